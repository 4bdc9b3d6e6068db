"""Charts drawn by matplotlib: on any axes, and as inline SVG for the page."""

import io
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from xml.etree import ElementTree

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from nemo_tropd.report.charts import COLORS, TICK_STEPS, Chart
from nemo_tropd.report.records import smooth, thin
from nemo_tropd.report.text import number
from nemo_tropd.report.timeline import Picture

# Of an SVG, in its own units, which matplotlib calls points: width and height; left, right, top and bottom margin.
_CHART = (360, 206), (40, 16, 16, 32)
_TIMELINE = (800, 190), (64, 68, 18, 32)
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
    return _svg(partial(draw, chart), chart.title, chart.values_in_words, *_CHART)


def timeline_svg(picture: Picture) -> str:
    """A timeline as an ``<svg>`` element, as ``svg`` of a chart."""
    return _svg(partial(draw_timeline, picture), f"Timeline, {picture.title}", picture.values_in_words, *_TIMELINE)


def _svg(
    draw: Callable[[Axes], None],
    title: str,
    in_words: str,
    size: tuple[int, int],
    margins: tuple[int, int, int, int],
) -> str:
    (width, height), (left, right, top, bottom) = size, margins
    with style(11, title):
        # A figure of its own, without pyplot: no global state, no display.
        figure = Figure(figsize=(width / 72, height / 72))
        figure.patch.set_visible(False)
        inside = (1 - (left + right) / width, 1 - (top + bottom) / height)
        draw(figure.add_axes((left / width, bottom / height, *inside)))
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    root = ElementTree.fromstring(file.getvalue())
    root.remove(root[0])  # a style sheet, which would hold for all of the page
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', file.getvalue()))
    for element in root.iter():
        _simplify(element, used)
    root.attrib = {"viewBox": f"0 0 {width} {height}", "role": "img", "aria-label": f"{title}. {in_words}"}
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


def draw_timeline(picture: Picture, axis: Axes) -> None:
    """Draw lanes, their idle shares and the axis of seconds, without title and legend."""
    for row in picture.rows:
        for bar in row.bars:
            width = max(bar.end - bar.begin, 0.0015 * picture.end)  # else it would not be seen
            edge = 0.8 if width > 0.01 * picture.end and row.height > 0.1 else 0  # else nothing else would be
            (patch,) = axis.barh(row.top, width, row.height, bar.begin, align="edge", color=COLORS[bar.kind.color])
            patch.set(alpha=bar.kind.opacity, edgecolor=COLORS["panel"], linewidth=edge)
    for x, y, text in _numbers(picture):
        ground = {"facecolor": COLORS["c0"], "edgecolor": "none", "pad": 1}
        axis.text(x, y, text, ha="center", va="center", color=COLORS["panel"], fontsize=10, bbox=ground)
    quiet: dict[str, Any] = {"color": COLORS["quiet"], "va": "center"}
    for place, share in enumerate(picture.lanes.values()):
        axis.text(1.012, place + 0.5, f"idle {share:.0%}", transform=axis.get_yaxis_transform(), **quiet)
    for i, (begin, end, name) in enumerate(picture.steps):
        if i:
            axis.axvspan(picture.steps[i - 1][1], begin, color=COLORS["rule"], alpha=0.6, linewidth=0)
            axis.axvline(begin, color=COLORS["quiet"], linewidth=1)
        if len(picture.steps) > 1:
            axis.text((begin + end) / 2, -0.22, name, ha="center", **quiet)
    axis.set(xlim=(0, picture.end), ylim=(len(picture.lanes), 0))
    axis.grid(False, axis="y")
    axis.grid(True, axis="x")
    axis.set_yticks([place + 0.5 for place in range(len(picture.lanes))], list(picture.lanes))
    ticks = [float(t) for t in MaxNLocator(8, steps=TICK_STEPS).tick_values(0, picture.end) if 0 <= t <= picture.end]
    axis.set_xticks(ticks, [number(t) for t in ticks])
    axis.set_xlabel("seconds", loc="right", labelpad=3)


def _numbers(picture: Picture) -> Iterator[tuple[float, float, str]]:
    """Where the numbers of the engines' bars have room: in all engines' bars of one number."""
    rows = [row for row in picture.rows if any(bar.number for bar in row.bars)]
    for bar in rows[0].bars if rows else ():
        begin, end = bar.begin, bar.end
        for other in (b for row in rows[1:] for b in row.bars):
            if other.number == bar.number and other.begin < bar.end and other.end > bar.begin:
                begin, end = max(begin, other.begin), min(end, other.end)
        if end - begin > (0.01 + 0.01 * len(bar.number)) * picture.end:
            yield (begin + end) / 2, (rows[0].top + rows[-1].top + rows[-1].height) / 2, bar.number
