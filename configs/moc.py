"""MOC (arXiv 2604.04497): one policy whose prompt states preference weights, compared with the same policy trained on
the weighted sum of the rewards.

MOC trains on min-norm combinations of the weighted rewards and a control reward, which is high where the rewards are
near the preference weights.

    python -m pjrlhf.main --config=configs/moc.py

The full text of the paper was not available. Where its abstract leaves a choice, the choice is a setting, explained in
`objectives/multi_objective.py:moc_heads`; `configs/family.py:ablation` compares them.

A pretrained story model, with sentiment (by the VADER lexicon, `pip install -e '.[sentiment]'`) against brevity, as in
the task of PAMA (arXiv 2508.07768), compared with other methods:

    python -m pjrlhf.main --config=configs/moc.py:stories --config.model.path=FOLDER

The setting of the paper: three public reward models on the prompts of HH-RLHF, for any chat model or Llama 2. Two have
the shape of GPT-2; the third runs in torch (`pip install -e '.[torch]'`). A path of your own is a flag, such as
`--config.rewards.harmless.path=FOLDER`:

    python -m pjrlhf.main --config=configs/moc.py:classifiers --config.model.path=FOLDER

Time on 2 CPU cores: about 2 minutes, and half an hour for the stories. Results: docs/results/moc.md.
"""

import ml_collections

from pjrlhf import config, papers
from pjrlhf.errors import UserError


def get_config(variant: str = "synthetic") -> ml_collections.ConfigDict:
    if variant not in ("synthetic", "stories", "classifiers"):
        known = ", ".join(f"configs/moc.py{name}" for name in ("", ":stories", ":classifiers"))
        raise UserError(f"configs/moc.py:{variant}: unknown variant; use one of {known}")
    c = config.base()
    c.title = "MOC: one policy whose prompt states preference weights"
    if variant == "synthetic":
        config.front(c, ("P2A", "P2B"))
        config.family(c, "moc", "sum")
    elif variant == "stories":
        stories(c)
    else:
        classifiers(c)
    return c


def classifiers(c: ml_collections.ConfigDict) -> None:
    """Harmless, helpful and humorous answers to the prompts of HH-RLHF, rewarded and evaluated by classifiers."""
    c.title = "MOC on three public reward models"
    papers.rewarded_by(c, "harmless", "helpful", "humor")
    with c.ignore_type():
        c.data.prompts = ml_collections.ConfigDict(
            {"kind": "datasets", "path": "Anthropic/hh-rlhf", "split": "train[:2%]"}
        )
    config.pretrained(c)
    c.data.update({"max_prompt": 256, "max_completion": 128})
    # PAMA (arXiv 2508.07768), whose setting the paper shares.
    c.adapter.update({"rank": 64, "alpha": 128.0})
    c.policy.optimizer.learning_rate = 1e-5
    c.policy.kl.coefficient = 0.2
    c.policy.update({"steps": 400, "rollouts": 32})
    config.family(c, "moc")


def stories(c: ml_collections.ConfigDict) -> None:
    """Sentiment and brevity of stories, from their openings."""
    c.title = "Sentiment against brevity on a story model"
    config.front(c, ("happy", "short"))
    c.stages = ("comparisons", "reward", "methods", "evaluate_front")
    with c.ignore_type():
        c.preferences = ml_collections.ConfigDict(
            {name: {"dimension": name, "sentence": f"{name}.", "label": name} for name in c.objectives}
        )
        c.judge = ml_collections.ConfigDict({"happy": "sentiment", "short": "short"})
        c.data.prompts = ml_collections.ConfigDict(
            {"kind": "jsonl", "path": config.beside(__file__, "story_openings.jsonl")}
        )
    config.pretrained(c)
    c.data.update({"max_prompt": 256, "max_completion": 128})
    c.sample_rows = 128
    config.family(c, "rlhf", "rsoups", "clp", "moc", "sum", "pama")
