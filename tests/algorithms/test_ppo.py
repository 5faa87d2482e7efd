"""The PPO update: K policies train as K runs, and a bandit is solved as theory says."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.small_policies import (
    ADAPTERS,
    CONFIG,
    EOS,
    KINDS,
    MODEL,
    PAD,
    bank,
    base,
    close,
    fresh_bank,
    noise,
    prompts,
    value_heads,
)

from pjrlhf.algorithms.policy import PPOConfig, ppo_gradient, ppo_loss, ppo_update
from pjrlhf.merging.lora import merge_dense
from pjrlhf.models.adapters import AdapterConfig, init_bank
from pjrlhf.models.config import ModelConfig
from pjrlhf.models.decoder import Decoder, init_params
from pjrlhf.rollout.experience import ExperienceConfig, experience, init_value_heads, sample
from pjrlhf.rollout.sampler import Sampling
from pjrlhf.training.optimizer import make_optimizer, per_ingredient

K, n, P, N = 3, 4, 4, 5
TEMPERATURE = 0.9
LIMIT = 0.5  # of the gradient norm
OPTIMIZERS = {
    "sgd": {"name": "sgd", "learning_rate": 0.1, "max_grad_norm": LIMIT},
    "adamw": {"learning_rate": 1e-2, "eps": 1e-5, "max_grad_norm": LIMIT},
}


def fabricated(scale, spread=1.0, seed=0):
    """Rows of experience [K, n, ...] with made-up numbers; `scale` [K] multiplies advantages and returns."""
    rng = np.random.default_rng(seed)
    prompt = jax.tree.map(np.asarray, prompts(K * n, P, seed))
    mask = np.arange(N) < rng.integers(1, N + 1, (K * n, 1))
    response = np.where(mask, rng.integers(2, CONFIG.vocab_size, (K * n, N)), PAD).astype(np.int32)
    scale = np.repeat(scale, n)[:, None]
    floats = {
        "logps": -3.0 + 0.3 * rng.standard_normal((K * n, N)),
        "values": spread * rng.standard_normal((K * n, N)),
        "advantages": scale * rng.standard_normal((K * n, N)),
        "returns": scale * rng.standard_normal((K * n, N)),
    }
    rows = {name: (x * mask).astype(np.float32) for name, x in floats.items()}
    rows |= {name: rows[name][..., None] for name in ("values", "returns")}  # of one head
    rows |= {
        "tokens": np.concatenate([prompt["prompt"], response], 1),
        "valid": np.concatenate([prompt["valid"], mask], 1),
        "response": response,
        "mask": mask.astype(np.float32),
    }
    return {name: x.reshape(K, n, *x.shape[1:]) for name, x in rows.items()}


def only(tree, k):
    return jax.tree.map(lambda x: x[k : k + 1], tree)


def trainable(kind, spread=1.0):
    return {"bank": bank(kind, K), "heads": jax.tree.map(lambda x: spread * x, value_heads(K))}


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def update(kind, optimizer, config, trainable, opt_state, base, rows, key):
    tx = per_ingredient(make_optimizer(OPTIMIZERS[optimizer], 100))
    return ppo_update(MODEL, ADAPTERS[kind], config, tx, TEMPERATURE, trainable, opt_state, base, rows, key)


@functools.partial(jax.jit, static_argnums=(0, 1))
def gradient(kind, config, trainable, base, rows):
    loss = jax.value_and_grad(ppo_loss, argnums=4, has_aux=True)
    (_, metrics), found = loss(MODEL, ADAPTERS[kind], config, TEMPERATURE, trainable, base, rows)
    return found, metrics


@pytest.mark.parametrize(
    "kind, optimizer",
    [
        pytest.param("lora", "adamw", marks=pytest.mark.slow),
        pytest.param("lora", "sgd", marks=pytest.mark.slow),
        pytest.param("full", "sgd", marks=pytest.mark.slow),
    ],
)
def test_policies_in_one_program_train_as_in_programs_of_their_own(kind, optimizer):
    """Two epochs of two minibatches, clipping active for one policy and idle for another."""
    rows, start = fabricated(np.array([0.05, 1.0, 300.0]), 0.05), trainable(kind, 0.05)
    found, _ = gradient(kind, PPOConfig(), start, base(), rows)
    norms = [float(optax.global_norm(only(found, k))) for k in range(K)]
    assert norms[0] < LIMIT < norms[1] < norms[2] / 100

    tx = per_ingredient(make_optimizer(OPTIMIZERS[optimizer], 100))

    def run(start, rows):
        key = jax.random.key(7)
        return update(kind, optimizer, PPOConfig(), start, tx.init(start), base(), rows, key)

    together = run(start, rows)
    for k in range(K):
        close(only(together, k), run(only(start, k), only(rows, k)))
    moved = jax.tree.map(lambda x, y: np.abs(x - y).max(), together[0], start)
    assert min(jax.tree.leaves(moved)) > 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_one_policy_do_not_reach_the_parameters_of_another(kind):
    rows = fabricated(np.ones(K))
    changed = jax.tree.map(np.copy, rows)
    changed["advantages"][1] *= -50
    changed["response"][1, :, 0] = 9
    one, two = (gradient(kind, PPOConfig(), trainable(kind), base(), x)[0] for x in (rows, changed))
    for k in (0, 2):
        close(only(one, k), only(two, k), 1e-6)
    assert optax.global_norm(jax.tree.map(jnp.subtract, only(one, 1), only(two, 1))) > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_how_many_gradients_are_taken_at_once_does_not_matter(kind):
    rows, config = fabricated(np.ones(K)), PPOConfig(policies_at_once=1)
    found = jax.jit(ppo_gradient, static_argnums=(0, 1, 2))(
        MODEL, ADAPTERS[kind], config, TEMPERATURE, trainable(kind), base(), rows
    )
    for one, other in zip(found, gradient(kind, PPOConfig(), trainable(kind), base(), rows), strict=True):
        close(one, other, 1e-5)
    with pytest.raises(ValueError, match="gradients of 3 policies cannot be taken of 2 at once"):
        ppo_gradient(MODEL, ADAPTERS[kind], PPOConfig(policies_at_once=2), 1.0, None, None, rows)


def test_full_parameters_have_the_gradient_of_a_plain_model():
    """The loss written out for one model, without Policies."""
    rows, config = only(fabricated(np.ones(K)), 0), PPOConfig(entropy_coef=0.02)
    plain = jax.tree.map(lambda x: x[0], trainable("full"))
    one = {name: x[0] for name, x in rows.items()}

    def loss(plain):
        hidden, _ = MODEL.apply({"params": plain["bank"]}, one["tokens"], one["valid"])
        hidden = hidden[:, P - 1 : -1]
        logits = MODEL.apply({"params": plain["bank"]}, hidden, method="logits") / TEMPERATURE
        everything = jax.nn.log_softmax(logits)
        logps = (everything * jax.nn.one_hot(one["response"], CONFIG.vocab_size)).sum(-1)
        values = hidden @ plain["heads"]["kernel"][0] + plain["heads"]["bias"][0]
        entropy = -(jnp.exp(everything) * everything).sum(-1)
        ratio = jnp.exp(logps - one["logps"])
        surrogate = jnp.minimum(ratio * one["advantages"], jnp.clip(ratio, 0.8, 1.2) * one["advantages"])
        before, after = one["values"][..., 0], one["returns"][..., 0]
        near = before + jnp.clip(values - before, -0.2, 0.2)
        errors = jnp.maximum(jnp.square(values - after), jnp.square(near - after))
        return ((-surrogate + 0.1 * 0.5 * errors - 0.02 * entropy) * one["mask"]).sum() / one["mask"].sum()

    start = jax.tree.map(lambda x: x[None], plain)
    got, _ = gradient("full", config, start, None, rows)
    close(jax.tree.map(lambda x: x[0], got), jax.jit(jax.grad(loss))(plain))


def rolled_out(kind, policies):
    """Rows as the stage makes them."""
    sampling = Sampling(max_new_tokens=N, eos_id=EOS, pad_id=PAD, temperature=TEMPERATURE)
    prompt, one_hot = prompts(K * n, P), jnp.eye(K)

    @jax.jit
    def run(base, policies, prompt):
        key, values = jax.random.key(3), value_heads(K)
        response = sample(MODEL, ADAPTERS[kind], sampling, base, policies, one_hot, prompt, key)
        state, scores = {"bank": policies, "heads": values}, jnp.linspace(-1, 1, K * n)[:, None]
        config, beta = ExperienceConfig(), jnp.full(K, 0.1)
        return experience(MODEL, ADAPTERS[kind], config, sampling, base, state, prompt, response, scores, beta)[0]

    return run(base(), policies, prompt)


@pytest.mark.parametrize("name, policies", [pytest.param("fresh", fresh_bank, marks=pytest.mark.slow), ("moved", bank)])
def test_the_first_step_sees_ratio_one(name, policies):
    rows = rolled_out("lora", policies("lora", K))
    start = {"bank": policies("lora", K), "heads": value_heads(K)}
    _, metrics = gradient("lora", PPOConfig(), start, base(), rows)
    np.testing.assert_allclose(metrics["val/ratio"], 1.0, atol=1e-6)
    np.testing.assert_allclose(metrics["policy/approxkl_avg"], 0.0, atol=1e-11)
    np.testing.assert_array_equal(metrics["policy/clipfrac_avg"], 0.0)
    tx = per_ingredient(make_optimizer(OPTIMIZERS["sgd"], 100))
    *_, metrics = update("lora", "sgd", PPOConfig(), start, tx.init(start), base(), rows, jax.random.key(0))
    np.testing.assert_allclose(metrics["policy/first_approxkl"], 0.0, atol=1e-11)
    assert (metrics["policy/approxkl_avg"] > 1e-9).all()  # later steps have moved


def test_minibatches_must_divide_the_rollouts():
    rows = fabricated(np.ones(K))
    with pytest.raises(ValueError, match="4 rollouts per policy cannot be split into 3 equal minibatches"):
        ppo_update(MODEL, ADAPTERS["lora"], PPOConfig(minibatches=3), None, 1.0, None, None, None, rows, None)


# ---- a bandit: one prompt, one token, a fixed reward per arm

ARMS, PULLS, STEPS = 8, 128, 80
BANDIT = Decoder(
    ModelConfig(
        vocab_size=ARMS, hidden_size=32, intermediate_size=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8
    )
)
WORTH = np.array([0.3, 0.2, 0.6, 0.0, 1.0, 0.5, 0.7, 0.4], np.float32)
# Policy 0 likes what policy 1 dislikes; policy 2 is free of the reference.
TABLE = np.stack([WORTH, -WORTH, WORTH])
BETAS = np.array([0.5, 0.4, 0.0], np.float32)


def train_on_bandit(adapter, params, learning_rate, seed=4):
    """Bank after training, and KL [STEPS, 3] on the way."""
    sampling = Sampling(max_new_tokens=1, eos_id=-1, pad_id=0)
    config, ppo = ExperienceConfig(missing_eos_penalty=0.0), PPOConfig(epochs=2, minibatches=2)
    tx = per_ingredient(make_optimizer({"learning_rate": learning_rate, "schedule": "linear"}, 4 * STEPS))
    one_hot, prompt = jnp.eye(3), jnp.full((3 * PULLS, 1), 2, jnp.int32)
    prompt = {"prompt": prompt, "valid": jnp.ones_like(prompt, bool)}

    @jax.jit
    def run(params, start, keys):
        def step(carry, key):
            policies, opt_state = carry
            draw, shuffle = jax.random.split(key)
            response = sample(BANDIT, adapter, sampling, params, policies["bank"], one_hot, prompt, draw)
            arms = response["tokens"].reshape(3, PULLS)
            scores = jnp.take_along_axis(jnp.asarray(TABLE), arms, 1).reshape(-1, 1)
            collected = params, policies, prompt, response, scores, jnp.asarray(BETAS)
            rows, statistics = experience(BANDIT, adapter, config, sampling, *collected)
            trained = policies, opt_state, params, rows, shuffle
            policies, opt_state, _ = ppo_update(BANDIT, adapter, ppo, tx, 1.0, *trained)
            return (policies, opt_state), statistics["objective/kl"]

        return jax.lax.scan(step, (start, tx.init(start)), keys)

    heads = init_value_heads(3, 1, BANDIT.config.hidden_size)
    start = {"bank": init_bank(params, adapter, 3, jax.random.key(1)), "heads": heads}
    (policies, _), kl = run(params, start, jax.random.split(jax.random.key(seed), STEPS))
    return policies["bank"], np.asarray(kl)


def probabilities(params):
    """Of the arms, [ARMS]."""
    hidden, _ = BANDIT.apply({"params": params}, jnp.full((1, 1), 2), jnp.ones((1, 1), bool))
    return np.asarray(jax.nn.softmax(BANDIT.apply({"params": params}, hidden, method="logits")[0, 0]), np.float64)


def distance(p, q):
    """Total variation."""
    return 0.5 * np.abs(p - q).sum()


@pytest.mark.slow
@pytest.mark.parametrize(
    "rank, learning_rate",
    [pytest.param(4, 0.02, id="lora"), pytest.param(0, 0.005, id="full")],
)
def test_ppo_finds_the_optimum_of_a_bandit(rank, learning_rate):
    """With KL to the reference the best policy is pi_ref(a) exp(r(a) / beta) / Z, without it the best arm."""
    adapter = AdapterConfig(rank=rank, alpha=8.0)
    params = noise(init_params(BANDIT, jax.random.key(0)), 1, 0.1)
    reference = probabilities(params)
    trained, kl = train_on_bandit(adapter, params, learning_rate)
    got = []
    for k in range(3):
        one = jax.tree.map(lambda x, k=k: x[k], trained)
        got.append(probabilities(merge_dense(params, [one], [adapter.scale], [1.0]) if rank else one))
    for k in (0, 1):
        best = reference * np.exp(TABLE[k] / BETAS[k])
        best /= best.sum()
        assert distance(reference, best) > 0.15
        assert distance(got[k], best) < 0.02
        np.testing.assert_allclose(kl[-20:, k].mean(), (best * np.log(best / reference)).sum(), atol=0.05)
    assert reference[WORTH.argmax()] < 0.1 and got[2][WORTH.argmax()] > 0.9
