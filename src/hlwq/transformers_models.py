"""Tokenizers and models without weights from transformers, which is an extra."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from hlwq.errors import CheckpointError, ResourceError, UnsupportedError, reason


def require_transformers() -> Any:
    """The module. Raises ResourceError, which says how to install it, where it is missing."""
    try:
        import transformers
    except ImportError:
        raise ResourceError("This needs transformers. Run: pip install 'hlwq[calibration,eval]'") from None
    return transformers


def load_tokenizer(path: Path) -> Any:
    """Load the tokenizer of a directory.

    Raises:
        ResourceError: transformers is not installed.
        CheckpointError: there is no tokenizer, or none that loads.
    """
    transformers = require_transformers()
    try:
        return transformers.AutoTokenizer.from_pretrained(path)
    except Exception as error:  # tokenizers raise what they like
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        message = f"{path} has no tokenizer that loads ({reason}). Copy the original's."
        raise CheckpointError(message, path=path) from None


def build_skeleton(config: dict[str, Any], *, tied: bool) -> Any:
    """The causal language model of a `config.json`: all of its modules and none of its weights, which are on `meta`.

    Raises:
        ResourceError: transformers is not installed.
        UnsupportedError: it does not know the model.
    """
    transformers = require_transformers()
    model_type = config.get("model_type")
    try:
        kind = type(transformers.AutoConfig.for_model(model_type))
    except (KeyError, ValueError):
        raise UnsupportedError(
            f"config.json: transformers {transformers.__version__} does not know model_type {model_type}. Upgrade "
            "transformers, or correct the file."
        ) from None
    try:
        with quiet_transformers(), _WithoutWeights():
            skeleton = transformers.AutoModelForCausalLM.from_config(kind.from_dict(config), trust_remote_code=False)
    except Exception as error:  # of its checks, or of the model's own code
        message = f"config.json: transformers makes no {model_type} model of it ({reason(error)}). Correct the file."
        raise CheckpointError(message) from None
    skeleton.config.tie_word_embeddings = tied
    return skeleton.eval()


class _WithoutWeights(TorchFunctionMode):
    """Leaves out what modules would initialise as weights, which they allocate by `torch.empty`.

    Other tensors are made: buffers that no file holds, such as the scale of an embedding or the rotary frequencies, are
    then what the model's code says.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty and kwargs.get("device") is None:
            kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' loading bars, and its hints on long texts and on kernels that are not installed.

    It imports torchao where that is installed, which complains of a missing GPU.
    """
    transformers = require_transformers()
    verbosity, bars = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    others = {logger: logger.level for logger in map(logging.getLogger, ("torchao", "torch.utils._pytree"))}
    for logger in others:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in others.items():
            logger.setLevel(level)
        transformers.logging.set_verbosity(verbosity)
        if bars:
            transformers.logging.enable_progress_bar()
