"""MLX affine: what `mlx_lm.convert` writes and stock mlx-lm runs on Apple silicon.

For a linear of shape (out, in): `weight` uint32 (out, in·bits/32), codes packed along `in`; `scales` and `biases`
(out, groups) in the model's dtype; w = scale · code + bias.

Names and kept tensors stay as Hugging Face has them: mlx-lm's `sanitize` renames them on load, and takes a convolution
in the HF layout as the sign that the norms are in it too. Only the per-module overrides use MLX's own paths.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hlwq.checkpoint import DTYPES, Reader, TensorSpec
from hlwq.errors import HlwqError
from hlwq.formats.base import (
    AGAIN,
    Contents,
    Engine,
    Scheme,
    StoredModule,
    check_parts,
    common_scheme,
    entry,
    matrix_shape,
    require_parts,
    section_of,
)
from hlwq.formats.uniform import check_codes, no_lloyd_grid
from hlwq.grids import Grid, Parameters, QuantizedMatrix, ScaleMethod, UniformGrid
from hlwq.models import ModelLayout
from hlwq.models.qwen3_5 import QWEN3_5
from hlwq.packing import pack, unpack

NAME = "mlx"
BITS: tuple[int, ...] = (2, 3, 4, 5, 6, 8)
ENGINES: tuple[Engine, ...] = (
    Engine("mlx-lm", BITS, "asymmetric or symmetric", "mlx_lm.generate --model {path} --prompt Hello"),
)
DEFAULT_SYMMETRIC = False
FUSED_ALIKE = False
HOLDS_EMBEDDINGS = True
HOLDS_DESC_ACT = False
STORES_DECODED = False


def lloyd_grid(bits: int, group_size: int) -> Grid:
    """MLX files hold uniform codes only: always raises HlwqError."""
    raise no_lloyd_grid(NAME, "hlwq-mlx for HLWQ followed by MLX 4-bit")


def uniform_grid(bits: int, group_size: int, symmetric: bool, scale_method: ScaleMethod, dtype: str) -> Grid:
    """Any bias; parameters in the model's dtype.

    Raises:
        HlwqError: bits or a group size that MLX does not have.
    """
    check_codes(NAME, bits, BITS, group_size)
    return UniformGrid(bits, group_size, symmetric, False, scale_method, (DTYPES[dtype],))


def outputs(module: str, shape: tuple[int, int], grid: Grid, dtype: str) -> list[TensorSpec]:
    """The three tensors of a module."""
    rows, columns = shape
    groups = columns // grid.group_size
    return [
        TensorSpec(f"{module}.weight", "U32", (rows, columns * grid.bits // 32)),
        TensorSpec(f"{module}.scales", dtype, (rows, groups)),
        TensorSpec(f"{module}.biases", dtype, (rows, groups)),
    ]


def encode(module: str, matrix: QuantizedMatrix, dtype: str) -> dict[str, Tensor]:
    """Pack codes, scales and biases as the module's docstring says."""
    assert matrix.parameters.bias is not None
    return {
        f"{module}.weight": pack(matrix.codes, matrix.grid.bits).view(torch.uint32),
        f"{module}.scales": matrix.parameters.scale.to(DTYPES[dtype]),
        f"{module}.biases": matrix.parameters.bias.to(DTYPES[dtype]),
    }


def json_files(config: dict[str, Any], contents: Contents) -> dict[str, dict[str, Any]]:
    """`config.json` with `quantization`, under both of the keys that mlx-lm writes, and what mlx-lm asks of a model."""
    common = common_scheme(contents.quantized)
    section: dict[str, Any] = {"group_size": common.group_size, "bits": common.bits, "mode": "affine"}
    for module, scheme in contents.quantized.items():
        if scheme != common:
            section[module_path(module, contents.layout)] = {"group_size": scheme.group_size, "bits": scheme.bits}
    config = {**config, "quantization": section, "quantization_config": section}
    # mlx-lm has defaults of its own for the tying, and looks for it where the decoder is described.
    config["tie_word_embeddings"] = contents.layout.tied
    if "text_config" in config:
        config["text_config"] = {**config["text_config"], "tie_word_embeddings": contents.layout.tied}
    if contents.layout.family is QWEN3_5:
        config["model_type"] = "qwen3_5"  # of the text-only checkpoints too
    else:
        config |= rope_as_before(config)
    return {"config.json": config}


def rope_as_before(config: dict[str, Any]) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling` at the top level, where mlx-lm reads them.

    transformers 5 moved both into `rope_parameters`; without them mlx-lm takes its own default in silence.
    """
    parameters = dict(config.get("rope_parameters") or {})
    theta = parameters.pop("rope_theta", None)
    found = {} if theta is None else {"rope_theta": theta}
    if parameters.get("rope_type", "default") != "default":
        found["rope_scaling"] = parameters
    return {key: value for key, value in found.items() if key not in config}


def module_path(module: str, layout: ModelLayout) -> str:
    """A checkpoint's module as mlx-lm names it after `sanitize`."""
    if layout.family is not QWEN3_5:
        return module
    if module.startswith("model.language_model."):
        return "language_model.model." + module.removeprefix("model.language_model.")
    return "language_model." + module


def stored_modules(reader: Reader) -> dict[str, StoredModule]:
    """Modules that have `scales`.

    Raises:
        HlwqError: `config.json` is damaged, tensors of a module are missing or disagree with it, or the mode is not
            affine.
    """
    section, where = section_of(reader, "quantization")
    if section.get("mode", "affine") != "affine":
        raise HlwqError(f"{reader.path}: MLX mode {section['mode']} cannot be read; only affine can.")
    modules = {}
    for name in reader.tensors:
        if not name.endswith(".scales"):
            continue
        module = name.removesuffix(".scales")
        parts = require_parts(reader, module, "weight", "scales", "biases")
        (rows, words), (_, groups), _ = (matrix_shape(reader, part) for part in parts)
        # An override goes by MLX's path, which is the file's own name or what `sanitize` makes of it.
        inner = module.replace("model.language_model.", "language_model.model.")
        paths = (module, inner, f"language_model.{module}")
        path = next((path for path in paths if isinstance(section.get(path), dict)), None)
        chosen, here = (section[path], f"{where}.{path}") if path else (section, where)
        scheme = Scheme(entry(chosen, "bits", int, here), entry(chosen, "group_size", int, here), symmetric=False)
        if scheme.bits not in BITS:
            raise HlwqError(f"{here}: bits is {scheme.bits}; MLX files have {', '.join(map(str, BITS))}. {AGAIN}")
        if scheme.bits * scheme.group_size * groups != words * 32:
            raise HlwqError(f"{reader.path}: {module} does not have the bits and group size that config.json gives it.")
        shape = (rows, words * 32 // scheme.bits)
        check_parts(reader, outputs(module, shape, UniformGrid(scheme.bits, scheme.group_size), "BF16"))
        modules[module] = StoredModule(scheme, shape, parts)
    return modules


def dequantize(reader: Reader, module: str, scheme: Scheme) -> Tensor:
    """scale · code + bias."""
    codes = unpack(reader.read(f"{module}.weight").view(torch.uint8), scheme.bits)
    scale, bias = (reader.read(f"{module}.{part}").to(torch.float32) for part in ("scales", "biases"))
    grid = UniformGrid(scheme.bits, scheme.group_size, False, False)
    return QuantizedMatrix(codes, Parameters(scale, bias), grid).dequantize()


def is_converted(reader: Reader) -> bool:
    """Whether a Qwen3.5 directory went through mlx-lm's own conversion, which renames tensors and changes some."""
    return any(name.startswith("language_model.model.") for name in reader.tensors)


def hugging_face_name(name: str) -> str:
    """The Hugging Face name of a tensor of a converted Qwen3.5 directory."""
    if name.startswith("language_model.model."):
        return "model.language_model." + name.removeprefix("language_model.model.")
    return name.removeprefix("language_model.")


def restored(name: str, tensor: Tensor) -> Tensor:
    """Undo what mlx-lm's conversion does to a Qwen3.5 tensor: a transposed convolution, and 1 added to the norms.

    The norms come back rounded, since the sum was stored in the model's dtype.
    """
    if name.endswith("conv1d.weight"):
        return tensor.movedim(1, 2)
    if name.endswith("norm.weight") and not name.endswith("linear_attn.norm.weight"):
        return tensor - 1
    return tensor


def restored_shape(spec: TensorSpec) -> tuple[int, ...]:
    """The shape of `restored(spec.name, …)`."""
    return (spec.shape[0], spec.shape[2], spec.shape[1]) if spec.name.endswith("conv1d.weight") else spec.shape


def restored_config(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration as it was before `json_files` called a text-only Qwen3.5 by the name mlx-lm knows."""
    if config.get("model_type") == "qwen3_5" and "text_config" not in config:
        return {**config, "model_type": "qwen3_5_text"}
    return config
