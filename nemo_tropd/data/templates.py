"""Conversations as text and token ids, by a chat template that writes the same on every day, restart and rank."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from jinja2 import TemplateSyntaxError

from nemo_tropd.config import ConfigError
from nemo_tropd.config_data import DataConfig
from nemo_tropd.data.conversations import Prompt, Tally
from nemo_tropd.data.sources import PromptError
from nemo_tropd.data.tokenizer import ids_of

# Arguments of transformers' apply_chat_template, which a template never sees.
_TAKEN = {
    *("conversation", "messages", "tools", "chat_template", "add_generation_prompt", "tokenize", "return_dict"),
    "strftime_now",
}
_CHANGED = ("assistant", "tool", "function", "ipython")  # roles whose content templates cut, or write as JSON
# What a record may have that only some templates write.
_SOME = ("tools", "tool_calls", "reasoning_content", "reasoning", "thinking")
_ANSWER = "an answer"


@dataclass(frozen=True)
class Template:
    """How a conversation becomes text. ``text``: True is the tokenizer's own template, False none: the prompt's text
    alone; else Jinja. ``kwargs`` are handed to the template, ``system_prompt`` is put first if there is none, and
    ``day`` is what the template takes for today."""

    text: str | bool = True
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    system_prompt: str | None = None
    day: str = "2024-07-26"
    file: str | None = None  # that the text is from

    @classmethod
    def of(cls, data: DataConfig) -> "Template":
        """The template that the keys of ``model.data`` name. Raises ConfigError."""
        text, key, file = data.chat_template, "model.data.chat_template", None
        if isinstance(text, str):
            file = text
            try:
                text = Path(os.path.expanduser(text)).read_text(encoding="utf-8")
            except (OSError, ValueError) as error:
                raise ConfigError(
                    key, data.chat_template, f"cannot be read ({error}): give a file, true or false"
                ) from error
        kwargs = dict(data.chat_template_kwargs)
        if taken := sorted(_TAKEN & kwargs.keys()):
            raise ConfigError(f"{key}_kwargs", taken[0], "is set by the program: give variables of the template alone")
        for name, value in ((f"{key}_kwargs", kwargs), ("model.data.system_prompt", data.system_prompt)):
            if value and text is False:
                raise ConfigError(name, value, f"needs a template: set {key} to true or to a file, or leave this out")
        return cls(text, kwargs, data.system_prompt, data.template_date, file)

    def check(self, tokenizer: Any) -> None:
        """ConfigError for a template that is no Jinja, and for a variable that it does not read."""
        self._check_syntax(tokenizer)
        text, key = self.of_tokenizer(tokenizer), "model.data.chat_template_kwargs"
        for name in self.kwargs if text else ():
            if not re.search(rf"\b{re.escape(name)}\b", text):
                raise ConfigError(key, name, "the chat template does not read it, so it would change nothing")

    def _check_syntax(self, tokenizer: Any) -> None:
        """Else each prompt would be blamed."""
        try:
            one = [{"role": "user", "content": "a"}]
            tokenizer.apply_chat_template(one, chat_template=None if self.file is None else self.text, tokenize=False)
        except TemplateSyntaxError as error:
            where = self.file or True
            why = f"line {error.lineno} of the template is no Jinja ({error.message}): correct it, or give another file"
            raise ConfigError("model.data.chat_template", where, why) from error
        except Exception:  # it takes no such conversation, or is none: said of a prompt
            return

    def of_tokenizer(self, tokenizer: Any) -> str:
        """The Jinja text in use; "" for none."""
        own = self.text if self.text is not True else getattr(tokenizer, "chat_template", None)
        return "\n".join(map(str, own.values())) if isinstance(own, Mapping) else str(own or "")

    def _turns(self, prompt: Prompt) -> list[Mapping[str, Any]]:
        missing = self.system_prompt is not None and prompt.messages[0]["role"] not in ("system", "developer")
        return [*[{"role": "system", "content": self.system_prompt}] * missing, *prompt.messages]

    def left_out(self, prompt: Prompt, text: str) -> list[Mapping[str, Any]]:
        """The turns of the user and the system that are not in the rendered ``text``. One is there if its longest word
        is: templates may change spaces and cases, and quote."""
        whole = text.casefold()
        return [t for t in self._turns(prompt) if t["role"] not in _CHANGED and _longest(t["content"]) not in whole]

    def render(self, prompt: Prompt, tokenizer: Any) -> str:
        """The prompt's text, with the opening of the assistant's turn. Raises PromptError, which names its line."""
        messages = [dict(turn) for turn in self._turns(prompt)]
        if self.text is False:
            if len(messages) > 1 or messages[0]["role"] != "user":
                remedy = "give a string, or set model.data.chat_template to true or to a file"
                raise PromptError(f"{prompt.where}: a conversation of {len(messages)} turns needs a template: {remedy}")
            return str(messages[0]["content"])
        try:
            return str(
                tokenizer.apply_chat_template(
                    messages,
                    tools=list(prompt.tools) or None,
                    chat_template=None if self.text is True else self.text,
                    add_generation_prompt=True,
                    tokenize=False,
                    **{"strftime_now": date.fromisoformat(self.day).strftime, **self.kwargs},
                )
            )
        except Exception as error:  # a template is code from the model's authors, and raises anything
            what = str(error).strip() or type(error).__name__
            raise PromptError(f"{prompt.where}: the chat template refuses the prompt: {what}") from error


def encode(
    prompts: Sequence[Prompt], tokenizer: Any, template: Template, tally: Tally | None = None
) -> list[list[int]]:
    """Token ids of each prompt, template included; ``tally`` counts "unsaid" ones, of which the template leaves out a
    turn. Raises PromptError, which names the line."""
    texts = [template.render(prompt, tokenizer) for prompt in prompts]
    for prompt, text in zip(prompts, texts, strict=True):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            what = f"half of a surrogate pair ({error.object[error.start]!r}) is no text"
            raise PromptError(f"{prompt.where}: {what}: remove it, or replace it by the character it was") from error
    encoded = _encoded(prompts, texts, tokenizer)
    for prompt, text, ids in zip(prompts, texts, encoded, strict=True):
        if not ids:
            raise PromptError(f"{prompt.where}: the prompt has no tokens after the chat template: it must have one")
        lost = template.left_out(prompt, text)
        if lost and lost[-1] is prompt.messages[-1]:
            what = f"{lost[-1]['role']!r}, {lost[-1]['content'][:40]!r}"
            remedy = "name the roles as it does, or choose another template (model.data.chat_template)"
            raise PromptError(f"{prompt.where}: the chat template leaves out the last turn ({what}): {remedy}")
        if lost and tally is not None:
            tally.add("unsaid", prompt.where)
    return encoded


def _encoded(prompts: Sequence[Prompt], texts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    try:
        return ids_of(tokenizer, texts)
    except Exception as error:  # the library's errors have no type of their own
        if len(prompts) > 1:  # one by one, to name the line
            return [_encoded([p], [text], tokenizer)[0] for p, text in zip(prompts, texts, strict=True)]
        raise PromptError(f"{prompts[0].where}: the tokenizer cannot encode the prompt: {error}") from error


def _longest(text: str | None) -> str:
    return max(re.findall(r"\w+", text or ""), key=len, default="").casefold()


def template_notes(
    template: Template, prompts: Sequence[Prompt], tokenizer: Any, teachers: Any, end_ids: Sequence[int]
) -> list[tuple[str, str]]:
    """Lines for the plan: what a template does that a user may not expect, and what texts do to it, a teacher's own
    texts too."""
    text, lines = template.of_tokenizer(tokenizer), []
    if "strftime_now" in text:
        lines.append(f"writes a date, which is {template.day} on every day: model.data.template_date")
    if template.text is not False and (other := _otherwise(template, prompts, tokenizer, teachers)):
        lines.append(other)
    bos = tokenizer.bos_token_id
    if bos is not None and bos in tokenizer("a")["input_ids"][:1] and prompts[0].token_ids[0] != bos:
        lines.append(f"prompts begin without {tokenizer.bos_token}, which the tokenizer puts before plain text")
    if text and (last := _last_tokens(template, tokenizer)) and not set(last) & set(end_ids):
        turn = f"ends the assistant's turn with {tokenizer.decode(last)!r}"
        lines.append(f"{turn}, which has no end token: see model.rollout.end_tokens")
    for name in _SOME:
        holders = [p for p in prompts if (p.tools if name == "tools" else any(turn.get(name) for turn in _read(p)))]
        if holders and not re.search(rf"\b{name}\b", text):
            lines.append(f"does not write the {name} that {len(holders)} prompts have; first {holders[0].where}")
    known = [re.escape(t) for t in map(str, tokenizer.added_tokens_decoder.values()) if t.strip()]
    control = re.compile("|".join(sorted(known, key=len, reverse=True)) or r"(?!)")
    held = [p for p in prompts if any(_user_text(turn, control) for turn in _read(p))]
    if held:
        what = f"{len(held)} of {len(prompts)} prompts hold the text of a control token, which becomes that token"
        lines.append(f"{what}; first {held[0].where}")
    if control.search(template.system_prompt or ""):
        lines.append("model.data.system_prompt holds the text of a control token, which becomes that token")
    return [("template", line) for line in lines]


def _read(prompt: Prompt) -> tuple[Mapping[str, Any], ...]:
    """The turns that the student or the teacher reads."""
    return (*prompt.messages, *prompt.told)


def _user_text(turn: Mapping[str, Any], control: re.Pattern[str]) -> bool:
    return turn["role"] != "assistant" and bool(control.search(str(turn.get("content"))))


def _otherwise(template: Template, prompts: Sequence[Prompt], tokenizer: Any, teachers: Any) -> str:
    """How the teacher's own template renders the first prompts, if otherwise."""
    if not getattr(teachers, "chat_template", None):
        return ""
    theirs = Template(True, template.kwargs, template.system_prompt, template.day)
    for prompt in prompts[:8]:
        used = template.render(prompt, tokenizer)
        try:
            other = theirs.render(prompt, teachers)
        except PromptError as error:
            return f"the teacher's own template does not take these prompts: {error}"
        if used != other:
            same = [a == b for a, b in zip(used, other, strict=False)]
            at = max((same.index(False) if False in same else len(same)) - 10, 0)
            instead, ours = other[at : at + 60], used[at : at + 60]
            return f"the teacher's own template writes {instead!r} where {ours!r} is used, first in {prompt.where}"
    return ""


def _last_tokens(template: Template, tokenizer: Any) -> list[int]:
    """The last tokens of a finished answer."""
    talk = ({"role": "user", "content": "a"}, {"role": "assistant", "content": _ANSWER})
    try:
        text = tokenizer.apply_chat_template(
            list(talk),
            chat_template=None if template.text is True else template.text,
            tokenize=False,
            **template.kwargs,
        )
    except Exception:  # it takes no such conversation
        return []
    return ids_of(tokenizer, [text.rpartition(_ANSWER)[2]])[0][:4] if _ANSWER in text else []
