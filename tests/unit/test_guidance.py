"""Prefixes of teacher text: their annealing, their draws and the requests they end up in."""

from __future__ import annotations

import hashlib
import logging
import math
import os
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from nemo_tropd import files, objectives
from nemo_tropd.batch import Rollout
from nemo_tropd.config import IMITATING, ConfigError, guided
from nemo_tropd.convert.fingerprint import checkpoint_fingerprint
from nemo_tropd.data import Prompt, PromptOrder, PromptSet, PromptSplit
from nemo_tropd.planner.degrees import teacher_generates
from nemo_tropd.rollout.engine import EngineDied, EngineError, Finished, RefreshStats, RolloutRequest, Sampling
from nemo_tropd.training.guidance import (
    Guidance,
    draw_prefix_length,
    make_guidance,
    max_prefix_length,
    request_seed,
    wanted_responses,
)
from nemo_tropd.training.objective import build_objective, prefix_line
from nemo_tropd.training.teacher_responses import TeacherResponse, TeacherResponses, Wanted, prompt_key
from tests.e2e.compose import compose_config
from tests.oracles import philox

pytestmark = pytest.mark.random

EOS = 2


class ScribeEngine:
    """Writes responses that are a function of the request alone; may die at a given call."""

    def __init__(self, log: list[str], die_at: int | None = None, fail_at: int | None = None) -> None:
        self.log, self.die_at, self.fail_at, self.calls = log, die_at, fail_at, 0

    def start(self) -> None:
        self.log.append("start")

    def generate(self, requests: Sequence[RolloutRequest], finished: Finished | None = None) -> list[Rollout]:
        self.calls += 1
        if self.calls == self.die_at:
            raise EngineDied("gone")
        if self.calls == self.fail_at:
            raise EngineError("cannot")
        self.log.append(f"generate {len(requests)}")
        return [self.write(r) for r in requests]

    @staticmethod
    def write(r: RolloutRequest) -> Rollout:
        rnd = random.Random(r.seed)
        finished = rnd.random() < 0.5
        length = rnd.randrange(0, r.max_new_tokens) if finished else r.max_new_tokens - 1
        ids = [rnd.randrange(3, 100) for _ in range(length)] + [EOS if finished else 7]
        return Rollout(r.prompt_ids, [], ids, [-rnd.random() for _ in ids], 0, r.sequence_id, r.prompt_index, finished)

    def update_weights(self, stream: object, version: int) -> RefreshStats:
        raise AssertionError("a teacher's weights never change")

    def sleep(self) -> bool:
        return False

    def close(self, *, run_over: bool = False) -> None:
        self.log.append("close")


def cache(folder: Path, **changes: object) -> TeacherResponses:
    settings: dict = {
        "teacher": "t",
        "sampling": Sampling(),
        "max_new_tokens": 12,
        "vocab_size": 100,
        "seed": 3,
    } | changes
    return TeacherResponses(folder, **settings)


def some_prompts(count: int, first: int = 5000) -> list[list[int]]:
    """Random prompts that end in first, first + 1, ...: no two are alike."""
    rnd = random.Random(random.random())
    return [[rnd.randrange(3, 1000) for _ in range(rnd.randrange(1, 9))] + [first + i] for i in range(count)]


def asked(prompts: Sequence[Sequence[int]]) -> list[Prompt]:
    return [Prompt(str(i), "", (), None, tuple(ids), "") for i, ids in enumerate(prompts)]


def test_annealing_follows_the_cosine_and_ends_at_nothing() -> None:
    longest, total = random.randrange(50, 5000), random.randrange(20, 300)
    lengths = [max_prefix_length(s, total_steps=total, longest=longest) for s in range(total + 3)]
    assert lengths[0] == longest
    assert lengths[total:] == [0, 0, 0]
    assert max_prefix_length(2 * total, total_steps=total, longest=longest) == 0  # where the cosine is 1 again
    assert lengths == sorted(lengths, reverse=True)
    quarter = total // 4
    assert lengths[quarter] == math.floor(longest * (1 + math.cos(math.pi * quarter / total)) / 2)
    assert abs(max_prefix_length(100, total_steps=200, longest=longest) - longest / 2) <= 1


def test_uniform_draw_covers_the_range_evenly_and_depends_on_its_names_alone() -> None:
    limit, seed = 7, random.randrange(1 << 40)
    drawn = [
        draw_prefix_length(limit, draw="uniform", seed=seed, step=s, sequence_id=q)
        for s in range(80)
        for q in range(100)
    ]
    counts = Counter(drawn)
    assert set(counts) == set(range(limit + 1))
    assert all(abs(n - 1000) < 160 for n in counts.values())  # five standard deviations
    again = [
        draw_prefix_length(limit, draw="uniform", seed=seed, step=s, sequence_id=q)
        for s in reversed(range(80))
        for q in reversed(range(100))
    ]
    assert again[::-1] == drawn
    other = [draw_prefix_length(limit, draw="uniform", seed=seed + 1, step=0, sequence_id=q) for q in range(100)]
    assert other != drawn[:100]
    assert draw_prefix_length(limit, draw="cap", seed=seed, step=0, sequence_id=0) == limit
    assert draw_prefix_length(0, draw="uniform", seed=seed, step=0, sequence_id=0) == 0


def test_a_length_is_the_philox_word_of_its_seed_step_and_sequence() -> None:
    wide = 2**64 - 1 - random.getrandbits(9)  # a float64 cannot tell it from its neighbours
    limit = 2**30 - 1  # two draws are hardly ever alike, and the product is exact
    for seed, step, sequence in ((wide, 3, 8), (random.getrandbits(40), wide, 0), (5, 6, random.getrandbits(50))):
        (word,) = philox.stream((seed, step), 1, word_2=sequence, word_3=1)
        length = draw_prefix_length(limit, draw="uniform", seed=seed, step=step, sequence_id=sequence)
        assert length == (word >> 11) * (limit + 1) >> 53


class Written(TeacherResponses):
    """Responses that are known beforehand."""

    def __init__(self, *responses: TeacherResponse) -> None:
        self.responses = responses

    def lookup(self, prompt_ids: Sequence[int], sampling: Sampling | None = None) -> TeacherResponse:
        return self.responses[prompt_ids[0]]


def test_a_prefix_stops_before_the_end_and_leaves_room_for_a_token() -> None:
    ids = [11, 12, 13, 14, 15]
    written = Written(TeacherResponse([*ids, EOS], [-1.0] * 6, True), TeacherResponse([*ids, 16], [-1.0] * 6, False))

    def prefixes(longest: int, room: int) -> list[list[int]]:
        guidance = Guidance(
            seed=1,
            total_steps=10,
            max_new_tokens=room,
            longest=longest,
            prefix_draw="cap",
            responses={"default": written},
        )
        return [r.prefix_ids for r in guidance.plan(asked([[0], [1]]), 0)]

    assert prefixes(9, 20) == [ids, [*ids, 16]]
    assert prefixes(9, 6) == [ids, ids]
    assert prefixes(3, 20) == [ids[:3]] * 2
    assert prefixes(9, 1) == [[], []]


def test_a_plan_is_a_function_of_seed_step_prompt_and_sample() -> None:
    long = [random.randrange(3, 100) for _ in range(500)]
    written = Written(*[TeacherResponse(long, [-1.0] * 500, False)] * 3)
    seed, step, places = random.getrandbits(60), random.randrange(1, 50), [700, 3, 41]
    guidance = Guidance(
        seed=seed, total_steps=10**6, max_new_tokens=400, samples_per_prompt=2, longest=300,
        responses={"default": written},
    )  # fmt: skip
    requests = guidance.plan(asked([[0], [1], [2]]), step, prompt_indices=places)
    limit = max_prefix_length(step, total_steps=10**6, longest=300)
    for i, r in enumerate(requests):
        assert (r.sequence_id, r.prompt_index) == (i, places[i // 2])
        assert r.seed == request_seed(seed, step, places[i // 2], i)
        length = draw_prefix_length(limit, draw="uniform", seed=seed, step=step, sequence_id=i)
        assert r.prefix_ids == long[:length] and r.max_new_tokens == 400 - length


@pytest.mark.parametrize("draw", ["uniform", "cap"])
def test_planned_prefixes_are_teacher_text_without_its_end(tmp_path: Path, draw: str) -> None:
    prompts = some_prompts(40)
    responses = cache(tmp_path)
    responses.ensure(prompts, lambda: ScribeEngine([]))
    guidance = Guidance(
        seed=1,
        total_steps=10,
        max_new_tokens=9,
        samples_per_prompt=3,
        longest=30,
        prefix_draw=draw,
        responses={"default": responses},
    )
    requests = guidance.plan(asked(prompts), 0, prompt_indices=range(100, 140))
    assert [r.sequence_id for r in requests] == list(range(120))
    assert [r.prompt_index for r in requests] == [100 + i // 3 for i in range(120)]
    assert len({r.seed for r in requests}) == 120
    for r in requests:
        teacher = responses.lookup(r.prompt_ids)
        assert r.prefix_ids == teacher.response_ids[: len(r.prefix_ids)]
        assert EOS not in r.prefix_ids
        assert r.max_new_tokens >= 1 and len(r.prefix_ids) + r.max_new_tokens == 9
    lengths = [len(r.prefix_ids) for r in requests]
    if draw == "cap":
        usable = [len(t.response_ids) - t.finished for t in (responses.lookup(r.prompt_ids) for r in requests)]
        assert lengths == [min(u, 8) for u in usable]
    assert max(lengths) > 3
    assert guidance.plan(asked(prompts), 0, prompt_indices=range(100, 140)) == requests
    assert guidance.plan(asked(prompts), 1, prompt_indices=range(100, 140)) != requests
    assert all(r.prefix_ids == [] for r in guidance.plan(asked(prompts), 10))


def test_without_guidance_nothing_is_looked_up() -> None:
    requests = Guidance(seed=1, total_steps=5, max_new_tokens=4, samples_per_prompt=2).plan(asked([[3, 4]]), 0)
    assert [(r.prompt_ids, r.prefix_ids, r.max_new_tokens) for r in requests] == [([3, 4], [], 4)] * 2


def test_guidance_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="prefix_draw is 'most'"):
        Guidance(seed=0, total_steps=1, max_new_tokens=1, prefix_draw="most")
    with pytest.raises(ValueError, match="at least"):
        Guidance(seed=0, total_steps=0, max_new_tokens=1)
    with pytest.raises(ValueError, match="2 prompts but 1 prompt indices"):
        Guidance(seed=0, total_steps=1, max_new_tokens=1).plan(asked([[1], [2]]), 0, prompt_indices=[0])


def test_responses_are_written_once_and_read_back(tmp_path: Path) -> None:
    prompts, log = some_prompts(10), []
    first = cache(tmp_path)
    assert first.ensure(prompts, lambda: ScribeEngine(log), batch=4) == 10
    assert log == ["start", "generate 4", "generate 4", "generate 2", "close"]
    log.clear()
    second = cache(tmp_path)
    assert second.ensure(prompts[::-1], lambda: ScribeEngine(log)) == 0 and log == []
    extra = some_prompts(2, first=6000)
    assert second.ensure(prompts + extra, lambda: ScribeEngine(log)) == 2
    assert log == ["start", "generate 2", "close"]
    third = cache(tmp_path)
    for prompt in prompts:
        assert third.lookup(prompt) == second.lookup(prompt) == first.lookup(prompt)
    with pytest.raises(LookupError, match="no teacher response"):
        third.lookup([1, 2, 3])
    for change in ({"teacher": "u"}, {"sampling": Sampling(temperature=0.5)}, {"max_new_tokens": 13}, {"seed": 4}):
        assert len(cache(tmp_path, **change)) == 0


def test_a_sampling_of_its_own_is_another_response(tmp_path: Path) -> None:
    (prompt, other), greedy, engines = some_prompts(2), Sampling(temperature=0.0), []
    responses = cache(tmp_path)

    class Asked(ScribeEngine):
        def generate(self, requests: Sequence[RolloutRequest], finished: Finished | None = None) -> list[Rollout]:
            engines.append([(r.sampling, r.max_new_tokens) for r in requests])
            return super().generate(requests)

    others = [Wanted(prompt, 5, greedy), Wanted(other, 5, greedy)]
    assert responses.ensure([prompt], lambda: Asked([]), others=others) == 3
    assert responses.ensure([prompt], lambda: Asked([]), others=others[1:]) == 0
    assert engines == [[(None, 12), (greedy, 5), (greedy, 5)]]
    again = cache(tmp_path)
    assert len(again) == 3 and again.lookup(prompt, greedy) != again.lookup(prompt) and other not in again


def test_a_response_does_not_depend_on_the_order_or_batches(tmp_path: Path) -> None:
    prompts = some_prompts(9)
    one, two = cache(tmp_path / "a"), cache(tmp_path / "b")
    one.ensure(prompts, lambda: ScribeEngine([]), batch=2)
    two.ensure(prompts[::-1], lambda: ScribeEngine([]), batch=5)
    assert [one.lookup(p) for p in prompts] == [two.lookup(p) for p in prompts]


def test_a_response_is_as_long_as_needed_and_continued_when_more_is(tmp_path: Path) -> None:
    prompts, asked = some_prompts(30), []

    class Asked(ScribeEngine):
        def generate(self, requests: Sequence[RolloutRequest], finished: Finished | None = None) -> list[Rollout]:
            asked.extend(requests)
            return [replace(self.write(r), prefix_ids=r.prefix_ids) for r in requests]

    responses = cache(tmp_path)
    lengths = [random.randrange(1, 7) for _ in prompts]
    assert responses.ensure(prompts, lambda: Asked([]), lengths=lengths) == 30
    assert [r.max_new_tokens for r in asked] == lengths and not any(r.prefix_ids for r in asked)
    first = {i: responses.lookup(p) for i, p in enumerate(prompts)}
    seeds = {r.seed for r in asked}
    asked.clear()
    assert responses.ensure(prompts, lambda: Asked([]), lengths=lengths) == 0
    longer = [n + random.randrange(0, 5) for n in lengths]
    open_ended = [i for i, r in first.items() if not r.finished and longer[i] > lengths[i]]
    # a prompt that is asked for twice is generated once, as long as the longer needs
    assert responses.ensure(prompts * 2, lambda: Asked([]), lengths=longer + lengths) == len(open_ended)
    assert [(r.prompt_ids, r.prefix_ids) for r in asked] == [(prompts[i], first[i].response_ids) for i in open_ended]
    assert [r.max_new_tokens for r in asked] == [longer[i] - lengths[i] for i in open_ended]
    assert len(seeds) == 30 and not seeds & {r.seed for r in asked}  # or a draw would be repeated
    for found in (responses, cache(tmp_path)):
        for i, prompt in enumerate(prompts):
            now = found.lookup(prompt)
            assert now.response_ids[: len(first[i].response_ids)] == first[i].response_ids
            assert now.finished or len(now.response_ids) == longer[i]
            assert len(now.log_probs) == len(now.response_ids)
            assert now == first[i] or i in open_ended


def test_prefixes_from_responses_of_the_needed_length_are_those_of_complete_ones() -> None:
    """Of a training prompt, a run asks for no more than the longest prefix of the steps that use it."""
    for _ in range(3):  # a single run may use no prompt twice with prefixes of other lengths
        for training in range(4, 10):  # of 5 and of 9 a step of 4 prompts leaves just one that no step has used yet
            prefixes_of_one_run(training)


PATHS = ["pretrained_checkpoint.restore_from_path=s", "model.teacher.path=t", "model.data.path=d"]


@pytest.mark.parametrize("name", objectives.OBJECTIVES)
def test_a_run_has_prefixes_if_its_objective_has_a_loss_on_them(name: str) -> None:
    """Others would learn from the teacher's tokens as if the student had sampled them."""
    own = objectives.build(name).guidance_weight
    assert (name in IMITATING) == (own is not None)

    def prefixes(*keys: str) -> tuple[float | None, str, set[int]]:
        cfg = compose_config([*PATHS, f"model.tropd.objective={name}", "model.tropd.guidance.prefix_draw=cap", *keys])
        prompts = asked(some_prompts(3))
        response = TeacherResponse([7] * 300, [-1.0] * 300, True)
        known = type("Known", (), {"lookup": lambda self, ids, sampling=None: response})()
        lengths = {len(r.prefix_ids) for r in make_guidance(cfg, {"default": known}).plan(prompts, 0)}
        split = PromptSplit(PromptSet(tuple(prompts)), PromptSet(()), 0)
        cfg.model.data.held_out = 0
        assert guided(cfg) == bool(lengths - {0}) == bool(wanted_responses(cfg, split)) == teacher_generates(cfg)
        return build_objective(cfg).guidance_weight, prefix_line(cfg), lengths

    none = f"none: {name} has no loss on them (model.tropd.guidance_weight)"
    some = "at most 256 tokens at step 1, none after step 200"
    assert prefixes() == ((own, none, {0}) if own is None else (own, some, {256}))
    weight = random.uniform(0, 0.1)
    assert prefixes(f"model.tropd.guidance_weight={weight}") == (weight, some, {256})
    assert prefixes(f"+model.tropd.params.guidance_weight={weight}") == (weight, some, {256})
    assert prefixes("model.tropd.guidance.enabled=false") == (own, "none", {0})
    assert prefixes("model.tropd.guidance.max_prefix_tokens=0") == (own, "none", {0})
    if own is None:
        with pytest.raises(ConfigError, match=f"guidance.enabled = True: {name} has no loss on teacher prefixes"):
            prefixes("model.tropd.guidance.enabled=true")
    else:
        assert prefixes("model.tropd.guidance.enabled=true") == (own, some, {256})


def prefixes_of_one_run(training: int) -> None:
    steps, samples = random.randrange(3, 7), random.randrange(1, 4)
    longest, most = random.randrange(4, 12), random.randrange(3, 14)
    cfg = compose_config(
        [
            "pretrained_checkpoint.restore_from_path=s",
            "model.teacher.path=t",
            "model.data.path=d",
            f"model.tropd.guidance.max_prefix_tokens={longest}",
            f"model.rollout.max_new_tokens={most}",
            "model.teacher.response_tokens=20",
            f"model.rollout.samples_per_prompt={samples}",
            f"model.global_batch_size={4 * samples}",
            f"trainer.tropd.max_steps={steps}",
            f"model.seed={random.randrange(1000)}",
        ]
    )
    texts = some_prompts(training + 2)
    prompts = asked(texts)
    split = PromptSplit(PromptSet(tuple(prompts[2:])), PromptSet(tuple(prompts[:2])), 0)
    wanted = wanted_responses(cfg, split)
    assert list(wanted)[:2] == [p.token_ids for p in prompts[:2]] and set(list(wanted.values())[:2]) == {20}
    assert max(list(wanted.values())[2:], default=0) <= min(longest, most - 1)

    def complete(ids: Sequence[int]) -> TeacherResponse:
        rnd = random.Random(prompt_key(ids))
        length, finished = rnd.randrange(1, 2 * most), rnd.random() < 0.5
        return TeacherResponse([rnd.randrange(3, 99) for _ in range(length)], [-1.0] * length, finished)

    class Known(TeacherResponses):
        def __init__(self, cut: bool) -> None:
            self.cut = cut

        def lookup(self, prompt_ids: Sequence[int], sampling: Sampling | None = None) -> TeacherResponse:
            full = complete(prompt_ids)
            length = wanted[tuple(prompt_ids)] if self.cut else len(full.response_ids)
            if length >= len(full.response_ids):
                return full
            return TeacherResponse(full.response_ids[:length], full.log_probs[:length], False)

    order = PromptOrder(training, cfg.model.seed)
    for step in range(steps):
        batch = order.batch(step, 4)
        plans = [
            make_guidance(cfg, {"default": Known(cut)}).plan(
                [split.train[i] for i in batch], step, prompt_indices=batch
            )
            for cut in (True, False)
        ]
        assert plans[0] == plans[1]
    # A run without an end is planned, too: once every prompt has been used the prefixes get no longer.
    cfg.trainer.tropd.max_steps = 2 * 10**9
    assert set(wanted_responses(cfg, split)) == {p.token_ids for p in prompts}
    cfg.trainer.tropd.max_steps = steps
    later = wanted_responses(cfg, split, steps - 1)
    assert set(later) <= set(wanted) and all(length <= wanted[ids] for ids, length in later.items())


@pytest.mark.parametrize("damage", ["truncated", "changed", "garbage"])
def test_a_damaged_line_is_named_and_only_its_response_written_anew(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    prompts = some_prompts(5)
    whole = cache(tmp_path)
    whole.ensure(prompts, lambda: ScribeEngine([]))
    (shard,) = whole.folder.glob("responses-*.jsonl")
    lines = shard.read_bytes().splitlines()
    if damage == "truncated":
        shard.write_bytes(b"\n".join(lines)[:-20])
        number = 5
    elif damage == "changed":
        number = 3
        lines[2] = (
            lines[2].replace(b'"finished": true', b'"finished": 1').replace(b'"finished": false', b'"finished": 0')
        )
        shard.write_bytes(b"\n".join(lines) + b"\n")
    else:
        number = 1
        lines[0] = b"\xff\x00[" + lines[0]
        shard.write_bytes(b"\n".join(lines) + b"\n")
    log: list[str] = []
    with caplog.at_level(logging.WARNING):
        again = cache(tmp_path)
    assert f"line {number} is damaged" in caplog.text and caplog.text.count("is damaged:") == 1
    assert len(again) == 4
    assert again.ensure(prompts, lambda: ScribeEngine(log)) == 1 and log == ["start", "generate 1", "close"]
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        clean = cache(tmp_path)
    assert caplog.text == "" and len(clean) == 5
    assert [clean.lookup(p) for p in prompts] == [whole.lookup(p) for p in prompts]


def test_an_engine_that_dies_is_replaced_once_and_what_was_written_stays(tmp_path: Path) -> None:
    prompts, log = some_prompts(6), []
    engines = [ScribeEngine(log, die_at=2), ScribeEngine(log), ScribeEngine(log)]
    responses = cache(tmp_path / "once")
    assert responses.ensure(prompts, lambda: engines.pop(0), batch=2) == 6 and len(engines) == 1
    assert log.count("start") == log.count("close") == 2
    engines = [ScribeEngine(log, die_at=2), ScribeEngine(log, die_at=2)]
    responses = cache(tmp_path / "twice")
    with pytest.raises(EngineDied):
        responses.ensure(prompts, lambda: engines.pop(0), batch=2)
    assert log.count("start") == log.count("close") == 4
    assert len(cache(tmp_path / "twice")) == 4
    engines = [ScribeEngine(log, fail_at=2)]
    with pytest.raises(EngineError, match="cannot"):
        cache(tmp_path / "not").ensure(prompts, lambda: engines.pop(0), batch=2)
    assert log.count("start") == log.count("close") and len(cache(tmp_path / "not")) == 2


def test_a_folder_that_takes_no_responses_is_named_by_its_key(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    responses, log = cache(tmp_path / "file" / "responses"), list[str]()
    with pytest.raises(ConfigError, match=r"model\.teacher\.cache_dir = .*cannot be kept there \(.*Not a directory"):
        responses.ensure(some_prompts(3), lambda: ScribeEngine(log))
    assert log[-1] == "close"


def test_left_over_partial_files_of_gone_processes_are_removed(tmp_path: Path) -> None:
    responses = cache(tmp_path)
    responses.ensure(some_prompts(1), lambda: ScribeEngine([]))
    left = responses.folder / f".responses-000009.jsonl.tmp-{files._MACHINE}-0123abcd-4194399"
    left.write_text("half")
    assert len(cache(tmp_path)) == 1 and not left.exists()


def test_fingerprints_tell_checkpoints_apart_but_not_their_places(tmp_path: Path) -> None:
    weights = {"w": torch.randn(64, 64)}
    for name in ("a", "b", "c", "d"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text('{"x": 1}' if name != "d" else '{"x": 2}')
        if name == "c":
            weights["w"][13, 17] += 1.0
        save_file(weights, str(tmp_path / name / "model.safetensors"))
        if name == "c":
            weights["w"][13, 17] -= 1.0
    prints = {name: checkpoint_fingerprint(tmp_path / name) for name in ("a", "b", "c", "d")}
    assert prints["a"] == prints["b"]
    assert len(set(prints.values())) == 3
    with pytest.raises(FileNotFoundError, match="holds no safetensors"):
        checkpoint_fingerprint(tmp_path)


def test_a_fingerprint_reads_every_byte_once_and_again_after_any_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer that is trained anew may lie anywhere, and some tools restore a file's times."""
    folder, memory, read = tmp_path / "model", tmp_path / "cache" / "fingerprints.json", []
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    weights = folder / "model.safetensors"
    save_file({"w": torch.zeros(40 << 20, dtype=torch.uint8)}, weights)
    digest = hashlib.file_digest

    def counted(file: Any, name: str) -> Any:
        read.append(file.name)
        return digest(file, name)

    monkeypatch.setattr(hashlib, "file_digest", counted)
    first = checkpoint_fingerprint(folder, memory)
    assert checkpoint_fingerprint(folder, memory) == first == checkpoint_fingerprint(folder) and len(read) == 2
    before = weights.stat()
    with weights.open("r+b") as file:
        file.seek((2 << 20) + 77)
        file.write(b"x")
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    changed = checkpoint_fingerprint(folder, memory)
    assert changed != first and len(read) == 3
    memory.write_text('{"cut')
    assert checkpoint_fingerprint(folder, memory) == changed and len(read) == 4
    assert checkpoint_fingerprint(folder, memory) == changed and len(read) == 4
