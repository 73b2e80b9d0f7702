"""A run that is killed at one of its steps on the disk, and then repeated: `kill_points.py SOURCE FOLDER RECIPE KIND`.

A step is a file opened to be written, a flush to the disk, a renaming, a directory made, a file removed, or a tensor
written by half. Each is tried in a process of its own, forked from one that has imported everything. KIND is `kill`, or
`lose`: what was not flushed to the disk is lost besides, as when the machine loses its power. Prints, as JSON, what
the second run made after each.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import sys
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

import hlwq
from hlwq.containers import Reader, Writer
from hlwq.families import describe

EVENTS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate"}


class Steps:
    """Counts the steps under a folder, and ends the process at one of them."""

    def __init__(self, folder: Path, last: int, lose: bool) -> None:
        self.folder, self.last, self.lose = str(folder), last, lose
        self.count, self.live = 0, True
        self.synced: dict[str, bytes] = {}
        self.fsync, self.write = os.fsync, Writer.write
        os.fsync = self.on_fsync
        Writer.write = lambda writer, *arguments, **options: self.on_write(writer, *arguments, **options)
        sys.addaudithook(self.on_event)

    def step(self) -> None:
        self.count += 1
        if self.count == self.last:
            self.end()

    def end(self) -> None:
        self.live = False
        if self.lose:
            for file in Path(self.folder).rglob("*"):
                if file.is_file() and "partial" in str(file) and not file.name.endswith(".lock"):
                    file.write_bytes(self.synced.get(str(file), b""))
        os._exit(9)

    def on_event(self, name: str, arguments: tuple[Any, ...]) -> None:
        if not self.live or name not in EVENTS or not str(arguments[0]).startswith(self.folder):
            return
        if name == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR):
            return
        if name == "os.rename":
            names = {str(arguments[0]): str(arguments[1])}
            for old, contents in list(self.synced.items()):  # what was flushed goes along with its new name
                for before, after in names.items():
                    if old == before or old.startswith(before + "/"):
                        self.synced[after + old.removeprefix(before)] = contents
        self.step()

    def on_fsync(self, descriptor: int) -> None:
        if self.live:
            self.step()
        self.fsync(descriptor)
        file = Path(f"/proc/self/fd/{descriptor}").readlink()
        if file.is_file():
            live, self.live = self.live, False
            self.synced[str(file)] = file.read_bytes()
            self.live = live
        if self.live:
            self.step()

    def on_write(self, writer: Writer, name: str, tensor: torch.Tensor) -> None:
        self.count += 1
        if self.count == self.last:
            cut = tensor.clone()
            cut.view(torch.uint8).reshape(-1)[cut.nbytes // 2 :] = 0
            self.write(writer, name, cut)
            self.end()
        self.write(writer, name, tensor)


def in_a_process(work: Callable[[], None]) -> tuple[int, str]:
    """Exit status and output of some work."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.close(reader)
        status, said = 0, io.StringIO()
        with contextlib.redirect_stderr(said):
            try:
                work()
            except hlwq.HlwqError as error:
                status = 1
                os.write(writer, str(error).encode())
            except BaseException as error:
                status = 2
                os.write(writer, repr(error).encode())
        os._exit(status)
    os.close(writer)
    with os.fdopen(reader) as stream:
        text = stream.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), text


def files_of(folder: Path) -> dict[str, str]:
    """Hashes of all files below a folder."""
    return {
        str(file.relative_to(folder)): sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def main() -> None:
    source, folder, recipe, kind = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4]
    every = int(sys.argv[5])
    torch.set_num_threads(1)
    options: dict[str, Any] = {"max_shard_size": 60_000}
    if recipe != "rtn":
        options |= {"calibration": "embedded", "samples": 4, "sequence_length": 64}

    def run(out: Path) -> None:
        hlwq.quantize(source, out, recipe, **options)

    reader = Reader(source)
    describe(reader.config, reader.tensors)  # imports what every process would
    whole = folder / "whole" / "out"
    assert in_a_process(lambda: run(whole)) == (0, "")
    results = []
    last = 1
    while True:
        place = folder / str(last) / "out"
        place.parent.mkdir()

        def killed(place: Path = place, last: int = last) -> None:
            Steps(place.parent, last, kind == "lose")
            run(place)

        status, text = in_a_process(killed)
        if status == 0:
            break
        assert status == 9, (last, status, text)
        appeared = place.exists()
        again = in_a_process(lambda place=place: run(place))
        results.append([last, appeared, *again, files_of(place.parent) == files_of(whole.parent)])
        shutil.rmtree(place.parent)
        last += every
    print(json.dumps(results))


if __name__ == "__main__":
    main()
