"""What a server is taken for, by what it says."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from hlwq.errors import ResourceError, UnsupportedError
from hlwq.evaluate.server import Endpoint

MLX = "0.32.2-0.32.4-macOS-15.5-arm64-arm-64bit-applegpu_g16s"
MLX_ON_LINUX = "0.32.2-0.32.4-Linux-6.8.0-x86_64-with-glibc2.39-cpu"


@contextmanager
def served(answers: dict[str, Any]) -> Iterator[str]:
    """A server with these answers by path; 404 for any other."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            answer = answers.get(self.path)
            body = json.dumps(answer).encode() if answer is not None else b"Not Found"
            self.send_response(404 if answer is None else 200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET

        def log_message(self, *arguments: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/v1"
        server.shutdown()


def answers(model: dict[str, Any], **more: Any) -> dict[str, Any]:
    models = {"/v1/models": {"object": "list", "data": [{"id": "model", "object": "model", "created": 1, **model}]}}
    return models | {path.replace("_", "/"): answer for path, answer in more.items()}


def completion(**more: Any) -> dict[str, Any]:
    return {"id": "1", "choices": [{"text": "x", "finish_reason": "length"}], **more}


@pytest.mark.parametrize(
    ("answers", "engine", "version"),
    [
        (answers({"owned_by": "vllm"}, _version={"version": "0.32.0"}), "vLLM", "0.32.0"),
        (answers({"owned_by": "llamacpp"}), "llama.cpp", None),
        (answers({"owned_by": "sglang"}), "SGLang", None),
        (answers({"owned_by": "me"}), "server", None),
        (answers({}, _v1_completions=completion(system_fingerprint=MLX)), "mlx-lm", "0.32.2"),
        (answers({}, _v1_completions=completion(system_fingerprint=MLX_ON_LINUX)), "mlx-lm", "0.32.2"),
        (answers({"owned_by": "me"}, _v1_completions=completion(system_fingerprint=MLX)), "server", None),
        (answers({}, _v1_completions=completion(system_fingerprint="fp_44709d6fcb")), "server", None),
        (answers({}, _v1_completions=completion(system_fingerprint="b6123-abcdef")), "server", None),
        (answers({}, _v1_completions=completion(system_fingerprint=None)), "server", None),
        (answers({}, _v1_completions=completion()), "server", None),
        (answers({}), "server", None),
    ],
)
def test_an_engine_is_named_only_where_it_is_proven(answers: dict[str, Any], engine: str, version: str | None) -> None:
    with served(answers) as url:
        endpoint = Endpoint(url)
    assert (endpoint.engine, endpoint.version) == (engine, version)
    assert endpoint.model == "model"


def test_a_server_without_a_model_is_refused() -> None:
    with served({"/v1/models": {"data": []}}) as url, pytest.raises(ResourceError, match="serves no model"):
        Endpoint(url)


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/v1", "http://localhost:9/v1"])
def test_an_address_without_a_server_gets_one_clear_line(url: str) -> None:
    with pytest.raises(ResourceError, match=f"The server at {url} does not answer"):
        Endpoint(url)


def test_an_answer_that_is_no_object_is_refused() -> None:
    with (
        served({"/v1/models": ["model"]}) as url,
        pytest.raises(ResourceError, match="a JSON object"),
    ):
        Endpoint(url)


def test_a_server_without_prompt_logprobs_is_told_so() -> None:
    with served(answers({"owned_by": "llamacpp"}, _v1_completions=completion())) as url:
        endpoint = Endpoint(url)
        with pytest.raises(UnsupportedError, match=r"gives no log-probabilities of prompts\. vLLM does"):
            endpoint.prompt_logprobs([1, 2], 0)
