"""Implement `isoflop scaling plan`: the runs of a scaling study and their cost, before any is trained."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from experiments.commands.options import JsonFile
from experiments.words import counted

if TYPE_CHECKING:
    from experiments.scaling.study.cost import Hardware, StudyPlan
    from experiments.scaling.study.design import Design
    from experiments.scaling.study.rungs import Rung

Definition = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DESIGN.toml")]
OptionalDefinition = Annotated[tyro.conf.Positional[Path | None], tyro.conf.arg(metavar="DESIGN.toml")]
Folder = Annotated[Path, tyro.conf.arg(metavar="FOLDER")]
OptionalFolder = Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")]


def plan(
    design: OptionalDefinition = None,
    *,
    data: OptionalFolder = None,
    budgets: tuple[float, ...] = (),
    hours: float | None = None,
    branches: bool | None = None,
    law: str | None = None,
    device: str | None = None,
    devices: int | None = None,
    mfu: float | None = None,
    probe: bool = True,
    json: JsonFile = None,
) -> None:
    """Lay out the sizes and token counts of a scaling study around the expected optimum, with what every run costs.

    Only a few steps on random tokens are trained, to time this machine. Nothing is written. With --device the hours are
    for other hardware: exact FLOPs over devices · peak · MFU.

    Keys that the definition leaves out have the defaults of small studies; from a middle budget of 1e17 FLOPs on, or
    with --device, those of published models: the optimum by --law besiroglu, one layer per 64 to 128 of d_model, heads
    of 64 or more, rows of 2,048 tokens, rates and batches by DeepSeek-AI 2024. No definition at all: Llama 2's
    architecture.

    Example: isoflop scaling plan experiments/configs/sotu_ladder.toml --data data/sotu --hours 0.5

    Example: isoflop scaling plan --budgets 1e19 1e20 1e21 --devices 8 --device h100 --mfu 0.4

    Args:
        design: The study's definition (see `experiments/scaling/study/design.py` for its keys).
        data: A folder made by `isoflop data prepare`; without one the vocabulary is the base's, and epochs are unknown.
        budgets: FLOPs (6·N·D) of one run of each budget, instead of the definition's budgets or hours.
        hours: Hours of training on the machine, for all runs together, instead of the definition's budgets or hours.
        branches: Whether runs of one size branch off one base run with a cooldown, instead of the definition's setting.
        law: Where the optimum is expected: besiroglu (Besiroglu et al. 2024), or hoffmann-1, hoffmann-2, hoffmann-3
            (Hoffmann et al. 2022, by approach), instead of the definition's tokens per parameter.
        device: What the study is to run on, such as h100, a100, tpu-v5e (their peaks: `train/peak.py`).
        devices: With --device: how many; 1 by default.
        mfu: With --device: the share of their bfloat16 peak that exact FLOPs reach; 0.4 by default.
        probe: Time the training step of the smallest and the largest model; --no-probe gives no hours.
        json: Also write the plan to this file.
    """
    from experiments.commands.options import write_document
    from experiments.scaling.study.cost import plan_study
    from model.errors import InputError

    if design is None and not budgets and hours is None:
        raise InputError("give a DESIGN.toml, or the FLOPs of each budget, such as --budgets 1e19 1e20 1e21")
    hardware = _hardware(device, devices, mfu)
    asked = read_design(design, budgets=budgets, hours=hours, branches=branches, law=law, at_scale=hardware is not None)
    made = plan_study(asked, data, probe=probe, hardware=hardware)
    write_document(json, made.document())
    show_plan(made)


def _hardware(device: str | None, devices: int | None, mfu: float | None) -> "Hardware | None":
    from experiments.scaling.study.cost import Hardware
    from model.errors import InputError

    if device is None:
        if devices is not None or mfu is not None:
            raise InputError("--devices and --mfu are of a --device: name it, such as --device h100")
        return None
    return Hardware(device, 1 if devices is None else devices, 0.4 if mfu is None else mfu)


def read_design(
    path: Path | None,
    *,
    budgets: tuple[float, ...] = (),
    hours: float | None = None,
    branches: bool | None = None,
    law: str | None = None,
    at_scale: bool = False,
) -> "Design":
    """Return the design of a file (None: an empty one), with the command line's overrides.

    Raises InputError.
    """
    from experiments.scaling.study.design import Design
    from model.errors import InputError

    if budgets and hours is not None:
        raise InputError("--budgets and --hours both say how long a study is; give one")
    said = {"budgets": budgets or None, "hours": hours, "branches": branches, "law": law}
    instead = {name: value for name, value in said.items() if value is not None}
    return Design.read(path, at_scale=at_scale, **instead)


def show_plan(plan: "StudyPlan") -> None:
    """Print every run as a row, and the totals in a few lines."""
    from experiments.commands.options import console, new_table
    from experiments.words import bytes_in_words, count_in_words, hours_in_words

    out, hardware = console(), plan.hardware
    devices = 1 if hardware is None else hardware.devices
    names = ("run", "d_model", "layers", "N", "non-emb.", "D", "D/N", "epochs", "steps", "6ND", "exact", "rate")
    table = new_table(*names, "time", "state each" if hardware else "memory", "", title=summary(plan)[0])
    for row, after in zip(plan.rows, [*plan.rungs[1:], None], strict=True):
        rung = row.rung
        table.add_row(
            rung.name,
            str(rung.d_model),
            str(rung.config.num_layers),
            count_in_words(rung.params),
            count_in_words(rung.params_non_embedding),
            count_in_words(rung.tokens),
            f"{rung.tokens / rung.params:.3g}",
            "–" if rung.epochs is None else f"{rung.epochs:.2f}",
            f"{rung.steps:,}",
            f"{rung.flops_6nd:.2e}",
            f"{rung.flops_exact:.2e}",
            f"{rung.learning_rate:.2g}",
            hours_in_words(row.hours),
            bytes_in_words(row.state_bytes / devices if row.memory_bytes is None else row.memory_bytes),
            _remarks(rung),
            end_section=after is None or after.budget != rung.budget,
        )
    out.print(table)
    for line in summary(plan)[1:]:
        out.print(line, highlight=False, soft_wrap=True)


def _remarks(rung: "Rung") -> str:
    leaves = "" if rung.trunk is None else f"leaves {rung.trunk} at {rung.leave_step:,}"
    return ", ".join(
        part for part in ("held out" if rung.held_out else "", "repeated" if rung.repeated else "", leaves) if part
    )


def summary(plan: "StudyPlan") -> list[str]:
    """Return the plan as text: its size, its cost, what branches save, and its warnings."""
    from experiments.words import bytes_in_words
    from experiments.words import hours_in_words as hours

    total, design, alone = plan.total, plan.design, plan.without_branches
    hardware = plan.hardware
    where = "with one worker here"
    if hardware is not None:
        where = f"on {hardware.devices} × {hardware.device} at {hardware.mfu:.0%} of {_peak(hardware)} each"
    compiling = "" if hardware is not None else f", {hours(total.compile_hours)} of it compiling"
    budgets, held_out = len(design.budgets), design.held_out
    costs = [
        f"{counted(total.runs, 'run')} in {counted(total.compiles, 'static shape')}, compiled once",
        f"{total.tokens:.4g} tokens, {total.flops_6nd:.3g} FLOPs (6ND), {total.flops_exact:.3g} (exact)",
        f"{bytes_in_words(total.checkpoint_bytes)} of checkpoints",
        f"{hours(total.hours)} {where}{compiling}" if total.hours is not None else "",
    ]
    held = {0: "none", 1: "the largest"}.get(held_out, f"the largest {held_out}")
    lines = [f"{counted(budgets, 'budget')}, {held} held out"]
    lines.append("; ".join(part for part in costs if part))
    lines += _optima(plan)
    lines.append(_shapes(design))
    if alone is not None:
        saved = alone.saved
        time = "" if alone.hours is None else f", {hours(alone.hours)}"
        lines.append(
            f"without branches: {alone.flops_6nd:.3g} FLOPs (6ND){time}; branches save {saved.flops_6nd:.0%} of "
            f"the FLOPs, {saved.flops_6nd_fitted:.0%} of those of the fitted budgets"
        )
    if total.repeated:
        lines.append(
            f"{total.repeated} of the runs see some tokens more than once (an epoch is "
            f"{plan.tokens_per_epoch:,} tokens); such runs do not enter a fit"
        )
    if plan.tokens_per_epoch is None:
        lines.append(
            f"no --data: the vocabulary is the base's, {plan.vocab_size:,}, and epochs are not checked: whether "
            "runs see tokens more than once"
        )
    if hardware is not None:
        lines.append(
            "state each: a run's parameters and the optimizer's moments, spread over all devices (fsdp), without "
            "activations"
        )
    return lines


def _peak(hardware: "Hardware") -> str:
    return f"{hardware.peak_flops_per_second / 1e12:,.4g} TFLOP/s"


def _optima(plan: "StudyPlan") -> list[str]:
    """Return where the optima are expected, by whom, and how far a published law was fitted."""
    from experiments.words import count_in_words

    law, optima, middle = plan.law, plan.optima, plan.design.tokens_per_parameter
    if law is None:
        return [
            f"optimum expected at {middle:.3g} tokens per parameter at the middle budget; --law: by a published law"
        ]
    lines = [f"optima expected by --law {plan.design.law} ({law.source}), N with the embedding tables:"]
    lines += [
        f"  {one.flops:.3g} FLOPs: N {count_in_words(one.params)}, D {count_in_words(one.tokens)}, "
        f"{one.tokens / one.params:.3g} tokens per parameter"
        for one in optima
    ]
    low, high = law.fitted
    if not all(0.99 * low <= one.flops <= 1.01 * high for one in optima):
        lines.append(f"that law was fitted to budgets of {low:.1g} … {high:.1g} FLOPs; beyond them it is extrapolated")
    return lines


def _shapes(design: "Design") -> str:
    family = design.family
    depth = "a layer per 64 to 128 of d_model" if family.depth == "published" else "the base's depth"
    if family.aspect_ratio:
        depth = f"a layer per {family.aspect_ratio:g} of d_model"
    heads = f"heads of {family.head_dim}" if family.head_dim else "as many heads as the base"
    wide = f", d_ff in multiples of {family.ff_multiple}" if family.ff_multiple else ""
    return f"shapes: {design.base} with {depth}, {heads}{wide}; rows of {design.seq_len:,} tokens"
