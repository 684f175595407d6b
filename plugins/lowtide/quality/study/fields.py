"""Applications that change over time, made here: small solvers of four partial differential
equations in two dimensions, each with two fields.

They stand in for simulation output where codecs and predictors of quality are studied: smooth and
rough, waves and fronts, fields that change fast, slowly, and more and more slowly. All are periodic
squares; a seed changes initial state and parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowtide.core.errors import DataError, UnknownNameError, listed, near

Floats = NDArray[np.float64]
Field = NDArray[np.float32]
State = Iterator[dict[str, Floats]]


@dataclass(frozen=True)
class Snapshot:
    """One field of one application at one step.

    Attributes:
        application: Its name, one of `APPLICATIONS`.
        field: Name of the field.
        step: Number of the output, from 0.
        values: float32, shape (edge, edge).
    """

    application: str
    field: str
    step: int
    values: Field

    @property
    def series(self) -> str:
        """The same for all steps of one field."""
        return f"{self.application}/{self.field}"


_TURN = 0.1  # time between outputs, turnovers are about 1


def turbulence(edge: int, rng: np.random.Generator) -> State:
    """Decaying two-dimensional turbulence: vorticity and one component of the velocity."""
    k, radius = _wavenumbers(edge)
    kx, ky = k
    inverse = np.where(radius > 0, 1.0 / np.maximum(radius, 1.0) ** 2, 0.0)
    is_kept = (np.abs(kx) < edge / 3) & (ky < edge / 3)
    viscosity = 10 ** rng.uniform(-3.9, -3.4) * (128 / edge)
    vorticity = np.fft.rfft2(_random(edge, rng, low=3, high=10, slope=0.0)) * 6

    def change(w: NDArray[Any]) -> NDArray[Any]:
        stream = w * inverse
        velocity = np.fft.irfft2(1j * ky * stream), np.fft.irfft2(-1j * kx * stream)
        slope = np.fft.irfft2(1j * kx * w), np.fft.irfft2(1j * ky * w)
        product = np.fft.rfft2(velocity[0] * slope[0] + velocity[1] * slope[1])
        return np.asarray(-product * is_kept)

    while True:
        u = np.fft.irfft2(1j * ky * vorticity * inverse)
        v = np.fft.irfft2(1j * kx * vorticity * inverse)
        yield {"vorticity": np.fft.irfft2(vorticity), "velocity": u}
        fastest = max(float(np.abs(u).max()), float(np.abs(v).max()))
        steps = math.ceil(_TURN * fastest * edge / (2 * math.pi) / 0.3)  # Courant number 0.3
        dt = _TURN / steps
        damping = np.exp(-viscosity * radius**2 * dt)
        for _ in range(steps):
            middle = vorticity + 0.5 * dt * change(vorticity)
            vorticity = (vorticity + dt * change(middle)) * damping


def gray_scott(edge: int, rng: np.random.Generator) -> State:
    """Spots that divide: the two species of the Gray-Scott reaction."""
    feed, kill = rng.uniform(0.026, 0.040), rng.uniform(0.058, 0.0625)
    u, v = np.ones((edge, edge)), np.zeros((edge, edge))
    for _ in range(6 + edge // 32):
        row, column = rng.integers(0, edge, 2)
        rows = (row + np.arange(edge // 12)) % edge
        columns = (column + np.arange(edge // 12)) % edge
        u[np.ix_(rows, columns)], v[np.ix_(rows, columns)] = 0.5, 0.3
    v += np.abs(rng.normal(0, 0.01, v.shape))
    while True:
        yield {"u": u, "v": v}
        for _ in range(50):
            reaction = u * v * v
            u = u + 0.16 * _laplacian(u) - reaction + feed * (1 - u)
            v = v + 0.08 * _laplacian(v) + reaction - (feed + kill) * v


def waves(edge: int, rng: np.random.Generator) -> State:
    """Pulses in a medium of uneven speed: displacement and velocity of the wave equation."""
    speed = 0.35 + 0.2 * np.tanh(_random(edge, rng, low=1, high=5, slope=-1.0))
    now: Floats = np.zeros((edge, edge))
    before = now.copy()
    x = np.arange(edge)
    chance = 1.0  # of a pulse: the first is sure
    while True:
        row, column = rng.uniform(0, edge, 2)
        width = edge / rng.uniform(20, 50)
        far = [np.minimum(np.abs(x - c), edge - np.abs(x - c)) for c in (row, column)]
        pulse = np.exp(-(far[0][:, None] ** 2 + far[1][None] ** 2) / (2 * width**2))
        if rng.uniform() < chance:
            pulse = pulse * rng.normal()
            now, before = now + pulse, before + pulse  # at rest: it adds no velocity
        chance = 0.35
        for _ in range(6):
            following = 2 * now - before + speed**2 * _laplacian(now) - 2e-3 * (now - before)
            before, now = now, following
        yield {"displacement": now, "velocity": now - before}


def allen_cahn(edge: int, rng: np.random.Generator) -> State:
    """Domains that coarsen (Allen-Cahn), and a tracer that a steady flow stirs."""
    phase = 0.1 * _random(edge, rng, low=2, high=edge // 4, slope=-0.5)
    tracer = _random(edge, rng, low=1, high=4, slope=-1.0)
    stream = np.fft.rfft2(_random(edge, rng, low=1, high=4, slope=-2.0))
    (kx, ky), radius = _wavenumbers(edge)
    u, v = np.fft.irfft2(1j * ky * stream), np.fft.irfft2(-1j * kx * stream)
    largest = max(float(np.abs(u).max()), float(np.abs(v).max()))
    u, v = u / largest, v / largest
    smoothing = np.exp(-(radius**2) * (10 / edge) ** 2 * 2e-3)
    grid = np.arange(edge, dtype=float)
    while True:
        yield {"phase": phase, "tracer": tracer}
        for _ in range(4):
            phase = phase + 0.2 * (0.5 * _laplacian(phase) + 0.5 * (phase - phase**3))
        back = (grid[:, None] - 0.9 * u) % edge, (grid[None, :] - 0.9 * v) % edge
        tracer = np.fft.irfft2(np.fft.rfft2(_bilinear(tracer, *back)) * smoothing)


APPLICATIONS: dict[str, Callable[[int, np.random.Generator], State]] = {
    "turbulence": turbulence,
    "gray_scott": gray_scott,
    "waves": waves,
    "allen_cahn": allen_cahn,
}


def snapshots(
    applications: Sequence[str] = tuple(APPLICATIONS),
    *,
    edge: int = 128,
    steps: int = 60,
    seed: int = 0,
    skip: int = 4,
) -> Iterator[Snapshot]:
    """Yield all fields of some applications, step by step.

    Args:
        applications: Names, of `APPLICATIONS`.
        edge: Points on each axis, 32 or more.
        steps: Outputs of each application.
        seed: Of initial states and parameters; each application draws from its own stream.
        skip: Outputs before the first that counts: initial states are artificial.

    Raises:
        DataError: `edge` is too small.
        UnknownNameError: no such application.
    """
    if edge < 32:
        raise DataError(f"edge {edge}: allowed are 32 and more")
    for name in applications:
        if name not in APPLICATIONS:
            raise UnknownNameError(
                f'unknown application "{name}".{near(name, APPLICATIONS)} '
                f"Known: {listed(APPLICATIONS)}"
            )
        number = list(APPLICATIONS).index(name)
        state = APPLICATIONS[name](edge, np.random.default_rng([seed, number]))
        for output in range(skip + steps):
            fields = next(state)
            if output < skip:
                continue
            for field, values in fields.items():
                yield Snapshot(name, field, output - skip, values.astype(np.float32))


def _wavenumbers(edge: int) -> tuple[tuple[Floats, Floats], Floats]:
    kx = np.asarray(np.fft.fftfreq(edge, 1 / edge), np.float64)[:, None]
    ky = np.asarray(np.fft.rfftfreq(edge, 1 / edge), np.float64)[None, :]
    return (kx, ky), np.hypot(kx, ky)


def _random(
    edge: int, rng: np.random.Generator, *, low: float, high: float, slope: float
) -> Floats:
    """Return a random field with wavenumbers from low to high, amplitude k^slope, variance 1."""
    _, radius = _wavenumbers(edge)
    amplitude = np.where((radius >= low) & (radius <= high), np.maximum(radius, 1.0) ** slope, 0.0)
    values = np.fft.irfft2(np.fft.rfft2(rng.normal(size=(edge, edge))) * amplitude)
    return np.asarray(values / values.std())


def _laplacian(x: Floats) -> Floats:
    return np.asarray(
        np.roll(x, 1, 0) + np.roll(x, -1, 0) + np.roll(x, 1, 1) + np.roll(x, -1, 1) - 4 * x
    )


def _bilinear(x: Floats, rows: Floats, columns: Floats) -> Floats:
    edge = len(x)
    r, c = rows.astype(int) % edge, columns.astype(int) % edge
    a, b = rows - np.floor(rows), columns - np.floor(columns)
    r1, c1 = (r + 1) % edge, (c + 1) % edge
    top = x[r, c] * (1 - b) + x[r, c1] * b
    return np.asarray(top * (1 - a) + (x[r1, c] * (1 - b) + x[r1, c1] * b) * a)
