"""What the commands' options have in common."""

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import click

from linearize_cli.errors import CheckFailed, Notice, shortened
from linearize_cli.files import check_writable, write_json
from linearize_cli.inputs import read_yaml, user_path
from linearize_cli.terminal import Terminal


class TokenCount(click.ParamType):
    name = "N"

    def convert(self, value, param, ctx):
        from linearize_cli.methods.recipe import parse_count

        try:
            return parse_count(value)
        except ValueError:
            self.fail(f"{value!r} is not a number of tokens such as 650k or 40M", param, ctx)


class TokenCounts(TokenCount):
    name = "N,N"

    def convert(self, value, param, ctx):
        return [super(TokenCounts, self).convert(part.strip(), param, ctx) for part in value.split(",")]


class Method(click.ParamType):
    """A method's name, or a recipe's file, which is read before anything heavy is imported."""

    name = "NAME|FILE"

    def convert(self, value, param, ctx):
        if value.endswith((".yaml", ".yml")):
            read_yaml(user_path(value), "Correct the file, or name a method.")
        return value


class Counts(click.ParamType):
    name = "N,N"

    def convert(self, value, param, ctx):
        if isinstance(value, list):
            return value
        parts = [part.strip() for part in value.split(",")]
        counts = [int(part) if part.isdecimal() and len(part) < 19 else 0 for part in parts]
        if 0 in counts:
            self.fail(f"{value!r} is not a list of whole numbers such as 1,8", param, ctx)
        return counts


class Flops(click.ParamType):
    name = "N"
    scales = {"G": 1e9, "T": 1e12, "P": 1e15}

    def convert(self, value, param, ctx):
        scale = self.scales.get(str(value)[-1:], 1.0)
        try:
            number = float(value[:-1] if scale > 1 else value) * scale
        except (TypeError, ValueError):
            number = 0.0
        if not 0 < number < float("inf"):
            self.fail(f"{value!r} is not a number of FLOP/s such as 500G or 200T", param, ctx)
        return number


TOKENS, FLOPS, METHOD = TokenCount(), Flops(), Method()


def options(*decorators: Callable) -> Callable[[Callable], Callable]:
    def apply(function: Callable) -> Callable:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return apply


def command_options(function: Callable) -> Callable:
    """`--json` and `-q`, which all commands have; the function gets a `terminal` and returns its result. A
    result with the verdict FAIL ends the program with exit code 1.
    """

    @wraps(function)
    def run(json_file: str | None, quiet: bool, **kwargs: Any) -> None:
        if json_file:
            check_writable(user_path(json_file), "--json")
        terminal = Terminal(quiet)
        with notices(terminal):
            result = function(terminal=terminal, **kwargs)
        if json_file:
            write_json(user_path(json_file), result)
        if isinstance(result, dict) and result.get("verdict") == "FAIL":
            sys.exit(CheckFailed.exit_code)

    json_option = click.option("--json", "json_file", metavar="FILE", help="Write the result as data, too.")
    quiet_option = click.option("-q", "--quiet", is_flag=True, help="No progress.")
    return json_option(quiet_option(run))


@contextmanager
def notices(terminal: Terminal) -> Iterator[None]:
    """While open, show each Notice as a line on the terminal."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", Notice)
        default = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *where: Any) -> None:
            if issubclass(category, Notice):
                terminal.note(shortened(str(message)))
            else:
                default(message, category, *where)

        warnings.showwarning = show
        yield


def calm_libraries() -> None:
    """Only our own progress and errors are shown."""
    import datasets
    import huggingface_hub
    import transformers

    warnings.filterwarnings("ignore", category=FutureWarning)
    for known in ("find_unused_parameters", "fan_in_fan_out"):  # torch and peft, on what is meant so
        warnings.filterwarnings("ignore", message=known)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    huggingface_hub.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()


model_options = options(
    click.option("--device", default="cpu", show_default=True, help="Where it runs, as torch names it."),
    click.option(
        "--dtype", default=None, help="float32, bfloat16 or float16; the checkpoint's own if not given."
    ),
    click.option(
        "--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True, help="Of all chance."
    ),
)
skip_option = click.option(
    "--skip-bad-rows",
    type=click.IntRange(0),
    default=0,
    metavar="N",
    help="Leave out up to N rows of text that cannot be used; else the first is an error.",
)
trust_option = click.option(
    "--trust-remote-code", is_flag=True, help="Run code that MODEL, ARTIFACT or the recipe brings along."
)
