"""Every matrix of an architecture and the vectors beside them: what parameters and products are both counted from.

`model.init` makes exactly these; the tests hold the two together.
"""

from typing import NamedTuple

from model.config import ModelConfig
from model.layout import LayerKind


class Matrix(NamedTuple):
    """Of a token's product [rows] @ [rows, columns]. bias: a vector of `columns` comes with it.

    part: the group in which it counts. path: of its module, in a layer or in the model. stored: how many alike there
    are; 0: the product is with a table that is counted elsewhere. used: how many of them a token is multiplied with.
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
        """Parameters of one."""
        return self.rows * self.columns + self.bias * self.columns

    @property
    def flops(self) -> int:
        """Of a token's product with those of them that it is multiplied with."""
        return 2 * self.used * self.rows * self.columns


def embedding_tables(config: ModelConfig) -> dict[str, int]:
    """Parameters of each table."""
    learned = config.max_seq_len if config.position == "learned" else 0
    rows = {"tokens": config.vocab_size, "positions": learned, "types": config.num_token_types}
    return {name: count * config.d_model for name, count in rows.items()}


def norm_size(config: ModelConfig) -> int:
    """Parameters of a norm of the residual stream."""
    return config.d_model * (2 if config.norm == "layernorm" and config.norm_bias else 1)


def layer_matrices(config: ModelConfig, kind: LayerKind) -> list[Matrix]:
    """All of one layer, in the order of computation."""
    attention = _attention(config, "attention") if config.latent is None else _latent_attention(config)
    cross = _attention(config, "cross_attention") if kind.cross else []
    return (
        attention + cross + (_experts(config) if kind.experts else _feed_forward(config, "feed_forward", config.d_ff))
    )


def layer_vectors(config: ModelConfig, kind: LayerKind) -> dict[str, int]:
    """Parameters of one layer that stand in no matrix and are no matrix's bias, by part."""
    of_heads = 2 * config.head_dim if config.qk_norm else 0
    if config.latent is not None:
        of_heads = config.latent.kv_rank + (config.latent.q_rank or 0)
    elif config.attention_sinks:
        of_heads += config.num_heads
    norms = (3 if kind.cross else 2) * (2 if config.norm_placement == "sandwich" else 1)
    selection = config.experts.count if kind.experts and config.experts and config.experts.selection_bias else 0
    return {"attention": of_heads, "router": selection, "norms": norms * norm_size(config)}


def head_matrices(config: ModelConfig) -> list[Matrix]:
    """What follows the last layer. Only a classifier reads the pooler; a tied head is stored as the token table."""
    width, makes_tokens = config.d_model, config.head in ("language-model", "masked-language-model")
    matrices = (
        [Matrix("pooler", ("pooler",), width, width, True, used=int(config.head == "classifier"))]
        if config.pooler
        else []
    )
    if config.head == "masked-language-model":
        matrices.append(Matrix("head", ("head", "transform"), width, width, True))
    if config.head != "none":
        stored = 0 if makes_tokens and config.tie_embeddings else 1
        matrices.append(Matrix("head", ("head",), width, _outputs(config), stored=stored))
    return matrices


def head_vectors(config: ModelConfig) -> int:
    """Parameters of the head that stand in no matrix: its own bias, and the norm of a masked-language-model."""
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
    """Over whole rows: every head's keys and values are made from the latent vector."""
    latent, width, heads = config.latent, config.d_model, config.num_heads
    assert latent is not None
    matrix = lambda name, *sizes: Matrix("attention", ("attention", name), *sizes)
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
    """below: the names of modules between the layer's feed-forward and the matrices."""
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
