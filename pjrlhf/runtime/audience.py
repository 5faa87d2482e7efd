"""The preferences of a run, the objectives among them, and the score of an answer by each."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pjrlhf.data import preferences, synthetic
from pjrlhf.data.preferences import Preference, Preferences
from pjrlhf.errors import UserError
from pjrlhf.rewards.scorers import scorer
from pjrlhf.types import Json

NAMED: Mapping[str, Preferences] = {**synthetic.ENVIRONMENTS, "paper": preferences.PAPER}


class Audience:
    """The preferences, objectives and judge of a run.

    Args:
      named: "synthetic", "synthetic16", "paper", or {id: {"dimension", "sentence", optional "label"}}.
      objectives: ids of the preferences with an ingredient of their own.
      general: the criterion of the general reward of RLHF; "" for none.
      judge: "synthetic", or {criterion: name of a scorer}.

    Raises:
      UserError: a preference without dimension or sentence, or an objective that is not among the preferences.
    """

    def __init__(self, named: str | Mapping[str, Any], objectives: Sequence[str], general: str, judge: Any):
        self.named, self.judge = named, judge
        self.objectives = tuple(objectives)
        self.general = general
        self.preferences = self._preferences()

    def check(self) -> None:
        """Raises UserError where the judge has no scorer for a criterion, or an unknown one."""
        _ = self.score

    def _preferences(self) -> Preferences:
        """Preference id -> dimension, sentence and label."""
        if isinstance(self.named, str):
            found = NAMED[self.named]
        else:
            found = {name: _preference(name, fields) for name, fields in self.named.items()}
        missing = [name for name in self.objectives if name not in found]
        if missing:
            raise UserError(f"objective {missing[0]!r}: not among the preferences {', '.join(found)}; add it to them")
        return found

    @property
    def synthetic(self) -> Preferences:
        """The preferences of the synthetic environment, for its corpus and its judge."""
        if isinstance(self.named, str):
            return synthetic.ENVIRONMENTS.get(self.named, synthetic.PREFERENCES)
        return synthetic.PREFERENCES

    @property
    def rewards(self) -> tuple[str, ...]:
        """The criteria with a reward model and a policy: the objectives, and the general criterion if it is set."""
        return self.objectives + ((self.general,) if self.general else ())

    @functools.cached_property
    def score(self) -> Callable[[str, str, str], float]:
        """(request, answer, criterion) -> the score of the judge."""
        if self.judge == "synthetic":
            return functools.partial(synthetic.score, preferences=self.synthetic)
        criteria = dict(self.judge)
        missing = [name for name in self.rewards if name not in criteria]
        if missing:
            raise UserError(f"judge: no scorer for {missing[0]!r}; add it to --config.judge")
        scorers = {name: scorer(spec) for name, spec in criteria.items()}
        return lambda prompt, text, criterion: scorers[criterion](prompt, text)


def _preference(name: str, fields: Mapping[str, Json]) -> Preference:
    try:
        return Preference(**fields)
    except TypeError as error:
        raise UserError(
            f"preferences.{name}: is {fields!r}; give it a dimension and a sentence, and optionally a label"
        ) from error
