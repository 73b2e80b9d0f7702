"""Running programs that a model wrote, with their tests, each in a jail of its own (`jail.py`).

Promised, on Linux, as root and as any other user, whatever the program does:

- It changes nothing outside: no file, process, socket, keyring or shared memory of this machine can be reached. It sees
  Python's standard library, the system's shared libraries and an empty folder in memory, and no installed package.
- It ends. Processor time, address space, files, threads and wall-clock time are limited; there is one process of it,
  so the limits are of everything. Nothing of it remains afterwards.
- It does not judge itself. The test runs in another process, and only plain values come from the program's.
- Where this cannot be had, nothing runs and the caller is told.

Not promised: that the kernel has no flaw by which a program with these few system calls can break out (a virtual
machine helps against that); that it cannot measure time or see the processor's model; that an answer was not learnt by
heart. Programs that need other processes, sockets (`asyncio.run` is one) or installed packages fail.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from hlwq.errors import ResourceError
from hlwq.evaluate.syscalls import filter_for

JAIL = Path(__file__).with_name("jail.py")
LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64")
GRACE_SECONDS = 60.0
"""Time beyond a program's own, to build its jail and take it down."""

Kind = Literal["passed", "failed", "raised", "malformed", "ended", "timed out"]


@dataclass(frozen=True)
class Submission:
    """A program and its test.

    Attributes:
        program: the source that a model wrote.
        entry_point: the function of it that the test calls, by this name.
        test: the source of the test, which is trusted; it raises nothing if the program is right. Arguments and
            results are plain values: numbers, strings, bytes, None, and lists, tuples, sets, dicts, ranges and
            iterators of them. Anything else that the program returns equals nothing, and the arguments that it gets are
            its own copies.
    """

    program: str
    entry_point: str = ""
    test: str = ""


@dataclass(frozen=True)
class Limits:
    """Resources of one program, and of its test.

    Attributes:
        seconds: processor time, which a busy machine does not shorten.
        wall_seconds: time from the start of the program until both are stopped.
        memory_bytes: address space.
        disk_bytes: size of all files together, which are in memory.
        threads: number of threads, the first one included; there are no other processes.
    """

    seconds: int = 4
    wall_seconds: float = 15.0
    memory_bytes: int = 1 << 30
    disk_bytes: int = 16 << 20
    threads: int = 8


@dataclass(frozen=True)
class Outcome:
    """Verdict on a program.

    Attributes:
        kind: `passed`; `failed`: the test raised, as an assertion does; `raised`: the program raised; `malformed`: what
            the program's process wrote is no value; `ended`: its process ended early, by itself or by a limit;
            `timed out`. Never taken from the program's words.
        reason: what is known of it, in words, which may be the program's.
    """

    kind: Kind
    reason: str = ""

    @property
    def passed(self) -> bool:
        """Whether the program was executed and its test raised nothing."""
        return self.kind == "passed"


def run_program(submission: Submission, limits: Limits | None = None) -> Outcome:
    """Run a Python program and its test, apart from this machine and from each other.

    Args:
        submission: the program and its test.
        limits: their resources.

    Raises:
        ResourceError: this system cannot isolate it, and nothing was run; or the sandbox itself was lost.
        UnsupportedError: programs cannot be isolated on this kind of machine.
    """
    limits = limits or Limits()
    if sys.platform != "linux":
        raise ResourceError("Programs can be isolated on Linux only. Run it there, or in a Linux container.")
    visible, hidden = _directories()
    request = {
        "program": submission.program,
        "entry_point": submission.entry_point,
        "visible": visible,
        "hidden": hidden,
        "filter": filter_for(platform.machine()).hex(),
        **asdict(limits),
    }
    try:
        reply = _reply(request, submission.test, limits.wall_seconds + GRACE_SECONDS)
    except OSError as error:
        raise ResourceError(f"The sandbox of a program cannot be started: {error}.") from None
    try:
        verdict = json.loads(reply)
    except ValueError:
        raise ResourceError(
            "The sandbox was lost before it could report on a program. Is there enough memory?"
        ) from None
    if verdict["kind"] == "no isolation":
        raise ResourceError(
            f"Programs cannot be isolated here ({verdict['reason']}): namespaces and seccomp are needed. Run it as "
            "root, in a privileged container, or without isolation: `run=run_unsafely`.",
            argument="run",
        )
    return Outcome(**verdict)


def _reply(request: dict[str, Any], test: str, seconds: float) -> bytes:
    """What the jail's supervisor writes: nothing if it was lost."""
    with tempfile.TemporaryDirectory() as root:
        parts = [json.dumps(each).encode() for each in ({**request, "root": os.path.realpath(root)}, test)]
        with subprocess.Popen(
            [sys.executable, "-I", "-S", str(JAIL)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={},
            cwd=root,
            start_new_session=True,
        ) as process:
            try:
                framed = b"".join(len(each).to_bytes(4, "big") + each for each in parts)
                return process.communicate(framed, timeout=seconds)[0]
            except subprocess.TimeoutExpired:
                return b""
            finally:  # after an interrupt, too; all else in the jail dies with it
                process.kill()


UNSAFE = """
import json, sys
program, test, word = json.load(sys.stdin)
namespace = {}
exec(compile(program + "\\n" + test, "program.py", "exec", dont_inherit=True), namespace)
print(word)
"""


def run_unsafely(submission: Submission, limits: Limits | None = None) -> Outcome:
    """Run a program and its test without a sandbox, in one process with a time limit: it can do any harm, and lie."""
    seconds = (limits or Limits()).wall_seconds
    word = "hlwq: the program and its test ran to their end"
    with tempfile.TemporaryDirectory() as folder:
        try:
            process = subprocess.run(
                [sys.executable, "-I", "-c", UNSAFE],
                env={},
                input=json.dumps([submission.program, submission.test, word]).encode(),
                capture_output=True,
                cwd=folder,
                timeout=seconds,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return Outcome("timed out", f"not done after {seconds:g} s")
    if process.returncode == 0 and process.stdout.endswith(f"{word}\n".encode()):
        return Outcome("passed")
    return Outcome("failed", process.stderr.decode(errors="replace")[-200:])


@cache
def _directories() -> tuple[list[str], list[str]]:
    """Directories that a program sees, of Python's modules and shared libraries; and those in them that it does not.

    Installed packages are hidden because one of them holds HumanEval's solutions.
    """
    wanted = [Path(os.__file__).resolve().parent]
    prefixes = {Path(each).resolve() for each in (sys.base_prefix, sys.base_exec_prefix)} - {Path("/usr")}
    for folder in (*map(Path, LIBRARIES), *(prefix / name for prefix in prefixes for name in ("lib", "lib64"))):
        if folder.is_dir() and not folder.is_symlink():
            wanted += list(folder.glob("*-linux-gnu*")) or [folder]  # Debian has much else beside them
    found = set(wanted)
    visible = sorted(each for each in found if not found.intersection(each.parents))
    hidden = sorted(each for name in visible for depth in ("", "*/") for each in name.glob(f"{depth}*-packages"))
    return [str(each) for each in visible], [str(each) for each in hidden if each.is_dir()]
