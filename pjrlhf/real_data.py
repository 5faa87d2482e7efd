"""Building blocks of configs on real answers and real people, whose files are in $PJRLHF_TEST_DATA (../shared by
default), in data/alpaca_eval, data/llmfao, data/papi and data/prefeval.
"""

# The attributes of a ConfigDict are dynamic.
# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false, reportArgumentType=false

import os
from typing import Any

import ml_collections
from absl import logging


def folder(name: str) -> str:
    """The folder of a set; a warning where it does not exist."""
    root = os.environ.get("PJRLHF_TEST_DATA", "../shared")
    found = f"{root}/data/{name}"
    if not os.path.isdir(found):
        logging.warning(
            "%s: does not exist, and this config reads it; set the environment variable PJRLHF_TEST_DATA to a folder "
            "with data/%s (docs/results/smollm.md says what is in it)",
            found,
            name,
        )
    return found


def source(section: ml_collections.ConfigDict, **spec: Any) -> None:
    """Makes a source the `data` of a section, whatever stood there."""
    with section.ignore_type():
        section.data = ml_collections.ConfigDict(spec)


def prompts(c: ml_collections.ConfigDict, **spec: Any) -> None:
    """Makes a source that of the prompts."""
    with c.ignore_type():
        c.data.prompts = ml_collections.ConfigDict(spec)


def style_pairs() -> dict[str, Any]:
    """The prompts of AlpacaEval, each with a concise and a verbose answer."""
    return {"kind": "jsonl", "path": f"{folder('alpaca_eval')}/style_pairs.jsonl.gz"}


def crowd_votes(least: int) -> dict[str, Any]:
    """The votes of a crowd on answers of language models, of people with `least` votes or more."""
    place = folder("llmfao")
    return {
        "kind": "votes",
        "path": f"{place}/pairs-crowd.jsonl",
        "votes": f"{place}/crowd-comparisons.csv",
        "prompt": "text",
        "left": "result_x",
        "right": "result_y",
        "min_votes": least,
    }


def statements() -> dict[str, Any]:
    """Pairs of statements about oneself, of which 120 people find one truer of them than the other."""
    place = folder("papi")
    return {
        "kind": "ratings",
        "path": f"{place}/users.jsonl",
        "statements": f"{place}/items.json",
        "ratings": "agreement",
        "prompt": "Which statement describes you?",
    }


def small_base(c: ml_collections.ConfigDict, steps: int, completion: int) -> None:
    """A model from scratch, trained on answers of real models, of which it reads the first `completion` tokens."""
    source(c.sft, kind="jsonl", path=f"{folder('alpaca_eval')}/responses.jsonl.gz")
    with c.ignore_type():
        c.data.columns = ml_collections.ConfigDict({"completion": "response"})
        c.model.tokenizer = ml_collections.ConfigDict({"kind": "bpe", "vocab_size": 2048, "texts": 5000})
    c.model.update({"hidden_size": 128, "intermediate_size": 384, "max_length": 384})
    c.data.update({"max_prompt": 64, "prompt_buckets": (32,), "max_completion": completion, "max_bad_fraction": 0.05})
    c.data.update({"long_prompt": "truncate_left", "long_completion": "truncate"})
    c.sft.update({"steps": steps, "batch_size": 16})
    c.sft.optimizer.learning_rate = 3e-3
