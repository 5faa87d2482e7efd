"""What is served: a base, the adapters of a bank by name, and people; and which soup or person a request means."""

import dataclasses
import difflib
import functools
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NotRequired, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from typing_extensions import TypedDict

from pjrlhf.data.messages import Prompt
from pjrlhf.data.schema import Example
from pjrlhf.errors import UserError
from pjrlhf.language_model import LanguageModel
from pjrlhf.models.adapters import Backbone
from pjrlhf.models.registry import UserRegistry
from pjrlhf.models.users import UserModel
from pjrlhf.serving.people.fit import Learning
from pjrlhf.serving.people.rewards import Scorer
from pjrlhf.serving.run_notes import RunNotes
from pjrlhf.settings import SERVED, check_names
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

    @property
    def asks(self) -> bool:
        """Whether it asks the base."""
        ...

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
        check_soups(self.soups, self.names)

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
            weights = checked_mix(parse_mix(name.removeprefix(SOUP)), self.names)
        elif name not in self.models:
            raise UnknownModel(f"model {name!r}: is not served here; choose one of {', '.join(self.models)}")
        elif mix is not None:
            if name in self.soups:
                raise UserError(f"mix: the model {name} is a soup already; give the mix with model {BASE}")
            if name in self.names and not self.user_tokens:
                raise UserError(f"mix: the model {name} is one adapter already; give the mix with model {BASE}")
            weights = checked_mix(mix, self.names)
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
        where people learn, or what is written of them asks the base, because both read the layers as they were loaded.
        """
        people = self.people
        if isinstance(people, People) and (people.learns or (people.teller is not None and people.teller.asks)):
            return self
        return dataclasses.replace(self, model=dataclasses.replace(self.model, backbone=backbone))

    def asked(self, text: str) -> Prompt:
        """A question of the command line as a prompt."""
        return [{"role": "user", "content": text}] if self.chat else text


def check_soups(soups: Mapping[str, Mapping[str, float]], names: Sequence[str]) -> None:
    """Checks soups with names of their own, see `Catalogue`.

    Raises:
      UserError: a name that cannot be one, or a soup that cannot be made of the adapters called `names`.
    """
    check_names("soups", soups, dict.fromkeys(names, "an ingredient"))
    for name, mix in soups.items():
        try:
            checked_mix(mix, names)
        except UserError as problem:
            raise UserError(f"soups: {name}: {problem}") from problem


def checked_mix(mix: Mapping[str, float], names: Sequence[str]) -> dict[str, float]:
    """A copy of the weights of a soup of the adapters called `names`.

    Raises:
      UnknownIngredient: a name that is none of them.
      UserError: a weight that is out of range.
    """
    for name, weight in mix.items():
        if name not in names:
            close = difflib.get_close_matches(name, names, 1)
            hint = f"did you mean {close[0]}?" if close else f"choose from {', '.join(names)}"
            if not names:
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
