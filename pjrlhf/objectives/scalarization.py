"""Combination rules: how the rewards of several objectives become one advantage, each with its settings.

Shapes: n answers of one policy, T response tokens, S objectives, H heads (each with its own values and advantages). `p`
are preference weights [n, S]. All arrays are float32 unless said otherwise.

A rule of your own is a frozen dataclass that inherits from `CombinationRule`; a config names it as
`policy.combine.kind = "package.module:ClassName"`, with its fields beside `kind`.
"""

import abc
import dataclasses
import itertools
import sys
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from pjrlhf.errors import UserError
from pjrlhf.objectives import multi_objective as mo
from pjrlhf.objectives.policy_gradient import zero_outside
from pjrlhf.registry import Registry
from pjrlhf.settings import Settings, setting, shown
from pjrlhf.types import Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class CombinationRule(Settings, abc.ABC):
    """How objectives become one advantage; static in a jitted program, so the fields of a rule must be hashable.

    Attributes:
      standardizes_heads: whether the trainer standardizes the advantages of every head before this rule combines them,
        and the combined advantage over the batch (GDPO).
    """

    standardizes_heads: ClassVar[bool] = False

    @property
    def needs_calibrated_rewards(self) -> bool:
        """Whether rewards are compared with preference weights, so that they must be on the scale from 0 to 1."""
        return False

    @property
    def needs_preference_groups(self) -> bool:
        """Whether `advantages` reads `group`, so that preferences must come from a fixed set."""
        return False

    @property
    def weighs_rewards(self) -> bool:
        """Whether `p` are factors of the rewards alone, so that a `schedule` may change them during training."""
        return True

    @abc.abstractmethod
    def names(self, objectives: Sequence[str]) -> tuple[str, ...]:
        """Names of the H heads, given those of the S objectives."""

    @abc.abstractmethod
    def rewards(self, scores: Float[Array, "n S"], p: Float[Array, "n S"]) -> Float[Array, "n H"]:
        """Rewards of the heads, from scores (calibrated to [0, 1] where `needs_calibrated_rewards`)."""

    @abc.abstractmethod
    def advantages(
        self,
        advantages: Float[Array, "n T H"],
        p: Float[Array, "n S"],
        mask: Float[Array, "n T"],
        group: Int[Array, " n"] | None = None,
    ) -> tuple[Float[Array, "n T"], dict[str, Array]]:
        """The advantage to train on, and statistics to log.

        Args:
          advantages: of every head; standardized where `standardizes_heads`.
          p: preference weights.
          mask: 1 on response tokens.
          group: which preference vector each answer was asked for, where `needs_preference_groups`.

        Returns:
          the advantage, 0 outside the mask, and {"weights": [H], NaN for a rule without weights, "gradient_cosine":
          scalar, the mean over pairs of heads}.
        """


def _rule(thing: object) -> type[CombinationRule]:
    if isinstance(thing, type) and issubclass(thing, CombinationRule) and dataclasses.is_dataclass(thing):
        return thing
    raise ValueError("is not a dataclass that inherits from CombinationRule")


RULES: Registry[type[CombinationRule]] = Registry("combination rule", _rule)


def make_rule(settings: Mapping[str, object]) -> CombinationRule:
    """The rule `settings["kind"]` with the fields given beside it.

    A section of a config holds the fields of every rule (see `section`), so a field of another rule is ignored while it
    has its default.

    Raises:
      UserError: unknown kind, a field that the rule does not have, or a bad value; starts with the name of the field.
    """
    fields = dict(settings)
    kind = fields.pop("kind")
    try:
        cls = RULES.get(kind)  # type: ignore[arg-type]  # whatever a config holds; the registry refuses what is no name
    except UserError as error:
        raise UserError(f"kind: {error}") from error
    own, others = {field.name for field in dataclasses.fields(cls)}, section()
    for name in set(fields) - own:
        if name not in others:
            raise UserError(f"{name}: rule {kind!r} has no such setting; it has {', '.join(sorted(own)) or 'none'}")
        if fields.pop(name) != others[name]:
            raise UserError(f"{name}: rule {kind!r} has no such setting; leave it at {others[name]!r}")
    return cls(**fields)


def section() -> dict[str, object]:
    """The section of a config that chooses a rule: the kind, and the fields of all registered rules."""
    defaults = {field.name: field.default for _, rule in RULES.items() for field in dataclasses.fields(rule)}
    return {"kind": "sum", **defaults}


@RULES.register("sum")
@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightedSum(CombinationRule):
    """One head, of the weighted sum of the rewards: RLHF, MORL, soups, CLP."""

    def names(self, objectives):
        return ("reward",)

    def rewards(self, scores, p):
        return mo.weighted_sum(scores, p)[..., None]

    def advantages(self, advantages, p, mask, group=None):
        return _single(advantages, mask)


@RULES.register("tchebycheff")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Tchebycheff(CombinationRule):
    """One head, of minus the largest weighted distance to an ideal reward (`multi_objective.tchebycheff`); with
    `smoothing`, its smooth form (STCH, arXiv 2402.19078).
    """

    ideal: float = setting(1.0, "the best reward of every objective, on the scale of the rewards", low=-1e6, high=1e6)
    smoothing: float = setting(0.0, "0 for the exact maximum; larger values make it smooth", low=0.0, high=1e6)
    across: str = setting(
        "mean",
        "how the gradients of the trained preference vectors are combined: their mean over the batch, or min_norm, as "
        "heads per_preference of the rule min_norm",
        choices=("mean", "min_norm"),
    )

    @property
    def needs_preference_groups(self):
        return self.across == "min_norm"

    def names(self, objectives):
        return ("reward",)

    def rewards(self, scores, p):
        return mo.tchebycheff(scores, p, jnp.full(scores.shape[-1], self.ideal), self.smoothing)[..., None]

    def advantages(self, advantages, p, mask, group=None):
        return _single(advantages, mask) if self.across == "mean" else _per_preference(advantages, mask, group)


@RULES.register("gdpo")
@dataclasses.dataclass(frozen=True, kw_only=True)
class GDPO(CombinationRule):
    """A head per objective; the weighted sum of their standardized advantages (GDPO, arXiv 2601.05242)."""

    standardizes_heads = True

    def names(self, objectives):
        return tuple(objectives)

    def rewards(self, scores, p):
        return jnp.asarray(scores, jnp.float32)

    def advantages(self, advantages, p, mask, group=None):
        _, statistics = _gram(advantages, mask)
        mixed = mo.weighted_sum(advantages, p[:, None])
        return zero_outside(mixed, mask), statistics | {"weights": p.mean(0)}


@RULES.register("pama")
@dataclasses.dataclass(frozen=True, kw_only=True)
class PAMA(CombinationRule):
    """A head per objective, combined token by token without weights (PAMA, arXiv 2508.07768)."""

    noon: bool = setting(True, "raise negative advantages to 0 first, as published")

    @property
    def weighs_rewards(self):
        return False

    def names(self, objectives):
        return tuple(objectives)

    def rewards(self, scores, p):
        return jnp.asarray(scores, jnp.float32)

    def advantages(self, advantages, p, mask, group=None):
        _, statistics = _gram(advantages, mask)
        mixed = mo.pama(advantages, self.noon)
        return zero_outside(mixed, mask), statistics | {"weights": jnp.full(advantages.shape[-1], jnp.nan)}


@RULES.register("min_norm")
@dataclasses.dataclass(frozen=True, kw_only=True)
class MinNorm(CombinationRule):
    """Heads weighted so that their mixed policy gradient has the least norm: MGDA (arXiv 1810.04650) with heads
    "per_reward", MOC (arXiv 2604.04497) with a control reward.

    The weights are those of the whole batch before its first update, where every ratio is 1 and no token is clipped, so
    that the surrogate gradient of head k in the log-probs is its advantage. A head without any advantage takes no part.

    The control reward is a mean of squares below 1. With `control_weight` 1 its gradient is the smallest, and min-norm
    weights give it nearly everything.
    """

    heads: str = setting(
        "reward_sum+control",
        "reward_sum+control and per_reward+control as `multi_objective.moc_heads`; per_reward ignores the preference "
        "weights; control is the control reward alone, an ablation; per_preference makes the weighted sum of every "
        "trained preference vector an objective of its own",
        choices=("per_reward", "reward_sum+control", "per_reward+control", "control", "per_preference"),
    )
    weights: str = setting("min_norm", "of the heads; equal weights are an ablation", choices=("min_norm", "equal"))
    normalize: str = setting(
        "none", "divide gradients by their norms first; two heads then get equal weights", choices=("none", "gradient")
    )
    target: str = setting(
        "identity",
        "rewards that the preference weights ask for (`multi_objective.target_map`)",
        choices=("identity", "l2", "max"),
    )
    sided: str = setting(
        "two",
        "two: rewards beyond their target count against the policy; hinge: they do not",
        choices=("two", "hinge"),
    )
    control_weight: float = setting(1.0, "factor of the control reward", low=0.0, high=1e6)

    @property
    def needs_calibrated_rewards(self):
        return "control" in self.heads

    @property
    def needs_preference_groups(self):
        return self.heads == "per_preference"

    @property
    def weighs_rewards(self):
        return self.heads == "per_preference"

    def names(self, objectives):
        return {
            "per_reward": tuple(objectives),
            "reward_sum+control": ("reward", "control"),
            "per_reward+control": (*objectives, "control"),
            "control": ("control",),
            "per_preference": ("reward",),
        }[self.heads]

    def rewards(self, scores, p):
        if self.heads == "per_preference":
            return mo.weighted_sum(scores, p)[..., None]
        if self.heads == "per_reward":
            return jnp.asarray(scores, jnp.float32)
        if self.heads == "control":
            return self.control_weight * mo.control_reward(scores, p, self.target, self.sided)[..., None]
        heads = mo.moc_heads(scores, p, self.heads, self.target, self.sided)
        return heads.at[..., -1].multiply(self.control_weight)

    def advantages(self, advantages, p, mask, group=None):
        if self.heads == "per_preference":
            return _per_preference(advantages, mask, group, self.weights)
        if advantages.shape[-1] == 1:
            return _single(advantages, mask)
        gram, statistics = _gram(advantages, mask)
        present = jnp.diagonal(gram) > 0
        if self.weights == "equal":
            c = present / jnp.maximum(present.sum(), 1)
        else:
            c = _present_weights(mo.cosines(gram) if self.normalize == "gradient" else gram, present)
        return zero_outside(mo.weighted_sum(advantages, c), mask), statistics | {"weights": c}


# ---- weights that change during training

Points = tuple[tuple[float, float], ...]  # (step, factor), by step


def schedule(spec: Any) -> Points:
    """The points between which a factor is interpolated linearly, from what a config says: a number;
    {"start": a, "end": b, "steps": n}, from a at step 0 to b at step n; or a list of [step, factor]. Before the first
    point and after the last one the factor stays as it is there.

    Raises:
      UserError: something else, a factor below 0, or steps that are below 0 or do not rise.
    """
    given: Any = spec
    if isinstance(spec, Mapping) and set(spec) == {"start", "end", "steps"}:
        given = ((0, spec["start"]), (spec["steps"], spec["end"]))
    elif _is_number(spec):
        given = ((0, spec),)
    pairs = given if isinstance(given, list | tuple) else ()
    fits = [isinstance(pair, list | tuple) and len(pair) == 2 and all(map(_is_number, pair)) for pair in pairs]
    if not fits or not all(fits):
        raise UserError(
            f'{shown(spec)} is no schedule; give a number, {{"start": 1.0, "end": 0.0, "steps": 100}}, or points such '
            "as [[0, 1.0], [100, 0.0]]"
        )
    points = tuple((float(step), float(factor)) for step, factor in pairs)
    steps = [step for step, _ in points]
    if steps[0] < 0 or any(a >= b for a, b in itertools.pairwise(steps)):
        raise UserError(f"{shown(spec)}: its steps do not rise from 0 or later; put them in order, each once")
    if min(factor for _, factor in points) < 0:
        raise UserError(f"{shown(spec)}: a factor below 0 would train against the reward; give 0 or more")
    return points


def schedules(specs: Mapping[str, Any], key: str) -> dict[str, Points]:
    """The schedule of each objective of a setting; `key` is its name, for messages.

    Raises:
      UserError: see `schedule`.
    """
    found = {}
    for name, spec in specs.items():
        try:
            found[name] = schedule(spec)
        except UserError as error:
            raise UserError(f"{key}.{name}: {error}") from error
    return found


def _is_number(x: object) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and abs(x) <= sys.float_info.max


def factors(schedules: Sequence[Points], step: Int[Array, ""] | int) -> Float[Array, " S"]:
    """The factors of S schedules after `step` updates, float32."""
    now = jnp.asarray(step, jnp.float32)
    return jnp.stack([jnp.interp(now, *jnp.array(points, jnp.float32).T) for points in schedules])


def _single(
    advantages: Float[Array, "n T 1"], mask: Float[Array, "n T"]
) -> tuple[Float[Array, "n T"], dict[str, Array]]:
    """The advantage of the only head."""
    _, statistics = _gram(advantages, mask)
    return zero_outside(advantages[..., 0], mask), statistics | {"weights": jnp.ones(1)}


def _per_preference(
    advantages: Float[Array, "n T 1"],
    mask: Float[Array, "n T"],
    group: Int[Array, " n"] | None,
    weights: str = "min_norm",
) -> tuple[Float[Array, "n T"], dict[str, Array]]:
    """The advantage of the only head, with every preference vector an objective of its own (`_disjoint_weights`)."""
    if group is None:
        raise ValueError("per_preference: needs the index of every answer's preference; train on a fixed set")
    advantage = zero_outside(advantages[..., 0], mask)
    scale = _disjoint_weights(jnp.square(advantage).sum(1), group)
    scale = jnp.ones_like(scale) if weights == "equal" else scale
    return advantage * scale[:, None], {"gradient_cosine": jnp.zeros(()), "weights": jnp.ones(1)}


def _gram(advantages: Float[Array, "n T H"], mask: Float[Array, "n T"]) -> tuple[Float[Array, "H H"], dict[str, Array]]:
    """Gram matrix [H, H] of the heads' surrogate gradients, and the statistics that follow from it."""
    gram = mo.gram_matrix(mo.surrogate_gradients(advantages, jnp.ones(mask.shape), mask))
    cosines, H = mo.cosines(gram), len(gram)
    return gram, {"gradient_cosine": (cosines.sum() - jnp.trace(cosines)) / max(H * (H - 1), 1)}


def _present_weights(gram: Float[Array, "H H"], present: Bool[Array, " H"]) -> Float[Array, " H"]:
    """Min-norm weights among the heads that are `present`, 0 for the others."""
    # An absent head gets the largest norm, many times over, and no weight from the least norm.
    far = 1e6 * jnp.maximum(jnp.diagonal(gram).max(), 1e-30)
    c = jnp.where(present, mo.min_norm_weights(jnp.where(present, gram, gram + far * jnp.eye(len(gram)))), 0.0)
    return c / jnp.maximum(c.sum(), 1e-30)


def _disjoint_weights(squares: Float[Array, " n"], group: Int[Array, " n"]) -> Float[Array, " n"]:
    """Min-norm weight of every answer's preference, times the number of preferences in the batch.

    Objectives of disjoint answers have a diagonal Gram matrix, whose min-norm weights are in proportion to
    1 / ||g_m||^2; `squares` holds every answer's contribution to ||g_m||^2. A preference without any advantage takes
    no part.
    """
    same = (group[:, None] == group).astype(jnp.float32)
    norms, sizes = same @ squares, same.sum(1)
    inverse = jnp.where(norms > 0, 1.0 / jnp.where(norms > 0, norms, 1.0), 0.0)
    total, count = (inverse / sizes).sum(), ((norms > 0) / sizes).sum()
    return inverse * count / jnp.maximum(total, 1e-30)
