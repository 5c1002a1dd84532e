"""A study's stages as commands for the shell, so that each can be repeated and changed by hand."""

import json
import shlex
from pathlib import Path
from typing import Any

from model import ModelConfig, presets

Command = dict[str, str]


def commands(folder: Path, document: dict[str, Any]) -> list[Command]:
    """{what, text} per stage, with the numbers of this study; stages that found nothing are left out."""
    settings, plan = document["settings"], document.get("plan") or {}
    winner = (document.get("sweep") or {}).get("winner")
    shape = f"--batch-size {settings['batch_size']} --seq-len {settings['seq_len']}"
    listed = [
        _command(
            "All of it",
            f"isoflop study --source {shlex.quote(settings['source'])} --minutes {settings['minutes']:g} "
            f"--vocab-size {settings['vocab_size']} {shape} --seed {settings['seed']} --out study",
        ),
        _command(
            "Data",
            f"isoflop data prepare {shlex.quote(settings['source'])} --out data --vocab-size {settings['vocab_size']}",
        ),
    ]
    if document.get("sweep"):
        listed.append(_sweep(document["sweep"], shape))
    if winner is not None and plan:
        file = f"cat > ladder.toml <<'END'\n{_design(settings, plan, winner['setting'])}END\n"
        listed += [
            _command(
                "What a ladder of these budgets would train", "isoflop scaling plan ladder.toml --data data", file
            ),
            _command("Ladder", "isoflop scaling run ladder.toml --data data --out ladder"),
            _command("Fit", "isoflop scaling fit ladder/runs.csv --json fit.json --plot fit.svg"),
        ]
    if document.get("heldout"):
        listed += _held_out(folder, document, winner, shape)
    return listed


def _design(settings: dict[str, Any], plan: dict[str, Any], winner: dict[str, Any]) -> str:
    """The definition of a study of the same budgets and recipe (`experiments/scaling/study/design.py`)."""
    return f"""base = "study-32"
budgets = {json.dumps(plan["budgets"])}
held_out = 0
batch_size = {settings["batch_size"]}
seq_len = {settings["seq_len"]}
learning_rate = {{ value = {winner["learning_rate"]!r}, centre = {{ d_model = {plan["proxy_d_model"]} }}, exponents = {{ d_model = -1 }} }}
family = {{ ff_ratio = 2.6667 }}
set = {{ weight_decay = 0.1, beta2 = {winner.get("beta2", 0.95)!r} }}
"""  # noqa: E501 – a table of TOML stands on one line


def _sweep(sweep: dict[str, Any], shape: str) -> Command:
    axes = " ".join(f"{name}={','.join(f'{value:g}' for value in values)}" for name, values in sweep["axes"].items())
    seeds = len({trial["seed"] for trial in sweep["trials"]})
    steps = sweep.get("steps", 0)
    base = f"weight_decay=0.1 final_fraction=0 warmup_steps={max(1, round(0.05 * steps))}"
    model, file = _model(sweep.get("config"), "proxy.json")
    return _command(
        "Sweep",
        f"isoflop sweep run {model} --data data --out sweep --steps {steps} --set {axes} --seeds {seeds} "
        f"--base {base} {shape}",
        file,
    )


def _held_out(folder: Path, document: dict[str, Any], winner: dict[str, Any] | None, shape: str) -> list[Command]:
    settings, run = document["settings"], document["heldout"]
    record = folder / "heldout" / run["run"] / "run.json"
    config = json.loads(record.read_text(encoding="utf-8"))["identity"]["config"] if record.exists() else None
    model, file = _model(config, "heldout.json", f"study-{run['d_model']}")
    beta2 = 0.95 if winner is None else winner["setting"].get("beta2", 0.95)
    listed = [
        _command(
            "Prediction",
            f"isoflop scaling predict ladder/runs.csv --params {run['params']} --tokens {run['tokens']}",
        ),
        _command(
            "Held-out run",
            f"isoflop train {model} --data data --out heldout --steps {run['steps']} --seed {settings['seed']} "
            f"--learning-rate {run['learning_rate']!r} {shape} "
            f"--set beta2={beta2:g} final_fraction=0 warmup_steps={run['warmup_steps']}",
            file,
        ),
    ]
    if cells := document.get("decode"):
        batches, contexts = (
            " ".join(map(str, sorted({cell[name] for cell in cells}))) for name in ("batch", "context")
        )
        listed.append(
            _command(
                "Decode",
                f"isoflop bench decode heldout --batch {batches} --prompt {contexts} --steps {cells[0]['steps']}",
            )
        )
    if samples := document.get("samples"):
        prompts = " ".join(shlex.quote(sample["prompt"]) for sample in samples)
        listed.append(
            _command(
                "Text",
                f"isoflop generate heldout --prompt {prompts} --temperature 0.7 --top-p 0.9 "
                f"--max-new-tokens {settings['seq_len'] // 2} --seed {settings['seed']}",
            )
        )
    return listed


def _command(what: str, text: str, before: str = "") -> Command:
    return {"what": what, "text": before + text}


def _model(config: dict[str, Any] | None, file: str, name: str = "study-24") -> tuple[str, str]:
    """This model as a command takes it: a preset where it is one, else a file and the shell text that makes it."""
    if config is None:
        return name, ""
    preset = f"study-{config['d_model']}"
    if preset in presets.names():
        ours = {"vocab_size": config["vocab_size"], "eos_token_ids": tuple(config["eos_token_ids"])}
        if presets.get(preset).replace(**ours) == ModelConfig.from_dict(config):
            return preset, ""
    return file, f"cat > {file} <<'END'\n{json.dumps(config)}\nEND\n"
