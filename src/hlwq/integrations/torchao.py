"""HLWQ before torchao's own INT4: the weights are rounded by HLWQ, decoded, and rounded again by torchao.

On a GPU torchao packs INT4 for its kernels (`Int4WeightOnlyConfig`), on other devices it keeps a byte for a code
(`IntxWeightOnlyConfig`); both fit a zero point. Neither can be made for a GPU without one, so the files that hlwq
writes for this (recipe `hlwq-torchao`) are dense, and torchao rounds them as they are loaded. What it made can be saved
and loaded again by transformers alone, in safetensors.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hlwq.bases import Hadamard
from hlwq.decoded import open_dense
from hlwq.devices import torch_device
from hlwq.errors import HlwqError, HlwqWarning, RequestError, ResourceError, UnsupportedError
from hlwq.families import ModelLayout, describe
from hlwq.files import expanded
from hlwq.formats.patterns import module_patterns, outside_the_decoder
from hlwq.grids import LloydGrid, fit_group_size
from hlwq.plan import usual_modules
from hlwq.recipes import Stage
from hlwq.transformers_models import quiet_transformers
from hlwq.work import check_finite, quantize_matrix


@torch.no_grad()
def quantize_(model: nn.Module, *, bits: int | None = 5, block_size: int = 128, group_size: int = 128) -> None:
    """Quantize a transformers model in place: the matrices that hlwq quantizes, by HLWQ and then by torchao.

    Args:
        model: a model of a supported family, on the device where it shall run.
        bits: width of HLWQ's codes; None leaves HLWQ out, so that torchao rounds the weights themselves.
        block_size: weights that share a norm in HLWQ, a power of two.
        group_size: weights that share a scale and a zero in torchao. Where a size does not divide a matrix's
            in_features, the largest of 128, 64 and 32 below it that does is used for that matrix, with a warning.

    Raises:
        ResourceError: torchao is not installed.
        RequestError: a size is out of range.
        UnsupportedError: the family is not supported, no group size divides a matrix, or one is quantized already or
            offloaded.
        CheckpointError: a weight is not finite.
            All of this is found out before anything is changed, but for groups whose parameters overflow.
    """
    _require_torchao()
    from torchao.quantization import quantize_ as torchao_quantize_

    tensors = model.state_dict()
    for name in tensors:
        if name.endswith(".weight_packed"):
            raise _quantized_already(name.rpartition(".")[0])
    layout = describe({**_config_of(model), "architectures": [type(model).__name__]}, tensors)
    if layout.has_experts:
        raise UnsupportedError("Experts are no linear layers, which alone torchao quantizes. Use `hlwq quantize`.")
    weights = {name: _plain_weight(name, model.get_submodule(name)) for name in sorted(usual_modules(layout))}
    widths = {name: weight.shape[1] for name, weight in weights.items()}
    device = next(model.parameters()).device
    config = _int4_config(layout, widths, group_size, device)
    if bits is None and block_size != 128:
        raise RequestError("`block_size` changes nothing where `bits` is None. Leave it out.")
    if bits is not None:
        if block_size < 1 or block_size & (block_size - 1):
            raise RequestError(f"`block_size` is {block_size}, which is no power of two. Use 32, 64 or 128.")
        sizes = _fitted("block_size", block_size, widths)
        stages = {width: Stage(LloydGrid(bits, size), Hadamard(size)) for width, size in sizes.items()}
        for name, weight in weights.items():
            try:
                matrix, _ = quantize_matrix(weight.cpu(), [stages[weight.shape[1]]], device)
            except HlwqError as error:
                raise error.about(name) from None
            weight.copy_(matrix.dequantize())
    torchao_quantize_(model, config, filter_fn=None)


def transformers_config(directory: str | Path, *, group_size: int = 128, device: str | None = None) -> Any:
    """What makes transformers quantize a dense directory by torchao as it loads it.

    Use it as `AutoModelForCausalLM.from_pretrained(directory, quantization_config=…)`; `save_pretrained` then writes
    the quantized model, which loads without it.

    Args:
        directory: such as recipe hlwq-torchao writes, or any checkpoint that is not quantized.
        group_size: see `quantize_`.
        device: where the model shall run: `cuda`, `cpu`; by default a GPU if there is one.

    Returns:
        A `transformers.TorchAoConfig`.

    Raises:
        ResourceError: torchao is not installed, or the device cannot be used.
        CheckpointError: the directory cannot be read.
        UnsupportedError: it is quantized, or no group size divides a matrix.
    """
    _require_torchao()
    from transformers import TorchAoConfig

    reader = open_dense(expanded(directory))
    layout = describe(reader.config, reader.tensors)
    widths = {name: reader.tensors[f"{name}.weight"].shape[1] for name in sorted(usual_modules(layout))}
    target = torch_device(device)
    return TorchAoConfig(_int4_config(layout, widths, group_size, target))


def _int4_config(layout: ModelLayout, widths: dict[str, int], group_size: int, device: torch.device) -> Any:
    """torchao's `FqnToConfig` that quantizes these modules and nothing else, whatever stands before `layers`."""
    from torchao.quantization import FqnToConfig, Int4WeightOnlyConfig, IntxWeightOnlyConfig, MappingType, PerGroup

    by_size: dict[int, set[str]] = defaultdict(set)
    sizes = _fitted("group_size", group_size, widths)
    for name, width in widths.items():
        by_size[sizes[width]].add(name)
    configs: dict[str, Any] = {}
    for size, names in by_size.items():
        if device.type == "cuda":
            config = Int4WeightOnlyConfig(group_size=size, int4_packing_format="tile_packed_to_4d")
        else:
            int4 = vars(torch)["int4"]  # torch's type hints lack it
            config = IntxWeightOnlyConfig(
                weight_dtype=int4, granularity=PerGroup(size), mapping_type=MappingType.ASYMMETRIC
            )
        # Parts beside the decoder can have layers of the same names.
        elsewhere = "|".join(outside_the_decoder(layout))
        configs |= {f"re:(?!{elsewhere}){pattern}": config for pattern in module_patterns(names, layout)}
    return FqnToConfig(configs)


def _fitted(option: str, wanted: int, widths: dict[str, int]) -> dict[int, int]:
    """The group size for each width that the named matrices have. Warns where it is not the wanted one.

    Raises:
        RequestError: it is not positive.
        UnsupportedError: no size divides a matrix.
    """
    if wanted < 1:
        raise RequestError(f"`{option}` is {wanted}. It must be positive.")
    sizes: dict[int, int] = {}
    for name, width in widths.items():
        try:
            size = fit_group_size(wanted, width)
        except UnsupportedError as error:
            raise error.about(name) from None
        if size != wanted and width not in sizes:
            warnings.warn(
                f"{option} {size} where in_features is {width}, which {wanted} does not divide",
                HlwqWarning,
                stacklevel=3,
            )
        sizes[width] = size
    return sizes


def _plain_weight(name: str, module: nn.Module) -> Tensor:
    """The weight of a linear layer that nothing has been done to.

    Raises:
        UnsupportedError: it is quantized already, or elsewhere than in memory.
        CheckpointError: it is not finite.
    """
    weight = getattr(module, "weight", None)
    if type(weight) is not nn.Parameter or not weight.is_floating_point():
        raise _quantized_already(name)
    if weight.is_meta:
        message = f"The weight of {name} is not in memory. Load the model whole, as with device_map='cpu'."
        raise UnsupportedError(message, tensor=name)
    check_finite(weight.detach(), name)
    return weight


def _config_of(model: nn.Module) -> dict[str, Any]:
    config = getattr(model, "config", None)
    if config is None:
        raise UnsupportedError(f"{type(model).__name__} has no configuration. Give a model that transformers loaded.")
    values: dict[str, Any] = config.to_dict()
    return values


def _require_torchao() -> None:
    """Raise ResourceError unless torchao and transformers are installed."""
    try:
        with quiet_transformers():
            import torchao  # noqa: F401
    except ImportError:
        raise ResourceError("This needs torchao. Run: pip install 'hlwq[torchao]'") from None


def _quantized_already(module: str) -> UnsupportedError:
    return UnsupportedError(f"{module} is quantized already. Give the model as it was before.", tensor=module)
