"""Prompts to evaluate on: Koala and AlpacaEval."""

import os
import pathlib

import pytest
from support.raw_data import odd, read, write


def test_line_feeds_of_koala_are_unescaped(tmp_path):
    rows = [{"id": "0", "prompt": "Rank these:\\nA, B."}, {"id": "1", "prompt": "Why?"}, {"id": "2", "prompt": None}]
    found = read("koala", write(tmp_path / "one_text/koala_eval_50.json", rows))
    assert [one["prompt"] for one in found.good] == ["Rank these:\nA, B.", "Why?"]
    assert found.bad == [("koala_eval_50.json record 3", "prompt is null")]


def row(subset="helpful_base", **changes):
    base = {"instruction": f"Say {subset}.", "output": "Well.", "generator": "text_davinci_003", "dataset": subset}
    return {**base, **changes}


def test_subsets_of_alpaca_eval(tmp_path):
    rows = [row(), row("koala"), row("vicuna"), row("oasst", output="")]
    path = write(tmp_path / "one_text/alpaca_eval.json", rows)
    assert [one["prompt"] for one in read("alpaca_eval", path).good] == [f"Say {row['dataset']}." for row in rows]
    found = read("alpaca_eval", path, subsets=("koala", "oasst"), gives="completions")
    assert found.good == [
        {"prompt": "Say koala.", "subset": "koala", "completion": "Well.", "generator": "text_davinci_003"}
    ]
    assert found.dropped == {"other subsets": 2} and [reason for _, reason in found.bad] == ["empty output"]
    assert len(read("alpaca_eval", path, split="eval[:3]").good) == 3


@pytest.mark.real_data
def test_the_file_of_koala_has_50_prompts():
    folder = os.environ.get("PJRLHF_TEST_DATA")
    if not folder:
        pytest.skip("PJRLHF_TEST_DATA names no folder of real data")
    found = read("koala", pathlib.Path(folder) / "data/koala_eval_50.json")
    assert len({one["prompt"] for one in found.good}) == 50 and not any("\\n" in one["prompt"] for one in found.good)


def test_values_of_another_type_are_bad_rows_and_no_tracebacks(tmp_path):
    assert read("koala", write(tmp_path / "a.jsonl", list(odd({"id": "0", "prompt": "Why?"})))).bad
    assert read("alpaca_eval", write(tmp_path / "a.jsonl", list(odd(row()))), gives="completions").bad
