"""The command line: verbs only. Everything heavy is imported inside a verb, so that help is quick.

Exit codes: 0 done; 1 a bug; 2 command line or configuration; 3 data; 4 base model or adapter;
5 run directory or disk; 130 interrupted.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    help="Federated LoRA fine-tuning of language models, every client at the rank it can afford.",
    epilog="Any verb takes --debug: show the traceback of an error. Exit codes: 0 done, 1 a bug, "
    "2 command line or configuration, 3 data, 4 base model or adapter, 5 run directory or disk, "
    "130 interrupted.",
    add_completion=False,
    suggest_commands=False,  # click does
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="rich",
)

OVERRIDES: dict[str, Any] = {
    "context_settings": {"allow_extra_args": True, "ignore_unknown_options": True},
    "epilog": "Anything in the configuration can be set: --training.learning_rate 5e-5.",
}
"""What such a verb does not know is an override of the configuration, `--section.key value`."""


class Split(StrEnum):
    """A part of a client's examples."""

    train = "train"
    eval = "eval"
    test = "test"


class Format(StrEnum):
    """How results are printed."""

    text = "text"
    json = "json"


# What arguments mean stands in the verbs' docstrings: typer below 0.21, which flwr asks for, loses
# the help of an argument on click 8.4 and later.
Recipe = Annotated[str, typer.Argument(metavar="RECIPE")]
RunDir = Annotated[Path, typer.Argument(metavar="RUN")]
As = Annotated[
    Format, typer.Option("--format", help="json: one object on the last line of stdout.")
]


@app.callback(invoke_without_command=True)
def top(
    ctx: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    """Help, where nothing is asked for."""
    if version:
        from importlib.metadata import version as version_of

        print(f"flexlora {version_of('flexlora')}")
        raise typer.Exit
    if ctx.invoked_subcommand is None:
        print(ctx.get_help().rstrip())


@app.command(**OVERRIDES)
def run(ctx: typer.Context, recipe: Recipe, format: As = Format.text) -> None:
    """Run the federated fine-tuning of RECIPE: a YAML file, or a shipped one such as quickstart."""
    from flexlora.experiment.load import load_config
    from flexlora.experiment.run import start

    config = load_config(recipe, ctx.args)
    with _console(format) as console:
        summary = start(config, Path(recipe).stem, console)
    _finish(summary, format)


@app.command()
def resume(folder: RunDir, format: As = Format.text) -> None:
    """Continue the run in the folder RUN, stopped or killed, exactly from its last checkpoint."""
    from flexlora.experiment.run import proceed

    with _console(format) as console:
        summary = proceed(folder, console)
    _finish(summary, format)


@app.command()
def status(folder: RunDir, format: As = Format.text) -> None:
    """Where the run in RUN stands: rounds, who is connected, ranks, bytes, who was refused."""
    from flexlora.experiment.status import describe, status

    _print(status(folder), format, describe)


@app.command(**OVERRIDES)
def demo(ctx: typer.Context, format: As = Format.text) -> None:
    """Run the recipe quickstart: a 135M model, reasoning tasks, minutes on two CPU cores."""
    run(ctx, "quickstart", format)


@app.command(**OVERRIDES)
def plan(ctx: typer.Context, recipe: Recipe, format: As = Format.text) -> None:
    """What a run of RECIPE will be: clients, ranks, parameters, memory, bytes, time."""
    from flexlora.experiment.load import load_config
    from flexlora.experiment.plan import describe, make_plan

    found = make_plan(load_config(recipe, ctx.args))
    _print(found, format, describe)


@app.command(**OVERRIDES)
def validate(ctx: typer.Context, recipe: Recipe, format: As = Format.text) -> None:
    """Check RECIPE, its ranks and its data; print what seen and unseen clients share."""
    from flexlora.experiment.load import load_config
    from flexlora.experiment.validate import check, describe

    found = check(load_config(recipe, ctx.args))
    _print(found, format, describe)


@app.command()
def evaluate(
    folder: RunDir,
    adapter: Annotated[
        Path | None, typer.Option(help="A PEFT folder instead of the run's own adapter.")
    ] = None,
    split: Annotated[Split, typer.Option(help="Which of the clients' examples.")] = Split.test,
    format: As = Format.text,
) -> None:
    """Measure the adapter of the run in RUN, or any other, on its seen and unseen clients."""
    from flexlora.experiment.evaluation import describe, evaluate_run

    with _console(format) as console:
        found = evaluate_run(folder, adapter, split.value, console)
    _print(found, format, describe)


@app.command()
def export(
    folder: RunDir,
    to: Annotated[Path, typer.Argument(metavar="TO")],
    rank: Annotated[int | None, typer.Option(help="Rank of every module.")] = None,
    energy: Annotated[
        float | None, typer.Option(help="Smallest rank that keeps this share of every update.")
    ] = None,
    merged: Annotated[
        bool, typer.Option(help="The whole model with the update merged in.")
    ] = False,
) -> None:
    """Write the global adapter of RUN to a new folder TO: PEFT's, at any rank, or merged."""
    from flexlora.experiment.export import export_run

    print(export_run(folder, to, rank, energy, merged))


@app.command(**OVERRIDES)
def compare(
    ctx: typer.Context,
    recipe: Recipe,
    format: As = Format.text,
) -> None:
    """Run RECIPE's methods x ranks x settings x seeds, resumable, and test the differences."""
    from flexlora.experiment.compare.grid import load_comparison
    from flexlora.experiment.compare.run import compare

    comparison = load_comparison(recipe, ctx.args)
    folder = Path(comparison.output_dir or Path("comparisons") / Path(recipe).stem)
    with _console(format) as console:
        found = compare(comparison, folder, console)
    _finish(found, format)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR")],
    to: Annotated[
        Path | None, typer.Option(help="File to write; default: report.html in DIR.")
    ] = None,
) -> None:
    """Write one self-contained HTML file about the run or comparison in DIR; needs no network."""
    from flexlora.experiment.report.page import write_report

    print(write_report(folder, to))


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(metavar="NAME")] = None,
    format: As = Format.text,
) -> None:
    """List methods, with what is true of each, loaders, rank plans, trackers; or NAME in full."""
    from flexlora.experiment.catalogue import catalogue, describe, describe_method, one_method

    if name is None:
        _print(catalogue(), format, describe)
    else:
        _print(one_method(name), format, describe_method)


@app.command()
def schema() -> None:
    """Print the JSON schema of the configuration."""
    from flexlora.experiment.config import Config

    print(json.dumps(Config.model_json_schema(), indent=2))


def _console(format: Format) -> Any:
    """Where people read: stdout, or stderr when a program reads stdout."""
    from flexlora.experiment.console import Console

    return Console(sys.stderr if format is Format.json else sys.stdout)


def _finish(summary: dict[str, Any], format: Format) -> None:
    if format is Format.json:
        print(json.dumps(summary))


def _print(found: Any, format: Format, describe: Any) -> None:
    print(json.dumps(found) if format is Format.json else describe(found))


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: errors become one message and an exit code; `--debug` shows the traceback."""
    import click

    from flexlora.experiment.errors import INTERRUPTED, USAGE, Failure, missing

    # From 0.29 on typer has exceptions of its own.
    usage = (click.ClickException, getattr(typer, "TyperException", click.UsageError))
    aborted = (KeyboardInterrupt, click.Abort, typer.Abort)
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    try:
        words = [w for w in words if w != "--debug"]
        if app(words, prog_name="flexlora", standalone_mode=False) == INTERRUPTED:
            raise KeyboardInterrupt  # typer returns what it caught
    except usage as error:
        _stop(error.format_message() or "see flexlora --help", USAGE, debug)
    except Failure as error:
        _stop(str(error), error.code, debug)
    except aborted:
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
