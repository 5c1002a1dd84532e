"""Record what a checkout computes, or compare two records: a proof that a clean-up changes no behaviour.

    PYTHONPATH=BEFORE python tests/same_outputs.py before.json
    PYTHONPATH=AFTER python tests/same_outputs.py after.json
    python tests/same_outputs.py before.json after.json

A record holds the hash of the lowered programs (StableHLO) of the training step, prefill and decode step for every
preset and for variants of a tiny model, and the `--json` document of every command on a small corpus with fixed seeds.
It is made by the code in the folder that PYTHONPATH names, which may be a commit without this file. Recording takes
about five minutes of one CPU core. `isoflop study` is left out: its budgets come from a measurement of the machine.
"""

import argparse
import fnmatch
import functools
import hashlib
import json
import os
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Without most optimisations XLA compiles these small programs several times faster; one CPU device on any machine.
ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
LONGEST = 4096  # tokens of context: rotary tables are constants of a program, and presets go up to a million tokens
# Patterns of keys, or of COMMAND/key, at any depth of a document, whose values two runs of one commit do not share.
VOLATILE = (
    *("*second*", "*_at", "host", "versions", "extras", "compile_cache", "command", "commit", "load_average"),
    *("samples", "ceilings", "bound", "worker", "mfu", "share_of_*", "peak_memory_bytes", "compiles_from_cache"),
    *(f"bench compare/{key}" for key in ("before", "after", "spread", "*times", "interval_95", "verdict", "changed")),
)

_ROWS = "--seq-len 32 --batch-size 4 --evaluate-tokens 256"
_SMALL = "num_layers=1 d_model=16 num_heads=2 d_ff=32"
_SWEEP = f"study-8 --data data --out sweep --steps 4 {_ROWS} --set learning_rate=0.01,0.03 num_layers=1,2 --seeds 2"
_DROPOUT = "--set schedule=constant dropout=true dropout_rate=0.1 accumulate=2"
# Run in this order in one folder, each with --json FILE.
COMMANDS = {
    "data prepare": "data prepare corpus.jsonl --out data --vocab-size 320 --validation-fraction 0.2",
    "data prepare labels": "data prepare corpus.jsonl --out labelled --tokenizer data --label-field label",
    "data inspect": "data inspect data --packing 32",
    "model list": "model list",
    "model show": "model show llama3-8b --mesh fsdp=4",
    "train": f"train study-8 --data data --out base --steps 6 {_ROWS} --keep-steps 4 --evaluate-every 3 {_DROPOUT}",
    "train muon": f"train study-8 --data data --out muon --steps 3 {_ROWS} --set optimizer=muon packing=best-fit",
    "train masked": f"train bert-base --objective masked --data data --out masked --steps 3 {_ROWS} --set {_SMALL}",
    "train spans": f"train t5-small --objective spans --data data --out spans --steps 3 {_ROWS} --set {_SMALL}"
    " num_encoder_layers=1",
    "train classification": f"train study-8 --objective classification --data labelled --out class --steps 3 {_ROWS}",
    "train lora": f"train base --lora 2 --data data --out lora --steps 3 {_ROWS}",
    "cool": "cool base --at 4 --out cooled --decay-steps 2 --evaluate-tokens 256",
    "report": "report base lora",
    "generate": "generate base --prompt bade kilo --max-new-tokens 12 --logprobs 2",
    "eval": "eval base --data data --evaluate-tokens 512",
    "sweep plan": f"sweep plan {_SWEEP} --no-probe",
    "sweep run": f"sweep run {_SWEEP}",
    "sweep status": "sweep status sweep",
    "sweep resume": "sweep resume sweep",
    "sweep report": "sweep report sweep",
    "sweep replay": "sweep replay sweep --replays 2",
    "scaling plan": "scaling plan design.toml --data data --no-probe",
    "scaling plan published": "scaling plan --budgets 1e19 1e20 --device h100",
    "scaling run": "scaling run design.toml --data data --out study",
    "scaling report": "scaling report study --bootstraps 20",
    "scaling fit": "scaling fit runs.csv --bootstraps 20",
    "scaling predict": "scaling predict runs.csv --bootstraps 20 --flops 1e21 --target-loss 2.5",
    "model compress": "model compress base small --method int4 --data data --seq-len 32 --evaluate-tokens 256",
    "model coordcheck": "model coordcheck --widths 16 32 --steps 2 --seeds 1",
    "model transfer": "model transfer --data data --out transfer --widths 16 32 --learning-rates 0.01 0.02 0.04"
    " --steps 3 --seeds 1 --seq-len 32",
    "bench decode": "bench decode tiny --batch 1 --prompt 8 --steps 4 --repeats 2",
    "bench train": "bench train tiny --seconds 0.2 --seq-len 32 --batch-size 4",
    "bench compare": "bench compare bench-train.json bench-train.json",
    "doctor": "doctor",
}
METRICS = ("base/metrics.jsonl", "cooled/from-4/metrics.jsonl", "lora/metrics.jsonl")  # recorded as well
DESIGN = (
    *('base = "tiny"', "budgets = [1.5e8, 3e8]", "held_out = 0", "sizes = 4", "size_factor = 1.41", "batch_size = 2"),
    *("tokens_per_parameter = 0.05", "seq_len = 32", "evaluate_tokens = 128", "learning_rate = 0.01"),
)


def programs() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield (name, function that lowers the program) for every preset and for variants of a tiny model."""
    from model import Execution, Experts, presets
    from model.adapters import Adapter
    from train import TrainConfig, objectives, standard_phases

    language_modeling = objectives.LanguageModeling()
    for name in presets.names():
        config = presets.get(name)
        config = config.replace(max_seq_len=min(config.max_seq_len, LONGEST))
        objective = {"encoder": "masked", "encoder-decoder": "spans"}.get(config.stack, "language-modeling")
        config, fitted = objectives.get(objective).fit(config)
        yield f"{name} train", functools.partial(lower_step, config, TrainConfig(batch_size=4, seq_len=64), fitted)
        if config.stack == "decoder":
            yield f"{name} prefill", functools.partial(lower_prefill, config)
            yield f"{name} decode", functools.partial(lower_decode, config)

    tiny, shape = presets.get("tiny"), TrainConfig(batch_size=8, seq_len=64)
    adapter = Adapter(rank=4)
    variants: dict[str, dict[str, Any]] = {
        "scanned": {"execution": Execution(scan_layers=True)},
        "unrolled": {"execution": Execution(scan_layers=False)},
        "accumulate": {"execution": Execution(accumulate=2)},
        "loss-chunks": {"execution": Execution(loss_chunks=4)},
        "remat": {"execution": Execution(remat="full", accumulate=4)},
        "remat-dots": {"execution": Execution(remat="dots")},
        "large-batch": {"train_config": shape.replace(batch_size=32)},
        "dropout": {"train_config": shape.replace(dropout=True)},
        "segments": {"train_config": shape.replace(segment_documents=True)},
        "no-norms": {"train_config": shape.replace(norms=False)},
        "phases": {"train_config": shape.replace(phases=standard_phases(100_000, 8, 64))},
        "experts": {"config": tiny.replace(experts=Experts(count=4, top_k=2, d_ff=8))},
        "mup": {"config": tiny.replace(parameterization="mup", base_d_model=8)},
        "lora": {"objective": objectives.LanguageModeling(adapter=adapter)},
        "qlora": {"objective": objectives.LanguageModeling(adapter=adapter, base_weights="int8")},
        "classification": {"objective": objectives.Classification()},
    }
    for optimizer in ("adam", "sgd", "adafactor", "lion", "muon"):
        variants[optimizer] = {"train_config": shape.replace(optimizer=optimizer)}
    for schedule in ("constant", "linear", "wsd", "inverse_sqrt"):
        variants[schedule] = {"train_config": shape.replace(schedule=schedule)}
    for name, changes in variants.items():
        options: dict[str, Any] = {"config": tiny, "train_config": shape, "objective": language_modeling} | changes
        options["config"], options["objective"] = options["objective"].fit(options["config"])
        yield f"tiny {name} train", functools.partial(lower_step, **options)
        yield f"tiny {name} evaluate", functools.partial(lower_step, evaluation=True, **options)
        if name in ("scanned", "accumulate", "segments", "experts", "muon", "lora"):
            for lanes in (1, 3):
                yield f"tiny {name} lanes={lanes}", functools.partial(lower_step, lanes=lanes, **options)
    for weights in ("float32", "bfloat16", "int8", "int8-dynamic", "int4"):
        for cache in ("float32", "int8"):
            yield f"tiny weights={weights} cache={cache}", functools.partial(lower_decode, tiny, weights, cache)


def lower_step(
    config: Any, train_config: Any, objective: Any, execution: Any = None, evaluation: bool = False, lanes: int = 0
) -> Any:
    """Lower `train_step`, `eval_step` (evaluation) or the step of a population's program (lanes)."""
    import jax

    from model import Execution
    from train import HParams, eval_step, init_state, train_step

    options = {"objective": objective, "execution": execution or Execution()}
    hparams: Any = HParams()
    state = jax.eval_shape(functools.partial(init_state, config, train_config, objective=objective), hparams)
    shape = (train_config.batch_size, train_config.seq_len)
    batch = objective.batch_spec(config, train_config, *shape, evaluation=evaluation)
    frozen = jax.eval_shape(objective.frozen, _params(config)) or None
    if evaluation:
        options["execution"] = options["execution"].replace(accumulate=1)
        step = jax.jit(functools.partial(eval_step, config, **options))
        return step.lower(state.params, batch, frozen=frozen, hparams=hparams)
    if not lanes:
        step = jax.jit(functools.partial(train_step, config, train_config, **options))
        return step.lower(state, batch, hparams, frozen=frozen)
    from train.lanes.vmapped import step_lanes

    stack = lambda leaf: jax.ShapeDtypeStruct((lanes, *leaf.shape), leaf.dtype)
    state, batch, hparams = jax.tree.map(stack, (state, batch, hparams))
    step = jax.jit(functools.partial(step_lanes, config, train_config, **options))
    return step.lower(state, batch, hparams, jax.ShapeDtypeStruct((lanes,), bool), frozen)


def lower_prefill(config: Any) -> Any:
    """Lower `infer.prefill` of two rows of 16 tokens."""
    import jax

    from infer import init_cache, prefill

    cache = jax.eval_shape(lambda: init_cache(config, 2, 128))
    tokens, lengths = jax.ShapeDtypeStruct((2, 16), "int32"), jax.ShapeDtypeStruct((2,), "int32")
    return prefill.lower(config, _params(config), tokens, lengths, cache)


def lower_decode(config: Any, weights: str | None = None, cache_dtype: str | None = None) -> Any:
    """Lower `infer.decode_step` of two rows; weights: as `infer.prepare` stores them, None: as training does."""
    import jax

    from infer import decode_step, init_cache, prepare

    params = _params(config)
    if weights is not None:
        params = jax.eval_shape(lambda params: prepare(config, params, weights), params)
    cache = jax.eval_shape(lambda: init_cache(config, 2, 64, cache_dtype))
    return decode_step.lower(config, params, jax.ShapeDtypeStruct((2,), "int32"), cache)


def _params(config: Any) -> Any:
    import jax

    from model import init

    return jax.eval_shape(functools.partial(init, config), jax.random.key(0))


def canonical(text: str) -> str:
    """Return a lowered module with its functions numbered: their names come from those of Python functions."""
    names = dict.fromkeys(re.findall(r"func\.func (?:public |private )?@([\w.$-]+)", text))
    numbers = {name: f"@{number}" for number, name in enumerate(names)}
    text = re.sub(r"^module @[\w.$-]+", "module", text)
    return re.sub(r"@([\w.$-]+)", lambda found: numbers.get(found[1], found[0]), text)


def record_programs() -> dict[str, str]:
    """Return the SHA-256 of every program, or the error where one cannot be lowered."""
    record = {}
    for name, lower in programs():
        try:
            record[name] = hashlib.sha256(canonical(lower().as_text()).encode()).hexdigest()
        except Exception as error:
            record[name] = f"{type(error).__name__}: {error}"
            print(f"{name}: {record[name]}", file=sys.stderr)
    return record


def write_inputs(folder: Path) -> None:
    """Write a labelled corpus of made-up words, a table of runs that follow a known law, and a study's design."""
    draw = random.Random(0)
    syllables = [consonant + vowel for consonant in "bdklmnrst" for vowel in "aeiou"]
    words = ["".join(draw.choices(syllables, k=draw.randint(1, 4))) for _ in range(120)]
    frequencies = [1 / rank for rank in range(1, len(words) + 1)]
    with (folder / "corpus.jsonl").open("w", encoding="utf-8") as corpus:
        for number in range(40):
            text = " ".join(draw.choices(words, frequencies, k=150))
            print(json.dumps({"text": text, "label": number % 3}), file=corpus)
    with (folder / "runs.csv").open("w", encoding="utf-8") as table:
        print("params,tokens,loss", file=table)
        for budget in (1e17, 1e18, 1e19, 1e20):
            for size in (0.25, 0.5, 1, 2, 4):
                params = size * (budget / 120) ** 0.5
                tokens = budget / (6 * params)
                loss = 1.7 + 406 / params**0.34 + 411 / tokens**0.28 + draw.gauss(0, 0.003)
                print(params, tokens, loss, sep=",", file=table)
    (folder / "design.toml").write_text("\n".join(DESIGN), encoding="utf-8")


def record_commands() -> dict[str, Any]:
    """Return the document of every command, or the exit code where one fails; and the metrics of some runs."""
    record: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        write_inputs(folder)
        for name, line in COMMANDS.items():
            file = folder / f"{name.replace(' ', '-')}.json"
            call = [sys.executable, "-m", "experiments.cli", *line.split(), "--json", str(file)]
            done = subprocess.run(call, cwd=folder, capture_output=True, text=True, stdin=subprocess.DEVNULL)
            if file.exists():
                text = file.read_text(encoding="utf-8").replace(str(folder), "FOLDER")
                record[name] = stable(json.loads(text), name)
            if done.returncode or not file.exists():
                record[name] = {"exit code": done.returncode}
                print(f"{name}: exit code {done.returncode}: {done.stderr[-2000:]}", file=sys.stderr)
        for path in METRICS:
            if (folder / path).exists():
                lines = (folder / path).read_text(encoding="utf-8").splitlines()
                record[path] = [stable(json.loads(line)) for line in lines]
    return record


def stable(value: Any, command: str = "") -> Any:
    """Return a command's document without the keys that VOLATILE names."""
    if isinstance(value, dict):
        names = lambda key: (key, f"{command}/{key}")
        is_volatile = lambda key: any(fnmatch.filter(names(key), pattern) for pattern in VOLATILE)
        return {key: stable(entry, command) for key, entry in value.items() if not is_volatile(key)}
    return [stable(entry, command) for entry in value] if isinstance(value, list) else value


def differences(before: Any, after: Any, path: str = "") -> Iterator[str]:
    """Yield a line for every value that differs. Floats must be equal to the last bit; NaN equals NaN."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in dict.fromkeys([*before, *after]):
            yield from differences(before.get(key, "(missing)"), after.get(key, "(missing)"), f"{path}/{key}")
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for index, pair in enumerate(zip(before, after, strict=True)):
            yield from differences(*pair, f"{path}/{index}")
    elif json.dumps(before) != json.dumps(after):
        yield f"{path[1:]}: {json.dumps(before)[:100]} → {json.dumps(after)[:100]}"


def main() -> None:
    """Write a record, or compare two and exit with 1 where they differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", type=Path, help="the record to write; with AFTER, the earlier of two to compare")
    parser.add_argument("after", type=Path, nargs="?", help="the later record")
    given = parser.parse_args()
    if given.after is None:
        os.environ.update(ENVIRONMENT)
        record = {"programs": record_programs(), "commands": record_commands()}
        given.record.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        return
    before, after = (json.loads(path.read_text(encoding="utf-8")) for path in (given.record, given.after))
    found = list(differences(before, after))
    print("\n".join(found) if found else "the records are the same")
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
