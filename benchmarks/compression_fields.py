"""Fields that codecs are measured on: one that is made here, and .npy files of your own.

The report in ``results/`` also used real ones. They come from packages: Debian's `ferret-datasets`
(etopo5.cdf ROSE, monthly_navy_winds.cdf UWND) and `mricron-data` (ch2.nii.gz), PyPI's
`iris-sample-data` (A1B_north_america.nc air_temperature). Save the variables as float32 with
`numpy.save` in a folder and pass it as --fields.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


def random_field(edge: int, *, seed: int = 0) -> NDArray[np.float32]:
    """Return a smooth random field: spectrum k^-11/3, cut off at 0.3 `edge`, unit variance.

    Args:
        edge: Points on each of the three axes.
        seed: Of the random numbers.

    Returns:
        float32, shape (edge, edge, edge).
    """
    k = np.fft.fftfreq(edge) * edge
    half = np.fft.rfftfreq(edge) * edge
    radius = np.sqrt(k[:, None, None] ** 2 + k[None, :, None] ** 2 + half[None, None, :] ** 2)
    radius[0, 0, 0] = 1.0
    amplitude = np.sqrt(radius ** (-11 / 3)) * np.exp(-((radius / (0.3 * edge)) ** 2))
    amplitude[0, 0, 0] = 0.0
    noise = np.random.default_rng(seed).normal(size=(edge, edge, edge))
    field = np.fft.irfftn(np.fft.rfftn(noise) * amplitude, s=(edge,) * 3, axes=(0, 1, 2))
    return np.asarray(field / field.std(), dtype=np.float32)


def all_fields(edge: int, folder: Path | None) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Yield (name, float32 array) of the made field and of each .npy file in `folder`."""
    yield f"random {edge}^3", random_field(edge)
    for path in sorted(folder.glob("*.npy")) if folder else ():
        values = np.load(path, allow_pickle=False)
        if np.isfinite(values).all() and np.abs(values).max() < 1e9:  # rivals know no fill values
            yield path.stem, np.ascontiguousarray(values, dtype=np.float32)
