"""Measure the loss and speed of a model that is stored in fewer bits, pruned, or shortened."""

import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from experiments.evaluate.loss import validation_set
from infer import init_cache, prepare
from infer.compress import drop_layers, prune
from infer.step import decode_step
from model import ModelConfig, Params, apply
from model.errors import InputError
from model.quantize import KINDS
from model.tokenizer import Tokenizer, load_tokenizer
from model.weights import bytes_of
from train.data import gives_ids_of
from train.data.rows import Batch
from train.data.shards import TokenShards
from train.progress import progress_bar

_STEPS, _ROUNDS = 32, 3  # decode steps per timing, and timings of which the median counts


@dataclasses.dataclass(frozen=True)
class CompressedModel:
    """One row of the report. make: the parameters as they are used; cache: the KV cache's dtype."""

    name: str
    make: Callable[[], tuple[ModelConfig, Params]]
    cache: str | None = None


def forms(
    config: ModelConfig, params: Params, calibration: Int[Array | np.ndarray, "batch seq"]
) -> list[CompressedModel]:
    """Return every form that the report compares; the first is what the others are compared with."""

    def stored(kind: str) -> CompressedModel:
        return CompressedModel(kind, lambda: (config, prepare(config, params, kind)))

    def pruned(name: str, method: str, **how: Any) -> CompressedModel:
        def smaller() -> Params:
            return prune(config, params, method, calibration=calibration, **how)

        return CompressedModel(name, lambda: (config, prepare(config, smaller())))

    def shorter(count: int) -> CompressedModel:
        def make() -> tuple[ModelConfig, Params]:
            few, rest = drop_layers(config, params, count, calibration)
            return few, prepare(few, rest)

        return CompressedModel(f"{count} layer{'s' * (count > 1)} dropped", make)

    return [
        *(stored(kind) for kind in KINDS),
        CompressedModel("int8 cache", lambda: (config, prepare(config, params)), cache="int8"),
        pruned("magnitude 50 %", "magnitude", sparsity=0.5),
        pruned("magnitude 2:4", "magnitude", pattern="2:4"),
        pruned("wanda 2:4", "wanda", pattern="2:4"),
        *(pruned(f"wanda {share} %", "wanda", sparsity=share / 100) for share in (10, 20, 30, 40, 50)),
        *(shorter(count) for count in (1, 2, 4) if count < config.num_layers),
    ]


INTERRUPTED = "interrupted"


def report(
    config: ModelConfig,
    params: Params,
    data: str | Path,
    *,
    tokenizer: Tokenizer | None = None,
    batch_size: int = 8,
    seq_len: int = 256,
    max_tokens: int | None = 8192,
    decode_batches: Sequence[int] = (1, 8),
    only: Sequence[str] | None = None,
) -> list[dict[str, Any]]:
    """Return one row per form: bits per byte on validation text, the change in %, the share of equal top-1 tokens with
    the first form, decoded tokens per second at each batch size, and bytes of weights as stored (zeros included).

    A form that cannot be measured is {"form", "reason"}; after Ctrl-C, INTERRUPTED, it is the last. only: names of
    forms besides the first.
    """
    seq_len = min(seq_len, config.max_seq_len)
    batches, bytes_per_token = validation_set(
        config, data, tokenizer=tokenizer, batch_size=batch_size, seq_len=seq_len, max_tokens=max_tokens
    )
    calibration = calibration_tokens(config, data, tokenizer, rows=16, seq_len=seq_len)
    chosen = forms(config, params, calibration)
    chosen = [form for number, form in enumerate(chosen) if not number or only is None or form.name in only]
    rows: list[dict[str, Any]] = []
    first: tuple[float, list[np.ndarray]] | None = None
    with progress_bar("compressing", len(chosen)) as advance:
        for form in chosen:
            try:
                own_config, own_params = form.make()
                nats, tokens, likeliest = _quality(own_config, own_params, batches, form.cache)
                bits = nats / tokens / math.log(2) / bytes_per_token
                first = first or (bits, likeliest)
                rows.append(
                    {
                        "form": form.name,
                        "bits_per_byte": bits,
                        "change_percent": 100 * (bits / first[0] - 1),
                        "agreement": _agreement(first[1], likeliest, batches),
                        "tokens_per_second": {
                            str(batch): decode_speed(own_config, own_params, batch, form.cache)
                            for batch in decode_batches
                        },
                        "weight_bytes": bytes_of(own_params),
                    }
                )
            except KeyboardInterrupt:  # measured forms are kept
                rows.append({"form": form.name, "reason": INTERRUPTED})
                break
            except Exception as error:  # a form that fails must not stop the others
                rows.append({"form": form.name, "reason": f"{type(error).__name__}: {error}".splitlines()[0]})
            advance(note=form.name)
    return rows


def decode_speed(config: ModelConfig, params: Params, batch: int, cache_dtype: str | None = None) -> float:
    """Return tokens per second of all rows together: the median of short greedy runs that stay on the device."""
    steps = min(_STEPS, config.max_seq_len)
    seconds = []
    for number in range(_ROUNDS + 1):
        start = time.perf_counter()
        jax.block_until_ready(_greedy(config, params, batch, steps, cache_dtype))
        if number:  # the first one compiles
            seconds.append(time.perf_counter() - start)
    return batch * steps / statistics.median(seconds)


@functools.partial(jax.jit, static_argnums=(0, 2, 3, 4))
def _greedy(config: ModelConfig, params: Params, batch: int, steps: int, cache_dtype: str | None) -> Array:
    def step(_, carry):
        token, cache = carry
        logits, cache = decode_step(config, params, token, cache)
        return jnp.argmax(logits, axis=-1).astype(jnp.int32), cache

    start = (jnp.zeros(batch, jnp.int32), init_cache(config, batch, steps, dtype=cache_dtype))
    return jax.lax.fori_loop(0, steps, step, start)[0]


def calibration_tokens(
    config: ModelConfig, data: str | Path, tokenizer: Tokenizer | None, rows: int, seq_len: int
) -> Int[np.ndarray, "rows seq"]:
    """Return rows of training text in the model's ids, fewer if the data is short."""
    shards = TokenShards(data, "train")
    wanted = rows * seq_len
    ids = shards.windows(np.array([0]), min(3 * wanted, len(shards)))[0]
    if tokenizer is not None and not gives_ids_of(tokenizer, data):
        text = load_tokenizer(data).decode(ids[ids != shards.eos_id].tolist())
        ids = np.array(tokenizer.encode(text), np.int32)
    rows = min(rows, len(ids) // seq_len)
    if rows == 0:
        raise InputError(f"{data} has fewer than {seq_len} training tokens; give a smaller --seq-len")
    return ids[: rows * seq_len].reshape(rows, seq_len)


def _quality(
    config: ModelConfig, params: Params, batches: list[Batch], cache: str | None
) -> tuple[float, float, list[np.ndarray]]:
    """Return (nats, predicted tokens, the most likely token at every position) over all batches."""
    if config.experts is not None:
        config = config.replace(experts=config.experts.replace(dispatch="dropless"))
    score = functools.partial(_score if cache is None else functools.partial(_score_cached, dtype=cache), config)
    nats, tokens, likeliest = 0.0, 0.0, []
    for batch in batches:
        tokens_and_targets = (jnp.asarray(batch["tokens"]), jnp.asarray(batch["targets"]))
        one, best = score(params, *tokens_and_targets)
        nats += float(np.sum(np.asarray(one) * batch["loss_mask"], dtype=np.float64))
        tokens += float(batch["loss_mask"].sum())
        likeliest.append(np.asarray(best))
    return nats, tokens, likeliest


def _agreement(first: list[np.ndarray], second: list[np.ndarray], batches: list[Batch]) -> float:
    masks = [batch["loss_mask"] > 0 for batch in batches]
    same = sum(int(((a == b) & mask).sum()) for a, b, mask in zip(first, second, masks, strict=True))
    return same / sum(int(mask.sum()) for mask in masks)


@functools.partial(jax.jit, static_argnums=0)
def _score(config: ModelConfig, params: Params, tokens: Array, targets: Array) -> tuple[Array, Array]:
    logits = apply(config, params, tokens)
    return _nats(logits, targets), jnp.argmax(logits, axis=-1)


@functools.partial(jax.jit, static_argnums=0, static_argnames="dtype")
def _score_cached(
    config: ModelConfig, params: Params, tokens: Array, targets: Array, *, dtype: str | None
) -> tuple[Array, Array]:
    cache = init_cache(config, tokens.shape[0], tokens.shape[1], dtype=dtype)

    def step(cache, pair):
        logits, cache = decode_step(config, params, pair[0], cache)
        return cache, (_nats(logits, pair[1]), jnp.argmax(logits, axis=-1))

    _, (nats, likeliest) = jax.lax.scan(step, cache, (tokens.T, targets.T))
    return nats.T, likeliest.T


def _nats(logits: Array, targets: Array) -> Array:
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen
