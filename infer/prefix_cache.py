"""Keys and values of the beginnings of earlier prompts, in blocks: a beginning that prompts share is read once."""

import functools
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from model import KVCache, ModelConfig, init_cache
from model.accounting import kv_cache_bytes
from model.ambient import lenient
from model.dtypes import DTypeLike

_ROOT = 0  # the serial number of the empty prefix


class _Key(NamedTuple):
    """A block is found by the block before it and its own tokens, so that equal keys are equal prefixes."""

    parent: int
    tokens: bytes


class _Block(NamedTuple):
    """A stored block. serial: never used again. row: in the store; the rows of removed blocks are used again."""

    serial: int
    row: int


class Prefix(NamedTuple):
    """A stored beginning of a prompt. serial: of its last block; None: a block is missing, and none can follow."""

    length: int
    serial: int | None
    rows: list[int]


NO_PREFIX = Prefix(0, _ROOT, [])


class PrefixCache:
    """Blocks of `block` tokens with their keys and values in all layers, as they were when the block was prefilled.

    A block depends on all tokens before it: blocks form a tree, and a prompt is looked up from its first block on. A
    hit restores the bits that prefilling gives. Of a layer with a sliding window a block holds the part that is in the
    window at the block's end; prefixes are restored block by block, so that the ring holds what it held then. The least
    recently used block without a successor is removed when there is no room.
    """

    def __init__(self, config: ModelConfig, block: int, limit_bytes: int, dtype: DTypeLike | None = None):
        """Allocate the store. limit_bytes: its size at most; less than a block's: nothing is stored.

        dtype: see `init_cache`. An encoder-decoder's prompts have no blocks; nothing is stored.
        """
        self.block = block
        rows = limit_bytes // kv_cache_bytes(config, 1, block, dtype)
        self.rows = 0 if config.stack == "encoder-decoder" else rows
        self._store = _empty_store(config, self.rows, block, dtype) if self.rows else None
        self.clear()

    def clear(self) -> None:
        """Forget all blocks."""
        self._blocks: OrderedDict[_Key, _Block] = OrderedDict()  # the least recently used first
        self._successors: dict[int, int] = {}  # by serial number, without blocks that have none
        self._free = list(range(self.rows))
        self._last_serial = _ROOT

    def __len__(self) -> int:
        """The number of stored blocks."""
        return len(self._blocks)

    def find(self, prompt: Sequence[int]) -> Prefix:
        """Return the longest stored beginning of a prompt, without its last token, which has to be read."""
        found = []
        parent = _ROOT
        for end in range(self.block, len(prompt), self.block):
            key = _key(parent, prompt[end - self.block : end])
            if key not in self._blocks:
                break
            found.append(key)
            parent = self._blocks[key].serial
        for key in reversed(found):  # the first block becomes the most recently used, as it is in most prompts
            self._blocks.move_to_end(key)
        return Prefix(len(found) * self.block, parent, [self._blocks[key].row for key in found])

    def restore(self, cache: KVCache, prefix: Prefix) -> KVCache:
        """Return a cache of one row that holds the prefix. Donates the cache, whatever it held."""
        rows = np.zeros(-(-cache.capacity // self.block), np.int32)
        rows[: len(prefix.rows)] = prefix.rows
        return _restore(self.block, cache, self._store, rows, np.int32(len(prefix.rows)))

    def add(self, cache: KVCache, prefix: Prefix, tokens: Sequence[int]) -> Prefix:
        """Store the block that ends a cache of one row, which holds the prefix and the block; return both as one.

        A block that is stored already stays as it is: a prompt that ends with it reads it again for its last token.
        The result cannot be continued if there is no room for the block.
        """
        length = prefix.length + len(tokens)
        if prefix.serial is None:
            return Prefix(length, None, [])
        key = _key(prefix.serial, tokens)
        block = self._blocks.get(key)
        if block is None:
            row = self._free_row(prefix.serial)
            if row is None:
                return Prefix(length, None, [])
            self._last_serial += 1
            block = self._blocks[key] = _Block(self._last_serial, row)
            self._successors[key.parent] = self._successors.get(key.parent, 0) + 1
            self._store = _save(self._store, cache, np.int32(row), np.int32(length))
        return Prefix(length, block.serial, [*prefix.rows, block.row])

    def _free_row(self, parent: int) -> int | None:
        """Return a row for a block after this one, of the least recently used block if none is free."""
        if self._free:
            return self._free.pop()
        for key, block in self._blocks.items():
            if block.serial not in self._successors and block.serial != parent:
                del self._blocks[key]
                self._successors[key.parent] -= 1
                if not self._successors[key.parent]:
                    del self._successors[key.parent]
                return block.row
        return None


def _key(parent: int, tokens: Sequence[int]) -> _Key:
    return _Key(parent, np.asarray(tokens, np.int32).tobytes())


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
@lenient()
def _empty_store(config: ModelConfig, rows: int, block: int, dtype: DTypeLike | None) -> tuple[Any, ...]:
    """Return the layers of a cache with a row per block: a layer with a window has min(window, block) slots."""
    return init_cache(config, rows, block, dtype).layers


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
@lenient()
def _restore(
    block: int, cache: KVCache, store: tuple[Any, ...], rows: Int[Array, " most"], count: Int[Array, ""]
) -> KVCache:
    """Write the blocks in the first `count` of these rows, in this order, to the beginning of the cache."""

    def write(slots: Array, stored: Array, number: Array) -> Array:
        new = jax.lax.dynamic_slice_in_dim(stored, rows[number], 1)
        start = (number + 1) * block - new.shape[2]
        if slots.shape[2] == cache.capacity:
            return jax.lax.dynamic_update_slice_in_dim(slots, new, start, axis=2)
        return slots.at[:, :, (start + jnp.arange(new.shape[2])) % slots.shape[2]].set(new)

    def write_block(number: Array, layers: tuple[Any, ...]) -> tuple[Any, ...]:
        return jax.tree.map(functools.partial(write, number=number), layers, store)

    layers = jax.lax.fori_loop(jnp.int32(0), count, write_block, cache.layers)
    return cache.replace(layers=layers, lengths=count[None] * block)  # type: ignore[attr-defined]


@functools.partial(jax.jit, donate_argnums=0)
@lenient()
def _save(store: tuple[Any, ...], cache: KVCache, row: Int[Array, ""], end: Int[Array, ""]) -> tuple[Any, ...]:
    """Copy the block that ends at this position of the cache into a row of the store."""

    def copy(stored: Array, slots: Array) -> Array:
        length = stored.shape[2]
        if slots.shape[2] == cache.capacity:
            new = jax.lax.dynamic_slice_in_dim(slots, end - length, length, axis=2)
        else:
            new = slots[:, :, (end - length + jnp.arange(length)) % slots.shape[2]]
        return jax.lax.dynamic_update_slice_in_dim(stored, new, row, axis=0)

    return jax.tree.map(copy, store, cache.layers)
