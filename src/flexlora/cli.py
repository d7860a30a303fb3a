"""The command line: verbs only. Everything heavy is imported inside a verb, so that help is quick.

Exit codes: 0 done; 1 a bug; 2 command line or configuration; 3 data; 4 base model or adapter;
5 run directory or disk; 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NoReturn

from flexlora.experiment.errors import INTERRUPTED, USAGE, Failure, missing, nearest

ABOUT = "Federated LoRA fine-tuning of language models, every client at the rank it can afford."
CODES = (
    "Any verb takes --debug: show the traceback of an error. Exit codes: 0 done, 1 a bug, 2 "
    "command line or configuration, 3 data, 4 base model or adapter, 5 run directory or disk, 130 "
    "interrupted."
)
OVERRIDES = "Anything in the configuration can be set: --training.learning_rate 5e-5."

Format = Literal["text", "json"]


@dataclass(frozen=True)
class Word:
    """One argument of a verb: its name, what help says of it, and how it is read."""

    name: str
    help: str
    kind: Callable[[str], Any] | None = None
    choices: tuple[str, ...] | None = None
    default: Any = None
    optional: bool = False

    def add(self, parser: argparse.ArgumentParser) -> None:
        """Teach it to a parser."""
        told = self.help if self.default is None else f"{self.help} Default: {self.default}."
        if self.kind is bool:
            parser.add_argument(self.name, action="store_true", help=told)
            return
        rest: dict[str, Any] = {"choices": self.choices, "default": self.default}
        rest |= {"type": self.kind or str, "help": told}
        if not self.name.startswith("-"):
            rest |= {"metavar": self.name.upper()} | ({"nargs": "?"} if self.optional else {})
        elif self.choices is None:
            rest["metavar"] = "FILE" if self.kind is Path else "NUMBER"
        parser.add_argument(self.name, **rest)


RECIPE = Word("recipe", "A YAML file, or a shipped recipe such as quickstart.")
COMPARISON = Word("recipe", "A YAML file, or a shipped recipe such as compare-ranks-cpu.")
RUN = Word("run", "The directory of a run.", Path)
FORMAT = Word(
    "--format", "json: one object on the last line of stdout.", None, ("text", "json"), "text"
)


def run(recipe: str, format: Format, overrides: Sequence[str]) -> None:
    """Run a federated fine-tuning."""
    from flexlora.experiment.load import load_config
    from flexlora.experiment.run import start

    config = load_config(recipe, overrides)
    with _console(format) as console:
        summary = start(config, Path(recipe).stem, console)
    _finish(summary, format)


def resume(run: Path, format: Format) -> None:
    """Continue a run that was stopped or killed, exactly where its last checkpoint is."""
    from flexlora.experiment.run import proceed

    with _console(format) as console:
        summary = proceed(run, console)
    _finish(summary, format)


def status(run: Path, format: Format) -> None:
    """Where a run stands: rounds, who is connected, ranks, bytes, who was refused."""
    from flexlora.experiment.status import describe, status

    _print(status(run), format, describe)


def demo(format: Format, overrides: Sequence[str]) -> None:
    """Run the recipe quickstart: a 135M model, reasoning tasks, minutes on two CPU cores."""
    run("quickstart", format, overrides)


def plan(recipe: str, format: Format, overrides: Sequence[str]) -> None:
    """What a run will be before it starts: clients, ranks, parameters, memory, bytes, time."""
    from flexlora.experiment.load import load_config
    from flexlora.experiment.plan import describe, make_plan

    _print(make_plan(load_config(recipe, overrides)), format, describe)


def validate(recipe: str, format: Format, overrides: Sequence[str]) -> None:
    """Check a configuration, its ranks and its data; print what seen and unseen clients share."""
    from flexlora.experiment.load import load_config
    from flexlora.experiment.validate import check, describe

    _print(check(load_config(recipe, overrides)), format, describe)


def evaluate(run: Path, adapter: Path | None, split: Any, format: Format) -> None:
    """Measure a run's adapter, or any other, on the run's seen and unseen clients."""
    from flexlora.experiment.evaluation import describe, evaluate_run

    with _console(format) as console:
        found = evaluate_run(run, adapter, split, console)
    _print(found, format, describe)


def export(run: Path, to: Path, rank: int | None, energy: float | None, merged: bool) -> None:
    """Write the global adapter as a PEFT folder, at any rank, or merged into the model."""
    from flexlora.experiment.export import export_run

    print(export_run(run, to, rank, energy, merged))


def compare(recipe: str, format: Format, overrides: Sequence[str]) -> None:
    """Run methods x ranks x settings x seeds, each cell resumable, and test the differences."""
    from flexlora.experiment.compare.grid import load_comparison
    from flexlora.experiment.compare.run import compare

    comparison = load_comparison(recipe, overrides)
    folder = Path(comparison.output_dir or Path("comparisons") / Path(recipe).stem)
    with _console(format) as console:
        found = compare(comparison, folder, console)
    _finish(found, format)


def report(dir: Path, to: Path | None) -> None:
    """Write one self-contained HTML file about a run or a comparison; it needs no network."""
    from flexlora.experiment.report.page import write_report

    print(write_report(dir, to))


def methods(name: str | None, format: Format) -> None:
    """List the methods with what is true of each, data loaders, rank plans and trackers."""
    from flexlora.experiment.catalogue import catalogue, describe, describe_method, one_method

    if name is None:
        _print(catalogue(), format, describe)
    else:
        _print(one_method(name), format, describe_method)


def schema() -> None:
    """Print the JSON schema of the configuration."""
    from flexlora.experiment.config import Config

    print(json.dumps(Config.model_json_schema(), indent=2))


VERBS: dict[Callable[..., None], tuple[Word, ...]] = {
    run: (RECIPE, FORMAT),
    resume: (RUN, FORMAT),
    status: (RUN, FORMAT),
    demo: (FORMAT,),
    plan: (RECIPE, FORMAT),
    validate: (RECIPE, FORMAT),
    evaluate: (
        RUN,
        Word("--adapter", "A PEFT folder instead of the run's own adapter.", Path),
        Word("--split", "Which of the clients' examples.", None, ("train", "eval", "test"), "test"),
        FORMAT,
    ),
    export: (
        RUN,
        Word("to", "Folder to write; it must not exist.", Path),
        Word("--rank", "Rank of every module.", int),
        Word("--energy", "Smallest rank that keeps this share of every update.", float),
        Word("--merged", "The whole model with the update merged in.", bool),
    ),
    compare: (COMPARISON, FORMAT),
    report: (
        Word("dir", "Of a run or of a comparison.", Path),
        Word("--to", "File to write. Default: report.html in DIR.", Path),
    ),
    methods: (Word("name", "Show one method in full.", optional=True), FORMAT),
    schema: (),
}
"""Every verb with its arguments. One whose function takes `overrides` takes any `--a.b value`."""


class Parser(argparse.ArgumentParser):
    """Errors are one message and exit code 2, like every other error."""

    def error(self, message: str) -> NoReturn:
        """What argparse calls.

        Raises:
            Failure: always.
        """
        raise Failure(f"{message}; see {self.prog} --help", USAGE)


def parsers() -> tuple[Parser, dict[str, Parser]]:
    """The program's parser, and that of every verb."""
    top = Parser(prog="flexlora", description=ABOUT, epilog=CODES, allow_abbrev=False)
    top.add_argument("--version", action="store_true", help="print the version and exit")
    verbs = top.add_subparsers(metavar="VERB", dest="verb", title="verbs")
    found = {}
    for verb, words in VERBS.items():
        name, told = verb.__name__, verb.__doc__
        epilog = OVERRIDES if "overrides" in verb.__annotations__ else None
        parser = found[name] = verbs.add_parser(
            name,
            help=told,
            description=told,
            epilog=epilog,
            allow_abbrev=False,
            formatter_class=partial(argparse.HelpFormatter, max_help_position=30),
        )
        for word in words:
            word.add(parser)
    return top, found


def dispatch(words: Sequence[str]) -> None:
    """Do what a command line says.

    Raises:
        Failure: a word that nobody knows, or what the verb refuses.
    """
    known = {verb.__name__: verb for verb in VERBS}
    if words and not words[0].startswith("-") and words[0] not in known:
        raise Failure(f"no verb {words[0]!r}; {nearest(words[0], known)}")
    top, _ = parsers()
    options, rest = top.parse_known_args(words)
    given = vars(options)
    name, version = given.pop("verb"), given.pop("version")
    if version:
        from importlib.metadata import version as version_of

        print(f"flexlora {version_of('flexlora')}")
    elif name is None:
        if rest:
            top.error(f"unknown option {rest[0]!r}")
        top.print_help()
    elif "overrides" in known[name].__annotations__:
        known[name](**given, overrides=rest)
    elif rest:
        raise Failure(f"{name} takes no {' '.join(rest)!r}; see flexlora {name} --help")
    else:
        known[name](**given)


def _console(format: Format) -> Any:
    """Where people read: stdout, or stderr when a program reads stdout."""
    from flexlora.experiment.console import Console

    return Console(sys.stderr if format == "json" else sys.stdout)


def _finish(summary: dict[str, Any], format: Format) -> None:
    if format == "json":
        print(json.dumps(summary))


def _print(found: Any, format: Format, describe: Callable[[Any], str]) -> None:
    print(json.dumps(found) if format == "json" else describe(found))


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: errors become one message and an exit code; `--debug` shows the traceback."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    try:
        dispatch([w for w in words if w != "--debug"])
    except Failure as error:
        _stop(str(error), error.code, debug)
    except KeyboardInterrupt:
        _stop("interrupted; flexlora resume RUN goes on from the last checkpoint", INTERRUPTED)
    except ModuleNotFoundError as error:
        _stop(f"{error}. {missing(error.name or '')}", 1, debug)
    except Exception as error:
        advice = (
            "This is a bug in flexlora; please report it with the traceback that --debug shows."
        )
        _stop(f"{type(error).__name__}: {error}\n{advice}", 1, debug)


def _stop(message: str, code: int, debug: bool = False) -> None:
    if debug:
        traceback.print_exc()
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(code)
