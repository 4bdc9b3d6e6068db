"""The main job on a laptop: SmolLM2-135M teaches a copy of itself without 4 of its 30 layers, on two CPU cores.

``make demo`` runs this. It builds both checkpoints once, then does the same as

    torchrun examples/train_tropd.py --config-name smollm2_cpu

Arguments are passed on: ``make demo ARGS="trainer.tropd.max_steps=10"``. Rerun the same command to resume a stopped
run.
"""

import os
import sys
from pathlib import Path

from nemo_tropd.launch.supervise import Supervisor
from nemo_tropd.parallel.cpu import fast_bf16

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this file is run, its sibling is imported

from examples.make_smollm2 import build_smollm2, build_student

HERE = Path(__file__).resolve().parent
MOST_THREADS = 4  # a model this small gains little from more
FP32 = ("trainer.precision=32", "model.rollout.dtype=float32")


def main(overrides: list[str]) -> int:
    """Build the checkpoints, then train; returns torchrun's exit code."""
    print(f"teacher  {build_smollm2()}\nstudent  {build_student()}", flush=True)
    if not fast_bf16() and not any(o.startswith("trainer.precision=") for o in overrides):
        print("This CPU has no AVX-512, which bf16 needs to be fast: the demo computes in fp32 instead.", flush=True)
        overrides = [*FP32, *overrides]
    command = [sys.executable, "-m", "nemo_tropd.launch.agent", "--nproc_per_node=1", str(HERE / "train_tropd.py")]
    os.chdir(HERE.parent)
    env = {"OMP_NUM_THREADS": str(min(MOST_THREADS, len(os.sched_getaffinity(0)))), **os.environ}
    overrides = [f"model.rollout.omp_threads={env['OMP_NUM_THREADS']}", *overrides]
    command += ["--config-name", "smollm2_cpu", *overrides]
    return Supervisor(command, env, restarts=0, patience_s=600, stop_timeout_s=150).run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
