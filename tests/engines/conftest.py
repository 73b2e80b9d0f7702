"""Engines run in environments of their own (`make test-engines`); without them these tests skip and say so."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).parent

RunEngine = Callable[..., Any]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(item.path).parent == SCRIPTS:
            item.add_marker(pytest.mark.engines)


def engine_python(engine: str) -> Path:
    root = os.environ.get("HLWQ_ENGINES")
    if not root:
        pytest.skip("HLWQ_ENGINES names no directory of engine environments: run `make test-engines`")
    python = Path(root).absolute() / engine / "bin" / "python"
    if not python.exists():
        pytest.skip(f"{engine} is not installed in {root}: run `make test-engines`")
    return python


@pytest.fixture
def run_engine(tmp_path: Path) -> RunEngine:
    """Run one of this folder's scripts in an engine's environment: run_engine(engine, script, directory, payload)."""

    def run(engine: str, script: str, directory: Path, payload: Any = None, suffix: str = ".json") -> Path | Any:
        python = engine_python(engine)
        out = tmp_path / f"{script}{suffix}"
        arguments = [str(python), str(SCRIPTS / script), str(directory)]
        if payload is not None:
            (tmp_path / "payload.json").write_text(json.dumps(payload))
            arguments.append(str(tmp_path / "payload.json"))
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "GPTQMODEL_CPU_WORKERS": "2"}
        process = subprocess.run(
            [*arguments, str(out)], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=900
        )
        assert process.returncode == 0, process.stdout[-3000:] + process.stderr[-6000:]
        return json.loads(out.read_text()) if suffix == ".json" else out

    return run
