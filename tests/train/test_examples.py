"""Rows of every format become examples; what cannot be used is counted; a folder is made as a whole or not at all."""

import json
import os
import re
import runpy
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from experiments.commands import data as command
from model import presets
from model.errors import InputError, UnknownNameError
from model.tokenizer import load_tokenizer
from train.data import load_manifest, prepare
from train.data.documents import document_ends
from train.data.examples.formats import UnusableError, examples_of, kinds_of
from train.data.manifest import verify_checksums
from train.data.shards import TokenShards, TrainedMask
from train.objectives import Preference, Reward

_CASES = runpy.run_path(str(Path(__file__).with_name("example_cases.py")))
SPECIAL, TEMPLATES, marked, turns, write_rows, write_tokenizer = (
    _CASES[name] for name in ("SPECIAL", "TEMPLATES", "marked", "turns", "write_rows", "write_tokenizer")
)
ASKED, YES, NO = turns("Hi", "Yes")[:1], turns("Hi", "Yes")[1:], turns("Hi", "No")[1:]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("chatml"), TEMPLATES["chatml"])


@pytest.fixture(scope="module")
def untemplated(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("plain"))


@pytest.fixture
def made(tmp_path, tokenizer):
    """(rows, kind, **options) → the folder and its manifest."""

    def make(rows, kind, **options):
        source = rows if isinstance(rows, Path) else write_rows(tmp_path / "rows.jsonl", rows)
        options = {"tokenizer": tokenizer, "validation_fraction": 0.4, "kind": kind} | options
        return prepare(source, tmp_path / "out", **options)

    return make


def documents(folder, split):
    """The documents of a split, with marks around what is trained."""
    shards, tokenizer = TokenShards(folder, split), load_tokenizer(folder)
    ends = document_ends(shards)
    spans = np.append(0, ends[:-1] + 1), np.diff(ends, prepend=-1)
    cuts = np.cumsum(spans[1])[:-1]
    ids, trained = (np.split(part.spans(*spans), cuts) for part in (shards, TrainedMask(shards)))
    assert len(TrainedMask(shards)) == len(shards)
    return [marked(tokenizer, *pair) for pair in zip(ids, trained, strict=True)]


def everything(folder):
    return documents(folder, "train") + documents(folder, "validation")


@pytest.mark.parametrize(
    "row",
    [
        {"messages": turns("Hi", "Yes")},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes"}]},
        {"conversations": turns("Hi", "Yes"), "id": 7, "source": None},
        {"instruction": "Hi", "output": "Yes"},
        {"instruction": "Hi", "input": "", "output": "Yes"},
    ],
)
def test_every_format_of_a_conversation_is_one(row):
    (example,) = examples_of(row, "chat")
    assert example.answers == (tuple(turns("Hi", "Yes")),)
    assert example.prompt == ()
    assert kinds_of(list(row))[0] == "chat"


def test_names_of_roles_and_the_input_of_an_instruction():
    names = ["system", "human", "gpt", "user", "assistant", "user", "chatgpt", "user", "bing", "user", "model"]
    (example,) = examples_of({"conversations": [{"from": name, "value": "x"} for name in names]}, "chat")
    assert [m["role"] for m in example.answers[0]] == ["system"] + ["user", "assistant"] * 5
    (example,) = examples_of({"instruction": "Add", "input": "1 2", "output": "3"}, "chat")
    assert example.answers[0][0]["content"] == "Add\n\n1 2"
    called = {"role": "assistant", "content": None, "tool_calls": [{"name": "add"}], "refusal": None}
    (example,) = examples_of({"messages": [*ASKED, called, {"role": "tool", "content": "3"}], "tools": [{}]}, "chat")
    assert example.answers[0][1] == {"role": "assistant", "content": "", "tool_calls": [{"name": "add"}]}
    assert example.variables == {"tools": [{}]}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": ASKED, "chosen": YES, "rejected": NO},
        {"prompt": "Hi", "chosen": YES, "rejected": NO},
        {"prompt": ASKED, "chosen": "Yes", "rejected": "No"},
        {"chosen": ASKED + YES, "rejected": ASKED + NO, "margin": None},
        {"prompt": "Hi", "chosen": ASKED + YES, "rejected": ASKED + NO, "messages": ASKED + YES},
        {"prompt": ASKED, "responses": ["No", "Yes"], "ranks": [2, 1]},
    ],
)
def test_every_format_of_a_pair_is_one(row):
    (example,) = examples_of(row, "preference")
    assert (example.prompt, example.answers) == (tuple(ASKED), (tuple(YES), tuple(NO)))


def test_plain_text_stays_plain(made, untemplated, tmp_path):
    rows = [{"prompt": f"{i} ", "completion": f"a{i}", "label": i % 2} for i in range(20)]
    made([{"prompt": row["prompt"], "completion": row["completion"]} for row in rows], "chat", tokenizer=untemplated)
    assert sorted(everything(tmp_path / "out")) == sorted(f"{i} ⟦a{i}</s>⟧" for i in range(20))


def test_rankings_give_all_pairs_of_unequal_rank(made, tmp_path):
    rows = [{"prompt": f"{i}: ", "responses": ["a", "b", "c"], "ranks": [2, 1, 2]} for i in range(20)]
    rows += [{"prompt": "p", "chosen": "x", "rejected": "y"}]
    manifest = made(rows, "preference")
    assert manifest.altered == manifest.dropped == {}
    for split in ("train", "validation"):
        texts, shards = documents(tmp_path / "out", split), TokenShards(tmp_path / "out", split)
        weights = shards.array("weights")
        prompts = Counter()
        for chosen, rejected, weight in zip(texts[::2], texts[1::2], weights, strict=True):
            prompts[chosen.split("⟦")[0]] += weight
            assert chosen.split("⟦")[0] == rejected.split("⟦")[0]
            assert "⟦b" in chosen or chosen == "p⟦x</s>⟧"
        assert set(prompts.values()) == {1.0}, "every prompt counts once"
        assert weights.dtype == np.float32
        assert shards.array("margins") is None


def test_margins_and_labels(made, tmp_path, tokenizer):
    rows = [{"prompt": f"{i}", "chosen": "yes", "rejected": "no"} | ({"margin": i} if i % 2 else {}) for i in range(20)]
    made(rows, "preference")
    for split in ("train", "validation"):
        shards = TokenShards(tmp_path / "out", split)
        numbers = [int(text.split("⟦")[0]) for text in documents(tmp_path / "out", split)[::2]]
        assert shards.array("margins").tolist() == [i if i % 2 else 0 for i in numbers]
    shutil.rmtree(tmp_path / "out")
    rows = [{"prompt": f"{i}", "completion": "a", "label": [True, False, 1, 0][i % 4]} for i in range(20)]
    made(rows, "rated")
    for split in ("train", "validation"):
        shards = TokenShards(tmp_path / "out", split)
        numbers = [int(text.split("⟦")[0]) for text in documents(tmp_path / "out", split)[::2]]
        assert shards.array("labels").tolist() == [1 - i % 2 for i in numbers]


def test_a_mismatch_is_the_next_answer_to_another_prompt(made, tmp_path):
    rows = [{"prompt": f"{i // 3}:", "completion": f"a{i}", "label": 1} for i in range(36)]
    made(rows, "rated")
    for split in ("train", "validation"):
        texts = documents(tmp_path / "out", split)
        pairs = [text.rstrip("⟧").removesuffix("</s>").split("⟦") for text in texts]
        own, mismatches = pairs[::2], pairs[1::2]
        for place, ((prompt, _), (same, other)) in enumerate(zip(own, mismatches, strict=True)):
            after = (own + own)[place + 1 :]
            assert same == prompt
            assert other == next(answer for asked, answer in after if asked != prompt)


def test_prompts_open_the_answer(made, tmp_path):
    rows = [{"prompt": turns(f"{i}")} for i in range(10)] + [{"messages": turns("x", "y", f"{i}")} for i in range(10)]
    rows += [{"messages": turns("x", "y")}]
    manifest = made(rows, "prompts")
    assert manifest.dropped == {"no user turn at the end": 1}
    assert all(text.endswith("<|im_start|>assistant\n") for text in everything(tmp_path / "out"))
    assert manifest.trained_tokens == {"train": 0, "validation": 0}


def test_everything_that_is_dropped_or_altered_is_counted(made, tmp_path):
    good = [{"messages": turns(f"question {i}", f"answer {i}")} for i in range(20)]
    bad = {
        "broken lines": ["{", "[1]", {"messages": "Hi"}, {"messages": [3]}, {"text": "Hi"}, {"messages": None}],
        "unknown roles": [{"conversations": [{"from": "critic", "value": "Hi"}]}],
        "empty turns": [{"messages": turns("Hi", " \n")}, {"messages": turns("", "Yes")}],
        "no assistant turn": [{"messages": turns("Hi")}],
        "prompts that fill max_tokens": [{"messages": turns("x" * 100, "Yes")}],
    }
    long = [{"messages": turns("Hi", "y" * 100)}]
    rows = [*good, *(row for rows in bad.values() for row in rows), *long, good[0], good[0]]
    manifest = made(rows, "chat", max_tokens=80)
    assert manifest.dropped == {reason: len(found) for reason, found in bad.items()}
    assert manifest.altered == {"truncated documents": 1}
    assert manifest.duplicates_dropped == 2
    assert sum(split.documents for split in manifest.splits.values()) == len(good) + 1
    assert manifest.longest == 80
    assert manifest == load_manifest(tmp_path / "out")


def test_whole_conversations_are_compared_from_what_the_assistant_first_says(made, tmp_path):
    rows = [
        {
            "chosen": turns(f"q{i}", "fine", "bye", "bye", system="Talk"),
            "rejected": turns(f"r{i}", "no", system="Talk"),
        }
        for i in range(20)
    ]
    manifest = made(rows, "preference", validation_fraction=0.3)
    assert manifest.dropped == {}
    assert manifest.altered == {"pairs whose prompts differ": 20}
    for split in ("train", "validation"):
        found, weights = documents(tmp_path / "out", split), TokenShards(tmp_path / "out", split).array("weights")
        assert len(weights) == len(found) / 2 > 0, "a system turn in common does not tie conversations together"
        assert set(weights) == {1.0}
        for chosen, rejected in zip(found[::2], found[1::2], strict=True):
            assert chosen.split("⟦")[1].startswith("fine")
            assert "q" in chosen.split("⟦")[0]
            assert rejected.split("⟦")[1].startswith("no")
    sources = {"pairs": TokenShards(tmp_path / "out", "train")}
    config = presets.get("tiny").replace(vocab_size=manifest.vocab_size)
    Reward().check_data(config, sources)
    with pytest.raises(InputError, match="has 20 pairs whose prompts differ"):
        Preference().check_data(config, sources)


def test_pairs_that_are_equal_or_lose_a_side_are_counted(made):
    good = [{"prompt": f"question {i}", "chosen": "yes", "rejected": "no"} for i in range(20)]
    bad = {
        "equal pairs": [
            {"prompt": "a", "chosen": "b", "rejected": "b"},
            {"prompt": "a", "chosen": "x" * 100 + "y", "rejected": "x" * 100 + "z"},  # equal once they are truncated
            {"prompt": "a", "responses": ["b", "c"], "ranks": [1, 1]},
        ],
        "broken lines": [
            {"prompt": "a", "chosen": "b", "rejected": "c", "margin": "1"},
            {"prompt": "a", "responses": ["b", "c"], "ranks": [1]},
            {"chosen": "b", "rejected": "c"},
        ],
        "no assistant turn": [
            {"prompt": turns("a"), "chosen": turns("a"), "rejected": "c"},
            {"chosen": turns("a", "b"), "rejected": turns("c")},
        ],
        "prompts that fill max_tokens": [{"prompt": "p" * 50, "chosen": "b", "rejected": "c"}],
    }
    manifest = made([*good, *(row for rows in bad.values() for row in rows)], "preference", max_tokens=40)
    assert manifest.dropped == {reason: len(found) for reason, found in bad.items()}
    rated = [{"prompt": f"{i}", "completion": "a", "label": 1} for i in range(20)]
    with pytest.raises(UnusableError, match="broken"):
        examples_of(rated[0] | {"label": 0.5}, "rated")


def test_what_the_template_refuses_or_changes_is_counted(made, tmp_path):
    good = [{"messages": turns(f"question {i}", f"answer {i}")} for i in range(20)]
    gemma = write_tokenizer(tmp_path / "gemma", TEMPLATES["gemma"])
    manifest = made([*good, {"messages": turns("Hi", "Yes", system="Be short")}], "chat", tokenizer=gemma)
    assert manifest.dropped == {"refused by the chat template": 1}
    shutil.rmtree(tmp_path / "out")
    qwen = write_tokenizer(tmp_path / "qwen", TEMPLATES["qwen"])
    thoughts = {"messages": turns("Hi", "<think>\nhm\n</think>\n\nYes.", "And?", "No.")}
    manifest = made([*good, thoughts, {"messages": turns("Hi", "Yes")[1:]}], "chat", tokenizer=qwen)
    assert manifest.dropped == {"no trained token": 1}
    assert manifest.altered == {"assistant turns that the template renders differently later": 1}


def test_a_folder_is_the_same_from_every_kind_of_file(made, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [{"messages": turns(f"question {i} \ud800 é", f"answer {i}")} for i in range(20)]
    manifest = made(rows, "chat")
    assert manifest.bytes_replaced == 20 * 3, "a lone surrogate has three bytes"
    clean = [json.loads(json.dumps(row).replace("\\ud800", "\\ufffd" * 3)) for row in rows]
    (tmp_path / "list").mkdir()
    (tmp_path / "list" / "rows.json").write_text(json.dumps(clean))
    (tmp_path / "list" / "README.md").write_text("Hi")
    parquet.write_table(pyarrow.Table.from_pylist(clean), tmp_path / "rows.parquet")
    for source, skipped in ((tmp_path / "list", 1), (tmp_path / "rows.parquet", 0)):
        shutil.rmtree(tmp_path / "out")
        other = made(source, "chat")
        assert (other.hash, other.files_skipped) == (manifest.hash, skipped)


def test_answers_to_one_prompt_are_on_one_side_and_stay_there(made, tmp_path):
    def prompts(split):
        return {text.split("⟦")[0] for text in documents(tmp_path / "out", split)}

    rows = [{"prompt": f"{i // 4}", "chosen": f"a{i}", "rejected": "no"} for i in range(120)]
    made(rows, "preference")
    train, validation = prompts("train"), prompts("validation")
    assert not train & validation
    assert len(train) + len(validation) == 30
    assert 5 <= len(validation) <= 20
    shutil.rmtree(tmp_path / "out")
    made([{"prompt": "new", "chosen": "a", "rejected": "b"}, *rows[10:]], "preference")
    assert prompts("train") - {"new"} <= train
    assert prompts("validation") - {"new"} <= validation


def test_the_first_turns_decide_the_side_of_a_conversation():
    first = {"messages": turns("Hi", "Yes", "And?", "No", system="Be short")}
    other = {"messages": turns("Hi", "No", system="Be short")}
    answered = {"prompt": turns("Hi", system="Be short"), "completion": "Maybe"}
    sides = [examples_of(row, "chat")[0].split_by for row in (first, other, answered)]
    assert len(set(sides)) == 1
    assert examples_of({"messages": turns("Hi", "No")}, "chat")[0].split_by not in sides


GOOD = [{"messages": turns(f"question {i}", f"answer {i}")} for i in range(20)]
PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}
RATED = {"prompt": "a", "completion": "b", "label": True}
UNANSWERED, EMPTY = {"messages": turns("a")}, {"messages": turns("a", "")}


def test_asked_again_nothing_is_done_and_other_arguments_are_an_error(made, tmp_path, tokenizer):
    manifest = made(GOOD, "chat")
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert made(GOOD, "chat") == manifest
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == stamps
    with pytest.raises(InputError, match="max_tokens=None there, 50 requested"):
        made(GOOD, "chat", max_tokens=50)
    with pytest.raises(InputError, match="kind=chat there, preference requested"):
        made(GOOD, "preference")
    with pytest.raises(InputError, match="kind=chat there, text requested"):
        made(GOOD, "text")
    with pytest.raises(InputError, match="made from other documents"):
        made(GOOD[1:], "chat")


def test_a_damaged_array_is_noticed(made, tmp_path):
    manifest = made(GOOD, "chat")
    names = [file.name for files in manifest.array_files.values() for file in files]
    assert names[:2] == ["trained-train-00000.npy", "ends-train.npy"]
    assert names[2:] == ["trained-validation-00000.npy", "ends-validation.npy"]
    for name in names:
        path = tmp_path / "out" / name
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(InputError, match=f"{name} is damaged"):
            verify_checksums(load_manifest(tmp_path / "out"), tmp_path / "out")
        path.write_bytes(content[:-1])
        with pytest.raises(InputError, match=f"{name} is damaged or cut short"):
            load_manifest(tmp_path / "out")
        path.write_bytes(content)
    text = (tmp_path / "out" / "manifest.json").read_text()
    (tmp_path / "out" / "manifest.json").write_text(text.replace('"longest": ', '"longest": 1'))
    with pytest.raises(InputError, match="does not give its own hash"):
        load_manifest(tmp_path / "out")


def test_small_shards_hold_the_same(made, tmp_path):
    manifest = made(GOOD, "chat")
    expected = everything(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    other = made(GOOD, "chat", shard_tokens=100)
    assert len(other.splits["train"].shards) > 3
    assert everything(tmp_path / "out") == expected
    assert other.trained_tokens == manifest.trained_tokens
    whole = np.array([0]), np.array([other.splits["train"].tokens])
    assert other.trained_tokens["train"] == TrainedMask(TokenShards(tmp_path / "out")).spans(*whole).sum()


@pytest.mark.parametrize(
    ("match", "rows", "options"),
    [
        ("keys prompt, chosen, rejected, which look like kind=preference and not like kind=chat", [PAIR], {}),
        ("look like kind=rated and not like kind=chat", [*GOOD, RATED], {}),
        ("all 2 are broken; the keys found are text, those expected are messages;", [{"text": "a"}] * 2, {}),
        ("of the 2 rows .* dropped were: 1 empty turns, 1 no assistant turn", [UNANSWERED, EMPTY], {}),
        ("has no rows", [], {}),
        ("too small for the split: .*; dropped were: 1 no assistant turn", [GOOD[0], UNANSWERED], {}),
        ("needs the tokenizer of the model", GOOD, {"tokenizer": None}),
        ("max_tokens=1 must be at least 2", GOOD, {"max_tokens": 1}),
        ("label_field='label' is for kind=text", GOOD, {"label_field": "label"}),
        ("validation_fraction=2", GOOD, {"validation_fraction": 2}),
    ],
)
def test_errors_say_what_to_do_and_leave_nothing(match, rows, options, made, tmp_path):
    before = set(os.listdir(tmp_path)) | {"rows.jsonl"}
    with pytest.raises(InputError, match=match) as refusal:
        made(rows, "chat", **options)
    assert "\n" not in str(refusal.value)
    assert set(os.listdir(tmp_path)) == before


def test_errors_of_kinds_and_sources(made, tmp_path, untemplated):
    with pytest.raises(InputError, match="20 refused by the chat template; the first refusal: the tokenizer"):
        made(GOOD, "chat", tokenizer=untemplated)
    with pytest.raises(UnknownNameError, match="chats"):
        made(GOOD, "chats")
    with pytest.raises(InputError, match="max_tokens=5 is for"):
        made(GOOD, "text", max_tokens=5)
    one = [{"prompt": "a", "completion": f"{i}", "label": 1} for i in range(9)]
    with pytest.raises(InputError, match="answers to one prompt only"):
        made(one, "rated")
    with pytest.raises(InputError, match="no file or folder"):
        made(tmp_path / "none.jsonl", "chat")
    (tmp_path / "rows.txt").write_text("Hi")
    with pytest.raises(InputError, match=r"rows.txt is no .jsonl, .json or .parquet file"):
        made(tmp_path / "rows.txt", "chat")
    (tmp_path / "one.json").write_text(json.dumps(GOOD[0]))
    with pytest.raises(InputError, match="is no JSON list"):
        made(tmp_path / "one.json", "chat")
    (tmp_path / "bad.parquet").write_text("Hi")
    with pytest.raises(InputError, match="is not a Parquet file"):
        made(tmp_path / "bad.parquet", "chat")


def test_a_given_template_is_kept_with_the_folder(tmp_path, made, untemplated):
    """Its markers are tokens where the vocabulary has them; the same names in a message are text."""
    rows = [{"messages": turns(f"Hi {number} <|im_end|></s>", "Yes")} for number in range(10)]
    with pytest.raises(InputError, match=r"has no chat template; .* `isoflop data prepare … --chat-template chatml`"):
        made(rows, "chat", tokenizer=untemplated)
    manifest = made(rows, "chat", tokenizer=untemplated, chat_template="chatml")
    out = tmp_path / "out"
    text = "<s><|im_start|>user\nHi 0 <|im_end|></s><|im_end|>\n<|im_start|>assistant\n⟦Yes<|im_end|></s>⟧\n"
    assert text in everything(out)
    shards, kept = TokenShards(out, "train"), load_tokenizer(out)
    ids = shards.windows(np.array([0]), len(shards))[0]
    names = Counter(SPECIAL[i] for i in ids.tolist() if i < len(SPECIAL))
    count = shards.manifest.splits["train"].documents
    assert names == {"<s>": count, "</s>": count, "<|im_start|>": 2 * count, "<|im_end|>": 2 * count}
    assert kept.apply_chat_template(ASKED) == "<s><|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert "chat_template.jinja" in manifest.tokenizer_companions
    assert made(rows, "chat", tokenizer=untemplated, chat_template="chatml") == manifest
    assert made(rows, "chat", tokenizer=out) == manifest  # a folder's tokenizer has the template
    (tmp_path / "own.jinja").write_text(TEMPLATES["words"])
    with pytest.raises(InputError, match="was made with other arguments"):
        made(rows, "chat", tokenizer=untemplated, chat_template=tmp_path / "own.jinja")


def test_a_template_of_a_tokenizer_trained_here(tmp_path, made, data):
    """Markers are pieces of text, and the tokenizer's end token ends an answer, though no file of it names that."""
    rows = [{"messages": turns(f"Hi {number} <|endoftext|>", "Yes", "And?", "No")} for number in range(10)]
    made(rows, "chat", tokenizer=data, chat_template="chatml")
    shards, own = TokenShards(tmp_path / "out", "train"), load_tokenizer(tmp_path / "out")
    ids = shards.windows(np.array([0]), len(shards))[0].tolist()
    assert [i for i in ids if i in own.special_tokens] == [own.eos_id] * (2 * shards.manifest.splits["train"].documents)
    trained = TrainedMask(shards).spans(np.array([0]), np.array([len(ids)]))
    assert own.decode([i for i, is_trained in zip(ids, trained, strict=True) if is_trained]).startswith(
        "Yes<|im_end|>No<|im_end|>"
    )
    assert load_tokenizer(data).encode("été") == own.encode("été")


def test_what_is_no_template_is_refused(tmp_path, made, data):
    (tmp_path / "damaged.jinja").write_text("{% for %}")
    for given, message in (
        ("chatmll", "there is no chat template chatmll; give a Jinja file, or one of these names: chatml"),
        (tmp_path / "damaged.jinja", "damaged.jinja is damaged at line 1"),
    ):
        with pytest.raises(InputError, match=message):
            made(GOOD, "chat", chat_template=given)
    with pytest.raises(InputError, match="chat_template='chatml' is for examples; text has no messages"):
        made(GOOD, "text", tokenizer=data, chat_template="chatml")
    with pytest.raises(InputError, match="this template writes no tools"):
        made([row | {"tools": [{}]} for row in GOOD], "chat", chat_template="chatml")


def test_the_commands_show_counts_and_the_mask(tmp_path, tokenizer, capsys):
    source = write_rows(tmp_path / "rows.jsonl", [*GOOD, "x"])
    options = {"out": tmp_path / "out", "kind": "chat", "tokenizer": tokenizer, "validation_fraction": 0.4}
    command.prepare(str(source), json=tmp_path / "prepared.json", **options)
    out = capsys.readouterr().out
    assert "dropped: broken lines" in out
    assert "trained tokens" in out
    assert json.loads((tmp_path / "prepared.json").read_text())["manifest"]["dropped"] == {"broken lines": 1}
    command.inspect(tmp_path / "out", rows=2, packing=100, json=tmp_path / "inspected.json")
    out = capsys.readouterr().out
    assert re.search(r"<\|im_start\|>assistant\n⟦answer \d+<\|im_end\|>⟧", out)
    assert "packing of validation" in out
    shown = json.loads((tmp_path / "inspected.json").read_text())["rows"]
    assert [row["text"] for row in shown] == [documents(tmp_path / "out", "train")[i] for i in (0, -1)]
    assert all(len(row["ids"]) == len(row["trained"]) for row in shown)
    pairs = write_rows(tmp_path / "pairs.jsonl", [PAIR | {"prompt": f"{i}"} for i in range(20)])
    command.prepare(str(pairs), **(options | {"kind": "preference", "out": tmp_path / "pairs"}))
    command.inspect(tmp_path / "pairs")
    out = capsys.readouterr().out
    assert "example 0, chosen" in out
    assert "⟦c</s>⟧" in out
