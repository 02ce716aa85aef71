"""Numbers as a person reads them."""

from __future__ import annotations

import math

SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
DASH = "–"  # where there is no number
STAY = "\u00a0"  # a space that no line ends at, between a number and its unit


def number(value: float | None, digits: int = 3) -> str:
    """A number with so many significant digits: 1,230 or 0.0123, and 1.23·10⁻⁵ where zeros would have to be counted."""
    if value is None or math.isnan(value):
        return DASH
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    mantissa, _, exponent = f"{value:.{digits}g}".partition("e")
    if exponent.startswith("+"):
        return f"{value:,.0f}".replace("-", "−")
    text = f"{mantissa}·10{str(int(exponent)).translate(SUPERSCRIPTS)}" if exponent else mantissa
    return text.replace("-", "−")


def percent(share: float) -> str:
    """A share of 0 to 1 in percent; neither all nor nothing is said of what only comes near to it."""
    value = 100 * share
    if value in (0.0, 100.0):
        return f"{value:.0f}{STAY}%"
    if value < 0.1:
        return f"less than 0.1{STAY}%"
    if value > 99.9:
        return f"more than 99.9{STAY}%"
    return f"{value:.0f}{STAY}%" if 10 <= value <= 90 else f"{value:.1f}{STAY}%"


def megabytes(size: int) -> str:
    """A size of a file, in kB or MB."""
    return f"{size / 1e3:,.1f}{STAY}kB" if size < 1e6 else f"{size / 1e6:,.2f}{STAY}MB"


def tenths(value: float) -> str:
    """Percent of a loss, to a tenth where it is small: 0.4 %, 17 %."""
    text = f"{value:.1f}" if abs(value) < 9.95 else f"{value:.0f}"
    return f"{'0.0' if text == '-0.0' else text.replace('-', '−')}{STAY}%"


def sentence(text: str) -> str:
    """Text with a capital at its start."""
    return text[:1].upper() + text[1:]


def counted(count: int, what: str) -> str:
    """`1 layer`, `2 layers`."""
    return f"{count:,} {what}" if count == 1 else f"{count:,} {what}s"


def seconds(value: float) -> str:
    """A duration: 0.05 s, 12 s, 3 min 20 s."""
    if value < 60:
        return f"{value:.2f}{STAY}s" if value < 9.95 else f"{value:.0f}{STAY}s"
    whole = round(value)
    return f"{whole // 60:,}{STAY}min {whole % 60}{STAY}s"
