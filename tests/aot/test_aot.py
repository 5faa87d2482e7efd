"""Compiling ahead of time for chips that are not here: what it counts, what it refuses, and where parameters live."""

import importlib.util
import json
import pathlib
import types

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec
from support import tiny, tiny_classifiers, tiny_family, tiny_judge, tiny_users

from pjrlhf.algorithms import policy, reward
from pjrlhf.algorithms.pdpo_settings import PreferenceSettings
from pjrlhf.aot import dry_run as planned
from pjrlhf.aot import plan as aot
from pjrlhf.aot.dry_classifiers import bytes_per_chip, classifiers_of, rewards_of
from pjrlhf.aot.dry_judges import judges_of
from pjrlhf.errors import UserError
from pjrlhf.models.classifier import load_classifier, read_classifier
from pjrlhf.parallel import roofline
from pjrlhf.parallel.mesh import bytes_per_device, make_mesh
from pjrlhf.runtime.devices import Devices, MeshSettings
from pjrlhf.runtime.judges import ModelJudgeSettings, NextToken

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "shardings.json"
LLAMAS = ("pdpo_8b", "soups_8b", "pdpo_70b", "soups_70b")


def test_one_chip_is_a_host_of_one(monkeypatch):
    """The compiler takes hosts for four chips, of which there are none in a topology of one."""
    asked = []

    def describe(*_, **options):
        asked.append(options)
        return types.SimpleNamespace(devices=["chip"])

    monkeypatch.setattr(topologies, "get_topology_desc", describe)
    for name in ("TPU_SKIP_MDS_QUERY", "ALLOW_MULTIPLE_LIBTPU_LOAD"):
        monkeypatch.setenv(name, "1")
    for topology in ("v6e:1x1", "v6e:2x2", "v6e:1x4"):
        assert planned.devices_of(topology) == ("v6e", ["chip"])
    assert asked == [{"chips_per_host_bounds": (1, 1, 1)}, {}, {}]


def test_matmuls_are_counted():
    """Of a scan, a loop and a gradient, by the formula 2 m k n."""
    x, w = jnp.zeros((3, 4)), jnp.zeros((5, 4, 4))

    def scanned(x, w):
        return jax.lax.scan(lambda h, m: (jnp.tanh(h @ m), None), x, w)[0].sum()

    one = 2 * 3 * 4 * 4
    assert roofline.matmul_cost(jax.make_jaxpr(scanned)(x, w).jaxpr).flops == 5 * one
    # Backwards there is one product for the input and one for the weights; with remat the forward one again.
    gradient = jax.make_jaxpr(jax.grad(scanned, argnums=(0, 1)))(x, w).jaxpr
    assert roofline.matmul_cost(gradient).flops == 15 * one
    again = jax.make_jaxpr(jax.grad(jax.checkpoint(scanned), argnums=(0, 1)))(x, w).jaxpr
    assert 15 * one < roofline.matmul_cost(again).flops <= 20 * one

    def loop(x, w):
        return jax.lax.while_loop(lambda c: c[0] < 7, lambda c: (c[0] + 1, c[1] @ w[0]), (0, x))[1]

    assert roofline.matmul_cost(jax.make_jaxpr(loop)(x, w).jaxpr, trip_count=7).flops == 7 * one
    batched = jax.make_jaxpr(lambda a, b: jnp.einsum("bij,bjk->bik", a, b))(jnp.zeros((2, 3, 4)), jnp.zeros((2, 4, 6)))
    cost = roofline.matmul_cost(batched.jaxpr)
    assert cost == roofline.Cost(2 * 2 * 3 * 4 * 6, 4 * 2 * (3 * 4 + 4 * 6 + 3 * 6))


def test_bytes_of_collectives():
    """A program whose collectives are known: a sum over rows, inside a loop, and gathered weights."""
    mesh = make_mesh({"fsdp": 8})
    rows, whole = (NamedSharding(mesh, PartitionSpec(*spec)) for spec in (("fsdp",), ()))

    def step(x, n):
        def body(i, total):
            return total + jax.lax.with_sharding_constraint((x * (i + 1)).sum(0), whole)

        return jax.lax.fori_loop(0, n, body, jnp.zeros(x.shape[1]))

    x = jax.ShapeDtypeStruct((16, 1024), jnp.float32, sharding=rows)
    text = jax.jit(step, static_argnums=1).lower(x, 6).compile().as_text()
    got = roofline.collective_bytes(text)
    assert got.keys() == {"all-reduce"}
    assert got["all-reduce"] in (2 * 4096 * 7 / 8 * times for times in (1, 6))  # moved out of the loop, or not

    def gathered(x, w):
        return x @ jax.lax.with_sharding_constraint(w, whole)

    w = jax.ShapeDtypeStruct((1024, 64), jnp.float32, sharding=rows)
    text = jax.jit(gathered, out_shardings=rows).lower(x, w).compile().as_text()
    assert roofline.collective_bytes(text) == {"all-gather": 1024 * 64 * 4 * 7 / 8}


def test_a_collective_in_parts_counts_once():
    """An asynchronous one is spread over computations that all name its channel; a loop around the rest of it does not
    repeat it. One of several arrays counts them all.
    """
    text = """
%start (p: f32[8,4]) -> f32[64,4] {
  %g = f32[64,4]{1,0} all-gather(%p), channel_id=3, replica_groups=[1,8]<=[8], dimensions={0}
}

%rest (p: f32[8,4]) -> f32[64,4] {
  %g = f32[64,4]{1,0} all-gather(%p), channel_id=3, replica_groups=[1,8]<=[8], dimensions={0}
}

%cond (c: (s32[], f32[64,4])) -> pred[] {
  %n = s32[] constant(12)
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%body (c: (s32[], f32[64,4])) -> (s32[], f32[64,4]) {
  %a = f32[64,4] fusion(%x), kind=kCustom, calls=%rest
  %r = (f32[10]{0}, f32[6]{0}) all-reduce(%y, %z), channel_id=4, replica_groups={{0,1},{2,3}}, to_apply=%add
}

ENTRY %main (p: f32[8,4]) -> f32[64,4] {
  %s = f32[64,4] fusion(%p), kind=kCustom, calls=%start
  %w = (s32[], f32[64,4]) while(%t), condition=%cond, body=%body
}
"""
    assert roofline.collective_bytes(text) == {"all-gather": 1024 * 7 / 8, "all-reduce": 12 * 2 * 64 / 2}


def llama(variant):
    return tiny.catalogue("llama").get_config(variant)


def found_shardings(variant):
    """Path -> shape and spec of every parameter of the base and of what is trained."""
    config = llama(variant)
    config.mesh.fsdp = 8 // config.mesh.tensor
    config.model.attention = "xla"
    run = aot.DryRun(config, "v5e:2x4")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planned, "devices_of", lambda topology: ("v5e", jax.devices()))
        _ = run.devices
    trees = {"base": run.workspace.base}
    if variant.startswith("pdpo"):
        run.records.count = 64  # enough for a batch
        pairs = planned.dry_pairs(run, run.section(PreferenceSettings))
        trees["preference"] = tiny_users.method_of(run, "individualized", pairs).init().trainable
    else:
        trees["reward"] = reward.method_of(run).init().trainable
        trees["policy"] = policy.method_of(run, rewarder=trees["reward"]).init().trainable
    leaves = jax.tree_util.tree_leaves_with_path(trees)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): f"{list(x.shape)} by {tuple(x.sharding.spec)}"
        for path, x in leaves
    }


@pytest.mark.parametrize("variant", LLAMAS)
def test_shardings_are_those_agreed_on(variant):
    """Changed on purpose? Then write them again: PYTHONPATH=.:tests:tests/aot python -c
    "import conftest, test_aot; test_aot.main()"
    """
    assert found_shardings(variant) == json.loads(GOLDEN.read_text())[variant]


def test_no_matrix_of_a_llama_is_on_every_chip():
    for variant in LLAMAS:
        for path, found in json.loads(GOLDEN.read_text())[variant].items():
            if path.startswith("base") and "norm" not in path:
                assert "'fsdp'" in found, path


@pytest.mark.slow
def test_every_step_of_the_catalogue_can_be_planned(monkeypatch):
    """On the devices that are here, in place of a TPU's: the same code up to the compiler."""
    monkeypatch.setattr(planned, "devices_of", lambda topology: ("v5e", jax.devices()))
    names = [
        step.name
        for step in aot.plan(
            tiny.settings(sft__batch_size=8, policy__rollouts=8, methods__pmorl__rollouts=8), "v5e:2x4"
        )
    ]
    assert names == [
        *("sft", "reward"),
        *(f"{where}: {part}" for where in ("policy", "methods/pmorl") for part in ("rollout", "rewards", "whole step")),
    ]
    config = tiny_users.settings(aot__users=100)
    compiled, compile_one = [], planned._compile
    monkeypatch.setattr(planned, "_compile", lambda *args: compiled.append(None) or compile_one(*args))
    steps = {step.name: step for step in aot.plan(config, "v5e:2x4", ["preference"])}
    assert list(steps) == [
        "preference: reference",
        *(f"preference: {name}" for name in config.preference.models),
    ]
    alike = {
        (steps[f"preference: {name}"].memory, steps[f"preference: {name}"].cost)
        for name in ("individualized", "permuted")
    }
    assert len(alike) == 1 and len(compiled) == len(steps) - 1, "the same program is compiled once"
    assert all(step.fits and step.cost.flops > 0 and step.estimate.seconds > 0 for step in steps.values())
    # Every pair twice, with user tokens, for a person's model; once for the pooled one.
    ratio = steps["preference: individualized"].cost.flops / steps["preference: pooled"].cost.flops
    assert 2.0 < ratio < 2.6


@pytest.mark.slow
def test_every_step_of_the_neighbours_can_be_planned(monkeypatch):
    """What MODPO and Rewards-in-Context compile in a run, in that order."""
    monkeypatch.setattr(planned, "devices_of", lambda topology: ("v5e", jax.devices()))
    config = tiny_family.settings(("dpo_soups", "modpo", "ric"), modpo__batch_size=8)
    steps = {step.name: step for step in aot.plan(config, "v5e:2x4", ["methods"])}
    pairs = ("rewards", "reference", "step")
    parts = {"dpo_soups": pairs, "modpo": pairs, "ric": ("rollout of the base", "rewards", "step", "rollout")}
    assert list(steps) == [f"methods/{name}: {part}" for name in parts for part in parts[name]]
    assert all(step.fits and step.cost.flops > 0 and step.estimate.seconds > 0 for step in steps.values())
    # Two policies at the corners, more of them over the simplex.
    assert steps["methods/modpo: step"].cost.flops > 1.4 * steps["methods/dpo_soups: step"].cost.flops
    sizes = next(changed for flags, changed in aot.remedies(config) if "modpo.batch_size" in flags)
    assert sizes.modpo.batch_size == 4 and sizes.ric.batch_size == 4


def test_planned_memory_is_what_the_program_holds(monkeypatch):
    """The frozen base is an argument: at least its part lies on each device."""
    monkeypatch.setattr(planned, "devices_of", lambda topology: ("v5e", jax.devices()))
    config = tiny.settings(policy__rollouts=8)
    (step,) = aot.plan(config, "v5e:2x4", ["reward"])
    run = aot.DryRun(config, "v5e:2x4")
    assert step.memory > sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(run.workspace.base)) > 0


@pytest.mark.slow
def test_classifiers_lie_beside_every_step_that_may_ask_them(monkeypatch, tmp_path):
    """Their weights count in the memory of each program of the stage, and their scoring is one; of the folder only
    config.json is read.
    """
    monkeypatch.setattr(planned, "devices_of", lambda topology: ("v5e", jax.devices()))
    folder = tiny_classifiers.gpt2_folder(tmp_path / "classifier")
    spec = {"kind": "classifier", "path": str(folder), "template": "{prompt}{answer}"}
    function = "support.toy_extensions:brevity"
    plans = {}
    for name, source in (("function", function), ("one", spec), ("twice", spec)):
        rewards = {"P1A": source, "P1B": spec if name == "twice" else function}
        config = tiny.settings(policy__rollouts=8, rewards=rewards, mesh__data=1, mesh__fsdp=-1)
        plans[name] = {step.name: step for step in aot.plan(config, "v5e:2x4", ["policy"])}
    run = aot.DryRun(config, "v5e:2x4")
    (found,) = classifiers_of(run, rewards_of(run))  # once for both rewards
    weights = load_classifier(read_classifier(folder))[1]
    assert 0 < found.bytes < sum(x.nbytes for x in jax.tree.leaves(weights)), "sharded"
    scoring = "policy: classifier of P1A"
    assert plans["one"].keys() - plans["function"].keys() == {scoring}
    for name, step in plans["function"].items():
        assert plans["one"][name].memory == plans["twice"][name].memory == step.memory + found.bytes
    assert plans["one"][scoring].memory > found.bytes + bytes_per_chip(run.workspace.base)
    for file in folder.glob("*.safetensors"):
        file.unlink()
    assert classifiers_of(run, rewards_of(run))[0].bytes == found.bytes


def judging(folder, **changes):
    """The tiny config on devices in the place of a TPU's, with a model folder as judge of its comparisons."""
    config = tiny.settings(policy__rollouts=8, mesh__data=1, mesh__fsdp=-1, **changes)
    with config.ignore_type():
        config.comparisons.judge = {"kind": "model", "path": str(folder), "batch_size": 8}
    return config


def test_a_judge_and_a_sampler_of_comparisons_are_planned(monkeypatch, tmp_path):
    """What a judge holds of each chip is what it holds in a run; of its folder only config.json is read."""
    monkeypatch.setattr(planned, "devices_of", lambda topology: ("v5e", jax.devices()))
    folder = tiny_judge.make(tmp_path)
    config = judging(folder)
    with config.ignore_type():
        config.comparisons.sampler = str(folder)
    run = aot.DryRun(config, "v5e:2x4")
    (found,) = judges_of(run, [("comparisons.judge", config.comparisons.judge.to_dict())])
    real = NextToken(ModelJudgeSettings(path=str(folder)), Devices(MeshSettings(data=1, fsdp=-1), 10))
    assert found.bytes == bytes_per_device(real.backbone.base)
    assert config.data.max_prompt + 2 * config.data.max_completion < found.length <= real.longest
    for file in folder.glob("*.safetensors"):
        file.unlink()
    steps = {step.name: step for step in aot.plan(config, "v5e:2x4", ["comparisons"])}
    assert list(steps) == ["comparisons: rollout of the sampler", "comparisons: judge of comparisons.judge"]
    base = bytes_per_chip(run.workspace.base)
    assert all(step.memory > found.bytes + base and step.cost.flops > 0 for step in steps.values())
    assert aot.plan(tiny.settings(), "v5e:2x4", ["comparisons", "evaluate"]) == []


@pytest.mark.slow
def test_judges_lie_beside_every_step_that_may_ask_them(monkeypatch, tmp_path):
    """Those of rewards beside the steps of training, those of a stage beside that stage alone."""
    monkeypatch.setattr(planned, "devices_of", lambda topology: ("v5e", jax.devices()))
    folder = tiny_judge.make(tmp_path)
    judge = {"kind": "judge", "path": str(folder), "criterion": "It helps.", "missing": 0.5}
    classifier = tiny_classifiers.gpt2_folder(tmp_path / "classifier")
    scored = {"kind": "classifier", "path": str(classifier), "template": "{prompt}{answer}", "missing": 0.5}
    function, plans = "support.toy_extensions:brevity", {}
    for name, source in (("function", function), ("judge", judge), ("compared", {**judge, "baseline": "greedy"})):
        config = judging(folder, rewards={"P1A": source, "P1B": function})
        config.evaluate.judges = ({"kind": "reward", "source": scored}, "score")
        found = aot.plan(config, "v5e:2x4", ["policy", "evaluate"])
        plans[name] = {step.name: step for step in found}
    run = aot.DryRun(config, "v5e:2x4")
    (one,), (other,) = judges_of(run, rewards_of(run)), classifiers_of(run, [("judges", scored)])
    of_judge = {"policy: judge of P1A", "evaluate: judge of P1A"}
    assert plans["judge"].keys() - plans["function"].keys() == of_judge
    for name, step in plans["function"].items():
        assert plans["judge"][name].memory == plans["compared"][name].memory == step.memory + one.bytes, name
    for name in of_judge:  # the answer of the baseline is read too
        assert plans["compared"][name].cost.flops > plans["judge"][name].cost.flops
    assert plans["function"]["evaluate: classifier of evaluate.judges"].memory > other.bytes


@pytest.mark.parametrize(
    ("topology", "message"),
    [
        ("v5e", "--aot=v5e: give chip:shape, for example v5e:4x4; chips are v4, v5e, v5p, v6e"),
        ("h100:8", "--aot=h100:8: give chip:shape"),
    ],
)
def test_topologies_that_are_none(topology, message):
    with pytest.raises(UserError, match=message):
        aot.plan(tiny.settings(), topology)


@pytest.mark.slow
def test_what_does_not_fit_comes_with_a_remedy(monkeypatch, capsys):
    monkeypatch.setattr(planned, "devices_of", lambda topology: ("v5e", jax.devices()))
    config = tiny.settings(stages=("sft",), sft__batch_size=64)
    (step,) = aot.plan(config, "v5e:2x4")
    smaller = next(
        found.memory
        for flags, changed in aot.remedies(config)
        if "sft.batch_size=32" in flags
        for found in aot.plan(changed, "v5e:2x4")
    )
    assert smaller < step.memory
    chip = roofline.Chip(1e12, (smaller + step.memory) / 2, 1e11, 1e10)
    monkeypatch.setitem(roofline.CHIPS, "v5e", chip)
    with pytest.raises(UserError, match=r"sft: 0\.0 GiB on a chip of .* \(v5e:2x4\); with --config\.\S+ it fits"):
        aot.report(config, "v5e:2x4")
    assert "sft" in capsys.readouterr().out


needs_compiler = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu (pjrlhf[tpu])")


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(
    ("topology", "stage"),
    [("v5e:2x4", "policy"), ("v5p:2x2x1", "reward"), ("v6e:2x4", "reward"), ("v4:2x2x1", "reward")],
)
def test_a_real_compiler_for_chips_that_are_not_here(topology, stage):
    config = tiny.settings(policy__rollouts=16, model__dtype="bfloat16", model__hidden_size=64)
    steps = aot.plan(config, topology, [stage])
    assert all(step.fits for step in steps)
    assert steps[-1].sent, "several chips, and nothing is sent"
    with pytest.raises(UserError, match="there is no such topology"):
        aot.plan(config, topology.split(":")[0] + ":3x17", [stage])


def main():
    """Writes the golden shardings."""
    GOLDEN.write_text(json.dumps({name: found_shardings(name) for name in LLAMAS}, indent=1) + "\n")
