"""A policy with user tokens as a plain model whose vocabulary holds the tokens of every person."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import flax.traverse_util
import numpy as np

from pjrlhf.errors import UserError
from pjrlhf.export.adapter import uniform
from pjrlhf.export.ingredients import combine_adapters
from pjrlhf.export.people import PeopleTokens
from pjrlhf.export.soup import Source
from pjrlhf.export.unsampled import add_rows, widen
from pjrlhf.merging import lora
from pjrlhf.models.folders import open_tensors, weight_files
from pjrlhf.models.hf_config import generation_config
from pjrlhf.models.huggingface import load_params, save_params
from pjrlhf.models.peft import module_factors, write_peft

ADAPTER = "adapter"  # the folder of a kept adapter
PEOPLE = "users.json"


def user_tokens(source: Source, names: Sequence[str]) -> np.ndarray:
    """Tokens of the generic user and of people, float32 [1 + U, E, D].

    Raises:
      UserError: a name that the user model does not know, or that is no UTF-8.
    """
    for name in names:
        source.check_user(name)
        try:
            name.encode()
        except UnicodeEncodeError:
            raise UserError(
                f"user {name!r}: is no UTF-8, which files and templates need; give them another name"
            ) from None
    found = [source.catalogue.people.row(name)[0] for name in (None, *names)]
    return np.asarray(found, np.float32)


def people_of(source: Source, user: str | None = None) -> tuple[PeopleTokens, np.ndarray]:
    """The added tokens of all people, or of one, and their vectors [1 + U, E, D]."""
    names = [*source.members] if user is None else [user]
    vectors = user_tokens(source, names)
    content = vectors.tobytes() + json.dumps(names).encode()
    return PeopleTokens.create(names, vectors.shape[1], source.catalogue.model.tokenizer, content), vectors


def write(
    work: pathlib.Path,
    output: pathlib.Path,
    source: Source,
    weights: Mapping[str, float],
    user: str | None,
    dtype: str | None,
    keep_adapter: bool,
) -> PeopleTokens:
    """Writes weights, config.json, tokenizer and users.json.

    Args:
      output: what `work` will be called.
      user: this person alone, beside the generic user; everybody where None.
      dtype: of the weights; that of the base where None.
      keep_adapter: write the adapter to a folder of its own instead of merging it.

    Raises:
      UserError: see `people.PeopleTokens.extend` and `unsampled.add_rows`; or a tensor is not finite.
    """
    tokenizer, folder = source.catalogue.model.tokenizer, source.folder
    tokens, vectors = people_of(source, user)
    backend = tokens.extend(tokenizer)
    adapters = source.adapters(weights)
    params: Any = load_params(folder)
    if not keep_adapter:
        params = lora.merge_dense(
            params, [x.adapter for x in adapters], [x.scale for x in adapters], [*weights.values()]
        )
    gap = backend.convert_tokens_to_ids(tokens.tokens(0)[0]) - source.config.vocab_size
    rows = np.pad(vectors.reshape(-1, vectors.shape[-1]), ((gap, 0), (0, 0)))
    config, wide = add_rows(source.config, params, rows, source.model_type)
    ids = source.token_ids()
    save_params(
        work,
        config,
        wide,
        model_type=source.model_type,
        dtype=dtype or _stored(source),
        token_ids=ids,
        generation=generation_config(folder, None, ids),
    )
    backend.save_pretrained(str(work))
    listed = {"generic": tokens.text(None), "people": {name: tokens.text(name) for name in tokens.names}}
    (work / PEOPLE).write_text(json.dumps(listed, indent=1, ensure_ascii=False), encoding="utf-8")
    if keep_adapter:
        combined = flax.traverse_util.flatten_dict(combine_adapters(lora.concatenate, adapters), sep="/")
        combined = {path: widen(source.config, source.model_type, path, np.asarray(x)) for path, x in combined.items()}
        whole = flax.traverse_util.unflatten_dict(combined, sep="/")
        modules, rank = uniform(module_factors(folder, whole, source.model_type, config.head_dim))
        write_peft(work / ADAPTER, modules, rank, rank, str(output.absolute()), source.model_type)
    return tokens


def _stored(source: Source) -> str:
    """The dtype of the embedding in the folder of the base."""
    name = f"{source.family.modules['embed']}.weight"
    with open_tensors(weight_files(source.folder), source.family.prefix) as files:
        return files[name].dtype(name).name
