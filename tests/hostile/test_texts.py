"""Calibration data as users have them: chats with tools, damaged rows, files that are no text."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_templates import (
    ARGUMENTS_AS_JSON,
    ARGUMENTS_AS_OBJECTS,
    JOINS_STRINGS,
    PARTS_ONLY,
    RESULTS_AS_JSON,
    TOOLS_AND_THOUGHTS,
)
from hypothesis import given
from hypothesis import strategies as st

from hlwq import HlwqError, quantize
from hlwq.calibration import Calibration, load_samples
from hlwq.calibration.rows import BadRow, read_row, text_of
from hlwq.demo import bundled_model
from hlwq.errors import CheckpointError, HlwqWarning, RequestError, reason
from hlwq.transformers_models import load_tokenizer

TOOL = {
    "type": "function",
    "function": {"name": "forecast", "parameters": {"properties": {"town": {"type": "string"}}}},
}
ASKED = {"role": "user", "content": "Will it rain in Vienna?"}
CALLED = {"name": "forecast", "arguments": {"town": "Vienna", "days": 3}}
RESULT = {"role": "tool", "content": '{"sky": "overcast",\n"mm": 12}'}
ANSWER = {"role": "assistant", "content": "Yes, twelve millimetres."}
WORDS = ["role", "content", "from", "value", "type", "text", "image", "tool_calls", "function", "name", "arguments"]
GOOD = {"messages": [{"role": "user", "content": "What is rain?"}, {"role": "assistant", "content": "Water. " * 30}]}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(bundled_model())


def with_template(tokenizer: Any, template: Any) -> Any:
    other = deepcopy(tokenizer)
    other.chat_template = template
    return other


def write(file: Path, *rows: Any) -> str:
    """Write rows as lines: bytes and strings as they are, anything else as JSON."""
    lines = [row.encode("utf-8", "surrogatepass") if isinstance(row, str) else row for row in map(as_line, rows)]
    file.write_bytes(b"\n".join(lines))
    return str(file)


def as_line(row: Any) -> str | bytes:
    return row if isinstance(row, str | bytes) else json.dumps(row)


def first_text(source: str, tokenizer: Any) -> str:
    """All that is calibrated on of a file with one row, or with the same row several times."""
    with pytest.raises(HlwqError) as refused:
        load_samples(Calibration((source,), 1, 10**6), tokenizer)
    tokens = int(str(refused.value).split(" has ")[1].split(" tokens")[0].replace(",", ""))
    text: str = tokenizer.decode(load_samples(Calibration((source,), 1, tokens), tokenizer).tokens[0])
    return text


def tool_chat(call: Any, **row: Any) -> dict[str, Any]:
    calling = call if isinstance(call, dict) else {"content": None, "tool_calls": call}
    asking = {"role": "assistant", "reasoning_content": "Ask the forecast.", **calling}
    return {"messages": [ASKED, asking, RESULT, ANSWER], "tools": [TOOL], **row}


CALLS = {
    "objects": [{"id": "1", "type": "function", "function": CALLED}],
    "arguments as JSON": [{"function": {**CALLED, "arguments": json.dumps(CALLED["arguments"])}}],
    "without function": [CALLED],
    "calls as JSON": json.dumps([{"function": CALLED}]),
    "one call": {"content": None, "function_call": {**CALLED, "arguments": json.dumps(CALLED["arguments"])}},
    "a call as a message": {"role": None, "from": "function_call", "value": json.dumps(CALLED)},
}


@pytest.mark.parametrize("call", CALLS)
def test_tools_their_calls_and_thoughts_reach_the_model(call: str, tmp_path: Path, tokenizer: Any) -> None:
    source = write(tmp_path / "a.jsonl", tool_chat(CALLS[call]))
    text = first_text(source, with_template(tokenizer, TOOLS_AND_THOUGHTS))
    for wanted in (
        '"name": "forecast", "parameters": {"properties"',
        "<think>\nAsk the forecast.\n</think>",
        '<tool_call>\n{"name": "forecast", "arguments": {"town": "Vienna", "days": 3}}\n</tool_call>',
        '<tool_response>\n{"sky": "overcast",\n"mm": 12}\n</tool_response>',
        "Yes, twelve millimetres.",
    ):
        assert wanted in text


@pytest.mark.parametrize("call", CALLS)
def test_arguments_are_as_templates_want_them(call: str, tmp_path: Path, tokenizer: Any) -> None:
    source = write(tmp_path / "a.jsonl", tool_chat(CALLS[call]))
    text = first_text(source, with_template(tokenizer, ARGUMENTS_AS_OBJECTS))
    assert "<function=forecast><parameter=town>Vienna<parameter=days>3" in text
    text = first_text(source, with_template(tokenizer, ARGUMENTS_AS_JSON))
    assert 'forecast\n{"town": "Vienna", "days": 3}<' in text
    text = first_text(source, with_template(tokenizer, RESULTS_AS_JSON))
    assert '"arguments": {"town": "Vienna", "days": 3}' in text
    assert r"\"sky\": \"overcast\",\n\"mm\"" in text  # written otherwise than it came, and not left out


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL])])
@pytest.mark.parametrize("key", ["messages", "conversations"])
def test_tools_are_lists_or_json(tools: Any, key: str, tmp_path: Path, tokenizer: Any) -> None:
    chat = (
        [ASKED, ANSWER] if key == "messages" else [{"from": "human", "value": "Rain?"}, {"from": "gpt", "value": "Yes"}]
    )
    text = first_text(
        write(tmp_path / "a.jsonl", {key: chat, "tools": tools}), with_template(tokenizer, TOOLS_AND_THOUGHTS)
    )
    assert '<tools>\n{"type": "function", "function": {"name": "forecast"' in text


def test_documents_reach_the_template(tmp_path: Path, tokenizer: Any) -> None:
    template = "{% for each in documents or [] %}{{ each.text }}\n{% endfor %}" + JOINS_STRINGS
    row = {"messages": [ASKED, ANSWER], "documents": [{"title": "t", "text": "It rains."}]}
    assert "It rains." in first_text(write(tmp_path / "a.jsonl", row), with_template(tokenizer, template))


def test_other_entries_of_a_message_are_kept(tmp_path: Path, tokenizer: Any) -> None:
    template = JOINS_STRINGS.replace("message['content']", "message['content'] + (message.name or '')")
    row = {"messages": [{**ASKED, "name": "Ada"}, {**ANSWER, "name": None}]}
    text = first_text(write(tmp_path / "a.jsonl", row), with_template(tokenizer, template))
    assert "Vienna?Ada<" in text
    assert "None" not in text


def test_tables_with_tools_read_as_lines_do(tmp_path: Path, tokenizer: Any) -> None:
    """A table gives every object the entries of all others, which templates would write as null."""
    datasets = pytest.importorskip("datasets")
    other = {
        "type": "function",
        "function": {"name": "clock", "parameters": {"properties": {"zone": {"type": "string"}}}},
    }
    rows = [tool_chat(CALLS["objects"]), {"messages": [ASKED, ANSWER], "tools": [other]}]
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "a.parquet"))
    tools = with_template(tokenizer, TOOLS_AND_THOUGHTS)
    text = first_text(str(tmp_path / "a.parquet"), tools)
    assert "null" not in text
    assert '{"properties": {"zone": {"type": "string"}}}' in text
    assert '{"town": "Vienna", "days": 3}' in text


PARTS = {
    "text": [{"type": "text", "text": "Will it "}, {"type": "text", "text": "rain?"}],
    "no type": [{"text": "Will it"}, {"text": "rain?"}],
    "input_text": [{"type": "input_text", "text": "Will it"}, {"type": "input_text", "text": "rain?"}],
    "output_text": [{"type": "output_text", "text": "Will it rain?", "annotations": []}],
    "strings": ["Will it", "rain?"],
    "mixed": ["Will it", {"type": "text", "text": "rain?"}],
    "an image before": [{"type": "image"}, {"type": "text", "text": "Will it rain?"}],
    "an image's address": [{"text": "Will it rain?"}, {"type": "image_url", "image_url": {"url": "https://x.invalid"}}],
    "an image without type": [{"image": "a.png"}, {"text": "Will it rain?"}],
    "sound and video": [{"type": "input_audio"}, {"type": "video", "text": None}, {"text": "Will it rain?"}],
    "cached": [{"type": "text", "text": "Will it rain?", "cache_control": {"type": "ephemeral"}}],
}


@pytest.mark.parametrize("template", [JOINS_STRINGS, TOOLS_AND_THOUGHTS, PARTS_ONLY, RESULTS_AS_JSON])
@pytest.mark.parametrize("parts", PARTS)
def test_parts_of_every_kind_keep_their_text(parts: str, template: str, tmp_path: Path, tokenizer: Any) -> None:
    row = {"messages": [{"role": "user", "content": PARTS[parts]}, ANSWER]}
    text = first_text(write(tmp_path / "a.jsonl", row), with_template(tokenizer, template))
    assert " ".join(text.split()).count("Will it rain?") == 1
    assert "Yes, twelve millimetres." in text


def test_a_plain_chat_suits_a_template_that_wants_parts(tmp_path: Path, tokenizer: Any) -> None:
    text = first_text(write(tmp_path / "a.jsonl", GOOD), with_template(tokenizer, PARTS_ONLY))
    assert "What is rain?<|im_end|>" in text


def chat(content: Any, role: Any = "user") -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content}]}


def calling(calls: Any) -> dict[str, Any]:
    return {"messages": [ASKED, {"role": "assistant", "content": "", "tool_calls": calls}]}


BAD_ROWS: dict[str, tuple[Any, str]] = {
    "no JSON": ("{oops", "not valid JSON"),
    "cut off": (json.dumps(GOOD)[:50], "not valid JSON: Unterminated string"),
    "two on a line": (json.dumps(GOOD) * 2, "not valid JSON: Extra data"),
    "a bare tab": ('{"text": "a\tb"}', "not valid JSON: Invalid control character"),
    "a number": (3, "it is 3, not an object"),
    "null": (None, "it is null, not an object"),
    "a list": ([1], r"it is \[1\], not an object"),
    "an empty string": ('""', "its text is empty"),
    "no entries": ({}, "needs messages .* but has none"),
    "other entries": ({"prompt": "x"}, 'needs messages .* but has "prompt"'),
    "null text": ({"text": None}, "its text is empty"),
    "a number for text": ({"text": 3}, "its text is 3, not a string"),
    "NaN": ('{"text": NaN}', "its text is NaN, not a string"),
    "a list for text": ({"text": ["a"]}, "not a string"),
    "blank text": ({"text": " \n"}, "its text is empty"),
    "a long integer": ('{"text": ' + "1" * 400 + "}", "its text is 111"),
    "a huge integer": ('{"text": ' + "1" * 5000 + "}", "its JSON cannot be read: Exceeds the limit"),
    "deep": ('{"text": ' + "[" * 100_000, "its JSON cannot be read: maximum recursion depth"),
    "deep messages": ('{"messages": ' + "[" * 500 + "]" * 500 + "}", "message 1: it is .*, not an object"),
    "deep tools": (
        '{"messages": [{"role": "user", "content": "x"}], "tools": [{"a": ' + "[" * 500 + "]" * 500 + "}]}",
        "template refuses a chat: maximum recursion depth",
    ),
    "a lone surrogate": ('{"text": "a\\ud800b"}', "lone surrogate"),
    "a lone surrogate in a chat": (chat("a\ud800b"), "message 1: its text has a lone surrogate"),
    "a lone surrogate in tools": ({**chat("x"), "tools": [{"name": "\ud800"}]}, "lone surrogate"),
    "NUL": ('{"text": "a\\u0000b"}', "NUL character"),
    "NUL in a chat": (chat("a\0b"), "message 1: its text has a NUL character"),
    "latin-1": ('{"text": "café"}'.encode("latin-1"), "its byte 13 is not UTF-8"),
    "UTF-16": ('{"text": "x"}'.encode("utf-16"), "its byte 0 is not UTF-8"),
    "messages a string": ({"messages": "hello"}, 'its chat is "hello", not a list'),
    "messages an object": ({"messages": {"role": "user"}}, "not a list of messages"),
    "no messages": ({"messages": []}, "its messages is empty"),
    "a null message": ({"messages": [ASKED, None]}, "message 2: it is null, not an object"),
    "a list for a message": ({"conversations": [["a", "b"]]}, r'message 1: it is \["a", "b"\], not an object'),
    "no role": ({"messages": [{"content": "x"}]}, "message 1: its role is null"),
    "a number for a role": (chat("x", 3), "its role is 3, none of system"),
    "a list for a role": (chat("x", ["user"]), r'its role is \["user"\], none of'),
    "unknown role": (chat("x", "wizard"), 'its role is "wizard", none of'),
    "no content": ({"messages": [{"role": "user"}]}, "its content is null, not text"),
    "null content": (chat(None), "its content is null, not text"),
    "a number for content": (chat(3), "its content is 3, not text"),
    "true for content": (chat(True), "its content is true, not text"),
    "an object for content": (chat({"a": 1}), "its content is .*, not text"),
    "an empty chat": (chat(""), "the chat has no text"),
    "no parts": (chat([]), "the chat has no text"),
    "only an image": (chat([{"type": "image"}]), "the chat has no text"),
    "empty parts": (chat([{"type": "text", "text": ""}]), "the chat has no text"),
    "a number for a part": (chat([3]), "a part of its content is 3, which has no text"),
    "a part with a number": (chat([{"type": "text", "text": 3}]), "which has no text"),
    "a part without text": (chat([{"type": "text"}]), "which has no text"),
    "a part of another kind": (chat([{"type": "thinking", "thinking": "x"}]), "which has no text"),
    "a part with value": (chat([{"value": "x"}]), "which has no text"),
    "ShareGPT with a number": ({"conversations": [{"from": "human", "value": 3}]}, "its content is 3, not text"),
    "tools no JSON": ({**chat("x"), "tools": "nope"}, "its tools: it is not valid JSON"),
    "a number for tools": ({**chat("x"), "tools": 3}, "its tools is 3, not a list of objects"),
    "numbers for tools": ({**chat("x"), "tools": [1]}, "not a list of objects"),
    "strings for documents": ({**chat("x"), "documents": ["a"]}, "its documents is .*, not a list of objects"),
    "a number for calls": (calling(3), "message 2: its tool_calls is 3, not a list of objects"),
    "a number for a function": (calling([{"function": 3}]), "which names no function"),
    "a function without name": (calling([{"function": {"arguments": {}}}]), "which names no function"),
}


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_a_bad_row_is_skipped_and_told_of(kind: str, tmp_path: Path, tokenizer: Any) -> None:
    row, said = BAD_ROWS[kind]
    tokenizer = with_template(tokenizer, TOOLS_AND_THOUGHTS)
    mixed = write(tmp_path / "a.jsonl", GOOD, row, GOOD)
    good = write(tmp_path / "b.jsonl", GOOD, GOOD)
    # More than the beginnings of both good rows, so that the row between them is tried.
    samples, clean = (load_samples(Calibration((source,), 3, 64), tokenizer) for source in (mixed, good))
    assert torch.equal(samples.tokens, clean.tokens)
    assert clean.warning == ""
    assert "a.jsonl: 1 row skipped, the first at line 2 (" in samples.warning
    assert len(samples.warning.splitlines()) == 1
    with pytest.raises(
        RequestError, match=f"nothing to calibrate on: 2 rows skipped, the first at line 1 .*{said}"
    ) as all_bad:
        load_samples(Calibration((write(tmp_path / "c.jsonl", row, row),), 2, 64), tokenizer)
    assert len(str(all_bad.value).splitlines()) == 1
    str(all_bad.value).encode()  # it can be printed


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=8),
    lambda inside: st.lists(inside, max_size=3) | st.dictionaries(st.sampled_from(WORDS), inside, max_size=4),
    max_leaves=12,
)
MESSAGE = st.dictionaries(st.sampled_from(WORDS), JSON | st.sampled_from(["user", "tool", "human"]), max_size=5)
ROW = (
    st.fixed_dictionaries({}, optional={"messages": st.lists(MESSAGE, max_size=3), "tools": JSON, "text": JSON}) | JSON
)


@given(ROW)
def test_any_json_is_a_text_or_a_bad_row(tokenizer: Any, row: Any) -> None:
    for template in (TOOLS_AND_THOUGHTS, PARTS_ONLY):
        with suppress(BadRow):
            text, _ = text_of(read_row(row), with_template(tokenizer, template))
            assert text.strip()
            text.encode()


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ raise_exception('roles must alternate') }}", "refuses a chat: roles must alternate"),
        ("{{ messages[0].nothing.at.all }}", "refuses a chat: .* has no attribute 'nothing'"),
        ("{{ 1 // 0 }}", "refuses a chat: .*by zero"),
        ("{% for each in range(10 ** 9) %}x{% endfor %}", "refuses a chat: Range too big"),
        ("{{ ''.__class__.__mro__ }}", "refuses a chat: access to attribute '__class__'"),
        ("{{ cycler.__init__.__globals__.os.system('touch evil') }}", "refuses a chat: access to attribute '__init__'"),
        ("{{ messages.append(1) }}", "refuses a chat: .*append"),
        ("nothing of the chat", "leaves out what user says"),
        ("{{ messages[0].content }}", "leaves out what assistant says"),
        ({"other": "x"}, "refuses a chat: .*no default"),
    ],
)
def test_a_template_that_refuses_or_leaves_out_is_named(
    template: Any, said: str, tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = write(tmp_path / "a.jsonl", GOOD, GOOD)
    with pytest.raises(RequestError, match=f"2 rows skipped, the first at line 1 .*({said})"):
        load_samples(Calibration((source,), 1, 32), with_template(tokenizer, template))
    assert not Path("evil").exists()


@pytest.mark.parametrize("template", ["{% for", "{{ nope", "{{ x | nope }}", "{% endfor %}", "{% nope %}"])
def test_a_template_that_is_not_valid_ends_the_run(template: str, tmp_path: Path, tokenizer: Any) -> None:
    source = write(tmp_path / "a.jsonl", GOOD, GOOD)
    with pytest.raises(
        CheckpointError, match=r"chat template is not valid \(line 1: .*\)\. Copy the original's"
    ) as refused:
        load_samples(Calibration((source,), 1, 32), with_template(tokenizer, template))
    assert len(str(refused.value).splitlines()) == 1


def test_a_chat_without_a_template_is_its_contents(tmp_path: Path, tokenizer: Any) -> None:
    text = first_text(write(tmp_path / "a.jsonl", tool_chat(CALLS["objects"])), with_template(tokenizer, None))
    assert text.startswith("Will it rain in Vienna?\n")
    assert text.endswith("Yes, twelve millimetres.")


@pytest.mark.parametrize("role", ["system", "developer", "tool"])
def test_a_turn_that_the_template_leaves_out_is_no_data(role: str, tmp_path: Path, tokenizer: Any) -> None:
    """Qwen3's template knows no developer, and writes nothing for one."""
    row = {"messages": [{"role": role, "content": "Zanzibar."}, ASKED, ANSWER]}
    source, tools = write(tmp_path / "a.jsonl", row), with_template(tokenizer, TOOLS_AND_THOUGHTS)
    if role == "developer":
        with pytest.raises(RequestError, match="leaves out what developer says"):
            load_samples(Calibration((source,), 1, 8), tools)
        assert "Zanzibar." in first_text(source, with_template(tokenizer, JOINS_STRINGS))
    else:
        assert "Zanzibar." in first_text(source, tools)


def test_thoughts_that_a_template_drops_are_no_loss(tmp_path: Path, tokenizer: Any) -> None:
    thinking = {"role": "assistant", "content": "<think>\nextraordinarily\n</think>\n\nYes."}
    row = {"messages": [ASKED, thinking, ASKED, ANSWER]}
    text = first_text(write(tmp_path / "a.jsonl", row), with_template(tokenizer, TOOLS_AND_THOUGHTS))
    assert "extraordinarily" not in text
    assert "Yes.<|im_end|>" in text


def test_the_first_of_many_bad_rows_is_told(tmp_path: Path, tokenizer: Any) -> None:
    rows = [GOOD, GOOD, "", {"text": 3}, GOOD, None, "{"]
    samples = load_samples(Calibration((write(tmp_path / "a.jsonl", *rows),), 1, 64), tokenizer)
    assert samples.warning.endswith("a.jsonl: 3 rows skipped, the first at line 4 (its text is 3, not a string).")


def test_each_source_tells_of_its_own(tmp_path: Path, tokenizer: Any) -> None:
    sources = tuple(write(tmp_path / f"{name}.jsonl", GOOD, None) for name in "ab")
    warning = load_samples(Calibration(sources, 2, 32), tokenizer).warning
    assert warning.count("1 row skipped") == 2


def test_rows_of_a_table_are_told_by_number(tmp_path: Path, tokenizer: Any) -> None:
    datasets = pytest.importorskip("datasets")
    texts = ["Water that falls. " * 20, None, "", "a\0b", "Rain on the land. " * 20]
    datasets.Dataset.from_list([{"text": text} for text in texts]).to_parquet(str(tmp_path / "a.parquet"))
    samples = load_samples(Calibration((str(tmp_path / "a.parquet"),), 3, 32), tokenizer)
    assert samples.warning.endswith("a.parquet: 3 rows skipped, the first at row 2 (its text is empty).")


def test_a_string_of_a_table_that_is_not_text_is_skipped(tmp_path: Path, tokenizer: Any) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    texts = [b"Water that falls. " * 20, b"caf\xe9", b"Rain on the land. " * 20]
    strings = arrow.array(texts, arrow.binary()).view(arrow.string())
    parquet.write_table(arrow.table({"text": strings}), tmp_path / "a.parquet")
    samples = load_samples(Calibration((str(tmp_path / "a.parquet"),), 3, 32), tokenizer)
    assert "1 row skipped, the first at row 2 (it cannot be read: 'utf-8' codec" in samples.warning


def test_what_was_skipped_is_told_once_before_the_work(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", *[GOOD, None] * 9)
    with pytest.warns(HlwqWarning) as warned:
        quantize(bundled_model(), tmp_path / "out", "gptq", calibration=source, samples=2, sequence_length=16)
    told = [str(each.message) for each in warned if "skipped" in str(each.message)]
    assert told == [f"{source}: 9 rows skipped, the first at line 2 (it is null, not an object)."]
    source = write(tmp_path / "b.jsonl", *[None] * 9)
    with pytest.raises(RequestError, match="9 rows skipped, the first at line 1") as refused:
        quantize(bundled_model(), tmp_path / "other", "gptq", calibration=source, samples=2, sequence_length=16)
    assert refused.value.argument == "sources"
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"prompt": ["a"], "answer": ["b"]}, "rows need messages .* but have prompt, answer"),
        ({"text": [1, 2]}, "2 rows skipped, the first at row 1 .its text is 1, not a string"),
        ({"messages": ["a", "b"]}, "2 rows skipped, the first at row 1 .its chat is"),
        ({"text": []}, "no data"),
    ],
)
def test_a_table_without_texts_is_refused(columns: dict[str, Any], said: str, tmp_path: Path, tokenizer: Any) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict(columns).to_parquet(str(tmp_path / "a.parquet"))
    with pytest.raises(RequestError, match=said):
        load_samples(Calibration((str(tmp_path / "a.parquet"),), 1, 8), tokenizer)


MARK = "\ufeff".encode()
TEXT = "Rain fell on the land,\r\nand on the sea. \u2028 It was wet.\n" * 40
ROWS = "".join(json.dumps({"text": f"Rain fell, {number} times. " * 9}) + "\n" for number in range(9))


@pytest.mark.parametrize(("name", "text"), [("a.txt", TEXT), ("a.jsonl", ROWS)])
@pytest.mark.parametrize(
    "spelled",
    [
        lambda data: MARK + data,
        lambda data: data.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n"),
        lambda data: MARK + data.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n"),
    ],
    ids=["byte-order mark", "CRLF", "both"],
)
def test_marks_and_line_ends_change_nothing(
    name: str, text: str, spelled: Callable[[bytes], bytes], tmp_path: Path, tokenizer: Any
) -> None:
    found = []
    for data in (text.encode(), spelled(text.encode())):
        (tmp_path / name).write_bytes(data)
        samples = load_samples(Calibration((str(tmp_path / name),), 3, 32), tokenizer)
        assert samples.warning == ""
        found.append(samples.tokens)
    assert torch.equal(*found)


def test_files_joined_with_their_marks_are_read(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "a.jsonl").write_bytes(MARK + ROWS.encode() + MARK + ROWS.encode() + MARK)
    assert load_samples(Calibration((str(tmp_path / "a.jsonl"),), 3, 32), tokenizer).warning == ""


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "A.TXT", "b.JsonL"])
def test_the_home_directory_is_expanded(
    name: str, tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / name).write_text(TEXT if name.lower().endswith("txt") else ROWS)
    assert load_samples(Calibration((f"~/{name}",), 3, 32), tokenizer).origin["sources"][0]["source"] == name


def a_pipe(file: Path) -> None:
    os.mkfifo(file)


def a_link_to_a_device(file: Path) -> None:
    file.symlink_to("/dev/zero")


def a_link_to_nowhere(file: Path) -> None:
    file.symlink_to("nowhere")


def a_link_to_itself(file: Path) -> None:
    file.symlink_to(file.name)


def holding(data: bytes) -> Callable[[Path], Any]:
    return lambda file: file.write_bytes(data)


FILES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "absent": (lambda file: None, "does not exist"),
    "a directory": (Path.mkdir, "is a directory, not a file"),
    "a pipe": (a_pipe, "is a pipe or a device, not a file"),
    "a device": (a_link_to_a_device, "is a pipe or a device, not a file"),
    "a dangling link": (a_link_to_nowhere, "does not exist"),
    "a link to itself": (a_link_to_itself, "cannot be read: .*symbolic links"),
    "empty": (holding(b""), "is empty"),
    "blank": (holding(b" \n\n\t\n"), "is empty"),
    "only a mark": (holding(MARK), "is empty"),
    "latin-1": (holding("Rain\ncafé".encode("latin-1")), "byte 8, in line 2|its byte 3 is not UTF-8|not valid JSON"),
    "latin-1 after a mark": (holding(MARK + b"Rain\n\xe9"), "byte 8, in line 2|line 1 "),
    "UTF-16": (holding("Rain".encode("utf-16")), "byte 0, in line 1|its byte 0 is not UTF-8"),
    "NUL": (holding(b"Rain\na\0b"), "line 2 has a NUL|line 1 .it is not valid JSON"),
    "binary": (holding(bytes(range(256)) * 9), "is not a|not valid JSON|not UTF-8"),
}


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
@pytest.mark.parametrize("kind", FILES)
def test_a_file_that_is_no_text_is_one_line(kind: str, name: str, tmp_path: Path, tokenizer: Any) -> None:
    make, said = FILES[kind]
    make(tmp_path / name)
    with pytest.raises(RequestError, match=said) as refused:
        load_samples(Calibration((str(tmp_path / name),), 1, 8), tokenizer)
    assert name in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize("source", ["~nobody-of-this-name/a.txt", "a" * 300 + ".txt", "a\0.txt", "a.txt/b.txt"])
def test_a_name_that_no_file_has_is_one_line(
    source: str, tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("x")
    with pytest.raises(RequestError, match="cannot be read"):
        load_samples(Calibration((source,), 1, 8), tokenizer)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(), "OSError"),
        (ValueError("  \n\n first. \n second"), "first"),
        (Exception("..."), "Exception"),
        (KeyError("x"), "'x'"),
        (RuntimeError("\n"), "RuntimeError"),
    ],
)
def test_every_error_has_a_reason(error: Exception, said: str) -> None:
    assert reason(error) == said
