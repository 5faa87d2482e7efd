"""Type aliases, and the legend of shape letters that docstrings and annotations of all modules use.

Annotations such as `Float[Array, "B T D"]` (jaxtyping) give dtype and shape; tests check them at run time.

    Rows and positions
      B  rows of a batch (examples)
      n  rows per policy; B = K n in batches of K policies
      G  groups of consecutive rows with one row of `mix` each; B is a multiple of G
      T  tokens, the positions of a row
      P  prompt positions, left-padded
      Q  prompt positions of a reward model, left-padded
      N  response positions, right-padded
      M  positions that a query may attend to: T, or the length of a key/value cache
      C  rows of a batch that are selected from it
    Packed rows (`data.packing`)
      O  owners: examples that are packed into rows
      Z  parts of the batch
      X  scored tokens of a part
      Y  last tokens of a part
    Policies, objectives and users
      K  policies, ingredients, adapters of a bank
      A  adapters of a bank, where one policy mixes several of them
      S  objectives
      H  value heads of the combination of objectives
      U  users; user tables have U + 1 rows, row 0 is the generic user
      E  user tokens (soft embeddings) of a user
      J  cluster centres of a user model
    Model
      L  layers
      D  model width
      F  outputs of a linear layer, such as the feed-forward width
      V  vocabulary
      R  rank of low-rank adapters
      Hq, Hkv, Dh  query heads, key/value heads, head width

Axes of length 1 that broadcast are written 1, and `*` prefixes any number of axes (`*batch`).
"""

from typing import TYPE_CHECKING, Any, TypeAlias

import jax
import numpy as np
from jaxtyping import Key, PyTree

if TYPE_CHECKING:
    from jaxlib._jax import Device
else:
    Device = jax.Device  # type checkers take it for a variable

if TYPE_CHECKING:
    Array: TypeAlias = jax.Array
else:
    Array = jax.Array | np.ndarray  # like JAX's own functions, ours accept arrays on the host
PRNGKey: TypeAlias = Key[jax.Array, ""]  # typed, from `jax.random.key`
Params: TypeAlias = dict[str, Any]  # nested dict of arrays: parameters, an adapter bank, heads, user tables
Tree: TypeAlias = PyTree  # any pytree of arrays, or of their shapes, shardings, ...
DType: TypeAlias = jax.typing.DTypeLike
Config: TypeAlias = Any  # an `ml_collections.ConfigDict`, whose attributes have no static types
Json: TypeAlias = Any  # value that `json` reads and writes

__all__ = ["Array", "Config", "DType", "Device", "Json", "PRNGKey", "Params", "Tree"]
