"""Named random streams. Every draw of a run belongs to one stream.

A JAX stream is `fold_in(key(seed), number)`; NumPy and Python generators are seeded with (seed, number). The table
fixes the number of every name, so that results do not depend on the names of files. A name outside the table, for
example of an extension, gets a number from its CRC-32.
"""

import functools
import random
import zlib

import jax
import numpy as np

from pjrlhf.settings import fold_seed

STREAMS = {
    "base/init": 0,
    "sft/adapter": 1,
    "sft/state": 2,
    "sft/completions": 3,
    "comparisons/answers": 10,
    "reward/adapter": 20,
    "reward/head": 21,
    "reward/state": 22,
    "reward/calibration": 23,
    "policy/adapter": 30,
    "policy/state": 31,
    "policy/eval": 32,
    "targets/weights": 35,
    "evaluate/people": 40,
    "evaluate/ingredients": 41,
    "evaluate/sweep": 42,
    "evaluate/best_of": 43,
    "population/train": 50,
    "population/heldout": 51,
    "population/new_users": 52,
    "preference/init": 60,
    "preference/clusters": 61,
    "preference/completions": 62,
    "evaluate_users/answers": 70,
    "modpo/adapter": 110,
    "modpo/state": 111,
    "modpo/completions": 112,
    "ric/adapter": 126,
    "ric/state": 127,
    "ric/completions": 128,
    "ric/targets": 120,
    "ric/kept": 121,
    "ric/base_answers": 122,
    "ric/answers": 123,
    "evaluate_front/base_answers": 160,
    "evaluate_front/answers": 161,
    "preference/permutation": 162,
    "requests/heldout_order": 163,
    "population/people": 164,
    "comparisons/prompts": 165,
    "rewards/baseline": 166,
    "evaluate_users/base_answers": 167,
    "user_models/permutation": 180,
    "user_models/init": 181,
    "user_models/batches": 182,
    "preference/history": 183,
}
UNNAMED = 2**31  # the first number of names outside the table


def number_of(name: str) -> int:
    """The number of a stream, below 2**32."""
    return STREAMS.get(name, UNNAMED + zlib.crc32(name.encode()) % UNNAMED)


class Streams:
    """The random streams of a run.

    Args:
      seed: of the run, of any sign, up to 64 bits.

    Attributes:
      seed: the seed as 32 bits, see `fold_seed`.
    """

    def __init__(self, seed: int):
        self.seed = fold_seed(seed)

    @functools.cached_property
    def root(self) -> jax.Array:
        """The PRNG key of the run."""
        with jax.ensure_compile_time_eval():  # the first call may be inside a traced program
            return jax.random.key(self.seed)

    def key(self, name: str, *indices: int) -> jax.Array:
        """The PRNG key of a stream; every index selects a substream by one `fold_in`."""
        key = jax.random.fold_in(self.root, number_of(name))
        for index in indices:
            key = jax.random.fold_in(key, index)
        return key

    def numpy(self, name: str, *indices: int) -> np.random.Generator:
        """The NumPy generator of a stream, or of the substream of the indices."""
        return np.random.default_rng((self.seed, number_of(name), *indices))

    def python(self, name: str) -> random.Random:
        """The Python generator of a stream."""
        return random.Random(f"{self.seed}/{number_of(name)}")
