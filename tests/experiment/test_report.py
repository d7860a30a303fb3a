"""The report: one file, nothing from outside, nothing claimed that no test supports."""

import re
from html.parser import HTMLParser

import pytest
from experiment.small import write_config
from experiment.test_compare import call, write

from flexlora.experiment.report.charts import bars, intervals, lines


@pytest.fixture(scope="module")
def pages(tmp_path_factory, tiny_model_dir):
    """A run's report and a comparison's."""
    folder = tmp_path_factory.mktemp("report")
    call("run", write_config(folder, tiny_model_dir), "--output_dir", folder / "run")
    call("compare", write(folder, tiny_model_dir), "--output_dir", folder / "grid")
    for name in ("run", "grid"):
        assert call("report", folder / name) == 0
    return {name: (folder / name / "report.html").read_text() for name in ("run", "grid")}


class Balanced(HTMLParser):
    """Every tag that opens closes."""

    VOID = ("meta", "wbr", "br", "path", "use", "rect")

    def __init__(self):
        super().__init__()
        self.open, self.counts = [], {}

    def handle_starttag(self, tag, attrs):
        self.counts[tag] = self.counts.get(tag, 0) + 1
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


@pytest.mark.parametrize("name", ["run", "grid"])
def test_one_file_that_needs_no_network(pages, name):
    page = pages[name]
    parser = Balanced()
    parser.feed(page)
    assert parser.open == []
    assert parser.counts["svg"] >= 2
    assert not re.search(r'(src|href)="(?!#)', page.replace("xlink:href", "xhref"))
    assert "<script" not in page
    assert "@import" not in page
    ids = re.findall(r'\sid="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_a_run_s_page_holds_what_it_should(pages):
    for title in ("Before and after", "Learning", "Gain by category", "Who had which rank",
                  "What the global update holds", "Costs", "Configuration"):  # fmt: skip
        assert f"<h2>{title}</h2>" in pages["run"]
    assert "nats per answer token" in pages["run"]
    assert "uploaded by all clients (MB)" in pages["run"]
    assert "One run of one seed describes" in pages["run"]


def test_a_comparison_s_page_concludes_nothing_from_one_seed(pages):
    page = pages["grid"]
    assert "no conclusion: 1 seed; a conclusion takes at least 3" in page
    assert " is better than " not in page
    assert "fedsa-lora/homogeneous: federation: method" in page
    for title in ("What to conclude", "Scores", "Costs of a run", "Equal budgets", "Refused"):
        assert f"<h2>{title}</h2>" in page


def test_bad_folders(tmp_path, capsys):
    assert call("report", tmp_path) == 5
    assert "neither a run nor a comparison" in capsys.readouterr().err
    (tmp_path / "comparison.yaml").write_text("{}")
    assert call("report", tmp_path) == 5
    assert "no seed of this comparison is complete" in capsys.readouterr().err


def test_charts_name_their_axes_and_escape_labels():
    chart = lines(
        {f"a<{i}": [(0, 1.0), (1, 0.5)] for i in range(9)}, "t & u", "round", "loss (nats)"
    )
    assert 'aria-label="T &amp; u"' in chart or 'aria-label="t &amp; u"' in chart
    assert "a&lt;1" in chart
    assert "loss (nats)" in chart
    assert "0.3" in bars({"x": 0.3, "y": -0.1}, "gains", "nats")
    assert "margin" in intervals({"x": (0.0, -1.0, 1.0)}, 0.1, "d", "nats", "to y")
