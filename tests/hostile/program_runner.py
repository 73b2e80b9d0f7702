"""Runs programs in the sandbox for `test_programs.py`, as whichever user started it: a line of JSON in, a line out."""

from __future__ import annotations

import json
import resource
import sys

from hlwq.errors import HlwqError
from hlwq.evaluate.sandbox import Limits, Submission, run_program

for line in sys.stdin:
    request = json.loads(line)
    try:
        outcome = run_program(Submission(*request["submission"]), Limits(**request["limits"]))
        answer = {"kind": outcome.kind, "reason": outcome.reason}
    except HlwqError as error:
        answer = {"kind": "error", "reason": str(error)}
    answer["peak_bytes"] = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss << 10
    print(json.dumps(answer), flush=True)
