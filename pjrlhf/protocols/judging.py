"""The judges of a report: the one whose verdicts count, and further ones, which judge the same comparisons."""

import collections
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pjrlhf.errors import UserError
from pjrlhf.evaluation.length_control import Comparisons, about_length, length_controlled
from pjrlhf.judges.judge import BothOrders, agreement, combo_outcomes, judge_name
from pjrlhf.judges.language_model import announce
from pjrlhf.runtime.audience import Audience
from pjrlhf.runtime.run import Run
from pjrlhf.settings import shown

ALL = "all"  # in place of a criterion: all of them together


class Panel:
    """The judges of a report.

    Args:
      specs: of the judge whose verdicts count, and of further ones.
      asked_twice: comparisons of each call of `again` that are asked anew.

    Attributes:
      judges: name -> judge; the first one counts.
    """

    def __init__(self, run: Run, specs: Sequence[str | Mapping[str, Any]], asked_twice: int = 0):
        self.judges: dict[str, BothOrders] = {}
        for spec in specs:
            name = judge_name(spec)
            same = sum(known == name or known.startswith(f"{name} (") for known in self.judges)
            self.judges[f"{name} ({same + 1})" if same else name] = run.judge(spec)
        self.asked_twice = asked_twice
        self._anew = {name: anew for name, judge in self.judges.items() if (anew := judge.again()) is not None}
        self._verdicts: dict[str, dict[str, list[np.ndarray]]] = collections.defaultdict(dict)  # criterion -> judge
        self._twice: dict[str, list[tuple[np.ndarray, np.ndarray]]] = collections.defaultdict(list)

    def __call__(
        self, requests: Sequence[Any], a: Sequence[str], b: Sequence[str], criteria: Sequence[str]
    ) -> dict[str, np.ndarray]:
        """Judge -> its verdicts of answers `a` against `b` under each of C criteria, float64 [N, C]. The first judge is
        the one that counts.
        """
        found = {name: combo_outcomes(judge, requests, a, b, criteria) for name, judge in self.judges.items()}
        for name, verdicts in found.items():
            for criterion, own in zip(criteria, verdicts.T, strict=True):
                self._verdicts[criterion].setdefault(name, []).append(own)
        return found

    def again(
        self,
        requests: Sequence[Any],
        a: Sequence[str],
        b: Sequence[str],
        criterion: str,
        verdicts: Mapping[str, np.ndarray],
    ) -> None:
        """Asks the first `asked_twice` of N comparisons anew, whose `verdicts` [N, 1] the judges gave before."""
        few = slice(self.asked_twice)
        for name, anew in self._anew.items() if self.asked_twice else ():
            second = combo_outcomes(anew, requests[few], a[few], b[few], (criterion,))[:, 0]
            self._twice[name].append((verdicts[name][few, 0], second))

    def announce(self, name: str, comparisons: int, anew: int = 0) -> None:
        """Logs how many requests the judges send at most about so many comparisons, of which some are asked anew."""
        anew *= bool(self.asked_twice)
        counts = {one: comparisons + (anew if one in self._anew else 0) for one in self.judges}
        announce(name, [pair for one, judge in self.judges.items() for pair in judge.planned_requests(counts[one])])

    def sections(self) -> dict[str, Any]:
        """The sections judge, judges and agreement, after everything is judged."""
        reports = []
        for name, judge in self.judges.items():
            report = {"name": name, **judge.report()}
            if name in self._twice:
                first, second = (np.concatenate(parts) for parts in zip(*self._twice[name], strict=True))
                report["self_consistency"] = agreement(first, second)
            reports.append(report)
        return {"judge": reports[0], "judges": reports, "agreement": self._agreements()}

    def _agreements(self) -> list[dict[str, Any]]:
        """How far each two judges agree, on all criteria together and on each."""
        by_criterion = {
            criterion: {name: np.concatenate(parts) for name, parts in found.items()}
            for criterion, found in self._verdicts.items()
        }
        together = {name: [found[name] for found in by_criterion.values()] for name in self.judges}
        tables = {ALL: {name: np.concatenate(parts) for name, parts in together.items() if parts}, **by_criterion}
        return [
            {"criterion": criterion, "judges": list(pair), **agreement(*(found[name] for name in pair))}
            for criterion, found in tables.items()
            for pair in itertools.combinations(found, 2)
        ]


def at_equal_lengths(
    criteria: Sequence[str],
    found: Mapping[tuple[str, str], Sequence[np.ndarray]],
    *,
    resamples: int,
    seed: int,
) -> dict[str, dict[str, Any]]:
    """The section length_controlled of some criteria.

    Args:
      found: (criterion, method) -> its comparisons with the base, [4, N] each: verdicts, the lengths of both answers in
        characters, and the numbers of the requests.
    """
    section: dict[str, dict[str, Any]] = {}
    for criterion in criteria:
        parts = {method: np.concatenate(own, axis=1) for (name, method), own in found.items() if name == criterion}
        models = {method: Comparisons(*rows) for method, rows in parts.items()}
        rates = length_controlled(models, resamples=resamples, seed=seed)
        section[criterion] = {}
        for method, (verdicts, own, base, _) in parts.items():
            known = verdicts[~np.isnan(verdicts)]
            rate = float((1 + known).mean() / 2) if len(known) else None
            lengths = {"length": float(own.mean()), "base_length": float(base.mean()), "n": len(known)}
            section[criterion][method] = {"rate": rate, **vars(rates[method]), **lengths}
    return section


def check_length_controlled(
    audience: Audience, names: Sequence[str], judges: Sequence[str | Mapping[str, Any]]
) -> None:
    """Raises UserError where one of the `names` of `evaluate.length_controlled` is no criterion of a run, or is about
    length, by its preference or by what the `judges` are told of it.
    """
    for name in names:
        if name not in audience.rewards:
            raise UserError(
                f"evaluate.length_controlled: {name!r} is no criterion; choose from {', '.join(audience.rewards)}"
            )
        found = audience.preferences.get(name)
        # What is opposite to a criterion about length is about length too.
        same = [one for one in audience.preferences.values() if found and one.dimension == found.dimension]
        texts = [text for one in same for text in (one.dimension, one.sentence, one.label)]
        if isinstance(audience.judge, Mapping):
            texts.append(str(audience.judge.get(name)))
        if audience.judge == "rewards":
            texts.append(str(audience.source_specs.get(name)))
        for spec in judges:
            own = spec.get("criteria") if isinstance(spec, Mapping) else None
            texts += [str(own.get(name))] if isinstance(own, Mapping) else []
            texts += [str(spec.get("source"))] if isinstance(spec, Mapping) else []
        if reason := next(filter(about_length, texts), None):
            raise UserError(
                f"evaluate.length_controlled: {name!r} is about length ({shown(reason)}), so equal lengths would take "
                "away what it asks for; leave it out"
            )
