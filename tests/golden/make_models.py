"""Makes the goldens beside this file with `transformers` and torch: random tiny models, and logits of stories260K.

    python tests/golden/make_models.py           # stories260K is read from $PJRLHF_TEST_DATA, default ../shared
    python tests/golden/make_models.py families  # families.json alone

A tiny Llama holds a whole checkpoint (`config` as JSON text, `weights/<Hugging Face name>`), inputs, and float32
logits at `positions`. The one of stories260K holds tokens and logits only. families.json holds for every family what
its config.json says, the shapes of its tensors, and logits; weights and inputs are drawn anew from their names and a
seed, see drawn_models.py.
"""

import json
import os
import pathlib
import sys
import tempfile

import numpy as np
import torch
import transformers
from safetensors.numpy import load_file, save_file

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from support.drawn_models import LENGTH, draw, inputs  # noqa: E402

SIZES = dict(
    vocab_size=48,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,  # not hidden / heads, so that the output projection is not square
    max_position_embeddings=512,
    initializer_range=0.2,
)
# Context 64 and theta 10,000 put the eight frequencies of a head into all three regimes of the scaling.
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=10_000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)
CHECKPOINTS = {
    "llama3_untied": dict(**SIZES, tie_word_embeddings=False, rope_parameters=LLAMA3, rms_norm_eps=1e-5),
    "default_tied": dict(
        **SIZES, tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": 500.0}
    ),
}
# Every switch that a family has is on, and far enough from its neutral value to show in the logits.
HEADS = dict(vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=512)
GROUPED = dict(**HEADS, num_key_value_heads=2, head_dim=6, intermediate_size=20)
GPT = dict(vocab_size=40, n_embd=24, n_layer=2, n_head=4, n_positions=512)
ROPE = {"rope_type": "default", "rope_theta": 100.0}
LOCAL, GLOBAL = "sliding_attention", "full_attention"
FAMILIES = {
    "llama": ("Llama", dict(**GROUPED, rope_parameters=ROPE, attention_bias=True, mlp_bias=True)),
    "mistral": ("Mistral", dict(**GROUPED, rope_parameters=ROPE, sliding_window=24)),
    "qwen2": (
        "Qwen2",
        dict(**GROUPED, rope_parameters=ROPE, use_sliding_window=True, sliding_window=24, max_window_layers=1),
    ),
    "qwen3": ("Qwen3", dict(**GROUPED, rope_parameters=ROPE, tie_word_embeddings=True)),
    "gemma2": (
        "Gemma2",
        dict(
            **GROUPED,
            rope_parameters=ROPE,
            sliding_window=24,
            query_pre_attn_scalar=9,
            attn_logit_softcapping=2.0,
            final_logit_softcapping=3.0,
        ),
    ),
    "gemma3_text": (
        "Gemma3Text",
        dict(
            **GROUPED,
            rope_parameters={LOCAL: ROPE, GLOBAL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000.0}},
            sliding_window=24,
            layer_types=[LOCAL, GLOBAL],
            query_pre_attn_scalar=9,
            final_logit_softcapping=3.0,
        ),
    ),
    "olmo2": ("Olmo2", {**GROUPED, "head_dim": 4, "rope_parameters": ROPE}),
    "gpt2": ("GPT2", dict(**GPT, n_inner=40)),
    "gpt_neox": (
        "GPTNeoX",
        dict(
            **HEADS | {"hidden_size": 32}, intermediate_size=40, rope_parameters=ROPE | {"partial_rotary_factor": 0.5}
        ),
    ),
    "gptj": ("GPTJ", dict(**GPT, rotary_dim=4)),
}
STORY = (
    "Once upon a time there was a small boat named Pip. Pip lived by a big blue lake with his friend Sam the frog. "
    "One day, Sam wanted to see the other side of the lake. Pip was scared, but he said yes. They went far, far away. "
    "The wind was cold and the water was dark. Sam held on to Pip and sang a happy song. Soon they saw a bright light. "
    "It was the moon! They were not scared any more. On the other side they found a tree with red apples. "
    "Sam ate two apples and gave one to a bird. The bird said thank you and showed them the way home. "
    "When they came back, Mom was there. She gave Sam a big hug and put Pip in the sun to dry. "
    "That night, Sam and Pip looked at the stars and talked about the next trip. They were very happy friends. The end."
)


@torch.no_grad()
def logits_of(model, tokens, valid, positions):
    """Float32 logits [B, len(positions), V] of `model`, positions counted from the first valid token."""
    valid = torch.tensor(valid)
    ids = (valid.cumsum(1) - 1).clamp(min=0)
    out = model.eval()(torch.tensor(tokens), attention_mask=valid.long(), position_ids=ids).logits
    return out.float().numpy()[:, positions]


def make_tiny(name, settings):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**settings, bos_token_id=1, eos_token_id=2, attn_implementation="eager")
    model = transformers.LlamaForCausalLM(config)
    for parameter in model.parameters():
        if parameter.ndim == 1:  # norm scales start as ones, which would hide a mistake
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, config.vocab_size, (2, LENGTH))
    valid = np.arange(LENGTH) >= np.array([[0], [41]])
    positions = np.r_[60:LENGTH:17, LENGTH - 1]
    weights = {
        k: v.numpy() for k, v in model.state_dict().items() if not (config.tie_word_embeddings and "lm_head" in k)
    }
    np.savez_compressed(
        HERE / f"{name}.npz",
        config=json.dumps(config.to_dict() | {"architectures": ["LlamaForCausalLM"]}, default=str),
        tokens=tokens,
        valid=valid,
        positions=positions,
        logits=logits_of(model, tokens, valid, positions),
        **{f"weights/{k}": v for k, v in weights.items()},
    )


def make_families():
    found = {}
    for model_type, (name, settings) in FAMILIES.items():
        config = getattr(transformers, f"{name}Config")(**settings, attn_implementation="eager")
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            raw = json.loads((pathlib.Path(folder) / "config.json").read_text())
            weights = {k: draw(k, x.shape) for k, x in load_file(f"{folder}/model.safetensors").items()}
            save_file(weights, f"{folder}/model.safetensors", metadata={"format": "pt"})
            model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
        tokens, valid, positions = inputs(config.vocab_size)
        logits = logits_of(model, tokens, valid, positions)
        found[model_type] = {
            "config": raw,
            "shapes": {k: list(x.shape) for k, x in weights.items()},
            "logits": [[[float(f"{x:.7g}") for x in place] for place in row] for row in logits],
        }
    lines = ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in found.items())
    (HERE / "families.json").write_text(f"{{\n{lines}\n}}\n")


def make_stories():
    folder = pathlib.Path(os.environ.get("PJRLHF_TEST_DATA", HERE.parents[2] / "shared")) / "models" / "stories260K"
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    tokens = np.array([tokenizer(STORY)["input_ids"]])
    assert tokens.shape[1] > 300, tokens.shape
    positions = np.r_[0 : tokens.shape[1] : 23, tokens.shape[1] - 1]
    logits = logits_of(model, tokens, np.ones_like(tokens, bool), positions)
    np.savez_compressed(
        HERE / "stories260K.npz", text=STORY, tokens=tokens.astype(np.int32), positions=positions, logits=logits
    )


if __name__ == "__main__":
    make_families()
    if sys.argv[1:] != ["families"]:
        for name, settings in CHECKPOINTS.items():
            make_tiny(name, settings)
        make_stories()
