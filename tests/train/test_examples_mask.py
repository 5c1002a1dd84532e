"""What is trained of a conversation: the assistant's words and the token that ends them, and nothing else."""

import itertools
import random
import runpy
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from model.tokenizer import load_tokenizer
from model.tokenizer.control import ChatText
from train.data.examples.formats import UnusableError
from train.data.examples.render import FILLED, UNTRAINABLE, Renderer, encode

_CASES = runpy.run_path(str(Path(__file__).with_name("example_cases.py")))
SPECIAL, TEMPLATES, marked, stretches, turns, write_tokenizer = (
    _CASES[name] for name in ("SPECIAL", "TEMPLATES", "marked", "stretches", "turns", "write_tokenizer")
)
END, IM_START, IM_END = (SPECIAL.index(name) for name in ("</s>", "<|im_start|>", "<|im_end|>"))
FOUR = turns("Hi", "Yes.", "And?", "No.")
THOUGHT = turns("Hi", "<think>\nhm\n</think>\n\nYes.", "And?", "<think>\nah\n</think>\n\nNo.")


@pytest.fixture(scope="module")
def tokenizer_of(tmp_path_factory):
    made = {}

    def get(name, texts=()):
        if name not in made:
            folder = tmp_path_factory.mktemp("tokenizers") / str(name)
            made[name] = load_tokenizer(write_tokenizer(folder, TEMPLATES.get(name), texts))
        return made[name]

    return get


@pytest.fixture
def encoded(tokenizer_of):
    """(template, messages, first=0, max_tokens=None) → the document and how many turns are left out."""

    def make(name, messages, first=0, max_tokens=None, **variables):
        tokenizer = tokenizer_of(name)
        rendered = Renderer(tokenizer).conversation(messages, first, variables)
        (document,) = encode(tokenizer, [rendered], max_tokens)
        return document

    return make


EXPECTED = {
    "chatml": "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦Yes.<|im_end|>⟧\n"
    "<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n⟦No.<|im_end|>⟧\n",
    "tagged": "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦Yes.<|im_end|>⟧\n"
    "<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n⟦No.<|im_end|>⟧\n",
    "opening": "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦Yes.<|im_end|>⟧\n"
    "<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n⟦No.<|im_end|>⟧\n",
    "llama": f"<s><|start_header_id|>system<|end_header_id|>\n\nYear: {datetime.now():%Y}\n\n<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n⟦Yes.<|eot_id|>⟧"
    "<|start_header_id|>user<|end_header_id|>\n\nAnd?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n⟦No.<|eot_id|>⟧",
    "gemma": "<s><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n⟦Yes.<end_of_turn>⟧\n"
    "<start_of_turn>user\nAnd?<end_of_turn>\n<start_of_turn>model\n⟦No.<end_of_turn>⟧\n",
    "mistral": "<s>[INST] Hi[/INST]⟦ Yes.</s>⟧[INST] And?[/INST]⟦ No.</s>⟧",
    "phi": "<|user|>\nHi<|end|>\n<|assistant|>\n⟦Yes.<|end|>⟧\n<|user|>\nAnd?<|end|>\n"
    "<|assistant|>\n⟦No.<|end|>\n</s>⟧",
    "next-turn": "<|user|>Hi<|assistant|>⟦Yes.<|user|>⟧And?<|assistant|>⟦No.⟧",
    "words": "user: Hi\nassistant: ⟦Yes.\n⟧user: And?\nassistant: ⟦No.\n⟧",
}


@pytest.mark.parametrize("name", EXPECTED)
def test_answers_and_their_end_tokens_are_trained(name, encoded, tokenizer_of):
    document = encoded(name, FOUR)
    assert marked(tokenizer_of(name), document.ids, document.trained) == EXPECTED[name]
    assert (document.left_out, document.truncated) == (0, False)
    assert document.bytes == len(EXPECTED[name].replace("⟦", "").replace("⟧", ""))


def test_ids_and_mask_by_hand(encoded, tokenizer_of):
    tokenizer = tokenizer_of("chatml")
    words = [tokenizer.encode(text) for text in ("user\nHi", "\n", "assistant\n", "Yes.")]
    ids = [IM_START, *words[0], IM_END, *words[1], IM_START, *words[2], *words[3], IM_END, *words[1]]
    document = encoded("chatml", FOUR[:2])
    assert document.ids.tolist() == ids
    assert document.trained.tolist() == [0] * (len(ids) - 6) + [1] * 5 + [0]


def test_a_turn_that_is_written_differently_later_is_left_out(encoded, tokenizer_of):
    document = encoded("qwen", THOUGHT)
    assert marked(tokenizer_of("qwen"), document.ids, document.trained) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n<|im_start|>user\nAnd?<|im_end|>\n"
        "<|im_start|>assistant\n⟦<think>\nah\n</think>\n\nNo.<|im_end|>⟧\n"
    )
    assert document.left_out == 1
    plain = encoded("qwen", FOUR)
    assert plain.left_out == 0
    assert sum(is_trained for _, is_trained in stretches(tokenizer_of("qwen"), plain.ids, plain.trained)) == 2


def test_an_answer_that_nothing_stands_before_is_left_out(encoded):
    document = encoded("chatml", [FOUR[1], *FOUR])
    assert document.left_out == 1
    assert document.trained.sum() == encoded("chatml", FOUR).trained.sum()
    assert encoded("chatml", [FOUR[1]]) == UNTRAINABLE


def test_only_the_answer_to_a_prompt_is_trained(encoded, tokenizer_of):
    for name in ("chatml", "tagged", "mistral"):
        whole = encoded(name, FOUR)
        document = encoded(name, FOUR, first=3)
        assert document.ids.tolist() == whole.ids.tolist()
        tokenizer = tokenizer_of(name)
        runs = stretches(tokenizer, document.ids, document.trained)
        (answer,) = [text for text, is_trained in runs if is_trained]
        assert answer.strip().startswith("No.")
        answered = Renderer(tokenizer).answer(tuple(FOUR[:3]), tuple(FOUR[3:]), {})
        (other,) = encode(tokenizer, [answered], None)
        assert (other.ids.tolist(), other.trained.tolist()) == (document.ids.tolist(), document.trained.tolist())


def test_a_name_of_a_special_token_in_a_message_is_text(encoded, tokenizer_of):
    for name in ("chatml", "tagged"):
        messages = turns("a<|im_end|>\n<|im_start|>assistant\nb", "c<|im_end|>d", "<|im_", "e")
        document = encoded(name, messages)
        assert (document.ids == IM_END).sum() == (document.ids == IM_START).sum() == 4
        runs = stretches(tokenizer_of(name), document.ids, document.trained)
        assert [text for text, is_trained in runs if is_trained] == ["c<|im_end|>d<|im_end|>", "e<|im_end|>"]


def test_variables_reach_the_template(encoded, tokenizer_of):
    document = encoded("qwen", FOUR, tools=[{"name": "add"}])
    assert '{"name": "add"}' in marked(tokenizer_of("qwen"), document.ids, document.trained)


def plain(tokenizer, prompt, answer, max_tokens=None):
    (document,) = encode(tokenizer, [Renderer(tokenizer).answer(prompt, answer, {})], max_tokens)
    return document


def test_plain_text_ends_once(tokenizer_of):
    tokenizer = tokenizer_of(None)
    for answer in ("Yes", "Yes</s>"):
        document = plain(tokenizer, "Hi ", answer)
        assert marked(tokenizer, document.ids, document.trained) == "Hi ⟦Yes</s>⟧"
        assert (document.ids == END).sum() == 1
    document = plain(tokenizer, "Hi </s>", "Yes</s></s>")
    assert (document.ids == END).sum() == 1, "what a user writes is text"
    assert marked(tokenizer, document.ids, document.trained) == "Hi </s>⟦Yes</s></s>⟧"


def test_a_token_over_the_boundary_is_trained(tokenizer_of):
    tokenizer = tokenizer_of("merges", ("x ab",) * 20)
    assert len(tokenizer.encode("ab")) == 1
    document = plain(tokenizer, "xa", "b")
    assert marked(tokenizer, document.ids, document.trained) == "x⟦ab</s>⟧"
    document = plain(tokenizer, "a", "b")
    assert document.trained.tolist() == [0, 1], "nothing predicts the first token"


def test_truncation_keeps_the_start(encoded, tokenizer_of):
    whole = encoded("chatml", FOUR)
    first = int(np.flatnonzero(whole.trained)[0])
    for size in range(2, len(whole.ids)):
        document = encoded("chatml", FOUR, max_tokens=size)
        if size <= first:
            assert document == FILLED
        else:
            assert document.truncated
            assert document.ids.tolist() == whole.ids[:size].tolist()
            assert document.trained.tolist() == whole.trained[:size].tolist()
    assert not encoded("chatml", FOUR, max_tokens=len(whole.ids)).truncated
    tokenizer = tokenizer_of("chatml")
    prompt = Renderer(tokenizer).prompt(tuple(FOUR[:1]), {})
    assert prompt.text.endswith("<|im_start|>assistant\n")
    (document,) = encode(tokenizer, [prompt], None)
    assert not document.trained.any()
    assert encode(tokenizer, [prompt], len(document.ids) - 1) == [FILLED]
    assert not isinstance(encode(tokenizer, [prompt], len(document.ids))[0], str)


def test_a_template_that_refuses_is_told(tokenizer_of):
    with pytest.raises(UnusableError, match="refused"):
        Renderer(tokenizer_of("gemma")).conversation(turns("Hi", "Yes", system="Be short"), 0, {})
    with pytest.raises(UnusableError, match="refused"):
        Renderer(tokenizer_of(None)).conversation(FOUR, 0, {})


@pytest.mark.parametrize("name", ["chatml", "tagged", "llama", "gemma", "opening", "qwen"])
def test_decoding_what_is_trained_gives_the_assistants_words(name, tmp_path):
    """With merges that reach over any boundary but special tokens; in every third text a special token's name."""
    generator = random.Random(0)
    words = ["the", "people", " of", "été", "\n", "日本", "🙂", "user", "assistant", "1 2", "</think", "<"]
    texts = ["".join(generator.choices(words, k=20)) for _ in range(50)]
    tokenizer = load_tokenizer(write_tokenizer(tmp_path, TEMPLATES[name], texts))
    end = {"llama": "<|eot_id|>", "gemma": "<end_of_turn>"}.get(name, "<|im_end|>")
    conversations = []
    for _ in range(60):
        count = generator.choice((2, 4, 5, 6))
        drawn = [generator.choices([*words, end, SPECIAL[0]], k=generator.randrange(1, 9)) for _ in range(count)]
        conversations.append(turns(*("a" + "x".join(parts) + "b" for parts in drawn)))
    rendered = [Renderer(tokenizer).conversation(messages, 0, {}) for messages in conversations]
    encoded = encode(tokenizer, rendered, None)
    for messages, text, document in zip(conversations, rendered, encoded, strict=True):
        found = [part for part, is_trained in stretches(tokenizer, document.ids, document.trained) if is_trained]
        assert found == [m["content"] + end for m in messages if m["role"] == "assistant"]
        assert document.left_out == 0
        ids = tokenizer.encode(text.text, special=True)
        assert document.ids.tolist() == ids
        borders = [common(ids, tokenizer.encode(text.part(0, place), special=True)) for place in text.places]
        expected = np.zeros(len(ids), np.uint8)
        for begin, stop in zip(borders[::2], borders[1::2], strict=True):
            expected[begin:stop] = 1
        assert document.trained.tolist() == expected.tolist(), "the ids before a span, encoded as a whole"


def common(one, other):
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def test_a_name_that_the_library_does_not_read_is_text(tmp_path):
    """The tokens before a span are then counted in the ids of the whole text before it."""
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role + '<w>' + m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant<w>{% endif %}"
    )
    folder = write_tokenizer(tmp_path, template)
    library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    library.add_special_tokens([tokenizers.AddedToken("<w>", special=True, single_word=True)])
    library.save(str(folder / "tokenizer.json"))
    tokenizer = load_tokenizer(folder)
    (document,) = encode(tokenizer, [Renderer(tokenizer).conversation(FOUR[:2], 0, {})], None)
    assert "<w>" in tokenizer.special_tokens.values()
    expected = "<|im_start|>user<w>Hi<|im_end|><|im_start|>assistant<w>⟦Yes.<|im_end|>⟧"
    assert marked(tokenizer, document.ids, document.trained) == expected


def test_a_cut_keeps_what_came_from_messages():
    text = ChatText("<a>x<a>y", "<a>x?a>y", ((3, 4), (5, 8)))
    part = text.cut(2, 7)
    assert (part, part.masked, part.generated) == (">x<a>", ">x?a>", ((1, 2), (3, 5)))
    assert text.cut(0, len(text)).masked == text.masked


def test_marks_inside_a_filter_are_not_trusted(tmp_path):
    """Where the marked text is changed as a whole, its places in the output cannot be told: turns are compared."""
    block = "{% generation %}{{ ' ' + m.content }}{% endgeneration %}"
    template = f"{{% for m in messages %}}{{% set x %}}{block}{{% endset %}}{{{{ x | trim }}}}<|im_end|>{{% endfor %}}"
    tokenizer = load_tokenizer(write_tokenizer(tmp_path, template))
    text = tokenizer.apply_chat_template(turns("Hi", "Yes"), add_generation_prompt=False)
    assert (text, text.generated) == ("Hi<|im_end|>Yes<|im_end|>", ())
