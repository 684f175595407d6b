"""Which checkpoint to load: verified, and the same on all ranks."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, Literal

from lowtide.checkpoint.board import Board
from lowtide.checkpoint.compact.copies import bases_of, is_compact
from lowtide.checkpoint.nodes.epochs import Epoch, Holding, holdings, put_together, what_is_missing
from lowtide.checkpoint.nodes.peers import Peers
from lowtide.checkpoint.nodes.restoring import Restorer
from lowtide.checkpoint.saving import Level
from lowtide.checkpoint.sizing import memory_share_bytes
from lowtide.checkpoint.store.catalog import Entry, list_checkpoints, read_latest
from lowtide.checkpoint.store.integrity import Share, verify, verify_share
from lowtide.core.errors import CheckpointError
from lowtide.core.restart import find_damage, find_missing_parts, read_record

if TYPE_CHECKING:
    from lowtide.checkpoint.files.image import Image

_VERIFY_TIMEOUT_S = 3600.0
_HOLDINGS_TIMEOUT_S = 600.0
_HELD_SHARE = 2  # of the free memory of the node, half is for files that will be loaded


@dataclass(frozen=True, kw_only=True)
class Found:
    """A checkpoint to load.

    Attributes:
        folder: The folder that holds it, or None where there is none to load.
        name: The name of its own folder, what DeepSpeed calls its tag.
        skipped: One line about each newer one that cannot be used.
    """

    folder: Path | None = None
    name: str | None = None
    skipped: list[str] = field(default_factory=list)


class Finder:
    """Chooses checkpoints for all ranks of a run.

    Args:
        board: Where the ranks agree.
        mode: How much is read of a checkpoint before it is chosen.
        peers: The way to the other nodes, where there are levels of which each has its own.
        wanted: Names the files of a checkpoint that this rank will load. They are read once: what
            is checked stays in memory, for `take`.
    """

    def __init__(
        self,
        board: Board,
        mode: Literal["full", "fast", "off"],
        peers: Peers | None = None,
        wanted: Callable[[Path], Collection[str]] | None = None,
    ) -> None:
        self._board = board
        self._mode: Literal["full", "fast", "off"] = mode
        self._peers = peers
        self._wanted = wanted
        self._held: dict[Path, Image] = {}
        self._count = 0

    def take(self, path: Path) -> Image | None:
        """Return the checked bytes of a file of the checkpoint that was found, if they are held.

        From then on they are the caller's: a second time they are not here any more.
        """
        return self._held.pop(path.absolute(), None)

    def forget(self) -> None:
        """Let go of what is held."""
        self._held.clear()

    def find(self, folders: Sequence[Path], tag: str | None, *, parts: int | None) -> Found:
        """Find the checkpoint to load. Collective.

        Without a tag that is what ``latest`` names, if it is whole; else the newest that is.

        Args:
            folders: Where to look, the fastest level first.
            tag: The name that the script asks for, or None.
            parts: Number of ranks of which each needs a part of its own, where that is so.

        Raises:
            CheckpointError: the one that was asked for is damaged, or not there.
        """
        self.forget()
        self._count += 1
        place = f"find{self._count}"
        levels = [None if self._peers is None else self._peers.level_of(each) for each in folders]
        self._tell_holdings(levels, place)
        candidates = self._board.share(
            f"{place}/list",
            lambda: _candidates(folders, tag, self._hear_epochs(levels, place)),
            timeout_s=_VERIFY_TIMEOUT_S,
        )
        if tag is not None and not candidates:
            raise CheckpointError(
                f'{folders[-1]}: holds no checkpoint with the tag "{tag}"; "lowtide checkpoint ls" '
                f"shows what is there, and without a tag the newest that is whole is loaded"
            )
        skipped: list[str] = []
        for number, (position, name, is_recorded, epoch) in enumerate(candidates):
            folder, level = folders[position], levels[position]
            if level is not None and epoch is not None:
                damage = self._bring_back(level, epoch, f"{place}/{number}")
            else:
                damage = self._damage(folder / name, None if is_recorded else parts)
                damage = self._worst(damage, f"{place}/{number}")
            if damage is None:
                return Found(folder=folder, name=name, skipped=skipped)
            self.forget()
            skipped.append(f"checkpoint {folder / name} is not used: {damage}")
        if tag is not None and skipped:
            raise CheckpointError(
                f"{'; '.join(skipped)}. Name another tag, or none to load the newest that is whole"
            )
        return Found(skipped=skipped)

    def _tell_holdings(self, levels: Sequence[Level | None], place: str) -> None:
        """Let each node's leader tell what is on the disks that only its node sees."""
        if self._peers is None or not self._peers.nodes.is_leader or self._board.rank == 0:
            return
        for number, level in enumerate(levels):
            if level is not None:
                node = self._peers.nodes.number
                self._board.post(f"{place}/{number}/node/{node}", holdings(level.folder))

    def _hear_epochs(self, levels: Sequence[Level | None], place: str) -> dict[int, list[Epoch]]:
        """Return, on rank 0, what all nodes have, by the position of the level."""
        found = {}
        for number, level in enumerate(levels):
            if level is None or self._peers is None:
                continue
            told: list[list[Holding]] = []
            for node in range(len(self._peers.nodes.ranks)):
                name = f"{place}/{number}/node/{node}"
                is_own = node == self._peers.nodes.number
                heard = (
                    holdings(level.folder)
                    if is_own
                    else self._board.wait(name, timeout_s=_HOLDINGS_TIMEOUT_S)
                )
                self._board.forget(name)
                told.append(heard or [])
            found[number] = put_together(told)
        return found

    def _bring_back(self, level: Level, epoch: Epoch, place: str) -> str | None:
        """Have every node make its part whole; return what rank 0 heard of it."""
        missing = what_is_missing(epoch)
        if missing is not None or self._peers is None:
            return missing
        restorer = Restorer(self._peers, level, epoch, self._mode)
        damage = self._worst(restorer.bring_back(), place)
        if damage is not None:
            restorer.discard()
        elif not restorer.is_whole_everywhere:
            damage = self._worst(restorer.give_name(), f"{place}/name")
        return damage

    def _worst(self, damage: str | None, place: str) -> str | None:
        """Tell rank 0 what is wrong with this rank's share; return what it heard from all."""
        if self._board.rank != 0:
            self._board.post(f"{place}/of/{self._board.rank}", [damage])
            answer: str | None = self._board.share(place, str, timeout_s=_VERIFY_TIMEOUT_S)
            return answer
        heard = [damage]
        for rank in range(1, self._board.world_size):
            name = f"{place}/of/{rank}"
            found = self._board.wait(name, timeout_s=_VERIFY_TIMEOUT_S)
            heard.append(found[0] if found else f"rank {rank} did not answer")
            self._board.forget(name)
        worst = next((text for text in heard if text is not None), None)
        self._board.share(place, lambda: worst)
        return worst

    def _damage(self, checkpoint: Path, parts: int | None) -> str | None:
        try:
            return self._find_damage(checkpoint, parts)
        except Exception as error:  # noqa: BLE001 - the others wait for an answer
            return f"rank {self._board.rank}: {error}"

    def _find_damage(self, checkpoint: Path, parts: int | None) -> str | None:
        if not checkpoint.is_dir():
            return f"rank {self._board.rank} cannot see it"
        missing = find_missing_parts(checkpoint, world_size=parts) if parts is not None else None
        if missing is not None:
            return missing
        record = read_record(checkpoint)
        if self._mode == "off" or (record is not None and record.get("nodes", 1) > 1):
            return find_damage(checkpoint)
        if self._wanted is not None and record is not None and self._mode == "full":
            is_same = record["world_size"] == self._board.world_size
            if is_same and record.get("manifests") and not is_compact(checkpoint):
                return self._read(checkpoint, record, self._wanted(checkpoint))
        share = (self._board.rank, self._board.world_size)
        report = verify(checkpoint, mode=self._mode, part=share)
        return str(report.damage[0]) if report.damage else self._damage_of_bases(checkpoint)

    def _read(
        self, checkpoint: Path, record: Mapping[str, Any], wanted: Collection[str]
    ) -> str | None:
        """Check this rank's share and hold what is wanted, if there is memory for that."""
        files: Mapping[str, Any] = record["files"]
        wanted = [name for name in wanted if name in files]
        if sum(files[name]["size_bytes"] for name in wanted) > memory_share_bytes(_HELD_SHARE):
            wanted = []
        share = Share(rank=self._board.rank, wanted=wanted)
        report = verify_share(checkpoint, share, world_size=self._board.world_size)
        if report.damage:
            return str(report.damage[0])
        self._held = {(checkpoint / name).absolute(): i for name, i in share.images.items()}
        return None

    def _damage_of_bases(self, checkpoint: Path) -> str | None:
        """Say what is wrong with what a compact checkpoint refers to, or return None."""
        for tag, attempt in bases_of(checkpoint):
            base = checkpoint.with_name(tag)
            record = read_record(base)
            if record is None or record.get("attempt") != attempt:
                return f"it refers to {tag}, which is not there any more"
            damage = self._find_damage(base, None)
            if damage is not None:
                return f"it refers to {tag}: {damage}"
        return None


# Position of the level, name, has it a record, and where only its node sees it: what all have.
_Candidate = tuple[int, str, bool, "Epoch | None"]


def _candidates(
    folders: Sequence[Path], tag: str | None, epochs: Mapping[int, Sequence[Epoch]]
) -> list[_Candidate]:
    """Return what can be loaded, what is to be tried first first."""
    found: list[tuple[Any, _Candidate]] = []
    tag = None if tag is None else PurePath(tag).as_posix()

    def add(candidate: _Candidate, *, is_latest: bool, step: int, time_s: float) -> None:
        key = (not is_latest if tag is None else False, -step, candidate[0], -time_s)
        found.append((key, candidate))

    for number, folder in enumerate(folders):
        for epoch in epochs.get(number, []):
            if tag is None or tag == epoch["tag"]:
                times = {name: epoch[name] for name in ("is_latest", "step", "time_s")}
                add((number, epoch["tag"], True, epoch), **times)
        latest = read_latest(folder)
        for place in () if number in epochs else _places(tag or latest, is_given=tag is not None):
            for entry in _entries(folder / place):
                name = (place / entry.path.name).as_posix()
                if tag is not None and tag not in ((place / entry.tag).as_posix(), name):
                    continue
                step = -1 if entry.step is None else entry.step
                candidate = (number, name, entry.state != "unverified", None)
                add(candidate, is_latest=name == latest, step=step, time_s=entry.time_s)
    found.sort(key=lambda each: each[0])
    return [candidate for _, candidate in found]


def _places(tag: str | None, *, is_given: bool) -> list[PurePath]:
    """Return where below a folder to look: a tag may be a path, as in "run/step10"."""
    place = PurePath(tag or "").parent
    return [place] if is_given else list(dict.fromkeys([PurePath(), place]))


def _entries(folder: Path) -> list[Entry]:
    """Return what may be loaded; an incomplete one too, so that it is told what it lacks."""
    try:
        found = list_checkpoints(folder)
    except (CheckpointError, OSError, ValueError):  # a level that is not there yet, or no name
        return []
    return [each for each in found if each.state not in ("abandoned", "in progress", "trash")]
