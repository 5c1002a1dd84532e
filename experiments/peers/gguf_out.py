"""A model of llama's kind as a GGUF file, so that llama.cpp can run the same weights."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from model import ModelConfig, Params
from model.errors import InputError

# Fields of the shape may have any value, and these too; every other one must be as it is by default.
_ANY = {"vocab_size", "d_model", "num_layers", "num_heads", "num_kv_heads", "head_dim", "d_ff", "max_seq_len"}
_ANY |= {"rope_base", "norm_epsilon", "tie_embeddings", "attention_bias", "attention_output_bias", "compute_dtype"}
# These change nothing in the logits of a model whose other fields are as they must be.
_ANY |= {"num_encoder_layers", "layer_pattern", "local_rope_base", "relative_buckets", "relative_max_distance"}
_ANY |= {"num_labels", "base_d_model", "zero_readout", "scan_layers", "eos_token_ids", "decoder_start_token_id"}
_ANY |= {"remat", "attention_kernel", "norm_bias"}
_PARTS = {
    "attn_q": "attention/query",
    "attn_k": "attention/key",
    "attn_v": "attention/value",
    "attn_output": "attention/output",
    "ffn_gate": "feed_forward/gate",
    "ffn_up": "feed_forward/up",
    "ffn_down": "feed_forward/down",
}


def check_is_llama(config: ModelConfig) -> None:
    """Raises InputError, with the field, for an architecture that llama.cpp's "llama" is not."""
    default = ModelConfig(vocab_size=2, d_model=2, num_layers=1, num_heads=1).to_dict()
    for name, value in config.to_dict().items():
        if name not in _ANY and value != default[name]:
            raise InputError(f"{name}={value!r} is no llama: llama.cpp is compared on models of llama's kind only")


def write_gguf(config: ModelConfig, params: Params, file: Path) -> None:
    """All weights in float32, with a stand-in vocabulary: token ids go in and come out.

    params: plain, as `init` makes them. llama.cpp turns neighbouring features of a head together where we turn its two
    halves, so that query and key rows are stored in that order. Raises InputError on other architectures.
    """
    import gguf

    check_is_llama(config)
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(config.max_seq_len)
    writer.add_embedding_length(config.d_model)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.d_ff)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_base)
    writer.add_layer_norm_rms_eps(config.norm_epsilon)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_tokenizer_model("no_vocab")
    for name, tensor in _tensors(config, params).items():
        writer.add_tensor(name, np.ascontiguousarray(tensor, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensors(config: ModelConfig, params: Params) -> dict[str, np.ndarray]:
    params = jax.device_get(params)
    tensors = {
        "token_embd.weight": params["embedding"]["tokens"],
        "output_norm.weight": params["final_norm"]["scale"],
    }
    if not config.tie_embeddings:
        tensors["output.weight"] = params["head"]["weight"].T
    for index in range(config.num_layers):
        layer = jax.tree.map(lambda leaf, index=index: leaf[index], params["layers"]["dense"])
        tensors[f"blk.{index}.attn_norm.weight"] = layer["attention_norm"]["scale"]
        tensors[f"blk.{index}.ffn_norm.weight"] = layer["feed_forward_norm"]["scale"]
        for theirs, ours in _PARTS.items():
            group, part = ours.split("/")
            for kind, leaf in layer[group][part].items():
                tensors[f"blk.{index}.{theirs}.{kind}"] = _stored(config, part, leaf)
    return tensors


def _stored(config: ModelConfig, part: str, leaf: Any) -> np.ndarray:
    rows = leaf.T  # (out, in); a bias has outputs alone
    if part not in ("query", "key"):
        return rows
    heads = config.num_heads if part == "query" else config.num_kv_heads
    halves = rows.reshape(heads, 2, config.head_dim // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)
