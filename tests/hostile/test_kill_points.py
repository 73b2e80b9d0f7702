"""Runs that are killed at every step that they take on the disk."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import make_checkpoint

from hlwq.demo import bundled_model

SCRIPT = Path(__file__).with_name("kill_points.py")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="what was flushed is found by /proc")
@pytest.mark.parametrize(
    ("recipe", "kind", "every"),
    [
        ("rtn", "kill", 27),
        ("rtn", "lose", 27),
        pytest.param("rtn", "kill", 1, marks=pytest.mark.slow),
        pytest.param("rtn", "lose", 1, marks=pytest.mark.slow),
        pytest.param("hlwq-v7", "kill", 11, marks=pytest.mark.slow),
        pytest.param("hlwq-v7", "lose", 11, marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path: Path, recipe: str, kind: str, every: int) -> None:
    source = make_checkpoint(tmp_path / "source", "llama", vocab_size=2048)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(bundled_model() / name, source / name)
    (tmp_path / "runs").mkdir()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), str(source), str(tmp_path / "runs"), recipe, kind, str(every)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    points = json.loads(done.stdout)
    assert len(points) >= 60 // every
    for step, appeared, status, text, same in points:
        # After the very last steps the directory is there, and no record of the run.
        complete = appeared and status == 1 and "is a finished checkpoint" in text
        assert status == 0 or complete, (step, text)
        assert same, step
