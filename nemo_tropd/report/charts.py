"""What each chart of a run shows. The page and the picture draw these same definitions, see drawing.py."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from matplotlib.ticker import MaxNLocator

from nemo_tropd.report.records import Points, RunRecord
from nemo_tropd.report.text import benchmarks, number

# The light theme; page.css has the dark one under the same names. Line n has colour c<n>. c0 to c6 are Okabe and Ito's,
# which differ for every kind of colour vision.
COLORS = {
    "c0": "#0072b2", "c1": "#d55e00", "c2": "#009e73", "c3": "#b0568f", "c4": "#56b4e9", "c5": "#e69f00",
    "c6": "#8c959f", "quiet": "#59636e", "rule": "#d8dee4", "panel": "#f6f7f9",
}  # fmt: skip
_LINE_COLORS = 7
TICK_STEPS = [1, 2, 2.5, 5, 10]  # between ticks, times a power of ten

# title, note, unit, scale, lines: kind of metric, metric, label (the title if empty), colour
_TRAIN, _HELD_OUT = "train", "validation"
_DEFINITIONS = (
    ("Reverse KL", "On held-out prompts, student's own text; nats a token.", "nats a token", "zero",
        [(_HELD_OUT, "reverse_kl", "", 0), (_HELD_OUT, "reverse_kl_sampled", "Reverse KL, sampled", 4)]),
    ("Forward KL", "On held-out prompts, the teacher's answers; nats a token.", "nats a token", "zero",
        [(_HELD_OUT, "forward_kl", "", 1), (_HELD_OUT, "forward_kl_sampled", "Forward KL, sampled", 5)]),
    ("Loss", "The objective, a mean over loss tokens.", "nats a token", "", [(_TRAIN, "loss", "", 0)]),
    ("Trust fraction", "Share of the student's tokens inside the gate.", "share", "share",
        [(_TRAIN, "trust_fraction", "", 2)]),
    ("Guided fraction", "Share of loss tokens in teacher-written prefixes.", "share", "share",
        [(_TRAIN, "guided_fraction", "", 3)]),
    ("Gradient norm", "Before clipping.", "", "", [(_TRAIN, "grad_norm", "", 1)]),
    ("Entropy", "Nats a token, on the student's own text.", "nats a token", "",
        [(_TRAIN, "student_entropy", "student, training", 0), (_HELD_OUT, "student_entropy", "student, held out", 1),
         (_HELD_OUT, "teacher_entropy", "teacher, held out", 2)]),
    ("Engine against trainer", "Difference of their log-probabilities of the same tokens; nats, log scale.", "nats",
        "log", [(_TRAIN, "mismatch_max_abs", "largest", 1), (_TRAIN, "mismatch_mean_abs", "mean", 0)]),
    ("Exact match", "Right answers to held-out prompts.", "share", "share", [(_HELD_OUT, "exact_match", "", 2)]),
    ("Top-1 agreement", "Share of tokens of the teacher's answers whose most probable token is the same.", "share",
        "share", [(_HELD_OUT, "top1_agreement", "", 0)]),
    ("Log-ratio", "log π teacher − log π student, mean over the student's tokens; nats.", "nats", "",
        [(_TRAIN, "log_ratio_mean", "", 0)]),
    ("Response length", "Tokens, mean over rollouts.", "tokens", "", [(_TRAIN, "response_tokens", "", 2)]),
)  # fmt: skip
# of each source and teacher, where there are several: title, note, unit, scale, kind of metric, metric
_BY_PART = (
    ("Loss tokens", "Share of a step's loss tokens: long responses take over a mixture.", "share", "share", _TRAIN,
        "share_of_tokens"),
    ("Trust fraction", "Share of the student's tokens inside the gate.", "share", "share", _TRAIN, "trust_fraction"),
    ("Reverse KL", "On held-out prompts, student's own text; nats a token.", "nats a token", "zero", _HELD_OUT,
        "reverse_kl"),
)  # fmt: skip
_WHOSE = (("", ""), ("/teacher", ", the teacher"))


@dataclass(frozen=True)
class Line:
    """One series of a chart. ``marked`` draws a dot at each point and no trend: for a few validations."""

    label: str
    points: Points
    color: int
    marked: bool = False


@dataclass(frozen=True)
class Chart:
    """Lines over steps, or bands that add up.

    ``scale``: ``share`` fixes the axis to 0 .. 1, ``zero`` begins it at 0, ``log`` is logarithmic and leaves out values
    that are not positive, ``""`` begins at 0 unless the values would then be all but flat.
    """

    title: str
    note: str
    unit: str
    lines: Sequence[Line]
    scale: str = ""
    stacked: bool = False  # bands, all of the same steps
    top: float | None = None  # cuts the axis off at the next tick

    @property
    def drawn(self) -> list[Line]:
        """The lines with values that the axis can show; without any the run did not log what the chart shows."""
        kept = (replace(s, points=[p for p in s.points if p[1] > 0 or self.scale != "log"]) for s in self.lines)
        return [s for s in kept if s.points]

    @property
    def values_in_words(self) -> str:
        """For the text alternative."""
        if self.stacked:
            means = [(s.label, sum(y for _, y in s.points) / len(s.points)) for s in self.drawn]
            return "; ".join(f"{label}: {number(mean)} s on average" for label, mean in means)
        ends = [(s.label, s.points[0][1], s.points[-1][1]) for s in self.drawn]
        return "; ".join(f"{label}: {number(first)} to {number(last)}" for label, first, last in ends)

    def y_ticks(self) -> list[float]:
        """The ticks of the y axis, which ends at the first and the last."""
        values = [0.0, self.top] if self.top is not None else [y for s in self.drawn for _, y in s.points]
        low, high = min(values), max(values)
        if self.scale == "log":
            first = math.floor(math.log10(low))
            last = max(math.ceil(math.log10(high)), first + 1)
            every = max(1, round((last - first) / 4))
            return [10.0**e for e in range(first, last + every, every)]
        if self.scale == "share":
            low, high = 0.0, 1.0
        elif self.scale == "zero" or 0 <= low < 0.85 * high:
            low = min(low, 0.0)
        if high == low:
            low, high = low - 0.5 * abs(low or 1), high + 0.5 * abs(high or 1)
        return [float(t) for t in MaxNLocator(4, steps=TICK_STEPS).tick_values(low, high)]


def charts_of(record: RunRecord) -> dict[str, Chart]:
    """The charts of a run by title, in the order of the page."""
    charts = {}
    for title, note, unit, scale, lines in _DEFINITIONS:
        drawn = [Line(label or title, record.series(kind, m), c, kind == _HELD_OUT) for kind, m, label, c in lines]
        charts[title] = Chart(title, note, unit, drawn, scale)
    if names := benchmarks({name: 0.0 for values in record.validation.values() for name in values}):
        both = [(n + part, n.partition("/")[2] + who) for n in names for part, who in _WHOSE]
        scores = [Line(text, record.series(_HELD_OUT, n), i % _LINE_COLORS, True) for i, (n, text) in enumerate(both)]
        charts["Benchmarks"] = Chart("Benchmarks", "Share of right answers.", "share", scores, "share")
    charts |= {c.title: c for of in ("source", "teacher") for c in _mixture(record, of)}
    seconds = step_time(record.seconds())
    return {**charts, seconds.title: seconds}


def _mixture(record: RunRecord, of: str) -> Iterator[Chart]:
    """What several sources or teachers have of a run."""
    names = sorted({k.split("/")[1] for values in record.train.values() for k in values if k.startswith(f"{of}/")})
    for title, note, unit, scale, kind, metric in _BY_PART if names else ():
        lines = [
            Line(name, record.series(kind, f"{of}/{name}/{metric}"), i % _LINE_COLORS, kind == _HELD_OUT)
            for i, name in enumerate(names)
        ]
        yield Chart(f"{title} by {of}", note, unit, lines, scale)


def step_time(layers: Sequence[tuple[str, Points]]) -> Chart:
    """The seconds of a step by phase, stacked. One slow step does not flatten all others: the axis is cut off."""
    lines = [Line(label, points, i % _LINE_COLORS) for i, (label, points) in enumerate(layers)]
    chart = Chart("Time of a step", "Seconds by phase.", "seconds", lines, stacked=True, top=0.0)
    totals = sorted(sum(y for _, y in column) for column in zip(*(points for _, points in layers), strict=True))
    if not totals:
        return chart
    usual, slowest = totals[int(0.95 * (len(totals) - 1))], totals[-1]
    if slowest <= 2 * usual:
        return replace(chart, top=slowest)
    chart = replace(chart, top=1.5 * usual)
    end = number(chart.y_ticks()[-1])
    return replace(chart, note=f"{chart.note} Cut off above {end}: the slowest step took {number(slowest)}.")
