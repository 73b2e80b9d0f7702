"""Loading any directory as a transformers model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from hlwq.devices import torch_device
from hlwq.errors import HlwqError
from hlwq.models import describe
from hlwq.sources import DecodedCheckpoint


def load_model(path: Path, device: str = "cpu", dtype: torch.dtype = torch.bfloat16) -> tuple[Any, Any]:
    """Load a dense, hlwq, gptq or mlx directory into transformers, with its codes decoded.

    Args:
        path: the directory.
        device: where the model goes.
        dtype: of its weights. float32 holds decoded weights exactly.

    Returns:
        The model, in evaluation mode, and its tokenizer.

    Raises:
        HlwqError: transformers is not installed, the directory cannot be read, or the device cannot be used.
    """
    transformers = _transformers()
    target = torch_device(device)
    checkpoint = DecodedCheckpoint(path)
    tied = describe(checkpoint.config, checkpoint.tensors).tied
    config = transformers.AutoConfig.for_model(checkpoint.config["model_type"])
    config = type(config).from_dict(checkpoint.config)
    weights = {name: checkpoint.read(name).to(dtype) for name in checkpoint.tensors}
    with quiet_transformers():
        with torch.device("meta"):  # for the class and the text configuration that it uses, no weights
            skeleton = transformers.AutoModelForCausalLM.from_config(config)
        skeleton.config.tie_word_embeddings = tied
        model, loading = type(skeleton).from_pretrained(
            None, config=skeleton.config, state_dict=weights, dtype=dtype, output_loading_info=True
        )
    if loading["missing_keys"]:  # transformers would fill them at random
        raise HlwqError(f"{path}: tensors are missing: {', '.join(sorted(loading['missing_keys'])[:3])}.")
    return model.eval().to(target), load_tokenizer(path)


def load_tokenizer(path: Path) -> Any:
    """Load the tokenizer of a directory.

    Raises:
        HlwqError: transformers is not installed, or there is no tokenizer.
    """
    try:
        return _transformers().AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise HlwqError(
            f"{path} has no tokenizer that loads ({str(error).splitlines()[0]}). Copy the original's."
        ) from None


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise HlwqError("Measuring needs transformers. Run: pip install 'hlwq[eval]'") from None
    return transformers


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without its loading bars, and its hints on long texts and on kernels that are not installed."""
    transformers = _transformers()
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        transformers.logging.enable_progress_bar()
