"""Layer runners of small checkpoints, and the whole models that they are held against."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hlwq.calibration import LayerRunner
from hlwq.containers import Reader
from hlwq.evaluate.model import load_model
from hlwq.families import ModelLayout, describe
from hlwq.solvers import INPUTS

TOKENS = torch.randint(0, 96, (5, 70), generator=torch.Generator().manual_seed(0))
"""Five samples."""


def runner_of(source: Reader, **options: Any) -> tuple[LayerRunner, ModelLayout]:
    layout = describe(source.config, source.tensors)
    embedding = source.read(f"{layout.embedding}.weight")
    options = {"batch_size": len(TOKENS), "needs": frozenset({INPUTS}), **options}
    runner = LayerRunner(
        source.config,
        layout,
        TOKENS,
        lambda ids: embedding[ids],
        read=source.read,
        device=torch.device("cpu"),
        **{"dtype": torch.float32, **options},
    )
    return runner, layout


def states(runner: LayerRunner) -> Tensor:
    """The hidden states that the samples have come to."""
    return runner._states.read(slice(0, len(TOKENS)))


def whole_model(source: Reader) -> Any:
    return load_model(source.path, dtype=torch.float32)[0]
