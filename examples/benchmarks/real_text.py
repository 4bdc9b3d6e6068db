"""Variants on real text: the demo's student and teacher, the same rollouts a step, several seeds.

    python examples/benchmarks/real_text.py [--compare ahead] [--only opd tropd] [--seeds 3] [--jobs 2] [key=value ...]

It compares objectives, or with ``--compare ahead`` rollouts of the present weights with older weights' rollouts.
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
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this file is run, its siblings are imported

from examples import demo
from examples.benchmarks.tables import markdown
from nemo_tropd.files import complete_file, write_text
from nemo_tropd.report.charts import COLORS
from nemo_tropd.report.drawing import style
from nemo_tropd.report.records import RunRecord, read_run

ROOT = Path(__file__).resolve().parents[2]
_ALONE = "model.tropd.guidance.enabled=false"
# metric, heading
VALIDATION = (
    ("forward_kl", "forward KL"),
    ("reverse_kl", "reverse KL"),
    ("top1_agreement", "top-1 agreement"),
    ("benchmark/capitals", "capitals"),
)
TRAINING = (("mismatch_mean_abs", "mean mismatch, nats"), ("effective_fraction", "effective fraction"))


@dataclass(frozen=True)
class Comparison:
    """Runs that differ in one thing each."""

    figure: str  # the name of its table and picture
    variants: Mapping[str, tuple[str, ...]]
    keys: tuple[str, ...]  # of every run
    training: tuple[tuple[str, str], ...] = ()  # of the table: means over the steps


COMPARISONS = {
    # Each adds to the one before: the gate, forward KL on what is outside of it, the teacher's prefixes.
    # Shorter than the demo, and validated half way.
    "objectives": Comparison(
        "real_text",
        {
            "opd": ("model.tropd.objective=opd", _ALONE),
            "gate alone": ("model.tropd.objective=mask_outlier", _ALONE),
            "gate, outliers": ("model.tropd.objective=tropd", _ALONE),
            "tropd": ("model.tropd.objective=tropd",),
            "tropd exact": ("model.tropd.objective=tropd_exact",),
            "opd exact": ("model.tropd.objective=opd_exact", _ALONE),
            "fkl": ("model.tropd.objective=fkl", _ALONE),
        },
        ("trainer.tropd.max_steps=16", "trainer.tropd.val_check_interval=8", "trainer.tropd.save_interval=16",
         "model.validation.score_teacher=false"),
    ),
    # The demo's own steps.
    "ahead": Comparison(
        "real_text_ahead",
        {
            "present weights": (),
            "one step behind": ("model.rollout.steps_ahead=1",),
            "two steps behind": ("model.rollout.steps_ahead=2",),
        },
        ("trainer.tropd.save_interval=24", "model.validation.score_teacher=false"),
        TRAINING,
    ),
}  # fmt: skip


def directory(out: Path, variant: str, seed: int) -> Path:
    """Of one run."""
    return out / f"{variant.replace(', ', '-').replace(' ', '-')}-{seed}"


def finished(out: Path, variants: Iterable[str], seeds: Sequence[int]) -> dict[str, list[RunRecord]]:
    """The finished runs of each variant that has any, with validations that all have."""
    found = {
        variant: [read_run(d) for seed in seeds if ((d := directory(out, variant, seed)) / "summary.json").is_file()]
        for variant in variants
    }
    return {variant: runs for variant, runs in found.items() if runs}


def table(runs: Mapping[str, Sequence[RunRecord]], training: Sequence[tuple[str, str]] = ()) -> str:
    """Markdown: before, and after for each variant, means with half the distance between the lowest and the highest;
    of ``training`` each run's mean over its steps."""
    header = ["", "seeds", *(heading for _, heading in (*VALIDATION, *training))]
    every = [run for of in runs.values() for run in of]
    before = [_mean([run.before[name] for run in every]) for name, _ in VALIDATION]
    rows = [["before", str(len(every)), *before, *("" for _ in training)]]
    for variant, of in runs.items():
        after = [_mean([run.after[name] for run in of]) for name, _ in VALIDATION]
        means = [_mean([float(np.mean([v for _, v in run.series("train", name)] or np.nan)) for run in of])
                 for name, _ in training]  # fmt: skip
        rows.append([variant, str(len(of)), *after, *means])
    return markdown(header, rows)


def _mean(values: Sequence[float]) -> str:
    if np.isnan(values).any():
        return ""
    spread = f" ± {(max(values) - min(values)) / 2:.3f}" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{spread}"


def draw(runs: Mapping[str, Sequence[RunRecord]], path: Path) -> None:
    """Each metric over steps: means over seeds, bands from the lowest to the highest."""
    with style(10):
        figure = Figure(figsize=(13, 3.4), dpi=130, facecolor="white", layout="constrained")
        for (name, heading), axis in zip(VALIDATION, figure.subplots(1, len(VALIDATION)), strict=True):
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
    parser.add_argument("--compare", choices=COMPARISONS, default="objectives", help="what differs between runs")
    parser.add_argument("--only", nargs="+", help="variants to run")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each variant")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, which share the processors")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "real_text", help="folder of the runs")
    parser.add_argument(
        "--figures", type=Path, default=ROOT / "examples" / "figures", help="folder of table and picture"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="keys of every run")
    options = parser.parse_intermixed_args()
    what = COMPARISONS[options.compare]
    if unknown := set(options.only or ()) - what.variants.keys():
        parser.error(f"variants are {', '.join(what.variants)}, not {', '.join(sorted(unknown))}")
    out, figures, seeds = options.out.absolute(), options.figures.absolute(), range(1, options.seeds + 1)
    figures.mkdir(parents=True, exist_ok=True)
    # Seeds first: what is finished when time runs out is the same number of runs of each variant.
    wanted = [(variant, seed) for seed in seeds for variant in options.only or what.variants]
    with ThreadPoolExecutor(options.jobs) as pool:
        runs = {pool.submit(train, what, out, each, options.overrides, options.jobs): each for each in wanted}
        for run in as_completed(runs):
            if not run.result():
                pool.shutdown(cancel_futures=True)
                sys.exit(f"{' '.join(map(str, runs[run]))} did not end; the same command resumes")
            done = finished(out, what.variants, seeds)
            write_text(figures / f"{what.figure}.md", table(done, what.training))
            draw(done, figures / f"{what.figure}.png")
            print(table(done, what.training), json.dumps({name: len(of) for name, of in done.items()}), sep="\n")


def train(what: Comparison, out: Path, run: tuple[str, int], overrides: Sequence[str], jobs: int) -> bool:
    """Whether the run is finished, now or already."""
    variant, seed = run
    run_dir = directory(out, variant, seed)
    if not (run_dir / "summary.json").is_file():
        keys = (*what.keys, *what.variants[variant], f"model.seed={seed}", f"exp_manager.explicit_log_dir={run_dir}")
        env = {"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // jobs)), **os.environ}
        run_dir.mkdir(parents=True, exist_ok=True)
        with (run_dir / "output.log").open("a") as log:
            said = {"stdout": log, "stderr": log} if jobs > 1 else {}
            subprocess.run([sys.executable, demo.__file__, *keys, *overrides], env=env, check=False, **said)  # type: ignore[call-overload]
    return (run_dir / "summary.json").is_file()


if __name__ == "__main__":
    main()
