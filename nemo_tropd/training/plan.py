"""The plan of a run: everything that can be computed, and refused, before a model is built."""

import os
import re
import shutil
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from nemo_tropd.command_line import printable
from nemo_tropd.config import ConfigError, TropdConfig, run_dir
from nemo_tropd.config_data import SourceConfig
from nemo_tropd.convert.families import ConversionError, ModelShape, read_shape
from nemo_tropd.convert.hf_files import HfCheckpoint
from nemo_tropd.data import (
    PromptError,
    PromptKeys,
    PromptSplit,
    Source,
    Template,
    Vocabulary,
    end_tokens,
    labelled_otherwise,
    load_prompts,
    load_tokenizer,
    template_notes,
)
from nemo_tropd.data.tokenizer import STUDENT, TEACHER, check_config
from nemo_tropd.evaluation.answers import AnswerError, judged_as
from nemo_tropd.loss.inputs import CHUNK_BYTES
from nemo_tropd.objectives import Objective, ParameterError, build, parameters
from nemo_tropd.parallel.cpu import fast_bf16
from nemo_tropd.planner.engine import engine_load
from nemo_tropd.planner.host import check_host, host_lines, host_memory
from nemo_tropd.planner.machine import GIB, Machine, host_bytes
from nemo_tropd.planner.memory import Memory, estimate, loss_tokens
from nemo_tropd.planner.roles import roles
from nemo_tropd.planner.seconds import step_seconds, time_lines
from nemo_tropd.planner.teacher_engines import TeacherEngines, generation_lines, teacher_engines
from nemo_tropd.planner.verdict import check_kv_cache, check_memory, gib, memory_lines
from nemo_tropd.planner.wire import estimate_wire
from nemo_tropd.rollout.placement import sampling_of
from nemo_tropd.teacher.fp8 import Fp8Settings
from nemo_tropd.training.guidance import wanted_responses
from nemo_tropd.training.teacher_responses import responses_dir

OWN_KEYS = ("gate", "outlier", "tail", "guidance_weight")  # parameters of the objective with keys beside params


@dataclass(frozen=True)
class Plan:
    """What a run will be."""

    student: ModelShape
    teacher: ModelShape
    tokenizer: Any
    vocab_size: int  # ids below it are sampled and scored: the one number that student, teacher and engine share
    pad_id: int
    end_ids: tuple[int, ...]  # end a response, in the student's and the teacher's engine
    prompts: PromptSplit
    objective: Objective
    machine: Machine
    memory: Memory
    host: Memory | None  # of a GPU node's host; None on a CPU, where ``memory`` is the host's
    wire: dict[str, float]  # bytes that a rank sends per step, by kind
    run_dir: Path
    wanted: dict[tuple[int, ...], int]  # tokens of the teacher's response that the run needs, by prompt
    teacher_engines: TeacherEngines | None  # None: nothing is wanted
    benchmarks: tuple[Any, ...] = ()  # training.benchmarks.Put; on rank 0
    notes: tuple[tuple[str, str], ...] = ()  # further lines: (label, text)


def make_plan(cfg: TropdConfig) -> Plan:
    """Check paths, shapes, tokenizers, prompts, objective and run directory. Raises ConfigError, ConversionError or
    PromptError."""
    student_path, teacher_path = Path(cfg.pretrained_checkpoint.restore_from_path), Path(cfg.model.teacher.path)
    m = cfg.model
    degrees = m.tensor_model_parallel_size, m.pipeline_model_parallel_size
    student = _shape(STUDENT, student_path, *degrees)
    own = m.teacher.tensor_model_parallel_size
    teacher_degrees = degrees if own in (None, degrees[0]) else (own, 1)
    teacher = _shape(TEACHER, teacher_path, *teacher_degrees)
    fp8 = Fp8Settings.of(m.teacher)
    if fp8 is not None:
        fp8.check_shape(teacher, *teacher_degrees)
    for key, shape in ((STUDENT, student), (TEACHER, teacher)):
        longest, why = shape.longest()
        if m.encoder_seq_length > longest:
            why = f"exceeds {why}, of the model at {key}; at most {longest}"
            raise ConfigError("model.encoder_seq_length", m.encoder_seq_length, why)
    vocabulary = _vocabulary(student_path, teacher_path, student, teacher)
    tokenizer, vocab_size, template = vocabulary.tokenizer, vocabulary.size, Template.of(m.data)
    template.check(tokenizer)
    end_ids, end_notes = end_tokens(vocabulary, (student_path, teacher_path), m.rollout.end_tokens)
    objective = build_objective(cfg)
    if m.tropd.top_k > vocab_size:
        raise ConfigError("model.tropd.top_k", m.tropd.top_k, f"the vocabulary has only {vocab_size} tokens")
    directory = run_dir(cfg)
    _check_folders(cfg, directory)
    prompts = _prompts(cfg, tokenizer, template)
    notes = _text_notes(student_path, vocabulary, template, prompts, end_ids)
    machine = machine_of(cfg)
    exact = objective.needs_distributions
    needs = {"reference": objective.needs_reference, "first_pass": objective.needs_first_pass, "exact": exact}
    memory = estimate(cfg, student, teacher, machine, **needs)
    check_memory(cfg, memory, machine)
    check_kv_cache(cfg, student, teacher, machine)
    host = host_memory(cfg, student, teacher, machine, exact=exact) if machine.kind == "gpu" else None
    if host is not None:
        check_host(cfg, host, machine)
    wanted = wanted_responses(cfg, prompts)
    benchmarks, benchmark_notes = _benchmarks(cfg, student, vocabulary, template, end_ids)
    scored = bool(m.validation.benchmarks) and m.validation.score_teacher
    return Plan(
        student=student,
        teacher=teacher,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        pad_id=_pad_id(tokenizer, vocab_size, end_ids),
        end_ids=end_ids,
        prompts=prompts,
        objective=objective,
        machine=machine,
        memory=memory,
        host=host,
        wire=estimate_wire(cfg, student, teacher, machine, exact=exact),
        run_dir=directory,
        wanted=wanted,
        teacher_engines=teacher_engines(cfg, teacher, machine) if wanted or scored else None,
        benchmarks=benchmarks,
        notes=(*vocabulary.notes, *end_notes, *notes, *benchmark_notes),
    )


def _prompts(cfg: TropdConfig, tokenizer: Any, template: Template) -> PromptSplit:
    data = cfg.model.data
    prompts = load_prompts(
        [
            Source(
                s.path,
                s.weight,
                PromptKeys(
                    s.prompt_key or data.prompt_key,
                    s.messages_key or data.messages_key,
                    s.answer_key or data.answer_key,
                ),
                s.split or data.split,
            )
            for s in [SourceConfig(**s) for s in data.sources] or [SourceConfig(str(data.path))]
        ],
        tokenizer,
        max_prompt_tokens=data.max_prompt_tokens,
        held_out=data.held_out,
        overlong=data.overlong,
        template=template,
    )
    return replace(prompts, notes=(*prompts.notes, *_answer_notes(prompts)))


def _benchmarks(
    cfg: TropdConfig, shape: ModelShape, vocabulary: Vocabulary, template: Template, end_ids: tuple[int, ...]
) -> tuple[tuple[Any, ...], list[tuple[str, str]]]:
    """The run's benchmarks as rank 0 puts them to the student, and the plan's lines on them."""
    v = cfg.model.validation
    if not v.benchmarks or os.environ.get("RANK", "0") != "0":
        return (), []
    from nemo_tropd.evaluation.models import Model  # with matplotlib, for results: only if there are any
    from nemo_tropd.training.benchmarks import put

    path = Path(cfg.pretrained_checkpoint.restore_from_path)
    model = Model(STUDENT, cfg.name, path, shape, vocabulary.tokenizer, vocabulary.size, end_ids, "", template)
    found = put(cfg, model)
    return tuple(found), [("benchmark", one.describe()) for one in found]


def _answer_notes(prompts: PromptSplit) -> list[tuple[str, str]]:
    """How the known answers of held-out prompts are judged. On rank 0 alone: judging takes a process of its own."""
    if os.environ.get("RANK", "0") != "0" or not any(p.answer for p in prompts.held_out):
        return []
    found = Counter[str]()
    try:
        for p in prompts.held_out:
            kinds = [judged_as(a) for a in ([p.answer] if isinstance(p.answer, str) else p.answer or ())]
            found[next(filter(None, kinds), "too long" if kinds else "unknown")] += 1
    except AnswerError as error:
        raise PromptError(f"{p.where}: its answer cannot be judged: {error}") from error
    words = {
        "expression": "as expressions",
        "text": "as text",
        "too long": "not judged (longer than a line)",
        "unknown": "unknown",
    }
    line = ", ".join(f"{found[kind]} {text}" for kind, text in words.items() if found[kind])
    return [("answers", f"of {len(prompts.held_out)} held-out prompts: {line}")]


def build_objective(cfg: TropdConfig) -> Objective:
    """The objective that ``model.tropd`` names; ConfigError for a name, a parameter or a value that there is not."""
    t = cfg.model.tropd
    given = {**t.params, **{name: value for name in OWN_KEYS if (value := getattr(t, name)) is not None}}
    try:
        objective = build(t.objective, **given)
    except ParameterError as error:
        key = "model.tropd" if getattr(t, error.parameter, None) is not None else "model.tropd.params"
        raise ConfigError(f"{key}.{error.parameter}", error.value, f"{t.objective}: {error.wanted}") from error
    except (ValueError, TypeError) as error:
        known = ""
        if "unknown objective" not in str(error):
            known = f"; parameters of {t.objective}: {', '.join(parameters(t.objective))}"
        raise ConfigError("model.tropd.objective", t.objective, f"{error}{known}") from error
    if objective.needs_distributions and cfg.model.rollout.top_k:
        cut = (
            f"{t.objective} compares the complete distributions of student and teacher, and top-k cuts what is sampled"
        )
        remedy = f"{cut}: set it to 0 (and model.rollout.top_p to 1), or choose a sampled objective"
        raise ConfigError("model.rollout.top_k", cfg.model.rollout.top_k, remedy)
    return objective


def _shape(key: str, path: Path, tensor: int, pipeline: int) -> ModelShape:
    if not path.is_dir():
        remedy = "give a Hugging Face checkpoint (make_smollm2.py makes one)"
        if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(path)):
            remedy = f"nothing is downloaded during a run: hf download {path} --local-dir FOLDER, and give FOLDER"
        raise ConfigError(key, str(path), f"no such directory; {remedy}")
    if not (path / "config.json").exists() and (within := sorted([*path.glob("hf"), *path.glob("snapshots/*")])):
        raise ConfigError(key, str(path), f"has no config.json; the checkpoint is in {within[-1]}")
    try:
        shape = read_shape(path)
        shape.check_layout(tensor, pipeline)
        HfCheckpoint(path, shape)  # reads headers alone
    except ConversionError as error:
        raise ConfigError(key, str(path), str(error)) from error
    if os.environ.get("RANK", "0") == "0":
        check_config(path, key)
    return shape


def _vocabulary(student_path: Path, teacher_path: Path, student: ModelShape, teacher: ModelShape) -> Vocabulary:
    tokenizer, teachers = load_tokenizer(student_path, STUDENT), load_tokenizer(teacher_path, TEACHER)
    return Vocabulary.shared(tokenizer, teachers, (student.vocab_size, teacher.vocab_size), str(teacher_path))


def _text_notes(
    student_path: Path, vocabulary: Vocabulary, template: Template, prompts: PromptSplit, end_ids: tuple[int, ...]
) -> list[tuple[str, str]]:
    """Check the prompts' tokens against both tokenizers; what the plan says of models, templates and tokens."""
    tokenizer, everything = vocabulary.tokenizer, (*prompts.train, *prompts.held_out)
    vocabulary.check(everything, template.of_tokenizer(tokenizer))
    first = everything[:64]
    splits = vocabulary.check_splits([template.render(p, tokenizer) for p in first], [p.where for p in first])
    labels = labelled_otherwise(student_path, tokenizer) if os.environ.get("RANK", "0") == "0" else []
    if student_path.resolve() == Path(vocabulary.teachers.name_or_path).resolve():
        labels.append(("teacher", "the student's own folder: at first there is nothing to learn from it"))
    return [*splits, *labels, *template_notes(template, everything, tokenizer, vocabulary.teachers, end_ids)]


def _pad_id(tokenizer: Any, vocab_size: int, end_ids: tuple[int, ...]) -> int:
    """What fills rows: masked and after the text, so any id does that both models have a row for."""
    pad = tokenizer.pad_token_id
    return int(pad) if pad is not None and pad < vocab_size else end_ids[0]


def _check_folders(cfg: TropdConfig, directory: Path) -> None:
    """What the run writes can be written, and not over its models. Creates nothing."""
    _check_run_dir(directory, cfg)
    for key, path in (
        (STUDENT, cfg.pretrained_checkpoint.restore_from_path),
        (TEACHER, cfg.model.teacher.path),
    ):
        if Path(path).resolve().is_relative_to(directory.resolve()):
            where = f"lies in the run directory {directory}, where the run writes its own"
            raise ConfigError(key, path, f"{where}: set exp_manager.explicit_log_dir to another")
    guidance = cfg.model.tropd.guidance
    if cfg.model.data.held_out or (guidance.enabled and guidance.max_prefix_tokens):
        _check_writable("model.teacher.cache_dir", responses_dir(cfg))


def _check_run_dir(directory: Path, cfg: TropdConfig) -> None:
    """The run directory can be written, and if it has a run, resuming is allowed. Creates nothing."""
    key = "exp_manager.explicit_log_dir" if cfg.exp_manager.explicit_log_dir else "exp_manager.exp_dir"
    _check_writable(key, directory)
    complete = list((directory / "checkpoints").glob("step_*")) if directory.is_dir() else []
    if complete and not cfg.exp_manager.resume_if_exists:
        what = f"{directory} has {len(complete)} checkpoint(s) of an earlier run"
        raise ConfigError(
            "exp_manager.resume_if_exists", False, f"{what}; set it to true to resume, or choose another {key}"
        )


def _check_writable(key: str, directory: Path) -> None:
    parent = directory.absolute()
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise ConfigError(key, str(directory), f"{parent} is a file, not a directory")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ConfigError(key, str(directory), f"{parent} cannot be written; choose another directory")


def machine_of(cfg: TropdConfig) -> Machine:
    """The GPU that ``trainer.gpu_memory_gib`` gives or this process has, else this host. ConfigError if a GPU is given,
    this machine has none, and check_only is off."""
    key, given = "trainer.gpu_memory_gib", cfg.trainer.gpu_memory_gib
    if torch.cuda.is_available():
        found = float(torch.cuda.get_device_properties(int(os.environ.get("LOCAL_RANK", "0"))).total_memory)
        size = found if given is None else min(found, given * GIB)
        return Machine("gpu", size, CHUNK_BYTES["cuda"], "this GPU" if size == found else key, host_bytes())
    if given is None:
        return Machine("cpu", host_bytes(), CHUNK_BYTES["cpu"], "this host, all its ranks together")
    if not cfg.check_only:
        why = "this machine has no GPU: set it to null to run on CPU, or check_only=true to see the plan"
        raise ConfigError(key, given, why)
    return Machine("gpu", given * GIB, CHUNK_BYTES["cuda"], key)


def print_plan(cfg: TropdConfig, plan: Plan) -> None:
    """The plan as a table."""
    m, t = cfg.model, cfg.trainer
    tp, pp = m.tensor_model_parallel_size, m.pipeline_model_parallel_size
    world = t.num_nodes * t.devices
    fp8 = f", layers in FP8 ({m.teacher.fp8})" if m.teacher.fp8 else ""
    table = Table(title=f"Plan of {cfg.name}", show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column()
    for label, value in (
        (
            "ranks",
            f"{world} = tensor {tp} x pipeline {pp} x data {world // (tp * pp)}"
            + (", sequence parallel" if m.sequence_parallel else ""),
        ),
        ("student", plan.student.describe() + f", {t.precision}"),
        ("teacher", plan.teacher.describe() + f", {m.teacher.precision or t.precision}" + fp8),
        ("vocabulary", f"{plan.vocab_size} tokens, padded to {plan.student.padded_vocab(tp)}"),
        ("objective", repr(plan.objective)),
        ("sampled, trained on", str(sampling_of(cfg))),
        ("prompts", f"{len(plan.prompts.train)} to train, {len(plan.prompts.held_out)} held out; {_epochs(cfg, plan)}"),
        *plan.prompts.notes,
        ("a step", f"{m.global_batch_size} rollouts, at most {loss_tokens(cfg)} tokens in the loss"),
        ("a run", f"{t.tropd.max_steps} steps in {plan.run_dir}"),
        *_generation(cfg, plan),
        *plan.notes,
        *_slow_bf16(cfg, plan.machine),
        *roles(cfg, plan.machine),
        *_on_gpus(cfg, plan),
        *memory_lines(plan.memory, plan.machine),
        *(("sent by a rank in a step: " + kind, gib(size)) for kind, size in plan.wire.items() if size),
    ):
        table.add_row(label, printable(value))
    Console(width=max(shutil.get_terminal_size((110, 40)).columns, 100), markup=False, emoji=False).print(table)


def _epochs(cfg: TropdConfig, plan: Plan) -> str:
    """How often a run uses the prompts: less than once may be meant, many times a step is a file too small."""
    step, there = cfg.model.global_batch_size // cfg.model.rollout.samples_per_prompt, len(plan.prompts.train)
    uses = f"{step * cfg.trainer.tropd.max_steps / there:.1f} times each in a run"
    return uses if step <= there else f"{uses}, some of them {-(-step // there)} times in a step"


def _generation(cfg: TropdConfig, plan: Plan) -> list[tuple[str, str]]:
    if plan.teacher_engines is None:
        return []
    return generation_lines(plan.teacher_engines, plan.teacher, plan.machine, cfg, plan.wanted)


def _on_gpus(cfg: TropdConfig, plan: Plan) -> list[tuple[str, str]]:
    """What only a plan for GPUs says: the engines' caches, seconds, host memory."""
    if plan.host is None:
        return []
    seconds = step_seconds(cfg, plan.student, plan.teacher, plan.machine, plan.wire)
    cache = engine_load(cfg, plan.student, plan.machine).line(cfg)
    return [cache, *time_lines(cfg, plan.student, seconds), *host_lines(plan.host, plan.machine)]


def _slow_bf16(cfg: TropdConfig, machine: Machine) -> list[tuple[str, str]]:
    """A warning if the ranks would compute in bf16 on a CPU that is not made for it."""
    teacher = cfg.model.teacher.precision or cfg.trainer.precision
    if machine.kind == "gpu" or "bf16" not in (cfg.trainer.precision, teacher) or fast_bf16():
        return []
    return [("slow", "bf16, about 100 times, on a CPU without AVX-512: set trainer.precision=32")]
