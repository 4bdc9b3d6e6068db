"""What the trainer asks of a rollout engine: requests in, rollouts out, weights in under a version.

It knows no more of one; ``vllm/{child,hosts,in_process}.py`` implement it with vLLM, tests with doubles.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from nemo_tropd.batch import Rollout
from nemo_tropd.batch import Sampling as Sampling

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class EngineError(RuntimeError):
    """The engine cannot do what was asked. Not retried, unless it is an ``EngineDied``."""


class EngineDied(EngineError):
    """The engine's process is gone or no longer answers; a new engine with the current weights can replace it."""


class RequestError(EngineError, ValueError):
    """A request that can never be served, such as one longer than the context. The engine is unharmed."""


class Abandoned(EngineError):
    """Nobody waits any more for what was being generated. The engine has nothing left to do and is unharmed."""


class WeightStreamError(EngineError):
    """The stream of weights does not fit the engine's model: tensors missing, unknown, repeated or of another shape."""


@dataclass(frozen=True)
class RolloutRequest:
    """Generate up to ``max_new_tokens`` tokens after ``prompt_ids`` and ``prefix_ids`` (tokens of the teacher)."""

    prompt_ids: list[int]
    prefix_ids: list[int]
    seed: int
    sequence_id: int
    prompt_index: int
    max_new_tokens: int
    sampling: Sampling | None = None  # None: the engine's


# Is told of a rollout when it is finished, while others are still generated; in any order.
Finished = Callable[[Rollout], None]
# More requests for a call that goes on: those that have come since it was last asked, with True after a wait for some;
# None: there are no more.
Further = Callable[[bool], Sequence[RolloutRequest] | None]
# Whether anybody waits for the rollouts; asked between two steps.
Wanted = Callable[[], bool]


@dataclass(frozen=True)
class RefreshStats:
    """What one refresh of the engine's weights cost."""

    seconds: float
    bytes: int
    buckets: int


class RolloutEngine(Protocol):
    """Life cycle: start, any number of update_weights, generate and sleep, then always close (twice is fine)."""

    def start(self) -> None:
        """Load the model. Raises EngineError when it cannot; nothing of the engine is left running then."""

    def generate(self, requests: Sequence[RolloutRequest], finished: Finished | None = None) -> list[Rollout]:
        """One rollout a request, in order, stamped with the version the engine itself reports; the same list gives the
        same rollouts on a fresh engine with the same weights. The end-of-sequence token stays in ``response_ids`` when
        it was sampled. Each has been given to ``finished`` before. Raises RequestError or EngineDied."""

    def update_weights(self, stream: Iterable[tuple[str, Tensor]], version: int) -> RefreshStats:
        """Load (Hugging Face name, full tensor) pairs and number the result ``version``. Raises WeightStreamError or
        EngineDied; the engine is of no use after either."""

    def sleep(self) -> bool:
        """Give back what memory of the trainer's device the engine has, until the next call. True if the weights were
        dropped, too: the next call must then be ``update_weights``."""

    def close(self, *, run_over: bool = False) -> None:
        """End every process of the engine and remove every temporary file. Engine hosts are left waiting for the
        trainer to come back unless ``run_over``: then they exit."""


class MemberEngine(RolloutEngine, Protocol):
    """One of several engines that share a queue, or an engine of a trainer that may leave."""

    def generate(
        self,
        requests: Sequence[RolloutRequest],
        finished: Finished | None = None,
        further: Further | None = None,
        wanted: Wanted | None = None,
    ) -> list[Rollout]:
        """As ``RolloutEngine.generate``; in addition the requests of ``further``, which is asked between two steps and
        whenever nothing is left to do. Their rollouts come behind the others. Raises Abandoned soon after ``wanted``
        is False."""


class RankEngine(RolloutEngine, Protocol):
    """An engine of which every rank has one, on its own device."""

    def generate(
        self, requests: Sequence[RolloutRequest], finished: Finished | None = None, *, wanted: Wanted | None = None
    ) -> list[Rollout]:
        """As ``RolloutEngine.generate``. ``wanted`` is asked after every step of the engine, of which the ranks of a
        tensor group take the same: it may be collective among them. Raises Abandoned at once when it is False."""

    def check_room(self) -> None:
        """Before ``start``, which may be collective: EngineError if the device lacks the memory it asks for."""


def check_requests(requests: Sequence[RolloutRequest], *, max_model_len: int, vocab_size: int) -> None:
    """Raise RequestError for the first request the engine could not serve in full."""
    for r in requests:
        if not r.prompt_ids:
            raise RequestError(f"prompt {r.prompt_index}: it has no tokens")
        if r.max_new_tokens < 1:
            raise RequestError(f"prompt {r.prompt_index}: max_new_tokens is {r.max_new_tokens}; it must be at least 1")
        total = len(r.prompt_ids) + len(r.prefix_ids) + r.max_new_tokens
        if total > max_model_len:
            raise RequestError(
                f"prompt {r.prompt_index}: {len(r.prompt_ids)} prompt + {len(r.prefix_ids)} prefix + "
                f"{r.max_new_tokens} new tokens are {total}, over the engine's context of {max_model_len}; "
                "shorten or filter the prompt, ask for fewer new tokens, or raise the context"
            )
        for token in (*r.prompt_ids, *r.prefix_ids):
            if not 0 <= token < vocab_size:
                raise RequestError(
                    f"prompt {r.prompt_index}: token id {token} is outside the engine's vocabulary of {vocab_size}; "
                    "prompts and engine must share one tokenizer"
                )


def check_rollouts(
    rollouts: Sequence[Rollout], requests: Sequence[RolloutRequest], *, version: int | None, vocab_size: int
) -> None:
    """The one check of what engines generated, before anything is trained on it. Raises EngineError.

    A rollout answers its request, was generated with the weights ``version`` (None: any), and has 1 to
    ``max_new_tokens`` ids below ``vocab_size`` (exactly as many unless it is finished), with finite log-probabilities.
    """
    if len(rollouts) != len(requests):
        raise EngineError(f"got {len(rollouts)} of {len(requests)} rollouts")
    for asked, r in zip(requests, rollouts, strict=True):
        if version is not None and r.weight_version != version:
            raise EngineError(
                f"sequence {r.sequence_id} was generated with weight version {r.weight_version} instead of {version}; "
                "the engine was not refreshed"
            )
        count, most = len(r.response_ids), asked.max_new_tokens
        wrong = ""
        if (r.sequence_id, r.prompt_index) != (asked.sequence_id, asked.prompt_index):
            wrong = f"sequence {r.sequence_id} of prompt {r.prompt_index} in the place of sequence {asked.sequence_id}"
        elif (r.prompt_ids, r.prefix_ids) != (asked.prompt_ids, asked.prefix_ids):
            wrong = "another prompt or prefix than was asked for"
        elif not (1 <= count <= most if r.finished else count == most):
            wrong = f"{count} tokens, {'' if r.finished else 'not '}finished; {most} were asked for"
        ids, log_probs = np.asarray(r.response_ids), np.asarray(r.response_log_probs)
        if (outside := np.flatnonzero((ids < 0) | (ids >= vocab_size))).size:
            wrong = f"token id {ids[outside[0]]}, outside the vocabulary of {vocab_size}"
        elif (bad := np.flatnonzero(~np.isfinite(log_probs))).size:
            wrong = f"log-probability {log_probs[bad[0]]} for token id {ids[bad[0]]}"
        if wrong:
            raise EngineError(f"prompt {asked.prompt_index}: the engine generated {wrong}")
