"""The table of `hlwq models`: what a test found is what is recorded, or, with HLWQ_RECORD set, is recorded.

    HLWQ_RECORD=1 python -m pytest tests/test_models.py
    HLWQ_RECORD=1 HLWQ_ENGINES=.venvs python -m pytest tests/engines/test_every_model.py

Set, it also writes docs/models.md anew.
"""

from __future__ import annotations

import json
import os
import tempfile
from importlib.resources import files
from pathlib import Path

from filelock import FileLock

from hlwq.models import markdown_table, supported_models

FILE = Path(str(files("hlwq").joinpath("bundled/models.json")))
PAGE = Path(__file__).parents[1] / "docs" / "models.md"
BEGIN, END = "<!-- table -->\n", "<!-- end of table -->\n"


def found(architecture: str, engine: str, version: str, format_name: str, cell: str) -> None:
    """A test of a model in an engine and a format ended so: with `tested`, or with why it does not run there."""
    place = f"{engine}, {format_name}"
    if os.environ.get("HLWQ_RECORD"):
        with FileLock(Path(tempfile.gettempdir()) / "hlwq-models.lock"):
            table = json.loads(FILE.read_text())
            table["versions"][engine] = version
            table["models"].setdefault(architecture, {})[place] = cell
            FILE.write_text(json.dumps(table, indent=1, ensure_ascii=False) + "\n")
            supported_models.cache_clear()
            PAGE.write_text(page())
        return
    table = json.loads(FILE.read_text())
    assert table["versions"][engine] == version
    assert table["models"][architecture][place] == cell


def page() -> str:
    """`docs/models.md` as it should be."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    return before + BEGIN + markdown_table() + END + rest.partition(END)[2]
