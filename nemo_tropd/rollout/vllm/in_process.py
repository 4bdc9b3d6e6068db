"""Rollouts by vLLM inside the trainer's own process: one GPU serves both, in turns. The methods in a step's order:

    update_weights   wakes the memory of the weights, copies the trainer's tensors into it, forgets cached prefixes
    generate         hands torch's cached blocks back to the device, wakes the key-value cache, generates
    sleep            drops weights (level 2: they are refreshed before they are next used) and cache

Under tensor parallelism every rank of a group makes its own ``vllm.LLM`` (external launcher) and is given the same
requests; vLLM splits the model over the process group that is already up.
Source: vllm 0.24.0, v1/executor/uniproc_executor.py, v1/executor/abstract.py, device_allocator/cumem.py.
"""

from __future__ import annotations

import gc
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

import torch
from torch import Tensor

from nemo_tropd.batch import Rollout
from nemo_tropd.imports import without_collections
from nemo_tropd.rollout.engine import (
    EngineError,
    Finished,
    Further,
    RefreshStats,
    RolloutRequest,
    Wanted,
    WeightStreamError,
    check_requests,
)
from nemo_tropd.rollout.vllm.generating import forget_prefixes, generated
from nemo_tropd.rollout.vllm.settings import EngineSettings
from nemo_tropd.rollout.weights.stream import checked_stream

_DISCARD_ALL = 2  # vLLM's sleep level that keeps nothing
# In the order of waking: on the first call after a sleep vLLM copies buffers back into the weights, whatever its tag.
_MEMORY = ("weights", "kv_cache")
# A second runner of vLLM draws all seeded requests of a step in one kernel (the first launches one a request), but
# takes at most so many biased logits a request. Source: vllm 0.24.0, v1/worker/gpu/sample/logit_bias.py.
_MOST_BIASED = 1024
# Bytes of a GPU that vLLM's communicators take before it looks for its share, if the engine spans several GPUs:
# NCCL's buffers, 64 MiB of symmetric memory, its own all-reduce's.
_COMMUNICATORS = 1 << 29


def _vllm() -> Any:
    with without_collections():
        from vllm import LLM

    keep_sampled_log_probs()
    return LLM


def keep_sampled_log_probs() -> None:
    """Where only the sampled token's log-probability is asked for, vLLM keeps it as a number. Its own dictionary and
    object a token are made on the thread that launches the next step: a sixth of a 1.5B model's rollouts on an H200.
    EngineError if this vLLM does it elsewhere."""
    from vllm.v1.engine.logprobs import LogprobsProcessor

    complete = getattr(LogprobsProcessor, "_update_sample_logprobs", None)
    if complete is None:
        raise EngineError("this vLLM has no LogprobsProcessor._update_sample_logprobs: install a version of the pins")
    if getattr(complete, "keeps_numbers", False):
        return

    def update(processor: Any, lists: Any) -> None:
        if processor.num_logprobs:
            complete(processor, lists)
        else:  # in one row a token the sampled one comes first
            processor.logprobs.extend(row[0] for row in lists[1].tolist())

    update.keeps_numbers = True  # type: ignore[attr-defined]
    setattr(LogprobsProcessor, "_update_sample_logprobs", update)  # noqa: B010 - mypy takes it for another signature


@dataclass(eq=False, repr=False)
class ColocatedEngine:
    """A ``RolloutEngine`` in this process. Collective over the tensor-parallel group if that is larger than one."""

    settings: EngineSettings
    _: KW_ONLY
    world_size: int = 1  # processes of the trainer, whose process group is up unless this is 1
    sleeps: bool = True  # needs ``settings.refreshable``; False keeps weights and cache on the device between rollouts
    make_llm: Callable[..., Any] | None = None  # instead of vllm.LLM, in tests
    _llm: Any = field(default=None, init=False)
    _asleep: set[str] = field(default_factory=set, init=False)  # of _MEMORY
    _version: int | None = field(default=None, init=False)

    def check_room(self) -> None:
        """vLLM asks for its share of the device first. One rank that lacks it would leave the others in collectives of
        vLLM's start; what all ranks ask before it, all raise."""
        if not torch.cuda.is_available():
            return
        torch.cuda.empty_cache()
        (free, total), share = torch.cuda.mem_get_info(), self.settings.gpu_memory_utilization
        several = self.settings.tensor_parallel > 1
        free -= _COMMUNICATORS * several
        if free < share * total:
            raise EngineError(
                f"model.rollout.gpu_memory_utilization={share} of the {total / 2**30:.1f} GiB of "
                f"{torch.cuda.get_device_name()} is the engine's, but only {free / 2**30:.1f} GiB are free"
                f"{' beside its communicators' * several}; lower it, "
                "or end what else runs on this GPU"
            )

    def start(self) -> None:
        """Build vLLM's engine beside the trainer's models and put it to sleep; it takes memory that must be free."""
        if self._llm is not None:
            raise EngineError("the engine is running; close it before it is started again")
        arguments = self.settings.llm_arguments() | {"enable_sleep_mode": self.sleeps}
        if self.world_size > 1:
            arguments["distributed_executor_backend"] = "external_launcher"
        if self.settings.tensor_parallel > 1 and _expandable_segments():
            # Its IPC handles cannot be made of such segments: the process would end.
            arguments["disable_custom_all_reduce"] = True
        try:
            with environment(self._environment()), _triton_hooks_kept():
                make = self.make_llm or _vllm()
                if torch.cuda.is_available():
                    # vLLM's import patches set_stream, to remember the stream. Where it knows none it makes one, which
                    # would stay the trainer's, whose gradient accumulators are made on this one.
                    torch.cuda.set_stream(torch.cuda.current_stream())
                self._llm = make(**arguments)
        except Exception as error:
            _release_half_built(error)
            raise EngineError(
                f"vLLM could not start on {self.settings.model_dir} ({type(error).__name__}: {error}); if memory is "
                "short, lower model.rollout.gpu_memory_utilization or set model.rollout.placement=process"
            ) from error
        if self.sleeps:
            self._fall_asleep()
        elif self.settings.weights_shapes is None:
            self._version = 0  # the checkpoint's

    def update_weights(self, stream: Iterable[tuple[str, Tensor]], version: int) -> RefreshStats:
        """Tensors are read where they lie and cast by the copy."""
        llm = self.llm
        if not self.settings.refreshable:
            raise EngineError("this engine was made with refreshable=False: its weights stay as they are")
        began, sizes = time.monotonic(), []

        def tensors() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in checked_stream(stream, *self.settings.shapes):
                sizes.append(tensor.numel() * tensor.element_size())
                yield name, tensor.detach()

        passed = tensors()
        self._version = None  # until the last tensor is in, some layers are new and some old
        self._wake("weights")
        try:
            llm.collective_rpc("begin_tropd_refresh")
            llm.collective_rpc("load_tropd_tensors", args=(passed,))
            llm.collective_rpc("finish_tropd_refresh")
        except EngineError:
            raise
        except Exception as error:
            raise WeightStreamError(f"vLLM did not take the weights ({type(error).__name__}: {error})") from error
        if next(passed, None) is not None:
            raise WeightStreamError("vLLM stopped reading the weights before their end")
        forget_prefixes(llm)
        self._version = version
        return RefreshStats(seconds=time.monotonic() - began, bytes=sum(sizes), buckets=1)

    def generate(
        self,
        requests: Sequence[RolloutRequest],
        finished: Finished | None = None,
        further: Further | None = None,
        wanted: Wanted | None = None,
    ) -> list[Rollout]:
        llm, requests, s = self.llm, list(requests), self.settings
        check_requests(requests, max_model_len=s.max_model_len, vocab_size=s.vocab_size)
        if not requests and further is None:
            return []
        if self._version is None:
            raise EngineError("the engine has no weights (discarded by sleep(), or never loaded): refresh it first")
        self._wake(*_MEMORY)
        return generated(llm, requests, s, self._version, finished, further, wanted)

    def sleep(self) -> bool:
        if self._llm is not None and self.sleeps and self._asleep != set(_MEMORY):
            self._wake(*_MEMORY)  # vLLM falls asleep as one
            self._fall_asleep()
        return self.sleeps

    def close(self, *, run_over: bool = False) -> None:
        """Free vLLM's memory and its process groups; the trainer's process group stays."""
        if self._llm is None:
            return
        try:
            self._wake(*_MEMORY)  # vLLM unmaps all memory at its end, and what sleeps is unmapped already
            with _default_group_kept():
                self._llm.llm_engine.engine_core.shutdown()
                self._llm = None
                gc.collect()  # later versions shut down once more when the engine is collected
        except Exception as error:
            # The run's results are safe by now: what is left of vLLM goes with the process.
            print(f"vLLM raised during shutdown ({type(error).__name__}: {error})", file=sys.stderr, flush=True)
        self._llm, self._asleep = None, set()
        torch.cuda.empty_cache()

    @property
    def llm(self) -> Any:
        """The ``vllm.LLM`` inside."""
        if self._llm is None:
            raise EngineError("the engine is not running")
        return self._llm

    def _environment(self) -> dict[str, str]:
        values = {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # in this process, which the external launcher demands, too
            # Of a child's tensor-parallel workers: torch counts this process's devices as a use of CUDA, after which
            # forked processes have none, and vLLM forks if CUDA is merely not initialized.
            "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
            "VLLM_PLUGINS": "",  # NeMo registers one, which costs 20 s and tracebacks
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_USE_FLASHINFER_SAMPLER": "0",  # compiles at its first use, and knows no seeds a request
            "HF_HUB_OFFLINE": "1",
            "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
        }
        if torch.cuda.is_available() and "VLLM_USE_V2_MODEL_RUNNER" not in os.environ:
            biased = self.settings.model_rows - self.settings.vocab_size
            values["VLLM_USE_V2_MODEL_RUNNER"] = str(int(biased <= _MOST_BIASED))
        # vLLM turns expandable segments off around its own pool, and on again, if it finds this text under this name.
        if self.sleeps and _expandable_segments():
            values["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
        return values

    def _wake(self, *parts: str) -> None:
        for part in parts:
            if part in self._asleep:
                # The trainer's freed blocks stay with torch's allocator; vLLM's memory comes from the device itself.
                torch.cuda.empty_cache()
                self.llm.wake_up(tags=[part])
                self._asleep.discard(part)

    def _fall_asleep(self) -> None:
        self.llm.sleep(level=_DISCARD_ALL)
        self._asleep, self._version = set(_MEMORY), None


def _expandable_segments() -> bool:
    """Whether a variable asks torch's allocator for them; torch passes over blanks. Of both names 2.13 goes by the
    older, releases before it by the newer: either counts, since what cannot have such segments ends the process."""
    given = ",".join(os.environ.get(name, "") for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"))
    return "expandable_segments:True" in "".join(given.split())


def _release_half_built(error: BaseException) -> None:
    """Free what vLLM had allocated when it failed: the frames of ``error``, and cycles, still hold it."""
    link: BaseException | None = error
    while link is not None:
        traceback.clear_frames(link.__traceback__)
        link = link.__cause__ or link.__context__
    gc.unfreeze()  # vLLM freezes what is alive after its warm-up
    gc.collect()
    torch.cuda.empty_cache()


@contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """``values`` in this process's environment while the block runs; then what was there before."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


@contextmanager
def _default_group_kept() -> Iterator[None]:
    """vLLM's shutdown ends with the default process group, which is the trainer's: that one call is passed over."""
    destroy = torch.distributed.destroy_process_group

    def destroy_others(group: Any = None) -> None:
        if group is not None:
            destroy(group)

    torch.distributed.destroy_process_group = destroy_others
    try:
        yield
    finally:
        torch.distributed.destroy_process_group = destroy


@contextmanager
def _triton_hooks_kept() -> Iterator[None]:
    """vLLM's start ends with hooks that warn of each Triton kernel compiled from then on, as a delay of inference: the
    trainer's own kernels are still to come. Source: vllm 0.24.0, triton_utils/jit_monitor.py."""
    if not torch.cuda.is_available():
        yield
        return
    from triton import knobs

    hook, shown = knobs.runtime.jit_post_compile_hook, knobs.autotuning.print
    try:
        yield
    finally:
        knobs.runtime.jit_post_compile_hook, knobs.autotuning.print = hook, shown
