"""The table and picture of objectives on real text, from runs' directories."""

from __future__ import annotations

import json
from pathlib import Path

from examples.benchmarks.real_text import COMPARISONS, TRAINING, VALIDATION, directory, draw, finished, table
from nemo_tropd.config import guided
from nemo_tropd.training.objective import build_objective
from tests.e2e.compose import compose_config


def run(out: Path, variant: str, seed: int, last: float, *, complete: bool = True) -> None:
    folder = directory(out, variant, seed)
    folder.mkdir(parents=True)
    lines = [
        {"step": step, "kind": "validation", **{name: value for name, _ in VALIDATION}}
        for step, value in ((0, 1.0), (2, last))
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if complete:
        (folder / "summary.json").write_text(json.dumps({"steps": 2, "before": lines[0], "after": lines[1]}))


def test_finished_runs_are_shown_with_their_spread(tmp_path: Path) -> None:
    run(tmp_path, "opd", 1, 0.8)
    run(tmp_path, "opd", 2, 0.6)
    run(tmp_path, "gate, outliers", 1, 0.5)
    run(tmp_path, "tropd", 1, 0.1, complete=False)
    runs = finished(tmp_path, COMPARISONS["objectives"].variants, (1, 2, 3))
    rows = [line.split(" | ") for line in table(runs).splitlines()]
    assert [row[0].strip("| ") for row in rows] == ["", "---", "before", "opd", "gate, outliers"]
    assert rows[2][1:3] == ["3", "1.000 ± 0.000"] and rows[3][1:3] == ["2", "0.700 ± 0.100"]
    assert rows[4][1:3] == ["1", "0.500"]
    draw(runs, tmp_path / "real_text.png")
    assert (tmp_path / "real_text.png").read_bytes().startswith(b"\x89PNG")


def test_each_variant_adds_one_thing() -> None:
    cfgs = {
        name: compose_config(list(keys), "smollm2_cpu") for name, keys in COMPARISONS["objectives"].variants.items()
    }
    objectives = {name: build_objective(cfg) for name, cfg in cfgs.items()}
    assert objectives["gate, outliers"] == objectives["tropd"] != objectives["gate alone"]
    assert [name for name, cfg in cfgs.items() if guided(cfg)] == ["tropd", "tropd exact"]
    exact = [name for name, objective in objectives.items() if objective.needs_distributions]
    assert exact == ["tropd exact", "opd exact"]


def test_figures_of_training_are_means_over_steps_where_a_run_has_them(tmp_path: Path) -> None:
    for seed, values in ((1, (0.5, 1.0)), (2, (0.8, 0.9))):
        run(tmp_path, "one step behind", seed, 0.5)
        with (directory(tmp_path, "one step behind", seed) / "metrics.jsonl").open("a") as lines:
            for step, value in enumerate(values, 1):
                lines.write(json.dumps({"step": step, "kind": "train", "effective_fraction": value}) + "\n")
    run(tmp_path, "present weights", 1, 0.4)
    rows = table(finished(tmp_path, COMPARISONS["ahead"].variants, (1, 2)), TRAINING).splitlines()
    assert rows[0].endswith("| effective fraction |")
    assert rows[3].startswith("| present weights | 1 |") and rows[3].endswith("|  |  |")
    assert rows[4].endswith("|  | 0.800 ± 0.050 |")


def test_runs_ahead_differ_in_nothing_else() -> None:
    cfgs = [compose_config(list(keys), "smollm2_cpu") for keys in COMPARISONS["ahead"].variants.values()]
    assert [cfg.model.rollout.steps_ahead for cfg in cfgs] == [0, 1, 2]
    for cfg in cfgs:
        cfg.model.rollout.steps_ahead = 0
    assert cfgs[0] == cfgs[1] == cfgs[2]
