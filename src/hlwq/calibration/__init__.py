"""Calibration: texts as token samples, and a model that runs on them one decoder layer at a time."""

from __future__ import annotations

from hlwq.calibration.generated import GENERATION_BYTES, continued, kv_bytes_per_token, prompts_from
from hlwq.calibration.layers import LayerRunner, calibration_memory, default_batch_size, not_calibrated
from hlwq.calibration.texts import EMBEDDED, HUB_DEFAULT, MOST_GENERATED, Calibration, Samples, load_samples

__all__ = [
    "EMBEDDED",
    "GENERATION_BYTES",
    "HUB_DEFAULT",
    "MOST_GENERATED",
    "Calibration",
    "LayerRunner",
    "Samples",
    "calibration_memory",
    "continued",
    "default_batch_size",
    "kv_bytes_per_token",
    "load_samples",
    "not_calibrated",
    "prompts_from",
]
