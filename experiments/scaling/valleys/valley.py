"""Describe one budget's valley: its runs, the curve through them, and whether its minimum is reliable.

The curves are linear in the losses once their shape is fixed, so that thousands of bootstrap draws are one
product. Coordinates: u = ln N − mean(ln N) of the budget's runs.
"""

from dataclasses import asdict, dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Int

from experiments.scaling.law.intervals import exponential
from experiments.scaling.law.outliers import Outlier
from experiments.words import counted

SAME_BUDGET = 1.05  # budgets within 5 % are one: whole numbers of steps and heads make exact budgets impossible
STRAIGHT = 1e-4  # a smaller skew counts as 0, as the bent square would cancel numerically
MINIMUM_SIZES = 3  # of one budget: a curve with three coefficients


@runtime_checkable
class ValleyShape(Protocol):
    """A family of curves with at least three degrees of freedom, and its minimum."""

    @property
    def name(self) -> str:
        """Name in reasons and messages."""
        ...

    def operator(self, u: Float[np.ndarray, " runs"], at: Float[np.ndarray, " at"]) -> Float[np.ndarray, "at runs"]:
        """Return the fitted curve at `at` is this matrix times the losses of runs at `u`."""
        ...

    def minimum(self, u: Float[np.ndarray, " runs"], loss: Float[np.ndarray, "*draws runs"]) -> tuple[Any, Any, Any]:
        """Return (u*, loss, curvature) of each draw's minimum; the curvature is half the second derivative there.

        u* is NaN or outside the runs where the curve has no minimum inside.
        """
        ...


@dataclass(frozen=True)
class Convex:
    """c0 + c1·u + c2·(e^{tu} − 1 − tu)·2/t², a parabola whose second derivative grows as e^{tu}; t = 0 is the parabola.

    A law E + A·N^−α + B·D^−β has f'''/f'' = β − α at every valley's minimum, so that one skew t ≈ β − α serves all
    budgets. The family is closed under shifts of u, and convex for every t where c2 > 0.
    """

    skew: float = 0.0
    name: str = "parabola"

    def basis(self, u: Float[np.ndarray, " at"]) -> Float[np.ndarray, "at 3"]:
        """Return 1, u and the bent square."""
        return bent_bases(u, np.asarray(self.skew))

    def coefficients(
        self, u: Float[np.ndarray, " runs"], loss: Float[np.ndarray, "*draws runs"]
    ) -> Float[np.ndarray, "*draws 3"]:
        """Return the coefficients of least squares."""
        return loss @ np.linalg.pinv(self.basis(u)).T

    def operator(self, u: Float[np.ndarray, " runs"], at: Float[np.ndarray, " at"]) -> Float[np.ndarray, "at runs"]:
        """Return the operator that `ValleyShape` describes."""
        return self.basis(at) @ np.linalg.pinv(self.basis(u))

    def minimum(self, u: Float[np.ndarray, " runs"], loss: Float[np.ndarray, "*draws runs"]) -> tuple[Any, Any, Any]:
        """Return the minimum in closed form, without limits: the vertex may lie outside the runs."""
        return bent_minimum(self.coefficients(u, loss), np.asarray(self.skew))


PARABOLA = Convex()


def _bent_square(u: np.ndarray, skew: np.ndarray) -> np.ndarray:
    """Return (e^{tu} − 1 − tu)·2/t², or u² where t is too small to divide by."""
    straight = np.abs(skew) < STRAIGHT
    t = np.where(straight, 1.0, skew)
    tu = np.where(straight, 0.0, t * u)  # the parabola's vertex may overflow the exponential
    return np.where(straight, u**2, 2 * (np.expm1(tu) - tu) / t**2)


def bent_bases(u: Float[np.ndarray, " at"], skews: Float[np.ndarray, "*skews"]) -> Float[np.ndarray, "*skews at 3"]:
    """Return 1, u and the bent square of `Convex`, for many skews at once."""
    bent = _bent_square(u, skews[..., None])
    return np.stack([np.broadcast_to(u**0, bent.shape), np.broadcast_to(u, bent.shape), bent], axis=-1)


def bent_minimum(
    coefficients: Float[np.ndarray, "*draws 3"], skews: Float[np.ndarray, "#*draws"]
) -> tuple[Any, Any, Any]:
    """Return (u*, loss, curvature) of `Convex` curves, each with its own skew; u* is NaN if there is none."""
    c0, c1, c2 = np.moveaxis(coefficients, -1, 0)
    straight = np.abs(skews) < STRAIGHT
    t = np.where(straight, 1.0, skews)
    with np.errstate(divide="ignore", invalid="ignore"):
        c2 = np.where(np.abs(c2) > 1e-12 * np.abs(c0), c2, np.nan)  # a straight line
        ratio = c1 / (2 * c2)
        vertex = np.where(straight, -ratio, np.log1p(-t * ratio) / t)
        return (
            vertex,
            c0 + c1 * vertex + c2 * _bent_square(vertex, skews),
            c2 * np.exp(np.where(straight, 0.0, t * vertex)),
        )


@dataclass(frozen=True)
class ValleyMinimum:
    """The minimum of an accepted valley; near it the curve is loss + curvature·ln²(N/params)."""

    flops: float
    params: float
    tokens: float
    loss: float
    curvature: float
    runs: int
    smallest: float
    """Parameters of the smallest run that the curve is fitted to."""
    largest: float

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Valley:
    """The runs of one budget and the curve through them, loss = loss* + curvature·ln²(N/N*) near its minimum."""

    flops: float
    """FLOPs; the geometric mean of the runs'."""
    params: Float[np.ndarray, " runs"]
    tokens: Float[np.ndarray, " runs"]
    loss: Float[np.ndarray, " runs"]
    coefficients: Float[np.ndarray, "3"] | None
    """The parabola's: c0 + c1·u + c2·u² with u = ln N − mean(ln N); None with fewer than three sizes."""
    reason: str | None
    """Why the valley is rejected, or None."""
    shape: ValleyShape = PARABOLA
    outliers: list[Outlier] = field(default_factory=list)
    """The budget's runs that were left out."""
    runs_at_fault: bool = False
    """Return whether the reason comes from the runs, so that no other curve would change it."""

    @property
    def u(self) -> Float[np.ndarray, " runs"]:
        """ln N − mean(ln N)."""
        log_params = np.log(self.params)
        return log_params - log_params.mean()

    @property
    def optimum(self) -> ValleyMinimum:
        """The minimum of an accepted valley."""
        assert self.coefficients is not None, "fewer than three sizes: no curve"
        vertex, loss, curvature = self.shape.minimum(self.u, self.loss)
        log_params, log_tokens = np.log(self.params), np.log(self.tokens)
        return ValleyMinimum(
            flops=self.flops,
            params=float(np.exp(vertex + log_params.mean())),
            tokens=float(np.exp(tokens_line(log_params, log_tokens) @ [1.0, vertex])),
            loss=float(loss),
            curvature=float(curvature),
            runs=len(self.loss),
            smallest=float(self.params.min()),
            largest=float(self.params.max()),
        )

    def curve(self, params: Any) -> Any:
        """Return the fitted loss at `params` parameters."""
        assert self.coefficients is not None, "fewer than three sizes: no curve"
        at = np.log(np.asarray(params, np.float64)) - np.log(self.params).mean()
        return (self.shape.operator(self.u, np.atleast_1d(at)) @ self.loss).reshape(at.shape)[()]


def tokens_line(log_params: np.ndarray, log_tokens: np.ndarray) -> Float[np.ndarray, "2"]:
    """Fit log D = c0 + c1·u at one budget; D = C/(6N) makes it exact with c1 = −1, other conventions bend it."""
    u = log_params - log_params.mean()
    return np.array([log_tokens.mean(), u @ (log_tokens - log_tokens.mean()) / (u @ u)])


def mean_by_size(params: np.ndarray) -> Float[np.ndarray, "sizes runs"]:
    """Return the matrix that averages the runs of each size; sizes ascend."""
    member = params[None] == np.unique(params)[:, None]
    return member / member.sum(1, keepdims=True)


def rejection(
    params: Float[np.ndarray, " runs"], loss: Float[np.ndarray, "*draws runs"], vertex: Any, curvature: Any
) -> tuple[Bool[np.ndarray, "*draws"], Bool[np.ndarray, "*draws"], Bool[np.ndarray, "*draws"]]:
    """Return three flags per draw: not convex; lowest loss at an edge; vertex outside the sizes."""
    flat = np.asarray(~(curvature > 1e-12 * np.abs(loss).mean(-1)))
    lowest = (loss @ mean_by_size(params).T).argmin(-1)
    edge = np.asarray((lowest == 0) | (lowest == len(np.unique(params)) - 1))
    u = np.log(params) - np.log(params).mean()
    outside = np.asarray(~((vertex > u.min()) & (vertex < u.max())))
    return flat, edge, outside


def reason_against(params: np.ndarray, loss: np.ndarray, shape: ValleyShape) -> str | None:
    """Return the reason why this budget's minimum is unreliable, or None."""
    sizes = np.unique(params)
    if len(sizes) < MINIMUM_SIZES:
        return f"{counted(len(sizes), 'model size')} where a {shape.name} needs {MINIMUM_SIZES}"
    log_params = np.log(params)
    vertex, _, curvature = shape.minimum(log_params - log_params.mean(), loss)
    flat, edge, outside = rejection(params, loss, vertex, curvature)
    if edge:
        side = sizes[(mean_by_size(params) @ loss).argmin()]
        where, toward = ("smallest", "smaller") if side == sizes[0] else ("largest", "larger")
        return f"the lowest loss is at the {where} size, N={side:.3g}: an edge, so {toward} models are needed"
    if flat:
        return f"the {shape.name} through the losses is not convex: it has no minimum"
    if outside:
        at = float(exponential(vertex + log_params.mean()))
        return f"the {shape.name}'s minimum, N={at:.3g}, is outside the sizes {sizes[0]:.3g}…{sizes[-1]:.3g}"
    return None


def group_budgets(flops: Float[np.ndarray, " runs"]) -> list[Int[np.ndarray, " _members"]]:
    """Return the row numbers by budget, ascending.

    A run joins while it is within 5 % of the run below it and the group stays within ±5 % of its middle, so that a
    dense ladder of budgets cannot chain into one.
    """
    order = np.argsort(flops, kind="stable")
    groups: list[list[int]] = []
    for i in order:
        if (
            groups
            and flops[i] <= SAME_BUDGET * flops[groups[-1][-1]]
            and flops[i] <= SAME_BUDGET**2 * flops[groups[-1][0]]
        ):
            groups[-1].append(i)
        else:
            groups.append([i])
    return [np.array(sorted(group)) for group in groups]
