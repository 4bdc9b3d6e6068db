"""Prompts: every reader, every refusal, the split and the order."""

import json
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest

from nemo_tropd.data import Prompt, PromptError, PromptKeys, PromptOrder, PromptSet, PromptSplit, Source, load_prompts
from nemo_tropd.data.prompts import Share
from tests.oracles import philox

pytestmark = pytest.mark.random

REPOSITORY = Path(__file__).parents[2]
SHIPPED = REPOSITORY / "examples" / "prompts" / "instructions.jsonl"


class WordTokenizer:
    """A word is a token, a message's role is one more, and the assistant's opening is one."""

    chat_template = "role words"

    def __init__(self) -> None:
        self.vocabulary: dict[str, int] = {}

    def _ids(self, text: str) -> list[int]:
        return [self.vocabulary.setdefault(w, len(self.vocabulary)) for w in text.split()]

    def apply_chat_template(self, conversation, *, add_generation_prompt, tokenize, **kwargs):
        assert add_generation_prompt and not tokenize
        return " ".join(f"<{t['role']}> {t['content']}" for t in conversation) + " <assistant>"

    def __call__(self, texts, **kwargs):
        return {"input_ids": [self._ids(t) for t in texts]}

    def text(self, ids) -> str:
        words = list(self.vocabulary)
        return " ".join(words[i] for i in ids)


def write_jsonl(path: Path, records) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return path


def load(path, tokenizer=None, **settings) -> PromptSplit:
    return load_prompts(path, tokenizer or WordTokenizer(), **{"max_prompt_tokens": 50, **settings})


def random_prompts(n: int) -> list[str]:
    return [f"say {random.getrandbits(64):x} and {i}" for i in range(n)]


def test_jsonl_gives_chat_tokens_answers_and_places(tmp_path):
    talk = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "go"},
    ]
    records = [{"prompt": "what is 1 + 1", "answer": 2, "id": "first"}, {"messages": talk}, {"prompt": talk[:1]}]
    path, tokenizer = write_jsonl(tmp_path / "p.jsonl", records), WordTokenizer()
    first, second, third = load(path, tokenizer).train
    assert tokenizer.text(first.token_ids) == "<user> what is 1 + 1 <assistant>"
    assert (first.answer, first.id, first.where) == ("2", "first", f"{path}, line 1")
    assert tokenizer.text(second.token_ids) == "<user> hi <assistant> yes <user> go <assistant>"
    assert (second.text, second.answer) == ("go", None)
    assert third.text == "hi" and third.id != second.id


def test_every_format_gives_the_same_prompts(tmp_path):
    import datasets
    import pyarrow
    from pyarrow import parquet

    records = [{"prompt": p, "answer": str(i), "id": str(i)} for i, p in enumerate(random_prompts(7))]
    jsonl = write_jsonl(tmp_path / "p.jsonl", records)
    parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "p.parquet")
    saved = datasets.Dataset.from_list(records)
    saved.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": saved, "test": saved.select([0])}).save_to_disk(str(tmp_path / "dict"))
    tokenizer = WordTokenizer()
    want = [(p.id, p.token_ids, p.answer) for p in load(jsonl, tokenizer).train]
    assert len(want) == 7
    for name in ("p.parquet", "one", "dict"):
        assert [(p.id, p.token_ids, p.answer) for p in load(tmp_path / name, tokenizer).train] == want
    assert len(load(tmp_path / "dict", split="test").train) == 1
    with pytest.raises(PromptError, match=r"no split 'other'; it has train, test"):
        load(tmp_path / "dict", split="other")


def test_keys_can_be_renamed_and_nested(tmp_path):
    path = write_jsonl(tmp_path / "p.jsonl", [{"question": "why", "reward": {"truth": "so"}, "prompt": 3}])
    (prompt,) = load(path, keys=PromptKeys(prompt="question", answer="reward.truth")).train
    assert (prompt.text, prompt.answer) == ("why", "so")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a"', r"line 3: not JSON .*column"),
        ('["a"]', r"line 3: a line must be a JSON object, got list"),
        ('{"question": "a", "x": 1}', r"line 3: neither 'prompt' nor 'messages'; .*\['question', 'x'\]"),
        ('{"prompt": 5}', r"line 3: 'prompt' must be a string or a list of messages, got int 5"),
        ('{"messages": {}}', r"line 3: 'messages' must be a string or a list"),
        ('{"messages": [{"role": "user"}]}', r"line 3: 'messages'\[0\] must have 'role' and 'content'"),
        ('{"prompt": "a", "tools": [1]}', r"line 3: 'tools' must be a list of objects"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "fine"}\n\n' + line + "\n", encoding="utf-8")
    with pytest.raises(PromptError, match=re.escape(str(path)) + ", " + message):
        load(path)


def test_bytes_that_are_not_utf8_are_named(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'{"prompt": "a"}\n{"prompt": "\xff"}\n')
    with pytest.raises(PromptError, match="line 2: not UTF-8"):
        load(path)


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 nonsense")
    (tmp_path / "folder").mkdir()
    for name, message in {
        "empty.jsonl": "has no prompts",
        "notes.txt": "unsupported file type '.txt'",
        "bad.parquet": "is not a readable Parquet file",
        "folder": "not a data set written by",
        "absent.jsonl": "no prompt file at",
        "absent/dir/": "no prompt file at",
    }.items():
        with pytest.raises(PromptError, match=message):
            load(tmp_path / name)


def test_an_unknown_data_set_names_itself(monkeypatch):
    import datasets

    def refuse(*_args, **_kwargs):
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(PromptError, match=r"'someone/things:main' is not a local file.*offline"):
        load("someone/things:main")


def test_an_overlong_prompt_is_named_with_both_lengths_or_dropped(tmp_path):
    path = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "a b"}, {"prompt": "a b c d"}])
    with pytest.raises(PromptError, match=r"line 2: the prompt has 6 tokens .*max_prompt_tokens is 5"):
        load(path, max_prompt_tokens=5)
    split = load(path, max_prompt_tokens=5, overlong="drop")
    assert (len(split.train), split.dropped, len(split.train[0].token_ids)) == (1, 1, 4)
    assert len(load(path, max_prompt_tokens=6).train) == 2
    with pytest.raises(PromptError, match="all 2 prompts are longer"):
        load(path, max_prompt_tokens=3, overlong="drop")
    with pytest.raises(PromptError, match="overlong='cut'"):
        load(path, overlong="cut")


def test_a_tokenizer_without_template_is_refused(tmp_path):
    tokenizer = WordTokenizer()
    tokenizer.chat_template = None
    path = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "a b"}])
    with pytest.raises(PromptError, match="no chat template"):
        load(path, tokenizer)


def test_held_out_is_disjoint_and_independent_of_order(tmp_path):
    prompts = random_prompts(60)
    copies = [p.replace(" ", "  ") + " " for p in prompts]  # the same prompts but for whitespace
    records = [{"prompt": p} for p in prompts + copies]
    shuffled = random.sample(records, len(records))
    one = load(write_jsonl(tmp_path / "a.jsonl", records), held_out=5)
    two = load(write_jsonl(tmp_path / "b.jsonl", shuffled), held_out=5)

    def plain(prompts):
        return [" ".join(p.text.split()) for p in prompts]

    assert plain(one.held_out) == plain(two.held_out)
    assert not set(plain(one.train)) & set(plain(one.held_out))
    assert len(set(plain(one.held_out))) == len(one.held_out) == 5
    assert len(one.train) == 2 * (60 - 5)


def test_of_copies_of_a_held_out_prompt_one_with_an_answer_is_kept(tmp_path):
    texts = random_prompts(6)
    known = [{"prompt": p, "answer": f"{i}"} for i, p in enumerate(texts)]
    records = [*known, *({"prompt": p + " "} for p in texts)]
    split = load(write_jsonl(tmp_path / "a.jsonl", random.sample(records, len(records))), held_out=5)
    assert {(p.text.strip(), p.answer) for p in split.held_out} == {
        (one["prompt"], one["answer"]) for one in known if one["prompt"] in {p.text.strip() for p in split.held_out}
    }
    assert not [line for _, line in split.notes if "other answers" in line]
    others = [{"prompt": texts[0], "answer": "7"}, {"prompt": texts[1], "answer": None}]
    path = write_jsonl(tmp_path / "b.jsonl", [*known, *others, {"prompt": texts[2], "answer": "2"}, {"prompt": "z"}])
    split = load(path, held_out=6)
    found = [line for _, line in split.notes if "other answers" in line]
    if texts[0] in {p.text for p in split.held_out}:
        what = "1 held-out prompts have copies with other answers, of which one is used"
        assert found == [f"{what}; first {path}, line 1, '0'"]
    else:
        assert found == []


def test_impossible_splits(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "a"}, {"prompt": "b"}, {"prompt": "b"}])
    for value, message in ((2, "leaves none for training"), (-1, "negative")):
        with pytest.raises(PromptError, match=message):
            load(path, held_out=value)


def test_the_order_is_a_permutation_of_every_epoch_and_resumes():
    n, size, seed = random.randint(20, 40), 7, random.getrandbits(70)
    order = PromptOrder(n, seed)
    flat = [i for step in range(3 * n) for i in order.batch(step, size)]
    epochs = [tuple(flat[e * n : (e + 1) * n]) for e in range(len(flat) // n)]
    assert all(sorted(e) == list(range(n)) for e in epochs)
    assert len(set(epochs)) == len(epochs)
    again = PromptOrder(n, seed)
    assert [again.batch(step, size) for step in (17, 3, 17)] == [flat[s * size : s * size + size] for s in (17, 3, 17)]
    for other in (seed + 1, 2**64 - 1, 2**64 - 2, -3):
        assert other == seed or PromptOrder(n, other).batch(0, n) != flat[:n]
    assert order.batch(0, 2 * n + 1) == flat[: 2 * n + 1]
    assert PromptOrder(n, -1).batch(0, n) != PromptOrder(n, -2).batch(0, n)


def test_the_order_is_the_sorted_philox_stream_of_seed_and_epoch():
    wide = 2**64 - 1 - random.getrandbits(9)  # a float64 cannot tell it from its neighbours
    n, size = random.randint(5, 30), 4
    for seed in (wide, random.getrandbits(40), -3):
        order = PromptOrder(n, seed)
        flat = []
        for epoch in range(4):
            words = philox.stream((seed, epoch), n)
            flat += sorted(range(n), key=words.__getitem__)
        for step in range(len(flat) // size):
            assert order.batch(step, size) == flat[step * size : (step + 1) * size]


def test_the_order_does_not_change_between_releases():
    # Written down once: a resumed run must see the order it began with, whatever numpy it now has.
    assert PromptOrder(10, 1234).batch(0, 12) == [8, 9, 7, 3, 0, 1, 4, 2, 5, 6, 0, 9]


def test_an_order_of_no_prompts_and_empty_batches_are_refused():
    with pytest.raises(PromptError, match="at least one"):
        PromptOrder(0, 1)
    with pytest.raises(PromptError, match="size 0"):
        PromptOrder(10, 1).batch(0, 0)


def test_the_fingerprint_follows_content_and_order(tmp_path):
    a, b = ({"prompt": p} for p in random_prompts(2))
    digests = set()
    for i, records in enumerate(([a, b], [b, a], [a, {**b, "answer": 1}])):
        tokenizer = WordTokenizer()
        load(write_jsonl(tmp_path / "warm.jsonl", [a, b]), tokenizer)
        digests.add(load(write_jsonl(tmp_path / f"{i}.jsonl", records), tokenizer).train.fingerprint())
    assert len(digests) == 3


@pytest.mark.parametrize("part", ["id", "answer", "token_ids"])
def test_the_fingerprint_notices_each_part_of_a_prompt(part):
    prompts = [Prompt(f"p{i}", "text", (), "4", (5, 6, i), "here") for i in range(3)]
    changed = {"id": "other", "answer": "5", "token_ids": (5, 7, 1)}[part]
    other = [prompts[0], replace(prompts[1], **{part: changed}), prompts[2]]
    assert PromptSet(tuple(other)).fingerprint() != PromptSet(tuple(prompts)).fingerprint()


def test_what_was_left_out_is_counted(tmp_path):
    said = {"role": "assistant", "content": "x"}
    long, empty = {"prompt": "a b c d"}, {"prompt": " "}
    answered = {"messages": [{"role": "user", "content": "e"}, said]}
    path = write_jsonl(
        tmp_path / "p.jsonl", [long, {"prompt": "a b"}, empty, long, answered, {"prompt": "a  b"}, empty]
    )
    split = load(path, max_prompt_tokens=5, overlong="drop", held_out=1)
    assert len(split.train) in (1, 2) and split.dropped == 2
    copies = 2 - len(split.train)
    assert [line for label, line in split.notes if label == "data"] == [
        f"2 of 7 prompts dropped: longer than 5 tokens (first: {path}, line 1)",
        f"2 of 7 records skipped: nothing to respond to (first: {path}, line 3)",
        f"1 of 7 conversations end with the assistant: that answer is left out (first: {path}, line 5)",
        *["1 prompts left out of training: copies of held-out ones"] * copies,
    ]
    assert load(write_jsonl(tmp_path / "plain.jsonl", [{"prompt": "a"}])).notes == ()
    fields = {"prompt": "a", "input": "b", "meta": {"answer": 1}, "id": 1, "tools": None}
    noted = load(write_jsonl(tmp_path / "fields.jsonl", [{"prompt": "c"}, fields | {f"x{i}": i for i in range(8)}]))
    assert noted.notes == (("data", "not read of the records: input, meta, x0, x1, x2, x3, x4, x5 and 2 more"),)
    both = {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}
    assert load(write_jsonl(tmp_path / "both.jsonl", [both])).notes == (("data", "not read of the records: messages"),)
    odd = write_jsonl(tmp_path / "odd.jsonl", [{"prompt": "a", "answer": {"value": 3}}])
    assert "1 of 1 known answers are objects" in load(odd).notes[0][1]
    with pytest.raises(PromptError, match=r"all 2 records are empty: 'prompt' and 'messages' hold nothing"):
        load(write_jsonl(tmp_path / "empty.jsonl", [empty, empty]))


@pytest.mark.parametrize(("field", "key"), [("answer", "anwser"), ("prompt", "text"), ("messages", "a.b")])
def test_a_key_that_no_record_has_is_refused(tmp_path, field, key):
    records = [{"prompt": "a", "messages": [{"role": "user", "content": "b"}], "answer": 1, "a": {"c": 2}}]
    if field == "prompt":
        del records[0]["prompt"]
    path, keys = write_jsonl(tmp_path / "p.jsonl", records), PromptKeys(**{field: key})
    message = rf"p\.jsonl: no record has '{key}', which model\.data\.{field}_key names; their keys are .*messages"
    with pytest.raises(PromptError, match=message):
        load(path, keys=keys)
    plain = write_jsonl(tmp_path / "r.jsonl", [{"prompt": "c", "last": 0, "text" if field != "prompt" else "t": ""}])
    if field != "prompt":
        with pytest.raises(PromptError, match=r"their keys are prompt, messages, answer, a, last, text$"):
            load([Source(path, 1, keys), Source(plain, 1, keys)])
    # Of several sources one is enough, and a gap counts.
    has = write_jsonl(tmp_path / "q.jsonl", [{"prompt": "q", "messages": "[]", "text": "q", key: "q", "a": {"b": []}}])
    assert len(load([Source(path, 1, keys), Source(has, 1, keys)]).train) == 2


def test_a_set_split_over_folders_files_and_sources_gives_the_same_prompts(tmp_path):
    records = [{"prompt": p, "answer": i} for i, p in enumerate(random_prompts(40))]
    tokenizer = WordTokenizer()
    whole = load(write_jsonl(tmp_path / "all.jsonl", records), tokenizer, held_out=6)
    (tmp_path / "shards").mkdir()
    cut = random.randrange(1, 40)
    write_jsonl(tmp_path / "shards" / "0.jsonl", records[:cut])
    write_jsonl(tmp_path / "shards" / "1.jsonl", records[cut:])
    for path in (tmp_path / "shards", f"{tmp_path}/shards/*.jsonl", [Source(tmp_path / "shards", 0.3)]):
        split = load(path, tokenizer, held_out=6)
        assert split.train.fingerprint() == whole.train.fingerprint()
        assert split.held_out.fingerprint() == whole.held_out.fingerprint()
        assert split.train.order(5).batch(3, 9) == PromptOrder(34, 5).batch(3, 9)


def mixed(tmp_path, sizes, weights, **settings) -> tuple[PromptSplit, list[Path]]:
    paths = [
        write_jsonl(tmp_path / f"{k}.jsonl", [{"prompt": f"{k} {p}"} for p in random_prompts(n)])
        for k, n in enumerate(sizes)
    ]
    return load([Source(p, w) for p, w in zip(paths, weights, strict=True)], **settings), paths


def test_each_source_has_its_weight_of_every_epoch(tmp_path):
    split, paths = mixed(tmp_path, [40, 10, 30], [1, 3, 0.5], held_out=9)
    assert [p.text[0] for p in split.held_out] == ["0"] * 2 + ["1"] * 6 + ["2"]
    train, n = split.train, 80 - 9
    assert [share.prompts for share in train.shares] == [38, 4, 29]
    order, seed = train.order(7), 7
    size = random.randint(2, 9)  # eight epochs at least, so that each source is used up more than twice
    flat = [i for step in range(4 * n) for i in order.batch(step, size)]
    for epoch in range(len(flat) // n):
        sources = [train[i].text[0] for i in flat[epoch * n : (epoch + 1) * n]]
        assert [sources.count(k) for k in "012"] == [16, 47, 8]  # 71 times 2/9, 6/9 and 1/9
        assert sources != sorted(sources)
    for k, share in zip("012", train.shares, strict=True):
        own = [i for i in flat if train[i].text[0] == k]
        rounds = [own[r : r + share.prompts] for r in range(0, len(own) - share.prompts, share.prompts)]
        assert all(sorted(r) == sorted(set(own)) for r in rounds) and len(set(map(tuple, rounds))) > 1
    again = train.order(seed)
    assert [again.batch(s, size) for s in (17, 3, 17)] == [flat[s * size : s * size + size] for s in (17, 3, 17)]
    assert train.order(8).batch(0, n) != flat[:n]
    lines = [line for _, line in split.notes]
    assert lines[1] == f"{paths[1]}: 4 to train, 6 held out, {47 / 71:.1%} of each epoch"


def test_weights_equal_to_the_sizes_use_each_prompt_once_an_epoch(tmp_path):
    split, _ = mixed(tmp_path, [5, 11, 2], [5, 11, 2])
    order = split.train.order(random.getrandbits(40))
    for epoch in range(3):
        assert sorted(order.batch(epoch, 18)) == list(range(18))


def test_the_order_of_several_sources_is_made_of_philox_streams(tmp_path):
    seed, sizes = random.getrandbits(63), [random.randint(3, 9), random.randint(3, 9)]
    order = mixed(tmp_path, sizes, [1, 1])[0].train.order(seed)
    n = sum(sizes)
    places = [(n + 1) // 2, n // 2]

    def shuffled(count, stream, epoch):
        words = philox.stream((seed, epoch), count, word_2=stream, word_3=2)
        return sorted(range(count), key=words.__getitem__)

    wanted, used = [], [0, 0]
    for epoch in range(3):
        for place in shuffled(n, 2, epoch):
            source = int(place >= places[0])
            own = shuffled(sizes[source], source, used[source] // sizes[source])
            wanted.append(source * sizes[0] + own[used[source] % sizes[source]])
            used[source] += 1
    assert [i for step in range(3) for i in order.batch(step, n)] == wanted


def test_the_order_of_several_sources_does_not_change_between_releases():
    order = PromptSet((), (Share(4, 1.0), Share(3, 2.0))).order(1234)
    assert order.batch(0, 10) == [5, 6, 1, 2, 4, 5, 6, 4, 0, 4]


def test_a_text_held_out_of_one_source_is_trained_on_in_none(tmp_path):
    same = random_prompts(12)
    a = write_jsonl(tmp_path / "a.jsonl", [{"prompt": p} for p in same])
    b = write_jsonl(tmp_path / "b.jsonl", [{"prompt": p} for p in same + random_prompts(3)])
    split = load([Source(a), Source(b)], held_out=6)
    held = {p.text for p in split.held_out}
    assert len(held) == 6 and not held & {p.text for p in split.train}
    assert len(split.train) == 27 - 6 - sum(same.count(text) for text in held)
    assert split.notes[-1][1].startswith(f"{27 - 6 - len(split.train)} prompts left out of training: copies")


def test_the_fingerprint_follows_weights_and_sources(tmp_path):
    prompts = tuple(Prompt(str(i), "", (), None, (i,), "") for i in range(6))
    shares = [(), (Share(3, 1.0), Share(3, 1.0)), (Share(3, 1.0), Share(3, 2.0)), (Share(2, 1.0), Share(4, 1.0))]
    assert len({PromptSet(prompts, s).fingerprint() for s in shares}) == 4


@pytest.mark.parametrize(
    ("sizes", "weights", "settings", "message"),
    [
        ([3, 3], [1, 0], {}, r"1\.jsonl: its weight is 0"),
        ([3, 3], [1, float("nan")], {}, r"its weight is nan: give a number above 0"),
        ([3, 3], [1, 1e-3], {}, r"1\.jsonl: its weight 0\.001 is too small: of an epoch's 6 prompts none"),
        ([9, 2], [1, 1], {"held_out": 4}, r"1\.jsonl: held_out=2 takes all 2 distinct prompts"),
        ([9, 0], [1, 1], {}, r"1\.jsonl has no prompts"),
    ],
)
def test_impossible_sources(tmp_path, sizes, weights, settings, message):
    with pytest.raises(PromptError, match=message):
        mixed(tmp_path, sizes, weights, **settings)


def test_a_source_that_is_held_out_of_another_has_nothing_left(tmp_path):
    a = write_jsonl(tmp_path / "a.jsonl", [{"prompt": str(i)} for i in range(2)])
    b = write_jsonl(tmp_path / "b.jsonl", [{"prompt": "0"}, {"prompt": "1"}])
    with pytest.raises(PromptError, match=r"jsonl: (all its prompts are held out of other sources|held_out)"):
        load([Source(a), Source(b)], held_out=2)


def test_the_shipped_prompts_are_right():
    records = [json.loads(line) for line in SHIPPED.read_text(encoding="utf-8").splitlines()]
    kinds = [r["kind"] for r in records]
    assert len(records) >= 480
    assert abs(kinds.count("arithmetic") - kinds.count("instruction")) < 0.2 * len(records)
    assert set(kinds) == {"arithmetic", "instruction"}
    assert (
        len({" ".join(r["prompt"].lower().split()) for r in records}) == len({r["id"] for r in records}) == len(records)
    )
    for r in records:
        if r["kind"] == "instruction":
            assert "answer" not in r
            continue
        assert re.fullmatch(r"\d+( [-+x] \d+)+", r["expression"])
        assert int(r["answer"]) == eval(r["expression"].replace("x", "*")) > 0
        assert sorted(re.findall(r"\d+", r["prompt"])) == sorted(re.findall(r"\d+", r["expression"]))
