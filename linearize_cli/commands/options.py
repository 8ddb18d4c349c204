"""Options and parameter types that several commands share."""

import difflib
import json
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import click

from linearize_cli.checksums import is_loaded
from linearize_cli.errors import CheckFailed, Notice, UserError, first_five, shortened
from linearize_cli.files import check_writable, write_json
from linearize_cli.inputs import parse_yaml, read_yaml, user_path
from linearize_cli.terminal import Terminal


class TokenCount(click.ParamType):
    """A number of tokens, such as 650k."""

    name = "N"

    def convert(self, value, param, ctx):
        from linearize_cli.methods.recipe import parse_count

        try:
            return parse_count(value)
        except ValueError as error:
            self.fail(f"{value!r} {error}", param, ctx)


class TokenCounts(TokenCount):
    """Numbers of tokens, separated by commas."""

    name = "N,N"

    def convert(self, value, param, ctx):
        return [super(TokenCounts, self).convert(part.strip(), param, ctx) for part in value.split(",")]


class Method(click.ParamType):
    """A method's name, or the path of a recipe file. The file is parsed here, so that an error in it appears
    at once.
    """

    name = "NAME|FILE"

    def convert(self, value, param, ctx):
        if value.endswith((".yaml", ".yml")):
            read_yaml(user_path(value), "Correct the file, or pass the name of a method.")
        return value


class Counts(click.ParamType):
    """Positive whole numbers, separated by commas."""

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
    """A number of FLOP/s, such as 200T."""

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


class Memory(click.ParamType):
    """A number of bytes, such as 24G. The word `auto` becomes None."""

    name = "auto|SIZE"
    scales = {"M": 10**6, "G": 10**9, "T": 10**12, "MI": 2**20, "GI": 2**30, "TI": 2**40}

    def convert(self, value, param, ctx):
        text = str(value).upper().removesuffix("B")
        if value is None or text == "AUTO":
            return None
        digits = text.rstrip("MGTI")
        try:
            number = float(digits) * self.scales.get(text[len(digits) :], 0)
        except ValueError:
            number = 0.0
        if not 0 < number < 1e18:
            self.fail(
                f"{value!r} is not a size such as 24G (24 x 10^9 bytes), 24GiB or 800M, or auto", param, ctx
            )
        return round(number)


MEMORY = Memory()
TOKENS, FLOPS, METHOD = TokenCount(), Flops(), Method()


def options(*decorators: Callable) -> Callable[[Callable], Callable]:
    """Return a decorator that applies several decorators, the last one first."""

    def apply(function: Callable) -> Callable:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return apply


def command_options(function: Callable) -> Callable:
    """Add the options `--json` and `-q` to a command, and pass a `terminal` to its function.

    The function returns the result of the command. If the result has the verdict FAIL, the program ends with
    exit code 1.
    """

    @wraps(function)
    def run(json_file: str | None, quiet: bool, **kwargs: Any) -> None:
        if json_file:
            check_writable(user_path(json_file), "--json")
            check_replaceable(user_path(json_file), [kwargs.get("output")])
        terminal = Terminal(quiet)
        with notices(terminal):
            if kwargs.get("device") == "auto":
                kwargs["device"] = announced_device(terminal)
            result = function(terminal=terminal, **kwargs)
        if json_file:
            write_json(user_path(json_file), result)
        if isinstance(result, dict) and result.get("verdict") == "FAIL":
            sys.exit(CheckFailed.exit_code)

    json_option = click.option("--json", "json_file", metavar="FILE", help="Also write the result as JSON.")
    quiet_option = click.option("-q", "--quiet", is_flag=True, help="Show no progress.")
    return json_option(quiet_option(run))


def check_replaceable(file: Path, others: list[str | None]) -> None:
    """Check that the file of `--json` is neither a part of an artifact nor another file that the command writes.

    Args:
        others: the paths of the other files. None is no file.

    Raises:
        UserError: it is.
    """
    part = is_loaded(Path(file.name)) or file.name in ("linearize.json", "README.md", "report.html")
    if part and (file.parent / "linearize.json").is_file():
        raise UserError(f"--json {file} is a part of an artifact", "Choose another file.")
    if any(name and user_path(name) == file for name in others):
        raise UserError(f"--json {file} is also the output", "Choose two files.")


def announced_device(terminal: Terminal) -> str:
    """Choose the device of a command, and print its name."""
    from linearize_cli.models.device import chosen_device

    device = chosen_device()
    terminal.note(f"device: {device}")
    return device


@contextmanager
def notices(terminal: Terminal) -> Iterator[None]:
    """Show each Notice as a line on the terminal while the context is open."""
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


def quiet_libraries() -> None:
    """Hide the warnings and progress bars of other libraries until the process ends. With `--log-level`, show what
    they log instead.
    """
    import datasets
    import huggingface_hub
    import transformers

    level = click.get_current_context().find_root().params.get("log_level")
    if level:
        for library in (transformers, huggingface_hub, datasets):
            library.utils.logging.set_verbosity(getattr(logging, level.upper()))
        return
    warnings.filterwarnings("ignore", category=FutureWarning)
    for known in ("find_unused_parameters", "fan_in_fan_out"):  # torch and peft warn about intended settings
        warnings.filterwarnings("ignore", message=known)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    huggingface_hub.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()


device_option = click.option(
    "--device", default="auto", show_default=True, help="auto, or torch's name of a device, such as cuda:0."
)
dtype_option = click.option(
    "--dtype", default="auto", show_default=True, help="auto, float32, bfloat16 or float16."
)
model_options = options(
    device_option,
    dtype_option,
    click.option(
        "--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True, help="Random seed."
    ),
)
skip_option = click.option(
    "--skip-bad-rows",
    type=click.IntRange(0),
    default=0,
    metavar="N",
    help="Skip up to N rows of text that cannot be used.",
)
trust_option = click.option(
    "--trust-remote-code", is_flag=True, help="Run Python code that MODEL, ARTIFACT or the recipe contains."
)


def use_config(context: click.Context, option: click.Parameter, file: str | None) -> None:
    """Take the values of a command's options from a YAML file. The command line overrides them.

    The file's keys are the options' names without the dashes in front, such as `seq-len`, and the argument's name,
    `model`. A repeatable option takes one value or a list, and `set` also a mapping.

    Raises:
        UserError: the file cannot be read, or is no mapping of options to values.
    """
    if file is None:
        return
    hint = f"`linearize {context.info_name} --help` lists the options."
    found = read_yaml(user_path(file), hint)
    if not isinstance(found, dict):
        raise UserError(
            f"--config {file} holds no options", f"Write one a line, such as `seq-len: 512`. {hint}"
        )
    known = {
        name.removeprefix("--"): parameter
        for parameter in context.command.params
        for name in parameter.opts
        if parameter is not option
    }
    if unknown := {str(name) for name in found} - known.keys():
        near = difflib.get_close_matches(min(unknown), known, 1)
        hint = f"Did you mean {near[0]}? {hint}" if near else hint
        raise UserError(f"--config {file}: there is no option {first_five(unknown)}", hint)
    values: dict[str, Any] = {}
    for name, value in found.items():
        if value is None:
            continue
        parameter = known[name]
        try:
            values[str(parameter.name)] = as_typed(name, parameter, value)
            parameter.type_cast_value(context, values[str(parameter.name)])
        except ValueError as error:
            raise UserError(f"--config {file}: {error}", hint) from None
        except click.BadParameter as error:
            raise UserError(f"--config {file}: {name}: {error.message}", hint) from None
    context.default_map = values


def as_typed(name: str, option: click.Parameter, value: Any) -> Any:
    """Return an option's value in a YAML file as it would be typed on the command line: texts, or a bool for a flag.

    Args:
        name: the option's name.

    Raises:
        ValueError: the option takes no such value.
    """
    if getattr(option, "is_flag", False):
        return value if isinstance(value, bool) else str(value)
    if not getattr(option, "multiple", False):
        return as_text(name, value)
    if name == "set" and isinstance(value, dict):
        return [f"{key}={as_yaml(part)}" for key, part in value.items()]
    return [as_text(name, part) for part in (value if isinstance(value, list) else [value])]


def as_text(name: str, value: Any) -> str:
    """Return one value of an option in a YAML file as text.

    Args:
        name: the option's name.

    Raises:
        ValueError: the value is a list, a mapping or a bool.
    """
    if isinstance(value, (list, dict)):
        raise ValueError(f"{name} takes one value, not {value!r:.60}")
    if isinstance(value, bool):
        raise ValueError(f"{name} is the YAML value {str(value).lower()}: write the text in quotes")
    return str(value)


def as_yaml(value: Any) -> str:
    """Return a value as one line of YAML, as `--set KEY=VALUE` takes it. A text is quoted only if YAML needs that."""
    try:
        if isinstance(value, str) and parse_yaml(value) == value:
            return value
    except ValueError:
        pass
    return json.dumps(value, ensure_ascii=False)


config_option = click.option(
    "--config",
    metavar="FILE.yaml",
    is_eager=True,
    expose_value=False,
    callback=use_config,
    help="Take options from a YAML file. The command line overrides it.",
)
checksums_option = click.option(
    "--no-checksums",
    "checksums",
    flag_value=False,
    default=True,
    help="Load an artifact whose files were changed since it was saved.",
)
