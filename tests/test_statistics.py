from __future__ import annotations

import itertools
import math

import pytest

from hlwq.evaluate.statistics import (
    Estimate,
    mcnemar,
    mean_estimate,
    paired_verdict,
    pass_at_k,
    standard_error,
    verdict,
    wilson,
)


def test_mean_has_students_interval() -> None:
    values = [1.0, 2.0, 4.0, 5.0]
    estimate = mean_estimate(values)
    assert estimate.mean == 3.0
    assert standard_error(values) == pytest.approx(math.sqrt(10 / 3 / 4))
    assert estimate.high - 3.0 == pytest.approx(3.182446 * math.sqrt(10 / 3 / 4), rel=1e-5)  # t table, 3 degrees
    assert estimate.n == 4


def test_one_value_says_nothing_of_its_spread() -> None:
    assert mean_estimate([2.0]) == Estimate(2.0, -math.inf, math.inf, 1)


def test_wilson_is_that_of_the_literature() -> None:
    # Newcombe 1998, table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29 (method 3).
    for successes, trials, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        estimate = wilson(successes, trials)
        assert (estimate.low, estimate.high) == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))


def test_humaneval_interval_is_seven_points_wide_on_each_side() -> None:
    estimate = wilson(110, 164)
    assert estimate.mean == pytest.approx(0.6707, abs=1e-4)
    assert estimate.high - estimate.low == pytest.approx(0.14, abs=0.005)


def test_mcnemar_is_the_binomial_of_what_disagrees() -> None:
    first = [True] * 10 + [False] * 5 + [True] * 100
    second = [False] * 10 + [True] * 5 + [True] * 100
    tail = sum(math.comb(15, i) for i in range(6)) / 2**15
    assert mcnemar(first, second) == pytest.approx(2 * tail)
    assert mcnemar(second, first) == mcnemar(first, second)
    assert mcnemar(first, first) == 1.0


@pytest.mark.parametrize(("samples", "correct", "k"), [(5, 2, 1), (5, 2, 3), (6, 0, 2), (6, 6, 2), (7, 3, 5)])
def test_pass_at_k_is_the_mean_over_all_draws(samples: int, correct: int, k: int) -> None:
    outcomes = [True] * correct + [False] * (samples - correct)
    draws = list(itertools.combinations(outcomes, k))
    assert pass_at_k(samples, correct, k) == pytest.approx(sum(any(draw) for draw in draws) / len(draws))


def test_pass_at_k_of_too_few_samples_is_refused() -> None:
    with pytest.raises(ValueError, match="not defined"):
        pass_at_k(2, 1, 3)


def test_a_verdict_needs_the_whole_interval() -> None:
    assert verdict(Estimate(0.1, 0.01, 0.2, 8), higher_is_better=True) == "better"
    assert verdict(Estimate(0.1, 0.01, 0.2, 8), higher_is_better=False) == "worse"
    assert verdict(Estimate(-0.1, -0.2, -0.01, 8), higher_is_better=False) == "better"
    assert verdict(Estimate(0.1, -0.01, 0.2, 8), higher_is_better=True) == "no measurable difference"


def test_a_verdict_on_pairs_needs_a_small_p() -> None:
    theirs = [False] * 20
    assert paired_verdict([True] * 6 + [False] * 14, theirs) == (pytest.approx(2 / 2**6), "better")
    assert paired_verdict([True] * 5 + [False] * 15, theirs) == (pytest.approx(2 / 2**5), "no measurable difference")
    assert paired_verdict(theirs, [True] * 6 + [False] * 14)[1] == "worse"
