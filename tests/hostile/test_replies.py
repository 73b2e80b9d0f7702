"""Servers that answer what they should not: one line for each, in bounded time and memory, and never a figure."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from hlwq import HlwqError, RequestError, ResourceError
from hlwq.cli import app
from hlwq.demo import bundled_model, held_out_text
from hlwq.evaluate import server as servers
from hlwq.evaluate.generation import Request
from hlwq.evaluate.perplexity import perplexity
from hlwq.evaluate.server import Endpoint

MODELS: dict[str, Any] = {"data": [{"id": "m", "owned_by": "vllm"}]}
TOKENS = [5, 6, 7]


def http(body: bytes | str, status: str = "200 OK", headers: str = "") -> bytes:
    data = body.encode("utf-8", "surrogatepass") if isinstance(body, str) else body
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(data)}\r\n{headers}\r\n".encode() + data


class Server:
    """A server on 127.0.0.1 that answers by bytes: what a function gives for each path, a piece at a time."""

    def __init__(self, replies: Callable[[str], bytes | list[bytes | float]]) -> None:
        self.replies, self.seen = replies, []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}/v1"
        self.open: list[socket.socket] = []
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self.listener.accept()
                self.open.append(connection)
                threading.Thread(target=self.answer, args=[connection], daemon=True).start()

    def answer(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection:
            request = b""
            while b"\r\n\r\n" not in request:
                request += connection.recv(1 << 16)
            head, _, body = request.partition(b"\r\n\r\n")
            lengths = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length")]
            length = int(lengths[0].split(b":")[1]) if lengths else 0
            while len(body) < length:
                body += connection.recv(1 << 16)
            path = head.split(b" ")[1].decode()
            self.seen.append(path)
            reply = self.replies(path)
            for piece in reply if isinstance(reply, list) else [reply]:
                if isinstance(piece, bytes):
                    connection.sendall(piece)
                else:
                    time.sleep(piece)

    def close(self) -> None:
        self.listener.close()
        for connection in self.open:
            connection.close()


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    started: list[Server] = []

    def start(**replies: Any) -> Server:
        """Replies by the last word of a path; objects are sent as JSON."""

        def reply(path: str) -> bytes | list[bytes | float]:
            value = replies.get(path.rsplit("/", 1)[-1], MODELS if path.endswith("/models") else {"version": "1"})
            return value if isinstance(value, bytes | list) and not _is_json(value) else http(json.dumps(value))

        started.append(Server(reply))
        return started[-1]

    yield start
    for each in started:
        each.close()


def _is_json(value: Any) -> bool:
    return isinstance(value, list) and not any(isinstance(each, bytes) for each in value)


def one_line(error: BaseException, *phrases: str) -> None:
    assert "\n" not in str(error)
    assert len(str(error)) < 800
    for phrase in phrases:
        assert phrase in str(error)


LISTS: dict[str, Any] = {
    "a list": [],
    "null": None,
    "a number": 5,
    "no data": {"object": "list"},
    "data null": {"data": None},
    "data a string": {"data": "m"},
    "data an object": {"data": {"id": "m"}},
    "data empty": {"data": []},
    "data of strings": {"data": ["m"]},
    "data of null": {"data": [None]},
    "no id": {"data": [{"owned_by": "vllm"}]},
    "id a number": {"data": [{"id": 5}]},
    "id null": {"data": [{"id": None}]},
    "id a list": {"data": [{"id": ["m"]}]},
    "an error": {"error": {"message": "no"}},
}
BYTES: dict[str, bytes | list[bytes | float]] = {
    "nothing": b"",
    "no HTTP": b"SSH-2.0-OpenSSH_9.6\r\n",
    "half a status": b"HTTP/1.",
    "a status of words": b"HTTP/1.1 fine\r\n\r\n{}",
    "a status of 10 digits": b"HTTP/1.1 2000000000 OK\r\n\r\n{}",
    "status 100 for ever": b"HTTP/1.1 100 Continue\r\n\r\n" * 50,
    "endless headers": b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 100_000,
    "a long header": b"HTTP/1.1 200 OK\r\nX: " + b"y" * 200_000 + b"\r\n\r\n{}",
    "headers cut off": b"HTTP/1.1 200 OK\r\nContent-Le",
    "length of words": b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\nx",
    "length negative": b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\nx",
    "length too large": b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{}",
    "chunks cut off": b'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{"da',
    "chunks of words": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n",
    "chunks negative": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-5\r\n{}\r\n0\r\n\r\n",
    "a page": http("<html><body>502 Bad Gateway</body></html>"),
    "an empty body": http(""),
    "spaces": http("   "),
    "half of JSON": http('{"data": [{"id": '),
    "two objects": http("{}{}"),
    "not UTF-8": http(b'{"data": "\xff\xfe"}'),
    "UTF-16": http(json.dumps(MODELS).encode("utf-16")),
    "gzip": http(b"\x1f\x8b\x08\x00" + b"\0" * 20, headers="Content-Encoding: gzip\r\n"),
    "deep": http('{"data": ' + "[" * 100_000),
    "deep and whole": http('{"data": ' + "[" * 100_000 + "]" * 100_000 + "}"),
    "a huge number": http('{"data": ' + "9" * 10_000 + "}"),
    "NaN": http('{"data": NaN}'),
    "Infinity": http('{"data": [Infinity]}'),
    "escapes": http("\x1b[31mred\x1b[0m\x07"),
    "newlines": http("line\nline\r\nline"),
    "a redirection": http("", "302 Found", "Location: http://example.invalid/v1/models\r\n"),
    "a redirection to a file": http("", "301 Moved", "Location: file:///etc/passwd\r\n"),
    "a redirection without an address": http("", "307 Temporary Redirect"),
    "not modified": http("", "304 Not Modified"),
    "no content": http("", "204 No Content"),
    "partial": http(json.dumps(MODELS), "206 Partial Content"),
    "401": http('{"error": "key"}', "401 Unauthorized"),
    "403 page": http("<html>" * 1000, "403 Forbidden"),
    "404": http("", "404 Not Found"),
    "429": http("slow down", "429 Too Many Requests", "Retry-After: 3600\r\n"),
    "500 of binary": http(bytes(range(256)), "500 Internal Server Error"),
    "503": http("loading", "503 Service Unavailable"),
    "999": http("?", "999 What"),
}
CHOICES: dict[str, Any] = {
    "no choices": {"object": "text_completion"},
    "choices null": {"choices": None},
    "choices an object": {"choices": {}},
    "choices empty": {"choices": []},
    "choices of null": {"choices": [None]},
    "choices of strings": {"choices": ["text"]},
    "two choices": {"choices": [{"text": "a"}, {"text": "b"}]},
    "no text": {"choices": [{"index": 0}]},
    "text null": {"choices": [{"text": None, "message": {"content": None}}]},
    "text a number": {"choices": [{"text": 5, "message": {"content": 5}}]},
    "text a list": {"choices": [{"text": ["a"], "message": {"content": [{"type": "text", "text": "a"}]}}]},
    "text an object": {"choices": [{"text": {}, "message": {"content": {}}}]},
    "message null": {"choices": [{"message": None}]},
    "message a string": {"choices": [{"message": "hello"}]},
    "message a list": {"choices": [{"message": ["hello"]}]},
    "message empty": {"choices": [{"message": {}}]},
    "an error in 200": {"error": {"message": "out of memory"}},
}


def rows(*values: Any) -> dict[str, Any]:
    return {"choices": [{"text": "", "prompt_logprobs": [None, *values]}]}


def row(token: Any = 6, logprob: Any = -1.0, **others: Any) -> dict[str, Any]:
    return {str(token): {"logprob": logprob, "rank": 1}, **others}


GOOD = (row(6), row(7))
LOGPROBS: dict[str, Any] = {
    "none": {"choices": [{"text": ""}]},
    "null": {"choices": [{"prompt_logprobs": None}]},
    "empty": {"choices": [{"prompt_logprobs": []}]},
    "a string": {"choices": [{"prompt_logprobs": "-1"}]},
    "an object": {"choices": [{"prompt_logprobs": {"6": -1}}]},
    "too few": rows(row(6)),
    "too many": rows(*GOOD, row(8)),
    "null inside": rows(row(6), None),
    "a list inside": rows(row(6), []),
    "a number inside": rows(row(6), -1.0),
    "empty inside": rows(row(6), {}),
    "another token": rows(row(6), row(9)),
    "tokens in another order": rows(row(7), row(6)),
    "a token of words": rows(row(6), {"seven": {"logprob": -1.0}}),
    "a token below 0": rows(row(6), {"-7": {"logprob": -1.0}}),
    "a token of 40 digits": rows(row(6), {"7" * 40: {"logprob": -1.0}}),
    "an entry of a number": rows(row(6), {"7": -1.0}),
    "an entry of null": rows(row(6), {"7": None}),
    "an entry of a list": rows(row(6), {"7": [-1.0]}),
    "no logprob": rows(row(6), {"7": {"rank": 1}}),
    "a logprob of null": rows(row(6), row(7, None)),
    "a logprob of true": rows(row(6), row(7, True)),
    "a logprob of words": rows(row(6), row(7, "-1.0")),
    "a logprob above 0": rows(row(6), row(7, 0.5)),
    "a logprob far above 0": rows(row(6), row(7, 1e20)),
    "a logprob of 400 digits": rows(row(6), row(7, -(10**400))),
    "probabilities above 1": rows(row(6), {str(t): {"logprob": -0.1} for t in range(7, 20)}),
}
USAGES: dict[str, Any] = {
    "no usage": {"choices": [{"text": "a"}]},
    "null": {"usage": None},
    "a list": {"usage": []},
    "no prompt": {"usage": {"completion_tokens": 1}},
    "no completion": {"usage": {"prompt_tokens": 1}},
    "words": {"usage": {"prompt_tokens": "5", "completion_tokens": 1}},
    "fractions": {"usage": {"prompt_tokens": 5.5, "completion_tokens": 1}},
    "true": {"usage": {"prompt_tokens": True, "completion_tokens": 1}},
    "below 0": {"usage": {"prompt_tokens": -5, "completion_tokens": 1}},
    "no token read": {"usage": {"prompt_tokens": 0, "completion_tokens": 1}},
    "more than asked": {"usage": {"prompt_tokens": 5, "completion_tokens": 100}},
    "10**30": {"usage": {"prompt_tokens": 10**30, "completion_tokens": 1}},
}


@pytest.mark.parametrize("name", LISTS)
def test_a_list_of_models_that_is_none_is_refused(serve: Callable[..., Server], name: str) -> None:
    server = serve(models=http(json.dumps(LISTS[name])))
    with pytest.raises(ResourceError) as caught:
        Endpoint(server.url, timeout=20)
    one_line(caught.value, server.url)


@pytest.mark.parametrize("name", BYTES)
@pytest.mark.parametrize("path", ["models", "completions"])
def test_bytes_that_are_no_answer_are_refused(serve: Callable[..., Server], path: str, name: str) -> None:
    server = serve(**{path: BYTES[name] or [0.0, b""]})
    with pytest.raises(ResourceError) as caught:
        Endpoint(server.url, timeout=20).generate(Request("a", chat=False, max_tokens=1))
    one_line(caught.value, server.url)


@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize("chat", [True, False])
def test_answers_without_a_text_are_refused(serve: Callable[..., Server], chat: bool, name: str) -> None:
    endpoint = Endpoint(serve(completions=CHOICES[name]).url, timeout=20)
    with pytest.raises(ResourceError) as caught:
        endpoint.generate(Request("a", chat=chat, max_tokens=1))
    one_line(caught.value, endpoint.url)


@pytest.mark.parametrize("name", LOGPROBS)
def test_what_are_no_log_probabilities_is_refused(serve: Callable[..., Server], name: str) -> None:
    endpoint = Endpoint(serve(completions=LOGPROBS[name]).url, timeout=20)
    with pytest.raises(HlwqError) as caught:
        endpoint.prompt_logprobs(TOKENS, 0)
    one_line(caught.value, endpoint.url)


@pytest.mark.parametrize("constant", ["NaN", "Infinity", "-Infinity", "-1e999"])
def test_log_probabilities_that_are_no_numbers_are_refused(serve: Callable[..., Server], constant: str) -> None:
    text = json.dumps(rows(row(6), row(7, "X"))).replace('"X"', constant)
    endpoint = Endpoint(serve(completions=http(text)).url, timeout=20)
    with pytest.raises(ResourceError) as caught:
        endpoint.prompt_logprobs(TOKENS, 0)
    one_line(caught.value, endpoint.url)


def test_log_probabilities_that_are_right_are_taken(serve: Callable[..., Server]) -> None:
    endpoint = Endpoint(serve(completions=rows(row(6, -0.5), row(7, 0.0))).url, timeout=20)
    assert endpoint.prompt_logprobs(TOKENS, 0) == [{6: -0.5}, {7: 0.0}]
    assert (endpoint.engine, endpoint.version, endpoint.model) == ("vLLM", "1", "m")


@pytest.mark.parametrize("name", USAGES)
def test_counts_that_cannot_be_are_refused(serve: Callable[..., Server], name: str) -> None:
    endpoint = Endpoint(serve(completions=USAGES[name]).url, timeout=20)
    with pytest.raises(ResourceError) as caught:
        endpoint.complete("a", 8)
    one_line(caught.value, endpoint.url)


@pytest.mark.parametrize("owner", [5, [], {}, True, "", "someone", "vllm"])
@pytest.mark.parametrize("version", [{"version": 5}, {}, {"version": None}, http("no", "500 No"), http("[]")])
def test_what_a_server_says_of_itself_may_be_anything(serve: Callable[..., Server], owner: Any, version: Any) -> None:
    server = serve(models={"data": [{"id": "m", "owned_by": owner}]}, version=version, completions={"x": 1})
    endpoint = Endpoint(server.url, timeout=20)
    assert endpoint.engine in ("vLLM", "server")
    assert endpoint.version is None


PACE = 0.05
SLOW: dict[str, list[bytes | float]] = {
    "no answer": [b"", 60.0],
    "headers drip": [each for _ in range(600) for each in (b"H", PACE)],
    "a body drips": [b"HTTP/1.1 200 OK\r\n\r\n", *(each for _ in range(600) for each in (b" ", PACE))],
    "a body of known length drips": [
        b"HTTP/1.1 200 OK\r\nContent-Length: 600\r\n\r\n",
        *(each for _ in range(600) for each in (b" ", PACE)),
    ],
    "chunks drip": [
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
        *(each for _ in range(600) for each in (b"1\r\n \r\n", PACE)),
    ],
}


@pytest.mark.parametrize("name", SLOW)
def test_an_answer_that_does_not_come_ends_in_time(serve: Callable[..., Server], name: str) -> None:
    server = serve(models=SLOW[name])
    started = time.monotonic()
    with pytest.raises(ResourceError, match=r"0\.5 s") as caught:
        Endpoint(server.url, timeout=0.5)
    one_line(caught.value, server.url)
    assert time.monotonic() - started < 15  # of 30 that the whole would take


@pytest.mark.parametrize(
    "head", [b"HTTP/1.1 200 OK\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n"]
)
def test_an_answer_without_end_is_not_kept(
    serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch, head: bytes
) -> None:
    monkeypatch.setattr(servers, "MOST_BYTES", 1 << 20)
    server = serve(models=[head, *[b" " * (1 << 16)] * 1000])
    with pytest.raises(ResourceError, match="more than 1,048,576 bytes"):
        Endpoint(server.url, timeout=20)


@pytest.mark.parametrize("variable", ["http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"])
def test_this_machine_is_not_reached_through_a_proxy(
    serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    proxy, server = serve(), serve()
    monkeypatch.setenv(variable, proxy.url.removesuffix("/v1"))
    Endpoint(server.url, timeout=20)
    Endpoint(server.url.replace("127.0.0.1", "localhost"), timeout=20)
    assert proxy.seen == []
    assert server.seen


def test_other_machines_are_reached_through_the_proxy(
    serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = serve()
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", proxy.url.removesuffix("/v1"))
    endpoint = Endpoint("http://models.example.invalid/v1", timeout=20)
    assert not endpoint.local
    assert proxy.seen[0] == "http://models.example.invalid/v1/models"


@pytest.mark.parametrize(
    ("host", "local"),
    [
        ("127.0.0.1", True),
        ("127.8.9.10", True),
        ("localhost", True),
        ("LOCALHOST", True),
        ("[::1]", True),
        ("127.0.0.1.example.org", False),
        ("example.org", False),
        ("10.0.0.1", False),
        ("[::2]", False),
    ],
)
def test_this_machine_is_known_by_its_name(host: str, local: bool) -> None:
    assert servers._is_loopback(servers._address(f"http://{host}:80/v1").hostname or "") is local


@pytest.mark.parametrize(
    "url",
    [
        *(
            "",
            "127.0.0.1:8000",
            "localhost:8000/v1",
            "ftp://127.0.0.1/v1",
            "file:///etc/passwd",
            "http://",
            "http:///v1",
        ),
        *("http://host:port/v1", "http://host:99999/v1", "http://host:-1/v1", "http://[::1/v1", "http://host:0/v1"),
        *("http://a b/v1", "http://host/v1?key=1", "http://host/v1#x", "http://user:secret@host/v1", "javascript:1"),
        *("http://host/v1\r\nX: y", "http://höst/v1", "http://host/\x00"),
    ],
)
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(RequestError, match="endpoint") as caught:
        Endpoint(url, timeout=20)
    one_line(caught.value)


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/v1", "https://127.0.0.1:9/v1", "http://no-such-host.invalid/v1"])
def test_a_server_that_is_not_there_is_said(url: str) -> None:
    with pytest.raises(ResourceError, match="does not answer") as caught:
        Endpoint(url, timeout=20)
    one_line(caught.value, url)


def test_a_server_without_tls_is_said(serve: Callable[..., Server]) -> None:
    url = serve().url.replace("http:", "https:")
    with pytest.raises(ResourceError) as caught:
        Endpoint(url, timeout=1)
    one_line(caught.value, url)


@pytest.mark.parametrize("reply", [LOGPROBS["a logprob above 0"], LOGPROBS["too few"], CHOICES["text null"]])
def test_no_figure_is_made_of_it(serve: Callable[..., Server], tmp_path: Path, reply: Any) -> None:
    text = tmp_path / "text.txt"
    text.write_text(held_out_text().read_text()[:2000])
    server = serve(completions=reply)
    with pytest.raises(HlwqError):
        perplexity(Endpoint(server.url, timeout=20), text, tokenizer_of=bundled_model(), context=64, limit=1)
    arguments = ["--text", str(text), "--context", "64", "--limit", "1", "--endpoint", server.url]
    result = CliRunner().invoke(app, ["eval", "perplexity", str(bundled_model()), *arguments])
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    assert "perplexity" not in result.stdout
