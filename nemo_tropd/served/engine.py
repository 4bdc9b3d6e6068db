"""The teacher's own responses, from its servers, in the place of an engine with its weights."""

from collections.abc import Iterable, Sequence

from torch import Tensor

from nemo_tropd.batch import Rollout, Sampling
from nemo_tropd.rollout.engine import Finished, RefreshStats, RolloutRequest
from nemo_tropd.served.answers import Vocabulary, generating
from nemo_tropd.served.client import Servers


class ServedEngine:
    """Asks ``servers``. Log-probabilities are those of the complete distribution; what a server samples for a seed is
    not promised to be the same twice."""

    def __init__(self, servers: Servers, vocabulary: Vocabulary, sampling: Sampling, end_ids: Sequence[int]) -> None:
        self.servers, self.vocabulary, self.sampling, self.end_ids = servers, vocabulary, sampling, frozenset(end_ids)

    def start(self) -> None:
        """The servers run already."""

    def generate(self, requests: Sequence[RolloutRequest], finished: Finished | None = None) -> list[Rollout]:
        """As ``RolloutEngine.generate``, of version 0; ServerError."""
        ends = sorted(self.end_ids)
        found = self.servers.ask([generating(r, r.sampling or self.sampling, ends, self.vocabulary) for r in requests])
        rollouts = [
            Rollout(
                r.prompt_ids, r.prefix_ids, f.ids, f.log_probs, 0, r.sequence_id, r.prompt_index,
                f.ids[-1] in self.end_ids,
            )
            for r, f in zip(requests, found, strict=True)
        ]  # fmt: skip
        if finished is not None:
            for rollout in rollouts:
                finished(rollout)
        return rollouts

    def update_weights(self, stream: Iterable[tuple[str, Tensor]], version: int) -> RefreshStats:
        """Never called: the teacher is frozen."""
        raise NotImplementedError("a teacher behind a server keeps its weights")

    def sleep(self) -> bool:
        """It has no memory here."""
        return False

    def close(self, *, run_over: bool = False) -> None:
        """The servers are not ours to end."""
