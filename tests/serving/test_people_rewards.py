"""People of a reward model over HTTP: votes make a state, the state scores answers, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import tiny_serving
from support.serving import answering, send

from pjrlhf.data.schema import Example
from pjrlhf.data.token_table import Lengths, encode_example
from pjrlhf.models.registry import UserRegistry
from pjrlhf.models.user_models.base import Comparisons
from pjrlhf.models.user_models.kinds import user_model
from pjrlhf.rollout.features import STATES, Reduction
from pjrlhf.serving.catalogue import Catalogue, People
from pjrlhf.serving.engine import Engine
from pjrlhf.serving.people.rewards import LONG, Rewarded, Scorer

ENTRIES = {
    "pooled": {"kind": "pooled"},
    "lore": {"kind": "lore", "bases": 2, "fit_steps": 20},
    "pttt": {"kind": "pttt", "hidden": 8},
}
CONTEXT, WIDTH = 4, 5
PROMPT = "what is rain ?"
ANSWERS = [f"it is {word} ." for word in ("rain", "snow", "wind", "sand")]  # of one length
LENGTHS = Lengths(prompt=16, completion=12, **LONG)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_serving.model(tmp_path_factory.mktemp("base"))


def scorer_of(base, name):
    model = user_model(ENTRIES[name], "x")
    params = model.init(jax.random.key(3), WIDTH, 0)
    leaves, tree = jax.tree.flatten(params)
    params = jax.tree.unflatten(
        tree, [x + 0.1 * jax.random.normal(jax.random.key(i), x.shape) for i, x in enumerate(leaves)]
    )
    rng = np.random.default_rng(0)
    reduction = Reduction.fitted(rng.normal(size=(40, 2 * base.backbone.model.config.hidden_size)), WIDTH)
    return Scorer(model, params, reduction, STATES, CONTEXT, base, False, LENGTHS)


def place_of(base, name):
    scorer = scorer_of(base, name)
    params = {"table": jax.tree.map(lambda x: x[None], scorer.generic), "shared": {"params": scorer.params}}
    kind = Rewarded(name, scorer.model.slots.source != "nobody")
    people = People(kind, UserRegistry((None,)), params, trained=False, scorer=scorer, base="base")
    engine = Engine(base.backbone, base.tokenizer, None, 0, tiny_serving.SETTINGS)
    return scorer, answering(Catalogue(base, people=people, chat=False), engine)


def ask(place, path="", body=None):
    status, found, _ = send(place, body, f"/v1/users{path}", "GET" if body is None else "POST")
    return status, found


def vote(chosen, rejected):
    return {"prompt": PROMPT, "chosen": ANSWERS[chosen], "rejected": ANSWERS[rejected]}


def features(base, reduction, answers):
    """Without padding."""
    rows = [
        encode_example(Example(prompt=PROMPT, completion=answer), "completion", base.tokenizer, LENGTHS).ids
        for answer in answers
    ]
    tokens = np.array([[*row["prompt"], *row["completion"]] for row in rows], np.int32)
    hidden = jax.jit(lambda backbone, x: backbone.policies()(x, jnp.ones(x.shape, bool))[0])(base.backbone, tokens)
    hidden = np.asarray(hidden, np.float32)
    start = len(rows[0]["prompt"])
    return reduction(np.concatenate([hidden[:, -1], hidden[:, start:].mean(1)], axis=1))


@pytest.mark.parametrize("name", ["lore", pytest.param("pttt", marks=pytest.mark.slow)])
def test_votes_make_a_state_that_scores_answers(base, name):
    scorer, server = place_of(base, name)
    x = features(base, scorer.reduction, ANSWERS)
    votes = [(0, 1), (2, 1), (0, 3)]
    with server as place:
        assert ask(place, "", {"id": "ana"})[0] == ask(place, "", {"id": "bo"})[0] == 200
        for person, turned in (("ana", False), ("bo", True)):
            body = {"comparisons": [vote(*(pair[::-1] if turned else pair)) for pair in votes]}
            status, found = ask(place, f"/{person}/feedback", body)
            assert status == 200 and found["comparisons"] == 3, found
            status, found = ask(place, f"/{person}/score", {"prompt": PROMPT, "answers": ANSWERS})
            assert status == 200, found
            chosen, rejected = (x[[pair[i ^ turned] for pair in votes]] for i in (0, 1))
            context = Comparisons(jnp.asarray(chosen), jnp.asarray(rejected), jnp.ones(3))
            want = scorer.model.rewards(scorer.params, scorer.model.meet(scorer.params, context), jnp.asarray(x))
            got = [one["reward"] for one in found["data"]]
            np.testing.assert_allclose(got, want, atol=2e-3)
            assert found["best"] == int(np.argmax(got)) and [one["index"] for one in found["data"]] == [0, 1, 2, 3]
        pairs = [{"prompt": PROMPT, "answers": ANSWERS[i : i + 2]} for i in (0, 2)]
        status, found = ask(place, "/ana/next", {"pairs": pairs})
        assert status == (200 if name == "lore" else 400), found
        if name == "pttt":
            assert "reads a person from pairs" in found["error"]["message"]
        status, exported = ask(place, "/ana/export")
        assert status == 200 and exported["kind"] == name and len(exported["comparisons"]) == 3


@pytest.mark.slow
def test_the_base_alone_answers(base):
    body = {"user": "ana", "max_tokens": 2, "prompt": PROMPT}
    with place_of(base, "lore")[1] as place:
        assert ask(place, "", {"id": "ana"})[0] == 200
        for model in ({}, {"model": "base"}):
            status, found, _ = send(place, body | model, "/v1/completions")
            assert status == 200 and found["model"] == "base" and "user" not in found["pjrlhf"], found


def test_a_model_of_nobody_scores_and_learns_from_nobody(base):
    scorer, server = place_of(base, "pooled")
    with server as place:
        assert ask(place, "", {"id": "ana"})[0] == 200
        status, found = ask(place, "/ana/score", {"prompt": PROMPT, "answers": ANSWERS})
        want = scorer.model.rewards(scorer.params, {}, jnp.asarray(features(base, scorer.reduction, ANSWERS)))
        np.testing.assert_allclose([one["reward"] for one in found["data"]], want, atol=2e-3)
        status, found = ask(place, "/ana/feedback", {"comparisons": [vote(0, 1)]})
        assert status == 400 and "the same for everybody" in found["error"]["message"]
        for body, message in (
            ({"answers": ANSWERS}, "prompt: give either it or messages"),
            ({"prompt": PROMPT, "answers": []}, "answers"),
            ({"prompt": PROMPT, "answers": [""]}, "answers: number 1"),
        ):
            status, found = ask(place, "/ana/score", body)
            assert status == 400 and message in found["error"]["message"], found
        assert ask(place, "/nobody/score", {"prompt": PROMPT, "answers": ANSWERS})[0] == 404
