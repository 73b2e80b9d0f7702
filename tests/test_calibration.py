from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hlwq import HlwqError
from hlwq.calibration import EMBEDDED, Calibration, load_samples
from hlwq.demo import bundled_model
from hlwq.transformers_models import load_tokenizer

WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "and",
    "saw",
    "the",
    "sea",
    "while",
    "rain",
    "fell",
    "over",
    "our",
    "land",
]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(bundled_model())


def prose(sentences: int) -> list[str]:
    return [
        " ".join(WORDS[(i * 7 + j * (i % 5 + 1)) % len(WORDS)] for j in range(12)) + f" {i}." for i in range(sentences)
    ]


def write_text(file: Path) -> Path:
    file.write_text("\n".join(prose(600)))
    return file


def write_rows(file: Path, key: str = "text") -> Path:
    file.write_text("\n".join(json.dumps({key: " ".join(prose(40)[start:])}) for start in range(20)))
    return file


def write_parquet(file: Path) -> Path:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list([{"text": " ".join(prose(40)[start:])} for start in range(20)]).to_parquet(str(file))
    return file


@pytest.mark.parametrize(
    ("name", "write"), [("a.txt", write_text), ("a.jsonl", write_rows), ("a.parquet", write_parquet)]
)
def test_each_kind_of_file_gives_full_samples(
    name: str, write: Callable[[Path], Path], tmp_path: Path, tokenizer: Any
) -> None:
    file = write(tmp_path / name)
    samples = load_samples(Calibration((str(file),), 6, 64), tokenizer)
    assert samples.tokens.shape == (6, 64)
    assert samples.tokens.dtype == torch.int64
    text = "\n".join(prose(600))
    for row in samples.tokens:
        piece = tokenizer.decode(row[8:24])
        assert piece.split()[1] in text  # a word in full
    assert samples.origin["sources"][0]["source"] == name  # and not where it lies
    assert len(samples.origin["sources"][0]["sha256"]) == 64


@pytest.mark.parametrize("change", [{"seed": 1}, {"samples": 7}, {"sequence_length": 63}])
def test_each_option_changes_the_samples(change: dict[str, int], tmp_path: Path, tokenizer: Any) -> None:
    source = str(write_text(tmp_path / "a.txt"))
    first, again = (load_samples(Calibration((source,), 6, 64), tokenizer) for _ in range(2))
    other = load_samples(Calibration((source,), **{"samples": 6, "sequence_length": 64, **change}), tokenizer)
    assert torch.equal(first.tokens, again.tokens)
    assert first.origin == again.origin
    assert not torch.equal(first.tokens, other.tokens)
    assert first.origin["tokens_sha256"] != other.origin["tokens_sha256"]


def test_sources_mix_in_equal_parts(tmp_path: Path, tokenizer: Any) -> None:
    first, second = write_text(tmp_path / "a.txt"), tmp_path / "b.jsonl"
    second.write_text("\n".join(json.dumps({"text": "0 1 2 3 4 5 6 7 8 9 " * 30}) for _ in range(9)))
    samples = load_samples(Calibration((str(first), str(second)), 5, 64), tokenizer)
    digits = [sum(character.isdigit() for character in tokenizer.decode(row)) > 20 for row in samples.tokens]
    assert digits == [False, False, False, True, True]
    assert len(samples.origin["sources"]) == 2


@pytest.mark.parametrize("key", ["messages", "conversations"])
def test_chats_go_through_the_template(key: str, tmp_path: Path, tokenizer: Any) -> None:
    who, what = ("role", "content") if key == "messages" else ("from", "value")
    names = ("user", "assistant") if key == "messages" else ("human", "gpt")
    chat = [{who: names[0], what: "What is rain?"}, {who: names[1], what: "Water that falls."}]
    file = tmp_path / "chat.jsonl"
    file.write_text("\n".join(json.dumps({key: chat}) for _ in range(30)))
    samples = load_samples(Calibration((str(file),), 2, 64), tokenizer)
    expected = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is rain?"}, {"role": "assistant", "content": "Water that falls."}],
        tokenize=False,
    )
    ids = tokenizer(expected, add_special_tokens=False)["input_ids"]
    assert samples.tokens.flatten()[: len(ids)].tolist() == ids


def test_samples_come_from_all_over_a_text(tmp_path: Path, tokenizer: Any) -> None:
    file = tmp_path / "numbers.txt"
    file.write_text("\n".join(f"line {number} of this file, which has many of them" for number in range(4000)))
    samples = load_samples(Calibration((str(file),), 8, 64), tokenizer)
    numbers = [int(word) for row in samples.tokens for word in tokenizer.decode(row).split() if word.isdigit()]
    assert len({number // 500 for number in numbers}) >= 4


def test_a_text_can_be_used_up(tmp_path: Path, tokenizer: Any) -> None:
    file = write_text(tmp_path / "a.txt")
    total = len(tokenizer(file.read_text())["input_ids"])
    samples = load_samples(Calibration((str(file),), total * 9 // 10 // 64, 64), tokenizer)
    assert len(samples.tokens.unique()) > 10


def test_without_a_network_the_embedded_texts_serve_and_say_so(monkeypatch: pytest.MonkeyPatch, tokenizer: Any) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    samples = load_samples(Calibration((), 4, 64), tokenizer)
    assert "name better data with `sources`" in samples.warning
    assert samples.origin["sources"][0]["source"] == EMBEDDED
    named = load_samples(Calibration((EMBEDDED,), 4, 64), tokenizer)
    assert torch.equal(samples.tokens, named.tokens)
    assert not named.warning


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("absent.txt", None, "absent.txt does not exist"),
        ("a.jsonl", b'{"messages": "hello"}\n', 'its chat is "hello", not a list of messages'),
        ("a.jsonl", b'{"conversations": [["a", "b"]]}\n', "not an object with role and content"),
        ("a.jsonl", b'{"messages": [{"role": "user", "content": 3}]}\n', "message 1: its content is 3, not text"),
        ("empty.txt", b"", "empty.txt is empty"),
        ("short.txt", b"only a few words", r"has \d+ tokens in 1 texts, but 4 samples of 64 need 256. Lower `samples`"),
        ("binary.txt", b"\xff\xfe\x00", "binary.txt is not a UTF-8 text file: byte 0, in line 1"),
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', r"1 texts \(1 row skipped, the first at line 2 \(it is not valid"),
        ("a.jsonl", b'{"prompt": "x"}\n', 'line 1 .it needs messages .* but has "prompt"'),
        ("a.jsonl", b"[1]\n", r"it is \[1\], not an object"),
        ("a.csv", b"a,b", "must be a .txt, .jsonl or .parquet file"),
        ("a.parquet", b"not parquet", "a.parquet cannot be read"),
    ],
)
def test_a_source_that_cannot_serve_is_named(
    name: str, content: bytes | None, said: str, tmp_path: Path, tokenizer: Any
) -> None:
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(HlwqError, match=said):
        load_samples(Calibration((str(file),), 4, 64), tokenizer)


def test_the_same_source_twice_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    file = str(write_text(tmp_path / "a.txt"))
    with pytest.raises(HlwqError, match="named twice"):
        load_samples(Calibration((file, file), 4, 64), tokenizer)


def test_a_chat_template_that_refuses_is_named(tmp_path: Path, tokenizer: Any) -> None:
    from copy import deepcopy

    strict = deepcopy(tokenizer)
    strict.chat_template = "{{ raise_exception('roles must alternate') }}"
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"messages": [{"role": "user", "content": "x"}]}))
    with pytest.raises(HlwqError, match="chat template refuses a chat: roles must alternate"):
        load_samples(Calibration((str(file),), 1, 4), strict)


def test_text_parts_and_odd_line_ends_inside_rows_are_read(tmp_path: Path, tokenizer: Any) -> None:
    file = tmp_path / "a.jsonl"
    parts = [{"type": "text", "text": "rain\u2028sea "}, {"type": "image"}, {"type": "text", "text": "town " * 40}]
    row = {"messages": [{"role": "user", "content": parts}]}
    file.write_text(json.dumps(row, ensure_ascii=False), encoding="utf-8")
    decoded = tokenizer.decode(load_samples(Calibration((str(file),), 1, 32), tokenizer).tokens[0])
    assert "rain\u2028sea" in decoded
    assert "town" in decoded


def test_without_a_network_fewer_samples_are_taken_if_the_embedded_texts_have_no_more(
    monkeypatch: pytest.MonkeyPatch, tokenizer: Any
) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    samples = load_samples(Calibration(), tokenizer)
    assert 100 < len(samples.tokens) < 512
    assert f"calibrating on {len(samples.tokens)} samples" in samples.warning


@pytest.mark.parametrize("name", ["samples", "sequence_length", "batch_size"])
def test_numbers_out_of_range_are_refused(name: str) -> None:
    with pytest.raises(HlwqError, match=f"`{name}` 0 must be at least 1") as refused:
        Calibration(**{name: 0})
    assert refused.value.argument == name
