"""A soup as a full model."""

import pathlib
from collections.abc import Mapping

from pjrlhf.export.dense import write_dense
from pjrlhf.export.inherited import Inherited
from pjrlhf.export.soup import Source
from pjrlhf.models.adapters import is_low_rank
from pjrlhf.models.hf_config import generation_config
from pjrlhf.models.huggingface import save_params


def write(work: pathlib.Path, source: Source, weights: Mapping[str, float], dtype: str | None = None) -> None:
    """Writes weights, config.json, tokenizer and settings of generation.

    Args:
      dtype: of the weights; that of the base, or of a bank of full models, where None.

    Raises:
      UserError: a tensor is not finite.
    """
    ids, base = source.token_ids(), source.folder
    if not is_low_rank(source.catalogue.bank or {}):
        params = source.mixed(weights)
        save_params(
            work,
            source.config,
            params,
            model_type=source.model_type,
            dtype=dtype,
            tokenizer_folder=base,
            token_ids=ids,
        )
        return
    inherited = Inherited(base, ids, generation_config(base, None, ids, source.config.vocab_size))
    write_dense(
        work,
        base,
        source.adapters(weights),
        dtype=dtype,
        space="delta",
        method="linear",
        options={},
        inherited=inherited,
    )
