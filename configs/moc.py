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

Time on 2 CPU cores: about 2 minutes, and half an hour for the stories. Results: docs/results/moc.md.
"""

import ml_collections

from pjrlhf import config
from pjrlhf.errors import UserError


def get_config(variant: str = "synthetic") -> ml_collections.ConfigDict:
    if variant not in ("synthetic", "stories"):
        raise UserError(f"configs/moc.py:{variant}: unknown variant; use configs/moc.py or configs/moc.py:stories")
    c = config.base()
    c.title = "MOC: one policy whose prompt states preference weights"
    if variant == "synthetic":
        config.front(c, ("P2A", "P2B"))
        config.family(c, "moc", "sum")
    else:
        stories(c)
    return c


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
        c.data.prompts = ml_collections.ConfigDict({"kind": "jsonl", "path": "configs/story_openings.jsonl"})
    config.pretrained(c)
    c.data.update({"max_prompt": 256, "max_completion": 128})
    c.sample_rows = 128
    config.family(c, "rlhf", "rsoups", "clp", "moc", "sum", "pama")
