"""Building blocks of configs: a file of configs/ takes the shared settings, adds its stages and their sections, and
changes what it likes.

Every default stands in the `Settings` class of the code that reads it; `RunSettings` puts them together.
"""

# A ConfigDict has the attributes that it is given.
# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false, reportArgumentType=false

import dataclasses
from typing import Any, get_type_hints

import ml_collections

from pjrlhf.algorithms.modpo import ModpoSettings
from pjrlhf.algorithms.pdpo import PreferenceSettings
from pjrlhf.algorithms.policy import PolicySettings
from pjrlhf.algorithms.reward import RewardSettings
from pjrlhf.algorithms.ric import RicSettings
from pjrlhf.algorithms.sft import SftSettings
from pjrlhf.errors import UserError
from pjrlhf.export.merge import MergeSettings
from pjrlhf.feedback.comparisons import ComparisonsSettings
from pjrlhf.feedback.population import PopulationSettings
from pjrlhf.protocols.front import FrontSettings
from pjrlhf.protocols.soups import SoupsSettings
from pjrlhf.protocols.users import UsersSettings
from pjrlhf.runtime.run import SharedSettings
from pjrlhf.settings import Settings, fill, nested_class, overlay, setting, to_config


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunSettings(SharedSettings):
    """Everything a config may say: what all stages share, and a section for every stage it has."""

    sft: SftSettings | None = setting(None)
    comparisons: ComparisonsSettings | None = setting(None)
    reward: RewardSettings | None = setting(None)
    policy: PolicySettings | None = setting(None)
    modpo: ModpoSettings | None = setting(None)
    ric: RicSettings | None = setting(None)
    population: PopulationSettings | None = setting(None)
    preference: PreferenceSettings | None = setting(None)
    evaluate: SoupsSettings | None = setting(None)
    evaluate_users: UsersSettings | None = setting(None)
    evaluate_front: FrontSettings | None = setting(None)
    merge: MergeSettings | None = setting(None)

    def to_dict(self) -> dict[str, Any]:
        """Nested dictionaries of plain values; sections that the config does not have are left out."""
        absent = {field.name for field in dataclasses.fields(self) if getattr(self, field.name) is None}
        return {name: value for name, value in super().to_dict().items() if name not in absent}

    def check(self) -> None:
        super().check()
        known = self.audience.registry
        for name in self.population.personas if self.population else ():
            if name not in known:
                raise UserError(f"population.personas: {name!r} is not among the preferences {', '.join(known)}")
        if self.evaluate_users and self.preference:
            for name in self.evaluate_users.cold_start_models if self.evaluate_users.cold_start else ():
                if name not in self.preference.models:
                    raise UserError(
                        f"evaluate_users.cold_start_models: {name!r} is not among preference.models; choose from "
                        f"{', '.join(self.preference.models)}"
                    )
        for method, entries in (self.evaluate.scaling if self.evaluate else {}).items():
            for name in entries:
                if name not in self.methods:
                    raise UserError(f"evaluate.scaling.{method}: {name!r} is not among methods; add the entry")
        if self.policy and self.temperature == 0:
            raise UserError("temperature: a policy cannot learn from greedy samples; set it above 0, for example to 1")
        if (
            not self.model.path
            and "sft" in self.stages
            and self.data.max_prompt + self.data.max_completion > self.model.max_length
        ):
            raise UserError(
                f"model.max_length: {self.model.max_length} is less than data.max_prompt + data.max_completion = "
                f"{self.data.max_prompt} + {self.data.max_completion}; raise it or shorten one of them"
            )
        if self.seeds and (not self.stages or self.stages[-1] != "evaluate_front"):
            raise UserError("seeds: only runs that end in evaluate_front can be averaged; set --config.seed instead")

    @property
    def sections(self) -> dict[type, Settings]:
        """The sections the config has, by class."""
        shared = {field.name for field in dataclasses.fields(SharedSettings)}
        names = [field.name for field in dataclasses.fields(self) if field.name not in shared]
        return {type(found): found for name in names if (found := getattr(self, name)) is not None}


def read(config: Any) -> RunSettings:
    """The settings of a config, checked.

    Raises:
      UserError: an unknown key, a bad value, or settings that do not go together.
    """
    return overlay(RunSettings(), config)


def complete(config: ml_collections.ConfigDict) -> None:
    """Adds the settings that a config leaves out, with their defaults, so that a flag can change each of them.

    A section that is not in the config is added where the config has the stage.
    """
    fill(config, SharedSettings())
    for name in {field.name for field in dataclasses.fields(RunSettings)} - {*config}:
        if isinstance(config.stages, list | tuple) and name in config.stages:
            config[name] = ml_collections.ConfigDict()
    for name, kind in get_type_hints(RunSettings).items():
        section = config.get(name)
        if isinstance(section, ml_collections.ConfigDict) and (cls := nested_class(kind)):
            fill(section, cls())


def base() -> ml_collections.ConfigDict:
    """Shared settings and supervised fine-tuning, at the size of the synthetic environment."""
    return to_config(RunSettings(sft=SftSettings()))


def people(c: ml_collections.ConfigDict) -> None:
    """Adds the sections of the stages that serve people known by their comparisons: preference, evaluate_users."""
    c.preference = to_config(PreferenceSettings())
    c.evaluate_users = to_config(UsersSettings())


def policies(c: ml_collections.ConfigDict) -> None:
    """Adds the sections of the stages that make one policy per preference by PPO: comparisons, reward, policy."""
    c.comparisons = to_config(ComparisonsSettings())
    c.reward = to_config(RewardSettings())
    c.policy = to_config(PolicySettings())


def neighbours(c: ml_collections.ConfigDict) -> None:
    """Adds the sections of the methods that PPO is compared with, beside those of `policies`: modpo, ric."""
    c.modpo = to_config(ModpoSettings())
    c.ric = to_config(RicSettings())


def front(c: ml_collections.ConfigDict, objectives: tuple[str, ...]) -> None:
    """Adds what compares methods on one front: the trainers' sections, `methods` (still empty) and `evaluate_front`.

    All rewards are on the scale of quantiles, 0 to 1, which preference weights can be compared with, so that one KL
    coefficient means the same to every method.
    """
    policies(c)
    neighbours(c)
    c.objectives = objectives
    c.stages = ("sft", "comparisons", "reward", "methods", "evaluate_front")
    c.seeds = ()  # several seeds, one run after the other, and a report of their means
    c.data.update({"max_prompt": 36, "prompt_buckets": (12, 24)})
    c.comparisons.pairs = 768
    c.policy.update({"scale": "quantiles", "steps": 40, "rollouts": 64})
    c.policy.kl.coefficient = 0.03
    c.policy.experience.update({"missing_eos_penalty": 0.3, "score_clip": 0.0})
    # Three seeds of two and of three objectives, side by side, within half an hour on two cores.
    c.sft.steps, c.modpo.steps = 300, 90
    c.ric.update({"samples": 1536, "steps": 160, "online_steps": 60})  # in all as many samples as the policies
    c.evaluate_front = to_config(FrontSettings())


def family(c: ml_collections.ConfigDict, *names: str) -> None:
    """Fills `methods` with the entries of these names (all of them where none is given), sized for `c.objectives`.

    Each answers `policy.rollouts` prompts per step in all; only MORL, which trains a policy for every evaluated point,
    gets a quarter of that for each of them.
    """
    each = c.policy.rollouts // len(c.objectives) // 4 * 4  # minibatches divide it
    on_grid = {"preferences": {"kind": "grid", "points": "simplex"}}
    # What the base never read takes larger steps to learn; more than five words to tell apart, more samples.
    tally = {"prompt_preference": "always", "prompt_format": {"form": "tally", "levels": 5}}
    tally["optimizer"] = {"learning_rate": 2 * c.policy.optimizer.learning_rate}
    min_norm = {"kind": "min_norm", "control_weight": 4.0}
    entries = {
        "prompting": {"train": ""},
        "rlhf": {"preferences": {"kind": "fixed", "points": "centre"}},
        "morl": {"preferences": {"kind": "fixed", "points": "simplex"}, "rollouts": c.policy.rollouts // 4},
        "pmorl": {"preferences": {"kind": "grid", "points": "subsets"}, "prompt_preference": "always"},
        "psoups": {"preferences": {"kind": "own"}, "prompt_preference": "half", "rollouts": each},
        "rsoups": {"preferences": {"kind": "own"}, "rollouts": each},
        "bone": {"preferences": {"kind": "fixed", "points": "mixed"}, "rollouts": each, "answer": "bone"},
        "moc": {**on_grid, "combine": min_norm, **tally},
        "clp": {"preferences": {"kind": "dirichlet", "held_out": "between"}, "mix": "weights"},
        "ric": {"train": "ric"},
        "modpo": {"train": "modpo", "preferences": {"kind": "fixed", "points": "simplex"}},
        "dpo_soups": {"train": "modpo", "preferences": {"kind": "fixed", "points": "corners"}, "answer": "bone"},
        "mod": {"train": "", "of": "rsoups", "answer": "mod"},
    }
    # MOC taken apart, and other rules under the same conditions.
    combine = {
        "moc_equal": {**min_norm, "weights": "equal"},
        "moc_small_control": {**min_norm, "control_weight": 1.0},
        "moc_per_reward": {**min_norm, "heads": "per_reward+control"},
        "moc_per_preference": {**min_norm, "heads": "per_preference"},
        "moc_hinge": {**min_norm, "sided": "hinge", "target": "max"},
        "control": {**min_norm, "heads": "control"},
        "mgda": {**min_norm, "heads": "per_reward"},
        "sum": {"kind": "sum"},
        "tchebycheff": {"kind": "tchebycheff"},
        "gdpo": {"kind": "gdpo"},
        "pama": {"kind": "pama"},
    }
    entries |= {name: {**on_grid, "combine": rule, **tally} for name, rule in combine.items()}
    # The same conditions with the weights of adapters in place of words.
    entries["moc_mixed"] = {**on_grid, "combine": min_norm, "mix": "weights"}
    with c.ignore_type():
        wanted = names or [name for name in entries if name not in (*combine, "moc_mixed")]
        c.methods = ml_collections.ConfigDict({name: entries[name] for name in wanted})
