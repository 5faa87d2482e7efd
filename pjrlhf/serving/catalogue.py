"""What is served: a base, the adapters of a bank by name, and people; and which soup or person a request means."""

import dataclasses
import difflib
import functools
import math
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NotRequired, Protocol, cast

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh
from typing_extensions import TypedDict

from pjrlhf.data.messages import Prompt
from pjrlhf.data.schema import Example
from pjrlhf.data.token_table import Lengths
from pjrlhf.errors import UserError
from pjrlhf.export.ingredients import check_adapter, check_bases, open_ingredient
from pjrlhf.language_model import LanguageModel, load_bank, load_model, load_personal
from pjrlhf.models.adapters import AdapterConfig, Backbone, is_low_rank
from pjrlhf.models.folders import read_json
from pjrlhf.models.hf_config import read_config
from pjrlhf.models.hub import hub_name, model_folder
from pjrlhf.models.huggingface import fingerprint
from pjrlhf.models.registry import UserRegistry
from pjrlhf.models.storage import load_tree
from pjrlhf.models.users import UserModel
from pjrlhf.parallel.mesh import make_mesh, shard_params
from pjrlhf.paths import local
from pjrlhf.rollout.preference import PreferenceConfig
from pjrlhf.serving.people.fit import Learning
from pjrlhf.serving.people.rewards import LONG, Rewarded, Scorer, open_scorer
from pjrlhf.serving.run_notes import RunNotes, read_notes
from pjrlhf.settings import SERVED, check_names, parse
from pjrlhf.types import Params

# The name of the base among the models, and of the soup of the person who asks, where a user model mixes adapters.
BASE, PERSONAL = SERVED
SOUP = "soup:"
WEIGHT_LIMIT = 100.0


class UnknownModel(UserError):
    """A request names a model that is not served."""


class UnknownIngredient(UserError):
    """A mix names an adapter that is not served."""


class Persons(Protocol):
    """Who may ask: the people of a user model."""

    @property
    def model(self) -> UserModel: ...

    @property
    def trained(self) -> bool: ...

    def row(self, name: str | None) -> tuple[np.ndarray | None, np.ndarray | None]:
        """(user tokens [E, D] or None, mix [K] or None) of a person; of the generic user for unknown ones."""
        ...

    def knows(self, name: str) -> bool:
        """Whether a person has a row of their own."""
        ...

    @property
    def reads(self) -> "Reads | None": ...

    def told(self, prompt: Prompt, name: str | None) -> Prompt:
        """The prompt of a person, known or not, after what is written of their comparisons, where `reads` says so."""
        ...


@dataclasses.dataclass(frozen=True)
class Reads:
    """What an entry reads of a person before a prompt; see `EntrySettings`, whose fields these are."""

    history: int
    writer: str | Mapping[str, Any]
    similar: bool = False


class Teller(Protocol):
    """Writes comparisons of a person before a prompt; `feedback.served` has it."""

    def __call__(self, prompt: Prompt, person: str | None, comparisons: Sequence[Example]) -> Prompt:
        """The prompt as the entry reads it.

        Args:
          person: None for one that nobody was trained on.
          comparisons: of this person, the latest last.
        """
        ...


@dataclasses.dataclass(frozen=True)
class People:
    """A user model with its people.

    Attributes:
      model: kind and sizes.
      registry: who has which row.
      params: of the user model.
      trained: whether a run has trained it; otherwise everybody starts as the same share of every adapter.
      learning: how the rows of new people are fitted; None where that is not known.
      scorer: where people are those of a reward model.
      base: identifies the base.
      reads, teller: what is read of a person before a prompt, and who writes it.
    """

    model: UserModel
    registry: UserRegistry
    params: Params
    trained: bool = True
    learning: Learning | None = None
    scorer: Scorer | None = None
    base: str = ""
    reads: Reads | None = None
    teller: Teller | None = None

    @property
    def learns(self) -> bool:
        """Whether the rows of people can be fitted."""
        return self.model.personal and (self.learning is not None or self.scorer is not None)

    @functools.cached_property
    def _apply(self) -> Any:
        return jax.jit(self.model.apply)

    def row(self, name: str | None) -> tuple[np.ndarray | None, np.ndarray | None]:
        """(user tokens [E, D] or None, mix [K] or None) of a person; of the generic user for unknown ones."""
        found = self._apply(self.params, jnp.asarray(self.registry.indices([name])))
        return tuple(None if x is None else np.asarray(x, np.float32)[0] for x in found)  # pyright: ignore[reportReturnType]

    def knows(self, name: str) -> bool:
        """Whether a person has a row of their own."""
        return name in self.registry.rows

    def told(self, prompt: Prompt, name: str | None, comparisons: Sequence[Example] = ()) -> Prompt:
        """See `Persons`.

        Args:
          comparisons: of this person.

        Raises:
          UserError: nobody writes them down.
        """
        if self.reads is None:
            return prompt
        if self.teller is None:
            raise UserError(
                "prompt: this entry reads comparisons of a person before it, which nobody writes here; serve the run "
                "with pjrlhf serve"
            )
        return self.teller(prompt, name if name in self.registry.rows else None, comparisons)


class Person(TypedDict):
    """The person of a request, as a response tells."""

    id: str
    known: bool
    answered_as: NotRequired[str]


class Described(TypedDict):
    """Who has answered, as a response tells."""

    mix: dict[str, float]
    user: NotRequired[Person]


@dataclasses.dataclass(frozen=True)
class Voice:
    """Who answers a request.

    Attributes:
      model: the name under which it was asked for.
      mix: float [K], or None without a bank.
      user_tokens: float [E, D], or None.
      weights: name of an adapter -> its weight, without zeros.
      user: the person's name as given; None where nobody is named, people are not served, or the base alone answers.
      known: whether the user model knows this person.
      personal: whether the answer depends on the person.
      reads: whether their comparisons stand before the prompt, see `Catalogue.told`.
    """

    model: str
    mix: np.ndarray | None
    user_tokens: np.ndarray | None
    weights: Mapping[str, float]
    user: str | None = None
    known: bool = False
    personal: bool = False
    reads: bool = False

    def describe(self) -> Described:
        """For the response."""
        found: Described = {"mix": dict(self.weights)}
        if self.user is not None:
            found["user"] = {"id": self.user, "known": self.known}
            if self.personal and not self.known:
                found["user"]["answered_as"] = "the generic user, because this person is unknown"
        return found


@dataclasses.dataclass(frozen=True)
class Catalogue:
    """The models, adapters and people of a server.

    Attributes:
      model: the base with its tokenizer.
      names: of the adapters.
      bank: the adapters, or None.
      people: or None.
      chat: plain prompts of the command line are asked as the first message of a conversation.
      run: the run directory, where a run is served.
      notes: what the run tells people about all this.
      soups: name -> weights by name of adapter, of soups that are models of their own.
    """

    model: LanguageModel
    names: tuple[str, ...] = ()
    bank: Params | None = None
    people: Persons | None = None
    chat: bool = True
    run: pathlib.Path | None = None
    notes: RunNotes = dataclasses.field(default_factory=RunNotes)
    soups: Mapping[str, Mapping[str, float]] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        check_names("ingredients", self.names)
        check_names("soups", self.soups, dict.fromkeys(self.names, "an ingredient"))
        for name, mix in self.soups.items():
            try:
                self._checked(mix)
            except UserError as problem:
                raise UserError(f"soups: {name}: {problem}") from problem

    @property
    def user_tokens(self) -> int:
        """E, the number of user tokens of everybody who is not asked as the base alone."""
        return 0 if self.people is None else self.people.model.num_tokens

    @property
    def models(self) -> dict[str, str | None]:
        """Name -> name of the model it adapts."""
        found: dict[str, str | None] = {BASE: None}
        if self._mixing:
            found[PERSONAL] = BASE
        return found | dict.fromkeys((*self.names, *self.soups), BASE)

    @property
    def default(self) -> str:
        """The model that answers where a request names none: what the user model was trained for, else the base."""
        if self.people is None or not self.people.trained:
            return BASE
        return PERSONAL if self._mixing else self.names[0]

    @property
    def _mixing(self) -> bool:
        """Whether people are soups."""
        return self.people is not None and self.people.model.mixes

    def voice(self, model: str | None = None, mix: Mapping[str, float] | None = None, user: str | None = None) -> Voice:
        """Who answers.

        Args:
          model: a name of `models`, or "soup:NAME=WEIGHT,..."; where None, `personal` for a known person who is a soup,
            else `default`.
          mix: weights by name of adapter; they need not sum to 1 and may be negative.
          user: the person who asks.

        Raises:
          UnknownModel: no such model.
          UnknownIngredient: `mix`, or the soup that `model` names, has an unknown name.
          UserError: the soup is malformed, or `mix` is given beside a model that is a soup already.
        """
        known = self.people is not None and user is not None and self.people.knows(user)
        name = (PERSONAL if known and self._mixing else self.default) if model is None else model
        if name.startswith(SOUP):
            if mix is not None:
                raise UserError("mix: the model names a soup already; give one of the two")
            weights = self._checked(parse_mix(name.removeprefix(SOUP)))
        elif name not in self.models:
            raise UnknownModel(f"model {name!r}: is not served here; choose one of {', '.join(self.models)}")
        elif mix is not None:
            if name in self.soups:
                raise UserError(f"mix: the model {name} is a soup already; give the mix with model {BASE}")
            if name in self.names and not self.user_tokens:
                raise UserError(f"mix: the model {name} is one adapter already; give the mix with model {BASE}")
            weights = self._checked(mix)
        else:
            weights = {name: 1.0} if name in self.names else dict(self.soups.get(name, {}))
        tokens = None
        alone = name == BASE and mix is None  # no adapter, and nobody's user tokens
        if self.people is not None and not alone:
            tokens, own = self.people.row(user)
            if name == PERSONAL and mix is None and own is not None:
                weights = dict(zip(self.names, own.tolist(), strict=True))
        row = np.array([weights.get(one, 0.0) for one in self.names], np.float32) if self.names else None
        weights = {one: weight for one, weight in weights.items() if weight}
        reads = self.people is not None and self.people.reads is not None and not alone
        if self.people is None or user is None or alone:
            return Voice(name, row, tokens, weights, reads=reads)
        personal = tokens is not None or reads or (name == PERSONAL and mix is None)
        return Voice(name, row, tokens, weights, user, known, personal, reads)

    def told(self, voice: Voice, prompt: Prompt) -> Prompt:
        """A prompt as who answers reads it."""
        return self.people.told(prompt, voice.user) if voice.reads and self.people is not None else prompt

    def laid_out(self, backbone: Backbone) -> "Catalogue":
        """The catalogue with the base as an engine has laid it out, so that its layers lie in memory once; unchanged
        where people learn, because fits read the layers as they were loaded.
        """
        if isinstance(self.people, People) and self.people.learns:
            return self
        return dataclasses.replace(self, model=dataclasses.replace(self.model, backbone=backbone))

    def asked(self, text: str) -> Prompt:
        """A question of the command line as a prompt."""
        return [{"role": "user", "content": text}] if self.chat else text

    def _checked(self, mix: Mapping[str, float]) -> dict[str, float]:
        for name, weight in mix.items():
            if name not in self.names:
                close = difflib.get_close_matches(name, self.names, 1)
                hint = f"did you mean {close[0]}?" if close else f"choose from {', '.join(self.names)}"
                if not self.names:
                    hint = "only the base is served; leave the mix out"
                raise UnknownIngredient(f"mix: {name!r} is no ingredient; {hint}")
            if not math.isfinite(weight) or abs(weight) > WEIGHT_LIMIT:
                raise UserError(f"mix: the weight {weight!r} of {name} is not between -100 and 100; correct it")
        return dict(mix)


def parse_mix(text: str) -> dict[str, float]:
    """The weights of "P1A=0.5,P2B=0.5".

    Raises:
      UserError: another form, or a name that comes twice.
    """
    weights: dict[str, float] = {}
    for part in text.split(","):
        name, equals, value = part.partition("=")
        try:
            weight = float(value)
        except ValueError:
            weight = math.nan
        if not equals or not math.isfinite(weight) or not name.strip():
            raise UserError(f"mix: {text!r} is no soup; write NAME=WEIGHT,NAME=WEIGHT")
        if name.strip() in weights:
            raise UserError(f"mix: {name.strip()} comes twice in {text!r}; give it one weight")
        weights[name.strip()] = weight
    return weights


# ---- what to serve


def parse_mesh(text: str) -> Mesh | None:
    """The mesh of "data=2,tensor=4", see `parallel.mesh.make_mesh`; None, for one device, where the text is empty.

    Raises:
      UserError: another form, or sizes that do not fit the devices.
    """
    sizes: dict[str, int] = {}
    for part in text.split(",") if text else []:
        name, _, size = (x.strip() for x in part.partition("="))
        if not re.fullmatch(r"-?[0-9]{1,9}", size) or name in sizes:
            raise UserError(f"mesh: {part!r} is no size of an axis; write AXIS=N,AXIS=N, each axis once")
        sizes[name] = int(size)
    return make_mesh(sizes) if sizes else None


def open_run(run: str, entry: str | None = None, mesh: Mesh | None = None) -> Catalogue:
    """What a run has trained.

    Args:
      run: the run directory.
      entry: the policies of the stage policy ("policy"), of an entry of `methods`, or a user model, an entry of
        `preference.models` or of `user_models.models`. Where None, the policies; without any, the only user model.
      mesh: of the devices that hold the model; one device where None.

    Raises:
      UserError: no run, nothing of that name or nothing that can answer in it, or damaged files.
    """
    folder = local(run)
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: no config.json; name the run directory of a run that has trained policies")
    config = read_json(folder / "config.json")
    if "stages" not in config:
        raise UserError(f"{folder}: is no run directory; serve a model in Hugging Face layout with --model")
    banks = {
        path.parent.name: path for path in (*folder.glob("policy/bank.safetensors"), *folder.glob("methods/*/bank.*"))
    }
    people = {path.parent.name: path for path in sorted(folder.glob("preference/*/model.safetensors"))}
    scorers = {path.parent.name: path for path in sorted(folder.glob("user_models/*/model.safetensors"))}
    people |= {name: path for name, path in scorers.items() if name not in (*banks, *people)}
    if not banks and not people:
        raise UserError(
            f"{folder}: has nothing to serve yet; run its stages policy, methods, preference or user_models first"
        )
    if entry is None:
        entry = "policy" if "policy" in banks else next(iter(banks)) if len(banks) == 1 else None
        if entry is None and not banks and len(people) == 1:
            entry = next(iter(people))
    if entry not in (*banks, *people):
        found = ", ".join((*banks, *people))
        reason = "has several user models or methods" if entry is None else f"has no {entry!r}"
        raise UserError(f"{folder}: {reason}; name one with --entry: {found}")
    notes = read_notes(config)
    if entry in banks:
        return dataclasses.replace(_policies(folder, banks[entry], config, mesh), notes=notes)
    if people[entry] == scorers.get(entry):
        return dataclasses.replace(_rewarded(folder, people[entry], config, mesh), notes=notes)
    return dataclasses.replace(_person(folder, people[entry], config, mesh), notes=notes)


def _policies(folder: pathlib.Path, path: pathlib.Path, config: Mapping[str, Any], mesh: Mesh | None) -> Catalogue:
    settings = config["model"]
    base = folder / "sft" / "model" if "sft" in config["stages"] else _recorded(folder, settings["path"])
    bank, names, adapter = load_bank(path, base)
    model = load_model(
        base,
        adapter=adapter,
        dtype=settings["dtype"],
        param_dtype=settings["param_dtype"],
        quantize=settings["quantize"],
        eos_token=settings["eos_token"] or None,
        mesh=mesh,
    )
    learning = _learning(config, model, PreferenceConfig())
    people = soup_people(bank, names, learning, fingerprint(base))
    return Catalogue(model, names, _placed(bank, mesh), people, _chats(model, config["data"]["chat"]), folder)


def soup_people(bank: Params, names: Sequence[str], learning: Learning | None, base: str) -> People | None:
    """People who are soups of a bank that no user model was trained for: softmax of weights, which start at 0."""
    if len(names) < 2 or not is_low_rank(bank):
        return None
    model = UserModel(kind="soup", num_users=1, adapters=len(names))
    params = {"table": {"weights": jnp.zeros((2, len(names)))}}
    return People(model, UserRegistry((None, None)), params, trained=False, learning=learning, base=base)


def _learning(config: Mapping[str, Any], model: LanguageModel, objective: PreferenceConfig) -> Learning:
    """How a run fits new people, see `protocols.users.UsersSettings`."""
    data, evaluated = config["data"], config.get("evaluate_users") or {}
    lengths = Lengths(
        prompt=data["max_prompt"],
        completion=data["max_completion"],
        context=model.backbone.model.config.max_length,
        **LONG,
    )
    names = {"steps": "cold_start_steps", "learning_rate": "cold_start_learning_rate"}
    given = {ours: evaluated[name] for ours, name in names.items() if name in evaluated}
    return Learning(objective=objective, lengths=lengths, **given)


def _recorded(run: pathlib.Path, path: str) -> pathlib.Path:
    """The base that a run has read, at its commit where it is on the hub."""
    inputs = run / "inputs.json"
    commit = read_json(inputs).get("model.path", {}).get("commit") if inputs.is_file() else None
    name = hub_name(path)
    return model_folder(f"{name.repo}@{commit}" if name and commit else path)


def _person(folder: pathlib.Path, path: pathlib.Path, config: Mapping[str, Any], mesh: Mesh | None) -> Catalogue:
    personal = load_personal(path, mesh=mesh)
    if personal.users.policies > 1:
        raise UserError(
            f"{path}: has an adapter for each person, a baseline that is not served; name another entry with --entry"
        )
    if "heads" in personal.params:
        raise UserError(f"{path}: is a reward model, which gives no answers; name a policy with --entry")
    bank, names = _placed(personal.params["bank"], mesh), (path.parent.name,)
    _, note = load_tree(path)
    objective = {name.removeprefix("objective."): x for name, x in note.items() if name.startswith("objective.")}
    learning = _learning(config, personal.model, parse(PreferenceConfig, objective, str(path)))
    reads = None
    if note.get("entry.history") or note.get("entry.writer"):
        similar = bool(note.get("entry.similar"))
        reads = Reads(history=note["entry.history"], writer=note["entry.writer"], similar=similar)
    if note.get("entry.user_text"):
        logging.warning(
            "%s: was trained on what people say about themselves, before the prompt; a request must bring it there",
            path.parent.name,
        )
    parts = personal.users, personal.registry, personal.params["users"]
    people = People(*parts, learning=learning, base=str(note["base"]), reads=reads)
    if personal.users.mixes:
        source = config["preference"]["bank"]
        _, names, _ = load_bank(folder / "policy" if source == "policy" else source)
    return Catalogue(personal.model, names, bank, people, _chats(personal.model, personal.chat), folder)


def _rewarded(folder: pathlib.Path, path: pathlib.Path, config: Mapping[str, Any], mesh: Mesh | None) -> Catalogue:
    """The base, with people as a reward model knows them. Nobody is known before they tell something."""
    scorer, model = open_scorer(path, config["data"], mesh)
    kind = cast(UserModel, Rewarded(path.parent.name, scorer.model.slots.source != "nobody"))  # has what is read of it
    shared = {"params": scorer.params, "reduction": vars(scorer.reduction)}
    params = {"table": jax.tree.map(lambda x: x[None], scorer.generic), "shared": shared}
    people = People(
        kind, UserRegistry((None,)), params, trained=False, scorer=scorer, base=fingerprint(model.folder or "")
    )
    return Catalogue(model, people=people, chat=_chats(model, scorer.chat), run=folder)


def _chats(model: LanguageModel, chat: bool | None) -> bool:
    """Whether questions are asked as in training; `chat` is the setting, None for what the tokenizer suggests."""
    return model.tokenizer.has_chat_template and chat is not False


def _placed(bank: Params, mesh: Mesh | None) -> Params:
    """A bank on the devices of its base."""
    return bank if mesh is None else shard_params(mesh, bank)


def open_folders(
    model: str,
    ingredients: Mapping[str, str],
    dtype: str = "float32",
    quantize: str = "",
    mesh: Mesh | None = None,
) -> Catalogue:
    """A base and adapters from folders.

    Args:
      model: in Hugging Face layout, or its name on the hub.
      ingredients: name -> folder, or name on the hub, of a LoRA adapter in PEFT layout. Ranks, scales and adapted
        layers may differ.
      dtype: of activations and parameters.
      quantize: see `load_model`.
      mesh: of the devices that hold the model; one device where None.

    Raises:
      UserError: a folder that cannot be read, or an adapter that does not fit the base.
    """
    folder = model_folder(model)
    config = read_config(folder)
    kind = str(read_json(folder / "config.json").get("model_type"))
    opened = [open_ingredient(model_folder(path), 1.0, kind, config.head_dim) for path in ingredients.values()]
    for one in opened:
        if one.adapter is None:
            raise UserError(f"{one.folder}: is a full model; give LoRA adapters, or serve it with --model")
        check_adapter(one, config, folder)
    check_bases(folder, opened)
    rank = max((one.rank for one in opened), default=1)
    adapter = AdapterConfig(rank=rank, alpha=float(rank))  # scale 1: `b` has the scale of every adapter
    found = load_model(folder, adapter=adapter, dtype=dtype, param_dtype=dtype, quantize=quantize, mesh=mesh)
    bank = _placed(_stacked([(one.factors, one.scale) for one in opened], rank), mesh) if opened else None
    room = min(config.max_length, 4096)
    lengths = Lengths(prompt=room // 2, completion=room // 2, context=config.max_length, **LONG)
    learning = Learning(objective=PreferenceConfig(), lengths=lengths)
    people = None if bank is None else soup_people(bank, tuple(ingredients), learning, fingerprint(folder))
    return Catalogue(found, tuple(ingredients), bank, people, found.tokenizer.has_chat_template)


def _stacked(adapters: Sequence[tuple[Mapping[str, np.ndarray], float]], rank: int) -> Params:
    """One bank of adapters of any rank: factors are padded with zeros, as are layers that an adapter leaves out."""
    shapes = {path: factor.shape for factors, _ in adapters for path, factor in factors.items()}
    bank = {}
    for path, shape in shapes.items():
        axis = -1 if path.endswith("/a") else -2
        whole = list(shape)
        whole[axis] = rank
        bank[path] = np.zeros((len(adapters), *whole), np.float32)
        for k, (factors, scale) in enumerate(adapters):
            if path in factors:
                place = [k, ...] + [slice(None)] * -axis
                place[axis] = slice(factors[path].shape[axis])
                bank[path][tuple(place)] = factors[path] * (scale if axis == -2 else 1.0)
    return flax.traverse_util.unflatten_dict({path: jnp.asarray(x) for path, x in bank.items()}, sep="/")
