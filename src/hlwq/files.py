"""Files and directories: JSON, hashes, space on the disk, durability."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryFile
from textwrap import shorten
from typing import Any

from filelock import FileLock, Timeout

from hlwq.errors import CheckpointError, RequestError, ResourceError, reason

MOST_JSON_BYTES, MOST_JSON_NESTING = 1 << 27, 50
"""The index of the largest models has some ten megabytes."""
LFS_BEGINNING = b"version https://git-lfs.github.com/spec/v1"
LONGEST_NAME = 255
"""Bytes in the name of a file."""


def read_json(file: Path) -> dict[str, Any]:
    """Parse a JSON file that holds an object.

    Raises:
        CheckpointError: it is missing, or not such a file, or larger or deeper nested than any that is meant so.
    """
    if not os.path.lexists(file):
        raise CheckpointError(f"{file} is missing. Is {file.parent} a model directory?", path=file)
    check_file(file)
    if (size := file.stat().st_size) > MOST_JSON_BYTES:
        raise CheckpointError(f"{file} has {size:,} bytes, which no such file needs. Download it again.", path=file)
    try:
        value = json.loads(file.read_bytes().decode("utf-8"))
        _check_plain(value)
    except (ValueError, RecursionError) as error:  # of the encoding, of JSON, of a number without end
        raise CheckpointError(f"{file} is not valid JSON ({reason(error)}). Download it again.", path=file) from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} does not hold a JSON object. Download it again.", path=file)
    return value


def exists(path: Path) -> bool:
    """Whether something is there that can be seen. Python before 3.14 raises where the way to it is closed."""
    return os.path.exists(path)  # noqa: PTH110


def is_file(path: Path) -> bool:
    """Whether a regular file is there that can be seen; see `exists`."""
    return os.path.isfile(path)  # noqa: PTH113


def is_folder(path: Path) -> bool:
    """Whether a directory is there that can be seen; see `exists`."""
    return os.path.isdir(path)  # noqa: PTH112


def check_file(file: Path) -> None:
    """Raise CheckpointError unless a file can be read: there, a regular file, and not a placeholder of Git LFS.

    Reading anything else, such as a pipe, may never end.
    """
    try:
        regular = stat.S_ISREG(file.stat().st_mode)
        if regular:
            file.open("rb").close()
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}.", path=file) from None
    if not regular:
        raise CheckpointError(f"{file} is not a regular file.", path=file)
    if lfs_pointer(file):
        message = f"{file} is a placeholder of Git LFS, not the file. Run `git lfs pull` in {file.parent}."
        raise CheckpointError(message, path=file)


def _check_plain(value: Any) -> None:
    """Raise ValueError unless a JSON value can be handled by all that may come after: copied, compared, written."""
    level, nesting = [value], 0
    while level:
        if nesting > MOST_JSON_NESTING:
            raise ValueError(f"it is nested more than {MOST_JSON_NESTING} deep")
        inner: list[Any] = []
        for each in level:
            if isinstance(each, dict):
                inner += [*each, *each.values()]
            elif isinstance(each, list):
                inner += each
            elif isinstance(each, str) and not each.isascii():
                each.encode()  # no half of a surrogate pair, which could not be written again
        level, nesting = inner, nesting + 1


def write_json(file: Path, value: dict[str, Any]) -> None:
    """Write indented UTF-8 JSON, as the hub's own files are, durably, and whole or not at all."""
    _write(file, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def write_whole(file: Path, contents: bytes) -> None:
    """Write a file that a user named, durably, and whole or not at all.

    Raises:
        ResourceError: it cannot be written.
    """
    try:
        _write(file, contents)
    except OSError as error:
        raise ResourceError(f"{file} cannot be written: {error.strerror}. Name another place.", path=file) from None


def _write(file: Path, contents: bytes) -> None:
    partial = file.with_name(file.name + ".tmp")
    with partial.open("wb") as stream:
        stream.write(contents)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(file)


def cache_folder() -> Path:
    """The folder of what hlwq keeps between runs, in the cache of Hugging Face's libraries. It may not exist.

    Raises:
        ResourceError: this user has no home directory, and `HF_HOME` names no other place.
    """
    try:
        place = Path(os.environ.get("HF_HOME") or "~/.cache/huggingface").expanduser()
    except RuntimeError:
        raise ResourceError("There is no home directory for the cache. Set HF_HOME to a folder.") from None
    return place / "hlwq"


def sync(path: Path) -> None:
    """Force a file's contents, or a directory's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def expanded(path: str | Path) -> Path:
    """A path that a user gave, with `~` and `~name` followed; where there is no such user, as it is."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def resolve_output(out: Path) -> Path:
    """Where a directory called `out` will lie: `~` and symbolic links followed, also one that leads nowhere yet.

    Raises:
        RequestError: nothing can be put there: it is a mount point or the current directory, which cannot be replaced,
            or the directory above cannot be written.
    """
    try:
        path = Path(os.path.realpath(out.expanduser()))
    except (OSError, RuntimeError, ValueError) as error:  # no such user, or a name that no file can have
        raise RequestError(f"{out} cannot be made: {error}.", argument="out", path=out) from None
    if os.path.ismount(path):
        message = f"{out} is a mount point, which cannot be replaced. Name a directory inside it."
        raise RequestError(message, argument="out", path=out)
    if path == Path.cwd():
        message = f"{out} is the current directory, which cannot be replaced. Name a directory inside it."
        raise RequestError(message, argument="out", path=out)
    above = next(each for each in path.parents if os.path.lexists(each))
    if not above.is_dir():
        raise RequestError(f"{out} cannot be made: {above} is not a directory.", argument="out", path=out)
    try:
        if path.is_symlink():
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        with TemporaryFile(dir=above):
            pass
    except OSError as error:
        message = f"{out} cannot be made: {above} cannot be written: {error.strerror}."
        raise RequestError(message, argument="out", path=out) from None
    if len(os.fsencode(path.name)) > LONGEST_NAME - len(".partial.lock"):
        raise RequestError(f"{out} cannot be made: its name is too long.", argument="out", path=out)
    return path


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


def lfs_pointer(path: Path) -> bool:
    """Whether a file is only the pointer that Git leaves in the place of one kept by Git LFS."""
    try:
        if not path.is_file():  # a pipe would wait for its writer
            return False
        with path.open("rb") as stream:
            return stream.read(len(LFS_BEGINNING)) == LFS_BEGINNING
    except OSError:
        return False


def differences(before: Any, now: Any, where: str = "") -> list[str]:
    """The places where two JSON values differ, in words."""
    if before == now:
        return []
    if isinstance(before, dict) and isinstance(now, dict):
        keys = sorted(before.keys() | now.keys())
        return [
            found
            for key in keys
            for found in differences(before.get(key), now.get(key), f"{where}.{key}" if where else key)
        ]
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        pairs = enumerate(zip(before, now, strict=True))
        return [found for index, (old, new) in pairs for found in differences(old, new, f"{where}[{index}]")]
    old, new = (
        "not set" if each is None else shorten(json.dumps(each, ensure_ascii=False), 80, placeholder="…")
        for each in (before, now)
    )
    return [f"{where} was {old}, now it is {new}"]


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
