"""Sets of preferences that a config names."""

from collections.abc import Mapping

from pjrlhf.data import preferences, synthetic
from pjrlhf.data.preferences import Preferences

NAMED: Mapping[str, Preferences] = {
    **synthetic.ENVIRONMENTS,
    "paper": preferences.PAPER,
    "paper16": preferences.PAPER16,
}
