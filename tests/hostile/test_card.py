"""Cards: what is taken from a stranger's, and what is written with strangers' words in it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from checkpoints import make_checkpoint
from huggingface_hub import ModelCard
from typer.testing import CliRunner

import hlwq
from hlwq.cli import app
from hlwq.demo import bundled_model
from hlwq.errors import CheckpointError, HlwqError, HlwqWarning
from hlwq.provenance import LONGEST, base_model_of, inherited, origin_of, stated_by_card, stated_by_gguf
from hlwq.report.card import write_card
from hlwq.report.markdown import inline
from hlwq.report.tables import markdown_table
from tests.hostile.test_side_files import in_hub_cache

MIT = {"license": "mit"}
BOMB = "\n".join(["a0: &a0 [x, x]", *(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}, *a{i - 1}]" for i in range(1, 30))])
CARDS: dict[str, tuple[str | bytes, dict[str, Any]]] = {
    "plain": ("license: mit", MIT),
    "everything": (
        "license: other\nlicense_name: qwen-research\nlicense_link: LICENSE\nlanguage: [en, zh-Hant]\ntags: [x]",
        {"license": "other", "license_name": "qwen-research", "license_link": "LICENSE", "language": ["en", "zh-Hant"]},
    ),
    "quoted": ("license: \"mit\"\nlanguage: 'en'", MIT | {"language": "en"}),
    "Norwegian": ("license: mit\nlanguage: no", MIT | {"language": "no"}),
    "a list in lines": ("language:\n- en\n- no\nlicense: mit", MIT | {"language": ["en", "no"]}),
    "a link": ("license_link: https://x.org/a?b=c#d", {"license_link": "https://x.org/a?b=c#d"}),
    "the base of another": ("license: mit\nbase_model: Qwen/Qwen3.5-9B\nbase_model_relation: finetune", MIT),
    "comments": ("# license: gpl\nlicense: mit # and no other", MIT),
    "byte-order mark": (b"\xef\xbb\xbf---\nlicense: mit\n---\n", MIT),
    "carriage returns": (b"---\r\nlicense: mit\r\n---\r\n# x\r\n", MIT),
    "mark and returns": (b"\xef\xbb\xbf---\r\nlicense: mit\r\n---\r\n", MIT),
    "body is not UTF-8": (b"---\nlicense: mit\n---\n\xff\xfe", MIT),
    "ends at once": (b"---\nlicense: mit\n---", MIT),
    # Nothing can be taken.
    "empty": (b"", {}),
    "no metadata": (b"# A model\n\nlicense: mit\n", {}),
    "empty metadata": (b"---\n---\n", {}),
    "null": ("null", {}),
    "no end": (b"---\nlicense: mit\n# A model\n", {}),
    "text before": (b"x\n---\nlicense: mit\n---\n", {}),
    "not UTF-8": (b"---\nlicense: mit\nx: \xff\n---\n", {}),
    "UTF-16": ("---\nlicense: mit\n---\n".encode("utf-16"), {}),
    "not YAML": ("license: [unclosed", {}),
    "tabs": ("license:\n\t- mit", {}),
    "control characters": ("license: mit\nx: \x00\x1b", {}),
    "no such letter": ('license: mit\nx: "\\UFFFFFFFF"', {}),
    "an unknown directive": (b"---\n%YAML 9.9\n--- {license: mit}\n---\n", {}),
    "a list": ("- license: mit", {}),
    "a text": ("license", {}),
    "two documents": ("license: mit\n...\n--- {license: gpl-3.0}", {}),
    "bomb": (f"license: mit\n{BOMB}", {}),
    "bomb of mappings": ("license: mit\na: &a {b: c}\nd: {<<: *a}", {}),
    "an anchor": ("license: &a mit", {}),
    "an alias to itself": ("license: mit\na: &a [*a]", {}),
    "a tag": ("license: !!str mit", {}),
    "a Python object": ("license: mit\nx: !!python/object/apply:os.system ['exit 1']", {}),
    "deep lists": ("license: mit\nx: " + "[" * 5000, {}),
    "deep mappings": ("license: mit\nx: " + "{a: " * 5000, {}),
    "deep lines": ("\n".join(" " * i + "a:" for i in range(200)), {}),
    "dashes": ("license: mit\n" + "- " * 20000, {}),
    "longer than any": ("license: mit\nx: " + "y" * LONGEST, {}),
    "blank": ("\n" * (2 * LONGEST), {}),
    # What has another form is left out, and the rest is taken.
    "wide": ("license: mit\nx: [" + "a," * 30000 + "]", MIT),
    "many keys": ("license: mit\n" + "\n".join(f"k{i}: v" for i in range(6000)), MIT),
    "twice": ("license: mit\nlicense: gpl-3.0\nlanguage: en", {"language": "en"}),
    "twice the same": ("language: en\nlicense: mit\nlanguage: en", MIT),
    "license is a list": ("license: [mit, gpl-3.0]\nlanguage: en", {"language": "en"}),
    "license is a mapping": ("license: {name: mit}\nlanguage: en", {"language": "en"}),
    "license is null": ("license: null\nlanguage: en", {"language": "en"}),
    "license is a tilde": ("license: ~\nlanguage: en", {"language": "en"}),
    "license is empty": ("license:\nlanguage: en", {"language": "en"}),
    "license is true": ("license: true\nlanguage: en", {"language": "en"}),
    "license is a number": ("license: 5\nlanguage: en", {"language": "en"}),
    "license has lines": ("license: |\n  mit\n  gpl\nlanguage: en", {"language": "en"}),
    "license is markup": ("license: '<script>'\nlanguage: en", {"language": "en"}),
    "license is long": (f"license: {'m' * 1000}\nlanguage: en", {"language": "en"}),
    "language is a mapping": ("license: mit\nlanguage: {en: 1}", MIT),
    "language is nested": ("license: mit\nlanguage: [[en]]", MIT),
    "language is empty": ("license: mit\nlanguage: []", MIT),
    "language is markup": ("license: mit\nlanguage: ['en', '<b>']", MIT),
    "language is words": ("license: mit\nlanguage: English and others", MIT),
    "languages without end": (f"license: mit\nlanguage: [{'en,' * 5000}]", MIT),
    "link is a program": ("license: mit\nlicense_link: 'javascript:alert(1)'", MIT),
    "link leads up": ("license: mit\nlicense_link: ../../etc/passwd", MIT),
    "link is markup": ("license: mit\nlicense_link: 'https://x.org/\">'", MIT),
    "name has lines": ('license: mit\nlicense_name: "a\\nb"', MIT),
    "keys of other types": ("license: mit\n? [a, b]\n: c\n5: d\n? {e: f}\n: g", MIT),
}


def put_card(directory: Path, card: str | bytes) -> None:
    content = card if isinstance(card, bytes) else f"---\n{card}\n---\n# A model\n".encode()
    (directory / "README.md").write_bytes(content)


@pytest.mark.parametrize("kind", CARDS)
def test_of_a_card_only_what_is_plain_is_taken(kind: str, tmp_path: Path) -> None:
    card, expected = CARDS[kind]
    put_card(tmp_path, card)
    assert stated_by_card(tmp_path) == expected


def outside(directory: Path) -> None:
    (directory.parent / "other.md").write_text("---\nlicense: mit\n---\n")
    (directory / "README.md").symlink_to("../other.md")


@pytest.mark.parametrize(
    "make",
    [
        outside,
        lambda directory: os.mkfifo(directory / "README.md"),
        lambda directory: (directory / "README.md").mkdir(),
        lambda directory: (directory / "README.md").symlink_to("absent"),
        lambda directory: (directory / "README.md").symlink_to("README.md"),
        lambda directory: (directory / "README.md").symlink_to("/dev/zero"),
        lambda directory: None,
    ],
)
def test_a_card_that_is_no_file_of_the_directory_says_nothing(make: Callable[[Path], None], tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    make(tmp_path / "model")
    assert stated_by_card(tmp_path / "model") == {}


@pytest.mark.parametrize("kind", ["everything", "the base of another", "bomb", "twice", "not UTF-8"])
def test_what_was_taken_is_on_the_new_card(kind: str, tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "model", "llama")
    card, expected = CARDS[kind]
    put_card(model, card)
    hlwq.quantize(model, tmp_path / "out", "rtn")
    hlwq.convert(tmp_path / "out", tmp_path / "again", "mlx")
    for out in (tmp_path / "out", tmp_path / "again"):
        data = ModelCard.load(write_card(out, base_model="me/model")).data.to_dict()
        assert {key: data[key] for key in ("license", "license_name", "license_link", "language") if key in data} == (
            expected
        )
        assert (data["base_model"], data["base_model_relation"]) == ("me/model", "quantized")


# The base is the source.
@pytest.mark.parametrize(
    ("origin", "expected"),
    [
        ({"source": "me/model", "revision": "c" * 40}, "me/model"),
        ({"source": "gpt2", "revision": "c" * 40}, "gpt2"),
        ({"source": "model", "revision": None}, None),
        ({"source": "me/model"}, None),
        ({"source": "out", "revision": None, "made_by": {"origin": {"source": "me/a", "revision": "1"}}}, "me/a"),
        ({"source": "me/out", "revision": "2", "made_by": {"origin": {"source": "me/a", "revision": "1"}}}, "me/a"),
        ({"source": "me/out", "revision": "2", "made_by": {"origin": {"source": "a", "revision": None}}}, None),
        ({"source": "me/model", "revision": "1", "made_by": None}, "me/model"),
        ({"source": "me/model", "revision": "1", "card": {"base_model": "other/model"}}, "me/model"),
        ({"source": "a", "card": {"base_model": "other/model"}}, None),
        ({"source": "<b>/x", "revision": "1"}, None),
        ({"source": "../..", "revision": "1"}, None),
        ({"source": ["me/model"], "revision": "1"}, None),
        ({"made_by": {"origin": 5}}, None),
        ({"made_by": [1]}, None),
        ({}, None),
    ],
)
def test_the_base_is_what_was_taken_from_the_hub(origin: dict[str, Any], expected: str | None) -> None:
    assert base_model_of(origin) == expected


def test_a_snapshot_in_the_hubs_cache_has_the_name_of_its_repository(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "model", "llama")
    put_card(model, "license: mit\nbase_model: Qwen/Qwen3.5-9B")
    snapshot = in_hub_cache(model, tmp_path / "hub", shared=False)
    hlwq.quantize(snapshot, tmp_path / "out", "hlwq")
    hlwq.convert(tmp_path / "out", tmp_path / "again", "dense")
    for out in (tmp_path / "out", tmp_path / "again"):
        assert ModelCard.load(write_card(out)).data.to_dict()["base_model"] == "me/model"


def test_a_hub_id_is_the_base_of_what_is_made_from_it(tmp_path: Path) -> None:
    """The command line, offline, with the model in its cache."""
    model = make_checkpoint(tmp_path / "model", "llama")
    put_card(model, "license: mit\nbase_model: Qwen/Qwen3.5-9B")
    snapshot = in_hub_cache(model, tmp_path / "home" / "hub", shared=False)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text(snapshot.name)
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    for arguments in (["quantize", "me/model", "out", "--recipe", "rtn"], ["card", "out"]):
        command = [sys.executable, "-m", "hlwq.cli", *arguments]
        subprocess.run(command, check=True, env=environment, cwd=tmp_path, capture_output=True, timeout=120)
    data = ModelCard.load(tmp_path / "out" / "README.md").data.to_dict()
    assert (data["base_model"], data["base_model_relation"], data["license"]) == ("me/model", "quantized", "mit")
    origin = json.loads((tmp_path / "out" / "hlwq.json").read_text())["origin"]
    assert (origin["source"], origin["revision"]) == ("me/model", snapshot.name)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("made")
    hlwq.quantize(make_checkpoint(root / "fine-tune", "llama"), root / "out", "rtn")
    return root / "out"


@pytest.fixture
def checkpoint(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "checkpoint"))


def test_a_local_source_needs_its_hub_id_told(checkpoint: Path) -> None:
    with pytest.warns(HlwqWarning, match="names no base model: the source, fine-tune, was not taken from the hub"):
        file = write_card(checkpoint)
    data = ModelCard.load(file).data.to_dict()
    assert "base_model" not in data
    assert "base_model_relation" not in data
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_card(checkpoint, base_model="me/fine-tune", overwrite=True)
    data = ModelCard.load(file).data.to_dict()
    assert (data["base_model"], data["base_model_relation"]) == ("me/fine-tune", "quantized")


@pytest.mark.parametrize(
    "name", ["", "model", "./model", "/home/me/model", "a/b/c", "me/na me", "me/x\n", "<b>/c", "me/"]
)
def test_a_base_that_the_hub_cannot_have_is_refused(name: str, checkpoint: Path) -> None:
    result = CliRunner().invoke(app, ["card", str(checkpoint), "--base-model", name])
    assert result.exit_code == 1
    [line] = result.output.splitlines()
    assert line.startswith("error: --base-model ")
    assert not (checkpoint / "README.md").exists()


@pytest.mark.parametrize(
    ("family", "format_name", "expected"),
    [
        ("llama", "gptq", ("text-generation", "transformers")),
        ("llama", "mlx", ("text-generation", "mlx")),
        ("qwen3_5_text", "dense", ("text-generation", "transformers")),
        ("qwen3_5", "gptq", ("image-text-to-text", "transformers")),
        ("qwen3_5", "hlwq", ("image-text-to-text", "transformers")),
        ("qwen3_5", "mlx", ("text-generation", "mlx")),
    ],
)
def test_a_card_says_what_the_model_is_for(
    family: str, format_name: str, expected: tuple[str, str], tmp_path: Path
) -> None:
    model = make_checkpoint(tmp_path / "model", family)
    hlwq.quantize(model, tmp_path / "out", "hlwq" if format_name == "hlwq" else "rtn", format=format_name)
    data = ModelCard.load(write_card(tmp_path / "out", base_model="me/model")).data.to_dict()
    assert (data["pipeline_tag"], data["library_name"]) == expected
    assert {"hlwq", format_name} <= set(data["tags"])


# GGUF.
def gguf_file(file: Path, **stated: Any) -> Path:
    from gguf import GGUFWriter

    writer = GGUFWriter(str(file), "llama")
    for key, value in stated.items():
        name = f"general.{key.replace('_', '.')}"
        if isinstance(value, list):
            writer.add_array(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        else:
            writer.add_uint32(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return file


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        ({"license": "apache-2.0"}, {"license": "apache-2.0"}),
        ({"license": "mit", "languages": ["en"]}, {"license": "mit", "language": ["en"]}),
        (
            {"license": "other", "license_name": "Some terms", "license_link": "https://x.org/LICENSE"},
            {"license": "other", "license_name": "Some terms", "license_link": "https://x.org/LICENSE"},
        ),
        ({"base_model.0.repo.url": "https://huggingface.co/a/b", "name": "x"}, {}),
        ({"license": 5, "languages": ["en", "fr"]}, {"language": ["en", "fr"]}),
        ({"license": "<script>", "languages": [1, 2]}, {}),
        ({"license": ["mit"], "languages": "en"}, {"language": "en"}),
        ({}, {}),
    ],
)
def test_a_gguf_file_says_its_licence_and_languages(
    stated: dict[str, Any], expected: dict[str, Any], tmp_path: Path
) -> None:
    pytest.importorskip("gguf")
    file = gguf_file(tmp_path / "model.gguf", **stated)
    assert stated_by_gguf(file) == expected
    assert origin_of(file, tmp_path) == {"source": "model.gguf", "revision": None, "card": expected}


@pytest.mark.parametrize("kept", [0, 3, 8, 23, 40, 60])
def test_a_damaged_gguf_file_says_nothing(kept: int, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    file = gguf_file(tmp_path / "model.gguf", license="apache-2.0", languages=["en"])
    os.truncate(file, kept)
    assert stated_by_gguf(file) == {}


# Strangers' words on our card.
WORDS = {
    "HTML": "<script>alert(1)</script>",
    "image": "![x](https://x.org/y.png)",
    "link": "[x](javascript:alert(1))",
    "table": "a | b | c",
    "code": "`` ` ``",
    "emphasis": "*a* **b** _c_ __d__ ~~e~~",
    "entity": "&lt;b&gt;",
    "backslash": "\\<b>\\",
    "lines": "a\n---\nlicense: mit\n---\n# b\r\n",
    "front matter": "---",
    "heading": "# a",
    "list": "- a\n1. b",
    "quotes": "'\"",
    "colon": "a: b",
    "brace": "{a: [b]}",
    "YAML bomb": "&a [*a, *a]",
    "tag": "!!python/object:os.system",
    "control": "\x1b[2J\x00\x07",
    "direction": "a\u202etxt.exe\u2028b\u0085c",
    "surrogate": "caf\udce9",
    "spaces": "  a   b  ",
    "long": "x" * 2000,
}
DEFUSED = re.compile(r"\\[\\`*\[\]<>|&~_]")


@pytest.mark.parametrize("kind", WORDS)
def test_strangers_words_mean_nothing_but_themselves(kind: str) -> None:
    text = inline(WORDS[kind])
    assert len(text.splitlines()) == 1
    assert not re.search(r"[\\`*\[\]<>|&~]", DEFUSED.sub("", text))
    text.encode()


@pytest.mark.parametrize("kind", sorted(WORDS.keys() - {"surrogate"}))  # which is no JSON
def test_a_card_holds_strangers_words_as_text(kind: str, checkpoint: Path) -> None:
    word = WORDS[kind]
    manifest = json.loads((checkpoint / "hlwq.json").read_text())
    manifest["recipe"] = word
    manifest["origin"] |= {"source": word, "card": {"license": word, "language": [word], "base_model": word, "x": word}}
    manifest["origin"]["made_by"] = {"recipe": word, "origin": {"source": word, "revision": word}}
    manifest["versions"] = {word: word}
    manifest["calibration"] = {
        **{"samples": 1, "sequence_length": 2, "seed": 3, "tokens_sha256": word, "sources": [{"source": word}]},
        "batch_size": 1,
    }
    (checkpoint / "hlwq.json").write_text(json.dumps(manifest))
    if "/" not in word and "\x00" not in word and len(word) < 200:
        checkpoint = checkpoint.rename(checkpoint.with_name(word))
    card = write_card(checkpoint, base_model="me/model").read_text(encoding="utf-8")
    head, body = card.removeprefix("---\n").split("\n---\n", 1)
    data = yaml.safe_load(head)
    assert data["base_model"] == "me/model"
    assert not {"license", "language", "x"}.intersection(data)
    assert data["tags"][0] == "hlwq"
    plain = "\n".join(line for line in body.splitlines() if not line.startswith("    "))
    plain = re.sub(r"(?<!\\)`[^`\n]*`", "", plain).replace("[hlwq](https://github.com/hlwq/hlwq)", "")
    text = DEFUSED.sub("", plain)
    assert not re.search(r"[`<>~&]|!\[|\]\(|\*a\*", text)
    assert "\n---\n" not in body
    assert [line for line in body.splitlines() if line.startswith("# ")] == [body.splitlines()[1]]


def test_names_in_a_table_of_a_report_are_text() -> None:
    from tests.test_report import row_of

    for word in WORDS.values():
        table = markdown_table([row_of(word, 4, 0.3)])
        assert len(table.splitlines()) == 3
        assert not re.search(r"[`<>~&*]|!\[|\]\(", DEFUSED.sub("", table.splitlines()[2]))


@pytest.mark.parametrize("stated", [{"license": ["mit"]}, {"language": 5}, {"base_model": "a/b"}, {"tags": ["x"]}])
def test_a_record_of_a_card_is_read_as_carefully_as_a_card(stated: dict[str, Any]) -> None:
    assert inherited(stated) == {}


# Where the card is written.
@pytest.mark.parametrize("name", ["README.md", "README.md.tmp"])
@pytest.mark.parametrize("target", ["exists", "dangling"])
def test_a_card_is_never_written_through_a_link(target: str, name: str, checkpoint: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    if target == "exists":
        other.write_text("mine")
    (checkpoint / name).symlink_to(other)
    if name == "README.md":
        with pytest.raises(HlwqError, match="`overwrite=True` replaces it"):
            write_card(checkpoint, base_model="me/model")
    write_card(checkpoint, base_model="me/model", overwrite=True)
    assert (other.read_text() == "mine") if target == "exists" else not other.exists()
    assert not (checkpoint / "README.md").is_symlink()


def report_of(checkpoint: Path, report: Path) -> None:
    from hlwq.evaluate.results import fingerprint

    report.mkdir()
    (report / "rows.json").write_text(json.dumps([{"checkpoint": fingerprint(checkpoint)}]))
    (report / "table.md").write_text("| a |\n|---|\n| b |\n")
    (report / "loss.png").write_bytes(b"\x89PNG\r\n\x1a\n")


@pytest.mark.parametrize("name", ["table.md", "rows.json", "loss.png", "size.png"])
def test_no_link_of_a_report_leads_onto_the_card(name: str, checkpoint: Path, tmp_path: Path) -> None:
    report_of(checkpoint, tmp_path / "report")
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "report" / name).unlink(missing_ok=True)
    (tmp_path / "report" / name).symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match=f"{name} leads out of its directory"):
        write_card(checkpoint, base_model="me/model", report=tmp_path / "report")
    assert not (checkpoint / "README.md").exists()


@pytest.mark.parametrize(
    "rows", ["", "{", "5", "null", "[5]", "[{}]", "[[]]", '{"checkpoint": 1}', "[" * 100_000, "[NaN]"]
)
def test_rows_that_compare_did_not_write_are_refused(rows: str, checkpoint: Path, tmp_path: Path) -> None:
    report_of(checkpoint, tmp_path / "report")
    (tmp_path / "report" / "rows.json").write_text(rows)
    with pytest.raises(CheckpointError, match="is not what `hlwq compare` wrote"):
        write_card(checkpoint, base_model="me/model", report=tmp_path / "report")


def test_charts_are_not_written_into_a_folder_elsewhere(checkpoint: Path, tmp_path: Path) -> None:
    report_of(checkpoint, tmp_path / "report")
    (tmp_path / "report" / "secret.png").write_text("secret")
    (tmp_path / "elsewhere").mkdir()
    (checkpoint / "charts").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(HlwqError, match="is not a directory of its own"):
        write_card(checkpoint, base_model="me/model", report=tmp_path / "report")
    assert not list((tmp_path / "elsewhere").iterdir())
    (checkpoint / "charts").unlink()
    write_card(checkpoint, base_model="me/model", report=tmp_path / "report")
    assert [file.name for file in (checkpoint / "charts").iterdir()] == ["loss.png"]


def test_the_bundled_model_sees(tmp_path: Path) -> None:
    hlwq.quantize(bundled_model(), tmp_path / "out", "rtn")
    data = ModelCard.load(write_card(tmp_path / "out", base_model="me/model")).data.to_dict()
    assert data["pipeline_tag"] == "image-text-to-text"
