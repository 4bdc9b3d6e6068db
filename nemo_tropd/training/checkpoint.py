"""Checkpoints of a run, RUN/checkpoints/step_N: Megatron's distributed checkpoint, and what export needs in hf/.

Complete or absent: written under a temporary name, flushed, and renamed when every rank has written its part. One that
was damaged later is reported and renamed to ``step_N.damaged`` once the one before it is loaded.
"""

import errno
import json
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.serialization import get_default_save_sharded_strategy
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.models.gpt import GPTModel
from torch.distributed.checkpoint.api import CheckpointException  # derives from BaseException

from nemo_tropd.convert.folders import write_hf_sidecar
from nemo_tropd.convert.megatron_files import check_files
from nemo_tropd.convert.metadata_file import without_code
from nemo_tropd.files import finish_folder, sync
from nemo_tropd.parallel.agreement import ALONE_AFTER_S, Patience, endless, on_every_rank, on_rank_zero
from nemo_tropd.parallel.roll_call import failed_collective
from nemo_tropd.parallel.topology import Topology
from nemo_tropd.teacher.scorer import TeacherScorer
from nemo_tropd.training.ahead import FILE, Rollouts, load_rollouts, save_rollouts
from nemo_tropd.training.checkpoint_writer import write_in_this_process
from nemo_tropd.training.optimizer import StudentOptimizer
from nemo_tropd.training.resume import CheckpointError, RunState

T = TypeVar("T")

MODEL_PREFIX, TEACHER_PREFIX = "model.", "teacher."
FOLLOWING = "model.teacher.follow_steps"
_NAME = re.compile(r"step_(\d{8})")
_DAMAGE_S = 60.0  # in which every rank sees that a file which all of them read is damaged
_MEGATRON = ("metadata.json", ".metadata")  # beside the files that .metadata names, and 0.16's common.pt


class DamagedCheckpoint(CheckpointError):
    """A checkpoint whose files are missing, empty, cut or changed."""


def complete_checkpoints(folder: Path) -> list[Path]:
    """Those with a final name, oldest first."""
    entries = folder.iterdir() if folder.is_dir() else ()
    return sorted(p for p in entries if p.is_dir() and _NAME.fullmatch(p.name))


def newest_readable(
    folder: Path, before: Path | None = None, damage: Sequence[str] = ()
) -> tuple[Path | None, RunState | None, list[str]]:
    """The newest checkpoint (older than ``before``) whose files are all there, its state, and what is wrong with each
    newer one; Nones if there is no checkpoint at all. ``damage``: what was found before. Raises CheckpointError if
    every one is damaged, or the newest is of another version or cannot be looked at."""
    found = [path for path in complete_checkpoints(folder) if before is None or path.name < before.name]
    damage = list(damage)
    for path in reversed(found):
        try:
            return path, _state_of(path), damage
        except DamagedCheckpoint as error:
            damage.append(str(error))
    if damage:
        raise CheckpointError(
            "\n  ".join([f"no checkpoint in {folder} can be loaded:", *damage])
            + "\nRestore one of them, or set exp_manager.explicit_log_dir to start a new run"
        )
    return None, None, damage


def _state_of(path: Path) -> RunState:
    """The state in a checkpoint, after a look at the sizes of all of its files."""
    try:
        for name in _MEGATRON:
            if not (path / name).stat().st_size:
                raise EOFError(f"{name} is empty")
        json.loads((path / "metadata.json").read_text(encoding="utf-8"))
        check_files(path)
        with without_code(path):
            saved = dist_checkpointing.load_common_state_dict(str(path))["run_state"]  # megatron-core 0.19 has no file
    except Exception as error:
        raise _load_error(path, error) from error
    state = RunState.read(saved, path)
    if state.ahead:
        try:
            size = (path / FILE).stat().st_size
            if size != state.ahead_bytes:
                raise EOFError(f"{FILE} has {size} bytes of {state.ahead_bytes}")
        except Exception as error:
            raise _load_error(path, error) from error
    return state


class Checkpoints:
    """The checkpoints of one run directory. Every public method is collective."""

    def __init__(
        self, run_dir: Path, topology: Topology, *, hf_source: Path, keep: int, following: TeacherScorer | None = None
    ) -> None:
        """``following``: the teacher that becomes the student from time to time, which is then saved, too."""
        self.following, self._teacher_written = following, False
        self.dir = run_dir / "checkpoints"
        self.topology, self.hf_source, self.keep = topology, hf_source, keep
        write_in_this_process()

    def remove_unfinished(self) -> None:
        """Remove incomplete checkpoints of a killed run."""

        def remove() -> None:
            for path in self.dir.glob(".tmp-*") if self.dir.is_dir() else ():
                shutil.rmtree(path)

        self._on_rank_zero(remove, f"cannot clean {self.dir}")

    def save(
        self, model: GPTModel, optimizer: StudentOptimizer, state: RunState, ahead: Rollouts | None = None
    ) -> Path:
        """Write a checkpoint, with rollouts of later steps (``ahead``, on rank 0); on return it is complete and older
        ones beyond ``keep`` are removed. Raises CheckpointError without room or if a write failed; earlier
        checkpoints are untouched."""
        final = self.dir / f"step_{state.step:08d}"
        if self._on_rank_zero(final.exists, f"cannot look at {final}"):
            return final
        temporary = self.dir / f".tmp-{final.name}"
        self._check_room(model)

        def begin() -> int:
            self._fresh(temporary)
            return save_rollouts(ahead, temporary) if ahead else 0

        state = replace(state, ahead_bytes=self._on_rank_zero(begin, f"cannot write {temporary}"))
        try:
            sharded = model.sharded_state_dict(prefix=MODEL_PREFIX)
            content = {"optimizer": optimizer.sharded_state_dict(sharded), "run_state": asdict(state)}
            # Built anew: saving uses a sharded state dict up.
            content["model"] = model.sharded_state_dict(prefix=MODEL_PREFIX)
            # The data-parallel copies of a weight share the writing.
            strategy = FullyParallelSaveStrategyWrapper(get_default_save_sharded_strategy(), self.topology.data_group)
            with self.following.scoring() if self.following else nullcontext():
                if self.following:
                    content["teacher"] = self.following.model.sharded_state_dict(prefix=TEACHER_PREFIX)
                dist_checkpointing.save(content, str(temporary), strategy)
        except (Exception, CheckpointException) as error:
            raise CheckpointError(
                f"writing {temporary} failed on rank {self.topology.rank} ({_cause(error)}); "
                f"earlier checkpoints are untouched. Free disk space or fix the file system, then rerun the command"
            ) from error
        self._on_rank_zero(lambda: self._finish(temporary, final), f"cannot finish {final}")
        return final

    def _finish(self, temporary: Path, final: Path) -> None:
        for name in _MEGATRON:
            if not (temporary / name).is_file():
                raise FileNotFoundError(f"{temporary / name} is gone: another process has removed it")
        _state_of(temporary)  # before older ones go: every file has its size, and the state can be read
        write_hf_sidecar(temporary, self.hf_source)
        finish_folder(temporary, final)
        for old in complete_checkpoints(self.dir)[: -self.keep]:
            shutil.rmtree(old)

    def _fresh(self, path: Path) -> None:
        if path.exists():
            shutil.rmtree(path)
        path.mkdir(parents=True)

    def _on_rank_zero(self, action: Callable[[], T], message: str) -> T:
        """Run ``action`` on rank 0; its result is returned, or its error raised, on every rank."""

        def attempt() -> T:
            try:
                return action()
            except Exception as error:
                raise CheckpointError(f"{message}: {_cause(error)}; earlier checkpoints are untouched") from error

        return on_rank_zero(self.topology, attempt, unexpected=CheckpointError)

    def _check_room(self, model: GPTModel) -> None:
        # fp32 master weights and two Adam moments beside the weights: 12 bytes a parameter, sharded or saved once.
        local = sum(p.numel() * (p.element_size() + 12) for p in model.parameters())
        local += sum(p.numel() * p.element_size() for p in self.following.model.parameters()) if self.following else 0
        # Every data-parallel rank has the same weights, so the ranks of one replica are counted.
        need = local * self.topology.tensor_size * self.topology.pipeline_size

        def check() -> None:
            if not self.dir.is_dir():
                self.dir.mkdir(parents=True)
                sync(self.dir.parent)
            free = shutil.disk_usage(self.dir).free
            if free < need:
                raise OSError(f"needs {need / 2**20:.0f} MiB, {free / 2**20:.0f} MiB are free")

        self._on_rank_zero(check, f"no room for a checkpoint in {self.dir}")

    def load(self, path: Path, model: GPTModel, optimizer: StudentOptimizer) -> RunState:
        """Fill model and optimizer from ``path`` (saved under any parallel layout) and return the run's state. Raises
        DamagedCheckpoint on every rank if its files are damaged (model and optimizer may then be filled in part),
        CheckpointError if it cannot be loaded for another reason."""
        followed = self._followed(path)
        with followed.rewriting() if followed else nullcontext() as teacher:

            def wanted() -> dict[str, Any]:
                sharded = model.sharded_state_dict(prefix=MODEL_PREFIX)
                request = {
                    "optimizer": optimizer.sharded_state_dict(sharded, is_loading=True),
                    "model": model.sharded_state_dict(prefix=MODEL_PREFIX),
                }
                if teacher is not None:
                    request["teacher"] = teacher.sharded_state_dict(prefix=TEACHER_PREFIX)
                return request

            # Only the second part has collectives. The ranks enter it together, and each leaves it alone or with all.
            request = self._on_every_rank(path, wanted)

            def read() -> dict[str, Any]:
                with without_code(path):
                    return dict(dist_checkpointing.load(request, str(path)))

            loaded = self._on_every_rank(path, read, _patience)

            def fill() -> RunState:
                _fill(model, loaded["model"], MODEL_PREFIX)
                if teacher is not None:
                    _fill(teacher, loaded["teacher"], TEACHER_PREFIX)
                optimizer.load_state_dict(loaded["optimizer"])
                saved = loaded["run_state"]
                state = RunState.read(saved, path)
                if self.topology.is_leader:
                    load_rollouts(path, state.ahead)
                return state

            return self._on_every_rank(path, fill)

    def _on_every_rank(self, path: Path, work: Callable[[], T], patience: Patience = endless) -> T:
        """A part of reading ``path``; its error is raised on every rank."""

        def attempt() -> T:
            try:
                return work()
            except CheckpointError:
                raise
            except (Exception, CheckpointException) as error:
                raise _load_error(path, error) from error

        return on_every_rank(self.topology, attempt, unexpected=CheckpointError, patience=patience)

    def _followed(self, path: Path) -> TeacherScorer | None:
        """The teacher that follows the student, if the checkpoint holds it."""
        if self.following is None:
            return None

        def look() -> bool:
            return _state_of(path).settings.get(FOLLOWING) is not None

        held = on_rank_zero(self.topology, look, unexpected=CheckpointError)
        if not held and self._teacher_written:
            why = f"{path} is from before {FOLLOWING} was set, and the teacher was read from a later one in part"
            raise CheckpointError(f"{why}: rename that one out of the way, and rerun the command")
        self._teacher_written = held
        return self.following if held else None

    def restore(self, path: Path, model: GPTModel, optimizer: StudentOptimizer) -> tuple[Path, RunState]:
        """:meth:`load` from ``path``, or from the newest checkpoint before it that can be loaded; the damaged ones are
        reported, and renamed once another one is loaded, out of the way of new ones. CheckpointError if none can be.
        """
        tried: list[str] = []
        while True:
            try:
                state = self.load(path, model, optimizer)
                break
            except DamagedCheckpoint as error:
                tried.append(str(error))
                path = on_rank_zero(self.topology, partial(self._before, path, tried), unexpected=CheckpointError)
        self._on_rank_zero(lambda: self._set_aside(path), f"cannot rename checkpoints after {path}")
        return path, state

    def rollouts_ahead(self, path: Path, state: RunState) -> Rollouts | None:
        """The rollouts of later steps in a checkpoint that was restored, on rank 0; None elsewhere."""
        found: list[Rollouts] = []
        if state.ahead:
            self._on_rank_zero(lambda: found.append(load_rollouts(path, state.ahead)), f"{path / FILE} cannot be read")
        return found[0] if found else None

    def _before(self, path: Path, tried: list[str]) -> Path:
        found, _, damage = newest_readable(self.dir, path, tried)
        for line in damage[len(tried) - 1 :]:
            print(f"{line}; using the checkpoint before it", flush=True)
        assert found is not None
        return found

    def _set_aside(self, loaded: Path) -> None:
        for damaged in (path for path in complete_checkpoints(self.dir) if path.name > loaded.name):
            aside = damaged.with_name(f"{damaged.name}.damaged")
            if aside.exists():
                shutil.rmtree(aside)
            damaged.rename(aside)
            print(f"{damaged} is now {aside.name}; it can be removed", flush=True)


def _fill(model: GPTModel, loaded: dict[str, Any], prefix: str) -> None:
    model.load_state_dict({k.removeprefix(prefix): v for k, v in loaded.items()}, strict=True)
    for name, parameter in model.named_parameters():
        if not bool(parameter.isfinite().all()):
            raise ValueError(f"{name} has NaN or infinite values")


def _patience(error: BaseException) -> float:
    """While a checkpoint is read: others may be in Megatron's or torch's collectives, which this rank has left. What is
    wrong with a shard torch tells all ranks; files beside the shards each of them reads for itself."""
    return _DAMAGE_S if isinstance(error, DamagedCheckpoint) else ALONE_AFTER_S


def _load_error(path: Path, error: BaseException) -> CheckpointError:
    """Damage if files are missing, cut or changed; else what the machine, not the checkpoint, is to blame for."""
    causes = list(_causes(error))
    if all(isinstance(cause, OSError) and cause.errno not in (None, errno.ENOENT) for cause in causes):
        return CheckpointError(f"{path} cannot be read ({_cause(error)}); rerun the command when the file system works")
    if any(isinstance(cause, MemoryError | torch.OutOfMemoryError) or "allocate" in str(cause) for cause in causes):
        return CheckpointError(f"{path} cannot be loaded: out of memory ({_cause(error)})")
    if any(map(failed_collective, causes)):  # a rank is gone, or too slow
        return CheckpointError(f"{path} was not loaded: the ranks lost each other ({_cause(error)})")
    return DamagedCheckpoint(f"{path} cannot be loaded (it is damaged: {_cause(error)})")


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The errors of all ranks that failed, if torch collects them; else ``error``."""
    failures: dict[int, Any] = getattr(error, "failures", {})
    yield from (failure[0] for failure in failures.values()) if failures else (error,)


def _cause(error: BaseException) -> str:
    """The last line of an error: torch puts the rank's own exception there, behind a traceback."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1][:300]}" if lines else type(error).__name__
