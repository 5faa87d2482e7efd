"""What an export is made of: the base of a catalogue, and its adapters with their weights."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any, Protocol

import flax.traverse_util
import jax
import numpy as np
import xxhash

from pjrlhf import __version__
from pjrlhf.errors import UserError
from pjrlhf.export.ingredients import Ingredient
from pjrlhf.models.adapters import bank_size, is_low_rank, mixed_params
from pjrlhf.models.config import ModelConfig
from pjrlhf.models.families import FAMILIES, Family
from pjrlhf.models.folders import read_json
from pjrlhf.models.huggingface import fingerprint
from pjrlhf.models.quantization import kind_of
from pjrlhf.types import Json, Params

BASE = "base"  # its name in a catalogue


class Catalogue(Protocol):
    """What an export reads of a `serving.catalogue.Catalogue`."""

    @property
    def model(self) -> Any: ...
    @property
    def names(self) -> tuple[str, ...]: ...
    @property
    def bank(self) -> Params | None: ...
    @property
    def people(self) -> Any: ...
    @property
    def user_tokens(self) -> int: ...
    def voice(
        self, model: str | None = None, mix: Mapping[str, float] | None = None, user: str | None = None
    ) -> Any: ...


@dataclasses.dataclass(frozen=True)
class Source:
    """A catalogue that is exported.

    Attributes:
      catalogue: base, adapters and people.
      places: name of an adapter -> its folder, for the manifest.
      members: names of the people who have a row of their own.
    """

    catalogue: Catalogue
    places: Mapping[str, str]
    members: tuple[str, ...] = ()

    @property
    def folder(self) -> pathlib.Path:
        """That of the base."""
        folder = self.catalogue.model.folder
        assert folder is not None  # `load_model` read it
        return folder

    @property
    def config(self) -> ModelConfig:
        return self.catalogue.model.backbone.model.config

    @property
    def model_type(self) -> str:
        return str(read_json(self.folder / "config.json").get("model_type"))

    @property
    def family(self) -> Family:
        return FAMILIES[self.model_type]

    @property
    def quantize(self) -> str:
        """The `model.quantize` of the base; exports are made from the floats in its folder."""
        return kind_of(self.catalogue.model.backbone.base)

    @property
    def origin(self) -> tuple[str, str | None]:
        """(name on the hub, commit) of the base, by which others find it; else (absolute path, None)."""
        *_, repo, snapshots, commit = ("", "", *self.folder.parts)[-3:]
        if snapshots == "snapshots" and repo.startswith("models--"):
            return repo.removeprefix("models--").replace("--", "/", 1), commit
        return str(self.folder.absolute()), None

    @property
    def names(self) -> tuple[str, ...]:
        """Of the adapters.

        Raises:
          UserError: there are none.
        """
        if self.catalogue.bank is None:
            raise UserError("--for: there is no adapter to export, only a base; name some with --ingredients")
        return self.catalogue.names

    def refuse_user_tokens(self, kind: str) -> None:
        """Raises a UserError where every prompt starts with user tokens, which a format cannot hold."""
        if self.catalogue.user_tokens:
            raise UserError(
                f"--for {kind}: these adapters answer after user tokens only, which this format cannot hold; use "
                "--for vocabulary"
            )

    def refuse_full(self, kind: str) -> None:
        """Raises a UserError for a bank of full parameters."""
        if self.names and not is_low_rank(self.catalogue.bank or {}):
            raise UserError(
                f"--for {kind}: the ingredients are full models, which have no low-rank factors; use --for merged"
            )

    @property
    def personal(self) -> bool:
        """Whether a user model was trained, so that somebody answers where neither mix nor user is given."""
        return self.catalogue.people is not None and self.catalogue.people.trained

    def check_user(self, user: str) -> None:
        """Raises a UserError for a person whom nobody knows."""
        if not self.members and not self.personal:
            raise UserError("--user: these models know no people; leave it out, or name a user model with --entry")
        if user not in self.members:
            raise UserError(
                f"--user {user!r}: is unknown; leave it out, or name one of the {len(self.members)} people that "
                "pjrlhf users list shows"
            )

    def voice(self, mix: Mapping[str, float] | None, user: str | None) -> Any:
        """Who answers, see `Catalogue.voice`; a mix alone is that of the base and its adapters."""
        plain = mix is not None and not self.catalogue.user_tokens
        return self.catalogue.voice(BASE if plain else None, mix, user)

    def weights(self, mix: Mapping[str, float] | None, user: str | None) -> dict[str, float]:
        """Weights of the adapters, without zeros.

        Raises:
          UserError: an unknown name; a user where nobody is known, or who is no mix of adapters; or no weight but 0.
        """
        if user is not None:
            self.check_user(user)
        if mix is not None and user is not None:
            raise UserError("--mix: the user has weights already; give one of --mix and --user")
        if self.names and mix is None and user is None and not self.personal:
            raise UserError(f"--mix: is not given; weigh {', '.join(self.names)}, as in --mix {self.names[0]}=1")
        found = dict(self.voice(mix, user).weights)
        if not found:
            raise UserError("--mix: all weights are 0, which is the base; give one another weight")
        return found

    def adapters(self, weights: Mapping[str, float]) -> list[Ingredient]:
        """Low-rank adapters with their weights, float32."""
        adapter = self.catalogue.model.backbone.adapter
        return [
            Ingredient(
                pathlib.Path(self.places[name]), weight, self._one(name, np.float32), adapter.rank, adapter.alpha
            )
            for name, weight in weights.items()
        ]

    def _one(self, name: str, dtype: Any = None) -> Params:
        """One ingredient of the bank, as host arrays."""
        k = self.names.index(name)
        return jax.tree.map(lambda x: np.asarray(x[k], dtype), self.catalogue.bank)

    def mixed(self, weights: Mapping[str, float]) -> Params:
        """The parameters of a soup of full models."""
        bank: Any = self.catalogue.bank
        row = np.zeros((1, bank_size(bank)), np.float32)
        for name, weight in weights.items():
            row[0, self.names.index(name)] = weight
        return jax.tree.map(
            lambda x: x[0], mixed_params(self.catalogue.model.backbone.base, bank, jax.numpy.asarray(row))
        )

    def token_ids(self) -> dict[str, Json]:
        """Special tokens as answers were trained with them, for config.json and generation_config.json."""
        tokenizer = self.catalogue.model.tokenizer
        ends = [*tokenizer.eos_ids]
        return {
            "bos_token_id": tokenizer.bos_id,
            "eos_token_id": ends if len(ends) > 1 else ends[0],
            "pad_token_id": tokenizer.pad_id,
        }

    def manifest(self, kind: str, weights: Mapping[str, float]) -> dict[str, Json]:
        """What an export records of where it comes from."""
        name, commit = self.origin
        bank: Any = self.catalogue.bank
        entries = [
            {
                "name": one,
                "folder": self.places[one],
                "hash": _digest(self._one(one)),
                "kind": "lora" if is_low_rank(bank) else "full",
                "weight": weight,
            }
            for one, weight in weights.items()
        ]
        return {
            "package": "pjrlhf",
            "version": __version__,
            "format": kind,
            "space": "delta",
            "method": "linear",
            "base": {"folder": name, **({"commit": commit} if commit else {}), "hash": fingerprint(self.folder)},
            "ingredients": entries,
            **({"quantize": self.quantize} if self.quantize else {}),
        }


def _digest(tree: Params) -> str:
    """16 hex digits that identify the numbers of a tree."""
    digest = xxhash.xxh3_64()
    for path, leaf in sorted(flax.traverse_util.flatten_dict(tree, sep="/").items()):
        array = np.ascontiguousarray(leaf)
        digest.update(f"\0{path}\0{array.dtype}\0{array.shape}\0".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
