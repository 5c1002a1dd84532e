"""Data can be prepared with a tokenizer of any kind, which goes with them and is known again in other files."""

import json
import random
import shutil

import gguf
import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from model.errors import InputError
from model.store import open_parameters, open_tokenizer
from model.tokenizer import load_tokenizer
from model.tokenizer.export import export_tokenizer
from train.data import gives_ids_of, load_manifest, prepare
from train.data.mixture import have_same_ids
from train.data.shards import TokenShards

WORDS = ["the", "people", "of", "this nation", "1234", "été", "日本", "🙂", "<|end|>", "\n\n", "e\u0301"]
TEMPLATE = "{% for m in messages %}<|turn|>{{ m['content'] }}{{ eos_token }}{% endfor %}"
SPECIAL = ["<|begin|>", "<|end|>", "<|turn|>"]  # ids 0, 1, 2
KINDS = ["model", "model-folder", "json", "json-folder", "gguf", "gguf-parts", "gguf-sentencepiece", "data", "run"]
OPTIONS = {"validation_fraction": 0.2}


def texts(count=80, seed=0):
    generator = random.Random(seed)
    return [f"{i} " + " ".join(generator.choices(WORDS, k=15)) for i in range(count)]


def write_gguf(path, tokens, types, *, part=None, tensor=True, **more):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(path.stem)
    kinds = {bool: writer.add_bool, str: writer.add_string, list: writer.add_array, int: writer.add_uint32}
    for key, value in {"model": "gpt2", "tokens": tokens, "token_type": types, **more}.items():
        add = kinds[type(value)]
        add("tokenizer.chat_template" if key == "chat_template" else f"tokenizer.ggml.{key}", value)
    if part is not None:
        writer.add_uint16("split.no", part)
        writer.add_uint16("split.count", 2)
    if tensor:
        writer.add_tensor("token_embd.weight", np.ones((4, 2048), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def library():
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False
    )
    made.train_from_iterator(texts(), trainer)
    return made


@pytest.fixture(scope="module")
def bpe(library):
    """What a GGUF file holds of it, with two end tokens and a chat template."""
    model = json.loads(library.to_str())["model"]
    tokens = [token for token, _ in sorted(model["vocab"].items(), key=lambda item: item[1])]
    named = {"bos_token_id": 0, "eos_token_id": 1, "eot_token_id": 2, "chat_template": TEMPLATE}
    merges = [" ".join(merge) for merge in model["merges"]]
    return {"tokens": tokens, "types": [3] * 3 + [1] * (len(tokens) - 3), "pre": "gpt-2", "merges": merges, **named}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts") / "corpus"
    folder.mkdir()
    for i, text in enumerate(texts()):
        (folder / f"{i:03}.txt").write_text(text)
    return folder


@pytest.fixture(scope="module")
def places(corpus, library, bpe, tmp_path_factory):
    """Where a tokenizer of each kind is."""
    root = tmp_path_factory.mktemp("tokenizers")
    prepare(corpus, root / "own", vocab_size=300, **OPTIONS)
    model = root / "own" / "tokenizer.model"
    for name in ("model-folder", "json", "json-folder", "gguf-parts", "run"):
        (root / name).mkdir()
    shutil.copy(model, root / "model-folder")
    config = {"eos_token": "<|pad|>", "bos_token": "<|endoftext|>", "add_bos_token": True}
    (root / "model-folder" / "tokenizer_config.json").write_text(json.dumps(config))
    library.save(str(root / "json" / "tokenizer.json"))
    (root / "json" / "generation_config.json").write_text(json.dumps({"eos_token_id": 1, "top_p": 0.5}))
    library.save(str(root / "json-folder" / "tokenizer.json"))
    (root / "json-folder" / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<|end|>"}))
    (root / "json-folder" / "chat_template.jinja").write_text(TEMPLATE)
    (root / "json-folder" / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": [2, 1]}))
    write_gguf(root / "whole.gguf", **bpe)
    write_gguf(root / "gguf-parts" / "big-00001-of-00002.gguf", part=0, tensor=False, **bpe)
    write_gguf(root / "gguf-parts" / "big-00002-of-00002.gguf", [], [], part=1)
    pieces = [("<unk>", 2), ("<s>", 3), ("</s>", 3), *((f"<0x{byte:02X}>", 6) for byte in range(256))]
    pieces += [("▁", 1), ("t", 1), ("h", 1), ("▁t", 1), ("▁th", 1)]
    scores = [-float(i) for i in range(len(pieces))]
    tokens, types = map(list, zip(*pieces, strict=True))
    ids = {"bos_token_id": 1, "eos_token_id": 2}
    write_gguf(root / "pieces.gguf", tokens, types, model="llama", scores=scores, **ids)
    (root / "run" / "run.json").write_text(json.dumps({"schema_version": 1, "data": str(root / "own")}))
    return {
        "model": model,
        "model-folder": root / "model-folder",
        "json": root / "json" / "tokenizer.json",
        "json-folder": root / "json-folder",
        "gguf": root / "whole.gguf",
        "gguf-parts": root / "gguf-parts",
        "gguf-sentencepiece": root / "pieces.gguf",
        "data": root / "own",
        "run": root / "run",
    }


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_holds_the_ids_and_the_tokenizer(kind, places, corpus, tmp_path):
    """The ids are the given tokenizer's, the stored one is the same in all, and asked again nothing is done."""
    given, out = load_tokenizer(places[kind]), tmp_path / "out"
    manifest = prepare(corpus, out, tokenizer=places[kind], **OPTIONS)
    stored = load_tokenizer(out)
    assert stored.path == out / manifest.tokenizer_file
    for split in ("train", "validation"):
        shards = TokenShards(out, split)
        ids = shards.windows(np.array([0]), len(shards))[0]
        documents = [part[:-1].tolist() for part in np.split(ids, np.flatnonzero(ids == given.eos_ids[0]) + 1)[:-1]]
        found = [stored.decode(part) for part in documents]
        assert len(found) == manifest.splits[split].documents
        assert documents == given.encode_batch(found)
        assert set(found) <= set(texts())
    more = texts(30, seed=1) + SPECIAL
    assert given.encode_batch(more) == stored.encode_batch(more)
    for how in ({"special": True}, {"add_special_tokens": True}):
        assert [given.encode(text, **how) for text in more] == [stored.encode(text, **how) for text in more]
    assert (given.eos_ids, given.bos_id, given.vocab_size) == (stored.eos_ids, stored.bos_id, stored.vocab_size)
    if kind in ("json-folder", "gguf", "gguf-parts"):
        chat = [{"role": "user", "content": "hi"}]
        assert given.apply_chat_template(chat) == stored.apply_chat_template(chat) == "<|turn|>hi<|end|>"
        assert stored.eos_ids == (1, 2)
    assert gives_ids_of(given, out)

    before = {file.name: file.stat().st_mtime_ns for file in out.iterdir()}
    assert prepare(corpus, out, tokenizer=places[kind], **OPTIONS) == manifest == load_manifest(out)
    assert prepare(corpus, out, tokenizer=out, **OPTIONS) == manifest, "with the tokenizer that it holds"
    assert {file.name: file.stat().st_mtime_ns for file in out.iterdir()} == before
    assert sum(file.stat().st_size for file in out.glob("*.gguf")) < 20_000, "without the weights"
    with pytest.raises(InputError, match="is not a model"):
        open_parameters(out)
    assert open_tokenizer(out).path == stored.path
    if stored.path.suffix == ".gguf":
        with pytest.raises(InputError, match="has no weights"):
            open_parameters(stored.path)


def test_a_tokenizer_is_known_in_other_files(places, bpe, library, corpus, tmp_path):
    """A GGUF file, its quantisations and parts, what is exported of it, and the library's own file are the same."""
    prepare(corpus, tmp_path / "out", tokenizer=places["gguf"], **OPTIONS)
    prepare(corpus, tmp_path / "json", tokenizer=places["json"], **OPTIONS)
    exported = tmp_path / "exported"
    exported.mkdir()
    export_tokenizer(load_tokenizer(tmp_path / "out"), exported)
    assert sorted(file.name for file in exported.iterdir()) == [
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert load_tokenizer(exported).eos_ids == (1, 2)
    padded = {**bpe, "tokens": [*bpe["tokens"], "[PAD1]", "[PAD2]"], "types": [*bpe["types"], 5, 5]}
    same = [places["gguf-parts"], exported, places["json"], write_gguf(tmp_path / "padded.gguf", **padded)]
    for place in same:
        assert gives_ids_of(load_tokenizer(place), tmp_path / "out"), place
    assert have_same_ids(TokenShards(tmp_path / "out"), TokenShards(tmp_path / "json"))

    swapped = [*bpe["tokens"][:-2], bpe["tokens"][-1], bpe["tokens"][-2]]
    others = [
        write_gguf(tmp_path / "end.gguf", **{**bpe, "eos_token_id": 2}),
        write_gguf(tmp_path / "swapped.gguf", **{**bpe, "tokens": swapped}),
        write_gguf(tmp_path / "digits.gguf", **{**bpe, "pre": "smollm"}),
        places["model"],
    ]
    for place in others:
        assert not gives_ids_of(load_tokenizer(place), tmp_path / "out"), place


def test_what_says_more_about_a_tokenizer_belongs_to_the_data(places, corpus, tmp_path):
    plain, named = (
        prepare(corpus, tmp_path / name, tokenizer=places[name], **OPTIONS) for name in ("json", "json-folder")
    )
    assert plain.tokenizer_hash == named.tokenizer_hash
    assert set(plain.tokenizer_companions) == {"generation_config.json"}
    assert set(named.tokenizer_companions) == {
        "special_tokens_map.json",
        "chat_template.jinja",
        "generation_config.json",
    }
    assert plain.hash != named.hash
    assert json.loads((tmp_path / "json" / "generation_config.json").read_text()) == {"eos_token_id": [1]}
    with pytest.raises(InputError, match="made with other arguments"):
        prepare(corpus, tmp_path / "json", tokenizer=places["json-folder"], **OPTIONS)
    file = tmp_path / "json-folder" / "chat_template.jinja"
    file.write_text("other")
    with pytest.raises(InputError, match=r"jinja is not from the tokenizer of the shards"):
        load_manifest(file.parent)
    file.unlink()
    with pytest.raises(InputError, match=r"chat_template\.jinja is missing"):
        load_manifest(file.parent)


def test_a_model_beside_a_tokenizer_changes_no_data(places, corpus, tmp_path):
    """An exported run names the end token that its tokenizer has anyway; manifests stay as they were."""
    folder = tmp_path / "exported"
    folder.mkdir()
    shutil.copy(places["model"], folder)
    (folder / "config.json").write_text(json.dumps({"eos_token_id": 2}))
    alone, beside = (
        prepare(corpus, tmp_path / f"out{number}", tokenizer=place, **OPTIONS)
        for number, place in enumerate([places["model"], folder])
    )
    assert alone == beside
    assert (beside.tokenizer_file, beside.tokenizer_companions) == ("tokenizer.model", {})


def test_another_tokenizer_beside_the_datas_own_is_not_taken(places, corpus, tmp_path):
    """A data folder's tokenizer is the one of its manifest, and it alone goes into the folder of a model."""
    out, exported = tmp_path / "out", tmp_path / "exported"
    prepare(corpus, out, tokenizer=places["model"], **OPTIONS)
    shutil.copy(places["json"], out)
    exported.mkdir()
    export_tokenizer(load_tokenizer(out), exported)
    assert load_tokenizer(out).path.name == load_tokenizer(exported).path.name == "tokenizer.model"


def test_what_cannot_be_used_is_refused(places, bpe, corpus, tmp_path):
    def refused(match, tokenizer):
        with pytest.raises(InputError, match=match) as raised:
            prepare(corpus, tmp_path / "out", tokenizer=tokenizer, **OPTIONS)
        assert "\n" not in str(raised.value)
        assert not (tmp_path / "out").exists()

    empty = tmp_path / "empty"
    empty.mkdir()
    refused("has no tokenizer", empty)
    (empty / "run.json").write_text(json.dumps({"schema_version": 1, "data": str(tmp_path / "gone")}))
    refused(r"the run .* its data folder .*gone is gone", empty)
    endless = {name: value for name, value in bpe.items() if name not in ("eos_token_id", "eot_token_id")}
    refused("has no end token", write_gguf(tmp_path / "endless.gguf", **endless))
    content = places["gguf"].read_bytes()
    (tmp_path / "cut.gguf").write_bytes(content[:3000])
    refused("ends within its metadata", tmp_path / "cut.gguf")
    prepare(corpus, tmp_path / "data", tokenizer=places["gguf"], **OPTIONS)
    stored = tmp_path / "data" / "tokenizer.gguf"
    stored.write_bytes(stored.read_bytes()[:3000])
    refused("ends within its metadata", tmp_path / "data")
    with pytest.raises(InputError, match=r"tokenizer\.gguf is not the tokenizer of the shards"):
        load_manifest(tmp_path / "data")


@pytest.mark.parametrize("more", [{}, {"add_space_prefix": False}])
def test_pieces_are_exported_for_both_libraries(places, more, tmp_path):
    """A GGUF file's sentencepiece vocabulary as tokenizer.model, and as tokenizer.json with merges."""
    pieces = [("<unk>", 2), ("<s>", 3), ("</s>", 3), *((f"<0x{byte:02X}>", 6) for byte in range(256))]
    words = ["▁", "t", "h", "e", "th", "▁the", "he", "▁t", "\n", "▁▁", "é"]
    tokens, types = map(list, zip(*pieces, *((word, 1) for word in words), strict=True))
    scores = [-float(i) for i in range(len(tokens))]
    ids = {"bos_token_id": 1, "eos_token_id": 2}
    file = write_gguf(tmp_path / "a.gguf", tokens, types, model="llama", scores=scores, **ids, **more)
    given = load_tokenizer(file)
    export_tokenizer(given, tmp_path)
    both = [load_tokenizer(tmp_path / name) for name in ("tokenizer.json", "tokenizer.model")]
    for text in [*texts(), " the", "  the", "the\n the", "<s>the</s> the", ""]:
        for special in (False, True):
            for found in both:
                assert found.encode(text, special=special) == given.encode(text, special=special)
                assert found.decode(given.encode(text)) == given.decode(given.encode(text))
    assert [found.encode("the", add_special_tokens=True)[0] for found in both] == [1, 1]
    assert [found.eos_ids for found in both] == [(2,), (2,)]


def test_what_no_other_file_can_say_is_not_exported(bpe, tmp_path):
    again = {"tokens": [*bpe["tokens"], bpe["tokens"][-1]], "types": [*bpe["types"], 1]}
    twice = load_tokenizer(write_gguf(tmp_path / "twice.gguf", **{**bpe, **again}))
    target = tmp_path / "target"
    target.mkdir()
    (target / "tokenizer.json").write_text("of another")
    with pytest.raises(InputError, match=r"the tokens 329 and 330 have one text, .*, which no Hugging Face tokenizer"):
        export_tokenizer(twice, target)
    assert [file.name for file in target.iterdir()] == ["tokenizer.json"]
