"""The mesh: valid sizes, partition rules for every leaf, and the same numbers on every mesh shape."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec
from support.small_policies import EOS, PAD, backbone, bank, base, close, heads, prompts, value_heads

from pjrlhf.algorithms.ppo import PPOConfig, ppo_loss
from pjrlhf.errors import UserError
from pjrlhf.objectives.scalarization import MinNorm
from pjrlhf.parallel.mesh import leaf_sharding, make_mesh, shard_batch, shard_params
from pjrlhf.rollout.batches import ScoredRollout, TargetBatch, split_rows
from pjrlhf.rollout.experience import ExperienceConfig, Recipe, experience, sample
from pjrlhf.rollout.sampler import Sampling
from pjrlhf.training.optimizer import per_ingredient

K, n, P, N = 2, 8, 4, 4
CUBE = {"data": 2, "fsdp": 2, "tensor": 2}


@pytest.mark.parametrize(
    "sizes, shape",
    [
        ({}, None),
        ({"data": -1}, (8, 1, 1)),
        ({"data": 8}, (8, 1, 1)),
        ({"fsdp": -1, "tensor": 2}, (1, 4, 2)),
        ({"data": 2, "fsdp": 2, "tensor": -1}, (2, 2, 2)),
        ({"data": -1, "fsdp": 8}, (1, 8, 1)),
    ],
)
def test_sizes(sizes, shape):
    if shape is None:
        with pytest.raises(UserError, match="does not fit 8 devices"):
            make_mesh(sizes)
    else:
        mesh = make_mesh(sizes)
        assert mesh.axis_names == ("data", "fsdp", "tensor") and mesh.devices.shape == shape


@pytest.mark.parametrize(
    "sizes, message",
    [
        ({"data": 3}, r"\{'data': 3\} does not fit 8 devices; the sizes must multiply to 8"),
        ({"data": -1, "fsdp": 3}, "does not fit 8 devices"),
        ({"data": -1, "fsdp": 16}, "does not fit 8 devices"),
        ({"data": -1, "fsdp": -1}, "more than one axis is -1"),
        ({"data": 0, "fsdp": -1}, "does not fit"),
        ({"data": -2, "fsdp": -4}, "does not fit"),
        ({"modle": 8}, "unknown axis 'modle'; the axes are data, fsdp, tensor"),
    ],
)
def test_sizes_that_make_no_mesh(sizes, message):
    with pytest.raises(UserError, match=message):
        make_mesh(sizes)


def specs(tree, mesh):
    """Path -> spec of every leaf, as `shard_params` would place it."""
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        found[name] = leaf_sharding(mesh, name, leaf.shape).spec
    return found


def test_rules_of_the_base():
    column, row = PartitionSpec(None, "fsdp", "tensor"), PartitionSpec(None, "tensor", "fsdp")
    got = specs(base(), make_mesh(CUBE))
    assert got["embed/embedding"] == PartitionSpec("tensor", "fsdp")
    for name in ("attention/query", "attention/key", "attention/value", "mlp/gate", "mlp/up"):
        assert got[f"layers/{name}/kernel"] == column, name
    for name in ("attention/output", "mlp/down"):
        assert got[f"layers/{name}/kernel"] == row, name
    for name in ("layers/attention_norm/scale", "layers/mlp_norm/scale", "final_norm/scale"):
        assert got[name] == PartitionSpec(), name
    assert leaf_sharding(make_mesh(CUBE), "head/kernel", (16, 24)).spec == PartitionSpec("fsdp", "tensor")


def test_rules_of_banks_heads_and_moments():
    """K and L are never split; factors are split like the kernel they adapt, and moments like their parameters."""
    mesh = make_mesh(CUBE)
    trainable = {"bank": bank("lora", 2), "heads": heads(2)}
    got = specs(trainable, mesh)
    layer = "bank/layers/attention/query"
    assert got[f"{layer}/a"] == PartitionSpec(None, None, "fsdp", None)
    assert got[f"{layer}/b"] == PartitionSpec(None, None, None, "tensor")
    assert got["bank/layers/mlp/down/a"] == PartitionSpec(None, None, "tensor", None)
    assert got["bank/layers/mlp/down/b"] == PartitionSpec(None, None, None, "fsdp")
    assert got["heads/kernel"] == got["heads/bias"] == PartitionSpec()
    moments = specs(per_ingredient(optax.adam(1.0)).init(trainable), mesh)
    for moment in ("mu", "nu"):
        assert {k.split(f"{moment}/")[1]: v for k, v in moments.items() if f"/{moment}/" in k} == got

    full = specs(bank("full", 2), mesh)
    assert full["embed/embedding"] == PartitionSpec(None, "tensor", "fsdp")
    assert full["layers/mlp/down/kernel"] == PartitionSpec(None, None, "tensor", "fsdp")


def test_an_axis_that_does_not_divide_stays_whole():
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    assert leaf_sharding(mesh, "mlp/up/kernel", (2, 6, 10)).spec == PartitionSpec(None, None, "tensor")
    assert leaf_sharding(mesh, "mlp/up/kernel", (2, 8, 9)).spec == PartitionSpec(None, "fsdp", None)


@pytest.mark.parametrize("sizes, parts", [({"data": 8}, 1), ({"fsdp": 8}, 8), ({"tensor": 8}, 8), (CUBE, 4)])
def test_bytes_on_each_device(sizes, parts):
    """All matrices of this model divide evenly; only scales are replicated."""
    placed = shard_params(make_mesh(sizes), base())
    per_device = dict.fromkeys(jax.devices(), 0)
    for leaf in jax.tree.leaves(placed):
        for shard in leaf.addressable_shards:
            per_device[shard.device] += shard.data.nbytes
    whole = sum(x.nbytes for path, x in jax.tree_util.tree_leaves_with_path(base()) if "scale" in str(path))
    total = sum(x.nbytes for x in jax.tree.leaves(base()))
    assert set(per_device.values()) == {whole + (total - whole) // parts}
    close(jax.device_get(placed), jax.device_get(base()), 0)


def test_rows_are_split_over_data_and_fsdp():
    mesh = make_mesh(CUBE)
    got = shard_batch(mesh, {"x": np.arange(24).reshape(8, 3)})["x"]
    assert got.sharding.spec == PartitionSpec(("data", "fsdp"))
    assert {shard.data.shape for shard in got.addressable_shards} == {(2, 3)}
    with pytest.raises(UserError, match=r"batch of 6 rows.*data x fsdp = 4 devices; make it a multiple of 4"):
        shard_batch(mesh, {"x": np.zeros((6, 3))})


@jax.jit
def rollout_and_gradient(backbone, trainable, placed):
    """Samples, experience on them with two objectives and min-norm weights, and the PPO gradient of policies that have
    moved a little since.
    """
    sampling, prompt = Sampling(max_new_tokens=N, eos_ids=(EOS,), pad_id=PAD), split_rows(placed, K)
    response = sample(backbone, trainable["bank"], jnp.eye(K), prompt, sampling, jax.random.key(2))
    line = jnp.linspace(-1.0, 1.0, K * n).reshape(K, n)
    scores, group = jnp.stack([line, jnp.sin(5 * line)], 2), jnp.zeros((K, n), jnp.int32)
    targets = TargetBatch(jnp.zeros((K, n, 2), jnp.int32), jnp.full((K, n, 2), 0.5), group)
    recipe = Recipe(ExperienceConfig(), sampling, MinNorm(heads="per_reward"))
    collected = trainable, ScoredRollout(prompt, response, scores, targets), jnp.full(K, 0.1)
    rows, statistics = experience(recipe, backbone, *collected)
    moved = jax.tree.map(lambda x: 1.01 * x, trainable)
    loss = jax.value_and_grad(ppo_loss, argnums=2, has_aux=True)
    return rows, statistics, loss(PPOConfig(), backbone, moved, rows)


@functools.cache
def single_device(kind):
    trainable = {"bank": bank(kind, K), "value_heads": value_heads(K, 2)}
    return jax.device_get(rollout_and_gradient(backbone(kind), trainable, prompts(K * n, P)))


@pytest.mark.parametrize(
    "kind, sizes",
    [
        pytest.param("lora", CUBE, id="2x2x2", marks=pytest.mark.slow),
        pytest.param("lora", {"data": 8}, id="8x1x1", marks=pytest.mark.slow),
        pytest.param("lora", {"tensor": 8}, id="1x1x8", marks=pytest.mark.slow),
        pytest.param("full", CUBE, id="full 2x2x2", marks=pytest.mark.slow),
    ],
)
def test_any_mesh_gives_the_numbers_of_one_device(kind, sizes):
    mesh = make_mesh(sizes)
    trainable = {"bank": bank(kind, K), "value_heads": value_heads(K, 2)}
    placed = backbone(kind).replace(base=shard_params(mesh, base()))
    got = rollout_and_gradient(placed, shard_params(mesh, trainable), shard_batch(mesh, prompts(K * n, P)))
    got, want = jax.device_get(got), single_device(kind)
    np.testing.assert_array_equal(got[0].tokens, want[0].tokens)
    close(got, want)
    assert optax.global_norm(want[2][1]) > 0.1
    weights = want[1]["head_weights"]
    assert weights.shape == (K, 2) and np.abs(weights - 0.5).max() > 0.01
