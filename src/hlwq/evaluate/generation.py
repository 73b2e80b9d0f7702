"""Text from a model: in this process by transformers, or from any server that speaks OpenAI's HTTP API."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch

from hlwq.errors import HlwqError
from hlwq.evaluate.model import load_for_evaluation
from hlwq.sources import locate
from hlwq.transformers_models import load_tokenizer, quiet_transformers

Generate = Callable[["Request"], "Answer"]
TRANSFORMERS, PACKED = "transformers", "transformers, packed"
"""The engines of what runs in this process: with decoded weights, and with HLWQ's codes as they are."""
ENGINES = {"vllm": "vLLM", "llamacpp": "llama.cpp", "sglang": "SGLang", None: "mlx-lm"}
"""Programs by what their servers call the owner of a model; mlx_lm.server names none."""


@dataclass(frozen=True)
class Request:
    """What is asked of a model.

    Attributes:
        prompt: the text to continue, or of a chat the user's message.
        chat: whether it is a chat.
        max_tokens: of the answer.
        temperature: 0 is greedy.
        seed: of the sampling.
        stop: texts that end the answer, which they do not belong to.
    """

    prompt: str
    chat: bool
    max_tokens: int
    temperature: float = 0.0
    seed: int = 0
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Answer:
    """What a model said.

    Attributes:
        text: up to the first of the stop texts.
        unfinished: whether it ended because of `max_tokens`.
    """

    text: str
    unfinished: bool


def answer_of(text: str, stop: Sequence[str], at_limit: bool) -> Answer:
    """What a model said, by all that it wrote and whether it was stopped at its `max_tokens`."""
    said = cut_at(text, stop)
    return Answer(said, at_limit and said == text)


def cut_at(text: str, stop: Sequence[str]) -> str:
    """A text up to the first of the stop texts."""
    ends = [text.index(each) for each in stop if each in text]
    return text[: min(ends)] if ends else text


def has_chat_template(model: str | Path) -> bool:
    """Whether a directory's or hub id's tokenizer has a chat template. Raises HlwqError if there is no tokenizer."""
    return bool(getattr(load_tokenizer(locate(model)), "chat_template", None))


def transformers_generate(model: str | Path, device: str = "cpu") -> Generate:
    """Load a directory of any format or a hub id, to generate with it.

    Raises:
        HlwqError: see `locate` and `load_model`; of the generator: the model has no chat template.
    """
    loaded, tokenizer = load_for_evaluation(locate(model), device)

    def generate(request: Request) -> Answer:
        text = request.prompt
        if request.chat:
            if not getattr(tokenizer, "chat_template", None):
                raise HlwqError(f"{model} has no chat template. Use --prompting completion.")
            messages = [{"role": "user", "content": request.prompt}]
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        inputs = tokenizer(text, return_tensors="pt", add_special_tokens=not request.chat).to(loaded.device)
        options: dict[str, Any] = {"do_sample": False}
        if request.temperature:
            torch.manual_seed(request.seed)
            # The model's own habits of sampling are put aside: what is measured is said in the protocol.
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
        written = tokens[0, inputs["input_ids"].shape[1] :]
        ends = loaded.generation_config.eos_token_id
        ended = int(written[-1]) in (ends if isinstance(ends, list) else [ends])
        text = tokenizer.decode(written, skip_special_tokens=True)
        return answer_of(text, request.stop, len(written) >= request.max_tokens and not ended)

    return generate


class Endpoint:
    """A server that speaks OpenAI's HTTP API, such as vLLM, mlx_lm.server or llama.cpp's.

    Attributes:
        url: up to and including `/v1`.
        engine: the program behind it, such as `vLLM`, or `server` if it does not say.
        version: of the program, where it says.
        model: the name that the server gives its model; None where it offers several, the first being no better than
            its own choice.
        local: whether it is on this machine, or reached through a port of it.
    """

    def __init__(self, url: str, timeout: float = 3600.0) -> None:
        """Ask the server what it is and which model it serves.

        Raises:
            HlwqError: it does not answer, or serves no model.
        """
        self.url, self._timeout = url.rstrip("/"), timeout
        self.local = urlsplit(self.url).hostname in ("127.0.0.1", "localhost", "::1")
        served = self._call("/models").get("data")
        if not served:
            raise HlwqError(f"--endpoint {self.url} serves no model.")
        self.model = str(served[0]["id"]) if len(served) == 1 else None
        self.engine = ENGINES.get(served[0].get("owned_by"), "server")
        self.version = self._version()

    def _version(self) -> str | None:
        if self.engine != "vLLM":
            return None
        address = self.url.removesuffix("/v1")
        return str(self._call("/version", address=address)["version"])

    def generate(self, request: Request) -> Answer:
        """The server's answer.

        Raises:
            HlwqError: it fails, or answers in a way that is not understood.
        """
        body: dict[str, Any] = {
            "max_tokens": request.max_tokens,
            "temperature": request.temperature,
            "seed": request.seed,
        }
        if request.temperature:
            body["top_p"] = 1.0
        if request.stop:
            body["stop"] = list(request.stop)[:4]  # more than OpenAI's API allows; the rest is cut here
        if request.chat:
            body["messages"] = [{"role": "user", "content": request.prompt}]
            choice = self._call("/chat/completions", body)["choices"][0]
            text = choice["message"]["content"] or ""
        else:
            choice = self._call("/completions", {**body, "prompt": request.prompt})["choices"][0]
            text = choice["text"]
        return answer_of(text, request.stop, choice.get("finish_reason") == "length")

    def complete(self, prompt: str, count: int) -> tuple[int, int]:
        """Have the server continue a text by `count` tokens, past the end of its own answer where it can do that.

        Returns:
            How many tokens the prompt had, and how many were written.

        Raises:
            HlwqError: it fails.
        """
        body = {"prompt": prompt, "max_tokens": count, "temperature": 0, "ignore_eos": True}
        usage = self._call("/completions", body)["usage"]
        return int(usage["prompt_tokens"]), int(usage["completion_tokens"])

    def prompt_logprobs(self, tokens: Sequence[int], top: int) -> list[dict[int, float]]:
        """The server's log-probabilities of each token but the first: of the token itself, and of the likeliest.

        vLLM returns them; it is asked for one more token, which is ignored.

        Raises:
            HlwqError: the server does not return them.
        """
        body = {"prompt": list(tokens), "max_tokens": 1, "temperature": 0, "prompt_logprobs": top}
        try:
            found = self._call("/completions", body)["choices"][0].get("prompt_logprobs")
        except HlwqError as error:
            raise HlwqError(f"{error} It was asked for log-probabilities of a prompt, which vLLM gives.") from None
        if not found:
            raise HlwqError(f"--endpoint {self.url} gives no log-probabilities of prompts. vLLM does.")
        return [{int(token): float(entry["logprob"]) for token, entry in each.items()} for each in found[1:]]

    def _call(self, path: str, body: dict[str, Any] | None = None, address: str | None = None) -> dict[str, Any]:
        if body is not None and self.model is not None:
            body = {"model": self.model, **body}
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request((address or self.url) + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=self._timeout) as response:
                said = response.read().decode(errors="replace")
        except urllib.error.HTTPError as error:
            said = error.read().decode(errors="replace")[:300]
            raise HlwqError(f"--endpoint {self.url}{path} answered {error.code}: {said}") from None
        except (OSError, HTTPException, ValueError) as error:
            reason = getattr(error, "reason", error)
            raise HlwqError(f"--endpoint {self.url} does not answer ({reason}). Is the server up?") from None
        try:
            answer: dict[str, Any] = json.loads(said)
        except ValueError:
            raise HlwqError(f"--endpoint {self.url}{path} answered what is not JSON: {said[:100]!r}.") from None
        return answer
