"""Every grid in every basis in every format: refused before the work, or right."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from checkpoints import make_checkpoint

import hlwq
from hlwq import Hadamard, Identity, LloydGrid, Recipe, RequestError, Stage, UniformGrid, UnsupportedError
from hlwq.bases import Basis
from hlwq.containers import Reader
from hlwq.formats import FORMATS
from hlwq.grids import Grid
from hlwq.plan import make_plan

GRIDS: dict[str, Grid] = {
    "uniform": UniformGrid(4, 64),
    "symmetric": UniformGrid(8, 32, symmetric=True),
    "absmax": UniformGrid(4, 32, symmetric=True, scale_method="absmax"),
    "asymmetric": UniformGrid(4, 64, symmetric=False),
    "uniform, 3 bits": UniformGrid(3, 64),
    "lloyd": LloydGrid(5, 64),
    "lloyd, 3 bits": LloydGrid(3, 32),
}
BASES: dict[str, Basis] = {
    "identity": Identity(),
    "hadamard": Hadamard(),
    "hadamard 32": Hadamard(32),
    "hadamard 64": Hadamard(64),
    "hadamard 256": Hadamard(256),  # of the narrower matrices, 128
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("source") / "model", "llama", num_hidden_layers=1)


def is_possible(grid: Grid, basis: Basis, format_name: str) -> bool:
    """What each format says of itself in the documentation."""
    if format_name == "dense":
        return True
    if format_name == "hlwq":
        return isinstance(grid, LloydGrid) and basis in (Hadamard(), Hadamard(grid.group_size))
    bits = {"gptq": (4, 8), "mlx": (2, 3, 4, 5, 6, 8), "compressed-tensors": tuple(range(2, 9))}[format_name]
    rotated = format_name == "compressed-tensors"
    return isinstance(grid, UniformGrid) and (rotated or basis == Identity()) and grid.bits in bits


@pytest.mark.parametrize("format_name", FORMATS)
@pytest.mark.parametrize("basis", BASES.values(), ids=BASES.keys())
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS.keys())
def test_it_is_refused_or_right(grid: Grid, basis: Basis, format_name: str, source: Path, tmp_path: Path) -> None:
    recipe, out = Recipe("mine", "", (Stage(grid, basis),), (format_name,)), tmp_path / "out"
    if not is_possible(grid, basis, format_name):
        for call in (lambda: make_plan(Reader(source), recipe), lambda: hlwq.quantize(source, out, recipe)):
            with pytest.raises((UnsupportedError, RequestError)) as refused:
                call()
            assert refused.value.argument in ("format", "basis", "bits", "block_size")
        assert not list(tmp_path.iterdir())
        return
    hlwq.quantize(source, out, recipe)
    assert_right(source, out)


def assert_right(source: Path, out: Path) -> None:
    """Each error on record is the one measured, and one that the width of the codes explains."""
    manifest = json.loads((out / "hlwq.json").read_text())
    measured = {
        tensor.name.removesuffix(".weight"): tensor.relative_error
        for tensor in hlwq.inspect(out, against=source).tensors
    }
    recorded = {module: each["relative_squared_error"] for module, each in manifest["modules"].items()}
    embeddings = [module for module in recorded if module in ("model.embed_tokens", "lm_head")]
    assert len(recorded) == 7 + len(embeddings)
    for module, error in recorded.items():
        assert error == pytest.approx(measured[module], rel=1e-4), module
        assert 0 < error < 0.75 * 4.0 ** (1 - manifest["modules"][module]["bits"]), module
    assert all(error == 0 for module, error in measured.items() if module not in recorded)


@pytest.mark.parametrize(
    ("stage", "format_name", "argument"),
    [
        (Stage(UniformGrid(4, 128), Hadamard()), "gptq", "basis"),  # was written: recorded as 0.009, decoded to 2.04
        (Stage(UniformGrid(5, 64)), "gptq", "bits"),
        (Stage(UniformGrid(4, 64), Hadamard()), "mlx", "basis"),
        (Stage(LloydGrid(5, 128)), "hlwq", "basis"),  # was written, and then decoded as if rotated
        (Stage(LloydGrid(5, 128), Hadamard(64)), "hlwq", "basis"),
        (Stage(LloydGrid(5, 128)), "gptq", "format"),
        (Stage(UniformGrid(4, 64)), "hlwq", "format"),
    ],
)
def test_what_a_file_cannot_say_is_refused(stage: Stage, format_name: str, argument: str, source: Path) -> None:
    with pytest.raises(UnsupportedError, match=f"format {format_name}") as refused:
        make_plan(Reader(source), Recipe("mine", "", (stage,), (format_name,)))
    assert refused.value.argument == argument


def test_a_chain_may_be_rotated_before_its_last_stage(source: Path, tmp_path: Path) -> None:
    stages = (Stage(UniformGrid(8, 32), Hadamard(128)), Stage(LloydGrid(8, 64)), Stage(UniformGrid(4, 64)))
    for format_name in ("gptq", "mlx"):
        hlwq.quantize(source, tmp_path / format_name, Recipe("mine", "", stages, (format_name,)))
        assert_right(source, tmp_path / format_name)
