"""report.html of an evaluation: models side by side, with intervals and the answers themselves."""

from collections.abc import Mapping, Sequence
from typing import Any

from nemo_tropd.report.charts import COLORS
from nemo_tropd.report.page import template


def render(name: str, lead: str, benchmarks: Sequence[Mapping[str, Any]]) -> str:
    """The page as text; all text of models and problems is escaped by the template, which says what it reads."""
    return template("evaluation.html").render(name=name, lead=lead, benchmarks=benchmarks, colors=COLORS)
