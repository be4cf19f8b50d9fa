"""Duplicates in a data set: images that are equal byte for byte, or nearly so up to a small shift."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.spatial import KDTree

from attire.data.dataset import RowIndices
from attire.progress import NoProgress, Progress

Images = NDArray[np.uint8]  # (n, 28, 28)

_SHIFT = 2  # px either way, across and down
# Of the flatter image's own contrast. Measured on the 70,000 images of Fashion-MNIST, every pair looked at up to 0.1:
# the 31 pairs below 0.05 are one picture each; from 0.05 on come logos and prints that differ, from 0.066 on garments.
_NEAR = 0.05
# Of 200 real images shifted by a pixel, the original is among the 7 nearest of 70,000 by 12 axes for 198, by 8 for 193.
_AXES = 12
_NEIGHBOURS = 7
_LOW = 5  # spatial frequencies 0 .. 4 per 32 px; finer ones differ more between one picture and its re-encoding
_BLOCK = 4096  # images at a time
_PAIRS = 512  # pairs at a time: they stay in the processor's cache, which is three times faster than 4,096


@dataclass(frozen=True)
class NearPairs:
    """Pairs of rows (m,), `first` < `second`, most alike first; distance: RMS difference over contrast, see `_NEAR`."""

    first: RowIndices
    second: RowIndices
    distance: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.first)


def first_occurrences(images: Images) -> RowIndices:
    """(n,): for each image the first row that holds the same bytes, which is its own where there is none before."""
    rows: dict[bytes, int] = {}
    return np.array([rows.setdefault(image.tobytes(), row) for row, image in enumerate(images)], dtype=np.int64)


def duplicate_groups(first: RowIndices) -> list[RowIndices]:
    """The rows (two or more, ascending) of each image that occurs more than once. first: see `first_occurrences`."""
    order = np.argsort(first, kind="stable")
    starts = np.flatnonzero(np.diff(first[order])) + 1
    return [rows for rows in np.split(order, starts) if len(rows) > 1]


def find_near_pairs(images: Images, rows: RowIndices, progress: Progress | None = None) -> NearPairs:
    """Pairs among `rows` that show one picture, up to a shift of `_SHIFT` px and faint differences.

    rows: ascending, no two of them byte for byte alike. Candidates are neighbours by descriptors that a shift leaves
    almost unchanged; each candidate is then compared pixel by pixel. A picture that occurs more than
    `_NEIGHBOURS` + 1 times is connected through its neighbours, not by every pair.
    """
    progress = progress or NoProgress()
    pairs = rows[_candidates(_descriptors(images[rows]), progress)]
    distance, contrast = np.empty(len(pairs)), contrasts(images)
    for start in range(0, len(pairs), _PAIRS):
        progress.advance("Near duplicates, pairs", start, len(pairs))
        a, b = pairs[start : start + _PAIRS].T
        distance[start : start + _PAIRS] = _compare(images[a], images[b], np.minimum(contrast[a], contrast[b]))
    progress.advance("Near duplicates, pairs", len(pairs), len(pairs))
    near = np.flatnonzero(distance < _NEAR)
    near = near[np.argsort(distance[near], kind="stable")]
    return NearPairs(pairs[near, 0], pairs[near, 1], distance[near])


def _descriptors(images: Images) -> NDArray[np.float32]:
    """(n, _AXES): amplitudes of low spatial frequencies, rotated to their principal axes.

    A shift does not change the amplitudes: two black pixels around each image make shifts of up to two pixels cyclic.
    """
    parts = []
    for start in range(0, len(images), _BLOCK):
        pixels = torch.tensor(images[start : start + _BLOCK]).float() / 255
        waves = torch.fft.rfft2(F.pad(pixels, (_SHIFT,) * 4)).abs() / (28 + 2 * _SHIFT)  # (b, 32, 17)
        low = torch.cat([waves[:, :_LOW, :_LOW], waves[:, 1 - _LOW :, :_LOW]], dim=1)  # positive and negative down
        parts.append(low.flatten(1).numpy())
    amplitudes = np.concatenate(parts).astype(np.float64)
    amplitudes -= amplitudes.mean(axis=0)
    _, axes = np.linalg.eigh(amplitudes.T @ amplitudes)
    return np.asarray(amplitudes @ axes[:, : -_AXES - 1 : -1], dtype=np.float32)


def _candidates(points: NDArray[np.float32], progress: Progress) -> RowIndices:
    """(m, 2): each point with its nearest `_NEIGHBOURS`, each pair once, the smaller index first."""
    n = len(points)
    if n < 2:
        return np.empty((0, 2), dtype=np.int64)
    tree, parts = KDTree(points), []
    for start in range(0, n, _BLOCK):
        progress.advance("Near duplicates", start, n)
        own = np.arange(start, min(start + _BLOCK, n))
        _, near = tree.query(points[own], min(_NEIGHBOURS + 1, n), workers=-1)  # itself among them
        parts.append(np.stack([np.repeat(own, near.shape[1]), near.ravel()], axis=1))
    progress.advance("Near duplicates", n, n)
    pairs = np.sort(np.concatenate(parts), axis=1)
    codes = np.unique(pairs[:, 0] * n + pairs[:, 1])
    pairs = np.stack(np.divmod(codes, n), axis=1)
    return np.asarray(pairs[pairs[:, 0] != pairs[:, 1]])


def _compare(a: Images, b: Images, contrast: NDArray[np.float64]) -> NDArray[np.float64]:
    """(m,): the RMS difference of a[i] and b[i] at their best shift, over `contrast`; infinite from `_NEAR` on.

    Every fourth line decides first: over a quarter of the lines the mean square is at most four times that over all,
    so no pair below `_NEAR` is lost.
    """
    out = np.full(len(a), np.inf)
    likely = np.flatnonzero(_mismatch(a, b, 4) < 2 * _NEAR * contrast)
    if len(likely):
        distance = _mismatch(a[likely], b[likely], 1) / contrast[likely]
        out[likely] = np.where(distance < _NEAR, distance, np.inf)
    return out


def contrasts(images: Images) -> NDArray[np.float64]:
    """(n,): the standard deviation of each image's pixels, in grey levels."""
    return np.asarray(images.reshape(len(images), -1).std(axis=1))


def _mismatch(a: Images, b: Images, step: int) -> NDArray[np.float64]:
    """(m,): RMS difference in grey levels over what overlaps, at the best shift, on every `step`-th line of it."""
    left, right = a.astype(np.float32), b.astype(np.float32)
    best = np.full(len(a), np.inf)
    for down in range(-_SHIFT, _SHIFT + 1):
        for across in range(-_SHIFT, _SHIFT + 1):
            gap = _overlap(left, down, across, step) - _overlap(right, -down, -across, step)
            best = np.minimum(best, np.einsum("nij,nij->n", gap, gap) / gap[0].size)
    return np.asarray(np.sqrt(best))


def _overlap(images: NDArray[np.float32], down: int, across: int, step: int) -> NDArray[np.float32]:
    """Every `step`-th line of the part of each image that also lies inside the frame shifted by (down, across)."""
    side = images.shape[1]
    return images[:, max(down, 0) : side + min(down, 0) : step, max(across, 0) : side + min(across, 0)]
