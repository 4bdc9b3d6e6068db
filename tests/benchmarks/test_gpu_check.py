"""The GPU check's own machinery on a CPU: rows on the disk, limits, budget, resume; and the loop's check, rehearsed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from array import array
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from examples.benchmarks.gpu_check.check import Journal, run
from examples.benchmarks.gpu_check.rows import CHECKS
from examples.benchmarks.isolated import followed, isolated
from nemo_tropd.batch import Rollout
from nemo_tropd.rollout.engine import Finished, RolloutRequest
from tests.benchmarks.check_doubles import appends, crashes, dies, double, hangs, nothing, two
from tests.doubles import GivenEngines, ReplayEngine

pytestmark = pytest.mark.timeout(600)  # of a busy machine
ROOT = Path(__file__).resolve().parents[2]


def rows(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    return [line for line in lines if "point" in line]


def gone(pid: int) -> bool:
    """Within ten seconds; a process that only waits for its parent is gone."""
    for _ in range(100):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.1)
    return False


def test_a_failure_is_a_row_and_the_next_check_runs(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    checks = [double(crashes), double(dies), double(nothing), double(hangs, 5.0), double(two, 3000.0), double(two)]
    run(checks, journal, time.monotonic() + 300)
    found = [(r["check"], r["point"]) for r in rows(tmp_path)]
    assert found == [
        ("crashes", "before"), ("crashes", "failed"), ("dies", "before"), ("dies", "failed"), ("nothing", "failed"),
        ("hangs", "began"), ("hangs", "failed"), ("two", "not run"), ("two", "first"), ("two", "second"),
    ]  # fmt: skip
    said = [r["measured"] for r in rows(tmp_path) if r["point"] in ("failed", "not run")]
    log = tmp_path / "crashes.log"
    assert "ValueError: no such\nkernel" in said[0] and said[0].endswith(f"see {log}") and "raise" in log.read_text()
    assert "died, exit code -6" in said[1] and "nothing" in said[2] and "not done in 10 s" in said[3]
    assert "3000" in said[4] and "--resume" in said[4]
    assert "in hangs" in (tmp_path / "hangs.log").read_text()  # where it hung
    assert all(gone(int(pid)) for pid in rows(tmp_path)[5]["measured"].split())
    assert journal.state() == {"crashes": False, "dies": False, "nothing": False, "hangs": False, "two": True}
    table = (tmp_path / "table.md").read_text().splitlines()
    assert len(table) == 2 + len(found) and table[-2] == "| two | first | 1 \\| 2 | under 3 | held |"
    assert table[3].startswith("| crashes | failed |") and "no such kernel" in table[3] and "NOT HELD" in table[3]


def main(*arguments: object) -> subprocess.Popen[str]:
    """The command with these doubles as its checks, on a machine that says it has a GPU."""
    command = [sys.executable, "-m", "tests.benchmarks.check_doubles", *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_command_leaves_its_rows_and_resumes(tmp_path: Path, number: signal.Signals) -> None:
    out = tmp_path / "out"
    first = main("--out", out)
    assert first.stdout is not None
    line = next(line for line in first.stdout if "hangs: began" in line)
    pid, started = map(int, line.split()[2:4])
    first.send_signal(number)
    first.wait(timeout=60)
    assert gone(pid), "the check outlived the command"
    if number == signal.SIGKILL:  # what a check starts can end with it, but must not
        os.kill(started, signal.SIGKILL)
    assert gone(started)
    kept = [r["point"] for r in rows(out)]
    assert kept == ["measured on", "first", "second", "began"]
    with (out / "rows.jsonl").open("a") as file:
        file.write('{"check": "hangs", "poi')  # cut off in the middle
    refused = main("--out", out)
    assert "give it with --resume" in refused.communicate()[1] and refused.returncode == 2
    again = main("--resume", out, "--minutes", 0.2)
    said, errors = again.communicate()
    assert again.returncode == 1, errors
    lines = (out / "rows.jsonl").read_text().splitlines()
    assert '{"check": "hangs", "poi' in lines  # and what follows is a line of its own
    new = [json.loads(line)["point"] for line in lines[lines.index('{"check": "hangs", "poi') + 1 :] if "point" in line]
    assert new == ["measured on", "not run", "failed"] and "two: first" not in said
    done = main("--resume", out, "--only", "two")
    assert done.communicate()[1] == "" and done.returncode == 0


def test_the_compilers_cache_is_this_uids_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every measurement: uids that share a user's name would share torch's folder in /tmp."""
    for name in ("TORCHINDUCTOR_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    found = isolated(os.getenv, "TORCHINDUCTOR_CACHE_DIR", limit_s=120)
    assert found == str(tmp_path / ".cache" / "torchinductor")


def test_what_to_run_is_said_in_order() -> None:
    assert [c.name for c in CHECKS[:2]] == ["loop", "step"] and sum(c.seconds for c in CHECKS[:2]) <= 180
    assert sum(c.seconds for c in CHECKS if c.name not in ("trl", "resume")) <= 10 * 60
    assert len({c.name for c in CHECKS}) == len(CHECKS)


def test_lines_are_followed_as_they_come(tmp_path: Path) -> None:
    file = tmp_path / "lines.jsonl"
    file.write_text('{"n": 0}\n')
    seen = []
    with pytest.raises(Exception, match="later"):
        for line in followed(appends, file, limit_s=60, file=file):
            seen.append(line["n"])
    assert seen == [1]


class ScoringEngine(ReplayEngine):
    """Random tokens with the log-probabilities that Hugging Face's model gives them under the weights it was given; the
    third ones it forgets to take."""

    def __init__(self, folder: Path) -> None:
        super().__init__(131)
        self.folder, self.model = folder, None

    def update_weights(self, stream: Iterable[tuple[str, Any]], version: int) -> Any:
        from transformers import AutoModelForCausalLM

        weights = {name: tensor.detach().clone() for name, tensor in stream}
        if version != 2:
            self.model = AutoModelForCausalLM.from_pretrained(self.folder, dtype="float32")
            self.model.load_state_dict(weights)
        return super().update_weights(iter(weights.items()), version)

    def generate(self, requests: Sequence[RolloutRequest], finished: Finished | None = None) -> list[Rollout]:
        rollouts = super().generate(requests)
        for r in rollouts:
            ids = torch.tensor([[*r.prompt_ids, *r.prefix_ids, *r.response_ids]])
            with torch.no_grad():
                logits = self.model(ids).logits[0, -len(r.response_ids) - 1 : -1]
            own = logits.log_softmax(-1).gather(1, ids[0, -len(r.response_ids) :, None])
            r.response_log_probs[:] = array("d", own[:, 0].tolist())
            if finished is not None:
                finished(r)
        return rollouts


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A world of one process, with one thread."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_the_loops_check_rehearsed(tmp_path: Path, alone: None) -> None:
    """The same run, configuration and rows as on a GPU, tiny, with a double in vLLM's place; the step for which it kept
    old weights does not hold."""
    from examples.benchmarks.gpu_check import runs

    engines = GivenEngines(partial(ScoringEngine, tmp_path / "student"))
    runs.train_once(tmp_path, 3, True, runs._UNGUIDED, engines)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [runs.line_row(line).held for line in lines] == [True, True, False]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 3


def test_the_steps_check_rehearsed(alone: None) -> None:
    """Every phase of the plan has a row, and nothing that a CPU took is judged."""
    from examples.benchmarks.gpu_check.step import step

    found = {row.point: row for row in step(rehearsal=True)}
    phases = ("teacher scores", "student passes", "optimizer step", "weights to the engine")
    memory = [row for point, row in found.items() if point.startswith("memory in use")]
    assert [row.point.rpartition(", ")[2] for row in memory] == list(phases)
    assert all(float(row.measured.split()[0]) > 0 and "plan" in row.wanted for row in memory)
    assert {row.held for row in found.values()} == {None}
    (times,) = (row.measured for point, row in found.items() if point.endswith("seconds by phase"))
    assert all(name in times for name in ("rollout", "teacher", "student", "optimizer", "refresh"))
    assert "outside rollouts, teacher and student" in found
