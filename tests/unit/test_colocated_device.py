"""The engine in the trainer's process beside a CUDA device that only counts: streams, memory, what a failure leaves."""

from __future__ import annotations

import os
import random
import re
import threading
import weakref
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nemo_tropd.rollout.collective import EveryRankRollouts
from nemo_tropd.rollout.engine import EngineError
from nemo_tropd.rollout.vllm import in_process
from nemo_tropd.rollout.vllm.in_process import ColocatedEngine
from nemo_tropd.rollout.vllm.settings import EngineSettings
from tests.tiny_models import make_tiny
from tests.unit.test_colocated import ROWS, TOKENS, Colocated, RecordingLLM, ThreadRanks, on_threads


class Stream:
    """A CUDA stream's identity."""


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A CUDA device that only counts: free and total bytes, the current stream, and what was freed."""
    state = SimpleNamespace(free=8 << 30, total=80 << 30, stream=Stream(), emptied=0)

    def set_stream(stream: Stream) -> None:
        state.stream = stream

    def empty_cache() -> None:
        state.emptied += 1

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (state.free, state.total))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: state.stream)
    monkeypatch.setattr(torch.cuda, "set_stream", set_stream)
    monkeypatch.setattr(torch.cuda, "empty_cache", empty_cache)
    return state


def test_the_trainers_stream_stays_current(
    tmp_path: Path, device: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's import patches set_stream; what it then needs a stream for (NCCL) makes one where none was set."""
    known: list[Any] = []
    plain = torch.cuda.set_stream

    class StreamingLLM(RecordingLLM):
        def __init__(self, **arguments: Any) -> None:
            super().__init__(**arguments)
            if not known:
                torch.cuda.set_stream(Stream())

    def import_vllm() -> type[RecordingLLM]:
        def patched(stream: Any) -> None:
            known[:] = [stream]
            plain(stream)

        monkeypatch.setattr(torch.cuda, "set_stream", patched)
        return StreamingLLM

    monkeypatch.setattr(in_process, "_vllm", import_vllm)
    folder, before = make_tiny(tmp_path, layers=2, vocab=ROWS), device.stream
    ColocatedEngine(EngineSettings(folder, dtype="float32", max_model_len=64)).start()
    assert device.stream is before and known == [before]


def test_compiling_the_trainers_kernels_is_no_delay_of_inference(
    tmp_path: Path, device: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The start of vLLM leaves hooks in Triton that warn of each kernel compiled afterwards."""
    from triton import knobs

    def before(**_: Any) -> None:
        pass

    class MonitoringLLM(RecordingLLM):
        def __init__(self, **arguments: Any) -> None:
            super().__init__(**arguments)
            knobs.runtime.jit_post_compile_hook = lambda **_: self.calls.append(("warned",))
            knobs.autotuning.print = True

    monkeypatch.setattr(knobs.runtime, "jit_post_compile_hook", before)
    monkeypatch.setattr(knobs.autotuning, "print", False)
    folder = make_tiny(tmp_path, layers=2, vocab=ROWS)
    settings = EngineSettings(folder, dtype="float32", max_model_len=64)
    ColocatedEngine(settings, make_llm=MonitoringLLM).start()
    assert knobs.runtime.jit_post_compile_hook is before and knobs.autotuning.print is False


@pytest.mark.parametrize(("tensor", "fits"), [(1, True), (2, False)])
def test_communicators_come_before_the_share(tmp_path: Path, device: SimpleNamespace, tensor: int, fits: bool) -> None:
    """vLLM asks for its share when it has made them: a rank that then lacks it would fail alone."""
    device.free = int(0.3 * device.total) + (1 << 28)
    engine = Colocated(tmp_path, gpu_memory_utilization=0.3, tensor_parallel=tensor).engine
    outcome: Any = nullcontext() if fits else pytest.raises(EngineError, match=r"only 23\.8 GiB are free beside its")
    with outcome:
        engine.check_room()


@pytest.mark.parametrize(
    ("newer", "older", "seen"),
    [
        ("expandable_segments:True", None, "expandable_segments:True"),
        ("expandable_segments:True", "max_split_size_mb:512", "expandable_segments:True"),
        ("max_split_size_mb:512", "expandable_segments:True", "expandable_segments:True"),
        (None, "max_split_size_mb:512, expandable_segments : True", "expandable_segments:True"),
        ("expandable_segments:False", "max_split_size_mb:512", "max_split_size_mb:512"),
    ],
)
def test_vllm_sees_the_settings_that_torchs_allocator_goes_by(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, newer: str | None, older: str | None, seen: str
) -> None:
    """It turns expandable segments off around its pool, and on afterwards, where it sees them under the older name, in
    these very letters; torch passes over blanks, and which name comes first depends on its release."""
    found: list[str | None] = []

    class LookingLLM(RecordingLLM):
        def __init__(self, **arguments: Any) -> None:
            super().__init__(**arguments)
            found.append(os.environ.get("PYTORCH_CUDA_ALLOC_CONF"))

    for name, value in (("PYTORCH_ALLOC_CONF", newer), ("PYTORCH_CUDA_ALLOC_CONF", older)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    folder = make_tiny(tmp_path, layers=2, vocab=ROWS)
    ColocatedEngine(EngineSettings(folder, dtype="float32", max_model_len=64), make_llm=LookingLLM).start()
    assert found == [seen] and os.environ.get("PYTORCH_CUDA_ALLOC_CONF") == older


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_memory_that_has_no_ipc_handle_is_not_shared(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensor-parallel workers of a child are started fresh: forked ones would find no CUDA."""

    def argument(**changes: Any) -> object:
        colocated = Colocated(tmp_path / str(random.random()), world_size=2, **changes)
        colocated.engine.start()
        assert colocated.llm.start_method == "spawn"
        return colocated.llm.arguments.get("disable_custom_all_reduce")

    for variable in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(variable, raising=False)
    assert argument(tensor_parallel=2) is None
    for given in ("max_split_size_mb:512,expandable_segments:True", "expandable_segments: True"):
        monkeypatch.setenv(name, given)
        assert argument(tensor_parallel=2) is True and argument(tensor_parallel=1) is None


def test_a_half_built_engine_leaves_no_memory(tmp_path: Path, device: SimpleNamespace) -> None:
    """Though the exception that tells of it is still held, and its frames hold the model."""
    built: list[weakref.ref[Any]] = []

    class Model:
        pass

    def broken(**arguments: Any) -> Any:
        model = Model()
        model.itself = model
        built.append(weakref.ref(model))
        try:
            raise ValueError("no memory for the cache")
        except ValueError as error:
            raise RuntimeError("engine core") from error

    folder = make_tiny(tmp_path / "model")
    engine = ColocatedEngine(EngineSettings(folder, dtype="float32", max_model_len=32), make_llm=broken)
    with pytest.raises(EngineError, match="engine core") as raised:
        engine.start()
    assert raised.value.__cause__ is not None
    assert built[0]() is None and device.emptied == 1


def test_a_rank_without_memory_stops_all_before_any_starts(tmp_path: Path, device: SimpleNamespace) -> None:
    """vLLM's start has collectives over all ranks: those that have the memory would wait in them."""
    makers = [Colocated(tmp_path / str(rank), gpu_memory_utilization=0.3) for rank in range(3)]
    free = [60 << 30, 20 << 30, 60 << 30]
    own = threading.local()

    def work(ranks: ThreadRanks) -> Any:
        own.rank = ranks.rank
        rollouts = EveryRankRollouts(ranks, lambda: makers[ranks.rank].engine, lambda: iter(()), TOKENS)
        return rollouts.generate([] if ranks.is_leader else None, 0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "mem_get_info", lambda: (free[own.rank], 80 << 30))
        results = on_threads(3, 1, work)
    wanted = r"gpu_memory_utilization=0.3 of the 80.0 GiB of a GPU is the engine's, but only 20.0 GiB are free"
    assert all(isinstance(r, EngineError) and re.search(wanted, str(r)) for r in results), results
    assert not any(maker.made for maker in makers)
