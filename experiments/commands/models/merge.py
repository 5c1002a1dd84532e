"""Implement `isoflop model merge`: merge a low-rank adapter into its model, or export the adapter alone."""

from pathlib import Path

import tyro

from experiments.commands.options import BasePath


def merge(
    source: tyro.conf.Positional[Path],
    target: tyro.conf.Positional[Path],
    *,
    adapter: Path | None = None,
    adapter_only: bool = False,
    base: BasePath = None,
) -> None:
    """Add a low-rank adapter to the matrices of its model, and write that as a Hugging Face folder.

    Example: isoflop model merge runs/lora out/merged

    Example: isoflop model merge smollm2 out/merged --adapter my-peft-adapter

    The tokenizer is written too. With --adapter-only the adapter of a run is written alone, in PEFT's format.

    Args:
        source: A run that trained an adapter (`isoflop train MODEL --lora RANK`), or, with --adapter, the adapter's
            base: a run, a Hugging Face folder or a GGUF file.
        target: The folder to make; it appears when it is complete.
        adapter: A folder in PEFT's format.
        adapter_only: Write the adapter of a run alone.
        base: The new path of a run's base weights, if they were moved (for a run that stores only what it trained).
    """
    from experiments.commands.models.convert import convert
    from experiments.models import copy_tokenizer
    from experiments.runs.started import check_target
    from model.convert import merge_adapter, save_peft
    from model.errors import InputError
    from model.runs import load_adapter, read_record

    if adapter is not None:
        if adapter_only:
            raise InputError(
                "--adapter-only is for the adapter of a run; the one given with --adapter has its own folder already"
            )
        check_target(source, target, source, base)
        merge_adapter(source, adapter, target, base)
        copy_tokenizer(source, target)
        print(f"{target}: {source} with {adapter}")
        return
    config, described, tree = load_adapter(source)
    if not adapter_only:
        convert(source, target, base=base)
        return
    save_peft(config, described, tree, target, base=base or read_record(source).get("weights"))
    print(f"{target}: rank {described.rank}, alpha {described.alpha:g}")
