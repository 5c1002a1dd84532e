"""Implement `isoflop model coordcheck` and `transfer`: checks that hyperparameters carry over to larger models."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from experiments.commands.options import JsonFile, Overrides

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from model import Execution, ModelConfig
    from model.config import Parameterization
    from train.config import Optimizer
else:
    Optimizer = str  # a Literal would import JAX for every command; TrainConfig checks the name

Folder = Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")]
Preset = Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="[PRESET]")]
Which = Literal["both", "standard", "mup"]


def coordcheck(
    preset: Preset = None,
    *,
    widths: tuple[int, ...] = (64, 128, 256, 512, 1024),
    depths: tuple[int, ...] = (),
    steps: int = 5,
    learning_rate: float = 3e-3,
    optimizer: Optimizer = "adamw",
    seeds: int = 2,
    parameterization: Which = "both",
    data: Folder = None,
    set: Overrides = (),
    out: Folder = None,
    json: JsonFile = None,
) -> None:
    """Check that activations keep their size as a model widens or deepens, in the standard parameterization and muP.

    Every size is trained a few steps on one batch; the table shows by which factor the activations of each layer, and
    their change during training, grow from the smallest to the largest size. muP's base is the smallest one.

    Example: isoflop model coordcheck --widths 64 256 1024 --steps 5 --out check

    Args:
        preset: A preset (see `isoflop model list`) or a JSON file of a model config; by default 3 layers, vocabulary
            256, heads of 16 features. Heads keep their size, all else grows in proportion.
        widths: d_model of the models.
        depths: Layers of the models: these vary instead of the width; under muP branches are scaled with depth.
        steps: Updates of each model.
        learning_rate: Of the smallest model and, before the table's multipliers, of all others; sgd wants about 0.1.
        optimizer: Any that `isoflop train` has, such as sgd or muon.
        seeds: Runs of each model; the table shows their means.
        parameterization: Compare both, or check one.
        data: A folder made by `isoflop data prepare` to take the batch from; random tokens by default.
        set: Fields to change, of the model or of how it runs, such as tie_embeddings=true remat=full.
        out: Write coordcheck.png and coordcheck.json into this folder.
        json: Also write every number to this file.
    """
    from experiments.commands.options import console, write_document
    from experiments.coordcheck import coordinate_check, coordinate_figure, growth, judge
    from model.errors import check_whole
    from train.progress import progress_bar

    check_whole("--steps", steps, 1)
    check_whole("--seeds", seeds, 1)
    config, execution, batch = _opened(preset, set, data)
    names = _parameterizations(parameterization)
    with progress_bar("coordinate check", 1.0) as advance:
        check = coordinate_check(
            config,
            depths or widths,
            axis="depth" if depths else "width",
            steps=steps,
            learning_rate=learning_rate,
            seeds=range(seeds),
            optimizer=optimizer,
            parameterizations=names,
            batch=batch,
            execution=execution,
            advance=advance,
        )
    document = check | {
        "growth": {name: {q: growth(check, name, q) for q in ("scale", "change")} for name in names},
        "verdict": {name: judge(check, name) for name in names},
    }
    write_document(json, document)
    if out is not None:
        _write(out, "coordcheck", coordinate_figure(check), document)
    _show_check(console(), document)


def transfer(
    preset: Preset = None,
    *,
    data: Path,
    out: Path,
    widths: tuple[int, ...] = (32, 64, 128),
    learning_rates: tuple[float, ...] = (0.00125, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08),
    steps: int = 250,
    seeds: int = 3,
    batch_size: int = 2,
    seq_len: int = 128,
    parameterization: Which = "both",
    set: Overrides = (),
    json: JsonFile = None,
) -> None:
    """Sweep the learning rate at several widths, in the standard parameterization and muP, to see if the best one
    moves.

    Example: isoflop model transfer --data data/sotu --out transfer

    Args:
        preset: A preset (see `isoflop model list`) or a JSON file of a model config; by default 3 layers with heads of
            16 features. Heads keep their size, all else grows in proportion.
        data: A folder made by `isoflop data prepare`.
        out: The folder for the runs, transfer.png and transfer.json; the same command again resumes.
        widths: d_model of the models; muP's base is the smallest.
        learning_rates: The grid, the same at every width.
        steps: Updates of each run: 5 % warm-up, then cosine to 0.
        seeds: Runs per setting.
        batch_size: Rows per step.
        seq_len: Tokens per row.
        parameterization: Compare both, or check one.
        set: Other fields of model, training or hyperparameters, such as optimizer=muon.
        json: Also write every number to this file.
    """
    from experiments.commands.options import console, write_document
    from experiments.inputs import read_changes
    from experiments.transfer import learning_rate_transfer, transfer_figure
    from train import HParams, Recipe, TrainConfig
    from train.data import load_manifest
    from train.overlay import overlay

    manifest = load_manifest(data)
    model = _model(preset).replace(vocab_size=manifest.vocab_size, eos_token_ids=(manifest.eos_id,))
    shape = TrainConfig(batch_size=batch_size, seq_len=seq_len)
    hparams = HParams(warmup_steps=max(1, steps // 20), final_fraction=0.0)
    recipe, execution = overlay(read_changes(set), Recipe(model.replace(max_seq_len=seq_len), shape, hparams))
    document = learning_rate_transfer(
        recipe.model,
        widths,
        learning_rates,
        train_config=recipe.train,
        base=recipe.hparams,
        execution=execution,
        steps=steps,
        seeds=range(seeds),
        data=data,
        folder=out,
        parameterizations=_parameterizations(parameterization),
    )
    write_document(json, document)
    _write(out, "transfer", transfer_figure(document), document)
    _show_transfer(console(), document)


def _parameterizations(which: Which) -> "tuple[Parameterization, ...]":
    return ("standard", "mup") if which == "both" else (which,)


def _model(preset: str | None) -> "ModelConfig":
    from experiments.coordcheck import DEFAULT
    from experiments.models import read_config

    return DEFAULT if preset is None else read_config(preset)


def _opened(preset: str | None, set: tuple[str, ...], data: Path | None) -> tuple["ModelConfig", "Execution", Any]:
    """Return the model, how it runs, and a batch of the data, if there are any."""
    from experiments.inputs import read_changes
    from train.data import Loader, load_manifest
    from train.overlay import overlay_program

    config = _model(preset)
    if data is not None:
        config = config.replace(vocab_size=load_manifest(data).vocab_size)
    config, execution = overlay_program(read_changes(set), config)
    if data is None:
        return config, execution, None
    return config, execution, Loader(data, batch_size=4, seq_len=min(32, config.max_seq_len), seed=0).batch(0)


def _write(folder: Path, name: str, figure: "Figure", document: dict[str, Any]) -> None:
    from experiments.commands.options import output, write_document

    with output(folder):
        folder.mkdir(parents=True, exist_ok=True)
        figure.savefig(folder / f"{name}.png", dpi=100)
    write_document(folder / f"{name}.json", document)


def _show_check(out: Any, document: dict[str, Any]) -> None:
    from experiments.commands.options import new_table
    from experiments.coordcheck import HOLDS, TITLES, at_the_end

    sizes, noun = document["sizes"], "d_model" if document["axis"] == "width" else "layers"
    for name, growth in document["growth"].items():
        rows = [row for row in document["table"] if row["parameterization"] == name]
        headings = (noun, *map(str, sizes), "growth", "growth of\nactivations")
        table = new_table(*headings, title=f"{TITLES[name]}: change since the start")
        for place, factor in growth["change"].items():
            values = [f"{at_the_end(row, 'change')[place]:.3g}" for row in rows]
            table.add_row(place, *values, f"×{factor:.2f}", f"×{growth['scale'][place]:.2f}")
        out.print(table)
        found = document["verdict"][name]
        what = f"{found['place']} changes ×{found['growth']:.2f} from {noun} {sizes[0]} to {sizes[-1]}"
        words = f"keeps its size within a factor {HOLDS:g}" if found["holds"] else "does not keep its size"
        out.print(f"{TITLES[name]}: {words}; most: {what}.", highlight=False, style="bold")
        out.print()
    if document["config"]["tie_embeddings"] and "mup" in document["verdict"]:
        text = (
            "Logits through a tied table are not judged under muP: what they start with shrinks as 1/√width by design."
        )
        out.print(text, highlight=False, style="dim")
    lines = "Root mean squares after the last step, means over seeds. Judged on the change: activations hide behind"
    out.print(f"{lines} what initialisation put there.", highlight=False, style="dim")


def _show_transfer(out: Any, document: dict[str, Any]) -> None:
    from experiments.commands.options import new_table
    from experiments.coordcheck import TITLES

    rates = document["learning_rates"]
    for name, spread in document["spread"].items():
        headings = ("width", *(f"{rate:.3g}" for rate in rates), "± seeds", "best", "per seed")
        table = new_table(*headings, title=f"{TITLES[name]}: validation loss (nats per token)")
        for cell in (cell for cell in document["cells"] if cell["parameterization"] == name):
            losses = ["diverged" if row["mean"] is None else f"{row['mean']:.3f}" for row in cell["settings"]]
            noise = "" if cell["seed_noise"] is None else f"{cell['seed_noise']:.3f}"
            best = "" if cell["winner"] is None else f"{cell['winner']['setting']['learning_rate']:.3g}"
            seeds = " ".join("edge" if rate is None else f"{rate:.3g}" for rate in cell["optimum_per_seed"])
            table.add_row(str(cell["width"]), *losses, noise, best, seeds)
        out.print(table)
        moved = "no width has one" if spread is None else f"moves by a factor {spread:.3g} over the widths"
        out.print(f"{TITLES[name]}: the best rate {moved}.", highlight=False, style="bold")
        out.print()
