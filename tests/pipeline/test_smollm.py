"""Every variant of configs/smollm.py from end to end, on a random model and records in the schemas of its data."""

import csv
import gzip
import json

import pytest
from support import tiny, tiny_papers, tiny_users

from pjrlhf.data import synthetic

LONG, SHORT = "it can shine and it can grow and it can melt .", "it can grow ."
SIZES = {
    "log_every": 1,
    "checkpoint_every": 0,
    "sample_rows": 16,
    "data.max_prompt": 20,
    "data.max_completion": 12,
    "data.prompt_buckets": (),
    "data.completion_buckets": (),
    "data.heldout_fraction": 0.3,
}
PREFERENCE = {
    "preference.steps": 2,
    "preference.batch_size": 4,
    "preference.optimizer.warmup_steps": 0,
    "preference.max_pairs": 12,
    "evaluate_users.resamples": 20,
    "evaluate_users.generate_for": 1,
    "evaluate_users.max_new_tokens": 6,
}
POLICY = {"policy.steps": 2, "reward.calibration_samples": 8}
FRONT = POLICY | {
    "ric.samples": 8,
    "ric.steps": 2,
    "ric.online_steps": 2,
    "ric.batch_size": 4,
    "ric.optimizer.warmup_steps": 0,
}
PEOPLE = {
    "population.users": 3,
    "population.new_users": 2,
    "population.pairs_per_user": 4,
    "population.heldout_pairs_per_user": 2,
    "population.new_pairs_per_user": 2,
}
VARIANTS = {
    "soups": POLICY
    | {
        "methods.pmorl.rollouts": 8,
        "methods.pmorl.ppo.accumulation_steps": 2,
        "evaluate.resamples": 20,
        "evaluate.sweep_points": 2,
    },
    "front": FRONT,
    "front3": FRONT,
    "pdpo_length": PREFERENCE | PEOPLE | {"data.max_completion": 40},  # one answer of a pair has to fit
    "pdpo_votes": PREFERENCE,
    "pdpo_text": PREFERENCE,
    "hh": PREFERENCE,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with the files that the variants read, and a base."""
    folder = tmp_path_factory.mktemp("data")
    for name in ("alpaca_eval", "llmfao", "prefeval"):
        (folder / "data" / name).mkdir(parents=True)
    prompts = synthetic.prompts()[:24]
    with gzip.open(folder / "data/alpaca_eval/style_pairs.jsonl.gz", "wt") as file:
        for prompt in prompts:
            file.write(json.dumps({"prompt": prompt, "concise": SHORT, "verbose": LONG, "model": "m"}) + "\n")
    pairs = [{"id": i, "text": p, "result_x": SHORT, "result_y": f"{LONG} {p}"} for i, p in enumerate(prompts)]
    tiny_users.write_records(folder / "data/llmfao/pairs-crowd.jsonl", pairs)
    with (folder / "data/llmfao/crowd-comparisons.csv").open("w") as file:
        rows = csv.writer(file)
        rows.writerow(["id", "worker", "winner"])
        rows.writerows([[i, f"w{k}", "left" if k else "right"] for k in range(3) for i in range(24) for _ in range(3)])
    questions = [
        {
            "preference": f"i like {prompt}",
            "question": prompt,
            "classification_task_options": [LONG, SHORT, f"{SHORT} {SHORT}", "it can melt ."],
        }
        for prompt in prompts
    ]
    (folder / "data/prefeval/topic.json").write_text(json.dumps(questions))
    for part, texts in (("helpful-base", (LONG, SHORT)), ("harmless-base", (SHORT, LONG))):
        (folder / "hh" / part).mkdir(parents=True)
        rows = [
            {side: f"\n\nHuman: {p}\n\nAssistant: {t}" for side, t in zip(("chosen", "rejected"), texts, strict=True)}
            for p in prompts
        ]
        tiny_users.write_records(folder / "hh" / part / "train.jsonl", rows)
    return folder, tiny_papers.base(folder)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_runs(data, tmp_path, monkeypatch, variant):
    for extra in ("textstat", "vaderSentiment") if variant in ("soups", "front", "front3") else ():
        pytest.importorskip(extra, reason=f"{extra} is not installed")
    folder, base = data
    monkeypatch.setenv("PJRLHF_TEST_DATA", str(folder))
    config = tiny.catalogue("smollm").get_config(variant)
    assert not config.model.path, "any model will do"
    config.model.path = str(base)
    with config.ignore_type():
        config.update_from_flattened_dict(SIZES | VARIANTS[variant])
        if variant.startswith("front"):
            config.rewards.friendly.scorer = "longer"  # a random model knows no friendly word
        if variant == "pdpo_votes":
            config.preference.data.min_votes = 1
        if variant == "hh":
            config.preference.data.path = str(folder / "hh")
    run = tiny.run(tmp_path / "run", config)
    summary = json.loads((run / "report" / "summary.json").read_text())
    if variant == "pdpo_text":
        assert {"base", "base_told", "base_told_others"} < set(summary["choices"])
    elif variant == "soups":
        assert {"base", "prompting", "soups", "pmorl"} == set(summary["win_rate"])
    elif variant.startswith("front"):
        assert {"prompting", "rsoups", "clp", "moc", "ric", "mod"} == set(summary["methods"])
    else:
        assert {"base", "pooled", "individualized", "permuted"} <= set(summary["accuracy"])
    if variant == "hh":
        assert {*summary["accuracy"]["individualized"]["users"]} == {"helpful", "harmless"}
