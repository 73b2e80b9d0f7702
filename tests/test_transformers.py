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
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, Gemma3TextConfig
from transformers.quantizers import auto

import hlwq
from hlwq import HlwqError, UnsupportedError, integrations
from hlwq.containers import Reader
from hlwq.decoded import DecodedCheckpoint
from hlwq.demo import bundled_model, held_out_text
from hlwq.errors import HlwqWarning
from hlwq.evaluate.model import load_model
from hlwq.evaluate.perplexity import perplexity_of_tokens
from hlwq.evaluate.speed import speed
from hlwq.formats import FORMATS, Scheme
from hlwq.integrations.transformers import _replace
from hlwq.linear import HLWQEmbedding, HLWQLinear, HLWQTiedHead
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
    ("llama", {}, {"include_embeddings": False}),
    ("llama", {"tie_word_embeddings": True}, {}),
    ("qwen2", {}, {"include_embeddings": False, "exclude": [r"layers\.1\.mlp"], "include": ["lm_head"]}),
    ("qwen3_5", {"tie_word_embeddings": True}, {"bits": 8}),
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
    assert checkpoint.format.name == "hlwq"
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
    assert len(packed_modules(body)) == len(packed_modules(text)) - 1  # it has no head


def test_model_calls_its_quantized_modules_packed(hybrid: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(hybrid)
    kinds = {name.rpartition(".")[2]: type(module) for name, module in model.named_modules()}
    assert kinds["in_proj_qkv"] is kinds["q_proj"] is kinds["down_proj"] is kinds["lm_head"] is HLWQLinear
    assert kinds["in_proj_a"] is nn.Linear
    assert kinds["embed_tokens"] is HLWQEmbedding


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


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A small model whose head is tied to its embedding, and the same with all of it packed."""
    directory = tmp_path_factory.mktemp("tied")
    source = make_checkpoint(directory / "source", "llama", tie_word_embeddings=True)
    hlwq.quantize(source, directory / "made", "hlwq", include_embeddings=True)
    return source, directory / "made"


ON_CPU = dict.fromkeys(("model.embed_tokens", "model.layers", "model.norm", "model.rotary_emb", "lm_head"), "cpu")


@pytest.mark.parametrize("offload_buffers", [False, True])
@pytest.mark.parametrize("on_disk", [{"model.layers": "disk"}, {"model.embed_tokens": "disk"}], ids=str)
def test_codes_are_offloaded_to_disk(
    on_disk: dict[str, str], offload_buffers: bool, tied: tuple[Path, Path], tmp_path: Path
) -> None:
    source, made = tied
    expected = logits(AutoModelForCausalLM.from_pretrained(made))
    options = {"device_map": {**ON_CPU, **on_disk}, "offload_buffers": offload_buffers}
    packed = AutoModelForCausalLM.from_pretrained(made, offload_folder=tmp_path / "packed", **options)
    config = hlwq.HLWQConfig(include_embeddings=True)
    quantized = AutoModelForCausalLM.from_pretrained(
        source, offload_folder=tmp_path / "quantized", quantization_config=config, **options
    )
    for model in (packed, quantized):
        codes = {name: parameter for name, parameter in model.named_parameters() if name.endswith("weight_packed")}
        assert {name for name, parameter in codes.items() if parameter.is_meta} == {
            name for name in codes if name.startswith(tuple(on_disk))
        }
        assert torch.equal(logits(model), expected)
        model.save_pretrained(tmp_path / "saved")
        assert_same_tensors(tmp_path / "saved", made)
        with pytest.raises(HlwqError, match="Offloaded weights cannot be decoded"):
            model.dequantize()


def test_packed_model_has_the_dtype_that_it_was_loaded_in(tied: tuple[Path, Path], tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tied[1])
    assert model.dtype == torch.bfloat16  # and not that of the norms
    assert not any(parameter.requires_grad for name, parameter in model.named_parameters() if "packed" in name)
    model.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["dtype"] == "bfloat16"


def test_tied_head_goes_where_its_embedding_is(monkeypatch: pytest.MonkeyPatch) -> None:
    embedding, seen = HLWQEmbedding(8, 64, Scheme(5, 32), torch.float32, "meta"), []

    def multiply(inputs: Tensor) -> Tensor:
        seen.append(inputs.device.type)
        return torch.ones(3, 8)

    monkeypatch.setattr(embedding, "multiply", multiply)
    assert HLWQTiedHead(embedding)(torch.ones(3, 64)).device.type == "cpu"
    assert seen == ["meta"]


def test_packed_modules_say_that_they_have_no_weight(tied: tuple[Path, Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(tied[1])
    for call in (
        lambda: model.resize_token_embeddings(200),
        lambda: model.get_output_embeddings().weight,
        lambda: model.model.layers[0].mlp.down_proj.weight,
    ):
        with pytest.raises(HlwqError, match=r"has no weight, it is packed\. Decode"):
            call()
    assert not hasattr(model.lm_head, "weight")
    for ids in ([[1, -1]], [[1, 10**6]]):
        with pytest.raises(IndexError):
            model(input_ids=torch.tensor(ids))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_an_embedding_that_scales_its_rows_does_so_packed(dtype: torch.dtype) -> None:
    """Gemma's: rows times the root of the hidden size, rounded to the model's dtype; the head tied to it has none."""
    config = Gemma3TextConfig(
        vocab_size=96,
        hidden_size=192,  # whose root bfloat16 rounds
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    name, weight = "model.embed_tokens", model.model.embed_tokens.weight.detach().clone()
    matrix = hlwq.Nearest().solve(weight.float(), hlwq.LloydGrid(6, 64), hlwq.Hadamard(64))
    assert "lm_head.weight" in _replace(model, name, Scheme(6, 64))
    packed = model.get_submodule(name).to_empty(device="cpu")
    for part, tensor in FORMATS["hlwq"].encode(name, matrix, "").items():
        getattr(packed, part.rpartition(".")[2]).copy_(tensor)
    reference = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    reference.load_state_dict(
        {key: value for key, value in model.state_dict().items() if not key.startswith((name, "lm_head"))}, strict=False
    )
    reference.model.embed_tokens.weight.data = matrix.dequantize(dtype)
    reference.tie_weights()
    expected = reference.model.embed_tokens(TOKENS)
    assert (expected.float() - matrix.dequantize(dtype).float()[TOKENS]).abs().max() > 0.1
    assert packed(TOKENS).dtype == dtype
    assert torch.equal(packed(TOKENS), expected)
    decoded = packed.dequantize(dtype)
    assert torch.equal(decoded.weight, matrix.dequantize(dtype))
    assert torch.equal(decoded(TOKENS), expected)
    inputs = torch.randn(1, 3, 192, generator=torch.Generator().manual_seed(1)).to(dtype)
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-4}
    with torch.inference_mode():
        torch.testing.assert_close(model.lm_head(inputs), reference.lm_head(inputs), **tolerance)
    if dtype == torch.float32:
        torch.testing.assert_close(logits(model), logits(reference), rtol=1e-3, atol=1e-3)


def test_an_embedding_that_does_something_else_cannot_be_packed() -> None:
    class Odd(nn.Embedding):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) + 1

    model = AutoModelForCausalLM.from_config(Gemma3TextConfig(vocab_size=96, hidden_size=64, num_hidden_layers=1))
    model.model.embed_tokens = Odd(96, 64)
    with pytest.raises(UnsupportedError, match="does more than look rows up") as refused:
        _replace(model, "model.embed_tokens", Scheme(5, 64))
    assert (refused.value.argument, refused.value.tensor) == ("include_embeddings", "model.embed_tokens")


def test_outputs_have_the_dtype_of_the_inputs_whatever_the_bias_has() -> None:
    linear = HLWQLinear(64, 8, Scheme(5, 32), nn.Parameter(torch.ones(8)))
    linear.weight_packed.zero_()
    linear.weight_norms.zero_()
    for dtype in (torch.bfloat16, torch.float32):
        assert linear(torch.ones(2, 64, dtype=dtype)).dtype == dtype
    assert linear.dequantize(torch.float16).bias.dtype == torch.float16


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
    hlwq.quantize(source, tmp_path / "made", "hlwq", group_size=64, include_embeddings=False)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_dequantize_casts_the_whole_model(dtype: torch.dtype, tmp_path: Path) -> None:
    hlwq.quantize(make_checkpoint(tmp_path / "source", "qwen2"), tmp_path / "made", "hlwq")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "made").dequantize(dtype)
    assert {parameter.dtype for parameter in dense.parameters()} == {dtype}
    assert logits(dense).dtype == dtype
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "made")
    saved.save_pretrained(tmp_path / "saved")  # transformers then has the name of the dtype in its place
    assert logits(saved.dequantize()).dtype == torch.bfloat16


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


@pytest.mark.parametrize(
    "script",
    [
        pytest.param(REGISTERED_LATER, id="transformers later"),
        pytest.param(REGISTERED_AT_ONCE, id="transformers before", marks=pytest.mark.slow),
    ],
)
def test_importing_hlwq_registers_it_and_imports_no_transformers(script: str) -> None:
    subprocess.run([sys.executable, "-c", script], check=True)


def test_what_transformers_lacks_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "hlwq.integrations.transformers")
    monkeypatch.delattr(auto, "LOADING_ATTRIBUTES_CONFIG_TYPES")
    with pytest.warns(HlwqWarning, match=r"KeyError.*hlwq needs transformers 5\.16"):
        integrations._register()


@pytest.mark.filterwarnings("error")
def test_registering_twice_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integrations, "transformers", sys.modules["hlwq.integrations.transformers"])
    for table in (auto.AUTO_QUANTIZATION_CONFIG_MAPPING, auto.AUTO_QUANTIZER_MAPPING):
        monkeypatch.setitem(table, "hlwq", table["hlwq"])
    monkeypatch.delitem(sys.modules, "hlwq.integrations.transformers")
    integrations._register()


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
    "the key surprise, which": lambda path: _edit_section(path, surprise=1),
    'bits is "5"': lambda path: _edit_section(path, bits="5"),
    r"modules is \[\]": lambda path: _edit_section(path, modules=[]),
    "group_size is 0": lambda path: _edit_section(path, group_size=0),
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
        ({"bits": 9}, "1 to 8 bits"),
        ({"bits": 1}, "2, 3, 4"),
        ({"group_size": 96}, "power of two"),
        ({"exclude": ["nothing"]}, "matches no tensor"),
    ]:
        with pytest.raises(HlwqError, match=message):
            AutoModelForCausalLM.from_pretrained(source, quantization_config=config(**options))
    with pytest.raises(TypeError):
        config(bit=4)
    with pytest.raises(HlwqError, match="the key bit, which"):
        AutoModelForCausalLM.from_pretrained(source, quantization_config={"quant_method": "hlwq", "bit": 4})
    _edit_tensors(source, lambda tensors: tensors[f"{DOWN}.weight"].fill_(float("nan")))
    with pytest.raises(HlwqError, match=rf"{DOWN}\.weight: it holds a value that is NaN"):
        AutoModelForCausalLM.from_pretrained(source, quantization_config=config())


def test_polarquant_directories_are_sent_to_convert(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", "llama")
    _edit_tensors(
        source,
        lambda t: t.update({f"{DOWN}.codes": t.pop(f"{DOWN}.weight").char(), f"{DOWN}.norms": torch.ones(128, 2)}),
    )
    for options in ({}, {"dequantize": True}):
        with pytest.raises(HlwqError, match=r"PolarQuant.*hlwq convert"):
            AutoModelForCausalLM.from_pretrained(source, quantization_config=hlwq.HLWQConfig(**options))


@pytest.mark.parametrize("options", [{}, {"include_embeddings": True}], ids=str)
def test_a_trained_head_that_is_said_to_be_tied_is_refused(options: dict[str, bool], tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", "llama", tie_word_embeddings=True)
    _edit_tensors(source, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"] * 2}))
    for call in (
        lambda: hlwq.quantize(source, tmp_path / "made", "hlwq", **options),
        lambda: AutoModelForCausalLM.from_pretrained(source, quantization_config=hlwq.HLWQConfig(**options)),
    ):
        with pytest.raises(HlwqError, match=r"ties lm_head\.weight to the embedding, but the two differ"):
            call()


@pytest.mark.parametrize(
    "options", [{"bits": 3}, {"group_size": 128}, {"include_embeddings": True}, {"exclude": ["q"]}]
)
def test_options_change_nothing_where_codes_are_stored(options: dict[str, Any], tied: tuple[Path, Path]) -> None:
    with pytest.raises(
        HlwqError, match=f"`{next(iter(options))}` changes nothing: the checkpoint is quantized already"
    ):
        AutoModelForCausalLM.from_pretrained(tied[1], quantization_config=hlwq.HLWQConfig(**options))


def test_codes_are_of_the_files_own_values(tmp_path: Path) -> None:
    source, made = make_checkpoint(tmp_path / "source", "llama"), tmp_path / "made"
    generator = torch.Generator().manual_seed(1)
    noise = torch.rand(256, generator=generator) * 1e-4  # less than bfloat16 holds
    _edit_tensors(source, lambda t: t.update({name: w.float() + noise[: w.shape[-1]] for name, w in t.items()}))
    hlwq.quantize(source, made, "hlwq")
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=hlwq.HLWQConfig(), dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    model.save_pretrained(tmp_path / "saved")
    saved, written = Reader(tmp_path / "saved"), Reader(made)
    codes = [name for name in written.tensors if "weight_" in name]
    assert codes
    for name in codes:
        assert torch.equal(saved.read(name), written.read(name)), name


def test_models_without_their_head_are_saved_and_loaded(tmp_path: Path) -> None:
    source, made = (
        make_checkpoint(tmp_path / "source", "llama", hidden_size=192, num_attention_heads=6),
        tmp_path / "made",
    )
    hlwq.quantize(source, made, "hlwq")
    body = AutoModel.from_pretrained(made)
    body.save_pretrained(tmp_path / "saved")
    AutoModel.from_pretrained(source, quantization_config=hlwq.HLWQConfig()).save_pretrained(tmp_path / "quantized")
    assert_same_tensors(tmp_path / "quantized", tmp_path / "saved")
    assert section(tmp_path / "quantized") == section(tmp_path / "saved")
    assert set(section(made)["modules"]) == {f"model.{name}" for name in section(tmp_path / "saved")["modules"]}
    again = AutoModel.from_pretrained(tmp_path / "saved")
    with torch.inference_mode():
        assert torch.equal(again(input_ids=TOKENS)[0], body(input_ids=TOKENS)[0])


def test_a_single_pattern_is_one_pattern(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", "llama")
    config = hlwq.HLWQConfig(include_embeddings=False, exclude="o_proj", include="lm_head")
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config)
    leaves = {name.rpartition(".")[2] for name in packed_modules(model)}
    assert leaves == {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj", "lm_head"}


def test_config_is_not_changed_by_what_it_is_used_for(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", "llama", hidden_size=192, num_attention_heads=6)
    config = hlwq.HLWQConfig(bits=4)
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config)
    assert model.config.quantization_config.group_size == 64
    assert (config.bits, config.group_size, config.modules) == (4, 128, {})
    model.save_pretrained(tmp_path / "saved")
    described = model.config.quantization_config
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", quantization_config=described)
    assert torch.equal(logits(again), logits(model))


def test_packed_speed_is_for_format_hlwq(hybrid: Path) -> None:
    result = speed(hybrid, prompt_tokens=16, new_tokens=3, runs=1, packed=True)
    assert result.engine == "transformers, packed"
    with pytest.raises(HlwqError, match="format dense"):
        speed(bundled_model(), packed=True)


def test_check_says_what_transformers_demands(hybrid: Path, tmp_path: Path) -> None:
    said = hlwq.check(hybrid)
    assert all(line.passed for line in said if line.engine == "transformers")
    assert [line.remedy for line in said if not line.passed] == ["Quantize again with `include_embeddings=False`."]
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
