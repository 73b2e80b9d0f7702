from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import FAMILY_NAMES, make_checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText

import hlwq
from hlwq import HlwqError
from hlwq.checkpoint import Reader
from hlwq.demo import bundled_model, held_out_text
from hlwq.evaluate.model import load_model
from hlwq.evaluate.perplexity import perplexity_of_tokens
from hlwq.evaluate.speed import speed
from hlwq.formats import Scheme
from hlwq.linear import HLWQEmbedding, HLWQLinear, HLWQTiedHead
from hlwq.sources import DecodedCheckpoint
from hlwq.usage import commands

TOKENS = torch.arange(1, 33)[None]


def logits(model: Any, tokens: Tensor = TOKENS) -> Tensor:
    with torch.inference_mode():
        return model(input_ids=tokens).logits


def load(directory: Path, **options: Any) -> Any:
    """In float32, so that sums taken in another order differ by little."""
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **options)


def packed_modules(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, HLWQLinear | HLWQEmbedding)]


def section(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "config.json").read_text())["quantization_config"]


def assert_same_tensors(found: Path, expected: Path, left_out: tuple[str, ...] = ()) -> None:
    ours, theirs = Reader(found), Reader(expected)
    names = {name for name in theirs.tensors if not name.startswith(left_out)} if left_out else set(theirs.tensors)
    assert set(ours.tensors) == names
    for name in names:
        assert ours.tensors[name] == theirs.tensors[name]
        assert torch.equal(ours.read(name), theirs.read(name)), name


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model in format hlwq: inside a vision wrapper, as the real one is."""
    directory = tmp_path_factory.mktemp("hybrid") / "packed"
    hlwq.quantize(bundled_model(), directory, "hlwq")
    return directory


CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    *((family, {}, {}) for family in FAMILY_NAMES),
    ("llama", {}, {"bits": 3, "group_size": 32}),
    ("llama", {}, {"include_embeddings": True}),
    ("llama", {"tie_word_embeddings": True}, {"include_embeddings": True}),
    ("qwen2", {}, {"exclude": [r"layers\.1\.mlp"], "include": ["lm_head"]}),
    ("qwen3_5", {"tie_word_embeddings": True}, {"include_embeddings": True, "bits": 8}),
    ("llama", {"hidden_size": 192, "num_attention_heads": 6}, {}),  # in_features 192 and 256: two group sizes
]


@pytest.mark.parametrize(("family", "overrides", "options"), CASES)
def test_packed_dense_saved_and_made_on_the_fly_agree(
    family: str, overrides: dict[str, Any], options: dict[str, Any], tmp_path: Path
) -> None:
    source, made = make_checkpoint(tmp_path / "source", family, **overrides), tmp_path / "made"
    hlwq.quantize(source, made, "hlwq", **options)
    model = AutoModelForCausalLM.from_pretrained(made)
    assert len(packed_modules(model)) == len(DecodedCheckpoint(made).quantized_modules())
    model.save_pretrained(tmp_path / "saved")
    left_out = ("model.visual.", "mtp.")  # the class for text has neither
    assert_same_tensors(tmp_path / "saved", made, left_out)
    assert section(tmp_path / "saved") == section(made)

    quantized = AutoModelForCausalLM.from_pretrained(source, quantization_config=hlwq.HLWQConfig(**options))
    assert packed_modules(quantized) == packed_modules(model)
    quantized.save_pretrained(tmp_path / "quantized")
    assert_same_tensors(tmp_path / "quantized", made, left_out)
    assert section(tmp_path / "quantized") == section(made)

    dense = AutoModelForCausalLM.from_pretrained(made, quantization_config=hlwq.HLWQConfig(dequantize=True))
    decoded, _ = load_decoded(made)
    assert not packed_modules(dense)
    for name, tensor in decoded.state_dict().items():
        assert torch.equal(dense.state_dict()[name], tensor), name
    dense.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())

    exact, _ = load_decoded(made, torch.float32)
    torch.testing.assert_close(logits(load(made)), logits(exact), rtol=0, atol=1e-4)
    for again in (tmp_path / "saved", tmp_path / "quantized"):
        assert torch.equal(logits(load(again)), logits(load(made)))


def load_decoded(directory: Path, dtype: torch.dtype = torch.bfloat16) -> tuple[Any, None]:
    """As `load_model` does, without a tokenizer, which small checkpoints lack."""
    checkpoint = DecodedCheckpoint(directory)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hlwq.evaluate.model.load_tokenizer", lambda path: None)
        model, _ = load_model(directory, dtype=dtype)
    assert checkpoint.format.NAME == "hlwq"
    return model, None


def test_wrapper_and_text_class_load_the_same_checkpoint(hybrid: Path, tmp_path: Path) -> None:
    wrapped = AutoModelForImageTextToText.from_pretrained(hybrid)
    text = AutoModelForCausalLM.from_pretrained(hybrid)
    assert torch.equal(logits(wrapped), logits(text))
    wrapped.save_pretrained(tmp_path / "wrapped")
    assert_same_tensors(tmp_path / "wrapped", hybrid)
    quantized = AutoModelForImageTextToText.from_pretrained(bundled_model(), quantization_config=hlwq.HLWQConfig())
    quantized.save_pretrained(tmp_path / "quantized")
    assert_same_tensors(tmp_path / "quantized", hybrid)
    body = AutoModel.from_pretrained(hybrid)
    assert len(packed_modules(body)) == len(packed_modules(text))


def test_model_calls_its_quantized_modules_packed(hybrid: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(hybrid)
    kinds = {name.rpartition(".")[2]: type(module) for name, module in model.named_modules()}
    assert kinds["in_proj_qkv"] is kinds["q_proj"] is kinds["down_proj"] is HLWQLinear
    assert kinds["in_proj_a"] is kinds["lm_head"] is nn.Linear
    assert kinds["embed_tokens"] is nn.Embedding


def test_memory_is_that_of_the_file(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", "llama", vocab_size=2048, tie_word_embeddings=True)
    hlwq.quantize(source, tmp_path / "made", "hlwq", include_embeddings=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "made")
    assert isinstance(model.get_output_embeddings(), HLWQTiedHead)
    held = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    file = (tmp_path / "made" / "model.safetensors").stat().st_size
    assert held == pytest.approx(file, rel=0.05)


def test_sharded_files_and_device_maps(hybrid: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(hybrid, device_map="auto")
    model.save_pretrained(tmp_path / "shards", max_shard_size="500KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "shards", device_map="cpu")
    assert torch.equal(logits(again), logits(model))
    quantized = AutoModelForCausalLM.from_pretrained(
        bundled_model(), quantization_config=hlwq.HLWQConfig(), device_map="auto"
    )
    assert torch.equal(logits(quantized), logits(model))


def test_casting_a_model_leaves_the_norms_as_they_are(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", "llama", tie_word_embeddings=True)
    hlwq.quantize(source, tmp_path / "made", "hlwq", include_embeddings=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "made")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if "norms" in name}
    assert model(input_ids=TOKENS).logits.dtype == torch.bfloat16
    model.to(torch.float32)
    assert model(input_ids=TOKENS).logits.dtype == torch.float32
    for name, tensor in before.items():
        assert model.state_dict()[name].dtype == torch.float16
        assert torch.equal(model.state_dict()[name], tensor)


def test_gradients_reach_what_is_not_packed(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", "llama")
    hlwq.quantize(source, tmp_path / "made", "hlwq", group_size=64)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "made")
    logits(model)  # what is kept from inference must serve gradients, too
    model(input_ids=TOKENS).logits.float().square().mean().backward()
    assert model.model.embed_tokens.weight.grad.abs().max() > 0


def test_dequantize_after_loading(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", "qwen2", tie_word_embeddings=True)
    hlwq.quantize(source, tmp_path / "made", "hlwq", include_embeddings=True)
    model = load(tmp_path / "made")
    packed = logits(model)
    dense = model.dequantize()
    assert not packed_modules(dense)
    assert dense.lm_head.weight is dense.model.embed_tokens.weight
    torch.testing.assert_close(logits(dense), packed, rtol=0, atol=1e-4)


def test_generation_and_perplexity_are_those_of_the_decoded_model(hybrid: Path) -> None:
    decoded, tokenizer = load_model(hybrid, dtype=torch.float32)
    packed = load(hybrid)
    prompt = tokenizer("The northern end of the island", return_tensors="pt")["input_ids"]
    made = [model.generate(prompt, max_new_tokens=12, do_sample=False) for model in (packed, decoded)]
    assert torch.equal(*made)
    tokens = torch.tensor(tokenizer(held_out_text().read_text(encoding="utf-8")[:40_000])["input_ids"])
    measured = [
        perplexity_of_tokens(model, tokens, protocol="chunked", context=256, limit=8).perplexity
        for model in (packed, decoded)
    ]
    assert measured[0] == pytest.approx(measured[1], abs=1e-3)


@pytest.mark.parametrize(
    ("rows", "columns", "group_size", "bits"), [(48, 576, 64, 5), (24, 256, 128, 3), (9000, 1024, 32, 8)]
)
def test_one_row_is_multiplied_as_many_are(rows: int, columns: int, group_size: int, bits: int) -> None:
    pytest.importorskip("numba", reason="the kernels of the extra `kernels` are not installed")
    generator = torch.Generator().manual_seed(0)
    linear = HLWQLinear(columns, rows, Scheme(bits, group_size))
    linear.weight_packed.copy_(torch.randint(256, linear.weight_packed.shape, generator=generator))
    linear.weight_norms.copy_(torch.rand(linear.weight_norms.shape, generator=generator))
    linear.weight_norms[0] = 0
    linear.weight_norms[1] = 6e-8  # subnormal in float16
    inputs = torch.randn(1, 1, columns, generator=generator).to(torch.bfloat16)
    with torch.inference_mode():
        outputs = linear(inputs)
        assert torch.equal(outputs, linear(inputs.float()).to(torch.bfloat16))
        several = linear(inputs.float().expand(3, 1, columns))[:1]
        torch.testing.assert_close(linear(inputs.float()), several, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_perplexity_on_a_real_llm(smollm2: Path, tmp_path: Path) -> None:
    hlwq.quantize(smollm2, tmp_path / "made", "hlwq")
    decoded, tokenizer = load_model(tmp_path / "made", dtype=torch.float32)
    packed = load(tmp_path / "made")
    tokens = torch.tensor(tokenizer(held_out_text().read_text(encoding="utf-8")[:20_000])["input_ids"])
    measured = [
        perplexity_of_tokens(model, tokens, protocol="chunked", context=512, limit=4).perplexity
        for model in (packed, decoded)
    ]
    assert measured[0] == pytest.approx(measured[1], abs=1e-3)


@pytest.mark.slow
def test_command_of_the_format_works(hybrid: Path) -> None:
    command = dict(commands(hybrid, "hlwq"))["transformers"]
    words = [sys.executable if word == "python" else word for word in shlex.split(command)]
    said = subprocess.run(words, check=True, capture_output=True, text=True).stdout
    assert said.startswith("Hello")


REGISTERED_LATER = """
import sys, hlwq
assert "transformers" not in sys.modules
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
assert "hlwq" in AUTO_QUANTIZER_MAPPING
"""
REGISTERED_AT_ONCE = """
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
import hlwq
assert "hlwq" in AUTO_QUANTIZER_MAPPING
"""
WITHOUT_TRANSFORMERS = """
import sys
sys.modules["transformers"] = None
import hlwq
try:
    hlwq.HLWQConfig
except hlwq.HlwqError as error:
    assert "pip install" in str(error)
"""


@pytest.mark.parametrize(
    "script",
    [
        pytest.param(REGISTERED_LATER, id="transformers later"),
        pytest.param(REGISTERED_AT_ONCE, id="transformers before", marks=pytest.mark.slow),
        pytest.param(WITHOUT_TRANSFORMERS, id="no transformers", marks=pytest.mark.slow),
    ],
)
def test_importing_hlwq_registers_it_and_imports_no_transformers(script: str) -> None:
    subprocess.run([sys.executable, "-c", script], check=True)


def _edit_tensors(directory: Path, edit: Any) -> None:
    tensors = load_file(directory / "model.safetensors")
    edit(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def _edit_section(directory: Path, **values: Any) -> None:
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] |= values
    (directory / "config.json").write_text(json.dumps(config))


DOWN = "model.layers.0.mlp.down_proj"
DAMAGE = {
    "version 2": lambda path: _edit_section(path, version=2, more=1),
    "does not have the bits": lambda path: _edit_section(path, bits=4),
    "not have the bits and": lambda path: _edit_section(path, group_size=100),
    f"{DOWN}.weight_norms is missing": lambda path: _edit_tensors(path, lambda t: t.pop(f"{DOWN}.weight_norms")),
    f"{DOWN}.weight is missing": lambda path: _edit_tensors(
        path, lambda t: [t.pop(f"{DOWN}.{part}") for part in ("weight_norms", "weight_packed")]
    ),
    "model.norm.weight is missing": lambda path: _edit_tensors(path, lambda t: t.pop("model.norm.weight")),
    "have the bits": lambda path: _edit_tensors(
        path, lambda t: t.update({f"{DOWN}.weight_norms": t[f"{DOWN}.weight_norms"][:-1]})
    ),
    "the bits and group": lambda path: _edit_tensors(
        path, lambda t: t.update({f"{DOWN}.weight_norms": t[f"{DOWN}.weight_norms"].float()})
    ),
    "has shape": lambda path: _edit_tensors(
        path,
        lambda t: t.update({f"{DOWN}.{part}": t[f"{DOWN}.{part}"][:-1] for part in ("weight_norms", "weight_packed")}),
    ),
    "damaged or truncated": lambda path: (path / "model.safetensors").write_bytes(
        (path / "model.safetensors").read_bytes()[:-100]
    ),
}


@pytest.mark.parametrize("message", DAMAGE)
def test_damaged_checkpoints_are_refused_in_a_line(message: str, tmp_path: Path) -> None:
    made = tmp_path / "made"
    hlwq.quantize(make_checkpoint(tmp_path / "source", "llama"), made, "hlwq")
    DAMAGE[message](made)
    with pytest.raises(HlwqError, match=message) as caught:
        AutoModelForCausalLM.from_pretrained(made)
    assert "\n" not in str(caught.value)


def test_what_cannot_be_quantized_on_the_fly_is_refused_in_a_line(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", "llama")
    config = hlwq.HLWQConfig
    for options, message in [
        ({"dequantize": True}, "not quantized"),
        ({"bits": 9}, "2, 3, 4"),
        ({"group_size": 96}, "power of two"),
        ({"exclude": ["nothing"]}, "matches no tensor"),
    ]:
        with pytest.raises(HlwqError, match=message):
            AutoModelForCausalLM.from_pretrained(source, quantization_config=config(**options))
    with pytest.raises(TypeError):
        config(bit=4)
    _edit_tensors(source, lambda tensors: tensors[f"{DOWN}.weight"].fill_(float("nan")))
    with pytest.raises(HlwqError, match=rf"{DOWN}\.weight: it holds a value that is NaN"):
        AutoModelForCausalLM.from_pretrained(source, quantization_config=config())


def test_config_is_not_changed_by_what_it_is_used_for(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", "llama", hidden_size=192, num_attention_heads=6)
    config = hlwq.HLWQConfig(bits=4)
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config)
    assert model.config.quantization_config.group_size == 64
    assert (config.bits, config.group_size, config.modules) == (4, 128, {})


def test_packed_speed_is_for_format_hlwq(hybrid: Path) -> None:
    result = speed(hybrid, prompt_tokens=16, new_tokens=3, runs=1, packed=True)
    assert result.engine == "transformers, packed"
    with pytest.raises(HlwqError, match="format dense"):
        speed(bundled_model(), packed=True)


def test_check_says_what_transformers_demands(hybrid: Path, tmp_path: Path) -> None:
    assert all(line.passed for line in hlwq.check(hybrid))
    made = tmp_path / "made"
    hlwq.quantize(make_checkpoint(tmp_path / "source", "llama"), made, "hlwq")
    (made / "model.safetensors").rename(made / "weights.safetensors")
    config = json.loads((made / "config.json").read_text())
    del config["model_type"]
    (made / "config.json").write_text(json.dumps(config))
    failed = [(line.engine, line.detail) for line in hlwq.check(made) if not line.passed]
    assert failed == [
        ("transformers", "neither model.safetensors nor model.safetensors.index.json."),
        ("transformers", "model_type."),
    ]
