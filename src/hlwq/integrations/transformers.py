"""HLWQ in transformers: checkpoints loaded packed, models quantized while they are loaded, both saved in format hlwq.

Importing this module registers its two classes. What becomes of each tensor is decided where `hlwq quantize` decides
it, in the plan; transformers reads the files and renames their tensors for the model's class.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from inspect import signature
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    ConversionOps,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from hlwq.containers import DTYPES, PACKED, Reader
from hlwq.decoded import DecodedCheckpoint, open_dense
from hlwq.errors import HlwqError, RequestError, UnsupportedError
from hlwq.expert_cache import ExpertCache
from hlwq.expert_store import ExpertStore
from hlwq.families import describe
from hlwq.formats import Scheme
from hlwq.formats import hlwq as hlwq_format
from hlwq.linear import HLWQEmbedding, HLWQExperts, HLWQLinear, HLWQTiedHead
from hlwq.options import several
from hlwq.pipeline import check_dropped
from hlwq.plan import PlannedTensor, check_tensors, make_plan
from hlwq.recipes import changed, recipe_named
from hlwq.request import Selection
from hlwq.work import check_finite, quantize_matrix

OF_EXPERT = re.compile(r"\.experts\.\d+\.")
"""In the names of an expert's own modules."""
OF_CACHE = ("expert_policy", "expert_source", "expert_prefetch")
"""What is said of a cache of experts, beside its size."""

if TYPE_CHECKING:
    from transformers.modeling_utils import PreTrainedModel


class HLWQConfig(QuantizationConfigMixin):
    """How `from_pretrained` quantizes a model, or loads one that is quantized: its `quantization_config`."""

    quant_method: Any

    def __init__(
        self,
        bits: int | None = None,
        group_size: int | None = None,
        *,
        include_embeddings: bool | None = None,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        dequantize: bool = False,
        expert_cache: int | str | None = None,
        expert_policy: str | None = None,
        expert_source: str | None = None,
        expert_prefetch: bool | None = None,
    ) -> None:
        """The options of recipe hlwq, for a model that is not quantized; and how one loads that is.

        Args:
            bits: width of a code, 2 to 8; by default 5.
            group_size: weights that share a norm; by default 128.
            include_embeddings: quantize the embedding and the output head too, as by default, or not.
            include: regular expressions of modules, kept by default, to quantize.
            exclude: regular expressions of modules to keep.
            dequantize: for an HLWQ checkpoint: decode it into ordinary layers.
            expert_cache: for an HLWQ checkpoint with experts that do not fit: bytes of them that are kept in memory,
                like `4GB`, or how many of each layer. What was done is in `model.expert_cache.counters`.
            expert_policy: which are kept: `lfru`, those used most of late, as by default; `lru` or `lfu`.
            expert_source: where the others are: on `disk`, as by default, or in the host's `memory`.
            expert_prefetch: read what the next layer's router makes of this layer's input before it is needed, where
                the model is given one token.
        """
        self.quant_method = hlwq_format.NAME
        self.bits = 5 if bits is None else bits
        self.group_size = 128 if group_size is None else group_size
        self.include_embeddings = include_embeddings
        self.include = include
        self.exclude = exclude
        self.dequantize = dequantize
        self.expert_cache, self.expert_policy, self.expert_source = expert_cache, expert_policy, expert_source
        self.expert_prefetch = expert_prefetch
        self.modules: dict[str, dict[str, int]] = {}
        self.experts: list[Any] = []
        given = {
            "bits": bits is not None,
            "group_size": group_size is not None,
            "include_embeddings": include_embeddings is not None,
            "include": bool(include),
            "exclude": bool(exclude),
        }
        self.given = [name for name, is_given in given.items() if is_given]

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Read the section of a `config.json`, or the options as a dictionary.

        Raises:
            UnsupportedError: a later version wrote it.
            RequestError: it holds a key that is none of these.
        """
        hlwq_format.check_version({"version": hlwq_format.VERSION, **config_dict}, "config.json")
        described = ("quant_method", "version", "modules", "experts")
        own = {name: value for name, value in config_dict.items() if name not in described}
        if unknown := own.keys() - signature(cls).parameters.keys():
            raise RequestError(f"quantization_config has the key {min(unknown)}, which hlwq does not know. Delete it.")
        config = cls(**own)
        config.given = []
        config.modules, config.experts = config_dict.get("modules", {}), config_dict.get("experts", [])
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """The section as `hlwq quantize` writes it."""
        common = {"bits": self.bits, "group_size": self.group_size, "modules": self.modules}
        experts = {"experts": self.experts} if self.experts else {}
        return {"quant_method": hlwq_format.NAME, "version": hlwq_format.VERSION, **common, **experts}

    def get_loading_attributes(self) -> dict[str, Any]:
        """What is said at loading and not in the file."""
        return {name: getattr(self, name) for name in ("dequantize", "given", "expert_cache", *OF_CACHE)}


class HLWQQuantizer(HfQuantizer):
    """Puts packed modules into a model while transformers loads it.

    Attributes:
        planned: the tensors to quantize as they are loaded, by the model's own names of their weights.
        reader: the files that they are in, where they are quantized as they are loaded.
        names: what the model calls the modules that are packed, by their names in the files.
        failure: what went wrong with one of them. Raised when loading has ended, since transformers would wrap it.
        cache: what holds the experts; None if all are in the model.
    """

    quantization_config: HLWQConfig

    def __init__(self, quantization_config: HLWQConfig, **kwargs: Any) -> None:
        super().__init__(copy(quantization_config), **kwargs)  # ours will say what became of this model
        self.planned: dict[str, PlannedTensor] = {}
        self.reader: Reader | None = None
        self.names: dict[str, str] = {}
        self.failure: HlwqError | None = None
        self.cache: ExpertCache | None = None

    def files(self) -> Reader:
        """The files that are quantized as they are loaded."""
        if self.reader is None:
            raise ValueError("No files are being quantized.")
        return self.reader

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Raise RequestError if options of quantizing are given for a checkpoint that is quantized."""
        if self.pre_quantized and (given := self.quantization_config.given):
            raise RequestError(
                f"`{given[0]}` changes nothing: the checkpoint is quantized already, and loads as it is stored. "
                "Leave it out, or quantize the model's BF16 original.",
                argument=given[0],
            )

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        if not checkpoint_files:
            raise UnsupportedError("HLWQ needs a checkpoint's files: give from_pretrained a directory or a hub id.")
        directory = Path(checkpoint_files[0]).parent
        if self.pre_quantized:
            schemes = _stored_schemes(directory, model)
            experts = _experts_in(model, schemes)
            self.cache = self._cache_of(directory, bool(experts))
            for name, (stack, scheme) in experts.items():
                cached = (self.cache, stack) if self.cache else None
                model.set_submodule(name, HLWQExperts(model.get_submodule(name), scheme, cached))
            if self.cache:
                model._keys_to_ignore_on_load_unexpected = {
                    *(model._keys_to_ignore_on_load_unexpected or ()),
                    rf"\.{re.escape(PACKED)}$",
                }
                vars(model)["expert_cache"] = self.cache
                if self.quantization_config.expert_prefetch:
                    for name, following in pairwise(experts):
                        layer, next_layer = model.get_submodule(name), model.get_submodule(following)
                        vars(layer)["following"] = next_layer, _router_of(model, following)
            schemes = {module: scheme for module, scheme in schemes.items() if not OF_EXPERT.search(module)}
            self.names = _own_names(model, schemes)
            for module, name in self.names.items():
                _replace(model, name, schemes[module])
        else:
            self._plan(model, directory)

    def _cache_of(self, directory: Path, has_experts: bool) -> ExpertCache | None:
        """What holds the experts of a directory, if some of them are to be kept.

        Raises:
            RequestError: an option changes nothing, or is out of range.
        """
        config = self.quantization_config
        if config.expert_cache is None:
            for name in OF_CACHE:
                if getattr(config, name) is not None:
                    raise RequestError(f"`{name}` changes nothing without `expert_cache`.", argument=name)
            return None
        if not has_experts:
            message = f"`expert_cache` changes nothing: {directory} has no packed experts."
            raise RequestError(message, argument="expert_cache", path=directory)
        if config.dequantize:
            raise RequestError(
                "`dequantize=True` decodes all experts. Leave `expert_cache` out.", argument="dequantize"
            )
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            raise UnsupportedError("Experts that are not in memory run in one process. Leave `expert_cache` out.")
        store = ExpertStore(Reader(directory), config.expert_source or "disk")
        return ExpertCache(store, config.expert_cache, config.expert_policy or "lfru")

    def _plan(self, model: PreTrainedModel, directory: Path) -> None:
        config, self.reader = self.quantization_config, open_dense(directory)
        for name in ("expert_cache", *OF_CACHE):
            if getattr(config, name) is not None:
                message = f"`{name}` is for HLWQ checkpoints, and this one is not quantized. Leave it out."
                raise RequestError(message, argument=name)
        if config.dequantize:
            message = "`dequantize=True` is for HLWQ checkpoints, and this one is not quantized. Leave it out."
            raise RequestError(message)
        recipe = changed(recipe_named("hlwq"), {"bits": config.bits, "group_size": config.group_size})
        selection = Selection(config.include_embeddings, several(config.include), several(config.exclude))
        plan = make_plan(self.reader, recipe, hlwq_format.NAME, selection)
        check_dropped(self.reader, plan)
        tensors = {tensor.module: tensor for tensor in plan.quantized()}
        if any(OF_EXPERT.search(module) for module in tensors):
            raise UnsupportedError(
                "Experts cannot be quantized as they are loaded. Use `hlwq.quantize`, and load what it makes."
            )
        self.names = _own_names(model, tensors)
        self.planned = {f"{name}.weight": tensors[module] for module, name in self.names.items()}
        for name in self.names.values():
            # Where a device map says disk, transformers writes what was not a buffer before loading to the disk.
            norms = torch.empty(0, device="meta")
            model.get_submodule(name).register_buffer("weight_norms", norms, persistent=False)
        section = hlwq_format.section_for(plan.contents().quantized)
        config.given = []  # from here on it says how the model is stored
        config.bits, config.group_size, config.modules = (section[key] for key in ("bits", "group_size", "modules"))

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        """Whether a tensor is to be quantized as it is loaded."""
        return param_name in self.planned

    @property
    def quantized_element_size(self) -> float | None:
        """Bytes per weight that is quantized as it is loaded."""
        return self.quantization_config.bits / 8 + 2 / self.quantization_config.group_size

    def get_quantize_ops(self) -> ConversionOps:
        """The operation that quantizes a tensor as it is loaded."""
        return _Quantize(self)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if self.failure is not None:
            raise self.failure
        self._name_modules_as_saved(model)
        for parameter in model.parameters():
            # Before 5.21, transformers left a tensor in the file's dtype where the model calls it by another name.
            if parameter.is_floating_point() and parameter.dtype not in (model.config.dtype, torch.float32):
                parameter.data = parameter.data.to(model.config.dtype)
        if self.quantization_config.dequantize:
            self._dequantize(model)
        return model

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | str | None = None) -> PreTrainedModel:
        """Put ordinary layers with decoded weights in the place of the packed ones, one at a time.

        Args:
            model: with packed layers.
            dtype: to cast the model to; what is kept in another dtype than the model's stays in it.

        Raises:
            UnsupportedError: some of the codes are offloaded.
        """
        if self.cache:
            raise UnsupportedError("Experts that are not in memory cannot be decoded. Leave `expert_cache` out.")
        packed = (".weight_packed", ".experts.packed")
        if any(name.endswith(packed) and codes.is_meta for name, codes in model.named_parameters()):
            raise UnsupportedError(
                "Offloaded weights cannot be decoded. Load the model whole, as with device_map='cpu'."
            )
        tied, before = False, model.dtype
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype or before  # a string once it was saved
        for parameter in model.parameters():
            if parameter.dtype == before:
                parameter.data = parameter.data.to(dtype)
        for name, module in list(model.named_modules()):
            if isinstance(module, HLWQLinear | HLWQEmbedding | HLWQExperts):
                model.set_submodule(name, module.dequantize(dtype))
            elif isinstance(module, HLWQTiedHead):
                model.set_submodule(name, module.dequantize())
                tied = True
        if tied:
            model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
            model.tie_weights()
        return model

    def _name_modules_as_saved(self, model: PreTrainedModel) -> None:
        """Let the section call modules what `save_pretrained` will: a model without its head leaves a prefix out."""
        modules = {}
        for module, scheme in self.quantization_config.modules.items():
            if OF_EXPERT.search(module):
                modules[module] = scheme
            elif module in self.names:
                saved = revert_weight_conversion(model, {f"{self.names[module]}.weight_packed": torch.empty(0)})
                modules[next(iter(saved)).removesuffix(".weight_packed")] = scheme
        self.quantization_config.modules = modules

    def is_serializable(self) -> bool:
        """`save_pretrained` writes an HLWQ checkpoint."""
        return True

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> Any:
        """What `save_pretrained` writes.

        Raises:
            UnsupportedError: the experts are not in the model.
        """
        if self.cache:
            raise UnsupportedError("Experts that are not in memory cannot be saved. Leave `expert_cache` out.")
        return None, {}

    @property
    def is_trainable(self) -> bool:
        """Codes have no gradient."""
        return False


class _Quantize(ConversionOps):
    """Quantizes the weight of one module, which it replaces by a packed one."""

    def __init__(self, quantizer: HLWQQuantizer) -> None:
        self.quantizer = quantizer

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        *,
        full_layer_name: str = "",
        model: Any = None,
        missing_keys: set[str] | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """One weight in, codes and norms out, by the model's own names."""
        weights = next(iter(input_dict.values()))
        weights = weights[0] if isinstance(weights, list) else weights
        planned, name = self.quantizer.planned[full_layer_name], full_layer_name.removesuffix(".weight")
        device = weights.device
        if weights.dtype != DTYPES[planned.spec.dtype]:  # cast to the model's dtype already: codes would differ
            weights = self.quantizer.files().read(planned.spec.name)
        replaced = _replace(model, name, planned.scheme)
        if missing_keys is not None:
            missing_keys.difference_update(replaced)
        try:
            check_finite(weights, planned.spec.name)
            matrix, _ = quantize_matrix(weights, planned.stages, device)
        except HlwqError as error:
            self.quantizer.failure = error if error.tensor else error.about(planned.spec.name)
            return {}
        tensors: dict[str, Tensor] = hlwq_format.encode(name, matrix, "")
        return {key: tensor.to(device) for key, tensor in tensors.items()}


def _stored_schemes(directory: Path, model: PreTrainedModel) -> dict[str, Scheme]:
    """The packed modules of a directory, by the names in its files.

    Raises:
        CheckpointError: a tensor is missing or has a wrong shape.
        RequestError: the directory is of another format.
    """
    checkpoint = DecodedCheckpoint(directory)
    if checkpoint.format.name != hlwq_format.NAME:
        message = f"{directory} is in format {checkpoint.format.name}, not hlwq. Load it without HLWQConfig."
        raise RequestError(message, path=directory)
    # A model that was saved without its head is no architecture of hlwq's; transformers says what it misses.
    if checkpoint.config.get("architectures") != [type(model.base_model).__name__]:
        check_tensors(checkpoint, describe(checkpoint.config, checkpoint.tensors))
    schemes = {module: checkpoint.scheme_of(f"{module}.weight") for module in checkpoint.quantized_modules()}
    return {module: scheme for module, scheme in schemes.items() if scheme is not None}


def _experts_in(model: PreTrainedModel, schemes: Mapping[str, Scheme]) -> dict[str, tuple[str, Scheme]]:
    """The modules that hold experts which a checkpoint has packed, by the model's own names.

    Returns:
        The name that each has in the files, and its scheme.
    """
    found: dict[str, tuple[str, Scheme]] = {}
    packed: dict[str, tuple[str, Scheme]] = {}
    for module, scheme in schemes.items():
        if place := OF_EXPERT.search(module):
            # Mixtral's files call it otherwise than its module.
            stack = f"{module[: place.start()]}.experts"
            packed[stack.replace(".block_sparse_moe", ".mlp")] = stack, scheme
    for name, module in model.named_modules():
        if name.endswith(".experts") and hasattr(module, "gate_up_proj"):
            # Their place is the same, the names before the layers differ where the model is in a wrapper.
            inside = name[name.index("layers.") :]
            found.update((name, stored) for each, stored in packed.items() if f".{each}".endswith(f".{inside}"))
    return found


def _router_of(model: PreTrainedModel, experts: str) -> nn.Module:
    """The module that says which experts a token goes to.

    Raises:
        UnsupportedError: it is not found.
    """
    block, packed = model.get_submodule(experts.rpartition(".")[0]), model.get_submodule(experts)
    assert isinstance(packed, HLWQExperts)
    for module in block.children():
        weight = module._parameters.get("weight")
        if weight is not None and weight.shape == (packed.count, packed.shape.hidden):
            return module
    raise UnsupportedError(f"{experts} has no router beside it. Leave `expert_prefetch` out.", tensor=experts)


def _own_names(model: PreTrainedModel, modules: Iterable[str]) -> dict[str, str]:
    """What the model calls the modules that a checkpoint names; those that it does not have are left out."""
    conversions = get_model_conversion_mapping(model)
    renamings = [each for each in conversions if isinstance(each, WeightRenaming)]
    converters = [each for each in conversions if isinstance(each, WeightConverter)]
    own = model.state_dict()
    names = {}
    for module in modules:
        name, _ = rename_source_key(f"{module}.weight", renamings, converters, model.base_model_prefix, own)
        if name in own:
            names[module] = name.removesuffix(".weight")
    return names


def _replace(model: PreTrainedModel, name: str, scheme: Scheme) -> list[str]:
    """Put an empty packed module in the place of a dense one, and of the output head tied to it.

    Returns:
        The names of the weights that are then gone.
    """
    module = model.get_submodule(name)
    weight = f"{name}.weight"
    if isinstance(module, nn.Linear):
        linear = HLWQLinear(module.in_features, module.out_features, scheme, module.bias, "meta")
        model.set_submodule(name, linear)
        return [weight]
    if not isinstance(module, nn.Embedding):
        raise UnsupportedError(
            f"{name} is neither a linear layer nor an embedding, so it cannot be packed.", tensor=name
        )
    size, scale = (module.num_embeddings, module.embedding_dim), _scale_of(name, module)
    embedding = HLWQEmbedding(*size, scheme, module.weight.dtype, "meta", scale=scale)
    model.set_submodule(name, embedding)
    tied = [head for head, source in model.all_tied_weights_keys.items() if source == weight]
    for head in tied:
        model.set_submodule(head.removesuffix(".weight"), HLWQTiedHead(embedding))
        del model.all_tied_weights_keys[head]
    return [weight, *tied]


def _scale_of(name: str, embedding: nn.Embedding) -> float:
    """What a model multiplies the rows of its embedding by.

    Raises:
        UnsupportedError: it does something else with them.
    """
    if type(embedding).forward is nn.Embedding.forward:
        return 1.0
    scale = getattr(embedding, "scalar_embed_scale", getattr(embedding, "embed_scale", None))
    if isinstance(scale, Tensor) and not scale.is_meta:
        scale = float(scale)
    if not isinstance(scale, int | float):
        raise UnsupportedError(
            f"{name} is a {type(embedding).__name__}, which does more than look rows up, so it cannot be packed. "
            "Use `include_embeddings=False`.",
            tensor=name,
        )
    return float(scale)


# Where a file has a section of its own, transformers takes loading attributes from these classes only.
vars(auto)["LOADING_ATTRIBUTES_CONFIG_TYPES"] += (HLWQConfig,)
auto.AUTO_QUANTIZATION_CONFIG_MAPPING[hlwq_format.NAME] = HLWQConfig
auto.AUTO_QUANTIZER_MAPPING[hlwq_format.NAME] = HLWQQuantizer
