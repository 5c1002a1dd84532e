"""All families, in the order in which `save_hf` tries them."""

from model.convert.families.bert import BERT
from model.convert.families.deepseek import DEEPSEEK_V2, DEEPSEEK_V3
from model.convert.families.gemma import GEMMA, GEMMA2, GEMMA3
from model.convert.families.gpt import GPT2, OPENAI_GPT
from model.convert.families.llama import LLAMA, MISTRAL, MIXTRAL, PHI3, QWEN2, QWEN3, QWEN3_MOE
from model.convert.families.t5 import T5
from model.convert.family import Family

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        *(LLAMA, MISTRAL, MIXTRAL, QWEN2, QWEN3, QWEN3_MOE, PHI3),
        *(GEMMA, GEMMA2, GEMMA3, DEEPSEEK_V2, DEEPSEEK_V3),
        *(GPT2, OPENAI_GPT, BERT, T5),
    )
}
