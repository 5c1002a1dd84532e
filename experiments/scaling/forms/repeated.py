"""Define the data-constrained law (Muennighoff et al. 2023, arXiv 2305.16264, section 3): the worth of repeated data.

A quantity X made of U fresh units seen 1 + R times is worth X' = U·(1 + R*·(1 − e^(−R/R*))): the first repeats are
worth as much as fresh data, all together at most U·(1 + R*). It holds for tokens (U unique of D) and for parameters
beyond the compute-optimal number U_N for U tokens. The paper fits R* after the other unknowns; here all are fitted
together, so that their intervals reflect each other's uncertainty.
"""

from dataclasses import dataclass

import numpy as np

from experiments.scaling.forms.form import Features, LawForm, SolverScale
from experiments.scaling.forms.terms import Terms

START_RATES = (0.1, 0.2, 0.35, 0.5, 0.8)
START_WORTH = (3.0, 15.0)
LARGEST_EXCESS = 30.0  # bound of ln(N/U_N): only diverging steps exceed it
WORTH = (1e-2, 1e4)  # above the upper bound repeats are as good as fresh data


@dataclass(frozen=True)
class _Worth:
    """φ = ln X' − ln X as a function of m = ln(1 + R) and ρ = ln R*, with its derivatives."""

    value: np.ndarray
    m: np.ndarray
    rho: np.ndarray
    mm: np.ndarray
    m_rho: np.ndarray
    rho_rho: np.ndarray


def worth(m: np.ndarray, rho: np.ndarray) -> _Worth:
    """Return φ and its derivatives, shapes broadcast; zero with vanishing slopes at m = 0."""
    limit = np.exp(rho)
    z = np.minimum(np.expm1(m) / limit, 500.0)  # e^−z is 0 beyond, and nothing overflows
    left = np.exp(-z)
    gain = -limit * np.expm1(-z)
    whole = 1 + gain
    rising = np.exp(m) * left / whole
    gain_rho = gain - limit * z * left
    rho_1 = gain_rho / whole
    return _Worth(
        value=np.log(whole) - m,
        m=rising - 1,
        rho=rho_1,
        mm=rising * (1 - np.exp(m) / limit) - rising**2,
        m_rho=rising * z - rising * rho_1,
        rho_rho=(gain_rho - limit * z**2 * left) / whole - rho_1**2,
    )


@dataclass(frozen=True)
class RepeatedForm(LawForm):
    """Three terms in N' and D'; θ = (E, A, B, alpha, beta, R_D[, R_N]) with the R* as logarithms."""

    extra_starts: int = 0
    """Of a bootstrap draw, besides the best fit. With tokens alone all 50 starts of a grid ended in one minimum."""
    excess: bool = False
    """Whether parameters too can be in excess (N' rather than N)."""

    @property
    def unknowns(self) -> tuple[str, ...]:
        """Coefficients, rates, then the worth of repeats."""
        return super().unknowns + (("R_D", "R_N") if self.excess else ("R_D",))

    def terms(self, theta: np.ndarray, features: Features, scale: SolverScale) -> Terms:
        """Return the floor, the term of N (or N') and that of D', with all that depends on θ in them."""
        rows, count = len(features["D"]), theta.shape[1]
        N, D, U = (features[name][None] for name in ("N", "D", "U"))
        shape = (len(theta), count, rows)
        floor = np.zeros((1, count, rows))
        floor[0, 0] = 1.0

        tokens = worth(D - U, theta[:, 5:6])
        d_tokens = np.zeros(shape)
        d_tokens[:, 5] = tokens.rho
        if self.excess:
            m, d_m, second_m = self._excess(theta, N, U, scale)
            params = worth(m, theta[:, 6:7])
            d_params = params.m[:, None] * d_m
            d_params[:, 6] = params.rho

        def term(i: int, feature: str, log: np.ndarray, d_log: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
            rate, unit = theta[:, i + 2 : i + 3], scale.unit[self.rates[i - 1]]
            offset = (log - scale.centre[feature]) / unit
            jacobian = np.zeros(shape) if d_log is None else -(rate / unit)[:, None] * d_log
            jacobian[:, i] += 1.0
            jacobian[:, i + 2] -= offset
            return theta[:, i : i + 1] - rate * offset, jacobian

        log_params = N + params.value if self.excess else N + np.zeros((len(theta), 1))
        u_params, j_params = term(1, "N", log_params, d_params if self.excess else None)
        u_tokens, j_tokens = term(2, "D", D + tokens.value, d_tokens)

        def curvature(moments: list[np.ndarray]) -> np.ndarray:
            total = np.zeros((len(theta), count, count))
            unit_n, unit_d = (scale.unit[rate] for rate in self.rates)
            cross = np.matmul(d_tokens, moments[2][:, :, None])[:, :, 0] / unit_d
            total[:, 4] -= cross
            total[:, :, 4] -= cross
            total[:, 5, 5] -= theta[:, 4] / unit_d * (moments[2] * tokens.rho_rho).sum(1)
            if self.excess:
                cross = np.matmul(d_params, moments[1][:, :, None])[:, :, 0] / unit_n
                total[:, 3] -= cross
                total[:, :, 3] -= cross
                weight = -(theta[:, 3:4] / unit_n) * moments[1]
                total += np.matmul(d_m * (weight * params.mm)[:, None], d_m.transpose(0, 2, 1))
                mixed = np.matmul(d_m, (weight * params.m_rho)[:, :, None])[:, :, 0]
                total[:, 6] += mixed
                total[:, :, 6] += mixed
                total[:, 6, 6] += (weight * params.rho_rho).sum(1)
                for (k, j), values in second_m.items():
                    moment = (weight * params.m * values).sum(1)
                    total[:, k, j] += moment
                    if k != j:
                        total[:, j, k] += moment
            return total

        u_floor = theta[:, :1] + np.zeros(rows)
        return Terms([u_floor, u_params, u_tokens], [floor, j_params, j_tokens], curvature)

    def _excess(self, theta: np.ndarray, N: np.ndarray, U: np.ndarray, scale: SolverScale):
        """Return m = ln(N/U_N) where positive, its gradient and its second derivatives.

        N and D are optimal together where αA·N^−α = βB·D^−β, which gives U_N at D = U.
        """
        unit_n, unit_d = (scale.unit[rate] for rate in self.rates)
        alpha, beta = theta[:, 3:4] / unit_n, theta[:, 4:5] / unit_d
        tokens = U - scale.centre["D"]
        level = beta * tokens + np.log(alpha) - np.log(beta) + theta[:, 1:2] - theta[:, 2:3]
        m = N - scale.centre["N"] - level / alpha
        over = ((m > 0) & (m < LARGEST_EXCESS)).astype(np.float64)
        d_m = np.zeros((len(theta), theta.shape[1], m.shape[1]))
        by_beta = tokens - 1 / beta
        d_m[:, 1], d_m[:, 2] = -over / alpha, over / alpha
        d_m[:, 3] = -over * (1 - level) / alpha**2 / unit_n
        d_m[:, 4] = -over * by_beta / alpha / unit_d
        second = {
            (1, 3): over / alpha**2 / unit_n,
            (2, 3): -over / alpha**2 / unit_n,
            (3, 3): over * (3 - 2 * level) / alpha**3 / unit_n**2,
            (3, 4): over * by_beta / alpha**2 / unit_n / unit_d,
            (4, 4): -over / (beta**2 * alpha) / unit_d**2,
        }
        return np.clip(m, 0.0, LARGEST_EXCESS), d_m, second

    def bounds(self, scale: SolverScale) -> tuple[np.ndarray, np.ndarray]:
        """Return the bounds; rates stay above zero, as U_N divides by them, and R* is in [0.01, 10,000]."""
        lower, upper = super().bounds(scale)
        lower[3:5] = [1e-3 * scale.unit[rate] for rate in self.rates]
        extra = len(self.unknowns) - 5
        return np.append(lower, [np.log(WORTH[0])] * extra), np.append(upper, [np.log(WORTH[1])] * extra)

    def natural(self, theta: np.ndarray, scale: SolverScale) -> np.ndarray:
        """Return θ in the units of the columns; R* are counts of repetitions."""
        values = super().natural(theta, scale)
        values[:, 5:] = np.exp(theta[:, 5:])
        return values

    def starts(self, features: Features, log_loss: np.ndarray, scale: SolverScale) -> np.ndarray:
        """Return starts with exponents on a grid, coefficients as if all tokens were fresh, R* few or many."""
        plain = LawForm(self.name, self.formula, self.source, self.needs, self.parts)
        units = np.array([scale.unit[rate] for rate in self.rates])
        rates = np.array([(alpha, beta) for alpha in START_RATES for beta in START_RATES]) * units
        base = plain.with_coefficients(rates, features, log_loss, scale)
        extra = len(self.unknowns) - 5
        return np.concatenate([np.append(base, np.full((len(base), extra), np.log(r)), axis=1) for r in START_WORTH])
