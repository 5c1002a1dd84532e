"""The whole model: tokens → embeddings → stacks of layers → logits. All functions are pure."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int, PRNGKeyArray

from model.ambient import lenient
from model.block import Block
from model.cache import KVCache
from model.config import ModelConfig
from model.context import packed_after_cache, whole_rows, with_cache
from model.dropout import Dropout
from model.embedding import Embedding
from model.errors import InputError
from model.execution import Execution
from model.heads import Pooling, classify, head, init_head, pool
from model.layout import layer_kinds
from model.norm import Normalize
from model.stack import Params, auxiliary_of, init_stack, layer_trees, run_layers
from model.taps import TAPS, Edits, Taps, WholeEdits, check_edits, edit_embedded, edits_of, tap_shapes

OUTPUTS = ("final_hidden", *TAPS)


@struct.dataclass
class Output:
    """The results of a pass; a field that was not requested is None.

    logits: see `model.heads.head`. hidden, attention, heads, attention_output, feed_forward_output: activations of the
    main stack after their edits, see `model.taps.TAPS`. auxiliary: for a mixture of experts {"balance_loss",
    "router_z_loss", "dropped": means over layers, "expert_use": [expert layers, experts]}, otherwise empty.
    """

    logits: Array | None
    final_hidden: Float[Array, "batch seq d_model"] | None
    hidden: Float[Array, "layers_and_one batch seq d_model"] | None
    attention: Float[Array, "layers batch heads seq seq"] | None
    auxiliary: dict[str, Array]
    heads: Float[Array, "layers batch seq heads value_dim"] | None = None
    attention_output: Float[Array, "layers batch seq d_model"] | None = None
    feed_forward_output: Float[Array, "layers batch seq d_model"] | None = None


@functools.partial(jax.jit, static_argnums=0)
@lenient()
def init(config: ModelConfig, key: PRNGKeyArray) -> Params:
    """Initialise float32 parameters; `jax.eval_shape(partial(init, config), key)` returns their shapes alone."""
    keys = jax.random.split(key, 4)
    tokens = jnp.zeros((1, 1), jnp.int32)
    params = {"embedding": Embedding(config).init(keys[0], tokens, tokens)["params"]}
    if config.stack == "encoder-decoder":
        params["encoder"] = init_stack(config, keys[1], encoder=True)
    return params | init_stack(config, keys[2], encoder=False) | init_head(config, keys[3])


def apply(config: ModelConfig, params: Params, tokens: Int[Array, "batch seq"], **inputs: Any) -> Array:
    """Return float32 logits, of a language model [batch, seq, vocab], of others see `model.heads.head`.

    inputs: those of `forward`.
    """
    return forward(config, params, tokens, **inputs).logits  # type: ignore[return-value]


@lenient()
def forward(
    config: ModelConfig,
    params: Params,
    tokens: Int[Array, "batch seq"],
    *,
    positions: Int[Array, "batch seq"] | None = None,
    segment_ids: Int[Array, "batch seq"] | None = None,
    token_types: Int[Array, "batch seq"] | None = None,
    encoder_tokens: Int[Array, "batch source"] | None = None,
    encoder_segment_ids: Int[Array, "batch source"] | None = None,
    dropout_rate: Float[Array, ""] | float | None = None,
    dropout_key: PRNGKeyArray | None = None,
    outputs: Sequence[str] = (),
    edits: Edits | None = None,
    execution: Execution = Execution(),
) -> Output:
    """Run the model over whole rows, causal or, for an encoder, bidirectional.

    positions: default 0, 1, … within each segment. segment_ids: tokens attend within their own segment, and to the
    encoder's segment of the same id; 0 is padding. encoder_tokens: the input of an encoder-decoder's encoder; `tokens`
    is the decoder's. dropout_key: None: no dropout. outputs: names in `model.taps.TAPS` of activations to return in
    addition to the logits; ("final_hidden",) alone skips the head, which `head` computes. edits: {name in TAPS: Edit},
    such as {"hidden": Edit.patch(value, where)}; later activations are computed from the edited ones. An edit of
    "attention" does not renormalise the weights. "attention" in outputs or edits uses XLA instead of a fused kernel.
    Raises InputError if a row is longer than `max_seq_len`, or if inputs and config do not fit.
    """
    _check_inputs(config, tokens, token_types, encoder_tokens, outputs)
    outputs = tuple(outputs)
    whole_edits = check_edits(edits, tap_shapes(config, *tokens.shape))
    taps = [name for name in TAPS if name in outputs]
    dropout = None
    if dropout_key is not None:
        dropout = Dropout(jnp.asarray(0.0 if dropout_rate is None else dropout_rate, jnp.float32), dropout_key)
    encoder = encoder_mask = None
    if encoder_tokens is not None:
        encoder_dropout = dropout and dropout.at(config.num_layers + 1)
        encoder = encode(config, params, encoder_tokens, encoder_segment_ids, encoder_dropout, execution=execution)
        encoder_mask = _source_mask(encoder_tokens, encoder_segment_ids, segment_ids)
    if positions is None:
        positions = _positions_within_segments(tokens, segment_ids)
    kinds = layer_kinds(config)
    contexts = whole_rows(config, params, kinds, positions, segment_ids, encoder, encoder_mask, execution)
    real = None if segment_ids is None else segment_ids > 0
    x = Embedding(config).apply({"params": params["embedding"]}, tokens, positions, token_types, real)
    if dropout is not None:
        x = dropout.at(config.num_layers)(x)
    x, tapped, reports = run_layers(config, params, kinds, x, contexts, dropout, taps, whole_edits, execution)
    final_hidden = _final_norm(config, params, x)
    logits = None
    if outputs != ("final_hidden",) and config.head != "none":
        if config.head == "classifier":
            logits = classify(config, params, final_hidden, segment_ids)
        else:
            logits = head(config, params, final_hidden)
    return Output(
        logits=logits,
        final_hidden=final_hidden if "final_hidden" in outputs else None,
        auxiliary=auxiliary_of(reports),
        **{name: tapped.get(name) for name in TAPS},
    )


@lenient()
def encode(
    config: ModelConfig,
    params: Params,
    tokens: Int[Array, "batch source"],
    segment_ids: Int[Array, "batch source"] | None = None,
    dropout: Dropout | None = None,
    *,
    execution: Execution = Execution(),
) -> Float[Array, "batch source d_model"]:
    """Return the output of an encoder-decoder's encoder, to which the decoder attends.

    segment_ids: 0 is padding. Raises InputError if a row is longer than `max_seq_len`, and for a model of one stack.
    """
    if config.stack != "encoder-decoder":
        raise InputError(f"encode needs stack='encoder-decoder'; this model is {config.stack!r}: use forward")
    _check_length(config, "encoder's sequence", tokens)
    stack, kinds = params["encoder"], layer_kinds(config, encoder=True)
    positions = _positions_within_segments(tokens, segment_ids)
    contexts = whole_rows(config, stack, kinds, positions, segment_ids, execution=execution)
    real = None if segment_ids is None else segment_ids > 0
    x = Embedding(config).apply({"params": params["embedding"]}, tokens, positions, real=real)
    if dropout is not None:
        x = dropout.at(len(kinds))(x)
    x, *_ = run_layers(config, stack, kinds, x, contexts, dropout, (), {}, execution)
    return _final_norm(config, stack, x)


@lenient()
def sentence_embedding(
    config: ModelConfig,
    params: Params,
    tokens: Int[Array, "batch seq"],
    segment_ids: Int[Array, "batch seq"] | None = None,
    pooling: Pooling = "mean",
    *,
    execution: Execution = Execution(),
) -> Float[Array, "batch d_model"]:
    """Return one vector of norm 1 per row (Reimers and Gurevych 2019).

    segment_ids: 0 is padding. pooling: see `model.heads.pool`.
    """
    out = forward(config, params, tokens, segment_ids=segment_ids, outputs=("final_hidden",), execution=execution)
    assert out.final_hidden is not None
    vectors = pool(config, params, out.final_hidden, segment_ids, pooling)
    return vectors / jnp.maximum(jnp.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


@lenient()
def forward_cached(
    config: ModelConfig,
    params: Params,
    tokens: Int[Array, "batch seq"],
    lengths: Int[Array, " batch"],
    cache: KVCache,
    encoder_tokens: Int[Array, "batch source"] | None = None,
    encoder_lengths: Int[Array, " batch"] | None = None,
    *,
    fresh: bool = False,
    every: bool = False,
    edits: Edits | None = None,
    execution: Execution = Execution(),
) -> tuple[Float[Array, "batch *seq d_model"], KVCache]:
    """Append a chunk to the cache; return the final hidden state of each row's last token, and the cache.

    tokens: right-padded. lengths: the number of real tokens in each row. encoder_tokens: encoded here; their keys and
    values stay in the cache for later chunks. fresh: the cache is known to be empty, so that it need not be read.
    every: return the final hidden states of all tokens, [batch, seq, d_model]. edits: as in `forward`, of this chunk's
    activations, but not of "attention". A row that would exceed the capacity is not written beyond it, and its hidden
    state is NaN.
    """
    shapes = tap_shapes(config, *tokens.shape)
    del shapes["attention"]  # its keys are slots of the cache
    whole_edits = check_edits(edits, shapes)
    real = jnp.arange(tokens.shape[1])[None] < lengths[:, None]
    encoder = encoder_mask = None
    sources = cache.encoder_lengths
    if encoder_tokens is not None:
        encoder, sources = _encode_for_cache(config, params, encoder_tokens, encoder_lengths, cache, execution)
    if sources is not None:
        encoder_mask = (jnp.arange(cache.encoder_capacity)[None] < sources[:, None])[:, None]
    kinds = layer_kinds(config)
    contexts = with_cache(config, params, kinds, cache, real, encoder, encoder_mask, fresh)
    positions = cache.lengths[:, None] + jnp.arange(tokens.shape[1])[None]
    x = Embedding(config).apply({"params": params["embedding"]}, tokens, positions, real=real)
    x, whole_edits = edit_embedded(x, whole_edits)
    x, layers = _run_cached_layers(config, params, kinds, x, contexts, cache, whole_edits)
    if not every:
        x = jnp.take_along_axis(x, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)[:, 0]
    end = cache.lengths + lengths
    full = (end > cache.capacity).reshape(-1, *(1,) * (x.ndim - 1))
    final_hidden = jnp.where(full, jnp.nan, _final_norm(config, params, x))
    cache = cache.replace(  # type: ignore[attr-defined]
        layers=layers, lengths=jnp.minimum(end, cache.capacity), encoder_lengths=sources
    )
    return final_hidden, cache


@lenient()
def forward_branches(
    config: ModelConfig,
    params: Params,
    tokens: Int[Array, "batch seq"],
    lengths: Int[Array, " batch"],
    cache: KVCache,
) -> Float[Array, "batch seq d_model"]:
    """Return the final hidden states of rows that branch from the rows of a cache, without writing to it.

    With n times as many rows as the cache, the rows r · n … r · n + n − 1 continue its row r, whose keys and values are
    not copied for them: 6 rows over a cache of 2 continue the cache's rows 0, 0, 0, 1, 1, 1. tokens: right-padded.
    lengths: the number of real tokens in each row. The capacity is no limit.
    """
    rows, seq = tokens.shape
    branches = rows // cache.lengths.shape[0]
    real = jnp.arange(seq)[None] < lengths[:, None]
    encoder_mask = None
    if cache.encoder_lengths is not None:
        sources = jnp.repeat(cache.encoder_lengths, branches)
        encoder_mask = (jnp.arange(cache.encoder_capacity)[None] < sources[:, None])[:, None]
    kinds = layer_kinds(config)
    contexts = with_cache(config, params, kinds, cache, real, encoder_mask=encoder_mask, branches=branches)
    positions = jnp.repeat(cache.lengths, branches)[:, None] + jnp.arange(seq)[None]
    x = Embedding(config).apply({"params": params["embedding"]}, tokens, positions, real=real)
    x, _ = _run_cached_layers(config, params, kinds, x, contexts, cache, {})
    return _final_norm(config, params, x)


@lenient()
def forward_packed(
    config: ModelConfig,
    params: Params,
    tokens: Int[Array, "batch seq"],
    positions: Int[Array, "batch seq"],
    trees: Int[Array, "batch seq"],
    branches: Int[Array, "batch seq"],
    cache: KVCache,
) -> Float[Array, "batch seq d_model"]:
    """Return the final hidden states of rows of packed trees that continue rows of a cache, without writing to it.

    A tree is a prefix, of branch 0, and branches that continue it: a token attends to the row of the cache, the prefix
    of its tree and its own branch. positions: in the text, the cache's tokens included. trees: 0 is padding. The rows
    belong to the rows of the cache as in `forward_branches`.
    """
    kinds = layer_kinds(config)
    contexts = packed_after_cache(config, params, kinds, cache, positions, trees, branches)
    x = Embedding(config).apply({"params": params["embedding"]}, tokens, positions, real=trees > 0)
    x, _ = _run_cached_layers(config, params, kinds, x, contexts, cache, {})
    return _final_norm(config, params, x)


def _run_cached_layers(config, params, kinds, x, contexts, cache: KVCache, edits: WholeEdits):
    """Return the residual stream after all layers, and their caches."""
    layers = []
    trees = layer_trees(params["layers"], kinds)
    for index, (kind, tree, layer) in enumerate(zip(kinds, trees, cache.layers, strict=True)):
        taps = Taps((), edits_of(edits, index))
        x, layer, _ = Block(config, kind).apply({"params": tree}, x, contexts[kind.name], layer, taps=taps)
        x = taps("hidden", x)
        layers.append(layer)
    return x, tuple(layers)


def _final_norm(config: ModelConfig, stack: Params, x: Array) -> Array:
    return Normalize(config).apply({"params": stack["final_norm"]}, x) if config.final_norm else x


def _encode_for_cache(config, params, encoder_tokens, encoder_lengths, cache, execution):
    source = encoder_tokens.shape[1]
    if source > cache.encoder_capacity:
        raise InputError(
            f"{source} encoder tokens do not fit the cache's encoder_capacity={cache.encoder_capacity}; "
            "give init_cache a larger one"
        )
    if encoder_lengths is None:
        encoder_lengths = jnp.full(encoder_tokens.shape[0], source, jnp.int32)
    segment_ids = (jnp.arange(source)[None] < encoder_lengths[:, None]).astype(jnp.int32)
    return encode(config, params, encoder_tokens, segment_ids, execution=execution), encoder_lengths


def _source_mask(encoder_tokens: Array, encoder_segment_ids: Array | None, segment_ids: Array | None):
    """Return which encoder tokens each decoder token sees: those of its own segment, without padding."""
    if encoder_segment_ids is None:
        return jnp.ones((encoder_tokens.shape[0], 1, encoder_tokens.shape[1]), bool)
    mask = (encoder_segment_ids > 0)[:, None, :]
    return mask if segment_ids is None else mask & (segment_ids[:, :, None] == encoder_segment_ids[:, None, :])


def _check_inputs(config, tokens, token_types, encoder_tokens, outputs) -> None:
    _check_length(config, "sequence", tokens)
    if (encoder_tokens is not None) != (config.stack == "encoder-decoder"):
        need = "needs" if encoder_tokens is None else "takes no"
        raise InputError(f"a model with stack={config.stack!r} {need} encoder_tokens")
    if token_types is not None and not config.num_token_types:
        raise InputError("token_types were given to a model with num_token_types=0")
    if isinstance(outputs, str):
        raise InputError(f"outputs={outputs!r} is a string; give a tuple of names, such as ({outputs!r},)")
    unknown = set(outputs) - set(OUTPUTS)
    if unknown:
        raise InputError(f"outputs has {sorted(unknown)}; it takes {', '.join(map(repr, OUTPUTS))}")


def _check_length(config: ModelConfig, name: str, tokens: Array) -> None:
    if tokens.shape[1] > config.max_seq_len:
        raise InputError(
            f"the {name} of {tokens.shape[1]} tokens is longer than the context, max_seq_len={config.max_seq_len}"
        )


def _positions_within_segments(tokens: Array, segment_ids: Array | None) -> Array:
    """Return positions, [1, seq] without segments, otherwise [batch, seq].

    The segments [1, 1, 1, 2, 2, 0] have the positions [0, 1, 2, 0, 1, 0].
    """
    if segment_ids is None:
        return jnp.arange(tokens.shape[1])[None]
    index = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    starts = jnp.diff(segment_ids, axis=1, prepend=segment_ids[:, :1] - 1) != 0
    return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)
