"""Running programs that a model wrote, each in a jail of its own (`jail.py`)."""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from hlwq.errors import ResourceError

JAIL = Path(__file__).with_name("jail.py")
SYSTEM_DIRECTORIES = ("/usr", "/bin", "/lib", "/lib64")
FINISHED = "hlwq: the program ran to its end"
GRACE_SECONDS = 60.0
"""Time beyond a program's own, to build its jail and take it down."""


@dataclass(frozen=True)
class Limits:
    """Resources of one program.

    Attributes:
        seconds: processor time of each process, which a busy machine does not shorten.
        wall_seconds: time from the start of the program until it is stopped.
        memory_bytes: address space of each process.
        disk_bytes: size of all files together, which are in memory.
        processes: number of processes and threads, the program itself included.
    """

    seconds: int = 4
    wall_seconds: float = 15.0
    memory_bytes: int = 1 << 30
    disk_bytes: int = 16 << 20
    processes: int = 8


@dataclass(frozen=True)
class Outcome:
    """Result of a program: whether it ran to its end without an exception, and why not."""

    passed: bool
    reason: str


def run_program(program: str, limits: Limits | None = None) -> Outcome:
    """Run a Python program, which passes if it ends without an exception within its limits.

    Args:
        program: the source, test included.
        limits: its resources.

    Raises:
        ResourceError: this system cannot isolate it, and nothing was run; or the sandbox itself was lost.
    """
    limits = limits or Limits()
    if sys.platform != "linux":
        raise ResourceError("Programs can be isolated on Linux only. Run it there, or in a Linux container.")
    secret = secrets.token_hex(16)
    with tempfile.TemporaryDirectory() as root:
        request = {"secret": secret, "program": program, "root": root, "visible": _visible(), **asdict(limits)}
        process = subprocess.Popen(
            [sys.executable, "-I", str(JAIL)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={},
            cwd=root,
            close_fds=True,
            start_new_session=True,
        )
        try:
            reply, _ = process.communicate(json.dumps(request).encode(), timeout=limits.wall_seconds + GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            reply, _ = process.communicate()
    word, _, verdict = reply.decode(errors="replace").partition(" ")
    if word != secret:
        raise ResourceError("The sandbox was lost before it could report on a program. Is there enough memory?")
    if verdict.startswith("no isolation"):
        raise ResourceError(
            f"Programs cannot be isolated here ({verdict}): user namespaces are needed. Run it as root, in a "
            "privileged container, or without isolation: `run=run_unsafely`.",
            argument="run",
        )
    return Outcome(verdict == "passed", verdict)


def run_unsafely(program: str, limits: Limits | None = None) -> Outcome:
    """Run a Python program without a sandbox, in a process of its own with a time limit: it can do any harm."""
    seconds = (limits or Limits()).wall_seconds
    with tempfile.TemporaryDirectory() as folder:
        try:
            process = subprocess.run(
                [sys.executable, "-I", "-c", f"{program}\nprint({FINISHED!r})"],
                env={},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                cwd=folder,
                timeout=seconds,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return Outcome(False, f"timed out after {seconds:g} s")
    finished = process.stdout.decode(errors="replace").endswith(f"{FINISHED}\n")
    return Outcome(process.returncode == 0 and finished, process.stderr.decode(errors="replace")[-200:])


def _visible() -> list[str]:
    """Directories that a program needs to run: the system's libraries and Python itself."""
    python = {str(Path(each).resolve()) for each in (sys.base_prefix, sys.prefix)}
    system = [each for each in SYSTEM_DIRECTORIES if Path(each).is_dir() and not Path(each).is_symlink()]
    inside = [each for each in sorted(python) if not each.startswith(tuple(f"{name}/" for name in system))]
    return [*system, *(each for each in inside if each not in system)]
