"""A soup of low-rank adapters as one adapter in PEFT's layout that every reader scales alike.

All modules have one rank R and alpha = R, so the scale is 1 in all of them, and no key `rank_pattern` or
`alpha_pattern`, which some readers ignore. Weights and scales are folded into B; modules of a smaller rank are padded
with zeros.
"""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pjrlhf.export.ingredients import Ingredient, combine_adapters
from pjrlhf.export.soup import Source
from pjrlhf.merging import lora
from pjrlhf.models.peft import module_factors, write_peft

Factors = tuple[np.ndarray, np.ndarray]  # [L, in, R] and [L, R, out]


def soup_factors(source: Source, adapters: Sequence[Ingredient]) -> dict[str, Factors]:
    """Module on disk -> factors of sum_i w_i scale_i a_i b_i, at scale 1."""
    combined = combine_adapters(lora.concatenate, adapters)
    return module_factors(source.folder, combined, source.model_type, source.config.head_dim)


def truncated(modules: Mapping[str, Factors], rank: int) -> tuple[dict[str, Factors], dict[str, float]]:
    """The nearest factors of at most `rank`, layer by layer (Eckart and Young 1936), and what is lost.

    The singular values of a b are those of the small matrix R_a R_b^T, where a = Q_a R_a and b^T = Q_b R_b, so the
    product is never formed.

    Args:
      modules: factors [L, in, R] and [L, R, out].

    Returns:
      (factors, float32; relative errors |W - W'|_F / |W|_F of every module over its layers, and of all as "total").
    """
    found, lost, whole = {}, {}, {}
    for name, (a, b) in modules.items():
        qa, ra = np.linalg.qr(a.astype(np.float64))
        qb, rb = np.linalg.qr(b.astype(np.float64).swapaxes(1, 2))
        u, s, vt = np.linalg.svd(ra @ rb.swapaxes(1, 2))
        kept = min(rank, s.shape[1])
        root = np.sqrt(s[:, None, :kept])
        left = qa @ (u[..., :kept] * root)
        right = (vt[:, :kept].swapaxes(1, 2) * root).swapaxes(1, 2) @ qb.swapaxes(1, 2)
        found[name] = left.astype(np.float32), right.astype(np.float32)
        lost[name], whole[name] = (s[:, kept:] ** 2).sum(), (s**2).sum()
    names = {name: [name] for name in modules} | {"total": list(modules)}
    sums = {key: (sum(lost[x] for x in of), sum(whole[x] for x in of)) for key, of in names.items()}
    return found, {key: float(np.sqrt(part / all_)) if all_ else 0.0 for key, (part, all_) in sums.items()}


def uniform(modules: Mapping[str, Factors]) -> tuple[dict[str, Factors], int]:
    """Factors of one rank, padded with zeros, and that rank."""
    rank = max(b.shape[1] for _, b in modules.values())
    found = {}
    for name, (a, b) in modules.items():
        more = rank - b.shape[1]
        found[name] = np.pad(a, ((0, 0), (0, 0), (0, more))), np.pad(b, ((0, 0), (0, more), (0, 0)))
    return found, rank


def write(work: pathlib.Path, source: Source, weights: Mapping[str, float], rank: int | None) -> dict[str, Any]:
    """Writes adapter_config.json and adapter_model.safetensors; returns what the manifest says of them.

    Args:
      rank: at most so many; exact where None.

    Raises:
      UserError: a factor is not finite.
    """
    modules = soup_factors(source, source.adapters(weights))
    note: dict[str, Any] = {}
    if rank is not None:
        modules, errors = truncated(modules, rank)
        note["error"] = errors
    modules, size = uniform(modules)
    name, commit = source.origin
    write_peft(work, modules, size, size, name, source.model_type, commit)
    return {**note, "rank": size, "space": "concat"}
