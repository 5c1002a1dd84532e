"""Implement `isoflop study`: a complete scaling-law study."""

from pathlib import Path

from experiments.commands.options import JsonFile


def study(
    *,
    out: Path = Path("study"),
    minutes: float = 8.0,
    source: str = "sotu",
    vocab_size: int = 1024,
    batch_size: int | None = None,
    seq_len: int = 128,
    seed: int = 0,
    json: JsonFile = None,
) -> None:
    """Run a complete scaling-law study on this machine: data, sweep, ladder, fit, prediction, decode, report.

    A short probe measures this machine and sizes the compute budgets so that the study takes about `minutes`. It can be
    stopped at any time: the same command resumes it. The report is OUT/report.html.

    Example: isoflop study --minutes 8 --out study

    Args:
        out: The study's folder.
        minutes: Time limit in minutes; with more time larger models are measured.
        source: Corpus: sotu, stdlib, a folder of text files, a text, .jsonl or .parquet file, or
            hf:OWNER/NAME[/CONFIG][:SPLIT].
        vocab_size: Pieces of the tokenizer that is trained.
        batch_size: Rows per step; by default 2 on a CPU and 64 on an accelerator.
        seq_len: Tokens per row.
        seed: Seed of the ladder's runs; the sweep also uses seed + 1.
        json: Also write study.json's numbers to this file.
    """
    from experiments.commands.options import write_document
    from experiments.study import Settings, run_study

    document = run_study(out, Settings(source, minutes, vocab_size, batch_size, seq_len, seed))
    write_document(json, document)
    prediction, measured = document["prediction"], document["heldout"]
    print()
    if prediction["loss"] is not None and measured["loss"] is not None:
        low, high = prediction["interval_95"]
        print(
            f"predicted loss {prediction['loss']:.4f} (95 %: {low:.4f} … {high:.4f}), measured {measured['loss']:.4f}; "
            f"{prediction['compute_over_largest_fitted']:.1f} times the compute of the largest run in the fit"
        )
        by_form = ", ".join(f"{name} {loss:.4f}" for name, loss in prediction.get("by_form", {}).items())
        if by_form:
            forms = prediction["forms"]
            print(f"by form of law, fitted before: {by_form}; chosen then: {forms['winner']} ({forms['reason']})")
    print(f"{document['totals']['seconds'] / 60:.1f} minutes, {document['totals']['compiles']} compiled shapes")
    print(f"report: {(out / 'report.html').resolve()}")
