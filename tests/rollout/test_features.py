"""Features of answers: what they are, and that they depend on the answer alone."""

import jax
import numpy as np
import pytest

from pjrlhf.data.batching import collate_completion
from pjrlhf.models.adapters import AdapterConfig, Backbone
from pjrlhf.models.config import ModelConfig
from pjrlhf.models.decoder import Decoder, init_params
from pjrlhf.rollout import features
from pjrlhf.rollout.features import answer_key

answer_states = jax.jit(features.answer_states)


@pytest.fixture(scope="module")
def backbone():
    config = ModelConfig(
        vocab_size=20,
        hidden_size=8,
        intermediate_size=12,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        head_dim=4,
        max_length=32,
    )
    model = Decoder(config)
    return Backbone(model, AdapterConfig(rank=2), init_params(model, jax.random.key(0)))


ROWS = [
    {"prompt": np.array([1, 5, 6]), "completion": np.array([7, 8, 9, 2])},
    {"prompt": np.array([1, 4]), "completion": np.array([3, 2])},
]


def batch(rows, prompt, completion):
    return collate_completion(rows, prompt_length=prompt, completion_length=completion, pad_id=0)


def test_states_at_the_last_token_and_their_mean(backbone):
    forward = jax.jit(backbone.policies())
    found = np.asarray(answer_states(backbone, batch(ROWS, 3, 4)))
    for row, states in zip(ROWS, found, strict=True):
        tokens = np.concatenate([row["prompt"], row["completion"]])[None]
        hidden, _ = forward(tokens, tokens > -1)
        answered = np.asarray(hidden)[0, len(row["prompt"]) :]
        np.testing.assert_allclose(states, [answered[-1], answered.mean(0)], atol=1e-5)


def test_padding_and_company_do_not_matter(backbone):
    alone = answer_states(backbone, batch(ROWS[1:], 2, 2))
    np.testing.assert_allclose(alone[0], answer_states(backbone, batch(ROWS, 6, 9))[1], atol=1e-5)


def test_the_key_is_the_content():
    prompt, answer = np.array([1, 2]), np.array([3])
    key = answer_key({"prompt": prompt, "completion": answer})
    assert key == answer_key({"prompt": prompt.astype(np.int64), "completion": answer, "user_id": "ann"})
    assert key != answer_key({"prompt": prompt[:1], "completion": np.array([2, 3])}), "the border counts"
    assert len(key) == 16
