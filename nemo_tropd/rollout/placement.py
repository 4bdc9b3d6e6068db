"""What ``model.rollout.placement`` means on this machine, and the engines it asks for.

``placement_of`` decides; ``Engines`` makes the engines of the student and of the teacher; ``rollouts_of`` gives the
trainer its collective view of the student's. Imports no torch before it is called: the planner reads it, too.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from nemo_tropd.config import ConfigError, TropdConfig
from nemo_tropd.rollout.meeting import meeting_point
from nemo_tropd.rollout.secret import read_secret
from nemo_tropd.timeline import OFF, Timeline

if TYPE_CHECKING:
    from torch import Tensor

    from nemo_tropd.batch import Sampling
    from nemo_tropd.parallel.topology import Topology
    from nemo_tropd.rollout.collective import Rollouts
    from nemo_tropd.rollout.engine import RolloutEngine
    from nemo_tropd.rollout.vllm.settings import EngineSettings


def placement_of(cfg: TropdConfig, *, on_gpu: bool | None = None) -> str:
    """``process``, ``colocated`` or ``dedicated``; ``auto`` is colocated on a GPU without pipeline parallelism.

    ``on_gpu``: whether the ranks have GPUs; None asks torch. Raises ConfigError for what cannot be.
    """
    asked, pipeline = cfg.model.rollout.placement, cfg.model.pipeline_model_parallel_size
    if on_gpu is None:
        import torch

        on_gpu = torch.cuda.is_available()
    if asked == "auto":
        return "colocated" if on_gpu and pipeline == 1 else "process"
    wrong = ""
    if asked == "colocated" and not on_gpu:
        wrong = "there is no GPU here, and on CPU vLLM would take over the trainer's threads; choose process or auto"
    elif asked == "colocated" and pipeline > 1:
        wrong = (
            "the engine's tensor-parallel groups need complete layers, but model.pipeline_model_parallel_size is "
            f"{pipeline}; set that to 1, or choose process"
        )
    if wrong:
        raise ConfigError("model.rollout.placement", asked, wrong)
    return asked


def checked_place(cfg: TropdConfig, *, on_gpu: bool) -> str:
    """As ``placement_of``; ConfigError as well if engines there are to work ahead of the trainer, and cannot."""
    place, key, steps = placement_of(cfg, on_gpu=on_gpu), "model.rollout.steps_ahead", cfg.model.rollout.steps_ahead
    if steps and place == "colocated":
        why = "colocated engines and the trainer take turns on the same GPUs"
        raise ConfigError(key, steps, f"{why}: set model.rollout.placement to dedicated (or process), or this to 0")
    return place


def check_placement(cfg: TropdConfig) -> None:
    """Raise ConfigError for what this machine cannot serve and, before anything is allocated, for a missing secret."""
    if placement_of(cfg) == "dedicated" and not cfg.check_only and os.environ.get("RANK", "0") == "0":
        read_secret()


def sampling_of(cfg: TropdConfig) -> Sampling:
    """How ``model.rollout`` samples."""
    from nemo_tropd.batch import Sampling

    return Sampling(cfg.model.rollout.temperature, cfg.model.rollout.top_p, cfg.model.rollout.top_k)


TEACHER_SEQUENCES = 256  # that an engine of the teacher generates at a time: most are short prefixes
_BESIDE = 4.5 * 2**30  # bytes that such an engine leaves: a rank's context, its own CUDA graphs and communicators


def teacher_utilization(gpu_bytes: float) -> float:
    """Share of a GPU's memory for an engine that has it alone, but for the context of a rank."""
    return max(0.0, min(0.9, 1 - _BESIDE / gpu_bytes))


class EngineFactory(Protocol):
    """Makes the engines of a run; they are not started. Tests put doubles in the place of ``Engines``."""

    def student(self, cfg: TropdConfig) -> RolloutEngine: ...

    def teacher(self, cfg: TropdConfig) -> RolloutEngine: ...


class Engines:
    """vLLM engines that never sample an id from ``vocab_size`` (the tokenizer's true size) on."""

    def __init__(
        self, vocab_size: int, kv_cache_gib: float | None = None, teacher_tensor: Mapping[str, int] | None = None
    ) -> None:
        """``kv_cache_gib``: on a GPU, the key-value cache's memory; None leaves it to
        model.rollout.gpu_memory_utilization, which several runs on one GPU cannot share. ``teacher_tensor``: GPUs of
        each engine of a teacher, by model.teacher.path; 1 of others."""
        self._vocab_size, self._kv_cache_gib, self._teacher_tensor = vocab_size, kv_cache_gib, teacher_tensor or {}

    def student(self, cfg: TropdConfig) -> RolloutEngine:
        """Placed as ``placement_of`` says; with colocated each rank's."""
        import torch

        from nemo_tropd.rollout.vllm.child import VllmEngine
        from nemo_tropd.rollout.vllm.hosts import DedicatedEngines
        from nemo_tropd.rollout.vllm.in_process import ColocatedEngine

        r, place, options = cfg.model.rollout, placement_of(cfg), self._remote_options(cfg)
        settings = self._settings(cfg, cfg.pretrained_checkpoint.restore_from_path, place, refreshable=True)
        if place == "colocated":
            world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
            return ColocatedEngine(settings, world_size=world, sleeps=r.sleep)
        if place == "process":
            return VllmEngine(settings, **options)
        assert r.dedicated.address is not None and r.dedicated.engines is not None  # config_checks has seen to it
        address = meeting_point("model.rollout.dedicated.address", r.dedicated.address)
        options |= {"engines": r.dedicated.engines, "timeout_s": r.dedicated.timeout_s, "queue": r.dedicated.queue}
        return DedicatedEngines(settings, address=address, secret=read_secret(), **options)

    def teacher(self, cfg: TropdConfig) -> RolloutEngine:
        """Child processes of rank 0 with the checkpoint's own weights, wherever the student's engine is: one on a CPU,
        else as many as this node's GPUs hold. Those share a queue: what they generate is kept on disk."""
        import torch

        from nemo_tropd.rollout.vllm.child import VllmEngine

        settings = self._settings(cfg, cfg.model.teacher.path, "process", refreshable=False)
        devices: tuple[str | None, ...] = (None,)
        if torch.cuda.is_available():
            tensor = self._teacher_tensor.get(cfg.model.teacher.path, 1)
            changes: dict[str, Any] = {"tensor_parallel": tensor, "max_num_seqs": TEACHER_SEQUENCES}
            if self._kv_cache_gib is None:
                changes["gpu_memory_utilization"] = teacher_utilization(torch.cuda.mem_get_info()[1])
            settings = replace(settings, torch_compile=False, **changes)
            devices = device_groups(cfg.trainer.devices, tensor, torch.cuda.device_count())
        return VllmEngine(settings, devices=devices, queue=True, **self._remote_options(cfg))

    @staticmethod
    def _remote_options(cfg: TropdConfig) -> dict[str, Any]:
        return {"threads": cfg.model.rollout.omp_threads, "answer_timeout_s": cfg.model.rollout.request_timeout_s}

    def _settings(self, cfg: TropdConfig, model_dir: str, place: str, *, refreshable: bool) -> EngineSettings:
        import torch

        from nemo_tropd.rollout.vllm.settings import EngineSettings

        r, on_gpu = cfg.model.rollout, torch.cuda.is_available()
        return EngineSettings(
            Path(model_dir),
            dtype=r.dtype,
            max_model_len=cfg.model.encoder_seq_length,
            max_num_seqs=r.max_num_seqs,
            seed=cfg.model.seed,
            sampling=sampling_of(cfg),
            eos_ids=tuple(r.end_tokens) or None,
            true_vocab_size=self._vocab_size,
            refreshable=refreshable,
            kv_cache_gib=self._kv_cache_gib if on_gpu else r.kv_cache_gib,
            gpu_memory_utilization=r.gpu_memory_utilization,
            tensor_parallel=cfg.model.tensor_model_parallel_size if place == "colocated" else 1,
            enforce_eager=not on_gpu,
            torch_compile=r.torch_compile,
        )


def device_groups(devices: int, size: int, visible: int) -> tuple[str, ...]:
    """The node's first ``devices`` GPUs, of ``visible`` ones, in groups of ``size``, as CUDA_VISIBLE_DEVICES."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = (given.split(",") if given else [str(i) for i in range(visible)])[: min(devices, visible)]
    groups = tuple(",".join(names[i : i + size]) for i in range(0, len(names) - size + 1, size))
    if not groups:
        seen = f"rank 0 sees {len(names)} GPU(s) ({given or 'CUDA_VISIBLE_DEVICES is not set'})"
        remedy = f"an engine of the teacher needs {size}: let every rank see all of its node's GPUs"
        raise ConfigError("trainer.devices", devices, f"{seen}, but {remedy}")
    return groups


class Student(Protocol):
    """What is needed of the run's model. Streams are of (Hugging Face name, full tensor)."""

    vocab_size: int

    def leader_stream(self) -> Iterator[tuple[str, Tensor]]: ...

    def device_stream(self) -> Iterator[tuple[str, Tensor]]: ...


@contextmanager
def rollouts_of(
    cfg: TropdConfig, topology: Topology, model: Student, engines: EngineFactory, timeline: Timeline = OFF
) -> Iterator[Rollouts]:
    """The trainer's view of the student's engine or engines, closed at the end whatever happens. ``timeline`` is told
    when those of this rank are at work."""
    from nemo_tropd.rollout.ahead import AheadRollouts
    from nemo_tropd.rollout.collective import EveryRankRollouts, RankZeroRollouts
    from nemo_tropd.rollout.timed import TimedEngine

    kind: type[Rollouts] = AheadRollouts if cfg.model.rollout.steps_ahead else RankZeroRollouts
    weights = model.leader_stream
    if placement_of(cfg) == "colocated":
        kind, weights = EveryRankRollouts, model.device_stream

    def make() -> RolloutEngine:
        engine = engines.student(cfg)
        return TimedEngine(engine, timeline) if timeline.enabled else engine

    with closing(kind(topology, make, weights, model.vocab_size)) as rollouts:
        yield rollouts
