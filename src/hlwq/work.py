"""The work on single tensors: read, check, quantize or copy, write."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from zlib import crc32

import torch
from torch import Tensor

from hlwq.containers import DTYPES, Source, Writer, what_is_not_finite
from hlwq.errors import CheckpointError, HlwqError
from hlwq.matrix import CHUNK_WEIGHTS, QuantizedMatrix
from hlwq.plan import REST, Plan, PlannedTensor
from hlwq.recipes import Stage

Progress = Callable[[int, int, str], None]
"""Called with the work done, the work in all, and what is being worked on."""
COPYING, ROUNDING, CALIBRATING = 1, 16, 256
"""Time that a weight takes, relative to each other: measured on SmolLM2, to the nearest power of four."""


class Work:
    """Doing what a plan says to single tensors, and telling how far it is.

    Attributes:
        done: the cost of what is done, of `total`; see `cost`.
    """

    def __init__(self, source: Source, plan: Plan, writer: Writer, device: torch.device, report: Progress) -> None:
        self.source, self.plan, self.writer, self.device, self.report = source, plan, writer, device, report
        self.done = 0
        self._checksums: dict[str, int] = {}
        self.total = sum(map(cost, plan.tensors))

    def read(self, name: str) -> Tensor:
        """A tensor of the source, whose checksum is kept for `checksums`."""
        values = self.source.read(name)
        self._checksums[name] = checksum(values)
        return values

    def checksums(self, tensors: Sequence[PlannedTensor]) -> dict[str, int]:
        """The CRC-32 of the bytes of source tensors, as they were read for this work."""
        names = [tensor.spec.name for tensor in tensors]
        return {name: self._checksums.get(name) or checksum(self.source.read(name)) for name in names}

    def copy(self, tensor: PlannedTensor) -> None:
        """Write a tensor as it is, under the name and in the dtype that the plan gives it."""
        self.report(self.done, self.total, tensor.spec.name)
        values = self.read(tensor.spec.name)
        check_finite(values, tensor.spec.name)
        (output,) = tensor.outputs
        self.writer.write(output.name, values.to(DTYPES[output.dtype]))
        self.done += cost(tensor)

    def quantize(self, tensor: PlannedTensor) -> dict[str, float]:
        """Quantize a tensor without calibration; returns its errors."""
        self.report(self.done, self.total, tensor.module)
        stored_dtype = DTYPES[self.plan.dtype] if self.plan.format.stores_decoded else torch.float32
        weights = self.read(tensor.spec.name)
        check_finite(weights, tensor.spec.name)
        try:
            matrix, error = quantize_matrix(weights, tensor.stages, self.device, stored_dtype)
        except HlwqError as lacking:
            raise lacking.about(tensor.spec.name) from None
        self.write(tensor, matrix)
        return {"relative_squared_error": error}

    def write(self, tensor: PlannedTensor, matrix: QuantizedMatrix) -> None:
        """Write a quantized tensor as the format has it."""
        for name, part in self.plan.format.encode(tensor.module, matrix, self.plan.dtype).items():
            self.writer.write(name, part)
        self.done += cost(tensor)


def cost(tensor: PlannedTensor) -> int:
    """How long a tensor takes, in units of a weight that is copied."""
    if tensor.action == "drop":
        return 0
    in_layer = tensor.calibrated and tensor.unit != REST
    each = COPYING if tensor.action == "copy" else CALIBRATING if in_layer else ROUNDING * len(tensor.stages)
    return each * tensor.spec.parameters


def checksum(values: Tensor) -> int:
    """The CRC-32 of a tensor's bytes, which tells a source that changed: an accident, and quick to compute."""
    return crc32(values.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def quantize_matrix(
    weights: Tensor, stages: Sequence[Stage], device: torch.device, stored_dtype: torch.dtype = torch.float32
) -> tuple[QuantizedMatrix, float]:
    """Run a chain of stages that need no data over one matrix, a chunk of rows at a time.

    Args:
        weights: (out, in), any floating dtype, on the CPU.
        stages: with grids and bases that fit the matrix.
        device: where to compute.
        stored_dtype: what decoded weights are rounded to where they are stored decoded.

    Returns:
        The codes of the last stage, on the CPU, and the relative squared error ‖W − Ŵ‖²/‖W‖² of the whole chain.

    Raises:
        UnsupportedError: a group's parameters overflow.
    """
    parts: list[QuantizedMatrix] = []
    squared_error, squared_norm = 0.0, 0.0
    for rows in weights.split(max(1, CHUNK_WEIGHTS // weights.shape[1])):
        original = values = rows.to(device, torch.float32)
        for stage in stages:
            part = stage.solver.solve(values, stage.grid, stage.basis)
            values = part.dequantize()
        squared_error += sum_of_squares(values.to(stored_dtype) - original)
        squared_norm += sum_of_squares(original)
        parts.append(part)
    return QuantizedMatrix.joined(parts), squared_error / squared_norm if squared_norm else 0.0


def sum_of_squares(values: Tensor) -> float:
    """Summed by rows in float32, then in float64 on the CPU, since not every device has it."""
    return float(values.square().sum(-1).cpu().sum(dtype=torch.float64))


def check_finite(values: Tensor, name: str) -> None:
    """Raise CheckpointError, which names the tensor, if a value is NaN or infinite."""
    if kind := what_is_not_finite(values):
        raise CheckpointError(
            f"tensor {name}: it holds a value that is {kind}. The checkpoint is damaged: download or export it again.",
            tensor=name,
        )
