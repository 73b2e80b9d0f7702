"""Tokenizers that do not load, and checkpoints that bring code of their own."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import make_checkpoint

from hlwq import HlwqError, quantize
from hlwq.check import check_directory
from hlwq.demo import bundled_model, held_out_text
from hlwq.errors import CheckpointError, ResourceError
from hlwq.evaluate.generation import Request, has_chat_template, transformers_generate
from hlwq.evaluate.model import load_packed
from hlwq.evaluate.perplexity import perplexity
from hlwq.evaluate.speed import speed
from hlwq.files import lfs_pointer
from hlwq.transformers_models import CONVERTERS, load_tokenizer

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 123\n"
ADDED = {"content": "<z>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
Change = Callable[[Path], Any]


def copy_tokenizer(directory: Path) -> Path:
    directory.mkdir(exist_ok=True)
    for file in bundled_model().iterdir():
        if file.name.startswith(("tokenizer", "chat_template")):
            shutil.copy(file, directory / file.name)
    return directory


def put(name: str, data: str | bytes) -> Change:
    return lambda path: (path / name).write_bytes(data if isinstance(data, bytes) else data.encode())


def edit(name: str, **entries: Any) -> Change:
    return lambda path: (path / name).write_text(json.dumps({**json.loads((path / name).read_text()), **entries}))


def model(**entries: Any) -> Change:
    """Change entries of the `model` of `tokenizer.json`."""

    def change(path: Path) -> None:
        old = json.loads((path / "tokenizer.json").read_text())["model"]
        edit("tokenizer.json", model={**old, **entries})(path)

    return change


def cut(path: Path) -> None:
    (path / "tokenizer.json").write_bytes((path / "tokenizer.json").read_bytes()[:5000])


def without(*names: str) -> Change:
    return lambda path: [(path / name).unlink() for name in names]


def in_its_place(make: Change) -> Change:
    """Something else called `tokenizer.json`."""
    return lambda path: [(path / "tokenizer.json").unlink(), make(path / "tokenizer.json")]


CONFIG = "tokenizer_config.json"
BROKEN: dict[str, tuple[Change, str]] = {
    "an empty object": (put("tokenizer.json", "{}"), "added_tokens"),
    "an empty file": (put("tokenizer.json", ""), "Expecting value"),
    "cut off": (cut, "Expecting"),
    "a list": (put("tokenizer.json", "[]"), ""),
    "null": (put("tokenizer.json", "null"), ""),
    "binary": (put("tokenizer.json", b"\xff\xfe\x00"), "decode byte 0xff"),
    "deep": (put("tokenizer.json", "[" * 100_000), "recursion"),
    "an unknown model": (edit("tokenizer.json", model={"type": "Nope"}), "did not match any variant"),
    "no model": (edit("tokenizer.json", model=None), ""),
    "a list for a vocabulary": (model(vocab=[1]), ""),
    "a negative token": (model(vocab={"a": -1}), ""),
    "no vocabulary": (model(vocab={}, merges=[]), "no tokenizer that loads .it has no vocabulary"),
    "merges of nothing": (model(merges=[["qqq", "zzz"]]), "`qqq` out of vocabulary"),
    "odd merges": (model(merges=["a b c d"]), ""),
    "an unknown splitter": (edit("tokenizer.json", pre_tokenizer={"type": "Nope"}), "did not match any variant"),
    "a bad pattern": (
        edit(
            "tokenizer.json",
            pre_tokenizer={"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False},
        ),
        "Oniguruma error",
    ),
    "a panic": (
        edit(
            "tokenizer.json",
            post_processor={
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "zz", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [],
                "special_tokens": {},
            },
        ),
        "no entry found for key",
    ),
    "a string for added tokens": (edit("tokenizer.json", added_tokens="x"), ""),
    "an added token without id": (edit("tokenizer.json", added_tokens=[ADDED]), ""),
    "a directory": (in_its_place(Path.mkdir), "no tokenizer that loads .it has no vocabulary"),
    "a pipe": (in_its_place(os.mkfifo), "no tokenizer that loads .it has no vocabulary"),
    "a dangling link": (
        in_its_place(lambda file: file.symlink_to("nowhere")),
        "no tokenizer that loads .it has no vocabulary",
    ),
    "no tokenizer.json": (without("tokenizer.json"), "no tokenizer that loads .it has no vocabulary"),
    "no files": (without("tokenizer.json", CONFIG, "chat_template.jinja"), "has no tokenizer"),
    "a list for settings": (put(CONFIG, "[]"), ""),
    "null for settings": (put(CONFIG, "null"), ""),
    "broken settings": (put(CONFIG, "{"), "Expecting property name"),
    "binary settings": (put(CONFIG, b"\xff\xfe\x00"), "decode byte 0xff"),
    "a number for a class": (edit(CONFIG, tokenizer_class=3), ""),
    "a list for a class": (edit(CONFIG, tokenizer_class=["x"]), ""),
    "a string for a length": (edit(CONFIG, model_max_length="x"), "'int' and 'str'"),
    "a number for a token": (edit(CONFIG, eos_token=3), "has to be either str or AddedToken"),
    "a list for a token": (edit(CONFIG, eos_token=["a"]), "has to be either str or AddedToken"),
    "a list of decoders": (edit(CONFIG, added_tokens_decoder=[1]), ""),
    "numbers for decoders": (edit(CONFIG, added_tokens_decoder={"x": 1}), "should be a dictionary"),
    "a number for code": (edit(CONFIG, auto_map=3), ""),
    "a binary template": (put("chat_template.jinja", b"\xff\xfe"), "decode byte 0xff"),
    "a list of special tokens": (put("special_tokens_map.json", "[]"), ""),
    "a list of added tokens": (put("added_tokens.json", "[]"), ""),
    "a list for config.json": (put("config.json", "[]"), ""),
    "a list for model_type": (put("config.json", '{"model_type": ["llama"]}'), ""),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_tokenizer_that_does_not_load_is_one_line(kind: str, tmp_path: Path) -> None:
    change, said = BROKEN[kind]
    change(copy_tokenizer(tmp_path))
    with pytest.raises(CheckpointError, match=said or None) as refused:
        load_tokenizer(tmp_path)
    assert "Copy the original's." in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize(
    "name", ["tokenizer.json", CONFIG, "chat_template.jinja", "tokenizer.model", "merges.txt", "q.tiktoken"]
)
def test_a_pointer_of_git_lfs_is_named(name: str, tmp_path: Path) -> None:
    put(name, POINTER)(copy_tokenizer(tmp_path))
    assert lfs_pointer(tmp_path / name)
    with pytest.raises(CheckpointError, match=rf"{name} is a pointer of Git LFS.*Run `git lfs pull`"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("data", [b"", b"version", b"version https://git-lfs.github.com/spec/v2\n", b"\0" * 200, None])
def test_what_is_no_pointer_of_git_lfs(data: bytes | None, tmp_path: Path) -> None:
    if data is None:
        os.mkfifo(tmp_path / "a")  # which nobody writes
    else:
        (tmp_path / "a").write_bytes(data)
    assert not lfs_pointer(tmp_path / "a")
    assert not lfs_pointer(tmp_path)
    assert not lfs_pointer(tmp_path / "absent")


@pytest.mark.parametrize("kind", ["a panic", "cut off", "no vocabulary", "a string for a length", "null for settings"])
def test_commands_say_it_in_one_line(kind: str, tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "model", "llama", vocab_size=2048, num_hidden_layers=1)
    BROKEN[kind][0](copy_tokenizer(path))
    calls: list[Callable[[], Any]] = [
        lambda: quantize(path, tmp_path / "out", "gptq", calibration=held_out_text(), samples=2, sequence_length=16),
        lambda: perplexity(path, held_out_text(), context=16, limit=1),
        lambda: speed(path, prompt_tokens=4, new_tokens=2, runs=1),
        lambda: has_chat_template(path),
    ]
    for call in calls:
        with pytest.raises(CheckpointError, match="tokenizer"):
            call()


@pytest.mark.parametrize("token", [2048, 10**6, 2**31 - 1])
def test_tokens_beyond_the_vocabulary_are_refused(token: int, tmp_path: Path) -> None:
    path = copy_tokenizer(make_checkpoint(tmp_path / "model", "llama", vocab_size=2048, num_hidden_layers=1))
    vocabulary = json.loads((path / "tokenizer.json").read_text())["model"]["vocab"]
    model(vocab={**vocabulary, "e": token})(path)
    (tmp_path / "a.txt").write_text("e e e e " * 400)
    with pytest.raises(CheckpointError, match=f"gives the token {token}, but the model has 2048"):
        quantize(path, tmp_path / "out", "gptq", calibration=tmp_path / "a.txt", samples=2, sequence_length=16)


def test_a_template_that_is_not_valid_is_named_by_what_uses_it(tmp_path: Path) -> None:
    path = copy_tokenizer(make_checkpoint(tmp_path / "model", "llama", vocab_size=2048, num_hidden_layers=1))
    put("chat_template.jinja", "{% for")(path)
    with pytest.raises(CheckpointError, match="chat template is not valid"):
        transformers_generate(path)(Request("Rain?", chat=True, max_tokens=2))
    assert perplexity(path, held_out_text(), context=16, limit=1).perplexity > 1  # which needs none


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a tokenizer that has a `tokenizer.model` and no `tokenizer.json`."""
    trainer = pytest.importorskip("sentencepiece").SentencePieceTrainer
    pytest.importorskip("google.protobuf")
    path = tmp_path_factory.mktemp("sentencepiece")
    trainer.train(
        input=str(held_out_text()),
        model_prefix=str(path / "tokenizer"),
        vocab_size=400,
        byte_fallback=True,
        model_type="bpe",
        minloglevel=2,
    )
    (path / "tokenizer.vocab").unlink()
    (path / "config.json").write_text('{"model_type": "llama"}')
    (path / CONFIG).write_text('{"tokenizer_class": "LlamaTokenizer"}')
    return path


def test_a_sentencepiece_model_loads_with_the_extra(sentencepiece_model: Path) -> None:
    tokenizer = load_tokenizer(sentencepiece_model)
    assert tokenizer.decode(tokenizer("The rain fell.")["input_ids"], skip_special_tokens=True) == "The rain fell."


@pytest.mark.parametrize("name", ["tokenizer.model", "qwen.tiktoken"])
@pytest.mark.parametrize("package", CONVERTERS)
def test_a_missing_package_is_named(package: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(name, "not a tokenizer")(tmp_path)
    put("config.json", '{"model_type": "llama"}')(tmp_path)
    put(CONFIG, '{"tokenizer_class": "LlamaTokenizer"}')(tmp_path)
    monkeypatch.setitem(sys.modules, CONVERTERS[package], None)  # as where it is not installed
    with pytest.raises(ResourceError, match=rf"may need .*{package}.*pip install 'hlwq\[tokenizers\]'"):
        load_tokenizer(tmp_path)


# What a checkpoint may try. Each writes the file `evil` if code of it runs.


class _Writes:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.write_text, (self.file, "ran")


def code(path: Path) -> None:
    """Modules that a checkpoint's files may name."""
    for name in ("evil.py", "__init__.py", "custom_generate/generate.py", "tokenization_evil.py"):
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text(f"from pathlib import Path\nPath({str(path.parent / 'evil')!r}).write_text('ran')\n")


AUTO_MAP = {
    "AutoConfig": "evil.Config",
    "AutoModelForCausalLM": "evil.Model",
    "AutoModel": "evil.Model",
    "AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"],
}


def pickles(path: Path) -> None:
    for name in (
        "pytorch_model.bin",
        "model.pt",
        "tokenizer.pkl",
        "adapter_model.bin",
        "tokenizer.model",
        "qwen.tiktoken",
    ):
        (path / name).write_bytes(pickle.dumps(_Writes(path.parent / "evil")))


def only_pickles(path: Path) -> None:
    pickles(path)
    (path / "model.safetensors").unlink()


def only_a_pickled_tokenizer(path: Path) -> None:
    pickles(path)
    (path / "tokenizer.json").unlink()


ESCAPES = (
    "{{ cycler.__init__.__globals__.os.system('echo ran > ../evil') }}{{ ''.__class__.__mro__[1].__subclasses__() }}"
)
TRICKS: dict[str, tuple[Change, bool]] = {  # and whether the model can be used all the same
    "code for a model that is known": (edit("config.json", auto_map=AUTO_MAP), True),
    "code for a model that is not": (edit("config.json", model_type="evil", auto_map=AUTO_MAP), False),
    "code on the hub": (
        edit("config.json", model_type="evil", auto_map={"AutoConfig": "evil/repo--evil.Config"}), False
    ),
    "no model type": (edit("config.json", model_type=None, auto_map=AUTO_MAP), False),
    "an unknown architecture": (edit("config.json", architectures=["evil.Model"], auto_map=AUTO_MAP), False),
    "code for a tokenizer": (edit(CONFIG, auto_map=AUTO_MAP), True),
    "code for a tokenizer, as it was": (edit(CONFIG, auto_map=["evil.Tokenizer", None]), True),
    "a tokenizer's class": (edit(CONFIG, tokenizer_class="evil.Tokenizer", auto_map=AUTO_MAP), False),
    "a kernel on the hub": (edit("config.json", attn_implementation="evil/kernel"), True),
    "a kernel of the community": (
        edit("config.json", _attn_implementation="kernels-community/flash-attn3", use_kernels=True), True
    ),
    "pickles beside": (pickles, True),
    "only pickles": (only_pickles, False),
    "only a pickled tokenizer": (only_a_pickled_tokenizer, False),
    "a template that escapes": (put("chat_template.jinja", ESCAPES), True),
    "a template in the settings": (
        lambda path: [(path / "chat_template.jinja").unlink(), edit(CONFIG, chat_template=ESCAPES)(path)], True
    ),
}  # fmt: skip


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """A standard input that agrees to everything."""
    stream = io.StringIO("yes\n" * 100)
    monkeypatch.setattr(sys, "stdin", stream)
    return stream


def error_of(call: Callable[[], Any]) -> str:
    """What is said of a call that fails; empty if it does not."""
    try:
        call()
    except HlwqError as error:
        return str(error)
    return ""


@pytest.mark.slow
@pytest.mark.parametrize("trick", TRICKS)
def test_code_of_a_checkpoint_never_runs(trick: str, tmp_path: Path, answers: io.StringIO) -> None:
    path = copy_tokenizer(make_checkpoint(tmp_path / "model", "llama", vocab_size=2048, num_hidden_layers=1))
    code(path)
    change, usable = TRICKS[trick]
    change(path)
    rows = tmp_path / "a.jsonl"
    rows.write_text(
        "".join(f'{{"text": "Rain fell for {day} days on the land and on the sea."}}\n' for day in range(99))
    )
    chats = tmp_path / "b.jsonl"
    chats.write_text('{"messages": [{"role": "user", "content": "Will it rain?"}]}\n' * 99)
    few: dict[str, Any] = {"samples": 2, "sequence_length": 16}
    calls: dict[str, Callable[[], Any]] = {
        "rtn": lambda: quantize(path, tmp_path / "rtn", "rtn"),
        "gptq": lambda: quantize(path, tmp_path / "gptq", "gptq", calibration=rows, **few),
        "perplexity": lambda: perplexity(path, held_out_text(), context=16, limit=1),
        "speed": lambda: speed(path, prompt_tokens=4, new_tokens=2, runs=1),
        "generate": lambda: transformers_generate(path)(Request("Rain", chat=False, max_tokens=2)),
    }
    failures = {name: error_of(call) for name, call in calls.items()}
    assert not usable or set(failures.values()) == {""}, failures
    others: list[Callable[[], Any]] = [
        lambda: load_tokenizer(path),
        lambda: load_packed(path),
        lambda: check_directory(path),
        lambda: quantize(path, tmp_path / "chats", "gptq", calibration=chats, **few),
        lambda: transformers_generate(path)(Request("Rain", chat=True, max_tokens=2)),
    ]
    for error in (*failures.values(), *map(error_of, others)):
        assert len(error.splitlines()) <= 1
    assert not (tmp_path / "evil").exists()
    assert answers.tell() == 0  # nobody was asked


def test_packed_models_run_no_code_either(tmp_path: Path, answers: io.StringIO) -> None:
    path = copy_tokenizer(make_checkpoint(tmp_path / "model", "llama", vocab_size=2048, num_hidden_layers=1))
    quantize(path, tmp_path / "packed", "hlwq")
    code(tmp_path / "packed")
    pickles(tmp_path / "packed")
    edit("config.json", auto_map=AUTO_MAP, attn_implementation="evil/kernel")(tmp_path / "packed")
    load_packed(tmp_path / "packed")
    (tmp_path / "packed" / "model.safetensors").unlink()
    with pytest.raises(HlwqError):
        load_packed(tmp_path / "packed")
    assert not (tmp_path / "evil").exists()
    assert answers.tell() == 0


@pytest.mark.slow
def test_the_command_asks_nobody(tmp_path: Path) -> None:
    path = copy_tokenizer(make_checkpoint(tmp_path / "model", "llama", vocab_size=2048, num_hidden_layers=1))
    code(path)
    edit("config.json", model_type="evil", auto_map=AUTO_MAP)(path)
    edit(CONFIG, auto_map=AUTO_MAP, tokenizer_class="Evil")(path)
    for arguments in (
        ["quantize", str(path), str(tmp_path / "out"), "--recipe", "gptq", "--calibration", "embedded"],
        ["eval", "perplexity", str(path), "--text", str(held_out_text())],
        ["eval", "speed", str(path)],
        ["check", str(path)],
        ["inspect", str(path)],
    ):
        command = [sys.executable, "-c", "import hlwq_command; hlwq_command.main()", *arguments]
        done = subprocess.run(command, input="yes\n" * 100, capture_output=True, text=True, timeout=120, check=False)
        assert "custom code" not in done.stdout + done.stderr
        if arguments[0] in ("quantize", "eval"):  # the others need not know the model
            assert done.returncode == 1
            assert done.stderr.startswith("error: ")
            assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "evil").exists()


@pytest.mark.slow
def test_smollm2_reads_chats_with_tools(smollm2: Path, tmp_path: Path) -> None:
    """Its own template joins strings, and knows neither tools nor thoughts: what is said reaches it all the same."""
    from hlwq.calibration.rows import read_row, text_of

    tokenizer = load_tokenizer(smollm2)
    parts = [{"type": "input_text", "text": "Will it"}, {"type": "image"}, {"text": "rain?"}]
    calling = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "ask", "arguments": "{}"}}]}
    result = {"role": "tool", "content": '{"mm": 12}'}
    row = {"messages": [{"role": "user", "content": parts}, calling, result, {"role": "assistant", "content": "Yes."}]}
    text, is_chat = text_of(read_row(row), tokenizer)
    assert is_chat
    assert "<|im_start|>user\nWill it\nrain?<|im_end|>" in text
    assert '<|im_start|>tool\n{"mm": 12}<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>' in text
    assert "message['content']" in tokenizer.chat_template
