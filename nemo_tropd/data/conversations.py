"""Records as conversations: each field checked, not yet tokenized.

A record has ``prompt`` (a string, or a list of chat messages) or ``messages`` (a list of ``{"role", "content"}``), and
may have ``answer`` and ``id``. All keys but ``id`` can be renamed, and dotted for nested records. No torch.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nemo_tropd.data.sources import PromptError


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
    tools: tuple[Mapping[str, Any], ...] = ()  # schemas of what the model may call


def _lookup(record: Mapping[str, Any], key: str) -> Any:
    """The value at a possibly dotted key; None if there is none."""
    value: Any = record
    for part in [key] if key in record else key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return None
        value = value[part]
    return value


def checked(record: Mapping[str, Any], where: str, keys: PromptKeys) -> Prompt:
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
        id=digest(turns).hex()[:16] if name is None else str(name),
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


def digest(messages: Sequence[Mapping[str, str]]) -> bytes:
    """SHA-256 of a conversation; runs of whitespace count as one space."""
    turns = [[turn["role"], " ".join(turn["content"].split())] for turn in messages]
    return hashlib.sha256(json.dumps(turns, ensure_ascii=True).encode()).digest()
