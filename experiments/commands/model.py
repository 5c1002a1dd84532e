"""`isoflop model`: the architectures and their books."""

import tyro

from experiments.commands.options import JsonFile, Overrides


def list_presets(*, json: JsonFile = None) -> None:
    """All presets in a table.

    Example: isoflop model list

    Args:
        json: Also write the table to this file.
    """
    from rich.table import Table

    from experiments.commands.options import console, write_document
    from model import accounting, presets

    rows = []
    for name in presets.names():
        config = presets.get(name)
        rows.append(
            {
                "name": name,
                "layers": config.num_layers,
                "d_model": config.d_model,
                "heads": config.num_heads,
                "kv_heads": config.num_kv_heads,
                "context": config.max_seq_len,
                "vocabulary": config.vocab_size,
                "parameters": accounting.parameters(config).total,
                "cache_bytes_per_token": accounting.kv_cache_bytes(config, 1, 1),
            }
        )
    write_document(json, {"presets": rows})
    table = Table()
    for name in rows[0]:
        table.add_column(name.replace("_", " "), justify="left" if name == "name" else "right")
    for row in rows:
        table.add_row(*(value if isinstance(value, str) else f"{value:,}" for value in row.values()))
    console().print(table)


def show(
    preset: tyro.conf.Positional[str],
    *,
    set: Overrides = (),
    seq_len: int | None = None,
    batch: int = 1,
    json: JsonFile = None,
) -> None:
    """Parameters by group, FLOPs per token and cache of one architecture; no array is made.

    Example: isoflop model show gpt2-small --set num_layers=24 --seq-len 1024

    Args:
        preset: A preset (see `isoflop model list`) or a JSON file of a model config.
        set: Fields to change, such as num_layers=4.
        seq_len: Length that FLOPs and cache are counted at; the context by default.
        batch: Rows that the cache is counted for.
        json: Also write the numbers to this file.
    """
    from rich.table import Table

    from experiments.commands.options import console, read_config, write_document
    from model import accounting

    config = read_config(preset, set)
    seq_len = seq_len or config.max_seq_len
    counts = accounting.parameters(config)
    flops: dict[str, float] = {
        f"{mode} FLOPs per token ({convention})": accounting.flops_per_token(config, seq_len, convention, training)
        for mode, training in (("training", True), ("forward", False))
        for convention in ("6N", "exact")
    }
    document = {
        "config": config.to_dict(),
        "parameters": {
            "total": counts.total,
            "embedding": counts.embedding,
            "non_embedding": counts.non_embedding,
            "active": counts.active,
            "by_group": counts.by_group,
        },
        "seq_len": seq_len,
        "flops_per_token": flops,
        "forward_flops_exact_by_product": accounting.forward_flops_by_product(config, seq_len),
        "kv_cache_bytes": accounting.kv_cache_bytes(config, batch, seq_len),
    }
    write_document(json, document)
    out = console()
    out.print(config, highlight=False)
    table = Table(title=f"{preset} at {seq_len} tokens", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name, value in counts.by_group.items():
        table.add_row(f"parameters: {name}", f"{value:,}")
    table.add_row("parameters: total", f"{counts.total:,}")
    table.add_row("parameters: without embedding tables", f"{counts.non_embedding:,}")
    for label, flop in flops.items():
        table.add_row(label, f"{flop:,.0f}")
    table.add_row(f"KV cache of {batch} × {seq_len} tokens", f"{document['kv_cache_bytes']:,} bytes")
    out.print(table)
