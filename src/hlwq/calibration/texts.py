"""Calibration data: texts from files, the hub or Python itself, as token samples of one length."""

from __future__ import annotations

import json
import pydoc_data.topics
import random
from collections.abc import Iterable
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hlwq.errors import HlwqError, RequestError, ResourceError
from hlwq.files import hash_file
from hlwq.options import check_types, option, several

HUB_DEFAULT = "neuralmagic/LLM_compression_calibration"
EMBEDDED = "embedded"
"""Stands for the texts that every Python installation has: its reference documentation, some 460 KB of English."""
FILE_KINDS = (".txt", ".jsonl", ".parquet")
CHARACTERS_PER_TOKEN = 8
"""More than most texts have, so that a piece of so many characters per token fills a sample."""


@dataclass(frozen=True)
class Calibration:
    """Which data to calibrate on, and how it is run through the model.

    Attributes:
        sources: `.txt`, `.jsonl` or `.parquet` files, hub data sets, or `embedded`. Several contribute alike. Without
            any: the hub's `neuralmagic/LLM_compression_calibration`, or the embedded texts if it cannot be reached.
        samples: their number.
        sequence_length: tokens in a sample.
        seed: seed of the choice of texts.
        batch_size: samples that run through a layer together, whose activations are in memory at once; None for as
            many as 2 GB hold. With fewer than all, layers run several times.
        offload_activations: keep the inputs of the next layer on disk, inside `OUT.partial`, instead of in memory.
    """

    sources: tuple[str, ...] = option(
        "A .txt, .jsonl or .parquet file or a hub data set to calibrate on; several mix.",
        default=(),
        flag="--calibration",
    )
    samples: int = option("Calibration samples (default 512).", default=512)
    sequence_length: int = option("Tokens in a sample (default 512).", default=512)
    seed: int = option("Seed of the choice of samples (default 0).", default=0)
    batch_size: int | None = option(
        "Samples run together: more is faster and takes more memory (default: 2 GB).", default=None
    )
    offload_activations: bool = option("Keep samples on disk between layers, not in memory.", default=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sources", several(self.sources))
        check_types(self)
        for name, least in (("samples", 1), ("sequence_length", 1), ("batch_size", 1), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise RequestError(f"`{name}` {value} must be at least {least}.")
        if len(set(self.sources)) < len(self.sources):
            raise _wrong("the same source is named twice, which changes nothing. Name each once.")
        for source in self.sources:
            if Path(source).suffix in FILE_KINDS and not Path(source).expanduser().is_file():
                raise _wrong(f"{source} does not exist.")


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
        RequestError: a source cannot be read or holds no text, or there is too little of it.
        ResourceError: a package is missing, or the hub does not answer.
    """
    if not calibration.sources:
        _datasets()  # whose absence is no reason to do without the hub
        try:
            return load_samples(replace(calibration, sources=(HUB_DEFAULT,)), tokenizer)
        except HlwqError as error:
            return _embedded_samples(calibration, tokenizer, error)
    share, more = divmod(calibration.samples, len(calibration.sources))
    if not share:
        raise RequestError(
            f"`samples` {calibration.samples} is fewer than the {len(calibration.sources)} sources of `sources`."
        )
    parts, facts = [], []
    for index, source in enumerate(calibration.sources):
        identity, documents = _read(source, calibration)
        name = Path(source).name if Path(source).suffix in FILE_KINDS else source
        facts.append({"source": name, **identity})
        parts.append(_packed(source, documents, tokenizer, share + (index < more), calibration.sequence_length))
    tokens = torch.cat(parts)
    origin = {
        "sources": facts,
        "samples": len(tokens),
        "sequence_length": calibration.sequence_length,
        "seed": calibration.seed,
        "tokens_sha256": sha256(tokens.numpy().tobytes()).hexdigest(),
    }
    return Samples(tokens, origin)


def _embedded_samples(calibration: Calibration, tokenizer: Any, error: HlwqError) -> Samples:
    """As many of the samples wanted as the embedded texts give, with a warning."""
    text = "\n".join(pydoc_data.topics.topics.values())
    most = len(tokenizer(text)["input_ids"]) * 19 // 20 // calibration.sequence_length
    chosen = replace(calibration, sources=(EMBEDDED,), samples=max(1, min(calibration.samples, most)))
    warning = (
        f"calibrating on {chosen.samples} samples of Python's reference documentation, since the hub's data could not "
        f"be had. It is English about one subject: name better data with `sources`. ({error})"
    )
    return replace(load_samples(chosen, tokenizer), warning=warning)


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
        raise _wrong(
            f"{source} has {len(tokens):,} tokens in {used:,} texts, but {wanted} samples of {length} "
            f"need {needed:,}. Lower `samples` or `sequence_length`, or name more data."
        )
    return torch.tensor(tokens[:needed]).reshape(wanted, length)


def _text_of(document: Any, tokenizer: Any, source: str) -> tuple[str, bool]:
    """The text of a plain string or of a row of a data set, and whether a chat template wrote it."""
    if isinstance(document, str):
        return document, False
    row = document if isinstance(document, dict) else {}
    chat = row.get("messages") or row.get("conversations")
    if chat:
        try:
            messages = [_message(each) for each in chat]
        except (AttributeError, TypeError, KeyError):
            raise _wrong(f"{source}: a chat is not a list of messages with role and content.") from None
        if not getattr(tokenizer, "chat_template", None):
            return "\n".join(message["content"] for message in messages), False
        try:
            return tokenizer.apply_chat_template(messages, tokenize=False), True
        except Exception as error:  # a template raises what it likes
            raise _wrong(
                f"{source}: the model's chat template refuses a chat: {_first_line(error)}. "
                "Remove such rows, or give rows with text."
            ) from None
    for key in ("text", "content"):
        if isinstance(row.get(key), str):
            return row[key], False
    present = f"a row has {', '.join(row)}" if row else f"a row is {document!r:.40}"
    raise _wrong(f"{source}: rows need messages (or conversations) or text (or content), but {present}.")


def _message(message: dict[str, Any]) -> dict[str, str]:
    """A chat message in the usual spelling, its text parts joined; ShareGPT says `from` and `value`."""
    roles = {"human": "user", "gpt": "assistant"}
    role = message["role"] if "role" in message else roles.get(message["from"], message["from"])
    content = message["content"] if "content" in message else message["value"]
    if isinstance(content, list):
        content = "\n".join(part["text"] for part in content if part.get("type") == "text")
    return {"role": role, "content": "" if content is None else content + ""}


def _read(source: str, calibration: Calibration) -> tuple[dict[str, Any], Iterable[Any]]:
    """What identifies a source, and its documents in the order of the seed."""
    path = Path(source).expanduser()
    if source == EMBEDDED:
        topics = pydoc_data.topics.topics
        text = "\n".join(topics[topic] for topic in sorted(topics))
        return {"sha256": sha256(text.encode()).hexdigest()}, _shuffled(_pieces(text, calibration), calibration)
    if path.suffix not in FILE_KINDS:
        if path.exists():
            raise _wrong(f"{source} must be a .txt, .jsonl or .parquet file, or a hub data set.")
        return _from_hub(source, calibration)
    facts = {"sha256": hash_file(path)}
    if path.suffix == ".parquet":
        try:
            return facts, _datasets().Dataset.from_parquet(str(path)).shuffle(seed=calibration.seed)
        except Exception as error:  # the library's own, of many kinds
            raise _wrong(f"{source} cannot be read: {_first_line(error)}") from None
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise _wrong(f"{source} is not a UTF-8 text file.") from None
    if path.suffix == ".txt":
        return facts, _shuffled(_pieces(text, calibration), calibration)
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise _wrong(f"{source}, line {number} is not valid JSON ({error}).") from None
    return facts, _shuffled(rows, calibration)


def _from_hub(name: str, calibration: Calibration) -> tuple[dict[str, Any], Iterable[Any]]:
    """Rows of a hub data set's `train` split, or of its only split; no code of its own is ever run."""
    datasets = _datasets()
    try:
        builder = datasets.load_dataset_builder(name)
        splits = list(builder.info.splits or ["train"])
        data = datasets.load_dataset(name, split=splits[0] if len(splits) == 1 else "train")
        return {"fingerprint": data._fingerprint}, data.shuffle(seed=calibration.seed)
    except Exception as error:  # the library lets many through: of the network, of the hub, of the files
        raise ResourceError(
            f"`sources` {name} is no file here, and the hub did not give it: {_first_line(error)} "
            "Name a local file instead."
        ) from None


def _pieces(text: str, calibration: Calibration) -> list[str]:
    """Cut a text at line ends into pieces that fill a sample each; a shorter rest goes with the last."""
    characters = calibration.sequence_length * CHARACTERS_PER_TOKEN
    pieces, start = [], 0
    while start < len(text):
        end = text.find("\n", start + characters)
        if end < 0 or len(text) - end < characters:
            end = len(text)
        pieces.append(text[start:end])
        start = end + 1
    return pieces


def _shuffled(documents: list[Any], calibration: Calibration) -> list[Any]:
    return random.Random(calibration.seed).sample(documents, len(documents))


def _wrong(message: str) -> RequestError:
    return RequestError(f"`sources` {message}")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _datasets() -> Any:
    try:
        import datasets
    except ImportError:
        raise ResourceError(
            "Calibration data from the hub, which is also the default, and .parquet files need datasets. Run: "
            "pip install 'hlwq[calibration]', or name a .txt or .jsonl file with `sources`."
        ) from None
    return datasets
