"""Batches of examples: whole conversations packed, pairs and ratings row by row, with the mask at the right place."""

import itertools
import runpy
from pathlib import Path

import numpy as np
import pytest

from model.errors import InputError
from train import Phase, TrainConfig
from train.data import (
    Loader,
    PackedConversations,
    PairRows,
    PhasedLoader,
    RatedRows,
    check_kind,
    completions,
    prepare,
    validation_batches,
    validation_examples,
)
from train.data.documents import Documents, document_ends
from train.data.labelled import classes_of
from train.data.rows import PackedDocuments, Windows
from train.data.shards import TokenShards, TrainedMask
from train.plan import Plan

_CASES = runpy.run_path(str(Path(__file__).with_name("example_cases.py")))
TEMPLATES, turns, write_rows, write_tokenizer = (
    _CASES[name] for name in ("TEMPLATES", "turns", "write_rows", "write_tokenizer")
)


def rows_of(kind):
    for i in range(40):
        prompt, size = f"question {i // 2}", i % 7 + 1
        match kind:
            case "chat":
                yield {"messages": turns(prompt, "yes" * size, "and?", f"no {i}")[: 2 + i % 3]}
            case "preference":
                yield {"prompt": prompt, "chosen": "yes" * size, "rejected": f"no {i}", "margin": i}
            case "rated":
                yield {"prompt": turns(prompt), "completion": "yes" * size + str(i), "label": i % 2}
            case "prompts":
                yield {"prompt": turns(f"question {i}")}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder of each kind, all of one tokenizer."""
    root = tmp_path_factory.mktemp("folders")
    tokenizer = write_tokenizer(root / "tokenizer", TEMPLATES["chatml"])
    for kind in ("chat", "preference", "rated", "prompts"):
        source = write_rows(root / f"{kind}.jsonl", rows_of(kind))
        prepare(source, root / kind, kind=kind, tokenizer=tokenizer, validation_fraction=0.3, shard_tokens=150)
    texts = write_rows(root / "text.jsonl", [{"text": f"{i} the people " * (i % 5 + 1)} for i in range(40)])
    prepare(texts, root / "text", tokenizer=tokenizer, validation_fraction=0.3)
    return root


@pytest.fixture
def shards(folders):
    return lambda kind, split="train": TokenShards(folders / kind, split)


def documents(shards):
    """(ids, trained) of each document."""
    ends = document_ends(shards)
    for begin, end in itertools.pairwise([-1, *ends.tolist()]):
        span = np.array([begin + 1]), np.array([end - begin])
        yield tuple(shards.spans(*span)), tuple(TrainedMask(shards).spans(*span))


def everything(rows):
    return rows.take(np.arange(len(rows), dtype=np.int64))


def segments_of(batch):
    """(tokens, targets, mask) of every conversation in the rows of a batch."""
    for row in range(len(batch["tokens"])):
        for number in range(1, batch["segment_ids"][row].max() + 1):
            here = batch["segment_ids"][row] == number
            assert batch["positions"][row][here].tolist() == list(range(here.sum()))
            yield tuple(tuple(batch[name][row][here]) for name in ("tokens", "targets", "loss_mask"))


def test_conversations_are_packed_whole_with_the_mask_at_their_targets(shards):
    chats = shards("chat")
    longest = chats.manifest.longest
    for seq_len in (longest - 1, 2 * longest + 3):
        batch = everything(PackedConversations(chats, seq_len))
        assert {value.shape[1] for value in batch.values()} == {seq_len}
        expected = [(ids[:-1], ids[1:], tuple(map(float, trained[1:]))) for ids, trained in documents(chats)]
        assert sorted(segments_of(batch)) == sorted(expected)
        for value in batch.values():
            assert not value[batch["segment_ids"] == 0].any()
    assert batch["loss_mask"].sum() == chats.manifest.trained_tokens["train"]
    assert batch["loss_mask"].dtype == np.float32
    expected = rf"has {longest} tokens, .* --max-tokens {longest - 1}, or take seq_len={longest - 1}"
    with pytest.raises(InputError, match=expected):
        PackedConversations(chats, longest - 2)


def test_text_is_packed_beside_conversations(shards):
    text = shards("text")
    own, other = everything(PackedConversations(text, 16)), everything(PackedDocuments(text, 16))
    assert {name: value.tolist() for name, value in own.items()} == {name: v.tolist() for name, v in other.items()}
    seq_len = 2 * shards("chat").manifest.longest
    phase = Phase("both", 40 * seq_len, mixture={"chat": 0.5, "text": 0.5})
    plan = Plan.of(TrainConfig(batch_size=10, seq_len=seq_len, phases=(phase,)))
    sources = {"chat": shards("chat"), "text": text}
    batch = PhasedLoader(sources, plan, seed=0, rows=PackedConversations).batch(0)
    shares = (batch["loss_mask"].sum(axis=1) / (batch["segment_ids"] > 0).sum(axis=1)).tolist()
    assert 1.0 in shares
    assert min(shares) < 0.7


def test_a_pair_is_two_rows_with_the_mask_at_its_tokens(shards):
    pairs = shards("preference")
    seq_len, count = pairs.manifest.longest + 2, len(document_ends(pairs))
    reference = np.arange(count, dtype=np.float32)
    rows = PairRows(pairs, seq_len, reference)
    batch = everything(rows)
    expected = list(documents(pairs))
    for side, offset in (("chosen", 0), ("rejected", 1)):
        tokens, mask, segment_ids = (batch[f"{side}_{name}"] for name in ("tokens", "mask", "segment_ids"))
        assert (tokens.dtype, mask.dtype, segment_ids.dtype) == (np.int32, np.float32, np.int32)
        for row, (ids, trained) in enumerate(expected[offset::2]):
            assert tokens[row].tolist() == [*ids, *[0] * (seq_len - len(ids))]
            assert mask[row].tolist() == [*trained, *[0] * (seq_len - len(ids))]
            assert segment_ids[row].tolist() == [1] * len(ids) + [0] * (seq_len - len(ids))
        assert batch[f"reference_{side}"].tolist() == reference[offset::2].tolist()
    assert batch["weights"].tolist() == [1.0] * (count // 2)
    assert batch["margins"].tolist() == pairs.array("margins").tolist()
    some = rows.take(np.array([3, 1]))
    assert {name: value.tolist() for name, value in some.items()} == {n: v[[3, 1]].tolist() for n, v in batch.items()}
    assert "reference_chosen" not in everything(PairRows(pairs, seq_len))


def test_a_rated_answer_stands_beside_its_mismatch(shards):
    rated = shards("rated")
    seq_len, count = rated.manifest.longest, len(document_ends(rated))
    reference = np.arange(count, dtype=np.float32)
    batch = everything(RatedRows(rated, seq_len, reference))
    expected = list(documents(rated))
    for prefix, offset in (("", 0), ("mismatched_", 1)):
        filled = batch[f"{prefix}segment_ids"] == 1
        for row, (ids, trained) in enumerate(expected[offset::2]):
            assert tuple(batch[f"{prefix}tokens"][row][filled[row]]) == ids
            assert tuple(batch[f"{prefix}mask"][row][filled[row]]) == trained
        assert batch[f"{prefix}reference"].tolist() == reference[offset::2].tolist()
    assert batch["labels"].tolist() == rated.array("labels").tolist()
    assert batch["labels"].dtype == np.int32
    assert "weights" not in batch


@pytest.mark.parametrize(("kind", "rows"), [("preference", PairRows), ("rated", RatedRows)])
def test_what_does_not_fit_is_an_error(kind, rows, shards):
    split = shards(kind)
    longest = split.manifest.longest
    with pytest.raises(InputError, match=f"--max-tokens {longest - 1}, or take seq_len={longest}"):
        rows(split, longest - 1)
    with pytest.raises(InputError, match="give one number for each"):
        rows(split, longest, np.zeros(3, np.float32))


@pytest.mark.parametrize(
    ("kind", "rows", "weight"),
    [("chat", PackedConversations, "loss_mask"), ("preference", PairRows, "weights"), ("rated", RatedRows, "weights")],
)
def test_validation_is_the_first_examples_in_batches_of_one_shape(kind, rows, weight, shards):
    made = rows(shards(kind, "validation"), shards(kind).manifest.longest)
    batches, whole = validation_examples(made, 4), everything(made)
    assert len(batches) == -(-len(made) // 4)
    for name, values in whole.items():
        joined = np.concatenate([batch[name] for batch in batches])
        assert joined[: len(made)].tolist() == values.tolist()
        assert not joined[len(made) :].any()
    real = np.concatenate([batch[weight].reshape(4, -1).any(axis=1) for batch in batches])
    assert real.tolist() == [True] * len(made) + [False] * (len(real) - len(made))

    names = [name for name in whole if name.endswith("segment_ids")]
    filled = np.cumsum(sum((whole[name] > 0).sum(axis=1) for name in names))
    for max_tokens in (1, filled[0], filled[2], filled[3] - 1, filled[3], filled[4], filled[-1], 10**6):
        count = max(1, (filled <= max_tokens).sum())
        batches = validation_examples(made, 4, int(max_tokens))
        assert sum(batch[weight].reshape(4, -1).any(axis=1).sum() for batch in batches) == count
        assert len(batches) == -(-count // 4)
    for options in ({"batch_size": 0}, {"batch_size": 1, "max_tokens": 0}):
        with pytest.raises(InputError, match="of at least 1"):
            validation_examples(made, **options)


def test_completions_divide_each_document_at_its_first_trained_token(shards):
    for kind in ("preference", "rated"):
        found = completions(shards(kind))
        for (context, continuation), (ids, trained) in zip(found, documents(shards(kind)), strict=True):
            first = trained.index(1)
            assert (*context, *continuation) == ids[: first + sum(trained)]
            assert len(context) == first > 0
            assert all(trained[first : first + len(continuation)])


def test_a_folder_of_another_kind_is_an_error_that_names_the_command(shards, folders):
    for make in (lambda s: Windows(s, 8), lambda s: PackedDocuments(s, 8), classes_of):
        with pytest.raises(InputError, match=r"kind=chat .* is for `isoflop tune`"):
            make(shards("chat"))
    for make in (Loader, validation_batches):
        with pytest.raises(InputError, match=r"kind=prompts .* is for `isoflop tune`"):
            make(folders / "prompts", batch_size=2, seq_len=8, **({"seed": 0} if make is Loader else {}))
    for make in (lambda s: PairRows(s, 99), lambda s: RatedRows(s, 99), completions):
        with pytest.raises(InputError, match=r"kind=text .* is for `isoflop train`; .* --kind (preference|rated)"):
            make(shards("text"))
    with pytest.raises(InputError, match="make one of kind=chat or prompts with"):
        check_kind(shards("rated"), "chat", "prompts")
    check_kind(shards("rated"), "chat", "rated")
    assert len(Documents(shards("prompts"))) == shards("prompts").manifest.splits["train"].documents
