"""What verdicts on a benchmark say: scores with their errors, and whether two models differ by more than noise.

Arrays are (problems, samples). Problems are the independent units: samples of one problem are correlated, so an error
is that of the problems' means (clustered), and a comparison pairs the models' means of each problem.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

_SAME = 1e-9  # differences below are of rounding


class Mean(NamedTuple):
    """``error`` is the standard error; NaN of a single problem."""

    value: float
    error: float


@dataclass(frozen=True)
class Score:
    """Of one benchmark: the mean over all samples with its standard error over problems (NaN of one problem) and 95%
    interval, pass@k by k, majority@n, and the shares of samples that were cut at the length limit and whose answer
    could not be parsed."""

    mean: float
    error: float
    low: float
    high: float
    pass_at: dict[int, float]
    majority: float
    truncated: float
    unparsed: float


class Difference(NamedTuple):
    """``value``: mean of second less first, over problems; ``low`` to ``high``: its interval; ``differ``: how many of
    the ``problems`` have another mean."""

    value: float
    error: float
    low: float
    high: float
    level: float
    problems: int
    differ: int

    @property
    def beyond_noise(self) -> bool:
        """Is zero outside of the interval, and do so many problems differ that equal models would seldom have all of
        them on one side? At 95% that takes 6: 5 are on one side in a 16th of all cases."""
        return 2.0 ** (1 - self.differ) <= 1 - self.level and not self.low <= 0.0 <= self.high

    def sentence(self, first: str, second: str) -> str:
        """In words, in points of 100."""
        value, low, high = (100 * x for x in (self.value, self.low, self.high))
        way = "higher" if value > 0 else "lower"
        size = f"{second} scores {abs(value):.1f} points {way} than {first}" if value else f"{second} and {first} tie"
        said = f"{size} ({self.level:.0%} interval {low:+.1f} to {high:+.1f}, {self.problems} problems)"
        if self.beyond_noise:
            return f"{said}: more than noise."
        if not self.low <= 0.0 <= self.high:
            return f"{said}: as only {self.differ} of them differ, no more than noise explains."
        return f"{said}: no more than noise explains."


def score(correct: ArrayLike, answers: Sequence[Sequence[str | None]], finished: ArrayLike) -> Score:
    """All of them of (problems, samples), each problem with as many samples; pass@k for k of powers of 2, and for n.
    Raises ValueError if shapes differ or are empty."""
    right, ended, most = _array(correct), _array(finished), majority(answers, correct)
    if right.shape != ended.shape:
        raise ValueError(f"verdicts are {right.shape}, and whether samples finished is {ended.shape}")
    n = right.shape[1]
    ks = sorted({*(1 << i for i in range(n.bit_length())), n})
    unparsed = share([[answer is None for answer in row] for row in answers])
    pass_at = {k: pass_at_k(right, k).value for k in ks}
    return Score(*mean(right), *interval(right), pass_at, most.value, share(1 - ended), unparsed)


def mean(correct: ArrayLike) -> Mean:
    """Of (problems, samples) or (problems,) values: the mean over all, and its standard error over problems. Raises
    ValueError if there is nothing."""
    means = _means(correct)
    error = float(means.std(ddof=1) / np.sqrt(len(means))) if len(means) > 1 else float("nan")
    return Mean(float(means.mean()), error)


def interval(correct: ArrayLike, level: float = 0.95) -> tuple[float, float]:
    """Wilson's, with problems as trials: it holds at 0 of 30, too, where standard errors and resamples are 0. Of
    several samples a problem it is rather too wide: means vary no more than zeros and ones of the same mean."""
    means, z = _means(correct), NormalDist().inv_cdf((1 + level) / 2)
    n, p = len(means), float(means.mean())
    centre, half = p + z * z / (2 * n), z * float(np.sqrt(p * (1 - p) / n + z * z / (4 * n * n)))
    low, high = ((centre + side * half) / (1 + z * z / n) for side in (-1, 1))
    return max(low, 0.0) if p else 0.0, min(high, 1.0) if p < 1 else 1.0


def share(flags: ArrayLike) -> float:
    """Of the samples, the share that is flagged: truncated, or unparsed."""
    return mean(flags).value


def pass_at_k(correct: ArrayLike, k: int) -> Mean:
    """The chance that one of ``k`` samples, taken of a problem's n without putting back, is right: unbiased. Raises
    ValueError for a k that is not from 1 to n."""
    right = _array(correct)
    if right.ndim != 2 or not 1 <= k <= right.shape[1]:
        raise ValueError(f"k = {k}: give one from 1 to the number of samples, {right.shape[1:]}")
    n, count = right.shape[1], right.sum(axis=1)
    # the chance that all k are wrong: C(n - c, k) / C(n, k)
    factors = [(n - count - i) / (n - i) for i in range(k)]
    return mean(1.0 - np.clip(factors, 0.0, None).prod(axis=0))


def majority(answers: Sequence[Sequence[str | None]], correct: ArrayLike) -> Mean:
    """majority@n: is the answer that most samples of a problem gave right? Among answers given as often each counts its
    share; None is no vote; without votes it is wrong. Of equal answers, the share of right ones counts."""
    right = _array(correct)
    if right.ndim != 2 or [len(row) for row in answers] != [right.shape[1]] * len(right):
        raise ValueError(f"give an answer for each of the verdicts, {right.shape}")
    scores = []
    for row, verdicts in zip(answers, right, strict=True):
        votes = Counter(answer for answer in row if answer is not None)
        most = max(votes.values(), default=0)
        winners = [answer for answer, count in votes.items() if count == most]
        means = [np.mean([v for a, v in zip(row, verdicts, strict=True) if a == winner]) for winner in winners]
        scores.append(float(np.mean(means)) if means else 0.0)
    return mean(scores)


def difference(first: ArrayLike, second: ArrayLike, level: float = 0.95) -> Difference:
    """Of two models on the same problems in the same order; their numbers of samples may differ. The interval is
    Student's, of the problems' differences; if all of these are equal, and so show no spread, Newcombe's of two
    proportions. Raises ValueError if problems do not match."""
    ours, theirs = _means(first), _means(second)
    if ours.shape != theirs.shape:
        raise ValueError(f"the models answered {len(ours)} and {len(theirs)} problems: compare the same ones")
    if not 0.0 < level < 1.0:
        raise ValueError(f"level = {level}: give one between 0 and 1")
    change = theirs - ours
    value, error = mean(change)
    if np.ptp(change) < _SAME:
        (p, l1, u1), (q, l2, u2) = ((float(m.mean()), *interval(m, level)) for m in (ours, theirs))
        low, high = q - p - float(np.hypot(q - l2, u1 - p)), q - p + float(np.hypot(u2 - q, p - l1))
    else:
        half = _student(len(change) - 1, level) * error
        low, high = max(value - half, -1.0), min(value + half, 1.0)
    return Difference(value, error, low, high, level, len(change), int((abs(change) >= _SAME).sum()))


def _student(freedom: int, level: float) -> float:
    """The t beyond which, on either side, 1 - ``level`` of Student's distribution lies."""
    low, high = 0.0, 1.0
    while _within(high, freedom) < level:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < level else (low, middle)
    return high


def _within(t: float, freedom: int) -> float:
    """The share of Student's distribution from -t to t (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(freedom))
    square, odd = math.cos(angle) ** 2, freedom % 2
    term, total = 1.0, 0.0
    for k in range(1 + odd, freedom, 2):
        total += term
        term *= square * k / (k + 1)
    share = math.sin(angle) * total
    return 2 / math.pi * (angle + math.cos(angle) * share) if odd else share


def _array(values: ArrayLike) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim not in (1, 2) or array.size == 0 or not np.isfinite(array).all():
        raise ValueError(f"give finite values of (problems, samples), at least one: {array.shape}")
    return array


def _means(values: ArrayLike) -> NDArray[np.float64]:
    """Of each problem."""
    array = _array(values)
    return array if array.ndim == 1 else array.mean(axis=1)
