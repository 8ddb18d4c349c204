"""The sections of a model card about what `eval` and `bench` have measured."""

from pathlib import Path
from typing import Any

from linearize_cli.artifact.contents import REPORTS
from linearize_cli.inputs import read_object
from linearize_cli.tables import WEAK_RECALL, number, size


def measured(folder: Path) -> dict[str, Any]:
    """Return what has been measured of an artifact: the contents of `eval` and `bench` (None if they were not
    run), and the names of the `figures`.
    """
    found: dict[str, Any] = {
        name: read_object(folder / f"{name}.json") if (folder / f"{name}.json").is_file() else None
        for name in ("eval", "bench")
    }
    images = [pattern for pattern in REPORTS if pattern.endswith(".png")]
    return {**found, "figures": sorted(file.name for pattern in images for file in folder.glob(pattern))}


def quality(report: dict[str, Any]) -> list[str]:
    """Return the paragraphs about a report of `eval`: perplexity, agreement with the teacher, recall by
    distance and lm_eval's tasks.
    """
    found, parts = report.get("perplexity") or {}, []
    if found.get("student") is not None:
        parts.append(
            f"On {Path(report['data']).name}, in blocks of {report['contexts']['measured'][0]:,} tokens, the "
            f"perplexity is {found['student']:,.3f}; that of the softmax model is {found['teacher']:,.3f}. "
            f"KL(softmax ‖ this model) is {number(report.get('kl'), '.4f')} nats, and the most probable token is "
            f"the same at {number(report.get('top1_agreement'), '.1%')} of positions."
        )
    for row in report.get("embeddings") or []:
        parts.append(
            f"On {Path(report['data']).name}, in blocks of {row['context']:,} tokens, the distance of the "
            f"embeddings (1 - cosine) is {number(row['distance'], '.4f')}, and the rank correlation of the "
            f"similarities of all pairs {number(row['rank_correlation'], '.4f')}."
        )
    for key, what in (("recall", "words of the text"), ("passkey", "a pass key")):
        rows = (report.get(key) or {}).get("by_distance") or []
        if rows and (report[key].get("teacher") or 0) >= WEAK_RECALL:
            cells = [
                f"| {row['distance']:,} | {number(row['teacher'], '.0%')} | {number(row['student'], '.0%')} |"
                for row in rows
            ]
            head = "| tokens back, at least | softmax model | this model |\n| ---: | ---: | ---: |"
            parts += [f"Recall of {what} by distance:", "\n".join([head, *cells])]
    tasks = [
        f"| {task} | {metric} | {number(pair['teacher'], '.4f')} | {number(pair['student'], '.4f')} |"
        for task, metrics in (report.get("tasks") or {}).items()
        for metric, pair in metrics.items()
    ]
    if tasks:
        head = "| lm_eval task | metric | softmax model | this model |\n| --- | --- | ---: | ---: |"
        parts.append("\n".join([head, *tasks]))
    return parts


def speed(report: dict[str, Any]) -> list[str]:
    """Return the paragraphs about a report of `bench`: a table of tokens/s and memory, and the machine."""
    rows = {(row["phase"], row["batch"], row["context"], row["model"]): row for row in report["rows"]}
    cells = []
    for phase, batch, context in dict.fromkeys(key[:3] for key in rows):
        pair = [rows.get((phase, batch, context, name), {}) for name in ("teacher", "student")]
        if all(row.get("tokens_per_s") for row in pair):
            teacher, student = (row["tokens_per_s"] for row in pair)
            peaks = " | ".join("-" if row["peak_bytes"] is None else size(row["peak_bytes"]) for row in pair)
            cells.append(
                f"| {phase} | {batch} | {context:,} | {teacher:,.1f} | {student:,.1f} | "
                f"{student / teacher:.2f} | {peaks} |"
            )
    if not cells:
        return []
    names = (
        "phase",
        "batch",
        "context",
        "softmax, tokens/s",
        "this model",
        "ratio",
        "softmax, peak",
        "this model",
    )
    head = f"| {' | '.join(names)} |\n| --- |{' ---: |' * (len(names) - 1)}"
    on = report["machine"]
    where = f"{on['gpu'] or on['cpu']}, {on['threads']} thread of {on['cores']} cores, {report['dtype']}"
    return ["\n".join([head, *cells]), f"{where}; medians, the models timed alternately."]
