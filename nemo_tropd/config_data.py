"""The part of a run's schema that says what it trains on; see nemo_tropd/config.py. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from nemo_tropd.fields import FLAG_OR_TEXT, FREE_FORM, choice, day, integer, number, sections, text


@dataclass
class SourceConfig:
    """One of several sources of prompts. Keys and split that are null are those of model.data."""

    path: str = text("")
    """As model.data.path."""
    weight: float = number(1.0, above=0)
    """Of the prompts of each epoch, and of those held out, this source's part is its weight over the sum of weights,
    however many prompts it has: a small one is repeated within an epoch, a large one goes on in the next. An epoch is
    as many prompts as all sources have to train on. Weights equal to the numbers of prompts use each once an epoch."""
    prompt_key: str | None = text(None)
    messages_key: str | None = text(None)
    answer_key: str | None = text(None)
    teacher_prompt_key: str | None = text(None)
    split: str | None = text(None)
    teacher: str | None = text(None)
    """The teacher of all its prompts: a name of model.teachers, or default for model.teacher; null: by
    model.data.teacher_key."""


@dataclass
class DataConfig:
    path: str | None = text(None)
    """A file (.jsonl, .ndjson or .json, lines or an array, also with .gz or .zst; .parquet), a pattern such as
    /data/part-*.jsonl, a folder (saved by datasets, a clone of a hub data set, or shards of one kind, read sorted by
    name), or a hub data set's name; FOLDER:config or owner/name:config for a configuration."""
    sources: list[Any] = field(default_factory=list, metadata=sections(SourceConfig))
    """Several sources instead of path, each with the keys of SourceConfig:
    [{path: a.jsonl, weight: 3}, {path: b, prompt_key: question}]."""
    prompt_key: str = text("prompt")
    """Key of a string or a list of messages; dotted for nested records, as are the other two."""
    messages_key: str = text("messages")
    """Key of a list of messages (role, content, tool_calls, ...; or from, value), read if there is no prompt. A last
    answer of the assistant is left out."""
    answer_key: str = text("answer")
    """Key of the known answer of a held-out prompt: a number or expression, words, or a list of which each is right."""
    teacher_key: str | None = text(None)
    """Key of the name of a prompt's teacher, of model.teachers; default, or nothing there, is model.teacher. null: all
    prompts have that."""
    teacher_prompt_key: str | None = text(None)
    """Key of what the teacher reads in place of the prompt (a string or a list of messages): with a reference solution,
    a hint, another system turn. Where nothing is there, and with null, it reads what the student reads."""
    split: str = text("train")
    """Split of a data set that has any."""
    max_prompt_tokens: int = integer(1024, at_least=1)
    overlong: str = choice("error", "drop")
    """error or drop: what to do with a prompt longer than max_prompt_tokens."""
    held_out: int = integer(64, at_least=0)
    """Prompts kept for validation, chosen by a hash of their text."""
    chat_template: Any = field(default=True, metadata=FLAG_OR_TEXT)
    """true: the student's own; false: none, a prompt is its text alone; or a file with a Jinja template."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict, metadata=FREE_FORM)
    """Handed to the template, e.g. {enable_thinking: false} for Qwen3."""
    system_prompt: str | None = text(None)
    """Put first in conversations that have no system turn."""
    template_date: str = day("2024-07-26")
    """What templates that write the date of the day (Llama 3's) take for it: prompts are the same on every day."""
