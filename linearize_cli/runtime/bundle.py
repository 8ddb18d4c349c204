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
    """File name in the artifact -> text, for every module that an artifact needs."""
    here = Path(__file__).parent
    if not __name__.startswith("linearize_cli."):  # this is a copy already
        own = Path(__file__).name
        names = {p.name for p in here.glob("linearize_*.py")} | {f"{FLAT[m]}.py" for m in list(FLAT)[:2]}
        return {name: (here / name).read_text() for name in sorted(names | {own})}
    kernels = Path(find_spec("linearize_kernels").origin).parent
    files = {}
    for package, folder in (("linearize_cli.runtime", here), ("linearize_kernels", kernels)):
        for path in sorted(folder.glob("*.py")):
            if path.stem != "__init__":
                files[f"{flat_name(f'{package}.{path.stem}')}.py"] = flatten(path.read_text())
    return files


def flatten(source: str) -> str:
    """Rewrite `from linearize_kernels.block import block` to `from .linearize_kernels_block import block`."""
    lines = source.splitlines(keepends=True)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in (
            "linearize_cli",
            "linearize_kernels",
        ):
            line = lines[node.lineno - 1]
            lines[node.lineno - 1] = line.replace(
                f"from {node.module} ", f"from .{flat_name(node.module)} ", 1
            )
    return "".join(lines)


def copy_code(folder: Path) -> None:
    """Write the flat modules into a folder."""
    for name, text in sources().items():
        (folder / name).write_text(text)
