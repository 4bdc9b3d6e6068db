"""The frozen teacher: hidden states of a batch, reduced at once to scores of its loss tokens."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from nemo_tropd.batch import LossTokens, Sampling, TeacherScores, TeacherStates, TokenBatch, TokenScores
from nemo_tropd.convert.families import ModelShape, read_shape
from nemo_tropd.convert.hf_import import load_hf
from nemo_tropd.gpt.build import build_gpt, head_weight
from nemo_tropd.gpt.forward import pipeline_forward
from nemo_tropd.loss.head import score_tokens, teacher_scores
from nemo_tropd.loss.inputs import HeadLayout, HiddenRows
from nemo_tropd.parallel.topology import Topology
from nemo_tropd.teacher.fp8 import Fp8Settings, pad_tokens
from nemo_tropd.teacher.offload import Checksums, WeightHome

R = TypeVar("R")


class TeacherScorer:
    """A Megatron GPTModel without gradients, optimizer or gradient buffers.

    ``source`` is a Hugging Face checkpoint directory, or a shape whose weights ``fill`` writes in place. ``fp8`` runs
    the layers in FP8 (``fp8.check_hardware`` first); ``offload`` keeps the weights in host memory except inside
    ``scoring``; ``overrides`` are further fields of megatron-core's TransformerConfig.
    """

    def __init__(
        self,
        source: Path | ModelShape,
        topology: Topology,
        *,
        dtype: torch.dtype,
        vocab_size: int,
        fp8: Fp8Settings | None = None,
        offload: bool = False,
        fill: Callable[[GPTModel], None] | None = None,
        **overrides: Any,
    ) -> None:
        self.topology, self.dtype, self.vocab_size, self.fp8 = topology, dtype, vocab_size, fp8
        self.shape: ModelShape = source if isinstance(source, ModelShape) else read_shape(source)
        if fp8 is not None:
            fp8.check_shape(self.shape, topology.tensor_size, topology.pipeline_size)
        # Built without gradients, quantized weights keep no transposed copy and no high-precision original.
        with torch.no_grad():
            fields = {**(fp8.transformer_fields() if fp8 else {}), **overrides}
            self.model = build_gpt(self.shape, topology, dtype=dtype, trainable=False, **fields)
            if fill is not None:
                fill(self.model)
            elif isinstance(source, ModelShape):
                raise ValueError("a teacher built from a shape needs fill, which writes its weights")
            else:
                load_hf(self.model, source, self.shape, topology)
        self.model.eval().requires_grad_(False)
        self.home = WeightHome(self.model) if offload else None
        self._checksums = Checksums(self.model)
        self._depth = 0
        if self.home is not None:
            self._checksums.check()
            self.home.leave()

    @contextmanager
    def scoring(self) -> Iterator[None]:
        """A phase in which the teacher is used: with offload on, its weights come back before and leave after.
        ``score`` opens one of its own; open one around several calls, or around any use of ``head``. Raises
        RuntimeError if the weights are not those that were loaded."""
        if self.home is not None and self._depth == 0:
            self.home.come_back()
        self._depth += 1
        try:
            if self._depth == 1:
                self._checksums.check()  # an engine that shares the device has been awake since
            yield
        finally:
            self._depth -= 1
            if self.home is not None and self._depth == 0:
                self.home.leave()

    @torch.no_grad()
    def become(self, model: GPTModel) -> None:
        """Take the weights of ``model``, of the same shape and split alike, in this model's dtype."""
        with self.rewriting() as own:
            for (name, mine), (other, weight) in zip(own.named_parameters(), model.named_parameters(), strict=True):
                if name != other or mine.shape != weight.shape:
                    raise ValueError(f"the teacher has {name} {tuple(mine.shape)}, the other {other}")
                mine.copy_(weight)

    @contextmanager
    def rewriting(self) -> Iterator[GPTModel]:
        """A phase in which the weights, on the device, may be written to."""
        with self.scoring():
            try:
                yield self.model
            finally:  # whatever was written before an error: another checkpoint may be tried
                self._checksums = Checksums(self.model)
                self._checksums.check()
                if self.home is not None:
                    self.home.renew()

    @torch.no_grad()
    def hidden(self, batches: Sequence[TokenBatch]) -> list[Tensor | None]:
        """Hidden states [B, S, H] (sequence parallel: [B, S/TP, H]) of each batch; None except on the last stage.
        FP8's padding is removed again, for which sequence parallelism gathers and splits once more."""
        with self.scoring():
            padded = self._padded(batches)
            states = pipeline_forward(self.model, padded, self.topology)
            return [
                self._unpadded(state, batch) if wide is not batch else state
                for state, wide, batch in zip(states, padded, batches, strict=True)
            ]

    @property
    def head(self) -> Tensor:
        """The head's shard [V_padded/TP, H]; last stage only. RuntimeError while the weights are away."""
        if self.home is not None and self.home.away:
            raise RuntimeError("the teacher's weights are in host memory; use its head inside scoring()")
        return head_weight(self.model)

    def layout(self, chunk_tokens: int | None, temperature: float = 1.0) -> HeadLayout:
        """How this rank's shard of the head is read. Never cut by top-k or top-p: the gate needs a finite log pi_T."""
        sampling, topology = Sampling(temperature), self.topology
        return HeadLayout(self.vocab_size, topology.tensor_group, topology.sequence_parallel, chunk_tokens, sampling)

    @torch.no_grad()
    def score(
        self,
        batches: Sequence[TokenBatch],
        *,
        top_k: int,
        entropy: bool,
        chunk_tokens: int | None,
        temperature: float = 1.0,
    ) -> list[TeacherScores | None]:
        """The teacher's scores, by softmax(z / temperature), of each batch's loss tokens, NaN where its logits are not
        finite; None except on the last pipeline stage."""
        layout = self.layout(chunk_tokens, temperature)

        def reduce(hidden: Tensor, tokens: LossTokens, _: int) -> TeacherScores:
            return teacher_scores(
                hidden, self.head, tokens.rows, tokens.token_ids, top_k, layout, entropy=entropy, carry_bad=True
            )

        return self._reduced(batches, reduce)

    @torch.no_grad()
    def states(self, batches: Sequence[TokenBatch], *, on_host: bool = False) -> list[TeacherStates | None]:
        """The hidden states of each batch's loss tokens, for objectives that see distributions; under sequence
        parallelism this rank's share. None except on the last pipeline stage. ``on_host``: see ``kept``."""
        topology, layout = self.topology, self.layout(None)

        def reduce(hidden: Tensor, tokens: LossTokens, _: int) -> TeacherStates:
            split, size = topology.sequence_parallel, topology.tensor_size
            states = HiddenRows.of(hidden, tokens.rows, layout.shard(self.head), split).pick(slice(None))
            if split:
                each = -(-len(states) // size)
                states = torch.nn.functional.pad(states, (0, 0, 0, each * size - len(states)))
                states = states[topology.tensor_rank * each :][:each].clone()
            return TeacherStates(kept(states) if on_host else states, split)

        return self._reduced(batches, reduce)

    @torch.no_grad()
    def score_like(
        self,
        batches: Sequence[TokenBatch],
        reference: Sequence[TeacherScores | None],
        *,
        chunk_tokens: int | None,
        temperature: float = 1.0,
    ) -> list[TokenScores | None]:
        """This model in the student's place beside ``reference``: its log-probabilities at the same tokens and at the
        reference's top k. None except on the last pipeline stage."""

        layout = self.layout(chunk_tokens, temperature)

        def reduce(hidden: Tensor, tokens: LossTokens, index: int) -> TokenScores:
            other = reference[index]
            assert other is not None
            return score_tokens(hidden, self.head, tokens, other, layout, carry_bad=True)

        return self._reduced(batches, reduce)

    def _reduced(self, batches: Sequence[TokenBatch], reduce: Callable[[Tensor, LossTokens, int], R]) -> list[R | None]:
        """``reduce(hidden, loss tokens, index)`` of every batch, the rows counted in the padded batch."""
        with self.scoring():
            padded = self._padded(batches)
            # Without a pipeline one batch's hidden states live at a time.
            parts = [padded] if self.topology.pipeline_size > 1 else [[batch] for batch in padded]
            reduced: list[R | None] = []
            for part in parts:
                states = pipeline_forward(self.model, part, self.topology)
                for batch, hidden in zip(part, states, strict=True):
                    reduced.append(None if hidden is None else reduce(hidden, batch.loss_tokens(), len(reduced)))
            return reduced

    def _padded(self, batches: Sequence[TokenBatch]) -> list[TokenBatch]:
        fp8 = self.fp8
        return list(batches) if fp8 is None else [pad_tokens(b, fp8.multiple, self.topology) for b in batches]

    def _unpadded(self, hidden: Tensor | None, batch: TokenBatch) -> Tensor | None:
        if hidden is None:
            return None
        width = batch.input_ids.size(1)
        if not self.topology.sequence_parallel:
            return hidden[:, :width]
        shards = [torch.empty_like(hidden) for _ in range(self.topology.tensor_size)]
        torch.distributed.all_gather(shards, hidden.contiguous(), group=self.topology.tensor_group)
        part = width // self.topology.tensor_size
        return torch.cat(shards, 1)[:, :width].narrow(1, self.topology.tensor_rank * part, part)


def kept(states: Tensor) -> Tensor:
    """The same in host memory, pinned if they are on a GPU."""
    on_gpu = states.device.type == "cuda"
    home = torch.empty(states.shape, dtype=states.dtype, pin_memory=on_gpu)
    return home.copy_(states, non_blocking=on_gpu)  # in stream order: what reads them back sees all of it
