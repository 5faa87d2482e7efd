"""One step of each stage, and a merge, on every mesh shape of eight devices: the numbers of one device, and parameters
that are really split.
"""

import functools

import jax
import numpy as np
import pytest
from support import tiny, tiny_users
from support.meshes import MESHES
from support.small_policies import close, noise

from pjrlhf.algorithms import policy, reward
from pjrlhf.data import synthetic
from pjrlhf.merging import methods, trees
from pjrlhf.merging.lora import merge_dense
from pjrlhf.models.adapters import init_bank
from pjrlhf.parallel.mesh import bytes_per_device, shard_params
from pjrlhf.parallel.processes import to_host
from pjrlhf.pipeline import stages
from pjrlhf.training.checkpoint import Checkpoints
from pjrlhf.training.workdir import Workdir

U = 10
OBJECTIVES = ("P2A", "P2B")
STEPS = ("preference", "reward", "policy")
APART = "policy, gradients of one after the other"
# Each step on one mesh at once, and on the others where there is time.
CASES = [
    pytest.param(step, mesh, marks=() if (step, mesh) == ("preference", "2x4") else pytest.mark.slow)
    for step in STEPS
    for mesh in MESHES
] + [pytest.param(APART, "2x4", marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """The run of a step on a mesh, or on one device where that is None."""
    folder = tmp_path_factory.mktemp("steps")
    model = tiny_users.save_base(folder, vocab_size=208)  # which eight devices can split
    records = []
    for request in synthetic.prompts()[:8]:
        for i in range(U):
            answers = ("it can shine .", "it can melt today .")
            record = {"prompt": request, "chosen": answers[i % 2], "rejected": answers[1 - i % 2]}
            records.append(record | {"user_id": f"person {i}", "objective": OBJECTIVES[i % 2]})
    data = {"kind": "jsonl", "path": tiny_users.write_records(folder / "records.jsonl", records)}

    def make(step, mesh):
        # Rows of one kind on all: one device alone would join them.
        changes = {
            "model__path": str(model),
            "data__max_prompt": 16,
            "data__max_completion": 8,
            "data__packing": "share",
        }
        if step == "preference":
            models = {"cluster": {"kind": "cluster", "tokens": 2, "clusters": 3}}
            changes |= {"preference__data__path": data["path"], "preference__models": models}
            changes["evaluate_users__cold_start_models"] = ()
            settings = tiny_users.settings("records", **changes)
        else:
            changes |= {"objectives": OBJECTIVES, "general": "", "stages": ("reward", "policy")}
            changes |= {"policy__rollouts": 8, "policy__ppo__policies_at_once": int(step == APART)}
            settings = tiny.settings(policy__optimizer__eps=1e-5, **changes)
            with settings.ignore_type():
                settings.reward.data = type(settings)(data)
        if mesh is None:
            return tiny.start(folder / "one" / step, settings)
        settings.mesh.update({"data": 1, **MESHES[mesh]})
        return stages.read(settings).run(Workdir(folder / mesh / step))

    return make


def reward_models(run):
    """Reward models with distinct scores, and their scale."""
    trained = noise(to_host(reward.method_of(run).init().trainable), 7, 0.3)
    count = np.ones(len(OBJECTIVES), np.float32)
    return shard_params(run.devices.mesh, trained | {"mean": 0 * count, "std": count, "low": -count, "high": count})


@pytest.fixture(scope="module")
def taken(start):
    """(run, state, metrics) after one step from a perturbed state; in the initial state all gradients are small."""

    @functools.cache
    def take(step, mesh):
        run = start(step, mesh)
        if step == "preference":
            # Not under test: any values do.
            run.reference = lambda table, rows: -np.ones((len(table), 2), np.float32)
            method = tiny_users.method_of(run, "cluster", tiny_users.pairs_of(run))
        else:
            method = reward.method_of(run) if step == "reward" else policy.method_of(run, rewarder=reward_models(run))
        state = method.init()
        moved = noise({name: to_host(x) for name, x in state.trainable.items() if name != "users"}, 5, 0.1)
        state = state.replace(trainable={**state.trainable, **shard_params(run.devices.mesh, moved)})
        return run, *method.step(state, next(method.batches))

    return take


def named(tree):
    """(path, leaf) of every leaf."""
    found = jax.tree_util.tree_leaves_with_path(tree)
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), x) for path, x in found]


def moments(state):
    """Path -> first moments of Adam: after the first step, multiples of the gradient."""
    found = [(name, x) for name, x in named(to_host(state.opt_state)) if "/mu/" in name]
    # Free rows make the table divide evenly.
    return {name: x[: U + 1] if "/rows/" in name else x for name, x in found}


@pytest.mark.parametrize(("step", "mesh"), CASES)
def test_a_step_gives_the_numbers_of_one_device(taken, step, mesh):
    _, state, metrics = taken(step, mesh)
    _, want, want_metrics = taken("policy" if step == APART else step, None)
    close(to_host(metrics), to_host(want_metrics))
    found, expected = moments(state), moments(want)
    assert found.keys() == expected.keys()
    largest = max(np.abs(x).max() for x in expected.values())
    assert largest > 1e-4
    for name, x in expected.items():
        np.testing.assert_allclose(found[name], x, rtol=1e-4, atol=1e-6 * largest, err_msg=name)


# ---- placement of parameters


def whole_bytes(tree):
    return sum(x.nbytes for x in jax.tree.leaves(tree))


@pytest.mark.parametrize(("step", "mesh"), CASES)
def test_every_device_holds_its_part(taken, step, mesh):
    run, state, _ = taken(step, mesh)
    sizes = {"data": 1, "fsdp": 1, "tensor": 1} | MESHES[mesh]
    whole = whole_bytes([x for name, x in named(run.workspace.base) if "norm" in name])
    matrices = whole_bytes(run.workspace.base) - whole
    assert bytes_per_device(run.workspace.base) == whole + matrices // (sizes["fsdp"] * sizes["tensor"])
    want = 0
    for name, x in named(state.trainable["bank"]):
        # Factors [in, R] and [R, out] are split like their side of the kernel.
        by_tensor = ("output" in name or "down" in name) == name.endswith("a")
        want += x.nbytes // sizes["tensor" if by_tensor else "fsdp"]
    assert 0 < bytes_per_device(state.trainable["bank"]) == want
    if step == "preference":
        tables = {"table": state.trainable["users"]["table"], **state.opt_state["table"]["rows"]}
        assert bytes_per_device(tables) == whole_bytes(tables) // (sizes["data"] * sizes["fsdp"])


@pytest.mark.slow
def test_a_run_says_what_its_parameters_take(start, caplog):
    run = start("reward", "1x8")
    method = reward.method_of(run)
    with caplog.at_level("INFO"):
        state = run.train(method, "reward", 1)
    line = next(record.getMessage() for record in caplog.records if "bytes per device" in record.getMessage())
    for name, tree in {"base": run.workspace.base, **state.trainable, "optimizer": state.opt_state}.items():
        assert f"{name} {bytes_per_device(tree):,}" in line


# ---- merging


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
def test_merging_from_sharded_checkpoints(start, tmp_path, mesh):
    """Full models and adapters are saved from one mesh and merged on another, sharded throughout."""
    first, run = start("reward", "4x2"), start("reward", mesh)
    backbone = first.workspace.backbone
    adapter = init_bank(backbone.base, backbone.adapter, 2, first.streams.root)
    base, adapter = to_host(backbone.base), to_host(adapter)
    models, bank = [noise(base, seed, 0.3) for seed in (11, 12)], noise(adapter, 13, 0.3)
    saved = first.devices.shard({"models": models, "bank": bank})
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, saved, 0)
    with Checkpoints(tmp_path) as checkpoints:
        found, _ = checkpoints.restore(run.devices.shard(jax.tree.map(np.zeros_like, saved)))
    weights = (0.7, 0.5)

    soup = trees.soup(run.workspace.base, found["models"], weights)
    close(to_host(soup), jax.tree.map(lambda x, y, z: x + 0.7 * (y - x) + 0.5 * (z - x), base, *models))
    layer = [x["layers"]["mlp"] for x in (run.workspace.base, *found["models"], base, *models)]
    ties, want = (methods.ties(layer[i], layer[i + 1 : i + 3], weights, density=0.5) for i in (0, 3))
    close(to_host(ties), want)

    each = [jax.tree.map(lambda x, k=k: x[k], found["bank"]) for k in range(2)]
    dense = merge_dense(run.workspace.base, each, [run.workspace.adapter.scale] * 2, weights)
    kernel, factors = (tree["layers"]["mlp"]["up"] for tree in (base, bank))
    deltas = [w * run.workspace.adapter.scale * factors["a"][k] @ factors["b"][k] for k, w in enumerate(weights)]
    close(to_host(dense["layers"]["mlp"]["up"]["kernel"]), kernel["kernel"] + sum(deltas))
    assert bytes_per_device(ties) == bytes_per_device(layer[0])
    assert bytes_per_device(soup) == bytes_per_device(dense) == bytes_per_device(run.workspace.base)
