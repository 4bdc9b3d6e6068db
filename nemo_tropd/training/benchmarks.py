"""Benchmarks of a run: the room evaluation's questions and graders, answered by the run's own engine."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from nemo_tropd.batch import Rollout, Sampling
from nemo_tropd.config import ConfigError, TropdConfig
from nemo_tropd.evaluation.models import Model
from nemo_tropd.evaluation.problems import Question, Task, read_task
from nemo_tropd.evaluation.results import result_line, scored
from nemo_tropd.evaluation.settings import benchmarks_of
from nemo_tropd.evaluation.store import Answer
from nemo_tropd.rollout.engine import RolloutRequest
from nemo_tropd.training.teacher_responses import TeacherResponse, Wanted

KEY = "model.validation.benchmarks"
_SHOWN = 8  # questions whose answers are kept at each time


@dataclass(frozen=True)
class Put:
    """A benchmark put to the student: its questions, and their prompts as token ids."""

    task: Task
    model: Model
    prompts: list[list[int]]

    @property
    def name(self) -> str:
        """Of the benchmark's file."""
        return self.task.name

    @property
    def sampling(self) -> Sampling:
        """The benchmark's own, not the run's."""
        b = self.task.settings
        return Sampling(b.temperature, b.top_p, b.top_k)

    def describe(self) -> str:
        """For the plan."""
        b, t = self.task.settings, self.task
        sampled = str(self.sampling) if b.temperature else "greedy"
        what = f"{t.problems} problems x {b.samples}, at most {b.max_new_tokens:,} new tokens"
        return f"{t.name}: {what}, {sampled}"

    @property
    def of_teacher(self) -> list[Wanted]:
        """What the teacher is to answer: the first sample of each problem."""
        limit = self.task.settings.max_new_tokens
        return [Wanted(ids, limit, self.sampling) for ids in self.prompts[: self.task.problems]]

    def requests(self) -> list[RolloutRequest]:
        """One a question."""
        limit = self.task.settings.max_new_tokens
        return [
            RolloutRequest(ids, [], q.seed, i, q.problem, limit, self.sampling)
            for i, (q, ids) in enumerate(zip(self.task.questions, self.prompts, strict=True))
        ]

    def graded(self, given: Sequence[Rollout | TeacherResponse], model: str, dtype: str) -> dict[str, Any]:
        """The share of right answers with its interval, ``of`` how many, ``line``, which says how it came about, and
        some ``answers``; of one given answer to each question, or to each problem alone. ``model`` is what the line
        calls the model."""
        questions, own = self.task.questions[: len(given)], replace(self.model, label=model)
        answers = [_answer(own, q, r) for q, r in zip(questions, given, strict=True)]
        verdicts, score = scored(self.task, own, answers)
        return {
            "right": score.mean,
            "of": len(answers),
            "interval": [score.low, score.high],
            "truncated": score.truncated,
            "unparsed": score.unparsed,
            "line": result_line(self.task, own, answers, score, dtype),
            "answers": [
                {"problem": q.problem, "sample": q.sample, "prompt": q.text, "answer": a.text, "right": v.correct}
                for q, a, v in list(zip(questions, answers, verdicts, strict=True))[:_SHOWN]
            ],
        }


def _answer(model: Model, q: Question, r: Rollout | TeacherResponse) -> Answer:
    return Answer(q.problem, q.sample, "", model.text(r.response_ids, r.finished), len(r.response_ids), r.finished)


def put(cfg: TropdConfig, model: Model) -> list[Put]:
    """The run's benchmarks, all checked. Raises ConfigError or PromptError."""
    found = []
    for name, (prefix, b) in benchmarks_of(cfg.model.validation.benchmarks, KEY).items():
        task = read_task(name, b, cfg.model.seed, prefix)
        prompts = model.prompts([q.text for q in task.questions], name)
        longest, most = max(map(len, prompts)), cfg.model.encoder_seq_length
        if longest + b.max_new_tokens > most:
            what = f"with the longest prompt of {longest} tokens it exceeds model.encoder_seq_length = {most}"
            raise ConfigError(f"{prefix}max_new_tokens", b.max_new_tokens, f"{what}: lower it, or raise that")
        found.append(Put(task, model, prompts))
    return found
