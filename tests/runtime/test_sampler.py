"""Answers come in chunks of one size, each with what belongs to its prompt, and go back to their prompts."""

import functools

import jax
import numpy as np
import pytest
from support import tiny

from pjrlhf.rollout.batches import Rollout
from pjrlhf.runtime.answers import Row, sample_rows
from pjrlhf.runtime.sampler import Sampler

SIZE = 16  # sample_rows of the tiny config


@pytest.fixture(scope="module")
def run(finished):
    return tiny.start(finished, tiny.settings())


@pytest.fixture
def watched(run, monkeypatch):
    """Chunks that were drawn, (rows, decoded prompts, key) each; an answer is "shine" where the first weight of its row
    is positive, else "grow".
    """
    chunks = []
    tokenizer = run.workspace.tokenizer
    ids = tokenizer.backend.convert_tokens_to_ids(["shine", "grow"])

    def draw(backbone, parameters, rows, prompts, key):
        chunks.append((rows, tokenizer.backend.batch_decode(prompts.tokens), np.asarray(jax.random.key_data(key))))
        tokens = np.array([[ids[0] if row[0] > 0 else ids[1]] for row in rows])
        return Rollout(tokens, np.ones(tokens.shape, bool), np.zeros(tokens.shape, np.float32))

    sampler = Sampler(run.text, run.workspace.backbone)
    monkeypatch.setattr(sampler, "_draw", draw)
    monkeypatch.setattr(run, "sampler", lambda policies: sampler)
    return chunks


def asked(run, mixes):
    """A row for each of `mixes`; two in three state a preference."""
    requests = run.records.requests[1]
    words = ["", "use easy words .", "use easy words ."]
    return [Row(requests[i % len(requests)], words[i % 3], tuple(mix)) for i, mix in enumerate(mixes)]


LOW_RANK, FULL = {"layers": np.zeros(1)}, {"embed": np.zeros(1), "layers": np.zeros(1)}


def test_rows_are_drawn_with_their_own_weights_and_prompts(run, watched):
    rows = asked(run, [(float(i % 2), 0.0) for i in range(SIZE + 5)])
    keys = functools.partial(run.streams.key, "test")
    assert sample_rows(run, LOW_RANK, rows, keys) == ["shine" if i % 2 else "grow" for i in range(SIZE + 5)]
    assert [len(mix) for mix, _, _ in watched] == [SIZE, SIZE], "the last chunk is filled up"
    np.testing.assert_array_equal(np.concatenate([mix for mix, _, _ in watched])[: len(rows)], [r.mix for r in rows])
    texts = [text for _, texts, _ in watched for text in texts]
    for row, text in zip(rows, texts, strict=False):
        assert row.request in text and ("use easy words ." in text) == bool(row.words)
    assert set(texts[len(rows) :]) == {texts[SIZE]}, "filled up with its first row"
    for number, (_, _, key) in enumerate(watched):
        np.testing.assert_array_equal(key, jax.random.key_data(run.streams.key("test", number)))


def test_a_chunk_of_full_parameters_has_one_row_of_mix(run, watched):
    rows = asked(run, [(float(i % 3 == 0), float(i % 3)) for i in range(3 * SIZE + 2)])
    answers = sample_rows(run, FULL, rows, functools.partial(run.streams.key, "test"))
    assert answers == ["grow" if i % 3 else "shine" for i in range(len(rows))]
    assert len(watched) == 5 and all((mix == mix[0]).all() for mix, _, _ in watched)


def test_no_prompts_no_answers(run, watched):
    assert run.sampler(None)("nothing", [], functools.partial(run.streams.key, "test")) == [] and not watched
