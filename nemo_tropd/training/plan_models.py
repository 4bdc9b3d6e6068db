"""The models of a run, and what they have in common: shapes, tokens, what each teacher is to generate."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nemo_tropd.config import ConfigError, TropdConfig, about_teacher, loaded_as, teacher_named, with_teacher
from nemo_tropd.config_teacher import DEFAULT_TEACHER
from nemo_tropd.convert.families import ConversionError, ModelShape, read_shape
from nemo_tropd.convert.hf_files import HfCheckpoint
from nemo_tropd.data import (
    PromptSplit,
    Template,
    Vocabulary,
    end_tokens,
    labelled_otherwise,
    load_tokenizer,
    template_notes,
)
from nemo_tropd.data.tokenizer import STUDENT, TEACHER, check_config
from nemo_tropd.files import refusal
from nemo_tropd.objectives import Objective
from nemo_tropd.planner.degrees import scores_early, teacher_answers_benchmarks
from nemo_tropd.planner.machine import Machine
from nemo_tropd.planner.teacher_engines import TeacherEngines, teacher_engines
from nemo_tropd.planner.verdict import check_kv_cache
from nemo_tropd.teacher.fp8 import Fp8Settings
from nemo_tropd.training.guidance import wanted_responses


@dataclass(frozen=True)
class Teacher:
    """One of the run's teachers."""

    name: str
    cfg: TropdConfig  # of a run whose only teacher it is
    shape: ModelShape
    scored: bool = False  # it answers the benchmarks, too
    scores: bool = True  # some prompt has it
    wanted: Mapping[tuple[int, ...], int] = field(default_factory=dict)  # tokens of its response, by what it reads
    engines: TeacherEngines | None = None  # None: nothing is wanted

    @property
    def path(self) -> str:
        """Its checkpoint."""
        return self.cfg.model.teacher.path


def teacher_shape(cfg: TropdConfig, name: str) -> ModelShape:
    """The shape of a teacher, checked against its layout. Raises ConfigError."""
    m, t = cfg.model, teacher_named(cfg.model, name)
    degrees = m.tensor_model_parallel_size, m.pipeline_model_parallel_size
    own = t.tensor_model_parallel_size
    degrees = (1, 1) if t.url else degrees if own is None or own == degrees[0] else (own, 1)
    with about_teacher(name):
        shape = checked_shape(TEACHER, Path(t.path), *degrees, weights=not t.url)
        if (fp8 := Fp8Settings.of(t)) is not None:
            fp8.check_shape(shape, *degrees)
    check_context(cfg, TEACHER if name == DEFAULT_TEACHER else f"model.teachers.{name}.path", shape)
    return shape


def used_teachers(cfg: TropdConfig, shapes: dict[str, ModelShape], prompts: PromptSplit) -> list[Teacher]:
    """Those that any prompt has, and the default one if it is to answer the benchmarks. Raises ConfigError for one that
    would do nothing."""
    scored = teacher_answers_benchmarks(cfg)
    for name in cfg.model.teachers:
        if name not in prompts.teachers:
            why = "no prompt has it: leave it out, or see model.data.teacher_key and model.data.sources"
            raise ConfigError(f"model.teachers.{name}.path", teacher_named(cfg.model, name).path, why)
    follows = cfg.model.teacher.follow_steps
    if follows is not None and DEFAULT_TEACHER not in prompts.teachers:
        raise ConfigError("model.teacher.follow_steps", follows, "no prompt has model.teacher: set it to null")
    return [
        Teacher(name, with_teacher(cfg, name), shape, scored and name == DEFAULT_TEACHER, name in prompts.teachers)
        for name, shape in shapes.items()
        if name in prompts.teachers or (scored and name == DEFAULT_TEACHER)
    ]


def loaded_teachers(cfg: TropdConfig, teachers: Sequence[Teacher]) -> list[Teacher]:
    """Those that the ranks hold, each once."""
    apart: dict[tuple[object, ...], Teacher] = {}
    for t in teachers:
        if t.scores:
            apart.setdefault(loaded_as(cfg.model, t.name, cfg.trainer.precision), t)
    return list(apart.values())


def early_teachers(cfg: TropdConfig, used: Sequence[str], place: str, objective: Objective) -> tuple[str, ...]:
    """Of the teachers that prompts have, those that score rollouts as they are finished: which do not share a device
    with the student's engine, whose ``place`` is as ``placement_of`` says."""
    m, exact = cfg.model, objective.needs_distributions
    of = {name: with_teacher(cfg, name) for name in used}
    held = {loaded_as(m, name, cfg.trainer.precision) for name, own in of.items() if not own.model.teacher.url}
    early = (n for n, own in of.items() if scores_early(own, place, exact=exact, in_turns=len(held) > 1))
    return tuple(early)


def check_engines(
    run: TropdConfig, teacher: Teacher, student: ModelShape, prompts: PromptSplit, machine: Machine
) -> Teacher:
    """The teacher with what it is to generate, and by which engines. Raises ConfigError."""
    of, shape, t = teacher.cfg, teacher.shape, teacher.cfg.model.teacher
    with about_teacher(teacher.name):
        check_kv_cache(of, student, shape, machine)
        wanted = wanted_responses(of, prompts, teacher=teacher.name)
        engines = teacher_engines(of, shape, machine) if (wanted or teacher.scored) and not t.url else None
        alike = {loaded_as(run.model, name, run.trainer.precision) for name in prompts.held_out.teachers}
        measured = t.fp8 is not None and t.admission.prompts and teacher.scores
        if measured and loaded_as(run.model, teacher.name, run.trainer.precision) not in alike:
            why = "it is measured on held-out prompts of its own, and there are none: raise model.data.held_out"
            raise ConfigError("model.teacher.fp8", t.fp8, f"{why}, or set model.teacher.admission.prompts=0")
    return replace(teacher, wanted=wanted, engines=engines)


def checked_shape(key: str, path: Path, tensor: int, pipeline: int, *, weights: bool = True) -> ModelShape:
    """The shape of the model at ``key``, whose files and layout will do. Raises ConfigError."""
    if why := refusal(path):
        raise ConfigError(key, str(path), why)
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
        if weights:
            HfCheckpoint(path, shape)  # reads headers alone
    except ConversionError as error:
        raise ConfigError(key, str(path), str(error)) from error
    if os.environ.get("RANK", "0") == "0":
        check_config(path, key)
    return shape


def check_context(cfg: TropdConfig, key: str, shape: ModelShape) -> None:
    """ConfigError for a run whose sequences are longer than the model at ``key`` takes."""
    longest, why = shape.longest()
    if cfg.model.encoder_seq_length > longest:
        why = f"exceeds {why}, of the model at {key}; at most {longest}"
        raise ConfigError("model.encoder_seq_length", cfg.model.encoder_seq_length, why)


def vocabularies_of(cfg: TropdConfig, student: ModelShape, shapes: dict[str, ModelShape]) -> dict[str, Vocabulary]:
    """What the student shares with each teacher, of the ids that it shares with all."""
    tokenizer, found = load_tokenizer(Path(cfg.pretrained_checkpoint.restore_from_path), STUDENT), {}
    for name, shape in shapes.items():
        path = teacher_named(cfg.model, name).path
        with about_teacher(name):
            teachers = load_tokenizer(Path(path), TEACHER)
            found[name] = Vocabulary.shared(tokenizer, teachers, (student.vocab_size, shape.vocab_size), path)
    size = min(v.size for v in found.values())
    return {name: replace(v, size=size) for name, v in found.items()}


def all_end_tokens(
    cfg: TropdConfig, vocabularies: dict[str, Vocabulary]
) -> tuple[tuple[int, ...], list[tuple[str, str]]]:
    """Of the student and all teachers."""
    ids, notes = set[int](), dict[tuple[str, str], None]()
    for name, vocabulary in vocabularies.items():
        folders = (Path(cfg.pretrained_checkpoint.restore_from_path), Path(teacher_named(cfg.model, name).path))
        with about_teacher(name):
            own, lines = end_tokens(vocabulary, folders, cfg.model.rollout.end_tokens)
        ids.update(own)
        notes |= dict.fromkeys(lines)
    return tuple(sorted(ids)), list(notes)


def text_notes(
    student_path: Path,
    vocabularies: dict[str, Vocabulary],
    template: Template,
    prompts: PromptSplit,
    end_ids: tuple[int, ...],
) -> list[tuple[str, str]]:
    """Check the prompts' tokens against all tokenizers; what the plan says of models, templates and tokens."""
    tokenizer = vocabularies[DEFAULT_TEACHER].tokenizer
    everything = [*prompts.train, *prompts.held_out]
    labels = labelled_otherwise(student_path, tokenizer) if os.environ.get("RANK", "0") == "0" else []
    notes: dict[tuple[str, str], None] = {}
    for name, vocabulary in vocabularies.items():
        mine = [p for p in everything if p.teacher == name]
        if not mine:
            continue
        read = [*mine, *(p.as_told() for p in mine if p.told)]
        with about_teacher(name):
            vocabulary.check(read, template.of_tokenizer(tokenizer), end_ids)
            first = read[:64]
            lines = vocabulary.check_splits([template.render(p, tokenizer) for p in first], [p.where for p in first])
        if student_path.resolve() == Path(vocabulary.teachers.name_or_path).resolve() and not any(p.told for p in mine):
            lines.append(("teacher", "the student's own folder: at first there is nothing to learn from it"))
        lines += template_notes(template, mine, tokenizer, vocabulary.teachers, end_ids)
        notes |= dict.fromkeys(lines)
    return [*labels, *notes]


def pad_id(tokenizer: Any, vocab_size: int, end_ids: tuple[int, ...]) -> int:
    """What fills rows: masked and after the text, so any id does that both models have a row for."""
    pad = tokenizer.pad_token_id
    return int(pad) if pad is not None and pad < vocab_size else end_ids[0]
