"""A Hugging Face model for notebooks: text in, text or log-probabilities out, with an adapter bank and one row of `mix`
per prompt.
"""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from pjrlhf.data.batching import pad_left, pad_right
from pjrlhf.data.schema import Prompt
from pjrlhf.data.tokenization import Tokenizer, load_tokenizer
from pjrlhf.errors import UserError
from pjrlhf.models.adapters import AdapterConfig, Backbone, bank_size
from pjrlhf.models.attention import choose
from pjrlhf.models.decoder import Decoder, choose_decode
from pjrlhf.models.huggingface import load_params, read_config
from pjrlhf.models.storage import load_tree
from pjrlhf.paths import local
from pjrlhf.rollout import sampler, scoring
from pjrlhf.rollout.batches import Prompts
from pjrlhf.rollout.sampler import Sampling
from pjrlhf.settings import fold_seed
from pjrlhf.types import Params

MULTIPLE = 32  # lengths are rounded up to multiples of 32, so that few programs are compiled


def load_model(
    folder: str | os.PathLike,
    *,
    adapter: AdapterConfig = AdapterConfig(),  # noqa: B008 - frozen
    dtype: str = "float32",
    param_dtype: str = "float32",
    eos_token: str | None = None,
) -> "LanguageModel":
    """Reads a model and its tokenizer.

    Args:
      folder: in Hugging Face layout: config.json, safetensors weights and tokenizer files.
      adapter: rank and alpha of the adapter banks that `LanguageModel.generate` and `score` take.
      dtype: of activations, a dtype name.
      param_dtype: of the parameters, a dtype name.
      eos_token: the token that ends an answer; the EOS of the tokenizer where None.

    Raises:
      UserError: no such folder, or the model or tokenizer cannot be read.
    """
    path = local(str(folder))
    config = read_config(path)
    tokenizer = load_tokenizer(path, eos_token=eos_token, rows=config.vocab_size)
    platform = jax.default_backend()
    model = Decoder(
        config,
        dtype=jnp.dtype(dtype),
        attention=choose("auto", platform, dtype, 1),
        user_offset=int(bool(tokenizer.add_bos)),
        decode=choose_decode(platform),
    )
    return LanguageModel(Backbone(model, adapter, load_params(path, dtype=jnp.dtype(param_dtype))), tokenizer)


def load_bank(path: str | os.PathLike) -> tuple[Any, tuple[str, ...], AdapterConfig]:
    """Reads an adapter bank.

    Args:
      path: bank.safetensors, or the folder of the stage that wrote it.

    Returns:
      (bank, whose leaves have a leading axis K; names of the K adapters; their rank and alpha).

    Raises:
      UserError: no such file, or the file is not a bank.
    """
    file = pathlib.Path(path)
    file = file / "bank.safetensors" if file.is_dir() else file
    bank, note = load_tree(file)
    if "adapters" not in note:
        raise UserError(f"{file}: is not an adapter bank; name the bank.safetensors of a stage, or its folder")
    rank = bank["layers"]["attention"]["query"]["a"].shape[-1] if "embed" not in bank else 0
    return jax.tree.map(jnp.asarray, bank), tuple(note["adapters"]), AdapterConfig(rank=rank, alpha=note["alpha"])


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """A frozen base with its tokenizer.

    Attributes:
      backbone: model, parameters and adapter shape, as jitted functions take them.
      tokenizer: of the base.
    """

    backbone: Backbone
    tokenizer: Tokenizer

    def generate(
        self,
        prompts: Sequence[Prompt],
        bank: Params | None = None,
        mix: ArrayLike | None = None,
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> list[str]:
        """Samples one answer per prompt.

        Args:
          prompts: B texts, or conversations for a tokenizer with a chat template.
          bank: K adapters; None for the base alone.
          mix: float [K] or [B, K], weights of the adapters; None for the base alone.
          max_new_tokens: longest answer, in tokens.
          temperature: of sampling; 0 is greedy.
          top_p: nucleus sampling where below 1 (arXiv 1904.09751).
          seed: of all draws.

        Raises:
          UserError: a prompt does not fit the context, or `mix` does not fit the bank or the prompts.
        """
        mix = _rows_of_mix(bank, mix, len(prompts))
        ids = [self.tokenizer.encode_prompt(prompt) for prompt in prompts]
        self._check_context(max(map(len, ids)) + max_new_tokens)
        length = min(_rounded(max(map(len, ids))), self.backbone.model.config.max_length - max_new_tokens)
        tokens, valid = pad_left(ids, length, self.tokenizer.pad_id)
        sampling = Sampling(
            max_new_tokens=max_new_tokens,
            eos_id=self.tokenizer.eos_id,
            pad_id=self.tokenizer.pad_id,
            temperature=temperature,
            top_p=top_p,
        )
        out = jax.device_get(
            _generate(self.backbone, sampling, bank, mix, tokens, valid, jax.random.key(fold_seed(seed)))
        )
        texts = []
        for prompt, before, after, kept in zip(prompts, ids, out.tokens, out.valid, strict=True):
            answer = after[kept].tolist()
            if isinstance(prompt, str):  # prompt + answer is the whole text
                texts.append(self.tokenizer.decode(before + answer)[len(self.tokenizer.decode(before)) :])
            else:
                texts.append(self.tokenizer.decode(answer).strip())
        return texts

    def score(
        self,
        prompts: Sequence[Prompt],
        answers: Sequence[str],
        bank: Params | None = None,
        mix: ArrayLike | None = None,
    ) -> np.ndarray:
        """Log-probabilities of answers given their prompts, EOS included: float32 [B], in nats.

        Args:
          prompts, answers: B each.
          bank, mix: see `generate`.

        Raises:
          UserError: see `generate`.
        """
        mix = _rows_of_mix(bank, mix, len(prompts))
        rows = [self.tokenizer.encode_answers(p, [a]) for p, a in zip(prompts, answers, strict=True)]
        prompt_ids, answer_ids = [prompt for prompt, _ in rows], [found[0] for _, found in rows]
        self._check_context(max(len(p) + len(a) for p, a in zip(prompt_ids, answer_ids, strict=True)))
        prompt = pad_left(prompt_ids, _rounded(max(map(len, prompt_ids))), self.tokenizer.pad_id)
        answer = pad_right(answer_ids, _rounded(max(map(len, answer_ids))), self.tokenizer.pad_id)
        tokens, valid = (np.concatenate(pair, axis=1) for pair in zip(prompt, answer, strict=True))
        return np.asarray(_score(self.backbone, bank, mix, tokens, valid, prompt[0].shape[1]))

    def _check_context(self, length: int) -> None:
        limit = self.backbone.model.config.max_length
        if length > limit:
            raise UserError(f"prompts and answers: {length} tokens do not fit the context of {limit}; shorten them")


def _rounded(length: int) -> int:
    return length + -length % MULTIPLE


def _rows_of_mix(bank: Params | None, mix: ArrayLike | None, count: int) -> jax.Array | None:
    if bank is None or mix is None:
        if mix is not None:
            raise UserError("mix: has no bank to mix; give one, or leave mix out")
        return None
    rows = jnp.atleast_2d(jnp.asarray(mix, jnp.float32))
    if rows.ndim != 2 or rows.shape[1] != bank_size(bank) or rows.shape[0] not in (1, count):
        raise UserError(
            f"mix: has shape {list(rows.shape)}; give {bank_size(bank)} weights, or {bank_size(bank)} for each of the "
            f"{count} prompts"
        )
    return rows


@functools.partial(jax.jit, static_argnums=1)
def _generate(backbone, sampling, bank, mix, tokens, valid, key):
    return sampler.generate(backbone.policies(bank, mix), sampling, Prompts(tokens, valid), key)


@functools.partial(jax.jit, static_argnums=5)
def _score(backbone, bank, mix, tokens, valid, prompt_length):
    return scoring.sequence_logps(backbone.policies(bank, mix), tokens, valid, prompt_length)[0]
