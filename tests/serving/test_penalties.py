"""Biases and penalties of tokens against their definitions, and that neutral ones change nothing."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from support import tiny_serving
from support.tiny_serving import K

from pjrlhf.errors import UserError
from pjrlhf.serving.penalties import BIASES, above_min_p, penalized, penalties_of
from pjrlhf.serving.tickets import Request

V = 11
NONE = Request(tokens=[1], max_new_tokens=1)
SOUP = np.array([0.7, -0.4, 0.9], np.float32)


def bent(logits, counts, *requests):
    penalties = penalties_of(requests, V)
    return np.asarray(penalized(jnp.asarray(logits), penalties, jnp.asarray(counts), jnp.ones(len(requests), bool)))


def test_penalties_are_those_of_their_definitions():
    """Each alone, and all together, on random logits."""
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 3, (5, V)).astype(np.int32)
    logits = rng.normal(size=(5, V)).astype(np.float32)
    prompt = [2, 7, 7]
    in_prompt = np.isin(np.arange(V), prompt)

    def request(**changes):
        return dataclasses.replace(NONE, tokens=prompt, **changes)

    def want(row, frequency=0.0, presence=0.0, repetition=1.0, bias=()):
        found = logits[row].copy()
        for i, value in bias:
            found[i] += value
        for i in range(V):
            if in_prompt[i] or counts[row, i]:
                found[i] = found[i] / repetition if found[i] > 0 else found[i] * repetition
            found[i] -= frequency * counts[row, i] + presence * (counts[row, i] > 0)
        return found

    got = bent(
        logits,
        counts,
        request(frequency_penalty=0.5),
        request(presence_penalty=-1.5),
        request(repetition_penalty=1.7),
        request(logit_bias={3: 2.0, 0: -100.0}),
        request(frequency_penalty=0.5, presence_penalty=0.3, repetition_penalty=0.8, logit_bias={7: 1.0}),
    )
    wanted = [
        want(0, frequency=0.5),
        want(1, presence=-1.5),
        want(2, repetition=1.7),
        want(3, bias=[(3, 2.0), (0, -100.0)]),
        want(4, 0.5, 0.3, 0.8, [(7, 1.0)]),
    ]
    np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=1e-6)


def test_neutral_rows_keep_their_logits_bit_for_bit():
    logits = np.random.default_rng(1).normal(size=(2, V)).astype(np.float32)
    logits[0, 0] = -np.inf
    counts = np.ones((2, V), np.int32)
    got = bent(logits, counts, NONE, dataclasses.replace(NONE, frequency_penalty=1.0))
    assert (got[0] == logits[0]).all() and (got[1] != logits[1]).all()
    assert (np.asarray(above_min_p(jnp.asarray(logits), jnp.zeros(2))) == logits).all()


def test_min_p_keeps_what_is_likely_enough():
    probabilities = np.array([[0.5, 0.3, 0.12, 0.08]], np.float32)
    for min_p, kept in ((0.0, 4), (0.17, 3), (0.3, 2), (0.61, 1), (1.0, 1)):
        left = np.isfinite(above_min_p(jnp.log(probabilities), jnp.array([min_p], jnp.float32)))
        assert left.tolist() == [[True] * kept + [False] * (4 - kept)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_serving.model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def engine(model):
    return tiny_serving.engine(model)


def test_answers_follow_their_penalties(model, engine):
    """Greedy answers: a ban, a wish that always wins, and no token twice; log-probs stay those of the model."""
    tokens = model.tokenizer.encode_prompt("what is rain ?")
    plain = Request(tokens=tokens, max_new_tokens=10, plain=True, mix=SOUP)
    changes = [
        {},
        {"logit_bias": {i: -100.0 for i in model.tokenizer.eos_ids}},
        {"logit_bias": {40: 100.0}},
        {"presence_penalty": 2.0, "frequency_penalty": 2.0, "logit_bias": {40: 1.0}},
        {"repetition_penalty": 10.0},
        {"temperature": 1.0, "min_p": 1.0},
    ]
    requests = [dataclasses.replace(plain, **change) for change in changes]
    answers = [one for (one,) in engine.answer(requests)]
    ids = [[token.id for token in answer.tokens] for answer in answers]
    assert len(ids[1]) == 10 and not set(ids[1]) & set(model.tokenizer.eos_ids)
    assert ids[2] == [40] * 10
    assert ids[5] == ids[0]  # min-p of 1 is greedy
    assert ids[4] != ids[0]
    # The same tokens as a prompt: log-probs without any penalty.
    again = Request(tokens=[*tokens, *ids[2]], max_new_tokens=0, mix=SOUP, prompt_logps=True)
    ticket = engine.submit(again, lambda *_: None)
    while not ticket.done.is_set():
        engine.step()
    want = [token.logp for token in ticket.prompt[len(tokens) - 1 :]]
    np.testing.assert_allclose([token.logp for token in answers[2].tokens], want, rtol=1e-4, atol=1e-5)
    assert [one for (one,) in engine.answer(requests)] == answers  # a slot forgets the counts of its last answer


def test_a_greedy_answer_is_the_argmax_of_penalized_logits(model, engine):
    """Step by step, from the log-probs of likely tokens, which differ from logits by a constant."""
    tokens = model.tokenizer.encode_prompt("what is rain ?")
    request = Request(
        tokens=tokens, max_new_tokens=8, mix=SOUP, frequency_penalty=1.1, presence_penalty=0.6, alternatives=20
    )
    ((answer,),) = engine.answer([request])
    counts = {}
    for token in answer.tokens:
        scores = {i: logp - 1.1 * counts.get(i, 0) - 0.6 * (i in counts) for i, logp in token.top}
        assert max(scores, key=scores.get) == token.id
        counts[token.id] = counts.get(token.id, 0) + 1


def test_biases_that_do_not_fit_are_refused_by_name(engine):
    for bias in ({100_000: 1.0}, {-1: 1.0}, dict.fromkeys(range(BIASES + 1), 1.0)):
        with pytest.raises(UserError, match=r"^logit_bias: "):
            engine.submit(dataclasses.replace(NONE, mix=np.zeros(K), logit_bias=bias), lambda *_: None)
