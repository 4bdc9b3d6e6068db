"""Several teachers, each prompt's own, and a teacher that reads something else than the student."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM

from examples.benchmarks.shapes import SHAPES
from nemo_tropd import objectives
from nemo_tropd.batch import Rollout, TokenBatch
from nemo_tropd.command_line import compose_command_line
from nemo_tropd.config import ConfigError, ModelConfig, TropdConfig, about_teacher, with_teacher
from nemo_tropd.config_checks import resolve
from nemo_tropd.data import Prompt, PromptError, PromptKeys, PromptSet, PromptSplit
from nemo_tropd.data.conversations import checked
from nemo_tropd.data.prompts import _names
from nemo_tropd.model.tropd_model import MegatronTrOPDModel, StudentSource
from nemo_tropd.parallel.metric_sums import DeviceSums
from nemo_tropd.parallel.topology import Topology
from nemo_tropd.planner.host import check_host, host_memory
from nemo_tropd.planner.machine import GIB
from nemo_tropd.planner.memory import Memory, estimate
from nemo_tropd.planner.verdict import check_memory
from nemo_tropd.training.packing import Packer
from nemo_tropd.training.plan import Plan, make_plan
from nemo_tropd.training.plan_models import loaded_teachers, used_teachers
from nemo_tropd.training.step import _by_group
from tests.e2e.compose import CONF
from tests.e2e.tiny_run import TinyRun
from tests.tiny_models import make_tiny
from tests.unit.test_batch import rollout
from tests.unit.test_packing import topology as place
from tests.unit.test_planner import gpu

VOCABULARY = 131


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    root = tmp_path_factory.mktemp("teachers")
    make_tiny(root / "coder", layers=1, seed=7, hidden=32, head_dim=32)
    return TinyRun.make(root)


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)


def command_line(arguments: list[str]) -> TropdConfig:
    return resolve(compose_command_line(["--config-name", "base", *arguments], CONF))


def routed(tiny: TinyRun, tmp_path: Path, *records: dict[str, Any], **keys: Any) -> Plan:
    """The plan of a run on ``records``, six unless there are more, with a teacher called coder."""
    lines = [*records, *({"prompt": f"what is {i}?", "subject": "coder" if i % 2 else None} for i in range(6))]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    keys = {
        "model.data.path": tmp_path / "data.jsonl",
        "model.data.held_out": 0,
        "model.teachers.coder.path": tiny.root / "coder",
        "model.data.teacher_key": "subject",
        **keys,
    }
    return make_plan(command_line(tiny.overrides(tmp_path / "run", **{k: v for k, v in keys.items() if v is not ...})))


def test_prompts_have_the_teacher_that_their_record_or_their_source_names(tiny: TinyRun, tmp_path: Path) -> None:
    plan = routed(tiny, tmp_path, {"prompt": "a", "subject": "default"}, {"prompt": "b"})
    named = {p.text: p.teacher for p in plan.prompts.train}
    assert [named[f"what is {i}?"] for i in range(4)] == ["default", "coder"] * 2
    assert named["a"] == named["b"] == "default"
    assert ("data", "by teacher: coder 3 to train, default 5 to train") in plan.prompts.notes
    assert [(t.name, t.shape.layers) for t in plan.teachers] == [("default", 2), ("coder", 1)]
    assert all(set(t.wanted) == {p.token_ids for p in plan.prompts.train if p.teacher == t.name} for t in plan.teachers)
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text('{"prompt": "' + name + '", "subject": "coder"}\n{"prompt": "x"}\n')
    sources = f"[{{path: {tmp_path / 'a.jsonl'}, teacher: coder}},{{path: {tmp_path / 'b.jsonl'}, teacher: default}}]"
    plan = routed(
        tiny, tmp_path, **{"model.data.path": "null", "model.data.sources": sources, "model.data.teacher_key": ...}
    )
    assert [(p.text, p.teacher, p.source) for p in plan.prompts.train if p.text != "x"] == [
        ("a", "coder", "a.jsonl"), ("b", "default", "b.jsonl"),
    ]  # fmt: skip


def refused(tiny: TinyRun, tmp_path: Path, **keys: Any) -> str:
    with pytest.raises((ConfigError, PromptError)) as caught:
        routed(tiny, tmp_path, *keys.pop("records", []), **keys)
    assert not (tmp_path / "run").exists()
    return str(caught.value)


def test_what_cannot_be_is_named_by_the_plan(tiny: TinyRun, tmp_path: Path) -> None:
    one = {"records": [{"prompt": "a", "subject": "codr"}]}
    assert "line 1: its teacher (model.data.teacher_key=subject) is 'codr'" in refused(tiny, tmp_path, **one)
    assert "did you mean coder?" in refused(tiny, tmp_path, **one)
    assert "must be the name of a teacher, got 3" in refused(tiny, tmp_path, records=[{"prompt": "a", "subject": 3}])
    column = refused(tiny, tmp_path, **{"model.data.teacher_key": "topic"})
    assert "no record has 'topic', which model.data.teacher_key names" in column
    column = refused(tiny, tmp_path, **{"model.data.teacher_prompt_key": "hint"})
    assert "no record has 'hint', which model.data.teacher_prompt_key names" in column
    unread = refused(tiny, tmp_path, **{"model.data.teacher_key": ...})
    assert unread.startswith("model.teachers = ['coder']: no prompt would have them")
    blank = refused(
        tiny,
        tmp_path,
        records=[{"prompt": "a", "hint": []}, {"prompt": "b", "hint": [{"role": "system", "content": "x"}]}],
        **{"model.data.teacher_prompt_key": "hint"},
    )
    assert "line 2: 'hint' holds nothing that the teacher could respond to" in blank
    longer = refused(
        tiny, tmp_path, records=[{"prompt": "a", "hint": "b" * 81}], **{"model.data.teacher_prompt_key": "hint"}
    )
    assert "line 1: the teacher's prompt has" in longer and "max_prompt_tokens" in longer
    sources = f"[{{path: {tmp_path / 'data.jsonl'}, teacher: codr}}]"
    named = refused(tiny, tmp_path, **{"model.data.path": "null", "model.data.sources": sources})
    assert named.startswith(
        "model.data.sources[0].teacher = 'codr': model.teachers does not name it; there are default, coder"
    )
    for key, value, wanted in (
        ("path", "/nowhere", "model.teachers.coder.path = '/nowhere': no such directory"),
        ("fp8", "int8", "model.teachers.coder.fp8 = 'int8': choose one of"),
        (
            "fp8",
            "tensorwise",
            "model.teachers.coder.precision = '32': model.teachers.coder.fp8 = 'tensorwise' needs a bf16",
        ),
        ("size", 2, "model.teachers.coder.size = 2: there is no such key; choose of path, precision"),
        ("tensor_model_parallel_size", 3, "model.teachers.coder.tensor_model_parallel_size = 3: must divide"),
        ("response_tokens", 3, "model.tropd.guidance.max_prefix_tokens = 6: the teacher generates at most 3 tokens"),
    ):
        assert wanted in refused(tiny, tmp_path, **{f"model.teachers.coder.{key}": value}), key
    mistyped = {"model.teachers": "{coder: {pathh: x}}"}
    assert refused(tiny, tmp_path, **mistyped).startswith("model.teachers.coder.pathh = 'x': there is no such key")
    assert "default is model.teacher: rename it" in refused(tiny, tmp_path, **{"model.teachers.default.path": "x"})
    assert "name it by letters" in refused(tiny, tmp_path, **{"model.teachers": "{a/b: {path: x}}"})
    assert "path = None" in refused(
        tiny, tmp_path, **{"model.teachers.coder.path": ..., "model.teachers.coder.offload": True}
    )


def test_every_teachers_tokens_shape_and_folder_are_looked_at(tiny: TinyRun, tmp_path: Path) -> None:
    other = make_tiny(tmp_path / "other", layers=1, vocab=140, hidden=32, head_dim=32)
    tokens = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokens["model"]["vocab"]
    a, b = list(vocabulary)[20:22]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    (other / "tokenizer.json").write_text(json.dumps(tokens))
    said = refused(tiny, tmp_path, **{"model.teachers.coder.path": other})
    assert said.startswith("model.teachers.coder.path = ") and "differs from the student's in" in said
    said = refused(tiny, tmp_path, **{"model.teachers.coder.path": tmp_path / "run" / "coder"})
    assert "no such directory" in said
    shutil.copytree(tiny.root / "coder", tmp_path / "short")
    config = json.loads((tmp_path / "short" / "config.json").read_text())
    (tmp_path / "short" / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 50}))
    said = refused(tiny, tmp_path, **{"model.teachers.coder.path": tmp_path / "short"})
    assert "of the model at model.teachers.coder.path; at most 50" in said
    keys = {
        "model.teachers.coder.precision": "bf16",
        "model.teachers.coder.fp8": "tensorwise",
        "model.data.held_out": 1,
    }
    held = [{"prompt": f"{i}", "subject": "coder"} for i in range(1)]
    said = refused(tiny, tmp_path, records=held, **keys, **{"model.data.teacher_key": "subject"})
    assert "model.teachers.coder.fp8" in said  # its widths, or that nothing of its own is held out


def test_a_teacher_that_cannot_follow_is_refused(tiny: TinyRun, tmp_path: Path) -> None:
    for keys, wanted in (
        ({}, "has another shape than the student: set model.teacher.path="),
        ({"model.teacher.fp8": "tensorwise", "model.teacher.precision": "bf16"}, "a teacher in FP8 cannot take"),
        ({"model.teacher.tensor_model_parallel_size": 2, "data": 2}, "must be split as the student is"),
    ):
        path = {"model.teacher.path": tiny.root / "coder", "model.teacher.follow_steps": 4}
        said = refused(tiny, tmp_path, **path, **keys)
        assert said.startswith("model.teacher.follow_steps = 4: ") and wanted in said


@pytest.mark.parametrize("objective", ["tropd", "tropd_exact"])
@pytest.mark.parametrize("offload", [False, True])
def test_a_teacher_that_follows_is_the_student_from_then_on(
    tiny: TinyRun, topology: Topology, objective: str, offload: bool
) -> None:
    rollouts, prompts = some(5)
    plain = PromptSet(tuple(replace(p, told_ids=()) for p in prompts))
    one = model(topology, tiny, ("default",), objective, path=str(tiny.student), follow_steps=2, offload=offload)
    batches = Packer(topology, 0, 2, None, 5).pack(rollouts, 0, plain)

    def distance(step: int) -> float:
        one.follow(step)
        scores = one.score(batches)
        counts = {"loss_tokens": 1, "sequences": 1, "keep_tokens": True}
        _, sums = one.get_loss_and_metrics(batches, scores, step=step, **counts)
        ratios = [abs(r) for kept in sums.kept for r in kept["log_ratio"]]
        assert one.get_divergences(batches).sums["reverse_kl"] == pytest.approx(0, abs=1e-3) or max(ratios) > 1e-3
        return max(ratios)

    assert distance(0) == pytest.approx(0, abs=1e-5)
    with torch.no_grad():
        for p in one.student.parameters():
            p.mul_(1 + 0.3 * torch.rand_like(p))
    assert distance(1) > 1e-2
    assert distance(2) == pytest.approx(0, abs=1e-5)


def test_the_teacher_may_be_told_something_else(tiny: TinyRun, tmp_path: Path) -> None:
    hint = [{"role": "system", "content": "the answer is 4"}, {"role": "user", "content": "2 + 2?"}]
    records = [
        {"prompt": "2 + 2?", "hint": hint},
        {"prompt": "same", "hint": "same"},
        {"prompt": "none", "hint": None},
        {"prompt": "text", "hint": "the text is 5"},
    ]
    plan = routed(tiny, tmp_path, *records, **{"model.data.teacher_prompt_key": "hint"})
    told = {p.text: p for p in plan.prompts.train}
    template = lambda turns: plan.tokenizer.apply_chat_template(turns, add_generation_prompt=True)  # noqa: E731
    ids = lambda turns: tuple(dict(template(turns))["input_ids"])  # noqa: E731
    assert told["2 + 2?"].told_ids == ids(hint) != told["2 + 2?"].token_ids
    assert told["text"].told_ids == ids([{"role": "user", "content": "the text is 5"}])
    assert told["same"].told_ids == told["none"].told_ids == () and told["same"].teachers_ids == told["same"].token_ids
    assert ("data", f"of 2 of {len(plan.prompts.train)} prompts the teacher reads something else") in plan.prompts.notes
    (default, _) = plan.teachers
    assert told["text"].told_ids in default.wanted and told["text"].token_ids not in default.wanted


def some(count: int, teachers: tuple[str, ...] = ("default",)) -> tuple[list[Rollout], PromptSet]:
    """Rollouts, and their prompts: some told something else, of a few teachers and sources."""
    rng = random.Random(random.random())
    made = [rollout(rng, i) for i in range(count)]
    prompts = [
        Prompt(str(i), "", (), None, tuple(r.prompt_ids), "", teacher=rng.choice(teachers), source=rng.choice("ab"),
               told_ids=tuple(rng.randrange(4, VOCABULARY) for _ in range(rng.choice((0, 1, 9)))))
        for i, r in enumerate(made)
    ]  # fmt: skip
    return [replace(r, prompt_index=i) for i, r in enumerate(made)], PromptSet(tuple(prompts))


@pytest.mark.random
@pytest.mark.parametrize("tokens", [None, 40])
def test_a_micro_batch_is_one_teachers_and_has_what_it_reads(tokens: int | None) -> None:
    for _ in range(10):
        rollouts, prompts = some(random.randrange(1, 12), ("x", "y", "z"))
        ranks = random.randrange(1, 4)
        packers = [Packer(place(rank, ranks), 0, 2, tokens, 5) for rank in range(ranks)]
        parts = [packer.pack(rollouts, 2, prompts) for packer in packers]
        assert len({tuple(b.teacher for b in part) for part in parts}) == 1  # the same on every rank, in one order
        assert [b.teacher for b in parts[0]] == sorted(b.teacher for b in parts[0])
        every = [b for part in parts for b in part]
        assert sorted(r.sequence_id for b in every for r in b.rollouts) == list(range(len(rollouts)))
        for batch in every:
            assert {prompts[r.prompt_index].teacher for r in batch.rollouts} <= {batch.teacher}
            own = [prompts[r.prompt_index] for r in batch.rollouts]
            assert (batch.told is not None) == any(p.told_ids for p in own)
            read, mine, theirs = batch.for_teacher, batch.loss_tokens(), batch.for_teacher.loss_tokens()
            if tokens is not None:
                assert read.input_ids.size(1) <= tokens and batch.input_ids.size(1) <= tokens
            for name in ("token_ids", "guided", "sequence", "behavior_log_probs"):
                torch.testing.assert_close(getattr(mine, name), getattr(theirs, name), equal_nan=True, rtol=0, atol=0)
            assert torch.equal(read.labels.flatten()[theirs.rows], theirs.token_ids)
            for row, rollout_ in zip(read.rollouts, batch.rollouts, strict=True):
                prompt = prompts[rollout_.prompt_index]
                assert tuple(row.prompt_ids) == prompt.teachers_ids
                assert row.prefix_ids + row.response_ids == rollout_.prefix_ids + rollout_.response_ids


@pytest.mark.random
def test_rows_have_room_for_what_the_teacher_reads() -> None:
    rollouts, prompts = some(6)
    long = PromptSet(tuple(replace(p, told_ids=(7,) * 25) for p in prompts))  # the student's are 16 tokens at most
    batches = Packer(place(), 0, 2, 50, 5).pack(rollouts, 2, long)
    assert len(batches) >= 3 and all(b.for_teacher.input_ids.size(1) <= 50 for b in batches)


@pytest.mark.random
def test_metrics_are_summed_by_source_and_teacher() -> None:
    rollouts, prompts = some(9, ("x", "y"))
    sums, wanted = DeviceSums(), dict[str, float]()
    for batch in Packer(place(), 0, 4, None, 5).pack(rollouts, 2, prompts):
        tokens = batch.loss_tokens()
        value = torch.randn(len(tokens))
        sums.by_group(batch, {"value": value, "student_tokens": ~tokens.guided})
        for v, s in zip(value.tolist(), tokens.sequence.tolist(), strict=True):
            for group in prompts.groups(batch.rollouts[s].prompt_index):
                wanted[f"{group}/value"] = wanted.get(f"{group}/value", 0.0) + v
    found = sums.collect()
    several = len(prompts.teachers) > 1
    assert {k: v for k, v in found.sums.items() if k.endswith("value")} == pytest.approx(wanted, abs=1e-5)
    assert any(k.startswith("teacher/") for k in wanted) == several and any(k.startswith("source/") for k in wanted)
    shares = {k: v for k, v in _by_group(found, rollouts, prompts).items() if k.endswith("/share_of_tokens")}
    assert sum(v for k, v in shares.items() if k.startswith("source/")) == pytest.approx(1.0)
    of = prompts.sources[0]
    own = sum(r.loss_tokens for r in rollouts if prompts[r.prompt_index].source == of)
    assert shares[f"source/{of}/share_of_tokens"] == pytest.approx(own / sum(r.loss_tokens for r in rollouts))


def model(
    topology: Topology, tiny: TinyRun, names: tuple[str, ...], objective: str, kept: int = 4, **teacher: Any
) -> MegatronTrOPDModel:
    cfg = ModelConfig(micro_batch_size=2)
    cfg.validation.kept_rollouts = kept
    cfg.teacher.path, cfg.data.path, cfg.tropd.top_k = str(tiny.teacher), "unused", 8
    for key, value in teacher.items():
        setattr(cfg.teacher, key, value)
    cfg.teachers = {"coder": {"path": str(tiny.root / "coder")}, "again": {"path": str(tiny.teacher)}}
    source = StudentSource(tiny.student, "32", VOCABULARY)
    return MegatronTrOPDModel(
        OmegaConf.structured(cfg), None, topology=topology, objective=objectives.build(objective), student=source,
        teachers=names,
    )  # fmt: skip


@pytest.mark.random
@pytest.mark.parametrize("objective", ["tropd", "tropd_exact"])
@pytest.mark.parametrize("offload", [False, True])
def test_two_teachers_are_two_runs_with_one_each(
    tiny: TinyRun, topology: Topology, objective: str, offload: bool
) -> None:
    """Scores, hidden states and losses to the bit, of the same samples; gradients as far as sums may differ."""
    names = ("again", "coder", "default")
    rollouts, prompts = some(9, names)
    both = model(topology, tiny, names, objective, offload=offload)
    assert both.teachers["again"] is both.teachers["default"] is not both.teachers["coder"]
    batches = Packer(topology, 0, 2, None, 5).pack(rollouts, 0, prompts)
    scores = both.score(batches)
    tokens = sum(r.loss_tokens for r in rollouts)
    counts = {"step": 0, "loss_tokens": tokens, "sequences": len(rollouts)}
    loss, _ = both.get_loss_and_metrics(batches, scores, **counts)
    gradient = torch.cat([p.main_grad.flatten() for p in both.ddp.parameters()])
    alone, total = torch.zeros_like(gradient), 0.0
    for name in names:
        one = model(topology, tiny, (name,), objective)
        own = [i for i, batch in enumerate(batches) if batch.teacher == name]
        if not own:
            continue
        for i, score in zip(own, one.score([batches[i] for i in own]), strict=True):
            for field, value in vars(score).items():
                if isinstance(value, torch.Tensor):
                    assert torch.equal(value, getattr(scores[i], field)), (name, field)
        part, _ = one.get_loss_and_metrics([batches[i] for i in own], [scores[i] for i in own], **counts)
        alone += torch.cat([p.main_grad.flatten() for p in one.ddp.parameters()])
        total += part
    assert loss == pytest.approx(total, rel=1e-6, abs=1e-9)
    torch.testing.assert_close(gradient, alone, rtol=1e-4, atol=1e-7)
    found = both.get_divergences(batches).sums
    assert found["tokens"] == tokens == sum(found[f"source/{s}/tokens"] for s in prompts.sources)


@pytest.mark.random
@pytest.mark.parametrize("tokens", [None, 60])
def test_r_is_that_of_the_two_texts(tiny: TinyRun, topology: Topology, tokens: int | None) -> None:
    """log pi_T is transformers' after what the teacher reads, log pi_S after what the student reads."""
    rollouts, prompts = some(5)
    one, first = (model(topology, tiny, ("default",), "tropd", kept) for kept in (5, 2))
    batches = Packer(topology, 0, 2, tokens, 5).pack(rollouts, 0, prompts)
    scores = one.score(batches)
    _, sums = one.get_loss_and_metrics(batches, scores, step=0, loss_tokens=1, sequences=1, keep_tokens=True)
    theirs, mine = (AutoModelForCausalLM.from_pretrained(path).eval() for path in (tiny.teacher, tiny.student))
    by_id = {r.sequence_id: r for r in rollouts}
    some_kept = sorted(sums.kept, key=lambda kept: kept["sequence_id"])
    assert [kept["sequence_id"] for kept in some_kept] == [r.sequence_id for r in rollouts if r.loss_tokens]
    _, sums = first.get_loss_and_metrics(batches, scores, step=0, loss_tokens=1, sequences=1, keep_tokens=True)
    assert sums.kept == some_kept[:2]
    for kept in some_kept:
        r = by_id[kept["sequence_id"]]
        said, read = r.prefix_ids + r.response_ids, prompts[r.prompt_index].teachers_ids
        assert kept["token_ids"] == said
        wanted = log_probs(theirs, list(read), said) - log_probs(mine, r.prompt_ids, said)
        torch.testing.assert_close(torch.tensor(kept["log_ratio"]), wanted, rtol=0, atol=1e-4)
    divergences = one.get_divergences(batches).sums
    kl = sum(float(reverse_kl(mine, theirs, r, prompts[r.prompt_index].teachers_ids)) for r in rollouts)
    assert divergences["reverse_kl"] == pytest.approx(kl, rel=1e-4)


@torch.no_grad()
def log_probs(reference: Any, prompt: list[int], said: list[int]) -> torch.Tensor:
    """Of each token of ``said`` after ``prompt``."""
    logits = reference(torch.tensor([prompt + said])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return logits.gather(1, torch.tensor(said)[:, None])[:, 0]


@pytest.mark.random
def test_a_first_pass_leaves_out_what_the_teacher_generated(tiny: TinyRun, topology: Topology) -> None:
    """REOPOLD's first stage: a mean over the student's tokens that the mask keeps; prefix tokens are imitated."""
    theirs, mine = (AutoModelForCausalLM.from_pretrained(path).eval() for path in (tiny.teacher, tiny.student))
    weight, one = random.uniform(0.1, 1), model(topology, tiny, ("default",), "reopold_2stage")
    one.objective = objectives.build("reopold_2stage", guidance_weight=weight)
    floor, sure = one.objective.c, False
    while not sure:
        rollouts, prompts = some(9)
        said = [(r, r.prefix_ids + r.response_ids) for r in rollouts]
        log_s = torch.cat([log_probs(mine, r.prompt_ids, ids) for r, ids in said])
        log_t = torch.cat([log_probs(theirs, list(prompts[r.prompt_index].teachers_ids), ids) for r, ids in said])
        guided = torch.cat([torch.arange(len(ids)) < len(r.prefix_ids) for r, ids in said])
        ratio = (log_t - log_s).double()
        keep = ~guided & (ratio >= floor)
        # None so near to the floor that rounding decides, and some of each kind.
        sure = bool((ratio - floor).abs().min() > 1e-3 and keep.any() and guided.any())
    batches = Packer(topology, 0, 2, None, 5).pack(rollouts, 0, prompts)
    counts = {"step": 0, "loss_tokens": len(ratio), "sequences": len(rollouts)}
    loss, _ = one.get_loss_and_metrics(batches, one.score(batches), **counts)
    own = -(ratio.clamp(min=floor) * log_s)[keep].mean()
    assert loss == pytest.approx(float(own - weight * log_s[guided].sum() / len(ratio)), rel=1e-3, abs=1e-4)


@torch.no_grad()
def reverse_kl(mine: Any, theirs: Any, r: Rollout, read: tuple[int, ...]) -> torch.Tensor:
    said = r.prefix_ids + r.response_ids
    student, teacher = (
        of(torch.tensor([[*prompt, *said]])).logits[0, len(prompt) - 1 : -1, :VOCABULARY].double().log_softmax(-1)
        for of, prompt in ((mine, r.prompt_ids), (theirs, read))
    )
    return (student.exp() * (student - teacher)).sum()


@pytest.mark.random
def test_hidden_states_are_of_what_the_teacher_reads(tiny: TinyRun, topology: Topology) -> None:
    rollouts, prompts = some(6)
    long = PromptSet(tuple(replace(p, told_ids=(7, *p.token_ids)) for p in prompts))
    one = model(topology, tiny, ("default",), "tropd_exact")
    batches = Packer(topology, 0, 2, None, 5).pack(rollouts, 0, long)
    kept, wanted, others = (
        one.score(of) for of in (batches, [b.for_teacher for b in batches], [replace(b, told=None) for b in batches])
    )
    for a, b, c in zip(kept, wanted, others, strict=True):
        assert torch.equal(a.hidden, b.hidden) and not (len(c.hidden) and torch.equal(a.hidden, c.hidden))


def test_told_what_the_student_reads_a_teacher_says_the_same(tiny: TinyRun, topology: Topology) -> None:
    """To the bit: the path of another prompt, taken with an equal one."""
    rollouts, prompts = some(4)
    plain = PromptSet(tuple(replace(p, told_ids=()) for p in prompts))
    equal = PromptSet(tuple(replace(p, told_ids=p.token_ids) for p in prompts))
    one, packer = model(topology, tiny, ("default",), "tropd"), Packer(topology, 0, 2, None, 5)
    first, second = (one.score(packer.pack(rollouts, 0, of)) for of in (plain, equal))
    assert all(b.told is not None for b in packer.pack(rollouts, 0, equal))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.log_probs, b.log_probs) and torch.equal(a.top_k_log_probs, b.top_k_log_probs)


def test_a_batch_moves_with_what_the_teacher_reads() -> None:
    rollouts, prompts = some(6)
    told = PromptSet(tuple(replace(p, told_ids=(5, 6)) for p in prompts))
    (batch, *_) = Packer(place(), 0, 9, None, 5).pack(rollouts, 0, told)
    moved: TokenBatch = batch.to(torch.device("meta"))
    assert moved.told is not None and moved.told.input_ids.device.type == "meta"


def test_the_plan_counts_every_teacher() -> None:
    """What stays adds up; what comes and goes is the largest on the device, and all of it on the host."""
    student, small, large = (SHAPES[name] for name in ("Qwen3-1.7B", "Qwen3-4B", "Qwen3-8B"))
    required = ["pretrained_checkpoint.restore_from_path=s", "model.teacher.path=t", "model.data.path=d"]
    required += ["model.teachers.code.path=c", "model.data.teacher_key=subject"]

    def plan(*keys: str) -> tuple[Memory, Memory, Memory]:
        cfg = command_line([*required, *keys])
        code = with_teacher(cfg, "code")
        others = [(code, large)]
        alone = estimate(code, student, large, gpu(79))
        host = host_memory(cfg, student, small, gpu(79), others=others)
        return estimate(cfg, student, small, gpu(79), others=others), alone, host

    both, alone, _ = plan()
    ratio = both.resident["teacher"] / alone.resident["teacher"]
    assert ratio == pytest.approx(1 + small.parameters() / large.parameters(), rel=1e-3)
    both, alone, host = plan("model.teacher.offload=true")
    assert "teacher" not in both.resident and both.phases["teacher scores"] == alone.phases["teacher scores"]
    pinned = 2 * (small.parameters() + large.parameters())
    assert host.resident["teacher, pinned"] == pytest.approx(pinned, rel=1e-2)
    both, alone, _ = plan("model.teachers.code.offload=true")
    assert both.resident["teacher"] == pytest.approx(2 * small.parameters(), rel=1e-2)
    assert both.phases["teacher scores"]["teacher's turn"] == alone.phases["teacher scores"]["teacher"]
    cfg = command_line([*required, "model.teacher.offload=true"])
    poor = replace(gpu(79), host=host.total - GIB)
    with pytest.raises(ConfigError, match=r"^model.teacher.offload = True: a host needs .*teacher, pinned"):
        check_host(cfg, host, poor)


def test_one_checkpoint_is_one_teacher_whatever_is_spelled_out(tiny: TinyRun, tmp_path: Path) -> None:
    """Unless it follows the student."""
    path = {"model.teachers.coder.path": tiny.teacher}
    alone = routed(tiny, tmp_path, **path)
    spelled = {"model.teachers.coder.precision": 32, "model.teachers.coder.tensor_model_parallel_size": 1}
    assert routed(tiny, tmp_path, **path, **spelled).memory.resident == alone.memory.resident
    one = routed(tiny, tmp_path, **{"model.teachers.coder.path": tiny.student, "model.teacher.path": tiny.student})
    follows = {"model.teacher.path": tiny.student, "model.teacher.follow_steps": 3}
    two = routed(tiny, tmp_path, **{"model.teachers.coder.path": tiny.student}, **follows)
    assert two.memory.resident["teacher"] == 2 * one.memory.resident["teacher"]


def test_a_teacher_without_prompts_does_nothing_and_is_refused(tiny: TinyRun, tmp_path: Path) -> None:
    said = refused(tiny, tmp_path, **{"model.teachers.poet.path": tiny.teacher})
    assert said.startswith("model.teachers.poet.path = ") and "no prompt has it: leave it out" in said
    source = f"[{{path: {tmp_path / 'data.jsonl'}, teacher: coder}}]"
    keys = {"model.data.path": "null", "model.data.sources": source, "model.data.teacher_key": ...}
    assert [t.name for t in routed(tiny, tmp_path, **keys).teachers] == ["coder"]
    follows = {"model.teacher.path": tiny.student, "model.teacher.follow_steps": 3}
    assert "no prompt has model.teacher: set it to null" in refused(tiny, tmp_path, **keys, **follows)


def test_only_the_default_teacher_answers_benchmarks() -> None:
    required = ["pretrained_checkpoint.restore_from_path=s", "model.teacher.path=t", "model.data.path=d"]
    required += ["model.teachers.code.path=c", "model.data.teacher_key=subject", "model.teacher.precision=bf16"]
    cfg = command_line([*required, "model.validation.benchmarks=[capitals]", "model.validation.score_teacher=true"])
    prompts = PromptSet((Prompt("0", "", (), None, (5,), "", teacher="code"),))
    shapes = {"default": SHAPES["Qwen2.5-72B-Instruct"], "code": SHAPES["Qwen3-4B"]}
    found = used_teachers(cfg, shapes, PromptSplit(prompts, PromptSet(()), 0))
    assert [(t.name, t.scored, t.scores) for t in found] == [("default", True, False), ("code", False, True)]
    assert [t.name for t in loaded_teachers(cfg, found)] == ["code"]  # the other only generates


def test_too_little_memory_names_the_teacher_that_takes_it() -> None:
    required = ["pretrained_checkpoint.restore_from_path=s", "model.teacher.path=t", "model.data.path=d"]
    required += ["model.teachers.code.path=c", "model.data.teacher_key=subject"]
    for more in ([], ["model.teachers.code.offload=true"]):
        cfg = command_line([*required, *more])
        code, student, large = with_teacher(cfg, "code"), SHAPES["Qwen3-1.7B"], SHAPES["Qwen2.5-72B-Instruct"]
        memory = estimate(cfg, student, SHAPES["Qwen3-4B"], gpu(79), others=[(code, large)])
        wanted = (
            r"^model.teachers.code.tensor_model_parallel_size = None: the plan needs .*is teacher('s turn)?: raise it"
        )
        with pytest.raises(ConfigError, match=wanted), about_teacher("code"):
            check_memory(code, memory, gpu(180))


def test_sources_have_names_of_their_own() -> None:
    assert _names(["a/x.jsonl", "b/x.jsonl", "c/y z?.jsonl", "x.jsonl-1"]) == [
        "x.jsonl-1_", "x.jsonl-2", "y_z_.jsonl", "x.jsonl-1",
    ]  # fmt: skip
    assert _names(["only.jsonl"]) == [""]


def test_a_teacher_that_is_told_messages_has_the_records_system_turn() -> None:
    record = {"messages": [{"role": "user", "content": "hi"}], "system": "Be brief."}
    prompt = checked({**record, "hint": [{"role": "user", "content": "ho"}]}, "", PromptKeys(teacher_prompt="hint"))
    assert prompt is not None and [turn["content"] for turn in prompt.told] == ["Be brief.", "ho"]
    same = checked(record, "", PromptKeys(teacher_prompt="messages"))
    assert same is not None and same.told == ()
