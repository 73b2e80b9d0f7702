"""Calibration: texts as token samples, and a model that runs on them one decoder layer at a time."""

from __future__ import annotations

from hlwq.calibration.layers import LayerRunner, calibration_memory, default_batch_size
from hlwq.calibration.texts import EMBEDDED, HUB_DEFAULT, Calibration, Samples, load_samples

__all__ = [
    "EMBEDDED",
    "HUB_DEFAULT",
    "Calibration",
    "LayerRunner",
    "Samples",
    "calibration_memory",
    "default_batch_size",
    "load_samples",
]
