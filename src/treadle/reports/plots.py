"""Plots as inline SVG that takes its colours and its type from the page around it.

Matplotlib draws with stand-in colours; each becomes a CSS variable of the page, so that one
drawing reads well on light, on dark and on paper.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from xml.etree import ElementTree

from treadle.core.errors import TreadleError
from treadle.reports import numbers

SVG = "http://www.w3.org/2000/svg"
XLINK = "{http://www.w3.org/1999/xlink}href"
INK, LINE, RAW, ACCENT, QUIET = "#010203", "#010204", "#010205", "#010206", "#010207"
COLOURS = {
    INK: "currentColor",
    LINE: "var(--line)",
    RAW: "var(--raw)",
    ACCENT: "var(--accent)",
    QUIET: "var(--quiet)",
}
STYLE = {
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": LINE,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "font.size": 9.0,
    "axes.formatter.use_mathtext": False,
    "axes.unicode_minus": True,
    "text.parse_math": False,
    "svg.fonttype": "none",
    "lines.markersize": 5,
}
WIDTH, HEIGHT = 3.3, 1.95
"""Inches of a panel; panels stand side by side on a wide screen, below each other on a phone."""
_FONT = re.compile(r"font-size: ([\d.]+px); font-family: [^;]*|font: ([\d.]+px) [^;]*")


def curve_plot(curve: Mapping[str, Any], *, key: str) -> str:
    """A metric over the steps: raw in the background, smoothed in front."""
    steps, values, smoothed = curve["steps"], curve["values"], curve["smoothed"]
    ends = smoothed or values

    def paint(axes: Any) -> None:
        if smoothed:
            axes.plot(steps, values, color=RAW, linewidth=0.8)
        axes.plot(steps, ends, color=ACCENT, linewidth=1.6, marker="o" * (len(steps) < 10))
        axes.margins(x=0.02, y=0.08)
        if curve["metric"] == "lr":
            axes.set_ylim(bottom=0)
        axes.locator_params(axis="y", nbins=5)
        axes.locator_params(axis="x", nbins=5, integer=True)
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 4))

    label = (
        f"{curve['metric']} over {steps[-1]} steps, from {numbers.plain(ends[0])} "
        f"to {numbers.plain(ends[-1])}"
    )
    return _svg(paint, HEIGHT, label, key)


def interval_plot(rows: Sequence[Mapping[str, Any]], *, title: str, unit: str, key: str) -> str:
    """A result of each stage with its interval; `rows` have subject, baseline, figure."""
    factor = 100.0 if unit == "accuracy" else 1.0

    def paint(axes: Any) -> None:
        for place, row in enumerate(rows):
            value, low, high = (row["figure"][name] for name in ("value", "low", "high"))
            colour = QUIET if row["baseline"] else ACCENT
            face = "none" if row["baseline"] else colour
            if low is not None and high is not None:
                axes.plot([factor * low, factor * high], [place] * 2, color=colour, linewidth=2)
            dot = {"color": colour, "markerfacecolor": face, "clip_on": False}
            axes.plot([factor * value], [place], "o", **dot)
        axes.set_yticks(range(len(rows)), [row["subject"] for row in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.grid(axis="y", visible=False)
        axes.locator_params(axis="x", nbins=5)
        if unit == "accuracy":
            axes.set_xlim(left=0)
            axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}%")

    told = ", ".join(f"{row['subject']} {numbers.figure(row['figure'])}" for row in rows)
    return _svg(paint, 0.5 + 0.28 * len(rows), f"{title}: {told}", key)


def _svg(paint: Callable[[Any], None], height: float, label: str, key: str) -> str:
    """What `paint` draws, as an `svg` element; `key` keeps its ids apart from other drawings'."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError:
        raise TreadleError("a report needs matplotlib: pip install 'treadle[report]'") from None
    out = io.StringIO()
    style: Any = {**STYLE, "svg.hashsalt": key}
    with rc_context(style):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        paint(figure.add_subplot())
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    ElementTree.register_namespace("", SVG)
    root = ElementTree.fromstring(out.getvalue())
    _adapt(root)
    root.set("role", "img")
    root.set("aria-label", label)
    return ElementTree.tostring(root, encoding="unicode")


def _adapt(root: ElementTree.Element) -> None:
    """Leave what inline SVG needs, in the page's colours and type: no fixed size, no style for
    the whole page, no id that nothing refers to."""
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    root[:] = [
        e for e in root if e.tag != f"{{{SVG}}}metadata" and e.find(f"{{{SVG}}}style") is None
    ]
    used = set(re.findall(r"#([\w-]+)", ElementTree.tostring(root, encoding="unicode")))
    for element in root.iter():
        if element.get("id") not in used:
            element.attrib.pop("id", None)
        if XLINK in element.attrib:
            element.set("href", element.attrib.pop(XLINK))
        if style := element.get("style"):
            style = _FONT.sub(r"font-size: \1\2", style)
            for stand_in, colour in COLOURS.items():
                style = style.replace(stand_in, colour)
            element.set("style", style)
