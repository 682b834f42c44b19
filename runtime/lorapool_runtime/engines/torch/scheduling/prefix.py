"""The names of full KV blocks in the prefix cache: what a block's keys and values depend on, and nothing else.

    root   = H(base or adapter, cache_salt)          key(i) = H(key(i - 1), tokens of block i)

`cache_salt` is the identity of the weights (`base` or the adapter's digest), so that no two of them ever share a block,
whatever slots they sit in; a key covers every token before its block too. H is BLAKE2b with 256 bits (RFC 7693): who
could find two prompts with one key could break the hash. `sequence` calls it; the tokens never leave the process.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence

KEY_BYTES = 32


def root_key(cache_salt: str, *, is_base: bool) -> bytes:
    """Where a chain begins. A request of the base cannot meet an adapter's blocks even under a wrong salt."""
    kind = b"base\0" if is_base else b"adapter\0"
    return _hash(kind + cache_salt.encode())


def next_key(parent: bytes, tokens: Sequence[int]) -> bytes:
    """The key of the block that holds `tokens` (all of its places) right after the block named `parent`."""
    return _hash(parent + array("q", tokens).tobytes())


def _hash(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=KEY_BYTES, person=b"lorapool kv").digest()
