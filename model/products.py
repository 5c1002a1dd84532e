"""Every matrix product of a pass in order of computation, and of its gradient those that what is trained needs.

Of y = x @ W a gradient takes up to two products as large: that of x where something trained lies below, that of W where
W is trained. Nothing is traced and no array made.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple, Self

from model import matrices
from model.config import ModelConfig
from model.layout import LayerKind, layer_kinds

Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Trained:
    """Which parameters are trained: those below prefixes of their paths, or low-rank factors beside matrices.

    prefixes: such as "layers/dense/attention"; ("",): all parameters. rank, targets: of low-rank factors, and the names
    of the matrices that have them (`model.adapters`).
    """

    prefixes: tuple[str, ...] = ("",)
    rank: int = 0
    targets: tuple[str, ...] = ()

    @classmethod
    def factors(cls, rank: int, targets: tuple[str, ...]) -> Self:
        """Return a selection of low-rank factors alone."""
        return cls((), rank, targets)

    def touches(self, path: Path) -> bool:
        """Return whether a parameter at or below the path is trained."""
        for prefix in self.prefixes:
            names = tuple(prefix.split("/")) if prefix else ()
            if names[: len(path)] == path or path[: len(names)] == names:
                return True
        return False


ALL = Trained()


class Flops(NamedTuple):
    """FLOPs per token by product: of the forward pass, and of the gradient of what is trained."""

    forward: Mapping[str, float]
    backward: Mapping[str, float]


@functools.lru_cache(maxsize=4096)
def flops_by_product(config: ModelConfig, seq_len: int, source_len: int | None = None, trained: Trained = ALL) -> Flops:
    """Return the FLOPs per token of a row of `seq_len` tokens, whose encoder reads `source_len` (None: as many).

    The forward pass is that of `accounting.forward_flops_by_product`; low-rank factors stand under "adapters".
    Gradients are those of layers that are run one after the other: a scan over layers also computes the inputs'
    gradients of the first one where nothing below it is trained, and products joined side by side the gradient of all
    their matrices where one is trained.
    """
    source_len = seq_len if source_len is None else source_len
    total = _Count(trained)
    touches = trained.touches
    embedded, encoded = touches(("embedding",)), False
    if config.stack == "encoder-decoder":
        encoder = _Count(trained)
        encoded = _run_stack(encoder, config, embedded, False, True, source_len, source_len)
        total.add(encoder, source_len / seq_len, "encoder ")
    x = _run_stack(total, config, embedded, encoded, False, seq_len, source_len)
    share = 1 / seq_len if config.head == "classifier" else 1.0
    for matrix in matrices.head_matrices(config):
        tied = matrix.part == "head" and not matrix.stored
        x = total.multiply(matrix, ("embedding", "tokens") if tied else matrix.path, "head", x, share)
        if matrix.path == ("head", "transform"):
            x = x or touches(("head", "norm"))
    return Flops(dict(total.forward), dict(total.backward))


class _Count:
    """FLOPs by product, as they come."""

    def __init__(self, trained: Trained):
        self.trained = trained
        self.forward: dict[str, float] = collections.defaultdict(float)
        self.backward: dict[str, float] = collections.defaultdict(float)

    def add(self, other: "_Count", times: float, prefix: str = "") -> None:
        """Take over another count."""
        for mine, theirs in ((self.forward, other.forward), (self.backward, other.backward)):
            for name, flops in theirs.items():
                mine[prefix + name] += times * flops

    def put(self, name: str, flops: float, *needed: bool) -> None:
        """Count a product; needed: whether the gradient of each of its two inputs is."""
        self.forward[name] += flops
        self.backward[name] += flops * sum(needed)

    def multiply(self, matrix: matrices.Matrix, path: Path, name: str, x: bool, share: float = 1.0) -> bool:
        """Count x @ matrix with its low-rank factors; return whether what comes out depends on something trained.

        path: of the matrix's module. x: whether x depends on something trained. share: tokens that are multiplied, over
        those of the row.
        """
        self.put(name, share * matrix.flops, x, self.trained.touches((*path, "weight")))
        if ("experts" if matrix.part == "experts" else path[-1]) in self.trained.targets:
            once = 2 * share * matrix.used * self.trained.rank
            self.put("adapters", once * matrix.rows, x, True)
            self.put("adapters", once * matrix.columns, True, True)
            return True
        return x or (matrix.used > 0 and self.trained.touches(path))


def _run_stack(
    count: _Count, config: ModelConfig, x: bool, encoded: bool, encoder: bool, seq_len: int, source_len: int
) -> bool:
    """Count one stack; return whether its output depends on something trained, where its inputs do so (x, encoded)."""
    stack: Path = ("encoder",) if encoder else ()
    seen: dict[tuple[LayerKind, bool], tuple[_Count, bool]] = {}
    repeats: collections.Counter[tuple[LayerKind, bool]] = collections.Counter()
    for kind in layer_kinds(config, encoder):
        which = (kind, x)
        if which not in seen:
            layer = _Layer(config, kind, stack, count.trained, seq_len, source_len)
            seen[which] = (layer.count, layer.run(x, encoded))
        repeats[which] += 1
        x = seen[which][1]
    for which, times in repeats.items():
        count.add(seen[which][0], times)
    return x or (config.final_norm and count.trained.touches((*stack, "final_norm")))


class _Layer:
    """One layer, as `model.block` computes it."""

    def __init__(
        self, config: ModelConfig, kind: LayerKind, stack: Path, trained: Trained, seq_len: int, source_len: int
    ):
        self.config, self.kind, self.stack = config, kind, stack
        self.path: Path = (*stack, "layers", kind.name)
        self.count, self.seq_len, self.source_len = _Count(trained), seq_len, source_len
        self.matrices = matrices.layer_matrices(config, kind)

    def run(self, x: bool, encoded: bool) -> bool:
        """Return whether the residual stream depends on something trained after the layer, where it does before (x)."""
        x = self._branch("attention", x, lambda x: self._attention("attention", x, x))
        if self.kind.cross:
            x = self._branch("cross_attention", x, lambda x: self._attention("cross_attention", x, encoded))
        return self._branch("feed_forward", x, self._feed_forward)

    def _touches(self, *names: str) -> bool:
        return self.count.trained.touches((*self.path, *names))

    def _branch(self, name: str, x: bool, branch: Callable[[bool], bool]) -> bool:
        norm, placement = self._touches(f"{name}_norm"), self.config.norm_placement
        y = branch(x or (placement != "post" and norm))
        y = y or (placement == "sandwich" and self._touches(f"{name}_post_norm"))
        return x or y or (placement == "post" and norm)

    def _multiply(self, matrix: matrices.Matrix, name: str, x: bool, share: float = 1.0) -> bool:
        return self.count.multiply(matrix, (*self.path, *matrix.path), name, x, share)

    def _attention(self, part: str, x: bool, source: bool) -> bool:
        """source: whether what keys and values are made of depends on something trained."""
        config, own = self.config, part == "attention"
        name, keys = part.replace("_", "-"), self.seq_len if own else self.source_len
        value_dim = config.head_dim if config.latent is None else config.latent.v_dim
        made = {matrix.path[-1]: matrix for matrix in self.matrices if matrix.path[0] == part}
        multiply = lambda which, x, share=1.0: self._multiply(made[which], f"{name} projections", x, share)
        if config.latent is not None and own:
            if "query" in made:
                query = multiply("query", x)
            else:
                query = multiply("query_up", multiply("query_down", x) or self._touches(part, "query_norm"))
            down = multiply("key_value_down", x)
            value = multiply("key_value_up", down or self._touches(part, "key_value_norm"))
            key = value or down
        else:
            query = multiply("query", x)
            key, value = (multiply(which, source, keys / self.seq_len) for which in ("key", "value"))
            if own and config.qk_norm:
                query = query or self._touches(part, "query_norm")
                key = key or self._touches(part, "key_norm")
        self.count.put(f"{name} scores", 2 * keys * config.num_heads * config.head_dim, key, query)
        known = ("query", "key", "value", "query_down", "query_up", "key_value_down", "key_value_up", "output")
        others = [multiply(which, x) for which in made if which not in known]  # what else is made of the layer's input
        weights = query or key
        if own and config.attention_sinks and config.latent is None:
            weights = weights or self._touches(part, "sinks")
        if own and config.position == "relative":
            weights = weights or self.count.trained.touches((*self.stack, "relative_bias"))
        self.count.put(f"{name} mix", 2 * keys * config.num_heads * value_dim, value, weights)
        return multiply("output", weights or value or any(others))

    def _feed_forward(self, x: bool) -> bool:
        made = {matrix.path[1:]: matrix for matrix in self.matrices if matrix.path[0] == "feed_forward"}
        multiply = lambda path, x: self._multiply(made[path], made[path].part.replace("_", "-"), x)

        def through(*into: str) -> bool:
            hidden = [multiply((*into, name), x) for name in ("up", "gate") if (*into, name) in made]
            return multiply((*into, "down"), any(hidden))

        if not self.kind.experts:
            return through()
        assert self.config.experts is not None
        routed = x or self._touches("feed_forward", "router", "weight")
        self._multiply(made["router",], "router", x)
        y = through("experts") or routed
        if ("shared", "up") in made:
            y = through("shared") or y
        if ("shared_gate",) in made:
            y = multiply(("shared_gate",), x) or y
        return y
