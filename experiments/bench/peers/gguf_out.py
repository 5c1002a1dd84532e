"""Write a Llama-like model as a GGUF file, so that llama.cpp can run the same weights."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.bench.peers.twin import check_fields
from model import ModelConfig, Params
from model.convert import fold

_FREE = {"rope_base", "norm_epsilon", "tie_embeddings", "attention_bias", "attention_output_bias"}
_FREE |= {"compute_dtype", "norm_bias"}
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
    """Raise InputError, naming the field, for an architecture that llama.cpp's "llama" does not cover."""
    check_fields(config, _FREE, "is not supported: the comparison with llama.cpp needs a Llama architecture")


def write_gguf(config: ModelConfig, params: Params, file: Path) -> None:
    """Write all weights in float32, with a stand-in vocabulary: token ids go in and come out.

    params: plain, as `init` makes them; muP's multipliers are folded into them. llama.cpp rotates neighbouring features
    of a head, isoflop rotates features half a head apart: query and key rows are permuted accordingly. Raises
    InputError on other architectures.
    """
    import gguf

    config, params = fold(config, params)
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
