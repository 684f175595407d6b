"""How fast the paths are: a short measurement at the start, all of them at once, both ways."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from time import perf_counter

from torch import Tensor

from lowtide.core.errors import StorageError
from lowtide.offload.rates import PathRates
from lowtide.offload.storage.files import ScratchFile, aligned
from lowtide.offload.storage.lanes import run_watched

SAMPLE_BYTES = 16 << 20
LEAST_S = 0.25

Transfer = Callable[[Callable[[], None]], object]
Given = tuple[float | None, float | None]  # read and write rate of a path; None: to be measured


def measure_paths(
    files: Sequence[ScratchFile], given: Sequence[Given], *, stall_s: float
) -> list[PathRates]:
    """Measure what is not given; takes about half a second.

    All paths and directions work at once, as they do in an update. Ranks that share a path call
    this at the same time, so each measures its share.

    Args:
        files: One per path; grow by twice `SAMPLE_BYTES`.
        given: Rates in bytes per second, one pair per path.
        stall_s: A path that gets no further for so long is given up.

    Raises:
        StorageError: a path has no room, fails or hangs.
    """
    unknown = [j for j, pair in enumerate(given) if None in pair]
    jobs: list[tuple[int, Transfer]] = []
    for j in unknown:
        source, target = aligned(SAMPLE_BYTES), aligned(SAMPLE_BYTES)
        source.random_()
        first = run_watched(
            str(files[j].folder), partial(_first_sample, files[j], source), stall_s=stall_s
        )
        jobs += [
            (j, partial(files[j].read, target, first)),
            (j, partial(files[j].write, source, first + SAMPLE_BYTES)),
        ]
    found = _together(files, jobs, stall_s)
    rates = list(given)
    for turn, j in enumerate(unknown):
        read, write = given[j]
        rates[j] = (read or found[2 * turn], write or found[2 * turn + 1])
    return [PathRates(read_bytes_per_s=r or 0.0, write_bytes_per_s=w or 0.0) for r, w in rates]


def _first_sample(file: ScratchFile, source: Tensor, progress: Callable[[], None]) -> int:
    """Write something to be read; return where it is. Room for as much again is behind it."""
    first = file.reserve(2 * SAMPLE_BYTES)
    _transfer(file, partial(file.write, source, first), progress)
    return first


def _together(
    files: Sequence[ScratchFile], jobs: Sequence[tuple[int, Transfer]], stall_s: float
) -> list[float]:
    """Repeat all jobs at once until each has run for long enough; return bytes per second."""
    rates = [0.0] * len(jobs)
    failures: list[Exception] = []
    going = threading.Barrier(len(jobs)) if jobs else None
    left = [len(jobs)]
    lock = threading.Lock()

    def repeat(turn: int, progress: Callable[[], None]) -> None:
        path, action = jobs[turn]
        begin_s, done, is_counted = perf_counter(), 0, False
        while True:
            _transfer(files[path], action, progress)
            done += SAMPLE_BYTES
            passed_s = perf_counter() - begin_s
            if passed_s >= LEAST_S and not is_counted:
                rates[turn], is_counted = done / passed_s, True
                with lock:
                    left[0] -= 1
            if left[0] <= 0:  # the others were disturbed until the end
                return

    def run(turn: int) -> None:
        if going is not None:
            going.wait()
        try:
            folder = str(files[jobs[turn][0]].folder)
            run_watched(folder, partial(repeat, turn), stall_s=stall_s)
        except Exception as error:  # noqa: BLE001 - raised below
            failures.append(error)
            left[0] = 0

    threads = [threading.Thread(target=run, args=[turn], daemon=True) for turn in range(len(jobs))]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    if failures:
        raise failures[0]
    return rates


def _transfer(file: ScratchFile, action: Transfer, progress: Callable[[], None]) -> None:
    try:
        action(progress)
    except OSError as error:
        raise StorageError(
            f"offload.storage: {str(file.folder)!r}: {error}; choose another path"
        ) from error
