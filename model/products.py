"""FLOPs of every matrix product of a forward pass, and of the products of its gradient that training needs.

The gradient of y = x @ W takes up to two products of the size of the forward one: dx = dy @ Wᵀ where x depends on a
trained parameter, dW = xᵀ @ dy where W is trained. The functions below go through the model in the order of computation
with a flag, `NeedsGrad`, in place of each activation; no array is made and nothing is traced.

Example: y = (x @ A) @ B with x from frozen tables and matrices [1000, 1000], so that each product is 2 MFLOP per token.

    trained     gradients         backward
    A and B     dA, d(x @ A), dB  6 MFLOP
    A           dA, d(x @ A)      4 MFLOP
    B           dB                2 MFLOP
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
NeedsGrad = bool
"""In place of an activation: True if it depends on a trained parameter, so that its gradient is computed."""


@dataclasses.dataclass(frozen=True)
class Trained:
    """The trained parameters: those whose path has one of the prefixes, or low-rank factors next to frozen matrices.

    prefixes: such as "layers/dense/attention"; ("",): all parameters. rank: of the low-rank factors. targets: the names
    of the matrices that have such factors (`model.adapters`).
    """

    prefixes: tuple[str, ...] = ("",)
    rank: int = 0
    targets: tuple[str, ...] = ()

    @classmethod
    def factors(cls, rank: int, targets: tuple[str, ...]) -> Self:
        """Return the low-rank factors alone as trained."""
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
    """FLOPs per token by product, of the forward pass and of the backward pass."""

    forward: Mapping[str, float]
    backward: Mapping[str, float]


@functools.lru_cache(maxsize=4096)
def flops_by_product(config: ModelConfig, seq_len: int, source_len: int | None = None, trained: Trained = ALL) -> Flops:
    """Count the FLOPs per token of a row of `seq_len` tokens, whose encoder reads `source_len` (None: as many).

    The forward pass is that of `accounting.forward_flops_by_product`; products with low-rank factors are "adapters".
    The backward pass is that of unrolled layers and separate products: a scan over layers also computes the input
    gradient of the first layer where nothing below it is trained, and joined projections the gradient of all their
    matrices where one is trained.
    """
    source_len = seq_len if source_len is None else source_len
    total = _Counter(trained)
    embedded, encoded = trained.touches(("embedding",)), False
    if config.stack == "encoder-decoder":
        encoder = _Counter(trained)
        encoded = _count_stack(encoder, config, embedded, False, True, source_len, source_len)
        total.add(encoder, source_len / seq_len, "encoder ")
    x = _count_stack(total, config, embedded, encoded, False, seq_len, source_len)
    share = 1 / seq_len if config.head == "classifier" else 1.0
    for matrix in matrices.head_matrices(config):
        is_token_table = matrix.part == "head" and not matrix.stored
        path = ("embedding", "tokens") if is_token_table else matrix.path
        x = total.multiply(matrix, path, "head", x, share)
        if matrix.path == ("head", "transform"):
            x = x or trained.touches(("head", "norm"))
    return Flops(dict(total.forward), dict(total.backward))


class _Counter:
    """FLOPs by product, summed up."""

    def __init__(self, trained: Trained):
        self.trained = trained
        self.forward: dict[str, float] = collections.defaultdict(float)
        self.backward: dict[str, float] = collections.defaultdict(float)

    def add(self, other: "_Counter", times: float, prefix: str = "") -> None:
        """Add the counts of another one, `times` each, with a prefix before their names."""
        for mine, theirs in ((self.forward, other.forward), (self.backward, other.backward)):
            for name, flops in theirs.items():
                mine[prefix + name] += times * flops

    def add_product(self, name: str, flops: float, left: NeedsGrad, right: NeedsGrad) -> None:
        """Count left @ right, and a product of the same size for each side that needs a gradient."""
        self.forward[name] += flops
        self.backward[name] += flops * (left + right)

    def multiply(self, matrix: matrices.Matrix, path: Path, name: str, x: NeedsGrad, share: float = 1.0) -> NeedsGrad:
        """Count y = x @ matrix with its low-rank factors, if any; return y.

        path: of the matrix's module. share: the number of tokens that are multiplied over that of the row's tokens.

        For a matrix [d_in, d_out] the factors are [d_in, rank] and [rank, d_out]. Both are trained, and what lies
        between them depends on the first.
        """
        self.add_product(name, share * matrix.flops, x, self.trained.touches((*path, "weight")))
        target = "experts" if matrix.part == "experts" else path[-1]
        if target in self.trained.targets:
            flops_per_side = 2 * share * matrix.used * self.trained.rank
            self.add_product("adapters", flops_per_side * matrix.rows, x, True)
            self.add_product("adapters", flops_per_side * matrix.columns, True, True)
            return True
        return x or (matrix.used > 0 and self.trained.touches(path))


def _count_stack(
    counter: _Counter,
    config: ModelConfig,
    x: NeedsGrad,
    encoded: NeedsGrad,
    encoder: bool,
    seq_len: int,
    source_len: int,
) -> NeedsGrad:
    """Count one stack; return its output. encoded: the encoder's output.

    Layers of the same kind with the same input flag have the same products: each combination is counted once and added
    as often as it occurs.
    """
    stack: Path = ("encoder",) if encoder else ()
    counted: dict[tuple[LayerKind, NeedsGrad], tuple[_Counter, NeedsGrad]] = {}
    repeats: collections.Counter[tuple[LayerKind, NeedsGrad]] = collections.Counter()
    for kind in layer_kinds(config, encoder):
        key = (kind, x)
        if key not in counted:
            layer = _Layer(config, kind, stack, counter.trained, seq_len, source_len)
            counted[key] = (layer.counter, layer.run(x, encoded))
        repeats[key] += 1
        x = counted[key][1]
    for key, times in repeats.items():
        counter.add(counted[key][0], times)
    return x or (config.final_norm and counter.trained.touches((*stack, "final_norm")))


class _Layer:
    """The products of one layer, in the order in which `model.block` computes them."""

    def __init__(
        self, config: ModelConfig, kind: LayerKind, stack: Path, trained: Trained, seq_len: int, source_len: int
    ):
        self.config, self.kind, self.stack = config, kind, stack
        self.path: Path = (*stack, "layers", kind.name)
        self.counter, self.seq_len, self.source_len = _Counter(trained), seq_len, source_len
        self.matrices = matrices.layer_matrices(config, kind)

    def run(self, x: NeedsGrad, encoded: NeedsGrad) -> NeedsGrad:
        """Count the layer; return the residual stream after it. encoded: the encoder's output."""
        x = self._branch("attention", x, lambda x: self._attention("attention", x, x))
        if self.kind.cross:
            x = self._branch("cross_attention", x, lambda x: self._attention("cross_attention", x, encoded))
        return self._branch("feed_forward", x, self._feed_forward)

    def _touches(self, *names: str) -> bool:
        return self.counter.trained.touches((*self.path, *names))

    def _branch(self, name: str, x: NeedsGrad, branch: Callable[[NeedsGrad], NeedsGrad]) -> NeedsGrad:
        norm, placement = self._touches(f"{name}_norm"), self.config.norm_placement
        y = branch(x or (placement != "post" and norm))
        y = y or (placement == "sandwich" and self._touches(f"{name}_post_norm"))
        return x or y or (placement == "post" and norm)

    def _multiply(self, matrix: matrices.Matrix, name: str, x: NeedsGrad, share: float = 1.0) -> NeedsGrad:
        return self.counter.multiply(matrix, (*self.path, *matrix.path), name, x, share)

    def _attention(self, part: str, x: NeedsGrad, source: NeedsGrad) -> NeedsGrad:
        """Count "attention" or "cross_attention"; return its output. source: the input of keys and values."""
        config, own = self.config, part == "attention"
        name, num_keys = part.replace("_", "-"), self.seq_len if own else self.source_len
        value_dim = config.head_dim if config.latent is None else config.latent.v_dim
        by_name = {matrix.path[-1]: matrix for matrix in self.matrices if matrix.path[0] == part}

        def multiply(matrix: str, x: NeedsGrad, share: float = 1.0) -> NeedsGrad:
            return self._multiply(by_name[matrix], f"{name} projections", x, share)

        if config.latent is not None and own:
            if "query" in by_name:
                query = multiply("query", x)
            else:
                query = multiply("query_up", multiply("query_down", x) or self._touches(part, "query_norm"))
            down = multiply("key_value_down", x)
            value = multiply("key_value_up", down or self._touches(part, "key_value_norm"))
            key = value or down
        else:
            query = multiply("query", x)
            key, value = (multiply(matrix, source, num_keys / self.seq_len) for matrix in ("key", "value"))
            if own and config.qk_norm:
                query = query or self._touches(part, "query_norm")
                key = key or self._touches(part, "key_norm")
        self.counter.add_product(f"{name} scores", 2 * num_keys * config.num_heads * config.head_dim, query, key)
        known = ("query", "key", "value", "query_down", "query_up", "key_value_down", "key_value_up", "output")
        others = [multiply(matrix, x) for matrix in by_name if matrix not in known]  # further products with the input
        weights = query or key
        if own and config.attention_sinks and config.latent is None:
            weights = weights or self._touches(part, "sinks")
        if own and config.position == "relative":
            weights = weights or self.counter.trained.touches((*self.stack, "relative_bias"))
        self.counter.add_product(f"{name} mix", 2 * num_keys * config.num_heads * value_dim, weights, value)
        return multiply("output", weights or value or any(others))

    def _feed_forward(self, x: NeedsGrad) -> NeedsGrad:
        by_path = {matrix.path[1:]: matrix for matrix in self.matrices if matrix.path[0] == "feed_forward"}

        def multiply(path: Path, x: NeedsGrad) -> NeedsGrad:
            return self._multiply(by_path[path], by_path[path].part.replace("_", "-"), x)

        def through(*module: str) -> NeedsGrad:
            hidden = [multiply((*module, name), x) for name in ("up", "gate") if (*module, name) in by_path]
            return multiply((*module, "down"), any(hidden))

        if not self.kind.experts:
            return through()
        assert self.config.experts is not None
        routed = x or self._touches("feed_forward", "router", "weight")
        self._multiply(by_path["router",], "router", x)
        y = through("experts") or routed
        if ("shared", "up") in by_path:
            y = through("shared") or y
        if ("shared_gate",) in by_path:
            y = multiply(("shared_gate",), x) or y
        return y
