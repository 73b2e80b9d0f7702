"""Publishing: what `--dry-run` prints is what the hub receives, and nothing damaged or unknown is sent."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from checkpoints import make_checkpoint
from huggingface_hub import HfApi
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import hlwq
from hlwq.cli import app
from hlwq.errors import HlwqError, ResourceError
from hlwq.report.card import write_card
from hlwq.report.push import prepare_push, push, stale

NAME, SECRET = "me/model-INT4", "hf_notARealTokenButSecret"


class Hub(ThreadingHTTPServer):
    """As much of the hub as an upload asks for, on this machine.

    Attributes:
        files: what the repository holds, by path.
        requests: paths that were asked for.
        broken: replies that are given instead, by a part of the path: a status and a body.
        private: what the repository says of itself.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Replies)
        self.files: dict[str, bytes] = {".gitattributes": b""}
        self.requests: list[str] = []
        self.broken: dict[str, tuple[int, bytes]] = {}
        self.private = True

    @property
    def api(self) -> HfApi:
        """A client of this hub."""
        return HfApi(endpoint=f"http://127.0.0.1:{self.server_port}", token="hf_none")


class _Replies(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        if "/tree/" in self.path:
            found = self.server.files.items()
            self._reply([{"type": "file", "path": path, "size": len(data), "oid": "0"} for path, data in found])
        else:
            self._reply({"id": NAME, "sha": "0" * 40, "private": self.server.private, "siblings": []})

    def do_POST(self) -> None:
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        address = f"http://127.0.0.1:{self.server.server_port}/{NAME}"
        if self.path.endswith("/repos/create"):
            self._reply({"url": address})
        elif "/preupload/" in self.path:
            asked = json.loads(body)["files"]
            self._reply(
                {"files": [{"path": each["path"], "uploadMode": "regular", "shouldIgnore": False} for each in asked]}
            )
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                elif line["key"] == "deletedFile":
                    del self.server.files[line["value"]["path"]]
            self._reply({"commitUrl": f"{address}/commit/{'0' * 40}", "commitOid": "0" * 40})
        else:
            self._reply({})

    def _reply(self, value: Any) -> None:
        self.server.requests.append(self.path)
        broken = next((reply for part, reply in self.server.broken.items() if part in self.path), None)
        status, body = broken or (200, json.dumps(value).encode())
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as server:
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("made")
    source = make_checkpoint(root / "model", "llama")
    (source / "LICENSE").write_text("mine")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    hlwq.quantize(source, root / "out", "rtn", max_shard_size="80KB")
    write_card(root / "out", NAME, base_model="me/model")
    assert len(list((root / "out").glob("*.safetensors"))) > 3
    return root / "out"


@pytest.fixture
def checkpoint(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "checkpoint"))


def contents(directory: Path) -> dict[str, bytes]:
    return {
        file.relative_to(directory).as_posix(): file.read_bytes() for file in directory.rglob("*") if file.is_file()
    }


def dry_run(directory: Path, *options: str) -> Any:
    return CliRunner().invoke(app, ["push", str(directory), NAME, "--dry-run", *options])


def refusal(result: Any) -> str:
    """The one line of a command that refused."""
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    [line] = result.output.splitlines()
    assert line.startswith("error: ")
    return str(line)


def test_the_hub_receives_what_the_dry_run_lists(checkpoint: Path, hub: Hub) -> None:
    expected = contents(checkpoint)
    stays = ["results/perplexity-1.json", ".cache/huggingface/x.lock", ".git/config", ".gitattributes", "journal.jsonl"]
    for name in (*stays, "charts/loss.png", "arguments.json"):
        (checkpoint / name).parent.mkdir(parents=True, exist_ok=True)
        (checkpoint / name).write_text(SECRET)
    listed = json.loads(dry_run(checkpoint, "--json").stdout)
    assert listed["files"] == {name: len(data) for name, data in sorted(expected.items())}
    assert listed["bytes"] == sum(map(len, expected.values()))
    assert not hub.requests
    url = push(checkpoint, NAME, api=hub.api)
    assert url.endswith(NAME)
    assert hub.files == {".gitattributes": b"", **expected}
    printed = dry_run(checkpoint).stdout.splitlines()
    assert [line.split()[1] for line in printed[: len(expected)]] == sorted(expected)
    assert printed[-1] == "not sent: .cache, .git, .gitattributes, arguments.json, charts, journal.jsonl, results"


REMOTE = {
    "onnx/model.safetensors": False,
    "onnx/model.onnx": False,
    "onnx/model-00001-of-00002.safetensors": False,
    "gguf/model.safetensors.index.json": False,
    "model.safetensors": True,
    "model-00001-of-00099.safetensors": True,
    "model-00099-of-00099.safetensors": True,
    "model_old.safetensors": True,
    "adapter_model.safetensors": False,
    "consolidated.safetensors": False,
    "vae.safetensors": False,
    "pytorch_model.bin": False,
    "config.json.old": False,
    "model.safetensors.md": False,
    "README.txt": False,
    "my-model.safetensors": False,
}


def test_only_shards_of_an_earlier_upload_are_deleted(checkpoint: Path, hub: Hub) -> None:
    hub.files |= dict.fromkeys(REMOTE, b"old")
    push(checkpoint, NAME, api=hub.api)
    assert {name: name not in hub.files for name in REMOTE} == REMOTE
    assert {name: hub.files[name] for name in contents(checkpoint)} == contents(checkpoint)


@pytest.mark.parametrize("remote", [["model.safetensors"], ["model.safetensors.index.json"], ["model-a.safetensors"]])
def test_what_is_uploaded_again_is_replaced_rather_than_deleted(remote: list[str]) -> None:
    assert stale(remote, []) == remote
    assert stale(remote, remote) == []


UNKNOWN = [
    *(".env", ".netrc", ".git-credentials", "id_rsa", "secrets.json", "token", "notes.txt", "nohup.out", "train.log"),
    *("state.pkl", "training_args.bin", "optimizer.pt", "modeling_llama.py", "run.sh", "trainer_state.json"),
    *("hf_quant_config.json", "adapter_model.safetensors", "consolidated.safetensors"),
    *("model.safetensors.bak", "model-00099-of-00099.safetensors", "model.safetensors.tmp", "pytorch_model.bin"),
    *("README.md.orig", "README.md.tmp", "config.json.bak", "tokenizer.json ", "LICENSE.key", ".DS_Store", "core.1234"),
    *("onnx/model.onnx", "wandb/run.json", "original/tokenizer.model", "resultsx/a.json", "logs/x"),
    *("additional_chat_templates/.env", "additional_chat_templates/a/b.jinja", "a\nb", "\x1b[2J", "caf\udce9"),
]


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_is_not_known_is_refused_by_name(name: str, checkpoint: Path, hub: Hub) -> None:
    (checkpoint / name).parent.mkdir(exist_ok=True)
    (checkpoint / name).write_text(SECRET)
    line = refusal(dry_run(checkpoint))
    folder, _, _ = name.partition("/")
    shown = name if folder == "additional_chat_templates" and name.count("/") == 1 else folder
    if name.count("/") == 2:
        shown = name.rpartition("/")[0]
    assert "".join(letter if letter.isprintable() else "?" for letter in shown) in line
    assert SECRET not in line
    with pytest.raises(HlwqError):
        push(checkpoint, NAME, api=hub.api)
    assert not hub.requests


def test_many_unknown_files_are_counted(checkpoint: Path) -> None:
    for number in range(300):
        (checkpoint / f"{number}.log").touch()
    assert "0.log, 1.log, 10.log and 297 more" in refusal(dry_run(checkpoint))


def shard(checkpoint: Path) -> Path:
    return sorted(checkpoint.glob("*.safetensors"))[1]


def cut(checkpoint: Path) -> None:
    os.truncate(shard(checkpoint), shard(checkpoint).stat().st_size // 2)


def cut_a_little(checkpoint: Path) -> None:
    os.truncate(shard(checkpoint), shard(checkpoint).stat().st_size - 1)


def flip(checkpoint: Path) -> None:
    content = bytearray(shard(checkpoint).read_bytes())
    content[-1] ^= 1
    shard(checkpoint).write_bytes(content)


def blank(checkpoint: Path) -> None:
    size = shard(checkpoint).stat().st_size
    with shard(checkpoint).open("r+b") as stream:
        stream.seek(size - 64)
        stream.write(bytes(64))


def scale_all(checkpoint: Path) -> None:
    tensors = load_file(shard(checkpoint))
    save_file({name: tensor * 2 for name, tensor in tensors.items()}, shard(checkpoint), metadata={"format": "pt"})


def without(name: str) -> Callable[[Path], None]:
    return lambda checkpoint: (checkpoint / name).unlink()


def holding(name: str, content: bytes) -> Callable[[Path], None]:
    def change(checkpoint: Path) -> None:
        (checkpoint / name).write_bytes(content)

    return change


def listed_elsewhere(checkpoint: Path) -> None:
    file = checkpoint / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"] |= dict.fromkeys(index["weight_map"], "absent.safetensors")
    file.write_text(json.dumps(index))


def card(text: str) -> Callable[[Path], None]:
    def change(checkpoint: Path) -> None:
        file = checkpoint / "README.md"
        _, _, body = file.read_text().partition("\n---\n")
        file.write_text(f"---\n{text}\n---\n{body}")

    return change


BOMB = "\n".join(["a0: &a0 [x, x]", *(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}, *a{i - 1}]" for i in range(1, 30))])
DAMAGED: dict[str, Callable[[Path], None]] = {
    "shard cut to half": cut,
    "shard cut by a byte": cut_a_little,
    "bit flipped": flip,
    "end zeroed": blank,
    "other weights": scale_all,
    "shard missing": lambda checkpoint: shard(checkpoint).unlink(),
    "shard empty": lambda checkpoint: shard(checkpoint).write_bytes(b""),
    "shard is text": lambda checkpoint: shard(checkpoint).write_bytes(b"version https://git-lfs.github.com/spec/v1\n"),
    "index elsewhere": listed_elsewhere,
    "index is no JSON": holding("model.safetensors.index.json", b"{"),
    "config missing": without("config.json"),
    "config is no JSON": holding("config.json", b"{'a': 1}"),
    "tokenizer missing": without("tokenizer.json"),
    "tokenizer cut": holding("tokenizer.json", b'{"model": {"vo'),
    "tokenizer is a list": holding("tokenizer.json", b"[]"),
    "generation settings are no JSON": holding("generation_config.json", b"\xff\xfe"),
    "manifest is no JSON": holding("hlwq.json", b"{"),
    "manifest is a list": holding("hlwq.json", b"[]"),
    "manifest's checksums are a list": holding("hlwq.json", b'{"recipe": "rtn", "sha256": []}'),
    "card missing": without("README.md"),
    "card is empty": holding("README.md", b""),
    "card is another's": holding("README.md", b"---\nlicense: mit\n---\n# me/other\n"),
    "card is not UTF-8": holding("README.md", f"# {NAME}\n".encode() + b"\xff"),
    "card's metadata do not end": holding("README.md", f"---\nlicense: mit\n# {NAME}\n".encode()),
    "card's metadata are a bomb": card(BOMB),
    "card's metadata are deep": card("a: " + "[" * 1000 + "]" * 1000),
    "card's metadata are a list": card("- a"),
    "card's metadata are tagged": card("a: !!python/object:os.system {}"),
    "card's metadata are huge": card("a: " + "x" * 10**6),
    "card is huge": lambda checkpoint: os.truncate(checkpoint / "README.md", 1 << 30),
    "card's chart missing": lambda c: (c / "README.md").open("a").write("![loss](charts/loss.png)\n") and None,  # type: ignore[func-returns-value]
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_what_is_damaged_is_refused_in_a_line(kind: str, checkpoint: Path, hub: Hub) -> None:
    DAMAGED[kind](checkpoint)
    line = refusal(dry_run(checkpoint))
    assert len(line) < 600
    with pytest.raises(HlwqError):
        push(checkpoint, NAME, api=hub.api)
    assert not hub.requests


PARTS = ["model-00002-of-*.safetensors", "tokenizer.json", "config.json", "hlwq.json", "README.md", "LICENSE"]


@pytest.mark.parametrize("pattern", [*PARTS, "model.safetensors.index.json", "additional_chat_templates/tools.jinja"])
@pytest.mark.parametrize("kind", ["outside", "chain", "dangling"])
def test_no_link_that_leads_out_is_followed(kind: str, pattern: str, checkpoint: Path, tmp_path: Path) -> None:
    [file] = checkpoint.glob(pattern)
    target = tmp_path / "elsewhere"
    shutil.move(file, target)
    if kind == "chain":
        (checkpoint / "results").mkdir()
        (checkpoint / "results" / "between").symlink_to(target)
        target = checkpoint / "results" / "between"
    file.symlink_to(tmp_path / "absent" if kind == "dangling" else target)
    line = refusal(dry_run(checkpoint))
    assert kind == "dangling" or f"{file.name} leads out of its directory" in line


@pytest.mark.parametrize("name", ["tokenizer_config.json", "LICENSE.md", "hlwq_config.json", "README.md"])
def test_what_is_no_regular_file_is_refused(name: str, checkpoint: Path) -> None:
    (checkpoint / name).unlink(missing_ok=True)
    os.mkfifo(checkpoint / name)
    said = "has no model card" if name == "README.md" else name
    assert said in refusal(dry_run(checkpoint))


@pytest.mark.parametrize(
    "name",
    [
        *("", "model", "a/b/c", "../x", "/x", "x/", "me/na me", "me/x\ny", "-me/x", "me/x--y", "me/x..y", "me/.x"),
        *("me/x.git", "me/" + "x" * 200, "https://huggingface.co/me/x", "datasets/me/x", "me/ä", "me/x\x1b[2J"),
        *("me/$(id)", "me/x;id", "me/x`id`", " me/x", "me\\x"),
    ],
)
def test_a_name_that_the_hub_cannot_have_is_refused(name: str, checkpoint: Path, hub: Hub) -> None:
    with pytest.raises(HlwqError, match="is no hub id") as refused:
        push(checkpoint, name, api=hub.api)
    assert str(refused.value).isprintable()
    with pytest.raises(HlwqError, match="is no hub id"):
        write_card(checkpoint, name, overwrite=True)
    assert not hub.requests


@pytest.mark.parametrize("part", ["repos/create", "/tree/", "preupload", "/commit/"])
@pytest.mark.parametrize(
    "reply",
    [(401, b""), (403, b'{"error": "no"}'), (404, b"<html>"), (200, b""), (200, b"[]"), (200, b"{"), (413, b"")],
)
def test_a_hub_that_refuses_gets_one_line(part: str, reply: tuple[int, bytes], checkpoint: Path, hub: Hub) -> None:
    if part == "/tree/" and reply == (200, b"[]"):
        pytest.skip("an empty repository is none that refuses")
    hub.broken[part] = reply
    with pytest.raises(ResourceError) as refused:
        push(checkpoint, NAME, api=hub.api)
    assert re.match(rf"The hub did not take {NAME}: .+\. Check the network, and `hf auth login`\.$", str(refused.value))
    assert part == "/commit/" or hub.files == {".gitattributes": b""}


@pytest.mark.parametrize("private", [True, False])
def test_what_should_be_private_is_not_added_to_what_is_public(private: bool, checkpoint: Path, hub: Hub) -> None:
    hub.private = private
    if private:
        push(checkpoint, NAME, private=True, api=hub.api)
        assert hub.files.keys() >= contents(checkpoint).keys()
    else:
        with pytest.raises(ResourceError, match="it is there already, and public"):
            push(checkpoint, NAME, private=True, api=hub.api)
        assert hub.files == {".gitattributes": b""}


@pytest.mark.parametrize("format_name", ["gptq", "mlx", "hlwq", "compressed-tensors", "dense"])
def test_every_format_is_sent_whole(format_name: str, made: Path, tmp_path: Path) -> None:
    recipe = "hlwq" if format_name == "hlwq" else "rtn"
    hlwq.quantize(made.parent / "model", tmp_path / "out", recipe, format=format_name)
    write_card(tmp_path / "out", NAME, base_model="me/model")
    assert set(prepare_push(tmp_path / "out", NAME).files) == set(contents(tmp_path / "out"))


def test_the_charts_that_the_card_shows_are_sent_and_no_others(checkpoint: Path, hub: Hub) -> None:
    (checkpoint / "charts").mkdir()
    for name in ("loss.png", "size.png", "secret.txt"):
        (checkpoint / "charts" / name).write_bytes(b"\x89PNG")
    with (checkpoint / "README.md").open("a") as stream:
        stream.write("![loss](charts/loss.png)\n![x](charts/../../etc/passwd)\n![y](charts/secret.txt)\n")
    push(checkpoint, NAME, api=hub.api)
    assert {name for name in hub.files if "charts" in name} == {"charts/loss.png"}
