"""A data folder is made as a whole or not at all, and made again is the same."""

import errno
import fcntl
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys

import numpy as np
import pytest

from experiments.commands import data as command
from model.errors import InputError
from model.tokenizer import load_tokenizer
from train.data import load_manifest, prepare, shards
from train.data.manifest import token_dtype, verify_checksums
from train.data.shards import ShardWriter, TokenShards
from train.data.tokenizer_training import train_tokenizer

WORDS = ["the", "people", "of", "this nation", "and", "their", "government", "have", "reasons", "glad", "été"]
OPTIONS = {"vocab_size": 300, "validation_fraction": 0.2}


def texts(count=150):
    generator = random.Random(0)
    return [f"{i} " + " ".join(generator.choices(WORDS, k=20)) for i in range(count)]


def write(folder, documents):
    folder.mkdir(exist_ok=True)
    for i, text in enumerate(documents):
        (folder / f"{i:04}.txt").write_text(text)
    return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write(tmp_path_factory.mktemp("prepare") / "corpus", texts())


@pytest.fixture(scope="module")
def prepared(corpus):
    out = corpus.parent / "out"
    prepare(corpus, out, **OPTIONS)
    return out


@pytest.fixture
def copy(prepared, tmp_path):
    return shutil.copytree(prepared, tmp_path / "copy")


def documents(folder, split):
    """The documents of a split, decoded from its tokens."""
    tokens, tokenizer = TokenShards(folder, split), load_tokenizer(folder)
    ids = tokens.windows(np.array([0]), len(tokens))[0]
    assert ids[-1] == tokens.eos_id
    return [
        tokenizer.decode(part[part != tokens.eos_id]) for part in np.split(ids, np.flatnonzero(ids == tokens.eos_id))
    ][:-1]


def test_every_document_is_in_one_split_in_order(prepared):
    train, validation = (documents(prepared, split) for split in ("train", "validation"))
    held_out = [t for t in texts() if int(hashlib.sha256(t.encode()).hexdigest(), 16) < 0.2 * 2**256]
    assert validation == held_out
    assert train == [text for text in texts() if text not in set(held_out)]
    manifest = load_manifest(prepared)
    for name, part in (("train", train), ("validation", validation)):
        split = manifest.splits[name]
        assert split.documents == len(part)
        assert split.bytes == sum(len(text.encode()) for text in part)
        assert split.tokens == len(TokenShards(prepared, name))
        assert split.bytes_per_token == split.bytes / split.tokens
    verify_checksums(manifest, prepared)
    assert manifest.dtype == np.uint16


def test_adding_a_document_moves_no_other(corpus, prepared, tmp_path):
    more = write(tmp_path / "more", [*texts(), "a new document", "and another one"])
    tokenizer = prepared / "tokenizer.model"
    prepare(more, tmp_path / "out", validation_fraction=0.2, tokenizer=tokenizer)
    for split in ("train", "validation"):
        before, after = documents(prepared, split), documents(tmp_path / "out", split)
        assert after[: len(before)] == before


def test_duplicates_empties_and_invalid_bytes_are_counted(prepared, tmp_path):
    folder = write(tmp_path / "corpus", [*texts(), texts()[3], texts()[3], " \n", ""])
    (folder / "z.txt").write_bytes(b"caf\xe9 \xff")
    manifest = prepare(folder, tmp_path / "out", **OPTIONS)
    assert (manifest.duplicates_dropped, manifest.empty_skipped, manifest.bytes_replaced) == (2, 2, 2)
    assert sum(split.documents for split in manifest.splits.values()) == len(texts()) + 1


def test_hash_is_of_the_content_not_the_path(corpus, prepared, tmp_path):
    first = load_manifest(prepared)
    elsewhere = shutil.copytree(corpus, tmp_path / "elsewhere")
    second = prepare(elsewhere, tmp_path / "deep" / "er", **OPTIONS)
    assert second.hash == first.hash
    assert load_manifest(tmp_path / "deep" / "er") == second
    assert prepare(corpus, tmp_path / "other", vocab_size=301, validation_fraction=0.2).hash != first.hash


def test_asked_again_nothing_is_done(corpus, prepared):
    stamps = {path: path.stat().st_mtime_ns for path in prepared.iterdir()}
    assert prepare(corpus, prepared, **OPTIONS) == load_manifest(prepared)
    assert {path: path.stat().st_mtime_ns for path in prepared.iterdir()} == stamps


def test_other_arguments_or_content_are_refused(corpus, prepared, tmp_path):
    with pytest.raises(InputError, match="vocab_size=300 there, 400 requested"):
        prepare(corpus, prepared, vocab_size=400, validation_fraction=0.2)
    with pytest.raises(InputError, match=r"validation_fraction=0\.2 there, 0\.1 requested"):
        prepare(corpus, prepared, vocab_size=300, validation_fraction=0.1)
    other = write(tmp_path / "other", texts(140))
    with pytest.raises(InputError, match="was made from other documents"):
        prepare(other, prepared, **OPTIONS)


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_failure_in_the_writer_leaves_nothing(corpus, tmp_path, monkeypatch, failure):
    written = []
    original = ShardWriter.write

    def write(self, ids):
        if len(written) == 20:
            raise failure
        written.append(1)
        original(self, ids)

    monkeypatch.setattr(shards.ShardWriter, "write", write)
    with pytest.raises(type(failure)) as raised:
        prepare(corpus, tmp_path / "new" / "out", **OPTIONS)
    assert raised.value is failure
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    prepare(corpus, tmp_path / "new" / "out", **OPTIONS)


def test_kill_leaves_no_folder_and_the_next_cleans_up(corpus, prepared, tmp_path):
    script = (
        "import os, sys; from train.data import prepare; from train.data.shards import ShardWriter\n"
        "ShardWriter.finish = lambda self: os.kill(os.getpid(), 9)\n"
        f"prepare({str(corpus)!r}, {str(tmp_path / 'out')!r}, vocab_size=300, validation_fraction=0.2)"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True).returncode == -9
    left = list(tmp_path.iterdir())
    assert [path.name for path in left] == [".out.preparing"]
    (left[0] / "stray").mkdir()
    assert prepare(corpus, tmp_path / "out", **OPTIONS).hash == load_manifest(prepared).hash
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {path.name for path in prepared.iterdir()}


def test_two_at_once_are_refused(corpus, tmp_path):
    busy = tmp_path / ".out.preparing"
    busy.mkdir()
    lock = os.open(busy, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    with pytest.raises(InputError, match="another process is preparing"):
        prepare(corpus, tmp_path / "out", **OPTIONS)
    assert busy.is_dir(), "the other's work stays"
    os.close(lock)
    prepare(corpus, tmp_path / "out", **OPTIONS)


def test_corpus_that_changes_is_refused(corpus, tmp_path, monkeypatch):
    changing = shutil.copytree(corpus, tmp_path / "changing")

    def train_and_change(*args, **kwargs):
        (changing / "0000.txt").write_text("changed")
        return train_tokenizer(*args, **kwargs)

    # The package hands on the function `prepare`, which hides the module of that name.
    monkeypatch.setattr(sys.modules["train.data.prepare"], "train_tokenizer", train_and_change)
    with pytest.raises(InputError, match="changed while it was read"):
        prepare(changing, tmp_path / "out", **OPTIONS)
    assert [path.name for path in tmp_path.iterdir()] == ["changing"]


def test_bad_arguments(corpus, prepared, tmp_path):
    def refused(match, source=corpus, out=tmp_path / "out", **options):
        with pytest.raises(InputError, match=match):
            prepare(source, out, **OPTIONS | options)

    refused("vocab_size=100", vocab_size=100)
    refused("the largest that works is", vocab_size=5000)
    for fraction in (0.0, 1.0, -0.5, float("nan")):
        refused("must be a number above 0 and below 1", validation_fraction=fraction)
    refused("shard_tokens=0", shard_tokens=0)
    refused("no source", source="sottu")
    refused("no tokenizer at", tokenizer=tmp_path / "none.model")
    refused("too small for the split: .* 150 training and 0 validation", validation_fraction=1e-9)
    refused("too small for the split: .* 0 training and 150 validation", validation_fraction=1 - 1e-9)
    refused("is inside the source folder", out=corpus / "out")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("x")
    refused("is a file", out=tmp_path / "file")
    refused("cannot make the folder", out=tmp_path / "file" / "out")
    refused("has other files", out=tmp_path)
    (tmp_path / "empty").mkdir()
    prepare(corpus, tmp_path / "empty", **OPTIONS)


def test_damaged_folders_are_named(copy, tmp_path):
    def refused(match, folder=copy):
        with pytest.raises(InputError, match=match):
            load_manifest(folder)

    manifest, shard = copy / "manifest.json", copy / "tokens-train-00000.npy"
    intact, tokens = manifest.read_text(), shard.read_bytes()
    refused("no data folder at", tmp_path / "nowhere")
    refused("has no manifest", tmp_path)
    for text, match in [
        (intact[:100], "no valid JSON"),
        ("[]", "schema version None"),
        (
            intact.replace('"schema_version": 1', '"schema_version": 99'),
            "schema version 99, this isoflop reads version 1",
        ),
        (intact.replace('"vocab_size"', '"size"'), "missing or wrong"),
        (intact.replace('"eos_id": 2', '"eos_id": 3'), "does not give its own hash"),
    ]:
        manifest.write_text(text)
        refused(match)
    manifest.write_text(intact)
    shard.write_bytes(tokens[:-10])
    refused(r"tokens-train-00000\.npy is damaged or cut short")
    shard.write_bytes(tokens[:-1] + bytes([tokens[-1] ^ 1]))
    with pytest.raises(InputError, match="its SHA-256 is not the manifest's"):
        verify_checksums(load_manifest(copy), copy)
    np.save(shard, np.zeros(5, np.uint16))
    refused(r"holds uint16 \(5,\) where the manifest says")
    shard.unlink()
    refused(r"tokens-train-00000\.npy is missing")
    shard.write_bytes(tokens)
    load_manifest(copy)
    (copy / "tokenizer.model").write_bytes(b"other")
    refused("is not the tokenizer of the shards")
    (copy / "tokenizer.model").unlink()
    refused(r"tokenizer\.model is missing")


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65536, "uint16"), (65537, "uint32")])
def test_shards_are_plain_npy_of_the_smallest_type(tmp_path, vocab_size, dtype):
    ids = np.arange(vocab_size - 100, vocab_size, dtype=np.int64)
    with ShardWriter(tmp_path, "train", token_dtype(vocab_size), 30) as writer:
        for part in np.split(ids, [1, 1, 50]):
            writer.write(part)
        listed = writer.finish()
    arrays = [np.load(tmp_path / shard.name) for shard in listed]
    assert [shard.tokens for shard in listed] == [30, 30, 30, 10]
    assert {array.dtype.name for array in arrays} == {dtype}
    assert np.array_equal(np.concatenate(arrays), ids)


def test_commands(corpus, tmp_path, capsys):
    out = tmp_path / "out"
    command.prepare(str(corpus), out=out, **OPTIONS, json=tmp_path / "prepare.json")
    assert "bytes per token" in capsys.readouterr().out
    result = json.loads((tmp_path / "prepare.json").read_text())
    assert result["schema_version"] == 1
    assert result["manifest"]["hash"] == load_manifest(out).hash
    command.inspect(out, split="validation", rows=2, json=tmp_path / "inspect.json")
    assert "checksums verified" in " ".join(capsys.readouterr().out.split())
    rows = json.loads((tmp_path / "inspect.json").read_text())["rows"]
    assert len(rows) == 2
    assert documents(out, "validation")[0].startswith(rows[0]["text"].split(" ")[0])
    with pytest.raises(InputError, match="cannot write"):
        command.inspect(out, json=tmp_path / "prepare.json" / "below-a-file.json")
    with pytest.raises(InputError, match="rows=-1"):
        command.inspect(out, rows=-1)
    with pytest.raises(InputError, match="packing=0"):
        command.inspect(out, packing=0)
    command.inspect(out, packing=16, json=tmp_path / "inspect.json")
    shown = " ".join(capsys.readouterr().out.split())
    packing = json.loads((tmp_path / "inspect.json").read_text())["packing"]
    for split, numbers in packing.items():
        assert numbers["documents"] == load_manifest(out).splits[split].documents
        assert numbers["tokens"] == load_manifest(out).splits[split].tokens
        assert f"packing of {split}: {numbers['documents']:,} documents" in shown
    assert list(packing) == ["train", "validation"]
    assert {path.name for path in tmp_path.iterdir()} == {"out", "prepare.json", "inspect.json"}
