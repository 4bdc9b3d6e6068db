"""Records in the shapes that public data sets have: each becomes the conversation it means, or is refused by name."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from nemo_tropd.data import Prompt, PromptError, PromptKeys
from nemo_tropd.data.conversations import Tally, checked, digest, unread

ASK = {"role": "user", "content": "hi"}
SAY = {"role": "assistant", "content": "yes"}
CALL = {"type": "function", "id": "c1", "function": {"name": "add", "arguments": {"a": 1}}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
IMAGE = {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}


def prompt(record: dict[str, Any], keys: PromptKeys | None = None) -> Prompt:
    found = checked(record, "here", keys or PromptKeys())
    assert found is not None
    return found


def turns(messages: Any) -> list[Any]:
    return list(prompt({"messages": messages}).messages)


def called(arguments: object) -> Any:
    return [ASK, {"role": "assistant", "content": None, "tool_calls": arguments}, {"role": "tool", "content": "3"}]


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("a  b\n", "a  b\n"),
        ([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "a\nb"),
        ([{"type": "text", "text": "a", "image_url": None}], "a"),
        ([{"type": "input_text", "text": "a"}], "a"),
        ([{"text": "a"}], "a"),
        (["a", "b"], "a\nb"),
    ],
)
def test_text_parts_are_joined(content: object, text: str) -> None:
    assert turns([{"role": "user", "content": content}]) == [{"role": "user", "content": text}]


def test_tool_calls_and_other_fields_reach_the_template() -> None:
    tool = {"role": "tool", "content": "3", "tool_call_id": "c1", "name": "add"}
    thought = {"role": "assistant", "content": "so", "reasoning_content": "hm"}
    asked = [ASK, {"role": "assistant", "content": None, "tool_calls": [CALL]}, tool, thought, ASK]
    assert turns(asked) == asked
    assert prompt({"messages": asked, "tools": [TOOL]}).tools == (TOOL,)
    assert prompt({"prompt": "hi", "tools": [TOOL]}).tools == (TOOL,)
    assert prompt({"prompt": "hi"}).tools == prompt({"prompt": "hi", "tools": None}).tools == ()


@pytest.mark.parametrize("calls", [[CALL], json.dumps([CALL])])
def test_tool_calls_may_be_json(calls: object) -> None:
    assert turns(called(calls))[1]["tool_calls"] == [CALL]


def test_the_shapes_of_a_call_become_one() -> None:
    as_text = {**CALL, "function": {"name": "add", "arguments": '{"a": 1, "b": null}'}}
    assert turns(called([as_text]))[1]["tool_calls"][0]["function"]["arguments"] == {"a": 1, "b": None}
    broken = {**CALL, "function": {"name": "add", "arguments": '{"a": '}}
    assert turns(called([broken]))[1]["tool_calls"] == [broken]
    unified = {**CALL, "index": None, "function": {"name": "add", "arguments": {"a": 1, "b": None}}}
    assert turns(called([unified]))[1]["tool_calls"] == [CALL]
    legacy = {"role": "assistant", "content": None, "function_call": {"name": "add", "arguments": '{"a": 1}'}}
    function = {"name": "add", "arguments": {"a": 1}}
    wanted = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": function}]}
    assert turns([ASK, legacy, {"role": "function", "name": "add", "content": "3"}])[1] == wanted


@pytest.mark.parametrize(
    "tools", [json.dumps([TOOL]), [json.dumps(TOOL)], TOOL, [{**TOOL, "strict": None}], json.dumps(TOOL)]
)
def test_tools_may_be_json_or_unified_by_arrow(tools: object) -> None:
    assert prompt({"prompt": "hi", "tools": tools}).tools == (TOOL,)


@pytest.mark.parametrize("tools", [None, "", "[]", [], math.nan, "null"])
def test_no_tools(tools: object) -> None:
    assert prompt({"prompt": "hi", "tools": tools}).tools == ()


def test_fields_that_arrow_fills_with_null_are_dropped() -> None:
    filled = {"role": "user", "content": "hi", "tool_calls": None, "name": None, "tool_call_id": None}
    assert turns([filled]) == [ASK]
    assert prompt({"prompt": None, "messages": [ASK], "answer": None, "tools": None}).messages == (ASK,)


def test_a_tools_result_may_be_an_object() -> None:
    assert turns([ASK, {"role": "tool", "content": {"sum": 3}}])[1]["content"] == '{"sum": 3}'
    assert turns([ASK, {"role": "tool", "content": ""}])[1]["content"] == ""


def test_sharegpt_is_recognised_under_any_key() -> None:
    talk = [
        {"from": "system", "value": "be brief"},
        {"from": "human", "value": "hi", "weight": None},
        {"from": "gpt", "value": "yes"},
        {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
        {"from": "observation", "value": "3"},
        {"from": "human", "value": "and?"},
    ]
    wanted = (
        {"role": "system", "content": "be brief"},
        ASK,
        SAY,
        {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": CALL["function"]}]},
        {"role": "tool", "content": "3"},
        {"role": "user", "content": "and?"},
    )
    for key in ("messages", "conversations", "conversation"):
        assert prompt({key: talk}).messages == wanted
    assert prompt({"x": {"talk": talk}}, PromptKeys(messages="x.talk")).messages == wanted
    assert prompt({"messages": json.dumps(talk)}).messages == wanted
    assert prompt({"conversations": talk[1:2], "system": "be brief"}).messages == wanted[:2]
    assert prompt({"conversations": talk[:2], "system": "not this"}).messages == wanted[:2]


def test_a_last_answer_is_left_out_and_counted() -> None:
    tally = Tally()
    for i, messages in enumerate(([ASK, SAY], [ASK, SAY, ASK, SAY, SAY], [ASK, SAY, ASK], [ASK])):
        found = checked({"messages": messages}, f"line {i}", PromptKeys(), tally)
        assert found is not None and found.messages[-1] == ASK and found.text == "hi"
    assert tally == {"answered": (2, "line 0")}


@pytest.mark.parametrize("role", ["model", "gpt", "Assistant", "ASSISTANT ", "bot", "ai", "chatgpt"])
def test_roles_are_known_by_their_other_names_in_openais_form_too(role: str) -> None:
    tally, answer = Tally(), {"role": role, "content": "ANSWER"}
    found = checked({"messages": [ASK, answer, ASK, answer]}, "here", PromptKeys(), tally)
    assert found is not None and found.messages == (ASK, {**SAY, "content": "ANSWER"}, ASK)
    assert tally == {"answered": (1, "here")}
    talk = [
        ("System", "system"),
        ("developer", "developer"),
        ("Human", "user"),
        ("ipython", "ipython"),
        ("User", "user"),
    ]
    assert [t["role"] for t in turns([{"role": given, "content": "a"} for given, _ in talk])] == [r for _, r in talk]


def test_roles_that_nothing_knows_are_counted() -> None:
    tally = Tally()
    for i, role in enumerate(("user", "Narrator", "function_call", "developer", "ipython", "function")):
        checked({"messages": [{"role": role, "content": "a"}, ASK]}, f"line {i}", PromptKeys(), tally)
    assert tally == {"foreign": (2, "line 1")}


def test_what_is_left_out_need_not_be_an_answer() -> None:
    """The last turns of the assistant are no part of the prompt: templates of records leave them empty."""
    for last in ({**SAY, "content": None}, {"role": "gpt", "content": [IMAGE]}, {"from": "gpt", "value": None}):
        assert turns([ASK, last]) == turns([ASK, SAY, last]) == [ASK]


def test_a_system_column_is_the_first_turn_of_messages() -> None:
    told, other = {"role": "system", "content": "be"}, {"role": "developer", "content": "not"}
    for record in ({"messages": [ASK]}, {"conversations": [{"from": "human", "value": "hi"}]}, {"prompt": [ASK]}):
        assert prompt({**record, "system": "be"}).messages == (told, ASK)
        assert prompt({**record, "system": [{"type": "text", "text": "be"}]}).messages == (told, ASK)
        assert prompt({**record, "system": " "}).messages == prompt({**record, "system": None}).messages == (ASK,)
    assert prompt({"messages": json.dumps([{"from": "human", "value": "hi"}]), "system": "be"}).messages == (told, ASK)
    assert prompt({"messages": [other, ASK], "system": "be"}).messages == (other, ASK)
    assert prompt({"prompt": "hi", "system": "be"}).messages == (ASK,)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (["conversations", "system"], []),
        (["messages", "system"], []),
        (["messages", "conversations"], ["conversations"]),
        (["prompt", "messages", "system", "source"], ["messages", "system", "source"]),
    ],
)
def test_what_is_not_read_is_known(keys: list[str], said: list[str]) -> None:
    tally, values = Tally(), {"prompt": "hi", "messages": [ASK], "conversations": [ASK]}
    tally.keys_of_records.update(dict.fromkeys(keys))
    checked({key: values.get(key, "a") for key in keys}, "here", PromptKeys(), tally)
    assert unread(PromptKeys(), tally) == said


def nested(kind: type, depth: int = 900) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value] if kind is list else {"a": value}
    return value


DEEP: list[dict[str, Any]] = [
    {"prompt": "a", "answer": nested(list)},
    {"prompt": "a", "id": nested(dict, 2000)},
    {"prompt": "a", "tools": [nested(dict)]},
    {"messages": nested(list, 2000)},
    {"messages": [{**ASK, "reasoning": nested(list, 2000)}], "id": "x"},
    {"messages": called([{"function": nested(dict)}])},
    {"messages": [ASK, {"role": "tool", "content": nested(list, 2000)}]},
]


@pytest.mark.parametrize("record", DEEP, ids=lambda record: next(key for key in record if key != "prompt"))
def test_what_is_nested_too_deeply_is_refused_by_name(record: dict[str, Any]) -> None:
    with pytest.raises(PromptError, match=r"^here: .*nested too deeply"):
        checked(record, "here", PromptKeys())


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": ""},
        {"prompt": " \n"},
        {"prompt": None},
        {"prompt": math.nan},
        {"prompt": None, "messages": None},
        {"messages": []},
        {"messages": [SAY]},
        {"messages": [{"role": "user", "content": "  "}]},
        {"messages": "[]"},
        {"messages": [{"role": "system", "content": "Be brief."}]},
        {"messages": [{"role": "user", "content": None, "tool_calls": [CALL]}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": ""}]}, SAY]},
        {"conversations": []},
    ],
)
def test_a_record_without_anything_to_respond_to_is_counted(record: dict[str, Any]) -> None:
    tally = Tally()
    assert checked(record, "line 7", PromptKeys(), tally) is None and tally == {"empty": (1, "line 7")}


def test_a_gap_in_the_prompt_leaves_the_messages() -> None:
    for gap in (None, "", math.nan):
        assert prompt({"prompt": gap, "messages": [ASK]}).messages == (ASK,)
    assert prompt({"prompt": [ASK], "messages": None}).messages == (ASK,)
    assert prompt({"a": None, "messages": [ASK]}, PromptKeys(prompt="a.b")).messages == (ASK,)


@pytest.mark.parametrize(
    ("given", "answer"),
    [
        (4, "4"), (0, "0"), (0.5, "0.5"), ("4", "4"), ("B", "B"), (True, "True"), (False, "False"), ("nan", "nan"),
        (None, None), ("", None), ("  ", None), (math.nan, None), ([], None), ([None, ""], None),
        ({"value": 4}, None), ([{"value": 4}], None), (b"4", None), (["4"], "4"), (["4", "four"], ("4", "four")),
        ((4, 4.0, "4"), ("4", "4.0")), ([["a", None], "b", math.nan], ("a", "b")),
    ],
)  # fmt: skip
def test_answers_of_every_kind(given: object, answer: object) -> None:
    tally = Tally()
    found = checked({"prompt": "hi", "answer": given}, "here", PromptKeys(), tally)
    assert found is not None and found.answer == answer
    told = isinstance(given, dict | bytes) or given == [{"value": 4}]
    assert tally == ({"structured": (1, "here")} if told else {})


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("a", "a"),
        (7, "7"),
        (1.5, "1.5"),
        (True, "True"),
        ({"b": 1, "a": 2}, '{"a": 2, "b": 1}'),
        ([1, "x"], '[1, "x"]'),
    ],
)
def test_ids_of_every_kind(given: object, name: str) -> None:
    assert prompt({"prompt": "hi", "id": given}).id == name


@pytest.mark.parametrize("gap", [None, math.nan, ""])
def test_without_an_id_the_text_is_one(gap: object) -> None:
    assert prompt({"prompt": "hi", "id": gap}).id == digest([ASK]).hex()[:16] == prompt({"prompt": " hi "}).id


def test_the_digest_of_plain_conversations_stays() -> None:
    # Written down once: which prompts are held out, and ids, must not change under a run.
    assert digest([ASK]).hex()[:16] == "675b797826f34c78"
    plain = digest([{"role": "user", "content": "hi"}])
    assert plain == digest([{"role": "user", "content": " hi\n", "weight": 1}])
    assert len({plain, digest([{**ASK, "name": "x"}]), digest([ASK], [TOOL]), digest([{**SAY, "content": "hi"}])}) == 4


BAD: list[tuple[dict[str, Any], str]] = [
    ({"question": "a", 3: 1}, r"neither 'prompt' nor 'messages'; the record's keys are \['3', 'question'\]\. Rename"),
    ({"prompt": 5}, r"'prompt' must be a string or a list of messages, got int 5"),
    ({"prompt": True}, r"'prompt' must be a string or a list of messages, got bool"),
    ({"prompt": {"role": "user"}}, r"'prompt' must be a string or a list of messages, got dict"),
    ({"prompt": ["a", "b"]}, r"'prompt'\[0\] must have 'role' and 'content', or 'from' and 'value'; got 'a'"),
    ({"messages": "hi"}, r"'messages' must be a string or a list of messages, got str 'hi'"),
    ({"messages": "[{"}, r"'messages' must be an object, or its JSON; got '\[\{'"),
    ({"messages": [{"role": "user"}]}, r"'messages'\[0\] must have 'role' and 'content', or tool_calls"),
    ({"messages": [{"content": "a"}]}, r"'messages'\[0\] must have 'role' and 'content'"),
    ({"messages": [{"role": 1, "content": "a"}]}, r"'messages'\[0\] must have 'role'"),
    ({"messages": [{"role": " ", "content": "a"}]}, r"'messages'\[0\] must have 'role'"),
    ({"messages": [ASK, {"role": "assistant", "content": None}, ASK]}, r"'messages'\[1\] must have .* or tool_calls"),
    (
        {"messages": [{"role": "user", "content": 5}]},
        r"'messages'\[0\] must have .* a string or a list of text parts; got",
    ),
    ({"messages": [{"role": "user", "content": [3]}]}, r"'messages'\[0\] must have .* text parts; got 3"),
    (
        {"messages": [{"role": "user", "content": [IMAGE]}]},
        r"\[0\] has a part of type 'image_url': models here read text",
    ),
    ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, r"has a part of type 'input_audio'"),
    ({"messages": [{"role": "user", "content": {"type": "image"}}]}, r"has a part of type 'image'"),
    ({"messages": called("add(1)")}, r"'messages'\[1\]\['tool_calls'\] must be an object, or its JSON; got 'add\(1\)'"),
    ({"messages": called([3])}, r"'messages'\[1\]\['tool_calls'\] must be a list of objects, got \[3\]"),
    ({"messages": called(7)}, r"\['tool_calls'\] must be a list of objects, got 7"),
    ({"conversations": [{"from": "alien", "value": "a"}]}, r"'conversations'\[0\] is from 'alien'; known are human, "),
    ({"conversations": [{"from": "human", "value": None}]}, r"'conversations'\[0\] must have"),
    ({"conversations": [{"from": "human"}]}, r"'conversations'\[0\] must have"),
    (
        {"conversations": [{"from": "function_call", "value": "add"}, ASK]},
        r"\[0\]\['value'\] must be an object, or its",
    ),
    ({"prompt": "a", "tools": "none"}, r"'tools' must be an object, or its JSON; got 'none'"),
    ({"prompt": "a", "tools": [3]}, r"'tools' must be a list of objects, got \[3\]"),
    ({"prompt": "a", "tools": 3}, r"'tools' must be a list of objects, got 3"),
    ({"prompt": "x" * 5, "messages": 3, "tools": "x" * 9999}, r"'tools' must be an object"),
]


@pytest.mark.parametrize(("record", "message"), BAD)
def test_a_bad_record_is_refused_by_name(record: dict[str, Any], message: str) -> None:
    with pytest.raises(PromptError, match="^here: .*" + message) as caught:
        checked(record, "here", PromptKeys())
    assert len(str(caught.value)) < 600 and "\n" not in str(caught.value)
