"""Keeps a frozen model's weights in host memory while it is idle."""

from collections.abc import Iterator
from itertools import accumulate

import torch
from torch import Tensor

from nemo_tropd.pinned import pin

ALIGNMENT = 256  # bytes, of each weight in the host's buffer


class WeightHome:
    """Moves the bytes of a frozen model's weights to host memory and back; tensors keep their identity and views.

    The host's copy is made once and kept, pinned if there is a GPU: leaving the device then costs nothing, and coming
    back one copy. Who writes to the model's parameters or buffers calls ``renew``.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model
        self._host: list[tuple[torch.UntypedStorage, Tensor]] = []
        self.away = False

    def leave(self) -> None:
        """Free the device's bytes. The model must not run until ``come_back``. Does nothing if already away."""
        if self.away:
            return
        if not self._host:
            self._host = self._copied()
        for storage, _ in self._host:
            storage.resize_(0)
        for module in self._model.modules():  # Transformer Engine's casts of weights that are not kept in FP8
            getattr(module, "_fp8_workspaces", {}).clear()  # the next pass makes them again
        self.away = True
        if any(storage.device.type == "cuda" for storage, _ in self._host):
            torch.cuda.empty_cache()  # an engine in this process takes its memory from the driver, not from torch

    def renew(self) -> None:
        """Make what is on the device, if its bytes have changed, the copy on the host."""
        for storage, copy in self._host:
            copy.copy_(_bytes(storage))

    def come_back(self) -> None:
        """Bring the bytes back. Does nothing if they are on the device."""
        if not self.away:
            return
        for storage, copy in self._host:
            storage.resize_(copy.numel())
            _bytes(storage).copy_(copy, non_blocking=True)  # in stream order: what runs next sees all of it
        self.away = False

    def _copied(self) -> list[tuple[torch.UntypedStorage, Tensor]]:
        found = list(storages(self._model))
        starts = list(accumulate((-(-s.nbytes() // ALIGNMENT) * ALIGNMENT for s in found), initial=0))
        buffer = torch.empty(starts[-1], dtype=torch.uint8)
        if any(storage.device.type == "cuda" for storage in found):
            pin(buffer, self)
        copies = [buffer[at : at + s.nbytes()] for at, s in zip(starts, found, strict=False)]
        for storage, copy in zip(found, copies, strict=True):
            copy.copy_(_bytes(storage))
        return list(zip(found, copies, strict=True))


class Checksums:
    """Sums over the bytes of a frozen model's weights, made on their device: one read of the weights a check."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model
        self._storages: list[torch.UntypedStorage] = []
        self._wanted: list[Tensor] = []

    def check(self) -> None:
        """RuntimeError naming a weight whose bytes have changed since the first call."""
        self._storages = self._storages or list(storages(self._model))
        sums = [_sum(storage) for storage in self._storages]
        self._wanted = self._wanted or sums
        if not sums or not bool((torch.stack(sums) != torch.stack(self._wanted)).any()):
            return
        changed = {s._cdata for s, a, b in zip(self._storages, sums, self._wanted, strict=True) if int(a) != int(b)}
        named = (*self._model.named_parameters(), *self._model.named_buffers())
        names = [n for n, t in named if any(part.untyped_storage()._cdata in changed for part in parts(t))]
        raise RuntimeError(
            f"the frozen weights {', '.join(names[:3])} ({len(names)} in all) are not the bytes that were loaded: "
            "memory was overwritten or damaged. Rerun the command to load them again; if it recurs, set "
            "model.teacher.offload=false and test the machine's memory"
        )


def storages(model: torch.nn.Module) -> Iterator[torch.UntypedStorage]:
    """The storages behind parameters and buffers, each once, those of no bytes left out."""
    seen: set[int] = set()
    for tensor in (*model.parameters(), *model.buffers()):
        for part in parts(tensor):
            storage = part.untyped_storage()
            if storage.nbytes() and storage._cdata not in seen:
                seen.add(storage._cdata)
                yield storage


def parts(tensor: Tensor) -> list[Tensor]:
    """The plain tensors a tensor is made of: itself, or a quantized tensor's data and scales.
    Transformer Engine's quantized tensors name them in ``get_metadata`` (2.20.2, pytorch/tensor/storage)."""
    metadata = getattr(tensor, "get_metadata", None)
    if metadata is None:
        return [tensor.detach()]
    return [part for part in metadata().values() if isinstance(part, Tensor)]


def _sum(storage: torch.UntypedStorage) -> Tensor:
    """The sum of the storage's 64-bit words, modulo 2^64, and of the bytes behind them: in any order the same."""
    raw = _bytes(storage)
    words = raw.numel() // 8 * 8
    return raw[:words].view(torch.int64).sum() + raw[words:].sum()


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
