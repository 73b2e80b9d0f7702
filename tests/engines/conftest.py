"""Engines run in environments of their own (`make test-engines`); without them these tests skip and say so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from engines import SCRIPTS, RunEngine, run_script, write_payload


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(item.path).parent == SCRIPTS:
            item.add_marker(pytest.mark.engines)


@pytest.fixture
def run_engine(tmp_path: Path) -> RunEngine:
    """run_engine(engine, script, directory, payload): what the script wrote, parsed if it is JSON, else its path."""

    def run(engine: str, script: str, directory: Path, payload: Any = None, suffix: str = ".json") -> Any:
        out = tmp_path / f"{script}{suffix}"
        given = None if payload is None else write_payload(tmp_path / "payload.json", payload)
        run_script(engine, script, directory, out, given)
        return json.loads(out.read_text()) if suffix == ".json" else out

    return run
