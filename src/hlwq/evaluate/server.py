"""Servers that speak OpenAI's HTTP API, such as vLLM, mlx_lm.server or llama.cpp's.

What they answer is read by types and within limits of size and time: a server may be wrong or broken.
"""

from __future__ import annotations

import json
import math
import re
import threading
import time
import urllib.request
from collections.abc import Sequence
from contextlib import suppress
from http.client import HTTPConnection, HTTPException, HTTPSConnection, IncompleteRead
from ipaddress import ip_address
from socket import SHUT_RDWR, socket
from typing import Any
from urllib.parse import SplitResult, urlsplit

from hlwq.errors import RequestError, ResourceError, UnsupportedError, reason
from hlwq.evaluate.generation import Answer, Request, answer_of

ENGINES = {"vllm": "vLLM", "llamacpp": "llama.cpp", "sglang": "SGLang"}
"""Programs by what their servers call the owner of a model."""
MLX_FINGERPRINT = re.compile(r"(\d+\.\d+[^-]*)-\d+\.\d+[^-]*-(?:macOS|Linux)-.+")
"""`system_fingerprint` of mlx_lm.server, which names no owner: its version, MLX's, the platform and the GPU."""
MOST_BYTES = 1 << 28
"""Of an answer. The log-probabilities of a long prompt are some ten megabytes."""
MOST_TOKENS = 1 << 31
ROUNDING = 1e-3
"""By which log-probabilities may exceed 0: servers compute them in half precision."""


class Endpoint:
    """A server.

    Attributes:
        url: address up to and including `/v1`.
        engine: the program that the server proves to be, such as `vLLM`; else `server`.
        version: the program's version, where it tells.
        model: the server's name of its model; None where it offers several, of which its own choice is best.
        local: whether it is on this machine, or reached through a port of it.
    """

    def __init__(self, url: str, timeout: float = 3600.0) -> None:
        """Ask the server for its program and its model.

        Args:
            url: its address.
            timeout: seconds for each answer, from the request to its last byte.

        Raises:
            RequestError: the address is none.
            ResourceError: it does not answer, or serves no model.
        """
        self.url, self._timeout = url.rstrip("/"), timeout
        self._address = _address(self.url)
        self.local = _is_loopback(self._address.hostname or "")
        served = self._part(self._call("/models"), "/models", list, "data")
        if not served:
            raise ResourceError(f"The server at {self.url} serves no model.")
        names = [self._part(served, "/models", str, number, "id") for number in range(len(served))]
        self.model = names[0] if len(names) == 1 else None
        owner = served[0].get("owned_by")
        self.engine, self.version = self._identify(owner if isinstance(owner, str) else None)

    def _identify(self, owner: str | None) -> tuple[str, str | None]:
        """The program and its version, by the owner of its model or, without one, by how it signs a completion."""
        if owner is not None:
            engine = ENGINES.get(owner, "server")
            if engine != "vLLM":
                return engine, None
            with suppress(ResourceError):
                version = self._call("/version", above=True).get("version")
                return engine, version if isinstance(version, str) else None
            return engine, None
        try:
            signature = self._call("/completions", {"prompt": "A", "max_tokens": 1}).get("system_fingerprint")
        except ResourceError:
            return "server", None
        mlx = MLX_FINGERPRINT.fullmatch(str(signature))
        return ("mlx-lm", mlx[1]) if mlx else ("server", None)

    def generate(self, request: Request) -> Answer:
        """The server's answer.

        Raises:
            ResourceError: it fails, or its answer is none.
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
        way: tuple[str, ...]
        if request.chat:
            path, way = "/chat/completions", ("message", "content")
            body["messages"] = [{"role": "user", "content": request.prompt}]
        else:
            path, way = "/completions", ("text",)
            body["prompt"] = request.prompt
        choice = self._choice(self._call(path, body), path)
        text = self._part(choice, path, str, *way)
        return answer_of(text, request.stop, choice.get("finish_reason") == "length")

    def complete(self, prompt: str, count: int) -> tuple[int, int]:
        """Have the server continue a text by `count` tokens, past the end of its own answer where it can do that.

        Returns:
            Tokens of the prompt, and new tokens.

        Raises:
            ResourceError: it fails, or does not count tokens.
        """
        body = {"prompt": prompt, "max_tokens": count, "temperature": 0, "ignore_eos": True}
        answer = self._call("/completions", body)
        read, written = (
            self._part(answer, "/completions", int, "usage", name) for name in ("prompt_tokens", "completion_tokens")
        )
        if not (0 < read < MOST_TOKENS and 0 <= written <= count):
            message = f"The server at {self.url} counts {read} tokens of a prompt, and {written} new ones of {count}."
            raise ResourceError(f"{message} That cannot be.")
        return read, written

    def prompt_logprobs(self, tokens: Sequence[int], top: int) -> list[dict[int, float]]:
        """Log-probabilities, for each token but the first, of the token itself and of the `top` likeliest.

        vLLM returns them, with one new token, which is ignored.

        Raises:
            UnsupportedError: the server does not return them.
            ResourceError: it does not answer, or with what are no log-probabilities of these tokens.
        """
        body = {"prompt": list(tokens), "max_tokens": 1, "temperature": 0, "prompt_logprobs": top}
        path = "/completions"
        try:
            choice = self._choice(self._call(path, body), path)
        except ResourceError as error:
            raise ResourceError(
                f"{error} The request was for log-probabilities of a prompt, which vLLM gives."
            ) from None
        if not choice.get("prompt_logprobs"):
            raise UnsupportedError(f"The server at {self.url} gives no log-probabilities of prompts. vLLM does.")
        rows = self._part(choice, path, list, "prompt_logprobs")
        if len(rows) != len(tokens):
            raise self._malformed(path, f"log-probabilities of {len(rows)} tokens for a prompt of {len(tokens)}")
        return [self._logprobs(rows, number, token, path) for number, token in enumerate(tokens) if number]

    def _logprobs(self, rows: list[Any], number: int, token: int, path: str) -> dict[int, float]:
        """The log-probabilities at one place of a prompt, where a token stands."""
        where, found = f"prompt_logprobs[{number}]", {}
        for name in self._part(rows, path, dict, number):
            value = self._part(rows, path, float, number, name, "logprob")
            if not (name.isascii() and name.isdigit() and len(name) < 10):
                raise self._malformed(path, f"a token called {name[:20]!r} in {where}")
            if value > ROUNDING:
                raise self._malformed(path, f"a log-probability of {value:g} in {where}, which is above 0")
            found[int(name)] = value
        if token not in found:
            raise self._malformed(path, f"no log-probability of the prompt's own token {token} in {where}")
        if sum(map(math.exp, found.values())) > 1 + len(found) * ROUNDING:
            raise self._malformed(path, f"probabilities in {where} whose sum is above 1")
        return found

    def _choice(self, answer: dict[str, Any], path: str) -> dict[str, Any]:
        """The only choice of an answer."""
        choices = self._part(answer, path, list, "choices")
        if len(choices) != 1:
            raise self._malformed(path, f"{len(choices)} choices, where one was asked for")
        choice: dict[str, Any] = self._part(choices, path, dict, 0)
        return choice

    def _part(self, answer: Any, path: str, kind: type, *way: str | int) -> Any:
        """A part of an answer, of a type. Raises ResourceError if it is not there, or of another one."""
        value = answer
        for key in way:
            inside = isinstance(value, dict if isinstance(key, str) else list)
            if not inside or (key not in value if isinstance(key, str) else key >= len(value)):
                raise self._malformed(path, f"no {_words(way)}")
            value = value[key]
        number = type(value) in (int, float) and abs(value) < 1e30
        if kind is float and number:
            return float(value)
        if kind is float or type(value) is not kind:
            shown = json.dumps(value)[:60]
            raise self._malformed(path, f"{shown} for {_words(way)}")
        return value

    def _malformed(self, path: str, what: str) -> ResourceError:
        return ResourceError(
            f"The server at {self.url}{path} sent {what}. It does not speak OpenAI's API as it should; look at its log."
        )

    def _call(self, path: str, body: dict[str, Any] | None = None, *, above: bool = False) -> dict[str, Any]:
        """The JSON object that the server answers with. `above` leaves the address's `/v1` out."""
        if body is not None and self.model is not None:
            body = {"model": self.model, **body}
        data = None if body is None else json.dumps(body).encode()
        prefix = self._address.path.removesuffix("/v1") if above else self._address.path
        where = f"The server at {self.url}{path}"
        started = time.monotonic()
        try:
            status, moved, contents = self._exchange(prefix + path, data)
        except (OSError, HTTPException, ValueError) as error:
            if time.monotonic() - started >= self._timeout:
                raise ResourceError(f"{where} has not answered whole in {self._timeout:g} s. Is it busy?") from None
            if isinstance(error, IncompleteRead):
                raise ResourceError(f"{where} broke off in the middle of its answer. Look at its log.") from None
            message = f"The server at {self.url} does not answer ({reason(error)}). Is it up?"
            raise ResourceError(message) from None
        if 300 <= status < 400:
            raise ResourceError(f"{where} redirects to {moved}, which is not followed. Name that server instead.")
        text = contents.decode(errors="replace")
        if status != 200:
            raise ResourceError(f"{where} answered {status}: {text[:300].strip() or 'nothing'}")
        try:
            answer = json.loads(contents.decode(), parse_constant=_refuse)
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict):
            raise ResourceError(f"{where} did not answer with a JSON object, but: {text[:100]!r}")
        return answer

    def _exchange(self, target: str, data: bytes | None) -> tuple[int, str | None, bytes]:
        """Status, address of a redirection, and contents of an answer, all of it within the time and the size."""
        connection = self._connection()
        if self._proxy and self._address.scheme == "http":
            target = f"http://{self._address.netloc}{target}"
        started = time.monotonic()
        connection.connect()
        # Not the connection, which forgets its socket as soon as it has the head of an answer.
        timer = threading.Timer(self._timeout, _shut, [connection.sock])
        timer.daemon = True
        timer.start()
        try:
            headers = {"Content-Type": "application/json", "Accept": "application/json"}
            connection.request("GET" if data is None else "POST", target, data, headers)
            response = connection.getresponse()
            blocks, size = [], 0
            while block := response.read1(1 << 16):
                size += len(block)
                if size > MOST_BYTES:
                    raise ValueError(f"its answer has more than {MOST_BYTES:,} bytes")
                blocks.append(block)
            if time.monotonic() - started >= self._timeout:
                raise TimeoutError
            if response.length:
                raise IncompleteRead(b"", response.length)
            return response.status, response.getheader("Location"), b"".join(blocks)
        finally:
            timer.cancel()
            connection.close()

    @property
    def _proxy(self) -> SplitResult | None:
        """The proxy that the environment names for the server; none for one on this machine."""
        host, scheme = self._address.hostname or "", self._address.scheme
        proxies = urllib.request.getproxies()
        address = proxies.get(scheme) or proxies.get("all")
        if self.local or not address or urllib.request.proxy_bypass(host):
            return None
        return urlsplit(address if "://" in address else f"http://{address}")

    def _connection(self) -> HTTPConnection:
        secure = self._address.scheme == "https"
        kind: type[HTTPConnection] = HTTPSConnection if secure else HTTPConnection
        host, port, proxy = self._address.hostname or "", self._address.port, self._proxy
        if proxy is None:
            return kind(host, port, timeout=self._timeout)
        connection = kind(proxy.hostname or "", proxy.port, timeout=self._timeout)
        if secure:
            connection.set_tunnel(host, port)
        return connection


def _address(url: str) -> SplitResult:
    """The parts of a server's address. Raises RequestError if it is none."""
    lack = "it must be like http://127.0.0.1:8000/v1"
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise RequestError(f"`endpoint` {url!r} is no address ({reason(error)}); {lack}.") from None
    plain = url.isascii() and url.isprintable() and " " not in url
    if parts.scheme not in ("http", "https") or not parts.hostname or not plain or port == 0:
        raise RequestError(f"`endpoint` {url!r} is no address; {lack}.")
    if parts.username is not None or parts.query or parts.fragment:
        raise RequestError(f"`endpoint` {url!r} has more than a host, a port and a path; {lack}.")
    return parts


def _is_loopback(host: str) -> bool:
    """Whether a host is this machine, by its name or number alone."""
    if host.rstrip(".").lower() == "localhost" or host.lower().endswith(".localhost"):
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def _shut(connected: socket) -> None:
    """End a connection that another thread waits for."""
    with suppress(OSError):
        connected.shutdown(SHUT_RDWR)


def _words(way: Sequence[str | int]) -> str:
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in way).lstrip(".")


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON")
