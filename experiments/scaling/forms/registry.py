"""Register the forms of scaling laws by name."""

import itertools
from dataclasses import dataclass

import numpy as np

from experiments.scaling.forms.form import START_RATES, Features, LawForm, SolverScale
from experiments.scaling.forms.repeated import RepeatedForm
from experiments.scaling.forms.terms import Terms
from model.errors import UnknownNameError


@dataclass(frozen=True)
class KaplanForm(LawForm):
    """Kaplan et al. 2020, equation 1.5: with τ = α_D the terms are (Nc/N)^α_N and (Dc/D)^α_D, and no floor."""

    def terms(self, theta: np.ndarray, features: Features, scale: SolverScale) -> Terms:
        """Return the same two terms, at the temperature α_D."""
        plain = super().terms(theta, features, scale)
        temperature = self.unknowns.index("alpha_D"), scale.unit["alpha_D"]
        return Terms(plain.values, plain.jacobians, temperature=temperature)

    def bounds(self, scale: SolverScale) -> tuple[np.ndarray, np.ndarray]:
        """Return the bounds of the rates; α_D stays above zero, as the law divides by it."""
        lower, upper = super().bounds(scale)
        lower[self.unknowns.index("alpha_D")] = 1e-4 * scale.unit["alpha_D"]
        return lower, upper

    def natural(self, theta: np.ndarray, scale: SolverScale) -> np.ndarray:
        """Return Nc and Dc from (Nc)^α_N and (Dc)^α_D."""
        values = super().natural(theta, scale)
        with np.errstate(all="ignore"):  # a draw that lost a term has no scale for it: infinite
            for i, k in ((0, 2), (1, 3)):
                values[:, i] = np.exp(np.log(values[:, i]) / values[:, k])
        return values

    def starts(self, features: Features, log_loss: np.ndarray, scale: SolverScale) -> np.ndarray:
        """Return a grid over both exponents; either term alone starts at half of the mean loss."""
        grid = np.array(list(itertools.product(START_RATES, repeat=2)))
        level = log_loss.mean() - grid[:, 1:] * np.log(2)
        return np.concatenate([level, level, grid * [scale.unit[rate] for rate in self.rates]], axis=1)


_N, _D, _C = (("alpha", "N"),), (("beta", "D"),), (("gamma", "C"),)
_BOTH = ("params", "tokens")
_HOFFMANN = "Hoffmann et al. 2022, approach 3"
_MUENNIGHOFF = "Muennighoff et al. 2023, section 3"
_THREE = (("E", ()), ("A", _N), ("B", _D))
_EXPANDED = (
    ("E", ()),
    ("A", (("alpha", "N"), ("delta", "G"), ("gamma", "NG"))),
    ("B", (("beta", "D"), ("omega", "G"), ("zeta", "DG"))),
)
_ALL = (
    LawForm("chinchilla", "E + A·N^-alpha + B·D^-beta", _HOFFMANN, _BOTH, _THREE),
    LawForm(
        "shared-exponent",
        "E + A·N^-alpha + B·D^-alpha",
        _HOFFMANN + ", with one exponent",
        _BOTH,
        (("E", ()), ("A", _N), ("B", (("alpha", "D"),))),
    ),
    LawForm("no-floor", "A·N^-alpha + B·D^-beta", _HOFFMANN + ", without E", _BOTH, _THREE[1:]),
    KaplanForm(
        "kaplan",
        "((Nc/N)^(alpha_N/alpha_D) + Dc/D)^alpha_D",
        "Kaplan et al. 2020, equation 1.5",
        _BOTH,
        (("Nc", (("alpha_N", "N"),)), ("Dc", (("alpha_D", "D"),))),
    ),
    LawForm(
        "compute",
        "E + K·C^-gamma",
        "Henighan et al. 2020, equation 1.1",
        ("flops",),
        (("E", ()), ("K", _C)),
        frontier=True,
    ),
    LawForm(
        "compute-no-floor",
        "K·C^-gamma",
        "Kaplan et al. 2020, equation 1.3",
        ("flops",),
        (("K", _C),),
        frontier=True,
    ),
    RepeatedForm(
        "repeated-data",
        "E + A·N^-alpha + B·D'^-beta, D' = U·(1 + R_D·(1 - exp(-(D/U - 1)/R_D)))",
        _MUENNIGHOFF + ", repeated tokens only",
        (*_BOTH, "unique_tokens"),
        _THREE,
    ),
    RepeatedForm(
        "repeated-data-params",
        "the same with N' = U_N·(1 + R_N·(1 - exp(-(N/U_N - 1)/R_N))), U_N the compute-optimal N for U tokens",
        _MUENNIGHOFF,
        (*_BOTH, "unique_tokens"),
        _THREE,
        excess=True,
    ),
    LawForm(
        "experts",
        "E + A·G^-delta·N^-(alpha + gamma·ln G) + B·G^-omega·D^-(beta + zeta·ln G), N active, G = total/active",
        "Ludziejewski et al. 2025 (joint MoE laws), the expansion G in place of the number of experts",
        ("active_params", *_BOTH),
        _EXPANDED,
        signed=("delta", "gamma", "omega", "zeta"),
    ),
)

FORMS: dict[str, LawForm] = {form.name: form for form in _ALL}


def get(name: str) -> LawForm:
    """Return a form by name. Raises `UnknownNameError` with the close ones."""
    if name not in FORMS:
        raise UnknownNameError("form of law", name, FORMS)
    return FORMS[name]
