"""Megatron's logits against transformers', and the export against the source's bytes, for the layouts of a few
ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist

from tests.dist.run_distributed import run_distributed
from tests.tiny_models import FAMILIES, make_tiny

pytestmark = pytest.mark.random

TOLERANCE = 1e-4
LENGTHS = (14, 38)  # two micro-batches of different lengths, the second beyond Llama 3's original 32 positions


class Case(NamedTuple):
    family: str
    tied: bool
    tensor: int = 1
    pipeline: int = 1
    sequence: bool = False
    heads: int = 4
    kv_heads: int = 2
    biases: tuple[str, ...] = ()  # keys of config.json


class Outcome(NamedTuple):
    case: Case
    difference: float  # largest |logit - transformers' logit|
    spread: float  # standard deviation of transformers' logits
    exact: bool  # every exported tensor has the source's bytes


def _prompts(vocab: int, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocab, (2, length), generator=generator) for length in LENGTHS]


def _expected(folder: Path, seed: int) -> list[torch.Tensor]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return [model(ids).logits for ids in _prompts(model.config.vocab_size, seed)]


@torch.no_grad()
def schedule_logits(model: Any, topology: Any, shape: Any, prompts: list[torch.Tensor]) -> list[torch.Tensor]:
    """Full logits of each micro-batch, on the last stage, through Megatron's own schedule."""
    from megatron.core.pipeline_parallel.schedules import get_forward_backward_func

    from nemo_tropd.gpt.build import head_weight

    def gather(parts: torch.Tensor, dimension: int) -> torch.Tensor:
        pieces = [torch.empty_like(parts) for _ in range(topology.tensor_size)]
        dist.all_gather(pieces, parts.contiguous(), group=topology.tensor_group)
        return torch.cat(pieces, dimension)

    def collect(hidden: torch.Tensor, non_loss_data: bool = True) -> torch.Tensor:
        if topology.sequence_parallel:
            hidden = gather(hidden, 1)
        return gather(hidden @ head_weight(model).T, -1)[..., : shape.vocab_size]

    def step(batches: Any, chunk: Any) -> Any:
        ids = next(batches)
        return chunk(ids, torch.arange(ids.size(1)).expand_as(ids), None), collect

    return get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iter(prompts),
        model=[model],
        num_microbatches=len(prompts),
        seq_length=max(ids.size(1) for ids in prompts),
        micro_batch_size=prompts[0].size(0),
        forward_only=True,
        collect_non_loss_data=True,
    )


def _check_cases(rank: int, world_size: int, root: str, cases: list[Case], seed: int) -> list[Outcome]:
    from megatron.core import parallel_state

    from nemo_tropd.convert.families import read_shape
    from nemo_tropd.convert.hf_export import hf_stream
    from nemo_tropd.convert.hf_files import HfCheckpoint
    from nemo_tropd.convert.hf_import import load_hf
    from nemo_tropd.gpt.build import build_gpt
    from nemo_tropd.parallel.topology import Topology

    outcomes = []
    for case in cases:
        topology = Topology.start(case.tensor, case.pipeline, case.sequence)
        folder = _folder(root, case)
        shape = read_shape(folder)
        model = build_gpt(shape, topology, trainable=False)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(float("nan"))
        load_hf(model, folder, shape, topology)
        logits = schedule_logits(model, topology, shape, _prompts(shape.vocab_size, seed))
        source = HfCheckpoint(folder, shape)
        exported = dict(hf_stream(model, shape, topology))
        assert bool(exported) == topology.is_leader
        exact = [*exported] == [name for name, _ in shape.hf_tensors()] if exported else True
        exact = exact and all(torch.equal(t, source.read(n)) and t.is_contiguous() for n, t in exported.items())
        difference = spread = 0.0
        if topology.is_last_stage:
            expected = _expected(folder, seed)
            difference = max((a - b).abs().max().item() for a, b in zip(logits, expected, strict=True))
            spread = expected[0].std().item()
        outcomes.append(Outcome(case, difference, spread, exact))
        topology.barrier()
        parallel_state.destroy_model_parallel()
    return outcomes


def _folder(root: str, case: Case) -> Path:
    return Path(root) / "-".join(map(str, (case.family, case.tied, case.heads, case.kv_heads, *case.biases)))


def _run(tmp_path: Path, world_size: int, cases: list[Case]) -> None:
    seed = int(torch.randint(0, 2**31, ()))
    for case in cases:
        if not _folder(str(tmp_path), case).exists():
            make_tiny(
                _folder(str(tmp_path), case), case.family, case.tied, heads=case.heads, kv_heads=case.kv_heads,
                hidden=16 * case.heads, seed=seed, changes=dict.fromkeys(case.biases, True),
            )  # fmt: skip
    for rank, outcomes in enumerate(run_distributed(_check_cases, world_size, str(tmp_path), cases, seed)):
        for outcome in outcomes:
            assert outcome.difference < TOLERANCE, (rank, seed, outcome)
            assert outcome.exact, (rank, seed, outcome)
    assert any(outcome.spread > 0.5 for outcome in outcomes)  # logits worth comparing


def _everyone(**layout: Any) -> list[Case]:
    return [Case(family, tied, **layout) for family in FAMILIES for tied in (True, False)]


@pytest.mark.parametrize(
    ("world_size", "cases"),
    [
        pytest.param(1, _everyone(), id="one-process"),
        pytest.param(
            2,
            [
                *_everyone(tensor=2),
                *_everyone(tensor=2, sequence=True),
                *_everyone(pipeline=2),
                Case("qwen3", True),  # data parallel 2
                Case("llama", False, tensor=2, sequence=True, biases=("attention_bias", "mlp_bias")),
                Case("llama", True, pipeline=2, biases=("attention_bias",)),
            ],
            id="two-processes",
        ),
        pytest.param(3, [Case("llama", True, tensor=3, heads=9, kv_heads=3)], id="tensor-parallel-3"),
        pytest.param(
            4,
            [
                Case("qwen3", True, tensor=2, pipeline=2, sequence=True),
                Case("qwen2", False, tensor=2, pipeline=2),
                Case("llama3", True, pipeline=2),  # times data parallel 2
                Case("qwen2", True, tensor=4, heads=8, kv_heads=4),
            ],
            id="four-processes",
        ),
    ],
)
def test_logits_and_bytes(tmp_path: Path, world_size: int, cases: list[Case]):
    _run(tmp_path, world_size, cases)
