"""Calibration samples that the model writes itself: its own distribution, at no need of data.

Williams & Aletras (arXiv 2410.17170) calibrate on such samples alone; here they go beside real text.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hlwq.errors import CheckpointError, RequestError
from hlwq.families import ModelLayout
from hlwq.transformers_models import quiet_transformers

PROMPT_TOKENS = 16
"""Tokens of a text that a sample begins with at most, so that the samples are about what the texts are about."""

GENERATION_BYTES = 2 << 30
"""What the keys and values of samples that are written together may take."""


def kv_bytes_per_token(layout: ModelLayout, dtype: torch.dtype) -> int:
    """Bytes at most of the keys and values of one token."""
    config = layout.text_config
    heads = config["num_attention_heads"]
    width = config.get("head_dim") or config["hidden_size"] // heads
    values: int = len(layout.layers) * (config.get("num_key_value_heads") or heads) * width
    return 2 * dtype.itemsize * values


def prompts_from(tokens: Tensor, count: int) -> Tensor:
    """Beginnings of samples, (count, prompt length): the first tokens of each text sample, then the ones after those.

    Args:
        tokens: int64 (samples, sequence_length), those of the texts.
        count: how many.

    Raises:
        RequestError: the texts have too few tokens.
    """
    of_each = -(-count // len(tokens))
    width = min(PROMPT_TOKENS, tokens.shape[1] // max(of_each, 2))  # of the sample, a half at least is written
    if not width:
        raise RequestError(
            f"`generated_samples` {count} need as many beginnings, and {len(tokens)} samples of {tokens.shape[1]} "
            "tokens do not give them. Lower it, or raise `samples` or `sequence_length`."
        )
    runs = tokens[:, : tokens.shape[1] // width * width].unflatten(1, (-1, width))
    prompts: Tensor = runs.transpose(0, 1).flatten(0, 1)[:count]
    return prompts


@torch.inference_mode()
def continued(model: Any, prompts: Tensor, length: int, seed: int, progress: Callable[[int], None]) -> Tensor:
    """Let a model go on with prompts, each token drawn from its own distribution (temperature 1, all tokens).

    A text that ends is followed by another, as in packed training data: tokens that end a text are like any other.

    Args:
        model: a causal language model of transformers.
        prompts: int64 (samples, tokens), on any device.
        length: tokens of a sample, its prompt included.
        seed: seed of the draws.
        progress: told how many tokens of each sample there are.

    Returns:
        int64 (samples, length), on the CPU.

    Raises:
        CheckpointError: the model's predictions are not finite.
    """
    generator = torch.Generator(model.device).manual_seed(seed)
    newest = prompts.to(model.device)
    written, cache = [newest], None
    for done in range(prompts.shape[1], length):
        with quiet_transformers():
            outputs = model(input_ids=newest, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, logits = outputs.past_key_values, outputs.logits[:, -1].float()
        if not torch.isfinite(logits).all():
            raise CheckpointError("the model's predictions are not finite. Is the checkpoint damaged?")
        newest = torch.multinomial(logits.softmax(-1), 1, generator=generator)
        written.append(newest)
        progress(done + 1)
    return torch.cat(written, 1).cpu()
