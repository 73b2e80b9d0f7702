"""Which models hlwq is tested with in which engines, and what would become of a given one."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path

from hlwq.errors import HlwqError
from hlwq.families import FAMILIES
from hlwq.families.configuration import check_architectures
from hlwq.formats import FORMATS
from hlwq.plan import make_plan
from hlwq.recipes import RECIPES
from hlwq.sources import headers_of

TESTED = "tested"
"""Of a model, an engine and a format: loaded there, and found to compute what the codes say."""


@dataclass(frozen=True)
class Support:
    """What is known of an architecture.

    Attributes:
        family: as people write it.
        architecture: what `config.json` says under `architectures`.
        engines: by engine and format, such as `vLLM, gptq`: `tested`, or why it does not run there.
    """

    family: str
    architecture: str
    engines: dict[str, str]


@dataclass(frozen=True)
class Outlook:
    """What would become of a model in one format.

    Attributes:
        format: the format.
        nbytes: bytes of the weights, if each is rounded to nearest with the format's defaults; None if it is refused.
        engines: by engine, what is known of models like it.
        refusal: why the format is not for it; empty if it is.
        remarks: what should be known before.
    """

    format: str
    nbytes: int | None
    engines: dict[str, str]
    refusal: str = ""
    remarks: tuple[str, ...] = ()


@cache
def supported_models() -> tuple[Support, ...]:
    """The architectures that hlwq is tested with, and what the tests found."""
    found = json.loads(files("hlwq").joinpath("bundled/models.json").read_text(encoding="utf-8"))["models"]
    return tuple(
        Support(family.name, architecture, found.get(architecture, {}))
        for family in FAMILIES
        for architecture in family.architectures
    )


def engine_versions() -> dict[str, str]:
    """The engines' versions in which that was found."""
    versions: dict[str, str] = json.loads(files("hlwq").joinpath("bundled/models.json").read_text(encoding="utf-8"))[
        "versions"
    ]
    return versions


def outlook(source: str | Path, revision: str | None = None) -> list[Outlook]:
    """What would become of a model in each format, read off its configuration and the headers of its files.

    Args:
        source: a directory, a hub id, whose weights stay there, or a `.gguf` file.
        revision: a branch, tag or commit of the hub.

    Raises:
        HlwqError: it cannot be read, or is no language model.
    """
    headers = headers_of(source, revision)
    architecture = check_architectures(headers.config)[0]
    known = next((each.engines for each in supported_models() if each.architecture == architecture), {})
    outlooks = []
    for name in FORMATS:
        recipe = RECIPES["hlwq" if name == "hlwq" else "rtn"]
        engines = {place.partition(",")[0]: cell for place, cell in known.items() if place.endswith(f", {name}")}
        try:
            plan = make_plan(headers, recipe, name)
        except HlwqError as error:
            outlooks.append(Outlook(name, None, engines, refusal=str(error)))
        else:
            outlooks.append(Outlook(name, plan.output_bytes(), engines, remarks=(*plan.remarks, *plan.warnings)))
    if all(each.nbytes is None for each in outlooks):  # for one reason, which is the model's
        make_plan(headers, RECIPES["rtn"])
    return outlooks


def markdown_table() -> str:
    """`docs/models.md`'s table: a row for each architecture, and below it why what is not tested is not."""
    models = supported_models()
    places = list(dict.fromkeys(place for each in models for place in each.engines))
    versions = ", ".join(f"{engine} {version}" for engine, version in engine_versions().items())
    lines = [f"| | architecture | {' | '.join(places)} |", f"|{'---|' * (2 + len(places))}"]
    reasons: dict[str, int] = {}
    for each in models:
        cells = []
        for place in places:
            cell = each.engines.get(place, "")
            cells.append("✓" if cell == TESTED else f"[{reasons.setdefault(cell, len(reasons) + 1)}]" if cell else "")
        lines.append(f"| {each.family} | {each.architecture} | {' | '.join(cells)} |")
    lines += ["", f"✓ tested in {versions}.", ""]
    lines += [f"{number}. {reason}" for reason, number in reasons.items()]
    return "\n".join(lines) + "\n"
