"""Every setting: what it takes, what it refuses, and that a refusal is one line that names the key."""

import copy
import dataclasses
import functools
import importlib
import importlib.util
import math
import pathlib
import pkgutil
import typing
from collections.abc import Mapping
from typing import Any

import ml_collections
import numpy as np
import pytest
from absl import flags
from ml_collections import config_flags

import pjrlhf
from pjrlhf import config as configs
from pjrlhf.algorithms.answering import AnswerSettings
from pjrlhf.algorithms.pdpo_settings import EntrySettings
from pjrlhf.config import RunSettings
from pjrlhf.data.readers.reader import ReaderSettings
from pjrlhf.errors import UserError
from pjrlhf.feedback.samplers import ChatSamplerSettings, ModelSamplerSettings
from pjrlhf.feedback.writers.base import Writer
from pjrlhf.feedback.writers.kinds import kinds as writers
from pjrlhf.judges.language_model import JudgeSettings
from pjrlhf.models.user_models.base import UserRewards
from pjrlhf.models.user_models.kinds import kinds
from pjrlhf.objectives.scalarization import CombinationRule
from pjrlhf.pipeline import stages
from pjrlhf.runtime.classifiers import ClassifierSettings
from pjrlhf.runtime.judges import ModelJudgeSettings
from pjrlhf.serving.settings import EngineSettings, ServerSettings
from pjrlhf.settings import RENAMED, Settings, fields_of, nested_class, overlay, parse, rule_of, setting, to_config

ROOT = pathlib.Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inner(Settings):
    rate: float = setting(0.5, "of decay", low=0.0, below=1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outer(Settings):
    name: str = setting("a", choices=("a", "b"))
    count: int = setting(1, low=1, high=10)
    sizes: tuple[int, ...] = setting((), low=1)
    limit: int | None = setting(None, low=0)
    source: str | Mapping[str, Any] = setting("built-in", choices=("built-in",))
    inner: Inner = setting(Inner())

    def check(self):
        if self.count > 5 and self.name == "b":
            raise UserError(f"count: {self.count} is too many for name 'b'; choose 5 at most")


def test_values_are_converted_to_their_types():
    found = parse(Outer, {"sizes": [1, np.int64(2)], "limit": 3, "inner": {"rate": 0}, "count": np.int32(2)})
    assert found.sizes == (1, 2) and found.limit == 3 and found.count == 2
    assert isinstance(found.inner.rate, float) and isinstance(found.count, int)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"count": 0}, "x.count: 0 is out of range; choose a number at least 1 and at most 10"),
        ({"count": 1.5}, "x.count: 1.5 is not a whole number"),
        ({"count": True}, "x.count: True is not a whole number"),
        ({"count": "1"}, "x.count: '1' is not a whole number"),
        ({"name": "c"}, "x.name: 'c' is unknown; choose one of a, b"),
        ({"name": 3}, "x.name: 3 is not text; choose one of a, b"),
        ({"sizes": (1, 0)}, "x.sizes: 0 is out of range; choose a number at least 1"),
        ({"sizes": 3}, "x.sizes: 3 is not a list"),
        ({"sizes": (1, "2")}, "x.sizes: .* is not a list"),
        ({"inner": {"rate": 1.0}}, "x.inner.rate: 1.0 is out of range; choose a number at least 0 and below 1"),
        ({"inner": {"rate": math.nan}}, "x.inner.rate: nan is not finite; choose a number at least 0 and below 1"),
        ({"inner": {"rate": math.inf}}, "x.inner.rate: inf is not finite"),
        ({"inner": {"rate": 10**400}}, "x.inner.rate: .* is not a number"),
        ({"name": "a\udcff"}, "x.name: 'a.*' is not UTF-8"),
        ({"source": {"a": ["b\udcff"]}}, "x.source.a: 'b.*' is not UTF-8"),
        ({"source": {"a\udcff": 1}}, "x.source: 'a.*' is not UTF-8"),
        ({"inner": 3}, "x.inner: 3 is not a section of settings"),
        ({"inner": {"rat": 0.1}}, "x.inner.rat: no such setting; did you mean x.inner.rate?"),
        ({"size": 1}, "x.size: no such setting; did you mean x.sizes?"),
        ({"source": "file"}, "x.source: 'file' is unknown; choose one of built-in"),
        ({"source": "{'kind': csv}"}, "x.source: .* is no section; write such as {'kind': NAME"),
        ({"count": 6, "name": "b"}, "x.count: 6 is too many for name 'b'; choose 5 at most"),
    ],
)
def test_a_bad_value_names_the_key_the_value_and_what_is_allowed(values, message):
    with pytest.raises(UserError, match=message) as caught:
        parse(Outer, values, "x")
    assert "\n" not in str(caught.value)


def test_a_section_in_place_of_a_name_may_be_text_as_a_flag_gives_it():
    assert parse(Outer, {"source": "{'kind': 'jsonl', 'limit': 3}"}).source == {"kind": "jsonl", "limit": 3}


def test_an_overlay_changes_what_it_names():
    base = Outer(count=3, inner=Inner(rate=0.25))
    found = overlay(base, {"inner": {"rate": 0.75}})
    assert found == dataclasses.replace(base, inner=Inner(rate=0.75)) and base.inner.rate == 0.25


def test_a_config_of_settings_reads_back_as_the_same_settings():
    settings = Outer(count=2, sizes=(3,), source={"kind": "x"})
    config = to_config(settings)
    assert isinstance(config, ml_collections.ConfigDict) and parse(Outer, config) == settings
    config.limit = 4  # a placeholder, so that a flag can set it
    assert parse(Outer, config).limit == 4


# ---- the settings of this package


def everything():
    """A config with every section there is."""
    return copy.deepcopy(_everything())


@functools.cache
def _everything():
    config = configs.base()
    configs.users(config)
    configs.policies(config)
    configs.without_ppo(config)
    for field in dataclasses.fields(RunSettings):
        kind = nested_class(RunSettings.__annotations__.get(field.name) or type(getattr(RunSettings(), field.name)))
        if field.name not in config and kind:
            config[field.name] = to_config(kind())
    config.stages = ()
    return config


KEYS = {key: hint_and_field for key, hint_and_field in fields_of(RunSettings).items()}


def test_every_setting_is_reached_by_a_flag():
    config = everything()
    assert {*config.to_dict()} >= {field.name for field in dataclasses.fields(RunSettings)}
    for key in KEYS:
        section = config
        for part in key.split("."):
            assert part in section, key
            section = section[part]


def below(cls):
    """All classes derived from one."""
    return {one for direct in cls.__subclasses__() for one in (direct, *below(direct))}


def test_every_class_of_settings_is_reached_by_a_flag():
    """As a section, as what a section inherits, or under names that a config chooses."""
    for module in pkgutil.walk_packages(pjrlhf.__path__, "pjrlhf."):
        importlib.import_module(module.name)
    package = {cls for cls in below(Settings) if cls.__module__.startswith("pjrlhf.")}
    named = {JudgeSettings, ModelJudgeSettings, ChatSamplerSettings, ModelSamplerSettings, ClassifierSettings}
    chosen = {EntrySettings, AnswerSettings, CombinationRule, *named, *below(CombinationRule)}
    inherited = {base for cls in [*classes(), *named] for base in cls.__mro__}
    chosen |= {EngineSettings, ServerSettings}  # flags of `pjrlhf serve`
    chosen |= {ReaderSettings, *below(ReaderSettings)}  # of sources, by their kind
    chosen |= {UserRewards, *below(UserRewards)}  # entries of `user_models.models`
    chosen |= {Writer, *below(Writer)}  # `writer` of entries of `preference.models`
    assert package - inherited - chosen == set()
    combine = everything().policy.combine
    for rule in below(CombinationRule) & package:
        assert {field.name for field in dataclasses.fields(rule)} <= {*combine}, rule
    config = everything()
    config.preference.models = {"mine": to_config(EntrySettings())}
    assert {field.name for field in dataclasses.fields(EntrySettings)} <= {*config.preference.models.mine}


def test_the_defaults_of_a_config_are_those_of_the_classes():
    """The building blocks of configs change nothing; `front`, which sizes a run, says what it changes."""
    sections = {name: kind for name, hint in typing.get_type_hints(RunSettings).items() if (kind := nested_class(hint))}
    config = everything()
    del config.stages
    assert configs.read(config) == RunSettings(**{name: kind() for name, kind in sections.items()})


def values_for(hint, field):
    """Values made from the type and range of a field: wrong types, the ends of the range and what lies beyond."""
    rule = rule_of(field)
    yield from (None, "", "nonsense", "a:b", True, [], {}, {"x": 1}, [[1]], ["x"], 1.5, -1.5, 0, -1, 1, 2)
    yield from (
        10**9,
        10**30,
        -(10**30),
        1e30,
        math.nan,
        math.inf,
        -math.inf,
        (0.9, 0.1),
        (1, 1),
        "x" * 10_000,
        "\ud800",
    )
    for edge in (rule.low, rule.high, rule.above, rule.below):
        if edge is not None:
            yield from (edge, edge - 1, edge + 1)
    yield from rule.allowed
    yield field.default if field.default is not dataclasses.MISSING else field.default_factory()


def classes(cls=RunSettings):
    """Every class of settings below one, itself included."""
    found = {cls}
    for hint in typing.get_type_hints(cls).values():
        if nested := nested_class(hint):
            found |= classes(nested)
    return found


def one_line(error):
    return "\n" not in str(error) and len(str(error)) < 1000 and str(error).isprintable()


@pytest.mark.parametrize(
    "cls",
    sorted(
        classes() | {EngineSettings, ServerSettings} | set(kinds().values()) | set(writers().values()),
        key=lambda cls: cls.__name__,
    ),
)
def test_every_value_is_taken_or_refused_in_one_line(cls):
    """Given for one field of its class."""
    for field in dataclasses.fields(cls):
        hint, taken, refused = typing.get_type_hints(cls)[field.name], 0, 0
        for value in values_for(hint, field):
            try:
                found = getattr(parse(cls, {field.name: value}, "section"), field.name)
            except UserError as error:
                assert one_line(error), str(error)[:200]
                refused += 1
                continue
            taken += 1
            numbers = found if isinstance(found, tuple) else (found,)
            assert all(math.isfinite(x) for x in numbers if isinstance(x, float)), (field.name, value)
        assert refused, field.name
        assert taken or nested_class(hint), field.name


@pytest.mark.slow
@pytest.mark.parametrize("key", KEYS)
def test_every_value_is_taken_or_refused_by_a_config(key):
    """The same of a whole config, by its file and by a flag where flags can say it."""
    for value in ("nonsense", True, ["x"], {"x": 1}, -1, 0, math.nan, 10**30):
        for by_flag in (False, True):
            config = everything()
            if by_flag:
                if not set_flag(config, key, value):
                    continue
            else:
                *sections, last = key.split(".")
                part = config
                for name in sections:
                    part = part[name]
                with config.ignore_type():
                    part[last] = value
            try:
                stages.read(config)
            except UserError as error:
                assert one_line(error), str(error)[:200]


def set_flag(config, key, value):
    """Whether `--config.key=value` was understood; flags refuse in their own words, in one line."""
    found = flags.FlagValues()
    config_flags.DEFINE_config_dict("config", config, flag_values=found)
    try:
        found(["test", f"--config.{key}={value}"])
        return True
    except (flags.Error, TypeError, ValueError, SyntaxError):
        return False


def homes_of(new):
    """The sections (dotted, "" for the whole) that have a setting or a section of this name."""
    dotted = {".".join(key.split(".")[: n + 1]) for key in KEYS for n in range(len(key.split(".")))}
    return sorted({key.rpartition(".")[0] for key in dotted if key.rpartition(".")[2] == new})


@pytest.mark.parametrize("old", RENAMED)
def test_a_renamed_setting_is_answered_with_its_new_name(old):
    new, last = RENAMED[old], old.rpartition(".")[2]
    homes = [home for home in homes_of(new) if "." not in old or home == old.rpartition(".")[0]]
    assert homes
    for home in homes:
        config = everything()
        part = config
        for name in filter(None, home.split(".")):
            part = part[name]
        with config.unlocked(), config.ignore_type():
            part[last] = 1
        with pytest.raises(UserError, match=f"{last}: is called .*{new} now; rename it"):
            configs.read(config)


def test_old_names_of_values_are_answered_too():
    with pytest.raises(UserError, match="preferences: 'world' is called 'synthetic' now; write that"):
        configs.read({"preferences": "world"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stages": ("sft", "sfx")}, "stages: 'sfx' is unknown; choose from sft, "),
        ({"stages": "sft"}, "stages: 'sft' is not a list of names"),
        ({"stages": (1,)}, "stages: .* is not a list of names"),
        ({"objectives": ("P1A", "P9")}, "objective 'P9': not among the preferences"),
        (
            {"general": "polite", "stages": ("evaluate",)},
            "judge: synthetic has no score for 'polite'; give --config.judge a scorer",
        ),
        ({"objectives": ()}, "objectives: is empty"),
        ({"objectives": ("P1A", "P1A")}, "objectives: .* repeats one"),
        ({"judge": {"P1A": "no such"}}, "judge"),
        ({"seeds": (0, 1), "stages": ("sft",)}, "seeds: only runs that end in evaluate_front"),
        ({"seeds": (1, 1)}, "seeds: .* repeats one"),
        ({"policy": {"combine": {"kind": "sun"}}}, r"policy\.combine\..*sun"),
        ({"policy": {"rollouts": 5}}, "policy.rollouts: 5 cannot be split into ppo.minibatches=2 equal parts"),
        ({"policy": {}, "temperature": 0.0}, "temperature: a policy cannot learn from greedy samples"),
        ({"policy": {"experience": {"estimator": "rloo"}}}, "samples_per_prompt"),
        ({"reward": {"quantiles": (0.9, 0.1)}}, "reward.quantiles: .* is not a low and a high quantile"),
        ({"sft": {"steps": 3}}, "sft.optimizer.warmup_steps: 20 leaves none of the 3 updates"),
        (
            {"preference": {"models": {"one": {"kind": "clustre"}}}},
            "preference.models.one.kind: 'clustre' is unknown; did",
        ),
        ({"preference": {"models": {"one": {"tokens": 3}}}}, "preference.models.one: has no kind"),
        (
            {"preference": {"models": {"one": {"kind": "uniform", "betta": 1.0}}}},
            "preference.models.one.betta: no such",
        ),
        (
            {"population": {"personas": ("P9",), "fractions": (1.0,)}},
            "population.personas: 'P9' is unknown; choose from",
        ),
        ({"population": {"fractions": (1.0,)}}, "population.fractions: 1 for 2 personas"),
        ({"methods": {"one": {"train": "ppo"}}, "stages": ("methods",)}, "methods: train 'ppo' is no trainer"),
        ({"methods": {"one": {"stepps": 3}}, "stages": ("methods",)}, "methods.one.stepps: no such setting"),
        ({"model": {"hidden_size": 30, "num_heads": 4}}, "model.hidden_size: 30 is not a multiple"),
        ({"model": {"rope_scaling": {"factr": 1.0}}}, "model.rope_scaling: give factor"),
        ({"mesh": {"model": 2}}, "mesh.model: no such setting; known keys: data, fsdp, tensor"),
    ],
)
def test_settings_that_do_not_go_together(changes, message):
    with pytest.raises(UserError, match=message) as caught:
        stages.read(ml_collections.ConfigDict(changes))
    assert "\n" not in str(caught.value)


def catalogue():
    return sorted(path.stem for path in (ROOT / "configs").glob("*.py"))


@pytest.mark.parametrize("name", catalogue())
def test_the_catalogue_states_no_default_twice(name):
    """What a config of the catalogue does not change is what the classes say."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    plan = stages.read(module.get_config())
    assert plan.settings.mesh == RunSettings().mesh or name == "llama"
    assert configs.read(plan.to_dict()) == plan.settings
