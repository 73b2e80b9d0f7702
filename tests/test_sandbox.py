"""Programs that mean harm fail, and harm nothing. Each is bounded, and harmless should the sandbox fail."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from hlwq.evaluate.sandbox import Limits, run_program, run_unsafely

pytestmark = pytest.mark.usefixtures("isolation")
LIMITS = Limits(seconds=2, wall_seconds=60.0, memory_bytes=256 << 20)
"""Enough for a busy machine; what fails for another reason than its time fails well before."""
SHORT = Limits(wall_seconds=2.0)


def test_a_good_program_passes_with_what_programs_import() -> None:
    program = "import math, re, typing, collections, itertools, hashlib, random, string, functools\nassert math.pi > 3"
    assert run_program(program, LIMITS).passed


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("assert 1 == 2, 'no'", "AssertionError: no"),
        ("def f(:", "SyntaxError"),
        ("import sys; sys.exit(0)", "SystemExit"),
        ("import os; os._exit(0)", "ended early"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "SIGKILL"),
        ("while True: pass", "SIGKILL"),
        ("while True: print('x' * 10_000)", "SIGKILL"),
        ("import time; time.sleep(60)", "timed out"),
        ("block = bytearray(100 << 30)", "MemoryError"),
        ("blocks = [bytearray(100 << 20) for _ in range(40)]", "MemoryError"),
        ("open('big', 'wb').write(bytes(200 << 20))", "OSError"),
        ("[open(f'file{i}', 'wb').write(bytes(10 << 20)) for i in range(5)]", "No space left"),
        ("open('/usr/decoy', 'w')", "Read-only file system"),
        ("open('/decoy', 'w')", "Read-only file system"),
        ("import socket; socket.create_connection(('127.0.0.1', 9))", "Network is unreachable"),
        ("import socket; socket.getaddrinfo('localhost.invalid', 80)", "gaierror"),
        ("import os; os.setuid(0)", "PermissionError"),
    ],
)
def test_a_bad_program_fails(program: str, reason: str) -> None:
    outcome = run_program(program, SHORT if reason == "timed out" else LIMITS)
    assert not outcome.passed
    assert reason in outcome.reason


def test_a_fork_storm_is_stopped() -> None:
    program = (
        "import os\nfor _ in range(300):\n    if os.fork() == 0:\n        import time; time.sleep(30); os._exit(0)"
    )
    before = len(list(Path("/proc").iterdir()))
    outcome = run_program(program, LIMITS)
    assert not outcome.passed
    assert "temporarily unavailable" in outcome.reason
    assert len(list(Path("/proc").iterdir())) < before + 20


def test_a_child_does_not_outlive_its_parent(tmp_path: Path) -> None:
    mark = f"hlwq-orphan-{os.getpid()}"
    program = (
        "import os, sys\n"
        "if os.fork() == 0:\n"
        "    os.setsid()\n"
        f"    os.execv({sys.executable!r}, [{mark!r}, '-c', 'import time; time.sleep(30)'])\n"
        "import time; time.sleep(0.3)"
    )
    run_program(program, LIMITS)
    time.sleep(0.2)
    running = [file.read_bytes() for file in Path("/proc").glob("[0-9]*/cmdline") if file.exists()]
    assert not any(mark.encode() in line for line in running)


def test_files_outside_cannot_be_seen_written_or_deleted(tmp_path: Path) -> None:
    decoy = tmp_path / "home" / "precious.txt"
    decoy.parent.mkdir()
    decoy.write_text("keep me")
    for action in (
        f"open({str(decoy)!r}).read()",
        f"open({str(decoy)!r}, 'w')",
        f"__import__('os').remove({str(decoy)!r})",
    ):
        assert "No such file" in run_program(action, LIMITS).reason
    run_program(f"import shutil; shutil.rmtree({str(decoy.parent)!r}, ignore_errors=True)", LIMITS)
    assert decoy.read_text() == "keep me"


def test_the_environment_and_the_descriptors_of_the_parent_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret-of-the-parent")
    reading, writing = os.pipe()
    os.set_inheritable(writing, True)
    program = (
        "import os, glob\n"
        "assert 'HF_TOKEN' not in os.environ\n"
        "for name in glob.glob('/proc/[0-9]*/environ'):\n"
        "    try: assert b'secret-of-the-parent' not in open(name, 'rb').read()\n"
        "    except PermissionError: pass\n"
        "assert len(os.listdir('/proc/self/fd')) < 10\n"
        f"try: os.write({writing}, b'x')\n"
        "except OSError: pass\n"
        "else: assert os.fstat({0}).st_mode, 'a descriptor of the parent'".replace("{0}", str(writing))
    )
    outcome = run_program(program, LIMITS)
    assert outcome.passed, outcome.reason
    os.close(writing)
    assert os.read(reading, 1) == b""
    os.close(reading)


def test_a_server_on_this_machine_cannot_be_reached() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        server.settimeout(3)
        reached: list[bool] = []
        listener = threading.Thread(target=lambda: _accept(server, reached))
        listener.start()
        outcome = run_program(f"import socket; socket.create_connection(('127.0.0.1', {port}), 1)", LIMITS)
        listener.join()
    assert not outcome.passed
    assert not reached


def _accept(server: socket.socket, reached: list[bool]) -> None:
    try:
        server.accept()
        reached.append(True)
    except TimeoutError:
        pass


def test_programs_start_in_an_empty_directory_and_leave_nothing() -> None:
    program = (
        "import os\nassert os.listdir('.') == []\nopen('left', 'w').write('x')\nassert os.listdir('.') == ['left']"
    )
    assert run_program(program, LIMITS).passed
    assert run_program(program, LIMITS).passed


@pytest.mark.parametrize(
    "option",
    [{"seconds": 1}, {"wall_seconds": 0.3}, {"memory_bytes": 200 << 20}, {"disk_bytes": 1 << 20}, {"processes": 1}],
)
def test_each_limit_limits(option: dict[str, Any]) -> None:
    program = (
        "import time, threading\ntime.sleep(0.5)\nwhile time.process_time() < 1.5: pass\n"
        "block = bytearray(300 << 20)\nopen('f', 'wb').write(bytes(4 << 20))\n"
        "thread = threading.Thread(target=print)\nthread.start()\nthread.join()"
    )
    assert run_program(program, Limits(seconds=10, wall_seconds=30)).passed
    assert not run_program(program, Limits(**{"seconds": 10, "wall_seconds": 30, **option})).passed


def test_unsafe_is_only_a_process() -> None:
    assert run_unsafely("pass").passed
    assert not run_unsafely("assert False").passed
    assert "timed out" in run_unsafely("import time; time.sleep(9)", Limits(wall_seconds=0.2)).reason


@pytest.mark.skipif(shutil.which("unshare") is None, reason="util-linux has no unshare here")
def test_the_jail_holds_for_the_only_user_of_a_namespace() -> None:
    """Who has no other user to become: anybody but root, and root in some containers."""
    capabilities = "[line.split()[1] for line in open('/proc/self/status') if line.startswith('Cap')]"
    attempts = {
        f"found = {capabilities}; assert len(found) == 5 and not any(int(each, 16) for each in found), found": True,
        "open('/decoy', 'w')": False,
        "open('/usr/decoy', 'w')": False,
        "import ctypes; assert ctypes.CDLL(None).mount(None, b'/usr', None, 4096 | 32, None) == 0": False,
        "import os; os.open('/proc/1/fd/1', os.O_WRONLY)": False,
    }
    script = (
        "import sys; from hlwq.evaluate.sandbox import run_program\nfor each in sys.argv[1:]: print(run_program(each))"
    )
    command = ["unshare", "--user", "--map-root-user", sys.executable, "-c", script, *attempts]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.stderr.startswith("unshare:"):
        pytest.skip(done.stderr.strip())
    outcomes = done.stdout.strip().splitlines()
    assert ["passed=True" in outcome for outcome in outcomes] == list(attempts.values()), done.stdout + done.stderr
