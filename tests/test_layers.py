"""The layer runner against the whole model as transformers runs it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import ALL_FAMILY_NAMES, FAMILY_NAMES, make_checkpoint, some_names
from runners import TOKENS, runner_of, states, whole_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Gemma3TextConfig, GraniteConfig

from hlwq.calibration import LayerRunner
from hlwq.containers import Reader
from hlwq.families import Matrix, describe
from hlwq.solvers import INPUTS, ORIGINAL_INPUTS, STREAM, Gram

WRITERS = {
    **dict.fromkeys(
        ("gemma2", "gemma3", "gemma3_text", "gemma4", "gemma4_text", "olmo2", "olmo3", "glm4", "exaone4"), 0
    ),
    **dict.fromkeys(("granite", "falcon_h1"), 0),
    # Of a mixture of experts, what is added is the sum of many.
    **dict.fromkeys(
        ("cohere2", "nemotron_h", "qwen3_moe", "olmoe", "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_next"), 1
    ),
}
"""Matrices of a layer whose outputs are added to the hidden states as they are, where that is not two."""
every_family = pytest.mark.parametrize("family", ALL_FAMILY_NAMES)


@pytest.fixture(params=ALL_FAMILY_NAMES)
def source(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Reader:
    monkeypatch.setattr("hlwq.evaluate.model.load_tokenizer", lambda path: None)  # these have none
    return Reader(make_checkpoint(tmp_path / "model", request.param))


def single(matrices: Iterable[Matrix]) -> list[Matrix]:
    """Those that are none of an expert's, which `test_experts.py` looks at."""
    return [matrix for matrix in matrices if not matrix.experts]


@pytest.mark.parametrize("options", [{}, {"batch_size": 2}, {"spill": True}, {"batch_size": 2, "spill": True}])
def test_layers_compute_what_the_model_computes(source: Reader, options: dict[str, Any], tmp_path: Path) -> None:
    if "spill" in options:
        options = {**options, "spill": tmp_path / "activations"}
    runner, layout = runner_of(source, **options)
    with torch.no_grad():
        expected = whole_model(source)(input_ids=TOKENS, output_hidden_states=True).hidden_states
    for index in range(len(layout.layers) - 1):  # the last one's output is behind the norm there
        assert torch.allclose(states(runner), expected[index], atol=1e-4)
        runner.advance(source.read, source.read)
    assert torch.allclose(states(runner), expected[len(layout.layers) - 1], atol=1e-4)
    assert runner.index == len(layout.layers) - 1


def test_members_of_a_step_share_their_input(source: Reader) -> None:
    model, (_, layout) = whole_model(source), runner_of(source)
    seen: dict[str, Tensor] = {}

    def record(name: str) -> Any:
        return lambda module, inputs: seen.__setitem__(name, inputs[0])

    for index, layer in enumerate(layout.layers):
        for matrix in single(layer.matrices()):
            module = model.get_decoder().layers[index].get_submodule(matrix.name)
            module.register_forward_pre_hook(record(f"{index} {matrix.name}"))
    with torch.no_grad():
        model(input_ids=TOKENS)
    for index, layer in enumerate(layout.layers):
        for step in filter(single, layer.steps):
            first, *others = [seen[f"{index} {matrix.name}"] for matrix in step]
            assert all(torch.equal(first, other) for other in others)


def test_outputs_are_added_to_the_stream_that_the_family_names(source: Reader) -> None:
    model, (_, layout) = whole_model(source), runner_of(source)
    seen: dict[str, Tensor] = {}
    for index, layer in enumerate(layout.layers):
        module = model.get_decoder().layers[index]
        for name in {"post_attention_layernorm", "ffn_norm", *(m.stream for m in layer.matrices() if m.stream)} & dict(
            module.named_modules()
        ).keys():
            hook = partial(lambda name, _, inputs: seen.__setitem__(name, inputs[0]), name)
            module.get_submodule(name).register_forward_pre_hook(hook)
        for m in single(layer.matrices()):
            hook = partial(lambda name, _, inputs, outputs: seen.__setitem__(name, outputs), m.name)
            module.get_submodule(m.name).register_forward_hook(hook)
        module.register_forward_hook(lambda _, inputs, outputs: seen.__setitem__("end", outputs))
        with torch.no_grad():
            model(input_ids=TOKENS)
        end = seen["end"][0] if isinstance(seen["end"], tuple) else seen["end"]
        writers = [m for m in layer.matrices() if m.stream]
        of_experts = any(m.experts for m in layer.matrices())  # of which the sum of many is added
        assert len(writers) == (1 if of_experts else WRITERS.get(source.config["model_type"], 2))
        sums = [seen[m.stream] + seen[m.name] for m in writers]
        if of_experts:
            end = seen["ffn_norm" if source.config["model_type"] == "lfm2_moe" else "post_attention_layernorm"]
        if source.config["model_type"] == "cohere2":  # both add to what goes by the layer
            sums = [sums[0] + seen["mlp.down_proj"]]
        for each, after in zip(sums, [*(seen[m.stream] for m in writers[1:]), end], strict=bool(writers)):
            assert torch.allclose(each, after, atol=1e-5)


@pytest.mark.parametrize(
    ("source", "options", "needs"),
    [
        (family, options, needs)
        for family in ALL_FAMILY_NAMES
        for options in ({}, {"batch_size": 2})
        for needs in ({INPUTS}, {INPUTS, ORIGINAL_INPUTS}, {INPUTS, ORIGINAL_INPUTS, STREAM})
        if family in FAMILY_NAMES or (options and STREAM in needs)  # the others at their hardest
    ],
    indirect=["source"],
    ids=lambda value: str(len(value)) if isinstance(value, set) else str(value),
)
def test_steps_are_given_what_the_quantized_part_makes(
    source: Reader, options: dict[str, Any], needs: set[str]
) -> None:
    """Two layers with all matrices halved on the way, against whole models with the weights of that moment."""
    runner, layout = runner_of(source, needs=needs, **options)
    grams: list[tuple[str, Gram]] = []

    def halve(layer: nn.Module, names: Sequence[str], gram: Gram) -> None:
        grams.append((names[0], gram))
        for name in names:
            parameter = layer.get_parameter(f"{name}.weight")
            parameter.data = parameter / 2

    for index in range(2):
        described = layout.layers[index]
        streams = {m.name: m.stream for m in described.matrices() if m.stream} if STREAM in needs else {}
        runner.quantize(
            source.read, [[m.name for m in step] for step in described.steps if single(step)], halve, streams
        )
    model, original = whole_model(source), whole_model(source)
    for index in range(2):
        layer, layer_before = (each.get_decoder().layers[index] for each in (model, original))
        for step in filter(single, layout.layers[index].steps):
            name, gram = grams.pop(0)
            assert name == step[0].name
            inputs, originals = inputs_of(model, layer, name), inputs_of(original, layer_before, name)
            assert torch.allclose(gram.hessian, inputs.T @ inputs, rtol=1e-3, atol=1e-3)
            assert torch.equal(gram.hessian, gram.hessian.T)
            assert (gram.cross is not None) == (ORIGINAL_INPUTS in needs)
            if gram.cross is not None:
                assert torch.allclose(gram.cross, (originals - inputs).T @ inputs, rtol=1e-2, atol=1e-2)
            assert (gram.stream is not None) == (STREAM in needs and bool(step[0].stream))
            if gram.stream is not None:
                stream = inputs_of(model, layer, step[0].stream)
                original_stream = inputs_of(original, layer_before, step[0].stream)
                assert torch.allclose(gram.stream, (original_stream - stream).T @ inputs, rtol=1e-2, atol=1e-2)
            for matrix in step:
                layer.get_parameter(f"{matrix.name}.weight").data /= 2
    assert not grams


def inputs_of(model: Any, layer: nn.Module, name: str) -> Tensor:
    seen: list[Tensor] = []
    handle = layer.get_submodule(name).register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model(input_ids=TOKENS)
    handle.remove()
    return seen[0].flatten(0, -2)


def has_weights(module: nn.Module) -> bool:
    """Vectors and routers aside, which transformers may fill when it builds a model."""
    return any(not each.weight.is_meta for each in module.modules() if isinstance(each, nn.Linear | nn.Embedding))


def test_one_layer_has_weights_at_a_time(source: Reader) -> None:
    runner, layout = runner_of(source)
    loaded: list[list[bool]] = []

    def look(layer: nn.Module, names: Sequence[str], gram: Gram) -> None:
        layers = runner._decoder.layers
        loaded.append([has_weights(each) for each in layers])

    for index in range(2):
        runner.quantize(source.read, [[layout.layers[index].steps[0][0].name]], look)
    count = len(layout.layers)
    assert loaded == [[place == index for place in range(count)] for index in range(2)]
    assert not has_weights(runner._decoder)  # nor is the embedding, whose rows have served


# Models whose way from token ids to the first layer is more than a look-up.


def gemma3() -> tuple[Any, str]:
    config = Gemma3TextConfig(
        vocab_size=96,
        hidden_size=96,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        tie_word_embeddings=True,
    )
    return config, "Gemma3ForCausalLM"


def granite() -> tuple[Any, str]:
    config = GraniteConfig(
        vocab_size=96,
        hidden_size=96,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        embedding_multiplier=12.0,
        residual_multiplier=0.22,
    )
    return config, "GraniteForCausalLM"


@pytest.mark.parametrize("spill", [False, True])
@pytest.mark.parametrize("batch_size", [5, 2])
@pytest.mark.parametrize("describe_model", [gemma3, granite])
def test_samples_enter_the_first_layer_as_in_the_model(
    describe_model: Callable[[], tuple[Any, str]], batch_size: int, spill: bool, tmp_path: Path
) -> None:
    config, architecture = describe_model()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    values = {**config.to_dict(), "architectures": [architecture]}
    layout = describe(values, some_names(values))
    seen: list[Tensor] = []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(
            lambda _, inputs, named: seen.append(inputs[0] if inputs else named["hidden_states"]), with_kwargs=True
        )
    with torch.no_grad():
        model(input_ids=TOKENS)
    embedding, weights = model.get_input_embeddings().weight.detach(), model.state_dict()
    runner = LayerRunner(
        values,
        layout,
        TOKENS,
        lambda ids: embedding[ids],
        read=weights.__getitem__,
        needs=frozenset({INPUTS, ORIGINAL_INPUTS}),
        device=torch.device("cpu"),
        dtype=torch.float32,
        batch_size=batch_size,
        spill=tmp_path / "activations" if spill else None,
    )
    assert (seen[0] - embedding[TOKENS]).abs().max() > embedding.abs().max()  # scaled: not what a look-up gives
    assert torch.equal(states(runner), seen[0])
    for index in (1, 2):
        runner.advance(weights.__getitem__, weights.__getitem__)
        torch.testing.assert_close(states(runner), seen[index], rtol=0, atol=1e-4)
