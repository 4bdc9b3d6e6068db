"""Records as conversations: each field checked, not yet tokenized.

A record has ``prompt`` (a string, or a list of messages) or ``messages``, and may have ``answer``, ``id``, ``tools``
and, beside a list of messages without one, ``system``. Messages are OpenAI's (``role``, ``content``, ``tool_calls``,
...) or ShareGPT's (``from``, ``value``), and roles have the names of either. The keys of prompt, messages and answer
can be renamed, and dotted for nested records. No torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from nemo_tropd.config_teacher import DEFAULT_TEACHER
from nemo_tropd.data.sources import PromptError

_CONVERSATIONS = ("conversations", "conversation")  # other names of messages, if neither key is there
# Names of roles, in lower case, and those that templates know
_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "assistant", "model", "bot", "ai", "function_call", "tool_call"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
    **dict.fromkeys(("system", "developer"), "system"),
}
# As ``role``, which templates read: one of its own meaning, and those whose content is a call.
_KEPT = ("developer", "function_call", "tool_call")
_KNOWN = {*_ROLES.values(), "developer", "function", "ipython"}
_TEXTS = (None, "text", "input_text", "output_text", "refusal")  # types of a part that holds text
# Fields of a turn, besides role and content, that make it another turn; a template may read more.
_MEANT = ("name", "tool_calls", "tool_call_id", "reasoning_content", "reasoning", "thinking")
_ABSENT = object()


@dataclass(frozen=True)
class PromptKeys:
    """Keys of a record's fields. If a record has both, the prompt wins over the messages."""

    prompt: str = "prompt"
    messages: str = "messages"
    answer: str = "answer"
    teacher: str | None = None
    teacher_prompt: str | None = None


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt, ready for the model."""

    id: str
    text: str  # the last user turn, for display
    messages: tuple[Mapping[str, Any], ...]  # role, content (a string, or None beside tool_calls) and other fields
    answer: str | tuple[str, ...] | None  # of several, each is right
    token_ids: tuple[int, ...]  # the complete chat prompt, with the opening of the assistant's turn
    where: str  # the file and line, or row, that it came from
    tools: tuple[Mapping[str, Any], ...] = ()  # schemas of what the model may call
    teacher: str = DEFAULT_TEACHER
    source: str = ""  # its name, of several
    told: tuple[Mapping[str, Any], ...] = ()  # what the teacher reads in place of the messages, if something else
    told_ids: tuple[int, ...] = ()

    @property
    def teachers_ids(self) -> tuple[int, ...]:
        """The tokens that the teacher reads."""
        return self.told_ids or self.token_ids

    def as_told(self) -> Prompt:
        """The prompt that the teacher reads."""
        return replace(self, messages=self.told, token_ids=self.told_ids) if self.told else self


class Tally(dict[str, tuple[int, str]]):
    """How many records something happened to, by its name, and where the first one is; the records' keys, and those
    that conversations were read from."""

    def __init__(self) -> None:
        super().__init__()
        self.keys_of_records: dict[str, None] = {}
        self.keys_read: set[str] = set()

    def add(self, name: str, where: str) -> None:
        """One more."""
        count, first = self.get(name, (0, where))
        self[name] = (count + 1, first)


def checked(record: Mapping[str, Any], where: str, keys: PromptKeys, tally: Tally | None = None) -> Prompt | None:
    """The record with every field validated, not yet tokenized; None if it has nothing to respond to. ``tally`` counts
    such "empty" records, "answered" ones, whose last answer is left out, "foreign" ones with a role of another name,
    and "structured" known answers, which cannot be judged and are left out. Raises PromptError naming ``where``."""
    try:
        return _checked(record, where, keys, Tally() if tally is None else tally)
    except RecursionError as error:
        raise PromptError(
            f"{where}: nested too deeply to be read: leave it out, or make its deepest part text"
        ) from error


def _checked(record: Mapping[str, Any], where: str, keys: PromptKeys, tally: Tally) -> Prompt | None:
    key, given = _conversation(record, where, keys)
    answered = False
    if isinstance(given, str) and key == keys.prompt:
        turns = [] if _is_gap(given) else [{"role": "user", "content": given}]
    else:
        turns, answered = _turns(given, where, key)
        system = record.get("system")
        tally.keys_read |= {key.split(".")[0], "system"}
        if turns and turns[0]["role"] not in ("system", "developer") and not _is_gap(system):
            turns.insert(0, _turn({"role": "system", "content": system}, f"{where}: 'system'"))
    last = turns[-1] if turns else {"role": "system"}
    said = last["role"] in ("tool", "function") or (last.get("content") or "").strip()
    if last["role"] in ("system", "developer") or not said:
        tally.add("empty", where)
        return None
    if answered:
        tally.add("answered", where)
    if any(turn["role"] not in _KNOWN for turn in turns):
        tally.add("foreign", where)
    known, name = _lookup(record, keys.answer), _lookup(record, "id")
    if any(isinstance(part, Mapping | bytes) for part in (known if isinstance(known, list) else [known])):
        tally.add("structured", where)
    tools = _tools(record.get("tools"), f"{where}: 'tools'")
    told = _told(record, where, keys.teacher_prompt) if keys.teacher_prompt else ()
    if not _is_gap(name):
        name = str(name) if isinstance(name, str | int | float) else json.dumps(name, sort_keys=True, default=str)
    asked = [turn["content"] or "" for turn in turns if turn["role"] == "user"]
    own = digest(turns, tools).hex()[:16]  # of every record: it finds what is nested too deeply
    return Prompt(
        id=own if _is_gap(name) else name,
        text=(asked or [turns[-1]["content"]])[-1],
        messages=tuple(turns),
        answer=_answer(known),
        token_ids=(),
        where=where,
        tools=tools,
        teacher=_teacher(record, where, keys.teacher),
        told=() if told == tuple(turns) else told,
    )


def _teacher(record: Mapping[str, Any], where: str, key: str | None) -> str:
    name = _lookup(record, key) if key else None
    if not _is_gap(name) and not isinstance(name, str):
        raise PromptError(f"{where}: {key!r} must be the name of a teacher, got {_shown(name)}")
    return DEFAULT_TEACHER if _is_gap(name) else str(name)


def _told(record: Mapping[str, Any], where: str, key: str) -> tuple[Mapping[str, Any], ...]:
    """The turns that the teacher reads; none if there is nothing."""
    if _is_gap(given := _lookup(record, key)) or given == []:
        return ()
    told = checked({key: given, "system": record.get("system")}, where, PromptKeys(key, key))
    if told is None:
        raise PromptError(f"{where}: {key!r} holds nothing that the teacher could respond to: {_shown(given)}")
    return told.messages


def has(record: Mapping[str, Any], key: str) -> bool:
    """Whether there is something, if only null, at a possibly dotted key."""
    return _lookup(record, key, _ABSENT) is not _ABSENT


def unread(keys: PromptKeys, tally: Tally) -> list[str]:
    """Of the keys of records those that nothing has read."""
    named = [key for key in (keys.prompt, keys.answer, keys.teacher, keys.teacher_prompt) if key is not None]
    read = {*named, *(key.split(".")[0] for key in named), "id", "tools"} | tally.keys_read
    return [key for key in tally.keys_of_records if key not in read]


def _lookup(record: Mapping[str, Any], key: str, default: Any = None) -> Any:
    """The value at a possibly dotted key; None if it, or what it lies in, is null; ``default`` if there is none."""
    value: Any = record
    for part in [key] if key in record else key.split("."):
        if value is None:
            return None
        if not isinstance(value, Mapping) or part not in value:
            return default
        value = value[part]
    return value


def _is_gap(value: object) -> bool:
    """None, NaN (a gap of pandas), or a blank string."""
    return value is None or value != value or (isinstance(value, str) and not value.strip())


def _conversation(record: Mapping[str, Any], where: str, keys: PromptKeys) -> tuple[str, Any]:
    """The key that a record's conversation is under, and what is there."""
    found = {key: _lookup(record, key, _ABSENT) for key in (keys.prompt, keys.messages)}
    found = {key: value for key, value in found.items() if value is not _ABSENT}
    found = found or {key: record[key] for key in _CONVERSATIONS if key in record}
    if not found:
        raise PromptError(
            f"{where}: neither {keys.prompt!r} nor {keys.messages!r}; the record's keys are {sorted(map(str, record))}."
            " Rename them, or set model.data.prompt_key or model.data.messages_key"
        )
    return next(((key, value) for key, value in found.items() if not _is_gap(value)), (next(iter(found)), None))


def _turns(given: Any, where: str, key: str) -> tuple[list[dict[str, Any]], bool]:
    """The turns of a list of messages, or of its JSON, each checked, up to the assistant's last; whether it has any."""
    if isinstance(given, str) and given.lstrip().startswith("["):
        given = _parsed(given, f"{where}: {key!r}")
    if _is_gap(given):
        return [], False
    if not isinstance(given, Sequence) or isinstance(given, str | bytes):
        raise PromptError(
            f"{where}: {key!r} must be a string or a list of messages, got {type(given).__name__} {_shown(given)}"
        )
    asked = list(given)
    while asked and _role(asked[-1]) == "assistant":
        asked.pop()
    return [_turn(turn, f"{where}: {key!r}[{i}]") for i, turn in enumerate(asked)], len(asked) < len(given)


def _role(turn: Any) -> Any:
    """A turn's role by the name that templates know; as it is if there is none; None of what is no turn."""
    name = (turn.get("from") if turn.get("role") is None else turn["role"]) if isinstance(turn, Mapping) else None
    if not isinstance(name, str):
        return name
    low = name.strip().lower()
    return low if low in _KEPT and turn.get("role") is not None else _ROLES.get(low, name)


def _turn(turn: Any, at: str) -> dict[str, Any]:
    if isinstance(turn, Mapping) and isinstance(turn.get("from"), str) and turn.get("role") is None:
        turn = _of_sharegpt(turn, at)
    role = _role(turn) if isinstance(turn, Mapping) and "role" in turn else None
    if not isinstance(role, str) or not role.strip():
        raise PromptError(f"{at} must have 'role' and 'content', or 'from' and 'value'; got {_shown(turn)}")
    fields = {k: v for k, v in turn.items() if v is not None and k not in ("content", "tool_calls", "function_call")}
    calls = _parsed(turn.get("tool_calls"), f"{at}['tool_calls']") or []
    if not calls and (call := _parsed(turn.get("function_call"), f"{at}['function_call']")):
        calls = [{"type": "function", "function": call}]
    if not isinstance(calls, Sequence) or not all(isinstance(call, Mapping) for call in calls):
        raise PromptError(f"{at}['tool_calls'] must be a list of objects, got {_shown(calls)}")
    content = turn.get("content")
    if content is None and not calls and role == "assistant" and any(fields.get(name) for name in _MEANT[-3:]):
        content = ""  # it has thought, and not spoken
    if _is_gap(content) and not isinstance(content, str) and not calls:
        raise PromptError(f"{at} must have 'role' and 'content', or tool_calls; got {_shown(turn)}")
    text = _text(content, role, at) if not _is_gap(content) else content if isinstance(content, str) else None
    made = {**fields, "role": role, "content": text}
    return {**made, "tool_calls": [_call(call) for call in calls]} if calls else made


def _of_sharegpt(turn: Mapping[str, Any], at: str) -> dict[str, Any]:
    role, value = _role(turn), turn.get("value")
    if role not in _ROLES:
        raise PromptError(f"{at} is from {turn['from']!r}; known are {', '.join(_ROLES)}: rename it")
    if turn["from"].strip().lower() in _KEPT[1:]:
        calls = _parsed(value, f"{at}['value']")
        calls = [calls] if isinstance(calls, Mapping) else calls
        return {"role": role, "content": None, "tool_calls": calls}
    return {"role": role, "content": value}


def _text(content: Any, role: str, at: str) -> str:
    """A turn's text: a string, text parts joined by line breaks as vLLM's server joins them, or a tool's result."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, Sequence) and not isinstance(content, bytes) else None
    texts = [part if isinstance(part, str) else _part(part) for part in parts or ()]
    if parts is None or None in texts:
        if role in ("tool", "function"):
            return json.dumps(content, ensure_ascii=False, default=str)
        bad = content if parts is None else parts[texts.index(None)]
        kind = bad.get("type") if isinstance(bad, Mapping) else None
        if kind not in _TEXTS:
            raise PromptError(f"{at} has a part of type {kind!r}: models here read text alone; leave such records out")
        raise PromptError(f"{at} must have 'role' and 'content', a string or a list of text parts; got {_shown(bad)}")
    return "\n".join(text for text in texts if text is not None)


def _part(part: Any) -> str | None:
    """The text of a part; None if it is no text part."""
    if not isinstance(part, Mapping) or part.get("type") not in _TEXTS:
        return None
    text = part.get("refusal") if part.get("text") is None else part.get("text")
    return text if isinstance(text, str) else None


def _call(call: Mapping[str, Any]) -> dict[str, Any]:
    """A tool call with its arguments as an object, which is what templates expect."""
    call = _without_nulls(call)
    if not isinstance(call.get("function"), dict):
        call = {"type": "function", "function": call}
    function = call["function"]
    if isinstance(function.get("arguments"), str):
        with suppress(ValueError, RecursionError):  # of a model's own try at JSON: passed on as it is
            arguments = json.loads(function["arguments"])
            function["arguments"] = arguments if isinstance(arguments, dict) else function["arguments"]
    return dict(call)


def _tools(given: Any, at: str) -> tuple[Mapping[str, Any], ...]:
    """A record's tools: a list of objects or of their JSON, or the JSON of a list."""
    given = _parsed(given, at)
    given = [given] if isinstance(given, Mapping) else given or []
    tools = [_parsed(tool, at) for tool in given] if isinstance(given, list | tuple) else [given]
    if not all(isinstance(tool, Mapping) for tool in tools):
        raise PromptError(f"{at} must be a list of objects, got {_shown(given)}")
    return tuple(_without_nulls(tool) for tool in tools)


def _parsed(value: Any, at: str) -> Any:
    """``value``, from its JSON if it is a string: Arrow has no type for fields of many shapes."""
    if not isinstance(value, str):
        return None if _is_gap(value) else value
    try:
        return json.loads(value) if value.strip() else None
    except (ValueError, RecursionError) as error:
        raise PromptError(f"{at} must be an object, or its JSON; got {_shown(value)} ({error})") from error


def _without_nulls(value: Any) -> Any:
    """Without the null fields with which Arrow makes all records alike."""
    if isinstance(value, Mapping):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    return [_without_nulls(v) for v in value] if isinstance(value, list) else value


def _answer(value: Any) -> str | tuple[str, ...] | None:
    if _is_gap(value) or isinstance(value, Mapping | bytes):
        return None
    if not isinstance(value, list | tuple):
        return str(value)
    found = dict.fromkeys(a for part in map(_answer, value) for a in (part if isinstance(part, tuple) else (part,)))
    several = tuple(answer for answer in found if answer is not None)
    return several if len(several) > 1 else several[0] if several else None


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 200 else text[:200] + "..."


def digest(messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()) -> bytes:
    """SHA-256 of a conversation; runs of whitespace count as one space."""
    turns: list[list[Any]] = [[turn["role"], " ".join((turn["content"] or "").split())] for turn in messages]
    for turn, entry in zip(messages, turns, strict=True):
        entry += [{name: turn[name]} for name in _MEANT if turn.get(name)]
    if tools:
        turns.append([{"tools": list(tools)}])
    return hashlib.sha256(json.dumps(turns, ensure_ascii=True, default=str).encode()).digest()
