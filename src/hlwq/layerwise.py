"""Quantizing decoder layers in their order, the calibration samples going through what is quantized already."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from hlwq.calibration import Calibration, LayerRunner
from hlwq.containers import DTYPES
from hlwq.decoded import DecodedCheckpoint
from hlwq.devices import memory_errors
from hlwq.errors import HlwqError
from hlwq.files import check_disk
from hlwq.matrix import QuantizedMatrix
from hlwq.plan import PlannedTensor, head_rows
from hlwq.recipes import Stage
from hlwq.solvers import ORIGINAL_INPUTS, STREAM, Gram, output_error
from hlwq.work import Work, check_finite, quantize_matrix, sum_of_squares

HEAD_TOKENS = 1 << 15
"""Tokens, about, on which the inputs of the output head are looked at."""
SPILL_FILE = "activations"
"""Calibration samples between two layers, inside `OUT.partial`."""


class CalibratedLayers:
    """The decoder layers of a model on their way through calibration, each written as soon as it is solved."""

    def __init__(self, work: Work, tokens: Tensor, calibration: Calibration) -> None:
        self._work, self._tokens, self._calibration = work, tokens, calibration
        # What is written is read back: the next layer is given what engines will compute with, and a run that was
        # interrupted goes on from the same weights.
        self._written = DecodedCheckpoint(work.writer.directory)
        self._runner: LayerRunner | None = None

    def quantize(self, index: int, tensors: Sequence[PlannedTensor]) -> dict[str, dict[str, float]]:
        """Quantize one layer, running those that an earlier run wrote before it; returns each module's errors."""
        work = self._work
        runner = self._runner = self._runner or self._started()
        while runner.index < index:
            work.report(work.done, work.total, f"catching up: layer {runner.index}")
            runner.advance(self._written.read, work.source.read)
        layout = work.plan.layout
        prefix = layout.layer_prefix(index)
        path = layout.family.in_modules
        planned = {path(each.module.removeprefix(prefix)): each for each in tensors if each.action == "quantize"}
        errors: dict[str, dict[str, float]] = {}

        def solve(layer: nn.Module, names: Sequence[str], gram: Gram) -> None:
            errors.update(self._solve(layer, {name: planned[name] for name in names}, gram))

        steps = [[path(matrix.name) for matrix in step] for step in layout.layers[index].steps]
        steps = [[name for name in step if name in planned] for step in steps]
        streams = {}
        if STREAM in work.plan.recipe.solver.needs:
            streams = {path(m.name): m.stream for m in layout.layers[index].matrices() if m.stream}
            streams = {name: stream for name, stream in streams.items() if name in planned}
        work.report(work.done, work.total, f"layer {index}")
        with memory_errors(f"layer {index}: the device has too little memory. Lower `batch_size`."):
            counts = runner.quantize(work.read, [step for step in steps if step], solve, streams)
        for name, count in counts.items():
            errors[planned[name].module]["calibration_tokens"] = count
        return errors

    def _solve(self, layer: nn.Module, matrices: dict[str, PlannedTensor], gram: Gram) -> dict[str, dict[str, float]]:
        """Quantize matrices that share an input, write them, and put into the layer what the file then says."""
        alike: dict[Stage, dict[str, PlannedTensor]] = {}
        for name, tensor in matrices.items():  # those of one width are solved at once
            alike.setdefault(tensor.stages[-1], {})[name] = tensor
        errors: dict[str, dict[str, float]] = {}
        for stage, members in alike.items():
            errors |= self._solve_alike(layer, members, stage, gram)
        return errors

    def _solve_alike(
        self, layer: nn.Module, matrices: dict[str, PlannedTensor], stage: Stage, gram: Gram
    ) -> dict[str, dict[str, float]]:
        """Do so with matrices that one stage serves."""
        weights = []
        for name, tensor in matrices.items():
            # Detached: a parameter that is float32 already would become what is put into it below.
            weights.append(layer.get_parameter(f"{name}.weight").detach().float())
            check_finite(weights[-1], tensor.spec.name)
        try:
            solved = stage.solver.solve(torch.cat(weights), stage.grid, stage.basis, gram)
        except HlwqError as error:
            raise error.about(*(tensor.spec.name for tensor in matrices.values())) from None
        parts = solved.split_rows([len(values) for values in weights])
        errors = {}
        for (name, tensor), values, part in zip(matrices.items(), weights, parts, strict=True):
            self._work.write(tensor, part.cpu())
            stored = self._written.read(tensor.spec.name)
            parameter = layer.get_parameter(f"{name}.weight")
            difference = stored.to(values) - values
            parameter.data = stored.to(parameter)
            signal, squared = output_error(values, gram.hessian), sum_of_squares(values)
            loss = output_error(difference, gram.hessian) / signal if signal else 0.0
            errors[tensor.module] = {
                "relative_squared_error": sum_of_squares(difference) / squared if squared else 0.0,
                "relative_output_error": loss,
            }
            self._work.report(self._work.done, self._work.total, f"{tensor.module}, output error {loss:.2e}")
        return errors

    def quantize_head(self, tensor: PlannedTensor) -> dict[str, float]:
        """Quantize the output head by what the original model gives it; returns its errors."""
        self._work.report(self._work.done, self._work.total, tensor.module)
        weights = self._work.read(tensor.spec.name)
        check_finite(weights, tensor.spec.name)
        gram = self._head_gram
        parts, squared_error, squared_norm, loss, signal = [], 0.0, 0.0, 0.0, 0.0
        for rows in weights.split(head_rows(weights.shape[1])):
            original = rows.to(self._work.device, torch.float32)
            part = self._solved_head(original, tensor)
            difference = part.dequantize(DTYPES[self._work.plan.dtype]).float() - original
            squared_error += sum_of_squares(difference)
            squared_norm += sum_of_squares(original)
            loss += output_error(difference, gram.hessian)
            signal += output_error(original, gram.hessian)
            parts.append(part.cpu())
        self._work.write(tensor, QuantizedMatrix.joined(parts))
        return {
            "relative_squared_error": squared_error / squared_norm if squared_norm else 0.0,
            "relative_output_error": loss / signal if signal else 0.0,
        }

    def _solved_head(self, rows: Tensor, tensor: PlannedTensor) -> QuantizedMatrix:
        """Rows of the output head, float32 on the device, quantized; those of a tied one are the embedding's too."""
        stage = tensor.stages[-1]
        try:
            return stage.solver.solve(rows, stage.grid, stage.basis, self._head_gram)
        except HlwqError as error:
            raise error.about(tensor.spec.name) from None

    @cached_property
    def _head_gram(self) -> Gram:
        """Second moments of the output head's inputs in the original model, on some of the samples.

        Known before any layer is quantized: where the head is the embedding too, all layers are given its codes.
        """
        work, tokens = self._work, self._tokens
        some = tokens[:: max(1, tokens.numel() // HEAD_TOKENS)]
        batch_size = min(self._calibration.batch_size or len(some), len(some))
        with memory_errors("The device has too little memory for the samples. Lower `batch_size`."):
            runner = self._runner_of(some, self._embed_original, needs=(), batch_size=batch_size)
            for index in range(len(work.plan.layout.layers)):
                work.report(work.done, work.total, f"what the output head is given: layer {index}")
                runner.advance(work.source.read, work.source.read)
            return runner.outputs_gram(work.source.read)

    def remove_spilled(self) -> None:
        """Delete the samples that were kept on disk."""
        for file in self._work.writer.partial.glob(SPILL_FILE + "*"):
            file.unlink()

    def _started(self) -> LayerRunner:
        work, calibration, tokens = self._work, self._calibration, self._tokens
        needs = work.plan.recipe.solver.needs
        spill = None
        if calibration.offload_activations:
            self.remove_spilled()  # of a run that was killed
            copies = (2 if ORIGINAL_INPUTS in needs else 1) * (3 if work.plan.layout.has_experts else 1)
            width = work.plan.layout.text_config["hidden_size"] * 4
            # The output's files are laid out already, but take their space only as they are written.
            check_disk(work.writer.partial, copies * tokens.numel() * width + work.plan.output_bytes())
            spill = work.writer.partial / SPILL_FILE
        return self._runner_of(
            tokens, self._embed, self._embed_original, needs=needs, batch_size=calibration.batch_size, spill=spill
        )

    def _runner_of(
        self,
        tokens: Tensor,
        embed: Callable[[Tensor], Tensor],
        embed_original: Callable[[Tensor], Tensor] | None = None,
        *,
        needs: Container[str],
        batch_size: int | None,
        spill: Path | None = None,
    ) -> LayerRunner:
        work = self._work
        return LayerRunner(
            work.source.config,
            work.plan.layout,
            tokens,
            embed,
            embed_original,
            read=work.source.read,
            needs=needs,
            device=work.device,
            dtype=DTYPES[work.plan.dtype],
            batch_size=batch_size or len(tokens),
            spill=spill,
        )

    def _embed(self, ids: Tensor) -> Tensor:
        """Rows of the embedding, as the file will hold it."""
        plan, rows = self._work.plan, self._embed_original(ids)
        name = f"{plan.layout.embedding}.weight"
        planned = next(tensor for tensor in plan.tensors if tensor.spec.name == name)
        if planned.action != "quantize":
            return rows
        if not planned.calibrated:
            return quantize_matrix(rows, planned.stages, self._work.device)[0].dequantize(DTYPES[plan.dtype])
        chunks = rows.to(torch.float32).split(head_rows(rows.shape[1]))
        parts = [self._solved_head(chunk.to(self._work.device), planned).cpu() for chunk in chunks]
        return QuantizedMatrix.joined(parts).dequantize(DTYPES[plan.dtype])

    def _embed_original(self, ids: Tensor) -> Tensor:
        """Rows of the embedding of the source."""
        rows: Tensor = self._work.source.read(f"{self._work.plan.layout.embedding}.weight")[ids]
        return rows
