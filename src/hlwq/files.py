"""Files and directories: JSON, hashes, space on the disk, durability."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from hlwq.errors import CheckpointError, RequestError, ResourceError


def read_json(file: Path) -> dict[str, Any]:
    """Parse a JSON file that holds an object.

    Raises:
        CheckpointError: it is missing, or not such a file.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing. Is {file.parent} a model directory?", path=file) from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{file} is not valid JSON ({error}). Download it again.", path=file) from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} does not hold a JSON object. Download it again.", path=file)
    return value


def write_json(file: Path, value: dict[str, Any]) -> None:
    """Write indented UTF-8 JSON, as the hub's own files are, durably, and whole or not at all."""
    partial = file.with_name(file.name + ".tmp")
    with partial.open("w", encoding="utf-8") as stream:
        stream.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(file)


def sync(path: Path) -> None:
    """Force a file's contents, or a directory's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def refuse_unless_empty(out: Path) -> None:
    """Raise RequestError if `out` exists and is anything but an empty directory."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        message = f"{out} is not empty. Choose another output directory or delete this one."
        raise RequestError(message, argument="out", path=out)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep other processes from making `path`, by a lock file beside it that the system frees when this one dies.

    Args:
        path: what is made. The lock's file is called `PATH.lock`, and is removed at the end.

    Raises:
        ResourceError: another process makes it now, or the lock's file cannot be written.
    """
    file = path.with_name(path.name + ".lock")
    lock = FileLock(file, blocking=False)
    try:
        lock.acquire()
    except Timeout:
        message = f"{path} is being made by another process. Wait for it, or choose another directory."
        raise ResourceError(message, path=path) from None
    except OSError as error:
        raise ResourceError(f"{file} cannot be written: {error.strerror}.", path=file) from None
    try:
        yield
    finally:
        # Removed while it is held: a process that opened it before sees that it is gone, and makes a new one.
        file.unlink(missing_ok=True)
        lock.release()


def check_disk(directory: Path, needed: int) -> None:
    """Raise ResourceError if the file system of `directory` has fewer than `needed` bytes free."""
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise ResourceError(
            f"{directory} has {free / 1e9:.2f} GB free, but the output needs {needed / 1e9:.2f} GB. "
            "Free some space or choose another disk.",
            path=directory,
        )


def hash_file(file: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def first_difference(before: Any, now: Any, where: str = "") -> str:
    """The first place where two JSON values differ, in words; empty if they are equal."""
    if before == now:
        return ""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted(before.keys() | now.keys()):
            if difference := first_difference(before.get(key), now.get(key), f"{where}.{key}" if where else key):
                return difference
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for index, (old, new) in enumerate(zip(before, now, strict=True)):
            if difference := first_difference(old, new, f"{where}[{index}]"):
                return difference
    old, new = ("not set" if each is None else json.dumps(each, ensure_ascii=False) for each in (before, now))
    return f"{where} was {old}, now it is {new}"


@contextmanager
def disk_errors(directory: Path) -> Iterator[None]:
    """Turn the errors of a full disk into a ResourceError that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise ResourceError(
                f"The disk of {directory} is full. Free some space and run the same command again: "
                "it goes on where it stopped.",
                path=directory,
            ) from error
        raise
