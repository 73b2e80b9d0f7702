"""Text from a model: what is asked, what is answered, and a model in this process that answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hlwq.errors import RequestError
from hlwq.evaluate.model import load_for_evaluation, longest_context
from hlwq.sources import locate
from hlwq.transformers_models import load_tokenizer, quiet_transformers, render_chat

Generate = Callable[["Request"], "Answer"]
TRANSFORMERS, PACKED = "transformers", "transformers, packed"
"""Engines inside this process: with decoded weights, and with HLWQ's codes as they are."""


@dataclass(frozen=True)
class Request:
    """One prompt for a model.

    Attributes:
        prompt: the text to continue, or the user's message in a chat.
        chat: whether it is a chat.
        max_tokens: most tokens in the answer.
        temperature: sampling temperature; 0 is greedy.
        seed: seed of the sampling.
        stop: texts that end the answer, and are not part of it.
    """

    prompt: str
    chat: bool
    max_tokens: int
    temperature: float = 0.0
    seed: int = 0
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Answer:
    """A model's answer.

    Attributes:
        text: the answer up to the first of the stop texts.
        unfinished: whether it ended because of `max_tokens`.
    """

    text: str
    unfinished: bool


def answer_of(text: str, stop: Sequence[str], at_limit: bool) -> Answer:
    """The answer in all that a model wrote; `at_limit` tells whether `max_tokens` ended it."""
    answer = cut_at(text, stop)
    return Answer(answer, at_limit and answer == text)


def cut_at(text: str, stop: Sequence[str]) -> str:
    """A text up to the first of the stop texts."""
    ends = [text.index(each) for each in stop if each in text]
    return text[: min(ends)] if ends else text


def has_chat_template(model: str | Path) -> bool:
    """Whether a directory's or hub id's tokenizer has a chat template. Raises CheckpointError without a tokenizer."""
    return bool(getattr(load_tokenizer(locate(model)), "chat_template", None))


def transformers_generate(model: str | Path, device: str | None = None) -> Generate:
    """Load a directory of any format or a hub id, to generate with it.

    Raises:
        HlwqError: see `locate` and `load_model`; the generator raises RequestError if a chat lacks its template.
    """
    loaded, tokenizer = load_for_evaluation(locate(model), device)

    def generate(request: Request) -> Answer:
        text = request.prompt
        if request.chat:
            if not getattr(tokenizer, "chat_template", None):
                raise RequestError(f"{model} has no chat template. Use `prompting='completion'`.", argument="prompting")
            messages = [{"role": "user", "content": request.prompt}]
            text = render_chat(tokenizer, messages, add_generation_prompt=True)
        inputs = tokenizer(text, return_tensors="pt", add_special_tokens=not request.chat).to(loaded.device)
        needed, longest = inputs["input_ids"].shape[1] + request.max_tokens, longest_context(loaded.config)
        if longest is not None and needed > longest:
            raise RequestError(
                f"A prompt and `max_tokens` {request.max_tokens} are {needed} tokens, more than the model's own limit "
                f"of {longest}. Lower `max_tokens`."
            )
        options: dict[str, Any] = {"do_sample": False}
        if request.temperature:
            torch.manual_seed(request.seed)
            # Not the model's own top-p and top-k: the protocol defines what is measured.
            options = {"do_sample": True, "temperature": request.temperature, "top_p": 1.0, "top_k": 0}
        if request.stop:
            options |= {"stop_strings": list(request.stop), "tokenizer": tokenizer}
        with quiet_transformers(), torch.inference_mode():
            tokens = loaded.generate(
                **inputs,
                max_new_tokens=request.max_tokens,
                pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
                **options,
            )
        new = tokens[0, inputs["input_ids"].shape[1] :]
        ends = loaded.generation_config.eos_token_id
        ended = int(new[-1]) in (ends if isinstance(ends, list) else [ends])
        text = tokenizer.decode(new, skip_special_tokens=True)
        return answer_of(text, request.stop, len(new) >= request.max_tokens and not ended)

    return generate
