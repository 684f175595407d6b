"""What stays in the folders of checkpoints while a run writes there, and what goes."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path, PurePath

from lowtide.checkpoint.config import CheckpointConfig
from lowtide.checkpoint.nodes.epochs import prune_copies
from lowtide.checkpoint.saving import Level
from lowtide.checkpoint.store.catalog import is_within
from lowtide.checkpoint.store.claim import remove_old_scratch
from lowtide.checkpoint.store.commit import Committer
from lowtide.checkpoint.store.folders import remove_scratch, remove_trash
from lowtide.checkpoint.store.retention import finish_published, prune, remove_abandoned
from lowtide.core.errors import CheckpointError

logger = logging.getLogger("lowtide")


class Keeper:
    """Removes what is old or was left by earlier runs, where this rank leads.

    Args:
        config: The plugin's settings.
        committer: Says where this rank leads.
        token: What this run's attempts begin with.
    """

    def __init__(self, config: CheckpointConfig, committer: Committer, token: str) -> None:
        self._config = config
        self._committer = committer
        self._token = token
        self._cleaned: set[Path] = set()
        self._committed: dict[int, str] = {}  # the newest of each level, by its tag
        self._replicated: dict[int, str] = {}  # the newest of which all nodes' copies are there

    def clean(self, levels: Sequence[Level], tag: str) -> None:
        """Finish or remove what an earlier run left half done, once for each folder.

        Also in the sub-folder that `tag` lies in, where it has slashes.
        """
        place = PurePath(tag).parent
        for level in levels:
            if not self._committer.leads(level):
                continue
            places = (PurePath(), place) if is_within(level.folder, place) else (PurePath(),)
            for folder in dict.fromkeys(level.folder / each for each in places):
                if folder not in self._cleaned:
                    self._cleaned.add(folder)
                    with contextlib.suppress(OSError):  # the save itself will tell
                        folder.mkdir(parents=True, exist_ok=True)
                    self._clean(folder)

    def _clean(self, folder: Path) -> None:
        remove_unowned = partial(remove_scratch, token=self._token)
        work = (finish_published, remove_abandoned, remove_unowned, remove_trash)
        for clean in (*work, remove_old_scratch):
            with contextlib.suppress(OSError, CheckpointError):  # as much as is possible
                clean(folder)

    def committed(self, level: Level, tag: str) -> None:
        """Note the newest checkpoint of a level."""
        self._committed[level.number] = tag

    def replicated(self, level: Level, tag: str) -> None:
        """Note the newest checkpoint of a level of which all nodes' copies are there."""
        self._replicated[level.number] = tag

    def prune(self, level: Level, tag: str, in_use: Iterable[str]) -> None:
        """Remove old checkpoints of a level, but none whose tag is `in_use`.

        Those beside `tag`: where tags have slashes, each sub-folder is thinned out by itself.
        """
        if not self._committer.leads(level) or level.keep is None:
            return
        newest = (self._committed.get(level.number), self._replicated.get(level.number))
        # The copies of an earlier run are worth most until this run has made its own.
        is_waiting = bool(level.copies) and level.number not in self._replicated
        try:
            prune(
                level.folder,
                keep=level.keep + is_waiting,
                keep_every=self._config.keep_every_n_steps,
                protect=[*in_use, *filter(None, newest)],
                place=PurePath(tag).parent,
            )
            if level.is_of_node:
                prune_copies(level.folder, PurePath(tag).parent)
        except (OSError, CheckpointError) as error:
            logger.warning("%s: old checkpoints cannot be removed: %s", level.folder, error)
