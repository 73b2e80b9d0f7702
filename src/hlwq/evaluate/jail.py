"""Run one untrusted Python program where it can harm nothing. This is a script, which `sandbox.py` starts.

It reads a JSON request on standard input. On standard output, which the program never sees, it writes the request's
secret word and then `passed` or a reason. Linux only, by namespaces: a read-only file system with nothing but Python in
it; no network; no other processes; limits on time, memory, processes and files. When this process ends, the kernel
kills everything that was started in it.

Only the standard library: it runs as `python -I` with an empty environment.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC, CLONE_NEWUSER = 0x20000, 0x4000000, 0x8000000, 0x10000000
CLONE_NEWPID, CLONE_NEWNET = 0x20000000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
MNT_DETACH, PR_SET_NO_NEW_PRIVS, PR_SET_PDEATHSIG, PR_CAPBSET_DROP = 2, 38, 1, 24
CAPABILITY_VERSION = 0x20080522
NOBODY = 65534
STARTED = "started"
"""First word of the program's process, which tells a failing program from a failing jail."""

libc = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    """Build the jail, run the program in it, and report."""
    request = json.loads(sys.stdin.read())
    report = os.fdopen(os.dup(1), "w")
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    try:
        leave_namespaces()
    except OSError as error:
        report.write(f"{request['secret']} no isolation: {error.strerror} ({error.filename})")
        return
    inside = os.fork()  # the first process of the new PID namespace: all others die with it
    if inside == 0:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # which is not inherited
        supervise(request, report)
    os.waitpid(inside, 0)


def leave_namespaces() -> None:
    """Leave the network, the processes, the mounts and the user that started this."""
    user, group = os.getuid(), os.getgid()
    if user == 0:
        check(libc.unshare(CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWPID | CLONE_NEWNET), "unshare")
        return
    flags = CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWPID | CLONE_NEWNET
    check(libc.unshare(flags), "unshare")
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    Path("/proc/self/gid_map").write_text(f"0 {group} 1")


def supervise(request: dict[str, Any], report: Any) -> NoReturn:
    """Process 1: build the file system, start the program, and stop it after its time."""
    secret = request["secret"]
    try:
        build_root(Path(request["root"]), request["visible"], request["disk_bytes"])
        reading, writing = os.pipe()
        program = os.fork()
        if program == 0:
            os.close(reading)
            report.detach()
            run(request, writing)
        os.close(writing)
        os.set_blocking(reading, False)
        verdict = wait_for(program, reading, request["wall_seconds"])
    except OSError as error:
        verdict = f"no isolation: {error.strerror} ({error.filename})"
    report.write(f"{secret} {verdict}")
    report.flush()
    os._exit(0)


def wait_for(program: int, reading: int, seconds: float) -> str:
    """Verdict on the program: `passed`, or why not."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        ended, status = os.waitpid(program, os.WNOHANG)
        if ended:
            report = b""
            with contextlib.suppress(BlockingIOError):  # it ended without a report
                report = os.read(reading, 1000)
            started, _, verdict = report.decode(errors="replace").partition(" ")
            if started != STARTED:
                return "no isolation: the process of the program ended before it began"
            if verdict:
                return verdict
            if os.WIFSIGNALED(status):
                return f"killed by {signal.Signals(os.WTERMSIG(status)).name}"
            return "ended early"
        time.sleep(0.005)
    return f"timed out after {seconds:g} s"


def build_root(root: Path, visible: list[str], disk_bytes: int) -> None:
    """Make a read-only root of the visible directories and an empty /program in memory, and nothing else."""
    mount(None, Path("/"), None, MS_REC | MS_PRIVATE)
    mount("tmpfs", root, "tmpfs", MS_NOSUID | MS_NODEV, "mode=755")
    for name in visible:
        inside = root / name.lstrip("/")
        inside.mkdir(parents=True, exist_ok=True)
        mount(name, inside, None, MS_BIND | MS_REC)
        mount(None, inside, None, MS_BIND | MS_REMOUNT | MS_RDONLY | MS_NOSUID)
    for name in ("bin", "lib", "lib64"):  # links into /usr on most systems
        if Path("/", name).is_symlink():
            (root / name).symlink_to(Path("/", name).readlink())
    for name in ("proc", "dev", "old"):
        (root / name).mkdir()
    mount("proc", root / "proc", "proc", MS_NOSUID | MS_NODEV)
    for name in ("null", "zero", "urandom"):
        (root / "dev" / name).touch()
        mount(f"/dev/{name}", root / "dev" / name, None, MS_BIND)
    (root / "program").mkdir()
    limit = f"size={disk_bytes},nr_inodes=1000,mode=777"
    mount("tmpfs", root / "program", "tmpfs", MS_NOSUID | MS_NODEV, limit)
    machine = os.uname().machine
    if machine not in PIVOT_ROOT:
        raise OSError(0, f"pivot_root is not known for {machine}", "pivot_root")
    check(libc.syscall(PIVOT_ROOT[machine], bytes(root), bytes(root / "old")), "pivot_root")
    os.chdir("/program")
    check(libc.umount2(b"/old", MNT_DETACH), "umount")
    Path("/old").rmdir()
    mount(None, Path("/"), None, MS_BIND | MS_REMOUNT | MS_RDONLY | MS_NOSUID | MS_NODEV)


PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}


def run(request: dict[str, Any], writing: int) -> NoReturn:
    """The program's process: give up all rights, set the limits, and execute the program."""
    memory = request["memory_bytes"]
    limits = {
        resource.RLIMIT_CPU: request["seconds"],
        resource.RLIMIT_AS: memory,
        resource.RLIMIT_FSIZE: request["disk_bytes"],
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NPROC: request["processes"],
    }
    if os.getuid() == 0 and Path("/proc/self/uid_map").read_text().split()[2] != "1":
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    drop_capabilities()
    for kind, limit in limits.items():
        resource.setrlimit(kind, (limit, limit))
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    os.write(writing, f"{STARTED} ".encode())
    verdict = "passed"
    try:
        exec(compile(request["program"], "program.py", "exec"), {"__name__": "__main__"})
    except BaseException as error:
        verdict = f"{type(error).__name__}: {str(error)[:200]}"
    os.write(writing, verdict.encode())
    os._exit(0)


def drop_capabilities() -> None:
    """Give up, for good, the rights of a namespace's first user."""
    capability = 0
    while libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0) == 0:
        capability += 1
    header, none = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION, 0), (ctypes.c_uint32 * 6)()
    check(libc.capset(header, none), "capset")


def mount(source: str | None, target: Path, kind: str | None, flags: int, data: str = "") -> None:
    """mount(2), raising OSError with the target's name."""
    encoded = [None if each is None else each.encode() for each in (source, kind)]
    check(libc.mount(encoded[0], bytes(target), encoded[1], ctypes.c_ulong(flags), data.encode()), f"mount {target}")


def check(result: int, what: str) -> None:
    """Raise OSError if a system call failed."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), what)


if __name__ == "__main__":
    main()
