"""HLWQ in vLLM: a plugin that serves HLWQ checkpoints with their codes as they are.

Wherever hlwq is installed beside vLLM, the entry point group `vllm.general_plugins` has it call `register` in each of
its processes.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.parameter import GroupQuantScaleParameter, PackedvLLMParameter
from vllm.transformers_utils.config import get_safetensors_params_metadata

from hlwq import kernels
from hlwq.containers import PACKED
from hlwq.errors import CheckpointError, UnsupportedError
from hlwq.families import family_of
from hlwq.formats import Scheme
from hlwq.formats import hlwq as hlwq_format


def register() -> None:
    """Tell vLLM what `quant_method: hlwq` in a `config.json` means."""
    register_quantization_config(hlwq_format.NAME)(HLWQQuantizationConfig)


class HLWQQuantizationConfig(QuantizationConfig):
    """Which of vLLM's layers are packed, and how.

    Attributes:
        section: the checkpoint's `quantization_config`.
        schemes: the packed modules, by the checkpoint's names and then by vLLM's; fused matrices by their members.
    """

    def __init__(self, section: dict[str, Any]) -> None:
        super().__init__()
        self.section = section
        self.schemes: dict[str, Scheme] = {}

    @classmethod
    def get_name(cls) -> str:
        """As `config.json` calls it."""
        return hlwq_format.NAME

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        """Dtypes that models can run in."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """The oldest GPUs."""
        return 70

    @staticmethod
    def get_config_filenames() -> list[str]:
        """No files beside `config.json`."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> HLWQQuantizationConfig:
        """Read the section of a `config.json`.

        Raises:
            UnsupportedError: a later version wrote it.
        """
        hlwq_format.check_version(config, "config.json")
        return cls(config)

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Read off the headers of the files which modules are packed.

        Raises:
            CheckpointError: none is, or the section is damaged.
            UnsupportedError: vLLM builds one of them so that it cannot be.
        """
        for name in get_safetensors_params_metadata(model_name, revision=revision):
            module, _, part = name.rpartition(".")
            if name.endswith(f".{PACKED}"):
                raise UnsupportedError(
                    f"{model_name}: vLLM runs no packed experts. Quantize the original again with `format='gptq'`."
                )
            if part == "weight_packed":
                where = f"{model_name}: config.json: quantization_config"
                self.schemes[module] = hlwq_format.scheme_for(self.section, module, where)
        if not self.schemes:
            raise CheckpointError(f"{model_name}: config.json says hlwq, but no tensor is stored so.")
        embedding, family = self._embedding(), family_of({"architectures": hf_config.architectures})
        if embedding and family and not family.vllm_packs_embedding:
            raise UnsupportedError(
                f"{model_name}: vLLM has no packed embedding for {family.name}. Quantize again with "
                "`include_embeddings=False`."
            )
        if embedding and hf_config.get_text_config().tie_word_embeddings:
            self.schemes["lm_head"] = self.schemes[embedding]

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Take over vLLM's names of the modules."""
        named = {hf_to_vllm_mapper.map_name(f"{module}.weight"): scheme for module, scheme in self.schemes.items()}
        self.schemes = {name.removesuffix(".weight"): scheme for name, scheme in named.items() if name}

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        """What runs a layer of this name; None for an embedding as it is.

        Raises:
            UnsupportedError: vLLM fuses matrices that have different schemes.
        """
        if isinstance(layer, LinearBase):
            scheme = self._scheme(prefix)
            return HLWQMethod(scheme) if scheme else UnquantizedLinearMethod()
        if isinstance(layer, VocabParallelEmbedding):
            # Some models do not say what their embedding is called.
            name = prefix if isinstance(layer, ParallelLMHead) else self._embedding()
            scheme = self.schemes.get(name)
            return HLWQMethod(scheme) if scheme else None
        return None

    def _embedding(self) -> str:
        return next((module for module in self.schemes if module.endswith("embed_tokens")), "")

    def _scheme(self, prefix: str) -> Scheme | None:
        if (
            prefix in self.schemes
        ):  # a whole in the files too, as GLM-4's `gate_up_proj`, whatever it is made of elsewhere
            return self.schemes[prefix]
        parent, dot, name = prefix.rpartition(".")
        members = [f"{parent}{dot}{member}" for member in self.packed_modules_mapping.get(name, [name])]
        schemes = {self.schemes.get(member) for member in members}
        if len(schemes) > 1:
            raise UnsupportedError(
                f"vLLM runs {', '.join(members)} as one matrix, and their schemes differ. "
                "Quantize again with the defaults of recipe hlwq."
            )
        return schemes.pop()


@register_weight_loader_v2_supported_method
class HLWQMethod(LinearMethodBase):
    """Runs a linear layer, an embedding or an output head on its codes."""

    def __init__(self, scheme: Scheme) -> None:
        self.scheme = scheme

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Give a layer empty codes and norms, which load as rows of a matrix do.

        Raises:
            UnsupportedError: tensor parallelism would split a group.
        """
        bits, group_size = self.scheme.bits, self.scheme.group_size
        if input_size_per_partition % group_size:
            raise UnsupportedError(
                f"Groups of {group_size} do not divide the {input_size_per_partition} columns that tensor parallelism "
                "leaves on each device. Use fewer devices."
            )
        rows = sum(output_partition_sizes)
        shared = {"input_dim": 1, "output_dim": 0, "weight_loader": extra_weight_attrs["weight_loader"]}
        packed = torch.empty(rows, input_size_per_partition * bits // 8, dtype=torch.uint8)
        norms = torch.empty(rows, input_size_per_partition // group_size, dtype=torch.float16)
        layer.register_parameter(
            "weight_packed", PackedvLLMParameter(data=packed, packed_dim=1, packed_factor=Fraction(8, bits), **shared)
        )
        layer.register_parameter("weight_norms", GroupQuantScaleParameter(data=norms, **shared))

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Plain parameters are faster to use than those that know how to load."""
        for name in ("weight_packed", "weight_norms"):
            setattr(layer, name, nn.Parameter(layer.get_parameter(name).data, requires_grad=False))

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Inputs (…, in) to (…, out)."""
        outputs = kernels.matmul(x, layer.weight_packed, layer.weight_norms, self.scheme.bits)
        return outputs if bias is None else outputs + bias

    def embedding(self, layer: Any, ids: Tensor) -> Tensor:
        """Token ids (…) to rows (…, in)."""
        return kernels.embedding(ids, layer.weight_packed, layer.weight_norms, self.scheme.bits, layer.params_dtype)

    def tie_weights(self, layer: nn.Module, embed_tokens: nn.Module) -> nn.Module:
        """Let an output head use the codes of the embedding."""
        layer.weight_packed, layer.weight_norms = embed_tokens.weight_packed, embed_tokens.weight_norms
        return layer
