"""Statistics against enumeration, brute force and simulation."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from nemo_tropd.evaluation.statistics import Score, difference, interval, majority, mean, pass_at_k, score, share

RANDOM = np.random.default_rng(3)
VERDICTS = RANDOM.random((7, 6)) < RANDOM.random((7, 1))


def test_the_error_is_that_of_problems():
    assert mean([[1, 1, 1, 1], [0, 0, 0, 0]]) == (0.5, pytest.approx(math.sqrt(0.5 / 2)))
    assert mean([[1, 0], [1, 0]]) == (0.5, 0.0)
    one = mean([[1, 0, 0, 1]])
    assert one.value == 0.5 and math.isnan(one.error)
    assert share([[True, False], [False, False]]) == 0.25
    # samples of one problem, all alike, tell no more than one of them
    assert mean(np.repeat(VERDICTS[:, :1], 9, axis=1)).error == pytest.approx(mean(VERDICTS[:, 0]).error)


def test_the_error_is_the_spread_of_means_over_drawn_problems():
    chances = RANDOM.random((4000, 30))
    drawn = RANDOM.random((4000, 30, 5)) < chances[..., None]
    errors = [mean(verdicts).error for verdicts in drawn[:400]]
    assert np.mean(errors) == pytest.approx(drawn.mean(axis=(1, 2)).std(), rel=0.05)


@pytest.mark.parametrize("k", [1, 2, 3, 5, 6])
def test_pass_at_k_is_the_mean_over_all_choices(k):
    chosen = [np.mean([any(row[list(some)]) for some in itertools.combinations(range(6), k)]) for row in VERDICTS]
    value, error = pass_at_k(VERDICTS, k)
    assert value == pytest.approx(np.mean(chosen)) and error == pytest.approx(np.std(chosen, ddof=1) / math.sqrt(7))


def test_pass_at_k_of_many_samples_is_exact():
    verdicts = np.zeros((1, 1000))
    verdicts[0, :3] = 1
    exact = 1 - math.comb(997, 500) / math.comb(1000, 500)
    assert pass_at_k(verdicts, 500).value == pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize("k", [0, 7, -1])
def test_a_k_that_cannot_be_is_an_error(k):
    with pytest.raises(ValueError, match=f"k = {k}"):
        pass_at_k(VERDICTS, k)


def test_majority():
    answers = [
        ["4", "4", "5"],
        ["4", "5", "5"],
        ["4", "5", None],
        [None, None, None],
        ["4", None, None],
        ["a", "a", "a"],
    ]
    correct = [[1, 1, 0], [1, 0, 0], [1, 0, 0], [0, 0, 0], [1, 0, 0], [1, 0, 1]]
    assert majority(answers, correct).value == pytest.approx((1 + 0 + 0.5 + 0 + 1 + 2 / 3) / 6)
    with pytest.raises(ValueError, match="an answer for each"):
        majority([["4"]], [[1, 0]])


def test_a_score_has_all_of_them():
    correct, answers = [[1, 0, 0], [1, 1, 0]], [["4", None, "5"], ["4", "4", "5"]]
    found = score(correct, answers, [[1, 1, 1], [1, 0, 1]])
    assert found == Score(
        0.5, pytest.approx(1 / 6), *interval(correct), {1: 0.5, 2: pytest.approx(5 / 6), 3: 1.0}, 0.75, 1 / 6, 1 / 6
    )
    with pytest.raises(ValueError, match="whether samples finished"):
        score(correct, answers, [[1], [1]])


@pytest.mark.parametrize("level", [0.5, 0.8, 0.95, 0.99])
@pytest.mark.parametrize("problems", [2, 3, 6, 7, 31, 1000])
def test_the_interval_is_students(problems, level):
    change = np.linspace(-0.1, 0.2, problems) ** 3
    found = difference(np.zeros(problems), change, level)
    half = stats.t.ppf((1 + level) / 2, problems - 1) * stats.sem(change)
    assert found[:2] == pytest.approx((change.mean(), stats.sem(change)))
    assert found[2:4] == pytest.approx((change.mean() - half, change.mean() + half))


def test_problems_are_paired():
    first = np.tile([[1, 0], [0, 0], [1, 1], [0, 1]], (10, 1))
    assert difference(first, 1 - first).value == 0.0 and difference(first, first[:, :1]).problems == 40
    assert difference([[0, 0], [1, 1]], [[1, 1], [0, 1]])[2:4] == (-1.0, 1.0)  # no more than all
    with pytest.raises(ValueError, match="40 and 39 problems"):
        difference(first, first[1:])
    with pytest.raises(ValueError, match="level = "):
        difference(first, first, level=1.5)


def test_differences_that_are_all_equal_show_no_spread_but_are_not_certain():
    for problems in (1, 3, 40):
        first = np.tile([[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]], (20, 1))[:problems]
        second = first.copy()
        second[:, 3] = 1
        found, tie = difference(first, second), difference(first, first)
        assert found.value == 0.25 and found.low < 0.2 and found.high > 0.3
        assert tie.value == 0 and tie.low < -0.1 and tie.high > 0.1 and not tie.beyond_noise
    thirds = np.repeat([[0, 1, 0], [1, 1, 0], [0, 0, 0]], 5, axis=0)  # whose differences round differently
    more = thirds.copy()
    more[np.arange(15), [0] * 5 + [2] * 5 + [1] * 5] = 1
    assert difference(thirds, more).low < 0.1


def test_fewer_than_six_problems_that_differ_say_nothing():
    zeros = np.zeros((30, 1))
    for problems, differing, beyond in ((5, 5, False), (30, 5, False), (30, 6, True), (6, 6, True), (3, 3, False)):
        second = zeros[:problems].copy()
        second[:differing] = 1
        found = difference(zeros[:problems], second)
        assert (found.differ, found.beyond_noise) == (differing, beyond)
    found = difference([[0.0]] * 3, [[0.25], [0.26], [0.25]])
    assert found.low > 0.2 and found.sentence("a", "b").endswith(
        "3 problems): as only 3 of them differ, no more than noise explains."
    )


@pytest.mark.parametrize("problems", [2, 3, 4, 5, 6, 8, 30])
def test_of_equal_models_few_are_told_apart(problems):
    draws = RANDOM.random((2, 1000, problems, 4)) < RANDOM.random((1000, problems, 1))
    assert np.mean([difference(a, b).beyond_noise for a, b in zip(*draws, strict=True)]) < 0.08


def test_of_others_most_are_told_apart():
    chances = RANDOM.random((200, 60, 1))
    first, second = (RANDOM.random((200, 60, 4)) < np.clip(chances + shift, 0, 1) for shift in (0.0, 0.15))
    assert np.mean([difference(a, b).beyond_noise for a, b in zip(first, second, strict=True)]) > 0.85


def test_an_interval_holds_where_nothing_is_right_or_everything():
    assert interval(np.zeros((30, 1))) == (0.0, pytest.approx(0.11352, abs=1e-5))
    assert interval(np.ones((30, 4))) == (pytest.approx(0.88648, abs=1e-5), 1.0)
    for chance in (0.01, 0.05, 0.4):
        held = [low <= chance <= high for low, high in map(interval, RANDOM.random((2000, 30)) < chance)]
        assert np.mean(held) > 0.92, chance
    none, every = np.zeros(30), np.ones(30)
    tie, best = difference(none, none), difference(none, every)
    assert (tie.low, tie.high) == (pytest.approx(-0.11352, abs=1e-5), pytest.approx(0.11352, abs=1e-5))
    assert not tie.beyond_noise and best.beyond_noise and 0.8 < best.low < 0.9 and best.high == 1.0
    assert difference(every, none)[2:4] == (-1.0, pytest.approx(-best.low))


def test_in_words():
    low = np.zeros((40, 2))
    high = np.ones((40, 2))
    high[:20] = 0
    assert difference(low, high).sentence("before", "after") == (
        "after scores 50.0 points higher than before (95% interval +33.8 to +66.2, 40 problems): more than noise."
    )
    assert "lower than" in difference(high, low).sentence("a", "b")
    tie = difference(low, low).sentence("before", "after")
    assert tie.startswith("after and before tie") and tie.endswith("no more than noise explains.")
    assert not difference([[0]], [[1]]).beyond_noise


@pytest.mark.parametrize("values", [[], [[]], [[float("nan")]], [[[1]]]])
def test_nothing_to_average_is_an_error(values):
    with pytest.raises(ValueError, match="at least one"):
        mean(values)
