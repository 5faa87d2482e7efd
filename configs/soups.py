"""Personalized Soups (arXiv 2310.11564): one policy per preference by PPO, merged with each person's weights.

    python -m pjrlhf.main --config=configs/soups.py                       the built-in world, from nothing
    python -m pjrlhf.main --config=configs/soups.py:hf --config.model.path=FOLDER
                                                                          any Hugging Face Llama, here two lengths
                                                                          and dialogue

Built-in world, default seed, 2 CPU cores: about 2 minutes, compilation included. Figures to expect are in
BUILD_NOTES.md.
"""

import ml_collections


def get_config(variant: str = "world") -> ml_collections.ConfigDict:
    c = ml_collections.ConfigDict()
    c.title = "Personalized Soups on the built-in world"
    c.seed = 0
    c.stages = ("sft", "comparisons", "reward", "policy", "evaluate")
    c.mesh = {"data": -1, "fsdp": 1, "tensor": 1}  # devices per axis; -1 is the rest
    c.checkpoint_every = 100  # steps; every stage also saves its last
    c.log_every = 5

    # Who is there to please. "world", "paper", or {id: {"dimension": ..., "sentence": ...}}.
    c.preferences = "world"
    c.objectives = ("P1A", "P1B", "P2A", "P2B", "P3A", "P3B")  # one ingredient each
    c.general = "helpful"  # the general reward of the RLHF baseline; "" leaves the baseline out
    c.judge = "world"  # "world", or {criterion: scorer name}, see evaluation/judges.py
    c.prompt_preference = "half"  # does a policy's prompt state its preference in training: never, always, half

    c.model = {
        "path": "",  # Hugging Face folder to start from; "" trains a new model of the size below
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "max_length": 128,
        "dtype": "float32",  # of activations
        "param_dtype": "float32",  # of the frozen base
        "remat": "none",  # none, dots, full
        "attention": "auto",  # auto, einsum, xla, cudnn
        "eos_token": "",  # for tokenizers without one
    }
    c.adapter = {"rank": 8, "alpha": 16.0}  # rank 0: full parameters
    c.temperature = 1.0  # of all sampling
    c.sample_rows = 256  # rows sampled at once outside PPO

    c.data = {
        "prompts": "world",  # "world", or a source of prompt records: {"kind": "jsonl", "path": ...}
        "chat": True,  # put requests through the chat template
        "max_prompt": 24,  # tokens
        "max_completion": 30,
        "long_prompt": "drop",  # drop, truncate_left, error
        "long_completion": "drop",  # drop, truncate
        "heldout_share": 0.25,  # of the prompts; never trained on, used by evaluate
        "max_bad_share": 0.01,  # more bad records than this stop the run
    }
    c.sft = {
        "data": "world",  # "world", or a source of completion records
        "records": 8000,  # of the built-in corpus
        "steps": 400,
        "batch_size": 64,
        "adapter": {"rank": 0, "alpha": 16.0},
        "optimizer": {
            "learning_rate": 4e-3,
            "schedule": "cosine",
            "warmup_steps": 20,
            "b2": 0.98,
            "weight_decay": 0.01,
        },
    }
    c.comparisons = {"pairs": 768}  # two answers of the base each, labelled once per objective
    c.reward = {
        "data": "comparisons",  # "comparisons", or a source of preference records with `objective`
        "path": "",  # reward models of another run to use instead of training them
        "steps": 120,
        "batch_size": 8,  # pairs per objective
        "heldout_share": 0.2,  # of the prompts
        "calibration_samples": 256,
        "optimizer": {"learning_rate": 5e-3, "schedule": "cosine"},
    }
    c.policy = {
        "steps": 40,
        "rollouts": 16,  # per policy and step
        "top_k": 0,
        "top_p": 1.0,
        "kl": {"coefficient": 0.1, "target": 0.0, "horizon": 10000},  # target 0: fixed coefficient
        "ppo": {"epochs": 2, "minibatches": 2, "clip": 0.2, "value_clip": 0.2, "value_weight": 0.1},
        "experience": {"gamma": 1.0, "lam": 0.95, "kl_kind": "k1", "missing_eos": 1.0, "score_clip": 5.0},
        "optimizer": {"learning_rate": 3e-3, "schedule": "linear", "b2": 0.99, "eps": 1e-5},
    }
    c.evaluate = {
        "weight_scale": 1.0,  # sum of a soup's weights; 1 gives w = 1/3 each for three criteria, as in the paper
        "sweep_points": 11,
        "samples_per_prompt": 1,
        "resamples": 2000,
        "shown": 2,  # sample answers per combination in the report
        # Which methods are told the user's preferences in the prompt besides "prompting", as in the paper's evaluation.
        "told": ("soups",),
    }
    if variant == "hf":
        huggingface(c)
    elif variant != "world":
        raise ValueError(f"configs/soups.py:{variant}: unknown variant; use configs/soups.py or configs/soups.py:hf")
    return c


def huggingface(c: ml_collections.ConfigDict) -> None:
    """Two opposite lengths and a taste for dialogue, judged by rule, on a story model without instruction tuning."""
    c.title = "Personalized Soups on a Hugging Face model"
    c.stages = ("comparisons", "reward", "policy", "evaluate")
    with c.unlocked():
        c.preferences = ml_collections.ConfigDict(
            {
                "short": {"dimension": "length", "sentence": ""},
                "long": {"dimension": "length", "sentence": ""},
                "dialogue": {"dimension": "speech", "sentence": ""},
                "plain": {"dimension": "speech", "sentence": ""},
            }
        )
        c.judge = ml_collections.ConfigDict(
            {"short": "short", "long": "long", "dialogue": "dialogue", "plain": "plain"}
        )
        c.data.prompts = ml_collections.ConfigDict({"kind": "jsonl", "path": "configs/story_openings.jsonl"})
    c.objectives = ("short", "long", "dialogue", "plain")
    c.general = ""
    c.prompt_preference = "never"
    c.data.chat = False
    c.data.max_prompt = 32
    c.data.max_completion = 96
    c.evaluate.told = ()
