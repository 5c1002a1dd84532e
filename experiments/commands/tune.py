"""`isoflop tune`: fine-tune a stored model on conversations, preferences or ratings."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from experiments.commands.options import JsonFile, OptionalMetric, Overrides

if TYPE_CHECKING:
    from train import Recipe, Result


def tune(
    method: tyro.conf.Positional[str],
    model: tyro.conf.Positional[Path],
    *,
    data: Path,
    out: Path,
    lora: int | None = None,
    steps: int | None = None,
    epochs: float = 1.0,
    learning_rate: float | None = None,
    batch_size: int = 8,
    seq_len: int | None = None,
    mix: str | None = None,
    forgetting: Path | None = None,
    seed: int = 0,
    set: Overrides = (),
    precision: Literal["auto", "float32", "bfloat16"] = "auto",
    mesh: str | None = None,
    microbatch: str | None = None,
    evaluate_every: int = 0,
    evaluate_tokens: int = 65_536,
    evaluate_tasks: tuple[str, ...] = (),
    evaluate_task_items: int = 500,
    checkpoint_every: int = 0,
    checkpoint_seconds: float = 60.0,
    keep_best: OptionalMetric = False,
    patience: int = 0,
    wandb: str | None = None,
    json: JsonFile = None,
) -> None:
    """Fine-tune a model on data of `isoflop data prepare --kind`; the same command again resumes it.

    Example: isoflop tune sft models/SmolLM2.gguf --data data/chats --out runs/sft --lora 16

    Example: isoflop tune dpo runs/sft --data data/pairs --out runs/dpo --lora 16 --set beta=0.05

    Example: isoflop tune reward runs/sft --data data/pairs --out runs/reward --keep-best validation_accuracy
    --evaluate-every 20

    Args:
        method: sft (kind=chat); reward, a model that gives answers numbers (kind=preference); kto (kind=rated or
            preference); or a loss over pairs (kind=preference): dpo, cdpo, robust, ipo, hinge, normalized, simpo, orpo,
            cpo, exo_pair, nca_pair, bco_pair, sppo_hard, aot, aot_unpaired, apo_zero, apo_down, discopop.
        model: A run, a Hugging Face folder or a GGUF file.
        data: A folder made by `isoflop data prepare --kind` with the model's tokenizer. The log-probabilities that
            the model gives its answers are computed once, where the method compares with them, and kept in it.
        out: The run directory. `isoflop generate`, `eval` and `tune` open it like any model.
        lora: Train a low-rank adapter of this rank, with alpha as large (--set lora_alpha=32 changes it).
        steps: Updates to make.
        epochs: Passes over the data, where --steps is not given.
        learning_rate: The peak, after a warm-up of 5 % and before a linear decay to 0; by default 2e-5 for sft, 1e-5
            for reward, 1e-6 for the others, and ten times as much with --lora.
        batch_size: Rows per step; of examples with two answers, pairs.
        seq_len: Tokens per row; by default what the longest example takes.
        mix: FOLDER=SHARE of plain text, from which this share of sft's rows is drawn, against forgetting.
        forgetting: A folder of plain text whose bits per byte are measured before and after.
        seed: Of the adapter or the new head, dropout and data order.
        set: Any other field, such as beta=0.2 label_smoothing=0.1 schedule=cosine lora_alpha=32
            objective.divergence=js_divergence objective.base_weights=int4 accumulate=4.
        precision: Of products and activations. auto: bfloat16 on GPUs and TPUs, float32 on CPUs.
        mesh: Devices to train on, such as data=2,fsdp=4; all on data by default.
        microbatch: Rows of a batch that are computed at once, or auto: as many as the device's memory holds.
        evaluate_every: Steps between validations; 0 validates at the end only.
        evaluate_tokens: Tokens of the validation split, the same each time.
        evaluate_tasks: Tasks that every validation also scores, as in `isoflop train`.
        evaluate_task_items: Questions of each of these tasks, the same each time.
        checkpoint_every: Steps between checkpoints; 0 saves by time alone.
        checkpoint_seconds: Seconds between checkpoints.
        keep_best: The best validation's checkpoint stays, by METRIC of metrics.jsonl or validation_loss.
        patience: The run ends after so many validations in a row that do not improve --keep-best's metric; 0: never.
        wandb: A Weights & Biases project that gets the metrics too.
        json: Also write the result to this file.
    """
    from experiments.commands.options import say_unused, write_document
    from experiments.commands.train import dtype_of, report_result, say_tasks, warn_about_limits
    from experiments.evaluate.in_training import task_sets
    from experiments.evaluate.loss import bits_per_byte
    from experiments.inputs import read_changes
    from experiments.tuning import Tuning, read_mix
    from experiments.words import say
    from model import Execution
    from model.sharding import parse_mesh
    from train import RunOptions
    from train import train as run_training
    from train.data import load_manifest
    from train.overlay import overlay

    if steps is not None:
        say_unused("with --steps", tune, epochs=epochs)
    tuning = Tuning(
        method,
        model,
        data,
        lora=lora,
        steps=steps,
        epochs=epochs,
        learning_rate=learning_rate,
        batch_size=batch_size,
        seq_len=seq_len,
        mix=None if mix is None else read_mix(mix),
        seed=seed,
    )
    recipe = tuning.recipe(dtype_of(precision))  # before anything that takes time
    tuning.keep_reference()
    before = None if forgetting is None else bits_per_byte(model, forgetting)
    recipe, execution = overlay(
        read_changes(set),
        recipe,
        Execution(mesh=parse_mesh(mesh) if mesh else None),
    )
    options = RunOptions(
        evaluate_every=evaluate_every,
        evaluate_tokens=evaluate_tokens,
        tasks=task_sets(evaluate_tasks, data, evaluate_task_items),
        checkpoint_every=checkpoint_every,
        checkpoint_seconds=checkpoint_seconds,
        keep_best=keep_best,
        patience=patience,
        microbatch=microbatch,
        announce=True,
        wandb=wandb,
        description=f"{method} of {model}",
    )
    warn_about_limits(options, load_manifest(data), recipe)
    result = run_training(recipe, run=out, shell=options, execution=execution)
    document = report_result(result, None, recipe)
    say_tasks(result, options)
    if remark := _both_fell(result, recipe):
        say(remark)
    if forgetting is not None:
        after = bits_per_byte(Path(result.run), forgetting)
        document["forgetting"] = {"data": str(forgetting), "before": before, "after": after}
        print(f"{result.run}: {before:.4f} bits per byte of {forgetting} before, {after:.4f} after")
    write_document(json, document)


def _both_fell(result: "Result", recipe: "Recipe") -> str | None:
    """Return a remark if the chosen answers became less likely too, though the margin may have grown."""
    from train.objectives.preference import ReferencedObjective
    from train.run.metrics import open_metrics

    objective, lines = recipe.objective, open_metrics(result.run).lines
    if not (isinstance(objective, ReferencedObjective) and objective.compares and lines):
        return None
    last: dict[str, Any] = lines[-1]
    chosen, rejected = (last.get(f"validation_{side}_reward") for side in ("chosen", "rejected"))
    if chosen is None or rejected is None or max(chosen, rejected) >= 0:
        return None
    return (
        f"both rewards fell below 0 (chosen {chosen:.3f}, rejected {rejected:.3f}): the chosen answers are less likely "
        "than before, too; a larger beta, a smaller rate or --set nll_weight=1 keeps them"
    )
