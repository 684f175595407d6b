"""Series of fields for codecs that learn: earlier steps to train on, later ones to measure.

A series that is made here, and .npy files of your own with steps along the first axis. The report
in ``results/`` also used real ones, from packages: PyPI's `iris-sample-data` (A1B_north_america.nc
air_temperature, years) and Debian's `ferret-datasets` (monthly_navy_winds.cdf UWND, months). Save
the variables as float32 with `numpy.save` in a folder and pass it as --series.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
TRAIN_PART = 0.6  # the rest is measured


@dataclass(frozen=True)
class Series:
    """One quantity over time.

    Attributes:
        name: In tables.
        train: Earlier steps, float32 (steps, rows, columns).
        test: Later ones.
    """

    name: str
    train: Array
    test: Array


def turbulence(edge: int, steps: int, *, seed: int = 0) -> Array:
    """Return the vorticity of forced two-dimensional turbulence over hills.

    Barotropic vorticity equation on a periodic square, q = vorticity + hills, forced around
    wavenumber 5 by noise and damped by drag and by the sixth power of the wavenumber; spectral, 2/3
    dealiased, second-order Runge-Kutta. The hills stay where they are, so that the flow is another
    at each place; the start is noise, without symmetries.

    Args:
        edge: Points on each axis.
        steps: How many states, one time unit apart, after 20 units that are dropped.
        seed: Of start, hills and forcing.

    Returns:
        float32, shape (steps, edge, edge).
    """
    rng = np.random.default_rng(seed)
    k = np.fft.fftfreq(edge) * edge
    kx, ky = np.meshgrid(k, np.arange(edge // 2 + 1), indexing="ij")
    k2 = kx**2 + ky**2
    inverse = np.where(k2 > 0, -1 / np.maximum(k2, 1), 0.0)
    kept = (np.abs(kx) < edge / 3) & (np.abs(ky) < edge / 3)
    ring = np.exp(-((np.sqrt(k2) - 5) ** 2) / 2) * kept

    def noise(shape: NDArray[np.float64]) -> NDArray[np.complex128]:
        values = np.fft.irfft2(np.fft.rfft2(rng.normal(size=(edge, edge))) * shape)
        return np.asarray(np.fft.rfft2(values / values.std()))

    hills, vorticity = 4 * noise(ring), noise(ring)
    dt, drag = 0.02, 0.05
    decay = np.exp(-dt * (drag + 10 * (k2 / (edge / 3) ** 2) ** 3))

    def tendency(w: NDArray[np.complex128]) -> NDArray[np.complex128]:
        stream = inverse * w
        u, v = np.fft.irfft2(-1j * ky * stream), np.fft.irfft2(1j * kx * stream)
        q = w + hills
        qx, qy = np.fft.irfft2(1j * kx * q), np.fft.irfft2(1j * ky * q)
        return np.asarray(-np.fft.rfft2(u * qx + v * qy) * kept)

    found = np.empty((steps, edge, edge), np.float32)
    per_step = round(1 / dt)
    for number in range(-20, steps):
        for _ in range(per_step):
            half = vorticity + dt / 2 * tendency(vorticity)
            vorticity = (vorticity + dt * tendency(half)) * decay + 0.02 * noise(ring)
        if number >= 0:
            found[number] = np.fft.irfft2(vorticity)
    return found


def all_series(edge: int, steps: int, folder: Path | None) -> Iterator[Series]:
    """Yield the made series and each .npy file in `folder`."""
    yield _split(f"turbulence {edge}^2", turbulence(edge, steps))
    for path in sorted(folder.glob("*.npy")) if folder else ():
        yield _split(path.stem, np.load(path, allow_pickle=False).astype(np.float32))


def _split(name: str, steps: Array) -> Series:
    cut = int(len(steps) * TRAIN_PART)
    return Series(name, np.ascontiguousarray(steps[:cut]), np.ascontiguousarray(steps[cut:]))
