"""A tiny decoder with two banks of three noisy policies, and texts of many lengths."""

import functools

import jax
import numpy as np

from pjrlhf.models.adapters import AdapterConfig, init_bank
from pjrlhf.models.config import ModelConfig
from pjrlhf.models.decoder import Decoder, init_params
from support.small_policies import constant, noise

CONFIG = ModelConfig(
    vocab_size=40,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    rope_theta=100.0,
    tie_embeddings=False,
)
ADAPTER = AdapterConfig(rank=3, alpha=5.0)
MODEL = Decoder(CONFIG)
B, T, K = 8, 10, 3
LENGTHS = np.array([10, 7, 1, 4, 10, 9, 2, 5])


# Noise everywhere, so that no scale is one and no factor zero.
@constant
def base():
    return noise(init_params(MODEL, jax.random.key(0)), 1, 0.1)


@constant
def lora_bank():
    return noise(init_bank(base(), ADAPTER, K, jax.random.key(1)), 2, 0.1)


@constant
def full_bank():
    return noise(init_bank(base(), AdapterConfig(rank=0), K, jax.random.key(1)), 3, 0.1)


def texts():
    """Tokens [B, T] and valid [B, T], right-padded."""
    tokens = np.random.default_rng(4).integers(0, CONFIG.vocab_size, (B, T)).astype(np.int32)
    return tokens, np.arange(T) < LENGTHS[:, None]


def padded(left, right):
    """The same texts: at the right end with `left` more slots before, or at the left end with `right` more after."""
    tokens, valid = texts()
    if left:
        tokens = np.stack([np.roll(row, T - n) for row, n in zip(tokens, LENGTHS, strict=True)])
        valid = valid[:, ::-1]
    pad = ((0, 0), (left, right))
    return np.pad(tokens, pad, constant_values=7), np.pad(valid, pad)


@functools.partial(jax.jit, static_argnums=0)
def forward(model, params, tokens, valid, mix=None, bank=None):
    """Logits [B, T, V]."""
    variables = {"params": params} if bank is None else {"params": params, "adapters": bank}
    hidden, _ = model.apply(variables, tokens, valid, mix=mix)
    return model.apply(variables, hidden, method="logits")


def assert_close(got, want, tolerance=1e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance), got, want)


VARIANTS = {
    "remat full": Decoder(CONFIG, remat="full"),
    "remat dots": Decoder(CONFIG, remat="dots"),
    "xla attention": Decoder(CONFIG, attention="xla"),
}
