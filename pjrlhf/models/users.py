"""User models: map user indices to user tokens or to rows of `mix`, one `UserKind` per kind.

A user is a row of a table. Index 0 is the generic user, who stands for every unknown user. A textual user description
needs no table: it goes into the prompt (P-RLHF, arXiv 2402.05133). User tokens take positions right after BOS (see
`reserve`); a row of `mix` weighs the adapters.

Parameters are {"shared": leaves that all users share, "table": leaves [U + 1, ...], one row per user}; a kind without
one of them omits it. They belong to one policy and, unlike a bank, have no axis K.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.cluster.vq import kmeans2

from pjrlhf.registry import Registry
from pjrlhf.types import Array, Params, PRNGKey

Output: TypeAlias = tuple[Float[Array, "B E D"] | None, Float[Array, "B K"] | None]  # (user tokens, mix)
STARTS = ("vocabulary", "normal")
SIZES = ("tokens", "width", "clusters", "adapters")
KMEANS_RESTARTS = 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class UserModel:
    """Kind and size of a user model.

    Kinds (arXiv 2402.05133, section 4, except soup), or "package.module:kind" of your own, see `UserKind`:
      uniform: no parameters; training is then plain DPO.
      individualized: tokens e_i = e_0 + o_i, with an offset o_i for every user but the generic one.
      cluster: tokens e_i = sum_c softmax(w_i)_c V_c, with one weight vector w_i for all E tokens, also for the generic
        user.
      soup: no tokens; mix_i = softmax(w_i) over the K adapters.
      adapters: no tokens; everybody has one of K = U + 1 adapters, trained on their comparisons alone, and the generic
        user adapter 0. Fine-tuning per user, the baseline.

    Attributes:
      num_users: U, without the generic user.
      tokens, width: E and D, for kinds with tokens.
      clusters: J, for kind cluster.
      adapters: K, for kinds soup and adapters.
      start: initial values of e_0, V and non-zero offsets: "vocabulary" (input embeddings of random tokens, drawn with
        replacement) or "normal" (N(0, std^2)).
      std: see `start`.
      zero_offset: every user starts equal to the generic user. If False, offsets start like e_0 (the authors' choice)
        and weights w from N(0, 1).

    Raises:
      UserError: an unknown kind.
      ValueError: an unknown start, or a size below 1.
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
        if self.start not in STARTS:
            raise ValueError(f"start={self.start!r} of the user model is unknown; choose one of {', '.join(STARTS)}")
        for name in ("num_users", *self._kind.sizes):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} of user model {self.kind!r} must be at least 1")

    @property
    def _kind(self) -> "UserKind":
        return KINDS.get(self.kind)

    @property
    def personal(self) -> bool:
        """Whether every user has a row of their own in a table."""
        return self._kind.personal

    @property
    def mixes(self) -> bool:
        """Whether it mixes adapters that are given, instead of adding user tokens."""
        return self._kind.mixes

    @property
    def policies(self) -> int:
        """How many adapters are trained: one for everybody, or one for each row of the table."""
        return self.adapters if self._kind.trains_adapters else 1

    @property
    def num_tokens(self) -> int:
        """Number of user tokens, by which prompts become longer: E, or 0 for kinds without."""
        return self.tokens if "tokens" in self._kind.sizes else 0

    def init(self, key: PRNGKey, embedding: Float[Array, "V D"] | None = None) -> Params:
        """Initial parameters, float32.

        Args:
          embedding: the base's input embeddings, required by `start` "vocabulary".

        Raises:
          ValueError: `embedding` is required but missing, or has another width.
        """
        if self.num_tokens and self.start == "vocabulary":
            if embedding is None:
                raise ValueError("user tokens start from the vocabulary but no embedding is given; pass the base's")
            if embedding.shape[1] != self.width:
                raise ValueError(f"width={self.width} of the user model is not the embedding's {embedding.shape[1]}")
        return self._kind.init(self, key, embedding)

    def apply(self, params: Params, users: Int[Array, " B"]) -> Output:
        """(user tokens [B, E, D] or None, mix [B, K] or None) of `users`, float32.

        An index outside the table, such as a negative one, stands for the generic user.
        """
        if not params:
            return None, None
        return self._kind.apply(params, _known(users, params["table"]) if self.personal else users)


def _known(users: Int[Array, " B"], table: Params) -> Int[Array, " B"]:
    """`users`, with 0 in place of indices outside the table."""
    return jnp.where((users >= 0) & (users < jax.tree.leaves(table)[0].shape[0]), users, 0)


def _draw(
    model: UserModel, key: PRNGKey, embedding: Float[Array, "V D"] | None, *axes: int
) -> Float[Array, "*axes E D"]:
    """Initial token vectors."""
    if model.start == "normal" or embedding is None:
        return model.std * jax.random.normal(key, (*axes, model.tokens, model.width))
    ids = jax.random.randint(key, (*axes, model.tokens), 0, embedding.shape[0])
    return jnp.asarray(embedding, jnp.float32)[ids]


def _weights(model: UserModel, key: PRNGKey, size: int) -> Float[Array, "_ {size}"]:
    shape = (model.num_users + 1, size)
    return jnp.zeros(shape) if model.zero_offset else jax.random.normal(key, shape)


def _init_individualized(model: UserModel, key: PRNGKey, embedding: Float[Array, "V D"] | None) -> Params:
    keys = jax.random.split(key)
    if model.zero_offset:
        offset = jnp.zeros((model.num_users + 1, model.tokens, model.width))
    else:
        offset = _draw(model, keys[1], embedding, model.num_users + 1).at[0].set(0)
    return {"shared": {"generic": _draw(model, keys[0], embedding)}, "table": {"offset": offset}}


def _apply_individualized(params: Params, users: Int[Array, " B"]) -> Output:
    own = jnp.where((users > 0)[:, None, None], params["table"]["offset"][users], 0.0)
    return params["shared"]["generic"] + own, None


def _init_cluster(model: UserModel, key: PRNGKey, embedding: Float[Array, "V D"] | None) -> Params:
    keys = jax.random.split(key)
    centers = _draw(model, keys[0], embedding, model.clusters)
    return {"shared": {"centers": centers}, "table": {"weights": _weights(model, keys[1], model.clusters)}}


def _apply_cluster(params: Params, users: Int[Array, " B"]) -> Output:
    weights = jax.nn.softmax(params["table"]["weights"][users])
    return jnp.einsum("bj,jed->bed", weights, params["shared"]["centers"]), None


def _init_soup(model: UserModel, key: PRNGKey, embedding: Float[Array, "V D"] | None) -> Params:
    return {"table": {"weights": _weights(model, key, model.adapters)}}


def _apply_soup(params: Params, users: Int[Array, " B"]) -> Output:
    return None, jax.nn.softmax(params["table"]["weights"][users])


def _init_adapters(model: UserModel, key: PRNGKey, embedding: Float[Array, "V D"] | None) -> Params:
    return {"table": {"adapter": jnp.eye(model.num_users + 1, model.adapters)}}


def _apply_adapters(params: Params, users: Int[Array, " B"]) -> Output:
    return None, jax.lax.stop_gradient(params["table"]["adapter"][users])


@dataclasses.dataclass(frozen=True)
class UserKind:
    """A kind of user model.

    Attributes:
      init: (model, key, embedding [V, D] or None) -> parameters {"shared", "table"}; see the module. Table leaves named
        "offset" [U + 1, E, D] or "weights" [U + 1, any] are split over devices, others are replicated.
      apply: (parameters, users [B]) -> (user tokens [B, E, D] or None, mix [B, K] or None), float32.
      sizes: those of `SIZES` that must be positive. A kind with "tokens" adds user tokens; one with "adapters" mixes
        adapters that are trained already, or `trains_adapters`.
      personal: whether its parameters have a "table", a row for each user.
      trains_adapters: whether it trains an adapter for each row of its table.
    """

    init: Callable[[UserModel, PRNGKey, Array | None], Params]
    apply: Callable[[Params, Array], Output]
    sizes: tuple[str, ...] = ()
    personal: bool = True
    trains_adapters: bool = False

    @property
    def mixes(self) -> bool:
        return "adapters" in self.sizes and not self.trains_adapters


def _kind(thing: object) -> UserKind:
    if not isinstance(thing, UserKind):
        raise ValueError("is not a UserKind; see pjrlhf.models.users")
    if unknown := set(thing.sizes) - set(SIZES):
        raise ValueError(f"has no size {min(unknown)!r}; the sizes are {', '.join(SIZES)}")
    return thing


KINDS: Registry[UserKind] = Registry("user model", _kind)
KINDS.register("uniform")(
    UserKind(lambda model, key, embedding: {}, lambda params, users: (None, None), personal=False)
)
KINDS.register("individualized")(UserKind(_init_individualized, _apply_individualized, ("tokens", "width")))
KINDS.register("cluster")(UserKind(_init_cluster, _apply_cluster, ("tokens", "width", "clusters")))
KINDS.register("soup")(UserKind(_init_soup, _apply_soup, ("adapters",)))
KINDS.register("adapters")(UserKind(_init_adapters, _apply_adapters, ("adapters",), trains_adapters=True))


def fit_clusters(
    model: UserModel,
    params: Params,
    count: int,
    key: PRNGKey,
    sharpness: float = 4.0,
    user_rows: Sequence[int] | None = None,
) -> Params:
    """Initialises a cluster model of `count` centres from a trained individualized one, by k-means.

    Clusters trained from scratch tend to collapse. While the policy still ignores user tokens, all centres get the same
    gradient; the majority claims all of them, and minority users have no centre to choose. Individual vectors separate
    at once, because each has the gradient of one user, so their means are centres that the policy already tells apart.

    Args:
      model, params: the individualized model.
      count: J of the cluster model.
      key: seeds k-means.
      sharpness: initial logit of a user's own centre; those of other centres are 0. The generic user's logits are the
        log fractions of users per centre.
      user_rows: rows of the table that belong to users, default all but row 0. Weights of free rows are zero.

    Returns:
      Parameters of a `UserModel` of kind cluster.

    Raises:
      ValueError: `model` has no user tokens.
    """
    rows = params["table"]["offset"].shape[0]
    trained = np.arange(1, rows) if user_rows is None else np.asarray(user_rows, np.int32)
    U = len(trained)
    vectors, _ = model.apply(params, jnp.asarray(trained))
    if vectors is None:
        raise ValueError(f"user model {model.kind!r} has no user tokens to cluster; give an individualized one")
    flat = np.asarray(vectors, np.float64).reshape(U, -1)
    rng = np.random.default_rng(int(jax.random.randint(key, (), 0, 2**31 - 1)))

    def attempt():
        # k-means needs at least as many points as centres. k-means++ picks distant initial centres.
        centres, index = kmeans2(flat, min(count, U), minit="++", rng=rng)
        return np.square(flat - centres[index]).sum(), centres, index

    # A third of the restarts isolate a few outliers as a cluster; the best inertia of all restarts avoids that.
    _, centres, index = min((attempt() for _ in range(KMEANS_RESTARTS)), key=lambda result: result[0])
    centres = np.concatenate([centres, np.repeat(flat.mean(0)[None], count - len(centres), 0)])
    fractions = np.bincount(index, minlength=count) / U
    weights = np.zeros((rows, count))
    weights[0], weights[trained] = np.log(fractions + 1e-3), sharpness * np.eye(count)[index]
    shared = {"centers": jnp.asarray(centres.reshape(count, *vectors.shape[1:]), jnp.float32)}
    return {"shared": shared, "table": {"weights": jnp.asarray(weights, jnp.float32)}}


def gather_rows(params: Params, users: Int[Array, " B"]) -> tuple[Params, Int[Array, " B"], Int[Array, " B+1"]]:
    """Gathers the parameters of the users in a batch, so that the cost of a step does not grow with U.

        small, local, indices = gather_rows(params, users)
        gradient = jax.grad(loss)(small, local)         # loss calls model.apply(small, local)
        table, state = optimizer.update(indices, gradient["table"], state, params["table"])    # lazy_adam

    Args:
      params: of any kind with a table.
      users: rows of the table.

    Returns:
      small: `params` with table leaves [B + 1, ...]: the generic row, then each user of the batch once, then zeros.
      local: rows of `users` in `small`; `apply(small, local)` equals `apply(params, users)`.
      indices: the row of `params` behind each row of `small`; U + 1, which is no row, for padding and
        for a generic user who is not in the batch. `lazy_adam` skips these.
    """
    users = _known(users, params["table"])
    no_row = jax.tree.leaves(params["table"])[0].shape[0]
    named = jnp.where(users > 0, users, no_row)
    unique, inverse = jnp.unique(named, size=users.shape[0], fill_value=no_row, return_inverse=True)
    local = jnp.where(users > 0, inverse.reshape(users.shape) + 1, 0).astype(jnp.int32)
    generic = jnp.where((users == 0).any(), 0, no_row)
    indices = jnp.concatenate([generic[None], unique]).astype(jnp.int32)
    table = jax.tree.map(lambda x: x.at[indices].get(mode="fill", fill_value=0), params["table"])
    return {**params, "table": table}, local, indices


def reserve(
    tokens: Int[Array, "B T"],
    valid: Bool[Array, "B T"],
    count: int,
    user_offset: int = 1,
    placeholder: int | Int[Array, ""] = 0,
) -> tuple[Int[Array, "B T+{count}"], Bool[Array, "B T+{count}"]]:
    """Inserts positions for `count` user tokens into every row.

    Args:
      tokens, valid: the valid tokens of a row must be consecutive; padding on either side stays.
      user_offset: 1 inserts after the first token, which is BOS; 0 inserts before it, for tokenizers without BOS. Must
        equal the `user_offset` of the decoder.
      placeholder: token id at the new positions; the decoder ignores it.
    """
    T = tokens.shape[1]
    columns = jnp.arange(T + count)
    position = columns - jnp.argmax(valid, axis=1)[:, None]
    is_user = (position >= user_offset) & (position < user_offset + count)
    source = jnp.clip(jnp.where(position < user_offset, columns, columns - count), 0, T - 1)
    tokens = jnp.where(is_user, placeholder, jnp.take_along_axis(tokens, source, axis=1))
    return tokens, is_user | jnp.take_along_axis(valid, source, axis=1)
