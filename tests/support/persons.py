"""A catalogue of people with user tokens, to export."""

import jax
import numpy as np

from pjrlhf.language_model import load_model
from pjrlhf.models.adapters import AdapterConfig, init_bank
from pjrlhf.models.registry import UserRegistry
from pjrlhf.models.users import UserModel
from pjrlhf.serving.catalogue import Catalogue, People
from support.small_policies import noise

# What breaks templates, JSON and tokenizers, if anything does.
NAMES = ("ana", "b\"o'b\\", "{{ x }}{% endset %}", "#}\n\r\t", "你好 😀", "<|im_start|>", "0")
TOKENS = 3
ADAPTER = AdapterConfig(rank=3, alpha=6.0)


def catalogue(base, kind="individualized", names=NAMES, spread=0.5):
    """A policy with one adapter and people; one row of the table is free."""
    model = load_model(base, adapter=ADAPTER)
    width = model.backbone.model.config.hidden_size
    users = UserModel(
        kind=kind, num_users=len(names) + 1, tokens=TOKENS, width=width, start="normal", zero_offset=False, std=spread
    )
    params = users.init(jax.random.key(3))
    registry = UserRegistry((None, *names[:1], None, *names[1:]))
    bank = noise(init_bank(model.backbone.base, ADAPTER, 1, jax.random.key(1)), 2, 0.2)
    return Catalogue(model, (kind,), bank, People(users, registry, params))


def score(catalogue, user, prompt, answer):
    """The log-prob of an answer, as this person sees it."""
    voice = catalogue.voice(user=user)
    tokens = np.asarray(voice.user_tokens)[None]
    return float(catalogue.model.score([prompt], [answer], catalogue.bank, voice.mix, user_tokens=tokens)[0])
