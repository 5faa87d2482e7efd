"""The configs of papers, small enough to run whole in a test: random models, and data written by hand in the schemas of
the raw files.
"""

import functools
import importlib.util
import itertools
import json
import pathlib

import numpy as np

from pjrlhf.data import bpe
from pjrlhf.data.preferences import PAPER
from pjrlhf.data.readers.personal_llm import SCALES
from support.drawn_models import golden_families
from support.raw_data import write
from support.tiny_classifiers import config_of
from support.tiny_llamas import write as write_model
from support.tiny_users import save_base

PAPERS = pathlib.Path(__file__).parents[2] / "configs" / "papers"
VOCABULARY = 320
PEOPLE = ("ann", "bob", "cid", "dee")


def variants():
    """(paper, variant) of all configs."""
    for path in sorted(PAPERS.glob("*.py")):
        for variant in names_of(path.stem) or (None,):
            yield path.stem, variant


@functools.cache
def module(paper):
    spec = importlib.util.spec_from_file_location(f"paper_{paper}", PAPERS / f"{paper}.py")
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def names_of(paper):
    """The variants of a config, from the message that refuses another one."""
    import re

    from pjrlhf.errors import UserError

    try:
        module(paper).get_config("no such variant")
    except UserError as error:
        return tuple(re.findall(r"\w+", str(error).partition("; use")[2].replace(" or ", " ").replace("one of", "")))
    except TypeError:
        return ()
    raise AssertionError(f"{paper}: takes any variant")


def config_of_paper(paper, variant):
    return module(paper).get_config(*([variant] if variant else []))


# ---- text


def sentence(i, words=8):
    """A sentence of its own for every number."""
    things = ("rain", "a bird", "the sea", "an old map", "bread", "the moon", "a letter", "snow", "a clock", "tea")
    acts = ("falls on", "finds", "keeps", "forgets", "follows", "colours", "needs", "leaves", "answers", "crosses")
    rng = np.random.default_rng(i)
    parts = itertools.chain.from_iterable((rng.choice(things), rng.choice(acts)) for _ in range(words))
    return f"{i}: {' '.join(itertools.islice(parts, words))}."


def long_text(i):
    """Between 100 and 1,200 characters."""
    return "\n".join(sentence(100 * i + j) for j in range(4))


# ---- models


def tokenizer(folder):
    """Reads any text, and has a chat template."""
    bpe.write_tokenizer(folder, [sentence(i) for i in range(50)], VOCABULARY)
    return folder


def base(folder):
    """A random model that reads any text; returns its Hugging Face folder."""
    return save_base(folder, VOCABULARY, max_length=4096, write_tokenizer=tokenizer)


def classifier(folder, labels, seed):
    """A random classifier of GPT-2 shape; returns its folder."""
    config = config_of("gpt2", labels, vocab_size=VOCABULARY)
    rng = np.random.default_rng(seed)
    shapes = golden_families()["gpt2"]["shapes"]
    weights = {name: rng.normal(0, 0.3, shape).astype(np.float32) for name, shape in shapes.items() if name[:2] != "lm"}
    weights["transformer.wte.weight"] = rng.normal(0, 0.3, (VOCABULARY, 24)).astype(np.float32)
    weights["score.weight"] = rng.normal(0, 1, (labels, 24)).astype(np.float32)
    return write_model(tokenizer(folder), config, weights)


# ---- data, by the kind of a source


def instructions(folder):
    rows = [{"instruction": sentence(i), "input": sentence(i + 900) if i % 2 else "", "output": ""} for i in range(24)]
    return write(folder / "train.jsonl", rows)


def news(folder):
    rows = [
        {"id": str(i), "text": f"PARIS (Reuters) - {long_text(i)}", "prediction": [{"text": sentence(i)}]}
        for i in range(24)
    ]
    return write(folder / "test.jsonl", [*rows, rows[0], {**rows[0], "text": None}])


def comparisons(folder):
    """summarize_from_feedback: comparisons/batch*.json, whose rows are posts of Reddit but for one of news."""
    policies = ("sup2", "sup4_6b_t.7")
    rows = [
        {
            "info": {"id": f"t3_{i // 2}", "post": long_text(i // 2), "title": sentence(i // 2), "subreddit": "r/tea"},
            "summaries": [
                {"text": f" {sentence(3 * i + j, 4 + 6 * ((i + j) % 2))}", "policy": policies[j], "note": ""}
                for j in range(2)
            ],
            "choice": i % 2,
            "worker": PEOPLE[i % 4],
            "batch": "batch3",
            "split": "valid1" if i >= 48 else "train",
            "extra": {"confidence": 5},
        }
        for i in range(64)
    ]
    other = {"id": "n", "site": "cnn", "title": sentence(1), "article": long_text(1), "post": None}
    write(folder / "comparisons" / "batch3.json", [*rows, {**rows[0], "info": other}])
    return str(folder / "comparisons")


def transcripts(folder):
    """HH-RLHF."""
    prompts = [
        f"\n\nHuman: {sentence(i)}\n\nAssistant: {sentence(i + 1)}\n\nHuman: {sentence(i + 2)}" for i in range(24)
    ]
    rows = [
        {side: f"{prompt}\n\nAssistant: {sentence(10 * i + j)}" for j, side in enumerate(("chosen", "rejected"))}
        for i, prompt in enumerate(prompts)
    ]
    write(folder / "helpful-base" / "train.jsonl", rows)
    return str(folder)


def verdicts(folder):
    """PKU-SafeRLHF-10K."""
    rows = [
        {
            "prompt": sentence(i),
            "response_0": sentence(2 * i + 100),
            "response_1": sentence(2 * i + 101),
            "is_response_0_safe": True,
            "is_response_1_safe": i % 3 > 0,
            "better_response_id": i % 2,
            "safer_response_id": (i // 2) % 2,
        }
        for i in range(32)
    ]
    return write(folder / "train.jsonl", rows)


def profiles(folder):
    """Personalized Soups, as on the hub: `uid` from 1 to 6."""
    rows = [
        {
            "prompt": f"{sentence(i)} {list(PAPER.values())[i % 6].sentence}",
            "chosen": sentence(2 * i + 300),
            "rejected": sentence(2 * i + 301),
            "uid": i % 6 + 1,
        }
        for i in range(60)
    ]
    return write(folder / "train.jsonl", rows)


def dialogues(folder):
    """PRISM: survey.jsonl and conversations.jsonl."""
    names = ("values", "creativity", "fluency", "factuality", "diversity", "safety", "personalisation", "helpfulness")
    survey = [
        {
            "user_id": user,
            "stated_prefs": {**{name: 10 * j + i for j, name in enumerate(names)}, "other": None, "other_text": None},
            "order_stated_prefs": {name: 8 - j for j, name in enumerate(names)},
            "self_description": sentence(i),
            "system_string": sentence(i + 50),
            "age": "35-44 years old",
            "num_completed_conversations": 6,
        }
        for i, user in enumerate((*PEOPLE, "eve", "fay"))
    ]

    def said(turn, role, i, score=None, chosen=None):
        return {"turn": turn, "role": role, "content": sentence(i), "score": score, "if_chosen": chosen}

    rows = []
    for i in range(36):
        history = [said(0, "user", i), said(0, "model", i + 1, 80, True), said(0, "model", i + 2, 20, False)]
        history += [said(1, "user", i + 3), said(1, "model", i + 4, 70, True), said(1, "model", i + 5, 30, False)]
        row = {"conversation_id": f"c{i}", "user_id": survey[i % 6]["user_id"], "conversation_type": "unguided"}
        rows.append(row | {"conversation_history": history, "performance_attributes": None})
    write(folder / "survey.jsonl", survey)
    write(folder / "conversations.jsonl", rows)
    return str(folder)


def scored_answers(folder):
    """PersonalLLM: eight answers to each prompt with the scores of ten reward models."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(24):
        row = {"prompt": sentence(i)}
        for j in range(1, 9):
            row[f"response_{j}"] = sentence(100 * i + j)
            row |= {f"response_{j}_{name}": float(rng.normal(3, 2)) for name in SCALES}
        rows.append(row)
    return write(folder / "train.jsonl", rows)


def of_people(folder):
    """PersonalRewardBench."""
    rows = []
    for i in range(40):
        turns = [("user", sentence(i)), ("model", sentence(i + 1)), ("user", sentence(i + 2))]
        chosen, rejected = ({"role": "model", "content": sentence(10 * i + j + 200)} for j in range(2))
        row = {"user_id": PEOPLE[i % 4], "context": [{"role": role, "content": text} for role, text in turns]}
        row |= {"chosen": chosen, "rejected": rejected, "chosen_score": 90.0, "rejected_score": 10.0}
        rows.append(row | {"split": ("train", "val", "test")[i % 3], "agreement": None})
    return write(folder / "train.jsonl", rows)


DATA = {
    "pjrlhf.papers:instructions": instructions,
    "pjrlhf.papers:news": news,
    "pjrlhf.papers:posts": comparisons,
    "hh_rlhf": transcripts,
    "tldr": comparisons,
    "psoups": profiles,
    "prism": dialogues,
    "pku_saferlhf": verdicts,
    "personal_llm": scored_answers,
    "personal_rewardbench": of_people,
}

# ---- a whole config

TINY = {
    "checkpoint_every": 0,
    "log_every": 1,
    "sample_rows": 16,
    "mesh.fsdp": 1,
    "model.dtype": "float32",
    "model.param_dtype": "float32",
    "model.remat": "none",
    "adapter.rank": 2,
    "data.prompt_buckets": (),
    "data.completion_buckets": (),
    "data.heldout_fraction": 0.2,
    "sft.adapter.rank": 2,
    "sft.optimizer.warmup_steps": 0,
    "sft.steps": 2,
    "sft.batch_size": 4,
    "comparisons.pairs": 48,
    "reward.steps": 2,
    "reward.epochs": 0.0,
    "reward.batch_size": 2,
    "reward.accumulation_steps": 2,
    "reward.calibration_samples": 16,
    "policy.steps": 2,
    "policy.rollouts": 4,
    "policy.ppo.minibatches": 1,
    "policy.ppo.epochs": 1,
    "policy.ppo.accumulation_steps": 2,
    "modpo.steps": 2,
    "modpo.epochs": 0.0,
    "modpo.batch_size": 4,
    "modpo.accumulation_steps": 2,
    "ric.samples": 16,
    "ric.steps": 2,
    "ric.batch_size": 4,
    "ric.online_samples": 16,
    "ric.online_steps": 2,
    "preference.steps": 2,
    "preference.data.people": 8,
    "preference.data.comparisons": 12,
    "preference.epochs": 0.0,
    "preference.batch_size": 8,
    "preference.accumulation_steps": 2,
    "preference.optimizer.warmup_steps": 1,
    "preference.user_optimizer.warmup_steps": 1,
    "evaluate.sweep_points": 2,
    "evaluate.sweep_samples": 1,
    "evaluate.resamples": 20,
    "evaluate_users.resamples": 20,
    "evaluate_users.grid_pairs": 20,
    "evaluate_front.base_samples": 4,
    "evaluate_front.unseen": False,
}


def tiny_config(paper, variant, folder, judge=""):
    """The config of a paper with stand-ins in `folder` and few steps.

    Args:
      judge: URL in place of that of chat judges.
    """
    config = config_of_paper(paper, variant)
    flat = config.to_dict()
    known = set(_keys(flat))
    with config.ignore_type():
        config.update_from_flattened_dict({key: value for key, value in TINY.items() if key in known})
    config.data.max_completion = min(config.data.max_completion, 96 if config.data.long_completion == "drop" else 24)
    if "evaluate_users" in config:
        config.evaluate_users.generate_for = min(config.evaluate_users.generate_for, 1)
        config.evaluate_users.max_new_tokens = 8
        config.evaluate_users.cold_start = config.evaluate_users.cold_start and (0, 2)
    for entry in config.methods.values():
        if "rollouts" in entry:
            entry.rollouts = 4
    _stand_ins(config, folder, judge, itertools.count())
    return config


def planned_config(paper, variant, folder):
    """The config of a paper as it stands, but for reward models and judges, whose config.json a plan reads."""
    config = config_of_paper(paper, variant)
    path = config.model.path
    _stand_ins(config, folder, "", itertools.count())
    config.model.path = path
    return config


def _keys(values, name=""):
    for key, value in values.items():
        path = f"{name}.{key}" if name else key
        yield from _keys(value, path) if isinstance(value, dict) and value else [path]


def _stand_ins(config, folder, judge, count):
    """Puts tiny models and data in place of all that a config names."""
    for key, value in config.items():
        if not hasattr(value, "items"):
            continue
        kind, path = value.get("kind"), value.get("path")
        if key == "model" and path:
            value.path = str(base(folder / "base"))
        elif kind == "classifier":
            labels = 2 if "label" in value or "label" in str(value.get("activation")) else 1
            number = next(count)
            value.path = str(classifier(folder / f"classifier{number}", labels, number))
        elif kind == "model" and path:
            value.path = str(base(folder / "other"))
        elif kind in ("chat", "judge"):
            value.base_url = judge
        elif kind in DATA:
            value.path = DATA[kind](folder / kind.rpartition(":")[2])
            if value.get("split") != "validation":
                value.split = "train" if kind != "pjrlhf.papers:news" else "test"
        _stand_ins(value, folder, judge, count)


def longer(body):
    """The verdict of a judge who likes the longer answer, or its rating."""
    asked = body["messages"][-1]["content"]
    if "Response A:" not in asked:
        return json.dumps({"reason": "", "verdict": 1 + len(asked) % 10})
    first, _, second = asked.partition("Response A:\n")[2].partition("Response B:\n")
    return "A" if len(first) > len(second) - len(second.partition("Which response")[2]) else "B"


def summary(folder):
    return json.loads((folder / "report" / "summary.json").read_text())
