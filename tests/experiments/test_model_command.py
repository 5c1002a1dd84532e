"""`isoflop model list` and `show`: the numbers are those of the books, and a reader finds them."""

import json

import pytest

from model import ModelConfig, accounting, presets


def lines_of(out: str) -> dict[str, str]:
    """A table's rows by their first words, which stand two spaces or more before the numbers."""
    rows = [line.strip().split("  ", 1) for line in out.splitlines() if "  " in line.strip()]
    return {row[0].strip(): row[1].strip() for row in rows}


def test_list_has_a_line_for_every_preset_that_fits_a_terminal(isoflop, tmp_path):
    code, out, _ = isoflop("model", "list", "--json", tmp_path / "list.json")
    assert code == 0
    words = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line.strip()}
    assert set(presets.names()) <= set(words)
    table = out[: out.index("Parameters count")]
    assert max(map(len, table.splitlines())) <= 80
    assert words["llama2-70b"] == ["80", "8192", "64", "8", "4k", "32,000", "69.0B", "320", "KiB"]
    assert words["mixtral-8x7b"][6:8] == ["46.7B", "12.9B"]
    assert words["t5-base"][0] == "12+12"
    assert words["bert-base"][-1] == "none"

    document = json.loads((tmp_path / "list.json").read_text())
    assert document["schema_version"] == 1
    rows = {row["name"]: row for row in document["presets"]}
    assert tuple(rows) == presets.names()
    for name, row in rows.items():
        config = presets.get(name)
        assert row["parameters"] == accounting.parameters(config).total
        assert row["active"] == accounting.parameters(config).active
        assert row["cache_bytes_per_token"] == accounting.kv_cache_bytes(config, 1, 1, "bfloat16")
    assert rows["llama2-7b"]["released_parameters"] == 6_738_415_616
    assert rows["tiny"]["released_parameters"] is None


def test_show_explains_one_preset(isoflop, tmp_path):
    call = ("model", "show", "mixtral-8x7b", "--seq-len", 4096, "--batch", 8, "--json", tmp_path / "one.json")
    code, out, _ = isoflop(*call)
    assert code == 0
    document = json.loads((tmp_path / "one.json").read_text())
    config = presets.get("mixtral-8x7b")
    books = accounting.parameters(config)
    assert document["parameters"]["by_group"] == books.by_group
    assert sum(document["parameters"]["by_group"].values()) == document["parameters"]["total"] == books.total
    assert document["published"]["parameters"] == books.total
    flops = document["flops_per_token"]
    assert flops["training FLOPs per token (6N)"] == 6 * books.active
    assert flops["training FLOPs per token (exact)"] == accounting.flops_per_token(config, 4096)
    assert 3 * sum(document["forward_flops_exact_by_product"].values()) == accounting.flops_per_token(config, 4096)
    assert document["training_bytes"] == accounting.training_bytes(config)
    assert document["serving_bytes"] == accounting.serving_bytes(config, 8, 4096, "bfloat16")
    assert ModelConfig.from_dict(document["config"]) == config

    lines = lines_of(out)
    assert lines["total"].startswith(f"{books.total:,}")
    assert lines["active per token"].startswith(f"{books.active:,}")
    assert lines["published"].endswith("the same")
    assert "mistralai/Mixtral-8x7B-v0.1" in out
    assert lines["experts"].startswith(f"{32 * 2 * 2 * 3 * 4096 * 14_336:,}")
    assert lines["serving 8 × 4,096 tokens in bfloat16"].startswith(f"{2 * books.total + 8 * 4096 * 32 * 4096:,}")


def test_shown_fields_are_what_set_takes(isoflop, tmp_path):
    """Every field shown, given to --set on another preset of the same stack, makes the shown architecture."""
    _, out, _ = isoflop("model", "show", "deepseek-v2-lite")
    settings = " ".join(out.split("\n\n")[0].splitlines()[1:]).split()
    code, _, error = isoflop("model", "show", "study-256", "--set", *settings, "--json", tmp_path / "made.json")
    assert code == 0, error
    made = ModelConfig.from_dict(json.loads((tmp_path / "made.json").read_text())["config"])
    assert made.replace(num_kv_heads=None) == presets.get("deepseek-v2-lite")


def test_a_changed_preset_is_not_compared_with_the_release(isoflop, tmp_path):
    call = ("model", "show", "gpt2-small", "--set", "num_layers=6", "--json", tmp_path / "half.json")
    code, out, _ = isoflop(*call)
    assert code == 0
    assert "published" not in out
    assert json.loads((tmp_path / "half.json").read_text())["published"] is None


def test_our_own_architecture_says_that_it_is_no_release(isoflop):
    _, out, _ = isoflop("model", "show", "flash-moe")
    assert "not a released model" in out
    assert "published  " not in out


def test_a_part_of_the_config_is_set_from_the_command_line(isoflop, tmp_path):
    experts = '{"count":4,"top_k":2,"d_ff":24}'
    assert isoflop("model", "show", "tiny", "--set", f"experts={experts}", "--json", tmp_path / "a.json")[0] == 0
    made = json.loads((tmp_path / "a.json").read_text())["parameters"]["by_group"]
    assert made["layers/experts"] == 2 * 4 * 3 * 16 * 24
    assert made["layers/router"] == 2 * 4 * 16
    fields = ("experts.count=4", "experts.top_k=2", "experts.d_ff=24")
    assert isoflop("model", "show", "tiny", "--set", *fields, "--json", tmp_path / "b.json")[0] == 0
    assert json.loads((tmp_path / "b.json").read_text())["parameters"]["by_group"] == made


def test_a_config_file_is_shown(isoflop, tmp_path):
    file = tmp_path / "model.json"
    file.write_text(json.dumps(presets.get("tiny").to_dict()))
    code, out, _ = isoflop("model", "show", file, "--json", tmp_path / "out.json")
    assert code == 0
    assert f"{accounting.parameters(presets.get('tiny')).total:,}" in out
    assert json.loads((tmp_path / "out.json").read_text())["published"] is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("llama2-8b",), ("llama2-8b", "llama2-7b")),
        (("tiny", "--seq-len", 100), ("100", "64", "max_seq_len=100")),
        (("tiny", "--batch", 0), ("--batch=0",)),
        (("nowhere.json",), ("nowhere.json",)),
    ],
)
def test_a_wrong_call_is_one_sentence(isoflop, arguments, words):
    code, out, error = isoflop("model", "show", *arguments)
    assert code == 2
    assert not out
    assert len(error.strip().splitlines()) == 1
    assert all(word in error for word in words)
