"""Mixtures of experts: calibration of each expert on its tokens, stacks in files, and what is done without any."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import save_model
from runners import TOKENS, runner_of, states, whole_model
from torch import Tensor, nn

import hlwq
from hlwq.calibration.experts import SHRINKAGE, STARVED, Routed, tokens_of
from hlwq.containers import Reader
from hlwq.decoded import DecodedCheckpoint
from hlwq.demo import bundled_model, held_out_text
from hlwq.evaluate.divergence import divergence
from hlwq.evaluate.statistics import mean_estimate
from hlwq.files import read_json
from hlwq.plan import make_plan
from hlwq.recipes import RECIPES
from hlwq.solvers import INPUTS, ORIGINAL_INPUTS, Gram

FAMILIES = (
    "qwen3_moe",
    "olmoe",
    "mixtral",
    "glm4_moe",
    "qwen3_5_moe",
    "qwen3_5_moe_text",
    "qwen3_next",
    "phimoe",
    "ernie4_5_moe",
    "deepseek_v3",
)
every_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture
def untokenized(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hlwq.evaluate.model.load_tokenizer", lambda path: None)  # these have none


def given_to_experts(model: Any, layer: int) -> Routed:
    seen: list[tuple[Tensor, ...]] = []
    module = model.get_decoder().layers[layer].mlp.experts
    handle = module.register_forward_pre_hook(lambda _, given: seen.append(given))
    with torch.no_grad():
        model(input_ids=TOKENS)
    handle.remove()
    return Routed(*seen[0], torch.zeros_like(seen[0][0]))


@pytest.mark.parametrize("batch_size", [5, 2])
@every_family
def test_an_expert_is_solved_on_the_tokens_that_go_to_it(
    family: str, batch_size: int, tmp_path: Path, untokenized: None
) -> None:
    """The last layer's experts halved one by one, against whole models that hooks look at."""
    source = Reader(save_model(tmp_path / "model", family))
    runner, layout = runner_of(source, needs={INPUTS, ORIGINAL_INPUTS}, batch_size=batch_size)
    last = len(layout.layers) - 1
    for _ in range(last):
        runner.advance(source.read, source.read)
    grams: dict[str, Gram] = {}

    def halve(layer: nn.Module, names: list[str], gram: Gram) -> None:
        for name in names:
            grams[name] = gram
            parameter = layer.get_parameter(f"{name}.weight")
            parameter.data = parameter / 2

    path = layout.family.in_modules
    steps = [[path(m.name) for m in step] for step in layout.layers[last].steps if step[0].experts]
    counts = runner.quantize(source.read, steps, halve)

    model = whole_model(source)
    norm, head = model.get_decoder().get_submodule(layout.norm), model.get_output_embeddings()
    with torch.no_grad():  # the original beside goes on with the original experts, in all batches
        assert runner._originals is not None
        found = head(norm(runner._originals.read(slice(0, len(TOKENS)))))
        assert torch.allclose(found, model(input_ids=TOKENS).logits, rtol=1e-3, atol=1e-3)
    routed, module = given_to_experts(model, last), model.get_decoder().layers[last].mlp.experts
    assert set(counts) == {name for step in steps for name in step}
    for expert in range(len(module.down_proj)):
        place = f"mlp.experts.{expert}."
        token, weights, count = tokens_of(routed, expert)
        assert count == int((routed.experts == expert).sum()) == counts[f"{place}down_proj"]
        inputs = routed.hidden[token] * weights[:, None]
        assert torch.allclose(grams[f"{place}gate_proj"].hessian, inputs.T @ inputs, rtol=1e-3, atol=1e-3)
        gate, up = module.gate_up_proj[expert].detach().chunk(2)
        act = nn.functional.silu
        x = routed.hidden[token]
        quantized = act(x @ gate.T / 2) * (x @ up.T / 2) * weights[:, None]
        original = act(x @ gate.T) * (x @ up.T) * weights[:, None]
        down = grams[f"{place}down_proj"]
        assert torch.allclose(down.hessian, quantized.T @ quantized, rtol=1e-3, atol=1e-4)
        assert down.cross is not None
        assert torch.allclose(down.cross, (original - quantized).T @ quantized, rtol=1e-3, atol=1e-4)
    # What goes on is computed with the halved experts.
    with torch.no_grad():
        module.gate_up_proj.mul_(0.5)
        module.down_proj.mul_(0.5)
        expected = model(input_ids=TOKENS).logits
        found = head(norm(states(runner)))
    assert torch.allclose(found, expected, rtol=1e-3, atol=1e-3)


def test_a_starved_expert_is_given_other_tokens_with_little_weight() -> None:
    tokens = 1000
    experts = torch.stack([torch.zeros(tokens, dtype=torch.long), torch.ones(tokens, dtype=torch.long)], 1)
    experts[:10, 1] = 2
    routed = Routed(torch.randn(tokens, 8), experts, torch.full((tokens, 2), 0.5), torch.zeros(tokens, 8))
    for expert, own in ((0, tokens), (1, tokens - 10), (2, 10), (3, 0)):
        token, weights, count = tokens_of(routed, expert)
        assert count == own
        assert len(token) == len(set(token.tolist())) == max(own, STARVED)
        assert set(weights[:own].tolist()) <= {0.5}
        little = SHRINKAGE * (0.5 if own else 1)
        assert torch.allclose(weights[own:], torch.tensor(little))


@every_family
def test_no_layer_of_experts_is_ever_held(family: str, tmp_path: Path) -> None:
    source = Reader(save_model(tmp_path / "model", family))
    runner, layout = runner_of(source, needs=frozenset())
    largest = max(m.shape[0] * m.shape[1] for layer in layout.layers for m in layer.matrices())
    for _ in layout.layers:
        runner.advance(source.read, source.read)
        held = [p.numel() for p in runner._decoder.parameters() if not p.is_meta]
        assert max(held, default=0) <= largest


@pytest.mark.parametrize(("needs", "times"), [({INPUTS}, 1), ({INPUTS, ORIGINAL_INPUTS}, 2)], ids=["one", "both"])
@pytest.mark.parametrize("batch_size", [5, 2, 1])
def test_each_expert_is_read_once_however_many_batches(
    batch_size: int, needs: set[str], times: int, tmp_path: Path
) -> None:
    """Once more for the originals that run beside."""
    source = Reader(save_model(tmp_path / "model", "qwen3_moe"))
    runner, layout = runner_of(source, needs=needs, batch_size=batch_size)
    read: Counter[str] = Counter()

    def counting(name: str) -> Tensor:
        read[name] += ".experts." in name
        return source.read(name)

    path = layout.family.in_modules
    steps = [[path(m.name) for m in step] for step in layout.layers[0].steps]
    runner.quantize(counting, steps, lambda *_: None)
    runner.advance(counting, counting)
    assert read.total()
    assert max(read.values()) == times


def test_experts_are_solved_where_layers_run(tmp_path: Path) -> None:
    """What they are given is kept in this machine's memory; on `meta`, whatever stays there by mistake is an error."""
    source = Reader(save_model(tmp_path / "model", "qwen3_moe"))
    runner, _ = runner_of(source, needs={INPUTS, ORIGINAL_INPUTS})
    routed = Routed(torch.zeros(9, 128), torch.zeros(9, 1, dtype=torch.long), torch.ones(9, 1), torch.zeros(9, 128))
    runner._device = torch.device("meta")
    name, read = "mlp.experts", runner._reader_of("mlp.experts", source.read)
    solved: list[str] = []

    class Solved(Exception):
        """Before the expert runs, whose outputs `meta` has not."""

    def solve(layer: nn.Module, names: list[str], gram: Gram) -> None:
        assert gram.hessian.is_meta
        solved.extend(names)
        if len(solved) == 3:
            raise Solved

    steps = [[f"{name}.0.gate_proj", f"{name}.0.up_proj"], [f"{name}.0.down_proj"]]
    module = runner._decoder.layers[0].mlp.experts
    with pytest.raises(Solved):
        runner._solve_expert(module, name, 0, steps, routed, torch.zeros(9, 128), read, solve)
    assert solved == [member for step in steps for member in step]


@pytest.mark.parametrize("family", ["deepseek_v3", "lfm2_moe", "ernie4_5_moe"])
def test_what_routers_add_stays_in_float32(family: str, tmp_path: Path) -> None:
    source = Reader(save_model(tmp_path / "model", family))
    runner, layout = runner_of(source, dtype=torch.bfloat16)
    runner._dtype = torch.bfloat16
    runner.index = len(layout.layers) - 1
    with runner._loaded(source.read) as layer:
        routing = {name: each.dtype for name, each in layer.state_dict().items() if name.endswith("bias")}
    assert set(routing.values()) == {torch.float32}


@pytest.mark.parametrize("batch_size", [2, None])
def test_a_run_goes_on_and_spills_to_the_same_bytes(batch_size: int | None, tmp_path: Path) -> None:
    """What a layer's experts were solved with, and run with in the same pass, is what a resumed run computes."""
    model = save_model(tmp_path / "model", "qwen3_5_moe", vocab_size=2048)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(bundled_model() / name, model / name)
    calibration = hlwq.Calibration(
        ("embedded",), samples=5, sequence_length=32, generated_samples=0, batch_size=batch_size
    )

    def run(out: str, calibration: hlwq.Calibration, stop: str = "") -> dict[str, bytes]:
        def report(done: int, total: int, what: str) -> None:
            if stop and what.startswith(stop):
                raise KeyboardInterrupt

        hlwq.quantize(model, tmp_path / out, "best", format="gptq", calibration=calibration, progress=report)
        return {file.name: file.read_bytes() for file in (tmp_path / out).glob("*.safetensors")}

    whole = run("whole", calibration)
    assert run("spilled", replace(calibration, offload_activations=True)) == whole
    with pytest.raises(KeyboardInterrupt):
        run("resumed", replace(calibration, offload_activations=True), stop="layer 2")
    assert list(tmp_path.glob("resumed.partial/activations*"))
    assert run("resumed", replace(calibration, offload_activations=True)) == whole
    assert {file.name for file in (tmp_path / "spilled").iterdir()} == {f.name for f in (tmp_path / "whole").iterdir()}


@pytest.mark.parametrize(
    "options",
    [
        {"format": "gptq"},
        pytest.param({"format": "mlx"}, marks=pytest.mark.slow),
        pytest.param({"format": "hlwq", "bits": 4}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_what_is_calibrated_is_recorded_and_better(
    options: dict[str, Any], experts_model: Path, tmp_path: Path
) -> None:
    calibration = hlwq.Calibration(("embedded",), samples=32, sequence_length=256, generated_samples=0)
    hlwq.quantize(experts_model, tmp_path / "best", "best", calibration=calibration, **options)
    recorded = read_json(tmp_path / "best" / "hlwq.json")["modules"]
    counts = {module: each["calibration_tokens"] for module, each in recorded.items() if ".experts." in module}
    checkpoint = DecodedCheckpoint(tmp_path / "best")
    assert set(counts) == {m for m in checkpoint.quantized_modules() if ".experts." in m}
    config = checkpoint.config["text_config"]
    layers = config["num_hidden_layers"]
    assert sum(counts.values()) == 3 * layers * config["num_experts_per_tok"] * 32 * 256
    nearest = "hlwq" if options["format"] == "hlwq" else "rtn"
    hlwq.quantize(experts_model, tmp_path / "nearest", nearest, **options)
    text = held_out_text()
    best, plain = (
        divergence(tmp_path / name, experts_model, text, context=512, limit=8) for name in ("best", "nearest")
    )
    assert mean_estimate([a - b for a, b in zip(best.chunk_means, plain.chunk_means, strict=True)]).high < 0


def test_fused_and_single_experts_are_quantized_alike(tmp_path: Path) -> None:
    """The two spellings of a source give the same files."""
    from safetensors.torch import load_file, save_file

    single = save_model(tmp_path / "single", "qwen3_moe")
    tensors = load_file(single / "model.safetensors")
    fused = tmp_path / "fused"
    fused.mkdir()
    for layer in range(2):
        place = f"model.layers.{layer}.mlp.experts."
        of = {
            name: torch.stack([tensors.pop(f"{place}{expert}.{name}.weight") for expert in range(4)])
            for name in ("gate_proj", "up_proj", "down_proj")
        }
        tensors[f"{place}gate_up_proj"] = torch.cat([of["gate_proj"], of["up_proj"]], 1)
        tensors[f"{place}down_proj"] = of["down_proj"]
    save_file(tensors, fused / "model.safetensors", metadata={"format": "pt"})
    for name in ("config.json", "tokenizer.json"):
        (fused / name).write_text((single / name).read_text())
    for format_name in ("gptq", "mlx", "hlwq"):
        digests = []
        for source in (single, fused):
            recipe = "hlwq" if format_name == "hlwq" else "rtn"
            hlwq.quantize(source, tmp_path / f"{source.name}-{format_name}", recipe, format=format_name)
            manifest = json.loads((tmp_path / f"{source.name}-{format_name}" / "hlwq.json").read_text())
            digests.append(manifest["sha256"])
        assert digests[0] == digests[1]


@pytest.mark.parametrize("budget", [{"bits": 4.5}, {"size": 10**6}], ids=str)
def test_a_width_of_each_matrix_is_refused(budget: dict[str, Any], tmp_path: Path) -> None:
    source = save_model(tmp_path / "model", "qwen3_moe")
    with pytest.raises(hlwq.UnsupportedError, match="not measured for mixtures of experts"):
        hlwq.quantize(source, tmp_path / "out", "hlwq", **budget)


def test_what_loads_linear_layers_alone_refuses_experts(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    source = save_model(tmp_path / "model", "qwen3_moe")
    with pytest.raises(hlwq.UnsupportedError, match="Experts cannot be quantized as they are loaded"):
        AutoModelForCausalLM.from_pretrained(source, quantization_config=hlwq.HLWQConfig())
    pytest.importorskip("torchao", reason="torchao is not installed")
    model = AutoModelForCausalLM.from_pretrained(source)
    with pytest.raises(hlwq.UnsupportedError, match="Experts are no linear layers"):
        hlwq.torchao.quantize_(model)


@pytest.mark.parametrize("format_name", ["gptq", "compressed-tensors", "mlx", "hlwq"])
def test_experts_stay_or_go_together(format_name: str, tmp_path: Path) -> None:
    source = save_model(tmp_path / "model", "qwen3_5_moe_text")
    recipe = "hlwq" if format_name == "hlwq" else "rtn"
    with pytest.raises(hlwq.UnsupportedError, match="all or none can be quantized"):
        hlwq.quantize(source, tmp_path / "some", recipe, format=format_name, exclude=r"experts\.0\.")
    hlwq.quantize(source, tmp_path / "out", recipe, format=format_name, exclude=r"experts\.\d")
    checkpoint, original = DecodedCheckpoint(tmp_path / "out"), Reader(source)
    assert not any(".experts." in module for module in checkpoint.quantized_modules())
    for name in original.tensors:
        if ".experts." in name:
            assert torch.equal(checkpoint.read(name), original.read(name))


@every_family
def test_routers_and_gates_stay(family: str, tmp_path: Path) -> None:
    source = save_model(tmp_path / "model", family)
    hlwq.quantize(source, tmp_path / "out", "hlwq")
    quantized = DecodedCheckpoint(tmp_path / "out").quantized_modules()
    assert not any(module.endswith((".gate", "shared_expert_gate")) for module in quantized)
    assert any(".experts." in module for module in quantized)


def test_a_stack_beside_single_experts_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    source = save_model(tmp_path / "model", "qwen3_moe")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.mlp.experts.down_proj"] = torch.zeros(4, 128, 64, dtype=torch.bfloat16)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(hlwq.CheckpointError, match="alone and in the stack of all experts"):
        hlwq.quantize(source, tmp_path / "out", "rtn")


def test_experts_of_other_names_are_refused_by_them(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = save_model(tmp_path / "model", "qwen3_moe")
    tensors = load_file(model / "model.safetensors")
    save_file(
        {name.replace(".experts.", ".specialists."): t for name, t in tensors.items()}, model / "model.safetensors"
    )
    with pytest.raises(
        hlwq.UnsupportedError, match=r"files call the experts otherwise than model\.layers\.0\.mlp\.exp"
    ):
        make_plan(Reader(model), RECIPES["rtn"])


def test_transposed_experts_are_refused(tmp_path: Path) -> None:
    """As Qwen3-VL-MoE has them."""
    from safetensors.torch import load_file, save_file

    model = save_model(tmp_path / "model", "qwen3_5_moe_text")
    tensors = load_file(model / "model.safetensors")
    kept = {name: values for name, values in tensors.items() if ".experts." not in name}
    for layer in sorted({name.partition(".experts.")[0] for name in tensors.keys() - kept.keys()}):
        gate, up, down = (
            torch.stack([tensors[f"{layer}.experts.{expert}.{part}_proj.weight"].T for expert in range(4)])
            for part in ("gate", "up", "down")
        )
        kept[f"{layer}.experts.gate_up_proj"] = torch.cat([gate, up], 2)
        kept[f"{layer}.experts.down_proj"] = down.contiguous()
    save_file(kept, model / "model.safetensors")
    with pytest.raises(hlwq.UnsupportedError, match=r"_proj\.weight has shape .*, which is not read"):
        make_plan(Reader(model), RECIPES["rtn"])


def test_packed_experts_without_a_head_are_found(tmp_path: Path) -> None:
    from transformers import AutoModel

    source = save_model(tmp_path / "model", "qwen3_moe")
    hlwq.quantize(source, tmp_path / "out", "hlwq")
    first = AutoModel.from_pretrained(tmp_path / "out", dtype=torch.float32)
    first.save_pretrained(tmp_path / "headless")
    second = AutoModel.from_pretrained(tmp_path / "headless", dtype=torch.float32)
    with torch.inference_mode():
        states = [model(input_ids=TOKENS).last_hidden_state for model in (first, second)]
    assert torch.equal(*states)


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_vllm_is_said_to_have_no_packed_experts_where_it_has_none(family: str, tmp_path: Path) -> None:
    source = save_model(tmp_path / "model", family)
    hlwq.quantize(source, tmp_path / "out", "hlwq")
    failed = {each.engine for each in hlwq.check(tmp_path / "out") if not each.passed}
    assert failed == ({"vLLM with hlwq"} if family == "deepseek_v3" else set())
