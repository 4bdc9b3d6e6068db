"""Charts drawn by matplotlib: on any axes, and as inline SVG for the page."""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from xml.etree import ElementTree

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from nemo_tropd.report.charts import COLORS, TICK_STEPS, Chart
from nemo_tropd.report.records import smooth, thin
from nemo_tropd.report.text import number

_WIDTH, _HEIGHT = 360, 206  # of an SVG, in its own units, which matplotlib calls points
_LEFT, _RIGHT, _TOP, _BOTTOM = 40, 16, 16, 32
_STYLE = {
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "text.parse_math": False,  # names of runs and phases are not TeX
    "lines.linewidth": 2,
    "lines.solid_capstyle": "round",
    "lines.markersize": 7,
    **dict.fromkeys((f"axes.spines.{side}" for side in ("left", "right", "top", "bottom")), False),
    "axes.facecolor": "none",
    "axes.labelcolor": COLORS["quiet"],
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.titlesize": 11,
    "axes.titlepad": 14,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": COLORS["rule"],
    "grid.linewidth": 1,
    **dict.fromkeys(("xtick.color", "ytick.color"), COLORS["quiet"]),
    **dict.fromkeys(("xtick.major.size", "ytick.major.size"), 0),
    **dict.fromkeys(("xtick.major.pad", "ytick.major.pad"), 6),
    "legend.edgecolor": "none",
    "legend.fontsize": 9,
    "legend.handlelength": 1.2,
    "legend.columnspacing": 1.2,
    "svg.fonttype": "none",
}


@contextmanager
def style(font_size: float, salt: str = "") -> Iterator[None]:
    """Set the style, whatever the user's matplotlibrc says.
    Ids within an SVG are hashes of ``salt`` and content: charts of one page share none, a run always gets the same."""
    with matplotlib.style.context(["default", {**_STYLE, "font.size": font_size, "svg.hashsalt": salt}]):
        yield


def svg(chart: Chart) -> str:
    """The chart as an ``<svg>`` element of an HTML page: colours are CSS variables, text is text in the page's font."""
    with style(11, chart.title):
        # A figure of its own, without pyplot: no global state, no display.
        figure = Figure(figsize=(_WIDTH / 72, _HEIGHT / 72))
        figure.patch.set_visible(False)
        size = (1 - (_LEFT + _RIGHT) / _WIDTH, 1 - (_TOP + _BOTTOM) / _HEIGHT)
        draw(chart, figure.add_axes((_LEFT / _WIDTH, _BOTTOM / _HEIGHT, *size)))
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    root = ElementTree.fromstring(file.getvalue())
    root.remove(root[0])  # a style sheet, which would hold for all of the page
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', file.getvalue()))
    for element in root.iter():
        _simplify(element, used)
    label = f"{chart.title}. {chart.values_in_words}"
    root.attrib = {"viewBox": f"0 0 {_WIDTH} {_HEIGHT}", "role": "img", "aria-label": label}
    return ElementTree.tostring(root, encoding="unicode")


def _simplify(element: ElementTree.Element, used: set[str]) -> None:
    """Without namespaces, ids that nothing uses, needless digits; with the page's font and colours."""
    element.tag = element.tag.rpartition("}")[2]
    element.tail = None
    if element.tag != "text":
        element.text = None
    attributes = {}
    for key, value in element.attrib.items():
        key = key.rpartition("}")[2]
        if key in ("d", "x", "y"):
            value = re.sub(r"\.(\d\d)\d+", r".\1", value).replace("\n", "")
        elif key == "style":
            value = re.sub(r"font-family:[^;]*(; )?", "", value)
            for name, color in COLORS.items():
                value = value.replace(color, f"var(--{name})")
        if (key != "id" or value in used) and not value.startswith("rotate(-0 "):
            attributes[key] = value
    element.attrib = attributes


def draw(chart: Chart, axis: Axes) -> None:
    """Draw a chart's lines or bands and its axes on ``axis``, without title and legend."""
    lines = chart.drawn
    if not lines:
        axis.text(0.5, 0.5, "not logged", transform=axis.transAxes, ha="center", va="center", color=COLORS["quiet"])
        axis.set(xticks=[], yticks=[])
        return
    if chart.stacked:
        layers = [thin([(x, max(y, 0.0)) for x, y in s.points]) for s in lines]
        colors = [COLORS[f"c{s.color}"] for s in lines]
        steps, columns = [x for x, _ in layers[0]], [[y for _, y in layer] for layer in layers]
        if len(steps) == 1:  # a band needs a width
            steps, columns = [steps[0] - 0.5, steps[0] + 0.5], [2 * column for column in columns]
        labels = [s.label for s in lines]
        axis.stackplot(steps, columns, labels=labels, colors=colors, edgecolor=COLORS["panel"], linewidth=0.6)
    else:
        _draw_lines(chart, axis)
    if chart.scale == "log":
        axis.set_yscale("log")
    _draw_axes(chart, axis)


def _draw_lines(chart: Chart, axis: Axes) -> None:
    for line in chart.drawn:
        points, color = thin(line.points), COLORS[f"c{line.color}"]
        if line.marked or len(line.points) < 20:
            marker = "o" if len(line.points) <= 60 else ""
            axis.plot(*zip(*points, strict=True), color=color, marker=marker, label=line.label, clip_on=False)
        else:
            trend = smooth(points, log=chart.scale == "log")
            axis.plot(*zip(*points, strict=True), color=color, linewidth=1, alpha=0.3, clip_on=False)
            axis.plot(*zip(*trend, strict=True), color=color, label=line.label, clip_on=False)
    if len(chart.drawn) == 1 and chart.drawn[0].marked:
        values = chart.drawn[0].points
        for x, y in dict.fromkeys((values[0], values[-1])):
            text = axis.annotate(number(y), (x, y), (0, 8), textcoords="offset points", ha="center", zorder=1.5)
            text.set(color=COLORS["quiet"], bbox={"facecolor": COLORS["panel"], "edgecolor": "none", "pad": 0.5})


def _draw_axes(chart: Chart, axis: Axes) -> None:
    steps = [x for s in chart.drawn for x, _ in s.points]
    low, high = min(steps), max(steps)
    # The values at the first and the last dot need room on both sides.
    room = 0.06 * (high - low) if all(s.marked for s in chart.drawn) else 0.0
    axis.set_xlim(low - room, high + room) if high > low else axis.set_xlim(low - 1, high + 1)
    locator = MaxNLocator(5, steps=TICK_STEPS, integer=True)
    inside = [float(t) for t in locator.tick_values(low, high) if low <= t <= high] if high > low else [float(low)]
    axis.set_xticks(inside, [number(t) for t in inside])
    axis.set_xlabel("step", loc="right", labelpad=3)
    ticks = chart.y_ticks()
    axis.set_yticks(ticks, [number(t) for t in ticks])
    axis.set_yticks([], minor=True)
    axis.set_ylim(ticks[0], ticks[-1])
