"""A Hugging Face model for notebooks: text in, text or log-probabilities out, with an adapter bank and one row of `mix`
per prompt, or with the user model of P-DPO and one user per prompt.
"""

import contextlib
import dataclasses
import functools
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import ArrayLike

from pjrlhf.data.batching import pad_left, pad_right
from pjrlhf.data.messages import Conversation, Prompt, as_turns, options_of, read_turns
from pjrlhf.data.records import RecordError, name_of, plain
from pjrlhf.data.tokenization import Tokenizer, load_tokenizer
from pjrlhf.errors import UserError
from pjrlhf.models.adapters import AdapterConfig, Backbone, bank_size
from pjrlhf.models.attention import choose
from pjrlhf.models.decoder import Decoder, choose_decode
from pjrlhf.models.hub import hub_name, model_file, model_folder
from pjrlhf.models.huggingface import fingerprint, load_params, read_config
from pjrlhf.models.provenance import check_provenance, text_provenance
from pjrlhf.models.quantization import get_quantization
from pjrlhf.models.registry import UserRegistry
from pjrlhf.models.storage import load_tree
from pjrlhf.models.users import UserModel
from pjrlhf.parallel.mesh import batch_sharding, leaf_sharding
from pjrlhf.rollout import sampler, scoring
from pjrlhf.rollout.batches import Prompts
from pjrlhf.rollout.sampler import Sampling
from pjrlhf.settings import fold_seed
from pjrlhf.types import Json, Params

LONGEST = 64  # tokens of an answer where nobody says how many
MULTIPLE = 32  # lengths are rounded up to multiples of 32, so that few programs are compiled


def load_model(
    folder: str | os.PathLike,
    *,
    adapter: AdapterConfig = AdapterConfig(),  # noqa: B008 - frozen
    dtype: str = "float32",
    param_dtype: str = "float32",
    quantize: str = "",
    eos_token: str | None = None,
    mesh: Mesh | None = None,
) -> "LanguageModel":
    """Reads a model and its tokenizer.

    Args:
      folder: in Hugging Face layout: config.json, safetensors weights and tokenizer files; or a name on the hub,
        "owner/name" or "owner/name@revision".
      adapter: rank and alpha of the adapter banks that `LanguageModel.generate` and `score` take.
      dtype: of activations, a dtype name.
      param_dtype: of the parameters, a dtype name.
      quantize: "int8" or "nf4" keeps the kernels of the linear layers in 8 or 4 bits.
      eos_token: the token that ends an answer; the EOS of the tokenizer where None.
      mesh: of the devices over which parameters and rows are split, see `parallel.mesh`; one device where None.

    Raises:
      UserError: no such folder, or the model or tokenizer cannot be read.
    """
    path = model_folder(folder)
    config = read_config(path)
    tokenizer = load_tokenizer(path, eos_token=eos_token, rows=config.vocab_size)
    platform = jax.default_backend()
    model = Decoder(
        config,
        dtype=jnp.dtype(dtype),
        attention=choose("auto", platform, dtype, 1 if mesh is None else mesh.size),
        user_offset=int(bool(tokenizer.add_bos)),
        batch_sharding=None if mesh is None or mesh.size == 1 else batch_sharding(mesh),
        decode=choose_decode(platform),
    )
    place = None if mesh is None else functools.partial(leaf_sharding, mesh)
    base = load_params(path, dtype=jnp.dtype(param_dtype), place=place, quantization=get_quantization(quantize))
    return LanguageModel(Backbone(model, adapter, base), tokenizer, path)


def load_bank(
    path: str | os.PathLike, base: str | os.PathLike | None = None
) -> tuple[Any, tuple[str, ...], AdapterConfig]:
    """Reads an adapter bank.

    Args:
      path: bank.safetensors, or the folder of the stage that wrote it.
      base: folder of the model that it shall adapt; None does not check that they belong together.

    Returns:
      (bank, whose leaves have a leading axis K; names of the K adapters; their rank and alpha).

    Raises:
      UserError: no such file, a damaged one, one that is not a bank, or a bank of another base.
    """
    file = model_file(path, "bank.safetensors")
    bank, note = load_tree(file)
    if "adapters" not in note:
        raise UserError(f"{file}: is not an adapter bank; name the bank.safetensors of a stage, or its folder")
    if base is not None:
        _check_base(file, note, model_folder(base))
    return bank, tuple(note["adapters"]), _adapter(note)


def _adapter(note: dict[str, Json]) -> AdapterConfig:
    return AdapterConfig(rank=note["rank"], alpha=note["alpha"], dtype=note["adapter_dtype"])


def _check_base(file: pathlib.Path, note: dict[str, Json], folder: pathlib.Path) -> None:
    # Adapters of a quantised base also fit the floats it was made from.
    check_provenance(file, {"base": str(note.get("base")).split("-")[0]}, {"base": fingerprint(folder)})
    if "eos_tokens" in note:  # what a run wrote
        tokenizer = load_tokenizer(folder, eos_token=note["eos_tokens"][0], rows=read_config(folder).vocab_size)
        check_provenance(file, note, text_provenance(tokenizer, bool(note["chat_template"])))


def load_personal(
    path: str | os.PathLike, base: str | os.PathLike | None = None, *, mesh: Mesh | None = None
) -> "PersonalModel":
    """Reads a trained entry of `preference.models`: a policy or reward model with its people.

    Args:
      path: preference/<name>/model.safetensors of a run, or its folder.
      base: folder of the base model, where it is no longer where the run had it.
      mesh: of the base, see `load_model`.

    Raises:
      UserError: no such file, a damaged one, one that is no such entry, or another base.
    """
    file = model_file(path, "model.safetensors")
    params, note = load_tree(file)
    if "user_model" not in note:
        raise UserError(f"{file}: is no user model; name preference/<name>/model.safetensors of a run")
    model = load_base(file, note, base, mesh=mesh)
    registry = UserRegistry.from_json(note["users"])
    found = PersonalModel(model, UserModel(**note["user_model"]), registry, {"users": {}, **params}, note["chat"])
    check_provenance(file, note, {"user_offset": model.backbone.model.user_offset})
    return found


def load_base(
    file: pathlib.Path, note: dict[str, Json], base: str | os.PathLike | None = None, *, mesh: Mesh | None = None
) -> "LanguageModel":
    """The base that a file of a run was trained on, as its note records it.

    Args:
      base: its folder, where it is no longer where the run had it.
      mesh: see `load_model`.

    Raises:
      UserError: it is not there, or is another one.
    """
    recorded = str(note["base_folder"])  # see `Workspace.base_from`
    there = recorded if hub_name(recorded) else file.absolute().parent / recorded
    folder = model_folder(there if base is None else base)
    if not folder.is_dir():
        raise UserError(f"{folder}: the base of {file} is not there; name its folder with base=")
    _check_base(file, note, folder)
    dtypes = {name: note[name] for name in ("dtype", "param_dtype", "quantize")}
    return load_model(folder, adapter=_adapter(note), eos_token=note["eos_tokens"][0], mesh=mesh, **dtypes)


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """A frozen base with its tokenizer.

    Attributes:
      backbone: model, parameters and adapter shape, as jitted functions take them.
      tokenizer: of the base.
      folder: where the base was read from; None for one that was not read.
    """

    backbone: Backbone
    tokenizer: Tokenizer
    folder: pathlib.Path | None = None

    def generate(
        self,
        prompts: Sequence[Prompt],
        bank: Params | None = None,
        mix: ArrayLike | None = None,
        *,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        user_tokens: jax.Array | None = None,
    ) -> list[str]:
        """Samples one answer per prompt.

        Args:
          prompts: B texts, or conversations for a tokenizer with a chat template: lists of messages whose last one is
            to be answered, or a `data.messages.Conversation` with tools and variables of the template.
          bank: K adapters; None for the base alone.
          mix: float [K] or [B, K], weights of the adapters; None for the base alone.
          max_new_tokens: longest answer, in tokens; where None 64, or what the context leaves where that is less.
          temperature: of sampling; 0 is greedy.
          top_p: nucleus sampling where below 1 (arXiv 1904.09751).
          seed: of all draws.
          user_tokens: float [B, E, D], read before each prompt, see `models.users`.

        Raises:
          UserError: a prompt is not UTF-8, does not fit the context, or the chat template refuses it; `mix` does not
            fit the bank or the prompts; or a setting of sampling is out of range.
        """
        prompts = _checked(prompts)
        mix = _rows_of_mix(bank, mix, len(prompts))
        if not prompts:
            return []
        ids = []
        for number, prompt in enumerate(prompts, 1):
            with _named(f"prompt {number}"):
                ids.append(self.tokenizer.encode_prompt(prompt))
        reserved = 0 if user_tokens is None else user_tokens.shape[1]
        longest, limit = max(map(len, ids)) + reserved, self.backbone.model.config.max_length
        if max_new_tokens is None:
            max_new_tokens = max(1, min(LONGEST, limit - longest))
        sampling = Sampling(
            max_new_tokens=max_new_tokens,
            eos_ids=self.tokenizer.eos_ids,
            pad_id=self.tokenizer.pad_id,
            temperature=temperature,
            top_p=top_p,
        )
        room = limit - max_new_tokens - reserved
        if longest < limit < longest + max_new_tokens:
            raise UserError(
                f"max_new_tokens {max_new_tokens}: prompts of up to {longest} tokens leave {limit - longest} of the "
                f"context of {limit}; ask for {limit - longest} at most"
            )
        self._check_context(longest + max_new_tokens)
        tokens, valid = pad_left(ids, min(_rounded(max(map(len, ids))), room), self.tokenizer.pad_id)
        key = jax.random.key(fold_seed(seed))
        out = jax.device_get(_generate(self.backbone, sampling, bank, mix, user_tokens, tokens, valid, key))
        texts = []
        for prompt, before, after, kept in zip(prompts, ids, out.tokens, out.valid, strict=True):
            texts.append(
                self.tokenizer.decode_answer(after[kept].tolist(), before if isinstance(prompt, str) else None)
            )
        return texts

    def score(
        self,
        prompts: Sequence[Prompt],
        answers: Sequence[str],
        bank: Params | None = None,
        mix: ArrayLike | None = None,
        *,
        user_tokens: jax.Array | None = None,
        heads: Params | None = None,
    ) -> np.ndarray:
        """Log-probabilities of answers given their prompts, EOS included: float32 [B], in nats; with the `heads` of a
        reward model, the reward of every answer.

        Args:
          prompts, answers: B each.
          bank, mix, user_tokens: see `generate`.
          heads: scalar heads, one per adapter of `bank`.

        Raises:
          UserError: see `generate`.
        """
        prompts = _checked(prompts)
        if len(answers) != len(prompts):
            raise UserError(f"answers: there are {len(answers)} for {len(prompts)} prompts; give one for each")
        mix = _rows_of_mix(bank, mix, len(prompts))
        if not prompts:
            return np.zeros(0, np.float32)
        rows = []
        for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True), 1):
            with _named(f"prompt {number} and its answer"):
                rows.append(self.tokenizer.encode_answers(prompt, [plain(answer)]))
        prompt_ids, answer_ids = [prompt for prompt, _ in rows], [found[0].ids for _, found in rows]
        reserved = 0 if user_tokens is None else user_tokens.shape[1]
        self._check_context(reserved + max(len(p) + len(a) for p, a in zip(prompt_ids, answer_ids, strict=True)))
        prompt = pad_left(prompt_ids, _rounded(max(map(len, prompt_ids))), self.tokenizer.pad_id)
        answer = pad_right(answer_ids, _rounded(max(map(len, answer_ids))), self.tokenizer.pad_id)
        tokens, valid = (np.concatenate(pair, axis=1) for pair in zip(prompt, answer, strict=True))
        length = prompt[0].shape[1]
        return np.asarray(_score(self.backbone, bank, mix, user_tokens, heads, tokens, valid, length))

    def _check_context(self, length: int) -> None:
        limit = self.backbone.model.config.max_length
        if length > limit:
            raise UserError(f"prompts and answers: {length} tokens do not fit the context of {limit}; shorten them")


@dataclasses.dataclass(frozen=True)
class PersonalModel:
    """A policy or reward model that knows people, as the stage preference trained it.

    Prompts are read as they are: what an entry with `writer` or `user_text` reads of a person stands before them.

    Attributes:
      model: the frozen base with its tokenizer.
      users: its user model.
      registry: the people it knows; everybody else is the generic user.
      params: {"bank", "users"}, and "heads" of a reward model.
      chat: plain prompts are asked as the first message of a conversation, as in training.
    """

    model: LanguageModel
    users: UserModel
    registry: UserRegistry
    params: Params
    chat: bool

    def generate(self, prompts: Sequence[Prompt], users: Sequence[str | None], **options: Any) -> list[str]:
        """Samples one answer per prompt, each as its user sees it; options and errors are those of
        `LanguageModel.generate`.

        Raises:
          UserError: this is a reward model.
        """
        if "heads" in self.params:
            raise UserError("generate: this is a reward model; score answers with it")
        bank, mix, user_tokens = self._ingredients(users, len(prompts))
        return self.model.generate(self._asked(prompts), bank, mix, user_tokens=user_tokens, **options)

    def score(self, prompts: Sequence[Prompt], answers: Sequence[str], users: Sequence[str | None]) -> np.ndarray:
        """Log-probabilities of answers as their users see them, float32 [B], in nats; rewards of a reward model."""
        bank, mix, user_tokens = self._ingredients(users, len(prompts))
        heads = self.params.get("heads")
        return self.model.score(self._asked(prompts), answers, bank, mix, user_tokens=user_tokens, heads=heads)

    def _ingredients(self, users: Sequence[str | None], count: int) -> tuple[Params, jax.Array, jax.Array | None]:
        if len(users) != count:
            raise UserError(f"users: there are {len(users)} for {count} prompts; give one for each, or None")
        names = []
        for number, user in enumerate(users, 1):
            with _named(f"user {number}"):
                names.append(None if user is None else name_of(user, "name"))
        user_tokens, mix = self.users.apply(self.params["users"], jnp.asarray(self.registry.indices(names)))
        return self.params["bank"], jnp.ones((1, 1)) if mix is None else mix, user_tokens

    def _asked(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        return [as_turns(p) if self.chat and isinstance(p, str) else p for p in _checked(prompts)]


def _checked(prompts: Sequence[Prompt]) -> list[Prompt]:
    """The prompts, conversations with their messages as chat templates expect them.

    Raises:
      UserError: a single prompt, or one that is neither text nor a conversation that waits for an answer.
    """
    if isinstance(prompts, str | Mapping) or any(isinstance(prompt, Mapping) for prompt in prompts):
        raise UserError("prompts: is a single prompt; give a list of prompts, as [prompt]")
    found: list[Prompt] = []
    for number, prompt in enumerate(prompts, 1):
        with _named(f"prompt {number}"):
            if isinstance(prompt, str):
                found.append(plain(prompt))
            else:
                found.append(Conversation(read_turns(plain(prompt), "prompt"), options_of(prompt)))
    return found


@contextlib.contextmanager
def _named(what: str) -> Iterator[None]:
    """Names what cannot be used."""
    try:
        yield
    except RecordError as error:
        is_prompt = what.startswith("prompt") and error.reason != "not UTF-8"
        remedy = "correct it, or give the prompt as text" if is_prompt else "correct it"
        raise UserError(f"{what}: {error}; {remedy}") from error


def _rounded(length: int) -> int:
    return length + -length % MULTIPLE


def _rows_of_mix(bank: Params | None, mix: ArrayLike | None, count: int) -> jax.Array | None:
    if bank is None or mix is None:
        if mix is not None:
            raise UserError("mix: has no bank to mix; give one, or leave mix out")
        return None
    try:
        rows = np.atleast_2d(np.asarray(mix, np.float32))
    except (TypeError, ValueError, OverflowError):
        rows = np.full((1, 1), np.nan)
    if not np.isfinite(rows).all():
        raise UserError("mix: is not a list of finite numbers; give a weight for each adapter")
    if rows.ndim != 2 or rows.shape[1] != bank_size(bank) or rows.shape[0] not in (1, count):
        raise UserError(
            f"mix: has shape {list(rows.shape)}; give {bank_size(bank)} weights, or {bank_size(bank)} for each of the "
            f"{count} prompts"
        )
    return jnp.asarray(rows)


@functools.partial(jax.jit, static_argnums=1)
def _generate(backbone, sampling, bank, mix, user_tokens, tokens, valid, key):
    return sampler.generate(backbone.policies(bank, mix, user_tokens), sampling, Prompts(tokens, valid), key)


@functools.partial(jax.jit, static_argnums=7)
def _score(backbone, bank, mix, user_tokens, heads, tokens, valid, prompt_length):
    policies = backbone.policies(bank, mix, user_tokens)
    if heads is not None:
        return scoring.rewards(policies, heads, mix, tokens, valid)
    return scoring.sequence_logps(policies, tokens, valid, prompt_length)[0]
