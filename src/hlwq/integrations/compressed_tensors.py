"""Rotated compressed-tensors files in transformers, which ignores their `transform_config` (transformers#42887).

Importing this module puts two classes in the place of transformers' own for this method: they do the same, and then
apply the transforms by compressed-tensors' own public function, whoever made the file.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open
from torch import Tensor
from transformers.quantizers import auto
from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer
from transformers.utils import quantization_config as own

from hlwq.formats.compressed_tensors import NAME
from hlwq.formats.transforms import REFUSAL, SECTION

if TYPE_CHECKING:
    from transformers.modeling_utils import PreTrainedModel


class CompressedTensorsConfig(own.CompressedTensorsConfig):
    """transformers' own, with the transforms of the file.

    It has the same name, by which `from_pretrained` compares what it is given with what the file has.
    """

    def __init__(
        self,
        config_groups: dict[str, Any] | None = None,
        *args: Any,
        transform_config: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Take what transformers' own takes, and `transform_config`."""
        self.transform_config = transform_config
        groups = {
            name: {key: value for key, value in group.items() if key != REFUSAL} if isinstance(group, dict) else group
            for name, group in (config_groups or {}).items()
        }
        super().__init__(groups or config_groups, *args, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """The section of `config.json`, with the transforms."""
        values: dict[str, Any] = super().to_dict()
        return {**values, SECTION: self.transform_config} if self.transform_config else values


class RotatedQuantizer(CompressedTensorsHfQuantizer):
    """transformers' own, which applies the transforms of the file to the loaded model."""

    files: Sequence[str] = ()

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        super()._process_model_before_weight_loading(model, checkpoint_files=checkpoint_files, **kwargs)
        self.files = checkpoint_files or ()
        groups = self._transforms.get("config_groups", {})
        model._keys_to_ignore_on_load_unexpected = {
            *(model._keys_to_ignore_on_load_unexpected or ()),
            *(rf"\.{re.escape(name)}_(input|output)\.(weight|perm)$" for name in groups),
        }

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        model = super()._process_model_after_weight_loading(model, **kwargs) or model
        if self._transforms:
            _apply_transforms(model, self._transforms, self.files)
        return model

    def is_serializable(self) -> bool:
        """What it was loaded from is what would be saved; compressed-tensors' transforms are not saved rightly."""
        return not self._transforms

    @property
    def _transforms(self) -> dict[str, Any]:
        """The section of the file; empty too for transformers' own configuration, which a caller may give."""
        return getattr(self.quantization_config, "transform_config", None) or {}


def _apply_transforms(model: PreTrainedModel, section: dict[str, Any], files: Sequence[str]) -> None:
    """Have inputs and outputs transformed at run time. What is transformed in the weights already is left out."""
    from compressed_tensors.transform import TransformConfig, apply_transform_config

    config = TransformConfig.model_validate(section)
    for scheme in config.config_groups.values():
        scheme.apply = [each for each in scheme.apply if each.is_online()]
    apply_transform_config(model, config)
    stored = _stored_matrices(list(config.config_groups), files)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if (matrix := stored.get(_in_layers(name))) is not None:  # a shared parameter is so replaced for all modules
            parameter.data = matrix.to(parameter)


def _stored_matrices(groups: Sequence[str], files: Sequence[str]) -> dict[str, Tensor]:
    """The matrices of these groups that the files hold, by their names inside the layers."""
    matrices = {}
    for file in files:
        if Path(file).suffix == ".safetensors":
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - no dictionary
                    if any(name.endswith((f".{group}_input.weight", f".{group}_output.weight")) for group in groups):
                        matrices[_in_layers(name)] = tensors.get_tensor(name)
    return matrices


def _in_layers(name: str) -> str:
    """A name from the number of its layer on: what stands before may differ between a file and a model."""
    return name.rpartition("layers.")[2]


auto.AUTO_QUANTIZATION_CONFIG_MAPPING[NAME] = CompressedTensorsConfig
auto.AUTO_QUANTIZER_MAPPING[NAME] = RotatedQuantizer
