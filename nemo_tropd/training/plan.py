"""The plan of a run: everything that can be computed, and refused, before a model is built."""

import difflib
import os
import shutil
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from nemo_tropd.command_line import printable
from nemo_tropd.config import ConfigError, TropdConfig, about_teacher, guided, run_dir
from nemo_tropd.config_data import SourceConfig
from nemo_tropd.config_teacher import DEFAULT_TEACHER
from nemo_tropd.convert.families import ModelShape
from nemo_tropd.data import (
    PromptError,
    PromptKeys,
    PromptSplit,
    Source,
    Template,
    Vocabulary,
    load_prompts,
)
from nemo_tropd.data.tokenizer import STUDENT, TEACHER
from nemo_tropd.evaluation.answers import AnswerError, judged_as
from nemo_tropd.files import refusal
from nemo_tropd.loss.inputs import CHUNK_BYTES
from nemo_tropd.objectives import Objective
from nemo_tropd.parallel.cpu import fast_bf16
from nemo_tropd.planner.degrees import loss_tokens
from nemo_tropd.planner.engine import engine_load
from nemo_tropd.planner.host import check_host, host_lines
from nemo_tropd.planner.machine import GIB, Machine, host_bytes
from nemo_tropd.planner.memory import Memory
from nemo_tropd.planner.pace import time_lines
from nemo_tropd.planner.roles import roles
from nemo_tropd.planner.teacher_engines import generation_lines
from nemo_tropd.planner.verdict import check_memory, gib, memory_lines
from nemo_tropd.planner.ways import Work, way_lines
from nemo_tropd.planner.wire import estimate_wire
from nemo_tropd.rollout.placement import checked_place, sampling_of
from nemo_tropd.training.objective import build_objective, prefix_line
from nemo_tropd.training.plan_models import (
    Teacher,
    all_end_tokens,
    check_context,
    check_engines,
    checked_shape,
    early_teachers,
    loaded_teachers,
    pad_id,
    teacher_shape,
    text_notes,
    used_teachers,
    vocabularies_of,
)
from nemo_tropd.training.teacher_responses import responses_dir


@dataclass(frozen=True)
class Plan:
    """What a run will be."""

    student: ModelShape
    teachers: tuple[Teacher, ...]  # that any prompt has, or the benchmarks
    tokenizer: Any
    vocab_size: int  # ids below it are sampled and scored: the one number that student, teacher and engine share
    pad_id: int
    end_ids: tuple[int, ...]  # end a response, in the student's and the teacher's engine
    prompts: PromptSplit
    objective: Objective
    machine: Machine
    work: Work
    memory: Memory
    host: Memory | None  # of a GPU node's host; None on a CPU, where ``memory`` is the host's
    wire: dict[str, float]  # bytes that a rank sends per step, by kind
    run_dir: Path
    early: tuple[str, ...] = ()  # the teachers that score rollouts as they are finished
    benchmarks: tuple[Any, ...] = ()  # training.benchmarks.Put; on rank 0
    notes: tuple[tuple[str, str], ...] = ()  # further lines: (label, text)


def make_plan(cfg: TropdConfig) -> Plan:
    """Check paths, shapes, tokenizers, prompts, objective and run directory. Raises ConfigError, ConversionError or
    PromptError."""
    student_path, m = Path(cfg.pretrained_checkpoint.restore_from_path), cfg.model
    degrees = m.tensor_model_parallel_size, m.pipeline_model_parallel_size
    student = checked_shape(STUDENT, student_path, *degrees)
    check_context(cfg, STUDENT, student)
    shapes = {name: teacher_shape(cfg, name) for name in (DEFAULT_TEACHER, *m.teachers)}
    if m.teacher.follow_steps is not None and shapes[DEFAULT_TEACHER] != student:
        why = f"the teacher ({shapes[DEFAULT_TEACHER].describe()}) has another shape than the student: set "
        remedy = f"{why}model.teacher.path={student_path}, or this to null"
        raise ConfigError("model.teacher.follow_steps", m.teacher.follow_steps, remedy)
    vocabularies = vocabularies_of(cfg, student, shapes)
    vocabulary = vocabularies[DEFAULT_TEACHER]
    tokenizer, vocab_size, template = vocabulary.tokenizer, vocabulary.size, Template.of(m.data)
    template.check(tokenizer)
    end_ids, end_notes = all_end_tokens(cfg, vocabularies)
    objective = build_objective(cfg)
    if m.tropd.top_k > vocab_size:
        raise ConfigError("model.tropd.top_k", m.tropd.top_k, f"the vocabulary has only {vocab_size} tokens")
    directory = run_dir(cfg)
    _check_folders(cfg, directory)
    prompts = _prompts(cfg, tokenizer, template)
    notes = text_notes(student_path, vocabularies, template, prompts, end_ids)
    machine, teachers = machine_of(cfg), used_teachers(cfg, shapes, prompts)
    first, *_ = loaded = loaded_teachers(cfg, teachers)
    work = Work(student, {t.name: t.shape for t in loaded}, machine, _needs(objective))
    memory = work.memory(cfg)
    largest = max(loaded, key=lambda t: t.shape.parameters())
    with about_teacher(largest.name):
        check_memory(largest.cfg, memory, machine)
    teachers = [check_engines(cfg, t, student, prompts, machine) for t in teachers]
    host = None
    if machine.kind == "gpu":
        host = work.host(cfg)
        pinned = next((t for t in loaded if t.cfg.model.teacher.offload), first)
        with about_teacher(pinned.name):
            check_host(pinned.cfg, host, machine)
    place = checked_place(cfg, on_gpu=machine.kind == "gpu")
    benchmarks, benchmark_notes = _benchmarks(cfg, student, vocabulary, template, end_ids)
    return Plan(
        student=student,
        teachers=tuple(teachers),
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        pad_id=pad_id(tokenizer, vocab_size, end_ids),
        end_ids=end_ids,
        prompts=prompts,
        objective=objective,
        machine=machine,
        work=work,
        memory=memory,
        host=host,
        wire=estimate_wire(first.cfg, student, first.shape, machine, exact=work.exact),
        run_dir=directory,
        early=early_teachers(cfg, prompts.teachers, place, objective),
        benchmarks=benchmarks,
        notes=(*vocabulary.notes, *end_notes, *notes, *benchmark_notes),
    )


def _needs(objective: Objective) -> dict[str, bool]:
    o = objective
    return {"reference": o.needs_reference, "first_pass": o.needs_first_pass, "exact": o.needs_distributions}


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
                    data.teacher_key if s.teacher is None else None,
                    s.teacher_prompt_key or data.teacher_prompt_key,
                ),
                s.split or data.split,
                s.teacher,
            )
            for s in [SourceConfig(**s) for s in data.sources] or [SourceConfig(str(data.path))]
        ],
        tokenizer,
        max_prompt_tokens=data.max_prompt_tokens,
        held_out=data.held_out,
        overlong=data.overlong,
        template=template,
    )
    known = (DEFAULT_TEACHER, *cfg.model.teachers)
    if bad := next((p for p in (*prompts.train, *prompts.held_out) if p.teacher not in known), None):
        near = difflib.get_close_matches(bad.teacher, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
        why = f"its teacher (model.data.teacher_key={data.teacher_key}) is {bad.teacher!r}"
        raise PromptError(f"{bad.where}: {why}, which model.teachers does not name; {hint}")
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


def _check_folders(cfg: TropdConfig, directory: Path) -> None:
    """What the run writes can be written, and not over its models. Creates nothing."""
    _check_run_dir(directory, cfg)
    for key, path in (
        (STUDENT, cfg.pretrained_checkpoint.restore_from_path),
        (TEACHER, cfg.model.teacher.path),
        *((f"model.teachers.{name}.path", section["path"]) for name, section in cfg.model.teachers.items()),
    ):
        if Path(path).resolve().is_relative_to(directory.resolve()):
            where = f"lies in the run directory {directory}, where the run writes its own"
            raise ConfigError(key, path, f"{where}: set exp_manager.explicit_log_dir to another")
    if cfg.model.data.held_out or guided(cfg):
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
    if why := refusal(directory):
        raise ConfigError(key, str(directory), why)
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
        *map(_teacher_line, plan.teachers),
        ("vocabulary", f"{plan.vocab_size} tokens, padded to {plan.student.padded_vocab(tp)}"),
        ("objective", repr(plan.objective)),
        ("sampled, trained on", str(sampling_of(cfg))),
        ("prompts", f"{len(plan.prompts.train)} to train, {len(plan.prompts.held_out)} held out; {_epochs(cfg, plan)}"),
        *plan.prompts.notes,
        *([("scored early", f"each finished rollout, by {', '.join(plan.early)}")] if plan.early else ()),
        ("a step", f"{m.global_batch_size} rollouts, at most {loss_tokens(cfg)} tokens in the loss"),
        ("a run", f"{t.tropd.max_steps} steps in {plan.run_dir}"),
        ("teacher prefixes", prefix_line(cfg)),
        *_generation(plan),
        *plan.notes,
        *_slow_bf16(cfg, plan),
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


def _teacher_line(teacher: Teacher) -> tuple[str, str]:
    t = teacher.cfg.model.teacher
    fp8 = f", layers in FP8 ({t.fp8})" if t.fp8 else ""
    label = "teacher" if teacher.name == DEFAULT_TEACHER else f"teacher {teacher.name}"
    follows = f", becomes the student every {t.follow_steps} steps" if t.follow_steps else ""
    if not t.url:
        return label, f"{teacher.shape.describe()}, {t.precision or teacher.cfg.trainer.precision}{fp8}{follows}"
    when = "tried before step 1, not by check_only; it generates prefixes and held-out answers there, too"
    sampled = "validation's divergences are estimates from sampled tokens"
    return label, f"{teacher.shape.describe()}, on {', '.join(t.urls)}: {when}; {sampled}"


def _generation(plan: Plan) -> list[tuple[str, str]]:
    of = "" if len(plan.teachers) == 1 else "teacher {}: "
    answers = [one.length for put in plan.benchmarks for one in put.of_teacher]
    return [
        (label, of.format(t.name) + line)
        for t in plan.teachers
        if t.engines is not None
        for label, line in generation_lines(
            t.engines, t.shape, plan.machine, t.cfg, t.wanted, answers if t.scored else ()
        )
    ]


def _on_gpus(cfg: TropdConfig, plan: Plan) -> list[tuple[str, str]]:
    """What only a plan for GPUs says: the engines' caches, seconds, host memory."""
    if plan.host is None:
        return []
    cache, time = engine_load(cfg, plan.student, plan.machine).line(cfg), plan.work.pace(cfg)
    said = [cache, *time_lines(cfg, plan.student, time), *way_lines(cfg, plan.work)]
    return [*said, *host_lines(plan.host, plan.machine)]


def _slow_bf16(cfg: TropdConfig, plan: Plan) -> list[tuple[str, str]]:
    """A warning if the ranks would compute in bf16 on a CPU that is not made for it."""
    precisions = {cfg.trainer.precision, *(t.cfg.model.teacher.precision for t in plan.teachers)}
    if plan.machine.kind == "gpu" or "bf16" not in precisions or fast_bf16():
        return []
    return [("slow", "bf16, about 100 times, on a CPU without AVX-512: set trainer.precision=32")]
