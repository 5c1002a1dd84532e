"""Evaluate laws that are sums of terms, with the derivatives that the Newton solver needs.

log L̂ = τ·log Σ_j exp(u_j(θ)/τ): at τ = 1 the terms e^u_j add, and a temperature that is itself an unknown gives the
form of Kaplan et al. 2020. Let p_j be the terms' shares, S the log-sum-exp, and w_j = ∇u_j − (u_j/τ)·∇τ. Then
∇log L̂ = E_p[w] + S·∇τ and ∇²log L̂ = Cov_p[w]/τ + E_p[∇²u].
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from experiments.scaling.law.huber import Derivatives, huber


@dataclass(frozen=True)
class Terms:
    """The terms of a law at a batch of θ. Jacobians that do not depend on θ have a first axis of one."""

    values: list[np.ndarray]
    """u_j [problems, rows]."""
    jacobians: list[np.ndarray]
    """∇u_j [problems or 1, unknowns, rows]."""
    curvature: Callable[[list[np.ndarray]], np.ndarray] | None = None
    """From one weight m_j [problems, rows] per term: Σ_rows Σ_j m_j·∇²u_j, [problems, unknowns, unknowns]."""
    temperature: tuple[int, float] | None = None
    """(k, unit): τ = θ_k / unit; None is τ = 1."""

    def tau(self, theta: np.ndarray) -> np.ndarray:
        """Return τ as [problems, 1], or the one number 1."""
        if self.temperature is None:
            return np.ones((1, 1))
        index, unit = self.temperature
        return theta[:, index : index + 1] / unit


def mix(terms: Terms, theta: np.ndarray) -> tuple[np.ndarray, list[np.ndarray], list[np.ndarray]]:
    """Return S [problems, rows], the shares p_j of the terms, and u_j/τ."""
    tau = terms.tau(theta)
    cooled = [value / tau for value in terms.values]
    top = cooled[0]
    for value in cooled[1:]:
        top = np.maximum(top, value)
    weights = [np.exp(value - top) for value in cooled]
    total = sum(weights[1:], start=weights[0])
    return top + np.log(total), [weight / total for weight in weights], cooled


def log_prediction(terms: Terms, theta: Float[np.ndarray, "problems unknowns"]) -> Float[np.ndarray, "problems rows"]:
    """Return log L̂, L̂ in nats per token."""
    return terms.tau(theta) * mix(terms, theta)[0]


def evaluate(
    terms: Terms,
    theta: Float[np.ndarray, "problems unknowns"],
    weights: Float[np.ndarray, "problems rows"],
    log_loss: Float[np.ndarray, " rows"],
    delta: float,
) -> Derivatives:
    """Return Σ_i w_i·Huber_δ(log L̂_i − log L_i) of every problem, its gradient and its exact Hessian."""
    tau = terms.tau(theta)
    level, shares, cooled = mix(terms, theta)
    jacobians = terms.jacobians
    if terms.temperature is not None:
        index, unit = terms.temperature
        along = np.zeros((1, theta.shape[1], 1))
        along[0, index] = 1 / unit
        jacobians = [jacobian - value[:, None] * along for jacobian, value in zip(jacobians, cooled, strict=True)]
    mean = sum(share[:, None] * jacobian for share, jacobian in zip(shares, jacobians, strict=True))
    slope_of_law = mean if terms.temperature is None else mean + level[:, None] * along

    residual = tau * level - log_loss
    objective = (weights * huber(residual, delta)).sum(1)
    slope = weights * np.clip(residual, -delta, delta)
    gradient = np.matmul(slope_of_law, slope[:, :, None])[:, :, 0]
    inside = weights * (np.abs(residual) <= delta)
    if terms.temperature is None:
        hessian = _product(mean, inside - slope)
    else:
        hessian = _product(slope_of_law, inside) - _product(mean, slope / tau)
    moments = [slope * share for share in shares]
    for moment, jacobian in zip(moments, jacobians, strict=True):
        hessian += _product(jacobian, moment / tau)
    if terms.curvature is not None:
        hessian += terms.curvature(moments)
    return objective, gradient, hessian


def _product(jacobian: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Return Σ_rows weight·∇∇ᵀ, [problems, unknowns, unknowns]; one matrix product where the Jacobian is shared."""
    if len(jacobian) == 1:
        unknowns, rows = jacobian.shape[1:]
        outer = (jacobian[0][:, None] * jacobian[0][None]).reshape(unknowns**2, rows)
        return (weight @ outer.T).reshape(len(weight), unknowns, unknowns)
    return np.matmul(jacobian * weight[:, None], jacobian.transpose(0, 2, 1))
