"""Requests: what was asked of `quantize`, whether from Python or from the command line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from math import isfinite
from numbers import Real
from pathlib import Path
from typing import Any, Literal

from hlwq.calibration import Calibration
from hlwq.errors import RequestError
from hlwq.options import bytes_of, check_types, option, several
from hlwq.recipes import Recipe, changed, recipe_named, stage_options

USUAL_RECIPE = "best"
"""The recipe that is used unless another is named."""


@dataclass(frozen=True)
class Selection:
    """Which matrices are quantized beside, or instead of, those that the family usually has quantized.

    Attributes:
        include_embeddings: the embedding, and the output head if it is a matrix of its own, too; None for what the
            format's engines expect (formats mlx and hlwq include them).
        include: regular expressions; modules kept by default that match are quantized.
        exclude: regular expressions; modules that match are kept.
    """

    include_embeddings: bool | None = option(
        "Quantize the embedding and the output head, or not; formats mlx and hlwq do by default.",
        default=None,
        flag="--include-embeddings/--no-include-embeddings",
    )
    include: tuple[str, ...] = option("Quantize modules matching this regular expression.", default=())
    exclude: tuple[str, ...] = option("Keep modules matching this regular expression.", default=())

    def __post_init__(self) -> None:
        object.__setattr__(self, "include", several(self.include))
        object.__setattr__(self, "exclude", several(self.exclude))
        check_types(self)


@dataclass(frozen=True)
class Budget:
    """What codes may cost where each matrix has its own width: one of the two.

    Attributes:
        bits: mean bits of a code.
        nbytes: bytes of the weight files.
    """

    bits: float | None = None
    nbytes: int | None = None

    @property
    def argument(self) -> str:
        """The argument that says it."""
        return "size" if self.bits is None else "bits"

    @property
    def words(self) -> str:
        """As an error calls it."""
        return f"`size` {(self.nbytes or 0) / 1e6:,g} MB" if self.bits is None else f"`bits` {self.bits:g}"


@dataclass(frozen=True)
class Request:
    """What was asked of `quantize`.

    Attributes:
        source: a directory, a hub id, or a `.gguf` file that transformers can dequantize.
        recipe: a name of `RECIPES`, or a `Recipe` of one's own; None for `best`, or `rtn` where transformers is not
            installed and so nothing can be calibrated.
        format: what is written; None for the recipe's usual format.
        selection: which matrices are quantized.
        changes: options of the recipe's last stage, by name: of its grid, its basis and its solver; `basis` for another
            basis, and `calibrate`. See `hlwq.recipes.changed`. `bits` may be a fraction, the mean of widths that
            matrices are given by measurement.
        size: instead, what the weight files may take: bytes, or as in `5GB`.
        effort: `fast`, `normal` or `max`: how long recipe `best` works; None for `normal`.
        revision: branch, tag or commit of a hub id.
        calibration: which data a calibrated recipe uses; None for the usual ones.
        device: where to compute: `cuda`, `mps`, `cpu`; None for the first that is here.
        max_shard_size: the most that one safetensors file holds: bytes, or as in `5GB`.
    """

    source: str | Path
    recipe: str | Recipe | None = option("See `hlwq recipes`; by default best.", default=None)
    format: str | None = option("See `hlwq formats`; by default the recipe's usual one.", default=None)
    selection: Selection = field(default_factory=Selection)
    changes: Mapping[str, Any] = field(default_factory=dict)
    size: int | str | None = option(
        "Give each matrix its own bits, so that the weight files take this much, as 5GB.", default=None
    )
    effort: Literal["fast", "normal", "max"] | None = option(
        "How long recipe best works for better codes: fast, normal or max.", default=None
    )
    revision: str | None = option("Branch, tag or commit of a hub id.", default=None)
    calibration: Calibration | None = None
    device: str | None = option("Where to compute: cuda, mps, cpu; by default the first that is here.", default=None)
    max_shard_size: int | str = option("The most that one safetensors file holds (default 5GB).", default="5GB")

    def __post_init__(self) -> None:
        check_types(self)
        if not isinstance(self.calibration, Calibration | None):
            raise RequestError(f"`calibration` is {self.calibration!r}; it must be a Calibration.")
        if self.shard_bytes < 1:
            raise RequestError(f"`max_shard_size` is {self.max_shard_size}; it must be positive.")
        bits = self.changes.get("bits")
        if bits is not None:
            if isinstance(bits, bool) or not isinstance(bits, Real) or not isfinite(bits):
                raise RequestError(f"`bits` is {bits!r}; it must be a number.", argument="bits")
            exact = float(bits)
            object.__setattr__(self, "changes", {**self.changes, "bits": int(exact) if exact.is_integer() else exact})
        if self.size is not None and bits is not None:
            raise RequestError("`size` decides on the bits of each matrix. Leave `bits` out.", argument="size")

    @property
    def shard_bytes(self) -> int:
        """`max_shard_size` in bytes. Raises RequestError if it is no size."""
        return bytes_of("max_shard_size", self.max_shard_size)

    @property
    def budget(self) -> Budget | None:
        """What matrices of different bits may cost together; None where all have the recipe's.

        Raises:
            RequestError: `size` is no size.
        """
        bits = self.changes.get("bits")
        if isinstance(bits, float):
            return Budget(bits=bits)
        return None if self.size is None else Budget(nbytes=bytes_of("size", self.size))

    @classmethod
    def of(cls, source: str | Path, recipe: str | Recipe | None = None, **options: Any) -> Request:
        """A request from keyword arguments: fields of `Request`, `Selection`, `Calibration`, and changes of the recipe.

        None stands for an argument that is not given. Texts to calibrate on may be given as they are: a path, a hub
        data set, or several.

        Raises:
            TypeError: an argument is none of these.
            RequestError: an argument is out of range.
        """
        kinds = {kind: {each.name for each in fields(kind)} for kind in (cls, Selection, Calibration)}
        changing = {*stage_options(), "basis", "calibrate"}
        known = set().union(changing, *kinds.values()) - {"source", "selection", "changes"}
        if unknown := options.keys() - known:
            raise TypeError(f"unknown argument {min(unknown)!r}; arguments are {', '.join(sorted(known))}")
        given = {name: value for name, value in options.items() if value is not None}
        own, selecting, sampling = ({n: v for n, v in given.items() if n in names} for names in kinds.values())
        data = own.pop("calibration", None)
        if not isinstance(data, Calibration | None):
            data, sampling = None, {"sources": data, **sampling}
        if sampling:
            data = replace(data or Calibration(), **sampling)
        changes = {name: value for name, value in given.items() if name in changing}
        return cls(source, recipe, selection=Selection(**selecting), changes=changes, calibration=data, **own)

    def changed_recipe(self) -> Recipe:
        """The recipe with its changes.

        Raises:
            RequestError: a change would change nothing or is out of range, or calibration data are given to a recipe
                that needs none.
        """
        name = USUAL_RECIPE if self.recipe is None else self.recipe
        recipe = recipe_named(name) if isinstance(name, str) else name
        recipe = recipe.in_format(self.format)
        if self.effort is not None:
            recipe = recipe.with_effort(self.effort)
        budget, changes = self.budget, dict(self.changes)
        if budget is not None:
            changes.pop("bits", None)
            if len(recipe.stages) != 1:
                message = f"{budget.words} is for recipes that round once, and {recipe.name} does not. Use rtn or hlwq."
                raise RequestError(message, argument=budget.argument)
        recipe = changed(recipe, changes)
        if self.calibration is not None and not recipe.calibrated:
            nearest = f"recipe {recipe.name} rounds to nearest."
            if budget is None:
                raise RequestError(f"Calibration data changes nothing: {nearest}", argument="calibration")
            for name in ("generated_samples", "batch_size", "offload_activations"):
                if getattr(self.calibration, name):
                    raise RequestError(f"`{name}` changes nothing: {nearest}", argument=name)
        return recipe
