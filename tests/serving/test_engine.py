"""An answer of the engine depends on its request alone, and is what the model answers anywhere else."""

import dataclasses
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import tiny_serving
from support.meshes import MESHES
from support.serving import compilations
from support.tiny_serving import K

from pjrlhf.errors import UserError
from pjrlhf.language_model import LanguageModel
from pjrlhf.models import attention
from pjrlhf.models.adapters import Backbone
from pjrlhf.parallel.mesh import batch_sharding, make_mesh, shard_params
from pjrlhf.rollout.sampler import truncate, truncate_rows
from pjrlhf.serving.engine import Engine
from pjrlhf.serving.prefix import PrefixCache
from pjrlhf.serving.text import AnswerText
from pjrlhf.serving.tickets import Closing, Finished, QueueFull, Request

E = 2
SOUP = np.array([0.7, -0.4, 0.9], np.float32)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> LanguageModel:
    return tiny_serving.model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def engine(model):
    return tiny_serving.engine(model)


@pytest.fixture(scope="module")
def personal(model):
    """With user tokens."""
    return tiny_serving.engine(model, E)


def test_an_answer_does_not_depend_on_who_shares_the_batch(model, personal):
    """Bit for bit, log-probs included, while others arrive, end and are cancelled."""
    requests = tiny_serving.requests(model, 8, user_tokens=E)
    alone = [personal.answer([request])[0] for request in requests]
    rng = np.random.default_rng(1)
    others = tiny_serving.requests(model, 12, seed=2, user_tokens=E)
    pieces, tickets, companions = {}, {}, []
    left = list(range(len(requests)))
    while left or personal.busy:
        if left and rng.random() < 0.6:
            i = left.pop(0)
            pieces[i] = []
            tickets[i] = personal.submit(requests[i], lambda _, piece, i=i: pieces[i].append(piece))
        if others and rng.random() < 0.6:
            companions.append(personal.submit(others.pop(), lambda *_: None))
        if companions and rng.random() < 0.3:
            personal.cancel(companions.pop(rng.integers(len(companions))))
        personal.step()
    got = [Finished.of(pieces[i], request.n) for i, request in enumerate(requests)]
    assert got == alone
    assert len({answer.text for one in alone for answer in one}) > len(alone) / 2
    assert {answer.finish for one in alone for answer in one} == {"stop", "length"}
    assert not personal.busy and personal.running == personal.waiting == 0


def test_a_warm_engine_compiles_nothing(model):
    """Prompts of any length, draws of any kind, scores, hits of the prefix cache."""
    engine = tiny_serving.engine(model, E, context=37, chunk=32, prefix_mb=1.0)  # programs of its own
    engine.warm_up()
    assert engine.prefill.sizes == [16, 32] and not engine.busy and not engine.prefill.prefixes.bytes

    requests = tiny_serving.requests(model, 10, seed=12, user_tokens=E)
    long = [dataclasses.replace(one, tokens=[1] * 34, max_new_tokens=1) for one in requests]
    with compilations() as compiled:
        engine.answer([*requests, *long, *long])
    assert not compiled and engine.prefill.prefixes.hits


def test_another_base_of_the_same_shapes_compiles_nothing(model, engine):
    """An engine for merged weights starts at the price of a copy, and answers as they do."""
    base = jax.tree.map(lambda x: 0.5 * jnp.asarray(x), model.backbone.base)
    halved = dataclasses.replace(model, backbone=dataclasses.replace(model.backbone, base=base))
    requests = tiny_serving.requests(model, 1)
    before = engine.answer(requests)
    with compilations() as compiled:
        after = tiny_serving.engine(halved).answer(requests)
    assert not compiled and after != before


@pytest.mark.slow
def test_a_cache_that_is_read_in_blocks_changes_no_answer(model, monkeypatch):
    """The longest row says how many blocks are read, and no other row notices."""
    requests = tiny_serving.requests(model, 8, seed=11, user_tokens=E)
    want = tiny_serving.engine(model, E, context=39).answer(requests)
    monkeypatch.setattr(attention, "CACHE_BLOCK", 8)
    engine = tiny_serving.engine(model, E, context=38)  # programs of its own
    together = engine.answer(requests)
    assert together == [engine.answer([request])[0] for request in requests]
    for ours, theirs in zip(together, want, strict=True):
        assert [one.text for one in ours] == [one.text for one in theirs]


def test_the_prefix_cache_changes_nothing_and_is_keyed_by_mix_and_user(model):
    engine = tiny_serving.engine(model, E)
    without = tiny_serving.engine(model, E, prefix_mb=0.0)
    own = np.ones((E, model.backbone.model.config.hidden_size), np.float32)
    tokens = list(range(3, 20))
    request = Request(tokens=tokens, max_new_tokens=6, mix=SOUP, user_tokens=own, temperature=0.7)
    seen = []

    def answer(request, cached):
        ticket = engine.submit(request, lambda _, piece: seen.append(piece))
        while not ticket.done.is_set():
            engine.step()
        assert ticket.cached_tokens == cached
        assert Finished.of(seen, 1) == without.answer([request])[0]
        seen.clear()

    whole = (len(tokens) + E - 1) // engine.prefill.chunk * engine.prefill.chunk - E
    answer(request, 0)
    answer(request, whole)
    answer(dataclasses.replace(request, tokens=[*tokens[:11], 40, 41, 42]), 12 - E)
    answer(dataclasses.replace(request, mix=-SOUP), 0)
    answer(dataclasses.replace(request, user_tokens=request.user_tokens + 1), 0)
    answer(dataclasses.replace(request, mix=-SOUP), whole)
    answer(request, 0)  # the cache holds few chunks, and the oldest are gone
    answer(dataclasses.replace(request, prompt_logps=True), 0)
    prefixes = engine.prefill.prefixes
    assert 0 < prefixes.bytes <= prefixes.limit == 8 * tiny_serving.CHUNK_BYTES and not without.prefill.prefixes.bytes
    assert prefixes.hits > 0 and prefixes.misses > 8


def test_the_prefix_cache_is_bounded_in_bytes():
    """The least recently used go first; one that is too large is not kept."""
    cache = PrefixCache(100, 4)
    chunk = lambda size: [{"key": jnp.zeros(size, jnp.uint8)}]  # noqa: E731
    for name in "abc":
        cache.keep(name.encode(), chunk(30))
    assert len(cache.find([b"a", b"x", b"b"])) == 1 and (cache.hits, cache.misses) == (1, 2)
    cache.keep(b"d", chunk(40))  # b goes
    assert cache.bytes == 100 and b"b" not in cache and b"a" in cache and b"c" in cache
    cache.keep(b"e", chunk(101))
    cache.keep(b"d", chunk(50))  # is there
    assert cache.bytes == 100 and b"e" not in cache
    cache.keep(b"f", chunk(100))
    assert cache.bytes == 100 and b"f" in cache and b"a" not in cache


def test_greedy_answers_are_those_of_generate(model, engine):
    prompts = ["what is rain ?", "tell me more about rain and snow .", "hello"]
    mixes = np.stack([np.zeros(K), np.eye(K)[1], SOUP]).astype(np.float32)
    want = model.generate(prompts, tiny_serving.bank(model), mixes, max_new_tokens=9)
    chat = [[{"role": "user", "content": prompt}] for prompt in prompts]
    want += model.generate(chat, tiny_serving.bank(model), mixes, max_new_tokens=9)
    ids = [model.tokenizer.encode_prompt(prompt) for prompt in [*prompts, *chat]]
    requests = [
        Request(tokens=one, max_new_tokens=9, plain=i < len(prompts), mix=mixes[i % len(mixes)])
        for i, one in enumerate(ids)
    ]
    got = engine.answer(requests)
    assert [one.text for (one,) in got] == want
    assert len(set(want)) > 3


def test_greedy_answers_with_user_tokens_are_those_of_generate(model, personal):
    rng = np.random.default_rng(4)
    users = rng.normal(size=(2, E, model.backbone.model.config.hidden_size)).astype(np.float32)
    prompts = ["what is rain ?", "tell me more about snow ."]
    want = model.generate(prompts, tiny_serving.bank(model), SOUP, max_new_tokens=8, user_tokens=users)
    requests = [
        Request(tokens=model.tokenizer.encode_prompt(p), max_new_tokens=8, plain=True, mix=SOUP, user_tokens=own)
        for p, own in zip(prompts, users, strict=True)
    ]
    assert [one.text for (one,) in personal.answer(requests)] == want
    swapped = [dataclasses.replace(one, user_tokens=own) for one, own in zip(requests, users[::-1], strict=True)]
    assert [one.text for (one,) in personal.answer(swapped)] != want


def test_the_base_alone_shares_a_batch_with_people(model, engine, personal):
    """It has no positions for user tokens: its answers are those of an engine that knows none."""
    requests = [dataclasses.replace(one, user_tokens=None) for one in tiny_serving.requests(model, 6, seed=7)]
    people = [one for one in tiny_serving.requests(model, 6, seed=8, user_tokens=E) if one.user_tokens is not None]
    mixed = personal.answer([*requests, *people])
    for ours, theirs in zip(mixed, engine.answer(requests), strict=False):
        assert [one.text for one in ours] == [one.text for one in theirs]
        for a, b in zip(
            [t for one in ours for t in one.tokens], [t for one in theirs for t in one.tokens], strict=True
        ):
            assert a.id == b.id and abs(a.logp - b.logp) < 1e-4
    assert mixed[len(requests) :] == [personal.answer([one])[0] for one in people]


def test_log_probs_are_those_of_score(model, engine):
    """Of the answer, and of the prompt as an answer to its first token."""
    prompt = "what is rain ?"
    tokens = model.tokenizer.encode_prompt(prompt)
    request = Request(tokens=tokens, max_new_tokens=12, plain=True, mix=SOUP, alternatives=4, prompt_logps=True)
    seen = []
    ticket = engine.submit(request, lambda _, piece: seen.append(piece))
    while not ticket.done.is_set():
        engine.step()
    ((answer,),) = [Finished.of(seen, 1)]
    assert [token.id for token in ticket.prompt] == tokens[1:]
    ended = answer.finish == "stop"
    (want,) = model.score([prompt], [answer.text], tiny_serving.bank(model), SOUP)
    if ended:
        np.testing.assert_allclose(sum(token.logp for token in answer.tokens), want, rtol=1e-4)
    for token in [*ticket.prompt, *answer.tokens]:
        assert len(token.top) == 4 and token.top[0][1] >= token.logp
        assert [logp for _, logp in token.top] == sorted([logp for _, logp in token.top], reverse=True)
        for i, logp in token.top:
            assert i != token.id or logp == token.logp
    assert all(token.id == token.top[0][0] for token in answer.tokens)  # greedy
    # One more pass over prompt and answer gives the answer's log-probs as those of a prompt.
    again = Request(tokens=[*tokens, *(t.id for t in answer.tokens)], max_new_tokens=0, mix=SOUP, prompt_logps=True)
    ticket = engine.submit(again, lambda *_: None)
    while not ticket.done.is_set():
        engine.step()
    got = [token.logp for token in ticket.prompt[len(tokens) - 1 :]]
    np.testing.assert_allclose(got, [token.logp for token in answer.tokens], rtol=1e-4, atol=1e-5)


def test_stop_strings_end_an_answer_and_are_not_part_of_it(model, engine):
    (free,) = engine.answer([Request(tokens=[1, 5, 6], max_new_tokens=14, mix=SOUP, plain=True)])[0]
    words = free.text.split()
    stop = f"{words[2]} {words[3]}"
    (cut,) = engine.answer([Request(tokens=[1, 5, 6], max_new_tokens=14, mix=SOUP, plain=True, stop=("zz", stop))])[0]
    assert cut.finish == "stop" and cut.text == free.text[: free.text.index(stop)]
    assert cut.tokens == free.tokens[: len(cut.tokens)] and len(cut.tokens) < len(free.tokens)


class Letters:
    """A tokenizer whose tokens are bytes."""

    def decode(self, ids):
        return bytes(ids).decode("utf-8", errors="replace")


def test_pieces_hold_back_what_is_not_certain():
    text, pieces = AnswerText(Letters(), [32], stop=["END", "NO"]), []
    for byte in "a\u00e9 b E, EN N, END of".encode():
        if not text.stopped:
            text.add([byte])
            pieces.append(text.take())
    assert "".join(pieces) == "a\u00e9 b E, EN N, " and "\ufffd" not in "".join(pieces)
    assert pieces[1] == "" and pieces[2] == "\u00e9"
    turn = AnswerText(Letters())
    taken = ""
    for byte in ("  " + "long answer " * 30 + "\u00e9  ").encode():
        turn.add([byte])
        taken += turn.take()
    assert taken + turn.take(end=True) == ("long answer " * 30 + "\u00e9").strip()


def test_draws_follow_their_seeds(model, engine):
    base = Request(tokens=[1, 5, 6, 7], max_new_tokens=12, mix=SOUP, temperature=1.2, n=3, seed=2**62)
    first, again, other = engine.answer([base, base, dataclasses.replace(base, seed=-1)])
    assert first == again and first != other
    assert len({answer.text for answer in first}) > 1
    assert engine.answer([dataclasses.replace(base, n=2)])[0] == first[:2]


def test_a_row_is_truncated_as_a_batch():
    logits = np.random.default_rng(0).normal(size=(6, 30)).astype(np.float32) * 3
    k, p = np.array([0, 5, 1, 0, 40, 7]), np.array([1.0, 1.0, 1.0, 0.7, 0.3, 0.9], np.float32)
    got = truncate_rows(logits, k, p)
    for row in range(len(logits)):
        np.testing.assert_array_equal(got[row], truncate(logits[row : row + 1], int(k[row]), float(p[row]))[0])


def test_bad_requests_are_refused_by_name(model, engine, personal):
    good = Request(tokens=[1, 5], max_new_tokens=3, mix=SOUP)
    for name, change in {
        "tokens": {"tokens": []},
        "tokens: the prompt has an id": {"tokens": [1, 10**6]},
        "max_new_tokens": {"max_new_tokens": 100},
        "mix": {"mix": None},
        "mix: has shape": {"mix": SOUP[:2]},
        "mix: holds": {"mix": SOUP * np.nan},
        "user_tokens": {"user_tokens": np.zeros((E, 16), np.float32)},
    }.items():
        with pytest.raises(UserError, match=f"^{name}"):
            engine.served.check(dataclasses.replace(good, **change))
    with pytest.raises(UserError, match=r"^user_tokens"):
        personal.served.check(dataclasses.replace(good, user_tokens=np.zeros((E + 1, 16), np.float32)))
    with pytest.raises(UserError, match=f"and {E} user tokens and 30 new ones"):
        width = model.backbone.model.config.hidden_size
        own = np.zeros((E, width), np.float32)
        personal.served.check(dataclasses.replace(good, max_new_tokens=30, tokens=[1] * 9, user_tokens=own))
    with pytest.raises(UserError, match="full parameters"):
        Engine(model.backbone, model.tokenizer, jax.tree.map(lambda x: x[None], model.backbone.base))
    with pytest.raises(UserError, match=r"^context"):
        tiny_serving.engine(model, context=41)
    with pytest.raises(UserError, match=r"^prefix_mb: 0.0002 MB hold no chunk of 4 tokens, which takes 0.000256 MB"):
        tiny_serving.engine(model, prefix_mb=0.0002)
    for way_out in ({"prefix_mb": 0.000256}, {"chunk": 3}, {"prefix_mb": 0.0}):
        tiny_serving.engine(model, **{"prefix_mb": 0.0002, **way_out})


def test_the_queue_is_bounded_and_a_closed_engine_answers_what_it_has(model):
    engine = tiny_serving.engine(model, queue=2)
    request, done = Request(tokens=[1, 5], max_new_tokens=4, mix=SOUP), threading.Semaphore(0)
    for _ in range(2):
        engine.submit(request, lambda _, piece: piece.finish and done.release())
    with pytest.raises(QueueFull):
        engine.submit(request, lambda *_: None)
    engine.start()
    assert engine.close(timeout=120)
    assert done.acquire(blocking=False) and done.acquire(blocking=False)
    with pytest.raises(Closing):
        engine.submit(request, lambda *_: None)


def test_an_engine_that_fails_leaves_nobody_waiting(model, monkeypatch):
    engine = tiny_serving.engine(model)
    requests = [Request(tokens=[1, 5], max_new_tokens=limit, mix=SOUP) for limit in (0, *[4] * 8)]
    tickets = [engine.submit(request, lambda *_: None) for request in requests]

    def broken():
        raise RuntimeError("out of memory")

    monkeypatch.setattr(engine, "_dispatch", broken)
    engine.start()
    assert all(ticket.done.wait(60) and str(ticket.error) == "out of memory" for ticket in tickets)
    with pytest.raises(Closing):
        engine.submit(tickets[0].request, lambda *_: None)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("decode", ["scan", "transposed"])
def test_devices_answer_as_one_does(model, mesh, decode):
    requests = tiny_serving.requests(model, 10, seed=5)
    backbone, devices = model.backbone, make_mesh(MESHES[mesh])
    want = tiny_serving.engine(model).answer(requests)
    sharded = Backbone(
        backbone.model.clone(batch_sharding=batch_sharding(devices), decode=decode, attention="einsum"),
        backbone.adapter,
        shard_params(devices, backbone.base),
    )
    bank = shard_params(devices, tiny_serving.bank(model))
    got = Engine(sharded, model.tokenizer, bank, settings=tiny_serving.SETTINGS).answer(requests)
    for ours, theirs in zip(got, want, strict=True):
        assert [one.text for one in ours] == [one.text for one in theirs]
        np.testing.assert_allclose(
            [token.logp for one in ours for token in one.tokens],
            [token.logp for one in theirs for token in one.tokens],
            rtol=1e-3,
            atol=1e-4,
        )
