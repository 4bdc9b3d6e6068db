"""One step: rollouts, teacher scores, loss, optimizer, weights to the engine; seconds of each phase.

What occupies the device's memory: from refresh to the end of rollout the engine; in teacher an offloaded teacher; in
student and optimizer only activations, gradients and optimizer states. The program waits for the device at the end of a
phase and nowhere else.
"""

import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass

from nemo_tropd.batch import Rollout, TeacherScores, TeacherStates, TokenBatch
from nemo_tropd.data import PromptSet
from nemo_tropd.model.tropd_model import MegatronTrOPDModel
from nemo_tropd.parallel.metric_sums import MetricSums
from nemo_tropd.parallel.signals import STOP, Stopped
from nemo_tropd.rollout.engine import RolloutRequest
from nemo_tropd.timeline import OFF, Timeline
from nemo_tropd.training.ahead import Ahead
from nemo_tropd.training.early_scores import EarlyScoring
from nemo_tropd.training.guidance import Guidance
from nemo_tropd.training.metrics import PhaseTimer
from nemo_tropd.training.optimizer import StepResult, StudentOptimizer
from nemo_tropd.training.packing import Packer

_ABSENT = ("student_entropy", "importance_weight", "effective_fraction")  # figures of some objectives alone


@dataclass(frozen=True)
class StepRecord:
    """What one step did; the same on every rank."""

    values: dict[str, float]  # the step's line in metrics.jsonl
    rollouts: list[Rollout]
    sums: MetricSums
    result: StepResult


class TrainStep:
    """The parts of a training step, and the step itself, :meth:`run`."""

    def __init__(
        self,
        model: MegatronTrOPDModel,
        optimizer: StudentOptimizer,
        *,
        prompts: PromptSet,
        guidance: Guidance,
        packer: Packer,
        early: Collection[str] = (),
        ahead: Callable[[Callable[[int], list[RolloutRequest]]], Ahead] | None = None,
        timeline: Timeline = OFF,
    ) -> None:
        """``early``: the teachers that score rollouts as they are finished. ``ahead``, if engines work ahead of the
        trainer, is given a function of a step that returns its requests. ``timeline`` is told when who is at work."""
        self.model, self.optimizer = model, optimizer
        self.prompts, self.guidance, self.packer = prompts, guidance, packer
        self.order = prompts.order(model.settings.seed)
        self.early = EarlyScoring(model, packer, prompts, early, timeline) if early else None
        self.ahead = ahead(self._requests) if ahead is not None else None
        self.timeline = timeline

    def run(
        self,
        step: int,
        *,
        keep_tokens: bool,
        shown: Callable[[str], None] = lambda phase: None,
        before_update: Callable[[], None] = lambda: None,
        begin: Callable[[int], None] | None = None,
    ) -> StepRecord:
        """Step number ``step`` (from 0), collective. The engine has the weights ``step`` before and ``step + 1`` after;
        ``shown`` is called with the name of every phase as it begins. ``before_update`` is called while the weights are
        still ``step``, with everything else done; its time is none of the step's. ``begin``, of what works ahead, is
        called in the place of ``Ahead.begin``. Raises EngineError on every rank; Stopped, if rollouts and scores take
        over ``FINISH_S`` more after a request to stop: nothing of the step is left then but what ``ahead`` has."""
        model, topology, lag = self.model, self.model.topology, 0
        timer = PhaseTimer(topology.synchronize, self.timeline)

        def phase(name: str) -> AbstractContextManager[None]:
            shown(name)
            return timer.phase(name)

        with ExitStack() as held:
            with phase("rollout"):
                model.prepare_for_inference()
                early = held.enter_context(self.early.of_step(step)) if self.early else None
                requests = self._requests(step) if topology.is_leader and not self.ahead else None
                if self.ahead is not None:
                    self.ahead.begin(step)
                    rollouts, lag = self.ahead.take(step)
                elif early is None:
                    rollouts = model.infer(requests)
                else:
                    model.follow(step)  # the engine is elsewhere, so the device has room
                    rollouts = model.infer(requests, early.finished)
                    early.all_finished()
                model.finish_inference()
            with phase("teacher"):
                if early is None:
                    model.follow(step)
                batches = self.packer.pack(rollouts, step, self.prompts)
                scores = early.scores(rollouts, batches) if early else model.score(batches)
        self._stop_point()
        with phase("student"):
            sums = self._passes(step, rollouts, batches, scores, keep_tokens)
        with timer.paused():
            before_update()
        with phase("optimizer"):
            result = self.optimizer.step(step)
        with phase("refresh"):
            model.finish_training_step(step + 1)
            if self.ahead is not None:
                self.ahead.done(step)
                (begin or self.ahead.begin)(step + 1)
        values = _train_metrics(sums, result, rollouts, timer) | _by_group(sums, rollouts, self.prompts)
        if early is not None:
            values["scored_early_fraction"] = early.fraction
        if self.ahead is not None:
            values["weights_lag"] = float(lag)
        return StepRecord(values, rollouts, sums, result)

    def _stop_point(self) -> None:
        """The last moment to give the step up (collective): a gradient that is begun is taken to its end, and so is the
        step."""
        if self.model.topology.any_rank(STOP.overdue):
            raise Stopped("asked to stop")

    def _passes(
        self,
        step: int,
        rollouts: Sequence[Rollout],
        batches: Sequence[TokenBatch],
        scores: Sequence[TeacherScores | TeacherStates | None],
        keep_tokens: bool,
    ) -> MetricSums:
        """The gradient of the step, and what is summed up on the way (collective)."""
        self.optimizer.zero_grad()
        self.model.prepare_for_training_step()
        _, own = self.model.get_loss_and_metrics(
            batches,
            scores,
            step=step,
            loss_tokens=sum(r.loss_tokens for r in rollouts),
            sequences=sum(r.loss_tokens > 0 for r in rollouts),
            keep_tokens=keep_tokens,
        )
        return own.gather()

    def _requests(self, step: int) -> list[RolloutRequest]:
        m = self.model.settings
        indices = self.order.batch(step, m.global_batch_size // m.rollout.samples_per_prompt)
        return self.guidance.plan([self.prompts[i] for i in indices], step, prompt_indices=indices)


def _train_metrics(
    sums: MetricSums, result: StepResult, rollouts: Sequence[Rollout], timer: PhaseTimer
) -> dict[str, float]:
    s, seconds, count = sums.sums, timer.total(), max(len(rollouts), 1)
    sampled = s.get("student_tokens", 0.0)
    values = {
        "loss": s.get("loss", math.nan),
        "trust_fraction": sums.mean("trust", sampled),
        "log_ratio_mean": sums.mean("log_ratio", sampled),
        "log_ratio_min": sums.minima.get("log_ratio", math.nan),
        "outlier_forward_kl": sums.mean("outlier_forward_kl", sampled - s.get("trust", 0.0)),
        "student_entropy": sums.mean("student_entropy", sampled),
        "guided_fraction": sums.mean("guided_tokens", s.get("tokens", 0.0)),
        "mismatch_mean_abs": sums.mean("mismatch", sampled),
        "mismatch_max_abs": -sums.minima["minus_mismatch"] if "minus_mismatch" in sums.minima else math.nan,
        "importance_weight": sums.mean("importance_weight", sampled),
        "effective_fraction": _effective(s, sampled),
        "grad_norm": result.grad_norm,
        "applied": float(result.applied),
        "learning_rate": result.learning_rate,
        "response_tokens": sum(len(r.response_ids) for r in rollouts) / count,
        "finished_fraction": sum(r.finished for r in rollouts) / count,
        **{f"seconds/{name}": value for name, value in timer.seconds.items()},
        "seconds/step": seconds,
        "tokens_per_second": s.get("tokens", 0.0) / seconds,
    }
    return {k: v for k, v in values.items() if not (isinstance(v, float) and math.isnan(v) and k in _ABSENT)}


def _effective(sums: Mapping[str, float], tokens: float) -> float:
    """Effective sample size of weighted tokens, as a share of them: (sum w)^2 / (n sum w^2)."""
    squares = sums.get("importance_weight_squared", math.nan)
    return float(sums["importance_weight"] ** 2 / (tokens * squares)) if tokens and squares > 0 else math.nan


def _by_group(sums: MetricSums, rollouts: Sequence[Rollout], prompts: PromptSet) -> dict[str, float]:
    """What the mixture of sources and teachers is: of each its share of the loss tokens, which long responses take for
    themselves, and how far its teacher and the student are from each other."""
    tokens, of = sum(r.loss_tokens for r in rollouts), Counter[str]()
    lengths: dict[str, list[int]] = {}
    found = {f"{group}/share_of_tokens": 0.0 for group in prompts.every_group}  # also of those that have none
    for r in rollouts:
        for group in prompts.groups(r.prompt_index):
            of[group] += r.loss_tokens
            lengths.setdefault(group, []).append(len(r.response_ids))
    for group in sorted(lengths):
        sampled, trusted = (sums.sums.get(f"{group}/{name}", 0.0) for name in ("student_tokens", "trust"))
        found |= {
            f"{group}/share_of_tokens": of[group] / max(tokens, 1),
            f"{group}/response_tokens": sum(lengths[group]) / len(lengths[group]),
            f"{group}/trust_fraction": sums.mean(f"{group}/trust", sampled),
            f"{group}/log_ratio_mean": sums.mean(f"{group}/log_ratio", sampled),
            f"{group}/outlier_forward_kl": sums.mean(f"{group}/outlier_forward_kl", sampled - trusted),
        }
    return {name: value for name, value in found.items() if not math.isnan(value)}
