"""Packed rows give the log-probs, rewards and gradients of plain rows, in every packing mode."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pjrlhf.data import packing
from pjrlhf.data.batching import collate_completion, pad_left, pad_right
from pjrlhf.data.packing import MODES, NOWHERE, PackLayout, pack
from pjrlhf.errors import UserError
from pjrlhf.models.adapters import AdapterConfig, Policies, init_bank
from pjrlhf.models.config import ModelConfig
from pjrlhf.models.decoder import Decoder, init_params
from pjrlhf.rollout import scoring

CONFIG = ModelConfig(
    vocab_size=37, hidden_size=16, intermediate_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4
)
MODEL, ADAPTER = Decoder(CONFIG), AdapterConfig(rank=2, alpha=4.0)
E, K, U = 6, 2, 3
# Rows of an example each, and rows of several; the other two where there is time.
some_modes = pytest.mark.parametrize(
    "mode", [pytest.param(mode, marks=() if mode in ("share", "join") else pytest.mark.slow) for mode in MODES]
)


@pytest.fixture(scope="module")
def examples():
    rng = np.random.default_rng(0)
    prompts = [rng.integers(1, 37, n).tolist() for n in (2, 7, 4, 3, 5, 6)]
    answers = [
        [rng.integers(1, 37, n).tolist() for n in pair] for pair in ((3, 1), (2, 6), (5, 5), (1, 4), (2, 2), (4, 3))
    ]
    return prompts, answers


def packed(examples, mode, length=40, **settings):
    return pack(*examples, PackLayout(mode=mode, length=length, pad_id=0, **settings))


@pytest.fixture(scope="module")
def policy():
    base = init_params(MODEL, jax.random.key(0))
    bank = init_bank(base, ADAPTER, K, jax.random.key(1))
    leaves, treedef = jax.tree.flatten(bank)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    bank = treedef.unflatten([x + 0.3 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)])
    return {
        "base": base,
        "bank": bank,
        "mix": jax.random.normal(jax.random.key(3), (E, K)),
        "users": jax.random.normal(jax.random.key(4), (E, U, 16)),
        "heads": scoring.init_heads(K, 16, jax.random.key(5)),
    }


@pytest.fixture(scope="module")
def plain(policy, examples):
    """(log-probs, rewards) [E, 2] of every answer in a row of its own."""
    prompts = [prompt for prompt in examples[0] for _ in range(2)]
    prompt = pad_left(prompts, 7, 0)
    answer = pad_right([answer for pair in examples[1] for answer in pair], 6, 0)
    tokens, valid = (jnp.concatenate(both, axis=1) for both in zip(prompt, answer, strict=True))
    mix, users = (jnp.repeat(policy[name], 2, axis=0) for name in ("mix", "users"))

    @jax.jit
    def score():
        policies = Policies(MODEL, ADAPTER, policy["base"], policy["bank"], mix, users)
        logps, _ = scoring.sequence_logps(policies, tokens, valid, 7)
        return logps.reshape(E, 2), scoring.rewards(policies, policy["heads"], mix, tokens, valid).reshape(E, 2)

    return score()


@pytest.mark.parametrize("mode", MODES)
def test_packed_rows_score_as_plain_ones(policy, examples, plain, mode):
    rows = packed(examples, mode=mode, num_user_tokens=U)

    @jax.jit
    def score():
        policies = Policies(MODEL, ADAPTER, policy["base"], policy["bank"], policy["mix"], policy["users"])
        logps = scoring.packed_logps(policies, rows).reshape(E, 2)
        return logps, scoring.packed_rewards(policies, policy["heads"], policy["mix"], rows).reshape(E, 2)

    logps, rewards = score()
    np.testing.assert_allclose(logps, plain[0], rtol=2e-5)
    np.testing.assert_allclose(rewards, plain[1], rtol=2e-4, atol=2e-5)


@some_modes
def test_tokens_that_are_not_scored_are_context(policy, examples, mode):
    rng = np.random.default_rng(2)
    prompts, answers = examples
    masks = [[None if i % 3 == 0 else rng.random(len(a)) < 0.6 for a in pair] for i, pair in enumerate(answers)]
    rows = pack(prompts, answers, PackLayout(mode=mode, length=40, pad_id=0), masks)
    flat = [
        (p, a, m)
        for p, pair, some in zip(prompts, answers, masks, strict=True)
        for a, m in zip(pair, some, strict=True)
    ]
    plain = [{"prompt": p, "completion": a, "completion_mask": m} for p, a, m in flat]
    batch = collate_completion(plain, prompt_length=7, completion_length=6, pad_id=0)

    @jax.jit
    def score():
        policies = Policies(MODEL, ADAPTER, policy["base"], None, None)
        alone = scoring.sequence_logps(policies, batch.tokens, batch.valid, 7, batch.scored)
        return scoring.packed_logps(policies, rows), *alone

    together, alone, counts = score()
    np.testing.assert_allclose(together, alone, rtol=2e-5, atol=1e-6)
    np.testing.assert_array_equal(counts, [len(a) if m is None else m.sum() for _, a, m in flat])
    assert 0 < counts.sum() < sum(len(a) for _, a, _ in flat)
    whole = collate_completion(
        [row | {"completion_mask": None} for row in plain], prompt_length=7, completion_length=6, pad_id=0
    )
    assert whole.scored is None and batch.scored.shape == (2 * E, 6)


def test_windows_and_learned_positions_count_tokens_of_the_answer(examples):
    """The second answer follows the first in its row, but its positions continue the prompt."""
    model = Decoder(CONFIG.replace(windows=(3, 0), positions="learned", max_length=32))
    base = jax.jit(init_params, static_argnums=0)(model, jax.random.key(0))

    @jax.jit
    def score(rows):
        return scoring.packed_logps(Policies(model, ADAPTER, base, None, None), rows)

    alone, shared = (score(packed(examples, mode=mode)) for mode in ("none", "pack"))
    np.testing.assert_allclose(shared, alone, rtol=2e-5)


def test_every_way_of_packing_has_the_same_gradient(policy, examples):
    weight = np.random.default_rng(1).standard_normal(2 * E).astype(np.float32)

    def gradient(mode):
        rows = packed(examples, mode=mode, num_user_tokens=U)

        def loss(moving):
            policies = Policies(MODEL, ADAPTER, policy["base"], moving["bank"], moving["mix"], moving["users"])
            return scoring.packed_logps(policies, rows) @ weight

        return jax.jit(jax.grad(loss))({name: policy[name] for name in ("bank", "mix", "users")})

    first, *others = [gradient(mode) for mode in MODES]
    assert all(np.abs(leaf).max() > 1e-3 for leaf in jax.tree.leaves(first))
    for other in others:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), first, other)


@pytest.mark.parametrize("mode, attention", [("pack", "einsum"), ("join", "blocks")])
def test_full_parameters_packed_by_group(policy, examples, monkeypatch, mode, attention):
    """Each of K full-parameter policies has its own rows, both in a loop and vectorised."""
    monkeypatch.setattr("pjrlhf.models.attention.BLOCK", 8)
    model = MODEL.clone(attention=attention)
    params = jax.tree.map(lambda x: jnp.stack([x, 1.1 * x]), policy["base"])
    full = AdapterConfig(rank=0)
    mix = jnp.eye(2)

    @jax.jit
    def rewards(params, heads, rows):
        policies = Policies(model, full, None, params, jnp.eye(len(heads)))
        return scoring.packed_rewards(policies, policy["heads"], heads, rows).reshape(E, 2)

    rows = packed(examples, mode=mode, groups=2).by_group(2)
    both = rewards(params, mix, rows)
    for k in range(2):
        alone = packed(examples, mode="none")
        found = rewards(jax.tree.map(lambda x, k=k: x[k : k + 1], params), mix[k : k + 1], alone)
        half = slice(k * E // 2, (k + 1) * E // 2)
        np.testing.assert_allclose(both[half], found[half], rtol=1e-4, atol=1e-5)


def test_what_is_packed(examples):
    total = {mode: packed(examples, mode=mode) for mode in MODES}
    answers = sum(len(answer) for pair in examples[1] for answer in pair)
    for mode, rows in total.items():
        real = rows.segment > 0
        copies = 2 if mode == "none" else 1
        assert real.sum() == copies * sum(map(len, examples[0])) + answers, mode
        assert (rows.answer < NOWHERE).sum() == answers and (rows.tokens[~real] == 0).all()
        # Every answer once, and its last token at its last position.
        assert sorted(rows.last_answer[rows.last_answer < NOWHERE]) == list(range(2 * E))
        parts = rows.tokens.reshape(len(rows.last), -1)
        for z, m in zip(*np.nonzero(rows.last_answer < NOWHERE), strict=True):
            e, a = divmod(int(rows.last_answer[z, m]), 2)
            assert parts[z, rows.last[z, m]] == examples[1][e][a][-1]
    assert len(total["none"].tokens) == 2 * E and len(total["share"].tokens) == E
    assert 1 < len(total["pack"].tokens) < E and len(total["join"].tokens) == 1


def test_rows_are_joined_for_attention_by_blocks_alone():
    assert packing.choose_mode("auto", "blocks") == "join" and packing.choose_mode("auto", "cudnn") == "share"
    assert packing.choose_mode("pack", "blocks") == "pack"


@pytest.mark.parametrize("mode", MODES)
def test_rows_and_parts_are_a_multiple_of_the_devices(examples, mode):
    for groups in (1, 2, 3):
        rows = packed(examples, mode=mode, multiple=4, groups=groups)
        for name in ("tokens", "columns", "last"):
            assert len(getattr(rows, name)) % 4 == 0 and len(getattr(rows, name)) % groups == 0
        group = np.arange(len(rows.tokens)) // (len(rows.tokens) // groups)
        for g in range(groups):
            owners = rows.owner[group == g][rows.segment[group == g] > 0]
            assert set(owners) == set(range(g * E // groups, (g + 1) * E // groups))


@some_modes
def test_repeated_rows_number_their_answers_and_owners_on(policy, examples, mode):
    """Two copies score as two batches would, each copy with its own users and weights of adapters."""
    rows = packed(examples, mode=mode, num_user_tokens=U)
    both = {name: jnp.concatenate([policy[name], 1.5 * policy[name]]) for name in ("mix", "users")}

    @jax.jit
    def score(rows, mix, users):
        policies = Policies(MODEL, ADAPTER, policy["base"], policy["bank"], mix, users)
        return scoring.packed_logps(policies, rows), scoring.packed_rewards(policies, policy["heads"], mix, rows)

    found = score(rows.repeat(2), both["mix"], both["users"])
    copies = [score(rows, *(both[name][i : i + E] for name in ("mix", "users"))) for i in (0, E)]
    for whole, *parts in zip(found, *copies, strict=True):
        assert np.abs(parts[0] - parts[1]).max() > 1e-2
        np.testing.assert_allclose(whole, np.concatenate(parts), rtol=1e-4, atol=1e-4)
    assert rows.repeat(2).answers == 2 * rows.answers == 4 * E


@some_modes
def test_an_empty_answer_is_none_and_an_empty_example_takes_no_place(policy, examples, plain, mode):
    prompts, answers = examples
    thinner = [[[], pair[1]] if e == 2 else pair for e, pair in enumerate(answers)]
    rows = packed(([*prompts, []], [*thinner, [[], []]]), mode=mode, num_user_tokens=0)

    @jax.jit
    def score(rows):
        policies = Policies(MODEL, ADAPTER, policy["base"], None, None)
        heads, one = policy["heads"], jnp.eye(K)[:1]
        return scoring.packed_logps(policies, rows), scoring.packed_rewards(policies, heads, one, rows)

    whole = score(packed(examples, mode="none"))
    for found, expected in zip(score(rows), whole, strict=True):
        found, expected = (np.array(x).reshape(-1, 2) for x in (found, expected))
        assert len(found) == E + 1 and not found[E].any() and found[2, 0] == 0
        expected[2, 0] = 0
        np.testing.assert_allclose(found[:E], expected, rtol=2e-4, atol=1e-5)
    least = sum(map(len, prompts)) + sum(len(answer) for pair in thinner for answer in pair)
    assert (rows.segment > 0).sum() >= least and not (rows.segment == E + 1).any()


def test_a_fixed_number_of_rows(examples):
    rows = packed(examples, mode="pack", length=16, rows=8)
    assert rows.tokens.shape == (8, 16)
    with pytest.raises(ValueError, match="6 examples do not fit into 2 rows of 16"):
        packed(examples, mode="pack", length=16, rows=2)


def test_rows_are_filled_well_and_those_of_some_rows_alone_are_the_same():
    rng = np.random.default_rng(3)
    sizes = rng.integers(1, 60, 500).tolist()
    bins = packing.bins_of(range(500), sizes, 100)
    assert sorted(i for row in bins for i in row) == list(range(500))
    filled = [sum(sizes[i] for i in row) for row in bins]
    assert max(filled) <= 100 and len(bins) <= np.ceil(sum(sizes) / 100 * 11 / 9)
    some = sorted(i for row in bins[3:40:4] for i in row)
    assert packing.bins_of(some, sizes, 100) == bins[3:40:4]


def test_what_does_not_fit_is_refused(examples):
    with pytest.raises(ValueError, match="an example of 15 tokens does not fit into rows of 14"):
        packed(examples, mode="pack", length=14)
    with pytest.raises(ValueError, match="6 examples cannot be split into 4"):
        packed(examples, mode="share", groups=4)
    with pytest.raises(UserError, match=r"data\.packing 'yes': unknown; choose one of auto, none, share, pack, join"):
        packing.choose_mode("yes", "xla")


@pytest.mark.parametrize("part", [2**28, 2500, 4 * 37 * 3])
@pytest.mark.parametrize("entropies", [0.0, 1.0])
def test_chunked_log_probs_are_those_of_the_plain_softmax(policy, monkeypatch, part, entropies):
    """So are their gradients, for every chunk size, with logits saved or recomputed."""
    monkeypatch.setattr(scoring, "LOGIT_BYTES", part)
    states = jax.random.normal(jax.random.key(6), (3, 11, 16))
    target = jax.random.randint(jax.random.key(7), (3, 11), 0, 37)

    def found(score):
        def loss(base, states):
            logps, entropy = score(Policies(MODEL, ADAPTER, base, None, None), states)
            return (logps * jnp.arange(33.0).reshape(3, 11)).sum() + entropies * (entropy**2).sum(), (logps, entropy)

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(policy["base"], states)

    def plain(policies, states):
        exact = jax.nn.log_softmax(policies.logits(states) / 0.7)
        return jnp.take_along_axis(exact, target[..., None], -1)[..., 0], -(jnp.exp(exact) * exact).sum(-1)

    got, want = found(lambda policies, states: scoring.token_logps(policies, states, target, 0.7)), found(plain)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-4), got, want)
