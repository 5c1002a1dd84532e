"""The shapes of every matrix and vector of an architecture, from which parameters and products are counted.

They are those of `model.init`, as the tests check.
"""

from typing import NamedTuple

from model.config import ModelConfig
from model.layout import LayerKind


class Matrix(NamedTuple):
    """A matrix [rows, columns], or several of the same shape, by which a token [rows] is multiplied.

    part: the group of parameters that the matrix is counted in. path: of its module, within a layer or the model. bias:
    a vector of `columns` is added. stored: the number of such matrices; 0 for a tied head, which is counted as the
    token table. used: the number that one token is multiplied by: top_k of a mixture's experts.
    """

    part: str
    path: tuple[str, ...]
    rows: int
    columns: int
    bias: bool = False
    stored: int = 1
    used: int = 1

    @property
    def size(self) -> int:
        """Parameters of one such matrix with its bias."""
        return self.rows * self.columns + self.bias * self.columns

    @property
    def flops(self) -> int:
        """FLOPs of a token's products with the matrices that are used."""
        return 2 * self.used * self.rows * self.columns


def embedding_tables(config: ModelConfig) -> dict[str, int]:
    """Return the parameters of each table: "tokens", "positions", "types"."""
    learned = config.max_seq_len if config.position == "learned" else 0
    rows = {"tokens": config.vocab_size, "positions": learned, "types": config.num_token_types}
    return {name: count * config.d_model for name, count in rows.items()}


def norm_size(config: ModelConfig) -> int:
    """Return the parameters of one norm of the residual stream."""
    return config.d_model * (2 if config.norm == "layernorm" and config.norm_bias else 1)


def layer_matrices(config: ModelConfig, kind: LayerKind) -> list[Matrix]:
    """Return the matrices of one layer in the order of computation."""
    attention = _attention(config, "attention") if config.latent is None else _latent_attention(config)
    cross = _attention(config, "cross_attention") if kind.cross else []
    feed_forward = _experts(config) if kind.experts else _feed_forward(config, "feed_forward", config.d_ff)
    return attention + cross + feed_forward


def layer_vectors(config: ModelConfig, kind: LayerKind) -> dict[str, int]:
    """Return the parameters of one layer outside its matrices and their biases, by part."""
    of_heads = 2 * config.head_dim if config.qk_norm else 0
    if config.latent is not None:
        of_heads = config.latent.kv_rank + (config.latent.q_rank or 0)
    elif config.attention_sinks:
        of_heads += config.num_heads
    norms = (3 if kind.cross else 2) * (2 if config.norm_placement == "sandwich" else 1)
    selection = config.experts.count if kind.experts and config.experts and config.experts.selection_bias else 0
    return {"attention": of_heads, "router": selection, "norms": norms * norm_size(config)}


def head_matrices(config: ModelConfig) -> list[Matrix]:
    """Return the matrices after the last layer. Only a classifier uses the pooler; a tied head is the token table."""
    width, makes_tokens = config.d_model, config.head in ("language-model", "masked-language-model")
    matrices = []
    if config.pooler:
        matrices.append(Matrix("pooler", ("pooler",), width, width, True, used=int(config.head == "classifier")))
    if config.head == "masked-language-model":
        matrices.append(Matrix("head", ("head", "transform"), width, width, True))
    if config.head != "none":
        stored = 0 if makes_tokens and config.tie_embeddings else 1
        matrices.append(Matrix("head", ("head",), width, _outputs(config), stored=stored))
    return matrices


def head_vectors(config: ModelConfig) -> int:
    """Return the parameters of the head outside its matrices: its bias, and the norm of a masked-language-model."""
    bias = _outputs(config) if config.head_bias and config.head != "none" else 0
    return bias + (norm_size(config) if config.head == "masked-language-model" else 0)


def _outputs(config: ModelConfig) -> int:
    return {"classifier": config.num_labels, "scalar": 1}.get(config.head, config.vocab_size)


def _attention(config: ModelConfig, part: str) -> list[Matrix]:
    width, heads, kv_heads = config.d_model, config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    columns = {"query": heads, "key": kv_heads, "value": kv_heads}
    into = [Matrix(part, (part, name), width, count, config.attention_bias) for name, count in columns.items()]
    return [*into, Matrix(part, (part, "output"), heads, width, config.attention_output_bias)]


def _latent_attention(config: ModelConfig) -> list[Matrix]:
    """Return the matrices as used over whole rows, where keys and values of every head are computed from the latent."""
    latent, width, heads = config.latent, config.d_model, config.num_heads
    assert latent is not None

    def matrix(name: str, rows: int, columns: int, bias: bool = False) -> Matrix:
        return Matrix("attention", ("attention", name), rows, columns, bias)

    query = [matrix("query", width, heads * config.head_dim)]
    if latent.q_rank is not None:
        query = [
            matrix("query_down", width, latent.q_rank, config.attention_bias),
            matrix("query_up", latent.q_rank, heads * config.head_dim),
        ]
    return [
        *query,
        matrix("key_value_down", width, latent.kv_rank + latent.rope_dim, config.attention_bias),
        matrix("key_value_up", latent.kv_rank, heads * (latent.nope_dim + latent.v_dim)),
        matrix("output", heads * latent.v_dim, width, config.attention_output_bias),
    ]


def _feed_forward(config: ModelConfig, part: str, d_ff: int, *below: str) -> list[Matrix]:
    """Return the matrices of a feed-forward; below: names of modules between the layer's feed-forward and them."""
    path = ("feed_forward", *below)
    names = ("up", "gate") if config.gated else ("up",)
    into = [Matrix(part, (*path, name), config.d_model, d_ff, config.use_bias) for name in names]
    return [*into, Matrix(part, (*path, "down"), d_ff, config.d_model, config.use_bias)]


def _experts(config: ModelConfig) -> list[Matrix]:
    experts = config.experts
    assert experts is not None
    routed = _feed_forward(config, "experts", experts.d_ff, "experts")
    matrices = [Matrix("router", ("feed_forward", "router"), config.d_model, experts.count)]
    matrices += [m._replace(bias=False, stored=experts.count, used=experts.top_k) for m in routed]
    if experts.shared_d_ff:
        matrices += _feed_forward(config, "shared expert", experts.shared_d_ff, "shared")
        if experts.shared_gate:
            matrices.append(Matrix("shared expert", ("feed_forward", "shared_gate"), config.d_model, 1))
    return matrices
