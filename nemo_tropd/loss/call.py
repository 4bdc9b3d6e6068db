"""One call of the head: its arguments, the objective's part of each chunk, and what is left at the end."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nemo_tropd.batch import LossTokens, TeacherScores, TokenScores

from .chunks import StudentChunk
from .inputs import HeadLayout
from .sampled import as_sampled

if TYPE_CHECKING:
    from .head import LossOptions
    from .kernel_chunks import KernelStudentChunk
    from .teacher import TeacherHead


@dataclass
class Call:
    """One call's arguments, and what it leaves besides the loss."""

    tokens: LossTokens
    teacher: TeacherScores | TeacherHead
    objective: Any  # an ObjectiveFunction
    layout: HeadLayout
    scale: float | Tensor
    options: LossOptions
    grad_enabled: bool
    sums: dict[str, Tensor] = field(default_factory=dict)
    minima: dict[str, Tensor] = field(default_factory=dict)
    per_token: dict[str, Tensor] = field(default_factory=dict)
    bad: tuple[str, int] | None = None
    scores: TeacherScores = field(init=False)  # as given, or filled chunk by chunk

    def __post_init__(self) -> None:
        if isinstance(self.teacher, TeacherScores):
            self.scores = self.teacher

    def objective_gradient(
        self, out: StudentChunk | KernelStudentChunk, chunk: slice, sums: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...], dict[str, Tensor]]:
        """Loss [C] (weighted, unscaled, detached), gradients of the scaled sum over the temperature, by which logits
        were divided, and metrics of one chunk. The gradients are those of the columns [C, columns] and, with an exact
        objective's ``sums`` [C, n], of its value [C]."""
        with torch.enable_grad():
            columns, reference = out.log_probs.requires_grad_(self.grad_enabled), self.options.reference_log_probs
            exact = None if sums is None else self.objective.value(sums).detach().requires_grad_(self.grad_enabled)
            scores = token_scores(
                as_sampled(columns, out.kept, self.tokens, chunk), self.tokens, self.scores,
                entropy=out.entropy, reference_log_probs=reference, chunk=chunk,
            )  # fmt: skip
            if exact is not None:
                scores = replace(scores, exact=exact, sums=sums)
            loss, metrics = self.objective(scores)
            for name, values in {"loss": loss, **metrics}.items():
                if (shape := values.shape) != scores.student_log_probs.shape:
                    raise ValueError(f"the objective's {name!r} has shape {tuple(shape)}; give one value a token")
            if self.options.token_weights is not None:
                loss = loss * self.options.token_weights[chunk].to(loss.dtype)
            inputs = (columns,) if exact is None else (columns, exact)
            grads = tuple(torch.zeros_like(x) for x in inputs)
            if loss.requires_grad:
                scale = self.scale / self.layout.sampling.temperature
                total = (loss * scale).sum()
                grads = torch.autograd.grad(total, inputs, materialize_grads=True, allow_unused=True)
        return loss.detach(), grads, metrics

    def close(self, loss: Tensor, metrics: list[dict[str, Tensor]]) -> None:
        """Sums, minima and per-token values of all chunks."""
        guided = self.tokens.guided
        student = ~guided
        self.per_token = {name: torch.cat([m[name] for m in metrics]) for name in metrics[0]}
        self.sums = {name: torch.where(student, v, 0).double().sum() for name, v in self.per_token.items()}
        self.sums |= {"loss": torch.where(student, loss, 0).sum(), "guided_loss": torch.where(guided, loss, 0).sum()}
        self.sums |= {"tokens": student.sum().double(), "guided_tokens": guided.sum().double()}
        if (ratio := self.per_token.get("log_ratio")) is not None:
            floor = loss.new_full((1,), float("inf"))
            least = torch.cat([floor, torch.where(student, ratio.double(), torch.inf)]).min()
            self.minima = {"log_ratio": least}


def column_ids(tokens: LossTokens, teacher: TeacherScores, chunk: slice = slice(None)) -> Tensor:
    """[C, K + 1]: the sampled token, then the teacher's top k."""
    return torch.cat([tokens.token_ids[chunk, None], teacher.top_k_ids[chunk]], 1)


def token_scores(
    columns: Tensor,
    tokens: LossTokens,
    teacher: TeacherScores,
    *,
    entropy: Tensor | None = None,
    reference_log_probs: Tensor | None = None,
    chunk: slice = slice(None),
) -> TokenScores:
    """What an objective sees of the tokens in ``chunk``, of which ``columns`` [C, K + 1] and ``entropy`` [C] are."""
    return TokenScores(
        student_log_probs=columns[:, 0],
        student_top_k_log_probs=columns[:, 1:],
        teacher_log_probs=teacher.log_probs[chunk],
        teacher_top_k_log_probs=teacher.top_k_log_probs[chunk],
        guided=tokens.guided[chunk],
        uniforms=tokens.uniforms[chunk],
        student_entropy=entropy,
        teacher_entropy=None if teacher.entropy is None else teacher.entropy[chunk],
        behavior_log_probs=tokens.behavior_log_probs[chunk],
        reference_log_probs=None if reference_log_probs is None else reference_log_probs[chunk],
    )
