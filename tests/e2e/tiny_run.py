"""A run of a tiny random model through the real command, engine included."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.tiny_models import make_tiny

ROOT = Path(__file__).resolve().parents[2]
QUESTIONS = ["what is {a} plus {b}?", "add {a} and {b}", "{b} and {a} together?", "count from {a} to {b}"]


@dataclass(frozen=True)
class TinyRun:
    """Paths of a student, a teacher and prompts; ``command`` is what a user would type."""

    root: Path
    student: Path
    teacher: Path
    prompts: Path

    @classmethod
    def make(cls, root: Path, *, tied: bool = True, family: str = "qwen3") -> TinyRun:
        """Write models and prompts under ``root``."""
        # vLLM's CPU attention wants heads of at least 32, and Qwen2's are the hidden size over the heads.
        hidden = 128 if family == "qwen2" else 64
        make_tiny(root / "student", family=family, tied=tied, layers=2, seed=1, hidden=hidden, head_dim=32)
        make_tiny(root / "teacher", family=family, tied=tied, layers=2, seed=2, hidden=hidden, head_dim=32)
        lines = [
            json.dumps({"prompt": question.format(a=a, b=a + 2), "answer": str(2 * a + 2)})
            for a in range(1, 9)
            for question in QUESTIONS
        ]
        run = cls.at(root)
        run.prompts.write_text("\n".join(lines) + "\n")
        return run

    @classmethod
    def at(cls, root: Path) -> TinyRun:
        """The files that ``make`` wrote under ``root``."""
        return cls(root, root / "student", root / "teacher", root / "prompts.jsonl")

    def overrides(
        self, run_dir: Path, *, tensor: int = 1, data: int = 1, pipeline: int = 1, **keys: object
    ) -> list[str]:
        """Command-line overrides of a run in fp32 with 3 steps of 4 rollouts."""
        settings: dict[str, object] = {
            "trainer.devices": tensor * data * pipeline,
            "trainer.precision": "32",
            "trainer.distributed_timeout_s": 200,
            "trainer.tropd.max_steps": 3,
            "trainer.tropd.val_check_interval": 0,
            "trainer.tropd.save_interval": 1,
            "exp_manager.explicit_log_dir": run_dir,
            "pretrained_checkpoint.restore_from_path": self.student,
            "model.tensor_model_parallel_size": tensor,
            "model.pipeline_model_parallel_size": pipeline,
            "model.micro_batch_size": 2,
            "model.global_batch_size": 4,
            "model.encoder_seq_length": 96,
            "model.optim.lr": "1e-3",
            "model.tropd.top_k": 8,
            "model.tropd.guidance.max_prefix_tokens": 6,
            "model.teacher.path": self.teacher,
            "model.teacher.cache_dir": self.root / "responses",
            "model.rollout.dtype": "float32",
            "model.rollout.max_new_tokens": 12,
            "model.rollout.samples_per_prompt": 1,
            "model.rollout.max_num_seqs": 8,
            "model.rollout.kv_cache_gib": 0.125,
            "model.rollout.request_timeout_s": 120,
            "model.data.path": self.prompts,
            "model.data.max_prompt_tokens": 80,
            "model.data.held_out": 4,
            **keys,
        }
        return [f"{key}={value}" for key, value in settings.items()]

    def command(self, overrides: list[str], ranks: int = 1) -> list[str]:
        """torchrun and the example, as the README gives them."""
        return [
            sys.executable,
            "-m",
            "torch.distributed.run",
            f"--nproc_per_node={ranks}",
            "--master_port=0",
            "--rdzv-backend=c10d",
            "--rdzv-endpoint=localhost:0",
            str(ROOT / "examples" / "train_tropd.py"),
            *overrides,
        ]

    def run(
        self, overrides: list[str], ranks: int = 1, timeout_s: float = 240, **env: str
    ) -> subprocess.CompletedProcess[str]:
        """Run to the end; output is captured."""
        return subprocess.run(
            self.command(overrides, ranks),
            cwd=ROOT,
            env=environment(**env),
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )


def environment(**more: str) -> dict[str, str]:
    """The environment of a child: byte code kept, one thread a rank."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    return {**env, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **more}


def train_lines(run_dir: Path) -> list[dict[str, float]]:
    """The train lines of metrics.jsonl."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "train"]


def without_clock(line: dict[str, float]) -> dict[str, float]:
    """What of a train line the same run gives again: all but what a clock was read for."""
    return {k: v for k, v in line.items() if "second" not in k and not k.startswith("idle/")}
