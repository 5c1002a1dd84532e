"""Solve the Huber objective by a batched Newton method, of a parametric scaling law.

One call minimises a batch of problems (starts, bootstrap draws); `minimise` is for the three terms E + A·N^−α + B·D^−β,
each problem

    f(θ) = Σ_i w_i · Huber_δ( LSE(e, a − α·x_i, b − β·y_i) − l_i )

over θ = (e, a, b, α, β), in natural logarithms. At δ = 1e-3 most residuals of real runs sit on the linear
part of Huber, where the objective is nearly a sum of absolute values: its curvature changes abruptly
whenever a residual crosses ±δ, which makes quasi-Newton methods stop early. Here the Hessian is exact (the
curvature of the law itself included) and made positive by the absolute values of its eigenvalues
(saddle-free Newton, Dauphin et al. 2014) plus a Levenberg–Marquardt term, so the last steps converge
quadratically and "converged" can mean a vanishing gradient.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

MAX_ITERATIONS = 400
SAME_OBJECTIVE = 1e-6
GRADIENT_TOLERANCE = 1e-10  # of δ·Σw, the largest gradient that the residuals could make

Derivatives = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Objective [problems], gradient [problems, unknowns] and Hessian [problems, unknowns, unknowns]."""


@dataclass(frozen=True)
class Minimum:
    """The end point of each problem of a batch."""

    theta: Float[np.ndarray, "problems unknowns"]
    objective: Float[np.ndarray, "problems"]
    gradient: Float[np.ndarray, "problems"]
    """Largest entry of the projected gradient as a fraction of δ·Σw; `GRADIENT_TOLERANCE` is converged."""


def huber(residual: np.ndarray, delta: float) -> np.ndarray:
    """Return r²/2 within ±δ, δ·(|r| − δ/2) outside."""
    size = np.abs(residual)
    return np.where(size <= delta, 0.5 * residual**2, delta * (size - 0.5 * delta))


def log_law(
    theta: Float[np.ndarray, "problems 5"], x: Float[np.ndarray, " rows"], y: Float[np.ndarray, " rows"]
) -> tuple[Float[np.ndarray, "problems rows"], tuple[Float[np.ndarray, "problems rows"], ...]]:
    """Return log L̂ by log-sum-exp, and the shares of L̂ that the three terms E, A·N^−α, B·D^−β have."""
    e, a, b, alpha, beta = (theta[:, i : i + 1] for i in range(5))
    terms = (e + np.zeros_like(x), a - alpha * x, b - beta * y)
    top = np.maximum(np.maximum(terms[0], terms[1]), terms[2])
    weights = [np.exp(term - top) for term in terms]
    total = weights[0] + weights[1] + weights[2]
    return top + np.log(total), tuple(weight / total for weight in weights)


def _evaluate(theta, weights, x, y, log_loss, delta):
    """Return objective, gradient and exact Hessian of every problem."""
    predicted, (share_e, share_a, share_b) = log_law(theta, x, y)
    residual = predicted - log_loss
    objective = (weights * huber(residual, delta)).sum(1)
    slope = weights * np.clip(residual, -delta, delta)
    jacobian = np.stack([share_e, share_a, share_b, -x * share_a, -y * share_b], axis=1)
    gradient = np.matmul(jacobian, slope[:, :, None])[:, :, 0]
    # ∇²r = Σ_j share_j m_j m_jᵀ − ∇r ∇rᵀ with m_j the (constant) gradient of term j's exponent.
    curvature = weights * (np.abs(residual) <= delta) - slope
    hessian = np.matmul(jacobian * curvature[:, None], jacobian.transpose(0, 2, 1))
    hessian[:, 0, 0] += (slope * share_e).sum(1)
    for scale, coordinate, share in ((1, x, share_a), (2, y, share_b)):
        rate = scale + 2
        moments = (slope * share) @ np.stack([np.ones_like(coordinate), -coordinate, coordinate**2], axis=1)
        hessian[:, scale, scale] += moments[:, 0]
        hessian[:, scale, rate] += moments[:, 1]
        hessian[:, rate, scale] += moments[:, 1]
        hessian[:, rate, rate] += moments[:, 2]
    return objective, gradient, hessian


def _blocked(theta, gradient, lower, upper) -> Bool[np.ndarray, "problems unknowns"]:
    """Return coordinates at a bound that the gradient pushes outward."""
    return ((theta <= lower) & (gradient > 0)) | ((theta >= upper) & (gradient < 0))


def minimise(
    theta: Float[np.ndarray, "problems 5"],
    weights: Float[np.ndarray, "#problems rows"],
    x: Float[np.ndarray, " rows"],
    y: Float[np.ndarray, " rows"],
    log_loss: Float[np.ndarray, " rows"],
    *,
    delta: float,
    lower: Float[np.ndarray, "5"],
    upper: Float[np.ndarray, "5"],
    max_iterations: int = MAX_ITERATIONS,
) -> Minimum:
    """Minimise every problem from its own start, within the box [lower, upper]; see `newton`.

    x and y should be centred and of unit scale, so that one damping fits all five coordinates.
    """

    def evaluate(theta: np.ndarray, weights: np.ndarray) -> Derivatives:
        return _evaluate(theta, weights, x, y, log_loss, delta)

    weights = np.broadcast_to(weights, (len(theta), len(x)))
    return newton(evaluate, theta, weights, delta=delta, lower=lower, upper=upper, max_iterations=max_iterations)


def newton(
    evaluate: Callable[[np.ndarray, np.ndarray], Derivatives],
    theta: Float[np.ndarray, "problems unknowns"],
    weights: Float[np.ndarray, "problems rows"],
    *,
    delta: float,
    lower: Float[np.ndarray, " unknowns"],
    upper: Float[np.ndarray, " unknowns"],
    max_iterations: int = MAX_ITERATIONS,
) -> Minimum:
    """Minimise the Huber objective of any law; `evaluate(theta, weights)` gives it with its two derivatives.

    A problem leaves the batch when its projected gradient vanishes, or when no step lowers its objective.
    """
    theta = np.clip(theta, lower, upper)
    identity = np.eye(theta.shape[1])
    result = Minimum(theta.copy(), np.full(len(theta), np.inf), np.full(len(theta), np.inf))
    index: Int[np.ndarray, " active"] = np.arange(len(theta))
    damping = np.full(len(theta), 1e-3)
    objective, gradient, hessian = evaluate(theta, weights)

    for iteration in range(max_iterations + 1):
        scale = delta * weights.sum(1)
        blocked = _blocked(theta, gradient, lower, upper)
        steepest = np.abs(np.where(blocked, 0.0, gradient)).max(1)
        result.theta[index], result.objective[index] = theta, objective
        result.gradient[index] = steepest / scale
        active = (steepest > GRADIENT_TOLERANCE * scale) & (damping < 1e12)
        if iteration == max_iterations or not active.any():
            break
        theta, weights, objective, gradient, hessian, damping, index, blocked, steepest, scale = (
            array[active]
            for array in (
                theta,
                weights,
                objective,
                gradient,
                hessian,
                damping,
                index,
                blocked,
                steepest,
                scale,
            )
        )

        # A blocked coordinate gets a zero gradient and an isolated row, hence a zero step.
        free_gradient = np.where(blocked, 0.0, gradient)
        either = blocked[:, :, None] | blocked[:, None, :]
        free_hessian = np.where(either, scale[:, None, None] * identity, hessian)
        values, vectors = np.linalg.eigh(free_hessian)
        projected = np.matmul(vectors.transpose(0, 2, 1), free_gradient[:, :, None])[:, :, 0]
        values = np.abs(values)
        damped = np.maximum(values + damping[:, None] * scale[:, None], 1e-14 * scale[:, None])
        expected = (projected**2 / damped - 0.5 * projected**2 * values / damped**2).sum(1)
        trial = np.clip(theta - np.matmul(vectors, (projected / damped)[:, :, None])[:, :, 0], lower, upper)

        new_objective, new_gradient, new_hessian = evaluate(trial, weights)
        new_blocked = _blocked(trial, new_gradient, lower, upper)
        new_steepest = np.abs(np.where(new_blocked, 0.0, new_gradient)).max(1)
        # Near the minimum the objective no longer resolves a step; the gradient still does.
        flat = (new_objective <= objective * (1 + 1e-13)) & (new_steepest < steepest)
        accepted = (new_objective < objective) | flat
        gain = (objective - new_objective) / np.maximum(expected, 1e-300)
        relaxed = np.where(gain > 0.75, damping / 5, np.where(gain < 0.25, damping * 2, damping))
        damping = np.maximum(np.where(accepted, relaxed, damping * 6), 1e-12)
        theta = np.where(accepted[:, None], trial, theta)
        objective = np.where(accepted, new_objective, objective)
        gradient = np.where(accepted[:, None], new_gradient, gradient)
        hessian = np.where(accepted[:, None, None], new_hessian, hessian)
    return result


def best_of(
    objective: Float[np.ndarray, " starts"], gradient: Float[np.ndarray, " starts"], rows: int, delta: float
) -> tuple[int, int]:
    """Return (index of the best start, starts with the same minimum); ties go to the smallest gradient."""
    # The absolute part is the objective of residuals of 1e-7, which decides on tables without noise.
    tolerance = SAME_OBJECTIVE * objective.min() + rows * float(huber(np.array(1e-7), delta))
    lowest = objective <= objective.min() + tolerance
    return int(np.flatnonzero(lowest)[gradient[lowest].argmin()]), int(lowest.sum())
