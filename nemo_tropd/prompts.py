"""Prompts: read from JSONL, Parquet or a Hugging Face data set, formatted by the chat template, split and ordered.

A record has ``prompt`` (a string, or a list of chat messages) or ``messages`` (a list of ``{"role", "content"}``), and
may have ``answer`` and ``id``. All keys but ``id`` can be renamed, and dotted for nested records. No torch.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

_TOKENIZE_AT_ONCE = 512
_FILE_KINDS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".parquet": "parquet"}


class PromptError(ValueError):
    """Unusable prompts: names the file, the line or row, and what to change."""


@dataclass(frozen=True)
class PromptKeys:
    """Keys of a record's fields. If a record has both, the prompt wins over the messages."""

    prompt: str = "prompt"
    messages: str = "messages"
    answer: str = "answer"


@dataclass(frozen=True)
class Prompt:
    """One prompt, ready for the model."""

    id: str
    text: str  # the last user turn, for display
    messages: tuple[Mapping[str, str], ...]
    answer: str | None
    token_ids: tuple[int, ...]  # the complete chat prompt, with the opening of the assistant's turn
    where: str  # the file and line, or row, that it came from


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
        digest = hashlib.sha256()
        for p in self.prompts:
            digest.update(json.dumps([p.id, p.answer, p.token_ids]).encode())
        return digest.hexdigest()


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
) -> PromptSplit:
    """Read prompts, apply the chat template and split off the held-out ones.

    ``path`` is a .jsonl or .parquet file, a directory written by ``datasets.save_to_disk``, or the name of a data set
    (``owner/name`` or ``owner/name:config``), of which ``split`` is read. A prompt of more than ``max_prompt_tokens``,
    chat template included, is an error, or left out with ``overlong="drop"``. Raises PromptError, which names the line
    of a bad record.
    """
    if overlong not in ("error", "drop"):
        raise PromptError(f"overlong={overlong!r}: must be 'error' or 'drop'")
    if not getattr(tokenizer, "chat_template", None):
        raise PromptError("the tokenizer has no chat template: use an instruction-tuned model")
    records = [_checked(raw, where, keys or PromptKeys()) for raw, where in read_records(path, split=split)]
    if not records:
        raise PromptError(f"{path} has no prompts")
    prompts, dropped = [], 0
    for start in range(0, len(records), _TOKENIZE_AT_ONCE):
        part = records[start : start + _TOKENIZE_AT_ONCE]
        for record, ids in zip(part, _encode(part, tokenizer), strict=True):
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
        by_digest.setdefault(_digest(p.messages), []).append(p)
    chosen = dict.fromkeys(sorted(by_digest)[:held_out])
    if held_out and len(chosen) == len(by_digest):
        raise PromptError(
            f"held_out={held_out} takes all {len(by_digest)} distinct prompts and leaves none for training: lower it"
        )
    train = tuple(p for p in prompts if _digest(p.messages) not in chosen)
    return train, tuple(min(by_digest[d], key=lambda p: (p.answer or "", p.id)) for d in chosen)


def read_records(path: str | Path, *, split: str = "train") -> Iterator[tuple[dict[str, Any], str]]:
    """Raw records of a file or data set, each with its origin (file and line, or row). Raises PromptError."""
    given, local = str(path), Path(path).expanduser()
    if local.is_dir():
        return _read_saved_dataset(local, split)
    kind = _FILE_KINDS.get(local.suffix.lower())
    if local.is_file():
        if kind is None:
            raise PromptError(f"{local}: unsupported file type {local.suffix!r}; supported: {', '.join(_FILE_KINDS)}")
        return _read_jsonl(local) if kind == "jsonl" else _read_parquet(local)
    if kind or local.is_absolute() or given.startswith((".", "~")) or given.count("/") > 1:
        raise PromptError(f"no prompt file at {local.absolute()}")
    return _read_hub_dataset(given, split)


def _read_jsonl(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    try:
        file = path.open("rb")
    except OSError as error:
        raise PromptError(f"{path} cannot be read: {error}") from error
    with file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                record = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError as error:
                raise PromptError(f"{where}: not UTF-8 ({error})") from error
            except RecursionError as error:
                raise PromptError(f"{where}: not JSON that can be read: nested too deeply") from error
            except json.JSONDecodeError as error:
                shown = line.decode("utf-8", "replace").strip()[:80]
                raise PromptError(f"{where}: not JSON ({error.msg} at column {error.colno}): {shown}") from error
            if not isinstance(record, dict):
                raise PromptError(f"{where}: a line must be a JSON object, got {type(record).__name__}")
            yield record, where


def _read_parquet(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            yield from _rows((record for batch in file.iter_batches() for record in batch.to_pylist()), str(path))
    except (pyarrow.ArrowException, OSError) as error:
        raise PromptError(f"{path} is not a readable Parquet file: {error}") from error


def _read_saved_dataset(path: Path, split: str) -> Iterator[tuple[dict[str, Any], str]]:
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise PromptError(
            f"{path} is a directory, but not a data set written by datasets.save_to_disk ({error}): give a file"
        ) from error
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise PromptError(f"{path} has no split {split!r}; it has {', '.join(map(str, loaded))}")
        loaded = loaded[split]
    return _rows(loaded, str(path))


def _read_hub_dataset(name: str, split: str) -> Iterator[tuple[dict[str, Any], str]]:
    import datasets

    repository, _, config = name.partition(":")
    try:
        loaded = datasets.load_dataset(repository, config or None, split=split)
    except Exception as error:  # the hub client raises its own, network and file-system errors alike
        raise PromptError(
            f"{name!r} is not a local file, and could not be loaded as a data set (split {split!r}): "
            f"{type(error).__name__}: {error}. Check the path, or save the data set with datasets.save_to_disk"
        ) from error
    return _rows(loaded, name)


def _rows(dataset: Iterable[Any], name: str) -> Iterator[tuple[dict[str, Any], str]]:
    for row, record in enumerate(dataset, start=1):
        yield record, f"{name}, row {row}"


def _lookup(record: Mapping[str, Any], key: str) -> Any:
    """The value at a possibly dotted key; None if there is none."""
    value: Any = record
    for part in [key] if key in record else key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return None
        value = value[part]
    return value


def _checked(record: Mapping[str, Any], where: str, keys: PromptKeys) -> Prompt:
    """The record with every field validated, not yet tokenized. Raises PromptError naming ``where``."""
    prompt, messages = _lookup(record, keys.prompt), _lookup(record, keys.messages)
    if prompt is None and messages is None:
        raise PromptError(
            f"{where}: neither {keys.prompt!r} nor {keys.messages!r}; the record's keys are {sorted(record)}. "
            "Rename them, or set model.data.prompt_key or model.data.messages_key"
        )
    if isinstance(prompt, str):
        messages = [{"role": "user", "content": prompt}]
    elif prompt is not None:
        messages = prompt
    turns = _checked_messages(messages, where, keys.messages if prompt is None else keys.prompt)
    answer, name = _lookup(record, keys.answer), _lookup(record, "id")
    for label, value in ((keys.answer, answer), ("id", name)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, str | int | float)):
            raise PromptError(f"{where}: {label!r} must be a string or a number, got {type(value).__name__}")
    return Prompt(
        id=_digest(turns).hex()[:16] if name is None else str(name),
        text=turns[-1]["content"],
        messages=turns,
        answer=None if answer is None else str(answer),
        token_ids=(),
        where=where,
    )


def _checked_messages(messages: Any, where: str, key: str) -> tuple[Mapping[str, str], ...]:
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes) or not messages:
        raise PromptError(
            f"{where}: {key!r} must be a string or a list of messages, got {type(messages).__name__} {messages!r}"
        )
    turns = []
    for i, turn in enumerate(messages):
        if not isinstance(turn, Mapping) or not all(isinstance(turn.get(k), str) for k in ("role", "content")):
            raise PromptError(f"{where}: {key!r}[{i}] must have 'role' and 'content', both strings; got {turn!r}")
        turns.append({"role": turn["role"], "content": turn["content"]})
    if turns[-1]["role"] == "assistant":
        raise PromptError(
            f"{where}: {key!r} ends with the assistant's turn: there is nothing to answer; end with a user turn"
        )
    if not turns[-1]["content"].strip():
        raise PromptError(f"{where}: {key!r} is empty")
    return tuple(turns)


def _encode(records: Sequence[Prompt], tokenizer: Any) -> list[list[int]]:
    """Token ids of each prompt, chat template included."""
    conversations = [[dict(turn) for turn in r.messages] for r in records]
    try:
        encoded = tokenizer.apply_chat_template(conversations, add_generation_prompt=True, return_dict=True)
    except Exception as error:  # a template is code from the model's authors, and raises anything
        first, last = records[0].where, records[-1].where
        raise PromptError(f"the chat template rejected a prompt between {first} and {last}: {error}") from error
    return [list(ids) for ids in encoded["input_ids"]]


def _digest(messages: Sequence[Mapping[str, str]]) -> bytes:
    """SHA-256 of a conversation; runs of whitespace count as one space."""
    turns = [[turn["role"], " ".join(turn["content"].split())] for turn in messages]
    return hashlib.sha256(json.dumps(turns, ensure_ascii=True).encode()).digest()
