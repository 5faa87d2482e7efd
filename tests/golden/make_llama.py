"""Makes the goldens beside this file with `transformers` and torch: random tiny Llamas, and logits of stories260K.

    python tests/golden/make_llama.py            # stories260K is read from $PJRLHF_TEST_DATA, default ../shared

A tiny golden holds a whole checkpoint (`config` as JSON text, `weights/<Hugging Face name>`), inputs, and float32
logits at `positions`. The one of stories260K holds tokens and logits only.
"""

import json
import os
import pathlib

import numpy as np
import torch
import transformers

HERE = pathlib.Path(__file__).resolve().parent
LENGTH = 320
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
    for name, settings in CHECKPOINTS.items():
        make_tiny(name, settings)
    make_stories()
