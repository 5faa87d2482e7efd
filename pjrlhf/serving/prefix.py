"""The prefix cache: keys and values of whole chunks of prompts, bounded in bytes."""

import collections
import hashlib

import numpy as np

from pjrlhf.models.decoder import Cache
from pjrlhf.parallel.mesh import bytes_per_device
from pjrlhf.serving.tickets import Request


class PrefixCache:
    """Chunks by key. The chunk that was not used for longest goes first.

    Args:
      limit: bytes that the chunks may take on a device.
      chunk: tokens of a chunk.

    Attributes:
      bytes: that they take.
      hits, misses: chunks that were found, and whole chunks that had to be read.
    """

    def __init__(self, limit: int, chunk: int):
        self.limit, self._chunk = limit, chunk
        self.bytes = self.hits = self.misses = 0
        self._chunks: collections.OrderedDict[bytes, tuple[Cache, int]] = collections.OrderedDict()

    def keys(self, request: Request, tokens: np.ndarray) -> list[bytes]:
        """Of every whole chunk before the last token: a digest of all that decides on its keys and values.

        `tokens` are those of the prompt, with places for user tokens.
        """
        if not self.limit:
            return []
        digest = hashlib.blake2b(digest_size=16)
        for part in (request.mix, request.user_tokens):
            digest.update(b"0" if part is None else b"1" + np.asarray(part, np.float32).tobytes())
        keys = []
        for end in range(self._chunk, len(tokens), self._chunk):
            digest.update(tokens[end - self._chunk : end].tobytes())
            keys.append(digest.digest())
        return keys

    def find(self, keys: list[bytes]) -> list[Cache]:
        """The chunks of the first keys, up to one that is not there."""
        found = []
        for key in keys:
            if key not in self._chunks:
                break
            self._chunks.move_to_end(key)
            found.append(self._chunks[key][0])
        self.hits += len(found)
        self.misses += len(keys) - len(found)
        return found

    def __contains__(self, key: bytes) -> bool:
        return key in self._chunks

    def clear(self) -> None:
        """Forgets all chunks and counts."""
        self._chunks.clear()
        self.bytes = self.hits = self.misses = 0

    def keep(self, key: bytes, chunk: Cache) -> None:
        """Adds a chunk; older ones make room. A chunk that is larger than the whole cache is not kept."""
        size = bytes_per_device(chunk)
        if key in self._chunks or size > self.limit:
            return
        self._chunks[key] = chunk, size
        self.bytes += size
        while self.bytes > self.limit:
            _, (_, size) = self._chunks.popitem(last=False)
            self.bytes -= size
