"""report.html: what a run did, on one page that needs nothing but itself."""

from __future__ import annotations

import os
from html import escape
from pathlib import Path

from nemo_tropd.files import write_text
from nemo_tropd.report.charts import Line, line_chart, stacked_chart
from nemo_tropd.report.records import RunRecord, read_run
from nemo_tropd.report.style import CSS, SCRIPT
from nemo_tropd.report.tokens import rollouts_html

# metric, label, unit and meaning, +1 if higher is better, -1 if lower, 0 if neither
_TABLE = (
    ("reverse_kl", "Reverse KL", "nats a token, on the student's own text", -1),
    ("forward_kl", "Forward KL", "nats a token, on the teacher's answers", -1),
    ("one_minus_tv", "1 − TV", "overlap of the two distributions, on the student's own text", 1),
    ("exact_match", "Exact match", "right answers to arithmetic", 1),
    ("student_entropy", "Student entropy", "nats a token, on the student's own text", 0),
    ("teacher_entropy", "Teacher entropy", "nats a token, on the student's own text", 0),
)


def write_report(run_dir: str | os.PathLike[str]) -> Path:
    """Write ``report.html`` into a run's directory from its metrics.jsonl, rollouts.jsonl and summary.json.

    Self-contained: no outside resource. Metrics that the run did not log leave a note in their chart's place; files
    other than metrics.jsonl may be missing. Replaces an earlier report as a whole. Returns the page's path.

    Raises ReportError when the directory holds no metrics.
    """
    record = read_run(Path(run_dir))
    path = Path(run_dir) / "report.html"
    write_text(path, render(record))
    return path


def render(record: RunRecord) -> str:
    """The page as text."""
    name = escape(record.name)
    body = [
        f"<h1>{name}</h1>",
        f'<p class="lead">{_lead(record)}</p>',
        _table(record),
        "".join(f'<p class="note">{escape(note)}.</p>' for note in record.notes),
        _answers(record),
        "<h2>Curves</h2>",
        '<p class="quiet">Of values logged at each step, the faint line is the value and the strong one its trend '
        "(a local straight-line fit). Dots are validations on held-out prompts.</p>",
        f'<div class="charts">{"".join(_charts(record))}</div>',
        "<h2>Rollouts, token by token</h2>",
        rollouts_html(record.rollouts),
        _settings(record),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{name}: {record.steps} steps</title><style>{CSS}</style></head>"
        f"<body><main>{''.join(body)}</main><script>{SCRIPT}</script></body></html>\n"
    )


def _lead(record: RunRecord) -> str:
    sentences = []
    for key, label, _, _ in _TABLE[:2]:
        if key in record.before and key in record.after:
            old, new = record.before[key], record.after[key]
            verb = "fell" if new < old else "rose"
            moved = f"{verb} from {old:.2f} to {new:.2f} ({_percent(old, new)})"
            sentences.append(f"{label} {moved if new != old else f'stayed at {old:.2f}'}.")
    return escape(f"{record.steps} steps. " + " ".join(sentences))


def _table(record: RunRecord) -> str:
    rows = []
    for key, label, meaning, better in _TABLE:
        if key not in record.before and key not in record.after:
            continue
        old, new = record.before.get(key), record.after.get(key)
        change, tone = "", ""
        if old is not None and new is not None:
            change = _points(old, new) if key == "exact_match" else _percent(old, new)
            if better and new != old:
                good = (new > old) == (better > 0)
                tone = ' class="good"' if good else ' class="bad"'
                change += "<small>better</small>" if good else "<small>worse</small>"
        if key == "exact_match" and (count := record.after.get("exact_match_of")):
            meaning += f" ({count:.0f} questions)"
        show = _share if key == "exact_match" else "{:.3f}".format
        rows.append(
            f"<tr><td>{escape(label)}<small>{escape(meaning)}</small></td>"
            f"<td>{'' if old is None else show(old)}</td><td class=after>{'' if new is None else show(new)}</td>"
            f"<td{tone}>{change}</td></tr>"
        )
    if not rows:
        return '<p class="quiet">This run made no validation, so there is no before and after.</p>'
    head = "<tr><th>Held-out prompts</th><th>before</th><th>after</th><th>change</th></tr>"
    return f'<div class="wrap"><table><thead>{head}</thead><tbody>{"".join(rows)}</tbody></table></div>'


def _percent(old: float, new: float) -> str:
    if new == old:
        return "none"
    return f"{(new - old) / abs(old):+.0%}".replace("-", "−") if old else f"{new - old:+.3g}".replace("-", "−")


def _points(old: float, new: float) -> str:
    return f"{100 * (new - old):+.0f} points".replace("-", "−") if new != old else "none"


def _share(value: float) -> str:
    return f"{value:.0%}"


def _answers(record: RunRecord) -> str:
    if not record.answers:
        return ""

    def pair(answer: dict[str, str]) -> str:
        sides = "".join(
            f"<div><h3>{side}</h3><p>{escape(str(answer.get(side) or '(nothing)').strip())}</p></div>"
            for side in ("before", "after")
        )
        return f'<p><strong>{escape(str(answer["prompt"]))}</strong></p><div class="answers">{sides}</div>'

    first, *others = record.answers
    more = "".join(pair(a) for a in others)
    folded = f"<details><summary>{len(others)} more</summary>{more}</details>" if others else ""
    return f"<h2>One answer, before and after</h2>{pair(first)}{folded}"


def _charts(record: RunRecord) -> list[str]:
    def held_out(key: str, label: str, color: int) -> Line:
        return Line(label, record.series("validation", key), color, marked=True)

    def logged(key: str, label: str, color: int) -> Line:
        return Line(label, record.series("train", key), color)

    return [
        line_chart(
            "Reverse KL",
            "On held-out prompts, student's own text; nats a token.",
            [held_out("reverse_kl", "reverse KL", 0)],
            zero=True,
        ),
        line_chart(
            "Forward KL",
            "On held-out prompts, the teacher's answers; nats a token.",
            [held_out("forward_kl", "forward KL", 1)],
            zero=True,
        ),
        line_chart("Loss", "The objective, a mean over loss tokens.", [logged("loss", "loss", 0)]),
        line_chart(
            "Trust fraction",
            "Share of the student's tokens inside the gate.",
            [logged("trust_fraction", "trust fraction", 2)],
            share=True,
        ),
        line_chart(
            "Guided fraction",
            "Share of loss tokens in teacher-written prefixes.",
            [logged("guided_fraction", "guided fraction", 3)],
            share=True,
        ),
        line_chart("Gradient norm", "Before clipping.", [logged("grad_norm", "gradient norm", 1)]),
        line_chart(
            "Entropy",
            "Nats a token, on the student's own text.",
            [
                logged("student_entropy", "student, training", 0),
                held_out("student_entropy", "student, held out", 1),
                held_out("teacher_entropy", "teacher, held out", 2),
            ],
        ),
        line_chart(
            "Engine against trainer",
            "Difference of their log-probabilities of the same tokens; nats, log scale.",
            [logged("mismatch_max_abs", "largest", 1), logged("mismatch_mean_abs", "mean", 0)],
            log=True,
        ),
        line_chart(
            "Exact match",
            "Right answers to held-out arithmetic.",
            [held_out("exact_match", "exact match", 2)],
            share=True,
        ),
        line_chart(
            "Log-ratio",
            "log π teacher − log π student, mean over the student's tokens; nats.",
            [logged("log_ratio_mean", "mean", 0)],
        ),
        line_chart("Response length", "Tokens, mean over rollouts.", [logged("response_tokens", "tokens", 2)]),
        stacked_chart("Time of a step", "Seconds by phase.", _phase_layers(record)),
    ]


def _phase_layers(record: RunRecord) -> list[tuple[str, list[tuple[int, float]]]]:
    """Seconds by phase; what the step took beyond its phases is the last layer."""
    steps = [s for s in sorted(record.train) if any(k.startswith("seconds/") for k in record.train[s])]
    phases = record.phases()
    layers = [(p, [(s, record.train[s].get(f"seconds/{p}", 0.0)) for s in steps]) for p in phases]
    rest = []
    for s in steps:
        known = sum(record.train[s].get(f"seconds/{p}", 0.0) for p in phases)
        rest.append((s, max(record.train[s].get("seconds/step", known) - known, 0.0)))
    # Rounding and bookkeeping between phases is not worth a colour.
    worth = sum(y for _, y in rest) > 0.01 * sum(record.train[s].get("seconds/step", 0.0) for s in steps)
    return [*layers, ("other", rest)] if worth else layers


def _settings(record: RunRecord) -> str:
    parts = []
    if record.config:
        parts.append(f"<details><summary>Configuration</summary><pre>{escape(record.config)}</pre></details>")
    if record.versions:
        rows = "".join(f"<tr><td>{escape(k)}</td><td>{escape(v)}</td></tr>" for k, v in record.versions.items())
        parts.append(f"<details><summary>Versions</summary><table>{rows}</table></details>")
    return f"<h2>Settings</h2>{''.join(parts)}" if parts else ""
