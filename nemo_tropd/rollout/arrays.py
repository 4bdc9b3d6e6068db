"""Rollouts as a few arrays: what a checkpoint keeps, what travels between ranks, and what an engine's server answers.

A response's token takes 8 bytes: an int32 and, since engines compute in single precision, a float32. If one of the
log-probabilities is no float32, all of them are float64, 12 bytes a token: they come back to the bit in either case.
Prompts and prefixes take 4 bytes a token, a rollout 56 more.

Bytes, in this order and in the machine's byte order: three int64 (rollouts, ids, bytes a log-probability), then the
arrays ``numbers``, ``log_probs`` and ``ids``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from nemo_tropd.batch import Flat, Rollout

_COLUMNS = 7
_HEADER = np.dtype(np.int64).itemsize * 3
_FLOATS = {np.dtype(kind).itemsize: kind for kind in (np.float32, np.float64)}


@dataclass(frozen=True)
class Arrays:
    """N rollouts end to end: all ids of a rollout (prompt, prefix, response), then those of the next one."""

    # [N, 7]: weight_version, sequence_id, prompt_index, finished (0 or 1), and the tokens of prompt, prefix, response
    numbers: npt.NDArray[np.int64]
    ids: npt.NDArray[np.int32]  # [prompts, prefixes and responses]
    log_probs: npt.NDArray[np.float32] | npt.NDArray[np.float64]  # [responses]

    @classmethod
    def of(cls, rollouts: Sequence[Rollout]) -> Arrays:
        """Raises OverflowError for a number that is no int64."""
        ids = [(r.prompt_ids, r.prefix_ids, r.response_ids) for r in rollouts]
        numbers = [
            (r.weight_version, r.sequence_id, r.prompt_index, r.finished, *map(len, parts))
            for r, parts in zip(rollouts, ids, strict=True)
        ]
        return cls(
            np.array(numbers, dtype=np.int64).reshape(-1, _COLUMNS),
            _joined((part for parts in ids for part in parts), np.dtype(np.int32)),
            _shortest(_joined((r.response_log_probs for r in rollouts), np.dtype(np.float64))),
        )

    def rollouts(self) -> list[Rollout]:
        """They own what they hold. Raises ValueError for arrays that do not fit each other."""
        lengths = self.numbers[:, 4:]
        # One by one first, since a sum of int64 may come out right by going round.
        fit = bool(((lengths >= 0) & (lengths <= len(self.ids))).all())
        if not fit or lengths.sum() != len(self.ids) or lengths[:, 2].sum() != len(self.log_probs):
            raise ValueError(
                f"{len(self.ids)} ids and {len(self.log_probs)} log-probabilities are not of these rollouts"
            )
        if not np.isin(self.numbers[:, 3], (0, 1)).all():
            raise ValueError("a rollout is neither finished nor unfinished")
        ids = np.ascontiguousarray(self.ids, dtype=np.int32)
        ends = list(accumulate(lengths.ravel().tolist(), initial=0))
        scored, found = 0, []
        for i, (version, sequence_id, prompt_index, finished, *_, count) in enumerate(self.numbers.tolist()):
            a, b, c, d = ends[3 * i : 3 * i + 4]
            prompt, prefix, response = (Flat("i", ids[x:y].tobytes()) for x, y in ((a, b), (b, c), (c, d)))
            own = Flat("d", self.log_probs[scored : scored + count].astype(np.float64).tobytes())
            scored += count
            found.append(Rollout(prompt, prefix, response, own, version, sequence_id, prompt_index, bool(finished)))
        return found


def _joined(parts: Iterable[Sequence[float]], kind: np.dtype) -> npt.NDArray:
    """The arrays of rollouts, end to end."""
    data = bytearray().join(parts)  # type: ignore[arg-type]
    return np.frombuffer(data, kind) if data else np.empty(0, kind)


def _shortest(exact: npt.NDArray[np.float64]) -> npt.NDArray[np.float32] | npt.NDArray[np.float64]:
    """In single precision if that changes no bit."""
    with np.errstate(over="ignore", invalid="ignore"):
        single = exact.astype(np.float32)
        back = single.astype(np.float64)
    return single if np.array_equal(back.view(np.int64), exact.view(np.int64)) else exact


def encode(rollouts: Sequence[Rollout]) -> bytearray:
    """What ``decode`` reads. Raises OverflowError as ``Arrays.of``."""
    a = Arrays.of(rollouts)
    header = np.array([len(a.numbers), len(a.ids), a.log_probs.itemsize], dtype=np.int64)
    return bytearray().join(
        part.data.cast("B") if part.size else b"" for part in (header, a.numbers, a.log_probs, a.ids)
    )


def decode(data: bytes | bytearray | memoryview) -> list[Rollout]:
    """What ``encode`` encoded; nothing of ``data`` is kept. Raises ValueError for anything else: nothing that the
    header says is believed before it fits the number of bytes."""
    if len(data) < _HEADER:
        raise ValueError(f"{len(data)} bytes of rollouts, of which {_HEADER} are the header's")
    count, ids, width = np.frombuffer(data, np.int64, 3).tolist()
    scored_from = _HEADER + 8 * _COLUMNS * count
    ids_from = len(data) - 4 * ids
    if width not in _FLOATS or min(count, ids) < 0 or scored_from > ids_from or (ids_from - scored_from) % width:
        raise ValueError(f"{len(data)} bytes are not {count} rollouts with {ids} ids")
    view = memoryview(data)
    numbers = _read(view[_HEADER:scored_from], np.dtype(np.int64)).reshape(-1, _COLUMNS)
    log_probs = _read(view[scored_from:ids_from], np.dtype(_FLOATS[width]))
    return Arrays(numbers, _read(view[ids_from:], np.dtype(np.int32)), log_probs).rollouts()


def _read(data: memoryview, kind: np.dtype) -> npt.NDArray:
    return np.frombuffer(data, kind) if len(data) else np.empty(0, kind)
