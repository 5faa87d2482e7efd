"""Packed rows and the positions that a model has learned."""

import re
import types

import jax.numpy as jnp
import pytest
from support.tiny_llamas import SMALL

from pjrlhf.errors import UserError
from pjrlhf.models.decoder import Decoder
from pjrlhf.runtime.records import DataSettings
from pjrlhf.runtime.text import Text


def test_user_tokens_take_positions_of_the_context():
    settings = DataSettings(max_prompt=6, max_completion=8, prompt_buckets=())
    model = Decoder(SMALL.replace(positions="learned", max_length=16), dtype=jnp.float32)
    workspace = types.SimpleNamespace(model=model, tokenizer=types.SimpleNamespace(pad_id=0))
    text = Text(settings, workspace, types.SimpleNamespace(even=lambda n: n), 1.0, 1)
    row = {"prompt": [1, 2], "chosen": [3], "rejected": [4], "chosen_mask": None, "rejected_mask": None}
    rows = [row], ("chosen", "rejected")
    text.pack(*rows, num_user_tokens=2)
    with pytest.raises(
        UserError, match="3 with prompts of 6 and completions of 8 tokens are more than the 16 positions"
    ):
        text.pack(*rows, num_user_tokens=3)


def test_lengths_fit_the_context_where_texts_are_cut_anyway():
    cut = {"long_prompt": "truncate_left", "long_completion": "truncate", "prompt_buckets": ()}
    settings = DataSettings(max_prompt=512, max_completion=256, **cut)
    assert settings.within(768) is settings
    for context, user_tokens, learned in ((512, 0, False), (512, 10, False), (770, 10, True), (12, 10, False)):
        found = settings.within(context, user_tokens, learned)
        assert found.max_prompt + found.max_completion + user_tokens == context
        assert min(found.max_prompt, found.max_completion) >= 1
    assert settings.within(770, 10) is settings, "the positions of the model go on"
    with pytest.raises(UserError, match=r"model\.path: 10 user tokens leave no room"):
        settings.within(11, 10)


def test_lengths_that_exceed_the_context_are_refused_with_lengths_that_fit():
    settings = DataSettings(max_prompt=512, max_completion=256, prompt_buckets=())
    with pytest.raises(UserError, match="more than the model's context of 512 tokens; set ") as refused:
        settings.within(512, 10)
    remedy = {name: int(value) for name, value in re.findall(r"--config.data.(\w+)=(\d+)", str(refused.value))}
    fitted = settings.replace(**remedy)
    assert fitted.within(512, 10) is fitted
