"""FP8's padding under tensor, sequence and pipeline parallelism: removed, with the outputs of a pass that has none."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.dist.checks import Checks
from tests.dist.run_distributed import run_distributed
from tests.tiny_models import make_tiny

pytestmark = pytest.mark.random

VOCABULARY = 131
# (tensor, pipeline, sequence parallel)
LAYOUTS = [(2, 1, False), (2, 1, True), (1, 2, False)]


def _rollouts(seed: int) -> list[Any]:
    from nemo_tropd.batch import Rollout

    draw = random.Random(seed)
    made = []
    for i, length in enumerate((21, 6, 14)):
        ids = [draw.randrange(VOCABULARY) for _ in range(length)]
        made.append(Rollout(ids[:3], ids[3:], [], [], 0, i, i, True))
    return made


def _check(rank: int, world_size: int, path: str, seed: int) -> list[str]:
    from nemo_tropd.batch import TokenBatch
    from nemo_tropd.config_teacher import AdmissionConfig
    from nemo_tropd.parallel.topology import Topology
    from nemo_tropd.teacher.admission import admit
    from nemo_tropd.teacher.fp8 import Fp8Settings, pad_tokens
    from nemo_tropd.teacher.scorer import TeacherScorer

    checks = Checks()
    for tensor, pipeline, sequence in LAYOUTS:
        topology = Topology.start(tensor, pipeline, sequence)
        for layout in ("pack", "concatenate"):
            lay_out = getattr(TokenBatch, layout)
            batches = [
                lay_out(_rollouts(seed + i), pad_id=0, seed=1, step=0, pad_to_multiple=tensor if sequence else 1)
                for i in range(2)
            ]
            teacher = TeacherScorer(Path(path), topology, dtype=torch.float32, vocab_size=VOCABULARY)
            plain, scores = teacher.hidden(batches), teacher.score(batches, top_k=8, entropy=False, chunk_tokens=None)
            teacher.fp8 = Fp8Settings("tensorwise")  # pads from here on; its layers stay in fp32
            padded, again = teacher.hidden(batches), teacher.score(batches, top_k=8, entropy=False, chunk_tokens=None)
            case = f"tensor {tensor} pipeline {pipeline} sequence {sequence} {layout}"
            wide = pad_tokens(batches[0], 16, topology).input_ids
            local = wide.numel() // (tensor if sequence else 1)
            checks.true(case, local % 16 == 0 and wide.size(1) > batches[0].input_ids.size(1), tuple(wide.shape))
            for before, after, score, other in zip(plain, padded, scores, again, strict=True):
                if before is None or score is None:
                    checks.true(case, after is None and other is None)
                    continue
                assert after is not None and other is not None
                checks.true(case, after.shape == before.shape, (after.shape, before.shape))
                checks.close(f"{case} hidden", after, before, 1e-5)
                checks.close(f"{case} scores", other.log_probs, score.log_probs, 1e-5)
                checks.true(case, torch.equal(other.top_k_ids, score.top_k_ids), "top k")
        # A teacher that is measured against itself: nothing differs, and every token counts once, whatever the ranks.
        given = [TokenBatch.pack(_rollouts(seed), pad_id=0, seed=1, step=0, pad_to_multiple=tensor)]
        _, found = admit(
            lambda _, kept=teacher: kept,
            Fp8Settings("tensorwise"),
            given,
            lambda seen, reference, kept=teacher: kept.score_like(seen, reference, chunk_tokens=None),
            AdmissionConfig(top_k_kl=1e-5, gate_flips=0, ratio_error=1e-5),
            counts=topology.tensor_rank == 0 and topology.data_rank == 0,
        )
        checks.true(f"{case} admission", found.tokens == given[0].count_loss_tokens, found.line())
        topology.stop()
    return [*checks.failures, *([] if checks.count > 20 else [f"{checks.count} checks"])]


def test_padding_is_removed_whatever_the_layout(tmp_path: Path) -> None:
    path = make_tiny(tmp_path / "m", "qwen3", seed=4)
    seed = int(torch.randint(0, 2**31, ()))
    for rank, failures in enumerate(run_distributed(_check, 2, str(path), seed)):
        assert not failures, (rank, seed, failures)
