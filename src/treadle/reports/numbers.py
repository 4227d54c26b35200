"""Numbers as a reader wants them: three significant digits and a unit."""

from __future__ import annotations

from treadle.core.results import Figure

SCALES = ((1e9, "G"), (1e6, "M"), (1e3, "k"))


def percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def points(share: float) -> str:
    """A difference of two shares, signed."""
    return f"{100 * share:+.1f}".replace("-", "−")


def plain(value: float) -> str:
    """Three significant digits, grouped, without an exponent where one can do without."""
    if value == 0 or abs(value) < 1e-4 or abs(value) >= 1e9:
        return f"{value:.3g}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def figure(measured: Figure) -> str:
    """Its value, in its unit."""
    value, unit = measured["value"], measured["unit"]
    if unit == "accuracy":
        return percent(value)
    if unit == "bits/byte":
        return f"{value:.3f}"
    if unit == "perplexity" and value < 1000:
        return f"{value:.2f}" if value < 100 else f"{value:.1f}"
    return plain(value)


def interval(measured: Figure) -> str:
    """The 95% interval, or nothing."""
    low, high = measured["low"], measured["high"]
    if low is None or high is None:
        return ""
    if measured["unit"] == "accuracy":
        return f"{100 * low:.1f}–{100 * high:.1f}%"
    ends: list[Figure] = [{**measured, "value": low}, {**measured, "value": high}]
    return "–".join(map(figure, ends))


def count(value: float) -> str:
    """134,515,008 -> 134.5 M."""
    for scale, letter in SCALES:
        if abs(value) >= scale:
            return f"{value / scale:.1f} {letter}"
    return f"{value:,.0f}"


def size(value: float) -> str:
    """Bytes, in powers of ten."""
    for scale, letter in SCALES:
        if abs(value) >= scale:
            return f"{value / scale:.3g} {letter}B"
    return f"{value:.0f} B"


def duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.3g} s"
    minutes = seconds / 60
    if minutes < 100:
        return f"{minutes:.1f} min"
    hours, rest = divmod(round(minutes), 60)
    return f"{hours} h {rest:02d} min"


def energy(joules: float) -> str:
    hours = joules / 3600
    return f"{plain(hours / 1000)} kWh" if hours >= 1000 else f"{plain(hours)} Wh"
