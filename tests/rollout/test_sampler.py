"""Sampling draws from the right distribution, independently of cache, padding and other rows."""

import collections
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from support.small_policies import ADAPTERS, CONFIG, EOS, KINDS, MODEL, PAD, bank, base, close, prompts, wider

from pjrlhf.errors import UserError
from pjrlhf.models.adapters import Policies
from pjrlhf.models.decoder import Decoder, init_params
from pjrlhf.rollout import sampler, scoring
from pjrlhf.rollout.decoding import PolicyEnsemble
from pjrlhf.rollout.sampler import Sampling, generate, truncate

B, P, N, K = 8, 5, 7, 3
ENDLESS = -1  # an EOS that never occurs
ONE_HOT = np.eye(K, dtype=np.float32)
SOUPS = np.random.default_rng(0).dirichlet(np.ones(K), B).astype(np.float32)
GREEDY = Sampling(max_new_tokens=N, eos_ids=(ENDLESS,), pad_id=PAD, temperature=0.0)
WARM = Sampling(max_new_tokens=N, eos_ids=(EOS,), pad_id=PAD, temperature=0.7, top_k=6)
MIXES = {
    "base": ("lora", None),
    "a soup per row": ("lora", SOUPS),
    "base and ingredients": ("lora", np.concatenate([np.zeros((1, K), np.float32), ONE_HOT])),
    "full parameters": ("full", np.concatenate([ONE_HOT[:1], SOUPS[:1]])),
}


@functools.partial(jax.jit, static_argnums=(0, 1))
def _sample(kind, sampling, ids, base, bank, mix, prompt, key):
    # One compiled program for every choice of EOS and padding.
    sampling = dataclasses.replace(sampling, eos_ids=ids[0], pad_id=ids[1])
    return generate(Policies(MODEL, ADAPTERS[kind], base, bank, mix), sampling, prompt, key)


def sample(kind, sampling, mix, prompt, seed=0):
    ids = sampling.eos_ids, sampling.pad_id
    sampling = dataclasses.replace(sampling, eos_ids=(0,), pad_id=0)
    rest = base(), None if mix is None else bank(kind, K), mix, prompt, jax.random.key(seed)
    return jax.device_get(_sample(kind, sampling, ids, *rest))


@functools.partial(jax.jit, static_argnums=0)
def logits_of(kind, base, bank, mix, tokens, valid):
    policies = Policies(MODEL, ADAPTERS[kind], base, bank, mix)
    return policies.logits(policies(tokens, valid)[0])


def greedy_loop(kind, mix, prompt, count):
    lengths = np.asarray(prompt.valid).sum(1)
    tokens = np.zeros((B, P + count), np.int32)
    for b, n in enumerate(lengths):
        tokens[b, :n] = prompt.tokens[b, P - n :]
    found = []
    for _ in range(count):
        valid = np.arange(P + count) < lengths[:, None]
        logits = logits_of(kind, base(), None if mix is None else bank(kind, K), mix, tokens, valid)
        new = np.argmax(np.asarray(logits)[np.arange(B), lengths - 1], -1)
        tokens[np.arange(B), lengths] = new
        lengths = lengths + 1
        found.append(new)
    return np.stack(found, 1)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name == "a soup per row" else ()) for name in MIXES]
)
def test_greedy_decoding_is_the_argmax_of_the_full_forward(name):
    prompt = prompts(B, P)
    out = sample(MIXES[name][0], GREEDY, MIXES[name][1], prompt)
    np.testing.assert_array_equal(out.tokens, greedy_loop(*MIXES[name], prompt, N))
    assert out.valid.all() and out.tokens.dtype == jnp.int32


@pytest.mark.parametrize("kind", KINDS)
def test_unrolled_layers_write_the_same(kind):
    prompt = jax.tree.map(lambda x: jnp.tile(x, (K, 1)), prompts(B, P))

    @functools.partial(jax.jit, static_argnums=0)
    def draw(decode, base, bank):
        policies = Policies(MODEL.clone(decode=decode), ADAPTERS[kind], base, bank, ONE_HOT)
        return generate(policies, WARM, prompt, jax.random.key(3))

    one, *others = (draw(decode, base(), bank(kind, K)) for decode in ("scan", "unrolled", "transposed"))
    for other in others:
        np.testing.assert_array_equal(one.tokens, other.tokens)
        close(one.logps, other.logps)


def test_the_policies_differ():
    texts = [sample("lora", GREEDY, ONE_HOT[k : k + 1], prompts(B, P)).tokens for k in range(K)]
    assert all((texts[i] != texts[j]).any(1).sum() > B / 2 for i in range(K) for j in range(i))


@pytest.mark.parametrize("kind", ADAPTERS)
def test_all_ingredients_in_one_batch_write_what_each_writes_alone(kind):
    alone = prompts(B, P)
    together = jax.tree.map(lambda x: jnp.tile(x, (K, 1)), alone)
    got = sample(kind, GREEDY, ONE_HOT, together).tokens.reshape(K, B, N)
    for k in range(K):
        np.testing.assert_array_equal(got[k], sample(kind, GREEDY, ONE_HOT[k : k + 1], alone).tokens)


def with_eos(tokens, eos, pad):
    """The expected result for endless `tokens`, cut after `eos`."""
    ends = np.where((tokens == eos).any(1), np.argmax(tokens == eos, 1), N)
    valid = np.arange(N) <= ends[:, None]
    return np.where(valid, tokens, pad), valid


@pytest.mark.parametrize("pad_is_eos", [False, True])
def test_rows_end_with_eos_and_padding_follows(pad_is_eos):
    """EOS is a token that occurs in the endless text, early in some rows and never in others."""
    prompt = prompts(B, P)
    endless = np.asarray(sample("lora", GREEDY, SOUPS, prompt).tokens)
    eos = max(set(endless.flat), key=lambda token: len({*map(int, with_eos(endless, token, PAD)[1].sum(1))}))
    pad = int(eos) if pad_is_eos else PAD
    sampling = Sampling(max_new_tokens=N, eos_ids=(int(eos),), pad_id=pad, temperature=0.0)
    out = sample("lora", sampling, SOUPS, prompt)
    tokens, valid = with_eos(endless, eos, pad)
    np.testing.assert_array_equal(out.tokens, tokens)
    np.testing.assert_array_equal(out.valid, valid)
    assert not np.asarray(out.logps)[~valid].any()


def test_rows_end_with_the_first_of_several_tokens():
    prompt = prompts(B, P)
    endless = np.asarray(sample("lora", GREEDY, SOUPS, prompt).tokens)
    common = [token for token, _ in collections.Counter(endless.flat).most_common(3)]
    out = sample("lora", dataclasses.replace(GREEDY, eos_ids=tuple(map(int, common))), SOUPS, prompt)
    each = [with_eos(endless, token, PAD)[1] for token in common]
    valid = np.logical_and.reduce(each)
    assert all((valid != one).any() for one in each)  # each of the tokens ends a row
    np.testing.assert_array_equal(out.valid, valid)
    np.testing.assert_array_equal(out.tokens, np.where(valid, endless, PAD))
    with pytest.raises(UserError, match="eos_ids: is empty"):
        dataclasses.replace(GREEDY, eos_ids=())
    assert len(set(valid.sum(1))) > 1 and (~valid).any()


@pytest.mark.parametrize(
    "decode, kind",
    [
        ("transposed", "soups"),
        pytest.param("scan", "soups", marks=pytest.mark.slow),
        pytest.param("transposed", "users", marks=pytest.mark.slow),
        pytest.param("transposed", "combined", marks=pytest.mark.slow),
    ],
)
def test_rows_that_are_done_are_dropped(monkeypatch, decode, kind):
    """Eight rows, compacted to two, give the samples of eight rows without compaction."""
    prompt, model, worked = prompts(B, P), MODEL.clone(decode=decode), []

    class Counted:
        def __call__(self, tokens, *rest):
            if tokens.shape[1] == 1:
                jax.debug.callback(lambda: worked.append(len(tokens)))
            return super().__call__(tokens, *rest)

    def run(fewest):
        monkeypatch.setattr(sampler, "MIN_COMPACT_ROWS", fewest)
        worked.clear()

        @jax.jit
        def draw(base, bank):
            counted = [type("Counted", (Counted, each), {}) for each in (Policies, PolicyEnsemble)]
            users = jnp.ones((B, 2, CONFIG.hidden_size)) * jnp.arange(B)[:, None, None] if kind == "users" else None
            if kind == "combined":
                policies = counted[1](model, ADAPTERS["lora"], base, bank, jnp.asarray(SOUPS))
            else:
                mix = SOUPS if kind == "soups" else None
                policies = counted[0](model, ADAPTERS["lora"], base, bank, mix, users)
            sampling = Sampling(max_new_tokens=100, eos_ids=(EOS,), pad_id=PAD, temperature=2.0)
            return generate(policies, sampling, prompt, jax.random.key(1))

        found = jax.device_get(draw(base(), bank("lora", K)))
        jax.effects_barrier()
        return found, list(worked)

    (got, few), (want, many) = run(2), run(B)
    np.testing.assert_array_equal(got.tokens, want.tokens)
    np.testing.assert_array_equal(got.valid, want.valid)
    close(got.logps, want.logps)
    ends = want.valid.sum(1)
    assert len(few) == len(many) == ends.max() - 1
    assert set(many) == {B}
    alive = [(ends > i + 1).sum() for i in range(len(few))]
    assert few == [B if n > B // 4 else B // 4 for n in alive] and set(few) == {8, 2}


def test_log_probabilities_are_those_of_scoring():
    prompt = prompts(B, P)
    out = sample("lora", WARM, SOUPS, prompt)

    @jax.jit
    def score(base, bank, out):
        policies = Policies(MODEL, ADAPTERS["lora"], base, bank, SOUPS)
        tokens, valid = scoring.join(prompt.tokens, out.tokens), scoring.join(prompt.valid, out.valid)
        states = scoring.response_states(policies, tokens, valid, P)
        return scoring.token_logps(policies, states, out.tokens, WARM.temperature)[0]

    close(out.logps, np.where(out.valid, score(base(), bank("lora", K), out), 0.0))
    assert (out.logps < 0).any()


def test_prompt_padding_changes_nothing():
    prompt = prompts(B, P)
    want = sample("lora", GREEDY, SOUPS, prompt)
    got = sample("lora", GREEDY, SOUPS, wider(prompt, 6, fill=9))
    np.testing.assert_array_equal(got.tokens, want.tokens)
    close(got.logps, want.logps)


def test_decoding_stops_when_every_row_has_ended():
    """Counts the actual forward passes."""
    calls = []

    class Counted(Policies):
        def __call__(self, tokens, *rest):
            jax.debug.callback(lambda: calls.append(tokens.shape[1]))
            return super().__call__(tokens, *rest)

    # The same request twice, so that both rows end at the same time.
    prompt = jax.tree.map(lambda x: jnp.tile(x, (2, 1)), prompts(1, P))

    @jax.jit
    def run(base, eos):
        policies = Counted(MODEL, ADAPTERS["lora"], base, None, None)
        sampling = Sampling(max_new_tokens=12, eos_ids=(eos,), pad_id=PAD, temperature=0.0)
        return generate(policies, sampling, prompt, jax.random.key(0))

    def passes(eos):
        calls.clear()
        out = jax.device_get(run(base(), eos))
        jax.effects_barrier()
        return out.tokens[0], len(calls)

    endless, most = passes(ENDLESS)
    assert most >= 12
    ends = list(endless).index(endless[5])
    tokens, few = passes(endless[5])
    assert 1 <= few <= ends + 2
    np.testing.assert_array_equal(tokens, np.where(np.arange(12) <= ends, endless, PAD))


# ---- drawing


TABLE = np.log(np.array([[0.5, 0.25, 0.125, 0.125], [0.1, 0.2, 0.3, 0.4]], np.float32))


@pytest.mark.parametrize(
    "top_k, top_p, kept",
    [
        (0, 1.0, ["1111", "1111"]),
        (1, 1.0, ["1000", "0001"]),
        (2, 1.0, ["1100", "0011"]),
        (3, 1.0, ["1111", "0111"]),  # ties with the last one are kept
        (9, 1.0, ["1111", "1111"]),
        (0, 0.3, ["1000", "0001"]),
        (0, 0.45, ["1000", "0011"]),
        (0, 0.69, ["1100", "0011"]),
        (0, 0.85, ["1111", "0111"]),  # a tie at the threshold
        (0, 0.999, ["1111", "1111"]),
        (0, 1e-6, ["1000", "0001"]),
        (2, 0.6, ["1000", "0011"]),  # top-p over what top-k left: 2/3 and 4/7
    ],
)
def test_truncation_keeps_the_smallest_set(top_k, top_p, kept):
    got = np.asarray(truncate(TABLE, top_k, top_p))
    want = np.array([[c == "1" for c in row] for row in kept])
    np.testing.assert_array_equal(np.isfinite(got), want)
    np.testing.assert_array_equal(got[want], TABLE[want])


def test_top_1_is_greedy():
    prompt = prompts(B, P)
    hot = Sampling(max_new_tokens=N, eos_ids=(ENDLESS,), pad_id=PAD, temperature=2.0, top_k=1)
    np.testing.assert_array_equal(
        sample("lora", hot, SOUPS, prompt).tokens, sample("lora", GREEDY, SOUPS, prompt).tokens
    )


@pytest.mark.slow
@pytest.mark.parametrize("top_k, top_p", [(0, 1.0), (6, 0.7)])
def test_frequencies_are_those_of_the_softmax(top_k, top_p):
    rows, temperature = 8192, 0.7
    prompt = jax.tree.map(lambda x: jnp.repeat(x[:1], rows, axis=0), prompts(1, 3))
    sampling = Sampling(
        max_new_tokens=1, eos_ids=(ENDLESS,), pad_id=PAD, temperature=temperature, top_k=top_k, top_p=top_p
    )
    tokens = np.asarray(sample("lora", sampling, None, prompt).tokens)[:, 0]
    logits = logits_of("lora", base(), None, None, prompt.tokens[:1], prompt.valid[:1])[0, -1]

    def surprise(temperature):
        """p-value of the observed counts."""
        expected = rows * np.asarray(jax.nn.softmax(truncate(logits[None] / temperature, top_k, top_p)[0]), np.float64)
        counts = np.bincount(tokens, minlength=CONFIG.vocab_size)
        assert not counts[expected == 0].any()
        likely = expected > 5
        counts, expected = (np.append(x[likely], x[~likely].sum()) for x in (counts, expected))
        expected = np.maximum(expected, 1e-9)
        return scipy.stats.chisquare(counts, expected * counts.sum() / expected.sum()).pvalue

    assert surprise(temperature) > 1e-3
    if not sampling.truncated:
        assert surprise(1.0) < 1e-9  # the test has power


def test_draws_depend_on_the_key_alone():
    first, again, other = (sample("lora", WARM, SOUPS, prompts(B, P), seed).tokens for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_rows_with_the_same_prompt_draw_independently():
    prompt = jax.tree.map(lambda x: jnp.repeat(x[:1], B, axis=0), prompts(1, P))
    endless = dataclasses.replace(WARM, eos_ids=(ENDLESS,))
    tokens = sample("lora", endless, np.repeat(SOUPS[:1], B, axis=0), prompt).tokens
    assert len({tuple(map(int, row)) for row in tokens}) == B


@pytest.mark.parametrize(
    "setting, name",
    [
        *[({"top_p": value}, "top_p") for value in (0.0, 1.5, float("nan"))],
        *[({"temperature": value}, "temperature") for value in (-0.1, float("nan"), float("inf"))],
        *[({"max_new_tokens": value}, "max_new_tokens") for value in (0, -5)],
        ({"top_k": -1}, "top_k"),
    ],
)
def test_impossible_settings_are_refused(setting, name):
    with pytest.raises(UserError, match=name):
        Sampling(**{"max_new_tokens": N, "eos_ids": (EOS,), "pad_id": PAD} | setting)


@pytest.mark.slow
def test_learned_positions_are_counted_with_user_tokens():
    """Beyond the last one, embeddings would be NaN."""
    model = Decoder(CONFIG.replace(positions="learned", max_length=P + N + 2))
    params = init_params(model, jax.random.key(0))
    prompt = prompts(B, P)

    def logps(count):
        users = jnp.zeros((B, count, CONFIG.hidden_size))
        return generate(Policies(model, ADAPTERS["lora"], params, None, None, users), GREEDY, prompt, jax.random.key(1))

    assert np.isfinite(logps(2).logps).all()
    with pytest.raises(
        UserError, match=f"prompts of {P + 3} tokens, user tokens included, and answers of {N} do not fit"
    ):
        logps(3)
