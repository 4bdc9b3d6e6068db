"""Objectives on real text: the demo's student and teacher, the same rollouts a step, several seeds.

    python examples/benchmarks/real_text.py [--only opd tropd] [--seeds 3] [--jobs 2] [--out DIR] [key=value ...]

Each run is a directory of its own and resumes where it was stopped; a finished one is not run again. After each run the
table and the picture of all that are finished are written anew. With ``--jobs`` runs share the machine, and each
writes what it says to output.log in its directory.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this file is run, its siblings are imported

from examples import demo
from nemo_tropd.files import complete_file, write_text
from nemo_tropd.report.charts import COLORS
from nemo_tropd.report.drawing import style
from nemo_tropd.report.records import RunRecord, read_run

ROOT = Path(__file__).resolve().parents[2]
_ALONE = "model.tropd.guidance.enabled=false"
# What each adds to the one before: the gate, forward KL on what is outside of it, the teacher's prefixes.
VARIANTS = {
    "opd": ("model.tropd.objective=opd", _ALONE),
    "gate alone": ("model.tropd.objective=mask_outlier", _ALONE),
    "gate, outliers": ("model.tropd.objective=tropd", _ALONE),
    "tropd": ("model.tropd.objective=tropd",),
    "tropd exact": ("model.tropd.objective=tropd_exact",),
    "opd exact": ("model.tropd.objective=opd_exact", _ALONE),
    "fkl": ("model.tropd.objective=fkl", _ALONE),
}
# Shorter than the demo, and validated half way.
RUN = ("trainer.tropd.max_steps=16", "trainer.tropd.val_check_interval=8", "trainer.tropd.save_interval=16",
       "model.validation.score_teacher=false")  # fmt: skip
# metric, heading, whether more is better
METRICS = (
    ("forward_kl", "forward KL", False),
    ("reverse_kl", "reverse KL", False),
    ("top1_agreement", "top-1 agreement", True),
    ("benchmark/capitals", "capitals", True),
)


def directory(out: Path, variant: str, seed: int) -> Path:
    """Of one run."""
    return out / f"{variant.replace(', ', '-').replace(' ', '-')}-{seed}"


def finished(out: Path, seeds: Sequence[int]) -> dict[str, list[RunRecord]]:
    """The finished runs of each variant that has any, with validations that all have."""
    found = {
        variant: [read_run(d) for seed in seeds if ((d := directory(out, variant, seed)) / "summary.json").is_file()]
        for variant in VARIANTS
    }
    return {variant: runs for variant, runs in found.items() if runs}


def table(runs: Mapping[str, Sequence[RunRecord]]) -> str:
    """Markdown: before, and after for each variant, means with half the distance between the lowest and the highest."""
    rows = [["", "seeds", *(heading for _, heading, _ in METRICS)]]
    every = [run for of in runs.values() for run in of]
    rows.append(["before", str(len(every)), *(_mean([run.before[name] for run in every]) for name, _, _ in METRICS)])
    for variant, of in runs.items():
        rows.append([variant, str(len(of)), *(_mean([run.after[name] for run in of]) for name, _, _ in METRICS)])
    rows.insert(1, ["---"] * len(rows[0]))
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _mean(values: Sequence[float]) -> str:
    spread = f" ± {(max(values) - min(values)) / 2:.3f}" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{spread}"


def draw(runs: Mapping[str, Sequence[RunRecord]], path: Path) -> None:
    """Each metric over steps: means over seeds, bands from the lowest to the highest."""
    with style(10):
        figure = Figure(figsize=(13, 3.4), dpi=130, facecolor="white", layout="constrained")
        for (name, heading, _), axis in zip(METRICS, figure.subplots(1, len(METRICS)), strict=True):
            for i, (variant, of) in enumerate(runs.items()):
                curves = [dict(run.series("validation", name)) for run in of]
                steps = sorted(set.intersection(*(set(curve) for curve in curves)))
                values, color = np.array([[curve[s] for s in steps] for curve in curves]), COLORS[f"c{i}"]
                axis.fill_between(steps, values.min(0), values.max(0), color=color, alpha=0.15, linewidth=0)
                axis.plot(steps, values.mean(0), color=color, marker="o", markersize=4, label=variant)
            axis.set_title(heading)
            axis.set_xlabel("step", loc="right")
        figure.legend(*axis.get_legend_handles_labels(), loc="outside right upper", fontsize=9)
        with complete_file(path) as temporary:
            figure.savefig(temporary, format="png", metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="variants to run")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each variant")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, which share the processors")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "real_text", help="folder of the runs")
    parser.add_argument("--figures", type=Path, default=ROOT / "examples" / "figures", help="folder of real_text.*")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="keys of every run")
    options = parser.parse_intermixed_args()
    out, figures, seeds = options.out.absolute(), options.figures.absolute(), range(1, options.seeds + 1)
    figures.mkdir(parents=True, exist_ok=True)
    # Seeds first: what is finished when time runs out is the same number of runs of each variant.
    wanted = [(variant, seed) for seed in seeds for variant in options.only]
    with ThreadPoolExecutor(options.jobs) as pool:
        runs = {pool.submit(train, out, *each, options.overrides, options.jobs): each for each in wanted}
        for run in as_completed(runs):
            if not run.result():
                pool.shutdown(cancel_futures=True)
                sys.exit(f"{' '.join(map(str, runs[run]))} did not end; the same command resumes")
            done = finished(out, seeds)
            write_text(figures / "real_text.md", table(done))
            draw(done, figures / "real_text.png")
            print(table(done), json.dumps({name: len(of) for name, of in done.items()}), sep="\n", flush=True)


def train(out: Path, variant: str, seed: int, overrides: Sequence[str], jobs: int) -> bool:
    """Whether the run is finished, now or already."""
    run_dir = directory(out, variant, seed)
    if not (run_dir / "summary.json").is_file():
        keys = (*RUN, *VARIANTS[variant], f"model.seed={seed}", f"exp_manager.explicit_log_dir={run_dir}", *overrides)
        env = {"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // jobs)), **os.environ}
        run_dir.mkdir(parents=True, exist_ok=True)
        with (run_dir / "output.log").open("a") as log:
            said = {"stdout": log, "stderr": log} if jobs > 1 else {}
            subprocess.run([sys.executable, demo.__file__, *keys], env=env, check=False, **said)  # type: ignore[call-overload]
    return (run_dir / "summary.json").is_file()


if __name__ == "__main__":
    main()
