"""What the model card of a base model says about its licence and its languages."""

from pathlib import Path
from typing import Any

import yaml

KEYS = ("license", "license_name", "license_link", "language")
GATED = "extra_gated_"  # begins the keys of a card whose repository asks for consent


def origin(source: str) -> dict[str, Any]:
    """Return the licence, the languages, and whether the repository asks for consent, as far as a base model's
    card says so.

    Args:
        source: the base model's local folder. A GGUF file has no card.

    Returns:
        `license`, `license_name`, `license_link` and `language` (a list), those that the card has, and `gated`
            (True) if it asks for consent. Empty without a card that can be read.
    """
    try:
        text = Path(source, "README.md").read_text(encoding="utf-8")
        _, head, _ = text.split("---\n", 2) if text.startswith("---\n") else ("", "", "")
        data = yaml.safe_load(head)
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    if not isinstance(data, dict):
        return {}
    found = {key: data[key] for key in KEYS if isinstance(data.get(key), (str, list))}
    if isinstance(found.get("license"), list):  # several licences
        found["license"], found["license_name"] = "other", ", ".join(map(str, found["license"]))
    if "language" in found:
        languages = found["language"]
        found["language"] = [languages] if isinstance(languages, str) else [str(x) for x in languages]
    if any(str(key).startswith(GATED) for key in data):
        found["gated"] = True
    return found


def obstacle(facts: dict[str, Any]) -> str:
    """Return why a changed copy of a base model may not be published without a further look, as the end of a
    sentence. Empty if nothing speaks against it.

    Args:
        facts: the result of `origin`.
    """
    if "-nd" in str(facts.get("license", "")):
        return f"has the licence {facts['license']}, which does not allow changed copies to be published"
    if facts.get("gated"):
        return "is gated: its owner asks for consent to terms, which may also bind copies of it"
    return ""
