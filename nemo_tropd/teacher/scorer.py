"""The frozen teacher: hidden states of a batch, reduced at once to scores of its loss tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from nemo_tropd.batch import TeacherScores, TokenBatch
from nemo_tropd.convert.families import ModelShape, read_shape
from nemo_tropd.convert.hf_import import load_hf
from nemo_tropd.loss.head import teacher_scores
from nemo_tropd.model.build import build_gpt, head_weight
from nemo_tropd.model.forward import pipeline_forward
from nemo_tropd.parallel.topology import Topology


class TeacherScorer:
    """A Megatron GPTModel without gradients, optimizer or gradient buffers."""

    def __init__(self, path: Path, topology: Topology, *, dtype: torch.dtype, vocab_size: int) -> None:
        self.topology, self.dtype, self.vocab_size = topology, dtype, vocab_size
        self.shape: ModelShape = read_shape(path)
        self.model = build_gpt(self.shape, topology, dtype=dtype, trainable=False)
        load_hf(self.model, path, self.shape, topology)
        self.model.eval().requires_grad_(False)

    @torch.no_grad()
    def hidden(self, batches: Sequence[TokenBatch]) -> list[Tensor | None]:
        """Hidden states [B, S, H] (sequence parallel: [B, S/TP, H]) of each batch; None but on the last stage."""
        return pipeline_forward(self.model, batches, self.topology)

    @property
    def head(self) -> Tensor:
        """The head's shard [V_padded/TP, H]; last stage only."""
        return head_weight(self.model)

    @torch.no_grad()
    def score(
        self, batches: Sequence[TokenBatch], *, top_k: int, entropy: bool, chunk_tokens: int | None
    ) -> list[TeacherScores | None]:
        """The teacher's scores of each batch's loss tokens; None but on the last pipeline stage."""
        scores: list[TeacherScores | None] = []
        for batch, hidden in zip(batches, self.hidden(batches), strict=True):
            if hidden is None:
                scores.append(None)
                continue
            tokens = batch.loss_tokens()
            scores.append(
                teacher_scores(
                    hidden,
                    self.head,
                    tokens.rows,
                    tokens.token_ids,
                    top_k,
                    group=self.topology.tensor_group,
                    vocab_size=self.vocab_size,
                    sequence_parallel=self.topology.sequence_parallel,
                    chunk_tokens=chunk_tokens,
                    entropy=entropy,
                )
            )
        return scores
