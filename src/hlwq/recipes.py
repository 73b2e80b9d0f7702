"""Recipes: what is done to each matrix, as data."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from hlwq.errors import HlwqError
from hlwq.grids import Basis, ScaleMethod


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
    """

    grid: Literal["uniform", "lloyd"]
    basis: Basis
    bits: int
    group_size: int
    symmetric: bool | None = None
    scale_method: ScaleMethod | None = None


@dataclass(frozen=True)
class Recipe:
    """A chain of stages, and the formats it is usually written in, the default first."""

    name: str
    summary: str
    stages: tuple[Stage, ...]
    formats: tuple[str, ...]


_INT4 = Stage("uniform", "identity", bits=4, group_size=64)
_HLWQ5 = Stage("lloyd", "hadamard", bits=5, group_size=128)

RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe("rtn", "round to nearest, 4 bits, group 64", (_INT4,), ("gptq", "mlx", "dense")),
        Recipe("hlwq", "HLWQ, 5 bits (2 to 8), group 128", (_HLWQ5,), ("hlwq", "dense")),
        Recipe("hlwq-mlx", "HLWQ 5 bits, decoded, then MLX 4 bits, group 64", (_HLWQ5, _INT4), ("mlx",)),
        Recipe("hlwq-int4", "HLWQ 5 bits, decoded, then INT4, group 64", (_HLWQ5, _INT4), ("gptq", "dense")),
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


def override(
    recipe: Recipe,
    *,
    bits: int | None = None,
    group_size: int | None = None,
    symmetric: bool | None = None,
    scale_method: ScaleMethod | None = None,
) -> Recipe:
    """A recipe with parameters of its last stage, the one that the file stores, replaced.

    Raises:
        HlwqError: a parameter would change nothing, since the last stage has no such thing.
    """
    last = recipe.stages[-1]
    if last.grid == "lloyd" and symmetric is not None:
        raise HlwqError(
            f"--symmetric/--asymmetric changes nothing in recipe {recipe.name}: Lloyd–Max levels are symmetric."
        )
    if last.grid == "lloyd" and scale_method is not None:
        raise HlwqError(f"--scale changes nothing in recipe {recipe.name}: its groups have a norm, not a scale.")
    if bits is not None:
        last = replace(last, bits=bits)
    if group_size is not None:
        last = replace(last, group_size=group_size)
    if symmetric is not None:
        last = replace(last, symmetric=symmetric)
    if scale_method is not None:
        last = replace(last, scale_method=scale_method)
    return replace(recipe, stages=(*recipe.stages[:-1], last))
