"""A check that a folder is a complete artifact, and the choice of its files that a push publishes."""

from pathlib import Path

from safetensors import SafetensorError, safe_open

from linearize_cli.artifact.checksums import changed, edited_reports
from linearize_cli.artifact.contents import published_files
from linearize_cli.artifact.record import report_faults
from linearize_cli.errors import UserError
from linearize_cli.inputs import read_object

REQUIRED = ("config.json", "linearize.json", "recipe.yaml", "README.md", "tokenizer_config.json")
VOCABULARY = ("tokenizer.json", "*.model", "vocab.json", "vocab.txt")
INDEX = "model.safetensors.index.json"


def artifact_files(folder: Path) -> list[str]:
    """Return the sorted relative paths of an artifact's files that a push publishes.

    Raises:
        UserError: the folder is missing or is not a complete artifact. The message names every error.
    """
    if not folder.is_dir():
        raise UserError(
            f"there is no folder {folder}",
            "Give the folder that `linearize convert` wrote: linearize push ARTIFACT [REPO_ID].",
        )
    names = published_files(folder)
    contents, faults = {}, [f"no {name}" for name in REQUIRED if name not in names]
    for name in names & {"config.json", "linearize.json", INDEX}:
        try:
            contents[name] = read_object(folder / name)
        except UserError as error:
            faults.append(error.what.removeprefix(f"{folder}/"))
    if "config.json" in contents:
        faults += config_faults(contents["config.json"], names)
    faults += record_faults(contents.get("linearize.json", {}), folder)
    if not any(path.name in names for pattern in VOCABULARY for path in folder.glob(pattern)):
        faults.append("no vocabulary of the tokenizer (such as tokenizer.json)")
    shards = contents.get(INDEX, {}).get("weight_map", {})
    faults += weight_faults(folder, names, set(shards.values()) if isinstance(shards, dict) else set())
    if faults:
        raise UserError(
            f"{folder} is not a whole linearize artifact: {'; '.join(faults)}",
            "Run the command of a changed report again (eval, bench, verify), or remove the report. For other files,\n"
            "`linearize convert MODEL -o DIR` writes an artifact; an interrupted convert is finished by --resume.",
        )
    return sorted(names)


def config_faults(config: dict, names: set[str]) -> list[str]:
    """Return a phrase for each error in the contents of `config.json`.

    Args:
        names: the relative paths of the artifact's files.
    """
    faults, auto_map = [], config.get("auto_map")
    auto_map = auto_map if isinstance(auto_map, dict) else {}
    if config.get("model_type") != "linearized":
        faults.append(f"config.json has model_type {config.get('model_type')!r}, not 'linearized'")
    if not any(name.startswith("AutoModel") for name in auto_map):
        faults.append("config.json has no auto_map for AutoModelForCausalLM or the like")
    modules = {f"{target.split('.')[0]}.py" for target in auto_map.values() if isinstance(target, str)}
    return faults + [f"no {module}, which auto_map names" for module in sorted(modules - names)]


def record_faults(record: dict, folder: Path) -> list[str]:
    """Return a phrase for each error in `linearize.json`, and one for the files that differ from its
    checksums.
    """
    faults = [f"linearize.json: {fault}" for fault in report_faults(record)]
    if isinstance(record.get("checksums") or {}, dict) and (since := changed(record, folder)):
        faults.append(f"since it was saved, {since} (`linearize seal` records changes of your own)")
    faults += [f"{name} was changed since it was written" for name in edited_reports(folder)]
    return faults


def weight_faults(folder: Path, names: set[str], shards: set) -> list[str]:
    """Return a phrase for each file of weights that is missing or broken.

    Args:
        names: the relative paths of the artifact's files.
        shards: the weight files that the index names.
    """
    faults = [
        f"no {shard}, which the index names" for shard in sorted(map(str, shards)) if shard not in names
    ]
    weights = sorted(name for name in names if name.endswith(".safetensors"))
    if not any(name.startswith("model") for name in weights):
        faults.append("no model*.safetensors")
    for name in weights:
        try:
            # Opening compares the header with the size of the file, which finds a file that was cut short.
            with safe_open(folder / name, framework="numpy"):
                pass
        except (OSError, SafetensorError) as error:
            faults.append(f"{name} is broken ({error})")
    return faults
