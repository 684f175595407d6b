"""What the writer in Python captures next."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from lowtide.checkpoint.writer.python_file import Chunk, File, Slabs, Stage
from lowtide.checkpoint.writer.python_job import Job

Place: TypeAlias = tuple[Job, File, int]  # a chunk by its number


class Queue:
    """Chunks to be captured. Guarded by the writer's lock."""

    def __init__(self, slabs: Slabs) -> None:
        self._slabs = slabs
        self._jobs: deque[Job] = deque()
        self._urgent: deque[Place] = deque()  # to be captured before them
        self._found: tuple[Place, bool] | None = None

    def add(self, job: Job) -> None:
        """Take a job, behind the others."""
        self._jobs.append(job)

    def hurry(self, places: Iterable[Place]) -> None:
        """Take chunks before all jobs, behind what was hurried already."""
        self._urgent.extend(places)

    def hurry_first(self, places: list[Place]) -> None:
        """Take chunks before everything."""
        self._urgent.extendleft(reversed(places))

    def places(self, job: Job, memory: NDArray[np.uint64]) -> list[Place]:
        """Return which chunks of a job hold bytes of some memory, in the order of that."""
        return [
            (job, file, index)
            for begin, end in memory.tolist()
            for file in job.files
            if file.source is not None
            for index in file.source.chunks_of(begin, end, self._slabs.slab_bytes)
        ]

    def find(self) -> bool:
        """Look for the chunk that comes next; tell whether it can be captured now."""
        while self._urgent:
            job, file, index = self._urgent[0]
            if job.failure is None and index < file.chunks and file.stages[index] == Stage.KNOWN:
                return self._can_take(job, file, index, is_urgent=True)
            self._urgent.popleft()
        while self._jobs:
            job = self._jobs[0]
            if job.failure is not None or job.next_file == len(job.files):
                self._jobs.popleft()
                continue
            file = job.files[job.next_file]
            if (index := file.first_untaken()) < file.chunks:
                return self._can_take(job, file, index, is_urgent=False)
            if job.is_partial:
                return False
            job.next_file += 1
        return False

    def _can_take(self, job: Job, file: File, index: int, *, is_urgent: bool) -> bool:
        has_slab = self._slabs.has_free()
        self._found = ((job, file, index), is_urgent) if has_slab else None
        return has_slab

    def take(self) -> tuple[Job, File, Chunk]:
        """Take what was found, with a slab for it."""
        if self._found is None:
            raise AssertionError("unreachable: a chunk was found")
        ((job, file, index), is_urgent), self._found = self._found, None
        begin = index * self._slabs.slab_bytes
        chunk = Chunk(
            index=index,
            begin=begin,
            payload=min(self._slabs.slab_bytes, file.size_bytes - begin),
            slab=self._slabs.take(),
            is_hurried=is_urgent,
        )
        file.stages[index] = Stage.TAKEN
        file.in_flight += 1
        job.reading += 1
        return job, file, chunk
