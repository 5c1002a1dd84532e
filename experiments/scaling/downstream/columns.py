"""Name the columns of a table of benchmark results."""

import math

from experiments.scaling.rows.columns import ALIASES
from experiments.scaling.rows.table import RUN_COLUMNS

PROXIES = {
    "bits_per_byte": ("bits per byte", 1.0),
    "nats_per_byte": ("bits per byte", 1 / math.log(2)),
    "loss": ("nats per token", 1.0),
}
"""Columns that a link can start from, by role: the unit in which they are shown, and the factor to it."""
DOWNSTREAM_ALIASES: dict[str, tuple[str, ...]] = {
    "params": ALIASES["params"],
    "tokens": (*ALIASES["tokens"], "throughput_total_tokens"),
    "task": ("task", "task_name", "benchmark", "eval", "evaluation"),
    "bits_per_byte": (
        "bits_per_byte",
        "bpb",
        "gold_bpb",
        "gold_bits_per_byte",
        "correct_bpb",
        "task_bpb",
        "bits_per_byte_corr",
    ),
    "nats_per_byte": ("nats_per_byte", "loss_per_byte", "nll_per_byte"),
    "loss": ("loss", "task_loss", "loss_per_token", "nats_per_token", "nll_per_token", "nll", "cross_entropy"),
    "accuracy": ("accuracy", "acc", "acc_norm", "len_norm", "exact_match", "score", "primary_metric", "primary_score"),
    "error_rate": ("error_rate", "error", "err", "accuracy_error"),
    "questions": ("questions", "num_questions", "n_questions", "num_instances", "num_docs"),
    "chance": ("chance", "chance_level", "random", "random_baseline"),
    "ceiling": ("ceiling", "maximum"),
    "run": (*(name.lower() for name in RUN_COLUMNS), "model", "model_name"),
    "step": ("step", "_step", "checkpoint"),
    "recipe": ("recipe", "data", "data_recipe", "mix", "corpus"),
    "seed": ("seed", "random_seed"),
}
"""Names that others give to our columns, as in `columns.ALIASES`."""
