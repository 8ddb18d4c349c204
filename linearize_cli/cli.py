"""The command line. Each command imports what it needs when it runs, so `--help` does not load torch."""

import sys
import traceback

import click

from linearize_cli import __version__
from linearize_cli.commands.bench import bench
from linearize_cli.commands.compare import compare
from linearize_cli.commands.convert import convert
from linearize_cli.commands.demo import demo
from linearize_cli.commands.evaluate import evaluate
from linearize_cli.commands.generate import generate
from linearize_cli.commands.heads import heads
from linearize_cli.commands.inspect import inspect
from linearize_cli.commands.methods import methods
from linearize_cli.commands.push import push
from linearize_cli.commands.report import report
from linearize_cli.commands.seal import seal
from linearize_cli.commands.serve import serve
from linearize_cli.commands.verify import verify
from linearize_cli.errors import UserError, shortened
from linearize_cli.inputs import without_surrogates
from linearize_cli.terminal import fail


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="linearize")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.option(
    "--log-level",
    type=click.Choice(["error", "warning", "info", "debug"]),
    help="Show what transformers, datasets and huggingface_hub log.",
)
@click.pass_context
def cli(context: click.Context, debug: bool, log_level: str | None) -> None:
    """Turn a softmax checkpoint into a linear-attention model: constant memory while decoding."""
    context.obj = debug


for command in (
    *(convert, verify, seal, evaluate, bench, report, compare, push, serve),
    *(generate, heads, inspect, methods, demo),
):
    cli.add_command(command)


def check_arguments(arguments: list[str]) -> None:
    """Check that all arguments are valid Unicode text without null characters.

    Raises:
        UserError: an argument is not.
    """
    for number, argument in enumerate(arguments, 1):
        if "\0" in argument or argument != without_surrogates(argument):
            raise UserError(
                f"argument {number} is not valid UTF-8 text: {argument!r}", "Correct its characters."
            )


def main(arguments: list[str] | None = None) -> None:
    """Run a command and exit with its code: 0, or 1 for a failed check, 2 for an error of the user, 3 for an
    internal error, 130 for an interruption.

    Args:
        arguments: the command line without the program's name. None uses that of the process.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    debug = (
        "--debug" in arguments[: next((i for i, a in enumerate(arguments) if not a.startswith("-")), None)]
    )
    try:
        check_arguments(arguments)
        sys.exit(cli.main(arguments, prog_name="linearize", standalone_mode=False) and 0)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        sys.exit(2)
    except click.ClickException as error:
        error.message = shortened(error.message)
        error.show()
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt) as interrupt:
        reason = interrupt if str(interrupt) else interrupt.__cause__ or interrupt.__context__ or ""
        fail(f"interrupted; {reason}" if str(reason) else "interrupted")
        sys.exit(130)
    except UserError as error:
        if debug:
            traceback.print_exc()
        fail(str(error))
        sys.exit(error.exit_code)
    except Exception as error:
        if debug:
            traceback.print_exc()
        fail(
            shortened(f"internal: {type(error).__name__}: {error}")
            + "\nThis is a bug in linearize. `linearize --debug ...` shows the traceback."
        )
        sys.exit(3)
