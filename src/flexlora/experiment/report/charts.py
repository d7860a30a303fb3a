"""Charts as SVG text: colours that the colour-blind tell apart, and markers that print shows."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from typing import Any

from flexlora.experiment.errors import USAGE, Failure

OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8a7f00")
"""Okabe and Ito, Color Universal Design, 2008; its yellow darkened for white paper."""
MARKERS, DASHES = "os^Dv<>p", ("-", "--", "-.", ":")
Line = Sequence[tuple[float, float]]
_number = count()


def lines(
    series: Mapping[str, Line], title: str, x: str, y: str, *, log: str = "", note: str = ""
) -> str:
    """A line per series, each with its own colour and marker.

    Args:
        series: label -> points in order.
        title: of the chart.
        x: axis label with its unit.
        y: likewise.
        log: axes on a logarithmic scale, of `x` and `y`.
        note: under the title.

    Raises:
        Failure: matplotlib is absent.
    """

    def draw(axes: Any) -> None:
        for i, (label, points) in enumerate(series.items()):
            style = {"color": OKABE_ITO[i % 8], "marker": MARKERS[i % 8], "ls": DASHES[i // 8 % 4]}
            across, up = zip(*points, strict=True)
            every = max(1, len(points) // 12)
            axes.plot(across, up, label=label, lw=1.6, ms=4.5, markevery=every, **style)
        for axis in log:
            getattr(axes, f"set_{axis}scale")("log")
        if "x" not in log and all(float(p[0]).is_integer() for s in series.values() for p in s):
            axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(axis="y", alpha=0.3)

    return _svg(draw, title, x, y, note, legend=len(series))


def bars(values: Mapping[str, float], title: str, x: str, *, note: str = "") -> str:
    """A horizontal bar per label, from 0; the first label is on top."""

    def draw(axes: Any) -> None:
        labels = list(values)[::-1]
        numbers = [values[label] for label in labels]
        colours = [OKABE_ITO[0] if n >= 0 else OKABE_ITO[1] for n in numbers]
        drawn = axes.barh(labels, numbers, color=colours, height=0.65)
        axes.bar_label(drawn, fmt="%.3g", padding=3, fontsize=8)
        axes.axvline(0, color="#444", lw=0.8)
        axes.margins(x=0.14)

    return _svg(draw, title, x, "", note, height=max(1.6, 0.28 * len(values) + 1.1))


def intervals(
    found: Mapping[str, tuple[float, float, float]], margin: float, title: str, x: str, note: str
) -> str:
    """Means with their intervals, and the band within which a difference counts as none."""

    def draw(axes: Any) -> None:
        labels = list(found)[::-1]
        axes.axvspan(-margin, margin, color="#000000", alpha=0.08, lw=0, label="margin")
        axes.axvline(0, color="#444", lw=0.8)
        for i, label in enumerate(labels):
            mean, low, high = found[label]
            span = [[mean - low], [high - mean]]
            axes.errorbar(mean, i, xerr=span, fmt="o", color=OKABE_ITO[0], capsize=4, ms=5)
        axes.set_yticks(range(len(labels)), labels)
        axes.set_ylim(-0.6, len(labels) - 0.4)

    return _svg(draw, title, x, "", note, legend=1, height=max(1.8, 0.34 * len(found) + 1.2))


def _svg(
    draw: Callable[[Any], None], title: str, x: str, y: str, note: str = "", *,
    legend: int = 0, height: float = 3.2,
) -> str:  # fmt: skip
    try:
        import matplotlib
    except ImportError as error:
        message = 'a report needs matplotlib: pip install "flexlora[plots]"'
        raise Failure(message, USAGE) from error
    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    number = next(_number)
    settings: dict[Any, Any] = {
        **dict.fromkeys(("axes.spines.top", "axes.spines.right"), False),
        "svg.fonttype": "none",
        "svg.hashsalt": f"chart-{number}",
        "font.size": 9.5,
    }
    with matplotlib.rc_context(settings):
        beside = legend > 6
        figure, axes = plt.subplots(
            figsize=(7.6 if beside else 5.2, max(height, 0.2 * legend + 0.5)), layout="constrained"
        )
        draw(axes)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.set_title(
            title[:1].upper() + title[1:] + (f"\n{note}" if note else ""), loc="left", fontsize=10.5
        )
        if legend:
            where: dict[str, Any] = (
                {"loc": "center left", "bbox_to_anchor": (1.01, 0.5)} if beside else {}
            )
            axes.legend(frameon=False, fontsize=8.5, **where)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
        plt.close(figure)
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r' id="(?:figure|axes|patch|line2d|matplotlib|text|xtick|ytick|legend|[A-Za-z]+'
                  r'Collection)[._]?\w*"', "", text)  # fmt: skip
    return text.replace("<svg ", f'<svg role="img" aria-label="{_attribute(title)}" ', 1)


def _attribute(text: str) -> str:
    return text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
