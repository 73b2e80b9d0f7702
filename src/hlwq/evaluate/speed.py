"""Speed and memory of a model: prefill and decode tokens per second, load time, peak memory."""

from __future__ import annotations

import gc
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import urlsplit

import torch

from hlwq.devices import device_peak, peak_memory, peak_of_process, reset_device_peak, torch_device
from hlwq.errors import RequestError, ResourceError
from hlwq.evaluate.generation import PACKED, TRANSFORMERS
from hlwq.evaluate.model import load_model, load_packed, longest_context
from hlwq.evaluate.server import Endpoint
from hlwq.sources import locate
from hlwq.transformers_models import quiet_transformers

Progress = Callable[[int, int, str], None]
PROMPT_TOKENS, NEW_TOKENS, RUNS = 512, 64, 3
"""Defaults of `speed`."""
STEADY = 1.5
"""The most that the fastest run may be faster than the slowest, if it is the model that the figure tells of."""
WARM, MOST_WARM_UPS = 1.2, 6
"""Two runs after each other this close are warm: nothing is compiled or read any more. So many are tried."""
ATTEMPTS = 5
"""Prompts for one run of a server that ends its answers early."""
WORDS = ("the", "of", "and", "to", "in", "is", "it", "that", "for", "was", "on", "are", "as", "with", "at", "be")
"""Words of about one token. Servers are timed on texts, since not all of them take tokens."""


@dataclass(frozen=True)
class Run:
    """Tokens per second of one run."""

    prefill: float
    decode: float


@dataclass(frozen=True)
class Speed:
    """Medians over runs, with the slowest and the fastest; batch 1, after warming up.

    Attributes:
        engine: the program that ran the model.
        prompt_tokens: tokens of each prompt; about as many for a server.
        new_tokens: tokens that each run generates; a server may end earlier, and is then timed on what it wrote.
        runs: number of runs.
        prefill: prompt tokens per second: median, least, most.
        decode: new tokens per second after the first: median, least, most.
        load_seconds: time until the model could be used; None for a server, which was up.
        peak_memory: bytes of this process, or of a server's on this machine; None if unknown.
        device_memory: peak bytes of this process on the GPU; None without one, and for a server.
    """

    engine: str
    prompt_tokens: int
    new_tokens: int
    runs: int
    prefill: tuple[float, float, float]
    decode: tuple[float, float, float]
    load_seconds: float | None
    peak_memory: int | None
    device_memory: int | None

    @property
    def unsteadiness(self) -> float:
        """How many times as fast as the slowest the fastest run was; above `STEADY` the machine was busy."""
        return max(most / least for _, least, most in (self.prefill, self.decode))


def engine_here(format_name: str) -> str | None:
    """The engine of this process that runs a format as it is stored, by its name in `Speed`; None if there is none.

    Other formats run in transformers with their codes decoded: that is the same arithmetic for all of them.
    """
    return {"dense": TRANSFORMERS, "hlwq": PACKED}.get(format_name)


def tells_of_format(engine: str, format_name: str) -> bool:
    """Whether a speed in an engine, as results name it, is that of a format and not of decoded weights."""
    if not engine.startswith(TRANSFORMERS):
        return True  # a server, which loaded the file
    return engine.startswith(PACKED) == (format_name == "hlwq") and format_name in ("dense", "hlwq")


def in_turn(models: Mapping[Path, bool], device: str, progress: Progress, *, rounds: int = RUNS) -> dict[Path, Speed]:
    """Measure several models in rounds, so that what else the machine does meets all of them alike.

    Each model of each round has a process of its own, whose memory is that of this model alone.

    Args:
        models: directories, and whether each runs packed.
        device: where they run.
        progress: told how many models are measured.
        rounds: how often each is measured.

    Returns:
        The figures of each model over the rounds.

    Raises:
        ResourceError: one cannot be measured.
    """
    measured: dict[Path, list[Speed]] = {path: [] for path in models}
    turns = [(number, path) for number in range(rounds) for path in models]
    for done, (number, path) in enumerate(turns):
        progress(done, len(turns), f"{path.name}: speed, round {number + 1}")
        arguments = json.dumps({"model": str(path), "device": device, "packed": models[path], "runs": 1})
        command = [sys.executable, "-c", _IN_ITS_PROCESS, arguments]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        if ended.returncode:
            said = ended.stderr.strip().splitlines() or ["it was killed"]
            raise ResourceError(f"The speed of {path} could not be measured: {said[-1][-300:]}", path=path)
        measured[path].append(Speed(**json.loads(ended.stdout.splitlines()[-1])))
    progress(len(turns), len(turns), "speed")
    return {path: _over_rounds(each) for path, each in measured.items() if each}


_IN_ITS_PROCESS = (
    "import json, sys; from dataclasses import asdict; from hlwq.evaluate.speed import speed; "
    "print(json.dumps(asdict(speed(**json.loads(sys.argv[1])))))"
)


def _over_rounds(rounds: Sequence[Speed]) -> Speed:
    """The medians of rounds of one run each, and the most memory of any."""

    def most(values: Iterable[Any]) -> Any:
        return max((value for value in values if value is not None), default=None)

    return replace(
        rounds[0],
        runs=len(rounds),
        prefill=_spread([each.prefill[0] for each in rounds]),
        decode=_spread([each.decode[0] for each in rounds]),
        load_seconds=median([each.load_seconds or 0.0 for each in rounds]),
        peak_memory=most(each.peak_memory for each in rounds),
        device_memory=most(each.device_memory for each in rounds),
    )


def speed(
    model: str | Path | Endpoint,
    *,
    prompt_tokens: int = PROMPT_TOKENS,
    new_tokens: int = NEW_TOKENS,
    runs: int = RUNS,
    device: str | None = None,
    packed: bool = False,
    progress: Progress | None = None,
) -> Speed:
    """Measure a model in this process (transformers, decoded to bfloat16, or packed) or in a server.

    A server's prefill is the time of a request for a single token, its decoding the time that a request for more takes
    beyond that; each prompt is new, so that none is served from a cache. Its memory is that of its processes, if it
    runs here.

    Args:
        model: a directory of any format, a hub id, a `.gguf` file, or a server.
        prompt_tokens: tokens of each prompt.
        new_tokens: tokens that each run generates.
        runs: number of runs, after warming up.
        device: where the model runs; by default a GPU if there is one.
        packed: run an hlwq directory on its codes instead of decoding it.
        progress: told how many runs are done.

    Raises:
        RequestError: an argument is out of range or changes nothing.
        HlwqError: the model or the server cannot be used.
    """
    if min(prompt_tokens, new_tokens - 1, runs) < 1:
        raise RequestError("`prompt_tokens` and `runs` must be at least 1, and `new_tokens` at least 2.")
    report = progress or (lambda done, total, item: None)
    report(0, runs + 1, "loading")
    load_seconds = None
    if isinstance(model, Endpoint):
        if packed:
            raise RequestError(
                "`packed=True` changes nothing in a server, which runs what it has loaded. Leave it out.",
                argument="packed",
            )
        measure, engine = _server_timer(model, prompt_tokens, new_tokens), model.engine
    else:
        target = torch_device(device)
        reset_device_peak(target)
        started = time.monotonic()
        loaded, tokenizer = (load_packed if packed else load_model)(locate(model), device)
        load_seconds = time.monotonic() - started
        longest, vocabulary = longest_context(loaded.config), loaded.get_input_embeddings().num_embeddings
        if longest is not None and prompt_tokens + new_tokens > longest:
            raise RequestError(
                f"`prompt_tokens` {prompt_tokens} and `new_tokens` {new_tokens} exceed the model's limit, {longest}."
            )
        measure = _local_timer(loaded, min(len(tokenizer), vocabulary), prompt_tokens, new_tokens)
        engine = PACKED if packed else TRANSFORMERS
    _warm_up(measure, lambda: report(0, runs + 1, "warming up"))
    times = []
    for run in range(1, runs + 1):
        report(run, runs + 1, f"run {run}")
        times.append(measure(run))
    report(runs + 1, runs + 1, "measured")
    return Speed(
        engine=engine,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        runs=runs,
        prefill=_spread([each.prefill for each in times]),
        decode=_spread([each.decode for each in times]),
        load_seconds=load_seconds,
        peak_memory=server_memory(model) if isinstance(model, Endpoint) else peak_memory(),
        device_memory=None if isinstance(model, Endpoint) else device_peak(torch_device(device)),
    )


def _warm_up(measure: Callable[[int], Run], report: Callable[[], None]) -> None:
    """Run until two runs take about as long: what compiles does so at the first of each kind of step."""
    report()
    before = measure(0)
    for _ in range(MOST_WARM_UPS - 1):
        report()
        now = measure(0)
        ratios = (now.prefill / before.prefill, now.decode / before.decode)
        if all(1 / WARM <= ratio <= WARM for ratio in ratios):
            return
        before = now


def _spread(values: Sequence[float]) -> tuple[float, float, float]:
    return median(values), min(values), max(values)


def _local_timer(model: Any, vocabulary: int, prompt_tokens: int, new_tokens: int) -> Callable[[int], Run]:
    """Timer of a model in this process, by greedy steps."""

    @torch.inference_mode()
    def measure(run: int) -> Run:
        generator = torch.Generator().manual_seed(run)
        tokens = torch.randint(vocabulary, (1, prompt_tokens), generator=generator).to(model.device)
        gc.collect()
        with quiet_transformers():
            started = time.perf_counter()
            outputs = model(input_ids=tokens, use_cache=True, logits_to_keep=1)
            chosen = int(outputs.logits[0, -1].argmax())  # waits for the device
            first = time.perf_counter()
            for _ in range(new_tokens - 1):
                step = torch.tensor([[chosen]], device=model.device)
                outputs = model(input_ids=step, past_key_values=outputs.past_key_values, use_cache=True)
                chosen = int(outputs.logits[0, -1].argmax())
            return Run(prompt_tokens / (first - started), (new_tokens - 1) / (time.perf_counter() - first))

    return measure


def _server_timer(endpoint: Endpoint, prompt_tokens: int, new_tokens: int) -> Callable[[int], Run]:
    """Timer of a server, by two requests: for a single token, and for more."""

    chooser = random.Random()  # with no seed: a server remembers the prompts of an earlier measurement too

    def measure(run: int) -> Run:
        for _ in range(ATTEMPTS):
            seconds, completed = [], []
            for count in (1, new_tokens):
                prompt = " ".join(chooser.choices(WORDS, k=prompt_tokens))
                started = time.perf_counter()
                length, new = endpoint.complete(prompt, count)
                seconds.append(time.perf_counter() - started)
                completed.append(new)
            if completed[1] > new_tokens // 2 and seconds[1] > seconds[0]:
                return Run(length / seconds[0], (completed[1] - 1) / (seconds[1] - seconds[0]))
        raise ResourceError(
            f"The server at {endpoint.url} wrote {completed[1]} tokens of {new_tokens} in {seconds[1]:.3f} s and one "
            f"in {seconds[0]:.3f} s, after {ATTEMPTS} attempts: that gives no speed. Change `new_tokens`.",
            argument="new_tokens",
        )

    return measure


def server_memory(endpoint: Endpoint) -> int | None:
    """Memory of a server's processes, each at its own peak, in bytes.

    Shared pages count once for each process. Where the system does not tell the peaks of other processes, their
    memory now counts. None for a server on another machine, and without psutil.
    """
    try:
        import psutil  # an extra
    except ImportError:
        return None
    if not endpoint.local:
        return None
    port = urlsplit(endpoint.url).port
    total = 0
    try:
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port and connection.pid:
                listener = psutil.Process(connection.pid)
                for process in {listener, *listener.children(recursive=True)}:
                    total += peak_of_process(process.pid) or process.memory_info().rss
                break
    except (psutil.Error, OSError):  # of another user, or gone
        return None
    return total or None
