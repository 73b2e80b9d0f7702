"""PolarQuant and early HLWQ files, laid out here by hand as their formats say; real ones are in tests/engines."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import make_checkpoint
from safetensors.torch import load_file, save_file
from scipy.linalg import hadamard
from scipy.stats import norm

import hlwq
from hlwq import HlwqError
from hlwq.containers import Reader
from hlwq.decoded import DecodedCheckpoint, open_dense
from hlwq.formats import FORMATS, detect_format, polar

WIDTH, BLOCK = 192, 128
UP = "model.layers.0.mlp.up_proj"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "model", "llama", hidden_size=WIDTH, intermediate_size=320)


def bit_stream(codes: np.ndarray, bits: int, order: str) -> np.ndarray:
    """Codes along the last axis as a stream of bits."""
    fields = (codes[..., None] >> np.arange(bits)) & 1
    if order == "big":
        fields = fields[..., ::-1]
    return np.packbits(fields.reshape(*codes.shape[:-1], -1).astype(np.uint8), axis=-1, bitorder=order)


def nibbles(codes: np.ndarray) -> np.ndarray:
    blocks = codes.reshape(len(codes), -1, 2, BLOCK // 2).astype(np.uint8)
    return (blocks[:, :, 0] | blocks[:, :, 1] << 4).reshape(len(codes), -1)


def centroids(bits: int, cut: float) -> np.ndarray:
    """A hundred rounds of Lloyd's from even steps, as the author wrote them."""
    edges = np.linspace(-4, 4, 2**bits + 1)
    edges[[0, -1]] = -cut, cut
    for _ in range(100):
        levels = -np.diff(norm.pdf(edges)) / np.diff(norm.cdf(edges))
        edges[1:-1] = (levels[1:] + levels[:-1]) / 2
    return levels


def lay_out(
    source: Path, to: Path, spelling: str, bits: int, stated: dict[str, Any] | None = None
) -> dict[str, np.ndarray]:
    """Store a model's matrices as random codes; returns the weights that these stand for."""
    rng = np.random.default_rng(bits)
    tensors, stored, expected, layers = load_file(source / "model.safetensors"), {}, {}, {}
    for name, tensor in tensors.items():
        if "_proj" not in name:
            stored[name] = tensor
            continue
        rows, columns = tensor.shape
        blocks = -(-columns // BLOCK)
        codes = rng.integers(0, 2**bits, (rows, blocks * BLOCK))
        norms = torch.from_numpy(rng.uniform(0, 1, (rows, blocks))).half()
        module, cut = name.removesuffix(".weight"), {"counted": 4.0, "plain": np.inf}.get(spelling, np.inf)
        levels = (
            centroids(bits, cut) if spelling in ("counted", "plain", "unmeasured") else rng.normal(size=2**bits)
        ) / BLOCK**0.5
        values = levels[codes].reshape(rows, blocks, BLOCK) @ hadamard(BLOCK) / BLOCK**0.5
        expected[name] = (values * norms.double().numpy()[..., None]).reshape(rows, -1)[:, :columns]
        packed: dict[str, Callable[[], np.ndarray]] = {
            "bytes": lambda codes=codes: codes.astype(np.int8),
            "unmeasured": lambda codes=codes: codes.astype(np.int8),
            "nibbles": lambda codes=codes: nibbles(codes),
            "stream": lambda codes=codes: bit_stream(codes, 5, "little"),
            "counted": lambda codes=codes: bit_stream(codes.reshape(-1), bits, "big"),
            "plain": lambda codes=codes: bit_stream(codes, bits, "big"),
        }
        parts = {"norms": norms, "codes": torch.from_numpy(packed[spelling]())}
        if spelling == "unmeasured":
            stored |= {f"{module.replace('.', '__')}__{part}": tensor for part, tensor in parts.items()}
        elif spelling in ("counted", "plain"):
            meta = [rows, blocks, BLOCK, codes.size] if spelling == "counted" else [bits, blocks * BLOCK]
            key = (name if spelling == "counted" else module).replace(".", "__")
            parts["packed"], parts["meta"] = parts.pop("codes"), torch.tensor(meta)
            stored |= {f"{key}__{part}": tensor for part, tensor in parts.items()}
        else:
            parts["ct_scaled"] = torch.from_numpy(levels).float()
            stored |= {f"{module}.{part}": tensor for part, tensor in parts.items()}
        layers[module] = {"bits": bits, "block_size": BLOCK, "in_features": columns}
    to.mkdir()
    save_file(stored, to / "model.safetensors")
    for file in ("config.json", "tokenizer.json"):
        (to / file).write_text((source / file).read_text())
    if stated is not None:
        (to / "polar_config.json").write_text(json.dumps({"layers": layers, **stated}))
    return expected


V4, V5 = {"format": "polar_engine_v4", "block_size": BLOCK}, {"format": "polar_engine_v5", "block_size": BLOCK}
LAYOUTS = [
    ("bytes", 3, V4),
    ("bytes", 8, V5),
    ("nibbles", 2, V4),
    ("nibbles", 4, V5),
    ("stream", 5, V5),
    *(("counted", bits, None) for bits in (2, 3, 4, 5, 6)),
    ("counted", 5, {"block_size": BLOCK}),
    *(("plain", bits, {}) for bits in (3, 5)),
    ("unmeasured", 5, None),
    ("unmeasured", 3, {}),
]


@pytest.mark.parametrize(("spelling", "bits", "stated"), LAYOUTS)
def test_every_layout_decodes_to_the_weights_that_its_codes_stand_for(
    spelling: str, bits: int, stated: dict[str, Any] | None, model: Path, tmp_path: Path
) -> None:
    expected = lay_out(model, tmp_path / "polar", spelling, bits, stated)
    ours = DecodedCheckpoint(tmp_path / "polar")
    assert ours.format is polar.FORMAT
    assert {f"{module}.weight" for module in ours.quantized_modules()} == set(expected)
    for name, weights in expected.items():
        scheme = ours.scheme_of(name)
        assert scheme is not None
        assert (scheme.bits, scheme.group_size) == (bits, BLOCK)
        np.testing.assert_allclose(ours.read(name).numpy(), weights, rtol=0, atol=1e-6)
    original = Reader(model)
    for name in set(original.tensors) - set(expected):
        assert torch.equal(ours.read(name), original.read(name))
    assert sum(map(ours.stored_bytes, ours.tensors)) == sum(spec.nbytes for spec in Reader(ours.path).tensors.values())


CONFIG, RENAMED = polar.CONFIG_FILES


@pytest.mark.parametrize("names", [[RENAMED], [CONFIG, RENAMED]])
def test_its_configuration_is_read_under_both_names(names: list[str], model: Path, tmp_path: Path) -> None:
    expected = lay_out(model, tmp_path / "polar", "bytes", 3, V4)  # nothing else says that codes have 3 bits
    text = (tmp_path / "polar" / CONFIG).read_text()
    (tmp_path / "polar" / CONFIG).unlink()
    for name in names:
        (tmp_path / "polar" / name).write_text(text)
    ours = DecodedCheckpoint(tmp_path / "polar")
    for name, weights in expected.items():
        scheme = ours.scheme_of(name)
        assert scheme is not None
        assert scheme.bits == 3
        np.testing.assert_allclose(ours.read(name).numpy(), weights, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": "polar_engine_v5"}, "differ. Delete the one"),
        ({"layers": {}}, "differ. Delete the one"),
        ({"block_size": 64}, "differ. Delete the one"),
        ({"format": "polar_engine_v6"}, "differ. Delete the one"),
    ],
)
def test_two_configurations_that_differ_are_refused(
    change: dict[str, Any], said: str, model: Path, tmp_path: Path
) -> None:
    lay_out(model, tmp_path / "polar", "nibbles", 4, V4)
    config = json.loads((tmp_path / "polar" / CONFIG).read_text())
    (tmp_path / "polar" / RENAMED).write_text(json.dumps(config | change))
    with pytest.raises(HlwqError, match=said) as refused:
        DecodedCheckpoint(tmp_path / "polar")
    assert CONFIG in str(refused.value)
    assert RENAMED in str(refused.value)


@pytest.mark.parametrize("change", [{"format": "polar_engine_v6"}, {"layers": []}, {"block_size": 48}])
def test_errors_name_the_configuration_that_is_there(change: dict[str, Any], model: Path, tmp_path: Path) -> None:
    lay_out(model, tmp_path / "polar", "nibbles", 4, V4)
    config = json.loads((tmp_path / "polar" / CONFIG).read_text())
    if "block_size" in change:
        config["layers"][UP] |= change
    (tmp_path / "polar" / RENAMED).write_text(json.dumps(config | change))
    (tmp_path / "polar" / CONFIG).unlink()
    with pytest.raises(HlwqError) as refused:
        DecodedCheckpoint(tmp_path / "polar")
    assert CONFIG not in str(refused.value)


def test_a_pickle_beside_them_is_neither_read_nor_copied(model: Path, tmp_path: Path) -> None:
    lay_out(model, tmp_path / "polar", "nibbles", 4, V4)
    (tmp_path / "polar" / CONFIG).rename(tmp_path / "polar" / RENAMED)
    pickles = ["hlwq_state.pt", "codes.pkl", "polar_state.bin", "hlwq_config.pkl", "weights.pth"]
    for name in pickles:
        (tmp_path / "polar" / name).write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    hlwq.convert(tmp_path / "polar", tmp_path / "out", "dense")
    written = {file.name for file in (tmp_path / "out").iterdir()}
    assert written == {"config.json", "hlwq.json", "model.safetensors", "tokenizer.json"}


def test_centroids_are_the_unfinished_ones_of_their_author() -> None:
    for bits in (2, 5, 6):
        for cut in (4.0, np.inf):
            np.testing.assert_allclose(polar._centroids(bits, cut).numpy(), centroids(bits, cut), atol=1e-6)
    # The sixth digit of what each of his two programs prints for the outermost of 32.
    assert [float(polar._centroids(5, cut)[-1]) for cut in (4.0, np.inf)] == pytest.approx(
        [3.423144, 3.551609], abs=1e-5
    )


def test_centroids_may_be_stored_without_the_division_by_the_root_of_the_block(model: Path, tmp_path: Path) -> None:
    expected = lay_out(model, tmp_path / "polar", "bytes", 4, V4)
    file = tmp_path / "polar" / "model.safetensors"
    tensors = load_file(file)
    for name in list(tensors):
        if name.endswith(".ct_scaled"):
            tensors[name.removesuffix("_scaled")] = tensors.pop(name) * BLOCK**0.5
    save_file(tensors, file)
    decoded = DecodedCheckpoint(tmp_path / "polar").read(f"{UP}.weight").numpy()
    np.testing.assert_allclose(decoded, expected[f"{UP}.weight"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("format_name", ["gptq", "mlx", "dense"])
def test_it_converts_to_every_format(format_name: str, model: Path, tmp_path: Path) -> None:
    expected = lay_out(model, tmp_path / "polar", "nibbles", 4, V4)
    result = hlwq.convert(tmp_path / "polar", tmp_path / "out", format_name)
    assert all(line.passed for line in result.checks)
    assert not (tmp_path / "out" / "polar_config.json").exists()
    out = DecodedCheckpoint(tmp_path / "out")
    assert out.format is FORMATS[format_name]
    most = {"gptq": 0.03, "mlx": 0.03, "dense": 1e-5}[format_name]
    for name, weights in expected.items():
        error = np.square(out.read(name).float().numpy() - weights).sum() / np.square(weights).sum()
        assert error < most, name
    assert hlwq.inspect(tmp_path / "polar").format == "polar"
    assert all(line.passed for line in hlwq.check(tmp_path / "polar"))


def test_the_gates_of_a_hybrid_are_not_rounded_again(tmp_path: Path) -> None:
    lay_out(make_checkpoint(tmp_path / "model", "qwen3_5_text"), tmp_path / "polar", "nibbles", 4, V4)
    assert any("in_proj_a" in module for module in DecodedCheckpoint(tmp_path / "polar").quantized_modules())
    hlwq.convert(tmp_path / "polar", tmp_path / "out", "gptq")
    stored = DecodedCheckpoint(tmp_path / "out").quantized_modules()
    assert any("in_proj_z" in module for module in stored)
    assert not any("in_proj_a" in module for module in stored)


def test_the_decoder_of_a_vision_model_is_told_its_architecture(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "model", "qwen3_5_text")
    config = json.loads((model / "config.json").read_text())
    del config["architectures"]  # as the package leaves it
    (model / "config.json").write_text(json.dumps(config))
    lay_out(model, tmp_path / "polar", "bytes", 4, V4)
    assert DecodedCheckpoint(tmp_path / "polar").config["architectures"] == ["Qwen3_5ForCausalLM"]


def test_it_can_be_read_but_neither_written_nor_quantized(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lay_out(model, tmp_path / "polar", "bytes", 4, V4)
    assert "polar" not in FORMATS
    with pytest.raises(HlwqError, match="Format polar can be read, but not written"):
        hlwq.quantize(model, tmp_path / "out", "hlwq", format="polar")
    with pytest.raises(HlwqError, match=r"quantized already \(PolarQuant\)"):
        open_dense(tmp_path / "polar")
    from hlwq.cli import main

    monkeypatch.setattr(sys, "argv", ["hlwq", "formats", "--json"])
    with pytest.raises(SystemExit):
        main()
    rows = {row["format"]: row for row in json.loads(capsys.readouterr().out)}
    assert "read only" in rows["polar"]["symmetry"]


def test_a_dense_directory_beside_an_old_configuration_is_dense(model: Path) -> None:
    (model / "polar_config.json").write_text(json.dumps({"quantization_method": "PolarQuant"}))
    assert detect_format(Reader(model)) is FORMATS["dense"]


def without(part: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        tensors = load_file(path / "model.safetensors")
        del tensors[part]
        save_file(tensors, path / "model.safetensors")

    return change


def replaced(part: str, value: torch.Tensor) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        tensors = load_file(path / "model.safetensors")
        save_file({**tensors, part: value}, path / "model.safetensors")

    return change


def stating(layer: dict[str, Any], **entries: Any) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        config = json.loads((path / "polar_config.json").read_text())
        config["layers"][UP] |= layer
        (path / "polar_config.json").write_text(json.dumps(config | entries))

    return change


def listing(layer: Any) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        config = json.loads((path / "polar_config.json").read_text())
        config["layers"][UP] = layer
        (path / "polar_config.json").write_text(json.dumps(config))

    return change


PLAIN = UP.replace(".", "__")
KEY = PLAIN + "__weight"


@pytest.mark.parametrize(
    ("spelling", "change", "said"),
    [
        ("nibbles", without(f"{UP}.ct_scaled"), f"{UP} lacks its tensor {UP}.ct_scaled"),
        ("counted", without(f"{KEY}__norms"), f"{UP} lacks its tensor {KEY}__norms"),
        ("nibbles", stating({}, format="polar_engine_v6"), "format polar_engine_v6 is unknown"),
        ("nibbles", stating({}, layers=[]), "polar_config.json: layers is [], not an object"),
        ("nibbles", stating({"block_size": 48}), "blocks of 48"),
        ("nibbles", stating({"block_size": 64}), f"{UP} has 2 blocks of 64 for 192 columns"),
        ("nibbles", stating({"bits": 3}), "has centroids of shape (16,), but 3 bits"),
        ("nibbles", stating({"in_features": 100}), "has 2 blocks of 128 for 100 columns"),
        ("nibbles", replaced(f"{UP}.norms", torch.ones(320)), f"{UP}.norms has shape (320,)"),
        ("nibbles", replaced(f"{UP}.codes", torch.zeros(320, 100, dtype=torch.uint8)), "has 32000 bytes for"),
        ("counted", replaced(f"{KEY}__meta", torch.tensor([320, 2, 128, 81920, 192])), f"{KEY}__meta has shape (5,)"),
        ("nibbles", listing(None), f"layers: {UP} is null, not an object"),
        ("nibbles", listing([]), f"layers: {UP} is [], not an object"),
        ("nibbles", stating({"bits": "4"}), f'layers.{UP}: bits is "4", not an integer'),
        ("nibbles", stating({"bits": 4.0}), f"layers.{UP}: bits is 4.0, not an integer"),
        ("nibbles", stating({"bits": -4}), "has 40960 bytes for 81920 codes of -4 bits"),
        ("nibbles", stating({"block_size": True}), f"layers.{UP}: block_size is true, not an integer"),
        ("nibbles", stating({"block_size": 2**70}), "has 40960 bytes for"),
        ("nibbles", stating({"in_features": "192"}), f'layers.{UP}: in_features is "192", not an integer'),
        ("nibbles", stating({"in_features": 192.0}), f"layers.{UP}: in_features is 192.0, not an integer"),
        ("nibbles", replaced(f"{UP}.norms", torch.ones(320, 2, dtype=torch.int8)), f"{UP}.norms in I8"),
        ("nibbles", replaced(f"{UP}.ct_scaled", torch.arange(16)), f"{UP}.ct_scaled in I64"),
        *(
            ("bytes", replaced(f"{UP}.codes", torch.zeros(320, 256, dtype=dtype)), f"{UP}.codes in {said}")
            for dtype, said in (
                (torch.int64, "I64"),
                (torch.int16, "I16"),
                (torch.bool, "BOOL"),
                (torch.float8_e4m3fn, "F8_E4M3"),
            )
        ),
        ("counted", replaced(f"{KEY}__meta", torch.tensor(5)), f"{KEY}__meta has shape ()"),
        ("counted", replaced(f"{KEY}__meta", torch.tensor([[320, 2, 128, 81920]])), f"{KEY}__meta has shape (1, 4)"),
        ("counted", replaced(f"{KEY}__meta", torch.tensor([320.0, 2, 128, 81920])), f"{KEY}__meta in F32"),
        ("counted", replaced(f"{KEY}__meta", torch.tensor([True, True])), f"{KEY}__meta in BOOL"),
        ("counted", replaced(f"{KEY}__meta", torch.tensor([320, 2, 0, 81920])), "blocks of 0"),
        ("counted", replaced(f"{KEY}__meta", torch.tensor([160, 4, 128, 81920])), "but 320 rows of 2 blocks"),
        ("plain", replaced(f"{PLAIN}__meta", torch.tensor([4, 384])), f"{PLAIN}__meta [4, 384], but 320 rows of 2"),
    ],
)
def test_what_is_damaged_or_unknown_is_refused_by_name(
    spelling: str, change: Callable[[Path], None], said: str, model: Path, tmp_path: Path
) -> None:
    lay_out(model, tmp_path / "polar", spelling, 4, V4 if spelling in ("bytes", "nibbles") else None)
    change(tmp_path / "polar")
    with pytest.raises(HlwqError) as refused:
        DecodedCheckpoint(tmp_path / "polar")
    assert said in str(refused.value)


def test_a_code_without_a_centroid_is_refused(model: Path, tmp_path: Path) -> None:
    lay_out(model, tmp_path / "polar", "bytes", 4, V4)
    replaced(f"{UP}.codes", torch.full((320, 256), 16, dtype=torch.int8))(tmp_path / "polar")
    with pytest.raises(HlwqError, match="up_proj has the code 16, but 16 centroids"):
        DecodedCheckpoint(tmp_path / "polar").read(f"{UP}.weight")


def test_codes_without_the_rest_of_the_model_are_refused(model: Path, tmp_path: Path) -> None:
    lay_out(model, tmp_path / "polar", "counted", 5, None)
    without("model.embed_tokens.weight")(tmp_path / "polar")
    with pytest.raises(HlwqError, match=r"model\.embed_tokens\.weight is missing"):
        hlwq.convert(tmp_path / "polar", tmp_path / "out", "dense")
