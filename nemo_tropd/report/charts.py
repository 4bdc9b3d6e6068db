"""Charts as inline SVG. Colours are CSS variables of the page, so that they follow its light or dark theme."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from nemo_tropd.report.records import Points, smooth, thin

_WIDTH, _HEIGHT = 360, 200
_LEFT, _RIGHT, _TOP, _BOTTOM = 40, 16, 10, 32


@dataclass(frozen=True)
class Line:
    """One series of a chart. ``marked`` draws a dot at each point and no trend: for a few validations."""

    label: str
    points: Points
    color: int
    marked: bool = False


@dataclass(frozen=True)
class _Axes:
    """Maps data to the drawing; ``y`` is a log10 value where the axis is logarithmic."""

    x: tuple[float, float]
    y: tuple[float, float]
    log: bool

    def at(self, x: float, y: float) -> tuple[float, float]:
        span_x = (self.x[1] - self.x[0]) or 1.0
        value = math.log10(y) if self.log else y
        across = (x - self.x[0]) / span_x
        up = (value - self.y[0]) / ((self.y[1] - self.y[0]) or 1.0)
        return _LEFT + across * (_WIDTH - _LEFT - _RIGHT), _HEIGHT - _BOTTOM - up * (_HEIGHT - _TOP - _BOTTOM)

    def path(self, points: Sequence[tuple[float, float]]) -> str:
        return "M" + "L".join("{:.1f},{:.1f}".format(*self.at(x, y)) for x, y in points)


def line_chart(
    title: str, note: str, lines: Sequence[Line], *, log: bool = False, share: bool = False, zero: bool = False
) -> str:
    """A figure with lines over steps.

    Train lines show the raw values faintly and their trend; ``log`` needs positive values and leaves others
    out; ``share`` fixes the axis to 0 .. 1, ``zero`` begins it at 0. A figure without any value says so.
    """
    lines = [Line(s.label, [p for p in s.points if p[1] > 0 or not log], s.color, s.marked) for s in lines]
    lines = [s for s in lines if s.points]
    if not lines:
        return _empty(title, note)
    values = [y for s in lines for _, y in s.points]
    axes = _Axes(
        _extent([x for s in lines for x, _ in s.points]), _y_extent([*values, 0.0] if zero else values, log, share), log
    )
    parts = [_grid(axes)]
    for s in lines:
        tone = f"var(--c{s.color})"
        if s.marked or len(s.points) < 20:
            parts.append(f'<path class="line" style="stroke:{tone}" d="{axes.path(thin(s.points))}"/>')
            for x, y in s.points if len(s.points) <= 60 else []:
                cx, cy = axes.at(x, y)
                tip = f"<title>{escape(s.label)}, step {x}: {number(y)}</title>"
                parts.append(f'<circle style="fill:{tone}" cx="{cx:.1f}" cy="{cy:.1f}" r="3.5">{tip}</circle>')
        else:
            parts.append(f'<path class="raw" style="stroke:{tone}" d="{axes.path(thin(s.points))}"/>')
            parts.append(f'<path class="line" style="stroke:{tone}" d="{axes.path(smooth(thin(s.points), log=log))}"/>')
    ends = "; ".join(f"{s.label}: {number(s.points[0][1])} to {number(s.points[-1][1])}" for s in lines)
    return _figure(title, note, [(s.label, s.color) for s in lines], parts, ends)


def stacked_chart(title: str, note: str, layers: Sequence[tuple[str, Points]]) -> str:
    """A figure of layers that add up, such as the seconds of a step by phase. Layers lack no step that others have."""
    steps = sorted({x for _, points in layers for x, _ in points})
    if not steps:
        return _empty(title, note)
    base = dict.fromkeys(steps, 0.0)
    bands: list[tuple[Points, Points]] = []
    for _, points in layers:
        values = dict(points)
        low = [(x, base[x]) for x in steps]
        for x in steps:
            base[x] += max(values.get(x, 0.0), 0.0)
        bands.append((low, [(x, base[x]) for x in steps]))
    # One slow step (the first, or a checkpoint's) must not press all others flat.
    totals = sorted(base.values())
    usual = totals[int(0.95 * (len(totals) - 1))]
    top = totals[-1] if totals[-1] <= 2 * usual else 1.5 * usual
    axes = _Axes(_extent(steps), _y_extent([0.0, top], False, False), False)
    parts = [_grid(axes)]
    for color, (low, high) in enumerate(bands):
        ring = [*thin(high), *reversed(thin(low))]
        clipped = [(x, min(y, axes.y[1])) for x, y in ring]
        label, points = layers[color]
        mean = sum(y for _, y in points) / max(len(points), 1)
        tip = f"<title>{escape(label)}: {number(mean)} s a step on average</title>"
        parts.append(f'<path class="band" style="fill:var(--c{color % 7})" d="{axes.path(clipped)}Z">{tip}</path>')
    if top < totals[-1]:
        note += f" Cut off above {number(axes.y[1])}: the slowest step took {number(totals[-1])}."
    ends = "; ".join(f"{label}: {number(sum(y for _, y in p) / max(len(p), 1))} s on average" for label, p in layers)
    return _figure(title, note, [(label, i % 7) for i, (label, _) in enumerate(layers)], parts, ends)


def number(value: float) -> str:
    """A number for people: three significant digits, no needless zeros."""
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1e5 or size < 1e-3:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    if size >= 100:
        return f"{value:,.0f}"
    text = f"{value:.{max(2 - math.floor(math.log10(size)), 0)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def _figure(title: str, note: str, keys: Sequence[tuple[str, int]], parts: Sequence[str], ends: str) -> str:
    legend = "".join(f'<li><i style="background:var(--c{color})"></i>{escape(label)}</li>' for label, color in keys)
    shown = f'<ul class="legend">{legend}</ul>' if len(keys) > 1 else ""
    svg = (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(f"{title}. {ends}")}">'
        f"{''.join(parts)}</svg>"
    )
    caption = f"<figcaption><h3>{escape(title)}</h3><p>{escape(note)}</p>{shown}</figcaption>"
    return f"<figure>{caption}{svg}</figure>"


def _empty(title: str, note: str) -> str:
    return (
        f'<figure class="empty"><figcaption><h3>{escape(title)}</h3><p>{escape(note)}</p></figcaption>'
        f"<p>This run did not log it.</p></figure>"
    )


def _extent(values: Sequence[float]) -> tuple[float, float]:
    return float(min(values)), float(max(values))


def _y_extent(values: Sequence[float], log: bool, share: bool) -> tuple[float, float]:
    """Limits of the y axis at ticks; from zero unless the values would then be all but flat."""
    if share:
        return 0.0, 1.0
    low, high = _extent(values)
    if log:
        return math.floor(math.log10(low)), max(math.ceil(math.log10(high)), math.floor(math.log10(low)) + 1)
    if low >= 0 and low < 0.85 * high:
        low = 0.0
    if high == low:
        low, high = low - 0.5 * abs(low or 1), high + 0.5 * abs(high or 1)
    step = _tick_step(low, high)
    return math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step


def _tick_step(low: float, high: float, count: int = 4) -> float:
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    return next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)


def _grid(axes: _Axes) -> str:
    parts = []
    if axes.log:
        every = max(1, round((axes.y[1] - axes.y[0]) / 4))
        ticks = [10.0**e for e in range(int(axes.y[0]), int(axes.y[1]) + 1, every)]
    else:
        step = _tick_step(*axes.y)
        ticks = [axes.y[0] + i * step for i in range(round((axes.y[1] - axes.y[0]) / step) + 1)]
        ticks = [0.0 if abs(t) < 1e-9 * step else t for t in ticks]
    for tick in ticks:
        _, y = axes.at(axes.x[0], tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{number(tick)}</text>')
    for x in _step_ticks(axes.x):
        px, _ = axes.at(x, 10.0 ** axes.y[0] if axes.log else axes.y[0])
        parts.append(f'<text x="{px:.1f}" y="{_HEIGHT - _BOTTOM + 15}" text-anchor="middle">{number(x)}</text>')
    parts.append(f'<text x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 2}" text-anchor="end">step</text>')
    return "".join(parts)


def _step_ticks(extent: tuple[float, float]) -> list[float]:
    low, high = extent
    if high == low:
        return [low]
    step = max(_tick_step(low, high, 5), 1.0)
    first = math.ceil(low / step) * step
    return [first + i * step for i in range(int((high - first) / step + 1e-9) + 1)]
