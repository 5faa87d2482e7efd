"""P-RLHF (arXiv 2402.05133, version 3): P-DPO in the three experiments of the paper, against pooled DPO and permuted
user ids.

    python -m pjrlhf.main --config=configs/papers/prlhf.py:tldr_top10 --config.preference.data.path=FOLDER \\
        --config.preference.heldout_data.path=FOLDER
    python -m pjrlhf.main --config=configs/papers/prlhf.py:psoups
    python -m pjrlhf.main --config=configs/papers/prlhf.py:prism

Variants:
  tldr_top10, tldr_top40: GPT-J 6B, the 10 or 40 busiest annotators of TL;DR, each of whom wants longer or shorter
    summaries. FOLDER holds the raw comparisons of summarize_from_feedback, whose validation part is held out.
  psoups: Tulu 7B, six people with one preference of Personalized Soups each.
  prism: Llama 3 8B Instruct, the people of PRISM and what they say about themselves, individualized; prism_cluster10
    and prism_cluster100 with clusters of people.

Published: the tables of the paper were not available. For TL;DR, a model that knows nobody can reach 68.5 % on held-out
pairs of the top 10 (the fraction who want longer ones), and one that knows everybody about 100 %. An independent run of
P-RM, the same user model with a reward head, reaches 81.1 % on psoups (arXiv 2502.19158, its logs).

What differs from the paper, and how to prepare GPT-J and Tulu: docs/papers.md.
"""

from typing import Any

import ml_collections

from pjrlhf import config, papers
from pjrlhf.errors import UserError

# "code" in this file: HumainLab/Personalized_RLHF at ae1f81b, the scripts of the authors.
VARIANTS = ("tldr_top10", "tldr_top40", "psoups", "prism", "prism_cluster10", "prism_cluster100")
ABOUT = ("preferences", "description", "demographics")  # code: what the model is told of a person
LLAMA_TARGETS = ("q_proj", "k_proj", "v_proj")  # of the names in the code, those that a Llama has


def get_config(variant: str = "tldr_top10") -> ml_collections.ConfigDict:
    if variant not in VARIANTS:
        raise UserError(f"configs/papers/prlhf.py:{variant}: unknown variant; use one of {', '.join(VARIANTS)}")
    c = config.base()
    c.stages = ("preference", "evaluate_users")
    config.users(c)
    name, _, size = variant.partition("_")
    {"tldr": tldr, "psoups": psoups, "prism": prism}[name](c, size)
    # Code, of all scripts: rank 8, both optimizers alike, a seed of 123.
    c.adapter.rank = 8
    for optimizer in (c.preference.optimizer, c.preference.user_optimizer):
        optimizer.update({"learning_rate": 5e-5, "schedule": "cosine", "warmup_steps": 150})
    c.seed = 123
    # Code: 32 rows a step, where every pair is there twice: with its person and with the generic user.
    c.preference.update({"batch_size": 16, "accumulation_steps": 4, "mixture": "exact", "alpha": 0.5})
    c.evaluate_users.cold_start = ()
    return c


def _entries(c: ml_collections.ConfigDict, entry: dict[str, Any], **shared: Any) -> None:
    """Pooled DPO, the model of the paper, and the same under wrong names."""
    entry = {"tokens": 10, "start": "vocabulary", "zero_offset": False, **entry}  # code: ten tokens, offsets not zero
    pooled = {"kind": "uniform"}
    models = {"pooled": pooled, entry["kind"]: entry, "permuted": {**entry, "permuted": True}}
    with c.ignore_type():
        c.preference.models = ml_collections.ConfigDict({name: {**x, **shared} for name, x in models.items()})


def _data(c: ml_collections.ConfigDict, heldout: dict[str, Any] | None = None, **spec: Any) -> None:
    """The comparisons, and what is said otherwise where the held-out ones are published."""
    with c.ignore_type():
        c.preference.data = ml_collections.ConfigDict(spec)
        if heldout:
            c.preference.heldout_data = ml_collections.ConfigDict({**spec, **heldout})


def tldr(c: ml_collections.ConfigDict, size: str) -> None:
    top = int(size.removeprefix("top"))
    c.title = f"P-DPO on TL;DR: {top} annotators who want longer or shorter summaries"
    papers.base_model(c, "CarperAI/openai_summarize_tldr_sft")  # a public GPT-J after SFT; the authors name none
    # Code: pairs of supervised policies; every worker draws longer (0.7) or shorter summaries.
    pairs = {"kind": "tldr", "path": "", "workers": top, "policies": "supervised", "labels": "length"}
    _data(c, heldout={"split": "validation"}, **pairs)
    _entries(c, {"kind": "individualized"})
    c.data.update({"max_prompt": 550, "max_completion": 128})  # code: 550 of the prompt, 600 in all
    c.data.long_completion = "drop"  # the lengths of two cut summaries cannot be compared
    c.data.max_bad_fraction = 0.05
    c.preference.update({"beta": 0.5, "epochs": 2.0})  # code
    c.adapter.update({"alpha": 16.0, "dropout": 0.05})  # code
    c.evaluate_users.generate_for = 50  # code: 50 prompts, answered as every annotator


def psoups(c: ml_collections.ConfigDict, size: str) -> None:
    c.title = "P-DPO on Personalized Soups: six people with one preference each"
    papers.base_model(c, "TheBloke/tulu-7B-fp16")  # code: Tulu 7B
    _data(c, kind="psoups", path="RiverDong/psoups")
    _entries(c, {"kind": "individualized"})
    c.data.update({"max_prompt": 200, "max_completion": 800})  # code: 200 of the prompt, 1000 in all
    c.preference.update({"beta": 0.1, "epochs": 2.0, "heldout_fraction": 0.1})  # code
    c.adapter.update({"alpha": 32.0, "dropout": 0.1, "target_modules": LLAMA_TARGETS})  # code
    c.evaluate_users.generate_for = 50  # code: 50 prompts of Koala


def prism(c: ml_collections.ConfigDict, size: str) -> None:
    clusters = int(size.removeprefix("cluster") or 0)
    c.title = f"P-DPO on PRISM: {f'{clusters} clusters of people' if clusters else 'people'}"
    papers.base_model(c, "meta-llama/Meta-Llama-3-8B-Instruct")  # code
    _data(c, kind="prism", path="HannahRoseKirk/prism-alignment", about=ABOUT)
    entry = {"kind": "cluster", "clusters": clusters} if clusters else {"kind": "individualized"}
    _entries(c, entry, user_text=True)  # paper, section 5.3: who people are and what they say
    c.preference.models["pooled_plain"] = ml_collections.ConfigDict({"kind": "uniform"})
    c.data.update({"max_prompt": 470, "max_completion": 300})  # code: 470 of the prompt, 770 in all
    # Code: one in ten people is new, and of the others one in ten dialogues is held out.
    c.preference.update({"beta": 0.5, "epochs": 1.0, "new_user_fraction": 0.1, "heldout_fraction": 0.1})
    c.preference.split = "group"  # a dialogue is on one side
    c.adapter.update({"alpha": 16.0, "dropout": 0.05, "target_modules": LLAMA_TARGETS})  # code
    c.evaluate_users.generate_for = 0  # 1,234 people would answer every prompt
    c.aot.users = 1396  # paper: people with a finished conversation
