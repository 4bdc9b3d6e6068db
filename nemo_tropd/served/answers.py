"""What a teacher's server is asked, and the checks of what comes back: it is a stranger's."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nemo_tropd.rollout.engine import RolloutRequest, Sampling
from nemo_tropd.served.client import BadAnswer, Choice, LogProb, Question, ServerError

PADDING = 16  # further candidates, of a model with rows that no token has: such rows are left out
EPSILON = 2e-3  # of probabilities and log-probabilities: of a softmax in fp32 over bf16 logits
_ENTRY, _FIXED = 256, 1 << 16  # bytes that a candidate's text may take, and everything else
_PLAIN = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "min_p": 0.0}


@dataclass(frozen=True)
class Vocabulary:
    """``size`` ids are tokens, the same for student and teacher; the teacher's head has ``rows``, padded perhaps."""

    size: int
    rows: int

    @property
    def raw(self) -> "Vocabulary":
        """All rows, as if each were a token: what a server says, unchanged."""
        return Vocabulary(self.rows, self.rows)

    def asked(self, top_k: int) -> int:
        """Candidates to ask for, so that ``top_k`` of them are tokens."""
        return min(top_k + min(self.rows - self.size, PADDING), self.rows)


@dataclass(frozen=True)
class Scores:
    """Of N tokens, nats: log-probability, and the K best candidates, descending. Normalised over all true tokens, but
    for the mass of padding beyond the candidates that were asked for."""

    log_probs: npt.NDArray[np.float32]  # [N]
    top_k_log_probs: npt.NDArray[np.float32]  # [N, K]
    top_k_ids: npt.NDArray[np.int32]  # [N, K]


def scoring(ids: Sequence[int], start: int, top_k: int, vocabulary: Vocabulary) -> Question[Scores]:
    """The scores of ``ids[start:]``, each after all that precede it; ``start`` of at least 1."""
    asked, ids = vocabulary.asked(top_k), list(ids)
    body = {"prompt": ids, "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": asked, "return_token_ids": True}
    most = _FIXED + len(ids) * (16 + (asked + 1) * _ENTRY)
    return Question(body, lambda choice: _read(choice, ids, start, top_k, vocabulary), most)


def _read(choice: Choice, ids: list[int], start: int, top_k: int, vocabulary: Vocabulary) -> Scores:
    found, asked = choice.prompt_logprobs or [], vocabulary.asked(top_k)
    if choice.prompt_token_ids != ids:
        raise BadAnswer("it is about other tokens than were sent")
    if len(found) != len(ids):
        raise BadAnswer(f"log-probabilities of {len(found)} tokens; {len(ids)} were sent")
    count, own = len(ids) - start, np.empty(len(ids) - start)
    table = np.zeros((3, count, asked + 1))  # id, log-probability, rank; ids below 2^31 are exact in fp64
    table[1], table[2] = -math.inf, math.inf
    for row, (token, entry) in enumerate(zip(ids[start:], found[start:], strict=True)):
        if not entry or token not in entry:
            raise BadAnswer(f"token {start + row} (id {token}) has no log-probability")
        if not asked <= len(entry) <= asked + 1:
            raise BadAnswer(f"token {start + row} has {len(entry)} candidates; {asked} were asked for")
        own[row] = entry[token].logprob
        table[:, row, : len(entry)] = list(entry), *_columns(list(entry.values()))
    order = np.argsort(table[2], axis=1, kind="stable")[:, :asked]
    best_ids, best, ranks = (np.take_along_axis(part, order, axis=1) for part in table)
    _check(own, table, best, ranks, vocabulary.rows)
    return _without_padding(own, best, best_ids, top_k, vocabulary.size)


def _columns(candidates: list[LogProb]) -> tuple[list[float], list[float]]:
    return [c.logprob for c in candidates], [math.inf if c.rank is None else c.rank for c in candidates]


def _check(
    own: npt.NDArray[np.float64],
    table: npt.NDArray[np.float64],
    best: npt.NDArray[np.float64],
    ranks: npt.NDArray[np.float64],
    rows: int,
) -> None:
    """BadAnswer unless the candidates can be the best of a distribution over ``rows`` ids."""
    if not own.size:
        return
    if table[0].max() >= rows:
        raise BadAnswer(f"token id {table[0].max():.0f}, of a vocabulary of {rows}")
    if not np.isfinite(own).all() or not np.isfinite(best).all():
        raise BadAnswer("a log-probability that is not finite")
    if (ranks != np.arange(1, best.shape[1] + 1)).any():
        raise BadAnswer(f"its candidates are not the {best.shape[1]} best")
    if (np.diff(best, axis=1) > EPSILON).any() or (own > best[:, 0] + EPSILON).any():
        raise BadAnswer("its candidates are not in order")
    mass, least = np.exp(np.minimum(best, 1.0)).sum(1), best[:, 0].min()
    if mass.max() > 1 + EPSILON or least < -math.log(rows) - EPSILON:
        seen = (
            f"a token's candidates have {mass.max():.4f} of the mass, another's best a log-probability of {least:.3f}"
        )
        raise BadAnswer(f"not log-probabilities: {seen}; serve it with --logprobs-mode raw_logprobs")


def _without_padding(
    own: npt.NDArray[np.float64],
    best: npt.NDArray[np.float64],
    ids: npt.NDArray[np.float64],
    top_k: int,
    size: int,
) -> Scores:
    padding = ids >= size
    order = np.argsort(padding, axis=1, kind="stable")[:, :top_k]
    if np.take_along_axis(padding, order, axis=1).any():
        raise ServerError(
            f"of the teacher's {ids.shape[1]} best candidates for a token more than {ids.shape[1] - top_k} have ids "
            f"from {size} on, which no token has: its head is not that of model.teacher.path; serve that checkpoint"
        )
    rest = np.log1p(-np.minimum(np.where(padding, np.exp(best), 0).sum(1), 0.999))
    log_probs = np.take_along_axis(best, order, axis=1) - rest[:, None]
    kept = np.take_along_axis(ids, order, axis=1).astype(np.int32)
    return Scores((own - rest).astype(np.float32), log_probs.astype(np.float32), kept)


@dataclass(frozen=True)
class Generated:
    """Tokens that a server sampled, with their log-probabilities, nats, before sampling's cuts."""

    ids: list[int]
    log_probs: list[float]


def generating(
    request: RolloutRequest, sampling: Sampling, end_ids: Sequence[int], vocabulary: Vocabulary
) -> Question[Generated]:
    """What the teacher says after a prompt; nothing of the server's own generation_config takes part."""
    body = {
        **_PLAIN,
        "prompt": [*request.prompt_ids, *request.prefix_ids],
        "max_tokens": request.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k or -1,
        "seed": request.seed,
        "logprobs": 0,
        "ignore_eos": True,
        "stop_token_ids": list(end_ids),
        "logit_bias": {str(i): -100.0 for i in range(vocabulary.size, vocabulary.rows)} or None,
        "return_token_ids": True,
    }
    return Question(body, _generated, _FIXED + request.max_new_tokens * 4 * _ENTRY)


def _generated(choice: Choice) -> Generated:
    ids, log_probs = choice.token_ids, choice.logprobs.token_logprobs if choice.logprobs else []
    if not ids or len(ids) != len(log_probs):
        raise BadAnswer(f"{len(ids or ())} tokens with {len(log_probs)} log-probabilities")
    return Generated(ids, [math.nan if value is None else value for value in log_probs])
