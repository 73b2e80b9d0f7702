"""How fast a model runs and what it takes: prefill and decode tokens per second, load time, peak memory."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from hlwq.devices import peak_memory
from hlwq.errors import HlwqError
from hlwq.evaluate.generation import Endpoint
from hlwq.evaluate.model import load_model, load_packed
from hlwq.sources import locate
from hlwq.transformers_models import quiet_transformers

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Speed:
    """Medians over runs, with the slowest and the fastest; batch 1, after a warm-up.

    Attributes:
        engine: what ran the model.
        prompt_tokens: of each run.
        new_tokens: of each run.
        runs: how many.
        prefill: prompt tokens per second: median, least, most.
        decode: new tokens per second after the first: median, least, most.
        load_seconds: until the model could be used; None for a server, which was up.
        peak_memory: bytes of this process; None for a server.
        device_memory: bytes of the GPU at its peak; None without one.
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


def speed(
    model: str | Path | Endpoint,
    *,
    prompt_tokens: int = 512,
    new_tokens: int = 64,
    runs: int = 3,
    device: str = "cpu",
    packed: bool = False,
    progress: Progress | None = None,
) -> Speed:
    """Measure a model in this process (transformers, decoded to bfloat16, or packed) or in a server.

    A server's prefill is timed by asking for a single token, its decoding by what more tokens take beyond that; each
    prompt is another one, so that none is served from a cache.

    Raises:
        HlwqError: an option is out of range, or the model or the server cannot be used.
    """
    if min(prompt_tokens, new_tokens - 1, runs) < 1:
        raise HlwqError("--prompt-tokens and --runs must be at least 1, and --new-tokens at least 2.")
    report = progress or (lambda done, total, item: None)
    report(0, runs + 1, "loading")
    started = time.monotonic()
    load_seconds = None
    if isinstance(model, Endpoint):
        if packed:
            raise HlwqError("--packed changes nothing in a server, which runs what it has loaded. Leave it out.")
        time_both, engine = _server_timer(model, prompt_tokens, new_tokens), f"server, {model.model}"
    else:
        loaded, tokenizer = (load_packed if packed else load_model)(locate(model), device)
        load_seconds = time.monotonic() - started
        time_both, engine = _local_timer(loaded, len(tokenizer), prompt_tokens, new_tokens), "transformers"
        engine += ", packed" if packed else ""
    times = []
    for run in range(runs + 1):
        report(run, runs + 1, "warming up" if run == 0 else f"run {run}")
        found = time_both(run)
        if run:
            times.append(found)
    report(runs + 1, runs + 1, "measured")
    cuda = load_seconds is not None and torch.device(device).type == "cuda"
    return Speed(
        engine=engine,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        runs=runs,
        prefill=_spread([prompt_tokens / prefill for prefill, _ in times]),
        decode=_spread([(new_tokens - 1) / decode for _, decode in times]),
        load_seconds=load_seconds,
        peak_memory=peak_memory() if load_seconds is not None else None,
        device_memory=torch.cuda.max_memory_allocated() if cuda else None,
    )


def _spread(values: list[float]) -> tuple[float, float, float]:
    return median(values), min(values), max(values)


def _local_timer(
    model: Any, vocabulary: int, prompt_tokens: int, new_tokens: int
) -> Callable[[int], tuple[float, float]]:
    """Seconds of prefill and of decoding, by greedy steps of a model in this process."""

    @torch.inference_mode()
    def measure(run: int) -> tuple[float, float]:
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
            return first - started, time.perf_counter() - first

    return measure


def _server_timer(endpoint: Endpoint, prompt_tokens: int, new_tokens: int) -> Callable[[int], tuple[float, float]]:
    """Seconds of prefill and of decoding, by two requests to a server."""

    def measure(run: int) -> tuple[float, float]:
        chooser = random.Random(run)
        times = []
        for count in (1, new_tokens):
            prompt = [chooser.randrange(100, 1000) for _ in range(prompt_tokens)]
            started = time.perf_counter()
            made = endpoint.complete(prompt, count)
            times.append(time.perf_counter() - started)
            if made != count:
                raise HlwqError(f"The server made {made} tokens instead of {count}. It ignores `ignore_eos`.")
        return times[0], max(times[1] - times[0], 1e-9)

    return measure
