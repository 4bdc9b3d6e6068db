"""A teacher behind servers that is asked for scores of rollouts one by one, as they are finished."""

from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, Future, wait

from torch import Tensor

from nemo_tropd.batch import TokenBatch
from nemo_tropd.parallel.signals import STOP, Stopped
from nemo_tropd.served.answers import Scores, scoring
from nemo_tropd.served.client import Asking
from nemo_tropd.served.teacher import ServedTeacher, packed

_POLL_S = 0.25


class EarlyQuestions:
    """Questions in flight while the caller does something else. Servers see each sequence by itself anyway: the scores
    are those of ``ServedTeacher.score``."""

    def __init__(
        self, teacher: ServedTeacher, top_k: int, begin: Callable[[], Callable[[], None]] = lambda: lambda: None
    ) -> None:
        """``begin`` is called with every question; what it returns, once there is an answer or none will come."""
        self._teacher, self._top_k, self._begin = teacher, top_k, begin
        self._asking = Asking(teacher.servers) if teacher.asks else None
        self._futures: dict[int, Future[Scores]] = {}

    def add(self, sequence_id: int, batch: TokenBatch) -> None:
        """Ask for a micro-batch of one sequence; of a number that was here before it is another one. Raises the
        ServerError of an earlier question."""
        if self._asking is None:
            return
        if (old := self._futures.pop(sequence_id, None)) is not None:
            old.cancel()
        (r,) = batch.for_teacher.rollouts
        for future in self._futures.values():
            if future.done() and future.exception() is not None:
                future.result()  # no scores for a step, so what else is generated is in vain
        question = scoring(r.token_ids, len(r.prompt_ids), self._top_k, self._teacher.vocabulary)
        end = self._begin()
        self._futures[sequence_id] = future = self._asking.ask(question, sequence_id)
        future.add_done_callback(lambda _: end())

    def ready(self) -> set[int]:
        """The sequences whose scores are there."""
        return {i for i, future in self._futures.items() if future.done() and not future.exception()}

    def collect(self) -> dict[int, Tensor]:
        """Of each sequence its packed scores, once all are there. Raises ServerError, or Stopped if they take too long
        after a request to stop."""
        try:
            pending = set(self._futures.values())
            while pending:
                done, pending = wait(pending, _POLL_S, FIRST_EXCEPTION)
                for future in done:
                    future.result()
                if STOP.overdue and pending:
                    raise Stopped("asked to stop")
            if self._asking is not None:
                self._teacher.asked()
            futures, self._futures = self._futures, {}
            return {i: packed(future.result()) for i, future in futures.items()}
        finally:
            self.close()

    def close(self) -> None:
        """Drop what is not answered yet."""
        if self._asking is not None:
            self._asking.close()
            self._asking = None
