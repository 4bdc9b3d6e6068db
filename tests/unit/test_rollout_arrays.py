"""Rollouts as arrays: they come back to the bit, and what is no rollouts is refused."""

from __future__ import annotations

import json
import math
import pickle
import random
import struct
from array import array
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from nemo_tropd.batch import Flat, Rollout
from nemo_tropd.rollout.arrays import Arrays, decode, encode
from nemo_tropd.training.ahead import FILE, load_rollouts, save_rollouts

HEADER, ROLLOUT = 24, 56  # bytes


def some(count: int, log_prob: Callable[[], float], longest: int = 6) -> list[Rollout]:
    """Random ones; prefixes and responses may be empty."""

    def ids(least: int) -> list[int]:
        return [random.randrange(1 << 31) for _ in range(random.randint(least, longest))]

    found = []
    for i in range(count):
        response = ids(0)
        scores = [log_prob() for _ in response]
        version, finished = random.getrandbits(62), random.random() < 0.5
        found.append(Rollout(ids(1), ids(0), response, scores, version, 3 * i, random.getrandbits(40), finished))
    return found


def double() -> float:
    return -random.random() * 10 - 1e-9


def single() -> float:
    return float(np.float32(double()))


@pytest.mark.random
@pytest.mark.parametrize(("log_prob", "width"), [(single, 4), (double, 8)])
def test_rollouts_come_back_as_they_were(log_prob: Callable[[], float], width: int) -> None:
    empty = Rollout([2**31 - 1, -(2**31)], [], [], [], 0, 0, 0, False)
    full = Rollout([7], [], [1, 2], [log_prob(), log_prob()], 2**63 - 1, -1, 5, True)
    for rollouts in ([full], [*some(random.randint(0, 9), log_prob), empty, full], [empty, full, empty]):
        data = encode(rollouts)
        assert decode(data) == decode(memoryview(bytes(data))) == rollouts
        ids, scored = sum(r.length for r in rollouts), sum(len(r.response_ids) for r in rollouts)
        assert len(data) == HEADER + ROLLOUT * len(rollouts) + 4 * ids + width * scored
    assert decode(encode([])) == [] and decode(encode([empty])) == [empty]


@pytest.mark.parametrize(
    "odd",
    [[-math.inf], [math.nan], [-0.0, 0.0], [-1e-40], [-5e-324], [-1e300], [-0.1], [2**-149], [-1.0, math.pi]],
    ids=str,
)
def test_log_probabilities_come_back_to_the_bit(odd: list[float]) -> None:
    payload = struct.unpack("<d", struct.pack("<Q", 0xFFF8_0000_0000_0001))[0]  # a NaN that single precision has not
    for scores in (odd, [*odd, payload], [*odd, -0.5]):
        sent = Rollout([1], [], [3] * len(scores), scores, 0, 0, 0, True)
        (came,) = decode(encode([sent]))
        assert bytes(came.response_log_probs) == bytes(array("d", scores))


def test_a_rollout_holds_its_numbers_in_arrays_that_read_as_lists() -> None:
    r = Rollout((1, 2), range(3, 5), np.array([5, 2**31 - 1]), [-0.25, -1], 0, 1, 2, True)
    assert (r.length, r.loss_tokens, list(r.token_ids)) == (6, 4, [1, 2, 3, 4, 5, 2**31 - 1])
    assert all(type(i) is int for i in r.token_ids) and all(type(x) is float for x in r.response_log_probs)
    kept = {name: value.itemsize for name, value in vars(r).items() if isinstance(value, array)}
    assert kept == {"prompt_ids": 4, "prefix_ids": 4, "response_ids": 4, "response_log_probs": 8}
    assert r.response_ids == [5, 2**31 - 1] != r.prefix_ids and r.prompt_ids != (1, 2)
    assert (r.prefix_ids != [3, 4]) is False
    assert r.response_log_probs[-1:] == [-1.0] and type(r.response_ids[:1]) is list and [*r.prefix_ids[::-1]] == [4, 3]
    first, then = r.prompt_ids, r.prefix_ids
    for joined in (first + then, list(first) + then, first + list(then)):
        assert type(joined) is list and joined == [1, 2, 3, 4]
    assert pickle.loads(pickle.dumps(r)) == r and type(pickle.loads(pickle.dumps(r)).prompt_ids) is Flat
    assert len(pickle.dumps(replace(r, prefix_ids=range(1000)))) < 4 * 1000 + 1000
    assert Rollout(**json.loads(json.dumps(r.plain))) == r != replace(r, prefix_ids=[3, 5])
    for ids in ([2**31], [-(2**31) - 1]):
        with pytest.raises(ValueError, match="prefix_ids has a number that does not fit 32 bits"):
            replace(r, prefix_ids=ids)
    with pytest.raises(TypeError):
        replace(r, prefix_ids=[1.5])


def test_what_does_not_fit_an_array_is_an_error_of_the_sender() -> None:
    with pytest.raises(OverflowError):
        encode([Rollout([1], [], [], [], 2**63, 0, 0, True)])


def header(data: bytes, place: int, value: int) -> bytes:
    return data[: 8 * place] + struct.pack("<q", value) + data[8 * place + 8 :]


def number(data: bytes, column: int, value: int, rollout: int = 0) -> bytes:
    return header(data, 3 + 7 * rollout + column, value)


# Two rollouts of 1 + 2 + 2 tokens, whose log-probabilities are float32.
GOOD = bytes(encode([Rollout([1], [2, 3], [4, 5], [-0.5, -0.25], 0, i, i, True) for i in range(2)]))
BAD: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "0 bytes of rollouts, of which 24 are the header's"),
    "a header that is cut": (GOOD[:23], "23 bytes of rollouts"),
    "a header alone": (GOOD[:24], "24 bytes are not 2 rollouts with 10 ids"),
    "a byte less": (GOOD[:-1], "are not 2 rollouts with 10 ids"),
    "a byte more": (GOOD + b"\0", "are not 2 rollouts with 10 ids"),
    "four bytes more": (GOOD + bytes(4), "10 ids and 5 log-probabilities are not of these rollouts"),
    "a rollout more": (header(GOOD, 0, 3), "are not of these rollouts|are not 3 rollouts"),
    "rollouts past any memory": (header(GOOD, 0, 2**62), "are not 4611686018427387904 rollouts"),
    "fewer than none": (header(GOOD, 0, -1), "are not -1 rollouts"),
    "ids past any memory": (header(GOOD, 1, 2**63 - 1), "rollouts with 9223372036854775807 ids"),
    "fewer ids than none": (header(GOOD, 1, -1), "rollouts with -1 ids"),
    "an id less": (header(GOOD, 1, 9), "9 ids and 5 log-probabilities are not of these rollouts"),
    "another width": (header(GOOD, 2, 2), "are not 2 rollouts"),
    "no width": (header(GOOD, 2, 0), "are not 2 rollouts"),
    "doubles": (header(GOOD, 2, 8), "10 ids and 2 log-probabilities are not of these rollouts"),
    "half finished": (number(GOOD, 3, 2), "neither finished nor unfinished"),
    "no prompt": (number(number(GOOD, 4, 0), 5, 3), "a rollout needs a prompt"),
    "a length below zero": (number(number(GOOD, 4, -1), 5, 4), "are not of these rollouts"),
    "a length of another rollout": (number(number(GOOD, 5, 9), 5, -5, 1), "are not of these rollouts"),
    "lengths that go round": (
        number(number(number(GOOD, 4, 2**62 + 8), 5, 2**62), 4, 2**63 - 4, 1),
        "are not of these rollouts",
    ),
    "a response less": (number(number(GOOD, 6, 1), 5, 3), "10 ids and 4 log-probabilities are not of these rollouts"),
}


@pytest.mark.parametrize("bad", BAD)
def test_bytes_that_are_no_rollouts_are_refused(bad: str) -> None:
    data, why = BAD[bad]
    with pytest.raises(ValueError, match=why):
        decode(data)


@pytest.mark.random
def test_any_bytes_are_rollouts_or_a_value_error() -> None:
    assert len(decode(GOOD)) == 2
    for _ in range(3000):
        data = bytearray(GOOD)
        for _ in range(random.randint(1, 3)):
            data[random.randrange(len(data))] = random.randrange(256)
        data = data[: random.choice([len(data), random.randrange(len(data))])] + bytes(random.choice([0, 0, 4, 8]))
        try:
            found = decode(data)
        except ValueError:
            continue
        assert len(encode(found)) <= len(data) + 4 * 4  # widths may be others, for a log-probability that is no float32


def test_a_file_of_doubles_is_read_and_one_whose_arrays_do_not_fit_is_not(tmp_path: Path) -> None:
    counts, versions = {3: 2, 5: 0, 4: 1}, {3: 0, 4: 1}
    rollouts = {
        step: [replace(r, weight_version=versions[step]) for r in some(n, single)] for step, n in counts.items()
    }
    save_rollouts(rollouts, tmp_path)
    assert load_rollouts(tmp_path, versions) == {step: r for step, r in rollouts.items() if r}
    tensors = load_file(tmp_path / FILE)
    assert tensors["numbers"].shape == (3, 8) and tensors["log_probs"].dtype == np.float32
    save_file({**tensors, "log_probs": tensors["log_probs"].astype(np.float64)}, tmp_path / FILE)
    assert load_rollouts(tmp_path, versions) == {3: rollouts[3], 4: rollouts[4]}
    with pytest.raises(ValueError, match="has other rollouts than the checkpoint says"):
        load_rollouts(tmp_path, {3: 0, 4: 0})
    save_file({**tensors, "ids": tensors["ids"][:-1]}, tmp_path / FILE)
    with pytest.raises(ValueError, match="are not of these rollouts"):
        load_rollouts(tmp_path, versions)


def test_what_rollouts_hold_is_their_own() -> None:
    data = bytearray(GOOD)
    (first, _), before = decode(data), decode(GOOD)
    data[:] = bytes(len(data))
    assert first == before[0]
    arrays = Arrays.of(before)
    arrays.ids[:] = 0
    assert before == decode(GOOD)
