"""What lies beside the weights: only what is on the list is copied, and links lead nowhere else."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoints import make_checkpoint
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import hlwq
from hlwq.cli import app
from hlwq.containers import Reader
from hlwq.errors import CheckpointError
from hlwq.quantize import plan_for
from hlwq.request import Request
from hlwq.side_files import LARGEST, is_side_file, side_files

SECRET = "hf_notARealTokenButSecret"
WANTED = [
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model"),
    *("tokenizer.model.v3", "tokenizer.model.v7m1", "tekken.json", "vocab.json", "vocab.txt", "merges.txt"),
    *("spiece.model", "sentencepiece.bpe.model", "qwen.tiktoken", "chat_template.jinja", "chat_template.json"),
    *("additional_chat_templates/tool_use.jinja", "preprocessor_config.json", "processor_config.json"),
    *("video_preprocessor_config.json", "generation_config.json", "LICENSE", "LICENSE.txt", "LICENSE-APACHE.md"),
    *("License.md", "license.txt", "LICENCE", "NOTICE", "Notice.txt", "COPYING", "COPYING.LESSER.txt", "USE_POLICY.md"),
]
UNWANTED = [
    *(
        ".env",
        ".netrc",
        ".git-credentials",
        ".npmrc",
        ".hf_token",
        "id_rsa",
        "token",
        "secrets.json",
        "credentials.json",
    ),
    *("state.pkl", "tokenizer.pkl", "training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "model.ckpt"),
    *("modeling_llama.py", "tokenization_llama.py", "configuration_llama.py", "setup.py", "run.sh", "Makefile"),
    *("train.log", "nohup.out", "trainer_state.json", "all_results.json", "events.out.tfevents.1", "notes.txt"),
    *("hf_quant_config.json", "quantize_config.json", "quant_config.json", "quantization_config.json", "recipe.yaml"),
    *("adapter_model.bin", "params.json", "consolidated.00.pth", "model.onnx", "model.gguf"),
    *("model.safetensors.index.json.bak", "pytorch_model.bin.index.json", "README.md", ".gitattributes", "hlwq.json"),
    *(
        "tokenizer.json.bak",
        "tokenizer.json~",
        "tokenizer.json ",
        " tokenizer.json",
        "tokenizer.json\n",
        "Tokenizer.json",
    ),
    *(".tokenizer.json", "tokenizer.json\x1b[2J", "tokenizer.model.v3.pkl", "a b.tiktoken", ".tiktoken", "ä.tiktoken"),
    *(
        "LICENSE.pkl",
        "LICENSE.py",
        "LICENSE.env",
        "LICENSE.json",
        ".LICENSE",
        "LICENSE\n.txt",
        "NOTICE.sh",
        "COPYING.exe",
    ),
    *("chat_template.jinja.swp", "additional_chat_templates/run.py", "additional_chat_templates/.env"),
    *(
        "additional_chat_templates/.x.jinja",
        "results/tokenizer.json",
        "original/tokenizer.model",
        ".cache/tokenizer.json",
    ),
]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "model", "llama")


def put(file: Path, text: str) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text(text)


@pytest.mark.parametrize("name", WANTED)
def test_what_engines_and_lawyers_read_is_on_the_list(name: str) -> None:
    assert is_side_file(name)


@pytest.mark.parametrize("name", UNWANTED)
def test_nothing_else_is(name: str) -> None:
    assert not is_side_file(name)


@pytest.mark.parametrize("made_from", ["dense", "quantized"])
def test_only_the_list_is_copied(made_from: str, model: Path, tmp_path: Path) -> None:
    source = model
    if made_from == "quantized":
        hlwq.quantize(model, tmp_path / "first", "hlwq")
        source = tmp_path / "first"
    for name in UNWANTED:
        if name != "hlwq.json":  # which are read
            put(source / name, f"{SECRET} {name}")
    for name in WANTED:
        put(source / name, "{}")
    if made_from == "quantized":
        hlwq.convert(source, tmp_path / "out", "dense")
    else:
        hlwq.quantize(source, tmp_path / "out", "rtn", format="mlx")
    files = {
        file.relative_to(tmp_path / "out").as_posix() for file in (tmp_path / "out").rglob("*") if not file.is_dir()
    }
    assert files == {*WANTED, "config.json", "hlwq.json", "model.safetensors"}
    assert not any(SECRET.encode() in (tmp_path / "out" / name).read_bytes() for name in files)


@pytest.mark.parametrize("names", [[".env"], ["train.py", "b.log"], [f"{number}.log" for number in range(9)]])
def test_what_stays_behind_is_told_once(names: list[str], model: Path, tmp_path: Path) -> None:
    for name in names:
        (model / name).write_text(SECRET)
    for arguments in (["--dry-run"], []):
        result = CliRunner().invoke(app, ["quantize", str(model), str(tmp_path / "out"), "--recipe", "rtn", *arguments])
        assert result.exit_code == 0
        [line] = [line for line in result.output.splitlines() if "not copied" in line]
        assert names[0] in line
        assert (f"and {len(names) - 3} more" in line) == (len(names) > 3)
        assert SECRET not in result.output


def test_usual_files_are_not_worth_a_line(model: Path, tmp_path: Path) -> None:
    for name in (*WANTED, "README.md", ".gitattributes"):
        put(model / name, "{}")
    _, plan = plan_for(Request.of(model))
    assert not any("not copied" in remark for remark in plan.remarks)


# What stands under a name of the list, and is not a file of this directory.
def linked(target: str) -> Callable[[Path], None]:
    return lambda file: file.symlink_to(target)


def leads_out(file: Path) -> None:
    file.symlink_to(file.parent.parent / "secret")


def leads_out_relatively(file: Path) -> None:
    file.symlink_to(Path("..") / "secret")


def leads_out_by_a_chain(file: Path) -> None:
    (file.parent / "between").symlink_to(file.parent.parent / "secret")
    file.symlink_to("between")


def leads_out_by_a_folder(file: Path) -> None:
    (file.parent / "folder").symlink_to(file.parent.parent)
    file.symlink_to(Path("folder") / "secret")


def loops_with_another(file: Path) -> None:
    (file.parent / "other").symlink_to(file)
    file.symlink_to("other")


def is_a_socket(file: Path) -> None:
    here = Path.cwd()
    os.chdir(file.parent)  # the paths of sockets are short
    try:
        socket.socket(socket.AF_UNIX).bind(file.name)
    finally:
        os.chdir(here)


def is_huge(file: Path) -> None:
    file.touch()
    os.truncate(file, LARGEST + 1)


def is_like_a_blob(file: Path) -> None:
    (file.parent.parent / "blobs").mkdir()
    (file.parent.parent / "blobs" / ("a" * 40)).write_text(SECRET)
    file.symlink_to(Path("../blobs") / ("a" * 40))


ODD: dict[str, Callable[[Path], None]] = {
    "leads out": leads_out,
    "leads out relatively": leads_out_relatively,
    "leads out by a chain": leads_out_by_a_chain,
    "leads out by a folder": leads_out_by_a_folder,
    "passwd": linked("/etc/passwd"),
    "memory of the process": linked("/proc/self/environ"),
    "endless": linked("/dev/zero"),
    "terminal": linked("/dev/tty"),
    "dangling": linked("absent"),
    "dangling outside": linked("/absent/file"),
    "its own target": lambda file: file.symlink_to(file.name),
    "loops with another": loops_with_another,
    "fifo": lambda file: os.mkfifo(file),
    "socket": is_a_socket,
    "huge": is_huge,
    "placeholder of Git LFS": lambda file: put(file, "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
    "like a blob": is_like_a_blob,
}


@pytest.mark.parametrize("name", ["tokenizer_config.json", "generation_config.json", "LICENSE", "chat_template.jinja"])
@pytest.mark.parametrize("kind", ODD)
def test_what_is_no_file_of_the_directory_is_refused_before_the_work(
    kind: str, name: str, model: Path, tmp_path: Path
) -> None:
    (tmp_path / "secret").write_text(SECRET)
    ODD[kind](model / name)
    result = CliRunner().invoke(app, ["quantize", str(model), str(tmp_path / "out"), "--recipe", "rtn"])
    assert result.exit_code == 1
    assert result.exception is None or isinstance(result.exception, SystemExit)
    [line] = result.output.splitlines()
    assert line.startswith("error: ")
    assert name in line
    assert SECRET not in line
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("kind", ["leads out", "dangling", "fifo"])
@pytest.mark.parametrize("command", ["dry-run", "convert"])
def test_other_commands_refuse_it_too(command: str, kind: str, model: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text(SECRET)
    source = model
    if command == "convert":
        hlwq.quantize(model, tmp_path / "first", "hlwq")
        source = tmp_path / "first"
    ODD[kind](source / "merges.txt")
    arguments = {
        "dry-run": ["quantize", str(source), str(tmp_path / "out"), "--recipe", "rtn", "--dry-run"],
        "convert": ["convert", str(source), str(tmp_path / "out"), "--format", "dense"],
    }
    result = CliRunner().invoke(app, arguments[command])
    assert result.exit_code == 1
    assert "merges.txt" in result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("target", ["/", "/etc", "..", "../other"])
def test_a_folder_of_templates_elsewhere_is_refused(target: str, model: Path, tmp_path: Path) -> None:
    put(tmp_path / "other" / "tools.jinja", SECRET)
    (model / "additional_chat_templates").symlink_to(target)
    with pytest.raises(CheckpointError, match="additional_chat_templates leads out of its directory"):
        side_files(model)


def test_a_template_elsewhere_is_refused(model: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text(SECRET)
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tools.jinja").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match=r"tools\.jinja leads out of its directory"):
        side_files(model)


@pytest.mark.parametrize("name", ["LICENSE", "tokenizer.json", "additional_chat_templates"])
@pytest.mark.parametrize("target", [None, "/", "absent/.."])
def test_folders_under_such_names_are_no_side_files(name: str, target: str | None, model: Path) -> None:
    (model / name).unlink(missing_ok=True)
    if target is None:
        (model / name).mkdir()
    elif name != "additional_chat_templates":
        (model / name).symlink_to(target)
    else:
        (model / name).write_text("no folder")
    if target == "absent/..":
        (model / "absent").mkdir()
    assert name not in side_files(model)


@pytest.mark.parametrize("depth", [1, 2])
def test_links_inside_the_directory_are_followed(depth: int, model: Path, tmp_path: Path) -> None:
    put(model / "files" / "template", "{{ messages }}")
    target = Path("files/template")
    if depth == 2:
        (model / "between").symlink_to(target)
        target = Path("between")
    (model / "chat_template.jinja").symlink_to(target)
    (tmp_path / "link").symlink_to(model)  # the directory itself may be a link
    hlwq.quantize(tmp_path / "link", tmp_path / "out", "rtn")
    copy = tmp_path / "out" / "chat_template.jinja"
    assert not copy.is_symlink()
    assert copy.read_text() == "{{ messages }}"


def in_hub_cache(model: Path, cache: Path, *, shared: bool) -> Path:
    """A model as the hub's client stores it: links to blobs, perhaps links to those that all repositories share."""
    repository = cache / "models--me--model"
    snapshot = repository / "snapshots" / ("c" * 40)
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for number, file in enumerate(sorted(model.iterdir())):
        name = f"{number:064x}"
        blob = repository / "blobs" / name
        if shared:
            put(cache / "blobs" / "marker", "")
            (cache / "blobs" / "00").mkdir(exist_ok=True)
            shutil.copy(file, cache / "blobs" / "00" / name)
            blob.symlink_to(Path("../../blobs/00") / name)
        else:
            shutil.copy(file, blob)
        (snapshot / file.name).symlink_to(Path("../../blobs") / name)
    return snapshot


@pytest.mark.parametrize("shared", [False, True])
def test_links_of_the_hubs_cache_are_followed(shared: bool, model: Path, tmp_path: Path) -> None:
    (model / "LICENSE").write_text("mine")
    snapshot = in_hub_cache(model, tmp_path / "hub", shared=shared)
    hlwq.quantize(snapshot, tmp_path / "out", "rtn")
    assert (tmp_path / "out" / "LICENSE").read_text() == "mine"
    assert not (tmp_path / "out" / "LICENSE").is_symlink()


def not_a_hash(snapshot: Path, secret: Path) -> Path:
    target = snapshot.parent.parent / "blobs" / "id_rsa"
    shutil.copy(secret, target)
    return target


def blob_elsewhere(snapshot: Path, secret: Path) -> Path:
    target = snapshot.parent.parent / "blobs" / ("d" * 64)
    target.symlink_to(secret)
    return target


def other_model(snapshot: Path, secret: Path) -> Path:
    target = snapshot.parents[2] / "models--me--other" / "blobs" / ("d" * 64)
    target.parent.mkdir(parents=True)
    shutil.copy(secret, target)
    return target


def the_token(snapshot: Path, secret: Path) -> Path:
    target = snapshot.parents[2] / "token"
    shutil.copy(secret, target)
    return target


@pytest.mark.parametrize("elsewhere", [not_a_hash, blob_elsewhere, other_model, the_token])
def test_links_of_a_hub_cache_lead_to_its_own_blobs(
    elsewhere: Callable[[Path, Path], Path], model: Path, tmp_path: Path
) -> None:
    (tmp_path / "secret").write_text(SECRET)
    snapshot = in_hub_cache(model, tmp_path / "hub", shared=False)
    (snapshot / "merges.txt").symlink_to(elsewhere(snapshot, tmp_path / "secret"))
    with pytest.raises(CheckpointError, match=r"merges\.txt leads out of its directory"):
        side_files(snapshot)


def test_weights_may_be_links_to_elsewhere(model: Path, tmp_path: Path) -> None:
    """They are read as tensors, which a secret is not."""
    (model / "model.safetensors").rename(tmp_path / "weights")
    (model / "model.safetensors").symlink_to(tmp_path / "weights")
    assert Reader(model).tensors
    (tmp_path / "weights").write_text(SECRET * 100)
    with pytest.raises(CheckpointError) as refused:
        Reader(model)
    assert SECRET not in str(refused.value)


RUN_ALL = """
import json, sys
from typer.testing import CliRunner
from hlwq.cli import app
for arguments in json.loads(sys.argv[1]):
    result = CliRunner().invoke(app, arguments)
    crashed = result.exception is not None and not isinstance(result.exception, SystemExit)
    print(json.dumps([result.exit_code, crashed, result.output]))
"""
CLOSED = ["tokenizer.json", "LICENSE", "model.safetensors", "notes.txt"]


def without_roots_rights() -> None:
    """Let permissions hold for root, too, in the process that is started next."""
    for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        ctypes.CDLL(None).prctl(24, capability)  # PR_CAPBSET_DROP


@pytest.mark.skipif(sys.platform != "linux", reason="capabilities are Linux's")
def test_what_may_not_be_read_is_refused_in_a_line(model: Path, tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir()
    (tmp_path / "closed" / "file").write_text("{}")
    hlwq.quantize(model, tmp_path / "made", "hlwq")
    commands = []
    for kind in ("link", "file", "folder"):
        for name in CLOSED if kind != "folder" else ["additional_chat_templates"]:
            for source in (model, tmp_path / "made"):
                copy = Path(shutil.copytree(source, tmp_path / f"{kind}-{name}-{source.name}"))
                (copy / name).unlink(missing_ok=True)
                if kind == "link":
                    (copy / name).symlink_to(tmp_path / "closed" / "file")
                elif kind == "file":
                    (copy / name).write_text("{}")
                    (copy / name).chmod(0)
                else:
                    (copy / name).mkdir(mode=0)
                out = str(tmp_path / "out" / copy.name)
                if source is model:
                    commands.append(["quantize", str(copy), out, "--recipe", "rtn"])
                else:
                    commands.append(["convert", str(copy), out, "--format", "dense"])
                    commands.append(["push", str(copy), "me/model", "--dry-run"])
                    commands.append(["inspect", str(copy)])
    (tmp_path / "closed").chmod(0)
    result = subprocess.run(
        [sys.executable, "-c", RUN_ALL, json.dumps(commands)],
        check=True,
        capture_output=True,
        text=True,
        timeout=300,
        preexec_fn=without_roots_rights,
    )
    replies = [json.loads(line) for line in result.stdout.splitlines()]
    for copy in tmp_path.iterdir():  # so that pytest can remove them
        copy.chmod(0o700)
        for file in () if copy.is_symlink() else copy.iterdir():
            if not file.is_symlink():
                file.chmod(0o700)
    assert len(replies) == len(commands)
    for command, (status, crashed, output) in zip(commands, replies, strict=True):
        assert not crashed, command
        assert status == 1 or "model.safetensors" not in command[1]
        if status == 1:
            assert sum(line.startswith("error: ") for line in output.splitlines()) == 1


# Sections of other tools.
SECTIONS = {
    "null": {"quantization_config": None, "quantization": None, "compression_config": None},
    "code": {"auto_map": {"AutoConfig": "configuration_llama.Config"}},
}


@pytest.mark.parametrize("format_name", ["dense", "gptq", "mlx", "compressed-tensors"])
@pytest.mark.parametrize("kind", SECTIONS)
@pytest.mark.parametrize("family", ["llama", "qwen3_5"])
def test_no_section_of_another_tool_goes_along(family: str, kind: str, format_name: str, tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "model", family)
    config = json.loads((model / "config.json").read_text())
    if family == "qwen3_5":
        config["text_config"] |= SECTIONS[kind]
        config["vision_config"] |= SECTIONS[kind]
    (model / "config.json").write_text(json.dumps(config | SECTIONS[kind]))
    hlwq.quantize(model, tmp_path / "out", "rtn", format=format_name)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    own = {
        "dense": set(),
        "mlx": {"quantization", "quantization_config"},
        "gptq": {"quantization_config"},
        "compressed-tensors": {"quantization_config"},
    }
    sections = {"quantization_config", "quantization", "compression_config", "auto_map"}
    assert {key for key in sections if key in written} == own[format_name]
    assert all(written[key] for key in own[format_name])
    for part in ("text_config", "vision_config"):
        assert not sections.intersection(written.get(part, {}))


@pytest.mark.parametrize("key", ["quantization_config", "quantization", "compression_config"])
@pytest.mark.parametrize("part", [None, "text_config"])
@pytest.mark.parametrize("section", [{"quant_method": "modelopt", "bits": 4}, {}, []])
def test_a_section_over_dense_weights_is_refused(section: object, key: str, part: str | None, tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "model", "qwen3_5")
    config = json.loads((model / "config.json").read_text())
    (config if part is None else config[part])[key] = section
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(hlwq.HlwqError, match="Remove that section"):
        hlwq.quantize(model, tmp_path / "out", "rtn")


@pytest.mark.parametrize("part", ["text_config", "vision_config"])
def test_a_decoded_directory_says_nothing_of_quantization(part: str, tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "model", "qwen3_5")
    hlwq.quantize(model, tmp_path / "first", "hlwq")
    config = json.loads((tmp_path / "first" / "config.json").read_text())
    config[part]["quantization_config"] = {"quant_method": "modelopt"}
    (tmp_path / "first" / "config.json").write_text(json.dumps(config))
    hlwq.convert(tmp_path / "first", tmp_path / "out", "dense")
    assert "quantization_config" not in (tmp_path / "out" / "config.json").read_text()


def test_weights_are_not_taken_for_side_files(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    save_file(tensors, model / "tokenizer.safetensors")
    assert set(side_files(model)) == {"tokenizer.json"}
