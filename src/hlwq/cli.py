"""The command `hlwq`: the library's functions with tables for people and JSON for machines."""

from __future__ import annotations

import json
import math
import os
import re
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer
from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column, Table

from hlwq.calibration import Calibration
from hlwq.check import CheckLine, check_directory
from hlwq.errors import HlwqError, HlwqWarning
from hlwq.evaluate.statistics import Estimate
from hlwq.families import FAMILIES
from hlwq.formats import READABLE_FORMATS
from hlwq.inspect import TensorReport
from hlwq.plan import Plan
from hlwq.quantize import Progress as Report
from hlwq.quantize import QuantizeResult, plan_for
from hlwq.quantize import convert as run_convert
from hlwq.quantize import quantize as run_quantize
from hlwq.recipes import RECIPES
from hlwq.usage import commands
from hlwq.version import __version__

if TYPE_CHECKING:
    from hlwq.evaluate.generation import Endpoint
    from hlwq.evaluate.humaneval import HumanEval

app = typer.Typer(
    name="hlwq",
    help="Turn a Hugging Face LLM into the best small checkpoint that vLLM, mlx-lm and transformers load as it is.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
evaluation = typer.Typer(help="Measure a model.", no_args_is_help=True)
app.add_typer(evaluation, name="eval")

# Where the width is unknown (a pipe, a log), tables get room for tensor names instead of 80 columns.
WIDTH = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 160
output = Console(width=WIDTH)
messages = Console(stderr=True)


class ScaleChoice(StrEnum):
    """`--scale`."""

    signed = "signed"
    absmax = "absmax"


class ProtocolChoice(StrEnum):
    """`--protocol`."""

    windowed = "windowed"
    chunked = "chunked"


class PromptingChoice(StrEnum):
    """`--prompting`."""

    auto = "auto"
    chat = "chat"
    completion = "completion"


Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Device = Annotated[str, typer.Option(help="Where to compute: cpu, cuda, mps.")]
DeviceHere = Annotated[str | None, typer.Option("--device", help="Where to compute: cpu (default), cuda, mps.")]
Bits = Annotated[int | None, typer.Option(help="Bits of a code in the file.")]
GroupSize = Annotated[int | None, typer.Option(help="Weights that share a scale or norm in the file.")]
Symmetric = Annotated[
    bool | None, typer.Option("--symmetric/--asymmetric", help="For uniform codes; by default as the format prefers.")
]
Scale = Annotated[
    ScaleChoice | None, typer.Option(help="Symmetric scales: signed full range (largest weight exact), or absmax.")
]


@app.command()
def quantize(
    source: Annotated[str, typer.Argument(help="A model directory, a hub id, or a .gguf file.")],
    out: Annotated[Path, typer.Argument(help="The directory to make.")],
    recipe: Annotated[str, typer.Option(help="See `hlwq recipes`.")],
    format: Annotated[str | None, typer.Option(help="See `hlwq formats`; by default the recipe's usual one.")] = None,
    bits: Bits = None,
    group_size: GroupSize = None,
    symmetric: Symmetric = None,
    scale: Scale = None,
    include_embeddings: Annotated[
        bool, typer.Option("--include-embeddings", help="Quantize the embedding and the output head too.")
    ] = False,
    include: Annotated[
        list[str] | None, typer.Option(help="Quantize modules matching this regular expression.")
    ] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Keep modules matching this regular expression.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Calibrate a recipe that rounds to nearest: GPTQ's loop with GPTAQ.")
    ] = False,
    calibration: Annotated[
        list[str] | None,
        typer.Option(help="A .txt, .jsonl or .parquet file or a hub data set to calibrate on; several mix."),
    ] = None,
    samples: Annotated[int | None, typer.Option(help="Calibration samples (default 512).")] = None,
    sequence_length: Annotated[int | None, typer.Option(help="Tokens in a sample (default 512).")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the choice of samples (default 0).")] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Samples run together: more is faster and takes more memory (default: 2 GB).")
    ] = None,
    offload_activations: Annotated[
        bool, typer.Option("--offload-activations", help="Keep samples on disk between layers, not in memory.")
    ] = False,
    desc_act: Annotated[
        bool, typer.Option("--desc-act", help="Groups by importance of columns. vLLM refuses it; GPTQModel does not.")
    ] = False,
    foem_beta: Annotated[float | None, typer.Option(help="FOEM's β: 0 to 1, 0.2 in foem and hlwq-v7.")] = None,
    gptaq_alpha: Annotated[float | None, typer.Option(help="GPTAQ's α: 0 to 1; 0.25 with --calibrate.")] = None,
    damping: Annotated[float | None, typer.Option(help="Share of its mean added to the Hessian's diagonal.")] = None,
    device: Device = "cpu",
    max_shard_size: Annotated[str, typer.Option(help="The most that one safetensors file holds.")] = "5GB",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and its cost; write nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Quantize a model into a new directory."""
    options: dict[str, Any] = dict(
        format=format,
        bits=bits,
        group_size=group_size,
        symmetric=symmetric,
        scale_method=scale.value if scale else None,
        include_embeddings=include_embeddings,
        include=include or (),
        exclude=exclude or (),
        revision=revision,
        calibrate=calibrate or None,
        desc_act=desc_act or None,
        foem_beta=foem_beta,
        gptaq_alpha=gptaq_alpha,
        damping=damping,
    )
    about_samples: dict[str, Any] = dict(
        sources=tuple(calibration or ()),
        samples=samples,
        sequence_length=sequence_length,
        seed=seed,
        batch_size=batch_size,
        offload_activations=offload_activations,
    )
    given = {name: value for name, value in about_samples.items() if value is not None and value is not False}
    chosen = Calibration(**given) if given.get("sources") or len(given) > 1 else None
    if dry_run:
        _, plan = plan_for(source, recipe, calibration=chosen, **options)
        _print_plan(plan, chosen, as_json)
        return
    shard_bytes = _bytes_of(max_shard_size)
    with _progress("quantizing") as report:
        result = run_quantize(
            source,
            out,
            recipe,
            calibration=chosen,
            device=device,
            shard_bytes=shard_bytes,
            progress=report,
            **options,
        )
    _print_result(result, as_json)


@app.command()
def convert(
    directory: Annotated[Path, typer.Argument(help="A quantized directory.")],
    out: Annotated[Path, typer.Argument(help="The directory to make.")],
    format: Annotated[str, typer.Option(help="What to write: gptq, mlx, compressed-tensors, dense.")],
    bits: Bits = None,
    group_size: GroupSize = None,
    symmetric: Symmetric = None,
    scale: Scale = None,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Turn an HLWQ checkpoint, or an older PolarQuant one, into another format, without the model it was made from."""
    with _progress("converting") as report:
        result = run_convert(
            directory,
            out,
            format,
            bits=bits,
            group_size=group_size,
            symmetric=symmetric,
            scale_method=scale.value if scale else None,
            device=device,
            progress=report,
        )
    _print_result(result, as_json)


@app.command()
def inspect(
    directory: Annotated[Path, typer.Argument(help="A model directory of any format.")],
    against: Annotated[str | None, typer.Option(help="The source it was made from: measures the errors anew.")] = None,
    all_tensors: Annotated[
        bool, typer.Option("--all", help="A row for each tensor, instead of one for the same tensor of all layers.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show what a directory holds, tensor by tensor and in all."""
    from hlwq.inspect import inspect as run_inspect

    with _progress("reading") as report:
        found = run_inspect(directory, against, progress=report)
    if as_json:
        _print_json(asdict(found))
        return
    rows: dict[tuple[str, str, str], list[TensorReport]] = {}
    for tensor in found.tensors:
        name = tensor.name if all_tensors else re.sub(r"\.(layers|blocks)\.\d+\.", r".\1.*.", tensor.name)
        stored = f"{tensor.bits} bits, group {tensor.group_size}" if tensor.bits else tensor.dtype
        key = (name.removesuffix(".weight"), "×".join(map(str, tensor.shape)), stored)
        rows.setdefault(key, []).append(tensor)
    table = Table(
        Column("tensor", overflow="fold"),
        Column("", justify="right"),
        "shape",
        "stored as",
        Column("bytes", justify="right"),
        "squared error",
        "output error",
    )
    for (name, shape, stored), tensors in rows.items():
        errors = [_range([tensor.relative_error for tensor in tensors]), _range([t.output_error for t in tensors])]
        nbytes = sum(tensor.nbytes for tensor in tensors)
        table.add_row(name, f"{len(tensors)} ×", shape, stored, f"{nbytes:,}", *errors)
    output.print(table)
    output.print("Errors are relative: ‖W − Ŵ‖²/‖W‖², and ‖(W − Ŵ)X‖²/‖WX‖² on the calibration data.", highlight=False)
    bits = found.bits_per_quantized_weight
    output.print(
        f"format {found.format}{f', recipe {found.recipe}' if found.recipe else ''}: {found.nbytes:,} bytes; "
        + (f"{bits:.3f} bits per quantized weight, " if bits else "nothing quantized, ")
        + f"{found.bits_per_parameter:.3f} bits per parameter"
    )


@app.command()
def check(
    directory: Annotated[Path, typer.Argument(help="A model directory of any format.")],
    as_json: Json = False,
) -> None:
    """Check what each engine demands of a directory. Exit status 1 if no engine would load it."""
    lines = check_directory(directory)
    if as_json:
        _print_json([asdict(line) for line in lines])
    else:
        _print_checks(lines)
    engines = {line.engine for line in lines}
    failing = {line.engine for line in lines if not line.passed}
    if engines == failing:
        raise typer.Exit(1)


Measured = Annotated[str, typer.Argument(help="A model directory of any format, a hub id, or a .gguf file.")]
Text = Annotated[Path, typer.Option(help="A UTF-8 text file, such as WikiText-2's raw test split.")]
ServerUrl = Annotated[
    str | None,
    typer.Option("--endpoint", help="Measure this server (http://127.0.0.1:8000/v1) instead of loading MODEL here."),
]


@evaluation.command("perplexity")
def eval_perplexity(
    model: Measured,
    text: Text,
    protocol: Annotated[ProtocolChoice, typer.Option(help="windowed (the cards') or chunked (GPTQ papers').")] = (
        ProtocolChoice.windowed
    ),
    context: Annotated[int, typer.Option(help="Tokens in a window or chunk.")] = 2048,
    stride: Annotated[
        int | None, typer.Option(help="For windowed: tokens scored per window (default 512, or half the context).")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many windows or chunks, from the start.")] = None,
    endpoint: ServerUrl = None,
    device: DeviceHere = None,
    as_json: Json = False,
) -> None:
    """Measure perplexity on a text."""
    from hlwq.evaluate.perplexity import perplexity
    from hlwq.evaluate.results import engine_of, perplexity_setting

    if protocol is ProtocolChoice.chunked and stride is not None:
        raise HlwqError("--stride changes nothing with --protocol chunked: chunks do not overlap.")
    step = min(512, max(1, context // 2)) if stride is None else stride
    subject, device = _subject(model, endpoint, device)
    with _progress("measuring") as report:
        result = perplexity(
            subject,
            text,
            tokenizer_of=model if endpoint else None,
            protocol=protocol.value,
            context=context,
            stride=step,
            limit=limit,
            device=device,
            progress=report,
        )
    setting = perplexity_setting(text, protocol.value, context, step, limit, engine_of(subject, device))
    _keep(model, "perplexity", setting, asdict(result), subject)
    if as_json:
        _print_json(asdict(result))
        return
    error = "one chunk, no standard error" if result.standard_error is None else f"± {result.standard_error:.3f}"
    windows = f"{result.context}-token {'windows' if protocol is ProtocolChoice.windowed else 'chunks'}"
    stride_note = f", stride {result.stride}" if protocol is ProtocolChoice.windowed else ""
    output.print(
        f"perplexity {result.perplexity:.4f} ({error}; standard error over {len(result.chunk_losses)} {windows})\n"
        f"protocol {result.protocol}{stride_note}; {result.tokens:,} tokens scored"
    )


@evaluation.command("divergence")
def eval_divergence(
    model: Measured,
    against: Annotated[str, typer.Option(help="The model that it was made from.")],
    text: Text,
    context: Annotated[int, typer.Option(min=2, help="Tokens in a chunk.")] = 2048,
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many chunks, from the start.")] = None,
    endpoint: ServerUrl = None,
    device: DeviceHere = None,
    as_json: Json = False,
) -> None:
    """Measure how far a model's predictions are from its original's: KL divergence and top-1 agreement."""
    from hlwq.evaluate.divergence import divergence
    from hlwq.evaluate.results import divergence_setting, engine_of
    from hlwq.sources import locate

    subject, device = _subject(model, endpoint, device)
    with _progress("measuring") as report:
        result = divergence(subject, against, text, context=context, limit=limit, device=device, progress=report)
    setting = divergence_setting(text, context, limit, engine_of(subject, device), locate(against))
    _keep(model, "divergence", setting, asdict(result), subject)
    if as_json:
        _print_json(asdict(result))
        return
    least = "at least " if result.lower_bound else ""
    output.print(
        f"KL(base ‖ model) {least}{_interval(result.mean, 4)} nats per token; "
        f"99th percentile {result.percentile_99:.4f}\n"
        f"top-1 agreement {_interval(result.top1_agreement, 4)}\n"
        f"{result.tokens:,} tokens; 95 % intervals over {result.mean.n} chunks of {result.context} tokens"
    )


Subject = Annotated[
    str | None,
    typer.Argument(help="A model directory of any format, or a hub id; with --endpoint, what that server serves."),
]


@evaluation.command("humaneval")
def eval_humaneval(
    model: Subject = None,
    endpoint: ServerUrl = None,
    canonical: Annotated[
        bool, typer.Option("--canonical", help="Test the data set's own solutions, which must all pass.")
    ] = False,
    prompting: Annotated[
        PromptingChoice, typer.Option(help="Continue the prompt, or ask in a chat; auto: a chat for chat models.")
    ] = PromptingChoice.auto,
    samples: Annotated[int, typer.Option(min=1, help="Programs per problem.")] = 1,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.0,
    k: Annotated[list[int] | None, typer.Option("--k", min=1, help="Which pass@k; 1 unless told.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Of an answer.")] = 512,
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many problems, from the first.")] = None,
    record: Annotated[
        Path | None,
        typer.Option(help="A JSON-lines file of programs, from which repeated runs go on (default: beside MODEL)."),
    ] = None,
    concurrency: Annotated[
        int | None, typer.Option(min=1, help="Requests to a server at the same time (default 8).")
    ] = None,
    unsafe: Annotated[
        bool, typer.Option("--unsafe", help="Run programs without a sandbox, where none can be had.")
    ] = False,
    device: DeviceHere = None,
    as_json: Json = False,
) -> None:
    """Measure HumanEval pass@1: a model writes programs, and each is tested in a sandbox of its own."""
    from hlwq.evaluate import humaneval as human_eval
    from hlwq.evaluate.generation import Endpoint, has_chat_template, transformers_generate
    from hlwq.evaluate.results import engine_of, fingerprint, humaneval_setting, record_of_programs
    from hlwq.evaluate.sandbox import run_program, run_unsafely
    from hlwq.sources import locate

    run = run_unsafely if unsafe else run_program
    if canonical:
        without = (model, endpoint, k, record, concurrency, device)
        if any(without) or (prompting, samples, temperature) != (PromptingChoice.auto, 1, 0.0):
            raise HlwqError("--canonical tests the data set's own solutions: only --limit and --unsafe change it.")
        with _progress("testing") as report:
            _print_humaneval(human_eval.canonical(limit, run=run, progress=report), as_json)
        return
    subject, device = _subject(model, endpoint, device)
    if concurrency is not None and not endpoint:
        raise HlwqError("--concurrency changes nothing without --endpoint: one answer is written at a time.")
    if prompting is PromptingChoice.auto:
        if model is None:
            raise HlwqError(
                "A server does not say what it serves. Name MODEL too, or add --prompting chat or completion."
            )
        prompting = PromptingChoice.chat if has_chat_template(model) else PromptingChoice.completion
    asked = "chat" if prompting is PromptingChoice.chat else "completion"
    setting = humaneval_setting(asked, samples, temperature, max_tokens, limit, engine_of(subject, device))
    checkpoint = locate(model) if model else None
    if record is None and checkpoint:
        record = record_of_programs(checkpoint, setting)
    with _progress("measuring") as report:
        report(0, 1, "loading the model")
        result = human_eval.humaneval(
            subject.generate if isinstance(subject, Endpoint) else transformers_generate(subject, device),
            prompting="chat" if prompting is PromptingChoice.chat else "completion",
            samples=samples,
            temperature=temperature,
            max_tokens=max_tokens,
            ks=k or (1,),
            limit=limit,
            record=record,
            model=fingerprint(checkpoint)[:16] if checkpoint else str(endpoint),
            concurrency=(concurrency or 8) if endpoint else 1,
            run=run,
            progress=report,
        )
    if model and not unsafe:
        _keep(model, "humaneval", setting, asdict(result), subject)
    _print_humaneval(result, as_json)


@evaluation.command("speed")
def eval_speed(
    model: Subject = None,
    endpoint: ServerUrl = None,
    prompt_tokens: Annotated[int, typer.Option(help="Of each run.")] = 512,
    new_tokens: Annotated[int, typer.Option(help="Of each run.")] = 64,
    runs: Annotated[int, typer.Option(help="After a warm-up.")] = 3,
    packed: Annotated[
        bool, typer.Option("--packed", help="Run an hlwq directory packed instead of decoding it.")
    ] = False,
    device: DeviceHere = None,
    as_json: Json = False,
) -> None:
    """Measure prefill and decode tokens per second, load time and peak memory."""
    from hlwq.evaluate.results import speed_engine, speed_setting
    from hlwq.evaluate.speed import speed

    subject, device = _subject(model, endpoint, device)
    with _progress("measuring") as report:
        result = speed(
            subject,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            runs=runs,
            device=device,
            packed=packed,
            progress=report,
        )
    if model:
        setting = speed_setting(prompt_tokens, new_tokens, runs, speed_engine(subject, device, packed))
        _keep(model, "speed", setting, asdict(result), subject)
    if as_json:
        _print_json(asdict(result))
        return
    for name, (middle, least, most) in (("prefill", result.prefill), ("decode", result.decode)):
        output.print(f"{name} {middle:.1f} tokens/s (median of {result.runs} runs; {least:.1f} to {most:.1f})")
    output.print(f"{result.engine}, batch 1, {result.prompt_tokens} prompt and {result.new_tokens} new tokens")
    if result.load_seconds is not None:
        output.print(f"loaded in {result.load_seconds:.1f} s")
    if result.peak_memory is not None:
        output.print(f"peak memory {decimal(result.peak_memory)}")
    if result.device_memory is not None:
        output.print(f"peak memory of the device {decimal(result.device_memory)}")


@app.command()
def compare(
    directories: Annotated[list[Path], typer.Argument(help="Checkpoints made from one model.")],
    base: Annotated[str, typer.Option(help="The model they were made from.")],
    text: Text,
    out: Annotated[Path, typer.Option(help="Where the report is written.")] = Path("report"),
    protocol: Annotated[ProtocolChoice, typer.Option(help="Of the perplexity.")] = ProtocolChoice.windowed,
    context: Annotated[int, typer.Option(help="Tokens in a window or chunk.")] = 2048,
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many windows or chunks, from the start.")] = None,
    humaneval: Annotated[
        PromptingChoice | None, typer.Option(help="Measure HumanEval too: chat or completion.")
    ] = None,
    no_speed: Annotated[bool, typer.Option("--no-speed", help="Leave speed and memory out.")] = False,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Measure checkpoints of one model and set them side by side: tables, charts and a page."""
    from hlwq.report.charts import check_charts
    from hlwq.report.compare import Protocols
    from hlwq.report.compare import compare as run_compare
    from hlwq.report.page import write_report

    if humaneval is PromptingChoice.auto:
        raise HlwqError("--humaneval auto could ask two checkpoints differently. Say chat or completion.")
    protocols = Protocols(
        text=text,
        protocol=protocol.value,
        context=context,
        stride=min(512, max(1, context // 2)),
        limit=limit,
        humaneval=None if humaneval is None else ("chat" if humaneval is PromptingChoice.chat else "completion"),
        speed=not no_speed,
        device=device,
    )
    check_charts()  # before hours of measuring
    with _progress("comparing") as report:
        rows = run_compare(directories, base, protocols, report)
    files = write_report(rows, protocols, Path(base).name, out)
    if as_json:
        _print_json([asdict(row) for row in rows])
        return
    table = Table("checkpoint", "perplexity", "loss above base (95 %)", "", "size", "bits/weight")
    for row in rows:
        table.add_row(
            row.name,
            f"{row.perplexity:.3f}",
            "" if row.loss_above_base is None else _interval(row.loss_above_base, 4),
            row.loss_verdict or "",
            decimal(row.nbytes),
            f"{row.bits_per_weight:.3f}" if row.bits_per_weight else "16",
        )
    output.print(table)
    output.print(f"{files[0]}: open it in a browser", soft_wrap=True, highlight=False)


@app.command()
def card(
    directory: Annotated[Path, typer.Argument(help="A checkpoint that `hlwq quantize` made.")],
    repository: Annotated[str | None, typer.Option(help="The hub id it will have.")] = None,
    report: Annotated[
        Path | None, typer.Option(help="What `hlwq compare` wrote: its table and charts go into the card.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a README.md that is there.")] = False,
) -> None:
    """Write a model card into a checkpoint, with what has been measured of it."""
    from hlwq.report.card import write_card

    file = write_card(directory, repository, report=report, overwrite=overwrite)
    output.print(f"{file}", soft_wrap=True, highlight=False)


@app.command()
def push(
    directory: Annotated[Path, typer.Argument(help="A checkpoint with a model card.")],
    repository: Annotated[str, typer.Argument(help="The hub id, such as me/Qwen3.5-9B-INT4.")],
    private: Annotated[bool, typer.Option("--private", help="Make the repository private.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what would be uploaded; upload nothing.")] = False,
) -> None:
    """Upload a checkpoint to the hub."""
    from hlwq.report.card import check_card, files_to_push
    from hlwq.report.card import push as run_push

    check_card(directory, repository)
    files = files_to_push(directory)
    if dry_run:
        for name, nbytes in files:
            output.print(f"{nbytes:>15,}  {escape(name)}", highlight=False, soft_wrap=True)
        output.print(f"{sum(nbytes for _, nbytes in files):>15,}  in all, to {repository}", highlight=False)
        return
    output.print(run_push(directory, repository, private=private), highlight=False)


@app.command()
def demo(
    out: Annotated[Path, typer.Argument(help="Where the checkpoints are left.")] = Path("hlwq-demo"),
    as_json: Json = False,
) -> None:
    """Quantize the bundled model with each recipe into each format, and measure them all."""
    from hlwq.demo import BASELINE, run_demo

    with _progress("demo") as report:
        rows = run_demo(out, report)
    if as_json:
        _print_json([asdict(row) for row in rows])
        return
    table = Table(
        "recipe", "format", "perplexity", "loss above BF16 (95 %)", "rel. squared error", "bits/weight", "bytes"
    )
    for row in rows:
        table.add_row(
            row.recipe,
            row.format,
            f"{row.perplexity:.3f} ± {row.standard_error:.3f}",
            ""
            if row.difference is None
            else f"{row.difference[0]:+.4f} [{row.difference[1]:+.4f}, {row.difference[2]:+.4f}]",
            "" if row.relative_error is None else f"{row.relative_error:.5f}",
            "" if row.bits_per_weight is None else f"{row.bits_per_weight:.3f}",
            f"{row.nbytes:,}",
        )
    output.print(table)
    output.print(
        f"Perplexity on held-out text: {rows[0].tokens:,} tokens, protocol {rows[0].protocol}, "
        f"context {rows[0].context}; ± is the standard error over chunks.\n"
        "Loss above BF16: nats per token, paired over the same chunks. "
        "Bits per weight: quantized matrices, all overhead."
    )
    output.print("\nTo run them:")
    for row in rows:
        if row.recipe != BASELINE:
            for engine, command in commands(Path(row.directory), row.format):
                output.print(f"  [dim]{engine:>12}[/dim]  {escape(command)}", soft_wrap=True, highlight=False)


@app.command()
def models(as_json: Json = False) -> None:
    """List the supported model families."""
    rows = [{"family": family.name, "architectures": list(family.architectures)} for family in FAMILIES]
    _print_rows(rows, as_json)


@app.command()
def recipes(as_json: Json = False) -> None:
    """List the recipes."""
    rows = [
        {"recipe": recipe.name, "what it does": recipe.summary, "formats (usual first)": list(recipe.formats)}
        for recipe in RECIPES.values()
    ]
    _print_rows(rows, as_json)


@app.command()
def formats(as_json: Json = False) -> None:
    """List the formats: engine × format × bits × symmetry."""
    rows = [
        {"engine": engine.name, "format": each.name, "bits": list(engine.bits), "symmetry": engine.symmetry}
        for each in READABLE_FORMATS.values()
        for engine in each.engines
    ]
    _print_rows(rows, as_json)


def _version(value: bool) -> None:
    if value:
        output.print(__version__)
        raise typer.Exit


@app.callback()
def _global_options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line: a user's mistake is one line on standard error and exit status 1."""
    warnings.showwarning = _show_warning
    try:
        app()
    except HlwqError as error:
        messages.print(f"[red]error:[/red] {escape(str(error))}", soft_wrap=True, highlight=False)
        sys.exit(1)
    except KeyboardInterrupt:
        messages.print(
            "interrupted; `quantize`, `convert` and `eval humaneval` go on where they stopped", highlight=False
        )
        sys.exit(130)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Our own warnings as one line, like errors; those of libraries not at all."""
    if issubclass(category, HlwqWarning):
        messages.print(f"[yellow]warning:[/yellow] {escape(str(message))}", soft_wrap=True, highlight=False)


def _subject(model: str | None, endpoint: str | None, device: str | None) -> tuple[str | Endpoint, str]:
    """What is measured, which is the server if there is one, and on which device."""
    from hlwq.evaluate.generation import Endpoint

    if not endpoint:
        if model is None:
            raise HlwqError("Name a MODEL, or a server with --endpoint.")
        return model, device or "cpu"
    if device:
        raise HlwqError(f"--device {device} changes nothing with --endpoint: the server computes where it was told to.")
    server = Endpoint(endpoint)
    if model and server.model and Path(server.model).name != Path(model).name:
        text = f"the server says that it serves {server.model}; the result is taken as {model}'s"
        warnings.warn(text, HlwqWarning, stacklevel=2)
    return server, "cpu"


def _keep(model: str, kind: str, setting: dict[str, Any], result: dict[str, Any], subject: str | Endpoint) -> None:
    """Leave a measurement where `compare` and `card` find it."""
    from hlwq.evaluate.results import keep
    from hlwq.sources import locate

    keep(locate(model), kind, setting, result, server=None if isinstance(subject, str) else subject)


def _print_humaneval(result: HumanEval, as_json: bool) -> None:
    if as_json:
        _print_json(asdict(result))
        return
    for count, estimate in result.pass_at.items():
        output.print(f"HumanEval pass@{count} {_interval(estimate, 4)}")
    if not result.max_tokens:
        output.print(f"{len(result.solved)} problems, the data set's own solutions; 95 % interval")
        return
    sampling = f"temperature {result.temperature:g}" if result.temperature else "greedy"
    output.print(
        f"{len(result.solved)} problems, {result.samples} programs each, prompting {result.prompting}, {sampling}, "
        f"at most {result.max_tokens} tokens; 95 % interval"
    )
    if result.unfinished:
        output.print(
            f"{result.unfinished} answers were still going on at their last token: see what more --max-tokens give."
        )


def _range(values: list[float | None]) -> str:
    """The least and the largest of some errors, where they are known."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    return f"{known[0]:.2g}" if len(known) == 1 else f"{min(known):.2g} … {max(known):.2g}"


def _interval(estimate: Estimate, digits: int) -> str:
    return f"{estimate.mean:.{digits}f} [{estimate.low:.{digits}f}, {estimate.high:.{digits}f}] (n = {estimate.n})"


def _bytes_of(size: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG])B", size.strip(), re.IGNORECASE)
    if not match:
        raise HlwqError(f"--max-shard-size {size} is not a size. Write it like 5GB or 500MB.")
    return int(float(match[1]) * {"K": 10**3, "M": 10**6, "G": 10**9}[match[2].upper()])


@contextmanager
def _progress(title: str) -> Iterator[Report]:
    """Progress with the time left, on standard error: a bar on a terminal, a line every half minute in a log."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.fields[item]}[/dim]"),
    )
    with Progress(*columns, console=messages, transient=True, disable=not messages.is_terminal) as bar:
        task = bar.add_task(title, total=None, item="")
        started = said = time.monotonic()

        def report(done: int, total: int, item: str) -> None:
            nonlocal said
            bar.update(task, completed=done, total=total, item=item)
            if bar.disable and time.monotonic() - said > 30:
                said = time.monotonic()
                left = f", about {(said - started) * (total - done) / done:.0f} s left" if done else ""
                text = f"{title}: {100 * done / total:.0f} %, {said - started:.0f} s{left} ({item})"
                messages.print(text, markup=False, highlight=False, soft_wrap=True)

        yield report


def _print_json(value: Any) -> None:
    print(json.dumps(_finite(value), indent=2, default=str, ensure_ascii=False))


def _finite(value: Any) -> Any:
    """The same with None for infinities, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _print_rows(rows: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        _print_json(rows)
        return
    table = Table(*rows[0])
    for row in rows:
        table.add_row(
            *(", ".join(map(str, value)) if isinstance(value, list) else str(value) for value in row.values())
        )
    output.print(table)


def _print_checks(lines: list[CheckLine]) -> None:
    table = Table("engine", "demand", "", "what to do")
    for line in lines:
        verdict = "[green]pass[/green]" if line.passed else "[red]fail[/red]"
        table.add_row(line.engine, line.requirement, verdict, escape(f"{line.detail} {line.remedy}".strip()))
    output.print(table)


def _plan_summary(plan: Plan) -> dict[str, Any]:
    per_weight, per_parameter = plan.bits_per_weight()
    return {
        "family": plan.layout.family.name,
        "recipe": plan.recipe.name,
        "format": plan.format.name,
        "output_bytes": plan.output_bytes(),
        "bits_per_quantized_weight": per_weight,
        "bits_per_parameter": per_parameter,
        "remarks": [*plan.remarks, *plan.warnings],
    }


def _print_plan(plan: Plan, calibration: Calibration | None, as_json: bool) -> None:
    summary = {**_plan_summary(plan), "peak_memory_estimate": plan.peak_memory(calibration)}
    if as_json:
        tensors = [
            {
                "name": tensor.spec.name,
                "shape": list(tensor.spec.shape),
                "action": tensor.action,
                "reason": tensor.reason,
                "stages": [{"basis": basis, **asdict(grid)} for grid, basis in tensor.steps],
                "outputs": [asdict(spec) for spec in tensor.outputs],
            }
            for tensor in plan.tensors
        ]
        _print_json({**summary, "tensors": tensors})
        return
    # The same matrix of all layers is one row, and so is what is kept for one reason.
    rows: dict[tuple[str, str, str, str], list[int]] = {}
    for tensor in plan.tensors:
        if tensor.action == "quantize":
            how = " → ".join(f"{grid.bits} bits, group {grid.group_size}" for grid, _ in tensor.steps)
            name = re.sub(r"\.layers\.\d+\.", ".layers.*.", tensor.spec.name)
            key: tuple[str, str, str, str] = (name, tensor.action, how, "×".join(map(str, tensor.spec.shape)))
        else:
            key = ("", tensor.action, tensor.reason, "")
        row = rows.setdefault(key, [0, 0])
        row[0] += 1
        row[1] += sum(spec.nbytes for spec in tensor.outputs)
    table = Table("action", "tensors", "how, or why not", "name", "shape", "bytes")
    for (name, action, how, shape), (count, nbytes) in sorted(rows.items(), key=lambda row: row[0][1] != "quantize"):
        table.add_row(action, str(count), how, name, shape, f"{nbytes:,}")
    output.print(table)
    output.print(
        f"{summary['family']}, recipe {summary['recipe']}, format {summary['format']}: "
        f"{summary['output_bytes']:,} bytes on disk, "
        f"{summary['bits_per_quantized_weight']:.3f} bits per quantized weight, "
        f"{summary['bits_per_parameter']:.3f} per parameter; "
        f"about {summary['peak_memory_estimate'] / 1e9:.1f} GB of memory"
    )
    for remark in plan.remarks:
        output.print(f"note: {remark}", highlight=False)
    for warning in plan.warnings:
        output.print(f"warning: {warning}", highlight=False)


def _print_result(result: QuantizeResult, as_json: bool) -> None:
    summary = {
        **_plan_summary(result.plan),
        "out": str(result.out),
        "file_bytes": result.nbytes,
        "seconds": result.seconds,
        "peak_memory": result.peak_memory,
        "relative_errors": result.relative_errors,
        "output_errors": result.output_errors,
        "checks": [asdict(line) for line in result.checks],
    }
    if as_json:
        _print_json(summary)
        return
    per_weight = summary["bits_per_quantized_weight"]
    worst = sorted(result.relative_errors.items(), key=lambda item: -item[1])[:3]
    if result.output_errors:
        _print_layers(result.output_errors)
    elif worst:
        table = Table("largest relative squared errors", "")
        for module, error in worst:
            table.add_row(module, f"{error:.4g}")
        output.print(table)
    for remark in result.plan.remarks:
        output.print(f"note: {remark}", highlight=False)
    for line in result.checks:
        if not line.passed:
            text = f"warning: {line.engine} would not load it; it wants: {line.requirement}. `hlwq check` says more."
            output.print(escape(text), highlight=False)
    output.print(
        f"{result.out}: format {result.plan.format.name}, {result.nbytes:,} bytes"
        + (f", {per_weight:.3f} bits per quantized weight" if per_weight else "")
        + f", {result.seconds:.1f} s, peak memory {result.peak_memory / 1e9:.2f} GB",
        soft_wrap=True,
    )
    failing = {line.engine for line in result.checks if not line.passed}
    for engine, command in commands(result.out, result.plan.format.name, without=failing):
        output.print(f"  {engine}: {escape(command)}", soft_wrap=True, highlight=False)


def _print_layers(output_errors: dict[str, float]) -> None:
    """The layers, that whose outputs changed most first."""
    layers: dict[str, dict[str, float]] = {}
    for module, error in output_errors.items():
        _, layer, name = re.split(r"(?<=layers)\.(\d+)\.", module)
        layers.setdefault(layer, {})[name] = error
    table = Table("layer", "largest relative output error", "in", "mean over its matrices")
    for layer, errors in sorted(layers.items(), key=lambda item: -max(item[1].values())):
        name, error = max(errors.items(), key=lambda item: item[1])
        table.add_row(layer, f"{error:.2e}", name, f"{sum(errors.values()) / len(errors):.2e}")
    output.print(table)
    output.print("Relative output error: ‖(W − Ŵ) X‖² / ‖W X‖² on the calibration data.", highlight=False)


if __name__ == "__main__":
    main()
