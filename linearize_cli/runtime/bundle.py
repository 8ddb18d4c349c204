"""The code that travels inside an artifact: a flat copy of this package and of `linearize_kernels`.

transformers loads a repository's code from one folder, without subfolders; so each module becomes one file
beside the weights, and imports between them are rewritten to relative ones. Run from such a copy, it copies
itself.
"""

import ast
from importlib.util import find_spec
from pathlib import Path

AUTO_MAP = {
    "AutoConfig": "configuration_linearized.LinearizedConfig",
    "AutoModelForCausalLM": "modeling_linearized.LinearizedForCausalLM",
}
ENTRIES = ("linearize_cli.runtime.config", "linearize_cli.runtime.model")
FLAT = {
    "linearize_cli.runtime.config": "configuration_linearized",
    "linearize_cli.runtime.model": "modeling_linearized",
    "linearize_cli.runtime": "linearize_runtime",
    "linearize_kernels": "linearize_kernels",
}


def flat_name(module: str) -> str:
    """`linearize_kernels.block` -> `linearize_kernels_block`."""
    if module in FLAT:
        return FLAT[module]
    package, _, name = module.rpartition(".")
    return f"{FLAT[package]}_{name}"


def sources() -> dict[str, str]:
    """File name in the artifact -> text, for every module that loading an artifact imports."""
    here = Path(__file__).parent
    if not __name__.startswith("linearize_cli."):  # this is a copy already, and so are its neighbours
        names = {f"{FLAT[module]}.py" for module in ENTRIES} | {p.name for p in here.glob("linearize_*.py")}
        return {name: (here / name).read_text() for name in sorted(names)}
    files, pending = {}, list(ENTRIES)
    while pending:
        module = pending.pop()
        name = f"{flat_name(module)}.py"
        if name not in files:
            text = Path(find_spec(module).origin).read_text()
            files[name] = flatten(text)
            pending += [node.module for node in our_imports(text)]
    return files


def our_imports(source: str) -> list[ast.ImportFrom]:
    """The `from linearize_... import` statements of a module."""
    nodes = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom))
    return [
        node for node in nodes if (node.module or "").split(".")[0] in ("linearize_cli", "linearize_kernels")
    ]


def flatten(source: str) -> str:
    """Rewrite `from linearize_kernels.block import block` to `from .linearize_kernels_block import block`."""
    lines = source.splitlines(keepends=True)
    for node in our_imports(source):
        line = lines[node.lineno - 1]
        flat = f"from .{flat_name(node.module)} "
        lines[node.lineno - 1] = line.replace(f"from {node.module} ", flat, 1)
    return "".join(lines)


def copy_code(folder: Path) -> None:
    """Write the flat modules into a folder."""
    for name, text in sources().items():
        (folder / name).write_text(text)
