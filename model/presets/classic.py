"""GPT-1 to GPT-3, Megatron-Turing NLG, BERT and T5: LayerNorm (T5: RMSNorm), feed-forwards without gates."""

from model.config import ModelConfig
from model.presets.preset import Preset, safetensors


def _gpt(d_model: int, num_layers: int, num_heads: int, max_seq_len: int = 1024, vocab_size: int = 50_257):
    """Return GPT-2 (Radford et al. 2019, section 2.3) and models of the same architecture."""
    return ModelConfig(
        vocab_size=vocab_size,
        d_model=d_model,
        num_layers=num_layers,
        num_heads=num_heads,
        max_seq_len=max_seq_len,
        position="learned",
        norm="layernorm",
        activation="gelu_tanh",
        gated=False,
        use_bias=True,
        eos_token_ids=(50_256,),
    )


def _gpt1() -> ModelConfig:
    """Return GPT-1 (Radford et al. 2018, section 4.1): post-norm, no final norm, no end-of-text token."""
    config = _gpt(768, 12, 12, max_seq_len=512)
    return config.replace(vocab_size=40_478, norm_placement="post", eos_token_ids=())


def _bert(d_model: int, num_layers: int, num_heads: int) -> ModelConfig:
    """Return BERT (Devlin et al. 2019, section 3): the encoder with its pooler, the start of fine-tuning.

    `replace(head="masked-language-model", head_bias=True)` adds the pre-training head.
    """
    return ModelConfig(
        vocab_size=30_522,
        d_model=d_model,
        num_layers=num_layers,
        num_heads=num_heads,
        max_seq_len=512,
        stack="encoder",
        position="learned",
        norm="layernorm",
        norm_epsilon=1e-12,
        norm_placement="post",
        activation="gelu",
        gated=False,
        use_bias=True,
        num_token_types=2,
        embedding_norm=True,
        head="none",
        pooler=True,
    )


def _t5(d_model: int, num_layers: int, num_heads: int, d_ff: int) -> ModelConfig:
    """Return T5 v1.0 (Raffel et al. 2020, section 2.1): unscaled scores, relative position bias, ReLU, tied head."""
    return ModelConfig(
        vocab_size=32_128,
        d_model=d_model,
        num_layers=num_layers,
        num_heads=num_heads,
        head_dim=64,
        d_ff=d_ff,
        max_seq_len=512,
        stack="encoder-decoder",
        position="relative",
        attention_scale=1.0,
        norm_epsilon=1e-6,
        activation="relu",
        gated=False,
        scale_logits=True,
        eos_token_ids=(1,),
        decoder_start_token_id=0,
    )


_MASKS = "the causal masks that its file stores"
_PRETRAINING = "the heads of pre-training"
_T5_TABLE = "a table of distances that nothing reads"

PRESETS = {
    "gpt1": Preset(_gpt1(), 116_534_784, safetensors("openai-community/openai-gpt", _MASKS)),
    "bert-base": Preset(_bert(768, 12, 12), 109_482_240, safetensors("google-bert/bert-base-uncased", _PRETRAINING)),
    "bert-large": Preset(_bert(1024, 24, 16), 335_141_888, safetensors("google-bert/bert-large-uncased", _PRETRAINING)),
    "gpt2-small": Preset(_gpt(768, 12, 12), 124_439_808, safetensors("openai-community/gpt2", _MASKS)),
    "gpt2-medium": Preset(_gpt(1024, 24, 16), 354_823_168, safetensors("openai-community/gpt2-medium", _MASKS)),
    "gpt2-large": Preset(_gpt(1280, 36, 20), 774_030_080, safetensors("openai-community/gpt2-large", _MASKS)),
    "gpt2-xl": Preset(_gpt(1600, 48, 25), 1_557_611_200, safetensors("openai-community/gpt2-xl", _MASKS)),
    # Every second layer of GPT-3 has banded attention of an unpublished width; here all layers have full attention.
    "gpt3-175b": Preset(
        _gpt(12_288, 96, 96, max_seq_len=2048),
        174_600_000_000,
        "Brown et al. 2020, table D.1 (174,600 million); there is no checkpoint",
    ),
    # GPT-2's vocabulary of 50,257, padded for 8 devices.
    "mt-nlg-530b": Preset(
        _gpt(20_480, 105, 128, max_seq_len=2048, vocab_size=51_200),
        529_600_000_000,
        "Narayanan et al. 2021, table 1 (529.6 billion), the shape of Smith et al. 2022; there is no checkpoint",
    ),
    "t5-small": Preset(_t5(512, 6, 8, d_ff=2048), 60_506_624, safetensors("google-t5/t5-small", _T5_TABLE)),
    "t5-base": Preset(_t5(768, 12, 12, d_ff=3072), 222_903_552, safetensors("google-t5/t5-base", _T5_TABLE)),
}
