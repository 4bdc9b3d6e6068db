"""Rollouts as text whose tokens are coloured by log-ratio and marked by the trust gate."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from nemo_tropd.report.charts import number
from nemo_tropd.report.records import TokenTrace

# The log-ratio (nats) at which a colour is full, and how much of a rollout or a run is shown.
FULL_COLOR_AT = 4.0
_TOKENS_SHOWN = 600
_ROLLOUTS_SHOWN = 12


def rollouts_html(rollouts: Sequence[TokenTrace]) -> str:
    """The last rollouts open, earlier ones folded; at most 12, spread over the run."""
    if not rollouts:
        return '<p class="quiet">This run kept no rollouts.</p>'
    shown = _spread(rollouts)
    folded = "".join(_fold(r, opened=False) for r in reversed(shown[:-1]))
    return f"{_legend()}{_fold(shown[-1], opened=True)}{folded}"


def _spread(rollouts: Sequence[TokenTrace]) -> list[TokenTrace]:
    """Rollouts of the first and last steps, and of some between, in the order of steps."""
    ordered = sorted(rollouts, key=lambda r: r.step)
    if len(ordered) <= _ROLLOUTS_SHOWN:
        return ordered
    last = len(ordered) - 1
    return [ordered[round(i * last / (_ROLLOUTS_SHOWN - 1))] for i in range(_ROLLOUTS_SHOWN)]


def _legend() -> str:
    swatches = ""
    for value in (-4.0, -2.0, -1.0, 1.0, 2.0, 4.0):
        share = min(abs(value) / FULL_COLOR_AT, 1.0)
        bound = "" if share < 1 else "≤ " if value < 0 else "≥ "
        side = "neg" if value < 0 else "pos"
        swatches += f'<span class="t {side}" style="--a:{share:.2f}">{bound}{_signed(f"{value:+g}")}</span>'
    return (
        f'<div class="scale"><p>Colour: log-ratio log π<sub>teacher</sub> − log π<sub>student</sub>, in nats. '
        f"<span>student overrates</span> {swatches} <span>teacher prefers</span></p>"
        '<p>Mark: <span class="t">trusted</span> inside the gate, <span class="t out">outlier</span> outside it, '
        '<span class="t soft">partly</span> for a soft gate, <span class="t guided">prefix</span> written by the '
        "teacher. Point at a token, or tap it, for its values.</p>"
        "</div>"
    )


def _fold(r: TokenTrace, *, opened: bool) -> str:
    own = [i for i, guided in enumerate(r.guided) if not guided]
    outliers = sum(1 for i in own if r.gate[i] is not None and r.gate[i] == 0)
    known = [v for i in own if (v := r.log_ratio[i]) is not None]
    facts = [f"{len(own)} tokens", f"{outliers} outliers"]
    if known:
        facts.append("mean log-ratio " + _signed(f"{sum(known) / len(known):+.2f}"))
    if len(own) < len(r.tokens):
        facts.insert(0, f"{len(r.tokens) - len(own)} by the teacher")
    cut = len(r.tokens) - _TOKENS_SHOWN
    rest = f'<p class="quiet">The first {_TOKENS_SHOWN} of {len(r.tokens)} tokens.</p>' if cut > 0 else ""
    body = "".join(
        _token(t, v, g, w)
        for t, v, g, w in list(zip(r.tokens, r.log_ratio, r.gate, r.guided, strict=True))[:_TOKENS_SHOWN]
    )
    return (
        f"<details{' open' if opened else ''}><summary>Step {r.step} <span>{', '.join(facts)}</span></summary>"
        f'<p class="prompt">{escape(r.prompt)}</p><p class="tokens">{body}</p>{rest}</details>'
    )


def _token(text: str, log_ratio: float | None, gate: float | None, guided: bool) -> str:
    classes, style = ["t"], ""
    if log_ratio is not None and not guided:
        classes.append("neg" if log_ratio < 0 else "pos")
        style = f' style="--a:{min(abs(log_ratio) / FULL_COLOR_AT, 1.0):.2f}"'
    if guided:
        verdict = "written by the teacher"
        classes.append("guided")
    elif gate is None:
        verdict = "gate unknown"
    elif gate >= 1:
        verdict = "trusted"
    elif gate <= 0:
        verdict = "outlier"
        classes.append("out")
    else:
        verdict = f"trusted by {number(gate)}"
        classes.append("soft")
    facts = ["log-ratio " + _signed(f"{log_ratio:+.2f}")] if log_ratio is not None else []
    tip = escape(", ".join([repr(text), *facts, verdict]))
    shown = escape(text).replace("\n", "↵\n")
    return f'<span class="{" ".join(classes)}"{style} title="{tip}">{shown}</span>'


def _signed(text: str) -> str:
    """With a true minus sign."""
    return text.replace("-", "−")
