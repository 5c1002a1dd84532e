"""Write a study's stages as shell commands, so that each can be repeated and changed by hand."""

import json
import shlex
from typing import Any

from experiments.scaling.study.design import Design
from experiments.scaling.study.published import AT_SCALE, middle_of
from model import ModelConfig, presets

Command = dict[str, str]


def commands(document: dict[str, Any]) -> list[Command]:
    """Return {what, text} per stage, with the numbers of this study; stages without a result are left out."""
    settings, found = document["settings"], document.get("sweep") or {}
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
    if found:
        listed.append(_sweep(found, shape))
    if document.get("design"):
        file = f"cat > ladder.toml <<'END'\n{_toml(document['design'])}END\n"
        listed += [
            _command("What the ladder trains", "isoflop scaling plan ladder.toml --data data", file),
            _command(
                "Ladder, prediction and held-out runs", "isoflop scaling run ladder.toml --data data --out ladder"
            ),
            _command("Fit", "isoflop scaling fit ladder/runs.csv --json fit.json --plot fit.svg"),
        ]
    if run := document.get("heldout"):
        listed.append(
            _command(
                "What the laws say of the held-out run",
                f"isoflop scaling predict ladder/runs.csv --params {run['params']} --tokens {run['tokens']}",
            )
        )
        listed += _model_commands(document, f"ladder/{run['run']}")
    return listed


def _toml(design: dict[str, Any]) -> str:
    """Return the definition of a study (`experiments/scaling/study/design.py`), defaults left out.

    At the scale of published models keys that are left out have other defaults, so all keys are written.
    """
    usual = Design(budgets=(1.0, 2.0)).to_dict()
    if middle_of(design["budgets"]) >= AT_SCALE:
        usual = dict.fromkeys(usual) | {"law": "", "hours": 0.0}
    if design["law"]:  # it decides these
        design = {name: design[name] for name in design if name not in ("tokens_per_parameter", "optimum_exponent")}
    return "".join(
        f"{name} = {_value(value)}\n" for name, value in design.items() if name == "budgets" or value != usual[name]
    )


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{name} = {_value(inner)}" for name, inner in value.items()) + " }"
    return json.dumps(value)


def _sweep(sweep: dict[str, Any], shape: str) -> Command:
    axes = " ".join(f"{name}={','.join(f'{value:g}' for value in values)}" for name, values in sweep["axes"].items())
    base = " ".join(f"{name}={value}" for name, value in sweep["base"].items())
    seeds = len({trial["seed"] for trial in sweep["trials"]})
    model, file = _model(sweep["config"], "proxy.json")
    return _command(
        "Sweep",
        f"isoflop sweep run {model} --data data --out sweep --steps {sweep['steps']} --set {axes} --seeds {seeds} "
        f"--base {base} {shape}",
        file,
    )


def _model_commands(document: dict[str, Any], run: str) -> list[Command]:
    """Return what was done with the held-out model."""
    settings, listed = document["settings"], []
    if cells := document.get("decode"):
        batches, contexts = (
            " ".join(map(str, sorted({cell[name] for cell in cells}))) for name in ("batch", "context")
        )
        listed.append(
            _command(
                "Decode",
                f"isoflop bench decode {run} --batch {batches} --prompt {contexts} --steps {cells[0]['steps']}",
            )
        )
    if samples := document.get("samples"):
        prompts = " ".join(shlex.quote(sample["prompt"]) for sample in samples)
        listed.append(
            _command(
                "Text",
                f"isoflop generate {run} --prompt {prompts} --temperature 0.7 --top-p 0.9 "
                f"--max-new-tokens {settings['seq_len'] // 2} --seed {settings['seed']}",
            )
        )
    return listed


def _command(what: str, text: str, before: str = "") -> Command:
    return {"what": what, "text": before + text}


def _model(config: dict[str, Any], file: str) -> tuple[str, str]:
    """Return the model as a command-line argument: a preset, or a config file and the shell text to write it."""
    preset = f"study-{config['d_model']}"
    if preset in presets.names():
        ours = {"vocab_size": config["vocab_size"], "eos_token_ids": tuple(config["eos_token_ids"])}
        if presets.get(preset).replace(**ours) == ModelConfig.from_dict(config):
            return preset, ""
    return file, f"cat > {file} <<'END'\n{json.dumps(config)}\nEND\n"
