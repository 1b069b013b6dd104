"""Exact solvers for small problems in the task gradients, given as the columns of a factor of their Gramian."""

from __future__ import annotations

import numpy as np
from scipy.optimize import nnls

from recon.methods.bases.solved import Array

# An eigenvalue of the cosines below this times the largest is rounding, where the gradients are float32. A solution
# that inverts it is, too: two tasks that agree would get any weights, of opposite signs.
RANK_TOLERANCE = 1e-6


def factor(G: Array, tolerance: float = 0.0) -> Array:
    """R with RᵀR = G: vectors, one per column, with the gradients' inner products.

    Eigenvalues of the cosines below `tolerance` times the largest become zero, at least those that are rounding in
    float64.
    """
    lengths = np.sqrt(G.diagonal())
    # The factor of G itself would carry the rounding errors of the longest gradient in every column.
    eigenvalues, Q = np.linalg.eigh(unit_gramian(G))
    # The root of what is rounding would not be small any more.
    eigenvalues[eigenvalues < max(tolerance, len(G) * np.finfo(np.float64).eps) * eigenvalues[-1]] = 0
    R: Array = np.sqrt(eigenvalues)[:, None] * Q.T * lengths
    return R


def unit_gramian(G: Array) -> Array:
    """The gradients' cosines; zero for a gradient that is zero."""
    lengths = np.sqrt(G.diagonal())
    unit = np.where(lengths > 0, lengths, 1.0)
    cosines: Array = G / np.outer(unit, unit)
    return cosines


def min_norm_weights(R: Array) -> Array:
    """The w on the simplex that minimises ‖R w‖, exact up to rounding.

    Non-negative least squares with the sum as one more row, `‖R v‖² + (Σ v - 1)²` over v ≥ 0, has the
    solution v = s w: for v = s u with u on the simplex and n = ‖R u‖², the best s leaves n / (1 + n), which
    grows with n. With v counted in units of 1 / length, the columns are unit vectors, and gradients of very
    different lengths stay well conditioned.
    """
    lengths = np.linalg.norm(R, axis=0)
    shortest = lengths.min()
    if shortest == 0:
        return (lengths == 0) / np.count_nonzero(lengths == 0)
    units = shortest / lengths
    count = len(lengths)
    v, _ = nnls(np.vstack([R / lengths, units]), np.eye(count + 1)[count], maxiter=100 * count)
    w: Array = v * units
    return w / w.sum()


def min_norm_above(R: Array, lowest: Array) -> Array:
    """The w ≥ lowest that minimises ‖R w‖, exact up to rounding: non-negative least squares in w - lowest."""
    lengths = np.linalg.norm(R, axis=0)
    units = np.where(lengths > 0, lengths, 1.0)
    v, _ = nnls(R / units, -R @ lowest, maxiter=100 * len(lengths))
    w: Array = lowest + v / units
    return w
