"""A tiny model to serve: the tokenizer of the synthetic environment, random weights, random adapters."""

import functools

import jax
import numpy as np

from pjrlhf.language_model import LanguageModel, load_model
from pjrlhf.models.adapters import AdapterConfig, init_bank
from pjrlhf.serving.engine import Engine
from pjrlhf.serving.settings import EngineSettings
from pjrlhf.serving.tickets import Request
from support import tiny_users
from support.small_policies import noise

K = 3
CHUNK_BYTES = 4 * 2 * 8 * 4  # four tokens, keys and values of one head of 8 float32
ADAPTER = AdapterConfig(rank=2, alpha=4.0)
# The prefix cache holds eight chunks.
SETTINGS = EngineSettings(slots=4, chunk=4, steps=3, prefill_tokens=8, prefix_mb=8 * CHUNK_BYTES / 1e6)


@functools.cache
def model(folder) -> LanguageModel:
    """Written to `folder` and read again."""
    found = load_model(tiny_users.save_base(folder), adapter=ADAPTER)
    sharp = noise(found.backbone.base, 5, 0.3)  # answers that differ
    return LanguageModel(found.backbone.replace(base=sharp), found.tokenizer)


def bank(model):
    return noise(init_bank(model.backbone.base, ADAPTER, K, jax.random.key(1)), 2, 0.3)


def engine(model, user_tokens=0, adapters=K, **changes):
    some = jax.tree.map(lambda x: x[:adapters], bank(model))
    return Engine(model.backbone, model.tokenizer, some, user_tokens, SETTINGS.replace(**changes))


def requests(model, count, seed=0, user_tokens=0):
    """Requests that differ in everything; some bring no user tokens."""
    rng = np.random.default_rng(seed)
    width = model.backbone.model.config.hidden_size
    words = [i for i in range(model.tokenizer.vocab_size) if i not in model.tokenizer.eos_ids and i > 2]
    # Some prompts start alike, so that the prefix cache is of use.
    starts = [rng.choice(words, 9).tolist() for _ in range(2)]
    found = []
    for _ in range(count):
        start = starts[rng.integers(2)][: rng.integers(0, 10)]
        tokens = [1, *start, *rng.choice(words, rng.integers(1, 6)).tolist()]
        mix = [np.zeros(K), np.eye(K)[rng.integers(K)], rng.normal(size=K)][rng.integers(3)]
        own = rng.normal(size=(user_tokens, width)).astype(np.float32) if user_tokens and rng.integers(4) else None
        warm = bool(rng.integers(2))
        found.append(
            Request(
                tokens=tokens,
                max_new_tokens=int(rng.integers(1, 14)),
                plain=bool(rng.integers(2)),
                n=int(rng.choice([1, 1, 2, 3])),
                mix=mix.astype(np.float32),
                user_tokens=own,
                temperature=float(rng.uniform(0.3, 1.5)) if warm else 0.0,
                top_k=int(rng.choice([0, 0, 5])),
                top_p=float(rng.choice([1.0, 0.8])),
                seed=int(rng.integers(-(2**63), 2**63)),
                frequency_penalty=float(rng.choice([0, 0, 0.7])),
                presence_penalty=float(rng.choice([0, 0, -0.5])),
                repetition_penalty=float(rng.choice([1, 1, 1.3])),
                min_p=float(rng.choice([0, 0, 0.05])),
                logit_bias=dict(zip(rng.choice(words, 2, replace=False).tolist(), [3.0, -100.0], strict=True))
                if rng.integers(4) == 0
                else {},
                stop=rng.choice(list("jkqvxz"), rng.integers(4)).tolist(),
                alternatives=int(rng.choice([0, 0, 3])),
                prompt_logps=bool(rng.integers(4) == 0),
            )
        )
    return found
