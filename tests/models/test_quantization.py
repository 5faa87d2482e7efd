"""A quantised base computes what a base with the dequantised kernels computes."""

import functools
import statistics

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from support.small_policies import ADAPTERS, CONFIG, MODEL, bank, base, close, fresh_bank, prompts

from pjrlhf.errors import UserError
from pjrlhf.models.adapters import Policies, init_bank, mixed_params
from pjrlhf.models.config import ModelConfig
from pjrlhf.models.decoder import Decoder, init_params
from pjrlhf.models.huggingface import load_params, save_params
from pjrlhf.models.matmul import FEW_ROWS, matmul
from pjrlhf.models.quantization import (
    CODEBOOK,
    QUANTIZATIONS,
    Int8,
    NormalFloat4,
    check_quantize,
    kernel_shape,
    kind_of,
    quantize_params,
)
from pjrlhf.parallel.mesh import batch_sharding, leaf_sharding, make_mesh, shard_params
from pjrlhf.parallel.roofline import matmul_cost
from pjrlhf.rollout.sampler import Sampling, generate

LORA, K = ADAPTERS["lora"], 3
KINDS = {"int8": Int8(), "nf4": NormalFloat4(block=8)}  # the small decoder has 16 inputs


def numbers(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def dequantized_kernel(stored):
    """The kernel [*layers, in, out] of a layer, float32, by the definition."""
    stored = jax.tree.map(np.asarray, stored)
    if "scale" in stored:
        return stored["kernel"] * stored["scale"][..., None, :]
    *layers, blocks, half, outputs = stored["codes"].shape
    both = np.concatenate([stored["codes"] % 16, stored["codes"] // 16], axis=-2)
    scales = np.repeat(stored["absmax"], 2 * half, axis=-2)
    return np.float32(CODEBOOK)[both].reshape(*layers, 2 * half * blocks, outputs) * scales


def dequantized(params):
    """The base with dequantised kernels."""

    def layer(leaves):
        names = [name for name in leaves if name in ("kernel", "scale", "codes", "absmax")]
        rest = {name: leaf for name, leaf in leaves.items() if name not in names}
        return {"kernel": jnp.asarray(dequantized_kernel({name: leaves[name] for name in names})), **rest}

    layers = {
        block: {name: layer(leaves) for name, leaves in tree.items()} if block in ("attention", "mlp") else tree
        for block, tree in params["layers"].items()
    }
    return {**params, "layers": layers}


@functools.cache
def both(kind):
    """(quantised base, its dequantised form)."""
    small = quantize_params(KINDS[kind], base())
    return small, dequantized(small)


# ---- numbers


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_no_number_moves_by_more_than_half_a_step_of_its_column(dtype):
    kernel = (numbers(2, 50, 7) * jnp.geomspace(1e-3, 1e3, 7)).astype(dtype)
    found = Int8().quantize(kernel)
    assert found["kernel"].dtype == jnp.int8 and found["scale"].dtype == jnp.float32
    wide = np.asarray(kernel, np.float64)
    np.testing.assert_allclose(found["scale"], np.abs(wide).max(1) / 127, rtol=1e-6)
    steps = np.abs(found["kernel"] * np.asarray(found["scale"], np.float64)[:, None] - wide) / found["scale"][:, None]
    assert 0.4 < steps.max() <= 0.5 + 1e-4


def test_a_column_on_the_grid_is_kept_exactly_and_one_of_zeros_stays_zero():
    columns = jnp.stack([jnp.arange(-127.0, 128.0) / 64, jnp.zeros(255)], axis=1)
    found = Int8().quantize(columns)
    np.testing.assert_array_equal(found["kernel"] * found["scale"], columns)
    np.testing.assert_array_equal(Int8().quantize(found["kernel"] * found["scale"])["kernel"], found["kernel"])


def test_the_codebook_are_quantiles_of_the_normal_distribution():
    """Appendix E of QLoRA and its code: both halves start at the mean of the 1/32 and 1/30 tails, and share 0."""
    tail = (1 / 32 + 1 / 30) / 2

    def quantiles(count):
        return [statistics.NormalDist().inv_cdf(p) for p in np.linspace(1 - tail, 0.5, count)[:-1]]

    found = np.sort([*quantiles(9), 0.0, *(-x for x in quantiles(8))])
    np.testing.assert_allclose(CODEBOOK, found / found.max(), atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_numbers_become_the_nearest_entries_of_the_codebook(dtype):
    scales = jnp.repeat(jnp.asarray(np.geomspace(1e-3, 1e3, 12).reshape(4, 3), jnp.float32), 64, axis=0)
    kernel = (numbers(2, 256, 3) * scales).astype(dtype)
    stored = NormalFloat4().quantize(kernel)
    shapes = {name: (x.dtype, x.shape) for name, x in stored.items()}
    assert shapes == {"codes": (jnp.uint8, (2, 4, 32, 3)), "absmax": (jnp.float32, (2, 4, 3))}
    assert NormalFloat4().shape(stored) == kernel.shape
    blocks = np.asarray(kernel, np.float32).reshape(2, 4, 64, 3)
    absmax = np.abs(blocks).max(2)
    np.testing.assert_array_equal(stored["absmax"], absmax)
    found = dequantized_kernel(stored).reshape(blocks.shape)
    distances = np.abs(blocks[..., None] / absmax[:, :, None, :, None] - np.float32(CODEBOOK))
    errors = np.abs(found - blocks) / absmax[:, :, None]
    np.testing.assert_allclose(errors, distances.min(-1), atol=1e-6)
    assert 0.12 < errors.max() <= np.diff(CODEBOOK).max() / 2 + 1e-6


def test_blocks_of_codebook_entries_are_kept_exactly_and_zeros_stay_zero():
    entries = np.random.default_rng(0).permuted(np.tile(np.float32(CODEBOOK), (3, 4)), axis=1).T * np.float32(0.375)
    entries[:, 1] = 0.0
    stored = NormalFloat4().quantize(entries)
    np.testing.assert_array_equal(dequantized_kernel(stored), entries)
    np.testing.assert_array_equal(NormalFloat4().floats(stored, jnp.float32), entries)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_quantised_are_the_kernels_of_the_layers(kind):
    small = flax.traverse_util.flatten_dict(both(kind)[0], sep="/")
    before = flax.traverse_util.flatten_dict(base(), sep="/")
    kernels = {path.removesuffix("/kernel") for path in before if path.startswith("layers/") and "/kernel" in path}
    assert len(kernels) == 7
    stored = {f"{path}/{name}" for path in kernels for name in KINDS[kind].leaves}
    rest = before.keys() - {f"{path}/kernel" for path in kernels}
    assert small.keys() == stored | rest
    for path in rest:
        assert small[path] is before[path]
    assert kind_of(both(kind)[0]) == kind and kind_of(base()) == ""
    for tree in (both(kind)[0], base()):
        assert kernel_shape(tree["layers"]["mlp"]["down"]) == before["layers/mlp/down/kernel"].shape


# ---- matmuls


@pytest.mark.parametrize("rows", [2, FEW_ROWS + 1])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_products_and_their_gradients_are_those_with_floats(kind, transposed, rows):
    quantization, x = KINDS[kind], jnp.round(4 * numbers(rows, 16))
    stored = quantization.quantize(numbers(16, 4))
    kernel = dequantized_kernel(stored)
    if transposed:
        stored = {name: quantization.transpose(name, leaf) for name, leaf in stored.items()}
    multiply = quantization.product(stored, jnp.float32, transposed)
    found, of_found = jax.vjp(jax.jit(multiply), x)
    wanted, of_wanted = jax.vjp(lambda x: x @ kernel, x)
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-5)
    np.testing.assert_allclose(of_found(jnp.sign(wanted))[0], of_wanted(jnp.sign(wanted))[0], rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_kernel_that_is_multiplied_is_that_which_is_stored(kind, transposed):
    """Bit for bit; 8 bits come without their scales, which the product gets."""
    quantization = KINDS[kind]
    stored = quantization.quantize(numbers(2, 16, 4))
    wanted = dequantized_kernel(stored if kind == "nf4" else {**stored, "scale": jnp.ones((2, 4))})
    if transposed:
        stored = {name: quantization.transpose(name, leaf) for name, leaf in stored.items()}
        wanted = wanted.swapaxes(-1, -2)
    np.testing.assert_array_equal(jax.jit(lambda x: quantization.floats(x, jnp.float32, transposed))(stored), wanted)
    half = quantization.floats(stored, jnp.bfloat16, transposed)
    np.testing.assert_array_equal(half, jnp.asarray(wanted).astype(jnp.bfloat16))


def test_an_integer_kernel_is_multiplied_exactly():
    x, stored = jnp.round(4 * numbers(3, 7)), {**Int8().quantize(numbers(7, 4)), "scale": jnp.ones(4)}
    np.testing.assert_array_equal(Int8().product(stored, jnp.float32)(x), x @ stored["kernel"].astype(jnp.float32))


# ---- the decoder


def loss(model, adapter, base, moving, mix, tokens, valid):
    policies = Policies(model, adapter, base, moving["bank"], mix, moving["users"])
    tokens, valid = policies.reserve(tokens, valid)
    hidden, _ = policies(tokens, valid)
    return jnp.where(valid[..., None], jnp.sin(policies.logits(hidden)), 0.0).sum() / 100


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", [{}, pytest.param({"remat": "full"}, marks=pytest.mark.slow)])
def test_values_and_gradients_of_adapters_and_inputs_are_those_of_the_floats(change, kind):
    prompt, model = prompts(6, 5), MODEL.clone(**change)
    moving = {"bank": bank("lora", K), "users": numbers(6, 2, CONFIG.hidden_size)}
    mix = numbers(6, K, seed=1)
    value = jax.jit(jax.value_and_grad(loss, argnums=3), static_argnums=(0, 1))
    found, wanted = (value(model, LORA, x, moving, mix, prompt.tokens, prompt.valid) for x in both(kind))
    close(found, wanted)
    assert all(np.abs(leaf).max() > 1e-3 for leaf in jax.tree.leaves(wanted[1]))


@pytest.mark.parametrize(
    ("decode", "kind"),
    [
        ("transposed", "nf4"),
        *(pytest.param(name, "int8", marks=pytest.mark.slow) for name in ("scan", "transposed", "unrolled")),
        *(pytest.param(name, "nf4", marks=pytest.mark.slow) for name in ("scan", "unrolled")),
    ],
)
def test_samples_are_those_of_the_floats(decode, kind):
    prompt, model = prompts(6, 5), MODEL.clone(decode=decode)
    sampling = Sampling(max_new_tokens=8, eos_ids=(1,), pad_id=0)

    @jax.jit
    def sample(params):
        policies = Policies(model, LORA, params, bank("lora", K), numbers(6, K, seed=1))
        return generate(policies, sampling, prompt, jax.random.key(5))

    found, wanted = map(sample, both(kind))
    np.testing.assert_array_equal(found.tokens, wanted.tokens)
    np.testing.assert_allclose(found.logps, wanted.logps, rtol=1e-4, atol=1e-4)


def test_biases_and_an_untied_head_stay_floats():
    config = ModelConfig(**{**vars(CONFIG), "biases": ("query", "down", "head"), "tie_embeddings": False})
    model = Decoder(config)
    small = quantize_params(Int8(), init_params(model, jax.random.key(0)))
    assert small["head"]["kernel"].dtype == small["layers"]["mlp"]["down"]["bias"].dtype == jnp.float32
    prompt = prompts(3, 5)

    @jax.jit
    def logits(params):
        policies = Policies(model, LORA, params, None, None)
        return policies.logits(policies(prompt.tokens, prompt.valid)[0])

    close(logits(small), logits(dequantized(small)))


def test_activations_in_half_precision_are_within_its_rounding():
    model, prompt = MODEL.clone(dtype=jnp.bfloat16), prompts(6, 5)

    @functools.partial(jax.jit, static_argnums=0)
    def hidden(model, params):
        return Policies(model, LORA, params, None, None)(prompt.tokens, prompt.valid)[0].astype(jnp.float32)

    small, floats = both("int8")
    exact = hidden(MODEL, floats)
    error = np.abs(hidden(model, small) - exact).max()
    assert error < 1.5 * np.abs(hidden(model, floats) - exact).max()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_sharded_it_is_the_same(kind):
    mesh, prompt = make_mesh({"data": 2, "fsdp": 2, "tensor": 2}), prompts(8, 5)
    model = MODEL.clone(batch_sharding=batch_sharding(mesh), remat="full")
    small, floats = both(kind)
    moving = {"bank": bank("lora", K), "users": numbers(8, 2, CONFIG.hidden_size)}
    mix = numbers(8, K, seed=1)
    value = jax.jit(jax.value_and_grad(loss, argnums=3), static_argnums=(0, 1))
    found = value(model, LORA, shard_params(mesh, small), shard_params(mesh, moving), mix, prompt.tokens, prompt.valid)
    close(found, value(MODEL, LORA, floats, moving, mix, prompt.tokens, prompt.valid))


@pytest.mark.parametrize("kind", ["nf4", pytest.param("int8", marks=pytest.mark.slow)])
def test_no_float_copy_of_all_layers_is_kept_for_the_gradient(kind):
    """The backward pass converts the kernels of each layer again."""
    config = CONFIG.replace(num_layers=64, hidden_size=128, intermediate_size=512, head_dim=64)
    model = Decoder(config)
    shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    small = jax.eval_shape(functools.partial(quantize_params, QUANTIZATIONS[kind]), shapes)
    adapters = jax.eval_shape(lambda p: init_bank(p, LORA, 1, jax.random.key(0)), shapes)
    tokens = jax.ShapeDtypeStruct((2, 4), jnp.int32)

    def memory(params):
        def run(moving, params, tokens):
            valid = jnp.ones(tokens.shape, bool)
            return loss(model, LORA, params, {"bank": moving, "users": None}, jnp.ones((1, 1)), tokens, valid)

        program = jax.jit(jax.grad(run)).lower(adapters, params, tokens).compile()
        return program.memory_analysis().temp_size_in_bytes

    held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes["layers"]))
    assert memory(small) - memory(shapes) < held / 8


@pytest.mark.parametrize("kind", ["int8", pytest.param("nf4", marks=pytest.mark.slow)])
def test_kernels_are_converted_inside_the_loop_that_samples(kind):
    """A conversion in the entry computation would keep float kernels of all layers."""
    model, prompt = MODEL.clone(decode="unrolled"), prompts(2, 3)
    shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    sampling = Sampling(max_new_tokens=4, eos_ids=(1,), pad_id=0)

    @jax.jit
    def sample(params):
        policies = Policies(model, LORA, params, None, None)
        return generate(policies, sampling, prompt, jax.random.key(5))

    small = jax.eval_shape(functools.partial(quantize_params, KINDS[kind]), shapes)
    text = sample.lower(small).compile().as_text()
    kernel = f"= f32[{CONFIG.hidden_size},{CONFIG.intermediate_size}]"
    inside, entry = text.split("\nENTRY ")
    assert kernel in inside and kernel not in entry


# ---- loading and accounting


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [None, {"fsdp": 2, "tensor": 4}])
def test_a_folder_is_read_as_what_its_floats_become(tmp_path, sizes, kind):
    save_params(tmp_path / "model", CONFIG, base())
    place = functools.partial(leaf_sharding, make_mesh(sizes)) if sizes else None
    found = load_params(tmp_path / "model", place=place, quantization=KINDS[kind])
    close(found, both(kind)[0], 1e-6)
    if place:
        for name, leaf in found["layers"]["mlp"]["down"].items():
            assert leaf.sharding.is_equivalent_to(place(f"layers/mlp/down/{name}", leaf.shape), leaf.ndim)


def test_whole_blocks_of_4_bits_are_split_as_their_kernel():
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    for name, kernel in (("up", ("fsdp", "tensor")), ("down", ("tensor", "fsdp"))):
        codes = leaf_sharding(mesh, f"layers/mlp/{name}/codes", (2, 8, 32, 16)).spec
        assert codes == PartitionSpec(None, kernel[0], None, kernel[1])
        assert leaf_sharding(mesh, f"layers/mlp/{name}/absmax", (2, 8, 16)).spec == PartitionSpec(None, *kernel)
    few = leaf_sharding(mesh, "layers/mlp/up/codes", (2, 6, 32, 16)).spec  # 6 blocks do not divide over 4
    assert few == PartitionSpec(None, None, None, "tensor")


def test_matmuls_with_integers_cost_the_bytes_of_integers():
    x = jax.ShapeDtypeStruct((4, 512), jnp.bfloat16)
    kernel = jax.ShapeDtypeStruct((512, 1024), jnp.bfloat16)
    stored = jax.eval_shape(Int8().quantize, kernel)
    product = jax.make_jaxpr(lambda x, stored: Int8().product(stored, jnp.bfloat16)(x))(x, stored)
    costs = [matmul_cost(traced.jaxpr) for traced in (jax.make_jaxpr(matmul)(x, kernel), product)]
    assert costs[0].flops == costs[1].flops
    assert costs[0].bytes - costs[1].bytes == 512 * 1024


def test_bytes_of_a_kernel():
    kernel = jax.ShapeDtypeStruct((4, 512, 1024), jnp.bfloat16)
    bits = {
        kind: sum(8 * x.size * x.dtype.itemsize for x in jax.tree.leaves(jax.eval_shape(one.quantize, kernel)))
        / kernel.size
        for kind, one in QUANTIZATIONS.items()
    }
    assert bits == {"int8": 8 + 32 / 512, "nf4": 4 + 32 / 64}


# ---- errors


@pytest.mark.parametrize("kind", KINDS)
def test_full_parameters_are_refused(kind):
    small, full = both(kind)[0], fresh_bank("full", 2)
    with pytest.raises(UserError, match=r"model\.quantize.*adapter\.rank"):
        init_bank(small, ADAPTERS["full"], 2, jax.random.key(0))
    with pytest.raises(UserError, match=r"model\.quantize.*adapter\.rank"):
        mixed_params(small, full, jnp.ones((1, 2)))


@pytest.mark.parametrize(
    ("kind", "rank", "message"),
    [("int4", 8, "int4.*int8, nf4"), ("int8", 0, "adapter.rank"), ("nf4", 0, "adapter.rank")],
)
def test_settings_that_do_not_go_together_are_refused(kind, rank, message):
    with pytest.raises(UserError, match=message):
        check_quantize(kind, rank)


def test_a_kernel_that_blocks_do_not_divide_is_named_before_anything_is_read(tmp_path):
    save_params(tmp_path / "model", CONFIG, base())
    message = (
        "model.quantize=nf4: layers/attention/key/kernel has 16 inputs, which blocks of 64 do not divide; use int8"
    )
    with pytest.raises(UserError, match=message):
        load_params(tmp_path / "model", quantization=QUANTIZATIONS["nf4"], report=lambda *_: pytest.fail("reads"))
    with pytest.raises(UserError, match=message):
        jax.eval_shape(functools.partial(quantize_params, QUANTIZATIONS["nf4"]), base())
