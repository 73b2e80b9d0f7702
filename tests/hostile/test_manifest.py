"""`hlwq.json` as others might leave it: one typed reading, one line for what is wrong, in every command."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import hlwq
from hlwq.check import check_directory
from hlwq.cli import app
from hlwq.demo import bundled_model
from hlwq.errors import CheckpointError
from hlwq.manifest import read_manifest
from hlwq.report.card import write_card

VALUES: tuple[Any, ...] = (5, -1.5, True, "text", [], [None], {"a": 1}, [[]], 10**40)
MODULE = "model.language_model.layers.0.mlp.down_proj"
PLACES: dict[tuple[str, ...], type] = {
    ("origin",): dict,
    ("origin", "source"): str,
    ("origin", "card"): dict,
    ("origin", "made_by"): dict,
    ("recipe",): str,
    ("stages",): list,
    ("calibration",): dict,
    ("modules",): dict,
    ("modules", MODULE): dict,
    ("modules", MODULE, "relative_squared_error"): float,
    ("sha256",): dict,
    ("sha256", f"{MODULE}.qweight"): str,
    ("versions",): dict,
}
"""Entries, and the types that hlwq writes."""
WRONG = [(place, value) for place, kind in PLACES.items() for value in VALUES if type(value) is not kind]
READERS: dict[str, Callable[[Path, Path], Any]] = {
    "inspect": lambda made, out: hlwq.inspect(made),
    "check": lambda made, out: check_directory(made),
    "convert": lambda made, out: hlwq.convert(made, out, "mlx"),
    "card": lambda made, out: write_card(made),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("manifest") / "made"
    hlwq.quantize(bundled_model(), out, "rtn")
    return out


def spoil(made: Path, copy: Path, place: tuple[str, ...], value: Any) -> None:
    shutil.copytree(made, copy, copy_function=lambda a, b: Path(b).symlink_to(a))
    manifest = json.loads((made / "hlwq.json").read_text())
    entry = manifest
    for key in place[:-1]:
        entry = entry[key]
    entry[place[-1]] = value
    (copy / "hlwq.json").unlink()
    (copy / "hlwq.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(("place", "value"), WRONG, ids=lambda each: json.dumps(each)[:60])
def test_an_entry_of_another_type_is_named(made: Path, tmp_path: Path, place: tuple[str, ...], value: Any) -> None:
    copy = tmp_path / "copy"
    spoil(made, copy, place, value)
    with pytest.raises(CheckpointError) as caught:
        read_manifest(copy)
    assert "\n" not in str(caught.value)
    assert "hlwq.json" in str(caught.value)
    assert place[-1] in str(caught.value)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("place", [("recipe",), ("modules", MODULE), ("origin",)], ids="/".join)
def test_whoever_reads_it_says_so(made: Path, tmp_path: Path, place: tuple[str, ...], reader: str) -> None:
    copy = tmp_path / "copy"
    spoil(made, copy, place, 5)
    with pytest.raises(CheckpointError, match=r"hlwq\.json"):
        READERS[reader](copy, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"text"', "\udcff", '{"recipe": 1}'])
def test_the_command_line_says_so_in_a_line(made: Path, tmp_path: Path, text: str) -> None:
    copy = tmp_path / "copy"
    spoil(made, copy, ("recipe",), "rtn")
    (copy / "hlwq.json").write_text(text, encoding="utf-8", errors="surrogateescape")
    result = CliRunner().invoke(app, ["inspect", str(copy)])
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    assert "hlwq.json" in "".join(result.stderr.split())


def test_what_hlwq_writes_is_read_whole(made: Path) -> None:
    manifest = read_manifest(made)
    assert manifest is not None
    written = json.loads((made / "hlwq.json").read_text())
    assert {**manifest, "origin": written["origin"]} == written
    assert manifest["origin"].items() >= written["origin"].items()
    assert read_manifest(bundled_model()) is None
