"""Prompts: read from files and data sets, formatted by the chat template, split and ordered. No torch."""

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, lru_cache, partial
from itertools import accumulate, chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nemo_tropd.config_teacher import DEFAULT_TEACHER
from nemo_tropd.data.conversations import Prompt, PromptKeys, Tally, checked, has, unread
from nemo_tropd.data.held_out import split_sources
from nemo_tropd.data.sources import PromptError, Records, open_records
from nemo_tropd.data.templates import Template, encode

_TOKENIZE_AT_ONCE = 512
_NAMED = 8  # fields in a line of the plan
_MIXTURE = 2  # word 3 of the Philox counter, where one source alone has 0


@dataclass(frozen=True)
class Source:
    """Where prompts come from. ``weight``: see :class:`MixedOrder`."""

    path: str | Path
    weight: float = 1.0
    keys: PromptKeys = field(default_factory=PromptKeys)
    split: str = "train"
    teacher: str | None = None  # of all its prompts; None: by a key

    def __post_init__(self) -> None:
        if not 0 < self.weight < math.inf:
            raise PromptError(f"{self.path}: its weight is {self.weight}: give a number above 0")


class Share(NamedTuple):
    """One source's part of a set of prompts."""

    prompts: int
    weight: float


@dataclass(frozen=True)
class PromptSet(Sequence[Prompt]):
    """Prompts in a fixed order, source by source if there are several."""

    prompts: tuple[Prompt, ...]
    shares: tuple[Share, ...] = ()  # of several sources

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: Any) -> Any:
        return self.prompts[index]

    def fingerprint(self) -> str:
        """A digest of ids, tokens, answers and teachers in order, and of weights: a resumed run must see the same."""
        found = hashlib.sha256()
        for p in self.prompts:
            found.update(json.dumps([p.id, p.answer, p.token_ids]).encode())
            if p.told_ids or p.teacher != DEFAULT_TEACHER:
                found.update(json.dumps([p.teacher, p.told_ids]).encode())
        if self.shares:
            found.update(json.dumps(self.shares).encode())
        return found.hexdigest()

    @cached_property
    def teachers(self) -> tuple[str, ...]:
        """The names of the prompts' teachers, in an order that depends on nothing else."""
        return tuple(sorted({p.teacher for p in self.prompts}))

    @cached_property
    def sources(self) -> tuple[str, ...]:
        """The names of the prompts' sources, if there are several."""
        return tuple(dict.fromkeys(p.source for p in self.prompts if p.source))

    @cached_property
    def every_group(self) -> tuple[str, ...]:
        """What :meth:`groups` may give."""
        return tuple(dict.fromkeys(group for i in range(len(self)) for group in self.groups(i)))

    def groups(self, index: int) -> tuple[str, ...]:
        """Under which the metrics of a prompt are kept apart: its source and its teacher, where there are several."""
        if not self.prompts:
            return ()
        p, several = self.prompts[index], len(self.teachers) > 1
        return (*([f"source/{p.source}"] if p.source else []), *([f"teacher/{p.teacher}"] if several else []))

    def order(self, seed: int) -> "PromptOrder | MixedOrder":
        """The order in which a run with this seed uses the prompts."""
        return MixedOrder(self.shares, seed) if self.shares else PromptOrder(len(self), seed)


@dataclass(frozen=True)
class PromptSplit:
    """Result of :func:`load_prompts`: disjoint sets, how many prompts were dropped as too long, and what the plan says
    of the data (label, line)."""

    train: PromptSet
    held_out: PromptSet
    dropped: int
    notes: tuple[tuple[str, str], ...] = ()

    @property
    def teachers(self) -> tuple[str, ...]:
        """The names of the teachers that any prompt has."""
        return tuple(sorted({*self.train.teachers, *self.held_out.teachers}))


@dataclass
class PromptOrder:
    """The order in which ``n`` prompts are used: one seeded permutation per epoch; a batch may span two.
    ``batch(step, size)`` is a pure function of (n, seed, stream, step, size), so a resumed run sees the same prompts.
    ``stream``: words 2 and 3 of the counter."""

    n: int
    seed: int
    stream: tuple[int, int] = (0, 0)
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
        raw = np.random.Philox(key=key, counter=np.array([0, 0, *self.stream], dtype=np.uint64)).random_raw(self.n)
        return np.argsort(raw, kind="stable")


@dataclass
class MixedOrder:
    """The order of prompts of several sources. Of each epoch of as many places as there are prompts, source k has the
    share weight_k / sum of weights, in whole places; which ones is a seeded permutation of each epoch. A source fills
    its places by an order of its own, from which it goes on in the next epoch: a small source of large weight comes
    again within one, a large one of small weight takes several. ``batch`` is a pure function, as PromptOrder's."""

    shares: Sequence[Share]
    seed: int
    _sources: Any = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self.places = apportioned(sum(s.prompts for s in self.shares), [s.weight for s in self.shares])
        self.starts = list(accumulate((s.prompts for s in self.shares), initial=0))
        self.mixture = PromptOrder(self.starts[-1], self.seed, (len(self.shares), _MIXTURE))
        self.orders = [PromptOrder(s.prompts, self.seed, (k, _MIXTURE)) for k, s in enumerate(self.shares)]
        self._sources = lru_cache(maxsize=2)(self._mixed)

    def batch(self, step: int, size: int) -> list[int]:
        """The ``size`` prompt indices of step ``step`` (from 0)."""
        if step < 0 or size < 1:
            raise PromptError(f"no batch at step {step} of size {size}: step must be >= 0 and size >= 1")
        found = []
        for place in range(step * size, (step + 1) * size):
            epoch, within = divmod(place, self.starts[-1])
            source, nth = (int(of[within]) for of in self._sources(epoch))
            nth += epoch * self.places[source]
            found.append(self.starts[source] + self.orders[source].batch(nth, 1)[0])
        return found

    def _mixed(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """For each place of an epoch its source, and how many earlier places of the epoch the source has."""
        sources = np.repeat(np.arange(len(self.shares)), self.places)[self.mixture._shuffled(epoch)]
        nth = np.empty_like(sources)
        for source, places in enumerate(self.places):
            nth[sources == source] = np.arange(places)
        return sources, nth


def apportioned(total: int, weights: Sequence[float]) -> list[int]:
    """``total`` in whole parts in proportion to ``weights``, by largest remainder (of equal ones the first)."""
    exact = [total * w / sum(weights) for w in weights]
    parts = [int(e) for e in exact]
    by_remainder = sorted(range(len(parts)), key=lambda k: (parts[k] - exact[k], k))
    for k in by_remainder[: total - sum(parts)]:
        parts[k] += 1
    return parts


def load_prompts(
    path: str | Path | Sequence[Source],
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

    ``path`` is what ``open_records`` reads, with ``keys`` and of ``split``; or several sources that have their own. The
    held-out prompts are then taken from each in proportion to its weight. A prompt of more than ``max_prompt_tokens``,
    chat template included, is an error, or left out with ``overlong="drop"``; a record without anything to respond to
    is left out. Raises PromptError, which names the line of a bad record.
    """
    if overlong not in ("error", "drop"):
        raise PromptError(f"overlong={overlong!r}: must be 'error' or 'drop'")
    form = template or Template()
    if form.text is True and not getattr(tokenizer, "chat_template", None):
        remedy = "set model.data.chat_template to a file, or to false for texts as they are"
        raise PromptError(f"the tokenizer has no chat template: use an instruction-tuned model, or {remedy}")
    sources = [Source(path, 1.0, keys or PromptKeys(), split)] if isinstance(path, str | Path) else list(path)
    one = len(sources) == 1
    loaded, notes, dropped = [], [], 0
    missed, names, there = _set_keys(sources), _names([str(source.path) for source in sources]), dict[str, None]()
    for source, name in zip(sources, names, strict=True):
        records, files = open_records(source.path, split=source.split)
        tally, of = Tally(), "" if one else f"{source.path}: "
        prompts = _loaded(
            _watched(records, tally, missed),
            source,
            partial(encode, tokenizer=tokenizer, template=form, tally=tally),
            max_prompt_tokens,
            overlong,
            tally,
        )
        prompts = [replace(p, teacher=source.teacher or p.teacher, source=name) for p in prompts]
        loaded.append(prompts)
        there |= tally.keys_of_records
        dropped += tally.get("overlong", (0, ""))[0]
        lines = [*([files] if files else []), *_lines(tally, max_prompt_tokens, source.keys)]
        notes += [("data", of + line) for line in lines]
    for key, name in missed.items():
        where = ", ".join(str(s.path) for s in sources)
        raise PromptError(f"{where}: no record has {key!r}, which {name} names; their keys are {', '.join(there)}")
    weights = [source.weight for source in sources]
    train, kept_out, lines = split_sources(loaded, [str(s.path) for s in sources], apportioned(held_out, weights))
    shares = tuple(Share(len(part), weight) for part, weight in zip(train, weights, strict=True))
    notes += _share_lines(sources, shares, apportioned(held_out, weights))
    notes += [("data", line) for line in lines]
    every = tuple(chain.from_iterable(train))
    notes += _teacher_lines(every, kept_out)
    return PromptSplit(PromptSet(every, shares if len(shares) > 1 else ()), PromptSet(kept_out), dropped, tuple(notes))


def _set_keys(sources: Sequence[Source]) -> dict[str, str]:
    """Keys of records that were set, and where; of several sources one that has it is enough: they share defaults."""
    named = [(getattr(source.keys, f.name), f) for source in sources for f in fields(PromptKeys)]
    return {key: f"model.data.{f.name}_key" for key, f in named if key != f.default}


def _share_lines(sources: Sequence[Source], shares: Sequence[Share], held_out: Sequence[int]) -> list[tuple[str, str]]:
    """What each of several sources contributes."""
    lines, places = [], apportioned(sum(s.prompts for s in shares), [s.weight for s in shares])
    for source, share, held, n in zip(sources, shares, held_out, places, strict=True):
        if n == 0:
            why = f"of an epoch's {sum(places)} prompts none would be from it; raise its weight"
            raise PromptError(f"{source.path}: its weight {source.weight:g} is too small: {why}")
        part = f"{share.prompts} to train, {held} held out, {n / sum(places):.1%} of each epoch"
        lines.append(("data", f"{source.path}: {part}"))
    return lines if len(sources) > 1 else []


def _names(paths: Sequence[str]) -> list[str]:
    """What several sources are called in metrics: the last part of each path, numbered if that is not enough."""
    if len(paths) == 1:
        return [""]
    short = [re.sub(r"[^\w.-]+", "_", path.rstrip("/").rpartition("/")[2]) or "source" for path in paths]
    names: list[str] = []
    for i, name in enumerate(short, start=1):
        own = name if short.count(name) == 1 else f"{name}-{i}"
        while own in names or (own != name and own in short):
            own += "_"
        names.append(own)
    return names


def _teacher_lines(train: Sequence[Prompt], held_out: Sequence[Prompt]) -> list[tuple[str, str]]:
    """Lines of the plan: which prompts have which teacher, and how many teachers read something else."""
    lines, several = [], Counter(p.teacher for p in train)
    if several.keys() - {DEFAULT_TEACHER}:
        shares = ", ".join(f"{name} {count} to train" for name, count in sorted(several.items()))
        lines.append(f"by teacher: {shares}")
    if told := sum(bool(p.told_ids) for p in (*train, *held_out)):
        lines.append(f"of {told} of {len(train) + len(held_out)} prompts the teacher reads something else")
    return [("data", line) for line in lines]


def _watched(records: Records, tally: Tally, missed: dict[str, str]) -> Records:
    """``records``, whose keys are noted in ``tally``; those of ``missed`` that one has are taken out."""
    for raw, where in records:
        tally.keys_of_records.update(dict.fromkeys(map(str, raw)))
        for key in [key for key in missed if has(raw, key)]:
            del missed[key]
        yield raw, where


def _loaded(
    records: Records,
    source: Source,
    encoded: Callable[[Sequence[Prompt]], list[list[int]]],
    longest: int,
    overlong: str,
    tally: Tally,
) -> list[Prompt]:
    """The prompts of one source, of at most ``longest`` tokens. ``tally`` counts records ("read") and what was done."""
    prompts: list[Prompt] = []
    same: dict[int, int] = {}  # one object for each token id: a prompt then takes 8 bytes a token, not 36
    while part := list(islice(records, _TOKENIZE_AT_ONCE)):
        usable = [p for raw, where in part if (p := checked(raw, where, source.keys, tally)) is not None]
        tally["read"] = (tally.get("read", (0, ""))[0] + len(part), part[0][1])
        told = iter(encoded([p.as_told() for p in usable if p.told]) if any(p.told for p in usable) else ())
        for prompt, ids in zip(usable, encoded(usable) if usable else (), strict=True):
            others = next(told) if prompt.told else []
            if max(len(ids), len(others)) <= longest:
                mine, theirs = (tuple(same.setdefault(i, i) for i in part) for part in (ids, others))
                prompts.append(replace(prompt, token_ids=mine, told_ids=theirs))
            elif overlong == "error":
                what = "prompt" if len(ids) > longest else "teacher's prompt"
                raise PromptError(
                    f"{prompt.where}: the {what} has {max(len(ids), len(others))} tokens with the chat template, "
                    f"max_prompt_tokens "
                    f"is {longest}: shorten it, raise the limit, or set overlong to 'drop'"
                )
            else:
                tally.add("overlong", prompt.where)
    if not tally:
        raise PromptError(f"{source.path} has no prompts")
    if not prompts and "overlong" not in tally:
        keys = f"{source.keys.prompt!r} and {source.keys.messages!r}"
        raise PromptError(f"{source.path}: all {tally['read'][0]} records are empty: {keys} hold nothing to respond to")
    if not prompts:
        raise PromptError(
            f"{source.path}: all {tally['overlong'][0]} prompts are longer than max_prompt_tokens={longest}"
        )
    return prompts


def _lines(tally: Tally, longest: int, keys: PromptKeys) -> list[str]:
    """What was left out of a source's records, a line each."""
    texts = {
        "overlong": f"prompts dropped: longer than {longest} tokens",
        "empty": "records skipped: nothing to respond to",
        "answered": "conversations end with the assistant: that answer is left out",
        "foreign": "prompts have other roles than user, assistant, system and tool: the template must know them",
        "structured": "known answers are objects, which cannot be judged: name a part of it in model.data.answer_key",
        "unsaid": "prompts have turns that the chat template leaves out",
    }
    found = [(*tally[name], text) for name, text in texts.items() if name in tally]
    lines = [f"{count} of {tally['read'][0]} {text} (first: {where})" for count, where, text in found]
    others = unread(keys, tally)
    more = f" and {len(others) - _NAMED} more" if len(others) > _NAMED else ""
    return [*lines, f"not read of the records: {', '.join(others[:_NAMED])}{more}"] if others else lines
