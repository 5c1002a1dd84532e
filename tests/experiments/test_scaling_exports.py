"""Tables as people and their programs export them: read as they are meant, or refused in one sentence."""

import gzip
import json

import numpy as np
import pytest

from experiments.scaling.rows.table import read_table
from model.errors import InputError

PARAMS, TOKENS, LOSS = [1.3e9, 1.24e8, 7e7], [2.6e10, 3e9, 1.5e9], [2.85, 3.125, 3.5]
POINTS = "params,tokens,loss\n1.3B,26B,2.85\n124M,3B,3.125\n70M,1.5B,3.5\n"
COMMAS = "params;tokens;loss\n1,3B;26B;2,85\n124M;3B;3,125\n70M;1,5B;3,5\n"


def read(tmp_path, content, name="runs.csv", **columns):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_table(path, **columns)


def nested(n, d, loss):
    return {"config": {"n_params": n}, "summary": {"val": {"loss": loss}, "tokens_seen": d}, "Name": f"run {n}"}


RUNS = list(zip(PARAMS, TOKENS, LOSS, strict=True))
EXPORTS = {
    "suffixes": POINTS,
    "small suffixes and words": "params,tokens,loss\n1.3b,26 bn,2.85\n124 million,3 billion,3.125\n70m,1.5b,3.5\n",
    "thousands": 'params,tokens,loss\n"1,300,000,000","26,000,000,000",2.85\n"124,000,000","3,000,000,000",3.125\n'
    '"70,000,000","1,500,000,000",3.5\n',
    "spaces": "params,tokens,loss\n1 300 000 000,26'000'000'000,2.85\n124 000 000,3e9,3.125\n70 000 000,1.5e9,3.5\n",
    "decimal commas": COMMAS,
    "decimal commas and grouping dots": "params;tokens;loss\n1.300.000.000;26.000.000.000;2,85\n"
    "124.000.000;3.000.000.000;3,125\n70.000.000;1.500.000.000;3,50\n",
    "decimal commas in quotes": POINTS.replace("1.3B", '"1,3B"').replace("2.85", '"2,85"').replace("3.125", '"3,125"')
    .replace("1.5B", '"1,5B"').replace("3.5\n", '"3,5"\n'),
    "tabs": POINTS.replace(",", "\t"),
    "tabs and decimal commas": COMMAS.replace(";", "\t"),
    "byte order mark": "\ufeff" + POINTS,
    "utf-16": POINTS.replace(",", "\t").encode("utf-16"),
    "big-endian utf-16": b"\xfe\xff" + POINTS.encode("utf-16-be"),
    "windows line ends": POINTS.replace("\n", "\r\n"),
    "excel's sep line": "sep=;\r\n" + COMMAS,
    "units in the header": "params (M),tokens (billions),loss\n1300,26,2.85\n124,3,3.125\n70,1.5,3.5\n",
    "quotes that hold separators": 'note,params,tokens,loss\n"a;b;c;d;e",1.3B,26B,2.85\n"two\nlines",124M,3B,3.125\n'
    '"say ""x""",70M,1.5B,3.5\n',
    "a separator at the end": POINTS.replace("\n", ",\n"),
    "a comment mark": "# " + POINTS,
    "names of Weights & Biases": POINTS.replace("params,tokens,loss", "config.n_params,summary.tokens_seen,val/loss"),
    "minimum and maximum columns": "Name,params,tokens,val/loss,val/loss__MIN,val/loss__MAX\n"
    "a,1.3B,26B,2.85,2,4\nb,124M,3B,3.125,3,5\nc,70M,1.5B,3.5,3,9\n",
}  # fmt: skip


@pytest.mark.parametrize("name", EXPORTS)
def test_an_export_is_read_as_it_is_meant(tmp_path, name):
    table = read(tmp_path, EXPORTS[name])
    np.testing.assert_allclose([table.params, table.tokens, table.loss], [PARAMS, TOKENS, LOSS], rtol=1e-12)
    assert table.dropped == []
    assert bool(table.notes) == ("commas" in name or "excel" in name or "units" in name), "what was assumed is said"


def test_json_and_compressed_tables(tmp_path):
    lines = "".join(json.dumps(nested(*run)) + "\n" for run in RUNS)
    for name, content in {
        "runs.jsonl": lines,
        "runs.json": json.dumps([nested(*run) for run in RUNS]),
        "runs.csv.gz": gzip.compress(POINTS.encode()),
        "runs.jsonl.gz": gzip.compress(lines.encode()),
    }.items():
        table = read(tmp_path, content, name)
        np.testing.assert_allclose([table.params, table.tokens, table.loss], [PARAMS, TOKENS, LOSS])


def test_a_history_gives_the_last_step_of_every_run_and_says_so(tmp_path, isoflop):
    steps = [(f"run {i}", step, n, d * step / 30, loss + 1 - step / 30) for i, (n, d, loss) in enumerate(RUNS)
             for step in (10, 20, 30)]  # fmt: skip
    lines = "".join(f"{name},{step},{n},{d},{loss}\n" for name, step, n, d, loss in reversed(steps))
    lines += "run 0,40,1.3e9,3.5e10,\n"  # a step that has no validation loss
    table = read(tmp_path, "Name,_step,params,tokens,val/loss\n" + lines)
    np.testing.assert_allclose(sorted(table.loss), LOSS)
    np.testing.assert_allclose(sorted(table.tokens), sorted(TOKENS))
    assert len(table.dropped) == 7
    assert table.dropped[0].reason == "an earlier step of run 'run 2'"
    assert table.notes == ["of 10 rows the last step of 3 runs is taken"]
    code, _, err = isoflop("scaling", "fit", tmp_path / "runs.csv", "--bootstraps", 5)
    assert code == 2
    assert "the last step of 3 runs is taken" in err


def test_what_is_missing_is_dropped_and_listed(tmp_path):
    markers = ["", "nan", "NaN", "N/A", "#N/A", "null", "None", "-", "inf", "Infinity", "-inf"]
    rows = "".join(f"1e8,{i + 1}e9,{marker}\n" for i, marker in enumerate(markers))
    table = read(tmp_path, POINTS + rows + "1.3B,26B,2.85\n")
    assert len(table) == 3
    assert [item.row for item in table.dropped] == list(range(4, 5 + len(markers)))
    assert table.dropped[-1].reason == "exact duplicate of row 1"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (POINTS.replace("2.85", '"2,85"'), r"decimal commas \('2,85' in row 1.*decimal points \('1.3B' in row 1"),
        (POINTS.replace("2.85", "35%"), "row 1: column 'loss' holds '35%'.*without a per cent sign"),
        (POINTS.replace("124M", '"1,24,000"'), "row 2: column 'params' holds '1,24,000'"),
        ("Step,a - val/loss,a - val/loss__MIN,a - val/loss__MAX\n1,2,2,2\n", "chart's export.*'a - val/loss'.*one row"),
        ("params,tokens,train/loss\n1e6,1e8,3\n", "no column 'loss'.*'train/loss' is a training loss"),
        (POINTS.encode("utf-16-le"), "holds zero bytes; save it as CSV in UTF-8"),
        (POINTS.replace("params", "größe").encode("cp1252"), "not UTF-8 text.*save it as CSV in UTF-8"),
        (POINTS.replace("2.85", "2.85,7"), "row 1: 4 cells where the header has 3; quote cells"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_refused_in_one_sentence(tmp_path, content, message):
    with pytest.raises(InputError, match=message) as refusal:
        read(tmp_path, content)
    assert "\n" not in str(refusal.value)


def test_damaged_archives_and_sheets_are_refused(tmp_path):
    for name, content, message in (
        ("runs.csv.gz", gzip.compress(POINTS.encode())[:-9], "not a whole gzip file"),
        ("plain.csv.gz", POINTS, "not a whole gzip file"),
        ("runs.json", '{"params": 1}', "should be a list of objects"),
        ("runs.json", "[1,", "not valid JSON"),
        ("runs.xlsx", "x", "save the sheet as .csv"),
    ):
        with pytest.raises(InputError, match=message):
            read(tmp_path, content, name)
