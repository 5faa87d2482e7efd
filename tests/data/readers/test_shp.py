"""Comments of communities: the preferred one, few per post, and clear ones."""

import pytest
from support.raw_data import read, write


def row(post="p1", label=1, ratio=3.0, domain="askculinary_train", **more):
    base = {
        "post_id": post,
        "domain": domain,
        "upvote_ratio": 0.9,
        "history": "How long do I boil an egg?",
        "c_root_id_A": "a",
        "c_root_id_B": "b",
        "created_at_utc_A": 2,
        "created_at_utc_B": 1,
        "score_A": 6,
        "score_B": 2,
        "human_ref_A": "Nine minutes.",
        "human_ref_B": "Until it floats.",
        "labels": label,
        "seconds_difference": 1.0,
        "score_ratio": ratio,
    }
    return {**base, **more}


def test_the_label_says_which_comment_is_preferred(tmp_path):
    path = write(tmp_path / "SHP/askculinary/train.json", [row(label=1), row(label=0)])
    first, second = read(kind="shp", path=path).good
    assert (first["chosen"], first["rejected"]) == ("Nine minutes.", "Until it floats.")
    assert (second["chosen"], second["rejected"]) == ("Until it floats.", "Nine minutes.")
    assert first["prompt"] == "How long do I boil an egg?" and first["user_id"] == "askculinary"


def test_a_folder_gives_the_files_of_a_part_of_all_communities(tmp_path):
    for name in ("askculinary", "legaladvice"):
        write(tmp_path / f"SHP/{name}/train.json", [row(domain=f"{name}_train")])
        write(tmp_path / f"SHP/{name}/test.json", [row(domain=f"{name}_test"), row(domain=f"{name}_test", post="p2")])
    found = read(kind="shp", path=str(tmp_path / "SHP"))
    assert [record["user_id"] for record in found.good] == ["askculinary", "legaladvice"]
    found = read(kind="shp", path=str(tmp_path / "SHP"), split="test", name="legaladvice")
    assert [record["user_id"] for record in found.good] == ["legaladvice"] * 2


def test_pairs_of_a_post_are_few_and_clear(tmp_path):
    rows = [row(human_ref_A=f"Answer {i}.") for i in range(8)] + [row(post="p2", ratio=1.5)]
    path = write(tmp_path / "train.jsonl", rows)
    found = read(kind="shp", path=path)
    assert len(found.good) == 5
    assert found.dropped == {"further pairs of a post": 3, "pairs below min_score_ratio": 1}
    assert len(read(kind="shp", path=path, max_pairs_per_post=0, min_score_ratio=1.0).good) == 9
    assert found.good == read(kind="shp", path=write(tmp_path / "b.jsonl", rows)).good


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"labels": 2}, "bad labels"),
        ({"labels": None}, "labels is null"),
        ({"human_ref_A": " "}, "empty human_ref_A"),
        ({"human_ref_B": "Nine minutes."}, "chosen equals rejected"),
        ({"history": ""}, "empty history"),
        ({"score_ratio": "high"}, "bad score_ratio"),
    ],
)
def test_bad_rows_are_named(tmp_path, change, reason):
    found = read(kind="shp", path=write(tmp_path / "train.jsonl", [row(), row() | change]))
    assert found.bad == [("train.jsonl line 2", reason)] and len(found.good) == 1


def test_compred_has_titles_and_parts_of_its_own(tmp_path):
    rows = [row(domain="AskPhysics", title="Eggs", history=""), row(post="p2", domain="AskBio", title="Eggs?")]
    write(tmp_path / "compred/science/train_pref-00000-of-00001.parquet", rows)
    write(tmp_path / "compred/science/train_sft-00000-of-00001.parquet", [{"post_id": "x"}])
    found = read(kind="compred", path=str(tmp_path / "compred"), name="science").good
    assert [(one["prompt"], one["user_id"]) for one in found] == [
        ("Eggs", "AskPhysics"),
        ("Eggs?\nHow long do I boil an egg?", "AskBio"),
    ]
