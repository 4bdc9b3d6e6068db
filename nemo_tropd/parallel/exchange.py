"""Parts that some ranks made, to the ranks that need them."""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


def to_owners(
    parts: dict[int, Tensor],
    makers: Mapping[int, int],
    owners: Mapping[int, int],
    rows: Mapping[int, int],
    empty: Tensor,
    group: ProcessGroup,
) -> dict[int, Tensor]:
    """This rank's parts, by number, whoever made them; one all-to-all (collective over ``group``).

    ``parts`` are those that this rank made, and is emptied. ``makers``, ``owners`` and ``rows``, the same on every
    rank, have of each part the rank in the group that made it, the one that needs it, and its length; ``empty`` has no
    rows, and the columns, dtype and device of all.
    """
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    if size == 1:
        own = dict(parts)
        parts.clear()
        return own
    # Sent in the order of receivers, received in the order of senders; among those of one rank by number.
    sent = sorted((i for i in owners if makers[i] == rank), key=lambda i: (owners[i], i))
    received = sorted((i for i in owners if owners[i] == rank), key=lambda i: (makers[i], i))
    outgoing = torch.cat([empty, *(parts[i] for i in sent)])
    parts.clear()
    incoming = empty.new_empty((sum(rows[i] for i in received), *empty.shape[1:]))

    def splits(numbers: list[int], of: Mapping[int, int]) -> list[int]:
        return [sum(rows[i] for i in numbers if of[i] == r) for r in range(size)]

    dist.all_to_all_single(incoming, outgoing, splits(received, makers), splits(sent, owners), group=group)
    return dict(zip(received, incoming.split([rows[i] for i in received]), strict=True))
