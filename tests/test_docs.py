"""Every block of README and docs runs, on the tiny model; what a page quotes is what is computed.

Blocks of a page run in order, in one folder and one namespace. `flexlora ...` goes through the
command line itself, with the demo model replaced by a tiny one and the work cut down; `make` and
`pip` are only looked up.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import shutil
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import yaml
from experiment.small import write_config

from flexlora import cli
from flexlora.experiment import errors
from flexlora.experiment.config import Config
from flexlora.experiment.load import validate
from flexlora.methods import methods
from flexlora.training import models

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
WALKED = {"deploy.md"}
"""Run as written, with real processes, by tests/engines/flower/test_deployment.py."""
ELSEWHERE = {"git", "cd", "source"}
QUICK = {
    "training.max_steps": 1, "evaluation.max_new_tokens": 2, "evaluation.max_generated": 1,
    "federation.rounds": 1,
}  # fmt: skip
PROBLEMS = {"data.train": 8, "data.eval": 1, "data.test": 1}
RANKS = {"lora.types": "[1, 2, 3, 4]"}
"""Cuts: of any run, of reasoning-gym's problems, and of ranks that the tiny model cannot have."""
SILENT = {"text", "bibtex", "json", "toml", "console", "ini", "nginx"}


def blocks(page: Path) -> Iterator[tuple[str, int, str]]:
    """`(language, line, text)` of every fenced block."""
    text = page.read_text(encoding="utf-8")
    for found in re.finditer(r"^```(\S*)[^\n]*\n(.*?)^```$", text, re.M | re.S):
        yield found[1], text[: found.start()].count("\n") + 1, found[2]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_model_dir) -> Path:
    """A run that is done; read only."""
    folder = tmp_path_factory.mktemp("finished")
    config = write_config(folder, tiny_model_dir, lora={"r": {4: 0.75, 8: 0.25}})
    cli.main(["run", str(config), "--output_dir", str(folder / "run"), "--format", "json"])
    return folder / "run"


@pytest.fixture
def folder(tmp_path, monkeypatch, tiny_model_dir, finished) -> Path:
    """Where a reader sits: a finished run, and the tiny model under the demo model's name."""
    find = models.find
    tiny = {models.DEMO_MODEL: str(tiny_model_dir)}
    monkeypatch.setattr(models, "find", lambda name: tiny.get(name) or find(name))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished, tmp_path / "runs" / "quickstart-001")
    hospitals(tmp_path)
    partition(tmp_path)
    return tmp_path


def hospitals(folder: Path) -> None:
    """The four hospitals of docs/settings.md: the page's own YAML, and a file of rows."""
    page = ROOT / "docs" / "settings.md"
    text = next(text for language, _, text in blocks(page) if language == "yaml")
    (folder / "hospitals.yaml").write_text(text)
    rows = [
        {"hospital": hospital, "question": f"What is {i}?", "answer": f"{i}"}
        for hospital in ("north", "south", "east", "west")
        for i in range(10)
    ]
    (folder / "notes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def partition(folder: Path) -> None:
    """A Parquet file with the release's columns: clients enough for a cohort of 80."""
    columns = ("client", "task", "category", "split", "instruction", "input", "output")
    rows = [
        (f"{c}", f"task {c}", f"{c % 5}", split, "Say it.", f"number {c} {split}", f"{c}")
        for c in range(100)
        for split in ("train", "eval", "test")
    ]
    table = pyarrow.table(dict(zip(columns, zip(*rows, strict=True), strict=True)))
    pyarrow.parquet.write_table(table, folder / "natural-instructions-clients.parquet")


@pytest.mark.parametrize(
    "page", [p for p in PAGES if p.name not in WALKED], ids=lambda page: page.name
)
def test_every_block_runs(page, folder):
    names: dict[str, object] = {"__name__": page.stem}
    for language, line, text in blocks(page):
        if language.startswith("{") or language in SILENT:
            continue
        where = f"{page.relative_to(ROOT)}:{line}"
        if language == "python":
            exec(compile(text, where, "exec"), names)
        elif language == "yaml":
            raw = yaml.safe_load(text)
            if raw.keys() & Config.model_fields.keys():
                validate(raw, source=where)
        elif language in ("bash", "shell"):
            for command in text.replace("\\\n", " ").splitlines():
                run(shlex.split(command, comments=True), where)
        else:
            pytest.fail(f"{where}: a block in {language or 'no language'}; this test knows none.")


def cuts(words: list[str]) -> dict[str, object]:
    """Overrides that make a command small, without those that it sets itself."""
    released = any(word.startswith("natural-instructions") for word in words)
    cut = {**QUICK, **(RANKS if released else PROBLEMS)} if words[0] in ("run", "demo") else {}
    cut |= RANKS if released else {}
    return {key: value for key, value in cut.items() if f"--{key}" not in words}


def run(words: list[str], where: str) -> None:
    """One line of a shell block."""
    if not words or words[0] in ELSEWHERE:
        return
    program, rest = words[0], words[1:]
    if program == "flexlora":
        cli.main([*rest, *(w for k, v in cuts(rest).items() for w in (f"--{k}", str(v)))])
    elif program == "make":
        assert re.search(rf"^{rest[0]}:", (ROOT / "Makefile").read_text(), re.M), where
    elif program == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        [extra] = re.findall(r"flexlora\[(\w+)\]", " ".join(rest))
        assert extra in extras["optional-dependencies"], where
    elif program == "python":
        assert (ROOT / rest[0]).is_file(), where
    else:
        pytest.fail(f"{where}: {program!r} is not a command this test knows how to run.")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_pictures_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def script(path: str):
    """A script of the docs as a module."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("figure", ["averaging", "collapse"])
def test_figures_say_what_the_page_quotes(figure, tmp_path):
    pytest.importorskip("matplotlib")
    table = script(f"docs/figures/{figure}.py").main(tmp_path / "figure.svg")
    page = (ROOT / "docs" / "why-svd.md").read_text(encoding="utf-8")
    assert all(line in page.splitlines() for line in table.splitlines())
    assert (tmp_path / "figure.svg").stat().st_size < 100_000


def test_reference_pages_hold_everything_there_is():
    reference = script("docs/_ext/reference.py")
    assert all(part() for part in reference.PARTS.values())
    configuration, verbs = reference.configuration(), reference.verbs()
    for section, field in Config.model_fields.items():
        assert f"`{section}`" in configuration
        for key, inner in getattr(field.annotation, "model_fields", {}).items():
            assert f"`{key}`\n: " in configuration
            assert inner.description, f"{section}.{key} has no description"
    assert all(f"| `{name}` |" in reference.methods() for name in methods)
    for command in cli.app.registered_commands:
        assert f"## `flexlora {command.callback.__name__}`" in verbs


def test_exit_codes_are_those_of_the_program():
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    listed = {int(code) for code in re.findall(r"^\| (\d+) \|", page, re.M)}
    named = (errors.USAGE, errors.DATA, errors.MODEL, errors.RUN, errors.INTERRUPTED)
    assert listed == {0, 1, *named}
