"""Perplexity on a text, by two protocols that must never be mixed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from hlwq.errors import CheckpointError, RequestError
from hlwq.evaluate.model import check_tokens, load_for_evaluation
from hlwq.evaluate.server import Endpoint
from hlwq.evaluate.statistics import mean_estimate, standard_error
from hlwq.files import check_file, exists, expanded
from hlwq.sources import locate
from hlwq.transformers_models import encode, load_tokenizer, quiet_transformers

Protocol = Literal["windowed", "chunked"]
LARGEST_LOSS = 700.0
"""Nats per token; the exponential of more is no number."""


@dataclass(frozen=True)
class Perplexity:
    """A perplexity with its uncertainty.

    Attributes:
        protocol: `windowed` or `chunked`, see `perplexity`.
        context: tokens the model sees at once.
        stride: tokens between the starts of two windows; for `chunked`, the same as `context`.
        perplexity: exp of the mean negative log-likelihood over all scored tokens.
        standard_error: standard error of the perplexity over chunks (delta method); None for a single chunk.
        tokens: number of scored tokens.
        tokens_sha256: SHA-256 of all token ids of the text: results on different texts are never compared.
        chunk_losses: mean negative log-likelihood, in nats per token, of each chunk. All chunks score the same number
            of tokens, so their plain mean is the mean over tokens.
    """

    protocol: Protocol
    context: int
    stride: int
    perplexity: float
    standard_error: float | None
    tokens: int
    tokens_sha256: str
    chunk_losses: tuple[float, ...]


def perplexity(
    model: str | Path | Endpoint,
    text: str | Path,
    *,
    tokenizer_of: str | Path | None = None,
    protocol: Protocol = "windowed",
    context: int = 2048,
    stride: int | None = None,
    limit: int | None = None,
    device: str | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> Perplexity:
    """Measure a model's perplexity on a text file.

    `windowed`: windows of `context` tokens start every `stride` tokens and the last `stride` tokens of each are scored,
    in the first window too, so that every scored token has at least `context − stride` before it. `chunked`: chunks of
    `context` tokens that do not overlap; all tokens but each chunk's first are scored (the protocol of Frantar et al.,
    arXiv 2210.17323). Weights are in bfloat16 (run in float32 on a CPU without fast kernels for it), the log-softmax
    is in float32; the file is tokenized once, whole.

    Args:
        model: a directory of any format, a hub id, a `.gguf` file, or a server that gives log-probabilities of prompts.
        text: a UTF-8 file.
        tokenizer_of: the directory or hub id whose tokenizer a server's model has; for servers alone.
        protocol: `windowed` or `chunked`.
        context: tokens in a window or chunk.
        stride: tokens between the starts of two windows, for `windowed`; by default 512, or half the context if that is
            less.
        limit: most windows or chunks to measure, from the start.
        device: where the model runs; by default a GPU if there is one.
        progress: told how many chunks are done.

    Raises:
        RequestError: an argument is out of range, or the text is shorter than one window.
        HlwqError: the model or the text cannot be read.
    """
    contents = read_text(text)
    if progress:
        progress(0, 1, "loading the model")
    if isinstance(model, Endpoint):
        if tokenizer_of is None:
            raise RequestError(
                "A server does not say how it tokenizes. Name the model's directory too.", argument="tokenizer_of"
            )
        loaded, ids = model, _encode(locate(tokenizer_of), contents)
    else:
        path = locate(model)
        ids = _encode(path, contents)
        windows_of(ids, context, context, 1)
        check_tokens(path, ids, context)
        loaded, _ = load_for_evaluation(path, device)
    tokens = torch.tensor(ids)
    with quiet_transformers():
        return perplexity_of_tokens(
            loaded, tokens, protocol=protocol, context=context, stride=stride, limit=limit, progress=progress
        )


def _encode(path: Path, text: str) -> list[int]:
    with quiet_transformers():
        return encode(load_tokenizer(path), text)


def read_text(file: str | Path) -> str:
    """The text of a file, without a byte-order mark.

    Raises:
        RequestError: it does not exist.
        CheckpointError: it is not text in UTF-8, or empty.
    """
    path = expanded(file)
    if not exists(path):
        raise RequestError(f"`text={str(file)!r}` does not exist.", argument="text", path=file)
    check_file(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise CheckpointError(
            f"`text={str(file)!r}` is not a UTF-8 text file: byte {error.start} belongs to no character.",
            argument="text",
            path=file,
        ) from None
    if not text.strip():
        raise CheckpointError(f"`text={str(file)!r}` is empty.", argument="text", path=file)
    return text


def default_stride(context: int) -> int:
    """The stride of windows of so many tokens: 512, or half the context if that is less."""
    return min(512, max(1, context // 2))


def windows_of(tokens: Sequence[int], context: int, stride: int, limit: int | None = None) -> list[list[int]]:
    """Windows of `context` tokens that start every `stride` tokens; a shorter rest at the end is left out.

    Raises:
        RequestError: there are fewer tokens than one window holds, or an argument is out of range.
    """
    if context < 2 or (limit is not None and limit < 1):
        raise RequestError("`context` must be at least 2, and `limit` at least 1.")
    starts = range(0, len(tokens) - context + 1, stride)[:limit]
    if not starts:
        raise RequestError(
            f"The text has {len(tokens)} tokens, fewer than one window of {context}. Lower `context`.",
            argument="context",
        )
    return [list(tokens[start : start + context]) for start in starts]


def perplexity_of_tokens(
    model: Any,
    tokens: Tensor,
    *,
    protocol: Protocol = "windowed",
    context: int = 2048,
    stride: int | None = None,
    limit: int | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> Perplexity:
    """`perplexity` of a loaded model on token ids, int64 (n,).

    Raises:
        RequestError: an argument is out of range, or there are fewer tokens than one window holds.
    """
    if protocol not in ("windowed", "chunked"):
        raise RequestError(f"`protocol={protocol!r}` is unknown. Protocols are: windowed, chunked.")
    if context < 2:
        raise RequestError(f"`context` is {context}; it must be at least 2.")
    stride = default_stride(context) if stride is None else stride
    scored = stride
    if protocol == "chunked":
        stride, scored = context, context - 1
    elif not 0 < stride < context:
        raise RequestError(f"`stride={stride}` must be at least 1 and below `context={context}`.", argument="stride")
    windows = windows_of(tokens.tolist(), context, stride, limit)
    score = _server_loss if isinstance(model, Endpoint) else _loss
    losses = []
    for done, window in enumerate(windows):
        if progress:
            progress(done, len(windows), "chunks")
        losses.append(check_loss(score(model, window, scored), done))
    if progress:
        progress(len(windows), len(windows), "chunks")
    return perplexity_of_losses(losses, scored, tokens, protocol, context, stride)


def check_loss(loss: float, chunk: int) -> float:
    """A chunk's loss as it is. Raises CheckpointError if it is no finite number, or none that has a perplexity."""
    if not loss < LARGEST_LOSS:  # which a NaN is not either
        raise CheckpointError(
            f"The loss of chunk {chunk} is {loss:g}: the weights are damaged, or something overflows on the way. "
            "`hlwq check` looks at the weights."
        )
    return loss


def perplexity_of_losses(
    losses: Sequence[float], scored: int, tokens: Tensor, protocol: Protocol, context: int, stride: int
) -> Perplexity:
    """The perplexity that follows from each chunk's mean loss in nats, over `scored` tokens each."""
    mean = sum(losses) / len(losses)
    return Perplexity(
        protocol=protocol,
        context=context,
        stride=stride,
        perplexity=math.exp(mean),
        standard_error=math.exp(mean) * standard_error(losses) if len(losses) > 1 else None,
        tokens=scored * len(losses),
        tokens_sha256=sha256(tokens.numpy().tobytes()).hexdigest(),
        chunk_losses=tuple(losses),
    )


def paired_difference(a: Perplexity, b: Perplexity, confidence: float = 0.95) -> tuple[float, float, float]:
    """Mean loss of b minus that of a, paired by the chunks of one text.

    Pairing cancels the chunks' own difficulty, so the interval is far narrower than the two standard errors suggest.

    Returns:
        The mean difference in nats per token, and the ends of its confidence interval (Student's t over chunks).

    Raises:
        RequestError: the two were not measured by the same protocol on the same chunks, or on a single one.
    """
    if _protocol_of(a) != _protocol_of(b):
        raise RequestError("The two perplexities were not measured by the same protocol on the same text.")
    differences = [y - x for x, y in zip(a.chunk_losses, b.chunk_losses, strict=True)]
    if len(differences) < 2:
        raise RequestError("One chunk gives no interval. Raise `limit` or lower `context`.")
    estimate = mean_estimate(differences, confidence)
    return estimate.mean, estimate.low, estimate.high


def _protocol_of(result: Perplexity) -> tuple[object, ...]:
    return result.protocol, result.context, result.stride, result.tokens, result.tokens_sha256


@torch.inference_mode()
def _loss(model: Any, window: list[int], scored: int) -> float:
    """Mean negative log-likelihood, in nats, of the last `scored` tokens of a window."""
    tokens = torch.tensor(window, device=next(model.parameters()).device)
    logits = model(input_ids=tokens[None, :-1], use_cache=False, logits_to_keep=scored).logits[0]
    rows = zip(logits.split(256), tokens[-scored:].split(256), strict=True)  # the float32 copies can be large
    total = sum(float(torch.nn.functional.cross_entropy(x.float(), y, reduction="sum")) for x, y in rows)
    return total / scored


def _server_loss(endpoint: Endpoint, window: list[int], scored: int) -> float:
    """`_loss` by a server's log-probabilities."""
    rows = zip(endpoint.prompt_logprobs(window, 0)[-scored:], window[-scored:], strict=True)
    return -math.fsum(logprobs[token] for logprobs, token in rows) / scored
