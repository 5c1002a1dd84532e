"""Compare our scoring of a task's requests with lm-evaluation-harness and Transformers, in interleaved rounds."""

import contextlib
import dataclasses
import gzip
import json
import os
import random
import statistics
import tempfile
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.bench.ceilings import cores
from experiments.bench.peers.child import Child, python_has
from experiments.bench.peers.twin import torch_python
from experiments.bench.rounds import interleaved, median_and_range
from experiments.evaluate.encode import encode_pairs
from experiments.evaluate.tasks.olmes import UNCONDITIONAL
from experiments.models import export_tokenizer
from infer import prepare, score
from infer.scoring.programs import compiled_programs
from model import ModelConfig, Params
from model.convert import fold, save_hf
from model.errors import InputError, check_at_least_one, check_whole
from model.progress import progress_bar
from model.tokenizer import Tokenizer

_PEER = Path(__file__).parent / "peers/lm_eval_peer.py"
_TRIAL = 64  # requests on which their batch size is chosen
TOLERANCE = 1e-2
"""Largest difference of log-probabilities in nats; above it the contenders do not compute the same."""


class TaskRequest(NamedTuple):
    """A continuation to be scored after its context; question, choices, gold: of its document, for shots."""

    document: int
    context: str
    continuation: str
    question: str
    choices: tuple[str, ...]
    gold: int


@dataclasses.dataclass(frozen=True)
class EvaluationSpeed:
    """A contender on one file of requests.

    seconds, cpu_seconds: median of the rounds, of the whole call on texts, encoding included; samples: of each round.
    first_call_seconds: of ours, with compilation; theirs: None.
    """

    name: str
    batch_size: int
    seconds: float
    cpu_seconds: float
    requests_per_second: float
    first_call_seconds: float | None
    samples: dict[str, list[float]]


@dataclasses.dataclass(frozen=True)
class TaskComparison:
    """Both contenders on one file of requests; ratios of the same round, how many times as fast ours is.

    trial_seconds: of theirs, by batch size, on which the batch size was chosen. compiles: programs of our first call.
    """

    requests_file: str
    documents: int
    requests: int
    shots: str
    largest_difference: float
    compiles: int
    trial_seconds: dict[str, float]
    contenders: list[EvaluationSpeed]
    ratios: dict[str, float]


@dataclasses.dataclass(frozen=True)
class EvaluationComparison:
    """All files of requests. load_average: of the minute before the benchmark."""

    load_average: float
    threads: int
    rounds: int
    tasks: list[TaskComparison]
    versions: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return dataclasses.asdict(self)


def read_requests(file: Path, limit: int | None = None) -> list[TaskRequest]:
    """Return the log-likelihood requests of the first `limit` documents of an OLMES file, requests.jsonl or .jsonl.gz.

    Documents that repeat the answers without their questions are left out. Raises InputError for another file.
    """
    if limit is not None:
        check_whole("limit", limit, 1)
    try:
        text = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        rows = [json.loads(line) for line in text.splitlines()]
        found = [
            TaskRequest(
                row["doc_id"],
                row["request"]["context"],
                row["request"]["continuation"],
                row["doc"]["query"],
                tuple(row["doc"]["choices"]),
                row["doc"]["gold"],
            )
            for row in rows
            if row["request_type"] == "loglikelihood" and row["doc_id"] < UNCONDITIONAL
        ]
    except (OSError, EOFError, ValueError, KeyError, TypeError, zlib.error) as error:
        raise InputError(
            f"{file} is not a file of OLMES requests, requests.jsonl or requests.jsonl.gz: {error}"
        ) from error
    kept = list(dict.fromkeys(request.document for request in found))[:limit]
    if not kept:
        raise InputError(f"{file} has no log-likelihood requests")
    return [request for request in found if request.document in set(kept)]


def draw_shots(
    requests: Sequence[TaskRequest], others: Sequence[TaskRequest], shots: int, seed: int
) -> list[TaskRequest]:
    """Return the requests with other shots before each question, drawn for each document among those of `others`.

    All requests of a document have the same shots; a shot is a question, a space and its correct choice.
    """
    texts = {one.document: f"{one.question} {one.choices[one.gold]}" for one in others}
    if len(texts) <= shots:
        raise InputError(f"{shots} shots cannot be drawn from {len(texts) - 1} other questions; lower --draw-shots")

    def before(document: int) -> str:
        pool = [number for number in texts if number != document]
        drawn = random.Random(f"{seed} {document}").sample(pool, shots)
        return "".join(texts[number] + "\n\n" for number in drawn)

    prefixes = {document: before(document) for document in {one.document for one in requests}}
    return [one._replace(context=prefixes[one.document] + one.question) for one in requests]


def bench_evaluate(
    config: ModelConfig,
    params: Params,
    tokenizer: Tokenizer,
    files: Sequence[Path],
    *,
    limit: int | None = None,
    drawn_shots: int | None = None,
    batch_size: int = 16,
    their_batch_sizes: Sequence[int] = (1, 8, 32),
    rounds: int = 3,
    seed: int = 0,
) -> EvaluationComparison:
    """Return the time that ours and lm-evaluation-harness need for the log-probabilities of the same texts.

    files: of requests, see `read_requests`. limit: first documents of each. drawn_shots: a number of shots that is
    drawn for each document, instead of the shots of the file. Theirs runs in a process of its own, on the CPU in
    float32, with as many threads as there are cores, at the fastest of `their_batch_sizes` on a sample of the requests.
    Each turn is a whole call on texts, as both encode and score them; our first call, which compiles, is not among the
    samples.
    Raises InputError if lm-eval, PyTorch or Transformers is missing, and RuntimeError if the answers differ.
    """
    check_at_least_one(batch_size=batch_size, rounds=rounds, **{f"batch size {n}": n for n in their_batch_sizes})
    python = torch_python()
    for module in ("lm_eval", "torch", "transformers"):
        if not python_has(python, module):
            raise InputError(
                f"{python} has no {module}: install isoflop[peers], or name a Python that has it in "
                "ISOFLOP_TORCH_PYTHON"
            )
    tasks = []
    for file in files:
        requests = read_requests(file, limit)
        if drawn_shots is not None:
            requests = draw_shots(requests, read_requests(file), drawn_shots, seed)
        tasks.append((file, requests))
    load_average = os.getloadavg()[0]
    standard, folded = fold(config, params)
    prepared = prepare(config, params)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="isoflop-evaluate-")))
        save_hf(standard, folded, folder / "model")
        export_tokenizer(tokenizer, folder / "model")
        spec = {"folder": str(folder / "model"), "threads": cores()}
        child = Child([python, str(_PEER), json.dumps(spec)], "lm-evaluation-harness", folder / "peer.log")
        peer = stack.enter_context(child)
        advance = stack.enter_context(progress_bar("rounds", len(tasks) * rounds))
        measured = []
        for file, requests in tasks:
            pairs = [(one.context, one.continuation) for one in requests]
            own = _Own(config, prepared, tokenizer, pairs, batch_size)
            theirs = _Theirs(peer, pairs, folder / "requests.json", their_batch_sizes, seed)
            about = {
                "requests_file": str(file),
                "documents": len({one.document for one in requests}),
                "requests": len(pairs),
                "shots": "of the file" if drawn_shots is None else f"{drawn_shots} drawn for each document",
            }
            measured.append(_measured(about, own, theirs, rounds, advance))
    return EvaluationComparison(load_average, cores(), rounds, measured, peer.ready["versions"])


class _Turn(NamedTuple):
    seconds: float
    cpu_seconds: float
    logprobs: np.ndarray


class _Own:
    """Our side: texts to log-probabilities, in this process."""

    def __init__(self, config, params, tokenizer, pairs, batch_size):
        self._model, self._tokenizer, self._pairs = (config, params), tokenizer, pairs
        self.batch_size = batch_size
        before = compiled_programs()
        self.first_call_seconds = self.run().seconds
        self.compiles = compiled_programs() - before

    def run(self) -> _Turn:
        start, cpu_start = time.perf_counter(), time.process_time()
        ids = [encoded[:2] for encoded in encode_pairs(self._tokenizer, self._pairs, "lm-eval")]
        found = score(*self._model, ids, batch_size=self.batch_size)
        return _Turn(time.perf_counter() - start, time.process_time() - cpu_start, found.logprobs)


class _Theirs:
    """lm-evaluation-harness with Transformers, at the batch size that is fastest on a sample of the requests."""

    def __init__(self, peer: Child, pairs: list[tuple[str, str]], file: Path, batch_sizes: Sequence[int], seed: int):
        self._peer, self._file = peer, file
        self.trial_seconds: dict[str, float] = {}
        self.batch_size = batch_sizes[0]
        if len(batch_sizes) > 1:
            self._load(random.Random(seed).sample(pairs, min(_TRIAL, len(pairs))))
            self._run(batch_sizes[0])  # warms up
            self.trial_seconds = {str(size): self._run(size).seconds for size in batch_sizes}
            self.batch_size = int(min(self.trial_seconds, key=lambda size: self.trial_seconds[size]))
        self._load(pairs)

    def run(self) -> _Turn:
        return self._run(self.batch_size)

    def _load(self, pairs: list[tuple[str, str]]) -> None:
        self._file.write_text(json.dumps(pairs), encoding="utf-8")
        self._peer.ask(json.dumps({"do": "load", "file": str(self._file)}))

    def _run(self, batch_size: int) -> _Turn:
        answer = self._peer.ask(json.dumps({"do": "run", "batch_size": batch_size, "first": None}))
        return _Turn(answer["seconds"], answer["cpu_seconds"], np.array(answer["logprobs"]))


def _measured(about: dict[str, Any], own: _Own, theirs: _Theirs, rounds: int, advance: Any) -> TaskComparison:
    """Return the numbers of one file. Raises RuntimeError if the contenders' log-probabilities differ."""
    contenders: dict[str, _Own | _Theirs] = {"isoflop": own, "lm-eval": theirs}
    turns: dict[str, list[_Turn]] = {name: [] for name in contenders}
    for number, name in enumerate(interleaved(list(contenders), rounds), 1):
        turns[name].append(contenders[name].run())
        if number % len(contenders) == 0:
            advance()
    difference = float(np.abs(turns["isoflop"][-1].logprobs - turns["lm-eval"][-1].logprobs).max())
    if not difference < TOLERANCE:
        raise RuntimeError(f"the contenders do not compute the same: log-probabilities differ by {difference:.3g} nats")
    speeds, samples = [], {}
    for name, contender in contenders.items():
        samples[name] = {kind: [getattr(turn, kind) for turn in turns[name]] for kind in ("seconds", "cpu_seconds")}
        medians = {kind: statistics.median(values) for kind, values in samples[name].items()}
        speeds.append(
            EvaluationSpeed(
                name=name,
                batch_size=contender.batch_size,
                **medians,
                requests_per_second=about["requests"] / medians["seconds"],
                first_call_seconds=getattr(contender, "first_call_seconds", None),
                samples=samples[name],
            )
        )
    ratios: dict[str, float] = {}
    for kind, key in (("seconds", "isoflop_over_lm_eval"), ("cpu_seconds", "isoflop_over_lm_eval_by_cpu_time")):
        pairs = zip(samples["isoflop"][kind], samples["lm-eval"][kind], strict=True)
        ratios |= median_and_range(key, [other / mine for mine, other in pairs])
    return TaskComparison(
        **about,
        largest_difference=difference,
        compiles=own.compiles,
        trial_seconds=theirs.trial_seconds,
        contenders=speeds,
        ratios=ratios,
    )
