"""The checks `forms` (prefill and chunked prefill against decoding), `padding`, and `reload` (saving,
loading).
"""

from linearize_cli.metrics.equivalence import compare_forms, compare_padding, compare_reading, compare_reload
from linearize_cli.verification.check import Finding, Subject, compared


def forms(subject: Subject) -> Finding:
    """Compare the logits of prefills of many lengths, and of a chunked prefill, with those of decoding token
    by token.
    """
    decoder, _, _ = subject.task.start(subject.model, list(subject.rows[:1]))
    prefill, chunked = subject.comparison(), subject.comparison()
    compare_forms(decoder, subject.rows, subject.size, prefill, chunked)
    both = {"prefill_vs_decode": prefill, "chunked_vs_decode": chunked}
    found = [compared(name, x.diff, x.limit, {}) for name, x in both.items()]
    return Finding(
        {"forms": {name: x.diff for name, x in both.items()}},
        [line for x in found for line in x.lines],
        {name: x.limit for name, x in both.items()},
    )


def padding(subject: Subject) -> Finding:
    """Compare the logits of each row of a padded batch with those of the same row alone.

    If the model decodes, a few single tokens after the batch are compared too.
    """
    worst = subject.comparison()
    compare = compare_padding if subject.task.decodes else compare_reading
    compare(subject.task, subject.model, subject.rows, subject.size, worst)
    return compared("padding", worst.diff, worst.limit, {"padding": {"max_abs_diff": worst.diff}})


def reload(subject: Subject) -> Finding:
    """Compare the model's logits with those of a copy that was saved and loaded."""
    worst = subject.comparison()
    compare_reload(subject.task, subject.model, subject.rows, worst)
    return compared("reload", worst.diff, worst.limit, {"reload": {"max_abs_diff": worst.diff}})
