"""The settings every experiment shares; a file of configs/ adds its stages and its own sections to them."""

import ml_collections

from pjrlhf.objectives import scalarization


def base() -> ml_collections.ConfigDict:
    """Shared settings, at the size of the synthetic environment."""
    c = ml_collections.ConfigDict()
    c.title = ""
    c.seed = 0
    c.stages = ()
    c.mesh = {"data": -1, "fsdp": 1, "tensor": 1}  # devices per axis; -1 is the rest
    c.checkpoints = ""  # where they go if not into the run directory, a folder or gs://, s3:// of this run alone
    c.checkpoint_every = 100  # steps; every stage also saves its last
    c.max_to_keep = 2  # checkpoints
    c.keep_best = ""  # and the best by a metric: "loss" for the least, "max rewards/accuracies" for the greatest
    c.log_every = 5
    c.loggers = ()  # beside metrics.jsonl: tensorboard, wandb
    c.profile = False  # a trace of a few steps of every stage, for XProf

    # Who is there to please. "synthetic", "paper", or {id: {"dimension": ..., "sentence": ...}}.
    c.preferences = "synthetic"
    c.objectives = ("P1A", "P1B", "P2A", "P2B", "P3A", "P3B")  # one ingredient each
    c.general = ""  # a general criterion beside them, such as the reward of RLHF; "" for none
    c.judge = "synthetic"  # "synthetic", or {criterion: scorer name}, see evaluation/judges.py

    c.model = {
        "path": "",  # Hugging Face folder to start from; "" trains a new model of the size below
        # Of a new model: "synthetic", or {"kind": "bpe", "vocab_size": ..., "texts": how many sft records to train on}.
        "tokenizer": "synthetic",
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "max_length": 128,
        "vocab_size": 0,  # 0: that of the tokenizer
        "tie_embeddings": True,
        "rope_theta": 10000.0,
        "rope_scaling": {},  # of Llama 3: factor, low_freq_factor, high_freq_factor, original_max_position
        "dtype": "float32",  # of activations
        "param_dtype": "float32",  # of the frozen base
        "quantize": "",  # int8: the frozen base's linear layers in 8 bits, half the memory of bfloat16; for adapters
        "remat": "none",  # none, dots, full
        "attention": "auto",  # auto, blocks, einsum, xla, cudnn, splash
        "eos_token": "",  # what ends an answer, where it is not the tokenizer's own EOS
    }
    # rank 0: full parameters; dtype of what is trained: float32, bfloat16
    c.adapter = {"rank": 8, "alpha": 16.0, "dtype": "float32"}
    c.temperature = 1.0  # of all sampling
    c.sample_rows = 256  # rows sampled at once outside training
    c.aot = {"users": 1000}  # how many people --aot reckons with

    c.data = {
        "prompts": "synthetic",  # "synthetic", or a source of prompt records: {"kind": "jsonl", "path": ...}
        "chat": True,  # put requests through the chat template
        "columns": ml_collections.ConfigDict(),  # our column -> the name it has in your data
        "max_prompt": 20,  # tokens
        "prompt_buckets": (12,),  # shorter lengths to pad prompts to, each compiled once
        "max_completion": 28,
        "completion_buckets": (),
        "long_prompt": "drop",  # drop, truncate_left, error
        "long_completion": "drop",  # drop, truncate
        # Of what is trained on: an answer a row (none), a prompt with all its answers (share), several of those (pack),
        # all in one row (join); auto is join where attention goes by blocks, else share.
        "packing": "auto",
        "heldout_fraction": 0.25,  # of the prompts; never trained on, used to evaluate
        "max_bad_fraction": 0.01,  # more bad records than this stop the run
    }
    c.sft = {
        "data": "synthetic",  # "synthetic", or a source of completion records
        "records": 8000,  # of the built-in corpus
        "steps": 400,
        "batch_size": 64,
        "adapter": {"rank": 0, "alpha": 16.0, "dtype": "float32"},
        "optimizer": {
            "name": "adamw",  # adamw, adafactor, sgd
            "learning_rate": 4e-3,
            "schedule": "cosine",
            "warmup_steps": 20,
            "b2": 0.98,
            "weight_decay": 0.01,
        },
    }
    return c


def people(c: ml_collections.ConfigDict) -> None:
    """Adds the sections of the stages that serve people known by their comparisons: preference, evaluate_users."""
    c.preference = {
        "data": "population",  # "population", or a source of preference records with `user_id`
        "split": "prompt",  # of your own data: prompt, or pair (others may have compared the same prompt's answers)
        "heldout_fraction": 0.2,  # of the prompts or pairs, where the data are your own
        "new_user_fraction": 0.0,  # of the people, where the data are your own; kept out to be met as new people
        # Entries may differ in everything from `head` to `sft_weight`, too, and have user_text=True.
        "models": {
            "pooled": {"kind": "uniform"},
            "individualized": {"kind": "individualized", "tokens": 4},
            # The first half of the steps trains vectors of everybody's own, whose k-means are the centres.
            "cluster": {"kind": "cluster", "tokens": 4, "clusters": 2, "warm_start": 0.5},
            "permuted": {"kind": "individualized", "tokens": 4, "permuted": True},
        },
        "bank": "",  # for models of kind soup: "policy", or bank.safetensors of a stage policy on the same base
        "head": "policy",  # policy (P-DPO), or reward (P-RM)
        "loss": "sigmoid",  # see objectives/preference.py
        "beta": 0.1,
        "alpha": 0.5,  # share of the user-specific term; the rest trains the generic user
        "mixture": "exact",  # exact: every pair twice; dropout: once, half the cost
        "label_smoothing": 0.0,
        "sft_weight": 0.0,
        "steps": 160,
        "batch_size": 32,  # pairs
        "optimizer": {"name": "adamw", "learning_rate": 3e-3, "schedule": "cosine", "warmup_steps": 5},
        "user_optimizer": {"learning_rate": 3e-2, "schedule": "cosine"},
    }
    c.evaluate_users = {
        "resamples": 2000,
        "grid_pairs": 400,  # at most, per cell of known and new people and prompts; so many tell a share within 5 %
        "surface": False,  # beside the models, logistic regressions on surface features of the answers
        "generate_for": 4,  # held-out prompts answered as every user; 0 skips generation
        "max_new_tokens": 0,  # of these answers; 0 is data.max_completion
        "cold_start": (0, 1, 2, 4, 8, 16),  # comparisons a new person gives; () skips it
        "cold_start_models": ("individualized", "cluster"),
        "cold_start_steps": 20,
        "cold_start_learning_rate": 0.1,
    }


def policies(c: ml_collections.ConfigDict) -> None:
    """Adds the sections of the stages that make one policy per preference by PPO: comparisons, reward, policy."""
    c.prompt_preference = "never"  # does a policy's prompt state its preference in training: never, always, half
    c.comparisons = {"pairs": 1024}  # two answers of the base each, labelled once per objective
    c.reward = {
        "data": "comparisons",  # "comparisons", or a source of preference records with `objective`
        "path": "",  # reward models of another run to use instead of training them
        "steps": 160,
        "batch_size": 8,  # pairs per objective
        "heldout_fraction": 0.2,  # of the prompts
        "calibration_samples": 256,
        "quantiles": (0.02, 0.98),  # of the base's rewards, which the scale "quantiles" puts at 0 and 1
        "optimizer": {"learning_rate": 5e-3, "schedule": "cosine"},
    }
    c.policy = {
        # What policies are trained for, see algorithms/targets.py: own, fixed, grid, dirichlet, combinations. Points
        # are rows of weights, or a name: simplex, between, corners, centre, subsets, mixed.
        "preferences": {"kind": "own", "objectives": (), "points": (), "alpha": 1.0, "held_out": ()},
        "mix": "own",  # own: an adapter per policy; weights: one per objective, mixed by the preference weights
        "prompt_format": {"form": "sentences", "decimals": 1, "levels": 10},  # sentences, numbers, tally
        "scale": "std",  # of rewards: std, or quantiles (0 to 1)
        # How objectives become one advantage: the kind of rule and the settings of all (objectives/scalarization.py).
        "combine": scalarization.section(),
        "steps": 60,
        "rollouts": 16,  # per policy and step
        "top_k": 0,
        "top_p": 1.0,
        "kl": {"coefficient": 0.1, "target": 0.0, "horizon": 10000},  # target 0: fixed coefficient
        "ppo": {
            "epochs": 2,
            "minibatches": 2,
            "policies_at_once": 0,  # whose gradient is taken at once, 0: all; fewer take less memory
            "clip": 0.2,
            "value_clip": 0.2,
            "vf_coef": 0.1,
        },
        "experience": {
            "estimator": "gae",  # gae; or without a critic rloo, group, with samples_per_prompt of 2 or more
            "samples_per_prompt": 1,
            "gamma": 1.0,
            "lam": 0.95,
            "kl_kind": "k1",
            "missing_eos_penalty": 1.0,
            "score_clip": 5.0,
        },
        "optimizer": {"name": "adamw", "learning_rate": 3e-3, "schedule": "linear", "b2": 0.99, "eps": 1e-5},
    }


def front(c: ml_collections.ConfigDict, objectives: tuple[str, ...]) -> None:
    """Adds what compares methods on one front: the trainers' sections, `methods` (still empty) and `evaluate_front`.

    All rewards are on the scale of quantiles, 0 to 1, which preference weights can be compared with, so that one KL
    coefficient means the same to every method.
    """
    policies(c)
    neighbours(c)
    c.objectives = objectives
    c.stages = ("sft", "comparisons", "reward", "methods", "evaluate_front")
    c.seeds = ()  # several seeds, one run after the other, and a report of their means
    c.data.update({"max_prompt": 36, "prompt_buckets": (12, 24)})
    c.comparisons.pairs = 768
    c.policy.update({"scale": "quantiles", "steps": 40, "rollouts": 64})
    c.policy.kl.coefficient = 0.03
    c.policy.experience.update({"missing_eos_penalty": 0.3, "score_clip": 0.0})
    # Three seeds of two and of three objectives, side by side, within half an hour on two cores.
    c.sft.steps, c.modpo.steps = 300, 90
    c.ric.update({"samples": 1536, "steps": 160, "online_steps": 60})  # in all as many samples as the policies
    c.evaluate_front = {
        "points": (),  # preference weights; () are those of the literature, see evaluation.pareto.simplex_grid
        "unseen": True,  # besides, weights that no method was trained on
        "samples_per_prompt": 1,
        "base_samples": 8,  # answers of the base per held-out prompt, whose quantiles are the scale
        "quantiles": (0.02, 0.98),
        "reference": -0.1,  # of the hypervolume, on that scale, for every objective
        "target": "identity",  # the rewards that weights ask for, of the MSE
    }
    c.methods = {}


def family(c: ml_collections.ConfigDict, *names: str) -> None:
    """Fills `methods` with the entries of these names (all of them where none is given), sized for `c.objectives`.

    Each answers `policy.rollouts` prompts per step in all; only MORL, which trains a policy for every evaluated point,
    gets a quarter of that for each of them.
    """
    each = c.policy.rollouts // len(c.objectives) // 4 * 4  # minibatches divide it
    on_grid = {"preferences": {"kind": "grid", "points": "simplex"}}
    # What the base never read takes larger steps to learn; more than five words to tell apart, more samples.
    tally = {"prompt_preference": "always", "prompt_format": {"form": "tally", "levels": 5}}
    tally["optimizer"] = {"learning_rate": 2 * c.policy.optimizer.learning_rate}
    min_norm = {"kind": "min_norm", "control_weight": 4.0}
    entries = {
        "prompting": {"train": ""},
        "rlhf": {"preferences": {"kind": "fixed", "points": "centre"}},
        "morl": {"preferences": {"kind": "fixed", "points": "simplex"}, "rollouts": c.policy.rollouts // 4},
        "pmorl": {"preferences": {"kind": "grid", "points": "subsets"}, "prompt_preference": "always"},
        "psoups": {"preferences": {"kind": "own"}, "prompt_preference": "half", "rollouts": each},
        "rsoups": {"preferences": {"kind": "own"}, "rollouts": each},
        "bone": {"preferences": {"kind": "fixed", "points": "mixed"}, "rollouts": each, "answer": "bone"},
        "moc": {**on_grid, "combine": min_norm, **tally},
        "clp": {"preferences": {"kind": "dirichlet", "held_out": "between"}, "mix": "weights"},
        "ric": {"train": "ric"},
        "modpo": {"train": "modpo", "preferences": {"kind": "fixed", "points": "simplex"}},
        "dpo_soups": {"train": "modpo", "preferences": {"kind": "fixed", "points": "corners"}, "answer": "bone"},
        "mod": {"train": "", "of": "rsoups", "answer": "mod"},
    }
    # MOC taken apart, and other rules under the same conditions.
    combine = {
        "moc_equal": {**min_norm, "weights": "equal"},
        "moc_small_control": {**min_norm, "control_weight": 1.0},
        "moc_per_reward": {**min_norm, "heads": "per_reward+control"},
        "moc_per_preference": {**min_norm, "heads": "per_preference"},
        "moc_hinge": {**min_norm, "sided": "hinge", "target": "max"},
        "control": {**min_norm, "heads": "control"},
        "mgda": {**min_norm, "heads": "per_reward"},
        "sum": {"kind": "sum"},
        "tchebycheff": {"kind": "tchebycheff"},
        "gdpo": {"kind": "gdpo"},
        "pama": {"kind": "pama"},
    }
    entries |= {name: {**on_grid, "combine": rule, **tally} for name, rule in combine.items()}
    # The same conditions with the weights of adapters in place of words.
    entries["moc_mixed"] = {**on_grid, "combine": min_norm, "mix": "weights"}
    with c.ignore_type():
        wanted = names or [name for name in entries if name not in (*combine, "moc_mixed")]
        c.methods = ml_collections.ConfigDict({name: entries[name] for name in wanted})


def neighbours(c: ml_collections.ConfigDict) -> None:
    """Adds the sections of the methods that PPO is compared with, beside those of `policies`: modpo, ric."""
    c.modpo = {
        "preferences": {"kind": "own", "points": (), "alpha": 1.0, "held_out": ()},  # own or fixed, as in policy
        "mix": "own",
        "prompt_format": {"form": "sentences", "decimals": 1, "levels": 10},
        "prompt_preference": "never",  # the pairs have plain prompts
        "steps": 120,
        "batch_size": 8,  # pairs per policy
        "beta": 0.1,
        "loss": "sigmoid",  # or hinge
        "optimizer": {"learning_rate": 3e-3, "schedule": "linear"},
    }
    c.ric = {
        # How a prompt states scores of 0 to 1; a tally has up to `levels` words per objective, within data.max_prompt.
        "prompt_format": {"form": "tally", "decimals": 1, "levels": 5},
        "target": "l2",  # scores that preference weights ask for: identity, l2, max
        "samples": 2048,  # answers of the base
        "steps": 200,
        "batch_size": 64,
        "rounds": 1,  # online ones, after that on the base's answers
        "online_samples": 1024,  # answers of the policy in each of them
        "online_steps": 80,
        "quantile": 0.7,  # of the base's scores, which an online answer must reach by some objective
        "base_fraction": 0.25,  # share of the base's answers among those of an online round
        "optimizer": {"learning_rate": 3e-3, "schedule": "cosine"},
    }
