"""Building blocks of the configs of papers: public base and reward models, prompts, and tasks that papers share."""

# The attributes of a ConfigDict are dynamic.
# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false, reportArgumentType=false

from collections.abc import Iterable, Mapping
from typing import Any

import ml_collections

from pjrlhf import config
from pjrlhf.data.records import RecordError
from pjrlhf.data.sources import Source, open_source
from pjrlhf.errors import UserError

_LLAMA_7B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_layers": 32,
    "num_heads": 32,
    "num_kv_heads": 32,
    "vocab_size": 32000,
    "max_length": 2048,
    "tie_embeddings": False,
}
_LLAMA_3_8B = {
    **_LLAMA_7B,
    "intermediate_size": 14336,
    "num_kv_heads": 8,
    "vocab_size": 128256,
    "max_length": 8192,
    "rope_theta": 500000.0,
}
# Base on the hub -> its dimensions, by which a dry run plans it without a download. A real run reads its config.json.
BASES: Mapping[str, Mapping[str, Any]] = {
    # Two feed-forward matrices of width 16384, counted as three of 10880.
    "CarperAI/openai_summarize_tldr_sft": {
        **_LLAMA_7B,
        "intermediate_size": 10880,
        "num_layers": 28,
        "num_heads": 16,
        "num_kv_heads": 16,
        "vocab_size": 50400,
    },
    "huggyllama/llama-7b": _LLAMA_7B,
    "meta-llama/Llama-2-7b-hf": {**_LLAMA_7B, "max_length": 4096},
    "meta-llama/Llama-3.1-8B-Instruct": {
        **_LLAMA_3_8B,
        "max_length": 131072,
        "rope_scaling": {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position": 8192,
        },
    },
    "meta-llama/Meta-Llama-3-8B-Instruct": _LLAMA_3_8B,
    "PKU-Alignment/alpaca-7b-reproduced": {**_LLAMA_7B, "vocab_size": 32001},
    "Qwen/Qwen2.5-0.5B-Instruct": {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_layers": 24,
        "num_heads": 14,
        "num_kv_heads": 2,
        "vocab_size": 151936,
        "max_length": 32768,
        "tie_embeddings": True,
        "rope_theta": 1e6,
    },
    "TheBloke/tulu-7B-fp16": {**_LLAMA_7B, "vocab_size": 32001},
}


def base_model(c: ml_collections.ConfigDict, name: str) -> None:
    """A base of `BASES` in bfloat16, split over all devices, with learning rates and lengths for pretrained models.

    Call it after the sections are added.
    """
    config.pretrained(c)
    with c.ignore_type():
        dimensions = dict(BASES[name])
        c.model.rope_scaling = ml_collections.ConfigDict(dimensions.pop("rope_scaling", {}))
        c.model.update({"path": name, **dimensions})
    c.model.update({"dtype": "bfloat16", "param_dtype": "bfloat16", "remat": "full"})
    c.mesh.update({"data": 1, "fsdp": -1, "tensor": 1})


# Objective -> its public reward model, with the inputs and outputs that RiC (arXiv 2402.10207) gives it. `post` is a
# column of `summaries`.
REWARD_MODELS: Mapping[str, Mapping[str, Any]] = {
    "harmless": {"path": "Ray2333/gpt2-large-harmless-reward_model", "template": "transcript"},
    "helpful": {"path": "Ray2333/gpt2-large-helpful-reward_model", "template": "transcript"},
    "humor": {"path": "mohameddhiab/humor-no-humor", "template": "answer", "label": 1, "activation": "raw"},
    "summary": {"path": "Tristan/gpt2_reward_summarization", "template": "{answer} {bos} {post}"},
    "faithful": {
        "path": "CogComp/bart-faithful-summary-detector",
        "template": ("{answer}", "{post}"),
        "label": 1,
        "activation": "raw",
    },
    "deberta": {"path": "OpenAssistant/reward-model-deberta-v3-large-v2", "template": ("{post}", "{answer}")},
    # Rewarded Soups (arXiv 2306.04488) reads these, on questions in place of posts.
    "deberta_large": {"path": "OpenAssistant/reward-model-deberta-v3-large-v2", "template": "pair"},
    "electra": {"path": "OpenAssistant/reward-model-electra-large-discriminator", "template": "pair"},
    "deberta_base": {"path": "OpenAssistant/reward-model-deberta-v3-base", "template": "pair"},
    "deberta_base_v2": {"path": "theblackcat102/reward-model-deberta-v3-base-v2", "template": "pair"},
}


def rewarded_by(c: ml_collections.ConfigDict, *objectives: str, **changes: Mapping[str, Any]) -> None:
    """Rewards and judges answers by `REWARD_MODELS`, and compares methods on a front of these objectives.

    Args:
      changes: objective -> settings of its reward model that differ.
    """
    config.front(c, objectives)
    c.stages = ("reward", "methods", "evaluate_front")  # reward measures the scale of the classifiers
    c.judge = "rewards"
    with c.ignore_type():
        c.preferences = ml_collections.ConfigDict(
            {name: {"dimension": name, "sentence": f"{name}.", "label": name} for name in objectives}
        )
        c.rewards = ml_collections.ConfigDict(
            {
                name: {"kind": "classifier", "max_length": 512, **REWARD_MODELS[name], **changes.get(name, {})}
                for name in objectives
            }
        )


def later_styles(c: ml_collections.ConfigDict, *new: str) -> None:
    """The scaling experiment of Personalized Soups (arXiv 2310.11564): two more styles, so 2 x 2 x 4 = 16 combinations
    in place of 8.

    Soups train the new ingredients alone. Prompted-MORL trains again from the start, with as many answers as all eight
    ingredients.
    """
    before: Any = c.stages, c.objectives
    stages, old = before
    pmorl, rollouts = {"prompt_preference": "always"}, c.policy.rollouts
    c.objectives = (*old, *new)
    c.general = ""
    c.stages = tuple("methods" if stage == "policy" else stage for stage in stages if stage != "methods")
    with c.ignore_type():
        c.methods = ml_collections.ConfigDict(
            {
                "soups_old": {"preferences": {"kind": "own", "objectives": old}},
                "soups_new": {"preferences": {"kind": "own", "objectives": new}},
                "pmorl_8": {
                    "preferences": {"kind": "combinations", "objectives": old},
                    "rollouts": len(old) * rollouts,
                    **pmorl,
                },
                "pmorl_16": {
                    "preferences": {"kind": "combinations"},
                    "rollouts": len((*old, *new)) * rollouts,
                    **pmorl,
                },
            }
        )
        c.evaluate.new_preferences = new
        c.evaluate.scaling = ml_collections.ConfigDict({"soups": ("soups_new",), "pmorl_16": ("pmorl_16",)})


# Variant -> its objectives: the tasks of RiC (arXiv 2402.10207), section 4.
_TASKS = {
    "assistant": ("harmless", "helpful"),
    "humor": ("humor", "helpful"),
    "assistant_three": ("harmless", "helpful", "humor"),
    "summary": ("summary", "faithful"),
    "summary_three": ("summary", "faithful", "deberta"),
}


def rewards_in_context(c: ml_collections.ConfigDict, variant: str, file: str) -> None:
    """A task of RiC (arXiv 2402.10207): base, prompts, reward models, and the settings of its PPO baselines.

    Args:
      variant: one of `_TASKS`.
      file: of the config, for messages.

    Raises:
      UserError: an unknown variant.
    """
    if variant not in _TASKS:
        raise UserError(f"{file}:{variant}: unknown variant; use one of {', '.join(_TASKS)}")
    summary = variant.startswith("summary")
    rewarded_by(c, *_TASKS[variant])
    c.title = f"RiC: {'Reddit Summary' if summary else 'Helpful Assistant'} by {', '.join(_TASKS[variant])}"
    c.stages = ("sft", "reward", "methods", "evaluate_front")
    base_model(c, "meta-llama/Llama-2-7b-hf")
    prompts = {"kind": "pjrlhf.papers:posts", "path": ""} if summary else {"kind": "hh_rlhf", "path": HH}
    with c.ignore_type():
        c.data.prompts = ml_collections.ConfigDict(prompts)
        c.sft.data = ml_collections.ConfigDict({**prompts, "answers": "chosen"})
    # "code": YangRui2015/RiC at aee53a6, the scripts of the authors. It keeps prompts of 8 to 512 tokens.
    # Here longer ones are cut: some are longer only by the words about rewards, and those must not stop a run.
    c.data.update({"max_prompt": 512, "max_completion": 48 if summary else 128})  # code: 48 and 128 new tokens
    c.data.max_bad_fraction = 0.1
    c.adapter.update({"rank": 64, "alpha": 128.0})  # code
    c.temperature = 0.7  # code, of PPO
    # Code, sft.py: the same adapter and rate as RiC's own training.
    c.sft.adapter.update({"rank": 64, "alpha": 128.0, "dropout": 0.05})
    c.sft.update({"steps": 20_000, "batch_size": 8})
    c.sft.optimizer.update({"learning_rate": 1.414e-4, "schedule": "linear", "weight_decay": 0.01, "warmup_steps": 0})
    # Code, morlhf.py: 64 answers a step (on each of 4 GPUs) in minibatches of one, TRL's 4 passes, one epoch.
    c.policy.update({"steps": 2_000, "rollouts": 64, "scale": "raw"})
    c.policy.optimizer.update({"learning_rate": 1e-5, "schedule": "constant", "max_grad_norm": 0.5})
    c.policy.ppo.update({"epochs": 4, "minibatches": 64, "policies_at_once": 1})
    c.policy.kl.update({"coefficient": 0.2, "target": 3.0})
    c.policy.experience.missing_eos_penalty = 0.0


# ---- prompts

HH = "Anthropic/hh-rlhf"


def instructions(spec: Mapping[str, Any]) -> list[Any]:
    """Prompts of instructions and their inputs, from a data set with the columns of Alpaca, `instruction` and `input`.

    Args:
      spec: as of kind `datasets`.
    """
    return [{"prompt": " ".join(filter(None, (row["instruction"], row["input"])))} for row in _rows(spec)]


# The instruction that RiC and Rewarded Soups put before a post.
_SUMMARIZE = "### Instruction: Generate a one-sentence summary of this post. ### Input: {} ### Response: "


def news(spec: Mapping[str, Any]) -> list[Any]:
    """Prompts to summarize news of 100 to 1,500 characters, each text once: `prompt`, and the bare `post` for reward
    models, without the mark of the agency (Rewarded Soups, arXiv 2306.04488).

    Args:
      spec: as of kind `datasets`, of argilla/news-summary.
    """
    texts = dict.fromkeys(row["text"] for row in _rows(spec) if isinstance(row["text"], str))
    posts = [text.replace("\n", " ") for text in texts if 100 < len(text) < 1500]
    return _summarized(post.partition("(Reuters) -")[2].strip() or post.strip() for post in posts)


def posts(spec: Mapping[str, Any]) -> list[Any]:
    """Prompts to summarize posts of Reddit of 100 to 1,200 characters, each once: `prompt`, and the bare `post` for
    reward models (RiC, arXiv 2402.10207; Rewarded Soups, arXiv 2306.04488).

    Args:
      spec: as of kind `tldr`; with `answers` "chosen" every post has the better summary of one comparison as
        `completion`.
    """
    source = open_source({"split": "all", **spec, "kind": "tldr", "prompt": "post"}, getattr(spec, "key", "data"))
    bad: list[Any] = []
    found: dict[str, Mapping[str, Any]] = {}
    for i in range(len(source)):
        try:
            record = source[i]
        except RecordError as error:
            bad.append(error)
            continue
        if 100 < len(record["prompt"]) < 1200:
            found.setdefault(record["prompt"].replace("\n", " "), record)
    records = _summarized(found)
    if spec.get("answers") == "chosen":
        records = [{**one, "completion": of["completion"]} for one, of in zip(records, found.values(), strict=True)]
    return [*records, *bad]


def _summarized(posts: Iterable[str]) -> list[Any]:
    return [{"prompt": _SUMMARIZE.format(post), "post": post} for post in posts]


def _rows(spec: Mapping[str, Any]) -> Source:
    return open_source({**spec, "kind": "datasets"}, getattr(spec, "key", "data"))
