"""report.html: what a run did, on one page that needs nothing but itself."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from nemo_tropd.files import write_text
from nemo_tropd.report import drawing
from nemo_tropd.report.charts import COLORS, Chart, charts_of
from nemo_tropd.report.records import RunRecord, read_run
from nemo_tropd.report.text import answers_counted, benchmarks, change, change_in_points, headline
from nemo_tropd.report.timeline import Picture, picture_of
from nemo_tropd.report.tokens import shown_rollouts, swatches

# metric, label, unit and meaning, +1 if higher is better, -1 if lower, 0 if neither
_TABLE = (
    ("reverse_kl", "Reverse KL", "nats a token, on the student's own text", -1),
    ("reverse_kl_sampled", "Reverse KL, sampled", "an estimate, where a server has the teacher", -1),
    ("forward_kl", "Forward KL", "nats a token, on the teacher's answers", -1),
    ("forward_kl_sampled", "Forward KL, sampled", "an estimate, on the teacher's answers", -1),
    ("one_minus_tv", "1 − TV", "overlap of the two distributions, on the student's own text", 1),
    ("top1_agreement", "Top-1 agreement", "the most probable token is the teacher's, on the teacher's answers", 1),
    ("exact_match", "Exact match", "right answers, where one is known", 1),
    ("student_entropy", "Student entropy", "nats a token, on the student's own text", 0),
    ("teacher_entropy", "Teacher entropy", "nats a token, on the student's own text", 0),
)


@dataclass(frozen=True)
class _Row:
    """A metric before and after, in words. ``tone`` is a CSS class."""

    label: str
    meaning: str
    before: str
    after: str
    change: str
    verdict: str = ""
    tone: str = ""


def write_report(run_dir: str | os.PathLike[str], summary: dict[str, Any] | None = None) -> Path:
    """Write ``report.html`` into a run's directory, replacing an earlier one atomically; returns its path.

    Read are metrics.jsonl (without any: ReportError), timeline.jsonl, rollouts.jsonl and summary.json (or ``summary``,
    before that is written). What is missing leaves a note in its place.
    """
    path = Path(run_dir) / "report.html"
    write_text(path, render(read_run(Path(run_dir), summary)))
    return path


def render(record: RunRecord) -> str:
    """The page as text. All text of the run is escaped by the template."""
    return template("page.html").render(
        record=record,
        lead=_lead(record),
        rows=_rows(record),
        charts=charts_of(record).values(),
        timeline=picture_of(record.timeline),
        rollouts=shown_rollouts(record.rollouts),
        swatches=swatches(),
        colors=COLORS,
        svg=_svg,
        timeline_svg=_timeline_svg,
    )


def template(name: str) -> Template:
    """A page's template, which escapes what it is given."""
    loader = PackageLoader("nemo_tropd.report", package_path="")
    return Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    ).get_template(name)


def _svg(chart: Chart) -> Markup:
    return Markup(drawing.svg(chart))  # written out from an XML tree, which escapes


def _timeline_svg(picture: Picture) -> Markup:
    return Markup(drawing.timeline_svg(picture))


def _lead(record: RunRecord) -> str:
    sentences = [f"{record.length}.", *headline(record.before, record.after)]
    for key, label, _, _ in _TABLE[:4]:
        if key in record.before and key in record.after:
            old, new = record.before[key], record.after[key]
            verb = "fell" if new < old else "rose"
            moved = f"{verb} from {old:.2f} to {new:.2f} ({change(old, new)})"
            sentences.append(f"{label} {moved if new != old else f'stayed at {old:.2f}'}.")
    return " ".join(sentences)


def _rows(record: RunRecord) -> list[_Row]:
    """The table of metrics that a validation measured."""
    rows = []
    scores = ((k, k.partition("/")[2], "benchmark, right answers", 1) for k in benchmarks(record.before | record.after))
    for key, label, meaning, better in (*_TABLE, *scores):
        old, new = record.before.get(key), record.after.get(key)
        if old is None and new is None:
            continue
        is_share = key in ("exact_match", "top1_agreement") or key.startswith("benchmark/")
        if (goal := record.after.get(f"{key}/teacher")) is not None:
            meaning += f"; the teacher: {goal:.0%}"
        if is_share:
            meaning += answers_counted(record.before, record.after, key)
        before, after = ("" if v is None else f"{v:.0%}" if is_share else f"{v:.3f}" for v in (old, new))
        moved = verdict = tone = ""
        if old is not None and new is not None:
            moved = change_in_points(old, new) if is_share else change(old, new)
            if better and new != old:
                good = (new > old) == (better > 0)
                verdict, tone = ("better", "good") if good else ("worse", "bad")
        rows.append(_Row(label, meaning, before, after, moved, verdict, tone))
    return rows
