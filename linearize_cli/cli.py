"""The commands. Each imports what it needs when it runs: `--help` loads no torch."""

import sys
import traceback
from typing import Any

import click

from linearize_cli import __version__
from linearize_cli.console import Terminal, fail
from linearize_cli.errors import UserError, shortened
from linearize_cli.inputs import mended
from linearize_cli.options import (
    FLOPS,
    METHOD,
    TOKENS,
    Counts,
    TokenCounts,
    calm_libraries,
    command_options,
    model_options,
    skip_option,
    trust_option,
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="linearize")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.pass_context
def cli(context: click.Context, debug: bool) -> None:
    """Turn a softmax checkpoint into a linear-attention model: constant memory while decoding."""
    context.obj = debug


@cli.command()
@click.argument("model")
@click.option("-o", "--output", metavar="DIR", help="Where to; ./MODEL-METHOD if not given.")
@click.option(
    "--method",
    type=METHOD,
    metavar="NAME",
    default="augmented",
    show_default=True,
    help="NAME[:BASE] or FILE.yaml; see `methods`.",
)
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key of the recipe.")
@click.option("--keep-softmax", metavar="N|auto:N|at:i,j,k", help="Layers to keep as they are; auto: by KL.")
@click.option("--data", multiple=True, metavar="SRC", help="Text to train on; may be repeated.")
@click.option("--eval-data", metavar="SRC", help="Text to measure on; else 1% of documents.")
@skip_option
@click.option("--tokens", type=TOKENS, help="Budget of recovery, such as 650k; the recipe's if not given.")
@click.option("--seq-len", type=click.IntRange(8), help="Tokens per block; at most 1024 if not given.")
@click.option(
    "--batch-size", type=click.IntRange(1), help="Blocks per step; by the budget if not given, 8 at most."
)
@click.option("--no-train", is_flag=True, help="Swap only.")
@click.option(
    "--medusa-heads",
    type=click.IntRange(0),
    default=0,
    metavar="K",
    help="Then train K Medusa heads, for speculative decoding, on as many tokens again.",
)
@click.option(
    "--tracker", multiple=True, metavar="NAME", help="tensorboard, wandb or trackio; may be repeated."
)
@click.option("--keep-adapter", is_flag=True, help="Keep the unmerged LoRA under adapter/.")
@click.option("--resume", is_flag=True, help="Go on with an interrupted run.")
@click.option(
    "--dry-run", is_flag=True, help="Show the plan, memory and time, from MODEL's config; write nothing."
)
@click.option(
    "--processes", type=click.IntRange(1), default=1, show_default=True, help="Of --dry-run: how many train."
)
@click.option("--flops", type=FLOPS, help="Of --dry-run: FLOP/s of one, such as 200T; measured if not given.")
@click.option("--force", is_flag=True, help="Replace DIR if it is an artifact.")
@trust_option
@model_options
@command_options
def convert(terminal: Terminal, no_train: bool, tracker: tuple[str, ...], **arguments: Any) -> dict[str, Any]:
    """Convert MODEL: swap its attention, recover the quality, check and save.

    MODEL is a Hub id, a folder (Hugging Face's or Meta's Llama format), or `demo`. SRC is a text, JSONL or
    parquet file, a folder of them, a Hub dataset NAME[:CONFIG][:SPLIT], or `self` (sampled from the model).
    """
    from linearize_cli.conversion import convert as run
    from linearize_cli.render import conversion, plan

    calm_libraries()
    trackers = tuple(name for names in tracker for name in names.split(","))
    result = run(train=not no_train, tracker=trackers, terminal=terminal, **arguments)
    if result is None:  # another process has it
        sys.exit(0)
    terminal.out.print(plan(result) if arguments["dry_run"] else conversion(result))
    return result


@cli.command()
@click.argument("artifact", default=".")
@click.option("--prompts", metavar="FILE", help="Prompts for the greedy check: a line each, or JSONL.")
@click.option("--max-new", type=click.IntRange(1), default=64, show_default=True, help="Tokens per prompt.")
@click.option(
    "--draft", metavar="medusa|lookup|MODEL", help="Drafter; medusa if ARTIFACT has heads, else lookup."
)
@click.option(
    "--target",
    type=click.Choice(["self", "teacher"]),
    default="self",
    show_default=True,
    help="teacher: ARTIFACT drafts for its softmax model.",
)
@click.option("--tree", metavar="NAME|FILE", help="mc_sim_7b_63, chain, auto (with heads), or JSON choices.")
@click.option("--quick", is_flag=True, help="Leave out rows, drafts, definition, long and most of sampling.")
@trust_option
@model_options
@command_options
def verify(terminal: Terminal, **arguments: Any) -> dict[str, Any]:
    """Prove that all forms of ARTIFACT (default: this folder) compute the same, speculation among them, and measure it.

    The report goes to ARTIFACT/verify.json, too. With --trust-remote-code, the code that ARTIFACT carries is run; else
    this package's, which must be the same.
    """
    from linearize_cli.verification import render
    from linearize_cli.verification import verify as run

    calm_libraries()
    report = run(**arguments, progress=lambda check: terminal.note(f"checking {check}"))
    terminal.out.print(render(report))
    return report


@cli.command()
@click.argument("artifact", default=".")
@trust_option
@click.option("--device", default="cpu", show_default=True, help="Where it runs, as torch names it.")
@command_options
def seal(terminal: Terminal, **arguments: Any) -> dict[str, Any]:
    """Renew the checksums and the fingerprint of ARTIFACT (default: this folder) after a deliberate change.

    `verify` compares the artifact with both. With --trust-remote-code, the code that ARTIFACT carries is run.
    """
    from linearize_cli.artifact.seal import seal as run

    calm_libraries()
    result = run(**arguments)
    changed = f"; {result['changed']}" if result["changed"] else ""
    terminal.out.print(f"sealed {result['files']} files of {result['artifact']}{changed}")
    return result


@cli.command("eval")
@click.argument("artifact", default=".")
@click.option("--teacher", metavar="MODEL", help="Its softmax model; the one it was made from if not given.")
@click.option("--data", metavar="SRC", help="Text to measure on; a demo artifact has its own.")
@skip_option
@click.option("--context", type=TokenCounts(), metavar="N,N", help="Tokens of a block, such as 1k,8k.")
@click.option("--tasks", metavar="NAMES", help="Tasks of lm_eval (an extra: linearize-cli[eval]), by commas.")
@trust_option
@model_options
@command_options
def evaluate(
    terminal: Terminal, context: list[int] | None, tasks: str | None, **arguments: Any
) -> dict[str, Any]:
    """Measure ARTIFACT (default: this folder) beside its softmax teacher.

    Perplexity by position, KL and agreement, recall by distance, what it writes, what each part carries. The
    report goes to ARTIFACT/eval.json, too, with figures (eval-*.png) beside it.
    """
    from linearize_cli.evaluation import evaluate as run
    from linearize_cli.render import evaluation

    calm_libraries()
    names = [name.strip() for name in (tasks or "").split(",") if name.strip()]
    report = run(context=context or (), tasks=names, terminal=terminal, **arguments)
    terminal.out.print(evaluation(report))
    return report


@cli.command()
@click.argument("artifact", default=".")
@click.option("--teacher", metavar="MODEL", help="Its softmax model; the one it was made from if not given.")
@click.option(
    "--context",
    type=TokenCounts(),
    metavar="N,N",
    help="Tokens; up to 8 times the trained length if not given.",
)
@click.option("--batch", type=Counts(), metavar="N,N", default="1", show_default=True, help="Rows at a time.")
@click.option("--plot", metavar="FILE", help="The figure, a PNG; ARTIFACT/bench.png if not given.")
@trust_option
@model_options
@command_options
def bench(terminal: Terminal, context: list[int] | None, **arguments: Any) -> dict[str, Any]:
    """Measure the speed and memory of ARTIFACT (default: this folder) beside its softmax teacher.

    Prefill, decoding and training by context, both models in turn on one thread; medians. The report goes to
    ARTIFACT/bench.json, too, with a figure beside it.
    """
    from linearize_cli.benchmark import bench as run
    from linearize_cli.benchmark import render

    calm_libraries()
    report = run(context=context or (), terminal=terminal, **arguments)
    terminal.out.print(render(report))
    return report


@cli.command()
@click.argument("artifact", default=".")
@click.argument("repo_id", required=False)
@click.option("--private/--no-private", default=None, help="Visibility of a new repository.")
@click.option("--revision", help="Branch to push to; it must exist.")
@click.option("--create-pr", is_flag=True, help="Open a pull request instead.")
@click.option("--commit-message", metavar="M")
@click.option("--token", metavar="T", help="Instead of the one you signed in with.")
@click.option("--dry-run", is_flag=True, help="Show what would be pushed.")
@command_options
def push(terminal: Terminal, **arguments: Any) -> dict[str, Any]:
    """Push ARTIFACT (default: this folder) to the Hub as REPO_ID (default: your name and the folder's)."""
    from huggingface_hub.utils import disable_progress_bars

    from linearize_cli.artifact.push import push as run
    from linearize_cli.render import pushed

    if terminal.quiet:
        disable_progress_bars()
    result = run(**arguments)
    terminal.out.print(pushed(result))
    return result


@cli.command()
@click.argument("artifact")
@click.argument("prompt")
@click.option("--max-new", type=click.IntRange(1), default=128, show_default=True, help="Tokens at most.")
@click.option(
    "--speculative",
    type=click.Choice(["medusa", "lookup"]),
    help="Draft tokens, by the artifact's heads or by n-grams of the text, and verify them.",
)
@click.option(
    "--tree", metavar="NAME|FILE", help="Of medusa: auto, chain, mc_sim_7b_63, or a JSON file of choices."
)
@click.option("--temperature", type=click.FloatRange(0), default=0.0, show_default=True, help="0: greedy.")
@click.option(
    "--top-p",
    type=click.FloatRange(0, 1, min_open=True),
    default=1.0,
    help="Sample from this mass of tokens.",
)
@click.option(
    "--typical", is_flag=True, help="Accept typical drafts, too: faster, but LOSSY, not the model's own text."
)
@trust_option
@model_options
@command_options
def generate(terminal: Terminal, **arguments: Any) -> dict[str, Any]:
    """Continue PROMPT with ARTIFACT, as the text comes."""
    from linearize_cli.generate import generate as run

    calm_libraries()
    result = run(**arguments)
    if not result.get("lossless", True):
        terminal.note("lossy: with --typical the text is not distributed as the model's own")
    if result.get("acceptance"):
        terminal.note(f"{result['acceptance']} tokens a forward, {result['tokens_per_s']} tokens/s")
    return result


@cli.command()
@click.argument("artifact", default=".")
@click.option("--heads", type=click.IntRange(1), default=4, show_default=True, metavar="K", help="How many.")
@click.option("--data", multiple=True, metavar="SRC", help="Text to train on; the conversion's if not given.")
@click.option("--eval-data", metavar="SRC", help="Text to measure on; else 1% of documents.")
@skip_option
@click.option("--tokens", type=TOKENS, help="Budget, such as 650k; that of the recovery if not given.")
@click.option("--seq-len", type=click.IntRange(8), help="Tokens per block; the conversion's if not given.")
@click.option("--batch-size", type=click.IntRange(1), help="Blocks per step; by the budget if not given.")
@click.option("--lr", type=click.FloatRange(0, min_open=True), help="By the model's width if not given.")
@click.option("--resume", is_flag=True, help="Go on with an interrupted run.")
@click.option("--force", is_flag=True, help="Replace the heads that are there.")
@trust_option
@model_options
@command_options
def heads(terminal: Terminal, **arguments: Any) -> dict[str, Any]:
    """Train Medusa heads for ARTIFACT (default: this folder), which stays as it is: they draft for
    `generate --speculative medusa`.
    """
    from linearize_cli.heads import heads as run
    from linearize_cli.render import medusa

    calm_libraries()
    result = run(terminal=terminal, **arguments)
    if result is None:  # another process has it
        sys.exit(0)
    terminal.out.print(medusa(result))
    return result


@cli.command()
@click.argument("model")
@trust_option
@model_options
@command_options
def inspect(terminal: Terminal, model: str, seed: int, **arguments: Any) -> dict[str, Any]:
    """Show which layers of MODEL can be converted, why not the others, and the memory it saves."""
    from linearize_cli.inspect import inspect as run
    from linearize_cli.render import inspection

    calm_libraries()
    result = run(model, **arguments)
    terminal.out.print(inspection(result))
    return result


@cli.command()
@click.argument("name", type=METHOD, required=False)
@command_options
def methods(terminal: Terminal, name: str | None) -> Any:
    """List the methods, or print the recipe NAME (a method or a file). Code that a recipe names is not run."""
    from linearize_cli.methods import method_names, read_recipe
    from linearize_cli.render import method_table

    if name:
        recipe = read_recipe(name)
        click.echo(recipe.dump(), nl=False)
        return recipe.to_dict()
    recipes = [read_recipe(method) for method in method_names()]
    terminal.out.print(method_table(recipes))
    return [recipe.to_dict() for recipe in recipes]


@cli.command()
@click.option("-o", "--output", metavar="DIR", default="demo-augmented", show_default=True)
@click.option("--tokens", type=TOKENS, help="Budget of recovery.")
@click.option("--resume", is_flag=True, help="Go on with an interrupted conversion.")
@click.option("--force", is_flag=True, help="Replace DIR if it is an artifact.")
@model_options
@command_options
def demo(terminal: Terminal, **arguments: Any) -> dict[str, Any]:
    """Run the whole pipeline on the embedded teacher, in minutes on two cores."""
    from linearize_cli.demo.run import demo as run
    from linearize_cli.render import demonstration

    calm_libraries()
    result = run(terminal=terminal, **arguments)
    terminal.out.print(demonstration(result))
    return result


def check_arguments(arguments: list[str]) -> None:
    """
    Raises:
        UserError: an argument is not text that a file or a tokenizer can take.
    """
    for number, argument in enumerate(arguments, 1):
        if "\0" in argument or argument != mended(argument):
            raise UserError(
                f"argument {number} is not valid UTF-8 text: {argument!r}", "Correct its characters."
            )


def main(arguments: list[str] | None = None) -> None:
    """The console script: runs a command and turns what goes wrong into the contract's exit codes."""
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
            + "\nA fault of linearize; `linearize --debug ...` shows where."
        )
        sys.exit(3)
