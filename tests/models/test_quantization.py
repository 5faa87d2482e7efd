"""A quantised base computes what a base with the dequantised kernels computes."""

import functools

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.small_policies import ADAPTERS, CONFIG, MODEL, bank, base, close, fresh_bank, prompts

from pjrlhf.errors import UserError
from pjrlhf.models.adapters import Policies, init_bank, mixed_params
from pjrlhf.models.config import ModelConfig
from pjrlhf.models.decoder import Decoder, init_params
from pjrlhf.models.huggingface import load_params, save_params
from pjrlhf.models.matmul import FEW_ROWS, matmul, matmul_transposed
from pjrlhf.models.quantization import check_quantize, quantize, quantize_params
from pjrlhf.parallel.mesh import batch_sharding, leaf_sharding, make_mesh, shard_params
from pjrlhf.parallel.roofline import matmul_cost
from pjrlhf.rollout.sampler import Sampling, generate

LORA, K = ADAPTERS["lora"], 3


def numbers(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def dequantized(params):
    """The base with dequantised kernels."""
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    for path in [path for path, leaf in flat.items() if leaf.dtype == jnp.int8]:
        flat[path] = flat[path] * flat.pop(path.removesuffix("kernel") + "scale")[..., None, :]
    return flax.traverse_util.unflatten_dict(flat, sep="/")


@functools.cache
def both():
    """(quantised base, its dequantised form)."""
    small = quantize_params(base())
    return small, dequantized(small)


# ---- numbers


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_no_number_moves_by_more_than_half_a_step_of_its_column(dtype):
    kernel = (numbers(2, 50, 7) * jnp.geomspace(1e-3, 1e3, 7)).astype(dtype)
    found = quantize(kernel)
    assert found["kernel"].dtype == jnp.int8 and found["scale"].dtype == jnp.float32
    wide = np.asarray(kernel, np.float64)
    np.testing.assert_allclose(found["scale"], np.abs(wide).max(1) / 127, rtol=1e-6)
    steps = np.abs(found["kernel"] * np.asarray(found["scale"], np.float64)[:, None] - wide) / found["scale"][:, None]
    assert 0.4 < steps.max() <= 0.5 + 1e-4


def test_a_column_on_the_grid_is_kept_exactly_and_one_of_zeros_stays_zero():
    columns = jnp.stack([jnp.arange(-127.0, 128.0) / 64, jnp.zeros(255)], axis=1)
    found = quantize(columns)
    np.testing.assert_array_equal(found["kernel"] * found["scale"], columns)
    np.testing.assert_array_equal(quantize(found["kernel"] * found["scale"])["kernel"], found["kernel"])


def test_what_is_quantised_are_the_kernels_of_the_layers():
    small = flax.traverse_util.flatten_dict(quantize_params(base()), sep="/")
    before = flax.traverse_util.flatten_dict(base(), sep="/")
    kernels = {path for path in before if path.startswith("layers/") and path.endswith("/kernel")}
    assert len(kernels) == 7
    assert {path for path, leaf in small.items() if leaf.dtype == jnp.int8} == kernels
    for path in before.keys() - kernels:
        assert small[path] is before[path]
    assert small.keys() - before.keys() == {path.replace("/kernel", "/scale") for path in kernels}


# ---- matmuls


@pytest.mark.parametrize("rows", [2, FEW_ROWS + 1])
@pytest.mark.parametrize("multiply", [matmul, lambda x, kernel: matmul_transposed(x, kernel.T)])
def test_products_with_integers_and_their_gradients_are_those_with_floats(multiply, rows):
    x, kernel = jnp.round(4 * numbers(rows, 7)), quantize(numbers(7, 4))["kernel"]  # integers: exact
    found, of_found = jax.vjp(lambda x: multiply(x, kernel), x)
    wanted, of_wanted = jax.vjp(lambda x: x @ kernel.astype(jnp.float32), x)
    np.testing.assert_array_equal(found, wanted)
    np.testing.assert_array_equal(of_found(jnp.sign(wanted))[0], of_wanted(jnp.sign(wanted))[0])


# ---- the decoder


def loss(model, adapter, base, moving, mix, tokens, valid):
    policies = Policies(model, adapter, base, moving["bank"], mix, moving["users"])
    tokens, valid = policies.reserve(tokens, valid)
    hidden, _ = policies(tokens, valid)
    return jnp.where(valid[..., None], jnp.sin(policies.logits(hidden)), 0.0).sum() / 100


@pytest.mark.parametrize("change", [{}, pytest.param({"remat": "full"}, marks=pytest.mark.slow)])
def test_values_and_gradients_of_adapters_and_inputs_are_those_of_the_floats(change):
    prompt, model = prompts(6, 5), MODEL.clone(**change)
    moving = {"bank": bank("lora", K), "users": numbers(6, 2, CONFIG.hidden_size)}
    mix = numbers(6, K, seed=1)
    value = jax.jit(jax.value_and_grad(loss, argnums=3), static_argnums=(0, 1))
    found, wanted = (value(model, LORA, x, moving, mix, prompt.tokens, prompt.valid) for x in both())
    close(found, wanted)
    assert all(np.abs(leaf).max() > 1e-3 for leaf in jax.tree.leaves(wanted[1]))


@pytest.mark.parametrize(
    "decode", ["unrolled", *(pytest.param(name, marks=pytest.mark.slow) for name in ("scan", "transposed"))]
)
def test_samples_are_those_of_the_floats(decode):
    prompt, model = prompts(6, 5), MODEL.clone(decode=decode)
    sampling = Sampling(max_new_tokens=8, eos_ids=(1,), pad_id=0)

    @jax.jit
    def sample(params):
        policies = Policies(model, LORA, params, bank("lora", K), numbers(6, K, seed=1))
        return generate(policies, sampling, prompt, jax.random.key(5))

    found, wanted = map(sample, both())
    np.testing.assert_array_equal(found.tokens, wanted.tokens)
    np.testing.assert_allclose(found.logps, wanted.logps, rtol=1e-4, atol=1e-4)


def test_biases_and_an_untied_head_stay_floats():
    config = ModelConfig(**{**vars(CONFIG), "biases": ("query", "down", "head"), "tie_embeddings": False})
    model = Decoder(config)
    small = quantize_params(init_params(model, jax.random.key(0)))
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

    small, floats = both()
    exact = hidden(MODEL, floats)
    error = np.abs(hidden(model, small) - exact).max()
    assert error < 1.5 * np.abs(hidden(model, floats) - exact).max()


@pytest.mark.slow
def test_sharded_it_is_the_same():
    mesh, prompt = make_mesh({"data": 2, "fsdp": 2, "tensor": 2}), prompts(8, 5)
    model = MODEL.clone(batch_sharding=batch_sharding(mesh), remat="full")
    small, floats = both()
    moving = {"bank": bank("lora", K), "users": numbers(8, 2, CONFIG.hidden_size)}
    mix = numbers(8, K, seed=1)
    value = jax.jit(jax.value_and_grad(loss, argnums=3), static_argnums=(0, 1))
    found = value(model, LORA, shard_params(mesh, small), shard_params(mesh, moving), mix, prompt.tokens, prompt.valid)
    close(found, value(MODEL, LORA, floats, moving, mix, prompt.tokens, prompt.valid))


def test_no_float_copy_of_all_layers_is_kept_for_the_gradient():
    """The backward pass converts the kernels of each layer again."""
    config = CONFIG.replace(num_layers=64, hidden_size=128, intermediate_size=512)
    model = Decoder(config)
    shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    small = jax.eval_shape(quantize_params, shapes)
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


def test_kernels_are_converted_inside_the_loop_that_samples():
    """A conversion in the entry computation would keep float kernels of all layers."""
    model, prompt = MODEL.clone(decode="unrolled"), prompts(2, 3)
    shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    sampling = Sampling(max_new_tokens=4, eos_ids=(1,), pad_id=0)

    @jax.jit
    def sample(params):
        policies = Policies(model, LORA, params, None, None)
        return generate(policies, sampling, prompt, jax.random.key(5))

    text = sample.lower(jax.eval_shape(quantize_params, shapes)).compile().as_text()
    kernel = f"= f32[{CONFIG.hidden_size},{CONFIG.intermediate_size}]"
    inside, entry = text.split("\nENTRY ")
    assert kernel in inside and kernel not in entry


# ---- loading and accounting


@pytest.mark.parametrize("sizes", [None, {"fsdp": 8}])
def test_a_folder_is_read_as_what_its_floats_become(tmp_path, sizes):
    save_params(tmp_path / "model", CONFIG, base())
    place = functools.partial(leaf_sharding, make_mesh(sizes)) if sizes else None
    found = load_params(tmp_path / "model", place=place, quantized=True)
    close(found, both()[0], 1e-6)
    if place:
        kernel, scale = (found["layers"]["mlp"]["down"][name] for name in ("kernel", "scale"))
        assert kernel.sharding.is_equivalent_to(place("layers/mlp/down/kernel", kernel.shape), kernel.ndim)
        assert scale.sharding.is_equivalent_to(place("layers/mlp/down/scale", scale.shape), scale.ndim)


def test_matmuls_with_integers_cost_the_bytes_of_integers():
    x = jax.ShapeDtypeStruct((4, 512), jnp.bfloat16)
    costs = [
        matmul_cost(jax.make_jaxpr(matmul)(x, jax.ShapeDtypeStruct((512, 1024), dtype)).jaxpr)
        for dtype in (jnp.bfloat16, jnp.int8)
    ]
    assert costs[0].flops == costs[1].flops
    assert costs[0].bytes - costs[1].bytes == 512 * 1024


# ---- errors


def test_full_parameters_are_refused():
    small, full = both()[0], fresh_bank("full", 2)
    with pytest.raises(UserError, match=r"model\.quantize.*adapter\.rank"):
        init_bank(small, ADAPTERS["full"], 2, jax.random.key(0))
    with pytest.raises(UserError, match=r"model\.quantize.*adapter\.rank"):
        mixed_params(small, full, jnp.ones((1, 2)))


@pytest.mark.parametrize(("kind", "rank", "message"), [("int4", 8, "int4.*int8"), ("int8", 0, "adapter.rank")])
def test_settings_that_do_not_go_together_are_refused(kind, rank, message):
    with pytest.raises(UserError, match=message):
        check_quantize(kind, rank)
