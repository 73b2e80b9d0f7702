"""Loading any directory as a transformers model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from hlwq.decoded import DecodedCheckpoint
from hlwq.devices import compute_dtype, torch_device
from hlwq.errors import CheckpointError, HlwqError, RequestError, reason
from hlwq.families import describe
from hlwq.plan import check_tensors
from hlwq.transformers_models import build_skeleton, load_tokenizer, quiet_transformers


def load_for_evaluation(path: Path, device: str | None = None) -> tuple[Any, Any]:
    """`load_model` in bfloat16, whose weights run in float32 on a CPU without fast kernels for bfloat16.

    Raises:
        HlwqError: see `load_model`.
    """
    model, tokenizer = load_model(path, device)
    return model.to(compute_dtype(torch_device(device))), tokenizer


def load_model(path: Path, device: str | None = None, dtype: torch.dtype = torch.bfloat16) -> tuple[Any, Any]:
    """Load a dense, hlwq, gptq or mlx directory into transformers, with its codes decoded.

    Args:
        path: the directory.
        device: where the model goes; by default a GPU if there is one.
        dtype: dtype of its weights; float32 holds decoded weights exactly.

    Returns:
        The model, in evaluation mode, and its tokenizer.

    Raises:
        HlwqError: the directory cannot be read, or the device cannot be used.
    """
    target = torch_device(device)
    checkpoint = DecodedCheckpoint(path)
    # Only for its class and its text configuration.
    skeleton = build_skeleton(checkpoint.config, tied=describe(checkpoint.config, checkpoint.tensors).tied)
    weights = {name: checkpoint.read(name).to(dtype) for name in checkpoint.tensors}
    with quiet_transformers():
        model, loading = type(skeleton).from_pretrained(
            None,
            config=skeleton.config,
            state_dict=weights,
            dtype=dtype,
            output_loading_info=True,
            trust_remote_code=False,
            use_safetensors=True,
        )
    if loading["missing_keys"]:  # transformers would fill them at random
        missing = sorted(loading["missing_keys"])
        raise CheckpointError(f"{path}: tensors are missing: {', '.join(missing[:3])}.", path=path, tensor=missing[0])
    return model.eval().to(target), load_tokenizer(path)


def longest_context(config: Any) -> int | None:
    """The tokens that a transformers configuration says a model can be given; None where it does not say."""
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    return longest if isinstance(longest, int) else None


def check_tokens(path: Path, tokens: Sequence[int], context: int) -> None:
    """Check that a model can be given windows of these tokens, before it is loaded.

    Args:
        path: its directory.
        tokens: those of its own tokenizer.
        context: tokens in a window.

    Raises:
        RequestError: windows are longer than what the model is made for.
        CheckpointError: the tokenizer gives tokens that the model does not have.
    """
    checkpoint = DecodedCheckpoint(path)
    config = describe(checkpoint.config, checkpoint.tensors).text_config
    longest, vocabulary = config.get("max_position_embeddings"), config["vocab_size"]
    if longest is not None and context > longest:
        raise RequestError(f"`context` {context} exceeds the model's own limit of {longest} tokens.")
    if tokens and max(tokens) >= vocabulary:
        raise CheckpointError(
            f"The tokenizer of {path} gives the token {max(tokens)}, but the model has {vocabulary}. They do not "
            "belong together: copy the original's tokenizer.",
            path=path,
        )


def load_packed(path: Path, device: str | None = None) -> tuple[Any, Any]:
    """Load an hlwq directory into transformers without decoding it, in the model's own dtype.

    Args:
        path: the directory.
        device: where the model goes; by default a GPU if there is one.

    Returns:
        The model, in evaluation mode, and its tokenizer.

    Raises:
        RequestError: the directory is of another format.
        HlwqError: the directory cannot be read, or the device cannot be used.
    """
    from transformers import AutoModelForCausalLM

    target = torch_device(device)
    checkpoint = DecodedCheckpoint(path)
    check_tensors(checkpoint, describe(checkpoint.config, checkpoint.tensors))
    format_name = checkpoint.format.name
    if format_name != "hlwq":
        raise RequestError(
            f"{path} is in format {format_name}: only format hlwq runs packed. Leave `packed=True` out.",
            argument="packed",
            path=path,
        )
    try:
        with quiet_transformers():
            model: Any = AutoModelForCausalLM.from_pretrained(
                path,
                trust_remote_code=False,
                use_safetensors=True,
                local_files_only=True,
                attn_implementation="sdpa",  # a file could name a kernel on the hub
            )
    except HlwqError:
        raise
    except Exception as error:  # of its checks of a configuration that hlwq does not read so far
        raise CheckpointError(f"{path}: transformers does not load it ({reason(error)}).", path=path) from None
    return model.to(target), load_tokenizer(path)
