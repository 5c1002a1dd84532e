"""Tables of runs: what is read, what is dropped, what is refused, and the JSON that comes out."""

import json
import re

import numpy as np
import pytest

from experiments.scaling.fit import fit_both
from experiments.scaling.rows.table import DroppedRow, clean, read_table
from model.errors import InputError

ROWS = [(1e5, 2e6, 3.5), (2e5, 4e6, 3.25), (4e5, 8e6, 3.0)]


def write(path, text):
    path.write_text(text)
    return path


def csv_text(rows=ROWS, header="params,tokens,loss"):
    return header + "\n" + "".join(",".join(map(str, row)) + "\n" for row in rows)


def law_table(noise=0.003, exact=False):
    rng = np.random.default_rng(0)
    C = np.repeat(np.geomspace(3e12, 3e14, 4), 6)
    N = 0.07 * C**0.5 * np.tile(np.geomspace(1 / 6, 6, 6), 4)
    loss = 1.8 + 25 / N**0.3 + 60 / (C / 6 / N) ** 0.3
    return clean(N, C / 6 / N, loss * np.exp(rng.normal(0, noise, len(C))))


def test_every_format_reads_the_same(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    names = ("params", "tokens", "loss")
    records = [dict(zip(names, row, strict=True)) for row in ROWS]
    parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "runs.parquet")
    paths = [
        write(tmp_path / "runs.csv", "\ufeff" + csv_text()),
        write(tmp_path / "runs.tsv", csv_text().replace(",", "\t")),
        write(tmp_path / "semicolons.csv", csv_text().replace(",", ";")),
        write(tmp_path / "runs.jsonl", "\n".join(map(json.dumps, records)) + "\n\n"),
        tmp_path / "runs.parquet",
    ]
    for path in paths:
        table = read_table(path)
        np.testing.assert_array_equal(np.stack([table.params, table.tokens, table.loss], 1), ROWS)
        assert table.flops is None
        assert table.dropped == []


def test_columns_are_selectable(tmp_path):
    rows = [(*row, 6 * row[0] * row[1], "note") for row in ROWS]
    path = write(tmp_path / "runs.csv", csv_text(rows, "N,D,val_loss,C,comment"))
    table = read_table(path, params="N", tokens="D", loss="val_loss", flops="C")
    np.testing.assert_array_equal(table.flops, [row[3] for row in rows])


def test_usual_names_stand_in_for_ours_where_one_alone_does(tmp_path):
    path = write(tmp_path / "runs.csv", csv_text(header="Model Size,training_tokens,val_loss"))
    table = read_table(path)
    np.testing.assert_array_equal(table.loss, [row[2] for row in ROWS])
    assert table.columns == {"params": "Model Size", "tokens": "training_tokens", "loss": "val_loss"}
    both = write(tmp_path / "both.csv", csv_text([(*row, 1) for row in ROWS], "N,model_size,tokens,loss"))
    with pytest.raises(InputError, match=r"'N' as well as 'model_size' could be it; name one with --columns\.params"):
        read_table(both)
    assert read_table(both, params="N", tokens="tokens", loss="loss").columns["params"] == "N"
    compute = write(tmp_path / "compute.csv", csv_text(header="N,C,ppl"))
    with pytest.raises(InputError, match=r"no column 'tokens' or 'loss'.*not worked out from FLOPs.*in nats"):
        read_table(compute)


def test_counts_may_have_suffixes(tmp_path):
    path = write(tmp_path / "runs.csv", "params,tokens,loss\n70M,1.4B,3.5\n1.2e9,2T,2\n500K,64k,4\n")
    table = read_table(path)
    np.testing.assert_allclose(table.params, [7e7, 1.2e9, 5e5])
    np.testing.assert_allclose(table.tokens, [1.4e9, 2e12, 6.4e4])
    for cell in ('"1,00,0"', '"1,,5"', "7M2", "3G"):
        bad = write(tmp_path / "bad.csv", f"params,tokens,loss\n1e6,{cell},3\n")
        message = "1,300,000 for a count" if "," in cell else "should be a number"
        with pytest.raises(InputError, match=f"row 1: column 'tokens'.*{message}"):
            read_table(bad)
    with pytest.raises(InputError, match=r"'loss' should be a number, such as 3\.25, but holds '3K'"):
        read_table(write(tmp_path / "loss.csv", "params,tokens,loss\n1e6,1e7,3K\n"))


def test_unique_tokens_and_active_params_reach_their_forms(tmp_path):
    """From a file to the law of repeated data and to the law of experts."""
    from experiments.scaling.forms.fit import fit_form

    rng = np.random.default_rng(0)
    U = np.exp(rng.uniform(np.log(1e7), np.log(1e9), 60))
    D, N, G = (
        U * np.exp(rng.uniform(0, 4, 60)),
        np.exp(rng.uniform(np.log(1e6), np.log(1e9), 60)),
        rng.choice([1, 4, 16], 60),
    )
    fresh = U * (1 + 15 * (1 - np.exp(-(D / U - 1) / 15)))
    loss = 1.8 + 25 / N**0.3 + 60 / fresh**0.3
    rows = zip(N * G, N, D, U, loss, ["true"] * 60, strict=True)
    path = write(tmp_path / "runs.csv", csv_text(rows, "params,active_params,tokens,unique_tokens,loss,repeated"))
    named = {"unique_tokens": "unique_tokens", "active_params": "active_params"}
    table = read_table(path, params="active_params", unique_tokens="unique_tokens", keep_repeated=True)
    fit = fit_form("repeated-data", table, bootstraps=1)
    assert fit.values["R_D"] == pytest.approx(15, rel=1e-3)
    with pytest.raises(InputError, match="needs a column 'active_params'"):
        fit_form("experts", table, bootstraps=1)
    experts = read_table(path, **named, keep_repeated=True)
    np.testing.assert_allclose(experts.params / experts.active_params, G)
    assert len(fit_form("experts", experts, bootstraps=1).rows) == 60
    assert len(read_table(path, **named).loss) == 0, "repeated rows are dropped unless kept"


def test_held_out_rows_are_kept_for_whoever_asks(tmp_path):
    path = write(
        tmp_path / "runs.csv", csv_text([(*row, i == 1) for i, row in enumerate(ROWS)], "params,tokens,loss,held_out")
    )
    assert read_table(path).dropped == [DroppedRow(2, "held out")]
    assert len(read_table(path, keep_held_out=True)) == 3


def test_unusable_rows_are_dropped_by_rule_and_listed(tmp_path):
    bad = [
        ("1e5,2e6,nan,", "not finite"),
        ("1e5,2e6,inf,", "not finite"),
        ("1e5,2e6,,", "not finite"),
        ("1e5,2e6,0,", "not positive"),
        ("-1,2e6,3.5,", "params is not positive"),
        ("1e5,0,3.5,", "tokens is not positive"),
        ("100000,2000000,3.50,", "duplicate of row 1"),
        ("1e5,3e6,3.4,True", "repeated data"),
    ]
    lines = ["params,tokens,loss,repeated", "1e5,2e6,3.5,false", *(line for line, _ in bad)]
    path = write(tmp_path / "runs.csv", "\n".join(lines))
    table = read_table(path)
    assert len(table) == 1
    assert [item.row for item in table.dropped] == list(range(2, 10))
    for item, (_, reason) in zip(table.dropped, bad, strict=True):
        assert reason in item.reason
    assert len(read_table(path, keep_repeated=True)) == 2


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("empty.csv", "", "is empty"),
        ("blank.csv", "\n \n", "is empty"),
        ("header.csv", "params,tokens,loss\n", "no rows"),
        ("text.csv", csv_text([*ROWS, (1e5, 2e6, "diverged")]), r"row 4: column 'loss'.*'diverged'"),
        ("missing.csv", csv_text(header="Parms,tokenz,loss"), r"no column 'params' or 'tokens'.*'tokenz' for"),
        ("ragged.csv", csv_text() + "1,2\n", "row 4: 2 cells where the header has 3"),
        ("twice.csv", csv_text(header="params,params,loss"), "more than once"),
        ("broken.jsonl", '{"params": 1}\n{oops', "row 2: not valid JSON"),
        ("list.jsonl", "[1, 2]\n", "one JSON object"),
        ("bool.jsonl", '{"params": true, "tokens": 1, "loss": 2}', "row 1: column 'params'"),
        ("truth.csv", "params,tokens,loss,repeated\n1,2,3,maybe\n", "'repeated' should be true or false"),
        ("runs.xlsx", "x", "unknown suffix '.xlsx'"),
        ("fake.parquet", "not parquet", "not a readable Parquet"),
    ],
)
def test_bad_files_are_refused_in_one_sentence(tmp_path, name, text, message):
    with pytest.raises(InputError) as error:
        read_table(write(tmp_path / name, text))
    assert re.search(message, str(error.value))
    assert "\n" not in str(error.value)


def test_missing_folder_and_binary_files_are_refused(tmp_path):
    with pytest.raises(InputError, match="there is no file"):
        read_table(tmp_path / "absent.csv")
    with pytest.raises(InputError, match="not a file"):
        read_table(tmp_path)
    (tmp_path / "binary.csv").write_bytes(b"\xc3\x28\x00\x01")
    with pytest.raises(InputError, match="not UTF-8"):
        read_table(tmp_path / "binary.csv")


def test_without_pyarrow_the_message_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(InputError, match=r"isoflop\[parquet\]"):
        read_table(write(tmp_path / "runs.parquet", "x"))


@pytest.fixture(scope="module")
def fits():
    return fit_both(law_table(), bootstraps=50)


def test_the_json_contract(fits):
    document = fits.document()
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    assert document["schema_version"] == 1
    assert set(document) >= {"convention", "parametric", "isoflop", "dropped", "refused"}
    parametric, isoflop = document["parametric"], document["isoflop"]
    names = {"E", "A", "B", "alpha", "beta", "a", "b"}
    assert set(parametric) >= names | {"objective", "starts", "starts_at_best"}
    assert set(parametric["intervals"]) == names
    assert set(isoflop["intervals"]) == {"a", "b"}
    for intervals in (parametric["intervals"], isoflop["intervals"]):
        for by_level in intervals.values():
            assert set(by_level) == {"80", "95"}
            assert all(low <= high for low, high in by_level.values())
    assert all(set(best) >= {"flops", "params", "tokens", "loss"} for best in isoflop["optima"])
    assert parametric["a"] == pytest.approx(0.5, abs=0.05)
    assert isoflop["a"] == pytest.approx(0.5, abs=0.05)


def test_a_refused_estimator_is_null_with_its_reason():
    table = law_table()
    one_budget = clean(table.params[:6], table.tokens[:6], table.loss[:6])
    document = fit_both(one_budget, bootstraps=20).document()
    assert document["parametric"] is None
    assert document["isoflop"] is None
    assert "one line" in document["refused"]["parametric"]
    assert "1 of 1 budget with a minimum" in document["refused"]["isoflop"]
    with pytest.raises(InputError, match="delta"):
        fit_both(table, delta=-1)


def test_the_command_writes_json_and_a_figure(tmp_path, capsys):
    from experiments.commands.scaling.fit import fit

    table = law_table()
    path = write(tmp_path / "runs.csv", csv_text(zip(table.params, table.tokens, table.loss, strict=True)))
    few = {"forms": ("chinchilla", "no-floor"), "bootstraps": 5}
    fit(path, **few, json=tmp_path / "fit.json", plot=tmp_path / "fit.svg")
    assert json.loads((tmp_path / "fit.json").read_text())["parametric"]["starts"] == 49
    first = (tmp_path / "fit.svg").read_text()
    assert first.startswith("<svg ")
    said = " ".join(capsys.readouterr().out.split())
    assert "IsoFLOP" in said
    assert re.search(r"by form of law .* chinchilla \d.* no-floor \d.*chinchilla.*: .* with .*alpha 0\.\d", said)
    fit(path, **few, plot=tmp_path / "fit.svg")
    assert (tmp_path / "fit.svg").read_text() == first, "the same fit draws the same bytes"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["fit.json", "fit.svg", "runs.csv"]
    with pytest.raises(InputError, match="cannot write"):
        fit(path, **few, json=path / "below-a-file" / "fit.json")
    with pytest.raises(InputError, match="suffix"):
        fit(path, plot=tmp_path / "fit.gif")


def test_every_figure_draws(fits):
    from experiments.report.style import svg
    from experiments.scaling.figures import laws

    figures = [
        laws.valleys(fits.isoflop),
        *laws.compute_optimal(fits.isoflop),
        laws.overview(None, fits.parametric),
        laws.measured_predicted(fits.parametric, [{"params": 1e7, "tokens": 1e8, "loss": 2.3}]),
        *laws.residuals(fits.parametric),
    ]
    for figure in figures:
        assert svg(figure, "a <label>").count("a &lt;label&gt;") == 1
