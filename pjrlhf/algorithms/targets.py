"""What the policies of a stage are trained for: who they are, the preference weights of each answer, what its prompt
states, and which adapters give it.

| `preferences.kind` | policies | weights of an answer |
|---|---|---|
| own | one per reward model, or for `objectives` alone | 1 for its own (Personalized Soups, Rewarded Soups) |
| fixed | one per row of `points` | that row (MORL, RLHF on an average, Bone Soups) |
| grid | one | a row of `points`, at random (MOC) |
| between | one | a random point between two random rows of `points` |
| dirichlet | one | drawn with concentration `alpha` (MOC, CLP) |
| combinations | one | equal ones of one preference per dimension (of `objectives`), at random (Prompted-MORL) |
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from pjrlhf.data import preferences
from pjrlhf.data.messages import Prompt
from pjrlhf.data.preferences import PreferencePrompt
from pjrlhf.errors import UserError
from pjrlhf.merging.methods import mixing_matrix
from pjrlhf.models.adapters import AdapterConfig
from pjrlhf.objectives.simplex import simplex_grid
from pjrlhf.rollout.batches import PromptBatch, TargetBatch, split_rows
from pjrlhf.runtime.audience import Audience
from pjrlhf.runtime.records import Records
from pjrlhf.runtime.run import Sections
from pjrlhf.runtime.streams import Streams
from pjrlhf.runtime.text import Text
from pjrlhf.settings import Settings, setting, shown

KINDS = ("own", "fixed", "grid", "between", "dirichlet", "combinations")
NEAR = 0.02  # a drawn preference this near to a held-out one is drawn again


@dataclasses.dataclass(frozen=True, kw_only=True)
class TargetSettings(Settings):
    """Which preference weights the policies of a stage are trained for."""

    kind: str = setting("own", "where the weights come from; see the table above", choices=KINDS)
    objectives: tuple[str, ...] = setting((), "of own and combinations: train for these alone")
    points: str | tuple[tuple[float, ...], ...] = setting(
        (), "of fixed, grid and between: rows of weights, or the name of a set", choices=lambda: tuple(NAMED)
    )
    alpha: float = setting(1.0, "of dirichlet: its concentration", above=0.0, high=1e6)
    held_out: str | tuple[tuple[float, ...], ...] = setting(
        (), "weights that are never trained on: rows, or the name of a set", choices=lambda: tuple(NAMED)
    )


@dataclasses.dataclass(frozen=True)
class Target:
    """What one answer is rewarded for: numbers of S reward models, their weights, and which preference it is."""

    objectives: tuple[int, ...]
    weights: tuple[float, ...]
    group: int = 0


@runtime_checkable
class TargetSection(Protocol):
    """The settings that make `Targets`."""

    @property
    def preferences(self) -> TargetSettings: ...

    @property
    def mix(self) -> str: ...

    @property
    def prompt_format(self) -> PreferencePrompt: ...

    @property
    def prompt_preference(self) -> str: ...


class Targets:
    """The K policies of a stage and their A adapters.

    Args:
      adapter: shape of the adapters; full parameters cannot be mixed for every answer.

    Attributes:
      policies: K names.
      adapters: A names. `mix` "own": policy k is adapter k; "weights": the one policy is all adapters, one per
        objective, mixed by the preference weights of each example.
      sampled: the weights of an answer are drawn at random.

    Raises:
      UserError: unknown settings, points off the simplex, or a mix that does not fit.
    """

    def __init__(self, settings: TargetSection, audience: Audience, streams: Streams, adapter: AdapterConfig):
        self.audience, self.streams = audience, streams
        spec = settings.preferences
        self.kind = spec.kind
        self.sampled = self.kind in ("grid", "between", "dirichlet", "combinations")
        self.alpha = spec.alpha
        self.held_out = simplex_points(spec.held_out, audience.objectives, "held_out")
        self.points: list[tuple[float, ...]] = []
        if self.kind in ("fixed", "grid", "between"):
            self.points = simplex_points(spec.points, audience.objectives, "points")
            apart = [p for p in self.points if not any(_near(p, h, 1e-6) for h in self.held_out)]
            if self.kind == "grid":
                self.points = apart
            if not self.points:
                raise UserError("preferences.points: none is left to train on; give some that are not held out")
            if self.kind == "between" and len(self.points) < 2:
                raise UserError("preferences.points: between takes two or more; add some, such as corners")
        own = spec.objectives or audience.rewards
        if unknown := [name for name in own if name not in audience.rewards]:
            raise UserError(
                f"preferences.objectives: no reward model for {unknown[0]!r}; add it to --config.objectives"
            )
        objectives = [name for name in own if name in audience.objectives]
        self.combos = preferences.combinations(audience.preferences, objectives)
        names = {"own": own, "fixed": point_names(audience.objectives, self.points) if self.kind == "fixed" else ()}
        self.policies = names.get(self.kind, ("policy",))
        self.mix = settings.mix
        if self.mix == "weights" and self.kind not in ("grid", "between", "dirichlet"):
            raise UserError(f"mix 'weights': needs weights over all objectives, which {self.kind!r} does not draw")
        if self.mix == "weights" and not adapter.rank:
            raise UserError(
                "mix 'weights': every example has parameters of its own, which takes adapters; set "
                "--config.adapter.rank=8"
            )
        if self.kind == "combinations" and not adapter.rank:
            raise UserError(
                "preferences.kind combinations: every answer has reward models of its own; set --config.adapter.rank=8"
            )
        self.adapters = audience.objectives if self.mix == "weights" else self.policies
        self.prompt_format = settings.prompt_format
        # "half": each request comes once with and once without its preferences stated.
        stated = settings.prompt_preference
        self.stated = (False, True) if stated == "half" else (stated == "always",)

    def target(self, row: int, policy: int) -> Target:
        """What policy `policy` is rewarded for in row `row` of the data; the same whenever it is asked."""
        rewards, everything = self.audience.rewards, tuple(range(len(self.audience.objectives)))
        if self.kind == "own":
            return Target((rewards.index(self.policies[policy]),), (1.0,), policy)
        if self.kind == "fixed":
            return Target(everything, self.points[policy], policy)
        rng = self.streams.numpy("targets/weights", row)
        if self.kind == "grid":
            index = int(rng.integers(len(self.points)))
            return Target(everything, self.points[index], index)
        if self.kind == "combinations":
            index = int(rng.integers(len(self.combos)))
            combo = self.combos[index]
            return Target(tuple(map(rewards.index, combo)), (1 / len(combo),) * len(combo), index)
        while True:
            point = tuple(self._drawn(rng).tolist())
            if not any(_near(point, h, NEAR) for h in self.held_out):
                return Target(everything, point)

    def _drawn(self, rng: np.random.Generator) -> np.ndarray:
        """A point of the simplex [N]."""
        if self.kind == "dirichlet":
            return rng.dirichlet([self.alpha] * len(self.audience.objectives))
        one, other = np.array(self.points)[rng.choice(len(self.points), 2, replace=False)]
        return one + rng.random() * (other - one)

    @functools.cached_property
    def objectives(self) -> np.ndarray | None:
        """int32 [G, S], numbers of the reward models where they are the same in every batch, as `reward_scores` takes
        them; else None.
        """
        if self.kind == "own":
            return np.array([[self.audience.rewards.index(name)] for name in self.policies], np.int32)
        return None if self.kind == "combinations" else np.arange(len(self.audience.objectives), dtype=np.int32)[None]

    @property
    def scored(self) -> tuple[str, ...]:
        """Names of the S objectives of an answer, where they are the same for all; else places."""
        if self.kind in ("own", "combinations"):
            return tuple(f"objective {s + 1}" for s in range(len(self.target(0, 0).objectives)))
        return self.audience.objectives

    def words(self, target: Target) -> str:
        """What a prompt says to state a target; the general reward has no entry in the registry and goes unsaid."""
        registry, names = self.audience.preferences, [self.audience.rewards[i] for i in target.objectives]
        known = [(name, w) for name, w in zip(names, target.weights, strict=True) if name in registry]
        return self.prompt_format(registry, *zip(*known, strict=True)) if known else ""


def targets_of(run: Sections, settings: TargetSection) -> Targets:
    """What the policies of a section are trained for in a run."""
    return Targets(settings, run.audience, Streams(run.settings.seed), run.settings.adapter)


@dataclasses.dataclass(frozen=True)
class PromptRow:
    """One request as the K policies and the reward models read it.

    Attributes:
      prompts: token ids for each policy, with its target stated or not.
      reward_prompt: token ids of the plain request.
      targets: of each policy.
      request: number of the request.
    """

    prompts: tuple[list[int], ...]
    reward_prompt: list[int]
    targets: tuple[Target, ...]
    request: int


class PromptRows(Sequence[PromptRow]):
    """The requests that the policies are trained on; row i is a `PromptRow`.

    `part` 1 has the held-out requests instead. Where targets are drawn at random there are `count` rows or more, so
    that a request comes with ever new ones.
    """

    def __init__(self, targets: Targets, records: Records, text: Text, count: int = 0, part: int = 0):
        self.targets, self.records, self.text = targets, records, text
        self.requests = records.requests[part]
        size = len(self.requests) * len(targets.stated)
        self.size = size * max(1, -(-count // size)) if targets.sampled else size
        self._ids = functools.cache(lambda request, words: encode(records, text, request, words))
        if not part:
            text.check_known("data.prompts", (self[i].prompts[0] for i in range(min(self.size, 64))))
            text.show("data.prompts", {"prompt": (self[0].prompts[0], None)})

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, i: int) -> PromptRow:  # pyright: ignore[reportIncompatibleMethodOverride]
        stated = self.targets.stated
        number = i // len(stated) % len(self.requests)
        request = self.requests[number]
        targets = tuple(self.targets.target(i, k) for k in range(len(self.targets.policies)))
        words = [self.targets.words(target) if stated[i % len(stated)] else "" for target in targets]
        return PromptRow(tuple(self._ids(request, w) for w in words), self._ids(request, ""), targets, number)

    def collate(self, rows: Sequence[PromptRow], samples: int = 1) -> PromptBatch:
        """A batch [K, n, ...] of n / `samples` rows, each for that many consecutive samples.

        Raises:
          UserError: a prompt is longer than `data.max_prompt`.
        """
        K, limit = len(self.targets.policies), self.text.lengths.prompt
        rows = [row for row in rows for _ in range(samples)]
        prompts = [row.prompts[k] for k in range(K) for row in rows]
        plain = [row.reward_prompt for _ in range(K) for row in rows]
        if (longest := max(map(len, prompts + plain))) > limit:
            raise UserError(
                f"prompts: one has {longest} tokens, more than data.max_prompt={limit}; raise it, or cut them with "
                "--config.data.long_prompt=truncate_left"
            )
        targets = [row.targets[k] for k in range(K) for row in rows]
        arrays = TargetBatch(
            objectives=np.array([target.objectives for target in targets], np.int32),  # pyright: ignore[reportArgumentType]
            weights=np.array([target.weights for target in targets], np.float32),  # pyright: ignore[reportArgumentType]
            group=np.array([target.group for target in targets], np.int32),  # pyright: ignore[reportArgumentType]
        )
        requests: Any = None
        if self.targets.audience.sources:
            requests = np.array([row.request for _ in range(K) for row in rows], np.int32)
        batch = PromptBatch(self.text.pad_prompts(prompts), self.text.pad_prompts(plain), arrays, requests)
        return split_rows(batch, K)


def encode(records: Records, text: Text, request: Prompt, words: str) -> list[int]:
    """Token ids of a request that states `words`.

    Raises:
      UserError: the tokenizer has no token for some word, or see `Text.prompt_ids`.
    """
    ids, plain = (text.prompt_ids(records.ask(request, w)) for w in (words, ""))
    unknown = text.workspace.tokenizer.unk_id
    if unknown is not None and unknown in ids and unknown not in plain:
        raise UserError(
            f"prompt_format {words!r}: the tokenizer has no token for some of it; choose other labels, or another "
            'prompt_format.form ("tally" needs no numbers)'
        )
    return ids


def simplex_points(
    points: str | Sequence[Sequence[float]], objectives: Sequence[str], name: str
) -> list[tuple[float, ...]]:
    """Preference weights from a config, checked: rows, or the name of a set.

    "simplex": `objectives.simplex.simplex_grid`; "between": those that it holds out; "corners": one objective each;
    "centre": equal weights; "subsets": equal weights of every set of objectives, as sentences can state them; "mixed":
    the rewards of Bone Soups' backbones.
    """
    N, found = len(objectives), []
    if isinstance(points, str):
        if points not in NAMED:
            raise UserError(
                f"preferences.{name} {points!r}: unknown; give rows of weights, or one of {', '.join(NAMED)}"
            )
        try:
            points = NAMED[points](N)
        except ValueError as error:
            raise UserError(f"preferences.{name} {points!r}: {error}; add objectives") from error
    for point in points:
        try:
            row = tuple(float(w) for w in point)
        except (TypeError, ValueError, OverflowError) as error:
            raise UserError(
                f"preferences.{name}: {shown(point)} is no row of numbers; give weights such as (0.5, 0.5)"
            ) from error
        if len(row) != len(objectives):
            raise UserError(f"preferences.{name} {row}: {len(row)} weights; give one for each of {tuple(objectives)}")
        if not (min(row) >= 0 and abs(sum(row) - 1) <= 1e-3):  # NaN is no share
            raise UserError(f"preferences.{name} {row}: not shares; none may be below 0, and their sum is 1")
        found.append(row)
    return found


def _subsets(N: int) -> np.ndarray:
    bits = (np.arange(1, 2**N)[:, None] >> np.arange(N)) & 1
    return bits / bits.sum(1, keepdims=True)


NAMED = {
    "simplex": simplex_grid,
    "between": functools.partial(simplex_grid, held_out=True),
    "corners": np.eye,
    "centre": lambda N: np.full((1, N), 1 / N),
    "subsets": _subsets,
    "mixed": lambda N: mixing_matrix(N, 0.7),
}


def point_name(objectives: Sequence[str], point: Sequence[float]) -> str:
    """A file name: "P2A0.3+P2B0.7"."""
    return "+".join(f"{name}{w:.3g}" for name, w in zip(objectives, point, strict=True) if w > 0)


def point_names(objectives: Sequence[str], points: Sequence[Sequence[float]]) -> tuple[str, ...]:
    """Their names, which folders are called by.

    Raises:
      UserError: two of them have one name, or one is too long for a folder.
    """
    names = tuple(point_name(objectives, point) for point in points)
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"preferences.points: two of them are {twice[0]} in three digits; leave one out")
    if long := [name for name in names if len(name.encode()) > 200]:
        raise UserError(
            f"preferences.points: {shown(long[0])} is too long for the name of a folder; give objectives shorter names"
        )
    return names


def _near(a: Sequence[float], b: Sequence[float], distance: float) -> bool:
    return max(abs(x - y) for x, y in zip(a, b, strict=True)) < distance
