"""Numbers as the report writes them."""

import math


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
