"""The planner's arithmetic against independent counts, and every recipe against the GPU it names."""

from __future__ import annotations

import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from examples.benchmarks.recipes import MARK, Recipe, gpu_recipes, plan_recipe
from examples.benchmarks.shapes import SHAPES, known_shape
from nemo_tropd.batch import Rollout
from nemo_tropd.config import ConfigError
from nemo_tropd.loss.inputs import CHUNK_BYTES
from nemo_tropd.loss.teacher import TORCH_COPIES
from nemo_tropd.parallel.ranks import RankLayout, nodes_of
from nemo_tropd.planner.degrees import Degrees, layout
from nemo_tropd.planner.engine import engine_load
from nemo_tropd.planner.host import check_host, host_memory
from nemo_tropd.planner.machine import GIB, Machine
from nemo_tropd.planner.memory import EXACT_COPIES, estimate, placement, stage_parameters
from nemo_tropd.planner.pace import time_lines
from nemo_tropd.planner.roles import engine_groups, roles
from nemo_tropd.planner.seconds import spoken, step_seconds
from nemo_tropd.planner.teacher_engines import TeacherEngines, generation_lines, teacher_engines
from nemo_tropd.planner.verdict import check_kv_cache, check_memory
from nemo_tropd.planner.ways import gpus_of
from nemo_tropd.planner.wire import ROLLOUT_TOKEN, estimate_wire, ring
from nemo_tropd.rollout.collective import ROLLOUTS
from nemo_tropd.rollout.placement import device_groups, teacher_utilization
from nemo_tropd.training.objective import build_objective
from nemo_tropd.training.plan import print_plan
from nemo_tropd.training.plan_models import Teacher
from tests.e2e.compose import CONF, compose_config

RECIPES = gpu_recipes(CONF)
# Billions of parameters as the model cards give them (safetensors' own count).
PUBLISHED = {
    "DeepSeek-R1-Distill-Qwen-1.5B": 1.78,
    "Skywork-OR1-Math-7B": 7.62,
    "Qwen2.5-1.5B-Instruct": 1.54,
    "Qwen2.5-7B-Instruct": 7.62,
    "Qwen2.5-14B-Instruct": 14.77,
    "Qwen2.5-72B-Instruct": 72.71,
    "Qwen3-4B": 4.02,
    "Qwen3-8B": 8.19,
    "Qwen3-14B": 14.77,
    "Qwen3-32B": 32.76,
    "SmolLM2-135M-Instruct": 0.1345,
}


def gpu(gib: float) -> Machine:
    return Machine("gpu", gib * GIB, CHUNK_BYTES["cuda"], "a test")


@pytest.mark.parametrize(("name", "billions"), PUBLISHED.items())
def test_shapes_have_the_published_number_of_parameters(name: str, billions: float) -> None:
    assert SHAPES[name].parameters() / 1e9 == pytest.approx(billions, rel=4e-3)


def test_shapes_are_found_by_folder_whatever_the_case() -> None:
    assert known_shape("/models/qwen3-8b/") is SHAPES["Qwen3-8B"]
    assert known_shape("/models/unheard-of") is None


def test_the_planner_imports_no_torch() -> None:
    code = "import sys, examples.benchmarks.recipes; assert 'torch' not in sys.modules, 'torch was imported'"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=CONF.parent, timeout=60)


@pytest.mark.parametrize(("tensor", "data", "pipeline"), [(1, 1, 1), (2, 3, 1), (4, 2, 2), (1, 4, 3), (8, 8, 8)])
def test_groups_are_megatrons(tensor: int, data: int, pipeline: int) -> None:
    from megatron.core.parallel_state import RankGenerator

    theirs = RankGenerator(tp=tensor, ep=1, dp=data, pp=pipeline, cp=1, order="tp-cp-ep-dp-pp")
    ours = RankLayout(tensor * data * pipeline, tensor, pipeline)
    for rank in range(ours.world_size):
        assert list(ours.tensor_group(rank)) in theirs.get_ranks("tp")
        assert list(ours.model_group(rank)) in theirs.get_ranks("tp-pp")
        assert ours.rank(*ours.place(rank)) == rank


@pytest.mark.parametrize("teacher", [1, 2, 4, 8])
@pytest.mark.parametrize(("tensor", "data", "pipeline"), [(2, 4, 1), (4, 4, 2), (1, 8, 3), (8, 1, 2)])
def test_every_micro_batch_is_scored_once_and_reaches_its_owner(
    tensor: int, data: int, pipeline: int, teacher: int
) -> None:
    ranks = RankLayout(tensor * data * pipeline, tensor, pipeline, teacher)
    assert sorted(r for group in ranks.teacher_groups() for r in group) == list(range(ranks.world_size))
    for rank in range(ranks.world_size):
        group = ranks.teacher_group(rank)
        assert rank in group and len({ranks.place(r)[2] for r in group}) == 1, "a teacher lies within a stage"
    if ranks.teacher_tensor is None:
        assert ranks.replicas == 1 and teacher == tensor
        return
    batches = random.Random(tensor + data).randint(1, 7)
    scored: Counter[tuple[int, int]] = Counter()
    for group in ranks.teacher_groups():
        replica = {ranks.replica(r) for r in group}
        assert len(replica) == 1, "a teacher's ranks take the same micro-batches"
        seen = {ranks.place(r)[1] for r in group}
        for data_rank in seen:
            owner = data_rank % ranks.owners
            assert {ranks.owner(r) for r in group if ranks.place(r)[1] == data_rank} == {owner}
            scored.update((data_rank, i) for i in range(batches) if ranks.scorer_of(owner, i) in replica)
    assert scored == {(d, i): 1 for d in range(data) for i in range(batches)}
    for rank in range(ranks.world_size):
        for i in range(batches):
            replica_number = ranks.scorer_of(ranks.owner(rank), i)
            source = ranks.source(rank, replica_number)
            assert source in ranks.model_group(rank) and ranks.replica(source) == replica_number


@pytest.mark.parametrize(
    ("degrees", "message"),
    [
        ((6, 4, 1, None), r"6 processes cannot be split into tensor parallel 4 x pipeline parallel 1 = 4"),
        ((6, 2, 1, 4), r"must divide the 6 ranks of a pipeline stage"),
        ((6, 2, 1, 3), r"3 must divide the student's 2 or be a multiple"),
        ((4, 2, 0, None), r"at least 1"),
    ],
)
def test_degrees_that_do_not_go_together(degrees: tuple[int, int, int, int | None], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RankLayout(*degrees)


def test_the_teachers_degree_is_checked_with_the_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    base = ["pretrained_checkpoint.restore_from_path=s", "model.teacher.path=t", "model.data.path=d"]
    base += ["trainer.devices=6", "model.tensor_model_parallel_size=2", "model.global_batch_size=12"]
    key = "model.teacher.tensor_model_parallel_size"
    for degree, message in ((0, "at least 1"), (3, r"tensor_model_parallel_size = 2"), (4, "6 ranks of a pipeline")):
        with pytest.raises(ConfigError, match=message) as raised:
            compose_config([*base, f"{key}={degree}"])
        assert raised.value.key == key
    assert layout(compose_config([*base, f"{key}=1"])).replicas == 2
    assert layout(compose_config([*base, f"{key}=6"])).owners == 3


@pytest.mark.parametrize("name", ["Qwen3-4B", "Qwen3-8B", "Qwen2.5-7B-Instruct"])
@pytest.mark.parametrize("pipeline", [1, 2, 4])
def test_parameters_of_the_stages_add_up(name: str, pipeline: int) -> None:
    shape = SHAPES[name]
    whole = sum(stage_parameters(shape, Degrees(1, 1, 1)))
    assert whole == shape.parameters() + (shape.padded_vocab(1) - shape.vocab_size) * shape.hidden * (2 - shape.tied)
    layers, ends = stage_parameters(shape, Degrees(1, pipeline, 1))
    assert layers + ends >= whole / pipeline and layers <= whole / pipeline
    split = stage_parameters(shape, Degrees(4, pipeline, 1))
    assert layers / 4 < split[0] < layers / 4 * 1.001, "norms alone are not split"


def test_memory_falls_where_a_setting_promises_so() -> None:
    student, teacher = SHAPES["Qwen3-4B"], SHAPES["Qwen3-14B"]
    base = ["pretrained_checkpoint.restore_from_path=s", "model.teacher.path=t", "model.data.path=d"]
    base += ["trainer.devices=8", "model.global_batch_size=64"]

    def plan(*overrides: str):
        return estimate(compose_config([*base, *overrides]), student, teacher, gpu(79))

    plain = plan()
    resident, training = plain.resident, plain.phases["student passes"]
    assert resident["student"] == pytest.approx(2 * student.parameters(), rel=1e-3)
    assert resident["gradients"] == pytest.approx(4 * student.parameters(), rel=1e-3)
    assert resident["optimizer"] == pytest.approx(12 * student.parameters(), rel=1e-3)
    assert resident["teacher"] == pytest.approx(2 * teacher.parameters(), rel=1e-3)
    assert plan("model.optim.distributed=true").resident["optimizer"] == pytest.approx(resident["optimizer"] / 8)
    fp8 = plan("model.teacher.fp8=tensorwise").resident["teacher"]
    head = teacher.padded_vocab(1) * teacher.hidden
    assert fp8 == pytest.approx(teacher.parameters() - 2 * head + 2 * 2 * head, rel=1e-3)
    # Three bytes a number of the layers: Transformer Engine keeps what it casts beside the bf16 weights.
    both = plan("model.teacher.fp8=tensorwise", "model.teacher.fp8_param=false").resident["teacher"]
    assert both == pytest.approx(3 * teacher.parameters() - 2 * head, rel=1e-3)
    assert plan("model.teacher.tensor_model_parallel_size=4").resident["teacher"] == pytest.approx(
        resident["teacher"] / 4, rel=2e-3
    )
    full, selective = (
        plan(f"model.recompute={m}").phases["student passes"]["activations"] for m in ("full", "selective")
    )
    assert 10 * full < training["activations"] and full < selective < training["activations"]
    half = plan("model.tensor_model_parallel_size=2", "model.sequence_parallel=true")
    assert half.phases["student passes"]["activations"] == pytest.approx(training["activations"] / 2, rel=1e-2)
    assert "teacher" not in plan("model.teacher.offload=true").resident
    beside = plan("model.rollout.placement=process")
    assert beside.engine == pytest.approx(0.4 * 79 * GIB) and "rollouts" not in beside.phases
    assert plain.engine == 0 and plain.phases["rollouts"]["engine awake"] == pytest.approx(0.4 * 79 * GIB)
    assert resident["engine asleep"] >= 1.5 * GIB, "CUDA graphs lie beside the share, asleep or awake"
    refreshed = plain.phases["weights to the engine"]["engine's weights"]
    assert refreshed == pytest.approx(2 * student.parameters()) and "engine asleep" not in beside.resident
    awake = plan("model.rollout.sleep=false").resident["engine"]
    assert awake == pytest.approx(0.4 * 79 * GIB + resident["engine asleep"])
    split = plan("model.tensor_model_parallel_size=2", "model.teacher.tensor_model_parallel_size=4")
    assert split.resident["engine asleep"] > resident["engine asleep"], "an engine over two GPUs has communicators"
    assert split.resident["process"] > resident["process"] > plan("trainer.devices=1").resident["process"]
    assert EXACT_COPIES == TORCH_COPIES
    exact = estimate(compose_config(base), student, teacher, gpu(79), exact=True).resident
    assert exact["teacher's hidden states"] == 64 / 8 * 8096 * 5120 * 2
    assert {*exact} - {*resident} == {"teacher's hidden states"}, "its head is the teacher's own"
    keys = ["model.tensor_model_parallel_size=2", "model.sequence_parallel=true", "model.teacher.offload=true"]
    cfg = compose_config([*base, *keys, "model.teacher.offload_states=true"])
    exact = estimate(cfg, student, teacher, gpu(79), exact=True).resident
    copied = exact["teacher's head, split as the student's"]
    assert copied == teacher.padded_vocab(2) / 2 * 5120 * 2 and "teacher's hidden states" not in exact
    pinned = host_memory(cfg, student, teacher, gpu(79), exact=True).resident["teacher's hidden states, pinned"]
    assert pinned == 2 * 8 * (64 / 4 * 8096 * 5120 * 2 / 2)  # torch takes powers of two: up to double
    reference = estimate(compose_config(base), student, teacher, gpu(79), reference=True, first_pass=True)
    assert reference.resident["reference"] == pytest.approx(resident["student"])
    kept = reference.phases["first pass of the student"]["hidden states of a step"]
    assert kept == 64 / 8 * 9120 * 2560 * 2
    assert plain.phases["validation"]["hidden states of the held-out"] == 64 / 8 * 9120 * (2560 + 5120) * 2


def test_an_fp8_teacher_is_first_compared_with_itself_in_bf16() -> None:
    """72.7 billion numbers over two GPUs: 36 GB in FP8 all through the run, 73 GB in bf16 before it."""
    student, teacher = SHAPES["Qwen2.5-1.5B-Instruct"], SHAPES["Qwen2.5-72B-Instruct"]
    keys = ["pretrained_checkpoint.restore_from_path=s", "model.teacher.path=t", "model.data.path=d"]
    keys += ["trainer.devices=8", "model.teacher.tensor_model_parallel_size=2", "model.teacher.fp8=tensorwise"]
    keys += ["model.rollout.gpu_memory_utilization=0.2", "model.optim.distributed=true", "model.recompute=full"]
    cfg = compose_config(keys)
    memory = estimate(cfg, student, teacher, gpu(79))
    assert memory.peak_phase == "FP8 admission" and memory.steps < 70 * GIB
    held = memory.before["FP8 admission"]
    assert held["teacher in bf16"] == pytest.approx(teacher.parameters(), rel=1e-2)
    assert held["student"] + held["gradients"] == pytest.approx(6 * student.parameters(), rel=1e-2)
    assert "optimizer" not in held and "engine asleep" not in held
    with pytest.raises(ConfigError, match=r"during FP8 admission.*model.teacher.admission.prompts=0"):
        check_memory(cfg, memory, gpu(79))
    cfg.model.teacher.admission.prompts = 0
    check_memory(cfg, estimate(cfg, student, teacher, gpu(79)), gpu(79))


def test_an_engine_holds_what_its_weights_leave_of_its_share() -> None:
    """Qwen3-4B: 36 layers x 2 x 8 x 128 numbers of 2 bytes a token; 8.04 GB of weights, 3 GiB of workspace."""
    keys = ["pretrained_checkpoint.restore_from_path=s", "model.teacher.path=t", "model.data.path=d"]
    keys += ["trainer.devices=8", "model.rollout.gpu_memory_utilization=0.3"]
    cfg, shape = compose_config(keys), SHAPES["Qwen3-4B"]
    load = engine_load(cfg, shape, gpu(79))
    assert load.holds == pytest.approx((0.3 * 79 * GIB - 2 * shape.parameters() - 3 * GIB) / 147_456)
    assert (load.engines, load.sequences, load.longest, load.at_once, load.waves) == (8, 64, 9120, 10, 7)
    assert (
        "96,175 tokens" in load.line(cfg)[1] and "583,680" in load.line(cfg)[1] and "7 waves of 10" in load.line(cfg)[1]
    )
    cfg.model.rollout.max_num_seqs = 4
    assert "16 waves of model.rollout.max_num_seqs=4" in engine_load(cfg, shape, gpu(79)).line(cfg)[1]
    cfg.model.rollout.max_num_seqs = 64
    half = engine_load(compose_config([*keys, "model.tensor_model_parallel_size=2"]), shape, gpu(79))
    assert half.holds > 2 * load.holds and (half.engines, half.sequences) == (4, 128)
    cfg.model.rollout.gpu_memory_utilization = 0.14  # vLLM would not start
    with pytest.raises(ConfigError, match=r"utilization = 0\.14: .*9216 needs a share of 0\.15; raise it to 0\.15"):
        check_kv_cache(cfg, shape, shape, gpu(79))


@pytest.mark.parametrize("size", [16, 24, 40, 79, 139])
def test_the_teachers_engine_leaves_a_rank_its_context_and_itself_its_graphs(size: int) -> None:
    keys = ["pretrained_checkpoint.restore_from_path=s", "model.teacher.path=t", "model.data.path=d"]
    cfg = compose_config([*keys, "trainer.devices=8"])
    held = estimate(cfg, SHAPES["Qwen3-1.7B"], SHAPES["Qwen3-4B"], gpu(size)).before["teacher generates"]
    assert sum(held.values()) <= size * GIB and 0.7 < teacher_utilization(size * GIB) <= 0.9
    assert held["teacher's engine"] == pytest.approx(teacher_utilization(size * GIB) * size * GIB)
    cfg.model.data.held_out, cfg.model.tropd.guidance.enabled = 0, False
    cfg.model.validation.benchmarks = ["aime24"]
    for scored in (False, True):
        cfg.model.validation.score_teacher = scored
        for memory in (estimate, host_memory):
            before = memory(cfg, SHAPES["Qwen3-1.7B"], SHAPES["Qwen3-4B"], gpu(size)).before
            assert list(before) == ["teacher generates"] * scored


def test_seconds_are_at_least_what_the_rates_allow() -> None:
    recipe = plan_recipe(CONF / "qwen3-8b-from-qwen3-32b-2n8g.yaml", CHUNK_BYTES["cuda"])
    cfg, student, teacher, machine = recipe.cfg, recipe.student, recipe.teacher, recipe.machine
    seconds = step_seconds(cfg, student, teacher, machine, recipe.wire)
    tokens = 512 * 9120 / 16
    assert seconds["teacher"] > tokens * 2 * 32e9 / 989e12 and seconds["student"] > tokens * 6 * 8e9 / 989e12
    assert seconds["rollouts"] > 8096 * 2 * 8e9 / 2 / 3.35e12, "the weights are read for each token"
    assert 1 < sum(seconds.values()) / 60 < 15
    more = step_seconds(cfg, student, teacher, machine, {**recipe.wire, "teacher, tensor parallel": 450e9})
    assert more["teacher"] != seconds["teacher"] and more["student"] == seconds["student"]
    cfg.model.teacher.offload = False
    copied = seconds["teacher"] - step_seconds(cfg, student, teacher, machine, recipe.wire)["teacher"]
    assert copied == pytest.approx(2 * 32.76e9 / 4 / 25e9, rel=1e-2)
    cfg.model.global_batch_size = 256
    fewer = step_seconds(cfg, student, teacher, machine, estimate_wire(cfg, student, teacher, machine))
    assert fewer["student"] == pytest.approx(seconds["student"] / 2) and fewer["rollouts"] < seconds["rollouts"]
    said = dict(time_lines(cfg, student, recipe.work.pace(cfg)))
    assert all(phase in said["time of a step"] for phase in seconds) and "200 steps" in said["time of a run"]
    assert "estimated" in said["time of a step"]
    cpu = Machine("cpu", 64 * GIB, CHUNK_BYTES["cpu"], "a test")
    assert step_seconds(cfg, student, teacher, cpu, recipe.wire) == {}
    assert [spoken(s) for s in (0.04, 42, 130, 8000)] == ["0.0 s", "42 s", "2.2 min", "2.2 h"]


def test_waves_of_responses_follow_one_another() -> None:
    recipe = plan_recipe(CONF / "qwen3-8b-from-qwen3-32b-2n8g.yaml", CHUNK_BYTES["cuda"])
    cfg, student, machine = recipe.cfg, recipe.student, recipe.machine
    cfg.model.rollout.max_num_seqs = 4
    load = engine_load(cfg, student, machine)
    assert load.waves == load.sequences / 4 > 10
    seconds = step_seconds(cfg, student, recipe.teacher, machine, recipe.wire)["rollouts"]
    assert seconds > load.waves * 8096 * 2 * 8e9 / load.tensor / 3.35e12, "the weights are read for each token of each"


def test_a_host_holds_what_its_ranks_write() -> None:
    """8B, tensor 2, data 8 on two hosts: 14 bytes a number are written once, half of them by each host. Gathered on
    every rank, as Megatron does it, they would be 8 x 12 x 4.1e9 = 393 GB."""
    recipe = plan_recipe(CONF / "qwen3-8b-from-qwen3-32b-2n8g.yaml", CHUNK_BYTES["cuda"])
    cfg, student, teacher = recipe.cfg, recipe.student, recipe.teacher
    assert sum(recipe.host.phases["checkpoint"].values()) == pytest.approx(14 * 8.19e9 / 2, rel=1e-2)
    assert recipe.host.resident["teacher, pinned"] == pytest.approx(8 * 2 * 32.76e9 / 4, rel=1e-2)
    small = Machine("gpu", 79 * GIB, CHUNK_BYTES["cuda"], "a test", host=128 * GIB)
    host = host_memory(cfg, student, teacher, small)
    with pytest.raises(
        ConfigError, match=r"offload = True: a host needs 2\d\d\.\d+ GiB during checkpoint, but has 128"
    ):
        check_host(cfg, host, small)
    cfg.model.teacher.offload = False
    check_host(cfg, host_memory(cfg, student, teacher, small), small)
    cfg.model.optim.distributed = False
    copies = host_memory(cfg, student, teacher, small)
    assert copies.phases["checkpoint"] == pytest.approx(host.phases["checkpoint"]), "copies share the writing"
    tiny = Machine("gpu", 79 * GIB, CHUNK_BYTES["cuda"], "a test", host=64 * GIB)
    with pytest.raises(ConfigError, match=r"trainer.devices = 8: a host needs .*more hosts with fewer ranks"):
        check_host(cfg, copies, tiny)


def test_engines_on_hosts_of_their_own_take_nothing_of_the_ranks() -> None:
    student, teacher, machine = SHAPES["Qwen3-4B"], SHAPES["Qwen3-14B"], gpu(79)
    base = ["pretrained_checkpoint.restore_from_path=s", "model.teacher.path=t", "model.data.path=d"]
    base += ["trainer.devices=8", "model.tensor_model_parallel_size=2"]
    apart = compose_config(
        [
            *base,
            "model.rollout.placement=dedicated",
            "model.rollout.dedicated.address=node1:29600",
            "model.rollout.dedicated.engines=3",
        ]
    )
    beside = compose_config([*base, "model.rollout.placement=process"])
    assert engine_groups(apart, machine) == [] and engine_groups(beside, machine) == [(0,)]
    said = dict(roles(apart, machine))
    assert said["rollouts"] == "3 engine host(s) that join rank 0 at node1:29600; none on the ranks"
    assert said["requests to hosts"].startswith("in fixed shares, so that the last bits")
    apart.model.rollout.dedicated.queue = True
    assert dict(roles(apart, machine))["requests to hosts"].startswith("from one queue, the longest expected first")
    apart.model.rollout.dedicated.engines = 1
    assert "requests to hosts" not in dict(roles(apart, machine))
    apart.model.rollout.dedicated.engines = 3
    ours, theirs = (estimate(cfg, student, teacher, machine) for cfg in (apart, beside))
    assert ours.engine == 0 and "rollouts" not in ours.phases and ours.resident == theirs.resident
    sent, less = (estimate_wire(cfg, student, teacher, machine)["weights to the engines"] for cfg in (apart, beside))
    assert sent - less == pytest.approx(2 * student.parameters())  # once, in bf16


def test_too_little_memory_is_refused_with_the_numbers() -> None:
    student, teacher = SHAPES["Qwen3-4B"], SHAPES["Qwen3-14B"]
    base = ["pretrained_checkpoint.restore_from_path=s", "model.teacher.path=t", "model.data.path=d"]
    cfg = compose_config(
        [*base, "trainer.devices=8", "model.recompute=full", "model.rollout.gpu_memory_utilization=0.1"]
    )
    memory = estimate(cfg, student, teacher, gpu(79))
    with pytest.raises(ConfigError) as raised:
        check_memory(cfg, memory, gpu(79))
    text = str(raised.value)
    assert raised.value.key == "model.optim.distributed" and raised.value.value is False
    assert re.search(r"needs \d+\.\d\d GiB during weights to the engine, but only 79\.00 GiB", text)
    assert "teacher 27.5" in text and "The largest part that a key can change is optimizer: set it to true" in text
    cpu = Machine("cpu", 8 * GIB, CHUNK_BYTES["cpu"], "this host")
    small = compose_config([*base, "trainer.devices=2", "model.encoder_seq_length=9216"])
    with pytest.raises(ConfigError, match=r"\(2 ranks of \d+\.\d+ GiB per host\)"):
        check_memory(small, estimate(small, SHAPES["smollm2-student-24l"], SHAPES["Qwen3-1.7B"], cpu), cpu)


def test_a_rollouts_token_takes_as_many_bytes_as_the_plan_says() -> None:
    """Of log-probabilities in single precision, as vLLM's are."""
    draw = np.random.default_rng(random.getrandbits(32))
    ids, log_probs = draw.integers(150_000, size=8096).tolist(), draw.standard_normal(8096, np.float32).tolist()
    rollouts = [Rollout([1], [], ids, log_probs, 1, i, i, True) for i in range(4)]
    assert len(ROLLOUTS.encode(rollouts)) / (4 * 8096) == pytest.approx(ROLLOUT_TOKEN, rel=0.01)


def test_ring_volumes() -> None:
    assert ring(80.0, 1) == 0 and ring(80.0, 4) == 60 and ring(80.0, 4, reduce=True) == 120


def test_there_are_recipes() -> None:
    assert len(RECIPES) >= 8 and all(len(p.read_text().splitlines()) < 40 for p in RECIPES)


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_a_recipe_fits_its_gpus_and_says_so(path: Path) -> None:
    recipe = plan_recipe(path, CHUNK_BYTES["cuda"])
    assert recipe.machine.bytes == 79 * GIB and recipe.memory.total <= recipe.machine.bytes
    said = [line for line in path.read_text().splitlines() if line.startswith(MARK)]
    assert said == [recipe.line], "make scaling writes these lines anew"
    assert recipe.cfg.name == path.stem
    ranks, devices = layout(recipe.cfg), recipe.cfg.trainer.devices
    groups = [ranks.tensor_group(r) for r in range(ranks.world_size)] + list(ranks.teacher_groups())
    groups += engine_groups(recipe.cfg, recipe.machine)
    assert all(nodes_of(group, devices) == 1 for group in groups), "no tensor-parallel group leaves its node"
    hosts = {"requests to hosts"} if recipe.cfg.model.rollout.placement == "dedicated" else set()
    assert dict(roles(recipe.cfg, recipe.machine)).keys() == {"rank 0", "student", "teacher", "rollouts"} | hosts
    match = re.fullmatch(r".*-from-.*-(\d+)n(\d+)g(-fp8)?(-ahead)?", path.stem)
    if match:
        gpus, _ = gpus_of(recipe.cfg, recipe.machine)
        assert (int(match[1]) * int(match[2]), int(match[2])) == (gpus, devices)
        assert bool(match[3]) == (recipe.cfg.model.teacher.fp8 is not None)
        assert bool(match[4]) == (recipe.cfg.model.rollout.steps_ahead > 0)


PHASES = ("teacher scores", "student passes", "optimizer step", "weights to the engine", "validation", "rollouts")


def printed(recipe: Recipe, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The rows of the plan."""
    cfg, teacher, machine = recipe.cfg, recipe.teacher, recipe.machine
    plan: Any = SimpleNamespace(
        **{name: getattr(recipe, name) for name in ("student", "machine", "work", "memory", "host", "wire")},
        vocab_size=151_000, objective=build_objective(cfg), run_dir=Path("runs"), benchmarks=(), notes=(), early=(),
        prompts=SimpleNamespace(train=range(1000), held_out=range(64), notes=()),
        teachers=[Teacher("default", cfg, teacher, wanted={(1,): 256}, engines=teacher_engines(cfg, teacher, machine))],
    )  # fmt: skip
    monkeypatch.setenv("COLUMNS", "2000")  # a row a line
    print_plan(cfg, plan)
    return [line.split("│") for line in capsys.readouterr().out.splitlines() if "│" in line]


def test_a_plan_that_is_not_the_fastest_names_the_one_that_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = CONF / "qwen3-4b-from-qwen3-14b-1n8g.yaml"
    for nodes, named in ((1, False), (2, True)):
        recipe = plan_recipe(path, CHUNK_BYTES["cuda"], {"trainer.num_nodes": nodes})
        said = {row[1].strip(): row[2] for row in printed(recipe, capsys, monkeypatch)}
        assert ("a faster way" in said) == named
        assert f"at most {spoken(recipe.way.seconds)} (estimated" in said["time of a step"]
    assert "model.rollout.steps_ahead=1" in said["a faster way"]


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_a_recipes_plan_says_every_phase(
    path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a GPU and of its host, and the seconds: what check_only=true prints, but for the checkpoints' own part."""
    recipe = plan_recipe(path, CHUNK_BYTES["cuda"])
    cfg, machine = recipe.cfg, recipe.machine
    rows = printed(recipe, capsys, monkeypatch)
    labels = {row[1].strip() for row in rows}
    phases = [phase for phase in PHASES if phase != "rollouts" or placement(cfg, machine) == "colocated"]
    gpu_phases = {f"memory: during {phase}" for phase in phases} | {"memory: before the steps, teacher generates"}
    if cfg.model.teacher.fp8 is not None:
        gpu_phases.add("memory: before the steps, FP8 admission")
    host_phases = {f"host memory: during {phase}" for phase in ("checkpoint", "export")}
    host_phases.add("host memory: before the steps, teacher generates")
    others = {"memory of a rank", "memory of a host", "time of a step", "time of a run", "cache of an engine"}
    assert gpu_phases | host_phases | others | {"the teacher generates", "rollouts"} <= labels
    assert sum("(the peak)" in row[2] for row in rows) == 2, "one of a GPU, one of a host"


@pytest.mark.parametrize("path", [p for p in RECIPES if "1n8g" in p.stem and "14b" not in p.stem], ids=lambda p: p.stem)
def test_the_papers_settings_have_the_papers_numbers(path: Path) -> None:
    cfg = plan_recipe(path, CHUNK_BYTES["cuda"]).cfg
    m = cfg.model
    assert (cfg.trainer.tropd.max_steps, m.optim.lr, m.optim.sched.name) == (200, 5e-6, "constant")
    assert (m.global_batch_size, m.rollout.samples_per_prompt, m.rollout.max_new_tokens) == (512, 4, 8096)
    assert (m.tropd.top_k, m.tropd.objective) == (64, "tropd")


def test_a_recipe_that_no_longer_fits_is_refused() -> None:
    path = next(p for p in RECIPES if "72b" in p.stem)
    with pytest.raises(ConfigError, match=r"teacher\.tensor_model_parallel_size = 2.*is teacher: raise it"):
        plan_recipe(path, CHUNK_BYTES["cuda"], {"model.teacher.tensor_model_parallel_size": 2})


@pytest.mark.parametrize(
    ("recipe", "count", "tensor"),
    [
        ("deepseek-1.5b-from-skywork-7b-1n8g", 8, 1),
        ("qwen2.5-1.5b-from-qwen2.5-7b-1n1g-fp8", 1, 1),
        ("qwen3-4b-from-qwen3-14b-1n8g", 8, 1),
        ("qwen3-8b-from-qwen3-32b-2n8g", 8, 1),  # 61 GiB of bf16 weights in 0.9 x 79
        ("qwen2.5-14b-from-qwen2.5-72b-4n8g", 2, 4),  # 135 GiB and a sequence of 2.8 GiB do not fit two
    ],
)
def test_a_recipes_teacher_generates_on_every_gpu_of_a_node(recipe: str, count: int, tensor: int) -> None:
    """The rollouts' share of a GPU (0.3 in these recipes) would not even hold the weights."""
    cfg = compose_config([], recipe)
    shape, machine = known_shape(cfg.model.teacher.path), gpu(79)
    assert shape is not None
    engines = teacher_engines(cfg, shape, machine)
    assert engines == TeacherEngines(count, tensor)
    wanted = {(i,): 256 - i % 200 for i in range(25600)} | {(-i,): 8096 for i in range(1, 65)}
    ((label, line),) = generation_lines(engines, shape, machine, cfg, wanted)
    assert label == "the teacher generates"
    assert "25,600 prefixes of at most 256 tokens and 64 answers of at most 8,096" in line
    assert f"{sum(wanted.values()):,} tokens by {count} engine" in line and f"on {tensor} GPU" in line
    minutes = float(re.findall(r"about (\d+) min", line)[0])
    assert 1 <= minutes <= 30
    ((_, alone),) = generation_lines(engines, shape, machine, cfg, {}, [4096] * 29 + [6000])
    assert "30 answers to benchmarks of at most 6,000: 124,784 tokens by" in alone
    assert generation_lines(engines, shape, machine, cfg, {}) == []


def test_a_teacher_too_large_to_generate_is_refused() -> None:
    cfg = compose_config([], "qwen2.5-14b-from-qwen2.5-72b-4n8g")
    with pytest.raises(ConfigError, match=r"model.teacher.path.*needs 13\d\.\d+ GiB.*held_out=0"):
        teacher_engines(cfg, SHAPES["Qwen2.5-72B-Instruct"], gpu(16))
    host = Machine("cpu", 8 * GIB, CHUNK_BYTES["cpu"], "a test")
    cfg.trainer.devices = 1
    with pytest.raises(ConfigError, match=r"more than the 4\.\d+ GiB of 1 device"):
        teacher_engines(cfg, SHAPES["Qwen3-4B"], host)
    small = teacher_engines(cfg, SHAPES["SmolLM2-135M-Instruct"], host)
    assert small == TeacherEngines(1, 1)


@pytest.mark.parametrize(
    ("given", "devices", "size", "visible", "groups"),
    [
        ("", 8, 2, 8, ("0,1", "2,3", "4,5", "6,7")),
        ("", 1, 1, 8, ("0",)),
        ("4,6,7", 2, 1, 3, ("4", "6")),
        ("GPU-a,GPU-b,GPU-c,GPU-d", 4, 4, 4, ("GPU-a,GPU-b,GPU-c,GPU-d",)),
        ("3", 8, 1, 1, ("3",)),  # a scheduler that shows every rank its own GPU alone
    ],
)
def test_the_teachers_engines_divide_the_gpus_that_rank_zero_sees(
    given: str, devices: int, size: int, visible: int, groups: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    assert device_groups(devices, size, visible) == groups
    with pytest.raises(ConfigError, match=r"rank 0 sees .* GPU\(s\)"):
        device_groups(devices, visible + 1, visible)
