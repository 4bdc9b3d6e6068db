"""Which prompts are held out: chosen by their text, with all its copies. No torch."""

from collections.abc import Sequence

from nemo_tropd.data.conversations import Prompt, digest
from nemo_tropd.data.sources import PromptError


def split_held_out(prompts: Sequence[Prompt], held_out: int) -> tuple[tuple[Prompt, ...], tuple[Prompt, ...]]:
    """Split into (train, in the given order; held out, ordered by hash) by a hash of each conversation's text.

    The choice depends neither on the order of ``prompts`` nor on whitespace. All copies of a held-out text leave the
    training set, and one of them is kept, with an answer if any has one. Raises PromptError if ``held_out`` is
    negative or leaves nothing to train on.
    """
    (train,), kept, _ = split_sources([prompts], [""], [held_out])
    return train, kept


def split_sources(
    sources: Sequence[Sequence[Prompt]], names: Sequence[str], held_out: Sequence[int]
) -> tuple[list[tuple[Prompt, ...]], tuple[Prompt, ...], list[str]]:
    """:func:`split_held_out` of several sources; a held-out text of one leaves the training prompts of all. And lines
    on the copies."""
    digests = [[digest(p.messages, p.tools) for p in prompts] for prompts in sources]
    chosen: dict[bytes, list[Prompt]] = {}
    for name, prompts, own, count in zip(names, sources, digests, held_out, strict=True):
        if count < 0:
            raise PromptError(f"held_out={count}: must not be negative")
        left = set(own) - chosen.keys()
        if count and len(left) <= count:
            raise PromptError(
                f"{name}{': ' if name else ''}held_out={count} takes all {len(left)} distinct prompts and leaves none "
                "for training: lower it"
            )
        mine: dict[bytes, list[Prompt]] = {d: [] for d in sorted(left)[:count]}
        for p, d in zip(prompts, own, strict=True):
            if d in mine:
                mine[d].append(p)
        chosen.update(mine)
    train = [
        tuple(p for p, d in zip(prompts, own, strict=True) if d not in chosen)
        for prompts, own in zip(sources, digests, strict=True)
    ]
    if empty := [name for name, part in zip(names, train, strict=True) if not part and any(sources)]:
        raise PromptError(f"{empty[0]}: all its prompts are held out of other sources: leave it out")
    kept = tuple(min(copies, key=_order) for copies in chosen.values())
    return train, kept, _lines(list(chosen.values()), len(kept) + sum(map(len, train)), sum(map(len, sources)))


def _order(copy: Prompt) -> tuple[bool, str, str]:
    """Which of several copies is kept: the first by this. One with an answer before one without."""
    return copy.answer is None, str(copy.answer), copy.id


def _lines(held: Sequence[Sequence[Prompt]], used: int, every: int) -> list[str]:
    """For the plan: what became of copies."""
    lines = [f"{every - used} prompts left out of training: copies of held-out ones"] if every > used else []
    if other := [copies for copies in held if len({p.answer for p in copies} - {None}) > 1]:
        used_here = min(other[0], key=_order)
        what = f"{len(other)} held-out prompts have copies with other answers, of which one is used"
        lines.append(f"{what}; first {used_here.where}, {used_here.answer!r}")
    return lines
