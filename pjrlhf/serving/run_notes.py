"""What a run tells people about what is served from it: its title, what its ingredients mean, what to ask."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from pjrlhf.data.named_preferences import NAMED
from pjrlhf.data.preferences import Preference, Preferences

EXAMPLES = ("what is rain ?", "tell me about sun .")  # the base of the synthetic environment understands no others


@dataclasses.dataclass(frozen=True)
class RunNotes:
    """Notes of a run; all empty where no run is served.

    Attributes:
      title: of its config.
      preferences: by id; ingredients of the same name follow them.
      examples: questions that its models understand.
    """

    title: str = ""
    preferences: Preferences = dataclasses.field(default_factory=dict)
    examples: tuple[str, ...] = ()

    def describe(self, name: str) -> dict[str, str]:
        """The `label`, `description` and `dimension` of an ingredient; empty where the run says nothing of it."""
        found = self.preferences.get(name)
        if found is None:
            return {"label": "", "description": "", "dimension": ""}
        return {"label": found.label, "description": found.sentence, "dimension": found.dimension}


def read_notes(config: Mapping[str, Any]) -> RunNotes:
    """The notes of a run with this config."""
    named = config.get("preferences") or {}
    if isinstance(named, str):
        preferences = NAMED.get(named, {})  # a run of another version may have other names
    else:
        preferences = {name: Preference(**fields) for name, fields in named.items()}
    own = "sft" in config["stages"] and config["data"]["prompts"] == "synthetic"
    return RunNotes(config.get("title", ""), preferences, EXAMPLES if own else ())
