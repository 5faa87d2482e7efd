"""How an entry of `config.methods` answers for preference weights p:

| entry | weights of its adapters | what the prompt states |
|---|---|---|
| preferences own, or mix "weights" | p: a soup, or the conditioned policy itself | p, where training did so |
| fixed | one-hot on the policy of p, if there is one; a single policy serves everybody | p, where training did so |
| grid, dirichlet, combinations | the one policy | p, where training did so |
| train "ric" | the one policy | the target of p |
| answer "bone" | `bone_soup_weights`, for fixed mixed rewards | as above |
| answer "mod" | of the next token's log-probs, see `rollout.decoding` | as above |
| train "", without `of` | the base | p as sentences (preference prompting), or with prompted=False nothing |
| `best_of` above 1 | as above, of so many answers the best by the rewards weighed with p | as above |
| a trainer of other code | as it says, see `runtime.run.Trainer`; its one adapter | as it says; nothing |
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float

from pjrlhf.algorithms import banks
from pjrlhf.algorithms.targets import Targets, TargetSection, targets_of
from pjrlhf.data.preferences import PreferencePrompt
from pjrlhf.errors import UserError
from pjrlhf.merging.methods import bone_soup_weights
from pjrlhf.models.adapters import Backbone, is_low_rank
from pjrlhf.objectives.multi_objective import divergence_alpha
from pjrlhf.rollout.decoding import PolicyEnsemble
from pjrlhf.runtime.answers import EvaluatedPolicy, Point, silent
from pjrlhf.runtime.run import Run
from pjrlhf.runtime.sampler import mixed
from pjrlhf.settings import Settings, setting
from pjrlhf.types import Array, Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnswerSettings(Settings):
    """What an entry says about answering, not about training."""

    of: str = setting("", "the entry whose adapters are used; by default its own")
    answer: str = setting("soup", "how several adapters answer together", choices=("soup", "bone", "mod"))
    extrapolation: float | tuple[float, ...] = setting(0.0, "of bone: how far to go beyond the backbones")
    divergence: str | float = setting("reverse_kl", "of mod: what tied the policies to the base")
    prompted: bool = setting(True, "of the base: state the preferences")
    best_of: int = setting(
        1, "answers to a prompt, of which the one with the highest rewards by the weights counts", low=1, high=10**4
    )

    def check(self) -> None:
        try:
            divergence_alpha(self.divergence)
        except ValueError as error:
            raise UserError(f"divergence: {error}") from error


def combined(divergence: str | float, backbone: Backbone, bank: Params, weights: Float[Array, "B K"]) -> PolicyEnsemble:
    """The policies of a bank, combined for every row with its `weights` of their log-probabilities (MOD)."""
    return PolicyEnsemble(backbone.model, backbone.adapter, backbone.base, bank, weights, divergence)


def stating(run: Run, prompt_format: PreferencePrompt) -> Callable[[Sequence[float]], str]:
    """Weights of the objectives -> what a prompt says to state them."""
    return functools.partial(prompt_format, run.audience.preferences, run.audience.objectives)


def by_base(run: Run, how: AnswerSettings) -> EvaluatedPolicy:
    """The base, which is told the preferences, or nothing."""
    return EvaluatedPolicy(None, lambda p: (), stating(run, PreferencePrompt()) if how.prompted else silent)


def by_one_adapter(run: Run, settings: Settings, stage: str, how: AnswerSettings) -> EvaluatedPolicy:
    """The only adapter of a stage, named "policy"."""
    return EvaluatedPolicy(banks.load(run, stage, ["policy"]), lambda p: (1.0,))


def by_targets(run: Run, settings: TargetSection, stage: str, how: AnswerSettings) -> EvaluatedPolicy:
    """The adapters of a stage whose policies have `Targets`.

    Raises:
      UserError: MOD over full parameters.
    """
    targets = targets_of(run, settings)
    bank = banks.load(run, stage, targets.adapters)
    if how.answer == "mod" and not is_low_rank(bank):
        raise UserError(f"{stage}: MOD runs every policy as a row, which takes adapters; set --config.adapter.rank=8")
    mix, points = _mix(targets, how, len(run.audience.objectives))
    return EvaluatedPolicy(
        bank,
        mix,
        stating(run, targets.prompt_format) if any(targets.stated) else silent,
        points,
        functools.partial(combined, how.divergence) if how.answer == "mod" else mixed,
    )


def _mix(targets: Targets, how: AnswerSettings, N: int) -> tuple[Callable[[Point], Point], Sequence[Point] | None]:
    """(weights of N objectives -> weights of the adapters, the only weights that it is defined for or None)."""
    if targets.kind == "own" or targets.mix == "weights":
        more = len(targets.adapters) - N  # the general policy has no part in a soup
        return lambda p: p + (0.0,) * more, None
    if how.answer == "bone":
        return lambda p: tuple(bone_soup_weights(p, targets.points, how.extrapolation).tolist()), None
    if targets.kind == "fixed" and len(targets.points) > 1:
        one_hot = np.eye(len(targets.points))
        return lambda p: tuple(one_hot[targets.points.index(p)].tolist()), targets.points
    return lambda p: (1.0,), None
