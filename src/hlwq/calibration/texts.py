"""Calibration data: texts from files, the hub or Python itself, as token samples of one length."""

from __future__ import annotations

import pydoc_data.topics
import random
import stat
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hlwq.calibration.rows import COLUMNS, BadRow, Chat, parse_json, read_row, text_of, without_nulls
from hlwq.errors import CheckpointError, HlwqError, RequestError, ResourceError, reason
from hlwq.files import hash_file
from hlwq.options import check_types, option, several
from hlwq.transformers_models import encode

HUB_DEFAULT = "neuralmagic/LLM_compression_calibration"
EMBEDDED = "embedded"
"""Stands for the texts that every Python installation has: its reference documentation, some 460 KB of English."""
FILE_KINDS = (".txt", ".jsonl", ".parquet")
MOST_GENERATED = 128
"""Samples that a model writes unless more are asked for."""
CHARACTERS_PER_TOKEN = 8
"""More than most texts have, so that a piece of so many characters per token fills a sample."""


@dataclass(frozen=True)
class Calibration:
    """Which data to calibrate on, and how it is run through the model.

    Attributes:
        sources: `.txt`, `.jsonl` or `.parquet` files, hub data sets, or `embedded`. Several contribute alike. Without
            any: the hub's `neuralmagic/LLM_compression_calibration`, or the embedded texts if it cannot be reached.
        samples: the number of samples of these texts.
        sequence_length: tokens in a sample.
        seed: seed of the choice of texts.
        batch_size: samples that run through a layer together, whose activations are in memory at once; None for as
            many as 4 GB hold. With fewer than all, layers run several times.
        offload_activations: keep the inputs of the next layer on disk, inside `OUT.partial`, instead of in memory.
        generated_samples: samples beside those of the texts that the model writes itself; None for what
            `Plan.with_generated_samples` says.
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
        "Samples run together: more is faster and takes more memory (default: 4 GB).", default=None
    )
    offload_activations: bool = option("Keep samples on disk between layers, not in memory.", default=False)
    generated_samples: int | None = option(
        f"Samples that the model writes itself, besides (default: 0; recipe best: up to {MOST_GENERATED}).",
        default=None,
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "sources", several(self.sources))
        check_types(self)
        for name, least in (
            ("samples", 1),
            ("sequence_length", 1),
            ("batch_size", 1),
            ("seed", 0),
            ("generated_samples", 0),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise RequestError(f"`{name}` {value} must be at least {least}.")
        if len(set(self.sources)) < len(self.sources):
            raise _wrong("the same source is named twice, which changes nothing. Name each once.")
        for source in self.sources:
            if _kind(source) in FILE_KINDS:
                _check_file(source)


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
    so that the samples come from all over them. Chats (`messages` or `conversations`) go through the tokenizer's chat
    template whole, with their tools and documents. Rows that cannot be used are skipped, and the warning says so.

    Raises:
        RequestError: a source cannot be read, none of its rows can be used, or there is too little text.
        CheckpointError: the chat template is not valid.
        ResourceError: a package is missing, or the hub does not answer.
    """
    if not calibration.sources:
        _datasets()  # whose absence is no reason to do without the hub
        try:
            return load_samples(replace(calibration, sources=(HUB_DEFAULT,)), tokenizer)
        except (RequestError, ResourceError) as error:
            return _embedded_samples(calibration, tokenizer, error)
    share, more = divmod(calibration.samples, len(calibration.sources))
    if not share:
        raise RequestError(
            f"`samples` {calibration.samples} is fewer than the {len(calibration.sources)} sources of `sources`."
        )
    parts, facts, warnings = [], [], []
    for index, source in enumerate(calibration.sources):
        read = _read(source, calibration)
        name = Path(source).name if _kind(source) in FILE_KINDS else source
        facts.append({"source": name, **read.facts})
        parts.append(_packed(source, read, tokenizer, share + (index < more), calibration.sequence_length))
        if read.skipped:
            warnings.append(f"{source}: {read.told()}.")
    tokens = torch.cat(parts)
    origin = {
        "sources": facts,
        "samples": len(tokens),
        "sequence_length": calibration.sequence_length,
        "seed": calibration.seed,
        "tokens_sha256": sha256(tokens.numpy().tobytes()).hexdigest(),
    }
    return Samples(tokens, origin, " ".join(warnings))


def _embedded_samples(calibration: Calibration, tokenizer: Any, error: HlwqError) -> Samples:
    """As many of the samples wanted as the embedded texts give, with a warning."""
    text = "\n".join(pydoc_data.topics.topics.values())
    most = len(encode(tokenizer, text)) * 19 // 20 // calibration.sequence_length
    chosen = replace(calibration, sources=(EMBEDDED,), samples=max(1, min(calibration.samples, most)))
    warning = (
        f"calibrating on {chosen.samples} samples of Python's reference documentation, since the hub's data could not "
        f"be had. It is English about one subject: name better data with `sources`. ({error})"
    )
    return replace(load_samples(chosen, tokenizer), warning=warning)


def _packed(source: str, read: _Source, tokenizer: Any, wanted: int, length: int) -> Tensor:
    """Tokens (wanted, length): each document's first `length` tokens, then what is left of them, cut into rows.

    Rows that cannot be used are left out, and noted in `read.skipped`.
    """
    needed, used = wanted * length, 0
    tokens: list[int] = []
    left: list[int] = []
    for number, document in read.documents:
        try:
            ids = _tokens_of(document, tokenizer)
        except BadRow as error:
            read.skipped.append((number, str(error)))
            continue
        tokens += ids[:length]
        left += ids[length:]
        used += 1
        if len(tokens) >= needed:
            break
    tokens += left
    if not used:
        raise _wrong(f"{source} has nothing to calibrate on: {read.told() or 'it is empty'}.")
    if len(tokens) < needed:
        skipped = f" ({read.told()})" if read.skipped else ""
        raise _wrong(
            f"{source} has {len(tokens):,} tokens in {used:,} texts{skipped}, but {wanted} samples of {length} "
            f"need {needed:,}. Lower `samples` or `sequence_length`, or name more data."
        )
    return torch.tensor(tokens[:needed]).reshape(wanted, length)


def _tokens_of(document: str | Chat | BadRow, tokenizer: Any) -> list[int]:
    """The tokens of a text or a chat. Raises BadRow if there are none."""
    if isinstance(document, BadRow):
        raise document
    text, is_chat = text_of(document, tokenizer)
    try:
        ids = encode(tokenizer, text, add_special_tokens=not is_chat)  # a template writes the special ones itself
    except CheckpointError as error:
        raise BadRow(reason(error)) from None
    if not ids:
        raise BadRow("its text has no tokens")
    return ids


@dataclass
class _Source:
    """What a source holds.

    Attributes:
        facts: what identifies it.
        documents: what is in each row or piece, in the order of the seed, with its number in the source.
        unit: what the numbers count.
        skipped: numbers of those that cannot be used, with the reasons.
    """

    facts: dict[str, Any]
    documents: Iterable[tuple[int, str | Chat | BadRow]]
    unit: str
    skipped: list[tuple[int, str]] = field(default_factory=list)

    def told(self) -> str:
        """How many were skipped, and why the first; empty if none."""
        if not self.skipped:
            return ""
        number, why = min(self.skipped)
        rows = f"{len(self.skipped):,} row{'s' * (len(self.skipped) > 1)}"
        return f"{rows} skipped, the first at {self.unit} {number} ({why.rstrip('.')})"


def _read(source: str, calibration: Calibration) -> _Source:
    """Open a source. Raises HlwqError if it cannot be read."""
    if source == EMBEDDED:
        topics = pydoc_data.topics.topics
        text = "\n".join(topics[topic] for topic in sorted(topics))
        return _from_text(text, sha256(text.encode()).hexdigest(), calibration)
    path = _path(source)
    kind = _kind(source)
    if kind not in FILE_KINDS:
        if path.exists():
            raise _wrong(f"{source} must be a .txt, .jsonl or .parquet file, or a hub data set.")
        return _from_hub(source, calibration)
    _check_file(source)
    try:
        if kind == ".parquet":
            return _from_table(source, _datasets().Dataset.from_parquet(str(path)), hash_file(path), calibration)
        data = path.read_bytes()
    except HlwqError:
        raise
    except Exception as error:  # the library's own, of many kinds
        raise _wrong(f"{source} cannot be read: {reason(error)}.") from None
    digest = sha256(data).hexdigest()
    if not data.strip():
        raise _wrong(f"{source} is empty.")
    if kind == ".jsonl":
        return _from_lines(data, digest, calibration)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        place = len(data) - len(error.object) + error.start  # in the file: what is decoded is without the mark
        line = data.count(b"\n", 0, place) + 1
        raise _wrong(f"{source} is not a UTF-8 text file: byte {place}, in line {line}.") from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise _wrong(f"{source} is not a text file: line {line} has a NUL character.")
    return _from_text(text.replace("\r\n", "\n").replace("\r", "\n"), digest, calibration)


def _from_text(text: str, digest: str, calibration: Calibration) -> _Source:
    pieces = [(number, piece) for number, piece in enumerate(_pieces(text, calibration), 1) if piece.strip()]
    return _Source({"sha256": digest}, _shuffled(pieces, calibration), "piece")


def _from_lines(data: bytes, digest: str, calibration: Calibration) -> _Source:
    """The rows of a `.jsonl` file."""
    documents: list[tuple[int, str | Chat]] = []
    skipped: list[tuple[int, str]] = []
    for number, line in enumerate(data.split(b"\n"), 1):
        if not line.strip(b"\r\t \xef\xbb\xbf"):
            continue
        try:
            documents.append((number, read_row(parse_json(line.decode("utf-8-sig")))))
        except UnicodeDecodeError as error:
            place = len(line) - len(error.object) + error.start
            skipped.append((number, f"its byte {place} is not UTF-8"))
        except BadRow as error:
            skipped.append((number, str(error)))
    return _Source({"sha256": digest}, _shuffled(documents, calibration), "line", skipped)


def _from_table(source: str, data: Any, digest: str, calibration: Calibration) -> _Source:
    """The rows of a `datasets.Dataset`, read as they are needed."""
    columns = [name for name in COLUMNS if name in data.column_names]
    if not {"messages", "conversations", "text", "content"}.intersection(columns):
        present = ", ".join(data.column_names)
        raise _wrong(f"{source}: rows need messages (or conversations) or text (or content), but have {present}.")
    data = data.select_columns(columns)
    order = np.random.default_rng(calibration.seed).permutation(len(data))
    rows = ((int(index) + 1, _row(data, int(index))) for index in order)
    return _Source({"sha256": digest}, rows, "row")


def _row(table: Any, index: int) -> str | Chat | BadRow:
    """What is in a row of a table, or why it cannot be used."""
    try:
        return read_row({column: without_nulls(value) for column, value in table[index].items()})
    except BadRow as error:
        return error
    except Exception as error:  # the library's own, such as of a string that is not UTF-8
        return BadRow(f"it cannot be read: {reason(error)}")


def _from_hub(name: str, calibration: Calibration) -> _Source:
    """Rows of a hub data set's `train` split, or of its only split; no code of its own is ever run."""
    datasets = _datasets()
    try:
        builder = datasets.load_dataset_builder(name)
        splits = list(builder.info.splits or ["train"])
        data = datasets.load_dataset(name, split=splits[0] if len(splits) == 1 else "train")
    except Exception as error:  # the library lets many through: of the network, of the hub, of the files
        raise ResourceError(
            f"`sources` {name} is no file here, and the hub did not give it: {reason(error)}. "
            "Name a local file instead."
        ) from None
    read = _from_table(name, data, "", calibration)
    return replace(read, facts={"fingerprint": data._fingerprint})


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


def _kind(source: str) -> str:
    """The ending of a source's name, which tells files from hub data sets."""
    return Path(source).suffix.lower()


def _path(source: str) -> Path:
    try:
        return Path(source).expanduser()
    except RuntimeError as error:  # no such user
        raise _wrong(f"{source} cannot be read: {reason(error)}.") from None


def _check_file(source: str) -> None:
    """Raise RequestError unless a source is a file: reading a pipe or a device might never end."""
    path = _path(source)
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise _wrong(f"{source} does not exist.") from None
    except (OSError, ValueError) as error:
        raise _wrong(f"{source} cannot be read: {reason(error)}.") from None
    if not stat.S_ISREG(mode):
        raise _wrong(f"{source} is {'a directory' if stat.S_ISDIR(mode) else 'a pipe or a device'}, not a file.")


def _datasets() -> Any:
    try:
        import datasets
    except ImportError:
        raise ResourceError(
            "Calibration data from the hub, which is also the default, and .parquet files need datasets. Run: "
            "pip install 'hlwq[calibration]', or name a .txt or .jsonl file with `sources`."
        ) from None
    return datasets
