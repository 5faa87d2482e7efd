"""Building blocks of configs. A config file starts from `base`, adds the sections of its stages and changes values.

Every default is in the `Settings` class of the code that reads it; `RunSettings` combines them.
"""

# The attributes of a ConfigDict are dynamic.
# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false, reportArgumentType=false

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any, get_type_hints

import ml_collections
from absl import logging

from pjrlhf.algorithms.modpo import ModpoSettings
from pjrlhf.algorithms.pdpo_settings import PreferenceSettings
from pjrlhf.algorithms.policy import PolicySettings
from pjrlhf.algorithms.reward import RewardSettings
from pjrlhf.algorithms.ric import RicSettings
from pjrlhf.algorithms.sft import SftSettings
from pjrlhf.errors import UserError
from pjrlhf.export.merge import MergeSettings
from pjrlhf.feedback.comparisons import ComparisonsSettings
from pjrlhf.feedback.population import PopulationSettings
from pjrlhf.judges.judge import check_criteria
from pjrlhf.models.users import KINDS
from pjrlhf.protocols.front import FrontSettings, evaluated_points
from pjrlhf.protocols.judging import check_length_controlled
from pjrlhf.protocols.soups import OWN as SOUPS_OWN
from pjrlhf.protocols.soups import SoupsSettings
from pjrlhf.protocols.user_models import UserModelsSettings
from pjrlhf.protocols.users import OWN as USERS_OWN
from pjrlhf.protocols.users import UsersSettings
from pjrlhf.runtime.run import SharedSettings
from pjrlhf.settings import Settings, check_names, fill, nested_class, overlay, setting, to_config
from pjrlhf.types import Json


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunSettings(SharedSettings):
    """All settings of a config: those that all stages share, and a section for every stage."""

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
    user_models: UserModelsSettings | None = setting(None)
    merge: MergeSettings | None = setting(None)

    def to_dict(self) -> dict[str, Any]:
        """The settings as nested dictionaries of plain values, without the sections that the config does not have."""
        absent = {field.name for field in dataclasses.fields(self) if getattr(self, field.name) is None}
        return {name: value for name, value in super().to_dict().items() if name not in absent}

    @property
    def user_tokens(self) -> int:
        """The most user tokens that stand before a prompt of this run."""
        section = self.preference if "preference" in self.stages else None
        return max((section.entry(name).users.added for name in section.models), default=0) if section else 0

    def _check_judges(self) -> None:
        audience, evaluate = self.audience, self.evaluate or SoupsSettings()
        comparisons = self.comparisons or ComparisonsSettings()
        labels = comparisons.labels(audience) if "comparisons" in self.stages else ()
        asked = {
            "comparisons": ([comparisons.judge], labels),
            "evaluate": ([evaluate.judge, *evaluate.judges], audience.objectives),
        }
        known = tuple(dict.fromkeys((*audience.preferences, *audience.rewards)))
        for stage, (specs, criteria) in asked.items():
            for spec in specs if stage in self.stages else ():
                try:
                    check_criteria(spec, audience.sentences, known, criteria)
                except UserError as error:
                    raise error.within(stage) from error

    def check(self) -> None:
        super().check()
        known = self.audience.preferences
        if self.evaluate_front:
            evaluated_points(self.evaluate_front, self.objectives)
        if "evaluate_users" in self.stages and self.evaluate_users and self.preference:
            self._check_cold_start(self.evaluate_users, self.preference)
        if self.evaluate_users and self.preference:
            check_names("preference.models", self.preference.models, USERS_OWN)
        self._check_judges()
        if {"evaluate", "evaluate_front"} & {*self.stages}:
            self.audience.check_scores()
        if "evaluate" in self.stages:
            check_names("methods", self.methods, SOUPS_OWN)
            evaluate = self.evaluate or SoupsSettings()
            check_length_controlled(self.audience, evaluate.length_controlled, (evaluate.judge, *evaluate.judges))
        for name in self.population.personas if self.population else ():
            if name not in known:
                raise UserError(f"population.personas: {name!r} is unknown; choose from {', '.join(known)}")
        if self.evaluate_users and self.preference:
            for name in self.evaluate_users.cold_start_models if self.evaluate_users.cold_start else ():
                if name not in self.preference.models:
                    raise UserError(
                        f"evaluate_users.cold_start_models: {name!r} is unknown; choose from preference.models: "
                        f"{', '.join(self.preference.models)}"
                    )
        for method, entries in (self.evaluate.scaling if self.evaluate else {}).items():
            for name in entries if isinstance(entries, list | tuple) else (entries,):
                if name not in self.methods:
                    raise UserError(f"evaluate.scaling.{method}: {name!r} is not an entry of methods; add it")
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

    def _check_cold_start(self, evaluated: UsersSettings, trained: PreferenceSettings) -> None:
        """Raises UserError where there are no new people, or too few comparisons of each."""
        if not evaluated.cold_start or not evaluated.cold_start_models:
            return
        most = max(evaluated.cold_start)
        if not isinstance(trained.data, str) and not trained.new_user_fraction:
            raise UserError(
                "evaluate_users.cold_start: nobody is new; set --config.preference.new_user_fraction=0.2, or skip it "
                "with --config.evaluate_users.cold_start=()"
            )
        if trained.data == "population" and self.population and self.population.new_pairs_per_user <= most:
            raise UserError(
                f"evaluate_users.cold_start: {most} comparisons of each new person leave none of "
                f"population.new_pairs_per_user={self.population.new_pairs_per_user} to test on; raise the latter"
            )
        for name in evaluated.cold_start_models:
            entry = trained.entry(name).users
            kind = KINDS.get(entry.kind)
            if kind.trains_adapters or not (kind.personal or entry.read):
                raise UserError(
                    f"evaluate_users.cold_start_models: {name!r} has nothing of a person's own to fit; leave it out"
                )

    @property
    def sections(self) -> dict[type, Settings]:
        """The sections of the config, by class."""
        shared = {field.name for field in dataclasses.fields(SharedSettings)}
        names = [field.name for field in dataclasses.fields(self) if field.name not in shared]
        return {type(found): found for name in names if (found := getattr(self, name)) is not None}


def read(config: ml_collections.ConfigDict | Mapping[str, Json]) -> RunSettings:
    """The checked settings of a config, a ConfigDict or a mapping.

    Raises:
      UserError: an unknown key, a bad value, or settings that contradict each other.
    """
    return overlay(RunSettings(), config)


def complete(config: ml_collections.ConfigDict) -> None:
    """Adds the settings that a config omits, with their defaults, so that flags can change them.

    A missing section is added if its stage is in the config.
    """
    fill(config, SharedSettings())
    for name in {field.name for field in dataclasses.fields(RunSettings)} - {*config}:
        if isinstance(config.stages, list | tuple) and name in config.stages:
            config[name] = ml_collections.ConfigDict()
    for name, kind in get_type_hints(RunSettings).items():
        section = config.get(name)
        if isinstance(section, ml_collections.ConfigDict) and (cls := nested_class(kind)):
            fill(section, cls())


def beside(file: str, name: str) -> str:
    """Path of a file that stands beside a config, relative to the working directory where it is below that.

    Args:
      file: `__file__` of the config.
    """
    path = pathlib.Path(file).with_name(name).resolve()
    here = pathlib.Path.cwd().resolve()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def base() -> ml_collections.ConfigDict:
    """Shared settings and supervised fine-tuning, sized for the synthetic environment."""
    return to_config(RunSettings(sft=SftSettings()))


# Learning rates for a pretrained base: of its parameters in `sft` (Tulu 2, arXiv 2311.10702), of adapters elsewhere
# (Rewarded Soups, arXiv 2306.04488; P-RLHF, arXiv 2402.05133; MODPO, arXiv 2310.03708; RiC, arXiv 2402.10207).
PRETRAINED_RATES = {"sft": 2e-5, "reward": 1e-4, "policy": 1.4e-5, "preference": 5e-5, "modpo": 1e-4, "ric": 1.4e-4}
# Above these, training a pretrained base is likely to undo what it knows.
LARGEST_RATE, LARGEST_FULL_RATE = 1e-3, 1e-4  # of adapters, of all parameters


def pretrained(c: ml_collections.ConfigDict) -> None:
    """Changes the sections of a config, which are sized for small models from scratch, for a pretrained base and real
    text: learning rates of the literature, batches that fit into memory, and lengths of a few hundred tokens, to which
    longer texts are cut. Call it after the sections are added.
    """
    for name, rate in PRETRAINED_RATES.items():
        if name in c and c[name] is not None:
            c[name].optimizer.learning_rate = rate
    if "preference" in c:
        c.preference.user_optimizer.learning_rate = 1e-3
    for name in ("sft", "reward", "preference", "ric"):
        if name in c and c[name] is not None:
            c[name].batch_size = 16  # with texts of this length, larger ones take tens of gigabytes
    if "preference" in c:
        c.preference.mixture = "dropout"  # the same gradient in expectation at half the cost
    c.sample_rows = 32  # a chunk is padded to so many rows
    c.data.update({"max_prompt": 512, "max_completion": 256})
    c.data.update({"long_prompt": "truncate_left", "long_completion": "truncate"})
    with c.ignore_type():
        c.data.prompt_buckets, c.data.completion_buckets = (64, 128, 256), (64, 128)


def warn_of_rates(settings: RunSettings) -> None:
    """Warns of learning rates that are meant for small models from scratch, where the base is pretrained."""
    if not settings.model.path:
        return
    for name in PRETRAINED_RATES:
        section = getattr(settings, name)
        if section is None or name not in settings.stages:
            continue
        full = not (section.adapter if name == "sft" else settings.adapter).rank
        limit = LARGEST_FULL_RATE if full else LARGEST_RATE
        if section.optimizer.learning_rate > limit:
            logging.warning(
                "%s.optimizer.learning_rate=%g suits small models from scratch, and a pretrained base is likely to "
                "forget what it knows; --config.%s.optimizer.learning_rate=%g is usual",
                *(name, section.optimizer.learning_rate, name, PRETRAINED_RATES[name]),
            )


def users(c: ml_collections.ConfigDict) -> None:
    """Adds the sections of the stages for user models: preference, evaluate_users."""
    c.preference = to_config(PreferenceSettings())
    c.evaluate_users = to_config(UsersSettings())


def policies(c: ml_collections.ConfigDict) -> None:
    """Adds the sections of the stages that train one policy per preference by PPO: comparisons, reward, policy."""
    c.comparisons = to_config(ComparisonsSettings())
    c.reward = to_config(RewardSettings())
    c.policy = to_config(PolicySettings())


def without_ppo(c: ml_collections.ConfigDict) -> None:
    """Adds the sections of methods without PPO: modpo, ric."""
    c.modpo = to_config(ModpoSettings())
    c.ric = to_config(RicSettings())


def front(c: ml_collections.ConfigDict, objectives: tuple[str, ...]) -> None:
    """Adds the stages that compare methods on one front, with empty `methods`; `family` fills them.

    Rewards are quantiles, 0 to 1, so that they are comparable with preference weights, and one KL coefficient has the
    same meaning for all methods.

    Args:
      objectives: ids of the preferences on the axes of the front.
    """
    policies(c)
    without_ppo(c)
    c.objectives = objectives
    c.stages = ("sft", "comparisons", "reward", "methods", "evaluate_front")
    c.seeds = ()  # several seeds run one after the other, and the report has their means
    c.data.update({"max_prompt": 36, "prompt_buckets": (12, 24)})
    c.comparisons.pairs = 768
    c.policy.update({"scale": "quantiles", "steps": 40, "rollouts": 64})
    c.policy.kl.coefficient = 0.03
    c.policy.experience.update({"missing_eos_penalty": 0.3, "score_clip": 0.0})
    # Three seeds, with two and with three objectives side by side, take half an hour on two cores.
    c.sft.steps, c.modpo.steps = 300, 90
    c.ric.update({"samples": 1536, "steps": 160, "online_steps": 60})  # as many samples in total as the policies
    c.evaluate_front = to_config(FrontSettings())


def family(c: ml_collections.ConfigDict, *names: str) -> None:
    """Fills `methods` with entries sized for `c.objectives`.

    All policies of an entry together answer `policy.rollouts` prompts per step. Only MORL, which trains one policy per
    evaluated point, answers a quarter of that with each policy.

    Args:
      names: the entries; all but the ablations of MOC where none is given.
    """
    each = c.policy.rollouts // len(c.objectives) // 4 * 4  # a multiple of the number of minibatches
    on_grid = {"preferences": {"kind": "grid", "points": "simplex"}}
    # The base has never read a tally, so learning it takes larger steps. More than five labels would take more samples.
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
    # Ablations of MOC, and other combination rules under the same conditions.
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
    # The same conditions, with mixed adapters in place of a preference prompt.
    entries["moc_mixed"] = {**on_grid, "combine": min_norm, "mix": "weights"}
    with c.ignore_type():
        wanted = names or [name for name in entries if name not in (*combine, "moc_mixed")]
        c.methods = ml_collections.ConfigDict({name: entries[name] for name in wanted})
