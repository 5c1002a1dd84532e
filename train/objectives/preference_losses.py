"""The losses of preference alignment, by name: of a pair of answers, from how likely they are.

Every function takes the log-probabilities of a batch of pairs and traced hyperparameters, and returns one loss per
pair. Names and conventions are those of the papers; where TRL differs, the docstring says so.
"""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from train.config import HParams

Divergence = Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]
Weighting = Literal["none", "wpo"]
_DISCOPOP_TEMPERATURE = 0.05
_LARGEST_EXPONENT = 80.0  # exp of it is finite in float32


class PairLogProbs(NamedTuple):
    """Natural log-probabilities of the answers of a batch of pairs, summed over their trained tokens."""

    chosen: Float[Array, " pairs"]
    rejected: Float[Array, " pairs"]
    reference_chosen: Float[Array, " pairs"]
    reference_rejected: Float[Array, " pairs"]
    chosen_tokens: Float[Array, " pairs"]
    rejected_tokens: Float[Array, " pairs"]

    @property
    def chosen_ratio(self) -> Float[Array, " pairs"]:
        """Return log π(chosen) / π_reference(chosen)."""
        return self.chosen - self.reference_chosen

    @property
    def rejected_ratio(self) -> Float[Array, " pairs"]:
        """Return log π(rejected) / π_reference(rejected)."""
        return self.rejected - self.reference_rejected


PairLoss = Callable[[PairLogProbs, HParams, Divergence], Float[Array, " pairs"]]


def score(log_ratio: Float[Array, " pairs"], hparams: HParams, divergence: Divergence) -> Float[Array, " pairs"]:
    """Return f'(π / π_reference) of the divergence that keeps a policy near its reference (Wang et al. 2023, table 1).

    reverse_kl: the log ratio itself, as in DPO.
    """
    if divergence == "forward_kl":
        return 1 - jnp.exp(-log_ratio)
    if divergence == "js_divergence":
        return math.log(2) + jax.nn.log_sigmoid(log_ratio)
    if divergence == "alpha_divergence":
        order = hparams.divergence_alpha - 1
        near_one = jnp.abs(order) < 1e-6  # the limit is the log ratio
        safe = jnp.where(near_one, 1.0, order)
        return jnp.where(near_one, log_ratio, jnp.expm1(jnp.minimum(safe * log_ratio, _LARGEST_EXPONENT)) / safe)
    return log_ratio


def _margin(pairs: PairLogProbs, hparams: HParams, divergence: Divergence) -> Float[Array, " pairs"]:
    """Return by how much the chosen answer has gained on the rejected one."""
    return score(pairs.chosen_ratio, hparams, divergence) - score(pairs.rejected_ratio, hparams, divergence)


def _margin_per_token(pairs: PairLogProbs, hparams: HParams, divergence: Divergence) -> Float[Array, " pairs"]:
    chosen = score(pairs.chosen_ratio, hparams, divergence) / jnp.maximum(pairs.chosen_tokens, 1)
    return chosen - score(pairs.rejected_ratio, hparams, divergence) / jnp.maximum(pairs.rejected_tokens, 1)


def _smoothed(logits: Float[Array, " pairs"], label_smoothing: Array) -> Float[Array, " pairs"]:
    """Return the cross-entropy of "chosen is better" whose label is wrong with probability `label_smoothing`."""
    right, wrong = jax.nn.log_sigmoid(logits), jax.nn.log_sigmoid(-logits)
    return -(1 - label_smoothing) * right - label_smoothing * wrong


def dpo(pairs: PairLogProbs, hparams: HParams, divergence: Divergence) -> Float[Array, " pairs"]:
    """Return −log σ(β·margin) (Rafailov et al. 2023, equation 7). Label smoothing is cdpo's, and is not read here."""
    return -jax.nn.log_sigmoid(hparams.beta * _margin(pairs, hparams, divergence))


def cdpo(pairs: PairLogProbs, hparams: HParams, divergence: Divergence) -> Float[Array, " pairs"]:
    """Return the smoothed cross-entropy of β·margin (Mitchell 2023, "conservative DPO").

    TRL's "sigmoid" ignores `label_smoothing` without a word.
    """
    return _smoothed(hparams.beta * _margin(pairs, hparams, divergence), hparams.label_smoothing)


def robust(pairs: PairLogProbs, hparams: HParams, divergence: Divergence) -> Float[Array, " pairs"]:
    """Return DPO's loss unbiased by labels that are flipped at a known rate (Chowdhury et al. 2024, equation 12).

    Unlike cdpo it subtracts the flipped term and divides by 1 − 2ε, so that ε must be below 1/2.
    """
    logits, flipped = hparams.beta * _margin(pairs, hparams, divergence), hparams.label_smoothing
    right, wrong = jax.nn.log_sigmoid(logits), jax.nn.log_sigmoid(-logits)
    return (flipped * wrong - (1 - flipped) * right) / (1 - 2 * flipped)


def ipo(pairs: PairLogProbs, hparams: HParams, divergence: Divergence) -> Float[Array, " pairs"]:
    """Return (margin per token − 1/(2β))² (Azar et al. 2023, equation 17, β being its τ).

    The means over tokens are not in the paper; its authors confirmed them to TRL.
    """
    return jnp.square(_margin_per_token(pairs, hparams, divergence) - 1 / (2 * hparams.beta))


def hinge(pairs: PairLogProbs, hparams: HParams, divergence: Divergence) -> Float[Array, " pairs"]:
    """Return max(0, 1 − β·margin) (Zhao et al. 2023, SLiC, on ratios to a reference)."""
    return jax.nn.relu(1 - hparams.beta * _margin(pairs, hparams, divergence))


def normalized(pairs: PairLogProbs, hparams: HParams, divergence: Divergence) -> Float[Array, " pairs"]:
    """Return −log σ(β·margin per token) (Lambert et al. 2024, Tülu 3): a β of 5 here is one of about 0.1 in dpo."""
    return -jax.nn.log_sigmoid(hparams.beta * _margin_per_token(pairs, hparams, divergence))


def simpo(pairs: PairLogProbs, hparams: HParams, divergence: Divergence) -> Float[Array, " pairs"]:
    """Return the smoothed cross-entropy of β·(mean log-probability's margin) − γ (Meng et al. 2024, equation 6).

    Without a reference. γ is `simpo_gamma` itself and not its ratio to β. TRL smooths labels here too.
    """
    del divergence
    chosen = pairs.chosen / jnp.maximum(pairs.chosen_tokens, 1)
    rejected = pairs.rejected / jnp.maximum(pairs.rejected_tokens, 1)
    return _smoothed(hparams.beta * (chosen - rejected) - hparams.simpo_gamma, hparams.label_smoothing)


def orpo(pairs: PairLogProbs, hparams: HParams, divergence: Divergence) -> Float[Array, " pairs"]:
    """Return −β·log σ(log odds ratio) (Hong et al. 2024, equations 4 and 7, β being its λ), of mean log-probabilities.

    The loss of the chosen answer, which the objective adds, is the other half of ORPO; as in TRL, and in the authors'
    code, it is that of prompt and answer.
    """
    del divergence
    chosen = pairs.chosen / jnp.maximum(pairs.chosen_tokens, 1)
    rejected = pairs.rejected / jnp.maximum(pairs.rejected_tokens, 1)
    log_odds = (chosen - rejected) - (_log1mexp(chosen) - _log1mexp(rejected))
    return -hparams.beta * jax.nn.log_sigmoid(log_odds)


def _log1mexp(x: Float[Array, " pairs"]) -> Float[Array, " pairs"]:
    """Return log(1 − e^x) of x < 0 without cancellation (Mächler 2012)."""
    x = jnp.minimum(x, -jnp.finfo(jnp.float32).tiny)
    near = x > -math.log(2)
    return jnp.where(near, jnp.log(-jnp.expm1(jnp.where(near, x, -1.0))), jnp.log1p(-jnp.exp(jnp.where(near, -1.0, x))))


def cpo(pairs: PairLogProbs, hparams: HParams, divergence: Divergence) -> Float[Array, " pairs"]:
    """Return the smoothed cross-entropy of β·(log-probabilities' margin), without a reference (Xu et al. 2024).

    The paper adds the loss of the chosen answer: `nll_weight` 1, which is no default here.
    """
    del divergence
    return _smoothed(hparams.beta * (pairs.chosen - pairs.rejected), hparams.label_smoothing)


def kto(pairs: PairLogProbs, hparams: HParams, divergence: Divergence) -> Float[Array, " pairs"]:
    """Return the mean of KTO's losses of both answers (Ethayarajh et al. 2024, equation 8), chosen desirable.

    A pair has no answers to other prompts, of which the paper estimates the policy's distance: as in its authors' first
    code, the reference point of each side is the other side's mean log ratio, at least 0 and without a gradient. Rated
    answers (`rated_kto`) have the paper's estimate.
    """
    del divergence
    point = lambda ratios: jax.lax.stop_gradient(jnp.maximum(jnp.mean(ratios), 0))
    desirable = rated_kto(pairs.chosen_ratio, jnp.ones(()), point(pairs.rejected_ratio), hparams)
    undesirable = rated_kto(pairs.rejected_ratio, jnp.zeros(()), point(pairs.chosen_ratio), hparams)
    return (desirable + undesirable) / 2


def rated_kto(
    log_ratio: Float[Array, " answers"], desirable: Array, reference_point: Array, hparams: HParams
) -> Float[Array, " answers"]:
    """Return λ·(1 − σ(±β·(log ratio − reference point))): λ and the sign by whether an answer is desirable.

    reference_point: max(0, mean log ratio of answers to other prompts), without a gradient.
    """
    gain = hparams.beta * (log_ratio - reference_point)
    return jnp.where(
        desirable > 0,
        hparams.desirable_weight * (1 - jax.nn.sigmoid(gain)),
        hparams.undesirable_weight * (1 - jax.nn.sigmoid(-gain)),
    )


def exo_pair(pairs: PairLogProbs, hparams: HParams, divergence: Divergence) -> Float[Array, " pairs"]:
    """Return KL(policy ‖ labels) of two answers (Ji et al. 2024, equation 16); label_smoothing must be above 0."""
    logits, smoothing = hparams.beta * _margin(pairs, hparams, divergence), hparams.label_smoothing
    chosen = jax.nn.sigmoid(logits) * (jax.nn.log_sigmoid(logits) - jnp.log1p(-smoothing))
    return chosen + jax.nn.sigmoid(-logits) * (jax.nn.log_sigmoid(-logits) - jnp.log(smoothing))


def nca_pair(pairs: PairLogProbs, hparams: HParams, divergence: Divergence) -> Float[Array, " pairs"]:
    """Return noise contrastive alignment of a pair (Chen et al. 2024)."""
    del divergence
    chosen, rejected = hparams.beta * pairs.chosen_ratio, hparams.beta * pairs.rejected_ratio
    noise = jax.nn.log_sigmoid(-chosen) + jax.nn.log_sigmoid(-rejected)
    return -jax.nn.log_sigmoid(chosen) - 0.5 * noise


def bco_pair(pairs: PairLogProbs, hparams: HParams, divergence: Divergence) -> Float[Array, " pairs"]:
    """Return binary classifier optimisation of a pair (Jung et al. 2024), without its moving reference point."""
    del divergence
    return -jax.nn.log_sigmoid(hparams.beta * pairs.chosen_ratio) - jax.nn.log_sigmoid(
        -hparams.beta * pairs.rejected_ratio
    )


def sppo_hard(pairs: PairLogProbs, hparams: HParams, divergence: Divergence) -> Float[Array, " pairs"]:
    """Return self-play preference optimisation with certain labels (Wu et al. 2024, equation 4.7)."""
    del divergence
    target = 0.5 / hparams.beta
    return jnp.square(pairs.chosen_ratio - target) + jnp.square(pairs.rejected_ratio + target)


def aot(pairs: PairLogProbs, hparams: HParams, divergence: Divergence) -> Float[Array, " pairs"]:
    """Return alignment by optimal transport of paired data (Melnyk et al. 2024): margins compared in sorted order."""
    del divergence
    policy = jnp.sort(pairs.chosen - pairs.rejected)
    reference = jnp.sort(pairs.reference_chosen - pairs.reference_rejected)
    return _smoothed(hparams.beta * (policy - reference), hparams.label_smoothing)


def aot_unpaired(pairs: PairLogProbs, hparams: HParams, divergence: Divergence) -> Float[Array, " pairs"]:
    """Return alignment by optimal transport of unpaired data (Melnyk et al. 2024)."""
    del divergence
    margin = jnp.sort(pairs.chosen_ratio) - jnp.sort(pairs.rejected_ratio)
    return _smoothed(hparams.beta * margin, hparams.label_smoothing)


def apo_zero(pairs: PairLogProbs, hparams: HParams, divergence: Divergence) -> Float[Array, " pairs"]:
    """Return anchored preference optimisation for chosen answers above the model's own (D'Oosterlinck et al. 2024)."""
    del divergence
    chosen = 1 - jax.nn.sigmoid(hparams.beta * pairs.chosen_ratio)
    return chosen + jax.nn.sigmoid(hparams.beta * pairs.rejected_ratio)


def apo_down(pairs: PairLogProbs, hparams: HParams, divergence: Divergence) -> Float[Array, " pairs"]:
    """Return anchored preference optimisation for chosen answers below the model's own (D'Oosterlinck et al. 2024)."""
    del divergence
    chosen = jax.nn.sigmoid(hparams.beta * pairs.chosen_ratio)
    return chosen + 1 - jax.nn.sigmoid(hparams.beta * (pairs.chosen_ratio - pairs.rejected_ratio))


def discopop(pairs: PairLogProbs, hparams: HParams, divergence: Divergence) -> Float[Array, " pairs"]:
    """Return the loss that a search found: a blend of logistic and exponential (Lu et al. 2024, equation 5)."""
    logits = hparams.beta * _margin(pairs, hparams, divergence)
    blend = jax.nn.sigmoid(logits / _DISCOPOP_TEMPERATURE)
    return -jax.nn.log_sigmoid(logits) * (1 - blend) + jnp.exp(-logits) * blend


LOSSES: dict[str, PairLoss] = {
    loss.__name__: loss
    for loss in (
        *(dpo, cdpo, robust, ipo, hinge, normalized, simpo, orpo, kto, cpo),
        *(exo_pair, nca_pair, bco_pair, sppo_hard, aot, aot_unpaired, apo_zero, apo_down, discopop),
    )
}
REFERENCE_FREE = ("simpo", "orpo", "cpo")
OF_WHOLE_BATCHES = ("kto", "aot", "aot_unpaired")
"""Losses of a pair that depend on the batch's other pairs, so that microbatches do not add up."""
SORTED = ("aot", "aot_unpaired")
"""Losses that compare answers in sorted order, so that none belongs to a pair."""
DIVERGING = ("dpo", "cdpo", "robust", "ipo", "hinge", "normalized", "exo_pair", "discopop")
"""Losses that take another divergence than reverse_kl."""
