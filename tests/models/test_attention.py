"""Blockwise, fused and plain attention agree, in values and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pjrlhf.errors import UserError
from pjrlhf.models import splash
from pjrlhf.models.attention import attend, attend_cached, attend_used, choose
from pjrlhf.models.blockwise import BLOCK, attend_blocks
from pjrlhf.models.config import ModelConfig
from pjrlhf.models.decoder import Decoder, init_params
from pjrlhf.models.splash import attend_splash
from pjrlhf.parallel.mesh import batch_sharding, make_mesh
from pjrlhf.parallel.roofline import matmul_cost

B, C, N = 3, 6, 8


def inputs(T, H, G):
    """Query, key, value, and the cotangent of the output."""
    rng = np.random.default_rng(T)
    return [rng.normal(size=(B, T, heads, C)).astype(np.float32) for heads in (H, G, G, H)]


def packed(T):
    """Mask of packed rows: a prompt with two answers that do not attend to each other, another segment, padding."""
    segment, branch = np.ones((B, T), int), np.zeros((B, T), int)
    for b, (first, second, end) in enumerate([(T // 4, T // 2, T), (1, T // 2, T - 3), (0, 0, 1)]):
        branch[b, first:second], branch[b, second:], segment[b, end:] = 1, 2, 0
    segment[0, 3 * T // 4 :], branch[0, 3 * T // 4 :] = 2, 0
    own = (branch[:, None] == 0) | (branch[:, None] == branch[..., None])
    return np.tril(own & (segment[:, None] > 0) & (segment[:, None] == segment[..., None]))


def sliding(T):
    """Mask of a sliding window with left padding in one row, so that some queries attend nowhere."""
    distance = np.arange(T)[:, None] - np.arange(T)
    mask = np.repeat(((distance >= 0) & (distance < 5))[None], B, 0)
    mask[1, :, :9] = False
    return mask


def with_gradients(attention, mask, softcap, query, key, value, gradient):
    """The output and three gradients, with zeros for queries that attend nowhere."""
    looks = mask.any(-1)[..., None, None]

    @jax.jit
    def run(query, key, value, mask):
        out, back = jax.vjp(lambda *x: jnp.where(looks, attention(*x, mask, softcap=softcap), 0.0), query, key, value)
        return out, back(gradient)

    return run(query, key, value, mask)


def crossed():
    """All cases; half of them are quick, in which every two of shape, heads and cap meet."""
    for i, shape in enumerate([(32, packed), (21, packed), (24, sliding), (5, packed)]):
        for j, heads in enumerate([(4, 2), (3, 3)]):
            for k, softcap in enumerate([None, 2.0]):
                yield pytest.param(*shape, *heads, softcap, marks=[pytest.mark.slow] if (i + j + k) % 2 else [])


@pytest.mark.parametrize("T, mask, H, G, softcap", crossed())
def test_blocks_are_exact(T, mask, H, G, softcap):
    def blocks(*x, softcap):
        return attend_blocks(*x, softcap, block=N)

    def plain(*x, softcap):
        return attend(*x, "einsum", softcap)

    case = mask(T), softcap, *inputs(T, H, G)
    got, want = with_gradients(blocks, *case), with_gradients(plain, *case)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=2e-6), got, want)


def test_who_looks_nowhere_sees_zeros_and_moves_nothing():
    query, key, value, gradient = inputs(16, 2, 2)
    out, back = jax.vjp(lambda *x: attend_blocks(*x, jnp.zeros((B, 16, 16), bool), block=N), query, key, value)
    for x in (out, *back(gradient)):
        np.testing.assert_array_equal(x, 0.0)


def test_scores_far_from_zero_stay_finite():
    query, key, value, gradient = inputs(16, 2, 2)
    case = packed(16), None, 1e3 * query, 1e3 * key, value, gradient
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4),
        with_gradients(lambda *x, softcap: attend_blocks(*x, softcap, block=N), *case)[0],
        with_gradients(lambda *x, softcap: attend(*x, "einsum", softcap), *case)[0],
    )


def test_half_precision_keeps_its_dtype_and_sums_in_float32():
    T, mask = 32, packed(32)
    x = [jnp.asarray(a, jnp.bfloat16) for a in inputs(T, 4, 2)]
    got = with_gradients(lambda *a, softcap: attend_blocks(*a, softcap, block=N), mask, None, *x)
    want = with_gradients(
        lambda *a, softcap: attend(*a, "einsum", softcap), mask, None, *[a.astype(jnp.float32) for a in x]
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(got)} == {jnp.dtype(jnp.bfloat16)}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a.astype(jnp.float32), b, rtol=0.05, atol=0.05), got, want)


def test_one_cpu_takes_blocks_where_rows_are_longer_than_one():
    assert choose("auto", "cpu", "float32", 1) == "blocks"
    assert choose("auto", "cpu", "float32", 8) == "einsum"
    query, key, value, _ = inputs(2 * BLOCK, 2, 2)

    def loops(slots):
        x = [a[:, :slots] for a in (query, key, value)]
        return "while" in str(jax.make_jaxpr(lambda *a: attend(*a, packed(slots), "blocks"))(*x))

    assert loops(2 * BLOCK) and not loops(BLOCK)


@pytest.mark.parametrize("remat, forwards", [("none", 1), ("dots", 1), ("full", 2)])
def test_what_cudnn_computes_is_counted_and_kept(monkeypatch, remat, forwards):
    """Traced without a GPU: two matmuls forward and four backward, over the causal half."""
    cudnn = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91300)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda *_: True)
    T, H, C = 128, 4, 64
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_heads": H, "num_kv_heads": 2, "head_dim": C}
    config = ModelConfig(vocab_size=11, num_layers=2, **shape)
    model = Decoder(config, dtype=jnp.bfloat16, remat=remat)
    params = jax.eval_shape(lambda: init_params(model.clone(attention="einsum"), jax.random.key(0)))

    def flops(attention):
        def loss(params, tokens):
            hidden, _ = model.clone(attention=attention).apply({"params": params}, tokens, jnp.ones((B, T), bool))
            return hidden.astype(jnp.float32).sum()

        return matmul_cost(jax.make_jaxpr(jax.grad(loss))(params, jnp.zeros((B, T), jnp.int32)).jaxpr).flops

    one = config.num_layers * 2 * B * H * T * T * C
    products = {"none": 6, "dots": 8, "full": 8}[remat]  # of the plain form: both remat policies recompute two matmuls
    causal = (T + 1) / 2 / T
    assert flops("einsum") - products * one == pytest.approx(flops("cudnn") - (2 * forwards + 4) * causal * one)


@pytest.mark.slow
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("T, mask", [(200, packed), (128, sliding)])
@pytest.mark.parametrize("H, G", [(4, 2), (2, 1)])
def test_splash_is_exact(T, mask, H, G, softcap):
    """JAX's kernel for TPUs, in interpret mode."""

    def fused(*x, softcap):
        return attend_splash(*x, softcap, block=128, interpret=True)

    def plain(*x, softcap):
        return attend(*x, "einsum", softcap)

    case = mask(T), softcap, *inputs(T, H, G)
    got, want = with_gradients(fused, *case), with_gradients(plain, *case)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-4), got, want)


@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_splash_on_several_devices(sizes):
    """Each device computes its own rows and heads; FLOPs are counted over all devices."""
    mesh = make_mesh(sizes)
    rows = batch_sharding(mesh)
    x = [jnp.asarray(np.tile(a, (3, 1, 1, 1))[:8], jnp.float32) for a in inputs(128, 4, 2)[:3]]
    mask = jnp.asarray(np.tile(packed(128), (3, 1, 1))[:8])

    def fused(*x):
        return attend_splash(*x, mask, batch_sharding=rows, block=128, interpret=True)

    def plain(*x):
        return attend(*x, mask, "einsum")

    looks = np.asarray(mask.any(-1))[..., None, None]
    got, want = (np.where(looks, jax.jit(one)(*x), 0.0) for one in (fused, plain))
    np.testing.assert_allclose(got, want, atol=1e-5, rtol=1e-4)
    flops = [matmul_cost(jax.make_jaxpr(one)(*x).jaxpr).flops for one in (fused, plain)]
    assert flops[0] == flops[1] == 8 * 2 * 2 * 4 * 128 * 128 * C


def test_splash_is_for_tpus():
    assert choose("auto", "tpu", "bfloat16", 16) == choose("splash", "tpu", "bfloat16", 16) == "splash"
    with pytest.raises(UserError, match="is a kernel for TPUs, not for cpu"):
        choose("splash", "cpu", "float32", 1)


def test_splash_leaves_to_xla_what_it_cannot_share():
    rows = batch_sharding(make_mesh({"fsdp": 8}))
    assert not splash.unsupported((8, 512, 4, 64), rows) and not splash.unsupported((3, 512, 4, 64), None)
    assert "rows" in splash.unsupported((9, 512, 4, 64), rows)
    assert "tokens" in splash.unsupported((8, 40, 4, 64), rows)
    q, k, v, _ = inputs(9, 4, 2)
    found = str(jax.make_jaxpr(lambda *x: attend(*x, packed(9), "splash"))(q, k, v))
    assert "pallas_call" not in found


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize(("T", "M", "window"), [(1, 300, 999), (5, 384, 999), (3, 129, 999), (5, 384, 20)])
def test_blocks_of_a_cache_are_exact_and_rows_do_not_see_each_other(T, M, window, softcap):
    """Bit for bit, whatever the lengths of other rows."""
    rng = np.random.default_rng(0)
    query = rng.normal(size=(3, T, 4, 8)).astype(np.float32)
    key, value = (rng.normal(size=(3, 2, M, 8)).astype(np.float32) for _ in range(2))
    lengths = np.array([T, M // 2, M])

    def mask(rows):
        distance = (lengths[rows] - T)[:, None, None] + np.arange(T)[:, None] - np.arange(M)
        return (distance >= 0) & (distance < window)

    run = jax.jit(functools.partial(attend_used, softcap=softcap))
    got = run(query, key, value, mask([0, 1, 2]))
    np.testing.assert_allclose(got, attend_cached(query, key, value, mask([0, 1, 2]), softcap), rtol=1e-5, atol=1e-6)
    for row in range(3):
        others = [row] * 3
        np.testing.assert_array_equal(run(query[others], key[others], value[others], mask(others))[0], got[row])
