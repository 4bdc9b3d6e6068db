"""What megatron-core hard-codes for CUDA, replaced if there is no CUDA.

Each function below is one shim; its docstring names the place that needs it (megatron-core 0.16.1 unless said
otherwise).
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_installed: list[str] = []


def enable_cpu_megatron() -> None:
    """Make megatron-core run on CPU and gloo; on a machine with CUDA only repair a defect. Call it before building a
    model, outside any other torch function mode, in the thread that trains."""
    repair_reduce()
    if _installed or torch.cuda.is_available():
        return
    for shim in CPU_SHIMS:
        shim()
        _installed.append(shim.__name__)


def fast_bf16() -> bool:
    """Whether this CPU multiplies bf16 matrices by oneDNN; the loop that torch has else is a hundred times slower."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


class _CudaLiteralToCpu(TorchFunctionMode):
    """Reads ``device="cuda"`` (any spelling) as the CPU in every torch call."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: dict | None = None
    ) -> Any:
        if kwargs and _names_cuda(kwargs.get("device")):
            kwargs = {**kwargs, "device": torch.device("cpu")}
        return func(*args, **(kwargs or {}))


def _names_cuda(device: object) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.startswith("cuda")


_cuda_literal: _CudaLiteralToCpu | None = None


def accept_cuda_literal() -> None:
    """schedules.py:596, clip_grads.py, optimizer.py, transformer/utils.py:35 write ``device="cuda"``."""
    global _cuda_literal
    _cuda_literal = _CudaLiteralToCpu()
    _cuda_literal.__enter__()


def synchronize_is_a_no_op() -> None:
    """filesystem_async.py:230, p2p_communication.py:398, parallel_state.py:198."""
    torch.cuda.synchronize = lambda *args, **kwargs: None


def current_device_is_the_cpu() -> None:
    """state_dict_saver.py:252, tensor_parallel/mappings.py, p2p_communication.py:313, rotary_pos_embedding.py:162."""
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment, return-value]


def move_to_cuda_returns_self() -> None:
    """language_module.py:244, optimizer.py:375, distrib_optimizer.py:1089."""
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]


def rng_tracker_on_the_cpu_generator() -> None:
    """tensor_parallel/random.py:235: the tracker saves and restores the CUDA generator's state."""
    import megatron.core.tensor_parallel.random as tracker

    def get_state(*args: Any, **kwargs: Any) -> Tensor:
        return torch.get_rng_state()

    def set_state(new_state: Tensor, *args: Any, **kwargs: Any) -> None:
        torch.set_rng_state(new_state)

    tracker._get_cuda_rng_state = get_state
    tracker._set_cuda_rng_state = set_state
    torch.cuda.get_rng_state = get_state
    torch.cuda.set_rng_state = set_state
    torch.cuda.manual_seed = torch.manual_seed  # type: ignore[assignment]


def type_names_for_megatron() -> None:
    """clip_grads.py:167, optimizer.py:671 and distrib_optimizer.py:361 compare ``Tensor.type()`` with torch.cuda.*.
    Only a caller inside megatron sees the other name."""
    original = torch.Tensor.type

    def type_(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = original(self, *args, **kwargs)
        if isinstance(answer, str) and sys._getframe(1).f_globals.get("__name__", "").startswith("megatron."):
            return answer.replace("torch.", "torch.cuda.", 1)
        return answer

    torch.Tensor.type = type_  # type: ignore[method-assign, assignment]


class _Stream:
    """A CUDA stream's methods for a device on which every operation is complete when its call returns."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def synchronize(self, *args: object) -> None: ...

    wait_stream = wait_event = synchronize

    def record_event(self, event: _Event | None = None) -> _Event:
        return event or _Event()


class _Event:
    """A CUDA event that has always happened."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def synchronize(self, *args: object) -> None: ...

    record = wait = synchronize

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: object) -> float:
        return 0.0


def streams_are_synchronous() -> None:
    """param_and_grad_buffer.py:632 of megatron-core 0.19."""
    torch.cuda.Stream = _Stream  # type: ignore[assignment, misc]
    torch.cuda.Event = _Event  # type: ignore[assignment, misc]
    torch.cuda.current_stream = lambda *args, **kwargs: _Stream()  # type: ignore[assignment]
    torch.cuda.stream = lambda stream: contextlib.nullcontext()  # type: ignore[assignment, return-value]


def groups_share_a_device() -> None:
    """distributed_c10d.py:2169 (torch 2.13) gives every gloo group a device of its own, whose thread looks for work a
    hundred times a second: over thirty threads a rank, with Megatron's groups."""
    import torch.distributed.distributed_c10d as c10d

    gloo = c10d.ProcessGroupGloo
    devices: dict[tuple[int, str], list[Any]] = {}  # of a process, which may be a fork, and the interfaces asked for

    class Shared(type):
        def __call__(cls, store: Any, rank: int, size: int, timeout: timedelta) -> Any:
            interfaces = os.environ.get("GLOO_SOCKET_IFNAME", "")
            key = os.getpid(), interfaces
            if key not in devices:
                named = [gloo.create_device(interface=name) for name in interfaces.split(",") if name]
                devices[key] = named or [gloo.create_default_device()]
            options = gloo._Options()  # type: ignore[attr-defined]
            options._timeout, options._devices = timeout, devices[key]
            options._threads = 2 * len(devices[key])  # as torch has it
            return gloo(store, rank, size, options)

        def __instancecheck__(cls, instance: object) -> bool:
            return isinstance(instance, gloo)

    class ProcessGroupGloo(metaclass=Shared):
        """Stands for gloo's, of which its instances are."""

    c10d.ProcessGroupGloo = ProcessGroupGloo  # type: ignore[assignment, misc]


CPU_SHIMS: tuple[Callable[[], None], ...] = (
    synchronize_is_a_no_op,
    current_device_is_the_cpu,
    accept_cuda_literal,
    rng_tracker_on_the_cpu_generator,
    move_to_cuda_returns_self,
    type_names_for_megatron,
    streams_are_synchronous,
    groups_share_a_device,
)


def repair_reduce() -> None:
    """tensor_parallel/mappings.py:31 all-reduces ``input.contiguous()`` and returns ``input``: for an input that is
    not contiguous the sum is dropped, which gives the right loss and wrong gradients. Later releases return the copy.
    """
    import megatron.core
    import megatron.core.tensor_parallel.mappings as mappings

    if tuple(int(part) for part in megatron.core.__version__.split(".")[:2]) >= (0, 19) or "repair_reduce" in _repairs:
        return

    def reduce(input_: Tensor, group: torch.distributed.ProcessGroup) -> Tensor:
        if group.size() == 1:
            return input_
        summed = input_.contiguous()
        torch.distributed.all_reduce(summed, group=group)
        return summed

    mappings._reduce = reduce
    _repairs.add("repair_reduce")


_repairs: set[str] = set()
