"""What each engine demands of a directory, checked on the files as they lie there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from hlwq.containers import Reader
from hlwq.decoded import DecodedCheckpoint
from hlwq.errors import CheckpointError, UnsupportedError
from hlwq.families import ModelLayout, describe
from hlwq.formats import Demand, demand

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")
ALL_ENGINES = "all engines"


def check_directory(path: str | Path) -> list[Demand]:
    """Check a model directory against the engines that read its format.

    Args:
        path: a directory of any format.

    Returns:
        One line for each demand, engine by engine.

    Raises:
        CheckpointError: the directory is damaged.
        UnsupportedError: its format or architecture is not known.
    """
    directory = Path(path)
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is not a directory.", path=directory)
    reader = Reader(directory)
    decoded = DecodedCheckpoint(directory)
    layout = describe(decoded.config, decoded.tensors)
    lines = [_tokenizer(directory), _complete(decoded, layout)]
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
    return any((path / name).is_file() for name in TOKENIZER_FILES)


def _tokenizer(path: Path) -> Demand:
    missing = [] if has_tokenizer(path) else ["none of " + ", ".join(TOKENIZER_FILES)]
    return demand(ALL_ENGINES, "a tokenizer lies beside the weights", missing, "Copy it from the original model.")


def _complete(decoded: DecodedCheckpoint, layout: ModelLayout) -> Demand:
    wrong = [
        name
        for name, shape in layout.required_tensors().items()
        if name not in decoded.tensors or decoded.tensors[name].shape != shape
    ]
    requirement = "every tensor of the model is there, in its shape"
    return demand(ALL_ENGINES, requirement, wrong, "Quantize the original again.")
