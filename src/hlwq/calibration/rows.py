"""Rows of data sets as text: plain, or a chat as the model's template writes it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from hlwq.errors import RequestError, reason
from hlwq.transformers_models import render_chat

COLUMNS = ("messages", "conversations", "tools", "documents", "text", "content")
"""What is read of a row."""
ROLES = ("system", "developer", "user", "assistant", "model", "tool", "function", "ipython", "control")
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool"}
WITHOUT_CONTENT = ("tool_calls", "reasoning_content", "reasoning", "thinking")
"""Entries with one of which a message needs no content."""
MEDIA = re.compile("image|audio|video|file")
"""Parts of a message whose type or entries have such a name hold no text."""


class BadRow(Exception):
    """A row that cannot be calibrated on; the message says why."""


@dataclass(frozen=True)
class Chat:
    """A chat as templates take it.

    Attributes:
        messages: each with `role`, `content`, which is a string, and what else it came with.
        options: `tools` and `documents`, where the row has them.
    """

    messages: list[dict[str, Any]]
    options: dict[str, Any]


def read_row(row: Any) -> str | Chat:
    """The text or the chat in a row, which is an object with one of `COLUMNS`, or a string.

    Raises:
        BadRow: it holds neither, or something of a wrong type.
    """
    if isinstance(row, str):
        return check_text(row)
    if not isinstance(row, dict):
        raise BadRow(f"it is {_shown(row)}, not an object")
    if messages := row.get("messages") or row.get("conversations"):
        return _chat(messages, row)
    for key in ("text", "content"):
        if row.get(key) is not None:
            if not isinstance(row[key], str):
                raise BadRow(f"its {key} is {_shown(row[key])}, not a string")
            return check_text(row[key])
    if empty := next((key for key in COLUMNS if key in row), None):
        raise BadRow(f"its {empty} is empty")
    raise BadRow(f"it needs messages (or conversations) or text (or content), but has {_shown([*row])[1:-1] or 'none'}")


def text_of(document: str | Chat, tokenizer: Any) -> tuple[str, bool]:
    """The text of what `read_row` found, and whether a chat template wrote it.

    Raises:
        BadRow: the template refuses a chat, or leaves one of its messages out.
        CheckpointError: the template is not valid.
    """
    if isinstance(document, str):
        return document, False
    messages = document.messages
    if not getattr(tokenizer, "chat_template", None):
        return check_text("\n".join(message["content"] for message in messages)), False
    failure = ""
    for spelled in _spellings(messages):
        try:
            text = render_chat(tokenizer, spelled, **document.options)
        except RequestError as error:
            failure = failure or str(error)
            continue
        lost = next((each for each in messages if not _occurs(each["content"], text)), None)
        if lost is None:
            return check_text(text), True
        failure = failure or f"The model's chat template leaves out what {lost['role']} says"
    raise BadRow(failure)


def check_text(text: str) -> str:
    """The same text. Raises BadRow if it is empty, or has characters that no text has."""
    if not text.strip():
        raise BadRow("its text is empty")
    return _check_characters(text)


def _check_characters(text: str) -> str:
    if "\0" in text:
        raise BadRow("its text has a NUL character")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadRow("its text has a lone surrogate, which is half of a character") from None
    return text


def parse_json(text: str) -> Any:
    """The value of a JSON text. Raises BadRow if it is not valid, or cannot be held."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise BadRow(f"it is not valid JSON: {error.msg}, column {error.colno}") from None
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits, a thousand brackets
        raise BadRow(f"its JSON cannot be read: {reason(error)}") from None


def without_nulls(value: Any) -> Any:
    """A value of a table without what is not there: a table gives each object the entries of all others, as null."""
    if isinstance(value, dict):
        return {key: without_nulls(each) for key, each in value.items() if each is not None}
    return [without_nulls(each) for each in value] if isinstance(value, list) else value


def _chat(messages: Any, row: dict[str, Any]) -> Chat:
    if not isinstance(messages, list):
        raise BadRow(f"its chat is {_shown(messages)}, not a list of messages")
    read = []
    for number, message in enumerate(messages, 1):
        try:
            read.append(_message(message))
        except BadRow as error:
            raise BadRow(f"message {number}: {error}") from None
    if not any(message["content"].strip() for message in read):
        raise BadRow("the chat has no text")
    return Chat(read, {key: objects for key in ("tools", "documents") if (objects := _objects(row, key))})


def _message(message: Any) -> dict[str, Any]:
    """A message in the usual spelling, with its other entries.

    ShareGPT says `from` and `value`, and has calls of tools as messages; OpenAI's API had one call to a message.
    """
    if not isinstance(message, dict):
        raise BadRow(f"it is {_shown(message)}, not an object with role and content")
    read = {key: value for key, value in message.items() if key not in ("from", "value") and value is not None}
    role, content = message.get("role") or message.get("from"), read.get("content", message.get("value"))
    if role == "function_call":
        role, content, read["function_call"] = "assistant", "", content
    role = SHAREGPT_ROLES.get(role, role) if isinstance(role, str) else role
    if role not in ROLES:
        raise BadRow(f"its role is {_shown(role)}, none of {', '.join(ROLES)}")
    calls = _objects(read, "tool_calls") or _objects(read, "function_call")
    read = {key: value for key, value in read.items() if key not in ("tool_calls", "function_call")}
    if calls:
        read["tool_calls"] = [_call(call) for call in calls]
    if content is None and any(read.get(key) for key in WITHOUT_CONTENT):
        content = ""  # templates join strings
    return {**read, "role": role, "content": _content(content)}


def _content(content: Any) -> str:
    """The text of a message's content, whose parts become lines; pictures and sounds hold none."""
    if isinstance(content, str):
        return _check_characters(content)
    if not isinstance(content, list):
        raise BadRow(f"its content is {_shown(content)}, not text")
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, dict) else part
        if isinstance(text, str):
            texts.append(text)
        elif not (isinstance(part, dict) and MEDIA.search(" ".join([str(part.get("type")), *map(str, part)]))):
            raise BadRow(f"a part of its content is {_shown(part)}, which has no text")
    return _check_characters("\n".join(texts))


def _spellings(messages: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """The ways in which templates want messages: as they are, contents as parts, or arguments of calls as JSON."""
    yield messages
    yield [{**each, "content": [{"type": "text", "text": each["content"]}]} for each in messages]
    if any("tool_calls" in each for each in messages):
        yield [
            {**each, "tool_calls": [_with_json(call) for call in each["tool_calls"]]} if "tool_calls" in each else each
            for each in messages
        ]


def _with_json(call: dict[str, Any]) -> dict[str, Any]:
    arguments = call["function"].get("arguments")
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return {**call, "function": {**call["function"], "arguments": text}}


def _call(call: dict[str, Any]) -> dict[str, Any]:
    """A tool call whose arguments are an object, which most templates want; OpenAI's API gives them as JSON."""
    function = call.get("function", call)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadRow(f"a tool call is {_shown(call)}, which names no function")
    if isinstance(function.get("arguments"), str):
        with suppress(BadRow):
            if isinstance(arguments := parse_json(function["arguments"]), dict):
                function = {**function, "arguments": arguments}
    return {"type": "function", **(call if "function" in call else {}), "function": function}


def _objects(row: dict[str, Any], key: str) -> list[dict[str, Any]]:
    """A list of objects in a row, where it may stand as JSON, or one alone; empty where there is none."""
    value = row.get(key)
    if isinstance(value, str) and value.strip():
        try:
            value = parse_json(value)
        except BadRow as error:
            raise BadRow(f"its {key}: {error}") from None
    if not value:
        return []
    value = [value] if isinstance(value, dict) else value
    if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
        raise BadRow(f"its {key} is {_shown(value)}, not a list of objects")
    return value


def _occurs(content: str, text: str) -> bool:
    """Whether a template wrote a message's content, in whole or without the thoughts before it.

    Templates trim and escape contents, so what is looked for is the longest word.
    """
    said = content.rpartition("</think>")[2].strip()
    return max(re.findall(r"\w+", said), key=len, default=said) in text


def _shown(value: Any) -> str:
    """A value as JSON, shortened, for a message."""
    try:
        text = json.dumps(value)
    except (TypeError, ValueError, RecursionError):  # of a table, such as a date; or too large or deep
        return f"a value of type {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:59]}…"
