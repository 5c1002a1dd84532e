"""Implement `isoflop bench serve`: latencies, goodput and capacity of a server under load."""

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from experiments.commands.bench.decode import QUIET
from experiments.commands.options import JsonFile, PlotFile

if TYPE_CHECKING:
    from experiments.bench.serve.bench import MakePrompts, Send
    from experiments.bench.serve.load import Load, Prompt
    from experiments.bench.serve.measures import Limits
    from experiments.bench.serve.target import ClientProcess, Reached

Lengths = Annotated[tuple[int, ...], tyro.conf.arg(metavar="LENGTH | LOW HIGH")]
LimitTexts = Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME:MS ...")]
Rates = Annotated[tuple[float, ...], tyro.conf.arg(metavar="R ...")]
Streams = Annotated[tuple[int, ...], tyro.conf.arg(metavar="N ...")]
PathFile = Annotated[Path | None, tyro.conf.arg(metavar="FILE")]

_TEXT_CAPACITY = 4096  # tokens of a slot where prompts are texts
_DEFAULT_STREAMS = (1, 8)


def serve(
    target: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="URL-OR-MODEL")],
    *,
    rate: Rates = (),
    concurrency: Streams = (),
    burstiness: float = 1.0,
    requests: int = 64,
    prompt: Lengths = (32, 96),
    output: Lengths = (32,),
    prefix: int = 0,
    prompts: PathFile = None,
    record: PathFile = None,
    replay: PathFile = None,
    limits: LimitTexts = (),
    capacity: bool = False,
    share: float = 0.95,
    against: Annotated[str | None, tyro.conf.arg(metavar="LLAMA-SERVER")] = None,
    against_engine: bool = False,
    rounds: int = 5,
    endpoint: Literal["completions", "chat"] = "completions",
    model: str | None = None,
    api_key: str | None = None,
    ignore_eos: bool = True,
    timeout: float = 600.0,
    slots: int = 8,
    steps: int = 8,
    weights: str = "float32",
    cache: str | None = None,
    seed: int = 0,
    format: Literal["table", "json", "jsonl", "csv", "md"] = "table",
    json: JsonFile = None,
    plot: PlotFile = None,
) -> None:
    """Load a server with requests and measure the time to the first token, per token and to the end, and goodput.

    With a URL, any server with OpenAI's API is measured; with a model, `isoflop serve` is started for it on this
    machine and ended afterwards. Requests arrive at --rate whether or not earlier ones are done (open loop: what users
    do, and the queue shows), or --concurrency streams each send the next one when the last is answered (closed loop:
    what the server can do at most). By default: closed loops of 1 and 8 streams. Figures are vLLM's: the time per
    output token is (end − first token) / (tokens − 1) of a request; time counts from a request's arrival, not from when
    a busy client sent it. The client runs in a process of its own.

    Example: isoflop bench serve http://127.0.0.1:8000 --rate 1 2 4 --requests 200 --limits ttft:500 tpot:50

    Example: isoflop bench serve SmolLM2.gguf --concurrency 1 8 --json serve.json --plot serve.svg

    Example: isoflop bench serve SmolLM2.gguf --capacity --limits ttft:1000 tpot:100 --share 0.9

    Example: isoflop bench serve SmolLM2.gguf --rate 2 --record load.jsonl

    Example: isoflop bench serve http://127.0.0.1:8080 --replay load.jsonl

    Example: isoflop bench serve SmolLM2.gguf --against-engine --concurrency 8 --against llama.cpp/bin/llama-server

    Args:
        target: The URL of a running server; or a run directory, a Hugging Face folder or a GGUF file to be served.
        rate: Requests per second of open loops, each a row of the table; inf lets all arrive at once.
        concurrency: Streams of closed loops, each a row.
        burstiness: Of the arrivals: 1 is a Poisson process; the gaps are gamma-distributed with this shape, so that
            below 1 requests come in bursts, above 1 more regularly, and inf is a constant gap.
        requests: Requests of each load; with --capacity, the fewest of each rate.
        prompt: Tokens of a prompt: one length, or the smallest and the largest of a uniform draw. Words instead of
            tokens where the prompt must be a text: with --endpoint chat, or if the server does not tell its vocabulary.
        output: Tokens of an answer: one length, or the smallest and the largest.
        prefix: First tokens of a prompt that all prompts share, as with a system prompt.
        prompts: A file with prompts instead of random ones: a JSON list or JSON lines with "prompt", "messages" or
            "conversations" (as in ShareGPT).
        record: Write the load, with arrival times, prompts and lengths, to this file (JSON lines); needs one load.
        replay: Send the load of such a file; with --concurrency, its prompts in a closed loop.
        limits: What a good request keeps: ttft:500 (milliseconds to the first token), tpot:50 (per further token),
            e2e:10s (to the end; seconds with an s).
        capacity: Search for the highest rate at which --share of the requests keep --limits, with a 90 % interval.
        share: Of good requests at the capacity.
        against: The program llama-server of llama.cpp: it serves the same GGUF file, and both take turns in closed
            loops.
        against_engine: Also drive the bare engine in this process with the same prompts, in turns: what HTTP costs.
        rounds: Turns of each contender with --against and --against-engine, each with fresh prompts.
        endpoint: /v1/completions with token ids or texts, or /v1/chat/completions.
        model: The server's name of the model; by default the first one of its list.
        api_key: The server's key; by default the first one in the environment variable ISOFLOP_API_KEY.
        ignore_eos: Ask for all tokens of an answer (vLLM's, llama.cpp's and isoflop's field); --no-ignore-eos for
            servers that refuse it.
        timeout: Seconds after which a request counts as failed.
        slots: Requests that run at the same time in a server that is started here.
        steps: Tokens per request and step of `isoflop serve` started here: a request that arrives waits for a step.
        weights: Precision of the weights of `isoflop serve` started here.
        cache: Precision of its cache.
        seed: Of arrivals, prompts and lengths.
        format: How the loads are printed.
        json: Also write every number, with the raw samples, to this file.
        plot: Also draw latencies and goodput over the loads (.svg, .png or .pdf).
    """
    from experiments.bench.serve.bench import bench_capacity, bench_loads, replayed
    from experiments.bench.serve.load import Load
    from experiments.bench.serve.measures import Limits
    from experiments.bench.serve.prompts import prompt_maker
    from experiments.bench.serve.target import new_client, target_of
    from experiments.commands.options import check_plot, say_unused, write_document, write_plot
    from model.errors import InputError, check_at_least_one, check_number

    check_plot(plot)
    level, inputs, outputs = Limits.parse(limits), _range("prompt", prompt), _range("output", output)
    check_number("timeout", timeout, above=0)
    check_at_least_one(requests=requests, slots=slots, rounds=rounds)
    is_url, in_turns = target.startswith(("http://", "https://")), against is not None or against_engine
    if sum((capacity, replay is not None, in_turns)) > 1:
        raise InputError("--capacity, --replay and the comparisons with --against are measurements of their own")
    if (capacity or in_turns) and rate:
        raise InputError("--rate has no part in this measurement: leave it out")
    if is_url:
        say_unused(
            "with a URL, whose server runs already", serve, slots=slots, steps=steps, weights=weights, cache=cache
        )
    if not in_turns:
        say_unused("without --against", serve, rounds=rounds)
    if not capacity:
        say_unused("without --capacity", serve, share=share)
    load = None if replay is None else Load.read(replay, concurrency[0] if concurrency else None)
    size = _capacity(load, prompts, endpoint, inputs, outputs)
    key, document = _key(api_key), _describe(target, is_url, size)
    with contextlib.ExitStack() as stack:
        options = ("--steps", str(steps), "--weights", weights, *(() if cache is None else ("--cache", cache)))
        reached = _open(stack, target, is_url, slots, size, options, model, key)
        body: dict[str, Any] = {"temperature": 0.0} | ({"ignore_eos": True} if ignore_eos else {})
        goal = target_of(reached, endpoint, key, body, timeout)
        client = stack.enter_context(new_client())
        vocab_size = None if endpoint == "chat" else reached.vocab_size
        make = prompt_maker(prompts, vocab_size, inputs, outputs, prefix=prefix)
        _warm(client, goal, load, make, seed)
        document |= {"kind": "serve", "cells": [], "load": [], "seed": seed, "limits": str(level)}
        document |= {"server": {"url": reached.url, "model": reached.model, "endpoint": endpoint}}
        if not is_url:
            document |= {"slots": slots, "steps": steps, "weights": weights, "cache": cache}
        if capacity:
            found, document["load"] = bench_capacity(
                lambda load: client.run(goal, load),
                make,
                level,
                share=share,
                requests=requests,
                streams=concurrency[0] if concurrency else slots,
                seed=seed,
                burstiness=burstiness,
            )
            document["capacity"] = found.to_dict()
        elif in_turns:
            contenders: dict[str, Send] = {"isoflop": lambda load: client.run(goal, load)}
            if against_engine:
                contenders["bare engine"] = _bare(target, is_url, slots, size, steps, weights, cache)
            if against is not None:
                contenders["llama-server"] = _llama(stack, client, against, target, slots, size, body, timeout)
            document["against"] = _turns(contenders, make, concurrency or _DEFAULT_STREAMS, requests, rounds, seed)
        else:
            loads = (
                replayed(load)
                if load is not None
                else _offered(rate, concurrency, make(requests, seed), seed, burstiness)
            )
            if record is not None:
                if len(loads) > 1:
                    raise InputError("--record writes one load: give one --rate or one --concurrency")
                loads[0].load.write(record)
            document["load"] = bench_loads(client, goal, loads, level)
    write_document(json, document)
    _show(document, format, level)
    if plot is not None:
        from experiments.bench.serve.figures import draw

        write_plot(plot, draw(document), "latencies and the share of good requests over the load")


def _range(name: str, lengths: tuple[int, ...]) -> tuple[int, int]:
    from model.errors import InputError

    if len(lengths) not in (1, 2):
        raise InputError(f"--{name} takes one length or two, the smallest and the largest, not {len(lengths)}")
    return lengths[0], lengths[-1]


def _key(given: str | None) -> str | None:
    import os

    return given or os.environ.get("ISOFLOP_API_KEY", "").split(",")[0].strip() or None


def _capacity(
    load: "Load | None", prompts: Path | None, endpoint: str, inputs: tuple[int, int], outputs: tuple[int, int]
) -> int:
    """Return the most tokens of a request, for the slots of a server that is started here."""
    if load is not None:
        return load.most_tokens or _TEXT_CAPACITY
    is_text = prompts is not None or endpoint == "chat"
    return _TEXT_CAPACITY if is_text else inputs[1] + outputs[1]


def _describe(target: str, is_url: bool, size: int) -> dict[str, Any]:
    """Return the head of the document. Raises InputError for a model whose context is too small for the requests."""
    import os

    from experiments.bench.document import SCHEMA_VERSION, commit, describe
    from experiments.commands.options import origin
    from model.errors import InputError
    from model.store import open_config

    if is_url:
        about = {"schema_version": SCHEMA_VERSION, "model": target, "config_hash": None, "commit": commit()}
        return about | origin() | {"load_average": os.getloadavg()[0]}
    if not Path(target).exists():
        raise InputError(
            f"{target} is neither a URL (http://…) nor a run directory, a Hugging Face folder or a GGUF file"
        )
    config = open_config(target)
    if size > config.max_seq_len and size != _TEXT_CAPACITY:
        raise InputError(
            f"requests of up to {size} tokens do not fit the model's context, max_seq_len={config.max_seq_len}; give a "
            "smaller --prompt or --output"
        )
    return describe(config, target, random_weights=False)


def _open(
    stack: contextlib.ExitStack,
    target: str,
    is_url: bool,
    slots: int,
    size: int,
    options: tuple[str, ...],
    model: str | None,
    key: str | None,
) -> "Reached":
    """Return the server at a URL, or start one for a model."""
    from experiments.bench.serve.target import free_port, own_server, reach, started

    if is_url:
        return reach(target, model, key)
    port = free_port()
    command = own_server(target, port, slots, ("--capacity", str(size), "--conversations", "none", *options))
    url = stack.enter_context(started(command, port, "isoflop serve", {"ISOFLOP_API_KEY": key or ""}))
    return reach(url, model, key)


def _warm(client: "ClientProcess", goal: Any, load: "Load | None", make: "MakePrompts", seed: int) -> None:
    """Send one request that is not counted. Raises InputError with the server's message if it is not served."""
    from experiments.bench.serve.load import closed_load
    from model.errors import InputError

    first: list[tuple[Prompt, int]] = (
        [make(1, seed + 1_000_000)[0]] if load is None else [(load.requests[0].prompt, load.requests[0].max_tokens)]
    )
    outcome = client.run(goal, closed_load(1, first))[0]
    if outcome.status != "served":
        why = outcome.note or "it has no room (HTTP 429 or 503)"
        raise InputError(f"the server at {goal.url} did not serve a first request: {why}")


def _offered(
    rate: tuple[float, ...], concurrency: tuple[int, ...], prompts: Any, seed: int, burstiness: float
) -> list[Any]:
    from experiments.bench.serve.bench import offered

    return offered(rate, concurrency if rate or concurrency else _DEFAULT_STREAMS, prompts, seed, burstiness)


def _bare(target: str, is_url: bool, slots: int, size: int, steps: int, weights: str, cache: str | None) -> "Send":
    """Return a function that drives the engine in this process, with the model of the server and its settings."""
    from experiments.bench.serve.in_process import drive
    from infer import Engine, prepare
    from model.errors import InputError
    from model.store import open_parameters

    if is_url:
        raise InputError("--against-engine needs the model, not the URL of a server: the engine runs in this process")
    config, params = open_parameters(target)
    prepared = prepare(config, params, weights)
    engine = Engine(config, prepared, slots=slots, capacity=size, steps=steps, cache_dtype=cache)
    engine.warm_up()
    return lambda load: drive(engine, load)


def _llama(
    stack: contextlib.ExitStack,
    client: "ClientProcess",
    binary: str,
    model: str,
    slots: int,
    size: int,
    body: dict[str, Any],
    timeout: float,
) -> "Send":
    """Start llama-server on the same GGUF file, and return a function that loads it."""
    import shutil

    from experiments.bench.serve.target import free_port, llama_server, reach, started, target_of
    from model.errors import InputError

    if shutil.which(binary) is None:
        raise InputError(f"--against {binary}: there is no such program; give the path of llama.cpp's llama-server")
    if not model.endswith(".gguf"):
        raise InputError(f"--against needs a GGUF file, which llama-server reads, not {model}")
    port = free_port()
    url = stack.enter_context(started(llama_server(binary, model, port, slots, size), port, "llama-server"))
    goal = target_of(reach(url), "completions", None, body, timeout)
    return lambda load: client.run(goal, load)


def _turns(
    contenders: "dict[str, Send]",
    make: "MakePrompts",
    streams: tuple[int, ...],
    requests: int,
    rounds: int,
    seed: int,
) -> list[dict[str, Any]]:
    from experiments.bench.serve.against import take_turns

    return take_turns(contenders, make, streams=streams, requests=requests, rounds=rounds, seed=seed)


def _show(document: dict[str, Any], form: str, level: "Limits") -> None:
    from experiments.bench.render import load_table, offered_in_words, render
    from experiments.bench.serve.against import sentence, turns_table
    from experiments.commands.options import console, new_table
    from experiments.words import counted

    if form != "table":
        print(render(document, form))  # type: ignore[arg-type]
        return
    if document["load"]:
        header, lines = load_table(document["load"])
        title = f"{document['server']['model']}: medians (p99); good: {level}"
    else:
        header, lines = turns_table(document["against"])
        title = f"{document['server']['model']}: medians of rounds (lowest … highest)"
    table = new_table(*("\n".join(name.rsplit(" ", 1)) for name in header), title=title)  # narrow: many columns
    for line in lines:
        table.add_row(*line)
    console().print(table)
    for row in document["load"]:
        if missing := row["refused"] + row["failed"]:
            why = "".join(f"; {note}" for note in row["notes"])
            of = f"of {counted(row['requests'], 'request')} {row['refused']} were refused and {row['failed']} failed"
            print(f"{offered_in_words(row)}: {of if missing else ''}{why}")
    if found := document.get("capacity"):
        name = "capacity_requests_per_second"
        print(
            f"capacity: {found[name]:.3g} requests/s ({found[f'{name}_low']:.3g} … {found[f'{name}_high']:.3g}, "
            f"{found['confidence']:.0%} interval), the highest rate at which {found['service_share']:.0%} of the "
            f"requests keep {level}"
        )
    if document.get("against"):
        print(sentence(document["against"]))
    if document["load_average"] > QUIET:
        print(
            f"Other programs were running (load average {document['load_average']:.1f}): these numbers are of what "
            "they left; repeat it on a quiet machine."
        )
