"""The loop around ``step.TrainStep``: resume, validate, save, log, stop."""

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial

from nemo_tropd.files import write_json
from nemo_tropd.parallel.agreement import on_rank_zero
from nemo_tropd.parallel.signals import STOP, Stopped
from nemo_tropd.parallel.topology import Topology
from nemo_tropd.training.ahead import Rollouts
from nemo_tropd.training.checkpoint import Checkpoints
from nemo_tropd.training.metrics import MetricsLog, RolloutFile, TimelineFile
from nemo_tropd.training.progress import RunProgress
from nemo_tropd.training.resume import RunState
from nemo_tropd.training.setup import Setup
from nemo_tropd.training.step import StepRecord, TrainStep
from nemo_tropd.training.validation import BENCHMARKS, HELD_OUT, Validation, Validator

TEACHER_REMEDY = (
    "check the files of model.teacher.path, or set model.teacher.precision=32 model.teacher.fp8=null "
    "trainer.tropd.accept_changes='[model.teacher.precision,model.teacher.fp8]'"
)

EFFECTIVE_SHARE = 0.5
UNFINISHED_STEPS, UNFINISHED_SHARE = 10, 0.05  # the report's are the same


class TrainingError(RuntimeError):
    """The run cannot continue: names the step, the reason, and what to change."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    step: int  # optimizer steps done
    stopped_by_signal: bool
    before: Validation | None
    after: Validation | None


def stop_point(topology: Topology) -> None:
    """Collective: raises Stopped on every rank if any was asked to stop."""
    if topology.any_rank(bool(STOP)):
        raise Stopped("asked to stop")


class TropdTrainer:
    """One run: ``fit`` goes from the last complete checkpoint, or the start, to ``max_steps`` or a signal."""

    def __init__(
        self,
        setup: Setup,
        one_step: TrainStep,
        *,
        validator: Validator,
        checkpoints: Checkpoints,
        log: MetricsLog | None,
        rollout_file: RolloutFile | None,
        timeline_file: TimelineFile | None,
    ) -> None:
        """``log`` and the two files are those of rank 0; None elsewhere."""
        self.cfg, self.settings = setup.cfg, setup.cfg.trainer.tropd
        self.topology, self.run_dir = setup.topology, setup.run_dir
        self.one_step, self.model, self.optimizer = one_step, one_step.model, one_step.optimizer
        assert setup.start is not None
        self.validator, self.checkpoints = validator, checkpoints
        self.start, self.state = setup.start, setup.start.state
        self.log, self.rollout_file, self.timeline_file = log, rollout_file, timeline_file
        self._saved: int | None = None  # the step of the newest checkpoint of this process
        self._unfinished_in_a_row, self._said_stale = 0, False

    def fit(self) -> Outcome:
        """Run the loop. Collective; every rank returns the same outcome, or raises the same CheckpointError,
        EngineError or TrainingError; complete checkpoints stay."""
        self._resume()
        self.model.prepare_for_training()
        first, last = self.state.step, self.settings.max_steps
        self.progress = RunProgress(enabled=self.topology.is_leader, first=first, total=last)
        try:
            with suppress(Stopped):
                self._steps(last)
            stopped = self.state.step < last or self.topology.any_rank(bool(STOP))
            if stopped:
                self.progress.say(f"stopping after step {self.state.step}; rerun the same command to resume")
                if self.state.step > first and self.state.step != self._saved:
                    self._save()
            self.model.finish_training()
            return Outcome(self.state.step, stopped, self.validator.read(0), self.validator.read(last))
        finally:
            self.progress.close()

    def _steps(self, last: int) -> None:
        """Up to ``last`` steps. Raises Stopped between two phases, or out of rollouts that take too long."""
        self.progress.phase("starting engine")
        self.model.send_weights(self.state.step)
        first = self.state.step
        # Else a stop prevented what was due.
        parts = self._parts_due(first) if first == 0 or self.validator.read(first) is None else []
        self._begin(parts, first)
        self._validate(parts)
        while self.state.step < last:
            stop_point(self.topology)
            parts = self._parts_due(self.state.step + 1)
            self._step(self.state.step, parts)
            # First save, then validate: a request to stop does not wait for the validation.
            if self._due(self.state.step, self.settings.save_interval) or self.state.step == last:
                self._save()
            self._validate(parts)

    def _parts_due(self, step: int) -> list[str]:
        """Of a validation after ``step`` steps."""
        often, rare = self.settings.val_check_interval, self.cfg.model.validation.benchmark_interval
        every = {HELD_OUT: often, BENCHMARKS: often if rare is None else rare}
        ends = step in (0, self.settings.max_steps)
        return [part for part in self.validator.parts if ends or self._due(step, every[part])]

    def _begin(self, parts: Sequence[str], step: int) -> None:
        """What an engine that works ahead of the trainer does by the weights ``step``, in the order in which that one
        waits for it: held-out answers at once, the step's own rollouts (at the run's start), answers to benchmarks
        before the weights change, and other rollouts in later steps."""
        if (ahead := self.one_step.ahead) is None:
            return
        if HELD_OUT in parts:
            self.validator.begin(HELD_OUT, step)
        ahead.begin(step, own=True)
        if BENCHMARKS in parts:
            self.validator.begin(BENCHMARKS, step)
        ahead.begin(step)

    def _validate(self, parts: Sequence[str]) -> None:
        """Validate the student as it is now. What an engine ahead of the trainer answers to benchmarks is waited for in
        the next step, before the weights change: a checkpoint of later steps has this validation behind it."""
        if not parts:
            return
        stop_point(self.topology)
        self.progress.phase("validating")
        self.validator.start(self.state.step, parts)
        if self.one_step.ahead is None or BENCHMARKS not in parts or self.state.step == self.settings.max_steps:
            self._finish_validation()

    def _finish_validation(self) -> None:
        validation = self.validator.finish()
        if validation is not None and (validation.metrics or validation.dropped):
            if self.log is not None:
                self.log.write(validation.step, "validation", validation.metrics)
            if line := validation.line():
                self.progress.say(f"validation after step {validation.step}: {line}")
            for score in validation.benchmarks.values():
                self.progress.say(score["line"])

    def _step(self, step: int, parts_after: Sequence[str]) -> None:
        done = step + 1
        keeps = done in (1, self.settings.max_steps) or self._due(done, self.settings.val_check_interval)
        began = time.monotonic()
        record = self.one_step.run(
            step,
            keep_tokens=keeps,
            shown=self.progress.phase,
            before_update=self._finish_validation,
            begin=partial(self._begin, parts_after),
        )
        self.state = replace(self.state, step=done)
        if self.log is not None and self.timeline_file is not None:
            times = self.one_step.timeline.step_done(done, began)
            self.log.write(done, "train", record.values | {f"idle/{lane}": share for lane, share in times.idle.items()})
            self.timeline_file.write(times)
        if self.rollout_file is not None and record.sums.kept:
            kept = record.sums.kept[: self.cfg.model.validation.kept_rollouts]
            self.rollout_file.write(done, record.rollouts, kept)
        self._count_skipped(step, record)
        self._count_unfinished(record.values["finished_fraction"])
        self._count_stale(done, record.values)
        self.progress.step_done(step, record.values)

    def _count_skipped(self, step: int, record: StepRecord) -> None:
        """Keep the rollouts of a step that was skipped; end the run if it happens too often in a row (collective)."""
        state = self.state
        if record.result.applied:
            self.state = replace(state, skipped_in_a_row=0)
            return
        in_a_row = state.skipped_in_a_row + 1
        self.state = replace(state, skipped_steps=state.skipped_steps + 1, skipped_in_a_row=in_a_row)
        where = self.run_dir / "skipped" / f"step_{step + 1:08d}.json"
        causes, norm = self._not_finite(record), record.result.grad_norm

        def keep() -> None:
            where.parent.mkdir(exist_ok=True)
            rollouts = [r.plain for r in record.rollouts]
            write_json(where, {"not_finite": causes, "grad_norm": str(norm), "rollouts": rollouts})

        on_rank_zero(self.topology, keep)
        what = causes[0] + (f" and {len(causes) - 1} more" if len(causes) > 1 else "")
        self.progress.say(f"step {step + 1} skipped: not finite: {what}; rollouts kept in {where}")
        if in_a_row > self.settings.max_skipped_steps:
            of_teacher = causes[0].startswith("the teacher")
            remedy = TEACHER_REMEDY if of_teacher else "lower model.optim.lr or trainer.tropd.gradient_clip_val"
            raise TrainingError(
                f"step {step + 1}: {in_a_row} steps in a row were skipped "
                f"(trainer.tropd.max_skipped_steps = {self.settings.max_skipped_steps}); not finite: {what}. The same "
                f"command resumes from the last checkpoint and meets the same prompts and draws again: {remedy}, or "
                f"raise max_skipped_steps to get past them. Their rollouts are in {where.parent}"
            )

    def _count_unfinished(self, finished: float) -> None:
        """Say once if all but no rollout meets an end token for many steps."""
        said = self._unfinished_in_a_row >= UNFINISHED_STEPS
        self._unfinished_in_a_row += 1 if finished < UNFINISHED_SHARE or said else -self._unfinished_in_a_row
        if not said and self._unfinished_in_a_row == UNFINISHED_STEPS:
            r = self.cfg.model.rollout
            self.progress.say(
                f"in {UNFINISHED_STEPS} steps in a row fewer than {UNFINISHED_SHARE:.0%} of the rollouts met an end "
                f"token (model.rollout.end_tokens, {r.end_tokens}); the others were cut at "
                f"model.rollout.max_new_tokens = {r.max_new_tokens}: raise that, or name the token that ends answers"
            )

    def _count_stale(self, done: int, values: Mapping[str, float]) -> None:
        """Say once if weighted rollouts are worth less than half of their tokens."""
        effective = values.get("effective_fraction", 1.0)
        if self._said_stale or not self.one_step.ahead or effective >= EFFECTIVE_SHARE:
            return
        self._said_stale = True
        self.progress.say(
            f"step {done}: rollouts of weights {values['weights_lag']:.0f} step(s) old count as {effective:.0%} of "
            "their tokens (effective_fraction): the student changes too fast for them; lower "
            "model.rollout.steps_ahead or model.optim.lr"
        )

    def _not_finite(self, record: StepRecord) -> list[str]:
        """What was not finite in a skipped step, on which rank, in which prompt or parameter (collective)."""
        prompt_of = {r.sequence_id: self.one_step.prompts[r.prompt_index].where for r in record.rollouts}
        logits = [f"{cause} on rank {rank}, prompt {prompt_of[s]}" for cause, rank, s in record.sums.bad]
        names = self.topology.gather_objects(self.optimizer.bad_gradient())
        gradients = [f"the gradient of {name} on rank {rank}" for rank, name in enumerate(names) if name]
        return logits or gradients or ["the norm of the gradient, which overflowed"]

    def _due(self, done: int, interval: int) -> bool:
        return bool(interval) and done % interval == 0

    def _save(self) -> None:
        self.progress.phase("saving")
        if self.log is not None:
            self.log.sync()  # a checkpoint's steps are in the metrics, also after a power loss
        state, rollouts = self._with_ahead()
        path = self.checkpoints.save(self.model.student, self.optimizer, state, rollouts)
        self._saved = self.state.step
        self.progress.say(f"checkpoint {path}")

    def _with_ahead(self) -> tuple[RunState, Rollouts | None]:
        """The state with the rollouts of later steps, once the engine has generated them (collective)."""
        ahead, state = self.one_step.ahead, self.state
        pending = ahead.pending(state.step) if ahead else {}
        if ahead is None or not pending:
            return state, None
        rollouts = ahead.rollouts.finished(list(pending))
        if rollouts is None:
            again = "are generated anew by this checkpoint's weights when the run resumes"
            self.progress.say(f"the rollouts of step {min(pending) + 1} are not finished: they {again}")
            return state, None
        return replace(state, ahead=pending), rollouts

    def _resume(self) -> None:
        self.checkpoints.remove_unfinished()
        if self.start.path is None:
            return
        path, saved = self.checkpoints.restore(self.start.path, self.model.student, self.optimizer)
        self.model.teacher_changed()  # if it follows the student
        skipped, in_a_row = saved.skipped_steps, saved.skipped_in_a_row
        self.state = replace(self.state, step=saved.step, skipped_steps=skipped, skipped_in_a_row=in_a_row)
        anew: list[int] = []
        if (ahead := self.one_step.ahead) is not None:
            anew = ahead.resume(saved.ahead, self.checkpoints.rollouts_ahead(path, saved))
        if self.topology.is_leader:
            print(f"resuming from {path} (step {saved.step})", flush=True)
        for line in self.validator.changes():
            if self.topology.is_leader:
                print(line, flush=True)
        if anew and self.topology.is_leader:
            what = f"the checkpoint's rollouts of step {anew[0] + 1} answer other requests than this run's"
            print(f"{what}: they are generated anew by its weights", flush=True)
