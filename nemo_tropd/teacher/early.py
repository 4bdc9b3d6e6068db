"""A teacher on the ranks that scores rollouts one by one, as they are finished."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack

from torch import Tensor

from nemo_tropd.batch import TeacherScores, TokenBatch
from nemo_tropd.parallel.stopwatch import Stopwatch
from nemo_tropd.teacher.scorer import TeacherScorer
from nemo_tropd.teacher.sharing import packed_scores

Score = Callable[[Sequence[TokenBatch]], Sequence[TeacherScores | None]]


class EarlyScorer:
    """Scores of single sequences, packed: what is computed together then never depends on which is finished first.
    From the first sequence on the teacher's weights stay on the device until ``collect`` or ``close``."""

    def __init__(
        self, teacher: TeacherScorer, score: Score, busy: Callable[[float, float], None] = lambda begin, end: None
    ) -> None:
        """``score`` is collective over the ranks that have one student, and over no others. ``busy`` is told by
        ``collect`` when each score was made."""
        self._teacher, self._score, self._busy = teacher, score, busy
        self._watch = Stopwatch(teacher.topology.device)
        self._found: dict[int, Tensor] = {}
        self._held = ExitStack()
        self._awake = False

    def add(self, sequence_id: int, batch: TokenBatch) -> None:
        """Score a micro-batch of one sequence now; of a number that was here before it is another one."""
        with self._watch.running():
            if not self._awake:
                self._held.enter_context(self._teacher.scoring())
                self._awake = True
            (scores,) = self._score([batch])
            if scores is not None:
                self._found[sequence_id] = packed_scores(scores)

    def ready(self) -> set[int]:
        """The sequences whose scores are there."""
        return set(self._found)

    def collect(self) -> dict[int, Tensor]:
        """Of each sequence its packed scores, on the device, which has been waited for; none except on the last
        pipeline stage."""
        self.close()
        for begin, end in self._watch.intervals():
            self._busy(begin, end)
        found, self._found = self._found, {}
        return found

    def close(self) -> None:
        """The teacher leaves the device, if it is offloaded."""
        self._held.close()
