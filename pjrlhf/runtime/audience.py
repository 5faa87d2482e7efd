"""The preferences of a run, the objectives among them, and the score of an answer by each."""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from pjrlhf.data import synthetic
from pjrlhf.data.messages import Prompt
from pjrlhf.data.named_preferences import NAMED
from pjrlhf.data.preferences import Preference, Preferences
from pjrlhf.errors import UserError
from pjrlhf.judges.language_model import announce
from pjrlhf.parallel.processes import broadcast_from_zero, is_process_zero
from pjrlhf.rewards import server
from pjrlhf.rewards.scorers import checked, scorer
from pjrlhf.rewards.sources import NO_COLUMNS, NO_RUN, RecordColumns, RewardSource, SourceContext, reward_source
from pjrlhf.runtime import classifiers, judges
from pjrlhf.settings import shown
from pjrlhf.types import Json

# Modules that register reward sources.
REWARD_KINDS = (judges.by_judge, server.by_http, classifiers.by_classifier)


@dataclasses.dataclass(frozen=True)
class HostRewards:
    """What reward sources say.

    Attributes:
      rewards: raw, float32 [B, K]; NaN where a criterion has a reward model, where its source says nothing, and where
        the reward is not wanted.
      seconds: what each source took that this process asked.
    """

    rewards: np.ndarray
    seconds: Mapping[str, float]


class Audience:
    """The preferences, objectives and judge of a run.

    Args:
      named: "synthetic", "synthetic16", "paper", or {id: {"dimension", "sentence", optional "label"}}.
      objectives: ids of the preferences with an ingredient of their own.
      general: the criterion of the general reward of RLHF; "" for none.
      judge: "synthetic"; "rewards", the reward sources of the run; or {criterion: name of a scorer, or specification of
        a reward source that judges alone}.
      sources: {objective: specification of its reward source, see `rewards.sources`}; the others have reward models
        that are trained here.
      context: what the run offers to the sources; by default nothing, for a check.

    Raises:
      UserError: a preference without dimension or sentence, or an objective that is not among the preferences.
    """

    def __init__(
        self,
        named: str | Mapping[str, Any],
        objectives: Sequence[str],
        general: str,
        judge: Any,
        sources: Mapping[str, Any] | None = None,
        context: SourceContext = NO_RUN,
    ):
        self.named, self.judge = named, judge
        self.objectives = tuple(objectives)
        self.general = general
        self.source_specs, self.context = dict(sources or {}), context
        self.preferences = self._preferences()

    def within(self, context: SourceContext) -> "Audience":
        """The same audience, with reward sources that have the context of a run."""
        return Audience(self.named, self.objectives, self.general, self.judge, self.source_specs, context)

    def check(self) -> None:
        """Raises UserError where the judge has no scorer for a criterion, or an unknown one; for a reward source that
        cannot be made, or that no objective has.
        """
        _ = self.score, self.sources
        if self._judges:
            try:
                _ = self._judges.sources
            except UserError as error:
                raise UserError(f"judge: {error}") from error

    def check_scores(self) -> None:
        """Raises UserError where the synthetic judge has no score for a criterion."""
        known = (*self.synthetic, "helpful")
        if self.judge == "synthetic" and (unknown := [name for name in self.rewards if name not in known]):
            raise UserError(
                f"judge: synthetic has no score for {unknown[0]!r}; give --config.judge a scorer for each criterion"
            )

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
    def sentences(self) -> dict[str, str]:
        """Preference id -> its sentence, which may be empty."""
        return {name: found.sentence for name, found in self.preferences.items()}

    @property
    def rewards(self) -> tuple[str, ...]:
        """The criteria with a reward and a policy: the objectives, and the general criterion if it is set."""
        return self.objectives + ((self.general,) if self.general else ())

    @functools.cached_property
    def sources(self) -> Mapping[str, RewardSource]:
        """The sources of rewards that no reward model of this program gives, by criterion."""
        if unknown := [name for name in self.source_specs if name not in self.rewards]:
            raise UserError(
                f"rewards: {unknown[0]!r} is not one of {', '.join(self.rewards)}; add it to the objectives"
            )
        made = {name: reward_source(name, spec, self.context) for name, spec in self.source_specs.items()}
        return {name: source for name, source in made.items() if source is not None}

    @property
    def learned(self) -> tuple[str, ...]:
        """The criteria with a reward model that is trained here."""
        return tuple(name for name in self.rewards if name not in self.sources)

    def announce(self, name: str, answers: int | Mapping[str, int]) -> None:
        """Logs how many requests the sources of rewards send at most, before the first is sent.

        Args:
          name: of the stage.
          answers: how many each source is asked about; by criterion, or the same for all.
        """
        counts = {one: answers if isinstance(answers, int) else answers.get(one, 0) for one in self.sources}
        announce(name, [pair for one, source in self.sources.items() for pair in source.planned_requests(counts[one])])

    def host_rewards(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[str],
        wanted: Bool[np.ndarray, "B K"] | None = None,
        records: RecordColumns = NO_COLUMNS,
    ) -> Float[np.ndarray, "B K"]:
        """The rewards of `ask`."""
        return self.ask(prompts, completions, wanted, records)().rewards

    def ask(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[str],
        wanted: Bool[np.ndarray, "B K"] | None = None,
        records: RecordColumns = NO_COLUMNS,
        pool: Executor | None = None,
    ) -> Callable[[], "HostRewards"]:
        """Asks the sources for the rewards of completions by the K criteria of `rewards`; the result waits for them.

        Process 0 asks the sources, so that all processes have the same rewards. Sources on the mesh are asked on every
        process, in this thread, and all processes must call this and the result with the same arguments in the same
        order. Sources that wait for others are asked at the same time, each in a thread of its own.

        Args:
          wanted: which rewards count; all where None.
          records: what the records have beside prompts.
          pool: asks the sources that are not on the mesh; where None they are asked before this returns.

        Raises:
          SourceFailed: a source fails; by the result where it is asked in the pool.
        """
        rows = {
            name: [i for i in range(len(completions)) if wanted is None or wanted[i, k]]
            for k, name in enumerate(self.rewards)
            if name in self.sources
        }

        def of(name: str) -> tuple[str, np.ndarray, float]:
            own, started = rows[name], time.perf_counter()
            texts = [completions[i] for i in own]
            found = self.sources[name]([prompts[i] for i in own], texts, records.select(own))
            return name, found, time.perf_counter() - started

        def of_host() -> list[tuple[str, np.ndarray, float]]:
            here = [name for name in asked if not self.sources[name].on_all_processes] if is_process_zero() else []
            waiting = [name for name in here if self.sources[name].waits]
            with ThreadPoolExecutor(max(len(waiting), 1)) as threads:
                later = [threads.submit(of, name) for name in waiting]
                found = [of(name) for name in here if name not in waiting]
                return found + [one.result() for one in later]

        asked = [name for name, own in rows.items() if own]
        on_host = pool.submit(of_host).result if pool else None
        on_mesh = [of(name) for name in asked if self.sources[name].on_all_processes]
        here = on_host or functools.partial(list, of_host())

        def result() -> HostRewards:
            found = np.full((len(completions), len(self.rewards)), np.nan, np.float32)
            each = [*on_mesh, *here()]
            for name, values, _ in each:
                found[rows[name], self.rewards.index(name)] = values
            return HostRewards(broadcast_from_zero(found), {name: seconds for name, _, seconds in each})

        return result

    @functools.cached_property
    def score(self) -> Callable[[Prompt, str, str], float]:
        """(request, answer, criterion) -> the score of the judge; NaN where a reward source says nothing."""
        if self.judge == "rewards":
            if self.learned:
                raise UserError(
                    f"judge: rewards, but {self.learned[0]!r} has a reward model that this run trains, which cannot "
                    "judge its own policies; give it a source in --config.rewards, or name scorers"
                )
            return lambda prompt, text, criterion: float(self.scores([prompt], [text], criterion)[0])
        if self.judge == "synthetic":
            return functools.partial(synthetic.score, preferences=self.synthetic)
        criteria = dict(self.judge)
        missing = [name for name in self.rewards if name not in criteria]
        if missing:
            raise UserError(f"judge: no scorer for {missing[0]!r}; add it to --config.judge")
        for name, spec in criteria.items():
            if not isinstance(spec, str | Mapping):
                raise UserError(f"judge.{name}: {shown(spec)} is not text; name a scorer, or give a reward source")
        scorers = {
            name: checked(f"judge.{name}: scorer {spec!r}", scorer(spec))
            for name, spec in criteria.items()
            if isinstance(spec, str)
        }

        def score(prompt: Prompt, text: str, criterion: str) -> float:
            own = scorers.get(criterion)
            return own(prompt, text) if own else float(self.scores([prompt], [text], criterion)[0])

        return score

    @functools.cached_property
    def _judges(self) -> "Audience | None":
        """The same criteria with the reward sources that judge alone, if there are some."""
        judge = self.judge if isinstance(self.judge, Mapping) else {}
        specs = {name: spec for name, spec in judge.items() if isinstance(spec, Mapping)}
        return Audience(self.named, self.objectives, self.general, "rewards", specs, self.context) if specs else None

    @property
    def judging_sources(self) -> Mapping[str, RewardSource]:
        """The reward sources that score answers for the judge, by criterion."""
        if self._judges:
            return self._judges.sources
        return self.sources if self.judge == "rewards" else {}

    def scores(
        self,
        prompts: Sequence[Any],
        completions: Sequence[str],
        criterion: str,
        records: RecordColumns = NO_COLUMNS,
    ) -> Float[np.ndarray, " N"]:
        """Scores of the judge, float64; NaN where a reward source says nothing. All processes must call it.

        Args:
          records: what the records have beside prompts.

        Raises:
          UserError: the judge is the reward sources, and the criterion has none.
        """
        if self._judges and criterion in self._judges.sources:
            return self._judges.scores(prompts, completions, criterion, records)
        if self.judge != "rewards":
            pairs = zip(prompts, completions, strict=True)
            return np.array([self.score(prompt, text, criterion) for prompt, text in pairs], np.float64)
        if criterion not in self.sources:
            raise UserError(f"judge: rewards, but {criterion!r} has no source; add one to --config.rewards")
        k = self.rewards.index(criterion)
        wanted = np.arange(len(self.rewards)) == np.full((len(completions), 1), k)
        return self.host_rewards(prompts, completions, wanted, records)[:, k].astype(np.float64)


def _preference(name: str, fields: Mapping[str, Json]) -> Preference:
    try:
        found = Preference(**fields)
    except TypeError as error:
        raise UserError(
            f"preferences.{name}: is {fields!r}; give it a dimension and a sentence, and optionally a label"
        ) from error
    for key, text in vars(found).items():
        if not isinstance(text, str):
            raise UserError(f"preferences.{name}.{key}: {shown(text)} is not text; write it in quotes")
    return found
