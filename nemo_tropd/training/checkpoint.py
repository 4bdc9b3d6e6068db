"""Checkpoints of a run: Megatron's distributed checkpoint, complete or absent.

    RUN/checkpoints/step_00000020/     Megatron's files: model (keys under ``model.``), optimizer, run state
    RUN/checkpoints/step_00000020/hf/  config.json, tokenizer and chat template: export needs nothing else

A checkpoint is written under a temporary name and renamed when every rank has written its part, so a directory with a
final name is complete. Temporary directories left by a killed run are removed at the next start.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron.core import dist_checkpointing
from megatron.core.models.gpt import GPTModel
from torch.distributed.checkpoint.api import CheckpointException  # derives from BaseException

from nemo_tropd.config import ConfigError
from nemo_tropd.convert.folders import write_hf_sidecar
from nemo_tropd.convert.metadata_file import without_code
from nemo_tropd.files import finish_folder
from nemo_tropd.parallel.agreement import on_rank_zero
from nemo_tropd.parallel.topology import Topology
from nemo_tropd.training.checkpoint_writer import write_in_this_process
from nemo_tropd.training.optimizer import StudentOptimizer

MODEL_PREFIX = "model."
_NAME = re.compile(r"step_(\d{8})")


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read: names the path, what is wrong and what to do."""


@dataclass(frozen=True)
class RunState:
    """What a resumed run must agree with, besides weights and optimizer states.

    Draws, data order, schedule and prefix length are functions of ``step`` and the seed, so nothing else is state.
    """

    step: int  # optimizer steps done
    seed: int
    global_batch_size: int
    samples_per_prompt: int
    prompts: str  # fingerprint of the training prompts
    teacher: str
    student: str
    skipped_steps: int = 0


def checkpoint_name(step: int) -> str:
    """The directory name of the checkpoint after ``step`` optimizer steps."""
    return f"step_{step:08d}"


class Checkpoints:
    """The checkpoints of one run directory. Every method but :meth:`latest` is collective."""

    def __init__(self, run_dir: Path, topology: Topology, *, hf_source: Path, keep: int) -> None:
        self.dir = run_dir / "checkpoints"
        self.topology, self.hf_source, self.keep = topology, hf_source, keep
        write_in_this_process()

    def complete(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        if not self.dir.is_dir():
            return []
        return sorted(p for p in self.dir.iterdir() if p.is_dir() and _NAME.fullmatch(p.name))

    def remove_unfinished(self) -> None:
        """Remove incomplete checkpoints of a killed run."""
        if self.topology.is_leader and self.dir.is_dir():
            for path in self.dir.glob(".tmp-*"):
                shutil.rmtree(path)
        self.topology.barrier()

    def save(self, model: GPTModel, optimizer: StudentOptimizer, state: RunState) -> Path:
        """Write a checkpoint; on return it is complete and older ones beyond ``keep`` are removed.

        Raises:
            CheckpointError: no room, or a write failed; earlier checkpoints are untouched.
        """
        final = self.dir / checkpoint_name(state.step)
        if final.exists():
            return final
        temporary = self.dir / f".tmp-{final.name}"
        self._check_room(model, optimizer)
        self._on_rank_zero(lambda: self._fresh(temporary), f"cannot write {temporary}")
        try:
            sharded = model.sharded_state_dict(prefix=MODEL_PREFIX)
            content = {
                "optimizer": optimizer.sharded_state_dict(sharded),
                "run_state": asdict(state),
            }
            # Built anew: saving uses a sharded state dict up.
            content["model"] = model.sharded_state_dict(prefix=MODEL_PREFIX)
            dist_checkpointing.save(content, str(temporary))
        except (Exception, CheckpointException) as error:
            raise CheckpointError(
                f"writing {temporary} failed on rank {self.topology.rank} ({_cause(error)}); "
                f"earlier checkpoints are untouched. Free disk space or fix the file system, then rerun the command"
            ) from error
        self._on_rank_zero(lambda: self._finish(temporary, final), f"cannot finish {final}")
        return final

    def _finish(self, temporary: Path, final: Path) -> None:
        write_hf_sidecar(temporary, self.hf_source)
        finish_folder(temporary, final)
        for old in self.complete()[: -self.keep]:
            shutil.rmtree(old)

    def _fresh(self, path: Path) -> None:
        if path.exists():
            shutil.rmtree(path)
        path.mkdir(parents=True)

    def _on_rank_zero(self, action: Callable[[], None], message: str) -> None:
        """Run ``action`` on rank 0; an error there is raised on every rank."""

        def attempt() -> None:
            try:
                action()
            except OSError as error:
                raise CheckpointError(f"{message}: {error}; earlier checkpoints are untouched") from error

        on_rank_zero(self.topology, attempt, unexpected=CheckpointError)

    def _check_room(self, model: GPTModel, optimizer: StudentOptimizer) -> None:
        local = sum(p.numel() * p.element_size() for p in model.parameters())
        # fp32 master weights and two Adam moments beside the weights: 12 bytes a parameter, sharded or saved once.
        local += 12 * sum(p.numel() for p in model.parameters())
        # Every data-parallel rank has the same weights, so the ranks of one replica are counted.
        need = local * self.topology.tensor_size * self.topology.pipeline_size

        def check() -> None:
            self.dir.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.dir).free
            if free < need:
                raise OSError(f"needs {need / 2**20:.0f} MiB, {free / 2**20:.0f} MiB are free")

        self._on_rank_zero(check, f"no room for a checkpoint in {self.dir}")

    def latest(self) -> Path | None:
        """The newest complete checkpoint."""
        found = self.complete()
        return found[-1] if found else None

    def load(self, path: Path, model: GPTModel, optimizer: StudentOptimizer) -> RunState:
        """Fill model and optimizer from ``path`` (saved under any parallel layout) and return the run's state.

        Raises:
            CheckpointError: the checkpoint is damaged or of another model.
        """
        try:
            sharded = model.sharded_state_dict(prefix=MODEL_PREFIX)
            request = {
                "optimizer": optimizer.sharded_state_dict(sharded, is_loading=True),
                "model": model.sharded_state_dict(prefix=MODEL_PREFIX),
            }
            with without_code(path):
                loaded = dist_checkpointing.load(request, str(path))
            weights = {k.removeprefix(MODEL_PREFIX): v for k, v in loaded["model"].items()}
            model.load_state_dict(weights, strict=True)
            for name, parameter in model.named_parameters():
                if not bool(parameter.isfinite().all()):
                    raise ValueError(f"{name} has NaN or infinite values")
            optimizer.load_state_dict(loaded["optimizer"])
            return RunState(**loaded["run_state"])
        except (Exception, CheckpointException) as error:
            raise CheckpointError(
                f"{path} cannot be loaded ({_cause(error)}); remove this directory to resume from the checkpoint "
                f"before it, or set exp_manager.explicit_log_dir to start a new run"
            ) from error


def _cause(error: BaseException) -> str:
    """The last line of an error: torch puts the rank's own exception there, behind a traceback."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1][:300]}" if lines else type(error).__name__


def check_resumable(saved: RunState, now: RunState) -> None:
    """Refuse to resume with settings that would silently change random draws or data order.

    Raises:
        ConfigError: names the setting, its value now, and the value of the checkpoint.
    """
    for name, key in (
        ("seed", "model.seed"),
        ("global_batch_size", "model.global_batch_size"),
        ("samples_per_prompt", "model.rollout.samples_per_prompt"),
        ("prompts", "model.data.path"),
        ("teacher", "model.teacher.path"),
        ("student", "pretrained_checkpoint.restore_from_path"),
    ):
        was, is_now = getattr(saved, name), getattr(now, name)
        if was != is_now:
            raise ConfigError(
                key,
                is_now,
                f"the run's checkpoint was made with {was!r}; restore that value, or set "
                f"exp_manager.explicit_log_dir to start another run",
            )
