"""Answers in packed rows score as each does in a padded row of its own, in their order, in every packing mode."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import tiny, tiny_users

from pjrlhf.algorithms import modpo
from pjrlhf.data.packing import MODES
from pjrlhf.models.adapters import init_bank
from pjrlhf.rollout import scoring
from pjrlhf.rollout.experience import raw_rewards
from pjrlhf.rollout.reference import summed_logps
from pjrlhf.runtime.packed_answers import PackedAnswers

S = 3  # reward models


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_users.save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def answers():
    """Of one to five answers to each of seven prompts, in no order; every third has a mask."""
    rng, found = np.random.default_rng(1), []
    for e, count in enumerate((1, 5, 2, 2, 3, 1, 4)):
        prompt = np.array([1, *rng.integers(3, 20, rng.integers(2, 12)), 3 + e], np.int32)
        for n in rng.integers(1, 16, count):
            mask = rng.random(n) < 0.6 if len(found) % 3 == 0 and n > 4 else None
            ids = rng.integers(3, 20, n).astype(np.int32)
            found.append({"prompt": prompt, "completion": ids, "completion_mask": mask})
    return [found[i] for i in rng.permutation(len(found))]


def started(folder, base, mode):
    lengths = {"data__max_prompt": 16, "data__max_completion": 16, "data__packing": mode, "sample_rows": 8}
    return tiny.start(folder, tiny_users.settings("records", model__path=str(base), **lengths))


def drawn_rewarder(backbone):
    """Reward models that differ from each other."""
    bank = init_bank(backbone.base, backbone.adapter, S, jax.random.key(1))
    leaves, structure = jax.tree.flatten(bank)
    rng = np.random.default_rng(2)
    bank = structure.unflatten([x + 0.3 * rng.standard_normal(x.shape).astype(np.float32) for x in leaves])
    return {"bank": bank, "heads": scoring.init_heads(S, backbone.model.config.hidden_size, jax.random.key(3))}


SLOW = [pytest.param(mode, marks=pytest.mark.slow) for mode in MODES if mode not in ("share", "join")]


@pytest.mark.parametrize("mode", ["share", "join", *SLOW])
def test_answers_in_packed_rows_score_as_padded_ones(tmp_path, base, answers, mode):
    run = started(tmp_path, base, mode)
    backbone = run.workspace.backbone
    rewarder = drawn_rewarder(backbone)
    batch = run.text.pad_completions(answers)

    @jax.jit
    def padded(backbone, rewarder):
        scored = batch.prompt_length, batch.scored
        logps, _ = scoring.sequence_logps(backbone.policies(), batch.tokens, batch.valid, *scored)
        return logps, raw_rewards(backbone, rewarder, jnp.arange(S)[None], batch.tokens, batch.valid)

    logps, rewards = padded(backbone, rewarder)
    found = run.answer_scores("log-probs", answers, functools.partial(jax.jit(summed_logps), backbone), rows=5)
    np.testing.assert_allclose(found, logps, rtol=2e-5)
    found = run.answer_scores("rewards", answers, functools.partial(jax.jit(modpo.scores), backbone, rewarder))
    assert found.shape == (len(answers), S) and np.ptp(rewards, axis=0).min() > 0.1
    np.testing.assert_allclose(found, rewards, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("mode", MODES)
def test_chunks_hold_what_they_may_and_rows_that_are_filled_have_one_shape(tmp_path, base, answers, mode):
    run = started(tmp_path, base, mode)
    many = [row | {"prompt": row["prompt"] + i} for i in range(12) for row in answers]
    packed = PackedAnswers(run.text, many, 24)
    chunks = [packed.pack(packed.examples[i : i + packed.size]) for i in range(0, len(packed.examples), packed.size)]
    assert len(chunks) > 1 and len({(chunk.answers, chunk.owners) for chunk in chunks}) == 1
    assert max(chunk.tokens.size for chunk in chunks) <= 24 * (16 + 16)
    if mode in ("pack", "join"):
        assert len({chunk.tokens.shape for chunk in chunks}) == 1
    read = sum((chunk.segment > 0).sum() for chunk in chunks)
    everything = sum(len(row["prompt"]) + len(row["completion"]) for row in many)
    prompts = sum(len(ids) for ids in {row["prompt"].tobytes(): row["prompt"] for row in many}.values())
    assert read == everything if mode == "none" else read < 0.8 * everything
    assert read >= prompts + sum(len(row["completion"]) for row in many)
    if mode == "join":  # nearly no padding, but for the last chunk
        assert sum((chunk.segment > 0).mean() for chunk in chunks[:-1]) > 0.85 * (len(chunks) - 1)


def test_a_longest_prompt_with_its_answers_fits_where_few_may_be_scored_at_once(tmp_path, base):
    run = started(tmp_path, base, "join")
    rows = [{"prompt": np.full(16, 3), "completion": np.full(16, 4), "completion_mask": None}] * 4
    found = run.answer_scores("one", rows, functools.partial(jax.jit(summed_logps), run.workspace.backbone), rows=1)
    np.testing.assert_allclose(found, found[0], rtol=1e-5)
