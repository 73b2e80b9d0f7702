"""HLWQ in vLLM: a plugin that serves HLWQ checkpoints with their codes as they are.

Wherever hlwq is installed beside vLLM, the entry point group `vllm.general_plugins` has it call `register` in each of
its processes. Experts that do not fit stay in the files, and some are kept: environment variables say how many.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from fractions import Fraction
from functools import cached_property, partial
from pathlib import Path
from time import monotonic
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import Tensor, nn
from torch.library import custom_op
from torch.nn.functional import silu
from vllm.config import get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase, RoutedExperts
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
from vllm.platforms import current_platform
from vllm.transformers_utils.config import get_safetensors_params_metadata

from hlwq import kernels
from hlwq.containers import PACKED, Reader
from hlwq.errors import CheckpointError, RequestError, UnsupportedError
from hlwq.expert_cache import ExpertCache
from hlwq.expert_store import ExpertStore
from hlwq.families import family_of
from hlwq.formats import Scheme, reading
from hlwq.formats import hlwq as hlwq_format
from hlwq.packed_experts import ExpertShape, Rows, rows_in, run_experts

logger = init_logger("vllm.hlwq")
VARIABLES = {name: f"HLWQ_{name.upper()}" for name in ("expert_cache", "expert_policy", "expert_source")}
"""The environment variables that say what `HLWQConfig` of transformers is told."""
LOG_SECONDS = 60.0
"""How often the log says what a cache of experts has done."""


def register() -> None:
    """Tell vLLM what `quant_method: hlwq` in a `config.json` means."""
    register_quantization_config(hlwq_format.NAME)(HLWQQuantizationConfig)


class HLWQQuantizationConfig(QuantizationConfig):
    """Which of vLLM's layers are packed, and how.

    Attributes:
        section: the checkpoint's `quantization_config`.
        schemes: the packed modules, by the checkpoint's names and then by vLLM's; fused matrices by their members.
        stacks: those of experts, by vLLM's names: what the checkpoint calls them, and how they are stored.
        model: the checkpoint's directory or hub id, and its revision.
    """

    def __init__(self, section: dict[str, Any]) -> None:
        super().__init__()
        self.section = section
        self.schemes: dict[str, Scheme] = {}
        self.stacks: dict[str, tuple[str, Scheme]] = {}
        self.model: tuple[str, str | None] = "", None

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
        self.model, where = (model_name, revision), f"{model_name}: config.json: quantization_config"
        for name in get_safetensors_params_metadata(model_name, revision=revision):
            module, _, part = name.rpartition(".")
            if name.endswith(f".{PACKED}"):
                (first, *_), *_ = reading.entry(self.section, "experts", list, where)
                matrix = str(first).rpartition(".")[0]
                self.stacks[module] = module, hlwq_format.scheme_for(self.section, f"{module}.0.{matrix}", where)
            if part == "weight_packed":
                self.schemes[module] = hlwq_format.scheme_for(self.section, module, where)
        if not self.schemes and not self.stacks:
            raise CheckpointError(f"{model_name}: config.json says hlwq, but no tensor is stored so.")
        if self.cached and not self.stacks:  # which a draft model beside a mixture has none of
            logger.warning(
                "%s changes nothing in %s, which has no packed experts.", VARIABLES["expert_cache"], model_name
            )
        embedding, family = self._embedding(), family_of({"architectures": hf_config.architectures})
        if self.stacks and family and not family.vllm_packs_experts:
            raise UnsupportedError(
                f"{model_name}: vLLM's {family.name} loads the matrices of experts itself, and none that are packed. "
                "Quantize the original again with `format='gptq'`."
            )
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
        stacks = {hf_to_vllm_mapper.map_name(f"{stack}.packed"): stored for stack, stored in self.stacks.items()}
        self.stacks = {name.removesuffix(".packed"): stored for name, stored in stacks.items() if name}

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
        if isinstance(layer, RoutedExperts) and prefix in self.stacks:
            stack, scheme = self.stacks[prefix]
            shape = ExpertShape(layer.moe_config.hidden_dim, layer.moe_config.intermediate_size, scheme)
            return HLWQExpertsMethod(layer, shape, stack, self)
        return None

    @property
    def cached(self) -> bool:
        """Whether experts stay in the files."""
        return bool(os.environ.get(VARIABLES["expert_cache"]))

    @cached_property
    def cache(self) -> ExpertCache | None:
        """What holds the experts, once the files are there; None if all are in memory.

        Raises:
            RequestError: an environment variable is out of range.
        """
        said = {name: os.environ.get(variable) for name, variable in VARIABLES.items()}
        size, policy, source = said.values()
        try:
            if not size:
                for name in ("expert_policy", "expert_source"):
                    if said[name]:
                        raise RequestError(f"`{name}` changes nothing without `expert_cache`.", argument=name)
                return None
            model, revision = self.model
            directory = Path(model)
            if not directory.is_dir():
                folder = get_current_vllm_config().load_config.download_dir
                directory = Path(snapshot_download(model, revision=revision, cache_dir=folder, local_files_only=True))
            store = ExpertStore(Reader(directory), source or "disk")
            return ExpertCache(store, int(size) if size.isdecimal() else size, policy or "lfru")
        except RequestError as error:
            message = str(error)
            for name, variable in VARIABLES.items():
                message = message.replace(f"`{name}`", variable)
            raise RequestError(message) from None

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


class HLWQExpertsMethod(FusedMoEMethodBase):
    """Runs the experts of a layer on their bytes."""

    logged = monotonic()

    def __init__(self, layer: RoutedExperts, shape: ExpertShape, stack: str, config: HLWQQuantizationConfig) -> None:
        """Say what the bytes are.

        Args:
            layer: vLLM's.
            shape: what an expert's bytes are.
            stack: what the checkpoint calls the tensor that holds them.
            config: says whether a cache holds the experts.

        Raises:
            UnsupportedError: the layer does something else than the experts of a checkpoint, or is split.
        """
        super().__init__(layer.moe_config)
        self.shape, self.stack, self.config = shape, stack, config
        self.rows: Rows
        if layer.moe_config.moe_parallel_config.use_ep or layer.moe_config.tp_size > 1:
            raise UnsupportedError("Packed experts run on one device. Leave tensor, data and expert parallelism out.")
        if layer.activation.value != "silu":
            raise UnsupportedError(f"{stack}: packed experts are joined by SiLU, not {layer.activation.value}.")
        if layer.apply_router_weight_on_input:
            raise UnsupportedError(f"{stack}: packed experts are weighted behind, and not before, they run.")
        if current_platform.is_cuda_alike() and not get_current_vllm_config().model_config.enforce_eager:
            raise UnsupportedError("Packed experts run without CUDA graphs. Set `enforce_eager`.")

    def create_weights(self, layer: nn.Module, num_experts: int, *args: Any, **kwargs: Any) -> None:
        """Give a layer the bytes of its experts, unless a cache holds them."""
        if not self.config.cached:
            packed = torch.empty(num_experts, self.shape.nbytes, dtype=torch.uint8)
            layer.register_parameter("packed", nn.Parameter(packed, requires_grad=False))
        # Instead of the layer's own, which knows of matrices only.
        vars(layer)["load_weights"] = partial(self._load, layer)

    def _load(self, layer: nn.Module, weights: Iterable[tuple[str, Tensor]]) -> Iterator[str]:
        for name, tensor in weights:
            if not self.config.cached:
                layer.get_parameter(name).data.copy_(tensor)
            yield name

    def get_fused_moe_quant_config(self, layer: nn.Module) -> None:
        """None of vLLM's own kernels runs."""
        return None

    def maybe_roundup_sizes(self, hidden_size: int, intermediate_size_per_partition: int, *args: Any) -> Any:
        """As they are in the files."""
        return hidden_size, intermediate_size_per_partition

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """From here on the experts are where they will be."""
        if self.config.cache is None:
            self.rows = partial(rows_in, layer.get_parameter("packed"))
        else:
            self.config.cache.reserve(torch.device(current_platform.device_type))  # before it goes to keys and values
            self.rows = partial(self.config.cache.rows, self.stack)

    def apply(self, layer: Any, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        """What the experts make of tokens (n, hidden), weighted and summed."""
        return torch.ops.hlwq.experts(x, topk_ids, topk_weights, layer.layer_name)

    def run(self, inputs: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """See `hlwq.packed_experts.run_experts`."""
        outputs = run_experts(inputs, index, weights, self.shape, _gate, self.rows)
        if self.config.cache and monotonic() - HLWQExpertsMethod.logged > LOG_SECONDS:
            HLWQExpertsMethod.logged = monotonic()
            logger.info("Experts: %s", self.config.cache.counters)
        return outputs


@custom_op("hlwq::experts", mutates_args=())
def _experts(inputs: Tensor, index: Tensor, weights: Tensor, layer: str) -> Tensor:
    """The experts of a layer, which no compiler looks into: what is read depends on the tokens."""
    runner = get_forward_context().no_compile_layers[layer]
    outputs: Tensor = runner.routed_experts.quant_method.run(inputs, index, weights)
    return outputs


@_experts.register_fake
def _(inputs: Tensor, index: Tensor, weights: Tensor, layer: str) -> Tensor:
    return torch.empty_like(inputs)


def _gate(joined: Tensor) -> Tensor:
    gate, up = joined.chunk(2, -1)
    return silu(gate) * up
