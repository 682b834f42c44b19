"""The keys of full KV blocks in the prefix cache: a digest of everything that a block's contents depend on.

    root   = H(base or adapter, cache_salt, cache_scope)          key(i) = H(key(i - 1), tokens of block i)

`cache_salt` is the identity of the weights (`base` or the adapter's digest), so that different weights never share a
block, whatever slots they use. `cache_scope` names those who share blocks, such as the callers of one tenant. A key
also covers every token before its block. H is BLAKE2b with 256 bits (RFC 7693): two prompts with the same key would be
a collision of the hash.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence

KEY_BYTES = 32


def root_key(cache_salt: str, cache_scope: str, *, is_base: bool) -> bytes:
    """The key that precedes the first block. A request of the base never finds blocks of an adapter."""
    kind, salt = b"base" if is_base else b"adapter", cache_salt.encode()
    return _hash(b"%s %d\0%s%s" % (kind, len(salt), salt, cache_scope.encode()))


def next_key(parent: bytes, tokens: Sequence[int]) -> bytes:
    """The key of the full block that holds `tokens` and follows the block with the key `parent`."""
    return _hash(parent + array("q", tokens).tobytes())


def _hash(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=KEY_BYTES, person=b"lorapool kv").digest()
