"""User models, gathering the rows of a batch, and the registry of names."""

import functools
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pjrlhf.errors import UserError
from pjrlhf.models.registry import UserRegistry
from pjrlhf.models.users import KINDS, UserModel, fit_clusters, gather_rows

U, T, D, C, K, V = 6, 3, 4, 5, 2, 64
EMBEDDING = np.random.default_rng(0).standard_normal((V, D)).astype(np.float32)
USERS = np.array([4, 0, 2, 4, 1], np.int32)
TABLES = ["individualized", "cluster", "soup"]


def model_of(kind, **settings):
    return UserModel(kind=kind, num_users=U, tokens=T, width=D, clusters=C, adapters=K, **settings)


def noisy(kind):
    """Parameters plus noise, as if trained."""
    params = model_of(kind).init(jax.random.key(0), EMBEDDING)
    leaves, treedef = jax.tree.flatten(params)
    rng = np.random.default_rng(1)
    params = treedef.unflatten([x + rng.standard_normal(x.shape).astype(np.float32) for x in leaves])
    if kind == "individualized":  # the generic user's row has no gradient
        params["table"]["offset"] = params["table"]["offset"].at[0].set(0)
    return params


@functools.partial(jax.jit, static_argnums=0)
def output(kind, params, users):
    """User tokens or mix, whichever the kind has, [B, ...]."""
    (found,) = [x for x in model_of(kind).apply(params, jnp.asarray(users)) if x is not None]
    return found


def test_uniform_has_neither_parameters_nor_output():
    model = UserModel(kind="uniform", num_users=U)
    params = model.init(jax.random.key(0))
    assert jax.tree.leaves(params) == [] and model.num_tokens == 0
    assert model.apply(params, jnp.array([0, 3])) == (None, None)


def test_individualized_is_the_generic_user_plus_an_offset():
    params = noisy("individualized")
    generic, offset = params["shared"]["generic"], params["table"]["offset"]
    assert offset.shape == (U + 1, T, D)
    params["table"]["offset"] = offset = offset.at[0].set(9)
    got = output("individualized", params, USERS)
    for row, user in zip(got, USERS, strict=True):
        np.testing.assert_array_equal(row, generic + (offset[user] if user else 0))


def test_cluster_users_are_points_of_a_simplex_shared_by_all_their_tokens():
    params = noisy("cluster")
    centers, w = (np.asarray(x, np.float64) for x in (params["shared"]["centers"], params["table"]["weights"]))
    assert centers.shape == (C, T, D) and w.shape == (U + 1, C)
    got = output("cluster", params, USERS)
    for row, user in zip(got, USERS, strict=True):
        weights = np.exp(w[user]) / np.exp(w[user]).sum()
        np.testing.assert_allclose(row, sum(p * center for p, center in zip(weights, centers, strict=True)), rtol=1e-5)
    # Equal centers: any point of the simplex gives them back, and nothing else does.
    same = {**params, "shared": {"centers": jnp.broadcast_to(centers[:1], centers.shape).astype(jnp.float32)}}
    np.testing.assert_allclose(output("cluster", same, USERS), np.tile(centers[:1], (5, 1, 1)), rtol=1e-5)
    assert not np.allclose(got[1], got[0])  # the generic user has weights of its own


def test_soup_weights_are_points_of_the_simplex():
    params = noisy("soup")
    mix = output("soup", params, USERS)
    assert mix.shape == (5, K) and (mix > 0).all()
    np.testing.assert_allclose(mix.sum(1), 1, rtol=1e-6)
    np.testing.assert_allclose(mix, jax.nn.softmax(params["table"]["weights"])[USERS], rtol=1e-6)


def test_everybody_has_an_adapter_of_their_own():
    model = UserModel(kind="adapters", num_users=U, adapters=U + 1)
    params = model.init(jax.random.key(0))
    assert model.policies == U + 1 and model.personal and not model.mixes and model.num_tokens == 0
    tokens, mix = model.apply(params, jnp.asarray([*USERS, U + 1, -1]))
    assert tokens is None
    np.testing.assert_array_equal(mix, np.eye(U + 1)[[*USERS, 0, 0]])
    small, local, _ = gather_rows(params, jnp.asarray(USERS))
    np.testing.assert_array_equal(model.apply(small, local)[1], np.eye(U + 1)[USERS])
    gradient = jax.grad(lambda p: (model.apply(p, jnp.asarray(USERS))[1] ** 2).sum())(params)
    assert not np.any(gradient["table"]["adapter"])  # whose adapter it is is not learned


@pytest.mark.parametrize("kind", TABLES)
def test_an_index_outside_the_table_is_the_generic_user(kind):
    params, strangers = noisy(kind), jnp.array([U + 1, U + 2, -1, -U, 10**9, -(10**9)])
    generic = output(kind, params, [0])
    small, local, _ = gather_rows(params, strangers)
    for row in (*output(kind, params, strangers), *output(kind, small, local)):
        np.testing.assert_allclose(row, generic[0], rtol=1e-6, atol=1e-7)
    assert not np.allclose(output(kind, params, [U]), generic)


@pytest.mark.parametrize("kind", TABLES)
def test_with_zero_offsets_everybody_starts_as_the_generic_user(kind):
    everybody = np.arange(U + 1)
    same = output(kind, model_of(kind).init(jax.random.key(0), EMBEDDING), everybody)
    np.testing.assert_array_equal(same, np.broadcast_to(same[:1], same.shape))
    params = model_of(kind, zero_offset=False).init(jax.random.key(0), EMBEDDING)
    other = np.asarray(output(kind, params, everybody)).reshape(U + 1, -1)
    assert len(np.unique(other, axis=0)) == U + 1


def test_vocabulary_start_draws_with_replacement_for_any_number_of_users():
    model = UserModel(kind="individualized", num_users=10_000, tokens=T, width=D, zero_offset=False)
    params = model.init(jax.random.key(0), EMBEDDING)
    words = {row.tobytes() for row in EMBEDDING}
    vectors = np.concatenate([params["shared"]["generic"], *np.asarray(params["table"]["offset"])[1:]])
    assert vectors.shape == (10_001 * T, D)
    assert {row.tobytes() for row in vectors} == words
    np.testing.assert_array_equal(params["table"]["offset"][0], np.zeros((T, D)))


def test_normal_start_needs_no_embedding():
    model = UserModel(kind="cluster", num_users=1, tokens=10, width=100, clusters=10, start="normal", std=0.5)
    centers = model.init(jax.random.key(0))["shared"]["centers"]
    assert abs(centers.std() - 0.5) < 0.02 and abs(centers.mean()) < 0.02


@pytest.mark.parametrize("kind", TABLES)
def test_absent_users_get_no_gradient(kind):
    params = noisy(kind)
    gradient = jax.grad(lambda p: (output(kind, p, USERS) ** 2).sum())(params)
    (table,) = jax.tree.leaves(gradient["table"])
    size = np.abs(table).reshape(U + 1, -1).sum(1)
    present = np.isin(np.arange(U + 1), USERS)
    assert (size[~present] == 0).all()
    assert (size[present][1:] > 0).all()
    # Offsets of the generic user do not exist; weights of it do.
    assert (size[0] > 0) == (kind != "individualized")


@pytest.mark.parametrize("kind", TABLES)
@pytest.mark.parametrize(
    "users",
    [
        USERS,
        pytest.param(np.array([3, 5, 3]), marks=pytest.mark.slow),
        pytest.param(np.array([0, 0]), marks=pytest.mark.slow),
        np.array([1, U + 1, -2]),
    ],
)
def test_gathered_rows_are_the_model_itself(kind, users):
    params, users = noisy(kind), jnp.asarray(users)
    small, local, indices = jax.jit(gather_rows)(params, users)
    assert jax.tree.leaves(small["table"])[0].shape[0] == len(indices) == len(users) + 1
    np.testing.assert_array_equal(output(kind, small, local), output(kind, params, users))

    def loss(params, users):
        return (jnp.arange(1.0, len(users) + 1) @ output(kind, params, users).reshape(len(users), -1) ** 2).sum()

    gradient = jax.jit(jax.grad(loss))
    want, got = gradient(params, users), gradient(small, local)
    for name, table in want["table"].items():
        dense = np.zeros((table.shape[0] + 1, *table.shape[1:]), np.float32)
        np.add.at(dense, np.minimum(indices, table.shape[0]), got["table"][name])  # what is outside is dropped
        dense = dense[:-1]
        np.testing.assert_allclose(dense, table, rtol=1e-5, atol=1e-6)
    if "shared" in want:
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), got["shared"], want["shared"])
    # A row is listed once, and only if the batch has it.
    real = np.where((users >= 0) & (users <= U), users, 0)
    assert sorted(i for i in indices.tolist() if i <= U) == sorted(set(real.tolist()))


def test_free_rows_are_no_people_to_cluster():
    model, key = model_of("individualized"), jax.random.key(0)
    params = noisy("individualized")
    offset = params["table"]["offset"]
    # Users on rows 1, 3 and 4 of a table with distant free rows, and the same users without free rows.
    people = [1, 3, 4]
    wide = jnp.full((U + 3, T, D), 100.0).at[0].set(offset[0]).at[jnp.array(people)].set(offset[1:4])
    got = fit_clusters(model, {**params, "table": {"offset": wide}}, C, key, user_rows=people)
    want = fit_clusters(model, {**params, "table": {"offset": offset[:4]}}, C, key)
    np.testing.assert_array_equal(got["shared"]["centers"], want["shared"]["centers"])
    weights, expected = (np.asarray(x["table"]["weights"]) for x in (got, want))
    assert weights.shape == (U + 3, C)
    np.testing.assert_array_equal(weights[[0, *people]], expected)
    assert not np.delete(weights, [0, *people], 0).any()


def test_mistakes_are_named():
    with pytest.raises(UserError, match="user model 'personal': unknown; choose one of uniform, individualized"):
        model_of("personal")
    with pytest.raises(ValueError, match="start='zeros'"):
        model_of("cluster", start="zeros")
    with pytest.raises(ValueError, match="adapters=0 of user model 'soup' must be at least 1"):
        UserModel(kind="soup", num_users=3)
    with pytest.raises(ValueError, match="no embedding is given"):
        model_of("individualized").init(jax.random.key(0))
    with pytest.raises(ValueError, match="width=4 of the user model is not the embedding's 3"):
        model_of("individualized").init(jax.random.key(0), EMBEDDING[:, :3])
    assert set(KINDS) == {"uniform", "adapters", *TABLES}


def others_keep_every_bit(old, new, rows):
    def check(x, y):
        keep = ~np.isin(np.arange(len(x)), rows)
        np.testing.assert_array_equal(np.asarray(x)[keep].view(np.uint8), np.asarray(y)[: len(x)][keep].view(np.uint8))

    jax.tree.map(check, old, new)


@pytest.mark.parametrize("kind", TABLES)
def test_a_user_comes_leaves_and_is_replaced(kind):
    params = noisy(kind)
    table = params["table"]
    registry = UserRegistry.create(["ann", "bob", "eve"], capacity=U)
    assert registry.indices(["eve", None, "zoe", "ann"]).tolist() == [3, 0, 0, 1]

    registry, added = registry.add_users(table, ["zoe", "yan"])
    assert registry.rows["zoe"] == 4 and registry.rows["yan"] == 5
    others_keep_every_bit(table, added, [4, 5])
    np.testing.assert_array_equal(output(kind, {**params, "table": added}, [4]), output(kind, params, [0]))

    moments = {"mu": jax.tree.map(jnp.ones_like, added), "count": jnp.ones(U + 1, jnp.int32)}
    registry, left = registry.remove_users({"table": added, "moments": moments}, ["bob"])
    others_keep_every_bit({"table": added, "moments": moments}, left, [2])
    assert all((np.asarray(x)[2] == 0).all() for x in jax.tree.leaves(left))
    assert registry.indices(["bob"]) == [0]

    registry, again = registry.add_users(left["table"], ["kim"])
    assert registry.rows["kim"] == 2
    others_keep_every_bit(left["table"], again, [2])


@pytest.mark.parametrize("kind", TABLES)
def test_users_travel_as_json_without_losing_a_bit(kind):
    source, target = noisy(kind)["table"], model_of(kind).init(jax.random.key(0), EMBEDDING)["table"]
    here = UserRegistry.create([f"user {i}" for i in range(U)])
    there = UserRegistry.create(["user 4", "somebody"], capacity=U)
    exported = json.loads(json.dumps(here.export_users(source, ["user 2", "user 4"])))
    there = UserRegistry.from_json(json.loads(json.dumps(there.to_json())))
    there, table = there.import_users(target, exported)
    assert there.indices(["user 4", "somebody", "user 2"]).tolist() == [1, 2, 3]
    others_keep_every_bit(target, table, [1, 3])
    for user in ("user 2", "user 4"):
        for x, y in zip(jax.tree.leaves(source), jax.tree.leaves(table), strict=True):
            np.testing.assert_array_equal(y[there.rows[user]], x[here.rows[user]])


def test_a_full_table_grows():
    table = noisy("cluster")["table"]
    registry = UserRegistry.create([f"user {i}" for i in range(U)])
    with pytest.raises(UserError, match="user 'new': all 6 rows of the user table are taken"):
        registry.add_users(table, ["new"])
    registry, grown = registry.grow(table, 2)
    others_keep_every_bit(table, grown, [])
    assert registry.capacity == U + 2 and grown["weights"].shape == (U + 3, C)
    registry, grown = registry.add_users(grown, ["new"])
    np.testing.assert_array_equal(grown["weights"][registry.rows["new"]], table["weights"][0])


def test_registry_mistakes_are_named():
    table = noisy("cluster")["table"]
    registry = UserRegistry.create(["ann"], capacity=U)
    with pytest.raises(UserError, match="user 'ann': the name is taken"):
        registry.add_users(table, ["ann"])
    with pytest.raises(UserError, match="user 'bob': the name is taken"):
        UserRegistry.create(["bob", "bob"])
    with pytest.raises(UserError, match="user '': a name is a string"):
        registry.add_users(table, [""])
    with pytest.raises(UserError, match="user 'bob': unknown name"):
        registry.remove_users(table, ["bob"])
    with pytest.raises(UserError, match=r"user 'bob': does not fit the user table .*shape"):
        registry.import_users(table, {"bob": {"weights": [0.0] * (C + 1)}})
    with pytest.raises(UserError, match="user 'bob': does not fit the user table"):
        registry.import_users(table, {"bob": {"offset": [[0.0]]}})
    with pytest.raises(ValueError, match="a user table of 7 rows beside a registry of 3"):
        UserRegistry.create(["ann", "bob"]).remove_users(table, ["ann"])


def test_odd_people_do_not_take_a_centre_from_a_taste():
    """Two personas among much noise of everybody's own: one start of k-means often ends with a few odd people as a
    cluster, and the personas would share a centre.
    """
    people, width = 40, 300
    persona = np.arange(people) % 10 < 3
    model = UserModel(kind="individualized", num_users=people, tokens=1, width=width)
    for seed in range(6):
        rng = np.random.default_rng(seed)
        apart = np.where(persona, 1, -1)[:, None] * rng.normal(size=width)
        vectors = 0.2 * rng.normal(size=(people, width)) + 0.08 * apart
        offset = np.concatenate([np.zeros((1, width)), vectors]).reshape(people + 1, 1, width)
        params = {"shared": {"generic": jnp.zeros((1, width))}, "table": {"offset": jnp.asarray(offset, jnp.float32)}}
        found = fit_clusters(model, params, 2, jax.random.key(seed))
        index = np.asarray(found["table"]["weights"])[1:].argmax(1)
        assert ((index == index[0]) == (persona == persona[0])).all(), seed


def test_a_registry_of_many_users_takes_time_in_proportion():
    """Quadratic time would be minutes."""
    users = [f"user {i}" for i in range(100_000)]
    started = time.perf_counter()
    registry = UserRegistry.create(users, capacity=100_001)
    table = {"offset": jnp.zeros((100_002, 1))}
    smaller, table = registry.remove_users(table, users[::2])
    exported = smaller.export_users(table, users[1:2001:2])
    again, _ = smaller.import_users(table, exported | {"new": {"offset": [1.0]}})
    assert time.perf_counter() - started < 20
    assert (registry.rows["user 99999"], len(smaller.rows), again.rows["new"]) == (100_000, 50_000, 1)
    with pytest.raises(UserError, match="user 'user 7': the name is taken"):
        UserRegistry.create([*users, "user 7"])
