"""Run in an engine's own environment: scripts of this folder, each in a process forked from one that has imported much.

    python zygote.py MODULE...

Each line of standard input is a job: `{"script": …, "arguments": […], "folder": …, "log": …}`. The script's `main` is
called in that folder with these arguments, and what it prints goes to the log; its exit status is printed.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
from typing import Any


def main(*modules: str) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what imports print is no answer
    for module in modules:
        importlib.import_module(module)
    for line in sys.stdin:
        child = os.fork()
        if not child:
            os._exit(run(json.loads(line)))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=answers, flush=True)


def run(job: dict[str, Any]) -> int:
    log = os.open(job["log"], os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(job["folder"])
    try:
        importlib.import_module(job["script"]).main(*job["arguments"])
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


if __name__ == "__main__":
    main(*sys.argv[1:])
