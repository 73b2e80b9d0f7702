"""Run one untrusted Python program and its test where the program can harm nothing and cannot judge itself.

This is a script, which `sandbox.py` starts; that module says what is promised. Three processes take part:

- the supervisor, which reads the request on standard input, builds the jail, starts the two others, stops them after
  their time, and writes one JSON object, `kind` and `reason`, on standard output;
- the program's, which executes the model's code and then answers calls of its entry point;
- the test's, which executes the test, with a proxy under the entry point's name, and alone can write the verdict.

The program's process is made before the test is read, so that the test is nowhere in its memory. Two pipes lead from
the test to the program and back. What crosses them is plain values as tagged JSON: no object of the program's, with an
`__eq__` of its own, is ever part of the test's comparisons.

Both are in a read-only file system of the standard library and shared libraries (no /proc, no /sys, no executables, no
installed packages), without network, each alone with its first process in a process namespace, without rights, with
limits, and with few system calls (`syscalls.py`). They cannot make processes, so limits of one process are of all.

Only the standard library, and little of it, since this starts once per program: `python -I -S`, no environment.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import select
import signal
import sys
import time
from pathlib import Path

TYPE_CHECKING = False
if TYPE_CHECKING:  # typing takes longer to import than most programs run
    from collections.abc import Callable
    from typing import Any

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC, CLONE_NEWUSER = 0x20000, 0x4000000, 0x8000000, 0x10000000
CLONE_NEWPID, CLONE_NEWNET = 0x20000000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE, MNT_DETACH = 32, 4096, 16384, 1 << 18, 2
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS, SECCOMP_MODE_FILTER = 1, 22, 24, 38, 2
CAPABILITY_VERSION = 0x20080522
NUMBERS = {"x86_64": {"clone": 56, "pivot_root": 155}, "aarch64": {"clone": 220, "pivot_root": 41}}
"""System calls that the C library has no function for, or none that fits."""
NOBODY = 65534
NEIGHBOURS = 4
"""Processes of the jail beside the program's: the supervisor, the test's, and two first processes."""
COUNTED_BY_NAMESPACE = (5, 14)
"""Linux, from which on a limit of processes is counted in the user namespace, not over the whole machine."""

READY = b"ready"
SIGNALED = 128
"""Added to the number of the signal that killed a process, in the status of the first one of its namespace."""
MOST_BYTES = 16 << 20
"""Of one message between the test and the program."""
MOST_DEPTH = 100
"""Of nested values in one."""
ANY_LENGTH = 1 << 32
"""Of the request's parts, which are ours."""

libc = ctypes.PyDLL(None, use_errno=True)  # PyDLL: a fork must not happen while the interpreter is let go


def main() -> None:
    """Read the request, run the program and its test, and report."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    request = json.loads(receive(0, most=ANY_LENGTH))
    report, null = os.dup(1), os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 1)
    os.dup2(null, 2)
    try:
        Path("/proc/self/oom_score_adj").write_text("1000")  # where memory is short, this ends and not what started it
        request["user_ids"] = leave_namespaces()
        build_root(Path(request["root"]), request["visible"], request["hidden"], request["disk_bytes"])
        verdict = supervise(request)
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        verdict = {"kind": "no isolation", "reason": f"{error.strerror}{where}"}
    os.write(report, json.dumps(verdict).encode())


# The jail


def leave_namespaces() -> tuple[int, int] | None:
    """Leave the network, the mounts and the IPC of who started this, and its user where that is the only one.

    Returns:
        User ids to choose from, first and last; None in a user namespace of our own, which has only one.
    """
    flags = CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWNET
    user, group = os.getuid(), os.getgid()
    ranges = [line.split() for line in Path("/proc/self/uid_map").read_text().splitlines()]
    count, first = max(((int(count), int(inside)) for inside, _, count in ranges), default=(0, 0))
    if user == 0 and count > NOBODY:
        check(libc.unshare(flags), "unshare")
        user_ids = first + count // 2, first + count - 2  # those in use are low; the last one means none
    else:
        check(libc.unshare(flags | CLONE_NEWUSER), "unshare")
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
        user_ids = None
    check(libc.sethostname(b"jail", 4), "sethostname")
    return user_ids


def build_root(root: Path, visible: list[str], hidden: list[str], disk_bytes: int) -> None:
    """Make a root that holds the visible directories, read-only, and an empty /program in memory; nothing else."""
    mount(None, Path("/"), None, MS_REC | MS_PRIVATE)
    mount("tmpfs", root, "tmpfs", MS_NOSUID | MS_NODEV, "mode=755,size=1m")
    for name in visible:
        inside = root / name.lstrip("/")
        inside.mkdir(parents=True)
        mount(name, inside, None, MS_BIND | MS_REC)
    for name in hidden:
        mount("tmpfs", root / name.lstrip("/"), "tmpfs", MS_NOSUID | MS_NODEV, "mode=755,size=4k")
    for name in ("lib", "lib64"):  # links into /usr on most systems
        if Path("/", name).is_symlink():
            (root / name).symlink_to(Path("/", name).readlink())
    for name in ("dev", "old", "program"):
        (root / name).mkdir()
    for name in ("null", "zero", "urandom"):
        (root / "dev" / name).touch()
        mount(f"/dev/{name}", root / "dev" / name, None, MS_BIND)
    kept = MS_NOSUID | MS_NODEV | MS_NOEXEC  # a user namespace cannot take these away, nor remount without them
    for line in Path("/proc/self/mountinfo").read_bytes().splitlines():
        point = Path(os.fsdecode(line.split()[4].decode("unicode_escape").encode("latin-1")))  # which escapes spaces
        if point.is_relative_to(root):
            mount(None, point, None, MS_BIND | MS_REMOUNT | MS_RDONLY | MS_NOSUID | os.statvfs(point).f_flag & kept)
    scratch = f"size={disk_bytes},nr_inodes=1000,mode=777"
    mount("tmpfs", root / "program", "tmpfs", MS_NOSUID | MS_NODEV, scratch)
    check(libc.syscall(number_of("pivot_root"), bytes(root), bytes(root / "old")), "pivot_root")
    os.chdir("/program")
    check(libc.umount2(b"/old", MNT_DETACH), "umount")


def confine(request: dict[str, Any]) -> None:
    """Give up, for good, all rights of this process, and set its limits.

    Raises:
        OSError: this system cannot.
    """
    capability = 0
    while libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0) == 0:
        capability += 1
    neighbours = NEIGHBOURS
    if request["user_ids"]:
        first, last = request["user_ids"]
        user = first + int.from_bytes(os.urandom(8), "big") % (last - first + 1)  # whose processes are this one alone
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(user, user, user)
        neighbours = 0
    header, none = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION, 0), (ctypes.c_uint32 * 6)()
    check(libc.capset(header, none), "capset")
    check(libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL), "prctl")  # which a new user loses
    limits = {
        resource.RLIMIT_CPU: request["seconds"],
        resource.RLIMIT_AS: request["memory_bytes"],
        resource.RLIMIT_FSIZE: request["disk_bytes"],
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
    }
    if request["user_ids"] or tuple(map(int, os.uname().release.split(".")[:2])) >= COUNTED_BY_NAMESPACE:
        limits[resource.RLIMIT_NPROC] = request["threads"] + neighbours
    for kind, limit in limits.items():
        resource.setrlimit(kind, (limit, limit))
    check(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl")
    code = bytes.fromhex(request["filter"])
    check(libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(Filter(len(code) // 8, code)), 0, 0), "seccomp")


class Filter(ctypes.Structure):
    """The kernel's `struct sock_fprog`."""

    _fields_ = (("length", ctypes.c_ushort), ("code", ctypes.c_char_p))


# The three processes


def supervise(request: dict[str, Any]) -> dict[str, str]:
    """Start the program, then its test, wait for the verdict, and leave no process.

    Raises:
        OSError: one of them could not be confined; nothing untrusted has run.
    """
    calls, answers, state, verdicts = os.pipe(), os.pipe(), os.pipe(), os.pipe()
    deadline = time.monotonic() + request["wall_seconds"]
    started = []
    try:
        program = start(lambda: be_program(request, calls[0], answers[1], state[1]), calls[0], answers[1], state[1])
        started.append(program)
        os.close(state[1])
        wait_until_confined(state[0])
        request["test"] = json.loads(receive(0, most=ANY_LENGTH))
        test = start(lambda: be_test(request, calls[1], answers[0], verdicts[1]), calls[1], answers[0], verdicts[1])
        started.append(test)
        for descriptor in (*calls, *answers, verdicts[1]):
            os.close(descriptor)
        wait_until_confined(verdicts[0])
        written = read_until(verdicts[0], deadline)
        if written is None:
            return {"kind": "timed out", "reason": f"not done after {request['wall_seconds']:g} s"}
        verdict = json.loads(written or '{"kind": "failed", "reason": "the test was stopped by a limit"}')
        if verdict["kind"] == "ended":
            verdict["reason"] = how_it_ended(program)
        return {"kind": verdict["kind"], "reason": verdict["reason"]}
    finally:
        for process in started:  # all others in its namespace go with it, before `waitpid` returns
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)


def start(role: Callable[[], None], *descriptors: int) -> int:
    """Start a process that is alone with its first process in a namespace, and has no other descriptors."""
    first = libc.syscall(number_of("clone"), CLONE_NEWPID | signal.SIGCHLD, 0, 0, 0, 0)
    check(first, "clone")
    if first:
        return int(first)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # what it starts dies with it
    os.setsid()  # a signal to a group reaches all of it, outside the namespace too
    child = os.fork()
    if child == 0:
        keep_only(descriptors)
        try:
            role()
        finally:
            os._exit(0)
    keep_only(())
    status = os.waitpid(child, 0)[1]
    os._exit(SIGNALED + os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0)


def be_program(request: dict[str, Any], calls: int, answers: int, state: int) -> None:
    """The program's process: execute it, and answer calls of its entry point."""
    enter(request, state)
    os.close(state)
    try:
        namespace: dict[str, Any] = {}  # without a `__name__`, as in the reference implementation
        exec(compile(request["program"], "program.py", "exec", dont_inherit=True), namespace)
        function = eval(request["entry_point"] or "None", namespace)
        answer: dict[str, Any] = {"value": None}
    except BaseException as error:
        answer = {"raised": describe(error)}
    while True:
        send(answers, answer)
        call = json.loads(receive(calls))
        try:
            answer = {"value": encode(function(*decode(call["arguments"]), **decode(call["named"])))}
        except BaseException as error:
            answer = {"raised": describe(error)}


def be_test(request: dict[str, Any], calls: int, answers: int, verdicts: int) -> None:
    """The test's process: execute the test, whose calls the program answers, and write the verdict."""
    os.chdir("/")
    enter(request, verdicts)

    def candidate(*arguments: Any, **named: Any) -> Any:
        try:
            send(calls, {"arguments": encode(arguments), "named": encode(named)})
        except BrokenPipeError:
            raise LostProgram("ended", "") from None
        return answered(answers)

    try:
        answered(answers)  # that the program has been executed
        namespace = {request["entry_point"]: candidate}
        exec(compile(request["test"], "test.py", "exec", dont_inherit=True), namespace)
        verdict = {"kind": "passed", "reason": ""}
    except ProgramError as error:
        verdict = {"kind": "raised", "reason": str(error)}
    except LostProgram as error:
        verdict = {"kind": error.args[0], "reason": error.args[1]}
    except BaseException as error:
        verdict = {"kind": "failed", "reason": describe(error)}
    os.write(verdicts, json.dumps(verdict).encode())


class ProgramError(Exception):
    """The program raised an exception, which this describes."""


class LostProgram(BaseException):
    """There will be no answer: `ended` or `malformed`, and why. No test can catch it by mistake."""


def answered(answers: int) -> Any:
    """The value in the program's next answer, which may be anything: it is whatever its process wrote."""
    try:
        answer = json.loads(receive(answers))
        if "raised" in answer:
            raised = in_a_line(str(answer["raised"]))
        else:
            return decode(answer["value"])
    except EOFError:
        raise LostProgram("ended", "") from None
    except Exception as error:
        raise LostProgram("malformed", describe(error)) from None
    raise ProgramError(raised)


def enter(request: dict[str, Any], state: int) -> None:
    """Confine this process and tell the supervisor, or that it cannot be."""
    try:
        confine(request)
    except OSError as error:
        os.write(state, json.dumps([error.errno, error.strerror, error.filename]).encode())
        os._exit(1)
    os.write(state, READY)


def wait_until_confined(state: int) -> None:
    """Wait for what `enter` writes: nothing untrusted has run in that process, so the words are ours."""
    word = os.read(state, len(READY))
    if word != READY:
        rest = os.read(state, 4096)
        raise OSError(*(json.loads(word + rest) if word else (0, "a process of the jail was lost")))


def read_until(descriptor: int, deadline: float) -> bytes | None:
    """All that is written until the other end is closed; None if it is not closed in time."""
    content = b""
    while select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))[0]:
        more = os.read(descriptor, 1 << 16)
        if not more:
            return content
        content += more
    return None


def how_it_ended(program: int) -> str:
    """Why a program that answers no more does not: its process is gone, or has closed its pipe."""
    for _ in range(100):
        ended = os.waitid(os.P_PID, program, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if ended and ended.si_status > SIGNALED:
            return f"killed by {signal.Signals(ended.si_status - SIGNALED).name}"
        if ended:
            break
        time.sleep(0.01)
    return "ended early"


# Values between them


def send(descriptor: int, message: Any) -> None:
    """Write a message: its length in four bytes, and JSON in ASCII."""
    content = json.dumps(message).encode()
    rest = memoryview(len(content).to_bytes(4, "big") + content)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def receive(descriptor: int, most: int = MOST_BYTES) -> bytes:
    """Read a message.

    Raises:
        EOFError: the other end is closed.
        ValueError: it is longer than any may be.
    """
    length = int.from_bytes(read_exactly(descriptor, 4), "big")
    if length > most:
        raise ValueError(f"a message of {length} bytes")
    return read_exactly(descriptor, length)


def read_exactly(descriptor: int, count: int) -> bytes:
    """That many bytes, however they arrive."""
    content = bytearray()
    while len(content) < count:
        more = os.read(descriptor, min(count - len(content), 1 << 20))
        if not more:
            raise EOFError
        content += more
    return bytes(content)


def encode(value: Any, depth: int = MOST_DEPTH) -> Any:
    """A value as JSON: a list as itself, other types as an object of one tag; what is not plain as its type's name.

    Raises:
        ValueError: it is nested too deeply.
    """
    if not depth:
        raise ValueError(f"a value nested more than {MOST_DEPTH} deep")
    if value is None or isinstance(value, bool | float):
        return value
    if isinstance(value, int):
        return int(value) if abs(value) < 1 << 63 else {"int": hex(value)}
    if isinstance(value, str):
        surrogates = any("\ud800" <= each <= "\udfff" for each in value)
        return {"str": value.encode("utf-32-le", "surrogatepass").hex()} if surrogates else value
    if isinstance(value, bytes | bytearray):
        return {"bytes" if isinstance(value, bytes) else "bytearray": value.hex()}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    for module, name in (("decimal", "Decimal"), ("fractions", "Fraction")):
        if module in sys.modules and isinstance(value, getattr(sys.modules[module], name)):
            return {name: str(value)}
    if isinstance(value, dict):
        return {"dict": [[encode(key, depth - 1), encode(item, depth - 1)] for key, item in value.items()]}
    if isinstance(value, range):
        return {"range": encode([value.start, value.stop, value.step])}
    if hasattr(value, "__iter__") and not isinstance(value, type):
        content = [encode(each, depth - 1) for each in value]
        kind = next((kind.__name__ for kind in (list, tuple, set, frozenset) if isinstance(value, kind)), "iterator")
        return content if kind == "list" else {kind: content}
    return {"object": type(value).__name__}


def decode(value: Any, depth: int = MOST_DEPTH) -> Any:
    """What `encode` encoded. The JSON may be anybody's: only values of plain types are made of it.

    Raises:
        Exception: it was not made by `encode`.
    """
    if not depth:
        raise ValueError(f"a value nested more than {MOST_DEPTH} deep")
    if isinstance(value, list):
        return [decode(each, depth - 1) for each in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "int":
        return int(content, 16)
    if kind == "str":
        return bytes.fromhex(content).decode("utf-32-le", "surrogatepass")
    if kind == "dict":
        return {decode(key, depth - 1): decode(item, depth - 1) for key, item in content}
    if kind in ("bytes", "bytearray"):
        return (bytes if kind == "bytes" else bytearray).fromhex(content)
    if kind == "object":
        return Opaque()
    if kind == "Decimal":
        from decimal import Decimal

        return Decimal(content)
    if kind == "Fraction":
        from fractions import Fraction

        return Fraction(content)
    values = [decode(each, depth - 1) for each in content]
    if kind == "complex":
        return complex(*values)
    if kind == "range":
        return range(*values)
    if kind == "iterator":
        return iter(values)
    return {"tuple": tuple, "set": set, "frozenset": frozenset}[kind](values)


class Opaque:
    """Something of the program's that is no plain value, such as a function: equal to nothing but itself."""


# Odds and ends


def describe(error: BaseException) -> str:
    """An exception in a few words."""
    return in_a_line(f"{type(error).__name__}: {error}")


def in_a_line(text: str) -> str:
    """The beginning of a text, as one line of printable ASCII."""
    return "".join(each if " " <= each <= "~" else each.encode("unicode_escape").decode() for each in text[:200])


def keep_only(descriptors: tuple[int, ...]) -> None:
    """Close all descriptors but these and the standard ones, which lead nowhere."""
    os.dup2(1, 0)
    start = 3
    for each in sorted(descriptors):
        os.closerange(start, each)
        start = each + 1
    os.closerange(start, 1024)  # this process had none that it did not open


def number_of(call: str) -> int:
    """Number of a system call on this machine."""
    return NUMBERS[os.uname().machine][call]


def mount(source: str | None, target: Path, kind: str | None, flags: int, data: str = "") -> None:
    """mount(2), raising OSError with the target's name."""
    encoded = [None if each is None else os.fsencode(each) for each in (source, kind)]
    check(libc.mount(encoded[0], bytes(target), encoded[1], ctypes.c_ulong(flags), data.encode()), f"mount {target}")


def check(result: int, what: str) -> None:
    """Raise OSError if a system call failed."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), what)


if __name__ == "__main__":
    main()
