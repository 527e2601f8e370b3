"""Position tables for another resolution, as the upstream projects resize them before fine-tuning.

- `resize_grid`: learned positions, by bicubic interpolation (unilm `beit3/utils.py`, `vlmo_module.py`);
- `resize_offsets`: biases by offset, on a grid whose steps grow geometrically away from the centre (unilm
  `vlmo_module.py`, taken over from BEiT): near offsets keep their biases, far ones are spread.
"""

import numpy as np
import torch
from torch.nn import functional as F

from ..errors import ConversionError, missing_package


def resize_grid(positions: torch.Tensor, old: int, new: int) -> torch.Tensor:
    """(old · old, width) positions of patches, row by row → (new · new, width)."""
    if old == new:
        return positions
    # (patches, width) → (1, width, rows, columns); half precision has no bicubic kernel on a CPU
    grid = positions.float().reshape(1, old, old, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
    return grid.permute(0, 2, 3, 1).reshape(new * new, -1).to(positions.dtype)


def resize_offsets(biases: torch.Tensor, old: int, new: int) -> torch.Tensor:
    """((2·old − 1)², heads) biases of the offsets between patches → ((2·new − 1)², heads)."""
    if old == new:
        return biases
    try:
        from scipy.interpolate import RectBivariateSpline
    except ModuleNotFoundError as error:
        raise ConversionError(
            f"resizing relative positions: {missing_package(error, 'convert')}, or leave out --image-size"
        ) from error
    known, wanted = _geometric_offsets(2 * old - 1, 2 * new - 1), np.arange(1 - new, new, dtype=np.float64)
    degree = min(3, len(known) - 1)
    if degree == 0:
        return biases.expand((2 * new - 1) ** 2, -1)
    wanted = wanted.clip(known[0], known[-1])  # beyond the table, its edge
    resized = [
        RectBivariateSpline(known, known, column.reshape(len(known), -1), kx=degree, ky=degree, s=0)(wanted, wanted)
        for column in biases.double().numpy().T
    ]
    return torch.from_numpy(np.stack(resized, axis=-1)).reshape((2 * new - 1) ** 2, -1).to(biases.dtype)


def _geometric_offsets(old: int, new: int) -> np.ndarray:
    """Where the `old` known offsets lie among the `new` ones: steps 1, q, q², … to each side, out to the new edge."""
    steps, edge = old // 2, new // 2
    low, high = 1.01, 1.5
    while high - low > 1e-6:
        ratio = (low + high) / 2
        if (1 - ratio**steps) / (1 - ratio) > edge:
            high = ratio
        else:
            low = ratio
    side = np.cumsum(ratio ** np.arange(steps))
    return np.concatenate([-side[::-1], [0.0], side])
