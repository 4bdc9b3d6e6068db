"""Held-out prompts, before, during and after: exact divergences over the full vocabulary, and right answers."""

import json
import math
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from nemo_tropd.batch import Rollout
from nemo_tropd.config_teacher import DEFAULT_TEACHER
from nemo_tropd.data.conversations import digest
from nemo_tropd.evaluation.answers import exact_match
from nemo_tropd.files import read_json, write_json
from nemo_tropd.model.tropd_model import MegatronTrOPDModel
from nemo_tropd.parallel.agreement import on_rank_zero
from nemo_tropd.rollout.ahead import AheadRollouts
from nemo_tropd.rollout.engine import RolloutRequest
from nemo_tropd.served.teacher import SAMPLED
from nemo_tropd.training.guidance import request_seed
from nemo_tropd.training.setup import Setup
from nemo_tropd.training.teacher_responses import Responses, answers_everywhere

# Rollouts of validation draw from a stream of their own, the same at every validation.
VALIDATION_STREAM = (1 << 62) + 1
HELD_OUT, BENCHMARKS = "held-out", "benchmarks"  # the parts of a validation
# Keys of model.validation that alter none of the student's numbers.
_ALIKE = ("kept_rollouts", "benchmark_interval", "score_teacher")
EVERYWHERE = ("student_entropy", "top1_agreement")  # exact with teachers behind servers, too


@dataclass(frozen=True)
class Validation:
    """Numbers and a few answers of one validation. KLs in nats a token."""

    step: int
    metrics: dict[str, float]
    answers: list[dict[str, Any]] = field(default_factory=list)  # "prompt", "answer"; what both are of
    dropped: list[str] = field(default_factory=list)  # metrics that were not finite
    benchmarks: dict[str, dict[str, Any]] = field(default_factory=dict)  # benchmarks.Put.graded, "teacher" of it too
    settings: dict[str, Any] = field(default_factory=dict)  # of model.validation, what alters the numbers

    def line(self) -> str:
        """One human-readable line."""
        names = {"reverse_kl": "reverse KL", "forward_kl": "forward KL", "one_minus_tv": "1 - TV"}
        names |= {name + SAMPLED: f"{label} (sampled)" for name, label in names.items()}
        names |= {"top1_agreement": "top-1 agreement", "exact_match": "exact match"}
        figures = [f"{label} {self.metrics[name]:.3f}" for name, label in names.items() if name in self.metrics]
        return ", ".join([*figures, *(f"{name} not finite, left out" for name in self.dropped)])


class Validator:
    """Runs validations and keeps each in RUN/validation/step_N.json, so a resumed run still knows the first."""

    def __init__(self, setup: Setup, model: MegatronTrOPDModel, responses: Responses | None) -> None:
        """``responses``: the teachers' to the held-out prompts, on rank 0; None elsewhere."""
        self.cfg, self.model, self.responses = setup.cfg.model, model, responses
        self.prompts, self.tokenizer = setup.plan.prompts.held_out, setup.plan.tokenizer
        self.topology, self.packer = setup.topology, setup.packer()
        self.dir = setup.run_dir / "validation"
        self.benchmarks, self._of_teacher = setup.plan.benchmarks, dict[str, dict[str, Any]]()
        self._begun: set[str] = set()  # parts that an engine ahead of the trainer answers; the same on every rank
        self._open: tuple[int, dict[str, float], list[dict[str, Any]], bool] | None = None  # started, not finished

    def begin(self, part: str, step: int) -> None:
        """Have an engine that works ahead of the trainer answer ``part`` by the weights ``step``, behind what was begun
        before."""
        self._begun.add(part)
        if self.topology.is_leader:
            self._ahead().begin(part, self._asked(part), step)

    @property
    def parts(self) -> tuple[str, ...]:
        """What there is to validate on: of HELD_OUT and BENCHMARKS."""
        # The same on every rank: the benchmarks themselves are on rank 0 alone.
        there = {HELD_OUT: bool(self.prompts), BENCHMARKS: bool(self.cfg.validation.benchmarks)}
        return tuple(part for part, is_there in there.items() if is_there)

    def start(self, step: int, parts: Collection[str]) -> None:
        """Validate the student as it is, as far as that needs its weights (collective); ``finish`` does the rest.
        ``reverse_kl``, ``one_minus_tv`` and the entropies are means over the tokens of the student's own answers,
        ``forward_kl`` and ``top1_agreement`` over the tokens of the teacher's; ``exact_match`` over
        ``exact_match_of`` answers, to prompts for which one is known; ``benchmark/NAME`` is the share of right ones of
        ``benchmark/NAME/of`` answers. Divergences from a teacher behind servers are estimates, whose names end in
        SAMPLED."""
        metrics, shown = self._held_out() if HELD_OUT in parts else ({}, [])
        self._open = step, metrics, shown, BENCHMARKS in parts

    def finish(self) -> Validation | None:
        """Grade the answers to benchmarks and keep the validation that was started (collective), the same on every
        rank; None if none was. Raises Stopped if the answers take too long after a request to stop: nothing is kept."""
        if self._open is None:
            return None
        step, metrics, shown, benchmarks = self._open
        scores = self._benchmarks() if benchmarks else {}
        for name, score in scores.items():
            shares = {"": score["right"], "/truncated": score["truncated"], "/unparsed": score["unparsed"]}
            shares |= {"/of": float(score["of"])}
            shares |= {"/teacher": score["teacher"]["right"]} if score["teacher"] else {}
            metrics |= {f"benchmark/{name}{part}": value for part, value in shares.items()}
        finite = {k: v for k, v in metrics.items() if math.isfinite(v)}
        result = Validation(step, finite, shown, [k for k in metrics if k not in finite], scores, self._settings())
        if self.topology.is_leader:
            self.dir.mkdir(exist_ok=True)
            write_json(self._path(step), asdict(result))
        self._open = None
        return result

    def _infer(self, part: str) -> list[Rollout]:
        """The student's answers of ``part`` (collective)."""
        if part in self._begun:
            rollouts = self._ahead().take(part)
            self._ahead().forget(part)
            self._begun.remove(part)
            return rollouts
        self.model.prepare_for_inference()
        rollouts = self.model.infer(self._asked(part) if self.topology.is_leader else None)
        self.model.finish_inference()
        return rollouts

    def _ahead(self) -> AheadRollouts:
        assert isinstance(self.model.rollouts, AheadRollouts)  # with steps_ahead it is, see placement.rollouts_of
        return self.model.rollouts

    def _asked(self, part: str) -> list[RolloutRequest]:
        return self._requests() if part == HELD_OUT else [r for b in self.benchmarks for r in b.requests()]

    def _held_out(self) -> tuple[dict[str, float], list[dict[str, Any]]]:
        rollouts = self._infer(HELD_OUT)
        metrics = self._divergences(rollouts, ("reverse_kl", "one_minus_tv", "student_entropy", "teacher_entropy"))
        # The teacher's answers are prefixes: every token of them is scored, none is the student's.
        if taught := answers_everywhere(self.topology, self.prompts, self.responses):
            metrics |= self._divergences(taught, ("forward_kl", "top1_agreement"))
        texts = [self.tokenizer.decode(list(r.response_ids), skip_special_tokens=True) for r in rollouts]
        known = on_rank_zero(self.topology, lambda: self._right_answers(rollouts, texts))
        if known:
            metrics["exact_match"] = sum(known) / len(known)
            metrics["exact_match_of"] = float(len(known))
        return metrics, [self._shown(r, text) for r, text in list(zip(rollouts, texts, strict=True))[:8]]

    def _shown(self, r: Rollout, text: str) -> dict[str, Any]:
        """An answer with what it is of: the prompt is known by its digest, since its number may change."""
        prompt, sample = self.prompts[r.prompt_index], r.sequence_id % self.cfg.validation.samples_per_prompt
        of = {"digest": digest(prompt.messages, prompt.tools).hex(), "sample": sample}
        return {**of, "prompt": prompt.text, "answer": text}

    def _benchmarks(self) -> dict[str, dict[str, Any]]:
        """Each benchmark's score by name; the teacher's is graded once."""
        rollouts = self._infer(BENCHMARKS)

        def grade() -> dict[str, dict[str, Any]]:
            found: dict[str, dict[str, Any]] = {}
            left, dtype = rollouts, self.cfg.rollout.dtype
            for b in self.benchmarks:
                own, left = left[: len(b.prompts)], left[len(b.prompts) :]
                if self.cfg.validation.score_teacher and b.name not in self._of_teacher:
                    assert self.responses is not None  # rank 0
                    given = [self.responses[DEFAULT_TEACHER].lookup(w.prompt_ids, w.sampling) for w in b.of_teacher]
                    self._of_teacher[b.name] = b.graded(given, "teacher", dtype)
                found[b.name] = {**b.graded(own, "student", dtype), "teacher": self._of_teacher.get(b.name)}
            return found

        return on_rank_zero(self.topology, grade)

    def read(self, step: int) -> Validation | None:
        """The validation an earlier part of this run made after ``step``."""

        content = on_rank_zero(self.topology, lambda: read_json(self._path(step)))
        return Validation(**content) if content else None

    def changes(self) -> list[str]:
        """A line for each setting that is not the first validation's (collective): before and after are then not
        measured alike."""
        first, now = self.read(0), self._settings()
        was = first.settings if first else {}
        return [
            f"model.validation.{name}: {was[name]} at the first validation, {value} from here on: before and after are "
            "not measured alike"
            for name, value in now.items()
            if name in was and was[name] != value
        ]

    def _settings(self) -> dict[str, Any]:
        """Of model.validation, as JSON has it, what alters what a validation measures."""
        found = {name: value for name, value in asdict(self.cfg.validation).items() if name not in _ALIKE}
        found["max_new_tokens"] = self._limit
        return dict(json.loads(json.dumps(found)))

    @property
    def _limit(self) -> int:
        return self.cfg.validation.max_new_tokens or self.cfg.rollout.max_new_tokens

    def _path(self, step: int) -> Path:
        return self.dir / f"step_{step:08d}.json"

    def _requests(self) -> list[RolloutRequest]:
        samples = self.cfg.validation.samples_per_prompt
        return [
            RolloutRequest(
                prompt_ids=list(prompt.token_ids),
                prefix_ids=[],
                seed=request_seed(self.cfg.seed, VALIDATION_STREAM, i, sample),
                sequence_id=i * samples + sample,
                prompt_index=i,
                max_new_tokens=self._limit,
            )
            for i, prompt in enumerate(self.prompts)
            for sample in range(samples)
        ]

    def _right_answers(self, rollouts: Sequence[Rollout], texts: Sequence[str]) -> list[bool]:
        """For each rollout whose prompt has a known answer that can be judged: does it end in that answer?"""
        answers = [self.prompts[r.prompt_index].answer for r in rollouts]
        verdicts = [exact_match(t, a) for t, a in zip(texts, answers, strict=True) if a is not None]
        return [right for right in verdicts if right is not None]

    def _divergences(self, rollouts: Sequence[Rollout], names: Sequence[str]) -> dict[str, float]:
        """Means over tokens: of all, and of each source and teacher, where there are several."""
        batches = self.packer.pack(rollouts, 0, self.prompts)  # divergences use no draws
        self.model.prepare_for_validation_step()
        sums = self.model.get_divergences(batches).gather()
        self.model.finish_validation_step()
        of = ["", *(f"{k.removesuffix('/tokens')}/" for k in sorted(sums.sums) if k.endswith("/tokens"))]
        found: dict[str, float] = {}
        for part in of:
            tokens, sampled = sums.sums[f"{part}tokens"], sums.sums.get(f"{part}tokens{SAMPLED}", 0.0)
            for name in names:
                if sampled and part + name + SAMPLED in sums.sums:
                    found[part + name + SAMPLED] = sums.mean(part + name + SAMPLED, sampled)
                exact = tokens if name in EVERYWHERE else tokens - sampled
                if exact:
                    found[part + name] = sums.mean(part + name, exact)
        return found
