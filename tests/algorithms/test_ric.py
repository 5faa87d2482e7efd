"""Rewards-in-Context: prompts state the scores that answers really got, and what is good online is learned from."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import tiny
from support.small_trees import assert_same

from pjrlhf.algorithms import banks, reward, ric
from pjrlhf.config import without_ppo
from pjrlhf.data.batching import pad_right
from pjrlhf.data.preferences import PreferencePrompt
from pjrlhf.errors import UserError
from pjrlhf.objectives.multi_objective import target_map
from pjrlhf.rollout.batches import Rollout
from pjrlhf.rollout.experience import reward_scores

pytestmark = pytest.mark.slow  # many programs to compile

N = len(tiny.OBJECTIVES)
STAGE = "methods/ric"
SMALL = {
    "prompt_format": {"form": "tally", "levels": 2},
    "samples": 40,  # not a multiple of sample_rows
    "steps": 12,
    "batch_size": 8,
    "rounds": 2,
    "online_samples": 24,
    "online_steps": 6,
    "optimizer": {"learning_rate": 2e-2},
}


def settings(**changes):
    config = tiny.settings()
    with config.unlocked():
        without_ppo(config)
    config.ric.update(SMALL)
    config.ric.update(changes)
    return config


def started(folder, **changes):
    config = settings(**changes)
    run = tiny.start(folder, config)
    return run, run.section(ric.RicSettings)


@pytest.fixture(scope="module")
def trained(finished, tmp_path_factory):
    """(run, settings, what `train` returned, by round the answers learned from); not to be changed.

    Every round must start from the adapter of the one before, and that one must have given its answers.
    """
    folder = shutil.copytree(finished, tmp_path_factory.mktemp("ric") / "run")
    learned, trained, fine_tune, sample = {}, [None], ric.fine_tune, ric.sample_rows

    def watched(run, settings, stage, number, answers, start=None):
        assert start is trained[-1]
        learned[number] = list(answers)
        trained.append(fine_tune(run, settings, stage, number, answers, start))
        return trained[-1]

    def asked(run, bank, rows, keys, **named):
        assert bank is trained[-1] is not None
        return sample(run, bank, rows, keys, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ric, "fine_tune", watched)
        patch.setattr(ric, "sample_rows", asked)
        run, section = started(folder)
        info = ric.train(run, section, STAGE)
    return run, section, info, learned


def answers_of(run, number):
    return [json.loads(x) for x in (run.workdir.path / STAGE / f"answers{number}.jsonl").read_text().splitlines()]


def words(run, scores):
    return PreferencePrompt(form="tally", levels=2)(run.audience.preferences, run.audience.objectives, scores)


# ---- the data


def test_scores_are_calibrated_rewards_of_the_answers_to_plain_requests(trained):
    run, _, _, _ = trained
    score, found = jax.jit(reward_scores, static_argnames="scale"), []
    arguments = run.workspace.backbone, reward.load(run), jnp.arange(N)[None]
    records = [answer for number in range(3) for answer in answers_of(run, number)]
    for record in records[:: len(records) // 12]:
        plain = run.records.ask(record["request"])
        answer = run.workspace.tokenizer.encode_answers(plain, [record["text"]])[1][0].ids[
            : run.text.lengths.completion
        ]
        tokens, valid = pad_right([answer], run.text.lengths.completion, run.workspace.tokenizer.pad_id)
        response = Rollout(tokens, valid, np.zeros(tokens.shape, np.float32))
        found.append((record["scores"], score(*arguments, run.text.encode([plain]), response, scale="quantiles")[0]))
    np.testing.assert_allclose(*zip(*found, strict=True), atol=1e-5)
    scores = np.array([record["scores"] for record in records])
    assert scores.min() >= 0 and scores.max() <= 1 and (scores.std(0) > 0.05).all()


def test_requests_come_in_turn(trained):
    run, section, _, _ = trained
    asked = [answer["request"] for answer in answers_of(run, 0)]
    assert asked == [q for q in run.records.requests[0][: section.samples] if q in asked]
    assert len(asked) > section.samples / 2


def test_prompts_state_the_scores_their_answers_got(trained):
    run, section, _, learned = trained
    for number, answers in learned.items():
        table = ric.stated(run, section, answers, "test")
        assert len(table) == len(answers) > 0
        for row, answer in zip(table, answers, strict=True):
            prompt = run.records.ask(answer["request"], words(run, answer["scores"]))
            assert row["prompt"].tolist() == run.workspace.tokenizer.encode_prompt(prompt)
            assert run.workspace.tokenizer.decode(row["completion"]).split() == answer["text"].split()
        assert len({words(run, answer["scores"]) for answer in answers}) > 3, number
    # Online these are not the scores that were asked for.
    asked = {row.request: row.words for row in ric.wanted(run, section, 1)}
    online = answers_of(run, 1)
    assert len(asked) == section.online_samples
    assert np.mean([words(run, a["scores"]) != asked[a["request"]] for a in online]) > 0.3


def test_online_rounds_ask_for_targets_of_drawn_weights(trained):
    run, section, _, _ = trained
    weights = run.streams.numpy("ric/targets", 1).dirichlet(np.ones(N), section.online_samples)
    rows = ric.wanted(run, section, 1)
    assert [row.words for row in rows] == [words(run, p) for p in target_map(weights, "l2").tolist()]
    assert rows == ric.wanted(run, section, 1)
    assert [row.words for row in rows] != [row.words for row in ric.wanted(run, section, 2)]
    assert [row.request for row in rows] == run.records.requests[0][: section.online_samples]


# ---- what is kept


def test_good_is_what_any_objective_finds_good():
    def made(*scores):
        return [{"request": "", "text": str(i), "scores": list(row)} for i, row in enumerate(scores)]

    offline = made(*[(i / 10, 1 - i / 20) for i in range(11)])  # quantile 0.7 at 0.7 and 0.85
    answers = made((0.69, 0.84), (0.7, 0.0), (0.0, 0.86), (1.0, 1.0), (0.5, 0.5))
    assert [a["text"] for a in ric.good(answers, offline, 0.7)] == ["1", "2", "3"]
    assert ric.good(answers, offline, 0.0) == answers
    assert [a["text"] for a in ric.good(answers, offline, 1.0)] == ["3"]


def test_an_online_round_learns_from_the_good_and_a_share_of_the_first(trained):
    run, section, info, learned = trained
    offline = answers_of(run, 0)
    assert learned[0] == offline
    limits = np.quantile([answer["scores"] for answer in offline], section.quantile, axis=0)
    for number in (1, 2):
        found = answers_of(run, number)
        best = [answer for answer in found if any(s >= l for s, l in zip(answer["scores"], limits, strict=True))]
        assert 0 < len(best) < len(found)
        assert info["kept"][number - 1] == len(best)
        again = learned[number][len(best) :]
        assert learned[number][: len(best)] == best
        assert len(again) == round(section.base_fraction * len(offline)) and all(answer in offline for answer in again)
        assert len({answer["request"] for answer in again}) == len(again), "drawn twice"
    assert learned[1][-len(again) :] != learned[2][-len(again) :]


def test_empty_answers_are_left_out(trained, monkeypatch):
    run, _, _, _ = trained
    texts = ["it can grow .", "  ", "", "be kind ."]
    found = ric.scored(run, reward.load(run), run.records.requests[0][:4], texts, "test")
    assert [answer["request"] for answer in found] == [run.records.requests[0][0], run.records.requests[0][3]]
    with pytest.raises(UserError, match="test: all of 2 answers are empty; train the base longer"):
        ric.scored(run, reward.load(run), run.records.requests[0][:2], ["", " "], "test")


# ---- training


def test_what_is_returned_and_written(trained):
    run, section, info, _ = trained
    samples = section.samples + 2 * section.online_samples
    assert info["ingredients"] == ["policy"] and info["samples"] == samples
    assert info["empty_answers"] == samples - sum(len(answers_of(run, number)) for number in range(3))
    bank = banks.load(run, STAGE, ["policy"])
    assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(bank)) > 0
    assert (run.workdir.path / STAGE / "ingredients" / "policy" / "adapter_model.safetensors").is_file()
    steps = [[row["step"] for row in tiny.lines(run.workdir.path, f"{STAGE}/round{i}")] for i in range(3)]
    assert [len(x) for x in steps] == [section.steps, section.online_steps, section.online_steps]
    first = [row["loss"] for row in tiny.lines(run.workdir.path, f"{STAGE}/round0")]
    assert np.mean(first[-3:]) < np.mean(first[:3]) - 0.02


def test_a_round_goes_on_from_the_adapter_it_is_given(trained):
    run, section, _, learned = trained
    table = ric.stated(run, section, learned[1], "test")
    start = banks.load(run, STAGE, ["policy"])
    method = ric.method_of(run, section, ric.Round(table, 6, start))
    state = method.init()
    assert_same(state.trainable, start)
    state, _ = method.step(state, next(method.batches))
    moved = jax.tree.map(lambda x, y: float(jnp.abs(x - y).max()), state.trainable, start)  # start is not donated
    assert min(jax.tree.leaves(moved)) > 0


def never(*arguments, **more):
    raise AssertionError("sampled again")


def test_a_restart_samples_nothing_again(trained, tmp_path, monkeypatch):
    run, section, info, _ = trained
    folder = shutil.copytree(run.workdir.path, tmp_path / "run")
    monkeypatch.setattr(ric, "sample_base", never)
    monkeypatch.setattr(ric, "sample_rows", never)
    again, section = started(folder)
    assert ric.train(again, section, STAGE) == info
    assert_same(banks.load(again, STAGE, ["policy"]), banks.load(run, STAGE, ["policy"]))
    # Stopped in the second online round, with its answers, and with half a file from a crash.
    shutil.rmtree(folder / STAGE / "round2")
    (folder / STAGE / "bank.safetensors").unlink()
    (folder / STAGE / ".answers2.jsonl.tmp").write_text('{"request": "wh')
    assert ric.train(*started(folder), STAGE) == info
    assert_same(banks.load(again, STAGE, ["policy"]), banks.load(run, STAGE, ["policy"]))


def test_a_lost_round_is_sampled_as_it_was(trained, tmp_path, monkeypatch):
    run, _, info, _ = trained
    folder = shutil.copytree(run.workdir.path, tmp_path / "run")
    (folder / STAGE / "answers2.jsonl").unlink()
    shutil.rmtree(folder / STAGE / "round2")
    monkeypatch.setattr(ric, "sample_base", never)
    again, section = started(folder)
    assert ric.train(again, section, STAGE) == info
    assert answers_of(again, 2) == answers_of(run, 2)
    assert tiny.lines(folder, f"{STAGE}/round2") == tiny.lines(run.workdir.path, f"{STAGE}/round2")


MISTAKES = [
    (
        {"prompt_format": {"form": "numbers"}},
        "prompt_format .*: the tokenizer has no token for some of it; choose other labels",
    ),
    (
        {"prompt_format": {"form": "verse"}},
        "ric.prompt_format.form: 'verse' is unknown; choose one of sentences, numbers, tally",
    ),
    (
        {"prompt_format": {"levels": 30}},
        r"prompt_format .*: the prompt has \d+ tokens with it, more than data.max_prompt=20",
    ),
    ({"target": "linf"}, "ric.target: 'linf' is unknown; choose one of identity, l2, max"),
    ({"quantile": 1.5}, "ric.quantile: 1.5 is out of range; choose a number at least 0 and at most 1"),
    ({"base_fraction": -0.1}, "ric.base_fraction: -0.1 is out of range"),
]


@pytest.mark.parametrize(("changes", "message"), MISTAKES, ids=[str(changes) for changes, _ in MISTAKES])
def test_wrong_settings_are_found_before_anything_is_sampled(copied, monkeypatch, changes, message):
    monkeypatch.setattr(ric, "sample_base", never)
    with pytest.raises(UserError, match=message):
        ric.train(*started(copied, **changes), STAGE)


def test_too_large_a_batch(copied):
    run, section = started(copied, batch_size=64)
    with pytest.raises(
        UserError, match=r"ric.batch_size: a batch takes 64 rows, and there are only \d+ to train on; lower it"
    ):
        ric.train(run, section, STAGE)
