"""When the engine reads prompts and draws tokens: together where it can, at once where somebody waits."""

import dataclasses
import gc
import heapq
import weakref

import jax
import numpy as np
import pytest
from support import tiny_serving, tiny_users

from pjrlhf.language_model import LanguageModel, load_model
from pjrlhf.serving import programs
from pjrlhf.serving.catalogue import Catalogue
from pjrlhf.serving.engine import Engine
from pjrlhf.serving.settings import EngineSettings
from pjrlhf.serving.tickets import Request

E = 2


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> LanguageModel:
    return tiny_serving.model(tmp_path_factory.mktemp("base"))


@pytest.fixture
def calls(monkeypatch):
    """What the programs were asked: rows x tokens of every prefill, steps of every dispatch."""
    found = {"read": [], "steps": []}
    prefill, decode = programs.prefill, programs.decode

    def watched_prefill(*arguments):
        found["read"].append(arguments[3].shape)
        return prefill(*arguments)

    def watched_decode(*arguments):
        found["steps"].append(arguments[-1])
        return decode(*arguments)

    monkeypatch.setattr(programs, "prefill", watched_prefill)
    monkeypatch.setattr(programs, "decode", watched_decode)
    return found


def mix_of(i: int) -> np.ndarray:
    return np.random.default_rng(i).normal(size=tiny_serving.K).astype(np.float32)


@pytest.mark.slow
def test_prompts_read_together_have_the_bits_of_prompts_read_alone(model, calls):
    """In groups of 4 x 16 and 2 x 32 tokens, with user tokens and scores among them."""
    engine = tiny_serving.engine(model, E, chunk=64, prefix_mb=0.0)
    short = tiny_serving.requests(model, 8, seed=21, user_tokens=E)
    requests = [dataclasses.replace(one, prompt_logps=i == 2) for i, one in enumerate(short)]
    requests += [dataclasses.replace(one, tokens=[*one.tokens, *range(3, 18)][:18]) for one in requests[:4]]
    alone = [engine.answer([request])[0] for request in requests]
    assert {rows for rows, _ in calls["read"]} == {1}
    calls["read"].clear()
    assert engine.answer(requests) == alone
    assert {(4, 16), (2, 32)} <= set(calls["read"])
    assert all(rows in (1, engine.prefill.group(size)) for rows, size in calls["read"])


def test_few_waiting_prompts_are_not_padded_to_a_whole_group(model, calls):
    engine = tiny_serving.engine(model, chunk=64, prefix_mb=0.0)
    one = Request(tokens=[1, 5, 6], max_new_tokens=1, mix=mix_of(0))
    engine.answer([one] * 2)
    assert calls["read"] == [(1, 16)] * 2
    calls["read"].clear()
    engine.answer([one] * 3)
    assert calls["read"] == [(4, 16)]
    calls["read"].clear()
    # The first of the queue goes first; the others of its length are read with it.
    engine.answer([dataclasses.replace(one, tokens=[1] * 20), one, one, one, one])
    assert calls["read"] == [(1, 32), (4, 16)]


def test_a_first_token_waits_for_no_other(model, calls):
    engine = tiny_serving.engine(model, steps=8)
    pieces = []
    engine.submit(Request(tokens=[1, 5], max_new_tokens=20, mix=mix_of(1)), lambda _, piece: pieces.append(piece))
    while engine.busy:
        engine.step()
    assert len(pieces[0].tokens) == 1
    assert calls["steps"][:2] == [1, 8]


def test_no_slot_is_empty_while_a_request_waits(model, calls):
    """The steps are those of a list schedule: an answer starts as soon as the first one before it ends."""
    engine = tiny_serving.engine(model, steps=8, chunk=64, prefix_mb=0.0)
    ends = np.array(engine.tokenizer.eos_ids)
    banned = dict.fromkeys(ends.tolist(), -100.0)
    limits = np.random.default_rng(0).integers(1, 20, 17).tolist()
    requests = [Request(tokens=[1, 5], max_new_tokens=n, mix=mix_of(n), logit_bias=banned) for n in limits]
    answers = engine.answer(requests)
    assert [len(one.tokens) for (one,) in answers] == limits
    slots = [0] * 4
    for limit in limits:
        heapq.heapreplace(slots, slots[0] + limit)
    last = calls["steps"].pop()  # nobody waits any more: the devices stop it where all are over
    assert max(slots) <= sum(calls["steps"]) + last <= max(slots) + 8


def test_the_engine_shares_what_its_layout_leaves_as_it_is(model):
    backbone = model.backbone.replace(model=model.backbone.model.clone(decode="transposed"))
    engine = tiny_serving.engine(LanguageModel(backbone, model.tokenizer))
    ours, given = engine.served.backbone.base, backbone.base
    assert ours["embed"]["embedding"] is given["embed"]["embedding"]
    assert ours["final_norm"]["scale"] is given["final_norm"]["scale"]
    assert "layers" not in ours and len(jax.tree.leaves(ours["layers_0"])) > 0


@pytest.mark.slow
def test_the_layers_lie_in_memory_once_where_nobody_learns(tmp_path):
    model = load_model(tiny_users.save_base(tmp_path))
    given = [weakref.ref(leaf) for leaf in jax.tree.leaves(model.backbone.base["layers"])]
    engine = Engine(model.backbone, model.tokenizer, settings=EngineSettings(slots=1))
    catalogue = Catalogue(model).laid_out(engine.served.backbone)
    del model
    gc.collect()
    assert given and all(leaf() is None for leaf in given)
    assert catalogue.model.backbone is engine.served.backbone
