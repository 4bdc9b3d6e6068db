"""An evaluation: everything is checked first, then each model answers, is graded, and compared."""

import os
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from nemo_tropd.batch import Sampling
from nemo_tropd.command_line import printable
from nemo_tropd.config import ConfigError
from nemo_tropd.convert.families import ConversionError
from nemo_tropd.data import PromptError
from nemo_tropd.evaluation.answers import AnswerError
from nemo_tropd.evaluation.generation import (
    Asked,
    Engines,
    MakeEngine,
    complete,
    engine_settings,
    engine_version,
    vllm_engine,
)
from nemo_tropd.evaluation.models import Convert, Model, check_lengths, load_models
from nemo_tropd.evaluation.problems import Task, read_task
from nemo_tropd.evaluation.results import Graded, graded, write_results
from nemo_tropd.evaluation.settings import Evaluation, Plan
from nemo_tropd.evaluation.store import AnswerFile
from nemo_tropd.files import refusal
from nemo_tropd.rollout.engine import EngineError

EXPECTED = (ConfigError, ConversionError, PromptError, EngineError, AnswerError)
_BATCH = {"cpu": 64, "cuda": 512}


def evaluate(plan: Plan, convert: Convert, make_engine: MakeEngine = vllm_engine) -> dict[str, Any]:
    """Generate what is missing, grade, and write results.json, results.md and report.html into OUT/NAME; returns the
    results. Raises ConfigError, ConversionError or PromptError before an engine starts, EngineError later."""
    e, done = plan.evaluation, list[Graded]()
    asked = _asked(plan, convert)
    with closing(Engines(make_engine, e)) as engines:
        for one in asked:
            complete(one, engines, e.batch or _default_batch(e))
            done.append(graded(one))
            print(printable(done[-1].line), flush=True)
    return write_results(Path(e.out) / plan.name, plan.name, done)


def _default_batch(e: Evaluation) -> int:
    if not torch.cuda.is_available():
        return _BATCH["cpu"]
    return _BATCH["cuda"] * max(1, (e.devices or torch.cuda.device_count()) // e.tensor_model_parallel_size)


def _asked(plan: Plan, convert: Convert) -> list[Asked]:
    """Every benchmark put to every model, all checked."""
    e = plan.evaluation
    _check_devices(e)
    for part in ("", plan.name, *(f"answers/{name}" for name in plan.benchmarks)):
        _check_folder(e.out, Path(e.out) / part)
    prefixes = {name: "" if list(plan.benchmarks) == [plan.name] else f"{name}." for name in plan.benchmarks}
    tasks = [read_task(name, b, e.seed, prefixes[name]) for name, b in plan.benchmarks.items()]
    models = load_models(e, convert)
    for model in models:
        print(printable(f"{model.label}: {model.shape.describe()}, from {model.folder}"), flush=True)
    return [one for model in models for one in _put(tasks, model, e, prefixes)]


def _put(tasks: Sequence[Task], model: Model, e: Evaluation, prefixes: dict[str, str]) -> list[Asked]:
    prompts = [model.prompts([q.text for q in task.questions], task.name) for task in tasks]
    longest = max(
        check_lengths(model, ids, task.settings.max_new_tokens, f"{prefixes[task.name]}max_new_tokens")
        for task, ids in zip(tasks, prompts, strict=True)
    )
    asked = []
    for task, ids in zip(tasks, prompts, strict=True):
        b = task.settings
        sampling = Sampling(b.temperature, b.top_p, b.top_k)
        identity = {
            "benchmark": task.name,
            "model": model.digest,
            "vocab_size": model.vocab_size,
            "end_ids": list(model.end_ids),
            "temperature": b.temperature,
            "top_p": b.top_p,
            "top_k": b.top_k,
            "max_new_tokens": b.max_new_tokens,
            "seed": e.seed,
            "dtype": e.dtype,
            "engine": engine_version(),
        }
        file = AnswerFile(Path(e.out) / "answers" / task.name, identity, model.label)
        asked.append(Asked(task, model, ids, file, engine_settings(model, sampling, longest, e)))
    return asked


def _check_folder(out: str, folder: Path) -> None:
    """Can files be written in ``folder``, which may have to be made? Leaves nothing behind."""
    if why := refusal(folder):
        raise ConfigError("out", out, why)
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    try:
        with TemporaryDirectory(dir=there):
            pass
    except OSError as error:
        raise ConfigError("out", out, f"nothing can be written in {there} ({error.strerror})") from error


def _check_devices(e: Evaluation) -> None:
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for key, wanted in (("devices", e.devices), ("tensor_model_parallel_size", e.tensor_model_parallel_size)):
        if wanted is not None and wanted > max(there, key != "devices"):
            raise ConfigError(key, wanted, f"this process has {there} GPUs; set CUDA_VISIBLE_DEVICES or lower it")
