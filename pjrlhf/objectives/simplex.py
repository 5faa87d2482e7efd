"""Grids of preference weights on the probability simplex."""

import itertools

import numpy as np


def simplex_grid(objectives: int, *, held_out: bool = False) -> np.ndarray:
    """Preference weights to evaluate at, float64 [n, N] in lexicographic order; rows are points of the simplex.

    Two objectives: 11 equal steps (Rewarded Soups, arXiv 2306.04488). Three: the 13 points of Rewards-in-Context (arXiv
    2402.10207), which are the corners, one objective at .8 and at .6 over equal others, two at .4, and the centre. More
    objectives continue that pattern, 1 + 3N + N(N-1)/2 points; this choice is ours.

    Args:
      objectives: N, at least 2.
      held_out: other points instead, inside the simplex and none of them above (also ours), to see what lies between:
        for two objectives the 10 midpoints, for more the 2N rotations of the weights N, N-1, ..., 1 in either order.

    Raises:
      ValueError: fewer than two objectives.
    """
    if objectives < 2:
        raise ValueError(f"objectives {objectives}: a preference weighs at least two against each other")
    if objectives == 2:
        first = np.arange(1, 20, 2) / 20 if held_out else np.arange(11) / 10
        return np.round(np.stack([first, 1 - first], 1), 12)
    if held_out:
        falling = np.arange(objectives, 0, -1)
        rows = [np.roll(ranks, k) for ranks in (falling, falling[::-1]) for k in range(objectives)]
    else:
        rows = [np.ones(objectives)]
        for size, fraction in ((1, 1.0), (1, 0.8), (1, 0.6), (2, 0.4)):
            for leading in itertools.combinations(range(objectives), size):
                row = np.full(objectives, (1 - size * fraction) / (objectives - size))
                row[list(leading)] = fraction
                rows.append(row)
    rows = np.round([row / np.sum(row) for row in rows], 12)
    return rows[np.lexsort(rows.T[::-1])]
