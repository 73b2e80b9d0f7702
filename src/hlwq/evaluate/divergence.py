"""How far a quantized model's next-token distribution is from the original's, token by token."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hlwq.decoded import DecodedCheckpoint
from hlwq.devices import compute_dtype, torch_device
from hlwq.errors import HlwqError
from hlwq.evaluate.generation import Endpoint
from hlwq.evaluate.model import load_for_evaluation
from hlwq.evaluate.perplexity import Perplexity, perplexity_of_losses, read_text, windows_of
from hlwq.evaluate.statistics import Estimate, mean_estimate, share_estimate
from hlwq.families import describe
from hlwq.sources import locate
from hlwq.transformers_models import load_tokenizer, quiet_transformers

ROWS = 256
"""Tokens whose distributions over the whole vocabulary are held at once."""
SERVER_TOP = 20
"""How many log-probabilities per token a server is asked for: the most that vLLM gives by default."""
CACHED_RUNS = 8
"""Of bases on texts: a few kilobytes per token each."""
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Divergence:
    """KL(base ‖ model) in nats, over the tokens of a text.

    Attributes:
        context: tokens in a chunk; chunks do not overlap, and each token but the first is predicted.
        tokens: predictions compared.
        mean: KL, with its interval over chunks.
        percentile_99: of the KL over tokens: how bad the bad ones are.
        top1_agreement: share of tokens whose likeliest successor is the same, with its interval over chunks.
        lower_bound: whether the KL is only known to be at least this, since a server gave the likeliest tokens alone.
        chunk_means: mean KL of each chunk.
        perplexity: of the model, by protocol `chunked`, which the same run gives.
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
    device: str = "cpu",
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
        limit: only so many chunks, from the start.
        device: where the models run.
        progress: told how many chunks are done.

    Raises:
        HlwqError: a model or the text cannot be read, the tokenizers or vocabularies differ, or the text is too short.
    """
    base, words = locate(against), read_text(text)
    with quiet_transformers():
        ids = load_tokenizer(base)(words)["input_ids"]
        if _tokens_of(model, words) not in (None, ids):
            raise HlwqError(f"{model} was not made from {against}: their tokenizers cut the text differently.")
    chunks = windows_of(ids, context, context, limit)
    report = progress or (lambda done, total, item: None)
    hidden = _base_states(base, chunks, device, report)
    head = _head(base).to(torch_device(device), hidden.dtype)
    per_token, same, losses = [], [], []
    for index, found in enumerate(_model_logprobs(model, chunks, device)):
        report(len(chunks) + index, 2 * len(chunks), "comparing")
        kl, agree, loss = _compare(hidden[index].to(head.device), head, found, chunks[index][1:])
        per_token.append(kl)
        same.append(agree)
        losses.append(loss)
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


def _tokens_of(model: str | Path | Endpoint, text: str) -> list[int] | None:
    """A text by the model's own tokenizer, where it has one here."""
    if isinstance(model, Endpoint):
        return None
    try:
        ids: list[int] = load_tokenizer(locate(model))(text)["input_ids"]
    except HlwqError:
        return None
    return ids


def _compare(
    hidden: Tensor, head: Tensor, found: Tensor | list[dict[int, float]], targets: list[int]
) -> tuple[Tensor, Tensor, float]:
    """KL and agreement of the likeliest token, each (n,), and the mean loss, of a chunk of states (n, hidden)."""
    kls, agreements, loss = [], [], 0.0
    for start in range(0, len(hidden), ROWS):
        rows = slice(start, start + ROWS)
        base = (hidden[rows] @ head.T).float().log_softmax(-1)
        if isinstance(found, list):
            kl, likeliest = _partial_kl(base, found[rows])
            loss -= math.fsum(named[token] for named, token in zip(found[rows], targets[rows], strict=True))
        else:
            theirs = found[rows].to(base.device).float().log_softmax(-1)
            if theirs.shape[1] != base.shape[1]:
                raise HlwqError(
                    f"The vocabularies differ: {theirs.shape[1]} tokens against the base's {base.shape[1]}."
                )
            kl, likeliest = (base.exp() * (base - theirs)).sum(-1), theirs.argmax(-1)
            loss -= float(theirs.gather(-1, torch.tensor(targets[rows], device=base.device)[:, None]).sum())
        kls.append(kl.clamp(min=0).cpu())
        agreements.append((likeliest == base.argmax(-1)).cpu())
    return torch.cat(kls), torch.cat(agreements), loss / len(targets)


def _partial_kl(base: Tensor, found: list[dict[int, float]]) -> tuple[Tensor, Tensor]:
    """KL over the tokens that a server named and all others as one, which the exact KL cannot be below."""
    kls, likeliest = [], []
    for row, named in zip(base, found, strict=True):
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
def _model_logprobs(
    model: str | Path | Endpoint, chunks: list[list[int]], device: str
) -> Iterator[Tensor | list[dict[int, float]]]:
    """What the model says of each token but the first: logits (n, vocabulary), or a server's likeliest tokens."""
    if isinstance(model, Endpoint):
        for chunk in chunks:
            yield model.prompt_logprobs(chunk, SERVER_TOP)
        return
    loaded, _ = load_for_evaluation(locate(model), device)
    for chunk in chunks:
        with quiet_transformers():
            yield loaded(input_ids=torch.tensor([chunk[:-1]], device=loaded.device), use_cache=False).logits[0]


@torch.inference_mode()
def _base_states(base: Path, chunks: list[list[int]], device: str, report: Progress) -> Tensor:
    """The base's last hidden states, (chunks, n, hidden) in the dtype it runs in, from the cache if they are there."""
    stamps = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(base.glob("*.safetensors"))]
    dtype = compute_dtype(torch_device(device))
    key = sha256(repr((str(base.resolve()), stamps, chunks, str(dtype))).encode()).hexdigest()[:24]
    folder = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface")) / "hlwq" / "hidden-states"
    file = folder / f"{key}.safetensors"
    with suppress(FileNotFoundError):
        hidden = load_file(file)["hidden"]
        with suppress(OSError):  # the cache may be another user's
            os.utime(file)  # the least recently used are removed first
        return hidden
    model, _ = load_for_evaluation(base, device)
    states = []
    for index, chunk in enumerate(chunks):
        report(index, 2 * len(chunks), "running the base")
        with quiet_transformers():
            outputs = model.get_decoder()(input_ids=torch.tensor([chunk[:-1]], device=model.device), use_cache=False)
        states.append(outputs.last_hidden_state[0].cpu())
    folder.mkdir(parents=True, exist_ok=True)
    hidden = torch.stack(states)
    partial = file.with_suffix(f".{os.getpid()}.partial")  # another process may be at the same
    save_file({"hidden": hidden}, partial)
    partial.rename(file)
    with suppress(FileNotFoundError):  # another process removes them too
        for old in sorted(folder.glob("*.safetensors"), key=lambda each: each.stat().st_mtime)[:-CACHED_RUNS]:
            old.unlink()
    return hidden


def _head(base: Path) -> Tensor:
    """The base's output head, bfloat16 (vocabulary, hidden)."""
    checkpoint = DecodedCheckpoint(base)
    layout = describe(checkpoint.config, checkpoint.tensors)
    name = f"{layout.embedding}.weight" if layout.tied else "lm_head.weight"
    return checkpoint.read(name).to(torch.bfloat16)
