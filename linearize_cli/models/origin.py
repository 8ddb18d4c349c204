"""The licence and the languages of a base model, read from its model card."""

import re
from pathlib import Path
from typing import Any

from linearize_cli.inputs import parse_yaml

TEXTS = ("license", "license_name", "license_link")
GATED = "extra_gated_"  # begins the keys of a card whose repository asks for consent
HEAD = re.compile(r"\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", re.DOTALL)
UNREAD = {"unread": True}


def origin(source: str) -> dict[str, Any]:
    """Return the licence and the languages of a base model, and whether its repository asks for consent, as far
    as its card says so.

    Args:
        source: the base model's local folder. A GGUF file has no card.

    Returns:
        those of `license`, `license_name`, `license_link` and `language` (a list) that the card has, and `gated`
            (True) if it asks for consent. Empty without a card, and `unread` (True) if the card cannot be read.
    """
    path = Path(source, "README.md")
    if not path.is_file():
        return {}
    try:
        head = HEAD.match(path.read_text(encoding="utf-8-sig"))
        data = parse_yaml(head[1]) if head else {}
    except (OSError, ValueError):
        return dict(UNREAD)
    if not isinstance(data, dict):
        return dict(UNREAD) if head else {}
    licences = data.get("license")
    if isinstance(licences, list) and licences:
        several = len(licences) > 1
        data["license"] = "other" if several else licences[0]
        if several:
            data["license_name"] = ", ".join(map(str, licences))
    found: dict[str, Any] = {key: data[key] for key in TEXTS if isinstance(data.get(key), str)}
    languages = data.get("language")
    if languages is not None:
        listed = languages if isinstance(languages, list) else [languages]
        found["language"] = ["no" if x is False else str(x) for x in listed]  # YAML reads Norwegian as False
    if any(str(key).startswith(GATED) for key in data):
        found["gated"] = True
    return found


def obstacle(facts: dict[str, Any]) -> str:
    """Return why publishing a changed copy of a base model needs the user's consent, as the end of a sentence. It is
    empty if nothing is known that speaks against it.

    Args:
        facts: the result of `origin`.
    """
    names = f"{facts.get('license', '')}, {facts.get('license_name', '')}".strip(", ")
    if "-nd" in names:
        return f"has the licence {names}, which does not allow changed copies to be published"
    if facts.get("gated"):
        return "is gated: its owner asks for consent to terms, which may also bind copies of it"
    if facts.get("unread"):
        return "has a model card (README.md) that cannot be read, so its licence is not known"
    return ""
