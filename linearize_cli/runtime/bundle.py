"""The code inside an artifact: a copy of this package and of `linearize_kernels`, without subfolders.

transformers loads a repository's code from one folder without subfolders. So each module becomes one file in
the artifact, and imports between them become relative ones. When such a copy runs, it copies itself.
"""

import ast
import re
import sys
from functools import cache
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from pkgutil import walk_packages
from types import ModuleType
from typing import Any

from linearize_kernels.parts.feature_maps import FEATURE_MAPS

ENTRIES = ("linearize_cli.runtime.config", "linearize_cli.runtime.model")
FLAT = {
    "linearize_cli.runtime.config": "configuration_linearized",
    "linearize_cli.runtime.model": "modeling_linearized",
    "linearize_cli.runtime": "linearize_runtime",
    "linearize_cli.checksums": "linearize_checksums",
    "linearize_kernels": "linearize_kernels",
}
OWN = "linearize_own_"  # prefix of modules with a user's feature map


def auto_map(*model_classes: type[Any]) -> dict[str, str]:
    """Return `auto_map` of config.json, the names of the config class and of the model class for each Auto
    class.

    Args:
        model_classes: entry points from `model.AUTO_MODELS`.
    """
    models = {cls.auto_class: f"modeling_linearized.{cls.__name__}" for cls in model_classes}
    # The config class is loaded from the model's file. transformers caches a module by the hash of all files
    # that it imports, and a config class shared with another artifact would load the other one's model class.
    return {"AutoConfig": "modeling_linearized.LinearizedConfig", **models}


def flat_name(module: str) -> str:
    """Return the name of a module's file in an artifact, where all modules are in one folder.

    For example, `linearize_kernels.reference.block` becomes `linearize_kernels_reference_block`.
    """
    if module in FLAT:
        return FLAT[module]
    package, _, name = module.rpartition(".")
    return f"{flat_name(package)}_{name}"


def sources() -> dict[str, str]:
    """Return the text of every module that loading an artifact imports, by its file name in the artifact."""
    here = Path(__file__).parent
    if not __name__.startswith("linearize_cli."):  # this module is itself such a copy
        names = {f"{FLAT[module]}.py" for module in ENTRIES} | {p.name for p in here.glob("linearize_*.py")}
        return {name: (here / name).read_text() for name in sorted(names)}
    files, pending = {}, list(ENTRIES)
    while pending:
        module = pending.pop()
        name = f"{flat_name(module)}.py"
        if name not in files:
            text = text_of(module, find_spec(module))
            files[name] = flatten(text)
            pending += [imported for _, imported in our_imports(text)]
    return files


def text_of(name: str, spec: ModuleSpec | None) -> str:
    """Return the source text of a module.

    Args:
        name: the module's name, for the error.
        spec: its import spec.

    Raises:
        ImportError: the module has no file.
    """
    if spec is None or spec.origin is None:
        raise ImportError(f"the module {name} has no file")
    return Path(spec.origin).read_text()


@cache
def our_imports(source: str) -> tuple[tuple[int, str], ...]:
    """Return the line number and the module name of each `from linearize_... import` statement in a source
    text.
    """
    nodes = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom))
    imports = [(node.lineno, node.module or "") for node in nodes]
    ours = ("linearize_cli", "linearize_kernels")
    return tuple((line, name) for line, name in imports if name.split(".")[0] in ours)


def flatten(source: str) -> str:
    """Rewrite the imports of a source text for an artifact, where all modules are files of one folder.

    For example, `linearize_kernels.state` becomes `.linearize_kernels_state`.
    """
    lines = source.splitlines(keepends=True)
    for number, module in our_imports(source):
        line = lines[number - 1]
        lines[number - 1] = line.replace(f"from {module} ", f"from .{flat_name(module)} ", 1)
    return "".join(lines)


def load_own_code(path: Path) -> ModuleType:
    """Run a user's Python file, which defines a feature map, as the module `linearize_own_NAME`.

    Args:
        path: the original file, or its copy in an artifact, whose imports were rewritten.

    Raises:
        ImportError: the path is not a Python file.
    """
    name = OWN + path.stem.removeprefix(OWN)
    modules = walk_packages(import_module("linearize_kernels").__path__, "linearize_kernels.")
    packed = {flat_name(module.name): module.name for module in modules}
    spec = spec_from_file_location(name, path)
    if spec is None:
        raise ImportError(f"{path} is no Python file")
    module = sys.modules[name] = module_from_spec(spec)
    text = re.sub(
        r"from \.(linearize_kernels_\w+) ", lambda match: f"from {packed[match[1]]} ", path.read_text()
    )
    exec(compile(text, str(path), "exec"), vars(module))
    return module


def copy_code(folder: Path, feature_map: str | None) -> None:
    """Write the code that loads an artifact into its folder.

    Args:
        folder: the artifact's folder.
        feature_map: the recipe's feature map, or None. If a user's module defines it, that module is written
            too.
    """
    files = sources()
    cls = None if feature_map is None else FEATURE_MAPS.get(feature_map)
    if cls is not None and cls.__module__.startswith(OWN):
        own = sys.modules[cls.__module__]
        files[f"{own.__name__}.py"] = flatten(text_of(own.__name__, own.__spec__))
        files[f"{FLAT[ENTRIES[1]]}.py"] += (
            f"\nfrom .{own.__name__} import {cls.__name__}  # noqa: E402, F401\n"
        )
    for name, text in files.items():
        (folder / name).write_text(text)
