"""Text from a model: in this process by transformers, or from any server that speaks OpenAI's HTTP API."""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch

from hlwq.errors import RequestError, ResourceError, UnsupportedError
from hlwq.evaluate.model import load_for_evaluation
from hlwq.sources import locate
from hlwq.transformers_models import load_tokenizer, quiet_transformers, render_chat

Generate = Callable[["Request"], "Answer"]
TRANSFORMERS, PACKED = "transformers", "transformers, packed"
"""Engines inside this process: with decoded weights, and with HLWQ's codes as they are."""
ENGINES = {"vllm": "vLLM", "llamacpp": "llama.cpp", "sglang": "SGLang"}
"""Programs by what their servers call the owner of a model."""
MLX_FINGERPRINT = re.compile(r"(\d+\.\d+[^-]*)-\d+\.\d+[^-]*-(?:macOS|Linux)-.+")
"""`system_fingerprint` of mlx_lm.server, which names no owner: its version, MLX's, the platform and the GPU."""


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


def transformers_generate(model: str | Path, device: str = "cpu") -> Generate:
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


class Endpoint:
    """A server that speaks OpenAI's HTTP API, such as vLLM, mlx_lm.server or llama.cpp's.

    Attributes:
        url: address up to and including `/v1`.
        engine: the program that the server proves to be, such as `vLLM`; else `server`.
        version: the program's version, where it tells.
        model: the server's name of its model; None where it offers several, of which its own choice is best.
        local: whether it is on this machine, or reached through a port of it.
    """

    def __init__(self, url: str, timeout: float = 3600.0) -> None:
        """Ask the server for its program and its model.

        Raises:
            ResourceError: it does not answer, or serves no model.
        """
        self.url, self._timeout = url.rstrip("/"), timeout
        self.local = urlsplit(self.url).hostname in ("127.0.0.1", "localhost", "::1")
        served = self._call("/models").get("data")
        if not served:
            raise ResourceError(f"The server at {self.url} serves no model.")
        self.model = str(served[0]["id"]) if len(served) == 1 else None
        self.engine, self.version = self._identify(served[0].get("owned_by"))

    def _identify(self, owner: str | None) -> tuple[str, str | None]:
        """The program and its version, by the owner of its model or, without one, by how it signs a completion."""
        if owner is not None:
            engine = ENGINES.get(owner, "server")
            version = self._call("/version", address=self.url.removesuffix("/v1")) if engine == "vLLM" else {}
            return engine, version.get("version")
        try:
            signature = self._call("/completions", {"prompt": "A", "max_tokens": 1}).get("system_fingerprint")
        except ResourceError:
            return "server", None
        mlx = MLX_FINGERPRINT.fullmatch(str(signature))
        return ("mlx-lm", mlx[1]) if mlx else ("server", None)

    def generate(self, request: Request) -> Answer:
        """The server's answer.

        Raises:
            ResourceError: it fails, or its answer is not JSON.
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
            Tokens of the prompt, and new tokens.

        Raises:
            ResourceError: it fails.
        """
        body = {"prompt": prompt, "max_tokens": count, "temperature": 0, "ignore_eos": True}
        usage = self._call("/completions", body)["usage"]
        return int(usage["prompt_tokens"]), int(usage["completion_tokens"])

    def prompt_logprobs(self, tokens: Sequence[int], top: int) -> list[dict[int, float]]:
        """Log-probabilities, for each token but the first, of the token itself and of the `top` likeliest.

        vLLM returns them, with one new token, which is ignored.

        Raises:
            UnsupportedError: the server does not return them.
            ResourceError: it does not answer.
        """
        body = {"prompt": list(tokens), "max_tokens": 1, "temperature": 0, "prompt_logprobs": top}
        try:
            logprobs = self._call("/completions", body)["choices"][0].get("prompt_logprobs")
        except ResourceError as error:
            raise ResourceError(
                f"{error} The request was for log-probabilities of a prompt, which vLLM gives."
            ) from None
        if not logprobs:
            raise UnsupportedError(f"The server at {self.url} gives no log-probabilities of prompts. vLLM does.")
        return [{int(token): float(entry["logprob"]) for token, entry in each.items()} for each in logprobs[1:]]

    def _call(self, path: str, body: dict[str, Any] | None = None, address: str | None = None) -> dict[str, Any]:
        if body is not None and self.model is not None:
            body = {"model": self.model, **body}
        data = None if body is None else json.dumps(body).encode()
        try:
            request = urllib.request.Request((address or self.url) + path, data, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=self._timeout) as response:
                text = response.read().decode(errors="replace")
        except urllib.error.HTTPError as error:
            text = error.read().decode(errors="replace")[:300]
            raise ResourceError(f"The server at {self.url}{path} answered {error.code}: {text}") from None
        except (OSError, HTTPException, ValueError) as error:
            reason = getattr(error, "reason", error)
            raise ResourceError(f"The server at {self.url} does not answer ({reason}). Is it up?") from None
        try:
            answer = json.loads(text)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise ResourceError(f"The answer of the server at {self.url}{path} is no JSON object: {text[:100]!r}.")
        return answer
