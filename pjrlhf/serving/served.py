"""The model that an engine serves: one base and one bank, and which requests fit them."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pjrlhf.data.tokenization import Tokenizer
from pjrlhf.errors import UserError
from pjrlhf.models.adapters import Backbone, bank_size, is_low_rank
from pjrlhf.models.decoder import Decoder
from pjrlhf.models.shared_a import share
from pjrlhf.parallel.mesh import num_shards
from pjrlhf.serving.penalties import BIASES, penalties_of
from pjrlhf.serving.programs import Wanted
from pjrlhf.serving.tickets import Request
from pjrlhf.settings import fold_seed
from pjrlhf.types import Params


@dataclasses.dataclass(frozen=True, eq=False)
class ServedModel:
    """One base and one bank, in the layout in which they decode fastest.

    Attributes:
      backbone, bank: see `Engine`.
      tokenizer: of the base.
      user_tokens: E, the number of user tokens of a request that brings any.
      context: tokens of a prompt, its user tokens and an answer, at most.
    """

    backbone: Backbone
    bank: Params | None
    tokenizer: Tokenizer
    user_tokens: int
    context: int

    @classmethod
    def make(
        cls, backbone: Backbone, bank: Params | None, tokenizer: Tokenizer, user_tokens: int, context: int
    ) -> "ServedModel":
        """Checks the sizes; a `context` of 0 is what the model takes, or 4096 if less.

        Raises:
          UserError: sizes that do not fit the model, or a bank of full parameters.
        """
        if bank is not None and not is_low_rank(bank):
            raise UserError(
                "bank: holds full parameters, and every soup of them would be a model of its own; merge a soup with "
                "pjrlhf merge, and serve its folder"
            )
        longest = backbone.model.config.max_length
        context = context or min(longest, 4096)
        if context > longest:
            raise UserError(f"context: {context} is more than the {longest} tokens of the model; lower it")
        if user_tokens >= context:
            raise UserError(f"context: {context} has no room after {user_tokens} user tokens; raise it")
        if bank is not None:
            base, bank = share(backbone.base, bank)
            backbone = backbone.replace(base=base)
        return cls(*_unrolled(backbone, bank), tokenizer, user_tokens, context)

    @property
    def model(self) -> Decoder:
        """The decoder."""
        return self.backbone.model

    @property
    def shards(self) -> int:
        """Number of devices over which rows are split."""
        return 1 if self.model.batch_sharding is None else num_shards(self.model.batch_sharding)

    @property
    def adapters(self) -> int:
        """K, 0 without a bank."""
        return 0 if self.bank is None else bank_size(self.bank)

    def places(self, request: Request) -> int:
        """Number of user tokens of a request: E, or 0 for one that brings none."""
        return 0 if request.user_tokens is None else self.user_tokens

    def check(self, request: Request) -> None:
        """Raises UserError for a request that does not fit; the message starts with the name of a field."""
        places = self.places(request)
        length = len(request.tokens) + places
        if not len(request.tokens):
            raise UserError("tokens: the prompt is empty; give at least one token")
        if length + request.max_new_tokens > self.context:
            own = f" and {places} user tokens" if places else ""
            raise UserError(
                f"max_new_tokens: a prompt of {len(request.tokens)} tokens{own} and {request.max_new_tokens} new ones "
                f"exceed the context of {self.context} tokens; shorten the prompt or ask for fewer tokens"
            )
        rows = self.model.config.vocab_size
        if not all(0 <= i < rows for i in request.tokens):
            raise UserError(f"tokens: the prompt has an id that is not among the {rows} of the model; correct it")
        for name, value, width in (
            ("mix", request.mix, (self.adapters,)),
            ("user_tokens", request.user_tokens, (self.user_tokens, self.model.config.hidden_size)),
        ):
            wanted = width if width[0] else None
            if name == "user_tokens" and value is None:
                continue
            if (None if value is None else np.shape(value)) != wanted:
                raise UserError(f"{name}: has shape {None if value is None else np.shape(value)}; give {wanted}")
            if value is not None and not np.isfinite(value).all():
                raise UserError(f"{name}: holds numbers that are not finite; correct them")

        bias = request.logit_bias
        if len(bias) > BIASES:
            raise UserError(f"logit_bias: has {len(bias)} tokens; give {BIASES} at most")
        if unknown := [i for i in bias if not 0 <= i < rows]:
            raise UserError(f"logit_bias: {unknown[0]} is no token from 0 to {rows - 1}; correct it")

    def speakers(self, requests: Sequence[Request | None]) -> tuple[Any, Any, Any]:
        """Who answers requests, one row each: (mix [B, K], user tokens [B, E, D], which rows bring user tokens [B]).

        None in place of what nobody has here.
        """

        def arrays(name: str, *shape: int) -> Any:
            if not shape[0]:
                return None
            given = [None if one is None else getattr(one, name) for one in requests]
            return np.stack(
                [np.zeros(shape, np.float32) if one is None else np.asarray(one, np.float32) for one in given]
            )

        personal = np.array([one is not None and one.user_tokens is not None for one in requests])
        return (
            arrays("mix", self.adapters),
            arrays("user_tokens", self.user_tokens, self.model.config.hidden_size),
            personal if self.user_tokens else None,
        )

    def wanted(self, requests: Sequence[Request | None], sample: int = 0) -> Wanted:
        """The arrays of requests, one row each; of None, rows of no meaning."""

        def rows(name: str, dtype: type, none: float = 0) -> Any:
            return np.array([none if one is None else getattr(one, name) for one in requests], dtype)

        seeds: Any = np.array([0 if one is None else fold_seed(one.seed) for one in requests], np.uint32)
        samples: Any = np.full(len(requests), sample, np.int32)

        mix, user_tokens, personal = self.speakers(requests)
        return Wanted(
            limit=rows("max_new_tokens", np.int32),
            temperature=rows("temperature", np.float32),
            top_k=rows("top_k", np.int32),
            top_p=rows("top_p", np.float32, 1.0),
            seed=seeds,
            sample=samples,
            alternatives=rows("alternatives", np.int32) > 0,
            penalties=penalties_of(requests, self.model.config.vocab_size),
            mix=mix,
            user_tokens=user_tokens,
            personal=personal,
        )


def _unrolled(backbone: Backbone, bank: Params | None) -> tuple[Backbone, Params | None]:
    """The same policies in the layout in which the model decodes fastest, made once for all requests.

    What that layout leaves as it is, such as the embedding, stays the array of the base.
    """
    model, base = backbone.model, backbone.base
    if model.decode == "scan":
        return backbone, bank
    variables = _layout(backbone, bank)
    same = {name: tree for name, tree in base.items() if name != "layers" and name not in variables["params"]}
    unrolled = model.clone(scan_layers=False, transposed=model.decode == "transposed")
    return Backbone(unrolled, backbone.adapter, {**same, **variables["params"]}), variables.get("adapters")


@jax.jit  # of the module, so that another base of the same shapes compiles nothing
def _layout(backbone: Backbone, bank: Params | None) -> Params:
    """The arrays of the unrolled layout that are not those of the base."""
    mix = None if bank is None else jnp.zeros((1, bank_size(bank)))
    variables = backbone.policies(bank, mix).unroll().variables
    old = {id(leaf) for leaf in jax.tree.leaves(backbone.base)}
    params = {
        name: tree
        for name, tree in variables["params"].items()
        if any(id(leaf) not in old for leaf in jax.tree.leaves(tree))
    }
    return {**variables, "params": params}
