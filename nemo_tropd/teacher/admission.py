"""Admits an FP8 teacher: it is compared with itself in bf16, on the same tokens, before the first step."""

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from nemo_tropd.batch import TeacherScores, TokenBatch, TokenScores
from nemo_tropd.config import ConfigError
from nemo_tropd.config_teacher import AdmissionConfig
from nemo_tropd.objectives.terms import forward_kl, trust_gate
from nemo_tropd.parallel.metric_sums import MetricSums
from nemo_tropd.teacher.fp8 import Fp8Settings
from nemo_tropd.teacher.scorer import TeacherScorer

TOP_K = 64
# (batches, the bf16 teacher's scores of them) -> the student's scores beside them; None except on the last stage
StudentScores = Callable[[Sequence[TokenBatch], Sequence[TeacherScores | None]], Sequence[TokenScores | None]]


@dataclass(frozen=True)
class Admission:
    """An FP8 teacher against the same teacher in bf16, both at the run's temperature. Means over tokens; KL and R in
    nats."""

    recipe: str
    tokens: int
    top_k_kl: float  # KL(bf16 || FP8) over bf16's 64 best tokens and one bucket for all others
    gate_flips: float  # share of tokens whose Bernoulli gate falls the other way under the run's own draws
    ratio_error: float  # |R of FP8 - R of bf16|, R = log pi_T(x) - log pi_S(x)

    def line(self) -> str:
        return (
            f"FP8 teacher ({self.recipe}) against bf16 on {self.tokens} tokens: top-{TOP_K} KL {self.top_k_kl:.4f} "
            f"nats, gate flips {self.gate_flips:.2%}, error of R {self.ratio_error:.4f} nats"
        )

    def check(self, bounds: AdmissionConfig, first_last_bf16: int = 0) -> None:
        """Raise ConfigError, with every exceeded bound and its value, unless all are satisfied.
        A non-finite value counts as exceeding every bound."""
        labels = {"top_k_kl": f"top-{TOP_K} KL", "gate_flips": "share of gate flips", "ratio_error": "error of R"}
        exceeded = [
            f"{label} {getattr(self, key):.4g} is above model.teacher.admission.{key} = {getattr(bounds, key):g}"
            for key, label in labels.items()
            if not getattr(self, key) <= getattr(bounds, key)
        ]
        if exceeded:
            raise ConfigError(
                "model.teacher.fp8",
                self.recipe,
                f"on {self.tokens} tokens the FP8 teacher is too far from bf16: {'; '.join(exceeded)}. Run the teacher "
                f"in bf16 (model.teacher.fp8=null), keep the first and last layers in bf16 "
                f"(model.teacher.fp8_first_last_bf16={first_last_bf16 + 1}), or raise the bound",
            )


def measure(student: Sequence[TokenScores], quantized: Sequence[TokenScores], recipe: str) -> Admission:
    """The figures of an FP8 teacher, over all ranks (collective): ``student`` are the student's scores beside the bf16
    teacher's, ``quantized`` the FP8 teacher's in the student's place (``score_like``)."""
    sums = MetricSums()
    for mine, other in zip(student, quantized, strict=True):
        sums.add(_sums(mine, other))
    total = sums.gather()
    tokens = total.sums.get("tokens", 0)
    return Admission(recipe, int(tokens), *(total.mean(name, tokens) for name in ("kl", "flips", "error")))


def _sums(student: TokenScores, quantized: TokenScores) -> dict[str, float]:
    swapped = replace(student, teacher_log_probs=quantized.student_log_probs)
    flips = trust_gate(student, "bernoulli") != trust_gate(swapped, "bernoulli")
    error = (quantized.student_log_probs - student.teacher_log_probs).abs()
    return {
        "tokens": error.numel(),
        "kl": float(forward_kl(quantized, tail="ghost").double().sum()),
        "flips": float(flips.sum()),
        "error": float(error.double().sum()),
    }


def admit(
    make_teacher: Callable[[Fp8Settings | None], TeacherScorer],
    fp8: Fp8Settings,
    batches: Sequence[TokenBatch],
    student: StudentScores,
    bounds: AdmissionConfig,
    *,
    chunk_tokens: int | None = None,
    temperature: float = 1.0,
    counts: bool = True,
) -> tuple[TeacherScorer, Admission]:
    """The FP8 teacher and its figures if they satisfy ``bounds``, else ConfigError (collective).

    The two teachers are never in memory together. ``batches`` are the same on every data-parallel rank; ``counts`` is
    False on ranks that only repeat what another finds.
    """
    teacher = make_teacher(None)
    options: dict[str, Any] = {"chunk_tokens": chunk_tokens, "temperature": temperature}
    read = [batch.for_teacher for batch in batches]
    reference = teacher.score(read, top_k=min(TOP_K, teacher.vocab_size), entropy=False, **options)
    del teacher
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    scored = student(batches, reference)
    teacher = make_teacher(fp8)
    quantized = teacher.score_like(read, reference, **options)
    pairs = [(s, q) for s, q in zip(scored, quantized, strict=True) if counts and s is not None and q is not None]
    found = measure([s for s, _ in pairs], [q for _, q in pairs], fp8.recipe)
    found.check(bounds, fp8.first_last_bf16)
    return teacher, found
