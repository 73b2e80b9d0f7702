"""Recipes: what is done to each matrix, as data."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, TypedDict, Unpack

from hlwq.errors import HlwqError
from hlwq.grids import Basis, ScaleMethod
from hlwq.solvers.gptq import GptqOptions


@dataclass(frozen=True)
class Stage:
    """One rounding of a matrix. In a chain, each stage gets the decoded result of the one before.

    Attributes:
        grid: `uniform`, or `lloyd` (Lloyd–Max levels of N(0,1)).
        basis: the coordinates to round in.
        bits: of a code.
        group_size: weights that share parameters. Where it does not divide a matrix's in_features, the largest of
            128, 64 and 32 below it that does is used for that matrix.
        symmetric: for uniform grids. None leaves it to the format: GPTQ is symmetric, MLX is not.
        scale_method: how symmetric scales are chosen, see `UniformGrid`. None: `signed`.
        gptq: calibrate, with these options of the loop; None rounds to nearest.
    """

    grid: Literal["uniform", "lloyd"]
    basis: Basis
    bits: int
    group_size: int
    symmetric: bool | None = None
    scale_method: ScaleMethod | None = None
    gptq: GptqOptions | None = None


@dataclass(frozen=True)
class Recipe:
    """A chain of stages, and the formats it is usually written in, the default first."""

    name: str
    summary: str
    stages: tuple[Stage, ...]
    formats: tuple[str, ...]

    @property
    def gptq(self) -> GptqOptions | None:
        """How the last stage, the one that the file stores, is calibrated; None if it is not."""
        return self.stages[-1].gptq if self.stages else None


class Overrides(TypedDict, total=False):
    """Parameters of a recipe's last stage, the one that the file stores, that a user may replace. None keeps them.

    Attributes:
        bits: of a code.
        group_size: weights that share parameters.
        symmetric: by default GPTQ is symmetric and MLX is not.
        scale_method: `signed` or `absmax`, for symmetric uniform codes.
        calibrate: quantize by GPTQ's loop with GPTAQ a recipe that rounds to nearest; with `hlwq`, calibrated HLWQ.
        desc_act: form groups by the importance of columns, which GPTQModel reads and vLLM refuses.
        foem_beta: β of FOEM; 0 is plain GPTQ.
        gptaq_alpha: α of GPTAQ; 0 leaves it out.
        damping: added to the Hessian's diagonal, as a fraction of its mean.
    """

    bits: int | None
    group_size: int | None
    symmetric: bool | None
    scale_method: ScaleMethod | None
    calibrate: bool | None
    desc_act: bool | None
    foem_beta: float | None
    gptaq_alpha: float | None
    damping: float | None


_INT4 = Stage("uniform", "identity", bits=4, group_size=64)
_FOEM = GptqOptions(foem_beta=0.2)
CALIBRATED = GptqOptions(gptaq_alpha=0.25)
"""What `--calibrate` does: of GPTQ, FOEM and GPTAQ, what left the least loss over three seeds (see the README)."""
_UNIFORM_FORMATS = ("gptq", "compressed-tensors", "mlx", "dense")
_HLWQ5 = Stage("lloyd", "hadamard", bits=5, group_size=128)

RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe("rtn", "round to nearest, 4 bits, group 64", (_INT4,), _UNIFORM_FORMATS),
        Recipe(
            "gptq",
            "GPTQ on calibration data, 4 bits, group 128",
            (replace(_INT4, group_size=128, gptq=GptqOptions()),),
            _UNIFORM_FORMATS,
        ),
        Recipe(
            "foem", "GPTQ with FOEM, 4 bits, group 128", (replace(_INT4, group_size=128, gptq=_FOEM),), _UNIFORM_FORMATS
        ),
        Recipe("hlwq-v7", "GPTQ with FOEM, 4 bits, group 64", (replace(_INT4, gptq=_FOEM),), _UNIFORM_FORMATS),
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
        HlwqError: there is none of that name.
    """
    if name not in RECIPES:
        raise HlwqError(f"There is no recipe {name}. Recipes are: {', '.join(RECIPES)}.")
    return RECIPES[name]


def override(recipe: Recipe, **overrides: Unpack[Overrides]) -> Recipe:
    """A recipe with parameters of its last stage replaced.

    Raises:
        HlwqError: a parameter would change nothing, or is out of range.
    """
    given = {name: value for name, value in overrides.items() if value is not None}
    last = recipe.stages[-1]
    if last.grid == "lloyd" and "symmetric" in given:
        raise HlwqError(
            f"--symmetric/--asymmetric changes nothing in recipe {recipe.name}: Lloyd–Max levels are symmetric."
        )
    if last.grid == "lloyd" and "scale_method" in given:
        raise HlwqError(f"--scale changes nothing in recipe {recipe.name}: its groups have a norm, not a scale.")
    own: dict[str, Any] = {
        name: given[name] for name in ("bits", "group_size", "symmetric", "scale_method") if name in given
    }
    last = replace(last, **own, gptq=_gptq_options(recipe, given))
    return replace(recipe, stages=(*recipe.stages[:-1], last))


def _gptq_options(recipe: Recipe, given: dict[str, Any]) -> GptqOptions | None:
    options = recipe.gptq
    if options is not None and given.get("calibrate") is False:
        raise HlwqError(f"Recipe {recipe.name} is calibrated. Use rtn or hlwq to round to nearest.")
    if given.get("calibrate"):
        if options is not None:
            raise HlwqError(f"--calibrate changes nothing: recipe {recipe.name} is calibrated.")
        if len(recipe.stages) > 1:
            raise HlwqError(
                f"--calibrate is for recipes that round once; {recipe.name} rounds twice. Use --recipe hlwq-v7 for "
                "calibrated INT4, or --recipe hlwq --calibrate for calibrated HLWQ."
            )
        options = CALIBRATED
    names = ("desc_act", "foem_beta", "gptaq_alpha", "damping")
    changed: dict[str, Any] = {name: given[name] for name in names if name in given}
    if not changed:
        return options
    if options is None:
        name = next(iter(changed)).replace("_", "-")
        raise HlwqError(f"--{name} changes nothing in recipe {recipe.name}, which is not calibrated. Add --calibrate.")
    return replace(options, **changed)
