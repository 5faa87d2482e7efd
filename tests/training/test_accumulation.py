"""A batch in parts has the gradient and the metrics of the whole batch."""

import functools

import jax
import numpy as np
import pytest
from support import tiny
from support.small_policies import ADAPTERS, MODEL, bank, base

from pjrlhf import config as configs
from pjrlhf.algorithms.sft import sft_loss
from pjrlhf.data.packing import MODES, PackLayout, pack
from pjrlhf.errors import UserError
from pjrlhf.models.adapters import Backbone
from pjrlhf.training.accumulation import check_accumulation, gradient_of, in_parts, parts_of
from pjrlhf.training.optimizer import steps_of


def rows(count=8):
    """Prompts and completions of very different lengths, some tokens not scored."""
    rng = np.random.default_rng(0)
    sizes = [(int(rng.integers(1, 6)), int(rng.integers(1, 4 + 10 * (i % 4 == 0)))) for i in range(count)]
    masks = [rng.random(n) < 0.7 if i % 3 == 0 and n > 2 else None for i, (_, n) in enumerate(sizes)]
    ids = [[rng.integers(2, 24, n).tolist() for n in pair] for pair in sizes]
    return [(prompt, answer, mask) for (prompt, answer), mask in zip(ids, masks, strict=True)]


def collate(mode, rows):
    prompts, answers, masks = zip(*rows, strict=True)
    layout = PackLayout(mode=mode, length=24, pad_id=0, multiple=2)
    return pack(prompts, [[answer] for answer in answers], layout, [[mask] for mask in masks])


@jax.jit
def gradient(trainable, *parts):
    backbone = Backbone(MODEL, ADAPTERS["lora"], base())
    return gradient_of(functools.partial(sft_loss, backbone), trainable, parts, jax.random.key(0))


@pytest.mark.parametrize(
    "mode", [pytest.param(mode, marks=() if mode == "join" else pytest.mark.slow) for mode in MODES]
)
@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_parts_have_the_gradient_of_the_whole(mode, count):
    one = bank("lora", 1)
    (whole,) = parts_of(in_parts(functools.partial(collate, mode), 1)(rows()))
    expected, metrics = gradient(one, whole)
    assert metrics["loss"][1] == sum(len(a) if m is None else m.sum() for _, a, m in rows())
    parts = parts_of(in_parts(functools.partial(collate, mode), count)(rows()))
    assert len({jax.tree.map(np.shape, part) == jax.tree.map(np.shape, parts[0]) for part in parts}) == 1
    # The parts have different numbers of tokens: a mean of means would be another gradient.
    assert len({int((np.asarray(part.answer) < part.answers).sum()) for part in parts}) > 1
    found, summed = gradient(one, *parts)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-6, rtol=2e-4), found, expected)
    np.testing.assert_allclose(summed["loss"], metrics["loss"], rtol=1e-5)


def test_a_batch_must_divide_into_its_parts():
    check_accumulation(4, 8)
    with pytest.raises(UserError, match="accumulation_steps: 3 does not divide batch_size=8"):
        check_accumulation(3, 8)


def test_epochs_are_passes_over_the_rows():
    assert [steps_of(7, epochs, 100, 8) for epochs in (0, 0.01, 1, 3, 0.5)] == [7, 1, 12, 38, 6]


@pytest.mark.parametrize("stage", ["sft", "reward", "preference", "modpo", "ric"])
def test_settings_name_a_batch_that_does_not_divide(stage):
    c = tiny.catalogue("soups").get_config()
    configs.users(c)
    configs.without_ppo(c)
    c[stage].accumulation_steps, c[stage].batch_size = 3, 8
    with pytest.raises(UserError, match=f"{stage}.accumulation_steps: 3 does not divide batch_size=8"):
        configs.read(c)
