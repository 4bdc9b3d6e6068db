"""Numbers as the report writes them."""

import math
from collections.abc import Iterator, Mapping


def number(value: float) -> str:
    """Human-readable: three significant digits, no trailing zeros."""
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


def signed(text: str) -> str:
    """``text`` with a true minus sign."""
    return text.replace("-", "−")


def change(old: float, new: float) -> str:
    """The relative change in percent, or the difference if ``old`` is 0."""
    if new == old:
        return "none"
    return signed(f"{(new - old) / abs(old):+.0%}" if old else f"{new - old:+.3g}")


def change_in_points(old: float, new: float) -> str:
    """The difference of two shares in percentage points."""
    return signed(f"{100 * (new - old):+.0f} points") if new != old else "none"


def headline(before: Mapping[str, float], after: Mapping[str, float]) -> Iterator[str]:
    """How far the student has come towards its teacher, in sentences; of what both have measured."""
    if (old := before.get("forward_kl")) and (new := after.get("forward_kl")) is not None:
        closed = f"closed {1 - new / old:.0%} of its gap" if new < old else "did not come closer"
        yield f"The student {closed} to the teacher, in forward KL on the teacher's answers."
    if (old := before.get("top1_agreement")) is not None and (new := after.get("top1_agreement")) is not None:
        yield f"Its most probable token is the teacher's for {new:.0%} of them (before: {old:.0%})."
    for key in benchmarks(before):
        if key in after:
            was, now, goal = before[key], after[key], after.get(f"{key}/teacher")
            teacher = "" if goal is None else f"; the teacher: {goal:.0%}"
            if goal is not None and goal > was:
                teacher += f", {signed(f'{(now - was) / (goal - was):.0%}')} of that gap closed"
            yield f"{key.partition('/')[2]}: {was:.0%} right before, {now:.0%} after{teacher}."


def answers_counted(before: Mapping[str, float], after: Mapping[str, float], share: str) -> str:
    """Of how many answers a metric is the share of right ones, in parentheses; "" if nothing says it. Each sample of a
    prompt is one."""
    key = f"{share}/of" if share.startswith("benchmark/") else f"{share}_of"
    was, now = before.get(key), after.get(key)
    if was is not None and now is not None and was != now:
        return f" ({was:.0f} answers before, {now:.0f} after)"
    count = was if now is None else now
    return "" if count is None else f" ({count:.0f} answers)"


def benchmarks(metrics: Mapping[str, float]) -> list[str]:
    """The metrics that are a benchmark's share of right answers: benchmark/NAME."""
    return [key for key in metrics if key.startswith("benchmark/") and key.count("/") == 1]
