"""Surface normals from depth."""

from __future__ import annotations

import numpy as np

CHUNK = 64  # images at a time: the points of all would take gigabytes


def normals_from_depth(depth: np.ndarray, focal: tuple[float, float], centre: tuple[float, float]) -> np.ndarray:
    """The normals of the surface that each pixel sees: `(N, 3, H, W)`, float16, x right, y up, z towards the viewer.

    Each pixel's point in space follows from its depth and the camera. The normal is perpendicular to the differences
    between the points right and left of it, and between those below and above it (at the border, between the point
    itself and the one inside). It points to the camera. Where the depth jumps, at the edge of an object, it is the
    normal of a surface across the gap. It is 0 where the depth of the pixel or of a neighbour is not known.

    The depth is `(N, H, W)` along the camera's axis, in any unit; 0 or not finite where it is not known. The focal
    lengths (x, y) are in pixels, and so is the principal point, from the image's upper left corner, which is half a
    pixel away from the first pixel's centre.
    """
    rows, columns = depth.shape[1:]
    x = (np.arange(columns) + 0.5 - centre[0]) / focal[0]
    y = -(np.arange(rows) + 0.5 - centre[1]) / focal[1]
    rays = np.stack([*np.meshgrid(x, y), np.full((rows, columns), -1.0)]).astype(np.float32)
    found = np.empty((len(depth), 3, rows, columns), np.float16)
    for start in range(0, len(depth), CHUNK):
        found[start : start + CHUNK] = _normals(depth[start : start + CHUNK].astype(np.float32), rays)
    return found


def _normals(depth: np.ndarray, rays: np.ndarray) -> np.ndarray:
    known = np.isfinite(depth) & (depth > 0)
    points = np.where(known, depth, 0)[:, None] * rays
    across, down = np.gradient(points, axis=3), np.gradient(points, axis=2)
    normals = np.cross(down, across, axis=1)
    lengths = np.linalg.norm(normals, axis=1, keepdims=True)
    usable = _all_around(known)[:, None] & (lengths > 0)
    return np.divide(normals, lengths, out=np.zeros_like(normals), where=usable)


def _all_around(known: np.ndarray) -> np.ndarray:
    """Where a pixel and those of its four neighbours that are in the image are known."""
    padded = np.pad(known, ((0, 0), (1, 1), (1, 1)), constant_values=True)
    return known & padded[:, 2:, 1:-1] & padded[:, :-2, 1:-1] & padded[:, 1:-1, 2:] & padded[:, 1:-1, :-2]
