"""From a configuration to a finished run: checks first, then the parts, then the loop."""

import copy
import gc
import os
import secrets
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from nemo_tropd.command_line import fail, printable
from nemo_tropd.config import ConfigError, TropdConfig, teacher_named
from nemo_tropd.config_checks import resolve, without_secrets, yaml_without_secrets
from nemo_tropd.convert.families import ConversionError
from nemo_tropd.convert.hf_export import save_hf
from nemo_tropd.data import PromptError
from nemo_tropd.files import read_json, write_json, write_text
from nemo_tropd.model.tropd_model import MegatronTrOPDModel, StudentSource
from nemo_tropd.parallel.agreement import on_rank_zero
from nemo_tropd.parallel.roll_call import RollCall, collective_timeout_s
from nemo_tropd.parallel.signals import STOP, Stopped
from nemo_tropd.parallel.topology import Topology
from nemo_tropd.rollout.ahead import AheadRollouts
from nemo_tropd.rollout.engine import EngineError
from nemo_tropd.rollout.placement import EngineFactory, Engines, check_placement, placement_of, rollouts_of
from nemo_tropd.teacher.fp8 import check_hardware
from nemo_tropd.timeline import Timeline
from nemo_tropd.training.ahead import Ahead
from nemo_tropd.training.calibration import calibration_batches
from nemo_tropd.training.checkpoint import CheckpointError, Checkpoints
from nemo_tropd.training.guidance import make_guidance, wanted_responses
from nemo_tropd.training.metrics import MetricsLog, RolloutFile, TimelineFile
from nemo_tropd.training.optimizer import StudentOptimizer
from nemo_tropd.training.plan import Plan, make_plan, print_plan
from nemo_tropd.training.served import WithServed, open_served
from nemo_tropd.training.setup import Setup
from nemo_tropd.training.start import agreed_fingerprint, opened
from nemo_tropd.training.step import TrainStep
from nemo_tropd.training.summary import print_summary, summary_of
from nemo_tropd.training.teacher_responses import Responses, generate_teacher_responses
from nemo_tropd.training.trainer import Outcome, TrainingError, TropdTrainer, stop_point
from nemo_tropd.training.validation import Validator

EXPECTED = (ConfigError, ConversionError, PromptError, EngineError, CheckpointError, TrainingError)


def main(cfg: DictConfig, engines: EngineFactory | None = None) -> None:
    """What ``examples/train_tropd.py`` calls. Expected errors end the process with code 2 and one readable message,
    which of several ranks the one that announced it has printed."""
    STOP.install()
    try:
        settings = resolve(cfg)
    except ConfigError as error:
        fail(error)
    try:
        train(settings, engines)
    except BaseException as error:
        code = 2 if isinstance(error, EXPECTED) else 1
        if os.environ.get("WORLD_SIZE", "1") != "1":
            # Taking broken groups apart can wait for ranks that are gone.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        if code == 2:
            fail(error)
        raise


def train(cfg: TropdConfig, engines: EngineFactory | None = None) -> Outcome | None:
    """Run ``cfg`` from its last checkpoint, or from the start, to its end or a signal; None with ``check_only``, and if
    the run is already finished. ``engines`` makes rollout engines (default: vLLM). Raises ConfigError, ConversionError,
    PromptError before anything is allocated; EngineError, CheckpointError, TrainingError, PeerLost, PeerFailed later:
    complete checkpoints stay."""
    try:
        with STOP.handled(), RollCall(cfg.trainer.distributed_timeout_s) as call:
            plan = call.together(lambda: _checked_plan(cfg))
            cfg = copy.deepcopy(cfg)
            cfg.model.rollout.end_tokens = list(plan.end_ids)  # of both engines, and compared when the run is resumed
            degrees = {t.path: t.engines.tensor for t in plan.teachers if t.engines}
            return _with_plan(cfg, plan, engines or Engines(plan.vocab_size, teacher_tensor=degrees), call)
    except Stopped:
        if os.environ.get("RANK", "0") == "0":
            print("stopped before the first step; rerun the same command to start again", flush=True)
        return Outcome(0, True, None, None)


def _checked_plan(cfg: TropdConfig) -> Plan:
    plan = make_plan(cfg)
    check_placement(cfg)
    for recipe in {teacher_named(cfg.model, name).fp8 for name in plan.prompts.teachers} - {None}:
        if not cfg.check_only:
            check_hardware(str(recipe))
    return plan


def _with_plan(cfg: TropdConfig, plan: Plan, engines: EngineFactory, call: RollCall) -> Outcome | None:
    if os.environ.get("RANK", "0") == "0":
        print_plan(cfg, plan)
    if cfg.check_only:
        return None
    torch.manual_seed(cfg.model.seed)
    topology = Topology.start(
        cfg.model.tensor_model_parallel_size,
        cfg.model.pipeline_model_parallel_size,
        cfg.model.sequence_parallel,
        timeout_s=collective_timeout_s(cfg.trainer.distributed_timeout_s),
        seed=cfg.model.seed,
        teacher_tensor_parallel=cfg.model.teacher.tensor_model_parallel_size,
    )
    try:
        outcome = _open_and_train(Setup(cfg, plan, topology), engines, call)
    except BaseException as error:
        call.announce(error)
        topology.stop(failed=True)
        raise
    gc.collect()  # cycles hold the model: its memory, and its groups' threads, are not for a later run of this process
    topology.stop()
    return outcome


def _open_and_train(setup: Setup, engines: EngineFactory, call: RollCall) -> Outcome | None:
    plan = setup.plan
    prompts = agreed_fingerprint(plan.prompts, setup.topology)
    with opened(setup.cfg, plan.run_dir, plan.objective, prompts, setup.topology) as start:
        if not start.finished:
            return _train(replace(setup, cfg=start.cfg, start=start), engines, call)
        if setup.topology.is_leader:
            print_summary(read_json(plan.run_dir / "summary.json") or {})
            remedy = (
                "raise trainer.tropd.max_steps to continue it, or set exp_manager.explicit_log_dir to start another one"
            )
            print(f"this run is already finished ({plan.run_dir}); {remedy}", flush=True)
        return None


def _train(setup: Setup, engines: EngineFactory, call: RollCall) -> Outcome:
    cfg, plan, topology = setup.cfg, setup.plan, setup.topology
    lightning = make_lightning_trainer(cfg, setup.run_dir)
    first = setup.start.state.step if setup.start else 0
    wanted = {t.name: wanted_responses(cfg, plan.prompts, first, t.name) for t in plan.teachers}
    others = [one for b in plan.benchmarks for one in b.of_teacher] if cfg.model.validation.score_teacher else []
    served = open_served(setup)
    makers = WithServed(engines, served, plan.end_ids)
    names = {name: one.name for name, one in served.items()}
    responses = generate_teacher_responses(cfg, wanted, topology, makers, plan.vocab_size, others, names)
    stop_point(topology)
    model = MegatronTrOPDModel(
        OmegaConf.structured(cfg.model),
        lightning,
        topology=topology,
        objective=plan.objective,
        student=StudentSource(setup.student_path, cfg.trainer.precision, plan.vocab_size),
        calibration=calibration_batches(cfg.model, plan.prompts.held_out, responses, setup.packer()),
        teachers=plan.prompts.teachers,
        served=served,
    )
    stop_point(topology)
    timeline = Timeline(enabled=topology.is_leader)
    with rollouts_of(cfg, topology, model, engines, timeline) as rollouts:
        try:
            model.attach_rollouts(rollouts)
            trainer = _trainer(setup, model, responses, lightning, timeline)
            outcome = trainer.fit()
            if trainer.log is not None:
                trainer.log.close()
            if not outcome.stopped_by_signal:
                finish(setup, model, outcome)
                rollouts.close(run_over=True)  # after anything else gone wrong, engine hosts wait for the run to resume
        except BaseException as error:
            call.announce(error)  # before the engine is closed, which takes its time
            raise
    return outcome


def _trainer(
    setup: Setup, model: MegatronTrOPDModel, responses: Responses | None, lightning: Any, timeline: Timeline
) -> TropdTrainer:
    cfg, settings, leads = setup.cfg, setup.cfg.trainer.tropd, setup.topology.is_leader
    began = setup.start.state.step if setup.start else 0
    optimizer = StudentOptimizer(
        cfg.model.optim,
        model.ddp,
        dtype=model.dtype_of_run,
        clip=settings.gradient_clip_val,
        max_steps=settings.max_steps,
    )
    guidance, prompts = make_guidance(cfg, responses), setup.plan.prompts.train
    ahead = None
    if steps := cfg.model.rollout.steps_ahead:
        assert isinstance(model.rollouts, AheadRollouts)  # see placement.rollouts_of
        ahead = partial(Ahead, model.rollouts, steps=steps, last=settings.max_steps)
    return TropdTrainer(
        setup,
        TrainStep(
            model,
            optimizer,
            prompts=prompts,
            guidance=guidance,
            packer=setup.packer(),
            early=setup.plan.early,
            ahead=ahead,
            timeline=timeline,
        ),
        validator=Validator(setup, model, responses),
        checkpoints=Checkpoints(
            setup.run_dir,
            setup.topology,
            hf_source=setup.student_path,
            keep=settings.keep_checkpoints,
            following=model.following,
        ),
        log=MetricsLog(setup.run_dir, list(lightning.loggers)) if leads else None,
        rollout_file=RolloutFile(setup.run_dir, setup.plan.tokenizer, began) if leads else None,
        timeline_file=TimelineFile(setup.run_dir, placement_of(cfg), steps) if leads else None,
    )


def finish(setup: Setup, model: MegatronTrOPDModel, outcome: Outcome) -> None:
    """The Hugging Face export, the summary and the report (collective)."""
    from nemo_tropd.report import write_report  # imports matplotlib, which only the end of a run needs

    exported = setup.run_dir / "hf"
    save_hf(model.export_stream(), exported, source_dir=setup.student_path, dtype=model.dtype_of_run, overwrite=True)

    def write() -> None:
        assert setup.start is not None
        content = summary_of(setup.cfg, outcome, setup.start.state.run_id)
        report = write_report(setup.run_dir, content)
        # Last: a run with a summary has the rest, too.
        write_json(setup.run_dir / "summary.json", content)
        print_summary(content)
        print(printable(f"student  {exported}\nreport   {report}"), flush=True)

    on_rank_zero(setup.topology, write)


def make_lightning_trainer(cfg: TropdConfig, run_dir: Path) -> Any:
    """NeMo's exp_manager over a Lightning trainer that only carries loggers; writes config.yaml. It gets a folder of
    its own, RUN/logs: at every restart it moves the files it finds into a sub-folder."""
    from lightning.pytorch import Trainer
    from nemo.utils.exp_manager import exp_manager

    run_dir.mkdir(parents=True, exist_ok=True)
    lightning = Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=cfg.trainer.tropd.max_steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    given, sys.argv = sys.argv, [without_secrets(argument) for argument in sys.argv]  # exp_manager keeps them in a file
    exp_manager(
        lightning,
        OmegaConf.create(
            {
                "explicit_log_dir": str(run_dir / "logs"),
                "name": cfg.name,
                "create_tensorboard_logger": cfg.exp_manager.create_tensorboard_logger,
                "create_wandb_logger": cfg.exp_manager.create_wandb_logger,
                "wandb_logger_kwargs": _wandb_kwargs(cfg, run_dir),
                "create_checkpoint_callback": False,
                "create_preemption_callback": False,
                "log_step_timing": False,
                "log_tflops_per_sec_per_gpu": False,
                "seconds_to_sleep": 0,
            }
        ),
    )
    sys.argv = given
    if os.environ.get("RANK", "0") == "0":
        write_text(run_dir / "config.yaml", yaml_without_secrets(cfg))
    return lightning


def _wandb_kwargs(cfg: TropdConfig, run_dir: Path) -> dict[str, Any]:
    """With the run's own id unless one is given: a resumed run continues its curves."""
    kwargs = dict(cfg.exp_manager.wandb_logger_kwargs)
    if cfg.exp_manager.create_wandb_logger and os.environ.get("RANK", "0") == "0":
        path = run_dir / "wandb_id"
        if not path.is_file():
            write_text(path, secrets.token_hex(8))
        kwargs.setdefault("id", path.read_text(encoding="utf-8").strip())
    return kwargs
