"""A text comes back exactly, special tokens only come from where they are meant, and bad files are named."""

import json
import random
import subprocess
import sys

import pytest

from model.errors import InputError
from model.tokenizer import load_tokenizer
from train.data.tokenizer_training import MIN_VOCAB_SIZE, TextSample, train_tokenizer

WORDS = ["the", "people", "of", "this nation", "and", "their", "government", "1234", "été", "日本", "", "glad"]


def corpus(documents=200, seed=0):
    generator = random.Random(seed)
    return [
        "\n".join(" ".join(generator.choices(WORDS, k=12)) for _ in range(generator.randint(1, 6)))
        for _ in range(documents)
    ]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(corpus(), folder, vocab_size=340)
    return load_tokenizer(folder)


def test_any_text_comes_back(tokenizer):
    generator = random.Random(1)
    hard = ["\u2581", "\u2585", " ", "  ", "\n", "\r\n", "\t", "\0", "\ufeff", "\u2028", " ⁇ ", "e\u0301", "ﬁ", "\x7f"]
    hard += ["👩‍👩‍👧", "<|endoftext|>", "<|pad|>", "<|unknown|>", "<0x41>", "\ufffd", "123", "people"]
    for _ in range(1000):
        text = "".join(
            generator.choice(hard)
            if generator.random() < 0.6
            else chr(generator.choice([generator.randrange(0xD800), generator.randrange(0xE000, 0x110000)]))
            for _ in range(generator.randrange(16))
        )
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert not {0, 1, 2} & set(ids), "a plain text made a special token"


def test_batches_and_threads_change_nothing(tokenizer):
    texts = [*corpus(20), "", "\u2581", "a\u2581b"]
    one_by_one = [tokenizer.encode(text) for text in texts]
    assert tokenizer.encode_batch(texts, 1) == one_by_one
    assert tokenizer.encode_batch(texts, 2) == one_by_one


def test_ids(tokenizer):
    assert tokenizer.vocab_size == 340
    assert tokenizer.eos_ids == (2,)
    assert tokenizer.eos_id == 2
    assert tokenizer.bos_id is None
    assert tokenizer.decode([2, *tokenizer.encode("the people"), 2, 0]) == "the people"
    assert tokenizer.decode(tokenizer.encode("é")[:0]) == ""
    assert tokenizer.decode(tokenizer.encode("🙂")[:2]).strip("\ufffd") == ""
    assert len(tokenizer.encode("2024")) == 4, "digits come one by one"
    assert tokenizer.encode("a\nb") == [
        *tokenizer.encode("a"),
        *tokenizer.encode("\n"),
        *tokenizer.encode("b"),
    ]


def test_special_tokens_are_read_where_asked(tokenizer):
    text = "<|endoftext|>the people\u2581<|endoftext|><|pad|>of"
    ids = tokenizer.encode(text, special=True)
    assert ids == [2, *tokenizer.encode("the people\u2581"), 2, 0, *tokenizer.encode("of")]
    assert tokenizer.decode(ids) == "the people\u2581of"
    assert tokenizer.encode_batch([text, "", "of"], special=True) == [ids, [], tokenizer.encode("of")]
    assert not {0, 2} & set(tokenizer.encode(text))
    # Its file does not say what to put around a text.
    assert tokenizer.encode("of", add_special_tokens=True) == tokenizer.encode("of")


def test_folder_says_what_surrounds_a_text_and_how_a_chat_is_written(tmp_path):
    train_tokenizer(corpus(), tmp_path, vocab_size=300)
    config = {
        "bos_token": "<|endoftext|>",
        "add_bos_token": True,
        "add_eos_token": True,
        "chat_template": "{{ bos_token }}!",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("of", add_special_tokens=True) == [2, *tokenizer.encode("of"), 2]
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}]) == "<|endoftext|>!"


def test_importing_is_light():
    heavy = "tokenizers", "gguf", "jinja2", "sentencepiece", "safetensors", "torch"
    program = f"import sys, model.convert, model.tokenizer; print(*set({heavy!r}) & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_training_is_deterministic(tmp_path):
    texts = corpus()
    first = train_tokenizer(texts, tmp_path / "one", vocab_size=320)
    second = train_tokenizer(texts[::-1], tmp_path / "two.model", vocab_size=320)
    assert first.name == "one.model"
    assert first.read_bytes() == second.read_bytes()


def test_sample_is_bounded_and_of_any_order():
    def draw(texts):
        sample = TextSample(5000)
        for text in texts:
            sample.add(text)
        return list(sample)

    texts = corpus(400)
    assert sum(len(text.encode()) for text in draw(texts)) <= 5000
    assert draw(texts) == draw(texts[::-1])


@pytest.mark.parametrize("vocab_size", [MIN_VOCAB_SIZE, MIN_VOCAB_SIZE + 1, 270, 300])
def test_small_vocabularies_train(tmp_path, vocab_size):
    tokenizer = load_tokenizer(train_tokenizer(corpus(), tmp_path, vocab_size=vocab_size))
    assert tokenizer.vocab_size == vocab_size
    assert tokenizer.decode(tokenizer.encode("日本 été\n\t x")) == "日本 été\n\t x"


def test_too_small_corpus_names_a_vocabulary_that_works(tmp_path):
    texts = ["hello world, hello people", "日本"]
    with pytest.raises(InputError, match=r"vocab_size=1000: the largest that works is \d+") as refusal:
        train_tokenizer(texts, tmp_path, vocab_size=1000)
    largest = int(str(refusal.value).split("works is ")[1].split(";")[0])
    assert load_tokenizer(train_tokenizer(texts, tmp_path, vocab_size=largest)).vocab_size == largest
    with pytest.raises(InputError, match=f"works is {largest}"):
        train_tokenizer(texts, tmp_path, vocab_size=largest + 1)


def test_bad_training_inputs(tmp_path):
    with pytest.raises(InputError, match=f"vocab_size=259 .* at least {MIN_VOCAB_SIZE}"):
        train_tokenizer(corpus(), tmp_path, vocab_size=259)
    with pytest.raises(InputError, match="nothing but line ends"):
        train_tokenizer(["\n\n"], tmp_path, vocab_size=300)
    assert not list(tmp_path.iterdir())


def test_bad_texts_and_ids(tokenizer):
    with pytest.raises(InputError, match="text 1 has the lone surrogate"):
        tokenizer.encode_batch(["fine", "a\ud800"])
    for bad in (-1, 340):
        with pytest.raises(InputError, match=f"token id {bad} .* 0 to 339"):
            tokenizer.decode([5, bad])
    with pytest.raises(InputError, match="no chat template"):
        tokenizer.apply_chat_template([{"role": "user", "content": "hi"}])


def test_bad_files(tokenizer, tmp_path):
    with pytest.raises(InputError, match="no tokenizer at"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(InputError, match="has no tokenizer"):
        load_tokenizer(tmp_path)
    model = tokenizer.path.read_bytes()
    assert b"<0x41>" in model
    twice, no_text = (model.replace(b"<0x41>", name) for name in (b"<0x42>", b"<\xe4x41>"))
    for content in (b"", b"junk" * 100, bytes(100), twice, no_text):
        (tmp_path / "bad.model").write_bytes(content)
        with pytest.raises(InputError, match=r"bad\.model is not a sentencepiece model"):
            load_tokenizer(tmp_path / "bad.model")
