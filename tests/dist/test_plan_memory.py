"""The planned memory of a rank against the peak that a short run of real models reaches on CPU."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from nemo_tropd.parallel.cpu import fast_bf16
from tests.dist.run_distributed import run_distributed
from tests.doubles import GivenEngines, ReplayEngine

RESPONSE = 40


class LongestEngine(ReplayEngine):
    """Writes responses of the greatest length, as the plan assumes."""

    def generate(self, requests: Any, finished: Any = None) -> Any:
        from nemo_tropd.batch import Rollout

        made = []
        for r in requests:
            ids = [(r.seed + i) % self.vocab_size for i in range(r.max_new_tokens)]
            log_probs = [-1.0] * len(ids)
            made.append(
                Rollout(r.prompt_ids, r.prefix_ids, ids, log_probs, self.version, r.sequence_id, r.prompt_index, True)
            )
        return made


def peak_of_a_run(rank: int, world_size: int, overrides: list[str]) -> tuple[float, float, dict[str, Any]]:
    """(planned, measured) bytes of this rank, and the plan's parts."""
    from nemo_tropd.quiet import quiet_libraries

    quiet_libraries()
    from nemo_tropd.training.plan import make_plan
    from nemo_tropd.training.run import train
    from tests.e2e.compose import compose_config

    os.environ["WORLD_SIZE"] = str(world_size)
    cfg = compose_config(overrides, "smollm2_cpu")
    memory = make_plan(cfg).memory
    outcome = train(cfg, GivenEngines(lambda: LongestEngine(49000)))
    assert outcome is not None
    status = Path("/proc/self/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert found is not None
    return memory.rank, float(found[1]) * 1024, {**memory.resident, **memory.phases[memory.peak_phase]}


def measure(root: Path, *overrides: str, world_size: int = 3) -> list[tuple[float, float, dict[str, Any]]]:
    """Two steps of conf/smollm2_cpu.yaml on prompts that are nearly as long as it allows."""
    prompts = root / "prompts.jsonl"
    lines = (json.dumps({"prompt": f"{i} " + "one two three four five six " * 15}) for i in range(60))
    prompts.write_text("\n".join(lines) + "\n")
    keys = {
        "trainer.devices": world_size,
        "model.tensor_model_parallel_size": world_size,
        "trainer.tropd.max_steps": 2,
        "trainer.tropd.val_check_interval": 0,
        "exp_manager.explicit_log_dir": root / "run",
        "exp_manager.create_tensorboard_logger": False,
        "model.teacher.cache_dir": root / "responses",
        "model.data.path": prompts,
        "model.data.sources": "[]",
        "model.validation.benchmarks": "[]",
        "model.data.held_out": 4,
        "model.data.overlong": "drop",
        "model.rollout.max_new_tokens": RESPONSE,
        "model.encoder_seq_length": 128 + RESPONSE,
    }
    if not fast_bf16():
        keys["trainer.precision"] = 32  # bf16 would take an hour
    given = [*(f"{k}={v}" for k, v in keys.items()), *overrides]
    return run_distributed(peak_of_a_run, world_size, given, timeout_s=280)


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
@pytest.mark.timeout(300)
def test_the_plan_of_smollm2_is_within_15_percent_of_the_measured_peak(tmp_path: Path) -> None:
    from examples.make_smollm2 import build_smollm2, build_student

    build_smollm2()
    build_student()
    for planned, measured, parts in measure(tmp_path):
        assert planned == pytest.approx(measured, rel=0.15), {k: f"{v / 2**20:.0f} MiB" for k, v in parts.items()}


if __name__ == "__main__":  # python -m tests.dist.test_plan_memory DIR [key=value ...]
    where, *more = sys.argv[1:]
    Path(where).mkdir(parents=True)
    ranks = next((int(k.split("=")[1]) for k in more if k.startswith("trainer.devices=")), 3)
    for planned, measured, parts in measure(Path(where), *more, world_size=ranks):
        line = ", ".join(f"{k} {v / 2**20:.0f}" for k, v in parts.items())
        print(
            f"planned {planned / 2**20:.0f} MiB, measured {measured / 2**20:.0f}, {planned / measured - 1:+.0%}: {line}"
        )
