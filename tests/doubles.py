"""Doubles of real parts, for tests alone."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor

from nemo_tropd.batch import Rollout
from nemo_tropd.config import TropdConfig
from nemo_tropd.rollout.engine import (
    Abandoned,
    Finished,
    Further,
    RefreshStats,
    RolloutEngine,
    RolloutRequest,
    Wanted,
)


class ReplayEngine:
    """Writes the same tokens for the same request, whatever the weights: layouts can then be compared."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size, self.version = vocab_size, 0

    def check_room(self) -> None:
        """It needs none."""

    def start(self) -> None:
        """Nothing to start."""

    def generate(self, requests: Sequence[RolloutRequest], finished: Finished | None = None) -> list[Rollout]:
        """Random tokens from each request's own seed, of unequal lengths."""
        rollouts = [self._written(r) for r in requests]
        if finished is not None:
            for rollout in rollouts:
                finished(rollout)
        return rollouts

    def _written(self, r: RolloutRequest) -> Rollout:
        draw = random.Random(r.seed)
        length = draw.randint(1, r.max_new_tokens)
        ids = [draw.randrange(self.vocab_size) for _ in range(length)]
        scores = [-1.0] * length
        return Rollout(r.prompt_ids, r.prefix_ids, ids, scores, self.version, r.sequence_id, r.prompt_index, True)

    def update_weights(self, stream: Iterable[tuple[str, Tensor]], version: int) -> RefreshStats:
        """Takes the stream, as an engine would, and remembers the version."""
        size = sum(t.numel() * t.element_size() for _, t in stream)
        self.version = version
        return RefreshStats(0.0, size, 1)

    def sleep(self) -> bool:
        """It holds no memory."""
        return False

    def close(self, *, run_over: bool = False) -> None:
        """Nothing to close."""


class WeighedEngine(ReplayEngine):
    """What it generates, log-probabilities too, depends on every byte of the weights that it was given, and on the
    request."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__(vocab_size)
        self.digest = b""

    def update_weights(self, stream: Iterable[tuple[str, Tensor]], version: int) -> RefreshStats:
        """The digest of all of it is kept."""
        content = hashlib.sha256()
        for name, tensor in stream:
            content.update(name.encode() + tensor.detach().cpu().numpy().tobytes())
        self.version, self.digest = version, content.digest()
        return RefreshStats(0.0, 1, 1)

    def _written(self, r: RolloutRequest) -> Rollout:
        assert self.digest, "no weights"
        draw = random.Random(self.digest + str(r.seed).encode())
        ids = [draw.randrange(self.vocab_size) for _ in range(draw.randint(1, r.max_new_tokens))]
        scores = [-draw.random() * 6 for _ in ids]
        return Rollout(r.prompt_ids, r.prefix_ids, ids, scores, self.version, r.sequence_id, r.prompt_index, True)


class Hosted:
    """A double on an engine host: each of its calls is one step."""

    def __init__(self, engine: RolloutEngine) -> None:
        self.engine = engine
        self.start, self.update_weights, self.sleep = engine.start, engine.update_weights, engine.sleep
        self.close = engine.close

    def generate(
        self,
        requests: Sequence[RolloutRequest],
        finished: Finished | None = None,
        further: Further | None = None,
        wanted: Wanted | None = None,
    ) -> list[Rollout]:
        """The double's own, and those of ``further``."""
        rollouts, more = list[Rollout](), requests or None
        while more is not None:
            if wanted is not None and not wanted():
                raise Abandoned(f"nobody waits for {len(more)} rollouts")
            rollouts += self.engine.generate(more, finished)
            more = further(True) if further is not None else None
        return rollouts


class OnEveryRank(Hosted):
    """A double in the trainer's own process."""

    def check_room(self) -> None:
        """It needs none."""


class GivenEngines:
    """An engine factory for nemo_tropd.training.run.train: ``make`` makes every engine."""

    def __init__(self, make: Callable[[], RolloutEngine]) -> None:
        self.make = make

    def student(self, cfg: TropdConfig) -> RolloutEngine:
        """What ``make`` makes."""
        return self.make()

    def teacher(self, cfg: TropdConfig) -> RolloutEngine:
        """What ``make`` makes."""
        return self.make()


def replay_engines(vocab_size: int) -> GivenEngines:
    """Doubles for the student and for the teacher."""
    return GivenEngines(lambda: ReplayEngine(vocab_size))


class SayingEngine(ReplayEngine):
    """Says what ``say`` gives for a request, and keeps every list that it was asked."""

    def __init__(self, tokenizer: Any, end_id: int, say: Callable[[RolloutRequest], str]) -> None:
        super().__init__(len(tokenizer))
        self.tokenizer, self.end_id, self.say, self.asked = tokenizer, end_id, say, list[list[RolloutRequest]]()

    def generate(self, requests: Sequence[RolloutRequest], finished: Finished | None = None) -> list[Rollout]:
        """The text's tokens and the end token, cut at the length limit."""
        self.asked.append(list(requests))
        rollouts = []
        for r in requests:
            every = [*self.tokenizer(self.say(r), add_special_tokens=False)["input_ids"], self.end_id]
            ids, ended = every[: r.max_new_tokens], len(every) <= r.max_new_tokens
            scores = [-1.0] * len(ids)
            rollouts.append(Rollout(r.prompt_ids, [], ids, scores, 0, r.sequence_id, r.prompt_index, ended))
        if finished is not None:
            for rollout in rollouts:
                finished(rollout)
        return rollouts
