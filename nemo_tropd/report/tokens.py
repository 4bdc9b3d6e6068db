"""Rollouts as the page shows them: tokens coloured by log-ratio and marked by the trust gate."""

from collections.abc import Sequence
from dataclasses import dataclass

from nemo_tropd.report.records import TokenTrace
from nemo_tropd.report.text import number, signed

FULL_COLOR_AT = 4.0  # nats of log-ratio
_TOKENS_SHOWN = 600
_ROLLOUTS_SHOWN = 12


@dataclass(frozen=True)
class Token:
    """A token's text, CSS classes, strength of colour (empty if it has none) and the values shown on hover."""

    text: str
    classes: str
    share: str = ""
    tip: str = ""


@dataclass(frozen=True)
class Rollout:
    """``facts`` sums the rollout up; ``rest`` says what is left out, empty if nothing is."""

    step: int
    facts: str
    prompt: str
    tokens: list[Token]
    rest: str


def swatches() -> list[Token]:
    """The legend of the colours."""
    shown = []
    for value in (-4.0, -2.0, -1.0, 1.0, 2.0, 4.0):
        bound = "" if abs(value) < FULL_COLOR_AT else "≤ " if value < 0 else "≥ "
        shown.append(Token(bound + signed(f"{value:+g}"), *_color(value)))
    return shown


def shown_rollouts(rollouts: Sequence[TokenTrace]) -> list[Rollout]:
    """The last rollout first; at most 12, of the first and last steps and of some between."""
    ordered = sorted(rollouts, key=lambda r: r.step)
    if len(ordered) > _ROLLOUTS_SHOWN:
        ordered = [ordered[round(i * (len(ordered) - 1) / (_ROLLOUTS_SHOWN - 1))] for i in range(_ROLLOUTS_SHOWN)]
    return [_rollout(r) for r in reversed(ordered)]


def _rollout(r: TokenTrace) -> Rollout:
    own = [i for i, guided in enumerate(r.guided) if not guided]
    known = [v for i in own if (v := r.log_ratio[i]) is not None]
    facts = [f"{len(own)} tokens", f"{sum(r.gate[i] == 0 for i in own)} outliers"]
    if known:
        facts.append("mean log-ratio " + signed(f"{sum(known) / len(known):+.2f}"))
    if len(own) < len(r.tokens):
        facts.insert(0, f"{len(r.tokens) - len(own)} by the teacher")
    columns = zip(r.tokens, r.log_ratio, r.gate, r.guided, strict=True)
    tokens = [_token(*column) for column, _ in zip(columns, range(_TOKENS_SHOWN), strict=False)]
    rest = f"The first {_TOKENS_SHOWN} of {len(r.tokens)} tokens." if len(r.tokens) > _TOKENS_SHOWN else ""
    return Rollout(r.step, ", ".join(facts), r.prompt, tokens, rest)


def _token(text: str, log_ratio: float | None, gate: float | None, guided: bool) -> Token:
    classes, share = _color(None if guided else log_ratio)
    if guided:
        mark, verdict = " guided", "written by the teacher"
    elif gate is None or gate >= 1:
        mark, verdict = "", "gate unknown" if gate is None else "trusted"
    else:
        mark, verdict = (" out", "outlier") if gate <= 0 else (" soft", f"trusted by {number(gate)}")
    facts = ["log-ratio " + signed(f"{log_ratio:+.2f}")] if log_ratio is not None else []
    return Token(text.replace("\n", "↵\n"), classes + mark, share, ", ".join([repr(text), *facts, verdict]))


def _color(log_ratio: float | None) -> tuple[str, str]:
    """CSS classes and strength of colour."""
    if log_ratio is None:
        return "t", ""
    return "t neg" if log_ratio < 0 else "t pos", f"{min(abs(log_ratio) / FULL_COLOR_AT, 1.0):.2f}"
