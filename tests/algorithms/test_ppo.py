"""The PPO update: K policies train as K runs, and a bandit is solved as theory says."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.small_policies import (
    CONFIG,
    EOS,
    KINDS,
    MODEL,
    PAD,
    backbone,
    bank,
    close,
    fresh_bank,
    noise,
    prompts,
    value_heads,
)

from pjrlhf.algorithms.ppo import PPOConfig, ppo_gradient, ppo_loss, ppo_update
from pjrlhf.merging.lora import merge_dense
from pjrlhf.models.adapters import AdapterConfig, Backbone, init_bank
from pjrlhf.models.config import ModelConfig
from pjrlhf.models.decoder import Decoder, init_params
from pjrlhf.objectives.scalarization import WeightedSum
from pjrlhf.rollout.batches import Experience, Prompts, ScoredRollout, TargetBatch, split_rows
from pjrlhf.rollout.experience import ExperienceConfig, Recipe, experience, init_value_heads, sample
from pjrlhf.rollout.sampler import Sampling
from pjrlhf.training.optimizer import OptimizerSettings, make_optimizer, per_ingredient
from pjrlhf.training.state import State

K, n, P, N = 3, 4, 4, 5
TEMPERATURE = 0.9
LIMIT = 0.5  # of the gradient norm
OPTIMIZERS = {
    "sgd": OptimizerSettings(name="sgd", learning_rate=0.1, max_grad_norm=LIMIT),
    "adamw": OptimizerSettings(learning_rate=1e-2, eps=1e-5, max_grad_norm=LIMIT),
}


def fabricated(scale, spread=1.0, seed=0):
    """Experience [K, n, ...] with made-up numbers; `scale` [K] multiplies advantages and returns."""
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
    floats = {name: (x * mask).astype(np.float32) for name, x in floats.items()}
    floats |= {name: floats[name][..., None] for name in ("values", "returns")}  # of one head
    tokens, valid = np.concatenate([prompt.tokens, response], 1), np.concatenate([prompt.valid, mask], 1)
    return split_rows(Experience(tokens, valid, **floats, temperature=TEMPERATURE), K)


def only(tree, k):
    return jax.tree.map(lambda x: np.asarray(x)[k : k + 1], tree)


def trainable(kind, spread=1.0):
    return {"bank": bank(kind, K), "value_heads": jax.tree.map(lambda x: spread * x, value_heads(K))}


def state_of(trainable, tx):
    return State.create(jax.random.key(0), trainable, tx)


@functools.partial(jax.jit, static_argnums=(0, 1))
def update(optimizer, config, backbone, state, rows, key):
    tx = per_ingredient(make_optimizer(OPTIMIZERS[optimizer], 100))
    return ppo_update(config, tx, backbone, state, rows, key)


@functools.partial(jax.jit, static_argnums=0)
def gradient(config, backbone, trainable, rows):
    loss = jax.value_and_grad(ppo_loss, argnums=2, has_aux=True)
    (_, metrics), found = loss(config, backbone, trainable, rows)
    return found, metrics


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "optimizer"), [("lora", "adamw"), ("lora", "sgd"), ("full", "sgd")])
def test_policies_in_one_program_train_as_in_programs_of_their_own(kind, optimizer):
    """Two epochs of two minibatches, clipping active for one policy and idle for another."""
    rows, start = fabricated(np.array([0.05, 1.0, 300.0]), 0.05), trainable(kind, 0.05)
    found, _ = gradient(PPOConfig(), backbone(kind), start, rows)
    norms = [float(optax.global_norm(only(found, k))) for k in range(K)]
    assert norms[0] < LIMIT < norms[1] < norms[2] / 100

    tx = per_ingredient(make_optimizer(OPTIMIZERS[optimizer], 100))

    def run(start, rows):
        state, metrics = update(optimizer, PPOConfig(), backbone(kind), state_of(start, tx), rows, jax.random.key(7))
        return state.trainable, state.opt_state, metrics

    together = run(start, rows)
    for k in range(K):
        close(only(together, k), run(only(start, k), only(rows, k)))
    moved = jax.tree.map(lambda x, y: np.abs(x - y).max(), together[0], start)
    assert min(jax.tree.leaves(moved)) > 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_one_policy_do_not_reach_the_parameters_of_another(kind):
    rows = fabricated(np.ones(K))
    changed = jax.tree.map(np.copy, rows)
    changed.advantages[1] *= -50
    changed.response[1, :, 0] = 9
    one, two = (gradient(PPOConfig(), backbone(kind), trainable(kind), x)[0] for x in (rows, changed))
    for k in (0, 2):
        close(only(one, k), only(two, k), 1e-6)
    gaps = jax.tree.map(lambda x, y: np.abs(x - y).max(), only(one, 1), only(two, 1))
    assert max(jax.tree.leaves(gaps)) > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_how_many_gradients_are_taken_at_once_does_not_matter(kind):
    rows, config = fabricated(np.ones(K)), PPOConfig(policies_at_once=1)
    found = jax.jit(ppo_gradient, static_argnums=0)(config, backbone(kind), trainable(kind), rows)
    for one, other in zip(found, gradient(PPOConfig(), backbone(kind), trainable(kind), rows), strict=True):
        close(one, other, 1e-5)
    with pytest.raises(ValueError, match="gradients of 3 policies cannot be taken of 2 at once"):
        ppo_gradient(PPOConfig(policies_at_once=2), backbone(kind), None, rows)
    mixed = rows.replace(mix=np.ones((K, n, K), np.float32))
    with pytest.raises(ValueError, match="gradients of 3 policies cannot be taken of 1 at once"):
        ppo_gradient(PPOConfig(policies_at_once=1), backbone(kind), None, mixed)


@pytest.mark.parametrize("together", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_parts_of_a_minibatch_add_up_to_its_gradient(together):
    """Parts with other numbers of tokens, one policy with hardly any."""
    rows, kind = fabricated(np.ones(K)), "lora"
    rows.valid[0, 1:, P:] = False
    whole, parts = (PPOConfig(entropy_coef=0.02, policies_at_once=together, accumulation_steps=i) for i in (1, 4))
    one, other = (
        jax.jit(ppo_gradient, static_argnums=0)(config, backbone(kind), trainable(kind), rows)
        for config in (whole, parts)
    )
    close(one, other, 1e-5)


def test_full_parameters_have_the_gradient_of_a_plain_model():
    """The loss written out for one model, without Policies."""
    rows, config = only(fabricated(np.ones(K)), 0), PPOConfig(entropy_coef=0.02)
    plain = jax.tree.map(lambda x: x[0], trainable("full"))
    names = ("tokens", "valid", "response", "mask", "logps", "advantages", "values", "returns")
    one = {name: getattr(rows, name)[0] for name in names}

    def loss(plain):
        hidden, _ = MODEL.apply({"params": plain["bank"]}, one["tokens"], one["valid"])
        hidden = hidden[:, P - 1 : -1]
        logits = MODEL.apply({"params": plain["bank"]}, hidden, method="logits") / TEMPERATURE
        everything = jax.nn.log_softmax(logits)
        logps = (everything * jax.nn.one_hot(one["response"], CONFIG.vocab_size)).sum(-1)
        values = hidden @ plain["value_heads"]["kernel"][0] + plain["value_heads"]["bias"][0]
        entropy = -(jnp.exp(everything) * everything).sum(-1)
        ratio = jnp.exp(logps - one["logps"])
        surrogate = jnp.minimum(ratio * one["advantages"], jnp.clip(ratio, 0.8, 1.2) * one["advantages"])
        before, after = one["values"][..., 0], one["returns"][..., 0]
        near = before + jnp.clip(values - before, -0.2, 0.2)
        errors = jnp.maximum(jnp.square(values - after), jnp.square(near - after))
        return ((-surrogate + 0.1 * 0.5 * errors - 0.02 * entropy) * one["mask"]).sum() / one["mask"].sum()

    start = jax.tree.map(lambda x: x[None], plain)
    got, _ = gradient(config, backbone("full").replace(base=None), start, rows)
    close(jax.tree.map(lambda x: x[0], got), jax.jit(jax.grad(loss))(plain))


def rolled_out(kind, policies):
    """Experience as the stage makes it."""
    sampling = Sampling(max_new_tokens=N, eos_ids=(EOS,), pad_id=PAD, temperature=TEMPERATURE)

    @jax.jit
    def run(backbone, policies, prompt):
        response = sample(backbone, policies, jnp.eye(K), prompt, sampling, jax.random.key(3))
        state, scores = {"bank": policies, "value_heads": value_heads(K)}, jnp.linspace(-1, 1, K * n).reshape(K, n, 1)
        recipe = Recipe(ExperienceConfig(), sampling, WeightedSum())
        return experience(recipe, backbone, state, one_objective(prompt, response, scores), jnp.full(K, 0.1))[0]

    return run(backbone(kind), policies, split_rows(prompts(K * n, P), K))


def one_objective(prompt, response, scores):
    group = jnp.zeros(scores.shape[:2], jnp.int32)
    return ScoredRollout(prompt, response, scores, TargetBatch(group[..., None], jnp.ones_like(scores), group))


@pytest.mark.parametrize("name, policies", [pytest.param("fresh", fresh_bank, marks=pytest.mark.slow), ("moved", bank)])
def test_the_first_step_sees_ratio_one(name, policies):
    rows = rolled_out("lora", policies("lora", K))
    start = {"bank": policies("lora", K), "value_heads": value_heads(K)}
    _, metrics = gradient(PPOConfig(), backbone("lora"), start, rows)
    np.testing.assert_allclose(metrics["val/ratio"], 1.0, atol=1e-6)
    np.testing.assert_allclose(metrics["policy/approxkl_avg"], 0.0, atol=1e-11)
    np.testing.assert_array_equal(metrics["policy/clipfrac_avg"], 0.0)
    tx = per_ingredient(make_optimizer(OPTIMIZERS["sgd"], 100))
    _, metrics = update("sgd", PPOConfig(), backbone("lora"), state_of(start, tx), rows, jax.random.key(0))
    np.testing.assert_allclose(metrics["policy/first_approxkl"], 0.0, atol=1e-11)
    assert (metrics["policy/approxkl_avg"] > 1e-9).all()  # later steps have moved


def test_minibatches_must_divide_the_rollouts():
    rows = fabricated(np.ones(K))
    with pytest.raises(ValueError, match="4 rollouts per policy cannot be split into 3 equal minibatches"):
        ppo_update(PPOConfig(minibatches=3), None, None, None, rows, None)


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
    sampling = Sampling(max_new_tokens=1, eos_ids=(-1,), pad_id=0)
    config, ppo = ExperienceConfig(missing_eos_penalty=0.0), PPOConfig(epochs=2, minibatches=2)
    tx = per_ingredient(make_optimizer(OptimizerSettings(learning_rate=learning_rate, schedule="linear"), 4 * STEPS))
    prompt = jnp.full((3, PULLS, 1), 2, jnp.int32)
    prompt = Prompts(prompt, jnp.ones_like(prompt, bool))
    recipe = Recipe(config, sampling, WeightedSum())

    @jax.jit
    def run(backbone, state, keys):
        def step(state, key):
            draw, shuffle = jax.random.split(key)
            response = sample(backbone, state.trainable["bank"], jnp.eye(3), prompt, sampling, draw)
            scores = jnp.take_along_axis(jnp.asarray(TABLE), response.tokens[..., 0], 1)[..., None]
            collected = one_objective(prompt, response, scores)
            rows, statistics = experience(recipe, backbone, state.trainable, collected, jnp.asarray(BETAS))
            state, _ = ppo_update(ppo, tx, backbone, state, rows, shuffle)
            return state, statistics["objective/kl"]

        return jax.lax.scan(step, state, keys)

    heads = init_value_heads(3, 1, BANDIT.config.hidden_size)
    start = {"bank": init_bank(params, adapter, 3, jax.random.key(1)), "value_heads": heads}
    state = state_of(start, tx)
    state, kl = run(Backbone(BANDIT, adapter, params), state, jax.random.split(jax.random.key(seed), STEPS))
    return state.trainable["bank"], np.asarray(kl)


@jax.jit
def log_probabilities(params):
    hidden, _ = BANDIT.apply({"params": params}, jnp.full((1, 1), 2), jnp.ones((1, 1), bool))
    return jax.nn.log_softmax(BANDIT.apply({"params": params}, hidden, method="logits")[0, 0])


def probabilities(params):
    """Of the arms, [ARMS]."""
    return np.exp(np.asarray(log_probabilities(params), np.float64))


def distance(p, q):
    """Total variation."""
    return 0.5 * np.abs(p - q).sum()


@pytest.mark.slow
@pytest.mark.parametrize("rank, learning_rate", [pytest.param(4, 0.02, id="lora"), pytest.param(0, 0.005, id="full")])
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
