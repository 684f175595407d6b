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

_MOST_IN_PLACE = 2  # chunks that are being written from where they lie


class Queue:
    """Chunks to be captured. Guarded by the writer's lock."""

    def __init__(self, slabs: Slabs) -> None:
        self.in_place = 0  # chunks that are being written from where they lie
        self._slabs = slabs
        self._jobs: deque[Job] = deque()
        self._urgent: deque[Place] = deque()  # to be captured before them
        self._found: tuple[Job, File, Chunk] | None = None

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
        begin = index * self._slabs.slab_bytes
        payload = min(self._slabs.slab_bytes, file.size_bytes - begin)
        chunk = Chunk(index=index, begin=begin, payload=payload, slab=None, source=file.source)
        chunk.is_hurried = is_urgent or (job.is_lazy and job.is_rushed)
        may_be_direct = file.is_direct or file.direct_reason is None
        address = None
        if job.is_lazy and may_be_direct and chunk.source is not None:
            address = chunk.source.is_in_place(begin, payload)
        is_full = not self._slabs.has_free()
        if address is not None and (is_full or not chunk.is_hurried):
            chunk.memory = File.live_memory(address, payload)
            is_full = self.in_place >= _MOST_IN_PLACE
        self._found = None if is_full else (job, file, chunk)
        return not is_full

    def take(self) -> tuple[Job, File, Chunk]:
        """Take what was found, with a slab for it if it needs one."""
        if self._found is None:
            raise AssertionError("unreachable: a chunk was found")
        (job, file, chunk), self._found = self._found, None
        if chunk.memory is None:
            chunk.slab, chunk.source = self._slabs.take(), None
        else:
            self.in_place += 1
        file.stages[chunk.index] = Stage.TAKEN
        file.in_flight += 1
        job.reading += 1
        return job, file, chunk
