"""Packed rows and the positions that a model has learned."""

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
