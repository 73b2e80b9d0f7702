"""Where a checkpoint came from, and what its source says of licence and languages: material of strangers, read as data.

A card's metadata are YAML, in which a kilobyte can stand for gigabytes. So they are not loaded: of a bounded part of
the file, the plain entries are taken as they are written, and what uses aliases, anchors, tags or deep nesting says
nothing.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # its exports are lazy

from hlwq.containers import read_gguf_header
from hlwq.errors import CheckpointError, UnsupportedError, reason
from hlwq.files import exists, expanded, is_file
from hlwq.side_files import own_file

LONGEST = 1 << 16
"""Bytes of a card that its metadata can take."""
DEEPEST = 20
"""Collections of YAML inside each other."""

_IN_GGUF = {
    "license": "general.license",
    "license_name": "general.license.name",
    "license_link": "general.license.link",
    "language": "general.languages",
}
_FRONT_MATTER = re.compile(rb"\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
_SNAPSHOT = re.compile(r".*/models--([^/]+)/snapshots/([^/]+)", re.DOTALL)


def origin_of(source: str | Path, directory: Path) -> dict[str, Any]:
    """What `hlwq.json` says of a source: its name, its commit on the hub, and what it says of licence and languages.

    Where a file lies on this machine says nothing to others, and is nobody's business.

    Args:
        source: as it was given: a directory, a hub id or a `.gguf` file.
        directory: where `locate` found it.
    """
    local = expanded(source)
    if is_file(local):
        return {"source": local.resolve().name, "revision": None, "card": stated_by_gguf(local)}
    if not exists(local):  # a snapshot's directory is named after its commit
        return {"source": str(source), "revision": directory.name, "card": stated_by_card(directory)}
    path = directory.resolve()
    if snapshot := _SNAPSHOT.fullmatch(path.as_posix()):  # of the hub's cache, given as a directory
        name, revision = snapshot[1].replace("--", "/"), snapshot[2]
    else:
        name, revision = path.name, None
    return {"source": name, "revision": revision, "card": stated_by_card(directory)}


def base_model_of(origin: Mapping[str, Any]) -> str | None:
    """The hub id of the model that was quantized, through conversions; None where it was not taken from the hub.

    Args:
        origin: of a manifest.
    """
    first = _lineage(origin)[-1]
    source = first.get("source")
    return source if first.get("revision") and isinstance(source, str) and is_hub_id(source) else None


def stated_by_sources(origin: Mapping[str, Any]) -> dict[str, Any]:
    """What the source says that goes into the card; where that had no card, what its own source says.

    Args:
        origin: of a manifest.
    """
    cards = (each.get("card") for each in _lineage(origin))
    return next(filter(None, (inherited(card) for card in cards if isinstance(card, dict))), {})


def is_hub_id(name: str) -> bool:
    """Whether a repository on the hub can have this name, such as `Qwen/Qwen3.5-9B`."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return bool(name)


def stated_by_card(directory: Path) -> dict[str, Any]:
    """What a model's card says that holds for its quantizations too: licence and languages.

    Nothing where there is no card, or none that can be understood: a licence that is not stated must not be guessed.
    """
    try:
        return inherited(read_card(directory))
    except CheckpointError:
        return {}


def read_card(directory: Path) -> dict[str, Any]:
    """The metadata at the head of a model card: scalars as they are written, lists, and mappings as tuples of pairs.

    An entry that is there twice is left out. A card without metadata has no entries.

    Raises:
        CheckpointError: there is no card, or its metadata are damaged, longer than `LONGEST`, or not plain.
    """
    file = directory / "README.md"
    try:
        with own_file(file, directory).open("rb") as stream:
            head = stream.read(LONGEST).removeprefix(b"\xef\xbb\xbf")
        if not re.match(rb"\s*---[ \t]*\r?\n", head):
            return {}
        if not (found := _FRONT_MATTER.match(head)):
            raise ValueError("they do not end")
        return read_front_matter(found[1].decode())
    except (OSError, ValueError, OverflowError, yaml.YAMLError) as error:  # the third of "\UFFFFFFFF"
        raise CheckpointError(f"{file}: its metadata cannot be read ({reason(error)}).", path=file) from None


def stated_by_gguf(file: Path) -> dict[str, Any]:
    """What the header of a GGUF file says of licence and languages; nothing where it cannot be read."""
    try:
        metadata = read_gguf_header(file)
    except (CheckpointError, UnsupportedError):
        return {}
    return inherited({name: metadata[key] for name, key in _IN_GGUF.items() if key in metadata})


def inherited(stated: Mapping[str, Any]) -> dict[str, Any]:
    """Of what a source states, the entries that go into the card, as far as they have the form of such an entry."""
    return {key: stated[key] for key, accepts in _INHERITED.items() if key in stated and accepts(stated[key])}


def read_front_matter(text: str) -> dict[str, Any]:
    """The entries of a YAML mapping: scalars as they are written, lists, and mappings as tuples of pairs.

    An entry that is there twice is left out.

    Raises:
        ValueError: it is no mapping, uses aliases, anchors or tags, or is nested too deeply.
        YAMLError: it is not YAML.
    """
    document: list[Any] = []
    open_collections = [document]
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) or getattr(event, "tag", None):
            raise ValueError("aliases, anchors and tags are not read")
        if isinstance(event, yaml.ScalarEvent):
            open_collections[-1].append(event.value)
        elif isinstance(event, yaml.CollectionStartEvent):
            open_collections.append([])
            if len(open_collections) > DEEPEST:
                raise ValueError("nested too deeply")
        elif isinstance(event, yaml.CollectionEndEvent):
            items: Any = open_collections.pop()
            if isinstance(event, yaml.MappingEndEvent):
                items = tuple(zip(items[::2], items[1::2], strict=True))
            open_collections[-1].append(items)
    if len(document) != 1 or not isinstance(document[0], tuple):
        raise ValueError("not one mapping")
    entries = [(key, value) for key, value in document[0] if isinstance(key, str)]
    times = Counter(key for key, _ in entries)
    return {key: value for key, value in entries if times[key] == 1}


def _lineage(origin: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The origins of a manifest and of those that it was converted from, the original's last."""
    lineage = [origin]
    while isinstance(made_by := lineage[-1].get("made_by"), dict) and isinstance(made_by.get("origin"), dict):
        lineage.append(made_by["origin"])
    return lineage


def _text(pattern: str) -> Callable[[Any], bool]:
    form = re.compile(pattern, re.ASCII)
    return lambda value: isinstance(value, str) and bool(form.fullmatch(value))


_is_language = _text(r"[a-z]{2,3}(-[A-Za-z0-9]{1,8})*|multilingual|code")


def _are_languages(value: Any) -> bool:
    return _is_language(value) or (isinstance(value, list) and 0 < len(value) <= 1000 and all(map(_is_language, value)))


_INHERITED: dict[str, Callable[[Any], bool]] = {
    "license": _text(r"(?!(?:null|true|false|yes|no|on|off)$)[A-Za-z][A-Za-z0-9.+-]{0,63}"),
    "license_name": _text(r"\w[\w .+()-]{0,99}"),
    "license_link": _text(r"(https?://[\w./%#?=&~+:@-]{1,300}|\w[\w.-]{0,99})"),
    "language": _are_languages,
}
