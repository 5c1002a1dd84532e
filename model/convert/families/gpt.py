"""OpenAI's GPT (post-norm) and GPT-2 (pre-norm)."""

from model.convert.entries import Activation, Constant, EndTokens, Field, OneOf, WriteOnly, decoder_heads
from model.convert.family import Family
from model.convert.rules import DECODER_HEADS, conv, norm, table, within

_SHAPE = (
    Field("d_model", "n_embd", 768, "hidden_size"),
    Field("num_layers", "n_layer", 12, "num_hidden_layers"),
    Field("num_heads", "n_head", 12, "num_attention_heads"),
    Field("norm_epsilon", "layer_norm_epsilon", 1e-5),
    Field("tie_embeddings", "tie_word_embeddings", True),
    Constant(position="learned", norm="layernorm", gated=False, use_bias=True),
    WriteOnly(bos_token_id=None, pad_token_id=None),
)
_OLD_KEYS = ("n_ctx", "n_special", "predict_special_tokens")  # in the first files
_LAYERS = within(
    "layers/{i}/",
    "h.{i}.",
    norm("attention_norm", "ln_1"),
    conv(("attention/query", "attention/key", "attention/value"), "attn.c_attn"),
    conv("attention/output", "attn.c_proj"),
    norm("feed_forward_norm", "ln_2"),
    conv("feed_forward/up", "mlp.c_fc"),
    conv("feed_forward/down", "mlp.c_proj"),
)

OPENAI_GPT = Family(
    "openai-gpt",
    (
        decoder_heads("OpenAIGPT", "LMHeadModel"),
        *_SHAPE,
        Field("vocab_size", "vocab_size", 40_478),
        Field("max_seq_len", "n_positions", 512, "max_position_embeddings"),
        Constant(norm_placement="post"),
        Activation("afn", "gelu", renamed=(("gelu", "gelu_new"),)),
        EndTokens(None),
    ),
    (
        *table("embedding/tokens", "tokens_embed.weight"),
        *table("embedding/positions", "positions_embed.weight"),
        *_LAYERS,
        *DECODER_HEADS,
    ),
    prefixes=("transformer.",),
    ignored_keys=_OLD_KEYS,
)

GPT2 = Family(
    "gpt2",
    (
        decoder_heads("GPT2", "LMHeadModel"),
        *_SHAPE,
        Field("vocab_size", "vocab_size", 50_257),
        Field("max_seq_len", "n_positions", 1024, "max_position_embeddings"),
        Field("d_ff", "n_inner", None),
        Activation("activation_function", "gelu_new"),
        OneOf("scale_attn_weights", True),
        OneOf("scale_attn_by_inverse_layer_idx", False),
        OneOf("add_cross_attention", False),
        EndTokens(50_256),
    ),
    (
        *table("embedding/tokens", "wte.weight"),
        *table("embedding/positions", "wpe.weight"),
        *_LAYERS,
        *norm("final_norm", "ln_f"),
        *DECODER_HEADS,
    ),
    prefixes=("transformer.",),
    ignored_keys=_OLD_KEYS,
)
