"""The command line: thin. Exit codes: 0 done; 1 a run that failed for a reason that has a name (or a bug, with its
traceback); 2 bad input; 130 interrupted by Ctrl-C."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

from rlvlm_rewards.check import add_arguments

from rlvlm import __version__
from rlvlm.recipe import yaml12
from rlvlm.recipe.errors import RecipeError, RlvlmError, RunError
from rlvlm.recipe.load import load_recipe
from rlvlm.run import RunFolder

_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command (default: the process's arguments) and returns its exit code."""
    arguments = _parse(sys.argv[1:] if argv is None else argv)
    try:
        arguments.command(arguments)
    except RlvlmError as error:
        _tell(str(error), error)
        return error.exit_code
    except KeyboardInterrupt as interrupt:
        _tell("interrupted", interrupt)
        return _INTERRUPTED
    return 0


def _train(arguments: argparse.Namespace) -> None:
    from rlvlm.preflight import preflight

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    preflight(recipe)
    with RunFolder.of(recipe) as run:
        if arguments.resume:
            run.resume(recipe)
        else:
            run.create(recipe)
        with _telling_how_to_go_on(run, arguments):
            from rlvlm.trainer import train

            train(recipe, run, arguments.resume)


@contextmanager
def _telling_how_to_go_on(run: RunFolder, arguments: argparse.Namespace) -> Iterator[None]:
    """Whatever ends the block early, a bug included, carries the command that takes the run up again."""
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        command = shlex.join(["rlvlm", "train", str(arguments.recipe), *arguments.overrides, "--resume"])
        error.add_note(f"The run is in {run.root}; it goes on with:\n  {command}")
        raise


def _report(arguments: argparse.Namespace) -> None:
    run: Path = arguments.run
    if not (run / "recipe.yaml").is_file():
        raise RecipeError("run", run, "no run is in this folder", "give a run folder, like runs/tiny_demo")
    from rlvlm.report.html import write_report

    write_report(run)
    print(run / "report.html")


def _check(arguments: argparse.Namespace) -> None:
    from rlvlm.preflight import preflight

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    preflight(recipe)
    print(yaml12.dump(recipe.model_dump(mode="json")), end="")
    print(f"{arguments.recipe} is fine", file=sys.stderr)


def _replay_batch(arguments: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    from rlvlm.learner.refused import replay

    table = Table("rank", "row", "tokens", "loss", "where it begins to be not finite", box=None, pad_edge=False)
    for found in replay(arguments.folder):
        table.add_row(str(found.rank), str(found.row), str(found.tokens), f"{found.loss:.4g}", found.where)
    Console().print(table)


def _check_reward(arguments: argparse.Namespace) -> None:
    from rich.live import Live
    from rich.table import Table
    from rich.text import Text
    from rlvlm_rewards import check

    table = Table("check", "", "detail", box=None, pad_edge=False)
    styles, failed = {"pass": "green", "FAIL": "bold red", "-": "dim"}, 0
    try:
        findings = check.check_reward(arguments.plugin, check.parse_options(arguments.options), arguments.samples)
        first = next(findings)  # bad usage is told without a table
        with Live(table):
            for found in chain([first], findings):
                verdict = check.verdict(found)
                failed += verdict == "FAIL"
                table.add_row(found.check, Text(verdict, style=styles[verdict]), Text(found.detail))
    except check.BadUsage as error:
        problem, _, mend = str(error).removeprefix(f"reward {arguments.plugin!r}").lstrip(": ").partition("; ")
        raise RecipeError("reward", arguments.plugin, problem, mend) from None
    if failed:
        raise RunError(f"{failed} of {table.row_count} checks failed", "mend the reward before a run learns from it")


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("rlvlm", description="Make a vision-language model reason: long-CoT SFT, then RL.")
    parser.add_argument("--version", action="version", version=f"rlvlm {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    train = commands.add_parser("train", help="run a recipe: its stages, the evaluation, the report")
    train.add_argument("--resume", action="store_true", help="go on with the run that the recipe's folder holds")
    train.set_defaults(command=_train)
    check = commands.add_parser("check", help="check a recipe and this machine, and print the recipe with every key")
    check.set_defaults(command=_check)
    for command in (train, check):
        command.add_argument("recipe", type=Path, metavar="RECIPE", help="a YAML file")
        command.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="like rl.iterations=3")
    report = commands.add_parser("report", help="write a run's report.html anew")
    report.add_argument("run", type=Path, metavar="RUN", help="a run folder")
    report.set_defaults(command=_report)
    replay = commands.add_parser("replay-batch", help="compute a minibatch that a run has refused once more")
    replay.add_argument("folder", type=Path, metavar="FOLDER", help="like runs/NAME/refused/1")
    replay.set_defaults(command=_replay_batch)
    reward = commands.add_parser("reward", help="what concerns rewards").add_subparsers(required=True, metavar="WHAT")
    checked = reward.add_parser("check", help="check that a reward can be trusted: `rlvlm reward check PLUGIN`")
    add_arguments(checked)
    checked.set_defaults(command=_check_reward)
    arguments, others = parser.parse_known_args(argv)
    # argparse takes `train RECIPE --resume key=value` apart at --resume and gives back the overrides after it.
    overrides = [other for other in others if not other.startswith("-") and "overrides" in arguments]
    unknown = [other for other in others if other not in overrides]
    if unknown:
        hint = "; keys of the recipe take no dashes" if any("=" in other for other in unknown) else ""
        parser.error(f"{' '.join(unknown)} is not known here{hint}")
    if overrides:
        arguments.overrides = [*arguments.overrides, *overrides]
    return arguments


def _tell(what: str, error: BaseException) -> None:
    """`what`, then the error's notes."""
    first, *more = "\n".join([what, *getattr(error, "__notes__", ())]).splitlines()
    print(f"rlvlm: {first}", *(f"       {line}" for line in more), sep="\n", file=sys.stderr)
