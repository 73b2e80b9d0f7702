"""Distance of a quantized model's next-token distribution from the original's, token by token."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor, nn

from hlwq.cache import cached_tensor
from hlwq.decoded import DecodedCheckpoint
from hlwq.devices import compute_dtype, torch_device
from hlwq.errors import HlwqError, RequestError
from hlwq.evaluate.model import check_tokens, load_for_evaluation
from hlwq.evaluate.perplexity import Perplexity, check_loss, perplexity_of_losses, read_text, windows_of
from hlwq.evaluate.results import fingerprint
from hlwq.evaluate.server import Endpoint
from hlwq.evaluate.statistics import Estimate, mean_estimate, share_estimate
from hlwq.families import describe
from hlwq.sources import locate
from hlwq.transformers_models import build_skeleton, encode, load_tokenizer, quiet_transformers

ROWS = 256
"""Tokens whose distributions over the whole vocabulary are held at once."""
SERVER_TOP = 20
"""Log-probabilities per token that are requested of a server: the most that vLLM gives by default."""
CACHED_RUNS = 8
"""Runs of bases on texts that the cache holds: a few kilobytes per token each."""
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Divergence:
    """KL(base ‖ model) in nats, over the tokens of a text.

    Attributes:
        context: tokens in a chunk; chunks do not overlap, and each token but the first is predicted.
        tokens: predictions compared.
        mean: mean KL, with its interval over chunks.
        percentile_99: 99th percentile of the KL over tokens.
        top1_agreement: share of tokens whose likeliest successor is the same, with its interval over chunks.
        lower_bound: whether this is a lower bound of the KL, since a server gave the likeliest tokens alone.
        chunk_means: mean KL of each chunk.
        perplexity: perplexity of the model in the same run, by protocol `chunked`.
    """

    context: int
    tokens: int
    mean: Estimate
    percentile_99: float
    top1_agreement: Estimate
    lower_bound: bool
    chunk_means: tuple[float, ...]
    perplexity: Perplexity


def divergence(
    model: str | Path | Endpoint,
    against: str | Path,
    text: str | Path,
    *,
    context: int = 2048,
    limit: int | None = None,
    device: str | None = None,
    progress: Progress | None = None,
) -> Divergence:
    """Compare a model with the one it was made from.

    The base runs once for a text: its last hidden states are kept in the cache, a few kilobytes per token, and give its
    exact distributions by one product with its output head, whatever the vocabulary. Models run as for
    `perplexity`.

    Args:
        model: a directory of any format, a hub id, a `.gguf` file, or a server.
        against: the original.
        text: a UTF-8 file.
        context: tokens in a chunk.
        limit: most chunks to measure, from the start.
        device: where the models run; by default a GPU if there is one.
        progress: told how many bytes are hashed, then how many chunks are done.

    Raises:
        RequestError: the tokenizers or vocabularies differ, the text is too short, or an argument is out of range.
        HlwqError: a model or the text cannot be read.
    """
    base, words = locate(against), read_text(text)
    with quiet_transformers():
        ids = encode(load_tokenizer(base), words)
        if _tokens_of(model, words) not in (None, ids):
            raise RequestError(
                f"{model} was not made from {against}: their tokenizers cut the text differently.", argument="against"
            )
    chunks = windows_of(ids, context, context, limit)
    for path in (base, *([] if isinstance(model, Endpoint) else [locate(model)])):
        check_tokens(path, ids, context)
    report = progress or (lambda done, total, item: None)
    hidden = _base_states(base, chunks, device, report)
    logits = _head(base, torch_device(device), hidden.dtype)
    per_token, same, losses = [], [], []
    for index, predictions in enumerate(_predictions(model, chunks, device)):
        report(len(chunks) + index, 2 * len(chunks), "comparing")
        kl, agree, loss = _compare(hidden[index], logits, predictions, chunks[index][1:])
        per_token.append(kl)
        same.append(agree)
        losses.append(check_loss(loss, index))
        check_loss(float(kl.sum()) / len(kl), index)
    report(2 * len(chunks), 2 * len(chunks), "compared")
    means = tuple(float(each.mean()) for each in per_token)
    return Divergence(
        context=context,
        tokens=sum(len(each) for each in per_token),
        mean=mean_estimate(means),
        percentile_99=float(torch.cat(per_token).quantile(0.99)),
        top1_agreement=share_estimate([float(each.float().mean()) for each in same]),
        lower_bound=isinstance(model, Endpoint),
        chunk_means=means,
        perplexity=perplexity_of_losses(losses, context - 1, torch.tensor(ids), "chunked", context, context),
    )


class _Passed:
    """Hidden states as what a model without its head gives; of all else that such outputs have, None."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, place: int) -> Tensor:
        return self.last_hidden_state

    def __getattr__(self, name: str) -> None:
        return None


def _tokens_of(model: str | Path | Endpoint, text: str) -> list[int] | None:
    """A text by the model's own tokenizer, where it has one here."""
    if isinstance(model, Endpoint):
        return None
    try:
        return encode(load_tokenizer(locate(model)), text)
    except HlwqError:
        return None


def _compare(
    hidden: Tensor, logits: Callable[[Tensor], Tensor], predictions: Tensor | list[dict[int, float]], targets: list[int]
) -> tuple[Tensor, Tensor, float]:
    """KL and top-1 agreement, each (n,), and the model's mean loss in a chunk.

    Args:
        hidden: the base's last hidden states, (n, hidden).
        logits: the base's output head.
        predictions: see `_predictions`.
        targets: the tokens that are predicted.
    """
    kls, agreements, loss = [], [], 0.0
    for start in range(0, len(hidden), ROWS):
        rows = slice(start, start + ROWS)
        base = logits(hidden[rows]).float().log_softmax(-1)
        if isinstance(predictions, list):
            kl, likeliest = _partial_kl(base, predictions[rows])
            loss -= math.fsum(named[token] for named, token in zip(predictions[rows], targets[rows], strict=True))
        else:
            theirs = predictions[rows].to(base.device).float().log_softmax(-1)
            if theirs.shape[1] != base.shape[1]:
                raise RequestError(
                    f"The vocabularies differ: {theirs.shape[1]} tokens against the base's {base.shape[1]}.",
                    argument="against",
                )
            kl, likeliest = (base.exp() * (base - theirs)).sum(-1), theirs.argmax(-1)
            loss -= float(theirs.gather(-1, torch.tensor(targets[rows], device=base.device)[:, None]).sum())
        kls.append(kl.clamp(min=0).cpu())
        agreements.append((likeliest == base.argmax(-1)).cpu())
    return torch.cat(kls), torch.cat(agreements), loss / len(targets)


def _partial_kl(base: Tensor, predictions: list[dict[int, float]]) -> tuple[Tensor, Tensor]:
    """A lower bound of the KL: over the tokens that a server named, with all others counted as one token."""
    kls, likeliest = [], []
    for row, named in zip(base, predictions, strict=True):
        tokens = torch.tensor(list(named), device=base.device)
        theirs = torch.tensor(list(named.values()), device=base.device)
        ours = row[tokens]
        kl = (ours.exp() * (ours - theirs)).sum()
        rest, their_rest = 1 - ours.exp().sum(), 1 - theirs.exp().sum()
        if rest > 1e-6:
            kl = kl + rest * (rest.log() - their_rest.clamp(min=1e-6).log())
        kls.append(kl)
        likeliest.append(tokens[theirs.argmax()])
    return torch.stack(kls), torch.stack(likeliest)


@torch.inference_mode()
def _predictions(
    model: str | Path | Endpoint, chunks: list[list[int]], device: str | None
) -> Iterator[Tensor | list[dict[int, float]]]:
    """Predictions of each token but the first: logits (n, vocabulary), or log-probabilities of a server's likeliest."""
    if isinstance(model, Endpoint):
        for chunk in chunks:
            yield model.prompt_logprobs(chunk, SERVER_TOP)
        return
    loaded, _ = load_for_evaluation(locate(model), device)
    for chunk in chunks:
        with quiet_transformers():
            yield loaded(input_ids=torch.tensor([chunk[:-1]], device=loaded.device), use_cache=False).logits[0]


@torch.inference_mode()
def _base_states(base: Path, chunks: list[list[int]], device: str | None, report: Progress) -> Tensor:
    """The base's last hidden states, (chunks, n, hidden) in its compute dtype, from the cache or put there."""
    dtype = compute_dtype(torch_device(device))
    key = sha256(repr((fingerprint(base, report), chunks, str(dtype))).encode()).hexdigest()[:24]

    def run() -> Tensor:
        model, _ = load_for_evaluation(base, device)
        states = []
        for index, chunk in enumerate(chunks):
            report(index, 2 * len(chunks), "running the base")
            ids = torch.tensor([chunk[:-1]], device=model.device)
            with quiet_transformers():
                outputs = model.get_decoder()(input_ids=ids, use_cache=False)
            states.append(outputs.last_hidden_state[0].cpu())
        return torch.stack(states)

    return cached_tensor("hidden-states", key, run, keep=CACHED_RUNS)


def _head(base: Path, device: torch.device, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """What gives the base's logits, (n, vocabulary), of its last hidden states, (n, hidden), by the model's own code.

    Some models scale or bound them behind the output head.
    """
    checkpoint = DecodedCheckpoint(base)
    layout = describe(checkpoint.config, checkpoint.tensors)
    model = build_skeleton(checkpoint.config, tied=layout.tied, dtype=dtype)
    head = model.get_output_embeddings()
    for part in head.state_dict():
        values = checkpoint.read(f"{layout.head}.{part}").to(torch.bfloat16)
        setattr(head, part, nn.Parameter(values.to(device, dtype), requires_grad=False))
    # The hidden states come in where embeddings do, and pass by all that is before the head.
    model.base_model.forward = lambda **named: _Passed(named["inputs_embeds"])

    def logits(hidden: Tensor) -> Tensor:
        with quiet_transformers():
            given: Tensor = model(inputs_embeds=hidden[None].to(device), use_cache=False).logits[0]
        return given

    return logits
