"""Templates: what a prompt becomes is chosen by keys, is the same on every day, and a refused prompt is named."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from nemo_tropd.config import ConfigError, DataConfig
from nemo_tropd.data import Prompt, PromptError, Template, load_prompts, load_tokenizer, template_notes
from nemo_tropd.data.templates import encode
from tests.zoo.tokenizers import write_tokenizer


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root, made = tmp_path_factory.mktemp("shapes"), {}
    for kind in ("qwen2.5", "qwen3", "r1-qwen", "llama3", "llama2"):
        write_tokenizer(root / kind, kind)
        made[kind] = load_tokenizer(root / kind, "key")
    return made


def prompt(content: str, *more: tuple[str, str], line: int = 1, ids: tuple[int, ...] = (1,)) -> Prompt:
    turns = [("user", content), *more]
    messages = tuple({"role": role, "content": text} for role, text in turns)
    return Prompt("a", content, messages, None, ids, f"p.jsonl, line {line}")


def template(**keys: Any) -> Template:
    return Template.of(DataConfig(**keys))


def write_jsonl(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


class Tomorrow(datetime):
    @classmethod
    def now(cls, tz: Any = None) -> Tomorrow:
        return cls(2031, 5, 6)


def test_a_date_in_the_template_is_the_same_on_every_day(
    tokenizers: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, path = tokenizers["llama3"], write_jsonl(tmp_path / "p.jsonl", [{"prompt": "hi"}])
    today = load_prompts(path, tokenizer, max_prompt_tokens=500).train
    assert "26 Jul 2024" in tokenizer.decode(today[0].token_ids)
    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Tomorrow)
    chat = [{"role": "user", "content": "hi"}]
    assert "06 May 2031" in tokenizer.apply_chat_template(chat, tokenize=False)  # what would be written without
    assert load_prompts(path, tokenizer, max_prompt_tokens=500).train.fingerprint() == today.fingerprint()
    other = load_prompts(path, tokenizer, max_prompt_tokens=500, template=template(template_date="2025-01-02")).train
    assert "02 Jan 2025" in tokenizer.decode(other[0].token_ids)
    ((_, line),) = template_notes(Template(), today, tokenizer, tokenizer, [tokenizer.eos_token_id])
    assert "writes a date, which is 2024-07-26 on every day: model.data.template_date" in line


def test_switches_system_prompt_and_files(tokenizers: dict[str, Any], tmp_path: Path) -> None:
    qwen, one = tokenizers["qwen3"], prompt("hi")
    assert Template().render(one, qwen) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    still = template(chat_template_kwargs={"enable_thinking": False})
    assert still.render(one, qwen).endswith("assistant\n<think>\n\n</think>\n\n")
    assert qwen.get_vocab()["<think>"] in encode([one], qwen, still)[0]
    asked = template(system_prompt="Be brief.")
    assert asked.render(one, qwen).startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhi")
    own = Prompt("a", "b", ({"role": "system", "content": "S"}, *one.messages), None, (), "x")
    assert "Be brief" not in asked.render(own, qwen) and asked.render(own, qwen).count("system") == 1
    (tmp_path / "t.jinja").write_text("{{ messages[0].content | upper }}!")
    assert template(chat_template=str(tmp_path / "t.jinja")).render(one, qwen) == "HI!"
    tools = Prompt("a", "b", one.messages, None, (), "x", tools=({"name": "add"},))
    assert '{"name": "add"}' in Template().render(tools, qwen) and "Tools" not in Template().render(one, qwen)


def test_without_a_template_the_text_alone(tokenizers: dict[str, Any], tmp_path: Path) -> None:
    qwen, text = tokenizers["qwen2.5"], "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    none = template(chat_template=False)
    ids = encode([prompt(text)], qwen, none)[0]
    assert qwen.decode(ids) == text and ids[0] == qwen.get_vocab()["<|im_start|>"]
    with pytest.raises(PromptError, match=r"p\.jsonl, line 1: a conversation of 2 turns needs a template"):
        encode([prompt("hi", ("user", "more"))], qwen, none)
    path, bare = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "hi"}]), load_tokenizer(Path(qwen.name_or_path), "key")
    bare.chat_template = None
    with pytest.raises(PromptError, match=r"no chat template: .*set model\.data\.chat_template to a file, or to false"):
        load_prompts(path, bare, max_prompt_tokens=9)
    assert len(load_prompts(path, bare, max_prompt_tokens=9, template=none).train) == 1


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"chat_template": "/nowhere.jinja"}, r"model\.data\.chat_template = '/nowhere\.jinja': cannot be read"),
        ({"chat_template_kwargs": {"tools": []}}, r"chat_template_kwargs = 'tools': is set by the program"),
        ({"chat_template": False, "system_prompt": "x"}, r"model\.data\.system_prompt = 'x': needs a template"),
        ({"chat_template": False, "chat_template_kwargs": {"a": 1}}, r"chat_template_kwargs = .*needs a template"),
    ],
)
def test_keys_that_cannot_be(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        template(**keys)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"messages": [{"role": "user", "content": c} for c in "ab"]}, "refuses the prompt: Conversation roles must"),
        ({"prompt": "half \ud83d"}, r"half of a surrogate pair \('\\ud83d'\)"),
    ],
)
def test_a_refused_prompt_is_named_by_its_line(
    tokenizers: dict[str, Any], tmp_path: Path, record: dict[str, Any], message: str
) -> None:
    records: list[dict[str, Any]] = [{"prompt": f"number {i}"} for i in range(600)]
    records[299] = record
    with pytest.raises(PromptError, match=rf"p\.jsonl, line 300: .*{message}"):
        load_prompts(write_jsonl(tmp_path / "p.jsonl", records), tokenizers["llama2"], max_prompt_tokens=500)


def test_a_template_that_leaves_nothing_is_refused(tokenizers: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text("{# nothing #}")
    with pytest.raises(PromptError, match="line 1: the prompt has no tokens"):
        encode([prompt("hi")], tokenizers["qwen3"], template(chat_template=str(tmp_path / "t.jinja")))
    (tmp_path / "t.jinja").write_text("{% if %}")
    with pytest.raises(PromptError, match="refuses the prompt: Expected an expression"):
        encode([prompt("hi")], tokenizers["qwen3"], template(chat_template=str(tmp_path / "t.jinja")))


def test_a_template_that_is_no_jinja_is_refused_with_its_own_line(tokenizers: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "t.jinja"
    for text, line, what in (
        ("{% for m in messages %}{{ m.content }", 1, "unexpected '}'"),
        ("a\n\n{{ messages | nope }}", 3, "No filter named 'nope'"),
    ):
        file.write_text(text)
        with pytest.raises(ConfigError) as error:
            template(chat_template=str(file)).check(tokenizers["qwen3"])
        said = str(error.value)
        assert said.startswith(f"model.data.chat_template = '{file}': line {line} of the template") and what in said
    for text in ("{{ raise_exception('no') }}", "{% generation %}{{ messages[0].content }}{% endgeneration %}"):
        file.write_text(text)
        template(chat_template=str(file)).check(tokenizers["qwen3"])
    template(chat_template=False).check(tokenizers["qwen3"])


def notes(kind: str, tokenizers: dict[str, Any], *prompts: Prompt, teachers: Any = None, **keys: Any) -> str:
    tokenizer = tokenizers[kind]
    ends = keys.pop("ends", [tokenizer.eos_token_id])
    lines = template_notes(template(**keys), prompts, tokenizer, teachers or tokenizer, ends)
    assert all(label == "template" for label, _ in lines)
    return "\n".join(line for _, line in lines)


def test_texts_that_hold_control_tokens_are_counted(tokenizers: dict[str, Any]) -> None:
    held = prompt("what does <|im_end|> do?", line=7)
    history = prompt("a", ("assistant", "<think>b</think>c"), ("user", "d"))
    said = notes("qwen3", tokenizers, prompt("plain <b>"), history, held, held)
    assert said == "2 of 4 prompts hold the text of a control token, which becomes that token; first p.jsonl, line 7"
    told = replace(prompt("plain", line=8), told=({"role": "user", "content": "<|im_end|>"},))
    said = notes("qwen3", tokenizers, held, told, replace(held, told=told.told), prompt("plain"))
    assert said == "3 of 4 prompts hold the text of a control token, which becomes that token; first p.jsonl, line 7"
    said = notes("qwen3", tokenizers, prompt("plain"), system_prompt="be <|im_end|> brief")
    assert said == "model.data.system_prompt holds the text of a control token, which becomes that token"


def test_a_teacher_with_another_template_is_named(tokenizers: dict[str, Any], tmp_path: Path) -> None:
    said = notes("qwen3", tokenizers, prompt("hi", line=4), teachers=tokenizers["qwen2.5"])
    assert "the teacher's own template writes" in said and "system\\nYou are Qwen" in said
    assert said.endswith("first in p.jsonl, line 4")
    system = notes("qwen3", tokenizers, prompt("hi"), teachers=tokenizers["qwen2.5"], system_prompt="S")
    assert system == ""
    refusing = notes("qwen3", tokenizers, prompt("a", ("user", "b")), teachers=tokenizers["llama2"])
    assert "the teacher's own template does not take these prompts" in refusing


def test_a_missing_beginning_and_a_turn_without_end_are_said(tokenizers: dict[str, Any], tmp_path: Path) -> None:
    llama, said = tokenizers["llama3"], notes("llama3", tokenizers, prompt("hi"), chat_template=False)
    assert said == "prompts begin without <|begin_of_text|>, which the tokenizer puts before plain text"
    assert notes("llama3", tokenizers, prompt("hi", ids=(llama.bos_token_id,)), chat_template=False) == ""
    said = notes("qwen2.5", tokenizers, prompt("hi"), ends=[0])
    (tmp_path / "t.jinja").write_text("{{ messages[0].content }}")  # no place for an answer
    bare = notes("qwen2.5", tokenizers, prompt("hi"), ends=[0], chat_template=str(tmp_path / "t.jinja"))
    assert "ends the assistant's turn" not in bare
    assert said.startswith("ends the assistant's turn with '<|im_end|>\\n', which has no end token: see model")


def test_reasoning_of_earlier_turns_is_the_templates_business(tokenizers: dict[str, Any]) -> None:
    talk = prompt("a", ("assistant", "<think>b</think>c"), ("user", "d"))
    text = Template().render(talk, tokenizers["r1-qwen"])
    assert "<think>b" not in text and text.endswith("<think>\n") and ">c<" in text


QWENS = (  # as Qwen's own: what is of another role is not written
    "{% for m in messages if m.role in ('user', 'assistant') %}<|im_start|>{{ m.role }}\n{{ m.content | trim | upper }}"
    "<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)


def test_turns_that_the_template_leaves_out_are_refused_or_counted(tokenizers: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text(QWENS)
    (tmp_path / "wrong.jinja").write_text("{% for m in messages %}<|im_start|>{{ m.text }}<|im_end|>{% endfor %}")
    told = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": ' say  "hi" '}]
    path = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "what  now"}, {"messages": told}])

    def load(records: Path, file: str, **keys: Any) -> list[str]:
        form = template(chat_template=str(tmp_path / file), **keys)
        found = load_prompts(records, tokenizers["qwen3"], max_prompt_tokens=99, template=form)
        return [line for _, line in found.notes]

    left_out = "prompts have turns that the chat template leaves out (first: "
    assert load(path, "t.jinja") == [f"1 of 2 {left_out}{path}, line 2)"]
    assert load(path, "t.jinja", system_prompt="Think.") == [f"2 of 2 {left_out}{path}, line 1)"]
    strange = [{"prompt": "hello"}, {"messages": [{"role": "Narrator", "content": "how are you"}]}]
    other = write_jsonl(tmp_path / "strange.jsonl", strange)
    with pytest.raises(PromptError, match=r"line 2: the chat template leaves out the last turn \('Narrator', 'how are"):
        load(other, "t.jinja")
    with pytest.raises(
        PromptError, match=r"line 1: the chat template leaves out the last turn \('user', 'what  now'\)"
    ):
        load(path, "wrong.jinja")


def test_what_the_template_does_not_read_is_said(tokenizers: dict[str, Any]) -> None:
    qwen = tokenizers["qwen3"]
    template(chat_template_kwargs={"enable_thinking": False}).check(qwen)
    for name in ("enable_thinkin", "padding", "continue_final_message"):
        with pytest.raises(ConfigError, match=rf"chat_template_kwargs = '{name}': the chat template does not read it"):
            template(chat_template_kwargs={name: True}).check(qwen)
    with pytest.raises(ConfigError, match="'strftime_now': is set by the program"):
        template(chat_template_kwargs={"strftime_now": "%d"})
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}], "reasoning": "b"}
    talk = Prompt("a", "b", (*prompt("hi").messages, call), None, (1,), "p.jsonl, line 8", tools=({"name": "f"},))
    said = notes("qwen3", tokenizers, prompt("hi"), talk).splitlines()
    assert said == [
        f"does not write the {n} that 1 prompts have; first p.jsonl, line 8" for n in ("tool_calls", "reasoning")
    ]
    assert "does not write the tools that 1" in notes("qwen2.5", tokenizers, talk)
