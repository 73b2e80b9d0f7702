"""Recipes: what is done to each matrix, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import Field, dataclass, field, is_dataclass, replace
from typing import Any

from hlwq.bases import BASES, Basis, Hadamard, Identity
from hlwq.calibration.texts import MOST_GENERATED
from hlwq.errors import CheckpointError, HlwqError, RequestError
from hlwq.grids import GRIDS, Grid, LloydGrid, UniformGrid
from hlwq.options import options_of, recorded, several
from hlwq.solvers import SOLVERS, Gptq, Nearest, Solver

PARTS: dict[str, Mapping[str, type[Any]]] = {"grid": GRIDS, "basis": BASES, "solver": SOLVERS}
"""The parts of a stage, and what each can be."""


@dataclass(frozen=True)
class Stage:
    """One rounding of a matrix. In a chain, each stage gets the decoded result of the one before.

    Attributes:
        grid: the values to round to. Where its groups do not divide a matrix's in_features, the largest of 128, 64 and
            32 below their size that does is used for that matrix.
        basis: the coordinates to round in.
        solver: how codes are chosen.
    """

    grid: Grid
    basis: Basis = field(default_factory=Identity)
    solver: Solver = field(default_factory=Nearest)

    def __post_init__(self) -> None:
        for part, table in PARTS.items():
            if not is_dataclass(getattr(self, part)):
                kinds = ", ".join(kind.__name__ for kind in table.values())
                raise RequestError(f"`{part}` is {getattr(self, part)!r}; it must be an object such as {kinds} make.")
        if self.basis == Hadamard():  # of groups: those that cannot be rotated are refused, not replaced by others
            self.basis.fitted(self.grid.group_size, self.grid.group_size)

    @property
    def summary(self) -> str:
        """What it makes of a matrix, in a few words."""
        parts = (f"{self.grid.bits} bits", f"group {self.grid.group_size}", self.basis.summary)
        return ", ".join(filter(None, parts))

    def record(self) -> dict[str, Any]:
        """The stage as `hlwq.json` has it."""
        return {part: recorded(getattr(self, part)) for part in PARTS}

    @classmethod
    def recorded(cls, record: Mapping[str, Any]) -> Stage:
        """The stage that `record` gave.

        Raises:
            CheckpointError: it is none that this version knows.
        """
        try:
            parts = {part: dict(record[part]) for part in PARTS}
            return cls(**{part: PARTS[part][own.pop("name")](**own) for part, own in parts.items()})
        except (KeyError, TypeError, ValueError, HlwqError):
            raise CheckpointError(
                "hlwq.json was made by another version of hlwq, whose stages this one does not know."
            ) from None


@dataclass(frozen=True)
class Effort:
    """How long a recipe works for better codes.

    Attributes:
        changes: options of its last stage, by name.
        generated: samples that the model writes for each one of the texts, and at most.
    """

    changes: Mapping[str, Any]
    generated: tuple[int, int]


@dataclass(frozen=True)
class Recipe:
    """A chain of stages, and the formats it is usually written in, the default first.

    Attributes:
        name: as users write it.
        summary: what it does, in one line.
        stages: the chain.
        formats: names of formats.
        stages_in: other chains for some formats, by the format's name: those that hold better codes.
        generated: calibration samples that the model writes itself for each one of the texts, and at most.
        efforts: how it can be made to take less time or more, by name; `normal` is what it is.
    """

    name: str
    summary: str
    stages: tuple[Stage, ...]
    formats: tuple[str, ...]
    stages_in: Mapping[str, tuple[Stage, ...]] = field(default_factory=dict)
    generated: tuple[int, int] = (0, 0)
    efforts: Mapping[str, Effort] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "formats", several(self.formats))
        if not self.formats:
            raise RequestError(f"Recipe {self.name} names no format.")

    def in_format(self, name: str | None) -> Recipe:
        """The recipe as it is for a format, or for its default one."""
        stages = self.stages_in.get(self.formats[0] if name is None else name, self.stages)
        return replace(self, stages=stages, stages_in={})

    def with_effort(self, name: str) -> Recipe:
        """The recipe when it takes less time or more.

        Raises:
            RequestError: it has no such effort.
        """
        if name == "normal" and self.efforts:
            return self
        if name not in self.efforts:
            able = ", ".join(each.name for each in RECIPES.values() if each.efforts)
            raise RequestError(f"`effort={name!r}` changes nothing in recipe {self.name}; it is for {able}.")
        effort = self.efforts[name]
        return replace(changed(self, effort.changes), generated=effort.generated)

    @property
    def solver(self) -> Solver:
        """The solver of the last stage, the one that the file stores."""
        return self.stages[-1].solver if self.stages else Nearest()

    @property
    def calibrated(self) -> bool:
        """Whether it needs calibration data."""
        return bool(self.solver.needs)


_INT4 = Stage(UniformGrid(4, 64))
_INT4_128 = Stage(UniformGrid(4, 128))
_FOEM = Gptq(foem_beta=0.2)
_HLWQ5 = Stage(LloydGrid(5, 128), Hadamard())
_UNIFORM_FORMATS = ("gptq", "compressed-tensors", "mlx", "dense")
CALIBRATED = Gptq(gptaq_alpha=0.25)
"""What `calibrate` does: of GPTQ, FOEM and GPTAQ, what left the least loss over three seeds (see the README)."""
BEST = Gptq(mismatch=0.5, stream_change=0.5, damping=0.1, scale_candidates=8, sweeps=2)
"""What `best` does."""

RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            "best",
            "calibrated, 4 bits, group 64, rotated in compressed-tensors; HLWQ, 5 bits, in hlwq",
            (replace(_INT4, solver=BEST),),
            ("gptq", "compressed-tensors", "mlx", "hlwq", "dense"),
            {
                "compressed-tensors": (replace(_INT4, basis=Hadamard(), solver=BEST),),
                "hlwq": (replace(_HLWQ5, solver=BEST),),
            },
            generated=(2, MOST_GENERATED),
            efforts={
                "fast": Effort({"scale_candidates": 1, "sweeps": 0}, (0, 0)),
                "max": Effort({"sweeps": 4}, (4, 4 * MOST_GENERATED)),
            },
        ),
        Recipe("rtn", "round to nearest, 4 bits, group 64", (_INT4,), _UNIFORM_FORMATS),
        Recipe(
            "gptq",
            "GPTQ on calibration data, 4 bits, group 128",
            (replace(_INT4_128, solver=Gptq()),),
            _UNIFORM_FORMATS,
        ),
        Recipe("foem", "GPTQ with FOEM, 4 bits, group 128", (replace(_INT4_128, solver=_FOEM),), _UNIFORM_FORMATS),
        Recipe("hlwq-v7", "GPTQ with FOEM, 4 bits, group 64", (replace(_INT4, solver=_FOEM),), _UNIFORM_FORMATS),
        Recipe("hlwq", "HLWQ, 5 bits (2 to 8), group 128", (_HLWQ5,), ("hlwq", "dense")),
        Recipe("hlwq-mlx", "HLWQ 5 bits, decoded, then MLX 4 bits, group 64", (_HLWQ5, _INT4), ("mlx",)),
        Recipe(
            "hlwq-int4",
            "HLWQ 5 bits, decoded, then INT4, group 64",
            (_HLWQ5, _INT4),
            ("gptq", "compressed-tensors", "dense"),
        ),
        Recipe("hlwq-torchao", "HLWQ 5 bits, decoded, then torchao's INT4, group 128, at load", (_HLWQ5,), ("dense",)),
    )
}


def recipe_named(name: str) -> Recipe:
    """Look a recipe up.

    Raises:
        RequestError: there is none of that name.
    """
    if name not in RECIPES:
        raise RequestError(f"There is no recipe {name}. Recipes are: {', '.join(RECIPES)}.", argument="recipe")
    return RECIPES[name]


def stage_options() -> dict[str, Field[Any]]:
    """Every option of a grid, a basis or a solver, by name: what `changed` takes beside `basis` and `calibrate`."""
    kinds = [kind for table in PARTS.values() for kind in table.values()]
    return {name: each for kind in kinds for name, each in options_of(kind).items()}


def changed(recipe: Recipe, changes: Mapping[str, Any]) -> Recipe:
    """A recipe with options of its last stage, the one that the file stores, replaced.

    Args:
        recipe: what to change.
        changes: values by name. `basis` names another basis; `calibrate=True` takes GPTQ's loop with GPTAQ for a recipe
            that rounds to nearest; every other name is an option of a grid, a basis or a solver. None leaves it.

    Raises:
        TypeError: nothing has an option of that name.
        RequestError: an option would change nothing, or is out of range.
    """
    given = {name: value for name, value in changes.items() if value is not None}
    if unknown := given.keys() - stage_options().keys() - {"basis", "calibrate"}:
        raise TypeError(f"unknown option {min(unknown)!r}; options are {', '.join(sorted(stage_options()))}")
    if not given:
        return recipe
    if not recipe.stages:
        raise RequestError(f"`{min(given)}` changes nothing: recipe {recipe.name} rounds nothing.")
    parts: dict[str, Any] = {part: getattr(recipe.stages[-1], part) for part in PARTS}
    if "basis" in given:
        parts["basis"] = _basis_named(given.pop("basis"), parts["basis"])
    if "calibrate" in given:
        parts["solver"] = _calibrated(recipe, given.pop("calibrate"))
    for name, part in parts.items():
        parts[name] = replace(part, **{option: given.pop(option) for option in options_of(part) if option in given})
    for option in given:
        why = _why_idle(option, parts["grid"])
        raise RequestError(f"`{option}` changes nothing in recipe {recipe.name}: {why}")
    return replace(recipe, stages=(*recipe.stages[:-1], Stage(**parts)))


def _basis_named(name: str, present: Basis) -> Basis:
    if not isinstance(name, str) or name not in BASES:
        raise RequestError(f"There is no basis {name}. Bases are: {', '.join(BASES)}.", argument="basis")
    return present if present.name == name else BASES[name]()


def _calibrated(recipe: Recipe, calibrate: bool) -> Solver:
    if type(calibrate) is not bool:
        raise RequestError(f"`calibrate` is {calibrate!r}; it must be True or False.")
    if recipe.calibrated:
        if calibrate:
            raise RequestError(f"`calibrate=True` changes nothing: recipe {recipe.name} is calibrated.")
        raise RequestError(
            f"Recipe {recipe.name} is calibrated. Use rtn or hlwq to round to nearest.", argument="calibrate"
        )
    if calibrate and len(recipe.stages) > 1:
        raise RequestError(
            f"`calibrate=True` is for recipes that round once; {recipe.name} rounds twice. Use recipe hlwq-v7 for "
            "calibrated INT4, or hlwq with `calibrate=True` for calibrated HLWQ."
        )
    return CALIBRATED if calibrate else recipe.solver


def _why_idle(name: str, grid: Grid) -> str:
    """Why a stage on this grid has no option of a name that others have, and what to do."""
    owner = next(part for part, table in PARTS.items() if any(name in options_of(kind) for kind in table.values()))
    if owner == "solver":
        return "it is not calibrated. Add `calibrate=True`."
    if owner == "basis":
        return "its columns are not rotated. Add `basis='hadamard'`."
    return f"{grid.title} have no such option."
