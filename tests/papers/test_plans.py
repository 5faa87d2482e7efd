"""At their full size, the configs of papers fit the chips that docs/papers.md names, by a real compiler."""

import importlib.util
import json

import pytest
from support import tiny_papers

from pjrlhf.aot import plan as aot

needs_compiler = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu (pjrlhf[tpu])")
# What a dry run reads of the reward models of HH-RLHF; those of other architectures run in torch, beside the chips.
GPT2_LARGE = {
    "architectures": ["GPT2ForSequenceClassification"],
    "model_type": "gpt2",
    "n_embd": 1280,
    "n_head": 20,
    "n_layer": 36,
    "n_positions": 1024,
    "vocab_size": 50257,
    "id2label": {"0": "LABEL_0"},
    "pad_token_id": 50256,
}
PLANS = {
    ("prlhf", "prism"): "v5e:4x4",
    ("personalized_soups", "eight"): "v5p:2x2x4",
    ("ric", "assistant"): "v5p:2x2x4",
    ("moc", "assistant"): "v5p:2x2x4",
    ("rewarded_soups", "news"): "v5p:2x2x4",
    ("modpo", None): "v5p:2x2x4",
    ("personal_llm", "llama"): "v5e:4x4",
    ("personal_rewardbench", "arena"): "v5e:4x4",
}


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(("paper", "variant"), PLANS)
def test_a_paper_fits(paper, variant, tmp_path):
    config = tiny_papers.config_of_paper(paper, variant)
    for name, spec in config.rewards.items():
        folder = tmp_path / name
        folder.mkdir()
        raw = GPT2_LARGE if "gpt2" in spec.path else {"model_type": "distilbert"}
        (folder / "config.json").write_text(json.dumps(raw))
        spec.path = str(folder)
    steps = aot.plan(config, PLANS[paper, variant])
    assert steps and all(step.fits for step in steps), [(one.name, one.memory / 2**30, one.problem) for one in steps]
