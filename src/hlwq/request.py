"""Requests: what was asked of `quantize`, whether from Python or from the command line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from hlwq.calibration import Calibration
from hlwq.containers import DEFAULT_SHARD_BYTES
from hlwq.errors import RequestError
from hlwq.options import check_types, option, several
from hlwq.recipes import Recipe, changed, recipe_named, stage_options


@dataclass(frozen=True)
class Selection:
    """Which matrices are quantized beside, or instead of, those that the family usually has quantized.

    Attributes:
        include_embeddings: the embedding, and the output head if it is a matrix of its own, too.
        include: regular expressions; modules kept by default that match are quantized.
        exclude: regular expressions; modules that match are kept.
    """

    include_embeddings: bool = option("Quantize the embedding and the output head too.", default=False)
    include: tuple[str, ...] = option("Quantize modules matching this regular expression.", default=())
    exclude: tuple[str, ...] = option("Keep modules matching this regular expression.", default=())

    def __post_init__(self) -> None:
        object.__setattr__(self, "include", several(self.include))
        object.__setattr__(self, "exclude", several(self.exclude))
        check_types(self)


@dataclass(frozen=True)
class Request:
    """What was asked of `quantize`.

    Attributes:
        source: a directory, a hub id, or a `.gguf` file that transformers can dequantize.
        recipe: a name of `RECIPES`, or a `Recipe` of one's own.
        format: what is written; None for the recipe's usual format.
        selection: which matrices are quantized.
        changes: options of the recipe's last stage, by name: of its grid, its basis and its solver; `basis` for another
            basis, and `calibrate`. See `hlwq.recipes.changed`.
        revision: branch, tag or commit of a hub id.
        calibration: which data a calibrated recipe uses; None for the usual ones.
        device: where to compute: `cpu`, `cuda`, `mps`.
        shard_bytes: the most that one safetensors file holds.
    """

    source: str | Path
    recipe: str | Recipe = option("See `hlwq recipes`.", default="rtn")
    format: str | None = option("See `hlwq formats`; by default the recipe's usual one.", default=None)
    selection: Selection = field(default_factory=Selection)
    changes: Mapping[str, Any] = field(default_factory=dict)
    revision: str | None = option("Branch, tag or commit of a hub id.", default=None)
    calibration: Calibration | None = None
    device: str = option("Where to compute: cpu (default), cuda, mps.", default="cpu")
    shard_bytes: int = DEFAULT_SHARD_BYTES

    def __post_init__(self) -> None:
        check_types(self)
        if type(self.shard_bytes) is not int or self.shard_bytes < 1:
            raise RequestError(f"`shard_bytes` is {self.shard_bytes!r}; it must be a positive integer.")
        if not isinstance(self.calibration, Calibration | None):
            raise RequestError(f"`calibration` is {self.calibration!r}; it must be a Calibration.")

    @classmethod
    def of(cls, source: str | Path, recipe: str | Recipe = "rtn", **options: Any) -> Request:
        """A request from keyword arguments: fields of `Request` and of `Selection`, and changes of the recipe.

        None stands for an argument that is not given.

        Raises:
            TypeError: an argument is none of these.
            RequestError: an argument is out of range.
        """
        own = {each.name for each in fields(cls)} - {"selection", "changes"}
        selecting = {each.name for each in fields(Selection)}
        changing = {*stage_options(), "basis", "calibrate"}
        if unknown := options.keys() - own - selecting - changing:
            known = ", ".join(sorted((own | selecting | changing) - {"source"}))
            raise TypeError(f"unknown argument {min(unknown)!r}; arguments are {known}")
        given = {name: value for name, value in options.items() if value is not None}
        selection = Selection(**{name: value for name, value in given.items() if name in selecting})
        changes = {name: value for name, value in given.items() if name in changing}
        rest = {name: value for name, value in given.items() if name in own}
        return cls(source, recipe, selection=selection, changes=changes, **rest)

    def changed_recipe(self) -> Recipe:
        """The recipe with its changes.

        Raises:
            RequestError: a change would change nothing or is out of range, or calibration data are given to a recipe
                that needs none.
        """
        recipe = changed(recipe_named(self.recipe) if isinstance(self.recipe, str) else self.recipe, self.changes)
        if self.calibration is not None and not recipe.calibrated:
            raise RequestError(
                f"Calibration data changes nothing: recipe {recipe.name} rounds to nearest.", argument="calibration"
            )
        return recipe
