"""Which rollout engine a run gets, and where it lives: a child process of the leader, every rank's own process, or
hosts that train nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from nemo_tropd.config import ConfigError, TropdConfig, host_and_port
from nemo_tropd.model.tropd_model import MegatronTrOPDModel
from nemo_tropd.parallel.topology import Topology
from nemo_tropd.planner.memory import auto_placement
from nemo_tropd.rollout.colocated import ColocatedEngine
from nemo_tropd.rollout.dedicated import DedicatedEngines
from nemo_tropd.rollout.engine import RolloutEngine, Sampling
from nemo_tropd.rollout.engine_settings import EngineSettings
from nemo_tropd.rollout.every_rank import EveryRankRollouts
from nemo_tropd.rollout.supervisor import Rollouts, RolloutSupervisor
from nemo_tropd.rollout.vllm_engine import VllmEngine

# (configuration, checkpoint, refreshable) -> a maker of engines
EngineMaker = Callable[[TropdConfig, Path, bool], Callable[[], RolloutEngine]]


def placement(cfg: TropdConfig, *, on_cuda: bool | None = None) -> str:
    """``process``, ``colocated`` or ``dedicated``, as ``model.rollout.placement`` asks and the machine allows.

    Raises:
        ConfigError: colocated without a GPU, or with pipeline parallelism.
    """
    asked, pipeline = cfg.model.rollout.placement, cfg.model.pipeline_model_parallel_size
    on_cuda = torch.cuda.is_available() if on_cuda is None else on_cuda
    if asked == "auto":
        return auto_placement(cfg, on_gpu=on_cuda)
    if asked == "colocated" and not on_cuda:
        raise ConfigError(
            "model.rollout.placement",
            asked,
            "there is no GPU here, and on CPU vLLM would take over the trainer's threads; choose process or auto",
        )
    if asked == "colocated" and pipeline > 1:
        raise ConfigError(
            "model.rollout.placement",
            asked,
            f"the engine's tensor-parallel groups need whole layers, but model.pipeline_model_parallel_size is "
            f"{pipeline}; set that to 1, or choose process",
        )
    return asked


def sampling_of(cfg: TropdConfig) -> Sampling:
    """How the engine draws tokens."""
    r = cfg.model.rollout
    return Sampling(temperature=r.temperature, top_p=r.top_p, top_k=r.top_k)


def engine_maker(vocab_size: int, kv_cache_gib: float | None = None) -> EngineMaker:
    """Makers of vLLM engines that never draw an id from ``vocab_size`` (the tokenizer's true size) on.

    ``kv_cache_gib``: on a GPU, the key-value cache's memory; None leaves it to model.rollout.gpu_memory_utilization,
    which several runs on one GPU cannot share.
    """

    def maker(cfg: TropdConfig, path: Path, refreshable: bool) -> Callable[[], RolloutEngine]:
        r, on_cuda = cfg.model.rollout, torch.cuda.is_available()
        colocated = refreshable and placement(cfg) == "colocated"

        def make() -> RolloutEngine:
            settings = EngineSettings(
                path,
                dtype=r.dtype,
                max_model_len=cfg.model.encoder_seq_length,
                max_num_seqs=r.max_num_seqs,
                seed=cfg.model.seed,
                sampling=sampling_of(cfg),
                true_vocab_size=vocab_size,
                refreshable=refreshable,
                kv_cache_gib=kv_cache_gib if on_cuda else r.kv_cache_gib,
                gpu_memory_utilization=r.gpu_memory_utilization,
                tensor_parallel=cfg.model.tensor_model_parallel_size if colocated else 1,
                # A teacher writes once: graphs would take longer to make than they save.
                enforce_eager=not (on_cuda and refreshable),
                torch_compile=r.torch_compile,
            )
            if colocated:
                world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
                return ColocatedEngine(settings, world_size=world, sleeps=r.sleep)
            if refreshable and r.placement == "dedicated":
                return _dedicated(cfg, settings, "cuda" if on_cuda else "cpu")
            return VllmEngine(settings, threads=r.omp_threads, answer_timeout_s=r.request_timeout_s)

        return make

    return maker


def _dedicated(cfg: TropdConfig, settings: EngineSettings, device: str) -> DedicatedEngines:
    r = cfg.model.rollout
    assert r.dedicated.address is not None and r.dedicated.engines is not None  # config_checks has seen to it
    return DedicatedEngines(
        settings,
        address=host_and_port("model.rollout.dedicated.address", r.dedicated.address),
        engines=r.dedicated.engines,
        device=device,
        threads=r.omp_threads,
        timeout_s=r.dedicated.timeout_s,
        answer_timeout_s=r.request_timeout_s,
    )


@contextmanager
def rollouts_of(
    cfg: TropdConfig, topology: Topology, model: MegatronTrOPDModel, engines: EngineMaker
) -> Iterator[Rollouts]:
    """The engine or engines for the student, closed at the end whatever happens."""
    make = engines(cfg, Path(cfg.pretrained_checkpoint.restore_from_path), True)
    rollouts: Rollouts = (
        EveryRankRollouts(topology, make, model.device_stream)
        if placement(cfg) == "colocated"
        else RolloutSupervisor(topology, make, model.export_stream)
    )
    try:
        yield rollouts
    finally:
        rollouts.close()
