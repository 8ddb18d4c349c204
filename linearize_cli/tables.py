"""The printed tables of all commands."""

import re
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from linearize_cli.artifact.record import DISTANCES
from linearize_cli.methods.recipe import Recipe

WEAK_RECALL = 0.1  # below this recall of the teacher, the student's recall means nothing


def table(*columns: str, title: str | None = None) -> Table:
    """Return an empty table without borders. Columns that start with `>` are aligned to the right.

    A cell that is too wide goes on in the next line, so that nothing is cut off.
    """
    result = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        justify = "right" if column.startswith(">") else "left"
        result.add_column(column.lstrip(">"), justify=justify, overflow="fold")
    return result


def number(value: float | None, form: str = ".3f") -> str:
    """Return a formatted number, or `-` for None.

    Args:
        form: the format.
    """
    return "-" if value is None else format(value, form)


def size(count: int) -> str:
    """Return a number of bytes with a decimal unit, such as `1.5 MB`."""
    amount, units = float(count), ["B", "kB", "MB", "GB", "TB"]
    while amount >= 1000 and len(units) > 1:
        amount, _ = amount / 1000, units.pop(0)
    return f"{amount:.0f} {units[0]}" if amount >= 100 or units[0] == "B" else f"{amount:.1f} {units[0]}"


def perplexities(report: dict[str, Any]) -> Table:
    """Return a table of a conversion's perplexities: after each stage, and with the local or the linear part
    of the attention alone.
    """
    rows = table("", ">perplexity", ">x teacher")
    teacher = report["perplexity"]["teacher"]
    for name, value in report["perplexity"].items():
        rows.add_row(name, number(value), number(value and teacher and value / teacher))
    for name, value in report["ablation"].items():
        if name != "full" and value is not None:
            rows.add_row(name.replace("_", " "), number(value), number(value / teacher))
    return rows


def kept(report: dict[str, Any]) -> Table:
    """Return the table of `--keep-softmax auto:N`: the distance from the teacher with each layer alone returned
    to softmax.

    The layers that stay softmax are marked "kept".
    """
    chosen = report["keep_softmax"]
    titles = {**DISTANCES, "repeated_kl": "KL on repeated text"}
    metrics = [name for name in titles if name in chosen]
    rows = table("layer as softmax", *(f">{titles[name]}" for name in metrics), "")
    rows.columns[0].no_wrap = True
    for name in chosen[metrics[0]]:
        values = (number(chosen[metric][name], ".4f") for metric in metrics)
        rows.add_row(name, *values, "kept" if name in chosen["kept"] else "")
    return rows


def distances(report: dict[str, Any], metric: str) -> Table:
    """Return a table of the distance from the teacher after each stage.

    Args:
        metric: a key of DISTANCES.
    """
    rows = table("", f">{DISTANCES[metric]}")
    for name, value in report[metric].items():
        rows.add_row(name.replace("_", " "), number(value, ".4f"))
    return rows


def conversion(report: dict[str, Any]) -> RenderableType:
    """Return the report of `convert`: quality, self-check and memory."""
    layers, check = report["layers"], report["self_check"]
    state, per_token = report["state_bytes"], report["kv_bytes_per_token"]
    forms = ["full", *(form for form in ("incremental", "padded") if check[form] is not None)]
    largest = max(difference for difference in check.values() if difference is not None)
    lines = [
        f"{report['output']}: {report['base_model']} as {report['method']}, "
        f"layers linear: {len(layers['linear'])}, softmax: {len(layers['softmax'])}",
        f"self-check passed: logits differ by at most {largest:.1e} (compared: {', '.join(forms)}, reloaded)",
    ]
    if per_token:
        lines.append(
            f"memory of one sequence in the linear layers: {size(state)} at any context; softmax attention needs "
            f"{size(per_token)} per token, so more than this from {state // per_token + 1:,} tokens on"
        )
    recovered, transferred = (report["perplexity"].get(name) for name in ("recovered", "transferred"))
    if recovered and transferred and recovered > transferred:
        lines.append(
            "distillation raised the perplexity: it follows the teacher, not the text. `linearize eval` shows the KL "
            "from the teacher"
        )
    measured = [perplexities(report)] if any(report["perplexity"].values()) else []
    measured += [distances(report, metric) for metric in DISTANCES if report.get(metric)]
    if report["keep_softmax"]:
        measured += ["", kept(report)]
    if report.get("medusa"):
        measured += ["", medusa(report["medusa"])]
    return Group(*measured, "", *lines)


def medusa(facts: dict[str, Any]) -> RenderableType:
    """Return a table of how often each Medusa head is right within its top 1, 2 and 3 candidates, and the
    chosen tree.
    """
    rows = table("head", *(f">top {rank}" for rank in (1, 2, 3)))
    for head, rates in enumerate(facts["acceptance"], 1):
        rows.add_row(str(head), *(f"{sum(rates[:rank]):.1%}" for rank in (1, 2, 3)))
    return Group(
        rows,
        "",
        f"{facts['expected_tokens_per_step']} expected tokens per step with a tree of {facts['tree_nodes']} nodes, "
        "the fastest on this machine",
    )


def plan(report: dict[str, Any]) -> RenderableType:
    """Return the report of `convert --dry-run`: the layers, the training budget, and the estimates."""
    layers = report["layers"]
    rows = table("layer", "becomes")
    for name in layers["linear"]:
        rows.add_row(name, report["method"])
    for name, reason in layers["softmax"].items():
        rows.add_row(name, f"softmax: {reason}")
    budget = f"{report['tokens']:,} tokens" if report["tokens"] else "no training"
    chosen = [f"kept as softmax: {report['keep_softmax']}"] if report["keep_softmax"] else []
    return Group(
        rows,
        "",
        *chosen,
        f"{budget} in blocks of {report['seq_len']}, {report['batch_size']} per step; nothing was written",
        report["plan_line"],
        "",
        estimated(report["estimate"]),
    )


def estimated(lines: list[dict[str, Any]]) -> Table:
    """Return the estimated memory and time of a conversion, with the arithmetic behind each number."""
    rows = table("", "arithmetic", ">")
    section = None
    for line in lines:
        if line["section"] != section:
            section = line["section"]
            rows.add_row(Text(section, style="bold"))
        rows.add_row(f"  {line['what']}", line["arithmetic"], quantity(line["value"], line["unit"]))
    return rows


def quantity(value: float, unit: str) -> str:
    """Return a value with a readable unit, such as `1.5 GB`, `3.2 GFLOP/token` or `4.5 h`."""
    if unit == "B":
        return size(value)
    if unit == "s":
        scale, name = next((x for x in ((3600, "h"), (60, "min")) if value >= x[0]), (1, "s"))
        return f"{value / scale:,.1f} {name}"
    prefixes = ["", "k", "M", "G", "T", "P"]
    while value >= 1000 and len(prefixes) > 1:
        value, _ = value / 1000, prefixes.pop(0)
    return (
        f"{value:.3g} {prefixes[0]}{unit}" if unit != "parameters" else f"{value:.3g} {prefixes[0]}".strip()
    )


def inspection(report: dict[str, Any]) -> RenderableType:
    """Return the report of `inspect`: the layers, and the memory of softmax and linear attention by context."""
    rows = table(">", "layer", "attention", ">heads", ">kv", ">head size", "convertible")
    for index, layer in enumerate(report["layers"]):
        g = layer["geometry"]
        head = f"{g['key_dim']}" if g["key_dim"] == g["value_dim"] else f"{g['key_dim']}/{g['value_dim']}"
        rows.add_row(
            str(index),
            layer["name"],
            layer["attention"],
            str(g["heads"]),
            str(g["kv_heads"]),
            head,
            layer["refusal"] or "yes",
        )
    if not report["kv_bytes_per_token"]:
        return rows
    memory = table(">context", ">softmax", f">{report['method']}", title="memory of one sequence")
    for row in report["memory"]:
        memory.add_row(f"{row['context']:,}", size(row["kv_bytes"]), size(row["state_bytes"]))
    return Group(rows, "", memory)


def method_table(recipes: list[Recipe]) -> RenderableType:
    """Return a table of methods and their parts, and a line about their augmented forms.

    Args:
        recipes: the default method first. Augmented forms of the others are not listed one by one.
    """
    rows = table("method", "local", "features", "memory", "combine", "arXiv")
    for recipe in recipes:
        a = recipe.attention
        if ":" not in recipe.name:
            rows.add_row(
                recipe.name + (" (default)" if recipe is recipes[0] else ""),
                f"{a.local.scope} {a.local.size}" if a.local else "-",
                a.far.feature_map if a.far else "-",
                "-" if a.memory.kind == "none" else a.memory.kind,
                a.combine,
                "\n".join(re.findall(r"\d{4}\.\d{5}", recipe.paper)),
            )
    forms = sum(":" in recipe.name for recipe in recipes)
    more = (
        f"{forms} more: augmented:NAME adds a window, sinks and a convolution to a method, for example "
        "augmented:gated-delta.\n`linearize methods NAME` prints a recipe with every key."
    )
    return Group(rows, "", more)


def evaluation(report: dict[str, Any]) -> RenderableType:
    """Return the report of `eval`: perplexity or embeddings by context, then ablation, recall, generated text
    and lm_eval's tasks.
    """
    if report["embeddings"]:
        return embeddings(report["embeddings"])
    texts = table(">context", ">blocks", ">teacher", ">student", ">x teacher", ">KL", ">same top token")
    for row in report["perplexity"]["by_context"]:
        teacher, student = row["teacher"], row["student"]
        texts.add_row(
            f"{row['context']:,}",
            f"{row['blocks']:,}",
            number(teacher),
            number(student),
            number(student and student / teacher),
            number(row["kl"], ".4f"),
            number(row["top1_agreement"], ".1%"),
        )
    return Group("perplexity", texts, *ablation(report), *recall(report), *written(report), *harness(report))


def embeddings(measured: list[dict[str, Any]]) -> Table:
    """Return a table of the agreement of both models' embeddings by context."""
    rows = table(
        ">context", ">blocks", f">{DISTANCES['embedding_distance']}", ">rank correlation of similarities"
    )
    for row in measured:
        numbers = (number(row[key], ".4f") for key in ("distance", "rank_correlation"))
        rows.add_row(f"{row['context']:,}", f"{row['blocks']:,}", *numbers)
    return rows


def ablation(report: dict[str, Any]) -> list[RenderableType]:
    """Return a line with the student's perplexity if only its local or only its linear part is used. Empty if
    it was not measured.
    """
    parts = {name: value for name, value in report["ablation"].items() if name != "full" and value}
    said = "    ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in parts.items())
    return [f"student's perplexity with one part only: {said}"] if parts else []


def recall(report: dict[str, Any]) -> list[RenderableType]:
    """Return a table of recall by distance, with a column for each measure and model. Empty if recall was not
    measured.
    """
    measures = {name: report[name] for name in ("recall", "passkey") if report[name]}
    if not measures:
        return []
    parts = {name: {part["distance"]: part for part in x["by_distance"]} for name, x in measures.items()}
    columns = [(measure, name) for measure in measures for name in ("teacher", "student")]
    titles = {"recall": "recall", "passkey": "pass key"}
    rows = table(">tokens back", *(f">{titles[measure]},\n{name}" for measure, name in columns))
    for distance in sorted(set().union(*parts.values())):
        until = next(found[distance] for found in parts.values() if distance in found).get("until")
        shares = (parts[measure].get(distance, {}).get(name) for measure, name in columns)
        where = f"{distance:,} to {until - 1:,}" if until else f"{distance:,}"
        rows.add_row(where, *(number(share, ".1%") for share in shares))
    rows.add_row("all", *(number(measures[measure][name], ".1%") for measure, name in columns))
    weak = [titles[name] for name, values in measures.items() if (values["teacher"] or 0) < WEAK_RECALL]
    said = (
        f"{' and '.join(weak)}: the teacher's own is below {WEAK_RECALL:.0%}, so the student's means nothing"
    )
    return ["", rows, *([said] if weak else [])]


def written(report: dict[str, Any]) -> list[RenderableType]:
    """Return the comparison of generated text: repetition, and agreement with the teacher. Empty if none was
    generated.
    """
    if report["generation"] is None:
        return []
    found = report["generation"]
    repeated, exact = found["repetition"], found["exact_match"]
    rows = table("generated text", ">teacher", ">student")
    for way in ("greedy", "sampled"):
        shares = (number(repeated[way][name], ".1%") for name in ("teacher", "student"))
        rows.add_row(f"repeated 4-grams, {way} (real text: {number(repeated['text'], '.1%')})", *shares)
    said = f"greedy texts of both agree for the first {exact['mean']:.1f} of {exact['of']} tokens on average"
    return ["", rows, said]


def harness(report: dict[str, Any]) -> list[RenderableType]:
    """Return a table of lm_eval's results. Empty without tasks."""
    rows = table("task", "metric", ">teacher", ">student")
    for task, metrics in (report["tasks"] or {}).items():
        for metric, values in metrics.items():
            if "stderr" not in metric:
                rows.add_row(task, metric, number(values["teacher"], ".4f"), number(values["student"], ".4f"))
    return ["", rows] if rows.row_count else []


def pushed(result: dict[str, Any]) -> RenderableType:
    """Return the report of `push`: the files, their sizes, and the destination."""
    rows = table("file", ">size")
    for file in result["files"]:
        rows.add_row(file["path"], size(file["size"]))
    verb = "would be pushed" if result["dry_run"] else "pushed"
    where = result["pull_request"] or result["url"]
    return Group(rows, "", f"{len(result['files'])} files, {size(result['bytes'])}, {verb} to {where}")


def compared(result: dict[str, Any]) -> RenderableType:
    """Return the report of `compare`: a column for each artifact, and what makes numbers incomparable."""
    rows = table("", *(f">{name}" for name in result["artifacts"]))
    rows.columns[0].no_wrap = True
    for label, values in result["rows"].items():
        rows.add_row(label, *(value or "-" for value in values))
    notes = [f"{note}. Perplexities and KL cannot be compared." for note in result["notes"]]
    return Group(rows, *(["", *notes] if notes else []))


def demonstration(result: dict[str, Any]) -> RenderableType:
    """Return the report of `demo`: quality, recall, memory, speed and the verdict of `verify`."""
    recall, context = result["recall"], result["context"]
    rows = perplexities(result)
    facts = table("", ">teacher", ">recovered")
    facts.add_row("recall of earlier facts", f"{recall['teacher']:.1%}", f"{recall['student']:.1%}")
    facts.add_row(
        f"memory at {context:,} tokens",
        size(result["kv_bytes_per_token"] * context),
        size(result["state_bytes"]),
    )
    timed = result["bench"]["rows"]
    longest = max(row["context"] for row in timed)
    for phase in dict.fromkeys(row["phase"] for row in timed):
        speeds = [x["tokens_per_s"] for x in timed if (x["phase"], x["context"]) == (phase, longest)]
        facts.add_row(
            f"{phase} at {longest:,} tokens, tokens/s", *(number(speed, ",.0f") for speed in speeds)
        )
    return Group(rows, "", facts, "", f"verify: {result['verdict']}    artifact: {result['output']}")
