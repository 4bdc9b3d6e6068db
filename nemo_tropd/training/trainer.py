"""The loop: rollouts, teacher scores, loss, optimizer step, weights to the engine, checkpoint.

It is the only caller of the model's life cycle, and owns no model detail.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nemo_tropd.batch import Rollout, TokenBatch
from nemo_tropd.config import TropdConfig
from nemo_tropd.model.metric_sums import MetricSums
from nemo_tropd.model.tropd_model import MegatronTrOPDModel
from nemo_tropd.parallel.topology import Topology
from nemo_tropd.prompts import PromptOrder, PromptSet
from nemo_tropd.rollout.engine import RolloutRequest
from nemo_tropd.rollout.guidance import Guidance
from nemo_tropd.rollout.supervisor import RolloutSupervisor
from nemo_tropd.training.checkpoint import Checkpoints, RunState, check_resumable, write_json
from nemo_tropd.training.metrics import MetricsLog, PhaseTimer
from nemo_tropd.training.optimizer import StepResult, StudentOptimizer
from nemo_tropd.training.packing import pack_micro_batches
from nemo_tropd.training.progress import RunProgress
from nemo_tropd.training.run_files import RolloutFile
from nemo_tropd.training.signals import StopRequest
from nemo_tropd.training.validation import Validation, Validator


class TrainingError(RuntimeError):
    """The run cannot go on: says at which step, why, and what to change."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    step: int  # optimizer steps done
    stopped_by_signal: bool
    before: Validation | None
    after: Validation | None


class TropdTrainer:
    """One run: ``fit`` goes from the last whole checkpoint, or the start, to ``max_steps`` or a signal."""

    def __init__(
        self,
        cfg: TropdConfig,
        *,
        model: MegatronTrOPDModel,
        optimizer: StudentOptimizer,
        rollouts: RolloutSupervisor,
        prompts: PromptSet,
        guidance: Guidance,
        validator: Validator,
        checkpoints: Checkpoints,
        state: RunState,
        log: MetricsLog | None,
        rollout_file: RolloutFile | None,
        topology: Topology,
        pad_id: int,
        run_dir: Path,
    ) -> None:
        self.cfg, self.settings = cfg, cfg.trainer.tropd
        self.model, self.optimizer, self.rollouts = model, optimizer, rollouts
        self.prompts, self.guidance, self.validator = prompts, guidance, validator
        self.checkpoints, self.state, self.log, self.rollout_file = checkpoints, state, log, rollout_file
        self.topology, self.pad_id, self.run_dir = topology, pad_id, run_dir
        self.order = PromptOrder(len(prompts), cfg.model.seed)
        self.stop = StopRequest()
        self._skipped_in_a_row = 0

    def fit(self) -> Outcome:
        """Run the loop. Collective; every rank returns the same outcome.

        Raises:
            CheckpointError, EngineError, TrainingError: on every rank; the run directory keeps its whole checkpoints.
        """
        self.stop.install()
        self._resume()
        self.model.prepare_for_training()
        first, last = self.state.step, self.settings.max_steps
        self.progress = RunProgress(enabled=self.topology.is_leader, first=first, total=last)
        try:
            self.progress.phase("starting engine")
            self.rollouts.refresh(first)
            before = self._validate(first) if first == 0 else self.validator.read(0)
            after = before if first == last == 0 else None
            while self.state.step < last and not self.topology.any_rank(bool(self.stop)):
                step = self.state.step
                self._step(step)
                done = step + 1
                if self._due(done, self.settings.val_check_interval) or done == last:
                    after = self._validate(done)
                if self._due(done, self.settings.save_interval) or done == last:
                    self._save()
            stopped = self.state.step < last
            if stopped:
                self.progress.say(f"stopping after step {self.state.step}: writing a checkpoint")
                self._save()
            elif after is None:
                after = self.validator.read(last)
            self.model.finish_training()
            return Outcome(self.state.step, stopped, before, after)
        finally:
            self.progress.close()
            self.stop.remove()

    # ------------------------------------------------------------------------------------------------ one step

    def _step(self, step: int) -> None:
        timer, model = PhaseTimer(), self.model
        with self._phase(timer, "rollout"):
            model.prepare_for_inference()
            rollouts = model.infer(self._requests(step) if self.topology.is_leader else None)
            model.finish_inference()
            _refuse_other_versions(rollouts, step)
        with self._phase(timer, "teacher"):
            batches = self._pack(rollouts, step)
            scores = model.score(batches)
        with self._phase(timer, "student"):
            model.prepare_for_training_step()
            self.optimizer.zero_grad()
            _, own = model.get_loss_and_metrics(
                batches,
                scores,
                step=step,
                loss_tokens=sum(r.loss_tokens for r in rollouts),
                sequences=sum(r.loss_tokens > 0 for r in rollouts),
                keep_tokens=self._keeps_tokens(step),
            )
            sums = own.gather()
        with self._phase(timer, "optimizer"):
            result = self.optimizer.step(step)
            self._count_skipped(step, result, rollouts)
        with self._phase(timer, "refresh"):
            model.finish_training_step(step + 1)
            self.rollouts.refresh(step + 1)
        self.state = replace(self.state, step=step + 1)
        values = _train_metrics(sums, result, rollouts, timer)
        if self.log is not None:
            self.log.write(step + 1, "train", values)
        if self.rollout_file is not None and sums.kept:
            self.rollout_file.write(step + 1, rollouts, sums.kept[: self.cfg.model.validation.kept_rollouts])
        self.progress.step_done(step, values)

    def _requests(self, step: int) -> list[RolloutRequest]:
        m = self.cfg.model
        indices = self.order.batch(step, m.global_batch_size // m.rollout.samples_per_prompt)
        return self.guidance.plan([self.prompts[i].token_ids for i in indices], step, prompt_indices=indices)

    def _pack(self, rollouts: Sequence[Rollout], step: int) -> list[TokenBatch]:
        m = self.cfg.model
        return pack_micro_batches(
            rollouts, self.topology, micro_batch_size=m.micro_batch_size, pad_id=self.pad_id, seed=m.seed, step=step
        )

    def _keeps_tokens(self, step: int) -> bool:
        done = step + 1
        return done in (1, self.settings.max_steps) or self._due(done, self.settings.val_check_interval)

    def _count_skipped(self, step: int, result: StepResult, rollouts: Sequence[Rollout]) -> None:
        """Keep what led to a gradient that is not finite, and end the run when it happens again and again."""
        if result.applied:
            self._skipped_in_a_row = 0
            return
        self._skipped_in_a_row += 1
        self.state = replace(self.state, skipped_steps=self.state.skipped_steps + 1)
        where = self.run_dir / "skipped" / f"step_{step + 1:08d}.json"
        if self.topology.is_leader:
            where.parent.mkdir(exist_ok=True)
            write_json(where, {"grad_norm": str(result.grad_norm), "rollouts": [vars(r) for r in rollouts]})
        self.progress.say(f"step {step + 1}: gradient norm {result.grad_norm}; step skipped, rollouts kept in {where}")
        if self._skipped_in_a_row > self.settings.max_skipped_steps:
            raise TrainingError(
                f"step {step + 1}: {self._skipped_in_a_row} steps in a row had a gradient that is not finite "
                f"(trainer.tropd.max_skipped_steps = {self.settings.max_skipped_steps}); see {where.parent}, and lower "
                f"model.optim.lr or use trainer.precision=32"
            )

    # ------------------------------------------------------------------------------------------------ around steps

    def _phase(self, timer: PhaseTimer, name: str) -> Any:
        self.progress.phase(name)
        return timer.phase(name)

    def _due(self, done: int, interval: int) -> bool:
        return bool(interval) and done % interval == 0

    def _validate(self, step: int) -> Validation:
        self.progress.phase("validating")
        validation = self.validator.run(step)
        if not validation.metrics:
            return validation
        if self.log is not None:
            self.log.write(step, "validation", validation.metrics)
        self.progress.say(f"validation after step {step}: {validation.line()}")
        return validation

    def _save(self) -> None:
        self.progress.phase("saving")
        path = self.checkpoints.save(self.model.student, self.optimizer, self.state)
        self.progress.say(f"checkpoint {path}")

    def _resume(self) -> None:
        self.checkpoints.remove_unfinished()
        latest = self.checkpoints.latest()
        if latest is None:
            return
        saved = self.checkpoints.load(latest, self.model.student, self.optimizer)
        check_resumable(saved, self.state)
        self.state = saved
        self.model.finish_training_step(saved.step)
        if self.topology.is_leader:
            print(f"going on after step {saved.step} from {latest}", flush=True)


def _refuse_other_versions(rollouts: Sequence[Rollout], version: int) -> None:
    other = sorted({r.weight_version for r in rollouts} - {version})
    if other:
        raise TrainingError(
            f"step {version + 1}: rollouts were written by weights {other}, not {version}; the engine was not refreshed"
        )


def _train_metrics(
    sums: MetricSums, result: StepResult, rollouts: Sequence[Rollout], timer: PhaseTimer
) -> dict[str, float]:
    s = sums.sums
    written = s.get("student_tokens", 0.0)
    seconds = timer.total()
    values = {
        "loss": s.get("loss", math.nan),
        "trust_fraction": sums.mean("trust", written),
        "log_ratio_mean": sums.mean("log_ratio", written),
        "log_ratio_min": sums.minima.get("log_ratio", math.nan),
        "outlier_forward_kl": sums.mean("outlier_forward_kl", written - s.get("trust", 0.0)),
        "student_entropy": sums.mean("student_entropy", written),
        "guided_fraction": sums.mean("guided_tokens", s.get("tokens", 0.0)),
        "mismatch_mean_abs": sums.mean("mismatch", written),
        "mismatch_max_abs": -sums.minima["minus_mismatch"] if "minus_mismatch" in sums.minima else math.nan,
        "grad_norm": result.grad_norm,
        "applied": float(result.applied),
        "learning_rate": result.learning_rate,
        "response_tokens": sum(len(r.response_ids) for r in rollouts) / max(len(rollouts), 1),
        "finished_fraction": sum(r.finished for r in rollouts) / max(len(rollouts), 1),
        **{f"seconds/{name}": value for name, value in timer.seconds.items()},
        "seconds/step": seconds,
        "tokens_per_second": s.get("tokens", 0.0) / seconds,
    }
    return {k: v for k, v in values.items() if not (isinstance(v, float) and math.isnan(v) and k == "student_entropy")}
