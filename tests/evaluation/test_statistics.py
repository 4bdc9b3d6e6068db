"""Statistics against enumeration, brute force and simulation."""

import itertools
import math

import numpy as np
import pytest

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


def test_the_interval_is_that_of_all_resamples():
    first, second = np.array([0.0, 0.5, 1.0, 0.25, 0.0]), np.array([0.5, 0.5, 0.75, 1.0, 0.25])
    every = [np.mean([(second - first)[i] for i in some]) for some in itertools.product(range(5), repeat=5)]
    found = difference(first, second, resamples=200_000, level=0.8)
    assert found.value == pytest.approx(np.mean(every)) and found.error == pytest.approx(mean(second - first).error)
    # a step of the exact distribution is 1/80
    assert abs(found.low - np.quantile(every, 0.1)) < 1 / 80 and abs(found.high - np.quantile(every, 0.9)) < 1 / 80


def test_a_seed_decides_the_interval_and_problems_are_paired():
    first = np.tile([[1, 0], [0, 0], [1, 1], [0, 1]], (10, 1))
    assert difference(first, first, seed=1) == difference(first, first, seed=1)
    assert difference(first, 1 - first, 1, 50) != difference(first, 1 - first, 2, 50)
    assert difference(first, first)[:4] == (0.0, 0.0, 0.0, 0.0)
    assert difference(first, first[:, :1]).problems == 40
    with pytest.raises(ValueError, match="40 and 39 problems"):
        difference(first, first[1:])
    with pytest.raises(ValueError, match="level = "):
        difference(first, first, level=1.5)


def test_of_equal_models_few_and_of_others_most_are_told_apart():
    chances = RANDOM.random((200, 60, 1))
    draws = [RANDOM.random((200, 60, 4)) < np.clip(chances + shift, 0, 1) for shift in (0.0, 0.0, 0.15)]
    alike = np.mean([difference(a, b, resamples=400).beyond_noise for a, b in zip(draws[0], draws[1], strict=True)])
    apart = np.mean([difference(a, b, resamples=400).beyond_noise for a, b in zip(draws[0], draws[2], strict=True)])
    assert 0.01 < alike < 0.12 and apart > 0.9


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
        "after scores 50.0 points higher than before (95% interval +35.0 to +65.0, 40 problems): more than noise."
    )
    assert "lower than" in difference(high, low).sentence("a", "b")
    tie = difference(low, low).sentence("before", "after")
    assert tie.startswith("after and before tie") and tie.endswith("no more than noise explains.")
    assert not difference([[0]], [[1]]).beyond_noise


@pytest.mark.parametrize("values", [[], [[]], [[float("nan")]], [[[1]]]])
def test_nothing_to_average_is_an_error(values):
    with pytest.raises(ValueError, match="at least one"):
        mean(values)
