"""Would a cache in pages cost more than one row a slot? Measure the attention of a decode step both ways.

`python -m experiments.bench.decode.pages` prints one JSON document. Default shapes: SmolLM2-135M with 8 slots of 1,024.
"""

import functools
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from experiments.bench.rounds import interleaved, median_and_range
from model.attention import attend


class Shapes(NamedTuple):
    """Sizes of the step. page: tokens of a page. The keys of a page and a KV head are one row of the pool."""

    layers: int = 10
    slots: int = 8
    heads: int = 9
    kv_heads: int = 3
    head_dim: int = 64
    capacity: int = 1024
    page: int = 64

    @property
    def pages(self) -> int:
        """Pages of a slot."""
        return self.capacity // self.page


Caches = list[tuple[Array, ...]]  # keys and values of each layer
Part = Callable[[Array, Array], Float[Array, "slots kv_heads page head_dim"]]
"""(keys or values, number) → the page of this number of every slot."""


def mask_of(shapes: Shapes, lengths: Array) -> Array:
    """Return which tokens of a slot are attended to: those it holds, and the new one after them."""
    held = jnp.arange(shapes.capacity)[None, None] < lengths[:, None, None]
    return jnp.concatenate([held, jnp.ones_like(held[..., :1])], axis=-1)


def whole(shapes: Shapes, query: Array, layer: tuple[Array, ...], new: Array, lengths: Array) -> Array:
    """Attend to all tokens of a row at once, as the engine does."""
    mask = mask_of(shapes, lengths)
    keys, values = layer
    return attend(query, (keys, new), (values, new), mask, scale=shapes.head_dim**-0.5)


def by_page(shapes: Shapes, query: Array, part: Part, layer: tuple[Array, ...], new: Array, lengths: Array) -> Array:
    """Attend page by page (Milakov and Gimelshein 2018), up to the last page that any slot holds."""
    group = shapes.heads // shapes.kv_heads
    query = query.reshape(shapes.slots, shapes.kv_heads, group, shapes.head_dim) * shapes.head_dim**-0.5

    def add(carry: Any, keys: Array, values: Array, seen: Array) -> Any:
        most, total, mixed = carry
        scores = jnp.where(seen, jnp.einsum("bkgh,bkth->bkgt", query, keys), -1e30)
        new_most = jnp.maximum(most, scores.max(-1))
        shrink, weights = jnp.exp(most - new_most), jnp.exp(scores - new_most[..., None])
        mixed = mixed * shrink[..., None] + jnp.einsum("bkgt,bkth->bkgh", weights, values)
        return new_most, total * shrink + weights.sum(-1), mixed

    def one_page(number: Array, carry: Any) -> Any:
        seen = number * shapes.page + jnp.arange(shapes.page) < lengths[:, None, None, None]
        keys, values = (part(x, number) for x in layer)
        return add(carry, keys, values, seen)

    start = (jnp.full(query.shape[:-1], -1e30), jnp.zeros(query.shape[:-1]), jnp.zeros_like(query))
    start = add(start, new, new, jnp.array(True))
    pages = (lengths.max() + shapes.page - 1) // shapes.page
    _, total, mixed = jax.lax.fori_loop(0, pages, one_page, start)
    return (mixed / total[..., None]).reshape(shapes.slots, shapes.heads, 1, shapes.head_dim)


def step_in_rows(shapes: Shapes, loop: bool, caches: Caches, new: Array, lengths: Array) -> tuple[Array, Caches]:
    """Return the last layer's output, and the caches [slots, kv_heads, capacity, head_dim] with the new token."""
    key, written, x = new[:, : shapes.kv_heads], [], new
    for layer in caches:

        def part(held: Array, number: Array) -> Array:
            return jax.lax.dynamic_slice_in_dim(held, number * shapes.page, shapes.page, axis=2)

        x = by_page(shapes, x, part, layer, key, lengths) if loop else whole(shapes, x, layer, key, lengths)
        fresh = key + 0 * x[:, : shapes.kv_heads]  # the write waits for the read, and so is done in place
        for slot in range(shapes.slots):
            place, one = (slot, 0, lengths[slot], 0), fresh[slot : slot + 1]
            layer = tuple(jax.lax.dynamic_update_slice(old, one, place) for old in layer)
        written.append(layer)
    return x, written


def step_in_pages(
    shapes: Shapes, loop: bool, table: Array, caches: Caches, new: Array, lengths: Array
) -> tuple[Array, Caches]:
    """Return the last layer's output, and the pools [pages, page, head_dim] with the new token.

    table: the place in the pool of each slot's pages, [slots, kv_heads, pages].
    """
    key, written, x = new[:, : shapes.kv_heads], [], new
    row = (shapes.slots, shapes.kv_heads, shapes.capacity, shapes.head_dim)
    for layer in caches:

        def part(pool: Array, number: Array) -> Array:
            return pool.at[table[:, :, number]].get(mode="clip")

        if loop:
            x = by_page(shapes, x, part, layer, key, lengths)
        else:
            x = whole(shapes, x, tuple(pool.at[table].get(mode="clip").reshape(row) for pool in layer), key, lengths)
        fresh = key + 0 * x[:, : shapes.kv_heads]
        for slot in range(shapes.slots):
            for head in range(shapes.kv_heads):
                page = table[slot, head, lengths[slot] // shapes.page]
                place, one = (page, lengths[slot] % shapes.page, 0), fresh[slot, head][None]
                layer = tuple(jax.lax.dynamic_update_slice(old, one, place) for old in layer)
        written.append(layer)
    return x, written


def contenders(shapes: Shapes, seed: int = 0) -> dict[str, tuple[Callable, Caches]]:
    """Return the step and the caches of each way; all hold the same keys and values, pages in random order."""
    random = np.random.default_rng(seed)
    size = (shapes.slots, shapes.kv_heads, shapes.pages, shapes.page, shapes.head_dim)
    order = random.permutation(shapes.slots * shapes.kv_heads * shapes.pages)
    table = jnp.array(order.reshape(size[:3]))
    drawn = [[random.normal(size=size).astype(np.float32) for _ in range(2)] for _ in range(shapes.layers)]

    def pool(x: np.ndarray) -> Array:
        pages = np.empty((order.size, *size[3:]), np.float32)
        pages[order] = x.reshape(pages.shape)
        return jnp.array(pages)

    def row(x: np.ndarray) -> Array:
        return jnp.array(x.reshape(shapes.slots, shapes.kv_heads, shapes.capacity, shapes.head_dim))

    ways = {
        "rows": (functools.partial(step_in_rows, shapes, False), row),
        "rows_by_page": (functools.partial(step_in_rows, shapes, True), row),
        "pages_gathered": (functools.partial(step_in_pages, shapes, False, table), pool),
        "pages_by_page": (functools.partial(step_in_pages, shapes, True, table), pool),
    }
    return {
        name: (jax.jit(step, donate_argnums=0), [(make(keys), make(values)) for keys, values in drawn])
        for name, (step, make) in ways.items()
    }


def measure(shapes: Shapes, fills: Sequence[int] = (960, 256), rounds: int = 5, steps: int = 10) -> dict[str, Any]:
    """Return milliseconds a step and the ratios to "rows", in interleaved rounds, for each number of tokens held."""
    ways = contenders(shapes)
    document: dict[str, Any] = {"shapes": shapes._asdict(), "filled": {}}
    for filled in fills:
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for number, name in enumerate([*ways, *interleaved(list(ways), rounds)]):
            step, caches = ways[name]
            x = jnp.ones((shapes.slots, shapes.heads, 1, shapes.head_dim))
            start = time.perf_counter()
            for index in range(steps):
                x, caches = step(caches, x, jnp.full(shapes.slots, filled + index, jnp.int32))
            jax.block_until_ready((x, caches))
            if number >= len(ways):  # the first turns compile
                seconds[name].append((time.perf_counter() - start) / steps)
            ways[name] = (step, caches)
        found = {f"{name}_ms": statistics.median(values) * 1000 for name, values in seconds.items()}
        for name in [*ways][1:]:
            ratios = [slow / fast for slow, fast in zip(seconds[name], seconds["rows"], strict=True)]
            found |= median_and_range(f"{name}_over_rows", ratios)
        document["filled"][filled] = found
    return document


if __name__ == "__main__":
    json.dump(measure(Shapes()), sys.stdout, indent=1)
    print()
