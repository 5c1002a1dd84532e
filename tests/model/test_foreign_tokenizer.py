"""A tokenizer.json gives the library's own ids, and the files beside it say what is special."""

import json
import random

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from model.errors import InputError
from model.tokenizer import load_tokenizer
from model.tokenizer.extend import add_special_tokens

TEXTS = ["the people of this nation, 1234 glad hearts; l'été <nation>", "def f(x):\n\treturn x ** 2", "日本 🙂"] * 20
SPECIAL = ["<s>", "</s>", "<|end|>", "<unk>", "<pad>"]
BOS, EOS, TURN_END = 0, 1, 2


def train(kind):
    """A small tokenizer of the library, with five special tokens, ids 0 to 4."""
    options = {"vocab_size": 330, "special_tokens": SPECIAL, "show_progress": False}
    if kind == "bpe":
        library = tokenizers.Tokenizer(models.BPE())
        library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        library.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), **options)
    elif kind == "unigram":
        library = tokenizers.Tokenizer(models.Unigram())
        library.pre_tokenizer = pre_tokenizers.Metaspace()
        library.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(unk_token="<unk>", **options)
    else:
        library = tokenizers.Tokenizer(models.WordPiece(unk_token="<unk>"))
        library.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        library.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(**options)
    library.train_from_iterator(TEXTS, trainer)
    library.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    return library


@pytest.fixture(scope="module", params=["bpe", "unigram", "wordpiece"])
def library(request):
    return train(request.param)


@pytest.fixture(scope="module")
def bpe():
    return train("bpe")


def write(folder, library, **files):
    """A model's folder: tokenizer.json, and the files named by keyword."""
    folder.mkdir(parents=True, exist_ok=True)
    library.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / f"{name}.{'jinja' if name == 'chat_template' else 'json'}").write_text(text)
    return folder


def test_ids_are_the_librarys(tmp_path, library):
    folder = write(tmp_path, library)
    for path in (folder, folder / "tokenizer.json", str(folder)):
        tokenizer = load_tokenizer(path)
        assert tokenizer.vocab_size == library.get_vocab_size()
        texts = [*TEXTS[:3], ""]
        expected = [library.encode(text, add_special_tokens=False).ids for text in texts]
        assert [tokenizer.encode(text) for text in texts] == expected
        assert tokenizer.encode_batch(texts) == tokenizer.encode_batch(texts, 1) == expected
        assert tokenizer.encode("glad", add_special_tokens=True) == [BOS, *tokenizer.encode("glad"), EOS]
        assert tokenizer.decode([BOS, *tokenizer.encode("the people"), TURN_END, EOS]) == "the people"
        assert tokenizer.decode([]) == ""


def test_any_text_comes_back_from_bytes(tmp_path, bpe):
    tokenizer = load_tokenizer(write(tmp_path, bpe))
    generator = random.Random(2)
    hard = [" ", "\n", "\t", "\0", "👩‍👩‍👧", "e\u0301", "\u2581", "people", "12", *SPECIAL]
    for _ in range(500):
        text = "".join(
            generator.choice(hard) if generator.random() < 0.6 else chr(generator.randrange(0xE000, 0x110000))
            for _ in range(generator.randrange(16))
        )
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert min(ids, default=9) >= len(SPECIAL), "a plain text made a special token"


def test_special_tokens_are_read_where_asked(tmp_path, library):
    tokenizer = load_tokenizer(write(tmp_path, library))
    text = "the<|end|>people</s>"
    expected = [*tokenizer.encode("the"), TURN_END, *tokenizer.encode("people"), EOS]
    assert tokenizer.encode(text, special=True) == expected
    assert tokenizer.encode_batch([text, text], special=True) == [expected, expected]
    assert not {BOS, EOS, TURN_END} & set(tokenizer.encode(text))
    assert not {BOS, EOS, TURN_END} & set(tokenizer.encode_batch([text])[0])
    # Each way may be used after the other, in any order.
    assert tokenizer.encode(text, special=True) == expected


def test_what_the_file_cuts_and_fills_is_left_alone(tmp_path):
    library = train("wordpiece")
    library.enable_truncation(3)
    library.enable_padding(length=8)
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert len(tokenizer.encode("the people of this nation")) == 5
    assert len(tokenizer.encode("the")) == 1


def test_begin_and_end_tokens(tmp_path, bpe):
    assert load_tokenizer(write(tmp_path / "none", bpe)).eos_ids == ()
    assert load_tokenizer(tmp_path / "none").eos_id is None
    assert load_tokenizer(tmp_path / "none").bos_id is None

    def ends(name, **files):
        tokenizer = load_tokenizer(write(tmp_path / name, bpe, **files))
        return tokenizer.bos_id, tokenizer.eos_ids

    as_object = {"bos_token": {"content": "<s>", "lstrip": False}, "eos_token": {"content": "</s>"}}
    assert ends("objects", tokenizer_config=as_object) == (BOS, (EOS,))
    assert ends("map", special_tokens_map={"bos_token": "<s>", "eos_token": "</s>"}) == (BOS, (EOS,))
    # The tokenizer's own end token comes first; the generation's are added; the model's are a last resort.
    files = {"tokenizer_config": {"eos_token": "<|end|>"}, "generation_config": {"eos_token_id": [EOS, TURN_END]}}
    assert ends("generation", **files, config={"eos_token_id": 7}) == (None, (TURN_END, EOS))
    assert ends("config", config={"eos_token_id": EOS}, generation_config={"eos_token_id": None}) == (None, (EOS,))
    override = {"special_tokens_map": {"eos_token": "</s>"}, "tokenizer_config": {"eos_token": "<|end|>"}}
    assert ends("override", **override) == (None, (TURN_END,))
    # What the vocabulary does not hold counts as not given.
    unknown = {"tokenizer_config": {"eos_token": "<eos>", "bos_token": None}, "config": {"eos_token_id": 50256}}
    assert ends("unknown", **unknown) == (None, ())


def test_a_named_token_is_special_without_a_mark(tmp_path):
    library = train("bpe")
    description = json.loads(library.to_str())
    description["added_tokens"] = [token for token in description["added_tokens"] if token["content"] != "</s>"]
    tokenizer = load_tokenizer(write(tmp_path, library, tokenizer=description, tokenizer_config={"eos_token": "</s>"}))
    assert tokenizer.encode("</s>", special=True) == [EOS]
    assert tokenizer.decode([EOS]) == ""
    assert EOS not in tokenizer.encode("</s>")


MESSAGES = [{"role": "user", "content": "hi"}]


def test_where_the_chat_template_comes_from(tmp_path, bpe):
    def rendered(name, **files):
        return load_tokenizer(write(tmp_path / name, bpe, **files)).apply_chat_template(MESSAGES)

    text = "{{ bos_token }}{{ messages[0]['content'] }}"
    assert rendered("text", tokenizer_config={"chat_template": text, "bos_token": "<s>"}) == "<s>hi"
    templates = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": text}]
    assert rendered("list", tokenizer_config={"chat_template": templates}) == "hi"
    assert rendered("file", chat_template="file", tokenizer_config={"chat_template": text}) == "file"
    with pytest.raises(InputError, match='has no "default"'):
        rendered("no default", tokenizer_config={"chat_template": templates[:1]})
    with pytest.raises(InputError, match="neither a text nor a list"):
        rendered("wrong", tokenizer_config={"chat_template": 5})
    with pytest.raises(InputError, match="no chat template"):
        rendered("none")


def test_an_added_token_is_read_and_written(tmp_path):
    library = train("bpe")
    library.add_tokens([tokenizers.AddedToken("<think>", special=False, normalized=False)])
    tokenizer = load_tokenizer(write(tmp_path, library))
    i = library.token_to_id("<think>")
    assert tokenizer.vocab_size == i + 1
    assert tokenizer.encode("<think>a") == [i, *tokenizer.encode("a")]
    assert tokenizer.decode([i]) == "<think>"


def test_tokenizer_json_is_taken_before_tokenizer_model(tmp_path, bpe):
    (write(tmp_path, bpe) / "tokenizer.model").write_bytes(b"junk")
    assert load_tokenizer(tmp_path).path.name == "tokenizer.json"


def test_bad_texts_and_ids(tmp_path, bpe):
    tokenizer = load_tokenizer(write(tmp_path, bpe))
    with pytest.raises(InputError, match="text 1 has the lone surrogate"):
        tokenizer.encode_batch(["fine", "a\ud800"])
    for bad in (-1, tokenizer.vocab_size):
        with pytest.raises(InputError, match=f"token id {bad} .* 0 to {tokenizer.vocab_size - 1}"):
            tokenizer.decode([bad])


def test_bad_files(tmp_path, bpe):
    file = write(tmp_path, bpe) / "tokenizer.json"
    whole = file.read_bytes()
    for content in (b"", whole[: len(whole) // 2], b"{}", b"[]", b"null", b"\xff\xfe", b'{"version": "1.0"}'):
        file.write_bytes(content)
        with pytest.raises(InputError, match=r"tokenizer\.json is not a tokenizer\.json .* damaged"):
            load_tokenizer(tmp_path)
    empty = tokenizers.Tokenizer(models.BPE())
    empty.save(str(file))
    with pytest.raises(InputError, match="without a single token"):
        load_tokenizer(tmp_path)
    file.write_bytes(whole)
    for name in ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "config.json"):
        for content, match in (
            (b'{"eos', "is not valid JSON"),
            (b"[1]", "must be a JSON object, not list"),
            (b"\xff", "cannot read"),
        ):
            (tmp_path / name).write_bytes(content)
            with pytest.raises(InputError, match=match):
                load_tokenizer(tmp_path)
        (tmp_path / name).unlink()
    assert load_tokenizer(tmp_path).vocab_size == bpe.get_vocab_size()


def test_special_tokens_are_added_after_the_vocabulary(tmp_path):
    train("bpe").save(str(tmp_path / "tokenizer.json"))
    before = load_tokenizer(tmp_path)
    mask, end = before.vocab_size + 1, before.vocab_size + 2
    add_special_tokens(tmp_path, {0: "<s>", mask: "[MASK]", end: "<extra_id_0>"})
    after = load_tokenizer(tmp_path)
    text = "the people [MASK] <extra_id_0>"
    assert after.vocab_size == before.vocab_size + 3
    assert after.encode(text) == before.encode(text)
    assert after.encode(text, special=True)[-3::2] == [mask, end]
    with pytest.raises(InputError, match="has '<pad>' already, under another id"):
        add_special_tokens(tmp_path, {after.vocab_size: "<pad>"})
