"""What each engine demands of a directory, checked on the files as they lie there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from hlwq.containers import Reader, digest_of, what_is_not_finite
from hlwq.decoded import DecodedCheckpoint
from hlwq.errors import CheckpointError, UnsupportedError
from hlwq.families import ModelLayout, describe
from hlwq.files import expanded, is_file, is_folder
from hlwq.formats import Demand, demand
from hlwq.manifest import read_manifest

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")
ALL_ENGINES = "all engines"


def check_directory(path: str | Path, progress: Callable[[int, int, str], None] | None = None) -> list[Demand]:
    """Check a model directory against the engines that read its format, reading all of it.

    Args:
        path: a directory of any format.
        progress: told how many bytes of the weights are read.

    Returns:
        One line for each demand, engine by engine.

    Raises:
        CheckpointError: the directory is damaged.
        UnsupportedError: its format or architecture is not known.
    """
    directory = expanded(path)
    if not is_folder(directory):
        raise CheckpointError(f"{directory} is not a directory.", path=directory)
    reader = Reader(directory)
    decoded = DecodedCheckpoint(directory)
    layout = describe(decoded.config, decoded.tensors)
    lines = [_tokenizer(directory), _complete(decoded, layout), *_intact(reader, progress or (lambda *_: None))]
    lines += decoded.format.demands(reader, layout, decoded.format.stored_modules(reader))
    # What all engines demand is demanded by each.
    engines = dict.fromkeys(line.engine for line in lines if line.engine != ALL_ENGINES)
    return [
        replace(line, engine=engine) for engine in engines for line in lines if line.engine in (ALL_ENGINES, engine)
    ]


def refuse_unless_usable(lines: list[Demand]) -> None:
    """Raise UnsupportedError, which names the first demand that is not met, unless some engine's are all met."""
    engines = dict.fromkeys(line.engine for line in lines)
    if not any(all(line.passed for line in lines if line.engine == engine) for engine in engines):
        first = next(line for line in lines if not line.passed)
        raise UnsupportedError(
            f"No engine would load the result. {first.engine}: {first.requirement}: {first.detail} {first.remedy}"
        )


def has_tokenizer(path: Path) -> bool:
    """Whether a directory holds any of the files that tokenizers load from."""
    return any(is_file(path / name) for name in TOKENIZER_FILES)


def _tokenizer(path: Path) -> Demand:
    missing = [] if has_tokenizer(path) else ["none of " + ", ".join(TOKENIZER_FILES)]
    return demand(ALL_ENGINES, "a tokenizer lies beside the weights", missing, "Copy it from the original model.")


def _intact(reader: Reader, progress: Callable[[int, int, str], None]) -> list[Demand]:
    """Whether every value is a finite number, and what the directory's maker wrote, where it left checksums."""
    recorded = (read_manifest(reader.path) or {"sha256": {}})["sha256"]
    total, done = sum(spec.nbytes for spec in reader.tensors.values()), 0
    odd, damaged = [], [name for name in recorded if name not in reader.tensors]
    for name, spec in reader.tensors.items():
        progress(done, total, name)
        tensor = reader.read(name)
        if kind := what_is_not_finite(tensor):
            odd.append(f"{name} holds a value that is {kind}")
        if name in recorded and digest_of(tensor) != recorded[name]:
            damaged.append(name)
        done += spec.nbytes
    again = "Make it again, or download it again."
    lines = [demand(ALL_ENGINES, "every weight is a finite number", odd, again)]
    if recorded:
        lines.append(demand(ALL_ENGINES, "every tensor is as it was written", damaged, f"It is damaged. {again}"))
    return lines


def _complete(decoded: DecodedCheckpoint, layout: ModelLayout) -> Demand:
    wrong = [
        name
        for name, shape in layout.required_tensors().items()
        if name not in decoded.tensors or decoded.tensors[name].shape != shape
    ]
    requirement = "every tensor of the model is there, in its shape"
    return demand(ALL_ENGINES, requirement, wrong, "Quantize the original again.")
