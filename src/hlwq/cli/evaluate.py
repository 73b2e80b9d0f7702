"""Measuring one model."""

from __future__ import annotations

import warnings
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.filesize import decimal

from hlwq.cli.options import Device, flag
from hlwq.cli.printing import Cells, Line, Output, interval, progress
from hlwq.devices import usual_device
from hlwq.errors import HlwqWarning, RequestError, ResourceError
from hlwq.evaluate import results
from hlwq.evaluate.generation import has_chat_template, transformers_generate
from hlwq.evaluate.server import Endpoint
from hlwq.files import write_whole
from hlwq.sources import locate

if TYPE_CHECKING:
    from hlwq.evaluate.humaneval import HumanEval

Protocol = Literal["windowed", "chunked"]
Prompting = Literal["auto", "chat", "completion"]
Measured = Annotated[str, typer.Argument(help="A model directory of any format, a hub id, or a .gguf file.")]
Subject = Annotated[
    str | None,
    typer.Argument(help="A model directory of any format, or a hub id; with --endpoint, what that server serves."),
]
Text = Annotated[Path, flag("A UTF-8 text file, such as WikiText-2's raw test split.")]
ServerUrl = Annotated[
    str | None,
    flag("Measure this server (http://127.0.0.1:8000/v1) instead of loading MODEL here.", "--endpoint"),
]
Limit = Annotated[int | None, flag("Only so many windows or chunks, from the start.", min=1)]


def perplexity(
    model: Measured,
    text: Text,
    protocol: Annotated[Protocol, flag("windowed (the cards') or chunked (GPTQ papers').")] = "windowed",
    context: Annotated[int, flag("Tokens in a window or chunk.")] = 2048,
    stride: Annotated[
        int | None, flag("For windowed: tokens scored per window (default 512, or half the context).")
    ] = None,
    limit: Limit = None,
    endpoint: ServerUrl = None,
    device: Device = None,
) -> Output:
    """Measure perplexity on a text."""
    from hlwq.evaluate.perplexity import default_stride, perplexity

    if protocol == "chunked" and stride is not None:
        raise RequestError("`stride` changes nothing with `protocol='chunked'`: chunks do not overlap.")
    stride = default_stride(context) if stride is None else stride
    how: dict[str, Any] = dict(protocol=protocol, context=context, stride=stride, limit=limit)
    subject, device = _subject(model, endpoint, device)
    tokenizer = model if endpoint else None
    with progress("measuring", "--limit makes it shorter.") as report:
        result = perplexity(subject, text, tokenizer_of=tokenizer, device=device, progress=report, **how)
    setting = results.perplexity_setting(text, engine=results.engine_of(subject, device), **how)
    error = "one chunk, no standard error" if result.standard_error is None else f"± {result.standard_error:.3f}"
    windows, stride_note = ("windows", f", stride {result.stride}") if protocol == "windowed" else ("chunks", "")
    chunks = f"{len(result.chunk_losses)} {result.context}-token {windows}"
    lines = [
        f"perplexity {result.perplexity:.4f} ({error}; standard error over {chunks})",
        f"protocol {result.protocol}{stride_note}; {result.tokens:,} tokens scored",
        setting["engine"],
    ]
    return Output(result, lines, afterwards=lambda: _keep(model, "perplexity", setting, result, subject))


def divergence(
    model: Measured,
    against: Annotated[str, flag("The model that it was made from.")],
    text: Text,
    context: Annotated[int, flag("Tokens in a chunk.", min=2)] = 2048,
    limit: Annotated[int | None, flag("Only so many chunks, from the start.", min=1)] = None,
    endpoint: ServerUrl = None,
    device: Device = None,
) -> Output:
    """Measure how far a model's predictions are from its original's: KL divergence and top-1 agreement."""
    from hlwq.evaluate.divergence import divergence

    subject, device = _subject(model, endpoint, device)
    with progress("measuring", "--limit makes it shorter.") as report:
        result = divergence(subject, against, text, context=context, limit=limit, device=device, progress=report)
    setting = results.divergence_setting(text, context, limit, results.engine_of(subject, device), locate(against))
    least = "at least " if result.lower_bound else ""
    lines = [
        f"KL(base ‖ model) {least}{interval(result.mean)} nats per token; 99th percentile {result.percentile_99:.4f}",
        f"top-1 agreement {interval(result.top1_agreement)}",
        f"{result.tokens:,} tokens; 95 % intervals over {result.mean.n} chunks of {result.context} tokens",
        setting["engine"],
    ]
    return Output(result, lines, afterwards=lambda: _keep(model, "divergence", setting, result, subject))


def humaneval(
    model: Subject = None,
    endpoint: ServerUrl = None,
    canonical: Annotated[bool, flag("Test the data set's own solutions, which must all pass.", "--canonical")] = False,
    prompting: Annotated[
        Prompting, flag("Continue the prompt, or ask in a chat; auto: a chat for chat models.")
    ] = "auto",
    samples: Annotated[int, flag("Programs per problem.", min=1)] = 1,
    temperature: Annotated[float, flag("0 is greedy.", min=0)] = 0.0,
    ks: Annotated[list[int] | None, flag("Which pass@k; 1 unless told.", "--k", min=1)] = None,
    max_tokens: Annotated[int, flag("Of an answer.", min=1)] = 512,
    limit: Annotated[int | None, flag("Only so many problems, from the first.", min=1)] = None,
    record: Annotated[
        Path | None,
        flag("A JSON-lines file of programs, from which repeated runs go on (default: beside MODEL)."),
    ] = None,
    concurrency: Annotated[int | None, flag("Requests to a server at the same time (default 8).", min=1)] = None,
    unsafe: Annotated[bool, flag("Run programs without a sandbox, where none can be had.", "--unsafe")] = False,
    device: Device = None,
) -> Output:
    """Measure HumanEval pass@1: a model writes programs, and each is tested in a sandbox of its own."""
    from hlwq.evaluate import humaneval as human_eval
    from hlwq.evaluate.sandbox import run_program, run_unsafely

    run = run_unsafely if unsafe else run_program
    if canonical:
        idle = (model, endpoint, ks, record, concurrency, device)
        if any(idle) or (prompting, samples, temperature) != ("auto", 1, 0.0):
            raise RequestError("--canonical tests the data set's own solutions: only --limit and --unsafe change it.")
        with progress("testing", "--limit makes it shorter.") as report:
            return _humaneval_output(human_eval.canonical(limit, run=run, progress=report))
    subject, device = _subject(model, endpoint, device)
    if concurrency is not None and not endpoint:
        raise RequestError("`concurrency` changes nothing without `endpoint`: one answer is written at a time.")
    if prompting == "auto":
        if model is None:
            remedy = "Name MODEL too, or add --prompting chat or completion."
            raise RequestError(f"A server does not say what it serves. {remedy}")
        prompting = "chat" if has_chat_template(model) else "completion"
    how: dict[str, Any] = dict(
        prompting=prompting, samples=samples, temperature=temperature, max_tokens=max_tokens, limit=limit
    )
    setting = results.humaneval_setting(engine=results.engine_of(subject, device), **how)
    checkpoint = locate(model) if model else None
    if record is None and checkpoint:
        record = results.record_of_programs(checkpoint, setting)
    with progress("measuring", "--limit makes it shorter.") as report:
        report(0, 1, "loading the model")
        result = human_eval.humaneval(
            subject.generate if isinstance(subject, Endpoint) else transformers_generate(subject, device),
            ks=ks or (1,),
            record=record,
            model=results.fingerprint(checkpoint)[:16] if checkpoint else str(endpoint),
            concurrency=(concurrency or 8) if endpoint else 1,
            run=run,
            progress=report,
            **how,
        )
    output = _humaneval_output(result)
    output = replace(output, lines=[*output.lines, setting["engine"]])
    if model is None or unsafe:
        return output
    checked = model
    return replace(output, afterwards=lambda: _keep(checked, "humaneval", setting, result, subject))


def speed(
    model: Subject = None,
    endpoint: ServerUrl = None,
    prompt_tokens: Annotated[int, flag("Of each run.")] = 512,
    new_tokens: Annotated[int, flag("Of each run.")] = 64,
    runs: Annotated[int, flag("After a warm-up.")] = 3,
    packed: Annotated[bool, flag("Run an hlwq directory packed instead of decoding it.", "--packed")] = False,
    device: Device = None,
) -> Output:
    """Measure prefill and decode tokens per second, load time and peak memory."""
    from hlwq.evaluate.speed import STEADY, speed

    how: dict[str, Any] = dict(prompt_tokens=prompt_tokens, new_tokens=new_tokens, runs=runs)
    subject, device = _subject(model, endpoint, device)
    with progress("measuring", "Fewer --runs make it shorter.") as report:
        result = speed(subject, device=device, packed=packed, progress=report, **how)
    lines = [
        f"{name} {middle:.1f} tokens/s (median of {result.runs} runs; {least:.1f} to {most:.1f})"
        for name, (middle, least, most) in (("prefill", result.prefill), ("decode", result.decode))
    ]
    lines.append(f"{result.engine}, batch 1, {result.prompt_tokens} prompt and {result.new_tokens} new tokens")
    if result.load_seconds is not None:
        lines.append(f"loaded in {result.load_seconds:.1f} s")
    if result.peak_memory is not None:
        lines.append(f"peak memory {decimal(result.peak_memory)}")
    if result.device_memory is not None:
        lines.append(f"peak memory of the device {decimal(result.device_memory)}")

    def keep() -> None:
        if result.unsteadiness > STEADY:
            raise ResourceError(
                f"The fastest run was {result.unsteadiness:.1f} times as fast as the slowest (at most {STEADY}): the "
                "machine was busy."
            )
        if model:
            setting = results.speed_setting(engine=results.speed_engine(subject, device, packed), **how)
            _keep(model, "speed", setting, result, subject)

    return Output(result, lines, afterwards=keep)


def experts(
    model: Annotated[str, typer.Argument(help="A mixture of experts, or a file that --trace left.")],
    text: Annotated[Path | None, flag("A UTF-8 text file to run.")] = None,
    context: Annotated[int | None, flag("Tokens in a chunk (default 2048).", min=2)] = None,
    limit: Limit = None,
    capacities: Annotated[
        list[int] | None, flag("Experts of each layer that fit (default: 1/8 to 3/4 of them).", "--capacity", min=1)
    ] = None,
    trace: Annotated[Path | None, flag("Keep which experts were used here (.safetensors).")] = None,
    chart: Annotated[Path | None, flag("Draw the hit rates here (.svg or .png).")] = None,
    device: Device = None,
) -> Output:
    """Record which experts the tokens of a text go to, and what caches of them would have there."""
    from hlwq.evaluate.experts import ExpertUse, expert_use

    if trace is not None and trace.suffix != ".safetensors":
        raise RequestError(f"`trace` {trace} must end in .safetensors.", argument="trace")
    if chart is not None:
        from hlwq.report.charts import check_charts, hit_rate_chart

        if chart.suffix not in (".svg", ".png"):
            raise RequestError(f"`chart` {chart} must end in .svg or .png.", argument="chart")
        check_charts()
    for file in filter(None, (trace, chart)):
        if not file.parent.is_dir():
            raise RequestError(f"{file.parent} is no folder, where {file.name} would be written.", path=file)
    with progress("measuring", "--limit makes it shorter.") as report:
        if model.endswith(".safetensors"):
            given = {"text": text, "context": context, "limit": limit, "trace": trace, "device": device}
            if idle := next((name for name, value in given.items() if value is not None), None):
                raise RequestError(f"`{idle}` changes nothing: {model} holds uses already.", argument=idle)
            use = ExpertUse.read(Path(model))
        elif text is None:
            raise RequestError("Name the `text` that the model is to run.", argument="text")
        else:
            use = expert_use(model, text, context=context or 2048, limit=limit, device=device, progress=report)
            if trace is not None:
                use.save(trace)
        rates = use.replay(capacities or (), report)
    if chart is not None:
        drawn = hit_rate_chart(rates)
        write_whole(chart, drawn.png if chart.suffix == ".png" else drawn.svg.encode())
    balance = use.balance()
    heads = "layer", "busiest expert, %", "evenness", "unused"
    spread = [[f"{b.layer}", f"{100 * b.busiest:.1f}", f"{b.entropy:.3f}", f"{b.unused}"] for b in balance]
    names = list(rates[0].rates)
    cells = [
        [
            f"{row.capacity} of {use.experts}",
            "" if row.nbytes is None else decimal(row.nbytes),
            *(f"{100 * row.rates[name]:.1f}" for name in names),
        ]
        for row in rates
    ]
    layers, tokens, each = use.uses.shape
    lines: list[Line] = [
        Cells(heads, spread, right=range(4)),
        Cells(("experts of each layer", "memory", *(f"{name}, %" for name in names)), cells, right=range(1, 6)),
        f"{tokens:,} tokens, each to {each} of {use.experts} experts in {layers} layers. Hit rates: uses that find "
        "their expert in a cache that is empty at first, token by token; belady knows what comes, and is the bound.",
    ]
    return Output({"balance": balance, "hit_rates": rates, "tokens": tokens}, lines)


def _subject(model: str | None, endpoint: str | None, device: str | None) -> tuple[str | Endpoint, str]:
    """What is measured, which is the server if there is one, and on which device."""
    if not endpoint:
        if model is None:
            raise RequestError("Name a MODEL, or a server with `endpoint`.")
        return model, device or usual_device()
    if device:
        text = f"`device={device!r}` changes nothing with `endpoint`: the server computes where it was told to."
        raise RequestError(text)
    server = Endpoint(endpoint)
    if model and server.model and Path(server.model).name != Path(model).name:
        text = f"the server says that it serves {server.model}; the result is taken as {model}'s"
        warnings.warn(text, HlwqWarning, stacklevel=2)
    return server, "cpu"


def _keep(model: str, kind: str, setting: dict[str, Any], result: Any, subject: str | Endpoint) -> None:
    """Leave a measurement where `compare` and `card` find it."""

    results.keep(locate(model), kind, setting, asdict(result), server=None if isinstance(subject, str) else subject)


def _humaneval_output(result: HumanEval) -> Output:
    lines = [f"HumanEval pass@{count} {interval(estimate)}" for count, estimate in result.pass_at.items()]
    solutions = "the data set's own solutions"
    if result.max_tokens:
        sampling = f"temperature {result.temperature:g}" if result.temperature else "greedy"
        programs = f"{result.samples} programs each, prompting {result.prompting}, {sampling}"
        solutions = f"{programs}, at most {result.max_tokens} tokens"
    lines.append(f"{len(result.solved)} problems, {solutions}; 95 % interval")
    if result.max_tokens and result.unfinished:
        going = f"{result.unfinished} answers were still going on at their last token"
        lines.append(f"{going}: see what more --max-tokens give.")
    return Output(result, lines)
