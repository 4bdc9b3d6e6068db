"""The models of an evaluation: where their weights are, and how questions become tokens."""

import hashlib
import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from nemo_tropd.config import ConfigError
from nemo_tropd.config_data import DataConfig
from nemo_tropd.convert.families import ConversionError, ModelShape, read_shape
from nemo_tropd.convert.fingerprint import checkpoint_fingerprint
from nemo_tropd.convert.hf_files import HfCheckpoint
from nemo_tropd.data import Prompt, Template, Vocabulary, end_tokens, load_tokenizer
from nemo_tropd.data.templates import encode
from nemo_tropd.evaluation.settings import Evaluation
from nemo_tropd.files import refusal

Convert = Callable[[Path, Path], None]  # a Megatron checkpoint -> a Hugging Face folder that is not there yet
_STEP = re.compile(r"step_\d{8}")
_WANTED = "give a Hugging Face folder, a run's directory or a Megatron checkpoint"


@dataclass(frozen=True)
class Model:
    """One model, ready to be asked."""

    key: str  # of the setting that named it
    label: str
    folder: Path
    shape: ModelShape
    tokenizer: Any
    vocab_size: int  # ids below it may be sampled
    end_ids: tuple[int, ...]
    digest: str
    template: Template

    @property
    def template_in_words(self) -> str:
        """Which template the questions are in, with a digest of its text and variables."""
        text = self.template.of_tokenizer(self.tokenizer)
        if not text:
            return "no template"
        content = [text, dict(self.template.kwargs), self.template.system_prompt, self.template.day]
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]
        extras = "".join(f" {k}={v}" for k, v in self.template.kwargs.items())
        system = ", with a system prompt" if self.template.system_prompt else ""
        return f"{'own' if self.template.text is True else 'given'} template {digest}{extras}{system}"

    def prompts(self, texts: Sequence[str], where: str) -> list[list[int]]:
        """Token ids of users' turns, opening of the answer included. Raises PromptError."""
        asked = [self._prompt(text, f"{where}, question {i}") for i, text in enumerate(dict.fromkeys(texts))]
        ids = dict(zip(dict.fromkeys(texts), encode(asked, self.tokenizer, self.template), strict=True))
        return [ids[text] for text in texts]

    @cached_property
    def thinks_at_once(self) -> bool:
        """Whether the template itself opens a thought, which the answer then only closes."""
        opened = self.template.render(self._prompt("a", self.label), self.tokenizer).rpartition("<think>")
        return bool(opened[1]) and "</think>" not in opened[2]

    def text(self, ids: Sequence[int], finished: bool) -> str:
        """An answer's text, without the token that ended it; thoughts and their marks stay."""
        return str(self.tokenizer.decode(list(ids[:-1] if finished and ids[-1] in self.end_ids else ids)))

    @staticmethod
    def _prompt(text: str, where: str) -> Prompt:
        return Prompt("", text, ({"role": "user", "content": text},), None, (), where)


def load_models(e: Evaluation, convert: Convert) -> list[Model]:
    """The model and those it is compared with. Raises ConfigError, ConversionError or PromptError."""
    given = [("model", str(e.model)), *(("compare", str(path)) for path in e.compare)]
    found = [(key, path, *_find(key, Path(os.path.expanduser(path)))) for key, path in given]
    labels = [_label(Path(path)) for _, path, *_ in found]
    labels = [label if labels.count(label) == 1 else path for label, (_, path, *_) in zip(labels, found, strict=True)]
    if twice := next((path for path in labels if labels.count(path) > 1), None):
        raise ConfigError("compare", twice, "is there twice: name each model once")
    return [
        _load(e, key, label, _as_hf(folder, is_hf, Path(e.out) / "models", convert))
        for (key, _, folder, is_hf), label in zip(found, labels, strict=True)
    ]


def _find(key: str, path: Path) -> tuple[Path, bool]:
    """The folder with the weights, and whether it is Hugging Face's (else Megatron's)."""
    if why := refusal(path):
        raise ConfigError(key, str(path), why)
    if not path.is_dir():
        raise ConfigError(key, str(path), f"no such directory; {_WANTED}")
    steps = sorted(p for p in (path / "checkpoints").glob("step_*") if _STEP.fullmatch(p.name))
    # A Megatron checkpoint has an hf/, too, without weights: it is looked at before a run's.
    for folder, mark in ((path, "config.json"), (path, ".metadata"), (path / "hf", "config.json")):
        if (folder / mark).is_file():
            return folder, mark == "config.json"
    for folder in reversed(steps):
        if (folder / ".metadata").is_file():
            return folder, False
    raise ConfigError(key, str(path), f"has neither config.json, hf/, checkpoints/ nor .metadata; {_WANTED}")


def _label(path: Path) -> str:
    """A run's or folder's own name."""
    path = path.absolute()
    if path.name == "hf":
        return path.parent.name
    return f"{path.parents[1].name}-{path.name}" if _STEP.fullmatch(path.name) else path.name


def _as_hf(folder: Path, is_hf: bool, cache: Path, convert: Convert) -> Path:
    if is_hf:
        return folder
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    marks = [[str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns] for p in files]
    out = cache / hashlib.sha256(json.dumps(marks).encode()).hexdigest()[:16]
    if not out.is_dir():
        print(f"converting {folder} into {out}", flush=True)
        convert(folder, out)
    return out


def _load(e: Evaluation, key: str, label: str, folder: Path) -> Model:
    try:
        shape = read_shape(folder)
        HfCheckpoint(folder, shape)  # reads headers alone
        shape.check_layout(e.tensor_model_parallel_size, 1)
        tokenizer = load_tokenizer(folder, key)
        data = DataConfig(
            chat_template=e.chat_template,
            chat_template_kwargs=e.chat_template_kwargs,
            system_prompt=e.system_prompt,
            template_date=e.template_date,
        )
        template = Template.of(data)
        if template.text is True and not getattr(tokenizer, "chat_template", None):
            why = "the tokenizer has no chat template: set chat_template to a file, or to false for a base model"
            raise ConfigError(key, str(folder), why)
        vocabulary = Vocabulary.shared(tokenizer, tokenizer, (shape.vocab_size,) * 2, str(folder))
        ends, _ = end_tokens(vocabulary, (folder, folder), e.end_tokens)
        digest = checkpoint_fingerprint(folder, Path(e.out) / "fingerprints.json")
    except (ConversionError, OSError) as error:
        raise ConfigError(key, str(folder), str(error)) from error
    except ConfigError as error:  # of a run's keys, which are ours without their sections
        own, remedy = (re.sub(r"\bmodel\.(data|rollout)\.", "", part) for part in (error.key, error.remedy))
        raise ConfigError(key if "." in own else own, error.value, remedy) from error
    return Model(key, label, folder, shape, tokenizer, vocabulary.size, ends, digest, template)


def check_lengths(model: Model, prompts: Sequence[Sequence[int]], max_new_tokens: int, key: str) -> int:
    """Tokens of the longest prompt with its answer. Raises ConfigError if the model takes no such sequences."""
    longest, (most, why) = max(map(len, prompts)), model.shape.longest()
    if longest + max_new_tokens > most:
        what = f"with the longest prompt of {longest} tokens it exceeds {why}, of {model.label}"
        raise ConfigError(key, max_new_tokens, f"{what}; at most {most - longest}")
    return longest + max_new_tokens
