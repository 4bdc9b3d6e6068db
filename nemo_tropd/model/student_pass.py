"""One step's passes over the student: its micro-batches through Megatron's schedule, their losses and metrics."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from torch import Tensor

from nemo_tropd.batch import LossTokens, TeacherScores, TeacherStates, TokenBatch
from nemo_tropd.gpt.build import head_weight
from nemo_tropd.gpt.forward import run_model
from nemo_tropd.loss.head import HeadLoss, LossOptions, head_loss, sequence_mean_weights
from nemo_tropd.loss.inputs import HeadLayout
from nemo_tropd.loss.teacher import TeacherHead
from nemo_tropd.objectives import Objective
from nemo_tropd.parallel.metric_sums import DeviceSums, MetricSums
from nemo_tropd.parallel.topology import Topology


@dataclass(frozen=True)
class StudentPass:
    """Forward and backward of all micro-batches of one step, normalised by the global batch.

    Gradients are those of the sum over this rank's tokens divided by ``loss_tokens``: sums over micro-batches and
    data-parallel ranks then give the global mean, whatever the layout.
    """

    ddp: DistributedDataParallel
    topology: Topology
    objective: Objective
    loss_tokens: int  # of the global batch
    sequences: int  # of the global batch
    layout: HeadLayout
    most_kept: int = 0  # sequences whose tokens' log-ratios and gates are kept, for the report
    # With TeacherStates: the head of each teacher that they go through, split as the student's.
    teacher_heads: Mapping[str, Tensor] = field(default_factory=dict)
    top_k: int = 1  # and the candidates to take there

    def run(
        self,
        batches: Sequence[TokenBatch],
        scores: Sequence[TeacherScores | TeacherStates | None],
        reference: Sequence[Tensor | None],
    ) -> MetricSums:
        """Gradients into DDP's buffers; returns this rank's sums (empty except on the last stage's tensor rank 0).
        ``batches`` are the same number on every rank. Waits for the device once, at the end."""
        sums = DeviceSums(self.most_kept)

        def forward_step(data: Iterator[Any], chunk: torch.nn.Module) -> tuple[Tensor, Callable[..., Any]]:
            batch, teacher, ref = next(data)
            return run_model(chunk, batch), partial(self._loss, sums, batch, teacher, ref)

        rows, width = batches[0].input_ids.shape
        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(zip(batches, scores, reference, strict=True)),
            model=[self.ddp],
            num_microbatches=len(batches),
            seq_length=width,
            micro_batch_size=rows,
            forward_only=False,
        )
        return sums.collect()

    def _loss(
        self,
        sums: DeviceSums,
        batch: TokenBatch,
        teacher: TeacherScores | TeacherStates,
        reference: Tensor | None,
        hidden: Tensor,
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        tokens = batch.loss_tokens()
        beside: TeacherScores | TeacherHead
        if isinstance(teacher, TeacherStates):
            beside = TeacherHead(teacher, self.teacher_heads[batch.teacher], self.top_k)
        else:
            beside = teacher
        weight: Any = head_weight(self.ddp.module)  # with the main_grad that Megatron's DDP gives it
        divisor, weights = max(self.loss_tokens, 1), None
        if self.objective.denominator == "sequences":
            weights = sequence_mean_weights(tokens, divisor, max(self.sequences, 1))
        result = head_loss(
            hidden,
            weight,
            tokens,
            beside,
            self.objective,
            self.layout,
            scale=1.0 / divisor,
            options=LossOptions(weights, reference, weight.dtype != weight.main_grad.dtype, carry_bad=True),
        )
        if self.topology.tensor_rank == 0:
            _add_metrics(sums, batch, tokens, result)
            if result.bad is not None:
                sequence = int(batch.sequence_ids[tokens.sequence[result.bad[1]]])
                sums.bad.append((result.bad[0], self.topology.rank, sequence))
            elif self.most_kept:
                sums.keep(batch, result.per_token)
        # The schedule divides what it is given in place; the count is unused, see gpt.ddp.data_parallel.
        return result.loss, torch.ones((), dtype=torch.int, device=hidden.device), {}


def _add_metrics(sums: DeviceSums, batch: TokenBatch, tokens: LossTokens, result: HeadLoss) -> None:
    """One micro-batch's sums over student tokens, and the engine's and trainer's disagreement on them."""
    metrics = {k: v for k, v in result.metrics.items() if k not in ("loss", "guided_loss", "tokens")}
    sums.add({**metrics, "loss": result.loss, "student_tokens": result.metrics["tokens"]}, result.minima)
    sums.add({"tokens": tokens.rows.new_tensor(len(tokens))})
    student, per_token = ~tokens.guided, result.per_token
    if not len(tokens):
        return
    own: dict[str, Tensor] = {}
    if "forward_kl" in per_token and "trust" in per_token:
        outlier = (1 - per_token["trust"]) * per_token["forward_kl"]
        own["outlier_forward_kl"] = torch.where(student, outlier, 0.0)
        sums.add({"outlier_forward_kl": own["outlier_forward_kl"].sum()})
    if batch.groups:  # else nobody adds these up
        values = {name: per_token[name] for name in ("trust", "log_ratio") if name in per_token}
        own |= {name: torch.where(student, value, 0.0) for name, value in values.items()}
        sums.by_group(batch, {"student_tokens": student, **own})
    if "importance_weight" in per_token:
        squared = per_token["importance_weight"].double() ** 2
        sums.add({"importance_weight_squared": torch.where(student, squared, 0.0).sum()})
    log_probs = result.teacher_log_probs - per_token["log_ratio"]
    mismatch = (log_probs - tokens.behavior_log_probs).abs().double()
    # Minima are what is reduced over ranks, so the largest disagreement travels with its sign turned.
    sums.add(
        {"mismatch": torch.where(student, mismatch, 0.0).sum()},
        {"minus_mismatch": torch.where(student, -mismatch, torch.inf).min()},
    )
