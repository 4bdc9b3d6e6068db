"""What would make a GPU wait, counted on a CPU: looks at values, and streams that are one too many."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nemo_tropd import objectives
from nemo_tropd.loss import head, overlap
from nemo_tropd.loss.head import LossOptions, head_loss, score_tokens, teacher_scores
from nemo_tropd.loss.inputs import HeadLayout
from tests.oracles.micro_batch import make

pytestmark = pytest.mark.random


class Looks(TorchDispatchMode):
    """Counts the operations whose results the host waits for."""

    WAITS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in self.WAITS
        return func(*args, **(kwargs or {}))


def test_a_micro_batch_of_the_trainer_is_looked_at_once() -> None:
    mb = make(7)
    hidden, weight = mb.hidden.float(), mb.weight.float()
    layout, scores = HeadLayout(mb.vocab_size, chunk_tokens=3), mb.teacher_scores()

    def student(carry: bool) -> None:
        options, objective = LossOptions(carry_bad=carry), objectives.build("tropd")
        learns = hidden.detach().requires_grad_()
        head_loss(learns, weight, mb.tokens, scores, objective, layout, scale=0.25, options=options).loss.backward()

    def looks(work: Any, *args: Any, **options: Any) -> int:
        with Looks() as counted:
            work(*args, **options)
        return counted.count

    frozen = (hidden, weight, mb.tokens.rows, mb.tokens.token_ids, 5, layout)
    assert looks(teacher_scores, *frozen, carry_bad=True) == 0
    assert looks(score_tokens, hidden, weight, mb.tokens, scores, layout, carry_bad=True) == 0
    assert looks(student, True) == 1  # for what is not finite
    assert looks(teacher_scores, *frozen) > 0 and looks(student, False) > 1


class Recorder:
    """A stream that remembers what it is asked for."""

    def __init__(self, name: str, log: list[tuple[str, ...]]) -> None:
        self.name, self.log = name, log

    def wait_stream(self, other: Recorder) -> None:
        self.log.append((self.name, "waits for", other.name))

    def record_event(self) -> str:
        return self.name

    def wait_event(self, event: str) -> None:
        self.log.append((self.name, "waits for", event))


def test_the_side_stream_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch gives streams of a pool of 32: one a call would soon be the stream of somebody else."""
    log: list[tuple[str, ...]] = []
    made: list[Recorder] = []

    def stream(device: torch.device) -> Recorder:
        made.append(Recorder(f"side {len(made)}", log))
        return made[-1]

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Recorder("main", log))
    monkeypatch.setattr(torch.cuda, "Stream", stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda side: nullcontext())
    monkeypatch.setattr(overlap, "_side_streams", {})
    order: list[tuple[str, int]] = []

    def product(chunk: slice, slot: int) -> Tensor:
        order.append(("product", chunk.start))
        return torch.zeros(1)

    chunks = [slice(i, i + 1) for i in range(3)]
    for _ in range(4):
        overlap.run_chunks(
            chunks,
            product,
            lambda chunk, logits: order.append(("reduce", chunk.start)),
            lambda chunk, reduced: order.append(("back", chunk.start)),
            slots=2,
            device=torch.device("cuda", 0),
        )
    assert len(made) == 1
    both = [("main", "waits for", "side 0"), ("side 0", "waits for", "main")]
    assert log[:3] == [both[1], both[1], both[0]] and set(log) == set(both)
    assert order[:5] == [("product", 0), ("product", 1), ("reduce", 0), ("back", 0), ("product", 2)]


def test_the_allocator_knows_who_reads_what_the_side_stream_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory of expandable segments is unmapped once the stream that it was made on is done, whoever reads it."""

    class Made:
        reader = ""

        def record_stream(self, stream: str) -> None:
            self.reader = stream

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "the caller's")
    monkeypatch.setattr(head, "run_chunks", lambda *parts, **options: None)
    work, (loss, metric, log_z) = object.__new__(head._Pass), (Made() for _ in range(3))
    rows = SimpleNamespace(device=torch.device("cuda", 0))
    work.run, work.chunks, work.slots = SimpleNamespace(tokens=SimpleNamespace(rows=rows)), [], 2
    work.losses, work.metrics, work.log_z = [loss], [{"trust": metric}], [log_z]
    work.compute()
    assert {made.reader for made in (loss, metric, log_z)} == {"the caller's"}
