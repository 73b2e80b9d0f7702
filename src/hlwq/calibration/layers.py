"""Running a model one decoder layer at a time on calibration data, with one layer's weights in memory.

The layers are transformers' own modules, called as transformers calls them: masks, rotary embeddings and the state of
linear attention are those of the real model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hlwq.calibration.experts import (
    MATRICES,
    ReadExpert,
    Routed,
    add_expert,
    hidden_of,
    module_of,
    tokens_of,
    without_stacks,
)
from hlwq.calibration.texts import Calibration
from hlwq.devices import compute_dtype
from hlwq.errors import UnsupportedError
from hlwq.families import ModelLayout
from hlwq.files import disk_errors
from hlwq.solvers import ORIGINAL_INPUTS, Gram, Solver
from hlwq.transformers_models import build_skeleton, quiet_transformers

ACTIVATION_BYTES = 4 << 30
"""What the activations of samples that run together may take, unless a batch size is given."""
BYTES_PER_FEATURE = 8
"""Bytes of those for each token and output of a linear layer: its values, and what is computed from them meanwhile."""
GRAM_TOKENS = 1 << 13
"""Tokens whose inputs are held in float32 at once."""
GRAM_STRIPES = 8

Read = Callable[[str], Tensor]
"""Gives a tensor of a checkpoint by its name."""
Solve = Callable[[nn.Module, Sequence[str], Gram], None]
"""Given a layer, paths of modules in it that share an input, and its second moments: replaces their weights."""


class LayerRunner:
    """Calibration samples on their way through the layers of a model.

    Attributes:
        index: the layer that they have reached.
    """

    def __init__(
        self,
        config: dict[str, Any],
        layout: ModelLayout,
        tokens: Tensor,
        embed: Callable[[Tensor], Tensor],
        embed_original: Callable[[Tensor], Tensor] | None = None,
        *,
        read: Read,
        needs: Container[str],
        device: torch.device,
        dtype: torch.dtype,
        batch_size: int,
        spill: Path | None = None,
    ) -> None:
        """Embed the samples, by the model's own way from token ids to its first layer.

        Args:
            config: the model's `config.json`.
            layout: the model.
            tokens: int64 (samples, sequence_length).
            embed: gives rows of the embedding matrix, (n, hidden), for token ids (n,).
            embed_original: the same for the original model, where its embedding is another.
            read: where the decoder's tensors outside its layers come from, the embedding and the final norm aside.
            needs: what the solver needs; with `ORIGINAL_INPUTS`, the samples run through the original weights too,
                beside the quantized ones.
            device: where layers run.
            dtype: the model's; layers run in it, or in float32 on a CPU where it is slow.
            batch_size: samples that run together.
            spill: a file to keep the samples in between layers, instead of memory.

        Raises:
            UnsupportedError: the model gives its layers more of each sample than its hidden states.
        """
        self.index = 0
        self._running = slice(0)  # the batch that runs
        self._layout, self._device = layout, device
        # In float16 the activations of many models overflow.
        self._dtype = compute_dtype(device, torch.float32 if dtype == torch.float16 else dtype)
        self._decoder = build_skeleton(config, tied=layout.tied, dtype=self._dtype).get_decoder()
        self._norm = self._decoder.get_submodule(layout.norm)
        self._decoder.set_submodule(layout.norm, nn.Identity())
        self._load_others(read)
        ids, places = tokens.unique(return_inverse=True)
        rows = embed(ids).to(self._dtype)
        samples, self._length = tokens.shape
        # A smaller one comes first: the last one runs once, the others as often as there are steps in a layer.
        ends = range(samples, 0, -batch_size)
        self._batches = [slice(max(0, end - batch_size), end) for end in reversed(ends)]
        self._arguments: dict[int, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {}
        shape = (samples, self._length, rows.shape[1])
        self._states = _States(shape, self._dtype, spill)
        self._originals: _States | None = None
        if ORIGINAL_INPUTS in needs:
            self._originals = _States(shape, self._dtype, spill and spill.with_name(spill.name + "-original"))
        self._enter(rows, places, list(filter(None, (self._states, self._originals))))
        if self._originals is not None and embed_original:
            self._enter(embed_original(ids).to(self._dtype), places, [self._originals])
        self._decoder.get_input_embeddings().to("meta")  # its rows have served

    def _enter(self, rows: Tensor, places: Tensor, into: Sequence[_States]) -> None:
        """Write what the first layer is given: for each token the row of its place, gone the model's own way."""
        self._set_embedding(rows)
        for batch in self._batches:
            hidden, arguments = self._entered(places[batch])
            if not _same(self._arguments.setdefault(batch.stop - batch.start, arguments), arguments):
                raise UnsupportedError(not_calibrated(self._layout))
            for states in into:
                states.write(batch, hidden)

    def _load_others(self, read: Read) -> None:
        """Give the decoder what it has outside its layers, beside the embedding and the final norm."""
        own = self._layout.embedding.removeprefix(self._layout.prefix), self._layout.norm
        for name in self._layout.others:
            module, _, part = name.rpartition(".")
            if module not in own:
                values = nn.Parameter(read(self._layout.prefix + name).to(self._dtype), requires_grad=False)
                setattr(self._decoder.get_submodule(module), part, values)

    def _set_embedding(self, rows: Tensor) -> None:
        """Give the decoder the rows that the samples use, and put all but its layers on the device."""
        embedding = self._decoder.get_input_embeddings()
        embedding.weight = nn.Parameter(rows, requires_grad=False)
        embedding.padding_idx = None  # which may be none of the rows
        for name, child in self._decoder.named_children():
            if name != "layers":
                child.to(self._device)

    def _entered(self, places: Tensor) -> tuple[Tensor, list[tuple[tuple[Any, ...], dict[str, Any]]]]:
        """What the model gives its layers for rows of the embedding: hidden states, and what goes with them to each."""
        states: list[Tensor] = []
        arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def record(hidden: Tensor, *positional: Any, **named: Any) -> Tensor:
            states.append(hidden)
            arguments.append((positional, named))
            return hidden

        for layer in self._decoder.layers:
            layer.forward = record
        with quiet_transformers(), torch.no_grad():
            self._decoder(input_ids=places.to(self._device), use_cache=False)
        for layer in self._decoder.layers:
            del layer.forward
        return states[0], arguments

    @torch.no_grad()
    def advance(self, read: Read, read_original: Read) -> None:
        """Run the next layer with weights that were quantized before.

        Args:
            read: where those weights come from.
            read_original: where the original weights come from; used if the originals run beside.
        """
        self._advance(self._states, read)
        if self._originals is not None:
            self._advance(self._originals, read_original)
        self.index += 1

    def _advance(self, states: _States, read: Read) -> None:
        with quiet_transformers(), self._loaded(read) as layer:
            for name in self._experts():
                self._run_experts(layer, name, states, self._reader_of(name, read))
            self._run_all(layer, states, self._batches)

    @torch.no_grad()
    def quantize(
        self,
        read: Read,
        steps: Sequence[Sequence[str]],
        solve: Solve,
        streams: Mapping[str, str] | None = None,
    ) -> dict[str, int]:
        """Run the next layer, and have the modules of each step quantized when the forward pass reaches them.

        The last batch runs through the layer once and pauses at each step, while the step's inputs, which depend on
        what is quantized by then, are gathered from it and from the other batches, which are run up to there. Then
        `solve` replaces the weights and the pass goes on with them. A single batch thus needs a single pass (and, of a
        mixture of experts, one more of the originals).

        Of a mixture of experts, one expert is in memory at a time: what the experts are given is kept for all samples,
        and each is solved on the tokens that go to it, weighted by how much of it is added for them, and run on them.

        Args:
            read: where the layer's weights come from.
            steps: paths of modules inside the layer that share an input, in the order of evaluation, as transformers'
                modules have them.
            solve: called for each step.
            streams: by the first module of a step, the module whose inputs are the hidden states that the step's
                outputs are added to; for a solver that needs to know how those differ from the original model's.

        Returns:
            How many tokens went to each expert, by the paths of its modules.
        """
        *others, last = self._batches
        steps, experts = self._by_expert(steps)
        counts: dict[str, int] = {}
        original_states, streams = self._originals, streams or {}
        with quiet_transformers(), self._loaded(read) as layer:
            original = layer if original_states is None else deepcopy(layer)
            passed: dict[str, Tensor] = {}
            original_passed: dict[str, Tensor] = {}
            originally: dict[str, Routed] = {}
            for stream in streams.values():
                _before(layer, [stream], partial(passed.__setitem__, stream))
            if original_states is not None:
                for name in experts:
                    reader = self._reader_of(name, read)
                    originally[name] = self._run_experts(original, name, original_states, reader)
                for module in (*(step[0] for step in steps), *streams.values()):
                    _before(original, [module], partial(original_passed.__setitem__, module))
                original_outputs = self._run(original, original_states, last)

            def gather(module: str, inputs: Tensor) -> Gram:
                width, stream = inputs.shape[-1], streams.get(module)
                hessian = torch.zeros(width, width, device=self._device)
                gram = Gram(hessian, None if original_states is None else torch.zeros_like(hessian))
                if stream is not None:
                    gram.stream = torch.zeros(passed[stream].shape[-1], width, device=self._device)
                wanted = None
                if original_states is not None:
                    wanted = _Given(original_passed.pop(module), original_passed[stream] if stream else None)
                _accumulate(gram, _Given(inputs, passed[stream] if stream else None), wanted)
                for batch in others:
                    if original_states is not None:
                        wanted = self._given(original, original_states, batch, module, stream)
                    _accumulate(gram, self._given(layer, self._states, batch, module, stream), wanted)
                _mirror(hessian)
                return gram

            def pause_at(step: Sequence[str]) -> None:
                _before(layer, step, lambda inputs: solve(layer, step, gather(step[0], inputs)))

            def solve_experts(name: str, *given: Tensor) -> Tensor:
                module, reader = layer.get_submodule(name), self._reader_of(name, read)
                routed = self._routed(layer, name, self._states, given)
                wanted = originally[name].hidden if name in originally else None
                for expert, own in experts[name].items():
                    count = self._solve_expert(module, name, expert, own, routed, wanted, reader, solve)
                    counts.update((member, count) for step in own for member in step)
                self._supply(module, routed)
                return self._outputs(routed, last)

            for step in steps:
                pause_at(step)
            for name in experts:
                _in_place_of(layer.get_submodule(name), partial(solve_experts, name))
            outputs = self._run(layer, self._states, last)
            self._run_all(layer, self._states, others)
            self._states.write(last, outputs)
            if original_states is not None:
                self._run_all(original, original_states, others)
                original_states.write(last, original_outputs)
        self.index += 1
        return counts

    def _by_expert(
        self, steps: Sequence[Sequence[str]]
    ) -> tuple[list[Sequence[str]], dict[str, dict[int, list[Sequence[str]]]]]:
        """The next layer's steps without experts'; and those, by the module that holds them and by their numbers."""
        family = self._layout.family
        matrices = {family.in_modules(each.name): each for each in self._layout.layers[self.index].matrices()}
        others: list[Sequence[str]] = []
        found: dict[str, dict[int, list[Sequence[str]]]] = {}
        for matrix in matrices.values():
            if matrix.experts:
                found.setdefault(family.in_modules(matrix.experts), {})[matrix.expert] = []
        for step in steps:
            matrix = matrices[step[0]]
            if matrix.experts:
                found[family.in_modules(matrix.experts)][matrix.expert].append(step)
            else:
                others.append(step)
        return others, found

    def _solve_expert(
        self,
        module: nn.Module,
        name: str,
        expert: int,
        steps: Sequence[Sequence[str]],
        routed: Routed,
        originals: Tensor | None,
        read: ReadExpert,
        solve: Solve,
    ) -> int:
        """Have an expert's matrices solved on the tokens that go to it, and run; returns how many tokens they are."""
        token, weights, count = tokens_of(routed, expert)
        weights = weights.to(self._device)
        matrices = [read(expert, each) for each in MATRICES]
        holder = module_of({f"{name}.{expert}.{each}": m.clone() for each, m in zip(MATRICES, matrices, strict=True)})
        solved = [holder.get_parameter(f"{name}.{expert}.{each}.weight") for each in MATRICES]
        inputs = routed.hidden[token].to(self._device)
        wanted = None if originals is None else originals[token].to(self._device)
        for step in steps:
            given, original = inputs, wanted
            if step[0].endswith(MATRICES[2]):
                given = hidden_of(module, solved[0], solved[1], inputs)
                original = None if wanted is None else hidden_of(module, matrices[0], matrices[1], wanted)
            hessian = torch.zeros(given.shape[1], given.shape[1], device=self._device)
            gram = Gram(hessian, None if original is None else torch.zeros_like(hessian))
            wanted_rows = None if original is None else _Given(original, None, weights)
            _accumulate(gram, _Given(given, None, weights), wanted_rows)
            _mirror(hessian)
            solve(holder, step, gram)
        add_expert(routed, expert, module, solved)
        return count

    def _experts(self) -> list[str]:
        """The modules of the next layer that hold experts."""
        return [self._layout.family.in_modules(name) for name in self._layout.layers[self.index].experts()]

    def _reader_of(self, name: str, read: Read) -> ReadExpert:
        """Reads matrices of the next layer's experts, onto the device."""
        prefix, in_files = self._layout.layer_prefix(self.index), self._layout.family.in_files

        def read_expert(expert: int, matrix: str) -> Tensor:
            return read(prefix + in_files(f"{name}.{expert}.{matrix}.weight")).to(self._device, self._dtype)

        return read_expert

    def _run_experts(self, layer: nn.Module, name: str, states: _States, read: ReadExpert) -> Routed:
        """Run each expert once, on its tokens of all batches; passes through the layer are given what comes out."""
        module, routed = layer.get_submodule(name), self._routed(layer, name, states)
        for expert in routed.experts.unique().tolist():
            add_expert(routed, expert, module, [read(expert, matrix) for matrix in MATRICES])
        self._supply(module, routed)
        return routed

    def _routed(self, layer: nn.Module, name: str, states: _States, last: Sequence[Tensor] = ()) -> Routed:
        """What experts of a layer are given in all batches; in the last one, unless that is known already."""

        def stop(*given: Tensor) -> Tensor:
            raise _ReachedExperts(given)

        module = layer.get_submodule(name)
        _in_place_of(module, stop)
        kept, found = states.beside("inputs"), []
        for batch in self._batches:
            given = last if batch == self._batches[-1] else ()
            try:
                if not given:
                    self._run(layer, states, batch)
            except _ReachedExperts as reached:
                given = reached.given
            if not given:
                raise AssertionError(f"{name} was not reached")
            hidden, *routing = given
            kept[self._tokens(batch)] = hidden
            found.append([each.cpu() for each in routing])
        experts, weights = (torch.cat(each) for each in zip(*found, strict=True))
        return Routed(kept, experts, weights, states.beside("outputs"))

    def _supply(self, module: nn.Module, routed: Routed) -> None:
        """Have a module of experts give what is known already to come out of it, for the batch that runs."""
        _in_place_of(module, lambda *_: self._outputs(routed, self._running))

    def _outputs(self, routed: Routed, batch: slice) -> Tensor:
        # A copy: some models go on in place.
        return routed.outputs[self._tokens(batch)].to(self._device, copy=True)

    def _tokens(self, batch: slice) -> slice:
        return slice(batch.start * self._length, batch.stop * self._length)

    @torch.no_grad()
    def outputs_gram(self, read: Read) -> Gram:
        """The second moments of what the output head is given, once the samples have gone through all layers.

        Args:
            read: where the weights of the final norm come from.
        """
        place = f"{self._layout.prefix}{self._layout.norm}"
        weights = {name: read(f"{place}.{name}").to(self._dtype) for name in self._norm.state_dict()}
        self._norm.load_state_dict(weights, assign=True)
        self._norm.to(self._device)
        width = self._layout.text_config["hidden_size"]
        gram = Gram(torch.zeros(width, width, device=self._device))
        for batch in self._batches:
            _accumulate(gram, _Given(self._norm(self._states.read(batch).to(self._device)), None))
        _mirror(gram.hessian)
        return gram

    @contextmanager
    def _loaded(self, read: Read) -> Iterator[nn.Module]:
        """The next layer with its weights, which are let go afterwards."""
        layer: nn.Module = self._decoder.layers[self.index]
        prefix = self._layout.layer_prefix(self.index)
        with without_stacks(layer, self._experts()):
            named = {name: prefix + self._layout.family.in_files(name) for name in layer.state_dict()}
            weights = {
                name: read(named[name]).to(self._device, torch.float32 if self._stays_float32(name) else own.dtype)
                for name, own in layer.state_dict().items()
            }
            layer.load_state_dict(weights, assign=True)
            layer.to(self._device)  # its buffers, which no file holds
            del weights
            try:
                yield layer
            finally:
                layer.load_state_dict({name: each.to("meta") for name, each in layer.state_dict().items()}, assign=True)

    def _stays_float32(self, name: str) -> bool:
        """Whether transformers keeps a tensor of a layer in float32, such as what is added to a router's scores."""
        return not set(name.split(".")).isdisjoint(self._decoder._keep_in_fp32_modules_strict or ())

    def _run(self, layer: nn.Module, states: _States, batch: slice) -> Tensor:
        self._running = batch
        positional, named = self._arguments[batch.stop - batch.start][self.index]
        outputs = layer(states.read(batch).to(self._device), *positional, **named)
        result: Tensor = outputs[0] if isinstance(outputs, tuple) else outputs
        return result

    def _run_all(self, layer: nn.Module, states: _States, batches: Sequence[slice]) -> None:
        for batch in batches:
            states.write(batch, self._run(layer, states, batch))

    def _given(self, layer: nn.Module, states: _States, batch: slice, module: str, stream: str | None) -> _Given:
        """What a module of the layer is given, and what the module named by its stream; the pass ends there."""
        passed: list[Tensor] = []

        def stop(inputs: Tensor) -> None:
            raise _Reached(inputs)

        if stream is not None:
            _before(layer, [stream], passed.append)
        _before(layer, [module], stop)
        try:
            self._run(layer, states, batch)
        except _Reached as reached:
            return _Given(reached.inputs, passed[0] if passed else None)
        raise AssertionError(f"{module} was not reached")


def not_calibrated(layout: ModelLayout) -> str:
    """Why a model cannot be calibrated whose layers are given more of a sample than its hidden states."""
    return (
        f"{layout.family.name}: layers of this model are given more of each token than its hidden states, so it cannot "
        "be calibrated. Use `recipe='rtn'`, or `recipe='hlwq'`."
    )


def default_batch_size(layout: ModelLayout, sequence_length: int) -> int:
    """Samples that run together, such that their activations take about `ACTIVATION_BYTES`."""
    return max(1, ACTIVATION_BYTES // activation_bytes(layout, sequence_length))


def activation_bytes(layout: ModelLayout, sequence_length: int) -> int:
    """An estimate of what one sample's activations take in its way through a layer."""
    active = layout.text_config.get("num_experts_per_tok") or 1
    features = max(
        sum(matrix.shape[0] for matrix in layer.matrices() if matrix.expert < active) for layer in layout.layers
    )
    return BYTES_PER_FEATURE * features * sequence_length


def calibration_memory(layout: ModelLayout, calibration: Calibration, solver: Solver, width: int) -> int:
    """An estimate in bytes: a layer, the samples between layers, a batch's activations, the largest problem to solve.

    Args:
        layout: the model.
        calibration: the data and how they are run.
        solver: what is run on each step of a layer.
        width: bytes of a weight.
    """
    transformers = 300 << 20
    copies = 2 if ORIGINAL_INPUTS in solver.needs else 1
    samples = calibration.samples + (calibration.generated_samples or 0)
    states = samples * calibration.sequence_length * layout.text_config["hidden_size"] * width
    batch = calibration.batch_size or default_batch_size(layout, calibration.sequence_length)
    activations = activation_bytes(layout, calibration.sequence_length) * min(batch, samples)
    weights = problem = 0
    for layer in layout.layers:
        held = [matrix for matrix in layer.matrices() if matrix.expert < 1]  # of the experts, one
        weights = max(weights, width * sum(matrix.shape[0] * matrix.shape[1] for matrix in held))
        for step in layer.steps:
            problem = max(problem, solver.memory(sum(matrix.shape[0] for matrix in step), step[0].shape[1]))
    kept = 3 if layout.has_experts else 1  # between layers; what experts are given, and what comes out of them
    stored = 0 if calibration.offload_activations else kept * copies * states
    return transformers + copies * weights + stored + max(activations, problem)


@dataclass(frozen=True)
class _Given:
    """What a batch gives a module.

    Attributes:
        inputs: (…, in).
        stream: the hidden states (…, out) that its outputs are added to.
        weights: how much each of the inputs counts, (tokens,); 1 if None.
    """

    inputs: Tensor
    stream: Tensor | None
    weights: Tensor | None = None

    def rows(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Both in float32, as rows, some at a time."""
        inputs = self.inputs.flatten(0, -2).split(GRAM_TOKENS)
        streams = [None] * len(inputs) if self.stream is None else self.stream.flatten(0, -2).split(GRAM_TOKENS)
        weights = [None] * len(inputs) if self.weights is None else self.weights.split(GRAM_TOKENS)
        for values, stream, weight in zip(inputs, streams, weights, strict=True):
            rows = values.float() if weight is None else values.float() * weight[:, None]
            yield rows, None if stream is None else stream.float()


def _same(one: Any, other: Any) -> bool:
    """Whether two of the things that layers are given are equal."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return type(one) is type(other)


class _Reached(Exception):
    def __init__(self, inputs: Tensor) -> None:
        self.inputs = inputs


def _before(layer: nn.Module, modules: Sequence[str], act: Callable[[Tensor], None]) -> None:
    """Call `act` with its inputs once, when the forward pass reaches the first of some modules."""
    handles: list[Any] = []

    def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        for handle in handles:
            handle.remove()
        act(inputs[0])

    handles += [layer.get_submodule(module).register_forward_pre_hook(hook) for module in modules]


class _ReachedExperts(Exception):
    def __init__(self, given: tuple[Tensor, ...]) -> None:
        self.given = given


def _in_place_of(experts: nn.Module, act: Callable[..., Tensor]) -> None:
    """Have `act` called instead of a module of experts, whose weights are not there."""
    experts.__dict__["forward"] = act


def _accumulate(gram: Gram, given: _Given, originals: _Given | None = None) -> None:
    """Add inputs to the upper part of the Hessian, and what the originals differ by to the other moments."""
    width = given.inputs.shape[-1]
    stripe = -(-width // GRAM_STRIPES)
    original_rows = repeat((None, None)) if originals is None else originals.rows()
    for (values, stream), (original, original_stream) in zip(given.rows(), original_rows, strict=False):
        for start in range(0, width, stripe):  # XᵀX is symmetric: half of it is enough
            columns = slice(start, start + stripe)
            gram.hessian[columns, start:] += values[:, columns].T @ values[:, start:]
        if original is not None and gram.cross is not None:
            gram.cross += (original - values).T @ values
        if stream is not None and original_stream is not None and gram.stream is not None:
            gram.stream += (original_stream - stream).T @ values


def _mirror(matrix: Tensor) -> None:
    """Copy the upper part of a square matrix to the lower, in place."""
    stripe = -(-len(matrix) // GRAM_STRIPES)
    for start in range(0, len(matrix), stripe):
        stop = start + stripe
        matrix[stop:, start:stop] = matrix[start:stop, stop:].T


class _States:
    """The hidden states of all samples between two layers, in memory or in a file, read and written by batches."""

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype, file: Path | None) -> None:
        self._shape, self._dtype, self._file = shape, dtype, file
        if file is None:
            self._rows = torch.empty(shape, dtype=dtype)
        else:
            file.write_bytes(b"")
            self._sample_bytes = shape[1] * shape[2] * dtype.itemsize

    def read(self, batch: slice) -> Tensor:
        if self._file is None:
            return self._rows[batch]
        # Not mapped: the pages of a mapped file count as this process's memory.
        with self._file.open("rb") as stream:
            stream.seek(batch.start * self._sample_bytes)
            contents = bytearray(stream.read((batch.stop - batch.start) * self._sample_bytes))
        return torch.frombuffer(contents, dtype=self._dtype).reshape(-1, *self._shape[1:])

    def beside(self, name: str) -> Tensor:
        """Zeros (tokens, hidden) to keep more of all samples in; in a file that is mapped, if these are in a file.

        Rows are taken from anywhere in them. The pages of a mapped file count as this process's memory, but go when
        others need room.

        Args:
            name: of the file.
        """
        size = math.prod(self._shape)
        if self._file is None:
            return torch.zeros(size, dtype=self._dtype).reshape(-1, self._shape[-1])
        file = self._file.with_name(f"{self._file.name}-{name}")
        file.unlink(missing_ok=True)  # what is mapped of it goes on
        with disk_errors(file.parent), file.open("wb") as stream:  # written: a hole that finds no room is no error
            for _ in range(self._shape[0]):
                stream.write(bytes(self._sample_bytes))
        return torch.from_file(str(file), shared=True, size=size, dtype=self._dtype).reshape(-1, self._shape[-1])

    def write(self, batch: slice, states: Tensor) -> None:
        if self._file is None:
            self._rows[batch] = states
            return
        with disk_errors(self._file.parent), self._file.open("r+b") as stream:
            stream.seek(batch.start * self._sample_bytes)
            stream.write(states.cpu().contiguous().view(torch.uint8).numpy().data)
