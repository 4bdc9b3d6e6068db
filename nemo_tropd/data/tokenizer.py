"""One tokenizer for student, teacher, data and report: the ids are those of the folder's own tokenizer.json. No torch.

transformers chooses a class by a folder's labels, and some classes build the stages anew instead of reading them: a
byte-level tokenizer labelled LlamaTokenizerFast, as DeepSeek-R1-Distill's is, loses every space that way.
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemo_tropd.config import ConfigError
from nemo_tropd.data.conversations import Prompt
from nemo_tropd.data.sources import PromptError

STUDENT, TEACHER, END = "pretrained_checkpoint.restore_from_path", "model.teacher.path", "model.rollout.end_tokens"
PROBES = (
    "Hello world, how are you?",
    "  two spaces,\ta tab\n\nand line  breaks \r\n",
    "1234567890 3.14159 x=1e-7",
    "caf\u00e9 cafe\u0301 \u00c5 A\u030a \ufb01 \u0e01\u0e33",
    "\u65e5\u672c\u8a9e \u4e2d\u6587 \ud55c\uad6d\uc5b4",
    "\U0001f642 \U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea",
)
_SHOWN = 3
_RESERVED = re.compile(r"reserved|unused|placeholder|(\b|_)pad(\b|_|\d)", re.IGNORECASE)


def load_tokenizer(folder: Path, key: str) -> Any:
    """The tokenizer of a Hugging Face folder, with exactly the ids of its tokenizer.json; without that file, as
    transformers converts it. Raises ConfigError for ``key`` if there is none, or its ids are not those of the file."""
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    file = folder / "tokenizer.json"
    try:
        if not file.is_file():
            made = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            if (
                str(made.decode(ids_of(made, PROBES[:1])[0])).strip() != PROBES[0]
            ):  # made of nothing, or by a wrong label
                raise ValueError(f"there is no tokenizer.json, and by its other files {PROBES[0]!r} is not readable")
            return made
        made = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        stored = Tokenizer.from_file(str(file))
        stored.no_truncation()
        stored.no_padding()
        texts = [*PROBES, *_with_added(made)]
        encoded = [(ids_of(made, [text])[0], stored.encode(text, add_special_tokens=False).ids) for text in texts]
    except Exception as error:  # the library's errors have no type of their own
        remedy = "complete the folder with the tokenizer's files (git lfs pull, if they are pointers)"
        raise ConfigError(key, str(folder), f"its tokenizer cannot be read ({_line(error)}): {remedy}") from error
    if dropped := getattr(stored.model, "dropout", None):
        why = f"tokenizer.json has a dropout of {dropped:g}: the same text would have other tokens each time; set it to"
        raise ConfigError(key, str(folder), f"{why} null")
    for text, (ours, wanted) in zip(texts, encoded, strict=True):
        if ours != wanted:
            why = f"tokenizer_config.json changes what tokenizer.json says: {text!r} becomes {ours}, and by the file"
            raise ConfigError(key, str(folder), f"{why} {wanted}; make both name the same tokens")
    return made


def check_config(folder: Path, key: str) -> None:
    """ConfigError for a config.json that transformers' own class, by which the engine reads it, does not take."""
    from transformers import AutoConfig

    try:
        AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever a class makes of its keys
        why = f"transformers, and so vLLM, cannot load its config.json: {' '.join(str(error).split())[:300]}"
        raise ConfigError(key, str(folder), why) from error


def ids_of(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, nothing added."""
    encoded = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)
    return [list(ids) for ids in encoded["input_ids"]]


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text of each token, with the space that decoders take off the beginning of a text."""
    anchor = ids_of(tokenizer, ["a"])[0][-1:]
    start = len(tokenizer.decode(anchor))
    return [tokenizer.decode([*anchor, i])[start:] for i in ids]


def labelled_otherwise(folder: Path, tokenizer: Any) -> list[tuple[str, str]]:
    """A line for the plan if transformers' AutoTokenizer, which engines and other programs use, reads other ids from
    the folder than ``tokenizer`` has."""
    from transformers import AutoTokenizer

    if not (folder / "tokenizer.json").is_file():
        return [("tokenizer", f"{folder} has no tokenizer.json: its other files, converted by transformers")]
    try:
        theirs = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        texts = (*PROBES, *_with_added(tokenizer))
        found = next((t for t in texts if ids_of(theirs, [t]) != ids_of(tokenizer, [t])), None)
        if found is None:
            return []
        how = f"reads {found!r} as {theirs.decode(ids_of(theirs, [found])[0])!r}"
    except Exception as error:  # whatever a folder's own labels lead to
        how = f"cannot load it ({_line(error)})"
    remedy = "set tokenizer_class to PreTrainedTokenizerFast in the exported tokenizer_config.json before serving it"
    return [("tokenizer", f"by tokenizer.json; transformers' AutoTokenizer {how}: {remedy}")]


@dataclass(frozen=True)
class Vocabulary:
    """The ids that student and teacher share."""

    tokenizer: Any  # the student's
    teachers: Any
    size: int  # ids below it may be sampled and are scored; both models have a row for each
    renamed: dict[int, tuple[str, str]] = field(default_factory=dict)  # below size: the student's and teacher's names
    notes: tuple[tuple[str, str], ...] = ()

    @classmethod
    def shared(cls, student: Any, teacher: Any, rows: tuple[int, int], teacher_path: str) -> "Vocabulary":
        """Compare two tokenizers; ``rows``: of the student's and the teacher's embedding. Added tokens may be named
        otherwise, or be there in one of them alone; :meth:`check` sees whether they occur. ConfigError if ordinary text
        could become other ids, or an id without a row."""
        mine, theirs = ({i: t for t, i in tokenizer.get_vocab().items()} for tokenizer in (student, teacher))
        other = {i: (mine.get(i, ""), theirs.get(i, "")) for i in sorted(mine | theirs) if mine.get(i) != theirs.get(i)}
        added = [tokenizer.added_tokens_decoder.keys() for tokenizer in (student, teacher)]
        ordinary = [
            i for i, names in other.items() if any(n and i not in of for n, of in zip(names, added, strict=True))
        ]
        if ordinary:
            shown = "; ".join(f"{i}: student {other[i][0]!r}, teacher {other[i][1]!r}" for i in ordinary[:_SHOWN])
            raise ConfigError(
                TEACHER,
                teacher_path,
                f"its tokenizer differs from the student's in {len(ordinary)} tokens of ordinary text ({shown}); "
                "distillation by token needs one vocabulary: choose a teacher of the student's family and generation",
            )
        for key, names, of, have in zip((STUDENT, TEACHER), (mine, theirs), added, rows, strict=True):
            if lost := sorted(i for i in names if i >= have and i not in of):
                few = f"the model has fewer rows than its tokenizer has tokens: {names[lost[0]]!r} is {lost[0]}"
                raise ConfigError(key, have, f"{few}; give a folder whose tokenizer and weights belong together")
        size = min(max(mine) + 1, max(theirs) + 1, *rows)
        renamed = {i: names for i, names in other.items() if i < size}
        beyond = [t for i, t in sorted((mine | theirs).items()) if i >= size]
        notes = []
        if beyond:
            notes.append(f"{_few(beyond)} past the {size} ids that both models and tokenizers have: never sampled")
        if renamed:
            pairs = [f"{a or 'none'} / {b or 'none'} ({i})" for i, (a, b) in renamed.items()]
            notes.append(f"{_few(pairs)}: other names of the student / the teacher, which occur in no prompt")
        return cls(student, teacher, size, renamed, tuple(("vocabulary", note) for note in notes))

    def check(self, prompts: Iterable[Prompt], template: str = "", end_ids: Sequence[int] = ()) -> None:
        """PromptError for a prompt with a token that means something else to the teacher or that it has not got;
        ConfigError if ``template`` writes such a token, if one of ``end_ids`` is one, or if responses can hold it: of
        added tokens, models write those that are neither special nor reserved."""
        remedy = "choose a template without it (model.data.chat_template), or models with one tokenizer"
        teacher = getattr(self.teachers, "name_or_path", "")
        for i, (mine, theirs) in self.renamed.items():
            if mine and mine in template:
                why = f"its tokenizer has {theirs!r} for {i}, which the chat template knows as {mine!r}"
                raise ConfigError(TEACHER, teacher, f"{why}: {remedy}")
        for i, names in self.renamed.items():
            if i >= self.size:  # of all teachers
                break
            two = f"{i} is the student's {names[0]!r} and the teacher's {names[1]!r}"
            if i in end_ids:
                how = "give those that both know by one name in model.rollout.end_tokens"
                raise ConfigError(TEACHER, teacher, f"{two}, and ends a response: {how}, or choose another teacher")
            for name, tokenizer in zip(names, (self.tokenizer, self.teachers), strict=True):
                if _is_written(name, tokenizer):
                    why = f"{two}, and responses can hold {name!r}, which would be scored as another token"
                    raise ConfigError(TEACHER, teacher, f"{why}: choose a teacher with the student's tokenizer")
        for prompt in prompts:
            if max(prompt.token_ids) >= self.size or not self.renamed.keys().isdisjoint(prompt.token_ids):
                token = next(i for i in prompt.token_ids if i >= self.size or i in self.renamed)
                theirs = self.renamed.get(token, ("", ""))[1]
                means = f"which the teacher knows as {theirs!r}" if theirs else "which the two models do not share"
                text = self.tokenizer.convert_ids_to_tokens(token)
                raise PromptError(f"{prompt.where}: the prompt has the token {text!r} ({token}), {means}: {remedy}")

    def check_splits(self, texts: Sequence[str], where: Sequence[str]) -> list[tuple[str, str]]:
        """ConfigError if the teacher's tokenizer makes other tokens of a prompt's text; a line for the plan if it does
        of the probes alone."""
        for text, place in zip((*texts, *PROBES), (*where, *[""] * len(PROBES)), strict=True):
            ours, theirs = ids_of(self.tokenizer, [text])[0], ids_of(self.teachers, [text])[0]
            if ours == theirs:
                continue
            first = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), len(ours))
            cut = slice(max(first - 2, 0), first + 4)
            how = f"the student's tokens are {ours[cut]}, the teacher's {theirs[cut]}"
            if not place:
                return [("vocabulary", f"of {text!r} {how}: the teacher knows such text by other tokens")]
            part = self.tokenizer.decode(ours[cut])
            remedy = "choose a teacher with the student's tokenizer"
            raise ConfigError(
                TEACHER, getattr(self.teachers, "name_or_path", ""), f"of {part!r} in {place} {how}: {remedy}"
            )
        return []


def end_tokens(
    vocabulary: Vocabulary, folders: tuple[Path, Path], given: Sequence[str | int]
) -> tuple[tuple[int, ...], list[tuple[str, str]]]:
    """The ids that end a response, ascending, and a line for the plan: ``given`` (texts or ids of the student's
    tokenizer), else all that the config files and tokenizers of student and teacher name. Raises ConfigError."""
    tokens, size = vocabulary.tokenizer, vocabulary.size
    names = tokens.get_vocab()
    for token in given:
        found = names.get(token) if isinstance(token, str) else token
        if found is None or found >= size:
            known = ", ".join(tokens.all_special_tokens)
            raise ConfigError(
                END, token, f"is no token that the models share: give one or its id (special are {known})"
            )
    named = [
        {i for i in _named_ends(folder, key, of) if i >= 0}  # -1 is some programs' none
        for folder, key, of in zip(folders, (STUDENT, TEACHER), (tokens, vocabulary.teachers), strict=True)
    ]
    own = [{i for i in ids if i < size} for ids in named]
    ids = {names[t] if isinstance(t, str) else t for t in given} or own[0] | own[1]
    if not ids:
        why = (
            "neither model's config.json, generation_config.json or tokenizer names an end token, so no response would"
        )
        raise ConfigError(END, [], f"{why} ever end: give the token that ends an answer, such as '[\"<|im_end|>\"]'")
    line = _tokens(tokens, ids)
    if own[0] != own[1] and not given:
        line += f"; the student's files name {_tokens(tokens, own[0])}, the teacher's {_tokens(tokens, own[1])}"
    elif missing := (own[0] | own[1]) - ids:
        line += f", by {END}; not {_tokens(tokens, missing)}, which the models' files name"
    if lost := sorted((named[0] | named[1]) - own[0] - own[1]):
        line += f"; the models' files name {_few(list(map(str, lost)))}, too, which is no token that both have"
    return tuple(sorted(ids)), [("end tokens", line)]


def _named_ends(folder: Path, key: str, tokenizer: Any) -> set[int]:
    found = {tokenizer.eos_token_id} - {None}
    for file in (folder / "config.json", folder / "generation_config.json"):
        try:
            value = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id") if file.is_file() else None
        except (ValueError, AttributeError, OSError, RecursionError) as error:
            raise ConfigError(key, str(file), f"cannot be read ({_line(error)}): restore or remove it") from error
        values = value if isinstance(value, list) else [] if value is None else [value]
        if any(not isinstance(i, int) or isinstance(i, bool) for i in values):
            raise ConfigError(key, str(file), f"eos_token_id is {value!r}: give an id, a list of ids or null")
        found |= set(values)
    return found


def _is_written(name: str, tokenizer: Any) -> bool:
    """Whether a model may have learned to write an added token: one of thoughts, tools or roles, say."""
    known = {str(t): t.special for t in tokenizer.added_tokens_decoder.values()}
    return bool(name) and not (known.get(name) or name in tokenizer.all_special_tokens or _RESERVED.search(name))


def _with_added(tokenizer: Any) -> list[str]:
    return [f"a {token} b{token}" for token in map(str, tokenizer.added_tokens_decoder.values())]


def _tokens(tokenizer: Any, ids: Iterable[int]) -> str:
    return ", ".join(f"{tokenizer.convert_ids_to_tokens(i)} {i}" for i in sorted(ids)) or "none"


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
