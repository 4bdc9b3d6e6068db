"""Complete runs of a small random pair on one GPU: with the engine in the trainer's process, with engines in processes
of their own that work ahead, and one that resumes."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from examples.benchmarks.gpu_check.rows import Row
from examples.benchmarks.isolated import followed
from nemo_tropd.rollout.secret import VARIABLE

ROOT = Path(__file__).resolve().parents[3]
# Nats, mean over a step's tokens. Of this student two attentions of Transformers in bf16 on a CPU differ by 0.044; one
# update at the run's learning rate, were its signs random, moves its log-probabilities by 0.27: an engine that kept old
# weights, or lost some asleep, is above the limit.
MISMATCH = 0.12
_LIMIT_S = 3600.0  # the check has a limit of its own
_RUN = {
    "trainer.tropd.val_check_interval": 0,
    "exp_manager.create_tensorboard_logger": False,
    "model.global_batch_size": 32,
    "model.encoder_seq_length": 512,
    "model.optim.lr": 1e-3,
    "model.rollout.samples_per_prompt": 1,
    "model.rollout.max_new_tokens": 192,
    "model.rollout.torch_compile": False,
    "model.data.path": ROOT / "examples" / "prompts" / "instructions.jsonl",
    "model.data.max_prompt_tokens": 256,
    "model.data.overlong": "drop",
}
_UNGUIDED = {"model.tropd.guidance.enabled": False, "model.data.held_out": 0}  # no engine of the teacher
_GUIDED = {"model.tropd.guidance.max_prefix_tokens": 16, "model.data.held_out": 8}
_REHEARSED = {
    "trainer.precision": "32",
    "trainer.gpu_memory_gib": None,
    "model.global_batch_size": 4,
    "model.tokens_per_micro_batch": 1024,
    "model.rollout.dtype": "float32",
    "model.rollout.max_new_tokens": 24,
    "model.rollout.kv_cache_gib": 0.25,
}


def loop(*, rehearsal: bool = False) -> Iterator[Row]:
    """Three steps through ``train``, each with rollouts after the engine slept and was given new weights; then the
    checkpoint, the export and the engine's end."""
    with tempfile.TemporaryDirectory() as folder:
        yield from _run(Path(folder), 3, rehearsal, _UNGUIDED)


def resume() -> Iterator[Row]:
    """The teacher's engine, prefixes, validation; then the same command again with one step more."""
    with tempfile.TemporaryDirectory() as folder:
        for steps in (1, 2):
            yield from _run(Path(folder), steps, False, _GUIDED)


def ahead(*, rehearsal: bool = False) -> Iterator[Row]:
    """Two steps with an engine in a process of its own, whose rollouts are scored as they come; the same run resumed
    with an engine host, one step ahead. Its learning rate is so small that only an engine without the present weights,
    which the first two steps have moved, differs from the trainer."""
    with tempfile.TemporaryDirectory() as folder:
        turns = _UNGUIDED | {"model.rollout.placement": "process", "model.optim.lr": 1e-3}
        yield from _run(Path(folder), 2, rehearsal, turns)
        with _engine_host(Path(folder) / "host.log") as address:
            own = {"model.rollout.placement": "dedicated", "model.rollout.dedicated.engines": 1}
            own |= {"model.rollout.dedicated.address": address, "model.rollout.steps_ahead": 1, "model.optim.lr": 1e-7}
            changed = "[model.rollout.steps_ahead,model.tropd.params.importance_cap,model.optim.lr]"
            yield from _run(Path(folder), 6, rehearsal, _UNGUIDED | own | {"trainer.tropd.accept_changes": changed})


@contextmanager
def _engine_host(log: Path) -> Iterator[str]:
    """An engine host on this GPU, for one run; the address at which it looks for the trainer. Its log is printed."""
    from tests.ports import free_port

    os.environ[VARIABLE] = secrets.token_hex(32)
    # NCCL refuses two ranks on one GPU of one host: to it these are two hosts.
    env = os.environ | {"NCCL_HOSTID": "engine-host"}
    address = f"127.0.0.1:{free_port()}"
    command = [sys.executable, "-m", "nemo_tropd.rollout.engine_host", "--join", address, "--index", "0"]
    with log.open("wb") as file:
        host = subprocess.Popen([*command, "--wait-s", "300"], cwd=ROOT, env=env, stdout=file, stderr=file)
        try:
            yield address
            code = host.wait(60)
            if code:
                raise RuntimeError(f"the engine host left with code {code}")
        finally:
            host.kill()
            host.wait()
            print(log.read_text(errors="replace"), flush=True)


def _run(folder: Path, steps: int, rehearsal: bool, keys: dict[str, Any]) -> Iterator[Row]:
    run, began = folder / "run", time.monotonic()
    arguments = (folder, steps, rehearsal, keys)
    for line in followed(train_once, *arguments, limit_s=_LIMIT_S, file=run / "metrics.jsonl"):
        yield line_row(line)
    summary = run / "summary.json"
    done = json.loads(summary.read_text())["steps"] if summary.is_file() else 0
    seconds = time.monotonic() - began
    yield Row(
        f"a run of {steps} step(s) to its end: checkpoint, export, report, engine closed",
        f"{done} step(s), {seconds:.0f} s with all imports and starts",
        f"{steps} step(s), exported",
        done == steps and any((run / "hf").glob("*.safetensors")),
    )


def line_row(line: dict[str, Any]) -> Row:
    """The row of one line of a run's metrics.jsonl."""
    if line["kind"] == "validation":
        values = [line[name] for name in ("forward_kl", "reverse_kl")]
        return Row(f"validation after step {line['step']}, forward and reverse KL", " and ".join(map(str, values)))
    mean, applied = line["mismatch_mean_abs"], bool(line["applied"])
    text = "not finite" if mean is None else f"{mean:.5f} nats, largest {line['mismatch_max_abs']:.3f}"
    seconds = {name.partition("/")[2]: value for name, value in line.items() if name.startswith("seconds/")}
    parts = ", ".join(f"{name} {value:.2f}" for name, value in seconds.items())
    return Row(
        f"step {line['step']}: log-probabilities of engine and trainer",
        f"mean |difference| {text}; seconds: {parts}; applied: {applied}",
        f"mean at most {MISMATCH}, applied",
        mean is not None and mean <= MISMATCH and applied,
    )


def train_once(folder: Path, steps: int, rehearsal: bool, keys: dict[str, Any], engines: Any = None) -> None:
    """Make the pair unless it is there, and train it in ``folder``/run up to ``steps`` in all."""
    from nemo_tropd.quiet import quiet_libraries

    quiet_libraries()
    import torch
    from hydra import compose, initialize_config_dir

    from nemo_tropd.config_checks import resolve
    from nemo_tropd.training.run import train
    from tests.tiny_models import make_tiny

    size = {"layers": 2, "vocab": 131, "hidden": 128} if rehearsal else {"layers": 6, "vocab": 32768, "hidden": 1024}
    dtype = torch.float32 if rehearsal else torch.bfloat16
    pair = {"pretrained_checkpoint.restore_from_path": folder / "student", "model.teacher.path": folder / "teacher"}
    for seed, path in enumerate(pair.values()):
        if not (path / "config.json").is_file():
            more = {"max_position_embeddings": 4096}
            heads = {"heads": size["hidden"] // (32 if rehearsal else 128), "kv_heads": 2}
            make_tiny(path, "qwen2", False, seed=seed, dtype=dtype, spread=1.5, changes=more, **size, **heads)
    overrides = _RUN | pair | (_REHEARSED if rehearsal else {}) | keys
    overrides |= {"trainer.tropd.max_steps": steps, "model.teacher.cache_dir": folder / "responses"}
    overrides |= {"exp_manager.explicit_log_dir": folder / "run", "model.tropd.top_k": 64}
    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        words = [f"{k}={'null' if v is None else v}" for k, v in overrides.items()]
        train(resolve(compose("smollm2_1gpu", overrides=words)), engines)
