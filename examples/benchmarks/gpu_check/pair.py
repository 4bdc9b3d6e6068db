"""The SmolLM2 pair through the real trainer on one GPU: OPD against TrOPD, three seeds each, before and after.

Needs the two models (examples/make_smollm2.py) in the folder that NEMO_TROPD_CACHE names. The runs share the GPU, each
in a process of its own, so their seconds say nothing; ``gpu_check/loop.py`` times the step.
"""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from examples.benchmarks.gpu_check.rows import Row
from examples.benchmarks.isolated import IsolatedError, isolated

ROOT = Path(__file__).resolve().parents[3]
OBJECTIVES, SEEDS, STEPS = ("opd", "tropd"), (1, 2, 3), 24
VOCABULARY = 49152  # SmolLM2's tokenizer
_LIMIT_S = 170.0
_OVERRIDES = {
    "trainer.tropd.val_check_interval": 8,
    "trainer.tropd.save_interval": 1000,
    "exp_manager.create_tensorboard_logger": False,
    "model.global_batch_size": 32,
    "model.encoder_seq_length": 320,
    "model.tropd.guidance.enabled": False,
    "model.rollout.max_new_tokens": 96,
    "model.rollout.samples_per_prompt": 1,
    "model.rollout.max_num_seqs": 32,
    "model.rollout.gpu_memory_utilization": 0.08,
    "model.rollout.sleep": False,  # vLLM asserts that the device's free memory grows, and others allocate meanwhile
    "model.rollout.torch_compile": False,
    "model.data.held_out": 32,
    "model.data.path": ROOT / "examples" / "prompts" / "instructions.jsonl",
    "trainer.tropd.max_steps": STEPS,
}


def check() -> Iterator[Row]:
    """The points of this subject."""
    folder = os.environ.get("NEMO_TROPD_CACHE")
    if not folder or not (Path(folder) / "smollm2-student-24l").is_dir():
        yield Row("SmolLM2 pair", "not run: NEMO_TROPD_CACHE names no folder with the two models")
        return
    runs = [(objective, seed) for objective in OBJECTIVES for seed in SEEDS]
    found: dict[tuple[str, int], Any] = {}

    with tempfile.TemporaryDirectory() as out:

        def one(objective: str, seed: int) -> None:
            try:
                found[objective, seed] = isolated(
                    train_one, objective, seed, f"{out}/{objective}-{seed}", limit_s=_LIMIT_S
                )
            except IsolatedError as error:
                found[objective, seed] = str(error)

        threads = [threading.Thread(target=one, args=run) for run in runs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    yield from _rows(found)


def train_one(objective: str, seed: int, out: str) -> dict[str, Any]:
    """One run of the recipe through ``train``, as the example does; metrics before and after."""
    from nemo_tropd.quiet import quiet_libraries

    quiet_libraries()
    import json

    from hydra import compose, initialize_config_dir

    from nemo_tropd.config_checks import resolve
    from nemo_tropd.rollout.placement import Engines
    from nemo_tropd.training.run import train

    overrides = _OVERRIDES | {
        "exp_manager.explicit_log_dir": f"{out}/run",
        "model.teacher.cache_dir": f"{out}/responses",
        "model.tropd.objective": objective,
        "model.seed": seed,
    }
    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        composed = compose("smollm2_1gpu", overrides=[f"{k}={v}" for k, v in overrides.items()])
    outcome = train(resolve(composed), Engines(VOCABULARY, kv_cache_gib=2.0))
    assert outcome is not None and outcome.before is not None and outcome.after is not None
    lines = [json.loads(line) for line in Path(f"{out}/run/metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "train"]
    return {
        "before": outcome.before.metrics,
        "after": outcome.after.metrics,
        "curve": [(line["step"], line["forward_kl"]) for line in lines if line["kind"] == "validation"],
        "mismatch": max(line["mismatch_mean_abs"] for line in steps),
        "grad_norm": sorted(line["grad_norm"] for line in steps)[len(steps) // 2],
        "finite": all(line["loss"] is not None and line["applied"] for line in steps),
    }


def _rows(found: dict[tuple[str, int], Any]) -> Iterator[Row]:
    for objective in OBJECTIVES:
        runs = [found[objective, seed] for seed in SEEDS]
        failed = [r for r in runs if isinstance(r, str)]
        if failed:
            yield Row(f"{objective}, {len(SEEDS)} seeds", f"{len(failed)} failed: {failed[0]}"[:300], "all end", False)
        good = [r for r in runs if not isinstance(r, str)]
        if not good:
            continue
        for name in ("forward_kl", "reverse_kl", "one_minus_tv"):
            if name not in good[0]["after"]:
                continue
            before, after = ([r[when][name] for r in good] for when in ("before", "after"))
            held = all(a < b for a, b in zip(after, before, strict=True)) if name == "forward_kl" else None
            wanted = "lower with every seed" if held is not None else ""
            yield Row(
                f"{objective}, held out {name}, {STEPS} steps", f"{_span(before)} to {_span(after)}", wanted, held
            )
        curve = "; ".join(" ".join(f"{kl:.3f}" for _, kl in r["curve"]) for r in good)
        yield Row(f"{objective}, forward KL every {_OVERRIDES['trainer.tropd.val_check_interval']} steps", curve)
        worst = max(r["mismatch"] for r in good)
        norms = _span([r["grad_norm"] for r in good])
        yield Row(
            f"{objective}, engine against trainer",
            f"{worst:.4f} nats, worst step's mean; median gradient norm {norms}",
            "under 0.05, every loss finite",
            worst < 0.05 and all(r["finite"] for r in good),
        )


def _span(values: Sequence[float]) -> str:
    mean = sum(values) / len(values)
    return f"{mean:.3f} ({min(values):.3f} to {max(values):.3f})"
