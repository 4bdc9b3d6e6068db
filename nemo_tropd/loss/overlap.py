"""Overlaps the matrix products of one chunk with the reductions of its neighbours (CUDA streams)."""

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

P = TypeVar("P")
R = TypeVar("R")

_side_streams: dict[torch.device, torch.cuda.Stream] = {}


def run_chunks(
    chunks: Sequence[slice],
    product: Callable[[slice, int], P],
    reduce: Callable[[slice, P], R],
    back: Callable[[slice, R], None],
    *,
    slots: int,
    device: torch.device,
) -> None:
    """For every chunk ``back(chunk, reduce(chunk, product(chunk, slot)))``.

    With two slots on a GPU, ``reduce``, bound by memory, runs on a stream of its own beside the neighbouring chunks'
    ``product`` and ``back``, which are bound by arithmetic. Tensors that ``reduce`` makes may be used on the caller's
    stream once this returns (see ``read_by_caller``). A collective in ``reduce`` is called in one order on every rank.
    """
    if slots < 2 or device.type != "cuda" or len(chunks) < 2:
        for chunk in chunks:
            back(chunk, reduce(chunk, product(chunk, 0)))
        return
    main = torch.cuda.current_stream(device)
    if device not in _side_streams:  # each is the next of torch's pool of 32, which others draw from, too
        _side_streams[device] = torch.cuda.Stream(device)
    side = _side_streams[device]
    # The side stream's memory may still be read on the main stream, and the main stream's be of earlier side work.
    side.wait_stream(main)
    logits = product(chunks[0], 0)
    ready = main.record_event()
    for i, chunk in enumerate(chunks):
        current, current_ready = logits, ready
        if i + 1 < len(chunks):
            logits = product(chunks[i + 1], (i + 1) % slots)
            ready = main.record_event()
        with torch.cuda.stream(side):
            side.wait_event(current_ready)
            reduced = reduce(chunk, current)
            done = side.record_event()
        main.wait_event(done)
        back(chunk, reduced)


def read_by_caller(made: Iterable[Tensor], device: torch.device) -> None:
    """The caller's stream reads what ``reduce`` made. Else torch would give its memory back to the driver (where memory
    is short, and segments expandable) as soon as the stream that it was made on is done."""
    if device.type == "cuda":
        for tensor in made:
            tensor.record_stream(torch.cuda.current_stream(device))
