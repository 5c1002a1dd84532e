"""A tokenizer that went through a GGUF file gives the ids that it gave before."""

import contextlib
import json
import random

import gguf
import pytest
import tokenizers
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from tokenizers import decoders, models, pre_tokenizers, trainers

from model.errors import InputError
from model.tokenizer import load_tokenizer
from model.tokenizer.files import save_tokenizer
from model.tokenizer.pretokenizers import pre_tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
WORDS = ["the", "people", "of", "nation's", "WE'VE", "1234", "été", "日本", "x1y", "HTTPServer", "!?", "🙂"]
WORDS += ["\n\n", "\t"]
SIGNS = ["'s", "'S", "½", "²", "ſ", "<|end|>", "</s>", "$+", "ა", " ", "  ", "\n", "\r\n", "\u00a0", "\u0301", *WORDS]
CHATML = "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"


def texts(count=300, seed=0):
    generator = random.Random(seed)
    return [
        "".join(
            generator.choice(SIGNS) if generator.random() < 0.8 else chr(generator.randrange(32, 0xD800))
            for _ in range(generator.randrange(25))
        )
        for _ in range(count)
    ]


def corpus():
    generator = random.Random(1)
    return [" ".join(generator.choices(WORDS, k=20)) for _ in range(200)]


def finish(writer):
    """Write what a file without tensors holds."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


def write(path, tokens, types, *, model="gpt2", pre=None, merges=None, scores=None, endianess=None, **more):
    """A GGUF file of a tokenizer and no tensors; `more` are keys below tokenizer.ggml."""
    writer = gguf.GGUFWriter(path, "llama", endianess=endianess or gguf.GGUFEndian.LITTLE)
    writer.add_tokenizer_model(model)
    writer.add_token_list(tokens)
    if types is not None:
        writer.add_token_types(types)
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    if merges is not None:
        writer.add_token_merges(merges)
    if scores is not None:
        writer.add_token_scores(scores)
    if "chat_template" in more:
        writer.add_chat_template(more.pop("chat_template"))
    for key, value in more.items():
        add = {bool: writer.add_bool, int: writer.add_uint32, bytes: writer.add_array}[type(value)]
        add(f"tokenizer.ggml.{key}", list(value) if isinstance(value, bytes) else value)
    finish(writer)
    return path


@pytest.fixture(scope="module")
def gpt2():
    """A tokenizer as GPT-2's, whose words the library cuts by itself; ids 0 and 1 begin and end a text."""
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|bos|>", "<|end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    library.train_from_iterator(corpus(), trainer)
    library.encode_special_tokens = True
    return library


def write_bpe(path, library, **more):
    model = json.loads(library.to_str())["model"]
    tokens = [token for token, _ in sorted(model["vocab"].items(), key=lambda item: item[1])]
    types = [CONTROL, CONTROL] + [NORMAL] * (len(tokens) - 2)
    merges = [" ".join(merge) for merge in model["merges"]]
    more = {"bos_token_id": 0, "eos_token_id": 1, "merges": merges} | more
    return write(path, tokens, types, **more)


def test_byte_level_bpe_is_unchanged(tmp_path, gpt2):
    tokenizer = load_tokenizer(write_bpe(tmp_path / "a.gguf", gpt2, pre="gpt-2"))
    assert tokenizer.vocab_size == gpt2.get_vocab_size()
    for text in texts():
        assert tokenizer.encode(text) == gpt2.encode(text).ids
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert not {0, 1} & set(tokenizer.encode(text))
    assert tokenizer.encode("the<|end|>", special=True) == [*tokenizer.encode("the"), 1]
    assert tokenizer.decode([0, *tokenizer.encode("the people"), 1]) == "the people"
    assert load_tokenizer(tmp_path).encode("the people") == tokenizer.encode("the people"), "from its folder"


def test_words_are_cut_as_the_original_does():
    """The named rules against the library's own classes, and against what each is known for."""

    def cut(name, text):
        splits = [
            pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated") for pattern in pre_tokenizer(name).patterns
        ]
        return [piece for piece, _ in pre_tokenizers.Sequence(splits).pre_tokenize_str(text)]

    def library(rules, text):
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
        ends = [end for _, (_, end) in pre_tokenizers.Sequence([*rules, byte_level]).pre_tokenize_str(text)]
        return [text[start:end] for start, end in zip([0, *ends], ends, strict=False)]

    for text in texts():
        assert cut("gpt-2", text) == library([], text)
        assert cut("smollm", text) == cut("starcoder", text) == library([pre_tokenizers.Digits(True)], text)
        for name in ("falcon", "default", "deepseek-llm", "deepseek-coder", "deepseek-v3", "tekken", "gpt-4o"):
            assert "".join(cut(name, text)) == text
    numbers = "in 12345"
    assert cut("qwen2", numbers) == ["in", " ", "1", "2", "3", "4", "5"]
    assert cut("llama-bpe", numbers) == ["in", " ", "123", "45"]
    assert cut("gpt-2", numbers) == ["in", " 12345"]
    assert cut("deepseek-llm", "if(Ж) 12\n日本Ж") == ["if", "(", "Ж", ")", " ", "12", "\n", "日本", "Ж"]
    assert cut("deepseek-llm", "éა") == ["é", "ა"], "its list of letters has no Georgian ones"
    assert cut("deepseek-v3", "日本x 1234") == ["日本", "x", " ", "123", "4"]
    assert cut("llama-bpe", "WE'VE (HTTPServer)\n\n x") == ["WE", "'VE", " (", "HTTPServer", ")\n\n", " x"]
    assert cut("gpt-4o", "WE'VE HTTPServer a/\n") == ["WE'VE", " HTTPServer", " a", "/\n"]
    assert cut("tekken", "WE'VE camelCase") == ["WE", "'VE", " camel", "Case"]
    assert cut("qwen35", "e\u0301\u0301e") == ["e\u0301\u0301e"]
    assert cut("qwen2", "e\u0301\u0301e") == ["e", "\u0301\u0301", "e"]
    assert cut("default", "a12345 b.") == ["a", "123", "45", " b", "."]


def test_a_whole_word_needs_no_merge_where_the_rule_says_so(tmp_path):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, "abc", "de"]
    after = ["Ġ", "1", "de"]
    for pre, expected in (("llama-bpe", ["abc"]), ("qwen2", ["a", "b", "c"])):
        file = write(tmp_path / "a.gguf", tokens, [NORMAL] * len(tokens), pre=pre, merges=["d e"])
        assert [tokens[i] for i in load_tokenizer(file).encode("abc 1de")] == [*expected, *after]


def test_what_surrounds_a_text(tmp_path, gpt2):
    def around(**more):
        tokenizer = load_tokenizer(write_bpe(tmp_path / "a.gguf", gpt2, **more))
        ids, plain = tokenizer.encode("the", add_special_tokens=True), tokenizer.encode("the")
        at = ids.index(plain[0])
        assert ids[at : at + len(plain)] == plain
        return ids[:at], ids[at + len(plain) :]

    assert around(pre="gpt-2") == ([], [])
    assert around(pre="llama-bpe") == ([0], [])
    assert around(pre="llama-bpe", add_bos_token=False) == ([], [])
    assert around(pre="gpt-2", add_bos_token=True, add_eos_token=True) == ([0], [1])


def test_user_defined_tokens_and_turn_ends(tmp_path):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, "<think>", "<|eot|>", "<|end|>", "unused", "", "ab"]
    eot, end = len(alphabet) + 1, len(alphabet) + 2
    # The end of a turn has the wrong type, as some converters write it.
    types = [NORMAL] * len(alphabet) + [USER_DEFINED, NORMAL, CONTROL, UNUSED, UNUSED, NORMAL]
    file = write(tmp_path / "a.gguf", tokens, types, pre="gpt-2", merges=["a b"], eos_token_id=end, eot_token_id=eot)
    tokenizer = load_tokenizer(file)
    assert tokenizer.eos_ids == (end, eot)
    assert tokenizer.bos_id is None
    assert tokenizer.encode("<think>") == [len(alphabet)]
    assert tokenizer.decode([len(alphabet), eot, end]) == "<think>"
    assert eot not in tokenizer.encode("<|eot|>")
    assert tokenizer.encode("<|eot|>", special=True) == [eot]


def test_chat_template(tmp_path, gpt2):
    tokenizer = load_tokenizer(
        write_bpe(tmp_path / "a.gguf", gpt2, pre="gpt-2", chat_template="{{ bos_token }}" + CHATML)
    )
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}])
    assert prompt == "<|bos|><|start|>user\nhi<|end|>\n"
    ids = tokenizer.encode(prompt, special=True)
    assert ids[0] == 0
    assert ids.count(1) == 1


def test_a_given_template_stays_with_a_stored_tokenizer(tmp_path, gpt2):
    """Beside a model it changes nothing."""
    question = [{"role": "user", "content": "hi"}]
    tokenizer = load_tokenizer(write_bpe(tmp_path / "a.gguf", gpt2, pre="gpt-2", chat_template="own"))
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
    save_tokenizer(tokenizer.with_chat_template("given{{ eos_token }}"), folders[0])
    save_tokenizer(load_tokenizer(folders[0]), folders[1])
    assert [load_tokenizer(folder).apply_chat_template(question) for folder in folders] == ["given<|end|>"] * 2
    (tmp_path / "chat_template.jinja").write_text("other")
    assert load_tokenizer(tmp_path / "a.gguf").apply_chat_template(question) == "own"


def train_sentencepiece(folder, kind, **options):
    folder.mkdir(exist_ok=True)
    SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()),
        model_prefix=str(folder / kind),
        model_type=kind,
        vocab_size=400 if kind == "bpe" else 60,
        minloglevel=2,
        user_defined_symbols=["<think>"],
        control_symbols=["<|end|>", "<|end|>>"],
        hard_vocab_limit=False,
        **options,
    )
    return SentencePieceProcessor(str(folder / f"{kind}.model"))


def write_sentencepiece(path, processor, **more):
    ids = range(processor.get_piece_size())
    kinds = {2: processor.is_unknown, CONTROL: processor.is_control, 6: processor.is_byte, UNUSED: processor.is_unused}
    types = [next((kind for kind, holds in kinds.items() if holds(i)), NORMAL) for i in ids]
    types[processor.piece_to_id("<think>")] = USER_DEFINED
    scores = [processor.get_score(i) for i in ids]
    more = {"bos_token_id": processor.bos_id(), "eos_token_id": processor.eos_id()} | more
    return write(path, [processor.id_to_piece(i) for i in ids], types, scores=scores, **more)


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_bpe_is_unchanged(tmp_path, prefix):
    options = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "add_dummy_prefix": prefix}
    original = train_sentencepiece(tmp_path / "sp", "bpe", byte_fallback=True, **options)
    more = {} if prefix else {"add_space_prefix": False}
    tokenizer = load_tokenizer(write_sentencepiece(tmp_path / "a.gguf", original, model="llama", pre="default", **more))
    assert tokenizer.vocab_size == original.get_piece_size()
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (1, (2,))
    for text in texts():
        ids = original.encode(text)
        if "▁" not in text:
            assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids) == original.decode(ids)
    assert tokenizer.encode("the", add_special_tokens=True) == [1, *original.encode("the")]
    the, people = original.encode("the"), original.encode("people")
    end, longer = original.piece_to_id(["<|end|>", "<|end|>>"])
    assert tokenizer.encode("the<|end|>people<|end|>>", special=True) == [*the, end, *people, longer]
    assert end not in tokenizer.encode("the<|end|>people")


def test_unigram_is_unchanged(tmp_path):
    original = train_sentencepiece(tmp_path / "sp", "unigram", normalization_rule_name="nmt_nfkc")
    charsmap = ModelProto.FromString(original.serialized_model_proto()).normalizer_spec.precompiled_charsmap
    more = {"add_space_prefix": True, "remove_extra_whitespaces": True, "precompiled_charsmap": charsmap}
    tokenizer = load_tokenizer(write_sentencepiece(tmp_path / "a.gguf", original, model="t5", **more))
    for text in texts():
        assert tokenizer.encode(text) == original.encode(text)
    assert tokenizer.encode("the", add_special_tokens=True) == [*original.encode("the"), 2]


def test_bad_files(tmp_path, gpt2):
    file = tmp_path / "a.gguf"
    whole = write_bpe(file, gpt2, pre="gpt-2").read_bytes()

    def refused(match, content=None):
        if content is not None:
            file.write_bytes(content)
        with pytest.raises(InputError, match=match):
            load_tokenizer(file)

    refused("is not a GGUF file: it is empty", b"")
    refused("is not a GGUF file: it does not begin with GGUF", b"{}" * 100)
    refused("GGUF version 1", b"GGUF" + bytes([1, 0, 0, 0]) + bytes(100))
    for size in (4, 10, 40, 100, len(whole) // 2, len(whole) - 1):
        refused("ends within its metadata", whole[:size])
    generator = random.Random(0)
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(4):
            damaged[generator.randrange(len(damaged) if generator.random() < 0.3 else 300)] = generator.randrange(256)
        file.write_bytes(damaged)
        with contextlib.suppress(InputError):  # what is damaged is refused, or it does not matter
            load_tokenizer(file).encode("the people<|end|>", special=True)

    write(file, ["a"], [NORMAL], model="rwkv")
    refused("is of the kind 'rwkv'; known are gpt2, llama, t5")
    finish(gguf.GGUFWriter(file, "llama"))
    refused("has no tokenizer")
    write_bpe(file, gpt2, pre="mystery")
    refused("pre-tokenizer 'mystery' is unknown; known are .*gpt-2.*llama-bpe.*qwen2.*smollm")
    write_bpe(file, gpt2, pre="gpt-2", merges=["no such"])
    refused("its merges do not fit its tokens")
    write(file, ["a", "b"], [NORMAL], pre="gpt-2")
    refused("token_type has 1 values for 2 tokens")
    write(file, ["a"], [NORMAL], pre="gpt-2")
    refused(r"lacks tokenizer\.ggml\.merges")
    write(file, ["a"], [NORMAL], pre="gpt-2", eos_token_id=1)
    refused("eos_token_id=1, but it has 1 tokens")
    write(file, ["<unk>", "a"], [2, NORMAL], model="llama", scores=[0.0])
    refused("scores has 1 values for 2 tokens")
    write(file, ["<unk>", "<0x00>"], [2, BYTE], model="llama", scores=[0.0, 0.0])
    refused("sentencepiece cannot use its tokens")


def test_byte_level_texts_that_occur_twice(tmp_path):
    """A text becomes the last of its tokens, as in llama.cpp, and each of them decodes to it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    extra = [("ab", NORMAL), ("<s>", CONTROL), ("<s>", CONTROL), ("<s", NORMAL), ("<s>", NORMAL), ("ab", NORMAL)]
    extra += [("<t>", USER_DEFINED), ("<t>", NORMAL), ("", UNUSED), ("", UNUSED)]
    ab, control, last_control, _, word, last_ab, turn, word_turn, *empty = range(len(alphabet), len(alphabet) + 10)
    tokens, types = [*alphabet, *(text for text, _ in extra)], [NORMAL] * len(alphabet) + [kind for _, kind in extra]
    merges = ["a b", "< s", "<s >"]
    tokenizer = load_tokenizer(
        write(tmp_path / "a.gguf", tokens, types, pre="gpt-2", merges=merges, bos_token_id=control)
    )
    assert tokenizer.vocab_size == len(tokens)
    assert tokenizer.encode("ab") == [last_ab]
    assert tokenizer.decode([ab, last_ab, word, turn, word_turn]) == "abab<s><t><t>"
    assert tokenizer.decode([control, ab, last_control]) == "ab", "special tokens give nothing"
    assert tokenizer.encode("<t>") == [turn], "a user-defined token is found before words are cut"
    # The name of a control token is one only where it is asked for; else the text may hold the word of that name.
    assert not {control, last_control} & set(tokenizer.encode("<s>ab"))
    assert tokenizer.encode("<s>ab", special=True) == [last_control, last_ab]
    assert tokenizer.encode("ab", add_special_tokens=True) == [last_ab]
    assert not set(empty) & set(tokenizer.encode("a b"))
    file = write(tmp_path / "b.gguf", tokens, types, pre="llama-bpe", merges=merges, bos_token_id=control)
    assert load_tokenizer(file).encode("ab", add_special_tokens=True) == [control, last_ab]


def sentencepiece_tokens():
    words = ["▁", "t", "h", "e", "▁t", "he", "▁the", "<", "s", ">"]
    tokens = [("<unk>", 0.0, UNKNOWN), ("<s>", 0.0, CONTROL), ("</s>", 0.0, CONTROL)]
    tokens += [(f"<0x{byte:02X}>", 0.0, BYTE) for byte in range(256)]
    return tokens + [(word, -float(number), NORMAL) for number, word in enumerate(words)]


@pytest.mark.parametrize("model", ["llama", "t5"])
def test_sentencepiece_texts_that_occur_twice(tmp_path, model):
    old = sentencepiece_tokens()
    extra = [("▁the", -6.0, NORMAL), ("<s>", 0.0, CONTROL), ("<0x41>", 0.0, BYTE), ("", 0.0, UNUSED), ("", 0.0, UNUSED)]
    texts_, scores, types = zip(*old, *extra, strict=True)
    the, last_the, last_control, a = texts_.index("▁the"), len(old), len(old) + 1, len(old) + 2
    more = {"bos_token_id": 1, "eos_token_id": 2, "add_space_prefix": True}
    file = write(tmp_path / "a.gguf", list(texts_), list(types), model=model, scores=list(scores), **more)
    tokenizer = load_tokenizer(file)
    assert tokenizer.vocab_size == len(texts_)
    assert tokenizer.encode("the") == [last_the]
    assert tokenizer.decode([the]) == tokenizer.decode([last_the]) == "the"
    assert tokenizer.decode([the, last_the, texts_.index("<0x41>"), a]) == "the theAA"
    assert tokenizer.encode("A")[-1] == a
    assert tokenizer.decode([1, the, last_control, 2]) == "the"
    assert tokenizer.encode("<s>the", special=True) == [last_control, last_the]
    assert not {1, last_control} & set(tokenizer.encode("<s>the"))


@pytest.mark.parametrize("model", ["llama", "t5"])
def test_sentencepiece_without_scores_or_types(tmp_path, model):
    """llama.cpp takes both as optional: scores are 0; bytes and special tokens are known by their texts and ids."""
    texts_, scores, types = (list(column) for column in zip(*sentencepiece_tokens(), strict=True))
    more = {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0, "add_space_prefix": True}
    whole = load_tokenizer(write(tmp_path / "whole.gguf", texts_, types, model=model, scores=scores, **more))
    untyped = load_tokenizer(write(tmp_path / "untyped.gguf", texts_, None, model=model, scores=scores, **more))
    for text in ("the", "<s>the", "Ah é", "<unk>"):
        ids = untyped.encode(text, special=True)
        assert ids == whole.encode(text, special=True)
        assert untyped.decode(ids) == whole.decode(ids)
    bare = load_tokenizer(write(tmp_path / "bare.gguf", texts_, None, model=model, **more))
    assert bare.decode(bare.encode("the Ahé")) == "the Ahé"
    assert bare.encode("<s>", special=True) == [1]
    # Without an id of the unknown token it is llama.cpp's: 0 of "llama", 2 of "t5".
    del more["unknown_token_id"]
    alone = load_tokenizer(write(tmp_path / "alone.gguf", texts_, None, model=model, **more))
    assert alone.decode(alone.encode("the Ahé")) == "the Ahé"


def test_byte_level_without_types(tmp_path):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    end = len(alphabet)
    file = write(tmp_path / "a.gguf", [*alphabet, "<|end|>", "ab"], None, pre="gpt-2", merges=["a b"], eos_token_id=end)
    tokenizer = load_tokenizer(file)
    assert tokenizer.encode("ab<|end|>", special=True) == [end + 1, end]
    assert end not in tokenizer.encode("ab<|end|>")
    assert tokenizer.decode([end + 1, end]) == "ab"
