"""The ways to run on a number of GPUs, against a search that knows none of the planner's shortcuts."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import pytest

from examples.benchmarks import scaling, scaling_ways
from examples.benchmarks.recipes import gpu_recipes, plan_recipe
from examples.benchmarks.shapes import SHAPES
from nemo_tropd.config import ConfigError, TropdConfig
from nemo_tropd.config_checks import check
from nemo_tropd.convert.families import ConversionError
from nemo_tropd.loss.inputs import CHUNK_BYTES
from nemo_tropd.planner import rates
from nemo_tropd.planner.degrees import layout, scores_early
from nemo_tropd.planner.engine import engine_load
from nemo_tropd.planner.host import host_memory
from nemo_tropd.planner.machine import GIB, HOST_ENGINE, Machine
from nemo_tropd.planner.memory import estimate, placement
from nemo_tropd.planner.pace import time_lines
from nemo_tropd.planner.seconds import step_seconds
from nemo_tropd.planner.teacher_engines import teacher_engines
from nemo_tropd.planner.verdict import check_kv_cache, check_memory
from nemo_tropd.planner.ways import (
    WORTH_SAYING,
    Way,
    Work,
    best,
    cost,
    gpus_of,
    reason,
    way_lines,
    way_of,
    ways,
    with_keys,
)
from nemo_tropd.planner.wire import estimate_wire
from nemo_tropd.rollout.placement import teacher_utilization
from tests.e2e.compose import CONF, compose_config

BASE = ["pretrained_checkpoint.restore_from_path=s", "model.teacher.path=t", "model.data.path=d"]
AHEAD = CONF / "qwen2.5-1.5b-from-qwen2.5-14b-2n8g-ahead.yaml"
DEDICATED = {
    "model.rollout.placement": "dedicated",
    "model.rollout.dedicated.address": "node1:29600",
    "model.rollout.dedicated.engines": 8,
}
GRID = [i / 20 for i in range(1, 20)]


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)


def gpu(gib: float, host: float | None = None) -> Machine:
    return Machine("gpu", gib * GIB, CHUNK_BYTES["cuda"], "a test", host)


@dataclass(frozen=True)
class Case:
    """A configuration that a user could write, and its models."""

    keys: dict[str, object]
    cfg: TropdConfig
    work: Work
    gpus: int
    node: int


@cache
def base() -> TropdConfig:
    return compose_config(BASE)


def typed(keys: Mapping[str, object]) -> list[str]:
    """As on a command line."""
    words = {True: "true", False: "false", None: "null"}
    return [f"{k}={words[v] if v is None or isinstance(v, bool) else repr(v)}" for k, v in keys.items()]


def drawn() -> Case:
    """Any configuration that its own checks accept."""
    while True:
        student, teacher = (SHAPES[n] for n in (random.choice(STUDENTS), random.choice(TEACHERS)))
        node, nodes = random.choice([1, 2, 4, 8]), random.choice([1, 1, 2, 3, 4])
        tensor, pipeline = random.choice([1, 1, 2, 4]), random.choice([1, 1, 1, 2])
        keys: dict[str, object] = {
            "trainer.num_nodes": nodes,
            "trainer.devices": node,
            "model.tensor_model_parallel_size": tensor,
            "model.pipeline_model_parallel_size": pipeline,
            "model.teacher.tensor_model_parallel_size": random.choice([None, None, 1, 2, 4, 8]),
            "model.teacher.offload": random.random() < 0.3,
            "model.teacher.score_early": random.random() < 0.8,
            "model.optim.distributed": random.random() < 0.7,
            "model.recompute": random.choice([None, "selective", "full"]),
            "model.global_batch_size": 4 * random.choice([8, 16, 24, 64, 128]),
            "model.tokens_per_micro_batch": random.choice([None, 9216]),
            "model.rollout.gpu_memory_utilization": random.choice([0.2, 0.3, 0.4, 0.6]),
            "model.rollout.max_new_tokens": random.choice([1024, 4096, 8096]),
            "model.rollout.max_num_seqs": random.choice([16, 64, 256]),
            "model.rollout.sleep": random.random() < 0.8,
            "model.data.held_out": random.choice([0, 64]),
        }
        gpus = node * nodes
        if random.random() < 0.3:
            engines = random.choice([1, 2, node, 2 * node])
            address = random.choice(["127.0.0.1:29600", "node1:29600", "[::1]:29600"])
            keys |= DEDICATED | {"model.rollout.dedicated.engines": engines}
            keys |= {
                "model.rollout.dedicated.address": address,
                "model.rollout.steps_ahead": random.choice([0, 1, 3]),
            }
            gpus += engines
            node = node if "node1" in address else gpus
        cfg = with_keys(base(), keys)
        try:
            check(cfg)
            student.check_layout(tensor, pipeline)
            teacher.check_layout(layout(cfg).teacher_degree, pipeline if layout(cfg).teacher_tensor is None else 1)
        except (ConfigError, ConversionError):
            continue
        needs = random.choice([{}, {}, {"exact": True}, {"reference": True}, {"first_pass": True}])
        work = Work(student, {"default": teacher}, gpu(random.choice([40, 79, 139])), needs)
        return Case(keys, cfg, work, gpus, node)


STUDENTS = ("DeepSeek-R1-Distill-Qwen-1.5B", "Qwen3-1.7B", "Qwen3-4B", "Qwen3-8B", "smollm2-student-24l")
TEACHERS = ("Skywork-OR1-7B", "Qwen3-4B", "Qwen3-14B", "Qwen3-32B", "SmolLM2-135M-Instruct")


def fits(cfg: TropdConfig, work: Work) -> bool:
    """As a plan of ``cfg`` alone would say."""
    (teacher,) = work.teachers.values()
    try:
        check_memory(cfg, estimate(cfg, work.student, teacher, work.machine, **work.needs), work.machine)
        check_kv_cache(cfg, work.student, teacher, work.machine)
        teacher_engines(cfg, teacher, work.machine)
    except ConfigError:
        return False
    return True


def phases_of(cfg: TropdConfig, work: Work) -> dict[str, float]:
    (teacher,) = work.teachers.values()
    wire = estimate_wire(cfg, work.student, teacher, work.machine, exact=work.exact)
    return step_seconds(cfg, work.student, teacher, work.machine, wire)


def seconds_of(cfg: TropdConfig, work: Work) -> float:
    """A step, by hand: who waits for whom."""
    phases, where, ahead = phases_of(cfg, work), placement(cfg, work.machine), cfg.model.rollout.steps_ahead
    engines = phases["rollouts"] + phases["weights to the engine"]
    if where == "dedicated" and ahead:
        return max(engines, sum(phases.values()) - engines)
    hidden = 0.0
    if where == "dedicated" and scores_early(cfg, where, exact=work.exact, in_turns=False):
        waves = engine_load(cfg, work.student, work.machine).waves
        hidden = min(phases["rollouts"], phases["teacher"]) * (waves - 1) / waves
    return sum(phases.values()) - hidden


def others_of(case: Case) -> list[Way]:
    found = ways(case.cfg, case.work, case.gpus, case.node)
    assert found[0].cfg is case.cfg, "what is written comes first"
    return found[1:]


@pytest.mark.random
def test_the_best_takes_the_least_time_of_all_that_fit() -> None:
    case = drawn()
    found = ways(case.cfg, case.work, case.gpus, case.node)
    for way in found:
        assert way.seconds == pytest.approx(seconds_of(way.cfg, case.work)), way.spoken
        assert fits(way.cfg, case.work) == (not way.refusal), way.refusal
    able = [seconds_of(way.cfg, case.work) for way in found if fits(way.cfg, case.work)]
    chosen = best(found)
    assert (chosen is None) == (not able)
    if chosen is not None:
        assert chosen.seconds == pytest.approx(min(able))
        said = reason(chosen, found)
        assert re.search(r"\d+%|do not fit|no complete nodes", said) and (
            chosen.place == "dedicated" or "generate" in said
        )
        assert ("it costs" in cost(chosen, case.work)) == (chosen.ahead > 0)


@pytest.mark.random
def test_what_a_way_sets_can_be_written_and_is_all_that_it_changes() -> None:
    case = drawn()
    for way in random.sample(found := others_of(case), min(4, len(found))):
        again = compose_config([*BASE, *typed(case.keys | way.keys(case.cfg))])
        assert again == way.cfg
        engines = again.model.rollout.dedicated.engines if way.place == "dedicated" else 0
        ranks = layout(again).world_size
        assert (way.trainers, way.engines) == (ranks, engines)
        most = min(case.gpus - ranks, again.model.global_batch_size) if engines else 0
        assert ranks + engines == case.gpus or engines == most


@pytest.mark.random
def test_every_split_that_can_be_launched_is_looked_at() -> None:
    case = drawn()
    found = {(way.place, way.trainers, way.ahead) for way in others_of(case)}
    pipeline = case.cfg.model.pipeline_model_parallel_size

    def accepted(nodes: int, devices: int, keys: dict[str, object]) -> bool:
        keys = {"trainer.num_nodes": nodes, "trainer.devices": devices, "model.optim.distributed": False, **keys}
        try:
            check(with_keys(case.cfg, keys))
        except ConfigError:
            return False
        return True

    wanted = set()
    for nodes in range(1, -(-case.gpus // case.node) + 1):
        for devices in range(1, case.node + 1):
            apart = case.gpus - nodes * devices
            whole = nodes == 1 or devices == case.node
            if whole and apart > 0 and accepted(nodes, devices, DEDICATED | {"model.rollout.dedicated.engines": apart}):
                wanted |= {("dedicated", nodes * devices, ahead) for ahead in (0, 1)}
    place = "process" if pipeline > 1 else "colocated"
    turns: dict[str, object] = {"model.rollout.placement": "process", "model.rollout.steps_ahead": 0}
    if case.gpus % case.node == 0 and accepted(case.gpus // case.node, case.node, turns):
        wanted |= {(place, case.gpus, ahead) for ahead in ((0, 1) if pipeline > 1 else (0,))}
    assert found == wanted


@pytest.mark.random
def test_no_share_of_a_gpu_and_no_place_of_the_teacher_is_faster() -> None:
    case = drawn()
    for way in random.sample(found := others_of(case), min(6, len(found))):
        for offload in (False, True):
            for share in GRID:
                if way.place == "dedicated" and share > teacher_utilization(case.work.machine.bytes):
                    continue  # beside it are a context, graphs and communicators
                new = {"model.teacher.offload": offload, "model.rollout.gpu_memory_utilization": share}
                cfg = with_keys(way.cfg, new)
                if fits(cfg, case.work):
                    assert not way.refusal, f"{new} fits: {way.refusal}"
                    # In turns, a teacher that scores early gains by engines that are late with more waves.
                    early = not way.ahead and case.work.pace(cfg).hidden
                    assert early or way.seconds <= seconds_of(cfg, case.work) * (1 + 1e-9), new


@pytest.mark.random
def test_seconds_fall_where_they_must() -> None:
    """With engines, trainers and shorter responses; one step ahead is the longer of both, and never the sum."""
    case = drawn()
    work, found = case.work, [way for way in others_of(case) if way.place == "dedicated"]
    for way in found:
        if not way.ahead:
            continue
        assert way.seconds == max(way.pace.engines, way.pace.trainer)
        turns = next(w for w in found if w.trainers == way.trainers and not w.ahead)
        copies = way.pace.phases["weights to the host"] + way.pace.phases["weights to the engine"]
        same = with_keys(way.cfg, {"model.rollout.steps_ahead": 0})
        assert way.seconds <= seconds_of(same, work) + copies and turns.seconds <= seconds_of(same, work) + 1e-9
        more = with_keys(way.cfg, {"model.rollout.dedicated.engines": way.engines + random.randint(1, 9)})
        assert phases_of(more, work)["rollouts"] <= way.pace.phases["rollouts"] * (1 + 1e-9)
        doubled = with_keys(way.cfg, {"trainer.num_nodes": 2 * way.cfg.trainer.num_nodes})
        assert phases_of(doubled, work)["student"] < way.pace.phases["student"]
    lengths = sorted(random.uniform(0.05, 1) for _ in range(4))
    paces = [work.pace(case.cfg, length).phases for length in (*lengths, 1.0)]
    for phase in ("rollouts", "teacher", "student"):
        values = [pace[phase] for pace in paces]
        assert values == sorted(values), phase
    assert paces[-1] == work.pace(case.cfg).phases, "a plan is for the greatest length"


def test_a_single_response_of_the_greatest_length_is_waited_for() -> None:
    recipe = plan_recipe(CONF / "deepseek-1.5b-from-skywork-7b-1n8g.yaml", CHUNK_BYTES["cuda"])
    phases = recipe.work.pace(recipe.cfg, 0.01).phases
    assert phases["rollouts"] > 8096 * (rates.STEP_S + 2 * 1.77e9 / rates.BYTES)
    assert phases["student"] < 0.11 * recipe.work.pace(recipe.cfg).phases["student"]


def test_ways_that_do_not_fit_say_why_and_are_not_chosen() -> None:
    recipe = plan_recipe(CONF / "qwen3-4b-from-qwen3-14b-1n8g.yaml", CHUNK_BYTES["cuda"])
    small = replace(recipe.work, machine=gpu(24))
    found = ways(recipe.cfg, small, 16, 8)
    assert len(found) > 6 and all("only 24.00 GiB are available" in way.refusal for way in found)
    assert best(found) is None
    # A host that cannot pin the teacher leaves the ways that keep it on the device.
    written = with_keys(recipe.cfg, {"trainer.num_nodes": 2})
    poor = replace(recipe.work, machine=gpu(79, host=120 * GIB))
    assert "model.teacher.offload" in way_of(written, poor).refusal
    chosen = best(ways(written, poor, 16, 8))
    assert chosen is not None and not chosen.cfg.model.teacher.offload


def test_engines_on_the_ranks_own_host_take_its_memory() -> None:
    recipe = plan_recipe(AHEAD, CHUNK_BYTES["cuda"])
    (teacher,) = recipe.work.teachers.values()
    for address, engines in (("node1:29600", 0), ("127.0.0.1:29600", 8), ("localhost:1", 8), ("[::1]:29600", 8)):
        cfg = with_keys(recipe.cfg, {"model.rollout.dedicated.address": address})
        held = host_memory(cfg, recipe.student, teacher, recipe.machine).resident
        assert held.get("engines beside the ranks", 0) == engines * HOST_ENGINE
        assert gpus_of(cfg, recipe.machine) == (16, 16 if engines else 8)
    fewer = host_memory(recipe.cfg, recipe.student, teacher, recipe.machine, beside=3).resident
    assert fewer["engines beside the ranks"] == 3 * HOST_ENGINE
    # Of a node's eight GPUs two train: the plan for a host that holds 200 GiB counts the other six's engines.
    part = next(w for w in ways(recipe.cfg, recipe.work, 16, 8) if w.trainers == 2)
    needed = recipe.work.host(part.cfg, 6).total
    assert needed - recipe.work.host(part.cfg).total == 6 * HOST_ENGINE
    short = replace(recipe.work, machine=gpu(79, host=needed - GIB))
    again = next(w for w in ways(recipe.cfg, short, 16, 8) if w.trainers == 2 and w.ahead)
    assert "engines beside the ranks" in again.refusal


def test_a_recipe_for_two_nodes_is_the_best_way_on_them() -> None:
    recipe = plan_recipe(AHEAD, CHUNK_BYTES["cuda"])
    found = ways(recipe.cfg, recipe.work, 16, 8)
    chosen = best(found)
    assert chosen is found[0] and (chosen.trainers, chosen.engines, chosen.ahead) == (8, 8, 1)
    assert way_lines(recipe.cfg, recipe.work) == []
    turns = min(way.seconds for way in found if way.place == "colocated")
    assert turns > WORTH_SAYING * chosen.seconds
    said = dict(time_lines(recipe.cfg, recipe.student, chosen.pace))["time of a step"]
    assert said.startswith("at most 91 s") and "rollouts and weights to the engine beside the rest" in said
    assert reason(chosen, found).startswith(
        "generation takes 71% of 1.7 min where all GPUs do both; on GPUs of its own"
    )


def test_a_faster_way_is_named_with_its_keys_reason_and_cost() -> None:
    recipe = plan_recipe(CONF / "qwen3-4b-from-qwen3-14b-1n8g.yaml", CHUNK_BYTES["cuda"], {"trainer.num_nodes": 2})
    ((label, line),) = way_lines(recipe.cfg, recipe.work)
    assert label == "a faster way"
    assert re.match(r"3\.4 min a step instead of 4\.\d min \(estimated; 1\.9 min instead of 2\.1 min if resp", line)
    assert "on 16 GPUs: 4 GPUs train, 12 generate, 1 step ahead. Generation takes 8" in line
    assert "it costs rollouts by weights 1 step older than the student's, and 14.98 GiB of rank 0's host" in line
    keys = line.partition(". Set ")[2].split()
    again = plan_recipe(recipe.path, CHUNK_BYTES["cuda"], dict(key.split("=") for key in keys))
    assert again.way.seconds < recipe.way.seconds / WORTH_SAYING and again.cfg.model.rollout.steps_ahead == 1
    assert {"trainer.devices=4", "model.rollout.dedicated.engines=12", "model.rollout.steps_ahead=1"} <= set(keys)
    on_cpu = replace(recipe.work, machine=Machine("cpu", 64 * GIB, CHUNK_BYTES["cpu"], "a test"))
    assert way_lines(recipe.cfg, on_cpu) == []


def test_advice_that_shorter_responses_turn_around_is_not_given() -> None:
    """Two GPUs that train and six that generate would be faster with the longest responses alone."""
    recipe = plan_recipe(CONF / "qwen3-4b-from-qwen3-14b-1n8g.yaml", CHUNK_BYTES["cuda"])
    found = ways(recipe.cfg, recipe.work, 8, 8)
    chosen = best(found)
    assert chosen is not None and recipe.way.seconds > WORTH_SAYING * chosen.seconds
    shorter = recipe.work.pace(chosen.cfg, rates.SHORTER).seconds
    assert shorter > recipe.work.pace(recipe.cfg, rates.SHORTER).seconds
    assert way_lines(recipe.cfg, recipe.work) == []


def test_a_process_on_the_ranks_gpu_gains_nothing_by_working_ahead() -> None:
    keys = ["trainer.devices=8", "model.pipeline_model_parallel_size=2", "model.rollout.steps_ahead=1"]
    work = Work(SHAPES["Qwen3-1.7B"], {"default": SHAPES["Qwen3-4B"]}, gpu(79))
    cfg = compose_config([*BASE, *keys])
    pace = work.pace(cfg)
    assert pace.seconds == pytest.approx(sum(pace.phases.values())) and "shares rank 0's GPU" in pace.how
    assert work.pace(with_keys(cfg, {"model.rollout.steps_ahead": 0})).seconds < pace.seconds


def test_an_early_teacher_is_hidden_behind_all_waves_but_the_last() -> None:
    keys = [f"{key}={value}" for key, value in DEDICATED.items()]
    work = Work(SHAPES["Qwen3-1.7B"], {"default": SHAPES["Qwen3-4B"]}, gpu(79))
    base = [*BASE, "trainer.devices=8", *keys]
    for limit, waves in ((64, 1), (32, 2), (16, 4)):
        limits = ["model.rollout.gpu_memory_utilization=0.9", f"model.rollout.max_num_seqs={limit}"]
        cfg = compose_config([*base, *limits, "model.rollout.max_new_tokens=1024"])
        pace, late = work.pace(cfg), work.pace(with_keys(cfg, {"model.teacher.score_early": False}))
        assert late.hidden == 0 and late.phases == pace.phases
        assert pace.hidden == pytest.approx(min(pace.phases["rollouts"], pace.phases["teacher"]) * (1 - 1 / waves))
        assert ("all but the last" in pace.how) == (waves > 1)
        assert replace(work, needs={"exact": True}).pace(cfg).hidden == 0


@pytest.mark.random
def test_the_page_on_scaling_is_the_planners(tmp_path: Path) -> None:
    """``make scaling`` writes it anew. Of one recipe, any; and a picture of it."""
    path = random.choice(gpu_recipes(CONF))
    recipes = scaling.scale(path)
    choices = scaling.choices_of(recipes)
    page = (CONF.parent / "examples" / "figures" / "scaling.md").read_text(encoding="utf-8")
    rows = [line for line in scaling_ways.section({path.stem: choices}) if line.startswith(("|", "- "))]
    assert len(rows) > 3 and path.stem in page
    for row in rows:
        assert row.partition(path.stem)[2] in page, row
    assert choices[-1].gpus in (1, 512)
    for c in choices:
        assert c.best.seconds <= c.written.seconds and not c.best.refusal
        assert c.gpus == gpus_of(c.written.cfg, gpu(79))[0]
    scaling.draw(
        {path.stem: [scaling.point(recipe) for recipe in recipes]}, {path.stem: choices}, tmp_path / "page.png"
    )
    assert (tmp_path / "page.png").stat().st_size > 10_000
