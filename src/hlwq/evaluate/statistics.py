"""Uncertainty of numbers, and whether two of them differ."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["better", "worse", "no measurable difference"]
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean with its confidence interval.

    Attributes:
        mean: the estimate.
        low: the lower end of its interval.
        high: the upper end.
        n: number of observations.
    """

    mean: float
    low: float
    high: float
    n: int


def standard_error(values: Sequence[float]) -> float:
    """Standard error of the mean of two or more independent values."""
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))


def mean_estimate(values: Sequence[float], confidence: float = CONFIDENCE) -> Estimate:
    """The mean of independent values with Student's t interval; infinitely wide for a single value."""
    from scipy.stats import t  # an extra

    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return Estimate(mean, -math.inf, math.inf, len(values))
    margin = float(t.ppf((1 + confidence) / 2, len(values) - 1)) * standard_error(values)
    return Estimate(mean, mean - margin, mean + margin, len(values))


def share_estimate(values: Sequence[float]) -> Estimate:
    """`mean_estimate` of shares, whose interval cannot leave 0 to 1."""
    estimate = mean_estimate(values)
    return Estimate(estimate.mean, max(0.0, estimate.low), min(1.0, estimate.high), estimate.n)


def wilson(successes: int, trials: int, confidence: float = CONFIDENCE) -> Estimate:
    """A proportion with Wilson's score interval (Wilson 1927), which holds for few trials and extreme proportions."""
    from scipy.stats import binomtest

    interval = binomtest(successes, trials).proportion_ci(confidence, method="wilson")
    return Estimate(successes / trials, float(interval.low), float(interval.high), trials)


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> float:
    """The exact p-value of McNemar's test (1947): do two paired yes/no outcomes have one success rate?

    Only the pairs that disagree count; under the hypothesis each is as likely to favour the one as the other.

    Args:
        first: outcomes of one method, problem by problem.
        second: outcomes of the other method on the same problems.
    """
    from scipy.stats import binomtest

    only_first = sum(a and not b for a, b in zip(first, second, strict=True))
    only_second = sum(b and not a for a, b in zip(first, second, strict=True))
    disagreeing = only_first + only_second
    return float(binomtest(only_first, disagreeing).pvalue) if disagreeing else 1.0


def paired_verdict(ours: Sequence[bool], theirs: Sequence[bool]) -> tuple[float, Verdict]:
    """McNemar's p-value for paired yes/no outcomes, and whether ours are better, yes being good."""
    p_value = mcnemar(ours, theirs)
    if p_value >= 1 - CONFIDENCE:
        return p_value, "no measurable difference"
    return p_value, "better" if sum(ours) > sum(theirs) else "worse"


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """The unbiased estimate of pass@k for one problem: 1 − C(n−c, k)/C(n, k) (Chen et al., arXiv 2107.03374, eq. 1).

    Args:
        samples: n, the number of programs for the problem.
        correct: c, the number of programs that pass.
        k: number of programs drawn; at most n.
    """
    if not 0 <= correct <= samples or not 1 <= k <= samples:
        raise ValueError(f"pass@{k} of {correct} correct in {samples} samples is not defined")
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def verdict(difference: Estimate, *, higher_is_better: bool) -> Verdict:
    """Whether ours is better, by the interval of (ours − theirs)."""
    if difference.low > 0:
        return "better" if higher_is_better else "worse"
    if difference.high < 0:
        return "worse" if higher_is_better else "better"
    return "no measurable difference"
