"""`flexlora report`: the page, its style, its tables. What is on it: `run.py`, `comparison.py`."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from flexlora.experiment import runs
from flexlora.experiment.compare.run import RESULT
from flexlora.experiment.errors import RUN, Failure

STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, "DejaVu Sans", sans-serif; color: #1a1a1a; background: #fff;
       max-width: 68rem; margin: 2rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.6rem; margin-bottom: .2rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem;
     border-bottom: 1px solid #ccc; padding-bottom: .2rem; }
p, li { max-width: 48rem; } .lead { color: #444; margin-top: 0; }
table { border-collapse: collapse; font-size: .86rem; margin: .8rem 0; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #ddd; text-align: right; }
th:first-child, td:first-child { text-align: left; } th { border-bottom: 2px solid #888;
     vertical-align: bottom; } td { font-variant-numeric: tabular-nums; white-space: nowrap; }
.wide { overflow-x: auto; } .charts { display: flex; flex-wrap: wrap; gap: 1rem; }
figure { margin: .6rem 0; break-inside: avoid; } svg { max-width: 100%; height: auto; }
pre { background: #f5f5f5; padding: .8rem; font-size: .8rem; white-space: pre-wrap; }
summary { cursor: pointer; margin: .6rem 0; }
@media print { body { margin: 0; max-width: none; } details > pre { display: block; }
     h2 { break-after: avoid; } }
"""


def write_report(folder: Path, to: Path | None = None) -> str:
    """Write the report of a run or of a comparison; returns where it is.

    Args:
        folder: of either.
        to: the file; default `report.html` in the folder. An earlier one is replaced.

    Raises:
        Failure: neither a run nor a comparison, or nothing finished in it yet.
    """
    from flexlora.experiment.report.comparison import comparison_page
    from flexlora.experiment.report.run import run_page

    if (folder / RESULT).is_file():
        page = comparison_page(folder)
    elif (folder / "comparison.yaml").is_file():
        raise Failure(
            f"{folder}: no seed of this comparison is complete yet; the command that started it "
            "goes on.",
            RUN,
        )
    elif (folder / "config.yaml").is_file():
        page = run_page(folder)
    else:
        raise Failure(
            f"{folder} is neither a run nor a comparison: it has no config.yaml and no "
            "comparison.yaml.",
            RUN,
        )
    to = to or folder / "report.html"
    runs.write(to, page)
    return str(to)


def page(title: str, lead: str, parts: Sequence[str]) -> str:
    """A whole HTML document that needs nothing but itself."""
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style>'
    body = f'<h1>{escape(title)}</h1>\n<p class="lead">{escape(lead)}</p>\n' + "\n".join(parts)
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>'


def section(title: str, *parts: str) -> str:
    """A heading and what is under it; nothing where there is nothing."""
    inside = "\n".join(p for p in parts if p)
    return f"<h2>{escape(title)}</h2>\n{inside}" if inside else ""


def paragraph(text: str) -> str:
    """Plain text."""
    return f"<p>{escape(text)}</p>"


def items(texts: Sequence[str]) -> str:
    """A list of plain texts."""
    return "<ul>" + "".join(f"<li>{escape(t)}</li>" for t in texts) + "</ul>" if texts else ""


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Plain text in cells; the first column names the row."""
    if not rows:
        return ""
    head = "".join(f"<th>{escape(h).replace('/', '/<wbr>')}</th>" for h in heads)
    body = "\n".join(
        "<tr>" + "".join(f"<td>{escape(c)}</td>" for c in row) + "</tr>" for row in rows
    )
    whole = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="wide">{whole}</div>'


def figures(*charts: str) -> str:
    """Charts side by side where there is room."""
    drawn = "\n".join(f"<figure>{chart}</figure>" for chart in charts if chart)
    return f'<div class="charts">{drawn}</div>' if drawn else ""


def folded(title: str, text: str) -> str:
    """Long text that is closed at first."""
    return f"<details><summary>{escape(title)}</summary><pre>{escape(text)}</pre></details>"
