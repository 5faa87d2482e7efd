"""User tables on a mesh: every device keeps its part of the rows, and training gives the numbers of one device."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from support import tiny, tiny_users

from pjrlhf.algorithms import pdpo_entries, pdpo_objective
from pjrlhf.data import synthetic
from pjrlhf.models.users import UserModel, gather_rows
from pjrlhf.parallel.mesh import leaf_sharding, make_mesh, round_up_rows, shard_params
from pjrlhf.pipeline import stages
from pjrlhf.training.lazy_adam import lazy_adam
from pjrlhf.training.workdir import Workdir

U = 10
KINDS = ("individualized", "cluster")
# Mesh, and the number of devices that rows are split over.
MESHES = {
    "8x1x1": ({"data": 8}, 8),
    "4x2x1": ({"data": 4, "fsdp": 2}, 8),
    "2x4x1": ({"data": 2, "fsdp": 4}, 8),
    "1x8x1": ({"fsdp": 8}, 8),
    "2x2x2": ({"data": 2, "fsdp": 2, "tensor": 2}, 4),
}
# The people of each step. Person 10 is never in a batch, and some are in the first batch only.
STEPS = ((1, 2, 3, 4, 5, 6, 7, 8), (1, 1, 2, 2, 3, 3, 9, 9), (9, 9, 9, 2, 2, 2, 2, 1))
RESTING = (4, 5, 6, 7, 8, 10)
CUBE = MESHES["2x2x2"][0]


# ---- the rules


def test_rows_of_tables_moments_and_counts_are_split_over_data_and_fsdp():
    mesh = make_mesh(CUBE)
    rows = ("data", "fsdp")
    for kind, name in (("individualized", "offset"), ("cluster", "weights"), ("soup", "weights")):
        model = UserModel(kind=kind, num_users=11, tokens=2, width=4, clusters=3, adapters=3, start="normal")
        users = model.init(jax.random.key(0))
        state = {"users": users, "opt_state": {"table": lazy_adam(0.1).init(users["table"])}}
        placed = shard_params(mesh, state)
        split = [placed["users"]["table"][name], *jax.tree.leaves(placed["opt_state"]["table"]["rows"])]
        assert {x.sharding for x in split} == {
            NamedSharding(mesh, PartitionSpec(rows, *[None] * (x.ndim - 1))) for x in split
        }
        shared = [placed["opt_state"]["table"]["step"], *jax.tree.leaves(placed["users"].get("shared", {}))]
        assert all(x.sharding.is_fully_replicated for x in shared)


def test_rows_that_do_not_divide_are_replicated_and_rounded_rows_are_not():
    mesh = make_mesh(CUBE)
    assert leaf_sharding(mesh, "users/table/weights", (11, 3)).is_fully_replicated
    assert [round_up_rows(mesh, count) for count in (1, 4, 5, 11, 12)] == [4, 4, 8, 12, 12]
    assert not leaf_sharding(mesh, "users/table/weights", (round_up_rows(mesh, 11), 3)).is_fully_replicated


# ---- a step costs as much as its batch


def compiled_step(kind, users, mesh):
    """A compiled update of a sharded table of `users` rows for a batch of eight, with its state donated."""
    model = UserModel(kind=kind, num_users=users - 1, tokens=4, width=16, clusters=4, start="normal")
    optimizer = lazy_adam(0.1)

    def step(params, state, batch):
        small, local, indices = gather_rows(params, batch)
        gradient = jax.grad(lambda p: (model.apply(p, local)[0] ** 2).sum())(small)
        table, state = optimizer.update(indices, gradient["table"], state, params["table"])
        return {**params, "table": table}, state

    def place(tree, prefix):
        def one(path, x):
            name = prefix + jax.tree_util.keystr(path, simple=True, separator="/")
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=leaf_sharding(mesh, name, x.shape))

        return jax.tree_util.tree_map_with_path(one, tree)

    params = jax.eval_shape(functools.partial(model.init, jax.random.key(0)))
    state = place(jax.eval_shape(optimizer.init, params["table"]), "opt_state/table/")
    batch = jax.ShapeDtypeStruct((8,), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec(("data", "fsdp"))))
    return jax.jit(step, donate_argnums=(0, 1)).lower(place(params, "users/"), state, batch).compile()


@pytest.mark.parametrize("kind", KINDS)
def test_no_device_holds_a_table_whole_at_any_time(kind):
    mesh = make_mesh(CUBE)
    few, many = (compiled_step(kind, users, mesh) for users in (800, 80_000))
    assert few.cost_analysis()["flops"] == many.cost_analysis()["flops"]
    few, many = few.memory_analysis(), many.memory_analysis()
    assert many.temp_size_in_bytes == few.temp_size_in_bytes
    # Values and two moments of a row, and its count: a quarter of the rows each, which change in place.
    row = 4 * (3 * (4 * 16 if kind == "individualized" else 4) + 1)
    assert many.alias_size_in_bytes - few.alias_size_in_bytes == (80_000 - 800) // 4 * row


# ---- training


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """(run, pairs) of ten people on a mesh, or on one device where that is None."""
    folder = tmp_path_factory.mktemp("people")
    model = tiny_users.save_base(folder)
    answers = ("it can shine .", "it can melt .")
    records = [
        {"prompt": request, "chosen": answers[i % 2], "rejected": answers[1 - i % 2], "user_id": f"person {i}"}
        for request in synthetic.prompts()[:8]
        for i in range(U)
    ]
    path = tiny_users.write_records(folder / "records.jsonl", records)
    models = {"individualized": {"kind": "individualized", "tokens": 2}}
    models["cluster"] = {"kind": "cluster", "tokens": 2, "clusters": 3}

    def make(mesh):
        sizes = {"data__max_prompt": 16, "data__max_completion": 8, "model__path": str(model)}
        sizes["preference__mixture"] = "exact"  # every pair teaches its person
        config = tiny_users.settings(
            "records", preference__data__path=path, preference__models=models, preference__steps=len(STEPS), **sizes
        )
        if mesh is None:
            run = tiny.start(folder / "one", config)
        else:
            config.mesh.update(MESHES[mesh][0])
            run = stages.read(config).run(Workdir(folder / mesh))
        # Not under test: any values do.
        run.reference = lambda table, rows: np.zeros((len(table), 2), np.float32)
        return run, tiny_users.pairs_of(run)

    return functools.cache(make)


def words(backbone, users, trainable, batch, dropout_key=None):
    """Replaces the decoder by a policy whose answers depend on the user only, which compiles quickly."""
    user_tokens, _ = users.apply(trainable["users"], batch.places)
    vectors = user_tokens.mean(1) + trainable["bank"]["layers"]["mlp"]["down"]["b"].sum((0, 1, 2))
    logps = jax.nn.log_softmax(vectors @ backbone.base["embed"]["embedding"].T)
    rows = batch.rows
    scored = logps[jnp.minimum(rows.answer // 2, len(batch) - 1), rows.targets]
    return jnp.zeros(rows.answers).at[rows.answer].add(scored, mode="drop").reshape(-1, 2).T


def tables(state):
    return {"table": state.trainable["users"]["table"], **state.opt_state["table"]["rows"]}


@pytest.fixture(scope="module")
def trained(start):
    """What three steps of a kind leave on a mesh: where the state lay at first, the state, losses, and the tables after
    every step.
    """

    @functools.cache
    def make(kind, mesh, policy):
        run, pairs = start(mesh)
        method = tiny_users.method_of(run, kind, pairs)
        users, state = pairs.users("train"), method.init()
        placed = [x.sharding for x in jax.tree.leaves(state)]
        history, losses = [jax.tree.map(np.array, tables(state))], []
        with pytest.MonkeyPatch.context() as patch:
            if policy == "words":
                patch.setattr(pdpo_objective, "answer_scores", words)
            for step in STEPS:
                rows = [pairs.tables["train"][np.flatnonzero(users == user)[i % 2]] for i, user in enumerate(step)]
                state, metrics = method.step(state, method.collate("train", users, rows))
                losses.append(float(metrics["loss"][0] / metrics["loss"][1]))
                history.append(jax.tree.map(np.array, tables(state)))
        return placed, state, losses, history

    return lambda kind, mesh, policy="words": make(kind, mesh, policy)


# Each kind on one mesh at once, and on the others where there is time.
FAST = {"8x1x1": "individualized", "2x2x2": "cluster"}
CASES = [
    pytest.param(kind, mesh, marks=() if FAST.get(mesh) == kind else pytest.mark.slow)
    for mesh in MESHES
    for kind in KINDS
]
every_case = pytest.mark.parametrize(("kind", "mesh"), CASES)


@pytest.mark.parametrize(("mesh", "rows"), [(None, 11), ("8x1x1", 16), ("2x2x2", 12)])
def test_a_table_has_as_many_rows_as_divide_evenly(start, mesh, rows):
    registry = start(mesh)[1].registry
    assert registry.capacity + 1 == rows
    people = [f"person {i}" for i in range(U)]
    assert sorted(registry.names[1 : U + 1]) == people and registry.names[U + 1 :] == (None,) * (rows - U - 1)


@every_case
@pytest.mark.parametrize("policy", ["words", pytest.param("decoder", marks=pytest.mark.slow)])
def test_training_gives_the_numbers_of_one_device(trained, kind, mesh, policy):
    _, _, losses, history = trained(kind, mesh, policy)
    _, _, want_losses, want = trained(kind, None, policy)
    np.testing.assert_allclose(losses, want_losses, rtol=1e-5)
    assert want_losses[0] != want_losses[1]
    for got, expected in zip(history, want, strict=True):
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x[: U + 1], y, rtol=1e-3, atol=1e-5 * np.abs(y).max()),
            {name: got[name] for name in ("count", "mu", "nu")},
            {name: expected[name] for name in ("count", "mu", "nu")},
        )
        # Adam divides small gradients by their own size, rounding included.
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x[: U + 1], y, atol=1e-3), got["table"], expected["table"])


@every_case
def test_every_device_keeps_its_share_of_the_rows(trained, kind, mesh):
    placed, state, _, _ = trained(kind, mesh)
    share = MESHES[mesh][1]
    for leaf in jax.tree.leaves(tables(state)):
        assert {shard.data.nbytes for shard in leaf.addressable_shards} == {leaf.nbytes // share}
        assert len({shard.index[0].start for shard in leaf.addressable_shards}) == share
    # A step keeps the sharding of its state, else every run would compile it twice.
    leaves = zip(jax.tree.leaves(state), placed, strict=True)
    assert all(x.sharding.is_equivalent_to(sharding, x.ndim) for x, sharding in leaves)


@every_case
def test_absent_people_and_free_rows_keep_every_bit(trained, kind, mesh):
    _, _, _, history = trained(kind, mesh)
    rows = len(history[0]["count"])
    free = range(U + 1, rows)
    assert len(free) > 0
    untouched = {step: sorted({*range(1, rows)} - {*people}) for step, people in enumerate(STEPS)}
    assert set(RESTING) < set(untouched[1]) and set(RESTING) < set(untouched[2])
    for step, (before, after) in enumerate(itertools.pairwise(history)):
        for x, y in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
            assert x[untouched[step]].tobytes() == y[untouched[step]].tobytes()
            assert (x != y).reshape(rows, -1).any(1)[sorted({*STEPS[step]})].all()
    assert not any(x[[U, *free]].any() for x in jax.tree.leaves({k: history[-1][k] for k in ("count", "mu", "nu")}))


@pytest.mark.parametrize(
    ("kind", "mesh"), [("individualized", "8x1x1"), pytest.param("cluster", "4x2x1", marks=pytest.mark.slow)]
)
def test_vectors_are_those_of_the_people_in_the_order_of_their_names(start, trained, kind, mesh):
    run, pairs = start(mesh)
    _, state, _, _ = trained(kind, mesh)
    entry = tiny_users.entry_of(run, kind)
    users = pdpo_entries.user_model(entry, pairs.registry.capacity, run.workspace.model_config.hidden_size)
    pdpo_entries.save(run, entry, users, pairs.registry, state.trainable)
    found = tiny_users.trained_of(run, kind, pairs)
    assert not any(x.sharding.is_fully_replicated for x in jax.tree.leaves(found.trainable["users"]["table"]))
    vectors = found.vectors()
    names = [name for name in pairs.registry.names[1:] if name]
    assert len(vectors) == len(names) == U
    tokens, _ = found.users.apply(state.trainable["users"], jnp.asarray(pairs.registry.indices(names)))
    np.testing.assert_allclose(vectors, np.asarray(tokens).reshape(U, -1), rtol=1e-6)
