"""Recognise budgets: distinguish runs of one planned budget from a cloud with similar compute by chance.

Runs that share no budget also form groups within 5 % of one another, especially if there are many runs. Such a group is
not a valley of equal compute, and the minimum of a curve through it is spurious.
"""

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import stats

from experiments.scaling.valleys.valley import MINIMUM_SIZES

SURROUNDINGS = 0.2  # of ln C to either side of a group; budgets are seldom less than a factor of 1.5 apart
FINEST = 0.01  # of ln C; a narrower group is no stronger evidence
MOST = 0.5  # of the neighbours
FALSE_SHARE = 0.01  # of the groups taken for budgets from a cloud
APART = 2.0  # widths to the next group
BY_CHANCE = "no budget: these runs are near one another by chance, as those around are spread as densely in compute"
COMPARABLE = 0.5  # share of another group's number of sizes from which a group counts as its neighbour


def recognise_budgets(
    groups: list[Int[np.ndarray, " _members"]],
    log_n: Float[np.ndarray, " runs"],
    log_d: Float[np.ndarray, " runs"],
    log_c: Float[np.ndarray, " runs"],
) -> Bool[np.ndarray, " groups"]:
    """Return which `groups` (`group_budgets`, ascending) are budgets rather than a part of a cloud.

    If compute were spread smoothly, sizes would be as dense around a group as within it. Where most of a run's
    neighbours, within 0.2 in ln C, are of its own group, the table is one of budgets, and all groups of three sizes are
    taken. Where they are not, there may still be budgets in a cloud: of the sizes within 0.2 of a group, by chance the
    group would contain a share equal to its share of that width. Groups are taken while at most 1 % of those taken
    should be so full by this chance (binomial; Benjamini & Hochberg 1995, Journal of the Royal Statistical Society B
    57).

    A budget is also at least two widths away from the next such group, unlike the parts of one broad cluster.

    Several runs of one size in a group count once. A group is as wide as its range of ln C, or as the residuals of its
    runs from a line of ln D over ln N: a column of compute with few digits makes runs equal that are not.
    """
    firsts = np.concatenate([group[np.unique(log_n[group], return_index=True)[1]] for group in groups])
    place = np.sort(log_c[firsts])
    sizes = np.array([len(np.unique(log_n[group])) for group in groups])
    ends = np.array([(log_c[group].min(), log_c[group].max()) for group in groups])
    widths = np.array([max(FINEST, _width(log_n[g], log_d[g], log_c[g])) for g in groups])
    near = np.searchsorted(place, ends[:, 1] + SURROUNDINGS, "right") - np.searchsorted(
        place, ends[:, 0] - SURROUNDINGS
    )
    whole = np.minimum(widths + 2 * SURROUNDINGS, max(float(np.ptp(log_c)), FINEST))
    chances = stats.binom.sf(sizes - 2, near - 1, np.minimum(widths / whole, 1.0))
    chances[sizes < MINIMUM_SIZES] = 1.0
    order = np.argsort(chances, kind="stable")
    passing = np.flatnonzero(chances[order] <= FALSE_SHARE * np.arange(1, len(groups) + 1) / len(groups))
    taken = np.zeros(len(groups), bool)
    taken[order[: passing[-1] + 1 if len(passing) else 0]] = True
    if (sizes - 1).sum() > MOST * (near - 1).sum():
        taken = sizes >= MINIMUM_SIZES
    for i in np.flatnonzero(taken):
        like = np.flatnonzero(sizes >= max(MINIMUM_SIZES, COMPARABLE * sizes[i]))
        below, above = like[like < i][-1:], like[like > i][:1]
        gaps = [*(ends[i, 0] - ends[below, 1]), *(ends[above, 0] - ends[i, 1])]
        taken[i] = all(gap >= APART * widths[i] for gap in gaps)
    return taken


def _width(log_n: np.ndarray, log_d: np.ndarray, log_c: np.ndarray) -> float:
    """Return the range of ln C, or that of ln D about its line over ln N where that is larger."""
    u = log_n - log_n.mean()
    spread = u @ u
    line = u * (u @ log_d) / spread if spread > 0 else 0.0
    return float(max(np.ptp(log_c), np.ptp(log_d - line)))
