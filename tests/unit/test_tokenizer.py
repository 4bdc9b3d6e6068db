"""One tokenizer: its ids are those of tokenizer.json whatever the labels say, and student and teacher share them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from nemo_tropd.config import ConfigError
from nemo_tropd.data import Prompt, PromptError, Vocabulary, end_tokens, labelled_otherwise, load_tokenizer, token_texts
from nemo_tropd.data.templates import Template, encode
from nemo_tropd.data.tokenizer import PROBES, ids_of
from tests.zoo.makers import CHECKPOINTS, PAIRS
from tests.zoo.tokenizers import SHAPES, write_tokenizer

pytestmark = pytest.mark.random
EACH = 10_000 // len(SHAPES) + 1
ALPHABET = [
    *"abcdeHW  \t\n\r.,0123456789'\"-_<>|/",
    *("\u00e9", "e\u0301", "\u0301", "\u00c5", "\ufb01", "\u0e01\u0e33", "\u65e5\u672c", "\ud55c", "\u2581", "\u0120"),
    *("\U0001f642", "\u200d", "\U0001f1e9", "\u00a0", "\u3000", "\ufeff", "\x00", " Hello", " world", "\n\n"),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("shapes")
    return {kind: make(root / kind, kind) for kind in SHAPES}


def make(folder: Path, kind: str, end: Any = None, **config: Any) -> Path:
    size = write_tokenizer(folder, kind, **config)
    model = {"model_type": SHAPES[kind].model_type, "vocab_size": size, "eos_token_id": end}
    (folder / "config.json").write_text(json.dumps(model))
    return folder


def load(folder: Path) -> Any:
    return load_tokenizer(folder, "model.teacher.path")


def stored(folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def size_of(folder: Path) -> int:
    return int(stored(folder).get_vocab_size())


def shared(student: Path, teacher: Path, rows: tuple[int, int] = (10**6, 10**6)) -> Vocabulary:
    return Vocabulary.shared(load(student), load(teacher), rows, str(teacher))


def prompt(*ids: int) -> Prompt:
    return Prompt("a", "a", ({"role": "user", "content": "a"},), None, ids, "p.jsonl, line 3")


def test_ids_are_those_of_tokenizer_json_on_random_strings(folders: dict[str, Path]) -> None:
    for kind, folder in folders.items():
        ours, file = load(folder), stored(folder)
        tokens = [*SHAPES[kind].added, "<s>", "</s>"]
        texts = ["".join(random.choices([*ALPHABET, *tokens], k=random.randrange(1, 24))) for _ in range(EACH)]
        wanted = [encoding.ids for encoding in file.encode_batch(texts, add_special_tokens=False)]
        assert ids_of(ours, texts) == wanted, kind


@pytest.mark.parametrize("kind", ["r1-qwen", "r1-llama"])
def test_a_byte_level_tokenizer_with_a_llama_label_keeps_its_spaces(folders: dict[str, Path], kind: str) -> None:
    folder, text = folders[kind], "Hello world, how are you e\u0301"
    ours, labelled = load(folder), AutoTokenizer.from_pretrained(folder)
    assert ours.decode(ids_of(ours, [text])[0]) == text
    assert ids_of(labelled, [text]) != ids_of(ours, [text])  # or there is nothing to see here
    ((label, line),) = labelled_otherwise(folder, ours)
    assert label == "tokenizer" and "AutoTokenizer reads" in line and "PreTrainedTokenizerFast" in line


@pytest.mark.parametrize("kind", ["qwen2.5", "qwen3", "llama3"])
def test_nothing_is_said_of_a_rightly_labelled_folder(folders: dict[str, Path], kind: str) -> None:
    assert labelled_otherwise(folders[kind], load(folders[kind])) == []


def test_a_label_that_transformers_cannot_load_is_a_line_of_the_plan(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise ValueError("Tokenizer class Such does not exist\nsecond line")

    ours = load(folders["qwen2.5"])
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", refuse)
    ((_, line),) = labelled_otherwise(folders["qwen2.5"], ours)
    assert "AutoTokenizer cannot load it (Tokenizer class Such does not exist):" in line


def test_truncation_and_padding_stored_in_the_file_are_not_used(tmp_path: Path) -> None:
    folder = make(tmp_path, "qwen2.5")
    file = stored(folder)
    file.enable_truncation(4)
    file.enable_padding(length=40)
    file.save(str(folder / "tokenizer.json"))
    ours, text = load(folder), "one two three four five six seven"
    assert ours.decode(ids_of(ours, [text])[0]) == text


def test_settings_that_contradict_the_file_are_refused_with_text_and_encodings(tmp_path: Path) -> None:
    folder = make(tmp_path, "qwen2.5", extra_special_tokens=["llo wo"])
    with pytest.raises(ConfigError, match=r"tokenizer_config\.json changes .* becomes \[.*\], and by the file \[.*\]"):
        load(folder)


@pytest.mark.parametrize("content", [None, "version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n", "{}"])
def test_a_folder_without_a_readable_tokenizer_is_named(tmp_path: Path, content: str | None) -> None:
    folder = make(tmp_path, "qwen3")
    (folder / "tokenizer.json").unlink() if content is None else (folder / "tokenizer.json").write_text(content)
    with pytest.raises(ConfigError, match=r"^model\.teacher\.path = .*tokenizer cannot be read .*git lfs pull"):
        load(folder)


def edited(folder: Path, **model: Any) -> Path:
    """``folder`` with other settings of its tokenizer.json's model."""
    content = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    content["model"].update(model)
    (folder / "tokenizer.json").write_text(json.dumps(content), "utf-8")
    return folder


def test_a_tokenizer_that_encodes_by_chance_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.teacher\.path = .*dropout of 0\.3: .*other tokens each time.*null"):
        load(edited(make(tmp_path, "qwen3"), dropout=0.3))


def test_a_tokenizer_that_knows_not_every_text_is_an_error_of_its_folder_or_of_the_line(tmp_path: Path) -> None:
    folder = make(tmp_path, "qwen3")
    words = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "<unk>"}
    content = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    (folder / "tokenizer.json").write_text(json.dumps({**content, "model": words, "added_tokens": []}))
    with pytest.raises(ConfigError, match=r"its tokenizer cannot be read \(WordLevel error: Missing \[UNK\] token"):
        load(folder)
    knows_a = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0}, unk_token="<unk>")))
    asked = [
        Prompt("1", t, ({"role": "user", "content": t},), None, (), f"p.jsonl, line {i}") for i, t in enumerate("ab")
    ]
    assert encode(asked[:1], knows_a, Template(False)) == [[0]]
    with pytest.raises(PromptError, match=r"p\.jsonl, line 1: the tokenizer cannot encode the prompt: WordLevel error"):
        encode(asked, knows_a, Template(False))


def test_tokens_of_a_report_keep_the_space_before_a_word(folders: dict[str, Path]) -> None:
    for kind, folder in folders.items():
        ours = load(folder)
        ids = ids_of(ours, ["x Hello world"])[0][1:]
        assert "".join(token_texts(ours, ids)).endswith(" Hello world"), kind


def test_extra_tokens_at_the_end_are_never_sampled(folders: dict[str, Path]) -> None:
    for student, teacher in (("qwen3", "qwen2.5"), ("qwen2.5", "qwen3")):
        found = shared(folders[student], folders[teacher])
        assert found.size == size_of(folders["qwen2.5"]) and not found.renamed
        ((_, line),) = found.notes
        assert "<tool_response>, </tool_response>, <think> and 1 more" in line and "never sampled" in line
    thinks = ids_of(shared(folders["qwen3"], folders["qwen2.5"]).tokenizer, ["a<think>"])[0]
    with pytest.raises(PromptError, match=r"p\.jsonl, line 3: the prompt has the token '<think>' .* do not share"):
        shared(folders["qwen3"], folders["qwen2.5"]).check([prompt(1), prompt(*thinks)])


def test_an_added_pad_passes_with_a_row_and_without(folders: dict[str, Path], tmp_path: Path) -> None:
    padded, plain = make(tmp_path, "llama2", more=["<|PAD_TOKEN|>"]), folders["llama2"]
    size = size_of(plain)
    for student, teacher, rows in (
        (padded, plain, (size + 9,) * 2),
        (plain, padded, (size, size)),
        (padded, padded, (size, size)),
    ):
        found = shared(student, teacher, rows)
        assert found.size == size and "<|PAD_TOKEN|> past the" in found.notes[0][1]
        found.check([prompt(0, size - 1)])
    assert shared(padded, padded, (size + 1, size + 1)).size == size + 1
    with pytest.raises(PromptError, match=r"'<\|PAD_TOKEN\|>'"):
        shared(padded, padded, (size, size)).check([prompt(1, size)])
    with pytest.raises(ConfigError, match=rf"^model\.teacher\.path = {size - 5}: the model has fewer rows"):
        shared(plain, plain, (size, size - 5))


def renamed(folder: Path, kind: str, old: str, new: str) -> Path:
    make(folder, kind)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(f'"{old}"', f'"{new}"'))
    return folder


def test_a_renamed_reserved_token_passes_unless_it_occurs(folders: dict[str, Path], tmp_path: Path) -> None:
    other = renamed(tmp_path, "llama3", "<|reserved_special_token_5|>", "<|mine|>")
    found = shared(other, folders["llama3"])
    ((token, names),) = found.renamed.items()
    assert names == ("<|mine|>", "<|reserved_special_token_5|>") and found.size == size_of(other)
    assert f"<|mine|> / <|reserved_special_token_5|> ({token})" in found.notes[0][1]
    found.check([prompt(1, 2)], "{{ messages }}")
    with pytest.raises(PromptError, match=r"'<\|mine\|>' \(\d+\), which the teacher knows as '<\|reserved_special"):
        found.check([prompt(1), prompt(1, token)])
    with pytest.raises(ConfigError, match=r"model\.teacher\.path.*the chat template knows as '<\|mine\|>'"):
        found.check([prompt(1)], "x <|mine|>")


def test_a_token_that_responses_hold_may_not_mean_something_else(folders: dict[str, Path], tmp_path: Path) -> None:
    """Reserved tokens and pads may; ends, think and tool tokens, which models write, may not."""
    found = shared(folders["r1-qwen"], folders["qwen2.5"])
    box, end = (found.tokenizer.get_vocab()[t] for t in ("<think>", "<｜Assistant｜>"))
    with pytest.raises(
        ConfigError,
        match=r"^model\.teacher\.path = .*the student's '<｜User｜>' and .*'<\|im_start\|>', and responses can hold",
    ):
        found.check([prompt(1)])
    assert found.renamed[box] == ("<think>", "<|box_start|>")
    with pytest.raises(ConfigError, match=r"the student's '<\|box_start\|>' .* responses can hold '<think>'"):
        Vocabulary(found.teachers, found.tokenizer, found.size, {box: ("<|box_start|>", "<think>")}).check([prompt(1)])
    plain = renamed(tmp_path / "a", "llama3", "<|reserved_special_token_5|>", "<|mine|>")
    found = shared(plain, folders["llama3"])
    (token,) = found.renamed
    found.check([prompt(1)], "", [0, token + 1])
    with pytest.raises(ConfigError, match=r"'<\|mine\|>' .*, and ends a response: .*model\.rollout\.end_tokens"):
        found.check([prompt(1)], "", [0, token])
    padded, plain = (make(tmp_path / n, "llama2", more=[p, "<|end|>"]) for n, p in (("b", "<|PAD|>"), ("c", "<|x|>")))
    shared(padded, plain).check([prompt(1)], "", [1])
    plainly = renamed(tmp_path / "d", "qwen2.5", "<|fim_pad|>", "<unused_7>")  # not special, and written by none
    shared(plainly, folders["qwen2.5"]).check([prompt(1)])
    assert end != token


def test_the_recipes_own_models_share_their_tokens(tmp_path: Path) -> None:
    for kinds in {tuple(CHECKPOINTS[name].tokenizer for name in models) for models in PAIRS.values()}:
        student, *others = (make(tmp_path / kind, kind) for kind in kinds)
        for teacher in others:
            found = shared(student, teacher)
            found.check([prompt(1)], "", end_tokens(found, (student, teacher), [])[0])


def test_other_ordinary_tokens_are_refused_with_examples(folders: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match=r"from the student's in \d+ tokens of ordinary text \(\d+: student '"):
        shared(folders["llama2"], folders["qwen3"])
    mine, theirs = load(folders["r1-qwen"]), load(folders["qwen2.5"])
    found = Vocabulary.shared(mine, theirs, (10**6, 10**6), "t")
    with pytest.raises(
        ConfigError, match=r"'<\|endoftext\|>' for \d+, which the chat template knows as '<｜end▁of▁sentence｜>'"
    ):
        found.check([prompt(1)], mine.chat_template)


def test_a_teacher_that_splits_text_otherwise(folders: dict[str, Path], tmp_path: Path) -> None:
    student, other = folders["qwen2.5"], make(tmp_path, "qwen2.5")
    file = json.loads((other / "tokenizer.json").read_text())
    file["normalizer"] = None  # no NFC: an accent of its own stays one
    (other / "tokenizer.json").write_text(json.dumps(file))
    found = shared(student, other)
    ((_, line),) = found.check_splits(["plain"], ["p.jsonl, line 1"])
    assert "the student's tokens are [" in line
    assert shared(student, student).check_splits(["e\u0301"], ["x"]) == []
    with pytest.raises(ConfigError, match=r"^model\.teacher\.path.* in p\.jsonl, line 1 the student's tokens are \["):
        found.check_splits(["cafe\u0301"], ["p.jsonl, line 1"])


def test_end_tokens_are_those_of_student_and_teacher(folders: dict[str, Path], tmp_path: Path) -> None:
    base = make(tmp_path / "base", "qwen2.5-base")
    chat = make(tmp_path / "chat", "qwen2.5", end=None)
    found = shared(base, chat)
    names = found.tokenizer.get_vocab()
    text_end, turn_end, box = (names[t] for t in ("<|endoftext|>", "<|im_end|>", "<|box_start|>"))
    ids, ((label, line),) = end_tokens(found, (base, chat), [])
    assert ids == (text_end, turn_end) and label == "end tokens"
    assert f"the student's files name <|endoftext|> {text_end}, the teacher's <|im_end|> {turn_end}" in line
    (chat / "generation_config.json").write_text(json.dumps({"eos_token_id": [turn_end, box, 10**7]}))
    (base / "config.json").write_text(json.dumps({"eos_token_id": box}))
    ids, ((_, line),) = end_tokens(found, (base, chat), [])
    assert ids == tuple(sorted((text_end, turn_end, box)))
    assert line.endswith("; the models' files name 10000000, too, which is no token that both have")
    ids, ((_, line),) = end_tokens(found, (base, chat), ["<|im_end|>", 5])
    assert ids == (5, turn_end) and f"not <|endoftext|> {text_end}" in line


def test_no_end_token_at_all_is_refused(tmp_path: Path) -> None:
    folder = make(tmp_path, "qwen2.5", eos_token=None)
    with pytest.raises(
        ConfigError, match=r"^model\.rollout\.end_tokens = \[\]: neither model's .* no response would ever"
    ):
        end_tokens(shared(folder, folder), (folder, folder), [])
    assert end_tokens(shared(folder, folder), (folder, folder), [7])[0] == (7,)
    for token in ("no such token", 10**6):
        with pytest.raises(ConfigError, match=r"^model\.rollout\.end_tokens = .*is no token that the models share"):
            end_tokens(shared(folder, folder), (folder, folder), [token])
    for value in ("<|im_end|>", [[3]], True):
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
        with pytest.raises(ConfigError, match=r"generation_config\.json.*eos_token_id is .*give an id, a list of ids"):
            end_tokens(shared(folder, folder), (folder, folder), [])
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [-1, 7]}))
    assert end_tokens(shared(folder, folder), (folder, folder), [])[0] == (7,)
    for text in ("[]", "[" * 100_000):
        (folder / "generation_config.json").write_text(text)
        with pytest.raises(ConfigError, match=r"generation_config\.json.*cannot be read"):
            end_tokens(shared(folder, folder), (folder, folder), [])


def test_probes_cover_what_tokenizers_disagree_about() -> None:
    text = "".join(PROBES)
    assert all(part in text for part in ("  ", "\n\n", "\t", "12", "e\u0301", "\u00e9", "\U0001f642", "\u65e5"))
