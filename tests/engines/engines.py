"""Where the engines' environments are, and how to run a script in one."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).parent

RunEngine = Callable[..., Any]


def engine_python(engine: str) -> Path:
    root = os.environ.get("HLWQ_ENGINES")
    if not root:
        pytest.skip("HLWQ_ENGINES names no directory of engine environments: run `make test-engines`")
    python = Path(root).absolute() / engine / "bin" / "python"
    if not python.exists():
        pytest.skip(f"{engine} is not installed in {root}: run `make test-engines`")
    return python


def skip_without_int4_kernel() -> None:
    """vLLM 0.32 loads INT4 on any x86 processor, but fails in the first product on those without AVX-512."""
    flags = Path("/proc/cpuinfo")
    if flags.exists() and "avx2" in flags.read_text() and "avx512f" not in flags.read_text():
        pytest.skip("vLLM's INT4 kernel for CPUs needs AVX-512, which this processor lacks")


IMPORTED = {
    "vllm": ("vllm.entrypoints.llm", "vllm.v1.worker.cpu_worker", "vllm.model_executor.models.llama"),
    "mlx": ("mlx_lm",),
    "gptqmodel": (),  # its threads do not outlive a fork
    "polarquant": ("polarengine_vllm",),
}
"""What takes longer to import than all else that the scripts do."""


@cache
def _zygote(engine: str) -> subprocess.Popen[str]:
    """A process in an engine's environment that has imported it; it ends with this one."""
    python = engine_python(engine)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "GPTQMODEL_CPU_WORKERS": "2"}
    # One process less imports vLLM; the servers' tests run the engine in its own.
    environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    # It counts ranks for a prompt's log-probabilities in a function that would be compiled first, in every process.
    environment["TORCH_COMPILE_DISABLE"] = "1"
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    command = [python, SCRIPTS / "zygote.py", *IMPORTED[engine]]
    return subprocess.Popen(command, env=environment, start_new_session=True, **pipes)


def run_script(engine: str, script: str, directory: Path, out: Path, payload: Path | None, seconds: int = 900) -> None:
    """Run one of this folder's scripts in an engine's environment; it writes `out`."""
    zygote, log = _zygote(engine), out.with_suffix(".log")
    assert zygote.stdin
    assert zygote.stdout
    arguments = [str(each) for each in (directory, payload, out) if each]
    job = {"script": Path(script).stem, "arguments": arguments, "folder": str(out.parent), "log": str(log)}
    print(json.dumps(job), file=zygote.stdin, flush=True)
    answered = select.select([zygote.stdout], [], [], seconds)[0]
    status = zygote.stdout.readline().strip() if answered else ""
    if not status:  # nothing in time, or the engine cannot be imported
        with suppress(ProcessLookupError):
            os.killpg(zygote.pid, signal.SIGKILL)
        _zygote.cache_clear()
        said = log.read_text()[-6000:] if log.exists() else "See the standard error of its process."
        pytest.fail(
            f"{script} did not end within {seconds} s, or {engine} ended before (status {zygote.wait()}). {said}"
        )
    assert status == "0", log.read_text()[-9000:]


@contextmanager
def serve(engine: str, arguments: Callable[[int], list[str]], log: Path) -> Iterator[str]:
    """Start an engine's server on this machine alone, wait until it answers, and stop it; gives its address."""
    python = engine_python(engine)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    hub = log.parent / "hub"
    hub.mkdir(exist_ok=True)  # mlx_lm.server lists what is in there, and fails where it is not
    environment = {**os.environ, "HF_HUB_CACHE": str(hub), "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    with log.open("w") as stream:
        command = [str(python), *arguments(port)]
        server = subprocess.Popen(command, env=environment, stdout=stream, stderr=stream, start_new_session=True)
    url = f"http://127.0.0.1:{port}/v1"
    try:
        for _ in range(600):
            assert server.poll() is None, log.read_text()[-6000:]
            try:
                urllib.request.urlopen(f"{url}/models", timeout=5).close()
                break
            except OSError:
                time.sleep(0.5)
        else:
            raise AssertionError(f"the server does not answer: {log.read_text()[-6000:]}")
        yield url
    finally:
        for stop in (signal.SIGTERM, signal.SIGKILL):  # its children too, some of which outlive the first
            with suppress(ProcessLookupError):
                os.killpg(server.pid, stop)
            with suppress(subprocess.TimeoutExpired):
                server.wait(20)


def write_payload(file: Path, payload: Any) -> Path:
    file.write_text(json.dumps(payload))
    return file
