"""Reports with all of their text and empty charts: a run's take matplotlib four seconds, longer than the run does."""

from __future__ import annotations

from xml.sax.saxutils import quoteattr

from nemo_tropd.report import drawing


def empty(draw: object, title: str, in_words: str, size: tuple[int, int], margins: object) -> str:
    """For ``drawing._svg``: what the page says of a chart, and nothing in it."""
    return f'<svg viewBox="0 0 {size[0]} {size[1]}" role="img" aria-label={quoteattr(f"{title}. {in_words}")}></svg>'


def empty_charts() -> None:
    """From now on in this process and its forks."""
    vars(drawing)["_svg"] = empty
