"""A whole run on records with names and columns that no code here chose."""

import json

import pytest
from support import tiny, tiny_users
from support.pages import Page

from pjrlhf.data import synthetic

WHO = ("a$b_$", "_<i>\x1b[31m", "你好 [bold]")
ANSWERS = ("it can shine .", "it can grow .")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Columns with the names that the simulated population gives its own ones, and with other content."""
    folder = tmp_path_factory.mktemp("own")
    lines = [
        {
            "question": f"{i}",
            "persona": [i],
            "held_out": "yes",
            "group": {"a": i},
            "taste": None,
            "prompt": prompt,
            "user_id": who,
            "chosen": ANSWERS[(i + k) % 2],
            "rejected": ANSWERS[(i + k + 1) % 2],
        }
        for i, prompt in enumerate(synthetic.prompts()[:8])
        for k, who in enumerate(WHO)
    ]
    path = tiny_users.write_records(folder / "records.jsonl", lines)
    changes = {"preference__batch_size": 4, "preference__steps": 2, "preference__optimizer__warmup_steps": 0}
    changes |= {"data__max_prompt": 20, "data__max_completion": 10, "evaluate_users__generate_for": 1}
    models = {"pooled": {"kind": "uniform"}, "a$b_$[x]": {"kind": "individualized", "tokens": 1}}
    base = str(tiny_users.save_base(folder))
    config = tiny_users.settings(
        "records", model__path=base, preference__data__path=path, **changes, **{"preference.models": models}
    )
    config.evaluate_users.update({"cold_start": (), "resamples": 20})
    return tiny.run(folder / "run", config)


@pytest.mark.slow
def test_names_and_columns_are_data(finished):
    summary = json.loads((finished / "report" / "summary.json").read_text(encoding="utf-8"))
    for found in summary["accuracy"].values():
        assert set(found["users"]) == set(WHO) and "majority" not in found
        assert {one["group"] for one in found["users"].values()} == {None}
    assert summary["choices"] == {} and "ceiling" not in summary
    assert set(summary["grid"]["pooled"]) == {"seen_user_seen_prompt", "seen_user_unseen_prompt"}
    page = Page((finished / "report" / "index.html").read_text(encoding="utf-8"))
    assert "你好 [bold]" in "".join(page.text) and "i" not in {
        tag for tag, known in page.tags if not known and tag == "i"
    }


@pytest.mark.slow
def test_all_sampled_answers_are_kept(finished):
    lines = (finished / "report" / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    found = [json.loads(line) for line in lines]
    assert {(one["model"], one["user"]) for one in found} == {
        (model, who) for model in ("pooled", "a$b_$[x]") for who in WHO
    }
    assert all(isinstance(one["answer"], str) and one["prompt"] for one in found)


@pytest.mark.slow
def test_the_page_says_how_the_run_was_made(finished):
    summary = json.loads((finished / "report" / "summary.json").read_text(encoding="utf-8"))
    assert {"command", "folder", "base", "devices", "versions"} < set(summary["run"])
    assert {"preference.data.path", "model.path"} & set(summary["run"]), "what was read from outside the folder"
    assert "jax" in summary["run"]["versions"] and "fingerprint" in summary["run"]["base"]
    assert summary["config"]["preference"]["data"]["path"].endswith("records.jsonl")
    text = "".join(Page((finished / "report" / "index.html").read_text(encoding="utf-8")).text)
    assert "preference.optimizer.learning_rate" in text and "records.jsonl" in text


@pytest.mark.slow
def test_without_a_chat_template_the_synthetic_environment_trains_on_text(tmp_path):
    config = tiny.settings(stages=("sft",), data__chat=False, sft__steps=3, sft__optimizer__warmup_steps=0)
    folder = tiny.run(tmp_path / "run", config)
    assert len(tiny.lines(folder)) == 3
