"""A trained entry as many people ask it."""

import jax
import numpy as np
import pytest
from support import tiny, tiny_users

from pjrlhf.feedback.pairs import Pairs
from pjrlhf.models.registry import UserRegistry
from pjrlhf.parallel.processes import to_host

USERS = [f"person {i}" for i in range(1000)]
GREEDY = {"temperature": 0.0, "sample_rows": 64, "data.max_completion": 6}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["individualized", "cluster"])
def test_a_thousand_people_are_answered_in_chunks(people, name, monkeypatch):
    """Each as their own row of the table says, however many share a chunk."""
    run = tiny.start(people, tiny_users.settings(**GREEDY))
    pairs = tiny_users.pairs_of(run)
    trained = tiny_users.trained_of(run, name, pairs)
    trained.pairs = Pairs(pairs.tables, UserRegistry.create(USERS, 1023), pairs.reference, run.text)
    # As many people as rows of the table, far from each other.
    rng = np.random.default_rng(0)
    params, prompt = dict(trained.trainable["users"]), pairs.tables["heldout"].examples[0].prompt
    params["table"] = jax.tree.map(lambda x: 5 * rng.standard_normal((1024, *x.shape[1:]), np.float32), params["table"])
    params["shared"] = jax.tree.map(lambda x: 5 * rng.standard_normal(x.shape, np.float32), params.get("shared", {}))
    trained.trainable["users"] = params

    drawn, encode = [], run.text.encode
    monkeypatch.setattr(run.text, "encode", lambda prompts: drawn.append(len(prompts)) or encode(prompts))
    answers = [texts[0] for texts in trained.answers([prompt], USERS)]
    assert drawn == [64] * 16
    monkeypatch.setattr(run.text, "sample_rows", len(USERS))
    assert [texts[0] for texts in trained.answers([prompt], USERS)] == answers, "as in one batch"
    assert len(set(answers)) > 1, "people do not differ: this test could not fail"
    some = [USERS[i] for i in (999, 3, 500)]
    monkeypatch.setattr(run.text, "sample_rows", 64)
    assert [texts[0] for texts in trained.answers([prompt], some)] == [answers[i] for i in (999, 3, 500)]


@pytest.mark.slow
def test_answers_go_back_to_their_people_and_prompts(people):
    run = tiny.start(people, tiny_users.settings(**GREEDY))
    pairs = tiny_users.pairs_of(run)
    trained = tiny_users.trained_of(run, "pooled", pairs)
    prompts = list({repr(e.prompt): e.prompt for e in pairs.tables["heldout"].examples}.values())[:3]
    users = list(pairs.registry.rows)[:2]
    found = trained.answers(prompts, users)
    assert found[0] == found[1] and len(found[0]) == 3, "nobody is known to this entry"
    assert [trained.answers([prompt], users[:1])[0][0] for prompt in prompts] == found[0]
    assert to_host(trained.trainable["bank"]), "on the devices"
