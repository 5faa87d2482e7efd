"""User models: from integer user indices to user tokens and mix rows, one function per kind.

A user is a row of a table; index 0 is the generic user and stands for everybody unknown. What a user says about
themselves in words needs no table: put the text into the prompt, where the model's own embeddings are its user model
(P-RLHF, arXiv 2402.05133). User tokens sit in slots right after BOS (`reserve`), a mix row weighs the adapters.

Shapes: B examples, U users, T user tokens, D model width, C clusters, K adapters, V vocabulary, S slots.

Parameters are {"shared": what all users use, "table": one row per user, every leaf [U + 1, ...]}; a kind that has none
of one leaves it out. They belong to one policy, so unlike those of a bank they have no axis of policies.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.cluster.vq import kmeans2

Params = Any
Output = tuple[jax.Array | None, jax.Array | None]
STARTS = ("vocabulary", "normal")
STARTS_OF_K_MEANS = 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class UserModel:
    """Which user model, and how large.

    Kinds (arXiv 2402.05133, section 4, but for the last):
      uniform: nothing; training is then plain DPO.
      individualized: e_i = e_0 + o_i with an offset of their own for every user but the generic one.
      cluster: e_i = sum_c softmax(w_i)_c V_c with one weight vector for all T tokens; the generic user has its own.
      soup: no tokens; mix_i = softmax(w_i) over the K adapters.

    Attributes:
      num_users: rows beside the generic one.
      tokens, width: T and D, of the kinds with tokens.
      clusters: C, of kind cluster.
      adapters: K, of kind soup.
      start: what e_0, V (and non-zero offsets) start from: "vocabulary", input embeddings of tokens drawn with
        replacement, or "normal", N(0, std^2).
      zero_offset: every user starts equal to the generic one. If False, offsets start like e_0 (the authors' choice)
        and weights w from N(0, 1).
    """

    kind: str
    num_users: int
    tokens: int = 10
    width: int = 0
    clusters: int = 5
    adapters: int = 0
    start: str = "vocabulary"
    std: float = 0.02
    zero_offset: bool = True

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"user model {self.kind!r} is unknown; choose one of {', '.join(KINDS)}")
        if self.start not in STARTS:
            raise ValueError(f"start={self.start!r} of the user model is unknown; choose one of {', '.join(STARTS)}")
        for name in ("num_users", *KINDS[self.kind].sizes):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} of user model {self.kind!r} must be at least 1")

    @property
    def slots(self) -> int:
        """T where the kind has user tokens, else 0: how much longer prompts become."""
        return self.tokens if "tokens" in KINDS[self.kind].sizes else 0

    def init(self, key: jax.Array, embedding: jax.Array | None = None) -> Params:
        """Float32 parameters; `embedding` [V, D], the base's input embeddings, is needed to start from the vocabulary.

        Raises:
          ValueError: no embedding where one is needed, or one of another width.
        """
        if self.slots and self.start == "vocabulary":
            if embedding is None:
                raise ValueError("user tokens start from the vocabulary but no embedding is given; pass the base's")
            if embedding.shape[1] != self.width:
                raise ValueError(f"width={self.width} of the user model is not the embedding's {embedding.shape[1]}")
        return KINDS[self.kind].init(self, key, embedding)

    def apply(self, params: Params, users: jax.Array) -> Output:
        """(user tokens float32 [B, T, D] or None, mix float32 [B, K] or None) of users int32 [B].

        An index that is no row of the table, negative ones included, is the generic user: never somebody else's row.
        """
        if not params:
            return None, None
        return KINDS[self.kind].apply(params, _known(users, params["table"]))


def _known(users: jax.Array, table: Params) -> jax.Array:
    return jnp.where((users >= 0) & (users < jax.tree.leaves(table)[0].shape[0]), users, 0)


def _draw(model: UserModel, key: jax.Array, embedding: jax.Array | None, *axes: int) -> jax.Array:
    """Token vectors [*axes, T, D]."""
    if model.start == "normal":
        return model.std * jax.random.normal(key, (*axes, model.tokens, model.width))
    ids = jax.random.randint(key, (*axes, model.tokens), 0, embedding.shape[0])
    return jnp.asarray(embedding, jnp.float32)[ids]


def _weights(model: UserModel, key: jax.Array, size: int) -> jax.Array:
    shape = (model.num_users + 1, size)
    return jnp.zeros(shape) if model.zero_offset else jax.random.normal(key, shape)


def _init_individualized(model: UserModel, key: jax.Array, embedding: jax.Array | None) -> Params:
    keys = jax.random.split(key)
    if model.zero_offset:
        offset = jnp.zeros((model.num_users + 1, model.tokens, model.width))
    else:
        offset = _draw(model, keys[1], embedding, model.num_users + 1).at[0].set(0)
    return {"shared": {"generic": _draw(model, keys[0], embedding)}, "table": {"offset": offset}}


def _apply_individualized(params: Params, users: jax.Array) -> Output:
    own = jnp.where((users > 0)[:, None, None], params["table"]["offset"][users], 0.0)
    return params["shared"]["generic"] + own, None


def _init_cluster(model: UserModel, key: jax.Array, embedding: jax.Array | None) -> Params:
    keys = jax.random.split(key)
    centers = _draw(model, keys[0], embedding, model.clusters)
    return {"shared": {"centers": centers}, "table": {"weights": _weights(model, keys[1], model.clusters)}}


def _apply_cluster(params: Params, users: jax.Array) -> Output:
    weights = jax.nn.softmax(params["table"]["weights"][users])
    return jnp.einsum("bc,ctd->btd", weights, params["shared"]["centers"]), None


def _init_soup(model: UserModel, key: jax.Array, embedding: jax.Array | None) -> Params:
    return {"table": {"weights": _weights(model, key, model.adapters)}}


def _apply_soup(params: Params, users: jax.Array) -> Output:
    return None, jax.nn.softmax(params["table"]["weights"][users])


class _Kind(NamedTuple):
    init: Callable[[UserModel, jax.Array, jax.Array | None], Params]
    apply: Callable[[Params, jax.Array], Output]
    sizes: tuple[str, ...]  # the settings that must be positive


KINDS = {
    "uniform": _Kind(lambda model, key, embedding: {}, lambda params, users: (None, None), ()),
    "individualized": _Kind(_init_individualized, _apply_individualized, ("tokens", "width")),
    "cluster": _Kind(_init_cluster, _apply_cluster, ("tokens", "width", "clusters")),
    "soup": _Kind(_init_soup, _apply_soup, ("adapters",)),
}


def clusters_of(
    model: UserModel,
    params: Params,
    count: int,
    key: jax.Array,
    sharpness: float = 4.0,
    people: Sequence[int] | None = None,
) -> Params:
    """Parameters of a cluster model of `count` centres from those of a trained individualized one, by k-means.

    Clusters trained from scratch tend to collapse: while the policy still ignores user tokens, nothing tells the
    centres apart, the majority claims all of them, and the weights of the others then have nothing to choose. Vectors
    of one's own separate at once, each pulled by its own user alone; their means are centres that the policy already
    tells apart.

    Args:
      sharpness: logit of a user's own centre; those of the others are 0. The generic user starts from the shares of
        the centres.
      people: rows of the people, the others being free; by default all but the generic user's. Weights of free rows
        are zero.
    """
    rows = params["table"]["offset"].shape[0]
    people = np.arange(1, rows) if people is None else np.asarray(people, np.int32)
    U = len(people)
    vectors, _ = model.apply(params, jnp.asarray(people))
    flat = np.asarray(vectors, np.float64).reshape(U, -1)
    rng = np.random.default_rng(int(jax.random.randint(key, (), 0, 2**31 - 1)))

    def attempt():
        # More centres than people cannot be told apart; k-means++ picks distant starts.
        centres, index = kmeans2(flat, min(count, U), minit="++", rng=rng)
        return np.square(flat - centres[index]).sum(), centres, index

    # One start in three ends with a few odd people as a cluster of their own, which costs more than two personas apart.
    _, centres, index = min((attempt() for _ in range(STARTS_OF_K_MEANS)), key=lambda found: found[0])
    centres = np.concatenate([centres, np.repeat(flat.mean(0)[None], count - len(centres), 0)])
    shares = np.bincount(index, minlength=count) / U
    weights = np.zeros((rows, count))
    weights[0], weights[people] = np.log(shares + 1e-3), sharpness * np.eye(count)[index]
    shared = {"centers": jnp.asarray(centres.reshape(count, *vectors.shape[1:]), jnp.float32)}
    return {"shared": shared, "table": {"weights": jnp.asarray(weights, jnp.float32)}}


def gather_rows(params: Params, users: jax.Array) -> tuple[Params, jax.Array, jax.Array]:
    """The parameters cut down to the users of a batch, so that the cost of a step does not grow with U.

        small, local, indices = gather_rows(params, users)
        gradient = jax.grad(loss)(small, local)         # loss calls model.apply(small, local)
        table, state = optimizer.update(indices, gradient["table"], state, params["table"])    # lazy_adam

    Args:
      params: of any kind with a table.
      users: int32 [B].

    Returns:
      small: `params` with table leaves [B + 1, ...]: the generic row, then each user of the batch once, then zeros.
      local: int32 [B], the place of each example's user in them; `apply(small, local)` equals `apply(params, users)`.
      indices: int32 [B + 1], the row each came from, U + 1 (no row) where the batch has no such user: those must not
        be written back.
    """
    users = _known(users, params["table"])
    nobody = jax.tree.leaves(params["table"])[0].shape[0]
    named = jnp.where(users > 0, users, nobody)
    found, place = jnp.unique(named, size=users.shape[0], fill_value=nobody, return_inverse=True)
    local = jnp.where(users > 0, place.reshape(users.shape) + 1, 0).astype(jnp.int32)
    generic = jnp.where((users == 0).any(), 0, nobody)
    indices = jnp.concatenate([generic[None], found]).astype(jnp.int32)
    table = jax.tree.map(lambda x: x.at[indices].get(mode="fill", fill_value=0), params["table"])
    return {**params, "table": table}, local, indices


def reserve(
    tokens: jax.Array, valid: jax.Array, slots: int, user_offset: int = 1, placeholder: int = 0
) -> tuple[jax.Array, jax.Array]:
    """Makes room for user tokens: [B, S] to [B, S + slots] with `slots` placeholders in every row.

    Args:
      tokens, valid: int32 and bool [B, S]; the valid tokens of a row are consecutive, padding on either side is kept.
      slots: T.
      user_offset: 1 puts them after the first token, which is BOS; 0 puts them first, for tokenizers without BOS. It
        must be the `user_offset` of the decoder.
      placeholder: id that fills the slots; the decoder never looks it up.
    """
    S = tokens.shape[1]
    columns = jnp.arange(S + slots)
    place = columns - jnp.argmax(valid, axis=1)[:, None]
    slot = (place >= user_offset) & (place < user_offset + slots)
    source = jnp.clip(jnp.where(place < user_offset, columns, columns - slots), 0, S - 1)
    tokens = jnp.where(slot, placeholder, jnp.take_along_axis(tokens, source, axis=1))
    return tokens, slot | jnp.take_along_axis(valid, source, axis=1)
