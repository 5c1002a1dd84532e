"""A model type of Transformers: the entries of its config.json and the rules of its tensor names."""

import dataclasses
import re
from collections.abc import Callable, Collection
from typing import Any

from model.config import ModelConfig
from model.convert.entries import MAX_COUNT, Entry, Field, Raw
from model.convert.rules import TensorRule
from model.errors import InputError, check_whole

# Keys without effect on the function: origin and execution; training; token ids; heads; sampling of text.
_IGNORED_KEYS = """
    model_type architectures _name_or_path name_or_path _commit_hash transformers_version auto_map written_by
    unsloth_version unsloth_fixed transformers.js_config is_llama_config
    torch_dtype dtype use_bfloat16 use_cache pretraining_tp ep_size chunk_size_feed_forward reorder_and_upcast_attn
    _attn_implementation _attn_implementation_autoset attn_implementation _flash_attn_2_enabled use_flash_attention_2
    return_dict use_return_dict torchscript tf_legacy_loss output_past output_attentions output_hidden_states
    output_router_logits output_scores return_dict_in_generate

    initializer_range initializer_factor gradient_checkpointing use_gradient_checkpointing
    dropout dropout_rate attention_dropout hidden_dropout hidden_dropout_prob attention_probs_dropout_prob
    classifier_dropout classifier_dropout_prob resid_pdrop embd_pdrop attn_pdrop residual_dropout embedding_dropout
    activation_dropout router_jitter_noise router_aux_loss_coef router_z_loss_coef aux_loss_alpha seq_aux

    bos_token_id eos_token_id pad_token_id sep_token_id cls_token_id mask_token_id unk_token_id
    decoder_start_token_id forced_bos_token_id forced_eos_token_id tokenizer_class prefix
    model_max_length max_sequence_length seq_length

    is_decoder finetuning_task task_specific_params problem_type num_labels _num_labels id2label label2id
    sentence_transformers summary_type summary_use_proj summary_activation summary_proj_to_labels summary_first_dropout

    max_length min_length max_new_tokens do_sample early_stopping num_beams num_beam_groups diversity_penalty
    temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids num_return_sequences remove_invalid_values
    exponential_decay_length_penalty suppress_tokens begin_suppress_tokens cache_implementation
"""
# Keys of other families, with the values that have no effect.
_NEUTRAL: Raw = {
    **dict.fromkeys(("is_encoder_decoder", "add_cross_attention", "tie_encoder_decoder", "rope_interleaved"), False),
    **dict.fromkeys(("use_mrope", "qk_layernorm", "use_qk_norm", "use_parallel_residual", "parallel_attn"), False),
    **dict.fromkeys(("embedding_multiplier", "residual_multiplier", "logits_scaling", "logit_scale"), 1),
    "is_causal": True,
    "pruned_heads": {},
    "alibi": False,
}
QUANTISED = ("quantization_config", "quantization", "compression_config")
_LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "num_decoder_layers")
# Buffers of older files, which follow from the configuration.
_BUFFERS = (r"rotary_emb\.inv_freq$", r"position_ids$", r"\battn\.(masked_)?bias$")


def _unchanged(config: ModelConfig, names: Collection[str]) -> ModelConfig:
    return config


@dataclasses.dataclass(frozen=True)
class Family:
    """One model_type.

    prefixes: possible prefixes of the base model's tensor names; the first is written. renamed: (pattern, replacement)
    for the names of older files. ignored: patterns of tensors that are not needed. ignore_extra_layers: ignore the
    tensors of layers beyond the last (DeepSeek-V3's multi-token prediction). adapt: (config, tensor names) → config,
    for what only the names show. ignored_keys: keys of published config.json files without effect on the function.
    """

    model_type: str
    entries: tuple[Entry, ...]
    rules: tuple[TensorRule, ...]
    prefixes: tuple[str, ...] = ("model.",)
    renamed: tuple[tuple[str, str], ...] = ()
    ignored: tuple[str, ...] = ()
    ignore_extra_layers: bool = False
    adapt: Callable[[ModelConfig, Collection[str]], ModelConfig] = _unchanged
    ignored_keys: tuple[str, ...] = ()

    def read(self, raw: Raw) -> ModelConfig:
        """Return the config that a config.json describes.

        Raises InputError for unsupported features, and for unknown keys, since the file may belong to another family.
        """
        for key in QUANTISED:
            if raw.get(key):
                method = raw[key].get("quant_method", "unnamed") if isinstance(raw[key], dict) else raw[key]
                raise InputError(f"{key} with quant_method={method!r} is not supported; give full weights")
        self._check_keys(raw)
        values: dict[str, Any] = {}
        fields = [entry for entry in self.entries if isinstance(entry, Field)]
        raw = {**{field.key: raw.get(field.old_key or "", field.default) for field in fields}, **raw}
        for key in _LAYERS:  # ModelConfig checks the others; entries build lists of this length before that
            value = raw.get(key, 1)
            if value is not None:
                check_whole(key, value, 1, MAX_COUNT)
        try:
            for entry in self.entries:
                values |= entry.read(raw)
            return ModelConfig.from_dict(values)
        except InputError:
            raise
        except (TypeError, ValueError, KeyError, AttributeError, ZeroDivisionError) as error:
            raise InputError(f"it lacks a value or has one of a wrong type ({error})") from None

    def _check_keys(self, raw: Raw) -> None:
        known = {*_IGNORED_KEYS.split(), *QUANTISED, *self.ignored_keys}
        for entry in self.entries:
            known.update(entry.keys)
        unknown = [
            key
            for key, value in raw.items()
            if key not in known and value is not None and not (key in _NEUTRAL and value == _NEUTRAL[key])
        ]
        if unknown:
            raise InputError(
                f"isoflop does not know {', '.join(unknown)} for model_type {self.model_type!r}, which may change what "
                "the model computes or come from another model_type; remove keys without effect from config.json"
            )

    def write(self, config: ModelConfig) -> Raw:
        """Return a config.json, which may lack features of the config: the caller reads it to find out."""
        raw: Raw = {"model_type": self.model_type}
        for entry in self.entries:
            raw |= entry.write(config)
        return raw

    def base_name(self, name: str) -> str:
        """Return the name of a tensor as in the rules: its newest form, without prefix."""
        for pattern, replacement in self.renamed:
            name = re.sub(pattern, replacement, name)
        prefix = max((p for p in self.prefixes if name.startswith(p)), key=len, default="")
        return name[len(prefix) :]

    def written_name(self, base_name: str, outside: bool, config: ModelConfig) -> str:
        """Return the name of a tensor in Transformers: with prefix, except for a base model without head."""
        prefixed = not outside and config.head != "none" and self.prefixes
        return f"{self.prefixes[0]}{base_name}" if prefixed else base_name

    def is_ignored(self, base_name: str, config: ModelConfig) -> bool:
        """Return whether a tensor without a rule is known and not needed."""
        if any(re.search(pattern, base_name) for pattern in (*_BUFFERS, *self.ignored)):
            return True
        layer = re.match(r"layers\.(\d+)\.", base_name)
        return self.ignore_extra_layers and layer is not None and int(layer[1]) >= config.num_layers
