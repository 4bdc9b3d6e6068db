"""The whole path on a tiny random model: real engine, Megatron, checkpoints, export, report."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nemo_tropd.config import ConfigError
from nemo_tropd.rollout.engine import RolloutRequest
from nemo_tropd.rollout.placement import Engines
from nemo_tropd.training.checkpoint import CheckpointError
from nemo_tropd.training.run import train
from tests.e2e.compose import compose_config
from tests.e2e.conftest import SharedEngine, SharedEngines
from tests.e2e.tiny_run import TinyRun, train_lines

STEPS = 4
EXACT = ("loss", "grad_norm", "trust_fraction", "log_ratio_mean", "mismatch_max_abs")


def figures(run_dir: Path) -> list[tuple[float, ...]]:
    """What must be the same to the bit, step by step."""
    by_step = {line["step"]: line for line in train_lines(run_dir)}
    return [tuple(by_step[s][k] for k in EXACT) for s in sorted(by_step)]


@pytest.fixture(scope="module")
def straight(
    tiny: TinyRun,
    shared_engine: SharedEngine,
    teachers: dict[str, SharedEngine],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A run without interruption."""
    run_dir = tmp_path_factory.mktemp("straight") / "run"
    keys = {"trainer.tropd.max_steps": STEPS, "trainer.tropd.keep_checkpoints": STEPS}
    cfg = compose_config(tiny.overrides(run_dir, **keys))
    outcome = train(cfg, SharedEngines(shared_engine, teachers))
    assert outcome is not None and outcome.step == STEPS and not outcome.stopped_by_signal
    return run_dir


def test_engine_and_trainer_agree_after_every_refresh(straight: Path) -> None:
    lines = train_lines(straight)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert all(0 < line["mismatch_max_abs"] < 1e-3 for line in lines)
    assert len({line["loss"] for line in lines}) == STEPS
    assert all(0 < line["trust_fraction"] < 1 and line["grad_norm"] > 0 for line in lines)


def test_engine_and_trainer_agree_on_an_untied_model(tmp_path: Path) -> None:
    untied = TinyRun.make(tmp_path, tied=False, family="qwen2")
    keys = {"model.tropd.guidance.enabled": False, "model.data.held_out": 0, "trainer.tropd.save_interval": 10}
    train(compose_config(untied.overrides(tmp_path / "run", **keys)))
    lines = train_lines(tmp_path / "run")
    assert len(lines) == 3 and all(0 < line["mismatch_max_abs"] < 1e-3 for line in lines)


def test_guidance_anneals_and_counts(straight: Path) -> None:
    shares = [line["guided_fraction"] for line in train_lines(straight)]
    assert shares[0] > 0 and shares[-1] < shares[0]


def test_run_directory_holds_what_a_person_needs(straight: Path) -> None:
    for name in ("config.yaml", "metrics.jsonl", "rollouts.jsonl", "summary.json", "report.html"):
        assert (straight / name).stat().st_size > 100, name
    assert list(straight.rglob("events.out.tfevents.*"))
    summary = json.loads((straight / "summary.json").read_text())
    for name in ("reverse_kl", "forward_kl", "one_minus_tv", "exact_match"):
        assert name in summary["before"] and name in summary["after"]
    assert summary["before"]["reverse_kl"] != summary["after"]["reverse_kl"]
    assert "http" not in (straight / "report.html").read_text().replace("http://www.w3.org", "")
    rollout = json.loads((straight / "rollouts.jsonl").read_text().splitlines()[0])
    assert len(rollout["tokens"]) == len(rollout["log_ratio"]) == len(rollout["gate"]) == len(rollout["guided"]) > 0


def test_export_gives_the_trainers_logits(straight: Path, tiny: TinyRun) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    exported = AutoModelForCausalLM.from_pretrained(straight / "hf", dtype=torch.float32)
    assert AutoTokenizer.from_pretrained(straight / "hf").chat_template
    ids = torch.randint(4, 120, (2, 17), generator=torch.Generator().manual_seed(random.randrange(1 << 30)))
    with torch.no_grad():
        theirs = exported(ids).logits
    ours = logits_of_checkpoint(straight / "checkpoints" / "step_00000004", ids)
    assert (ours[..., : theirs.size(-1)] - theirs).abs().max() < 1e-4


def logits_of_checkpoint(path: Path, ids: torch.Tensor) -> torch.Tensor:
    """[B, S, V_padded] of the Megatron model saved at ``path``."""
    from megatron.core import dist_checkpointing

    from nemo_tropd.convert.families import read_shape
    from nemo_tropd.gpt.build import build_gpt, head_weight
    from nemo_tropd.parallel.topology import Topology

    topology = Topology.start()
    try:
        model = build_gpt(read_shape(path / "hf"), topology, dtype=torch.float32, trainable=False)
        loaded = dist_checkpointing.load({"model": model.sharded_state_dict(prefix="model.")}, str(path))
        model.load_state_dict({k.removeprefix("model."): v for k, v in loaded["model"].items()})
        with torch.no_grad():
            hidden = model(ids, torch.arange(ids.size(1)).expand_as(ids), None)
            return hidden @ head_weight(model).T
    finally:
        topology.stop()


def test_sigterm_finishes_the_step_and_resume_is_exact(
    tiny: TinyRun, straight: Path, engines, shared_engine: SharedEngine, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    overrides = tiny.overrides(run_dir, **{"trainer.tropd.max_steps": STEPS, "trainer.tropd.save_interval": 10})
    calls = []

    def stop_in_second_step(requests) -> None:
        calls.append(len(requests))
        if len(calls) == 3:  # validation, step 1, step 2
            os.kill(os.getpid(), signal.SIGTERM)

    shared_engine.before_generate = stop_in_second_step
    first = train(compose_config(overrides), engines)
    assert first is not None and first.stopped_by_signal and first.step == 2
    assert sorted(p.name for p in (run_dir / "checkpoints").iterdir()) == ["step_00000002"]
    shared_engine.before_generate = None
    second = train(compose_config(overrides), engines)
    assert second is not None and second.step == STEPS and not second.stopped_by_signal
    assert figures(run_dir) == figures(straight)
    ours, theirs = (load_file(d / "hf" / "model.safetensors") for d in (run_dir, straight))
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)
    assert (
        second.before is not None
        and second.before.metrics == json.loads((straight / "summary.json").read_text())["before"]
    )


def test_half_written_checkpoint_is_never_loaded(tiny: TinyRun, straight: Path, engines, tmp_path: Path) -> None:
    """As a killed run leaves it: one whole checkpoint, one half-written, one unfinished line of metrics."""
    run_dir = tmp_path / "run"
    shutil.copytree(straight, run_dir, ignore=shutil.ignore_patterns("hf", "summary.json"))
    for name in ("step_00000003", "step_00000004"):
        shutil.rmtree(run_dir / "checkpoints" / name, ignore_errors=True)
    whole = run_dir / "checkpoints" / "step_00000002"
    shutil.copytree(whole, run_dir / "checkpoints" / ".tmp-step_00000003")
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "kind": "tr')
    train(compose_config(tiny.overrides(run_dir, **{"trainer.tropd.max_steps": STEPS})), engines)
    assert not list((run_dir / "checkpoints").glob(".tmp-*"))
    lines = [line for line in (run_dir / "metrics.jsonl").read_text().splitlines() if line.endswith("}")]
    assert [json.loads(line)["step"] for line in lines if '"train"' in line] == [1, 2, 3, 4, 3, 4]
    ours, theirs = (load_file(d / "hf" / "model.safetensors") for d in (run_dir, straight))
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)


def test_teacher_equal_to_student_gives_nothing_to_learn(tiny: TinyRun, engines, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    keys = {"model.teacher.path": tiny.student, "model.tropd.guidance.enabled": False, "trainer.tropd.max_steps": 1}
    train(compose_config(tiny.overrides(run_dir, **keys)), engines)
    (line,) = train_lines(run_dir)
    assert line["trust_fraction"] == 1.0
    assert abs(line["loss"]) < 1e-4 and abs(line["log_ratio_min"]) < 1e-4
    for row in (run_dir / "rollouts.jsonl").read_text().splitlines():
        rollout = json.loads(row)
        assert max(map(abs, rollout["log_ratio"])) < 1e-4 and set(rollout["gate"]) == {1.0}


@pytest.mark.parametrize(
    ("objective", "keys"),
    [
        ("opd", {}),
        ("entropy_opd", {}),
        ("reopold_2stage", {"+model.tropd.params.switch_step": 1}),
        ("aopd", {}),
        ("gopd", {}),
        ("eopd", {}),
    ],
)
def test_other_objectives_train_through_the_same_path(
    objective: str, keys: dict[str, object], tiny: TinyRun, engines, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    settings = {"model.tropd.objective": objective, "trainer.tropd.max_steps": 2, "model.data.held_out": 0, **keys}
    outcome = train(compose_config(tiny.overrides(run_dir, **settings)), engines)
    assert outcome is not None and outcome.step == 2
    assert all(line["grad_norm"] > 0 and line["applied"] for line in train_lines(run_dir))


def test_full_disk_at_save_keeps_what_is_whole(
    tiny: TinyRun, engines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nemo_tropd.training import checkpoint

    run_dir = tmp_path / "run"
    usage = shutil.disk_usage
    saves = []

    def full_at_second_save(path):
        if "checkpoints" not in str(path):
            return usage(path)
        saves.append(path)
        return usage(path)._replace(free=0) if len(saves) == 2 else usage(path)

    monkeypatch.setattr(checkpoint.shutil, "disk_usage", full_at_second_save)
    with pytest.raises(CheckpointError, match="0 MiB are free"):
        train(compose_config(tiny.overrides(run_dir, **{"trainer.tropd.max_steps": STEPS})), engines)
    assert [p.name for p in (run_dir / "checkpoints").iterdir()] == ["step_00000001"]
    monkeypatch.undo()
    outcome = train(compose_config(tiny.overrides(run_dir, **{"trainer.tropd.max_steps": STEPS})), engines)
    assert outcome is not None and outcome.step == STEPS


def test_resume_with_other_data_order_is_refused(tiny: TinyRun, straight: Path, engines, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(straight / "checkpoints", run_dir / "checkpoints")
    settings = {"trainer.tropd.max_steps": STEPS + 1, "model.seed": 7}
    with pytest.raises(ConfigError, match=r"model\.seed = 7"):
        train(compose_config(tiny.overrides(run_dir, **settings)), engines)


def test_padding_ids_are_never_drawn(tiny: TinyRun, engines, shared_engine: SharedEngine, tmp_path: Path) -> None:
    """As where a checkpoint has more rows than its tokenizer has tokens."""
    limit = 100
    requests = [RolloutRequest([5, 6, 7 + i], [], 11 + i, i, i, 40) for i in range(16)]
    free = [token for r in shared_engine.generate(requests) for token in r.response_ids]
    engine = Engines(limit).student(compose_config(tiny.overrides(tmp_path / "run")))
    engine.start()
    try:
        bound = [token for r in engine.generate(requests) for token in r.response_ids]
    finally:
        engine.close()
    assert max(free) >= limit > max(bound)


def test_engine_killed_in_the_middle_is_restarted_and_draws_the_same(
    tiny: TinyRun, engines, shared_engine: SharedEngine, tmp_path: Path
) -> None:
    """The session's engine is killed; the one that takes its place in the run takes it in the session, too."""
    started: list[SharedEngine] = []
    calls: list[int] = []

    def kill_in_second_step(requests) -> None:
        calls.append(len(requests))
        if len(calls) == 3:  # validation, step 1, step 2
            threading.Timer(0.05, os.kill, (started[0].engine.process_id, signal.SIGKILL)).start()

    class Mortal(SharedEngines):
        def student(self, cfg):
            started.append(SharedEngine(Engines.student(self, cfg)) if started else shared_engine)
            return started[-1]

    run_dir = tmp_path / "run"
    keys = {"trainer.tropd.max_steps": 3, "trainer.tropd.save_interval": 10}
    reference = tmp_path / "reference"
    train(compose_config(tiny.overrides(reference, **keys)), engines)
    shared_engine.before_generate = kill_in_second_step
    outcome = train(compose_config(tiny.overrides(run_dir, **keys)), Mortal(shared_engine, engines.teachers))
    assert outcome is not None and outcome.step == 3 and len(started) == 2
    assert figures(run_dir) == figures(reference)
    shared_engine.engine.close()
    shared_engine.engine = started[1].engine


def test_finished_run_is_not_run_again(tiny: TinyRun, straight: Path, engines, capsys) -> None:
    settings = {"trainer.tropd.max_steps": STEPS}
    assert train(compose_config(tiny.overrides(straight, **settings)), engines) is None
    assert "raise trainer.tropd.max_steps to continue it" in capsys.readouterr().out
