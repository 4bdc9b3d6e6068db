"""The distributed optimizer's states in a checkpoint: every rank saves and loads only what it holds.

Megatron's "fully_reshardable" gathers 12 bytes a parameter on a host to save, and reads as much on every rank to load.
The files here have the same keys, shapes and dtypes, so either side loads the other's; only the cuts differ.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from torch import Tensor


@dataclass(frozen=True)
class OptimizerShards:
    """The states of one ``DistributedOptimizer``; ``model_state`` is its model's sharded state dict."""

    part: Any
    model_state: dict[str, Any]

    def pieces(self) -> dict[str, dict[str, list[ShardedTensor]]]:
        """The held part of each parameter, by its number and the state's name: views of the states [n] themselves."""
        found, _ = extract_sharded_tensors_and_factories(self.model_state)
        place = {sharded.data: sharded for sharded in nested_values(found)}
        return {
            str(number): {name: list(_pieces(place[parameter], start, name, state)) for name, state in states.items()}
            for number, (parameter, start, states) in enumerate(self._held())
        }

    def load(self, pieces: dict[str, dict[str, list[Tensor]]]) -> None:
        """Set the states from what a checkpoint filled ``pieces`` with."""
        for number, (parameter, _, states) in enumerate(self._held()):
            loaded = {name: torch.cat([t.flatten() for t in pieces[str(number)][name]]) for name in states}
            kept = self.part._get_main_param_and_optimizer_states(parameter)  # with the count of steps, if it is there
            self.part._set_main_param_and_optimizer_states(parameter, {**kept, **loaded})

    def _held(self) -> Iterator[tuple[Tensor, int, dict[str, Tensor]]]:
        """(model's parameter, first of its numbers here, states [n] by name) of what this data rank updates."""
        for by_dtype in self.part.gbuf_ranges:
            for buckets in by_dtype.values():
                for bucket in buckets:
                    for parameter, ranges in bucket["param_map"].items():
                        states = self.part._get_main_param_and_optimizer_states(parameter)
                        size = ranges["param"].end - ranges["param"].start
                        states = {k: v.detach() for k, v in states.items() if k != "step" and torch.is_tensor(v)}
                        yield parameter, ranges["param"].start, {k: v.view(size) for k, v in states.items()}


def _pieces(
    whole: ShardedTensor | ShardedTensorFactory, start: int, name: str, state: Tensor
) -> Iterator[ShardedTensor]:
    """``state``, the numbers from ``start`` on of the flattened parameter, as rectangles of the parameter."""
    shape_only = torch.empty(whole.data.shape, dtype=state.dtype, device="meta")
    # The last number of a replica counts data-parallel copies; what a rank holds of the states no other does.
    replica = (*whole.replica_id[:-1], 0)
    changes: dict[str, Any] = {"key": f"optimizer.state.{name}.{whole.key}", "data": shape_only, "replica_id": replica}
    if isinstance(whole, ShardedTensorFactory):  # the gate and up projections, one behind the other
        parts = list(nested_values(replace(whole, **changes).build()))
    else:
        parts = [replace(whole, **changes, dtype=state.dtype)]
    first = 0
    for part in parts:
        begin, end = (min(max(at - first, 0), part.data.numel()) for at in (start, start + len(state)))
        yield from _rectangles(part, begin, state[first + begin - start : first + end - start])
        first += part.data.numel()
    if first != shape_only.numel():
        raise ValueError(f"{whole.key}: its parts have {first} numbers, the parameter {shape_only.numel()}")


def _rectangles(part: ShardedTensor, begin: int, numbers: Tensor) -> Iterator[ShardedTensor]:
    """``numbers`` from position ``begin`` of ``part`` on: an incomplete row, complete ones, an incomplete row."""
    if len(part.local_shape) > 2:
        raise ValueError(f"{part.key} has shape {tuple(part.local_shape)}; only vectors and matrices are known here")
    front, one = part.prepend_axis_num, len(part.local_shape) == 1
    columns, done = 1 if one else part.local_shape[1], 0
    while done < len(numbers):
        row, column = divmod(begin + done, columns)
        left = len(numbers) - done
        rows, width = (1, min(columns - column, left)) if column or left < columns else (left // columns, columns)
        shape, at = ((rows,), (row,)) if one else ((rows, width), (row, column))
        offsets = (o + a for o, a in zip(part.global_offset, (0,) * front + at, strict=True))
        shape = (1,) * front + shape
        yield replace(
            part,
            data=numbers[done : done + rows * width].view(shape),
            local_shape=shape,
            global_offset=tuple(offsets),
            axis_fragmentations=None,  # no grid: Megatron then leaves the check of the cuts to torch
            prepend_axis_num=0,
        )
        done += rows * width
