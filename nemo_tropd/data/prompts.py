"""Prompts: read from files and data sets, formatted by the chat template, split and ordered. No torch."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from nemo_tropd.data.conversations import Prompt, PromptKeys, checked, digest
from nemo_tropd.data.sources import PromptError, read_records
from nemo_tropd.data.templates import Template, encode

_TOKENIZE_AT_ONCE = 512


@dataclass(frozen=True)
class PromptSet(Sequence[Prompt]):
    """Prompts in a fixed order."""

    prompts: tuple[Prompt, ...]

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: Any) -> Any:
        return self.prompts[index]

    def fingerprint(self) -> str:
        """A digest of ids, tokens and answers in order: a resumed run must see the same one."""
        found = hashlib.sha256()
        for p in self.prompts:
            found.update(json.dumps([p.id, p.answer, p.token_ids]).encode())
        return found.hexdigest()


@dataclass(frozen=True)
class PromptSplit:
    """Result of :func:`load_prompts`: disjoint sets, and how many prompts were dropped as too long."""

    train: PromptSet
    held_out: PromptSet
    dropped: int


@dataclass
class PromptOrder:
    """The order in which ``n`` prompts are used: one seeded permutation per epoch; a batch may span two.
    ``batch(step, size)`` is a pure function of (n, seed, step, size), so a resumed run sees the same prompts."""

    n: int
    seed: int
    _permutation: Any = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.n < 1:
            raise PromptError(f"cannot order {self.n} prompts: at least one is needed")
        self._permutation = lru_cache(maxsize=2)(self._shuffled)

    def batch(self, step: int, size: int) -> list[int]:
        """The ``size`` prompt indices (0 .. n - 1) of step ``step`` (from 0)."""
        if step < 0 or size < 1:
            raise PromptError(f"no batch at step {step} of size {size}: step must be >= 0 and size >= 1")
        first = step * size
        return [int(self._permutation(i // self.n)[i % self.n]) for i in range(first, first + size)]

    def _shuffled(self, epoch: int) -> np.ndarray:
        # Sorting the raw counter-based stream: unlike numpy's own shuffles, it cannot change with numpy's version.
        key = np.array([self.seed & (2**64 - 1), epoch], dtype=np.uint64)  # a list would pass through float64
        raw = np.random.Philox(key=key).random_raw(self.n)
        return np.argsort(raw, kind="stable")


def load_prompts(
    path: str | Path,
    tokenizer: Any,
    *,
    max_prompt_tokens: int,
    held_out: int = 0,
    overlong: str = "error",
    keys: PromptKeys | None = None,
    split: str = "train",
    template: Template | None = None,
) -> PromptSplit:
    """Read prompts, apply the chat template (default: the tokenizer's own) and split off the held-out ones.

    ``path`` is a .jsonl or .parquet file, a directory written by ``datasets.save_to_disk``, or the name of a data set
    (``owner/name`` or ``owner/name:config``), of which ``split`` is read. A prompt of more than ``max_prompt_tokens``,
    chat template included, is an error, or left out with ``overlong="drop"``. Raises PromptError, which names the line
    of a bad record.
    """
    if overlong not in ("error", "drop"):
        raise PromptError(f"overlong={overlong!r}: must be 'error' or 'drop'")
    template = template or Template()
    if template.text is True and not getattr(tokenizer, "chat_template", None):
        remedy = "set model.data.chat_template to a file, or to false for texts as they are"
        raise PromptError(f"the tokenizer has no chat template: use an instruction-tuned model, or {remedy}")
    records = [checked(raw, where, keys or PromptKeys()) for raw, where in read_records(path, split=split)]
    if not records:
        raise PromptError(f"{path} has no prompts")
    prompts, dropped = [], 0
    for start in range(0, len(records), _TOKENIZE_AT_ONCE):
        part = records[start : start + _TOKENIZE_AT_ONCE]
        for record, ids in zip(part, encode(part, tokenizer, template), strict=True):
            if len(ids) <= max_prompt_tokens:
                prompts.append(replace(record, token_ids=tuple(ids)))
            elif overlong == "error":
                raise PromptError(
                    f"{record.where}: the prompt has {len(ids)} tokens with the chat template, max_prompt_tokens "
                    f"is {max_prompt_tokens}: shorten it, raise the limit, or set overlong to 'drop'"
                )
            else:
                dropped += 1
    if not prompts:
        raise PromptError(f"{path}: all {dropped} prompts are longer than max_prompt_tokens={max_prompt_tokens}")
    train, kept_out = split_held_out(prompts, held_out)
    return PromptSplit(PromptSet(train), PromptSet(kept_out), dropped)


def split_held_out(prompts: Sequence[Prompt], held_out: int) -> tuple[tuple[Prompt, ...], tuple[Prompt, ...]]:
    """Split into (train, in the given order; held out, ordered by hash) by a hash of each conversation's text.

    The choice depends neither on the order of ``prompts`` nor on whitespace. All copies of a held-out text leave the
    training set, and one of them is kept. Raises PromptError if ``held_out`` is negative or leaves nothing to train on.
    """
    if held_out < 0:
        raise PromptError(f"held_out={held_out}: must not be negative")
    by_digest: dict[bytes, list[Prompt]] = {}
    for p in prompts:
        by_digest.setdefault(digest(p.messages), []).append(p)
    chosen = dict.fromkeys(sorted(by_digest)[:held_out])
    if held_out and len(chosen) == len(by_digest):
        raise PromptError(
            f"held_out={held_out} takes all {len(by_digest)} distinct prompts and leaves none for training: lower it"
        )
    train = tuple(p for p in prompts if digest(p.messages) not in chosen)
    return train, tuple(min(by_digest[d], key=lambda p: (p.answer or "", p.id)) for d in chosen)
