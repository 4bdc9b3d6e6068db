"""Rollouts by vLLM inside the trainer's own process: one GPU serves both, in turns.

The order of a step, each line a method of ``ColocatedEngine``:

    update_weights   wakes the memory of the weights, copies the trainer's tensors into it, forgets cached prefixes
    generate         hands torch's cached blocks back to the device, wakes the key-value cache, generates
    sleep            drops weights (level 2: they are refreshed before they are next used) and cache

Under tensor parallelism every rank of a group makes its own ``vllm.LLM`` with vLLM's external launcher, and all of them
are given the same requests; vLLM splits the model over the process group that is already up.
Source: vllm 0.24.0, v1/executor/uniproc_executor.py, v1/executor/abstract.py, device_allocator/cumem.py.
"""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from nemo_tropd.batch import Rollout
from nemo_tropd.rollout.engine import EngineError, RefreshStats, RolloutRequest, WeightStreamError, check_requests
from nemo_tropd.rollout.vllm.generate import generate
from nemo_tropd.rollout.vllm.settings import EngineSettings
from nemo_tropd.rollout.weights.stream import checked_stream

_DISCARD_ALL = 2  # vLLM's sleep level that keeps nothing
_KEEP_WEIGHTS = 1  # and the one that moves weights to pinned memory of the host
# A second runner of vLLM draws all seeded requests of a step in one kernel (the first launches one a request), but
# takes at most so many biased logits a request. Source: vllm 0.24.0, v1/worker/gpu/sample/logit_bias.py.
_MOST_BIASED = 1024


class ColocatedEngine:
    """A ``RolloutEngine`` in this process. Collective over the tensor-parallel group if that is larger than one."""

    def __init__(
        self,
        settings: EngineSettings,
        *,
        world_size: int = 1,
        sleeps: bool = True,
        make_llm: Callable[..., Any] | None = None,
    ) -> None:
        """Settings only; nothing is loaded.

        ``world_size``: processes of the trainer, whose process group is up unless this is 1.
        ``sleeps``: False keeps weights and cache on the device between rollouts.
        ``make_llm``: stands in for ``vllm.LLM`` in tests.
        """
        self.settings = settings
        self._shapes, self._optional = settings.shapes
        self._world_size, self._sleeps, self._make_llm = world_size, sleeps, make_llm
        self._llm: Any = None
        self._asleep: set[str] = set()  # of weights, kv_cache
        # The checkpoint's weights are number 0, unless they are discarded at the first sleep or are not there.
        discarded = settings.refreshable and sleeps
        self._version: int | None = None if discarded or settings.weights_shapes is not None else 0

    def start(self) -> None:
        """Build vLLM's engine beside the trainer's models and put it to sleep; it takes memory that must be free."""
        if self._llm is not None:
            raise EngineError("the engine is running; close it before it is started again")
        arguments = self.settings.llm_arguments() | {"enable_sleep_mode": self._sleeps}
        if self._world_size > 1:
            arguments["distributed_executor_backend"] = "external_launcher"
        try:
            with environment(self._environment()):
                self._llm = self._new_llm(arguments)
        except Exception as error:
            self.close()
            raise EngineError(
                f"vLLM could not start beside the trainer on {self.settings.model_dir} "
                f"({type(error).__name__}: {error}); if memory is short, lower "
                "model.rollout.gpu_memory_utilization or set model.rollout.placement=process"
            ) from error
        if self._sleeps:
            self._fall_asleep()

    def update_weights(self, stream: Iterable[tuple[str, Tensor]], version: int) -> RefreshStats:
        """See ``RolloutEngine.update_weights``: tensors are read where they lie and cast by the copy."""
        llm = self._running()
        if not self.settings.refreshable:
            raise EngineError("this engine was made with refreshable=False: its weights stay as they are")
        began, counted = time.monotonic(), _Counted(checked_stream(stream, self._shapes, self._optional))
        self._version = None  # until the last tensor is in, some layers are new and some old
        self._wake("weights")
        try:
            llm.collective_rpc("begin_tropd_refresh")
            llm.collective_rpc("load_tropd_tensors", args=(iter(counted),))
            llm.collective_rpc("finish_tropd_refresh")
        except EngineError:
            raise
        except Exception as error:
            raise WeightStreamError(f"vLLM did not take the weights ({type(error).__name__}: {error})") from error
        if not counted.exhausted:
            raise WeightStreamError("vLLM stopped reading the weights before their end")
        llm.reset_prefix_cache()
        self._version = version
        return RefreshStats(seconds=time.monotonic() - began, bytes=counted.bytes, buckets=1)

    def generate(self, requests: Sequence[RolloutRequest]) -> list[Rollout]:
        """See ``RolloutEngine.generate``."""
        llm, requests, s = self._running(), list(requests), self.settings
        check_requests(requests, max_model_len=s.max_model_len, vocab_size=s.vocab_size)
        if not requests:
            return []
        if self._version is None:
            raise EngineError(
                "the engine has no weights (discarded by sleep(), or never loaded): call update_weights() before "
                "generate()"
            )
        self._wake("weights")
        self._wake("kv_cache")
        answers = generate(
            llm,
            [[*r.prompt_ids, *r.prefix_ids] for r in requests],
            [r.seed for r in requests],
            [r.max_new_tokens for r in requests],
            sampling=s.sampling,
            end_ids=s.end_ids,
            padding_ids=range(s.vocab_size, s.model_rows),
        )
        return [
            Rollout(
                prompt_ids=list(r.prompt_ids),
                prefix_ids=list(r.prefix_ids),
                response_ids=a.token_ids,
                response_log_probs=a.log_probs,
                weight_version=self._version,
                sequence_id=r.sequence_id,
                prompt_index=r.prompt_index,
                finished=a.finished,
            )
            for r, a in zip(requests, answers, strict=True)
        ]

    def sleep(self) -> bool:
        """See ``RolloutEngine.sleep``. Weights that are never refreshed go to the host's memory and come back."""
        if self._llm is not None and self._sleeps and self._asleep != {"weights", "kv_cache"}:
            # vLLM falls asleep as one: what still sleeps is woken first.
            for part in sorted(self._asleep):
                self._wake(part)
            self._fall_asleep()
        return self._sleeps and self.settings.refreshable

    def close(self, *, run_over: bool = False) -> None:
        """Free vLLM's memory and its process groups; the trainer's process group stays."""
        if self._llm is None:
            return
        try:
            for part in sorted(self._asleep):
                self._wake(part)  # vLLM unmaps all its memory at the end, and what sleeps is unmapped already
            with _default_group_kept():
                self._llm.llm_engine.engine_core.shutdown()
                self._llm = None
                gc.collect()  # later versions shut down once more when the engine is collected
        except Exception as error:
            # The run's results are safe by now: what is left of vLLM goes with the process.
            print(f"vLLM raised during shutdown ({type(error).__name__}: {error})", file=sys.stderr, flush=True)
        self._llm, self._asleep = None, set()
        _release_cached_blocks()

    @property
    def llm(self) -> Any:
        """The ``vllm.LLM`` inside, for measurements."""
        return self._running()

    def _running(self) -> Any:
        if self._llm is None:
            raise EngineError("the engine is not running")
        return self._llm

    def _new_llm(self, arguments: dict[str, Any]) -> Any:
        if self._make_llm is not None:
            return self._make_llm(**arguments)
        from vllm import LLM

        return LLM(**arguments)

    def _environment(self) -> dict[str, str]:
        values = {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # in this process, which the external launcher demands, too
            "VLLM_PLUGINS": "",  # NeMo registers one, which costs 20 s and tracebacks
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_USE_FLASHINFER_SAMPLER": "0",  # compiles at its first use, and knows no seeds a request
            "HF_HUB_OFFLINE": "1",
            "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
        }
        if torch.cuda.is_available() and "VLLM_USE_V2_MODEL_RUNNER" not in os.environ:
            biased = self.settings.model_rows - self.settings.vocab_size
            values["VLLM_USE_V2_MODEL_RUNNER"] = str(int(biased <= _MOST_BIASED))
        # vLLM turns expandable segments off around its own pool, but knows only the older of the variable's names.
        newer = os.environ.get("PYTORCH_ALLOC_CONF", "")
        if self._sleeps and "expandable_segments:True" in newer and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
            values["PYTORCH_CUDA_ALLOC_CONF"] = newer
        return values

    def _wake(self, part: str) -> None:
        if part not in self._asleep:
            return
        # The trainer's freed blocks stay with torch's allocator; vLLM's memory comes from the device itself.
        _release_cached_blocks()
        self._running().wake_up(tags=[part])
        self._asleep.discard(part)

    def _fall_asleep(self) -> None:
        self._running().sleep(level=_DISCARD_ALL if self.settings.refreshable else _KEEP_WEIGHTS)
        self._asleep = {"weights", "kv_cache"}
        if self.settings.refreshable:
            self._version = None


class _Counted:
    """A stream of tensors that knows how many bytes passed and whether its end was reached."""

    def __init__(self, stream: Iterable[tuple[str, Tensor]]) -> None:
        self.stream, self.bytes, self.exhausted = stream, 0, False

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self.stream:
            self.bytes += tensor.numel() * tensor.element_size()
            yield name, tensor.detach()
        self.exhausted = True


@contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """``values`` in this process's environment for as long as the block runs; then what was there before."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _release_cached_blocks() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


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
