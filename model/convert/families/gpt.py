"""OpenAI's first two: GPT, whose norms come after the sums, and GPT-2."""

from model.convert.family import Family
from model.convert.fields import Activation, Always, Field, Only, Stops, Written, decoder_heads
from model.convert.rows import DECODER_HEADS, conv, norm, table, within

_SHAPE = (
    Field("d_model", "n_embd", 768, "hidden_size"),
    Field("num_layers", "n_layer", 12, "num_hidden_layers"),
    Field("num_heads", "n_head", 12, "num_attention_heads"),
    Field("norm_epsilon", "layer_norm_epsilon", 1e-5),
    Field("tie_embeddings", "tie_word_embeddings", True),
    Always(position="learned", norm="layernorm", gated=False, use_bias=True),
    Written(bos_token_id=None, pad_token_id=None),
)
_OLD_KEYS = ("n_ctx", "n_special", "predict_special_tokens")  # of the first files
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
        Always(norm_placement="post"),
        Activation("afn", "gelu", instead=(("gelu", "gelu_new"),)),
        Stops(None),
    ),
    (
        *table("embedding/tokens", "tokens_embed.weight"),
        *table("embedding/positions", "positions_embed.weight"),
        *_LAYERS,
        *DECODER_HEADS,
    ),
    prefixes=("transformer.",),
    harmless=_OLD_KEYS,
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
        Only("scale_attn_weights", True),
        Only("scale_attn_by_inverse_layer_idx", False),
        Only("add_cross_attention", False),
        Stops(50_256),
    ),
    (
        *table("embedding/tokens", "wte.weight"),
        *table("embedding/positions", "wpe.weight"),
        *_LAYERS,
        *norm("final_norm", "ln_f"),
        *DECODER_HEADS,
    ),
    prefixes=("transformer.",),
    harmless=_OLD_KEYS,
)
