"""What the sandbox promises of good programs, of limits and of verdicts; hostile ones are in `hostile/`."""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hlwq import HlwqError, ResourceError
from hlwq.evaluate import sandbox
from hlwq.evaluate.sandbox import Limits, Outcome, Submission, run_program, run_unsafely
from hlwq.evaluate.syscalls import MACHINES, filter_for

pytestmark = pytest.mark.usefixtures("isolation")
LIMITS = Limits(seconds=1, wall_seconds=60.0, memory_bytes=256 << 20)
"""Enough for a busy machine; what fails for another reason than its time fails well before."""
SHORT = Limits(wall_seconds=1.0)


def run(program: str, limits: Limits = LIMITS, entry_point: str = "", test: str = "") -> Outcome:
    return run_program(Submission(program, entry_point, test), limits)


# Good programs


def test_a_good_program_passes_with_what_programs_import() -> None:
    program = (
        "import math, re, typing, collections, itertools, hashlib, random, string, functools, decimal, heapq\n"
        "import asyncio, bisect, statistics, copy, datetime, json, sqlite3, threading, unittest, zlib\n"
        "assert math.pi > 3 and hashlib.sha256(b'').hexdigest().startswith('e3b0')\n"
        "thread = threading.Thread(target=print)\nthread.start()\nthread.join()\n"
        "import shutil, tempfile\nopen('left', 'w').write('x')\nshutil.copy2('left', 'right')\n"
        "assert open('right').read() == 'x'\ntempfile.TemporaryFile().write(b'x')"
    )
    assert run(program) == Outcome("passed")


@pytest.mark.parametrize(
    "value",
    [
        *(0, -1, 2**63, -(2**5000), True, None, 1.5, -0.0, 1e308, math.inf, 1 + 2j, range(3, 9, 2)),
        *("", "é\u2028\x00😀", "\ud800", "\ud83d\ude00", b"", b"\x00\xff", bytearray(b"a")),
        *([], [1, [2, [3]]], (), (1,), {1, 2}, frozenset({"a"}), {}, {(1, 2): [3], None: {"int": 4}, 1.5: "tuple"}),
        *(Decimal("1.10"), Fraction(1, 3)),
    ],
    ids=lambda value: repr(value)[:30].encode("ascii", "backslashreplace").decode(),
)
def test_plain_values_cross_unchanged(value: Any) -> None:
    """As an argument, as a result, and with their types."""
    imports = "from decimal import Decimal\nfrom fractions import Fraction\nfrom math import inf\n"
    program = f"{imports}def f(x):\n    assert (type(x), repr(x)) == (type({value!r}), repr({value!r}))\n    return x\n"
    test = f"{imports}x = {value!r}\nassert f(x) == x\nassert (type(f(x)), repr(f(x))) == (type(x), repr(x))"
    outcome = run(program, entry_point="f", test=test)
    assert outcome.passed, outcome


def test_all_of_the_protocol_holds_for_nested_values() -> None:
    from hlwq.evaluate.jail import decode, encode

    plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.binary()
    plain |= st.text(st.characters(codec=None, categories=None)) | st.complex_numbers(allow_nan=False)
    values = st.recursive(
        plain,
        lambda inside: st.lists(inside) | st.lists(inside).map(tuple) | st.dictionaries(plain, inside) | st.sets(plain),
        max_leaves=20,
    )

    @given(values)
    def crosses(value: Any) -> None:
        there = decode(json.loads(json.dumps(encode(value))))
        assert there == value
        assert type(there) is type(value)

    crosses()


def test_no_json_makes_anything_but_plain_values() -> None:
    from hlwq.evaluate.jail import Opaque, decode

    tags = ["int", "str", "bytes", "dict", "tuple", "set", "range", "complex", "iterator", "object", "Decimal", "x"]
    leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
    trees = st.recursive(
        leaves, lambda inside: st.lists(inside) | st.dictionaries(st.sampled_from(tags), inside), max_leaves=10
    )
    plain = (type(None), bool, int, float, str, bytes, dict, list, tuple, set, range, complex, Decimal, Opaque)

    @given(trees)
    def is_plain_or_refused(tree: Any) -> None:
        try:
            value = decode(tree)
        except Exception:
            return
        assert isinstance(value, plain) or type(value).__name__.endswith("_iterator")

    is_plain_or_refused()


@pytest.mark.parametrize(
    ("program", "test"),
    [
        ("f = lambda *a, **k: (a, k)", "assert f(1, b=[2]) == ((1,), {'b': [2]})"),
        ("def f(x): return x", "assert [f(n) for n in range(300)] == list(range(300))"),
        ("def f(x): return f(x - 1) + 1 if x else 0", "assert f(500) == 500"),
        ("calls = []\ndef f(x): calls.append(x); return len(calls)", "assert [f(0), f(0)] == [1, 2]"),
        ("def f(x): x.sort(); return x", "assert f([3, 1]) == [1, 3]"),
        ("def f(x): x.append(x)", "x = [1]\nf(x)"),
        ("def f(x): return (n for n in x)", "assert tuple(f([1, 2])) == (1, 2)\nassert f([1]) != [1]"),
        ("def f(x): return map(str, x)", "assert list(f([1, 2])) == ['1', '2']"),
        ("from collections import Counter\ndef f(x): return Counter(x)", "assert f('aab') == {'a': 2, 'b': 1}"),
        ("from enum import IntEnum\nE = IntEnum('E', 'a b')\ndef f(x): return E.b", "assert f(0) == 2"),
        ("import re\ndef f(x): return re.match(x, 'ab')", "assert f('a')\nassert not f('b')"),
        ("def f(x): return f", "assert f(0) and f(0) != 0 and f(0) not in [None, True]"),
        ("class A:\n    def __call__(self, x): return x\nf = A()", "assert f(3) == 3"),
        ("def g(x): return x\nf = g", "assert f(x=3) == 3"),
    ],
)
def test_calls_are_as_in_one_process(program: str, test: str) -> None:
    outcome = run(program, entry_point="f", test=test)
    assert outcome.passed, outcome
    assert run_unsafely(Submission(program, "f", test)).passed


# Verdicts


@pytest.mark.parametrize(
    ("program", "kind", "reason"),
    [
        ("assert 1 == 2, 'no'", "raised", "AssertionError: no"),
        ("def f(:", "raised", "SyntaxError"),
        ("import sys; sys.exit(0)", "raised", "SystemExit"),
        ("import os; os._exit(0)", "ended", "ended early"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "ended", "SIGKILL"),
        ("while True: pass", "ended", "SIGKILL"),
        ("while True: print('x' * 10_000)", "ended", "SIGKILL"),
        ("import time; time.sleep(60)", "timed out", "not done after 1 s"),
        ("block = bytearray(100 << 30)", "raised", "MemoryError"),
        ("blocks = [bytearray(100 << 20) for _ in range(40)]", "raised", "MemoryError"),
        ("open('big', 'wb').write(bytes(200 << 20))", "raised", "OSError"),
        ("[open(f'file{i}', 'wb').write(bytes(10 << 20)) for i in range(5)]", "raised", "No space left"),
        ("open('/usr/decoy', 'w')", "raised", "Read-only file system"),
        ("open('/decoy', 'w')", "raised", "Read-only file system"),
        ("import socket; socket.create_connection(('127.0.0.1', 9))", "raised", "not implemented"),
        ("import socket; socket.getaddrinfo('localhost.invalid', 80)", "raised", "gaierror"),
        ("import os; os.setuid(0)", "raised", "not implemented"),
        ("raise type('no isolation', (Exception,), {})", "raised", "no isolation: "),
        ("'\ud800'", "raised", "UnicodeEncodeError"),
    ],
)
def test_a_bad_program_fails(program: str, kind: str, reason: str) -> None:
    outcome = run(program, SHORT if kind == "timed out" else LIMITS)
    assert outcome.kind == kind
    assert reason in outcome.reason


@pytest.mark.parametrize(
    ("program", "test", "outcome"),
    [
        ("def f(): return 1", "assert f() == 1", Outcome("passed")),
        ("def f(): return 1", "assert f() == 2, 'two'", Outcome("failed", "AssertionError: two")),
        ("def f(): return 1", "assert g() == 2", Outcome("failed", "NameError: name 'g' is not defined")),
        ("def f(): return 1 / 0", "f()", Outcome("raised", "ZeroDivisionError: division by zero")),
        ("def g(): return 1", "assert f() == 1", Outcome("raised", "NameError: name 'f' is not defined")),
        ("f = 3", "f()", Outcome("raised", "TypeError: 'int' object is not callable")),
        ("def f(): raise SystemExit(0)", "f()", Outcome("raised", "SystemExit: 0")),
        ("def f(): raise KeyboardInterrupt", "f()", Outcome("raised", "KeyboardInterrupt: ")),
        ("import os\ndef f(): os._exit(0)", "f()", Outcome("ended", "ended early")),
        ("import os\ndef f(): os._exit(0)", "try: f()\nexcept Exception: pass", Outcome("ended", "ended early")),
        ("def f(): return 1", "while True: pass", Outcome("failed", "the test was stopped by a limit")),
        ("def f(): raise ValueError('é\ud800')", "f()", Outcome("raised", "UnicodeEncodeError: ")),
    ],
)
def test_a_verdict_says_what_happened(program: str, test: str, outcome: Outcome) -> None:
    found = run(program, entry_point="f", test=test)
    assert (found.kind, found.passed) == (outcome.kind, outcome.kind == "passed")
    assert found.reason.startswith(outcome.reason)


def test_a_test_may_expect_an_exception() -> None:
    test = "try: f()\nexcept Exception: pass\nelse: raise AssertionError"
    assert run("def f(): raise ValueError", entry_point="f", test=test).passed
    assert run("def f(): pass", entry_point="f", test=test).kind == "failed"


@pytest.mark.parametrize(
    ("program", "passes"),
    [
        ("def f(x: Dict[str, int]): pass", False),  # an import that is missing
        ("class A:\n    x: Dict", False),
        ("from __future__ import annotations\ndef f(x: Dict): pass", True),
        ("if __name__ == '__main__':\n    input()", True),  # it is no script
        ("assert __name__ == 'builtins'", True),
        ("import dataclasses\n@dataclasses.dataclass\nclass A:\n    x: int\nassert A(1) == A(1)", True),
        ("import typing\nclass A(typing.NamedTuple):\n    x: int\nassert A(1).x == 1", True),
        ("assert 'json' not in globals() and 'request' not in globals()", True),
    ],
)
def test_programs_run_as_in_the_reference_implementation(program: str, passes: bool) -> None:
    assert run(program).passed == passes
    assert run_unsafely(Submission(program)).passed == passes


# Nothing of this machine


def test_nothing_of_a_program_outlives_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(sandbox, "JAIL", shutil.copy(sandbox.JAIL, tmp_path))
    run("import threading, time\nthreading.Thread(target=time.sleep, args=(30,)).start()\nopen('left', 'w').write('x')")
    assert [each.name for each in tmp_path.iterdir()] == ["jail.py"]
    assert not _running(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_end_of_the_evaluation_ends_what_runs(number: signal.Signals, tmp_path: Path) -> None:
    shutil.copy(sandbox.JAIL, tmp_path)
    script = (
        "import pathlib, sys, tempfile\nfrom hlwq.evaluate import sandbox\ntempfile.tempdir = sys.argv[1]\n"
        "sandbox.JAIL = pathlib.Path(sys.argv[1], 'jail.py')\n"
        "sandbox.run_program(sandbox.Submission('import time\\ntime.sleep(30)'))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)],
        stderr=subprocess.DEVNULL,
        # A shell gives background jobs, and a test runner may have been one, a signal that is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    _wait_for(lambda: _running(tmp_path) == 5)  # the supervisor, and two processes each of the program's and the test's
    process.send_signal(number)
    assert process.wait() != 0
    _wait_for(lambda: _running(tmp_path) == 0)
    if number == signal.SIGINT:
        assert [each.name for each in tmp_path.iterdir()] == ["jail.py"]


def _running(folder: Path) -> int:
    """Processes of jails whose script is in a folder."""
    found = 0
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found += str(folder / "jail.py").encode() in file.read_bytes()
    return found


def _wait_for(condition: Any) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_server_on_this_machine_cannot_be_reached() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.1)
        port = server.getsockname()[1]
        assert not run(f"import socket; socket.create_connection(('127.0.0.1', {port}), 1)").passed
        with pytest.raises(TimeoutError):
            server.accept()


def test_files_outside_cannot_be_seen_written_or_deleted(tmp_path: Path) -> None:
    decoy = tmp_path / "home" / "precious.txt"
    decoy.parent.mkdir()
    decoy.write_text("keep me")
    for action in (
        f"open({str(decoy)!r}).read()",
        f"open({str(decoy)!r}, 'w')",
        f"__import__('os').remove({str(decoy)!r})",
    ):
        assert "No such file" in run(action).reason
    run(f"import shutil; shutil.rmtree({str(decoy.parent)!r}, ignore_errors=True)")
    assert decoy.read_text() == "keep me"


def test_the_environment_and_the_descriptors_of_the_parent_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret-of-the-parent")
    reading, writing = os.pipe()
    os.set_inheritable(writing, True)
    program = (
        "import os\nassert 'HF_TOKEN' not in os.environ\n"
        "def is_open(fd):\n    try: os.fstat(fd)\n    except OSError: return False\n    return True\n"
        "assert sum(map(is_open, range(1024))) == 5\n"  # nowhere, thrice, and to and from the test
    )
    outcome = run(program)
    assert outcome.passed, outcome.reason
    os.close(writing)
    assert os.read(reading, 1) == b""
    os.close(reading)


# Limits


@pytest.mark.parametrize(
    ("option", "program"),
    [
        ({"seconds": 1}, "import time\nwhile time.process_time() < 1.5: pass"),
        ({"wall_seconds": 0.3}, "import time\ntime.sleep(0.5)"),
        ({"memory_bytes": 200 << 20}, "block = bytearray(300 << 20)"),
        ({"disk_bytes": 1 << 20}, "open('f', 'wb').write(bytes(4 << 20))"),
        ({"threads": 1}, "import threading\nthreading.Thread(target=print).start()"),
    ],
)
def test_each_limit_limits(option: dict[str, Any], program: str) -> None:
    assert run(program, Limits(wall_seconds=60)).passed
    assert not run(program, Limits(**{"wall_seconds": 60, **option})).passed


@pytest.mark.parametrize("threads", [2, 8])
def test_there_are_as_many_threads_as_the_limit_says(threads: int) -> None:
    program = (
        "import threading\ndone = threading.Event()\n"
        f"others = [threading.Thread(target=done.wait) for _ in range({threads})]\n"
        "for each in others[:-1]: each.start()\n"
        "try: others[-1].start()\nexcept RuntimeError: pass\nelse: raise AssertionError\ndone.set()"
    )
    outcome = run(program, Limits(threads=threads))
    assert outcome.passed, outcome


# Where there is no isolation


@pytest.mark.skipif(shutil.which("unshare") is None, reason="util-linux has no unshare here")
def test_the_jail_holds_for_the_only_user_of_a_namespace() -> None:
    """Who has no other user to become: anybody but root, and root in some containers."""
    attempts = {
        "pass": True,
        "import threading\n[threading.Thread(target=print).start() for _ in range(7)]": True,
        "open('/decoy', 'w')": False,
        "open('/usr/decoy', 'w')": False,
        "import os; os.kill(1, 0); os.kill(-1, 9)": False,
        "import ctypes; assert ctypes.CDLL(None).mount(None, b'/usr', None, 4096 | 32, None) == 0": False,
        "import os; os.open('/proc/1/fd/1', os.O_WRONLY)": False,
    }
    done = _run_in_a_namespace(["--user", "--map-root-user"], attempts)
    outcomes = done.stdout.strip().splitlines()
    assert ["kind='passed'" in outcome for outcome in outcomes] == list(attempts.values()), done.stdout + done.stderr


@pytest.mark.skipif(shutil.which("unshare") is None, reason="util-linux has no unshare here")
def test_a_user_without_a_name_is_told() -> None:
    done = _run_in_a_namespace(["--user"], ["pass"])
    assert "ResourceError: Programs cannot be isolated here (Operation not permitted (unshare))" in done.stderr
    assert done.stdout == ""


def _run_in_a_namespace(options: list[str], programs: Iterable[str]) -> subprocess.CompletedProcess[str]:
    script = (
        "import sys; from hlwq.evaluate.sandbox import run_program, Submission\n"
        "for each in sys.argv[1:]: print(run_program(Submission(each)))"
    )
    command = ["unshare", *options, sys.executable, "-c", script, *programs]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.stderr.startswith("unshare:"):
        pytest.skip(done.stderr.strip())
    return done


def test_without_namespaces_nothing_runs(tmp_path: Path) -> None:
    """A filter that forbids them, as some containers have."""
    mark = tmp_path / "ran"
    script = f"""
import ctypes, errno, struct
from hlwq.evaluate.sandbox import *
libc = ctypes.CDLL(None, use_errno=True)
unshare = {272 if platform.machine() == "x86_64" else 97}
program = [(0x20, 0, 0, 0), (0x15, 0, 1, unshare), (0x06, 0, 0, 0x50000 | errno.EPERM), (0x06, 0, 0, 0x7FFF0000)]
code = b"".join(struct.pack("HBBI", *each) for each in program)
class Filter(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("code", ctypes.c_char_p))
libc.prctl(38, 1, 0, 0, 0)
assert libc.prctl(22, 2, ctypes.byref(Filter(len(program), code)), 0, 0) == 0
from hlwq import HlwqError, ResourceError
try: print(run_program(Submission("open({str(mark)!r}, 'w')")))
except HlwqError as error: print(type(error).__name__, error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout.startswith("ResourceError Programs cannot be isolated here (Operation not permitted (unshare))")
    assert done.stdout.count("\n") == 1
    assert not mark.exists()


def test_a_sandbox_that_cannot_be_started_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "missing"))
    with pytest.raises(ResourceError, match=r"cannot be started: .*missing"):
        run("pass")
    monkeypatch.setattr(sys, "executable", "/bin/false" if Path("/bin/false").exists() else "/usr/bin/false")
    with pytest.raises(ResourceError, match="was lost"):
        run("pass")


def test_an_unknown_machine_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    with pytest.raises(HlwqError, match="x86_64 and aarch64 only, and this is riscv64"):
        run("pass")


def test_both_machines_allow_the_same_calls_but_old_ones() -> None:
    names = {machine: {entry.split("=")[0] for entry in MACHINES[machine][1].split()} for machine in MACHINES}
    assert names["aarch64"] < names["x86_64"]
    assert len(filter_for("aarch64")) < len(filter_for("x86_64")) < 8 * 4096  # the kernel's most


# Unsafe


def test_unsafe_is_only_a_process() -> None:
    assert run_unsafely(Submission("pass")).passed
    assert run_unsafely(Submission("def f(): return 1", "f", "assert f() == 1")).passed
    assert run_unsafely(Submission("def f(): return 1", "f", "assert f() == 2")).kind == "failed"
    assert run_unsafely(Submission("assert False")).kind == "failed"
    assert run_unsafely(Submission("import os; os._exit(0)")).kind == "failed"
    assert run_unsafely(Submission("x = '\ud800'")).kind == "failed"
    assert run_unsafely(Submission("import time; time.sleep(9)"), Limits(wall_seconds=0.2)).kind == "timed out"
