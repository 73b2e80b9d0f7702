"""Calibration data: texts from files, the hub or Python itself, as token samples of one length."""

from __future__ import annotations

import json
import pydoc_data.topics
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hlwq.checkpoint import hash_file
from hlwq.errors import HlwqError

HUB_DEFAULT = "neuralmagic/LLM_compression_calibration"
EMBEDDED = "embedded"
"""Stands for the texts that every Python installation has: its reference documentation, some 460 KB of English."""
CHARACTERS_PER_TOKEN = 8
"""More than most texts have, so that a piece of so many characters per token fills a sample."""


@dataclass(frozen=True)
class Calibration:
    """Which data to calibrate on, and how it is run through the model.

    Attributes:
        sources: `.txt`, `.jsonl` or `.parquet` files, hub data sets, or `embedded`. Several contribute alike. Without
            any: the hub's `neuralmagic/LLM_compression_calibration`, or the embedded texts if it cannot be reached.
        samples: how many.
        sequence_length: tokens in a sample.
        seed: of the choice of texts.
        batch_size: samples that run through a layer together, whose activations are in memory at once; None for as
            many as 2 GB hold. With fewer than all, layers run several times.
        offload_activations: keep the inputs of the next layer on disk, inside `OUT.partial`, instead of in memory.
    """

    sources: tuple[str, ...] = ()
    samples: int = 512
    sequence_length: int = 512
    seed: int = 0
    batch_size: int | None = None
    offload_activations: bool = False

    def __post_init__(self) -> None:
        for name in ("samples", "sequence_length", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise HlwqError(f"--{name.replace('_', '-')} {value} must be at least 1.")


@dataclass(frozen=True)
class Samples:
    """Calibration data as a model takes it.

    Attributes:
        tokens: int64 (samples, sequence_length).
        origin: where they came from, with hashes, for `hlwq.json`.
        warning: what the user should know before the work; empty if nothing.
    """

    tokens: Tensor
    origin: dict[str, Any]
    warning: str = ""


def load_samples(calibration: Calibration, tokenizer: Any) -> Samples:
    """Read, choose, tokenize and pack calibration data.

    Documents are taken in an order that the seed decides; each contributes its first `sequence_length` tokens (and the
    rest, if there is too little otherwise), and they are packed without padding. Text files are cut into pieces first,
    so that the samples come from all over them.
    Chats (`messages` or `conversations`) go through the tokenizer's chat template.

    Raises:
        HlwqError: a source cannot be read or holds no text, or there is too little of it.
    """
    warning = ""
    sources = list(calibration.sources)
    if len(set(sources)) < len(sources):
        raise HlwqError("The same --calibration is named twice, which changes nothing. Name each once.")
    read: list[tuple[str, dict[str, Any], list[Any]]]
    if sources:
        read = [(source, *_read(source, calibration)) for source in sources]
    else:
        try:
            read = [(HUB_DEFAULT, *_from_hub(HUB_DEFAULT, calibration))]
        except HlwqError as error:
            warning = (
                f"calibrated on the reference documentation of Python, since {HUB_DEFAULT} could not be had: it is "
                f"English about one subject. Name better data with --calibration. ({error})"
            )
            read = [(EMBEDDED, *_embedded(calibration))]
    share, more = divmod(calibration.samples, len(read))
    if not share:
        raise HlwqError(f"--samples {calibration.samples} is fewer than the {len(read)} sources of --calibration.")
    parts = []
    for index, (source, _, documents) in enumerate(read):
        random.Random(calibration.seed).shuffle(documents)
        wanted = share + (index < more)
        parts.append(_packed(source, documents, tokenizer, wanted, calibration.sequence_length))
    tokens = torch.cat(parts)
    origin = {
        "sources": [{"source": source, **facts} for source, facts, _ in read],
        "samples": calibration.samples,
        "sequence_length": calibration.sequence_length,
        "seed": calibration.seed,
        "tokens_sha256": sha256(tokens.numpy().tobytes()).hexdigest(),
    }
    return Samples(tokens, origin, warning)


def _packed(source: str, documents: Iterable[Any], tokenizer: Any, wanted: int, length: int) -> Tensor:
    """Tokens (wanted, length): each document's first `length` tokens, then what is left of them, cut into rows."""
    needed, used = wanted * length, 0
    tokens: list[int] = []
    left: list[int] = []
    for document in documents:
        text, is_chat = _text_of(document, tokenizer, source)
        ids = tokenizer(text, add_special_tokens=not is_chat)["input_ids"]  # a template writes the special ones itself
        tokens += ids[:length]
        left += ids[length:]
        used += 1
        if len(tokens) >= needed:
            break
    tokens += left
    if len(tokens) < needed:
        raise HlwqError(
            f"--calibration {source} has {len(tokens):,} tokens in {used:,} texts, but {wanted} samples of {length} "
            f"need {needed:,}. Lower --samples or --sequence-length, or name more data."
        )
    return torch.tensor(tokens[:needed]).reshape(wanted, length)


def _text_of(document: Any, tokenizer: Any, source: str) -> tuple[str, bool]:
    """The text of a plain string or of a row of a data set, and whether a chat template wrote it."""
    if isinstance(document, str):
        return document, False
    row = document if isinstance(document, dict) else {}
    for key in ("messages", "conversations"):
        if row.get(key):
            messages = [_message(each) for each in row[key]]
            if getattr(tokenizer, "chat_template", None):
                return tokenizer.apply_chat_template(messages, tokenize=False), True
            return "\n".join(message["content"] for message in messages), False
    for key in ("text", "content"):
        if isinstance(row.get(key), str):
            return row[key], False
    found = f"a row has {', '.join(row)}" if row else f"a row is {document!r:.40}"
    raise HlwqError(
        f"--calibration {source}: rows need `messages` (or `conversations`) or `text` (or `content`), but {found}."
    )


def _message(message: dict[str, Any]) -> dict[str, str]:
    """A chat message in the usual spelling; ShareGPT says `from` and `value`."""
    roles = {"human": "user", "gpt": "assistant"}
    role = message.get("role") or roles.get(message.get("from", ""), message.get("from", "user"))
    return {"role": role, "content": message.get("content") or message.get("value") or ""}


def _read(source: str, calibration: Calibration) -> tuple[dict[str, Any], list[Any]]:
    """What identifies a source, and its documents."""
    path = Path(source).expanduser()
    if source == EMBEDDED:
        return _embedded(calibration)
    if path.suffix not in (".txt", ".jsonl", ".parquet"):
        if path.exists():
            raise HlwqError(f"--calibration {source} must be a .txt, .jsonl or .parquet file, or a hub data set.")
        return _from_hub(source, calibration)
    if not path.is_file():
        raise HlwqError(f"--calibration {source} does not exist.")
    facts = {"sha256": hash_file(path)}
    if path.suffix == ".parquet":
        try:
            return facts, list(_datasets().Dataset.from_parquet(str(path), keep_in_memory=True))
        except Exception as error:  # the library's own, of many kinds
            raise HlwqError(f"--calibration {source} cannot be read: {_first_line(error)}") from None
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise HlwqError(f"--calibration {source} is not a UTF-8 text file.") from None
    if path.suffix == ".txt":
        return facts, list(_pieces(text, calibration.sequence_length * CHARACTERS_PER_TOKEN))
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise HlwqError(f"--calibration {source}, line {number} is not valid JSON ({error}).") from None
    return facts, rows


def _embedded(calibration: Calibration) -> tuple[dict[str, Any], list[Any]]:
    text = "\n".join(pydoc_data.topics.topics[topic] for topic in sorted(pydoc_data.topics.topics))
    pieces = _pieces(text, calibration.sequence_length * CHARACTERS_PER_TOKEN)
    return {"sha256": sha256(text.encode()).hexdigest()}, list(pieces)


def _from_hub(name: str, calibration: Calibration) -> tuple[dict[str, Any], list[Any]]:
    """Rows of a hub data set's `train` split, or of its only split; no code of its own is ever run."""
    datasets = _datasets()
    try:
        builder = datasets.load_dataset_builder(name)
        splits = list(builder.info.splits or ["train"])
        split = "train" if "train" in splits or len(splits) > 1 else splits[0]
        data = datasets.load_dataset(name, split=split)
    except Exception as error:  # the library lets many through: of the network, of the hub, of the files
        raise HlwqError(
            f"--calibration {name} is no file here, and the hub did not give it: {_first_line(error)} "
            "Name a local file instead."
        ) from None
    # Only so many rows as could be needed: shuffled here, since a data set can be far larger than the memory.
    chosen = data.shuffle(seed=calibration.seed).select(range(min(len(data), 4 * calibration.samples)))
    return {"fingerprint": data._fingerprint}, list(chosen)


def _pieces(text: str, characters: int) -> Iterator[str]:
    """Cut a text at line ends into pieces of at least so many characters; a shorter rest goes with the last."""
    start = 0
    while start < len(text):
        end = text.find("\n", start + characters)
        if end < 0 or len(text) - end < characters:
            end = len(text)
        yield text[start:end]
        start = end + 1


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _datasets() -> Any:
    try:
        import datasets
    except ImportError:
        raise HlwqError("Calibration data of this kind needs datasets. Run: pip install 'hlwq[calibration]'") from None
    return datasets
