"""Labels stay with their documents, from the lines of a file to the rows of a batch."""

import hashlib
import json
import random
import shutil
from dataclasses import asdict

import numpy as np
import pytest

from experiments.commands import data as command
from model.errors import InputError
from model.tokenizer import load_tokenizer
from train.data import documents as documents_module
from train.data import load_manifest, open_source, prepare
from train.data.documents import Documents, document_ends
from train.data.labelled import LabelledDocuments, labelled_validation
from train.data.manifest import verify_checksums
from train.data.shards import TokenShards

OPTIONS = {"vocab_size": 300, "validation_fraction": 0.2}
WORDS = ["the", "people", "of", "this nation", "and", "their", "government", "have", "reasons", "glad", "été"]
CLASSES = ("glad", "neutral", "sad")


def rows(count=150):
    generator = random.Random(0)
    for number in range(count):
        label = generator.choice(CLASSES)
        yield {"text": f"{number} {label} " + " ".join(generator.choices(WORDS, k=number % 20 + 1)), "label": label}


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def reviews(tmp_path_factory):
    return write(tmp_path_factory.mktemp("labelled") / "reviews.jsonl", rows())


@pytest.fixture(scope="module")
def prepared(reviews):
    prepare(reviews, reviews.parent / "out", label_field="label", shard_tokens=100, **OPTIONS)
    return reviews.parent / "out"


def labels(path):
    return [document.label for document in open_source(path, label_field="label")]


def test_every_document_keeps_its_label(prepared, monkeypatch):
    monkeypatch.setattr(documents_module, "_SCANNED_AT_ONCE", 7)
    tokenizer, manifest = load_tokenizer(prepared), load_manifest(prepared)
    seen = []
    for split in ("train", "validation"):
        shards = TokenShards(prepared, split)
        labelled = LabelledDocuments(shards, seq_len=200)
        batch = labelled.take(np.arange(len(labelled))[::-1])
        texts = [tokenizer.decode(t[s == 1]) for t, s in zip(batch["tokens"], batch["segment_ids"], strict=True)]
        named = [labelled.classes[label] for label in batch["labels"]]
        assert [text.split()[1] for text in texts] == named
        assert batch["labels"].dtype == batch["tokens"].dtype == batch["segment_ids"].dtype == np.int32
        counts = manifest.label_files[split].counts
        assert counts == {label: named.count(label) for label in CLASSES}
        assert sum(counts.values()) == manifest.splits[split].documents == len(labelled)
        stored = np.load(prepared / f"labels-{split}.npy")
        assert stored.dtype == np.uint16
        assert np.array_equal(stored[::-1], batch["labels"])
        seen += zip(texts, named, strict=True)
    assert manifest.labels == CLASSES
    assert sorted(seen) == sorted((row["text"], row["label"]) for row in rows())


def test_a_row_is_the_front_of_its_document(prepared):
    shards = TokenShards(prepared, "train")
    documents, ends = Documents(shards), document_ends(shards)
    bounds = np.stack([np.append(0, ends + 1)[:-1], ends], axis=1)
    stream = shards.windows(np.array([0]), len(shards))[0]
    assert np.array_equal(np.delete(stream, bounds[:, 1]), np.concatenate([stream[slice(*b)] for b in bounds]))
    assert (stream[bounds[:, 1]] == shards.eos_id).all()
    seq_len = int(np.median(documents.lengths))
    places = np.arange(len(documents))
    tokens, segment_ids = documents.rows(places, seq_len)
    for row, mask, bound in zip(tokens, segment_ids, bounds, strict=True):
        kept = stream[slice(*bound)][:seq_len]
        assert np.array_equal(row, np.pad(kept, (0, seq_len - len(kept))))
        assert np.array_equal(mask, np.arange(seq_len) < len(kept))
    for place in (-1, len(documents)):
        with pytest.raises(InputError, match=f"no document {place}"):
            documents.rows(np.array([place]), seq_len)
    with pytest.raises(InputError, match="seq_len=0"):
        documents.rows(places, 0)


def test_a_document_of_no_tokens_is_its_end_token(prepared, tmp_path):
    copy = shutil.copytree(prepared, tmp_path / "copy")
    file, end = copy / "tokens-train-00000.npy", document_ends(TokenShards(copy, "train"))[0]
    tokens = np.load(file)
    tokens[[0, end]] = tokens[[end, 0]]
    np.save(file, tokens)
    documents = Documents(TokenShards(copy, "train"))
    assert documents.lengths[0] == 0
    row, mask = documents.rows(np.array([0]), 4)
    assert row.tolist() == [[documents.shards.eos_id, 0, 0, 0]]
    assert mask.tolist() == [[1, 0, 0, 0]]
    tokens[0] = tokens[end]
    np.save(file, tokens)
    with pytest.raises(InputError, match="end tokens where its manifest lists"):
        Documents(TokenShards(copy, "train"))


def test_labels_are_text_and_lines_without_one_are_counted(tmp_path):
    values = ["a", True, False, 3, 2.0, None, [1], {"x": 1}, float("nan")]
    path = write(tmp_path / "a.jsonl", [{"text": f"{i}", "label": v} for i, v in enumerate(values)] + [{"text": "x"}])
    source = open_source(path, label_field="label")
    assert [document.label for document in source] == ["a", "true", "false", "3", "2"]
    assert source.unlabelled_skipped == 5
    assert labels(tmp_path) == ["a", "true", "false", "3", "2"], "a folder of such files will do"
    assert [document.label for document in open_source(path)] == [None] * 10
    write(path, [{"text": "x", "label": 0.5}])
    with pytest.raises(InputError, match=r"line 1: the label 0\.5 in 'label' is float"):
        labels(path)
    write(path, [{"text": "x", "label": "a"}])
    with pytest.raises(InputError, match=r"has no labels: none of its 1 documents has a .* in the field 'lable'"):
        list(open_source(path, label_field="lable"))


def test_parquet_has_labels_too(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"label": [1, None, 0], "text": ["one", "two", "three"]}), path)
    assert [(d.text, d.label) for d in open_source(path, label_field="label")] == [("one", "1"), ("three", "0")]
    parquet.write_table(pyarrow.table({"label": ["b", "a"], "text": ["one", "two"]}), path)
    assert labels(path) == ["b", "a"]
    with pytest.raises(InputError, match="no field 'kind'; present are 'label', 'text'"):
        list(open_source(path, label_field="kind"))


def test_what_cannot_carry_labels_is_refused(tmp_path, reviews):
    (tmp_path / "a.txt").write_text("text")
    write(tmp_path / "a.jsonl", rows(2))
    for source in ("sotu", "stdlib", tmp_path, tmp_path / "a.txt"):
        with pytest.raises(InputError, match=r"has no field 'label' .* need a \.jsonl or \.parquet file"):
            open_source(source, label_field="label")
    with pytest.raises(InputError, match="'text' is the field of the text too"):
        prepare(reviews, tmp_path / "out", label_field="text")


def test_skipped_and_conflicting_are_counted(prepared, tmp_path):
    first = list(rows())
    conflict = {"text": first[0]["text"], "label": "another"}
    more = [*first, first[1], conflict, conflict, {"text": "unlabelled"}, {"text": "null", "label": None}]
    source = write(tmp_path / "more.jsonl", more)
    tokenizer = prepared / "tokenizer.model"
    manifest = prepare(source, tmp_path / "out", label_field="label", validation_fraction=0.2, tokenizer=tokenizer)
    assert (manifest.duplicates_dropped, manifest.conflicting_labels, manifest.unlabelled_skipped) == (3, 2, 2)
    assert {name: file.counts | {"another": 0} for name, file in load_manifest(prepared).label_files.items()} == {
        name: file.counts for name, file in manifest.label_files.items()
    }


def test_labels_that_teach_nothing_are_refused(tmp_path):
    def refused(match, lines):
        with pytest.raises(InputError, match=match):
            prepare(write(tmp_path / "a.jsonl", lines), tmp_path / "out", label_field="label", **OPTIONS)
        assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]

    refused("one class only, 'x'", [row | {"label": "x"} for row in rows()])
    held_out = [int(hashlib.sha256(row["text"].encode()).hexdigest(), 16) < 0.2 * 2**256 for row in rows()]
    lines = [
        row | ({"label": f"rare{i}"} if held else {})
        for i, (row, held) in enumerate(zip(rows(), held_out, strict=True))
    ]
    rare = sorted(line["label"] for line in lines if line["label"].startswith("rare"))
    refused(f"no training document has the label {', '.join(map(repr, rare[:5]))} and {len(rare) - 5} more", lines)


def test_the_hash_covers_labels_only_where_there_are_any(prepared, reviews, tmp_path):
    tokenizer = prepared / "tokenizer.model"
    plain = prepare(reviews, tmp_path / "plain", tokenizer=tokenizer, validation_fraction=0.2, shard_tokens=100)
    labelled = load_manifest(prepared)
    assert plain.splits == labelled.splits
    assert plain.hash != labelled.hash
    former = {name: getattr(plain, name) for name in ("schema_version", "tokenizer_hash", "vocab_size", "eos_id")}
    former["splits"] = {name: asdict(split) for name, split in plain.splits.items()}
    assert plain.hash == hashlib.sha256(json.dumps(former, sort_keys=True).encode()).hexdigest()
    file = tmp_path / "plain" / "manifest.json"
    content = json.loads(file.read_text())
    for name in ("labels", "label_files", "unlabelled_skipped", "conflicting_labels"):
        del content[name]
    del content["arguments"]["label_field"]
    file.write_text(json.dumps(content))
    assert load_manifest(tmp_path / "plain").hash == plain.hash, "a folder of a former version"
    assert prepare(
        reviews, tmp_path / "plain", tokenizer=tokenizer, validation_fraction=0.2, shard_tokens=100
    ) == load_manifest(tmp_path / "plain")
    with pytest.raises(InputError, match="--label-field FIELD"):
        LabelledDocuments(TokenShards(tmp_path / "plain"), 8)


def test_asked_again_with_other_labels_is_refused(prepared, reviews, tmp_path):
    same = {"label_field": "label", "shard_tokens": 100} | OPTIONS
    assert prepare(reviews, prepared, **same) == load_manifest(prepared)
    with pytest.raises(InputError, match="label_field='label' there, None requested"):
        prepare(reviews, prepared, **same | {"label_field": None})
    swapped = write(
        tmp_path / "a.jsonl", [row | {"label": CLASSES[0]} if row["text"][0] == "7" else row for row in rows()]
    )
    with pytest.raises(InputError, match="was made from other documents"):
        prepare(swapped, prepared, **same)


def test_damaged_labels_are_named(prepared, tmp_path):
    copy = shutil.copytree(prepared, tmp_path / "copy")
    file, manifest = copy / "labels-train.npy", copy / "manifest.json"
    intact = np.load(file)
    np.save(file, intact[::-1])
    with pytest.raises(InputError, match=r"labels-train\.npy is damaged: its SHA-256"):
        verify_checksums(load_manifest(copy), copy)
    for wrong in (intact[1:], intact.astype(np.int64)):
        np.save(file, wrong)
        with pytest.raises(InputError, match=r"labels-train\.npy holds .* where the manifest says uint16"):
            load_manifest(copy)
    file.unlink()
    with pytest.raises(InputError, match=r"labels-train\.npy is missing"):
        load_manifest(copy)
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(content | {"labels": ["a", "b", "c"]}))
    with pytest.raises(InputError, match="does not give its own hash"):
        load_manifest(copy)


def test_validation_is_every_document_once_in_order(prepared):
    labelled = LabelledDocuments(TokenShards(prepared, "validation"), 8)
    whole = labelled.take(np.arange(len(labelled)))
    batch_size = next(size for size in (4, 5) if len(labelled) % size)
    batches = labelled_validation(prepared, batch_size, 8)
    assert {tuple(part.shape for part in batch.values()) for batch in batches} == {
        ((batch_size, 8), (batch_size, 8), (batch_size,), (batch_size,))
    }
    joined = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    real = joined.pop("loss_mask")
    assert real.dtype == np.float32
    assert np.array_equal(real, np.arange(len(real)) < len(labelled))
    for name, part in joined.items():
        assert np.array_equal(part[: len(labelled)], whole[name])
        assert not part[len(labelled) :].any()
    spent = np.cumsum((whole["segment_ids"] == 1).sum(axis=1))
    for max_tokens, count in ((1, 1), (spent[4] - 1, 4), (spent[4], 5), (spent[-1] + 9, len(labelled))):
        cut = labelled_validation(prepared, batch_size, 8, max_tokens=int(max_tokens))
        assert sum(batch["loss_mask"].sum() for batch in cut) == count
    for wrong in ({"batch_size": 0}, {"seq_len": 0}, {"max_tokens": 0}):
        with pytest.raises(InputError, match=f"{next(iter(wrong))}=0"):
            labelled_validation(prepared, **{"batch_size": 2, "seq_len": 8} | wrong)


def test_commands_show_the_classes(prepared, reviews, tmp_path, capsys):
    command.prepare(
        str(reviews), out=tmp_path / "out", label_field="label", tokenizer=prepared, validation_fraction=0.2
    )
    assert "labels: 3 classes; 0 documents without a label" in capsys.readouterr().out
    command.inspect(tmp_path / "out", rows=0, json=tmp_path / "inspect.json")
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    manifest = json.loads((tmp_path / "inspect.json").read_text())["manifest"]
    assert manifest["labels"] == list(CLASSES)
    for label in CLASSES:
        counts = [str(manifest["label_files"][split]["counts"][label]) for split in ("train", "validation")]
        assert [repr(label), *counts] in lines
