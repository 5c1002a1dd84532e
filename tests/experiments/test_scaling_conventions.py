"""One set of runs under every convention: each exponent is the one that its convention's law has."""

import numpy as np
import pytest

from experiments.scaling.rows.conventions import Counts, conventions, count, read_counts
from model import accounting, presets
from model.errors import InputError


def made(gamma=0.9, noise=0.0):
    """A law in non-embedding N; the total is larger by a power of it, and exact FLOPs per token go as N^gamma."""
    rng = np.random.default_rng(0)
    budgets = np.geomspace(1e18, 1e21, 4)[:, None]  # in 6·N·D of the total
    # The optimum of A·N^-α + B·D^-β at D ∝ N^-0.8, where the windows stand.
    best = (budgets / 300) ** (0.28 / (0.34 + 0.8 * 0.28)) * (0.34 * 400 / (0.8 * 0.28 * 410)) ** (
        1 / (0.34 + 0.8 * 0.28)
    )
    N = (best * np.geomspace(1 / 4, 4, 7)).ravel()
    total = 50 * N**0.8
    D = np.repeat(budgets, 7) / 6 / total
    loss = (1.7 + 400 * N**-0.34 + 410 * D**-0.28) * np.exp(rng.normal(0, noise, len(N)))
    params = {"params_total": total, "params_non_embedding": N}
    return Counts(D, loss, params, {"flops_exact": 9 * N**gamma * D})


def test_each_convention_has_its_own_exponents():
    document = conventions(made(), bootstraps=20).to_dict()
    rows = {(row["params"], row["flops"]): row for row in document["rows"]}
    assert len(rows) == 4
    expected = {
        ("params_non_embedding", "6·N·D"): 0.28 / (0.34 + 0.28),
        ("params_total", "6·N·D"): 0.28 / (0.34 / 0.8 + 0.28),
        ("params_non_embedding", "flops_exact"): 0.28 / (0.34 + 0.9 * 0.28),
        ("params_total", "flops_exact"): 0.28 / (0.34 / 0.8 + 0.9 / 0.8 * 0.28),
    }
    for key, a in expected.items():
        assert rows[key]["parametric"]["a"] == pytest.approx(a, rel=1e-4)
        assert rows[key]["isoflop"]["a"] == pytest.approx(a, abs=0.01), "a valley off centre has a little bias"
    moved = max(expected.values()) - min(expected.values())
    assert document["spread"]["parametric"]["a"] == pytest.approx(moved, rel=1e-3)


def test_rows_that_are_not_numbers_are_dropped_and_listed():
    counts = made(noise=0.002)
    counts = Counts(counts.tokens, counts.loss, {"params_total": counts.params["params_total"]}, {})
    counts.loss[3] = np.nan
    document = conventions(counts, bootstraps=20).to_dict()
    assert document["dropped"] == [{"row": 4, "reason": "loss is not a positive number"}]
    assert all(row["isoflop"]["intervals"]["a"]["95"][0] < row["isoflop"]["a"] for row in document["rows"])


def test_counts_agree_with_the_books():
    config = presets.get("tiny").replace(tie_embeddings=False)
    counted = count(config, 64)
    books = accounting.parameters(config)
    assert counted["params_total"] == books.total
    assert counted["params_non_embedding"] - counted["params_without_head"] == config.d_model * config.vocab_size
    pairwise = counted["flops_exact"] - counted["flops_without_attention"]
    assert pairwise == 3 * config.num_layers * 2 * 2 * 64 * config.num_heads * config.head_dim
    tied = count(config.replace(tie_embeddings=True), 64)
    assert tied["params_non_embedding"] == tied["params_without_head"]


def test_a_table_gives_the_conventions_that_it_has_columns_for(tmp_path):
    table = tmp_path / "runs.csv"
    table.write_text("params_total,tokens,loss\n10,20,3\n11,21,2.9\n")
    counts = read_counts(table)
    assert (list(counts.params), list(counts.flops)) == (["params_total"], [])
    document = conventions(counts).to_dict()
    assert document["rows"][0]["parametric"] is None
    assert "2 usable runs" in document["rows"][0]["refused"]["parametric"]
    table.write_text("tokens,loss\n20,3\n")
    with pytest.raises(InputError, match="at least one column of params_total"):
        read_counts(table)
