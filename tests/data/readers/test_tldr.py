"""Comparisons of workers: both filters of P-RLHF, its draw of preferred lengths, and ratings on axes."""

import pytest
from support.raw_data import read, write

from pjrlhf.data.readers.tldr import lengths_preferred

POST = {"id": "t3_1", "post": "My cat sleeps all day. ", "title": "Cat?", "subreddit": "cats"}
ARTICLE = {"id": "c1", "post": None, "title": "News", "subreddit": None, "site": "cnn", "article": "It rained."}


def row(worker="w1", split="train", choice=1, texts=(" Cat sleeps.", " It sleeps all day long."), **more):
    policies = more.pop("policies", ("sup4_ppo_rm3_kl10", "sup1"))
    summaries = [{"text": t, "policy": p, "note": None} for t, p in zip(texts, policies, strict=True)]
    base = {"info": POST, "summaries": summaries, "choice": choice, "worker": worker, "batch": "batch3"}
    return {**base, "split": split, "extra": {"confidence": 8}, **more}


def sup(*args, **more):
    return row(*args, policies=("sup1", "sup2"), **more)


@pytest.fixture
def folder(tmp_path):
    """Ann has compared most, then Bob, then Eve; Dan only validated."""
    rows = [sup("ann")] * 3 + [sup("bob")] * 2 + [sup("eve"), row("bob"), row("dan")]
    rows += [sup("ann", "valid1"), sup("dan", "valid2"), sup("ann", info=ARTICLE)]
    rows += [row("dan", policies=("sup1", "sup_cnn"))]
    write(tmp_path / "dataset/comparisons/batch3.json", rows[:4])
    write(tmp_path / "dataset/comparisons/batch11.json", rows[4:])
    return tmp_path / "dataset"


def users(found):
    return [record["user_id"] for record in found.good]


def test_a_comparison_is_a_record_of_its_worker(folder):
    found = read("tldr", folder)
    assert len(found.good) == 9 and found.dropped == {"articles": 1} and not found.bad
    assert found.good[0] == {
        "prompt": "SUBREDDIT: r/cats\nTITLE: Cat?\nPOST: My cat sleeps all day.\nTL;DR:",
        "chosen": " It sleeps all day long.",
        "rejected": " Cat sleeps.",
        "user_id": "bob",
        "group": "t3_1",
        "confidence": 8,
    }
    assert read("tldr", folder, articles=True).dropped == {}


def test_forms_of_the_prompt(folder):
    prompts = {form: read("tldr", folder, prompt=form).good[0]["prompt"] for form in ("post", "summarize")}
    assert prompts == {
        "post": "My cat sleeps all day.",
        "summarize": "Summarize the following text:\nMy cat sleeps all day.",
    }


def test_a_line_of_a_prompt_without_a_value_is_left_out(folder):
    prompts = {record["prompt"] for record in read("tldr", folder, articles=True).good}
    assert "TITLE: News\nPOST: It rained.\nTL;DR:" in prompts and not any("None" in prompt for prompt in prompts)


def test_both_filters_of_p_rlhf(folder):
    found = read("tldr", folder, policies="supervised")
    assert sorted(users(found)) == ["ann"] * 3 + ["bob"] * 2 + ["eve"]
    assert found.dropped == {"articles": 1, "comparisons with other policies": 3}
    top = read("tldr", folder, policies="supervised", workers=2)
    assert sorted(users(top)) == ["ann"] * 3 + ["bob"] * 2
    assert top.dropped["comparisons of other workers"] == 1


def test_workers_are_ranked_by_training_comparisons_in_every_split(folder):
    filters = {"policies": "supervised", "workers": 1, "split": "validation"}
    assert users(read("tldr", folder, **filters)) == ["ann"]
    assert users(read("tldr", folder, **filters, others="keep")) == ["ann", "dan"]
    assert users(read("tldr", folder, split="valid2")) == ["dan"]
    assert len(read("tldr", folder, split="all").good) == 11


# Comparisons of the ten workers with the most of them, training and validation (P-RLHF, tldr_dataset.ipynb).
TRAIN = (5245, 2920, 2437, 2366, 2200, 2126, 1824, 1606, 1366, 1209)
VALID = (1175, 643, 381, 604, 586, 360, 321, 263, 177, 411)


def test_preferred_lengths_are_those_of_the_published_draw():
    prefers = list(lengths_preferred([f"w{i}" for i in range(10)]).values())
    assert sum(TRAIN) == 23299 and sum(VALID) == 4921
    for counts, longer, shorter in ((TRAIN, 16607, 6692), (VALID, 3371, 1550)):
        assert sum(n for n, one in zip(counts, prefers, strict=True) if one == "longer") == longer
        assert sum(n for n, one in zip(counts, prefers, strict=True) if one == "shorter") == shorter


def test_labels_by_length_are_one_preference_per_worker(tmp_path):
    workers = [f"w{i}" for i in range(10)]
    prefers = lengths_preferred(workers)
    texts = (" Long long summary.", " Short one.")
    rows = [
        sup(name, choice=choice, texts=texts[::order])
        for i, name in enumerate(workers)
        for _ in range(10 - i)
        for choice, order in ((0, 1), (1, -1))
    ]
    rows += [sup("w0", texts=(" Same.", " Same.")), sup("w0", texts=(" Abc.", " Xyz."))]
    found = read("tldr", write(tmp_path / "batch3.json", rows), labels="length", policies="supervised")
    assert len(found.good) == 110 and found.dropped == {"equal summaries": 1, "summaries of equal length": 1}
    for record in found.good:
        assert record["chosen"] == texts[prefers[record["user_id"]] == "shorter"]
        assert "confidence" not in record


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"choice": 2}, "bad choice"),
        ({"choice": None}, "choice is null"),
        ({"worker": None}, "worker is null"),
        ({"summaries": [{"text": "a"}]}, "not two summaries"),
        ({"summaries": [{"text": "a"}, {"text": " "}]}, "empty text"),
        ({"summaries": [{"text": "a"}, {"policy": "sup1"}]}, "missing text"),
        ({"info": {**POST, "post": None}}, "post is null"),
        ({"info": None}, "info is null"),
    ],
)
def test_bad_comparisons_are_named(tmp_path, change, reason):
    found = read("tldr", write(tmp_path / "batch3.json", [row(), row() | change]))
    assert found.bad == [("batch3.json line 2", reason)] and len(found.good) == 1


def rated(text, worker="ann", info=POST, split="valid2", **axes):
    scores = {"overall": None, "accuracy": None, "coverage": None, "coherence": None, **axes}
    summary = {"text": text, "policy": "sup1", "note": None, "axes": scores}
    return {"info": info, "summary": summary, "worker": worker, "batch": "axis", "split": split}


@pytest.fixture
def axes(tmp_path):
    rows = [
        rated(" A.", overall=7, accuracy=5),
        rated(" B.", overall="4", accuracy=5, coverage=2),
        rated(" C.", worker="bob", overall=1),
        rated(" D.", info=ARTICLE, overall=1),
        rated(" E."),
        rated(" F.", split="test", overall=2),
    ]
    write(tmp_path / "dataset/axis_evals/tldraxis1.json", rows)
    return tmp_path / "dataset"


def test_ratings_are_rewards_of_single_summaries(axes):
    found = read("tldr", axes, gives="axes", split="valid2")
    assert [(one["completion"], one["rewards"]) for one in found.good] == [
        (" A.", {"overall": 7.0, "accuracy": 5.0}),
        (" B.", {"overall": 4.0, "accuracy": 5.0, "coverage": 2.0}),
        (" C.", {"overall": 1.0}),
    ]
    assert found.dropped == {"articles": 1}
    assert found.bad == [("axis_evals/tldraxis1.json line 5", "no axis was judged")]


def test_pairs_of_ratings_are_of_one_post_worker_and_axis(axes):
    found = read("tldr", axes, gives="axis_pairs", split="valid2")
    (pair,) = found.good
    assert (pair["chosen"], pair["rejected"], pair["objective"], pair["margin"]) == (" A.", " B.", "overall", 0.5)
    assert found.dropped == {"articles": 1, "equal ratings": 1} and len(found.bad) == 1
