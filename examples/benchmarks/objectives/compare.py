"""Train the same student with every objective on a small task and draw what happens.

    python examples/benchmarks/objectives/compare.py                      # all objectives, three seeds, 200 steps
    python examples/benchmarks/objectives/compare.py --objectives opd tropd --seeds 1 --steps 100 --out /tmp/compare

The task: twelve digits in, their running sums modulo 10 out; the student starts from a mostly wrong rule. Writes a
figure (PNG), a table (Markdown) and every curve (JSON) to --out. Runs found there are not repeated.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, median, pstdev

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from nemo_tropd.files import write_text

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # this file is run, its siblings are imported

from examples.benchmarks.objectives.figure import draw
from examples.benchmarks.objectives.running_sums import OBJECTIVE_NAMES, Curve, Models, distill, prepare
from examples.benchmarks.tables import show

EXAMPLES = Path(__file__).resolve().parents[2]
HEADER = ("objective", "accuracy", "half way", "gradient norm", "trust, first", "trust, last", "reverse KL")


def compare(names: Sequence[str], seeds: int, steps: int, out: Path, processes: int | None = None) -> list[Curve]:
    """Run what is missing in ``out``/compare_objectives.json; write the JSON, a Markdown table and a PNG there.

    Runs already in the file are kept if they have ``steps`` steps, so that an interrupted comparison resumes where it
    stopped. Raises ValueError for an unknown name, before anything is trained.
    """
    unknown = [name for name in names if name not in OBJECTIVE_NAMES]
    if unknown:
        raise ValueError(f"unknown objective {', '.join(unknown)}; known: {', '.join(OBJECTIVE_NAMES)}")
    if seeds < 1 or steps < 2:
        raise ValueError(f"seeds is {seeds} and steps is {steps}; set seeds to at least 1 and steps to at least 2")
    out.mkdir(parents=True, exist_ok=True)
    store = out / "compare_objectives.json"
    done = {(c.objective, c.seed): c for c in _load(store) if len(c.reverse_kl) == steps}
    missing = [(name, seed) for name in names for seed in range(seeds) if (name, seed) not in done]
    console = Console()
    columns = (TextColumn("{task.description:24}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        for curve in _run(missing, steps, progress, processes):
            done[curve.objective, curve.seed] = curve
            _save(store, list(done.values()))
    curves = [done[name, seed] for name in names for seed in range(seeds)]
    rows = table_rows(curves)
    draw(curves, out / "compare_objectives.png")
    show(f"{steps} steps, mean of {seeds} seeds", HEADER, rows, out / "compare_objectives.md")
    console.print(f"written: {out / 'compare_objectives.png'}, .md and .json")
    return curves


def table_rows(curves: Sequence[Curve]) -> list[tuple[str, ...]]:
    """One row per objective: accuracy and reverse KL at the end, the median gradient norm of all steps and seeds."""
    rows: list[tuple[str, ...]] = []
    for name in dict.fromkeys(c.objective for c in curves):
        runs = [c for c in curves if c.objective == name]
        last = [c.accuracy[-1] for c in runs]
        few = max(1, min(20, len(runs[0].trust) // 4))
        rows.append(
            (
                name,
                f"{fmean(last):.3f} ± {pstdev(last):.3f}",
                f"{fmean(c.accuracy[len(c.accuracy) // 2] for c in runs):.3f}",
                f"{median(n for c in runs for n in c.gradient_norm):.2f}",
                f"{fmean(fmean(c.trust[:few]) for c in runs):.2f}",
                f"{fmean(fmean(c.trust[-few:]) for c in runs):.2f}",
                f"{fmean(fmean(c.reverse_kl[-few:]) for c in runs):.2f}",
            )
        )
    return rows


def _run(jobs: Sequence[tuple[str, int]], steps: int, progress: Progress, processes: int | None) -> Iterator[Curve]:
    if not jobs:
        return
    # One thread: the models are tiny, and results do not depend on what else is running.
    torch.set_num_threads(1)
    task = progress.add_task("teacher and student", total=None)
    models = prepare(lambda name, step, total: progress.update(task, description=name, completed=step, total=total))
    progress.update(task, description="teacher and student")
    runs = progress.add_task("runs", total=len(jobs))
    workers = min(len(jobs), processes or os.cpu_count() or 1)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        futures = [pool.submit(_one, job, steps, models) for job in jobs]
        for future in as_completed(futures):
            progress.advance(runs)
            yield future.result()


def _one(job: tuple[str, int], steps: int, models: Models) -> Curve:
    return distill(job[0], job[1], steps, models)


def _load(store: Path) -> list[Curve]:
    return [Curve(**entry) for entry in json.loads(store.read_text())] if store.exists() else []


def _save(store: Path, curves: list[Curve]) -> None:
    entries = [
        {k: [float(f"{x:.5g}") for x in v] if isinstance(v, list) else v for k, v in asdict(c).items()} for c in curves
    ]
    write_text(store, "[\n" + ",\n".join(json.dumps(e) for e in entries) + "\n]\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objectives", nargs="+", default=list(OBJECTIVE_NAMES), metavar="NAME")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0 .. N-1 (default 3)")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps per run (default 200)")
    parser.add_argument("--out", type=Path, default=EXAMPLES / "figures")
    parser.add_argument("--processes", type=int, help="runs at a time (default: one per core)")
    options = parser.parse_args()
    try:
        compare(options.objectives, options.seeds, options.steps, options.out, options.processes)
    except ValueError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
