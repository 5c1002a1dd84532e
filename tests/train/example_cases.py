"""Small tokenizers with chat templates in the styles of public models, and text with marks around what is trained."""

import itertools
import json
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

FIXTURES = Path(__file__).parents[1] / "fixtures/chat"
SPECIAL = [
    "</s>",
    "<s>",
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<start_of_turn>",
    "<end_of_turn>",
    "[INST]",
    "[/INST]",
    "<|user|>",
    "<|assistant|>",
    "<|end|>",
]
OPEN, TURN = "<|im_start|>", "{% for m in messages %}"
TEMPLATES = {name: (FIXTURES / f"{name}.jinja").read_text(encoding="utf-8") for name in ("chatml", "llama", "gemma")}
TEMPLATES |= {name: (FIXTURES / f"{name}.jinja").read_text(encoding="utf-8") for name in ("mistral", "qwen")}
TEMPLATES["tagged"] = (  # the marks end before the end token
    TURN + "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES["phi"] = (  # what stands at the end of a conversation does not stand in the middle of one
    TURN + "{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{{ '<|assistant|>\n' if add_generation_prompt else eos_token }}"
)
TEMPLATES["opening"] = (  # the prompt opens the answer with what an answer does not begin with
    TURN + "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>' }}{% endif %}"
)
TEMPLATES["next-turn"] = (  # the next turn's header ends an answer
    TURN + "{{ '<|' + m.role + '|>' + m.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
TEMPLATES["words"] = (  # no special token at all
    TURN
    + "{{ m.role + ': ' + m.content + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def write_tokenizer(folder, template=None, texts=()):
    """Write a model's folder: bytes and, of these texts, some merges; the special tokens above; a template."""
    folder.mkdir(parents=True, exist_ok=True)
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    size = 256 + len(SPECIAL) + (60 if texts else 0)
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False
    )
    library.train_from_iterator(texts, trainer)
    library.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>"} | ({} if template is None else {"chat_template": template})
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def write_rows(path, rows):
    """Write objects, and lines that are none, to a .jsonl file."""
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def turns(*contents, system=None):
    """User and assistant turns in alternation, after a system turn where one is given."""
    begun = [] if system is None else [{"role": "system", "content": system}]
    roles = itertools.cycle(["user", "assistant"])
    return begun + [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]


def stretches(tokenizer, ids, trained):
    """(text, is it trained) of the stretches of a document, special tokens by their names."""
    pairs = zip(ids.tolist(), trained.tolist(), strict=True)
    for is_trained, run in itertools.groupby(pairs, key=lambda pair: pair[1] > 0):
        text = ""
        for is_special, group in itertools.groupby([i for i, _ in run], key=lambda i: i < len(SPECIAL)):
            tokens = list(group)
            text += "".join(SPECIAL[i] for i in tokens) if is_special else tokenizer.decode(tokens)
        yield text, is_trained


def marked(tokenizer, ids, trained):
    """The text of a document with ⟦ ⟧ around what is trained."""
    return "".join(f"⟦{text}⟧" if is_trained else text for text, is_trained in stretches(tokenizer, ids, trained))
