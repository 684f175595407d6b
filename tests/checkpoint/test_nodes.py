"""Levels of which each node has its own: committed together, copied to the next, brought back."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest

from lowtide.checkpoint import verify
from lowtide.checkpoint.config import MIB, CheckpointConfig
from lowtide.checkpoint.nodes.epochs import copy_folder, holdings
from lowtide.checkpoint.nodes.peers import Peers
from lowtide.checkpoint.nodes.placement import _grouped, find_nodes, own_name
from lowtide.checkpoint.saver import Saver
from lowtide.checkpoint.saving import Stage
from lowtide.checkpoint.store import commit as commit_module
from lowtide.checkpoint.store.catalog import read_latest
from lowtide.checkpoint.store.finding import Finder
from lowtide.core.errors import CheckpointError
from lowtide.core.restart import find_damage, read_record
from tests.checkpoint.node_runs import (
    EVER,
    MODEL,
    Run,
    assert_found,
    assert_holds,
    contents,
    flip,
    nobody_has,
    start,
    tags,
)
from tests.checkpoint.ranks import file_name, hidden, make_boards, make_config, on_all, save
from tests.helpers.ranks import run_ranks

# -- commit ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("nodes", [2, 3])
def test_each_node_has_its_ranks_files_and_the_next_ones_copies(tmp_path: Path, nodes: int) -> None:
    with start(tmp_path, nodes) as run:
        savings = run.save(7)
    attempts = set()
    for node in range(nodes):
        folder, own = tmp_path / f"node{node}", (2 * node, 2 * node + 1)
        assert_holds(folder / "step7", 7, own)
        names = {file_name(rank) for rank in own} | ({MODEL} if node == 0 else set())
        manifests = {f"manifest-{rank:05d}.json" for rank in own}
        assert set(contents(folder / "step7")) == names | manifests | {"lowtide.json"}
        record = read_record(folder / "step7")
        assert record is not None
        assert (record["node"], record["nodes"], record["world_size"]) == (node, nodes, 2 * nodes)
        assert set(record["manifests"]) == manifests
        attempts.add(record["attempt"])
        assert verify(folder / "step7").is_ok
        assert read_latest(folder) == "step7"
        for rank in own:
            copy = tmp_path / f"node{(node + 1) % nodes}" / ".copies/step7" / str(rank)
            for name, raw in contents(copy).items():
                assert raw == (folder / "step7" / name).read_bytes()
            assert file_name(rank) in contents(copy)
        assert hidden(folder) == {".copies"}
    assert len(attempts) == 1
    for saving in savings:
        assert saving.stage is Stage.DRAINED
        assert saving.describe()["is_replicated"] is True


def test_one_nodes_part_alone_is_no_checkpoint_to_other_readers(tmp_path: Path) -> None:
    with start(tmp_path) as run:
        run.save(1)
    text = find_damage(tmp_path / "node0/step1")
    assert text is not None
    assert "disks of 2 nodes, of which this is node 0's" in text
    (board,) = make_boards(1)
    for mode in ("full", "off"):
        found = Finder(board, mode).find([tmp_path / "node0"], None, parts=None)  # type: ignore[arg-type]
        assert found.name is None
        assert "lowtide.checkpoint.tiers" in found.skipped[0]
        (board,) = make_boards(1)


def test_files_come_down_from_the_nodes_to_the_shared_level(tmp_path: Path) -> None:
    with start(tmp_path, every=1) as run:
        run.save(3)
    assert verify(tmp_path / "shared/step3").is_ok
    assert_holds(tmp_path / "shared/step3", 3, (0, 1, 2, 3))
    record = read_record(tmp_path / "shared/step3")
    assert record is not None
    assert "nodes" not in record
    assert len(record["manifests"]) == 4


def test_retention_removes_checkpoints_and_their_copies(tmp_path: Path) -> None:
    with start(tmp_path, keep=2, keep_every_n_steps=3) as run:
        for step in range(1, 7):
            run.save(step)
    for node in range(2):
        folder = tmp_path / f"node{node}"
        assert tags(folder) == ["step3", "step5", "step6"]
        assert {path.name for path in (folder / ".copies").iterdir()} == {"step3", "step5", "step6"}


def test_newest_one_with_copies_outlives_a_newer_one_without(
    tmp_path: Path, monkeypatch: Any
) -> None:
    with start(tmp_path, keep=1) as run:
        run.save(1)
        run.save(2)
        assert tags(tmp_path / "node0") == ["step2"]

        def refuse(*_: Any, **__: Any) -> None:
            raise CheckpointError("no way to it")

        monkeypatch.setattr(Peers, "send_copy", refuse)
        savings = run.save(3)
        run.save(4)
        assert savings[2].is_replicated is False
        assert "rank 0: no way to it" in str(savings[2].replica_error)
        assert savings[2].stage is Stage.DRAINED
    for node in range(2):
        assert tags(tmp_path / f"node{node}") == ["step2", "step4"]
        assert (tmp_path / f"node{node}/.copies/step2").is_dir()


def test_copies_of_an_earlier_run_stay_until_there_are_newer_ones(
    tmp_path: Path, monkeypatch: Any
) -> None:
    with start(tmp_path, keep=1) as run:
        run.save(1)
    with start(tmp_path, keep=1) as run:
        with monkeypatch.context() as patch:
            patch.setattr(Peers, "send_copy", _die)
            run.save(2)
        for node in range(2):
            assert tags(tmp_path / f"node{node}") == ["step1", "step2"]
        run.save(3)
        for node in range(2):
            assert tags(tmp_path / f"node{node}") == ["step3"]


def test_what_a_dead_run_left_on_a_node_is_removed_by_its_leader(tmp_path: Path) -> None:
    dead = tmp_path / f"node1/.step1.{'0' * 16}.part"
    dead.mkdir(parents=True)
    owner = {"host": socket.gethostname(), "pid": 999_999_999, "time_s": 1.0}
    (dead / "owner.json").write_text(json.dumps(owner))
    with start(tmp_path) as run:
        run.save(2)
    assert not dead.exists()


def test_half_of_a_copy_that_a_dead_run_left_is_removed(tmp_path: Path) -> None:
    with start(tmp_path, keep=2) as run:
        run.save(1)
        record = read_record(tmp_path / "node0/step1")
        assert record is not None
        copies = tmp_path / "node0/.copies/step1"
        mine, dead = copies / f".2.{record['attempt']}.part", copies / f".2.{'0' * 16}.part"
        for path in (mine, dead):  # the first is just being made, for all that is known
            path.mkdir()
        run.save(2)
        assert mine.exists()
        assert not dead.exists()


# -- failure --------------------------------------------------------------------------------------


def test_a_node_that_cannot_write_fails_all_and_the_level_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "node1").write_text("not a folder")
    with start(tmp_path, every=1) as run:
        savings = run.save(1)
        assert {saving.stage for saving in savings} == {Stage.FAILED}
        for saving in (savings[0], savings[1]):
            assert "rank 2: " in str(saving.error)
        run.save(2)
    assert list((tmp_path / "node0").iterdir()) == []
    assert_holds(tmp_path / "shared/step2", 2, (0, 1, 2, 3))


def test_a_leader_that_cannot_publish_takes_all_parts_back(
    tmp_path: Path, monkeypatch: Any
) -> None:
    stock = commit_module.publish

    def publish(part: Path, final: Path) -> None:
        if "node1" in str(final) and final.name == "step2":
            raise OSError(5, "a bad disk")
        stock(part, final)

    with start(tmp_path) as run:
        run.save(1)
        monkeypatch.setattr(commit_module, "publish", publish)
        savings = run.save(2)
        assert {saving.stage for saving in savings} == {Stage.FAILED}
        for saving in savings:
            assert "rank 2: [Errno 5] a bad disk" in str(saving.error)
        for node in range(2):
            folder = tmp_path / f"node{node}"
            assert tags(folder) == ["step1"]
            assert read_latest(folder) == "step1"
            assert hidden(folder) == {".copies"}
        assert assert_found(run, tmp_path, "step1") == []


def die_after_publishing(run: Run, monkeypatch: Any) -> None:
    """Let node 1's leader go once it has published its part and before it can say so."""
    leader = run.savers[2]._committer
    stock = leader._complete

    def complete(*args: Any) -> None:
        stock(*args)
        raise CheckpointError("as if it were dead")

    monkeypatch.setattr(leader, "_complete", complete)


def test_a_leader_that_dies_before_it_answers_leaves_no_checkpoint(
    tmp_path: Path, monkeypatch: Any
) -> None:
    with start(tmp_path) as run:
        run.save(1)
    with start(tmp_path, commit_timeout_s=1.0) as run:
        die_after_publishing(run, monkeypatch)
        savings = run.save(2)
        assert {saving.stage for saving in savings} == {Stage.FAILED}
        assert "no word from rank 2, the leader of its node" in str(savings[0].error)
    assert tags(tmp_path / "node0") == ["step1"]
    assert tags(tmp_path / "node1") == ["step1", "step2"]  # nobody was left to take it back
    with start(tmp_path) as run:
        assert assert_found(run, tmp_path, "step1") == []  # what latest says
        for node in range(2):
            (tmp_path / f"node{node}/latest").unlink()
        skipped = assert_found(run, tmp_path, "step1")
        assert skipped == [f"checkpoint {tmp_path}/node0/step2 is not used: {nobody_has('0, 1')}"]


def test_parts_of_two_attempts_are_not_put_together(tmp_path: Path, monkeypatch: Any) -> None:
    with start(tmp_path) as run:
        run.save(1)
        run.save(2, tag="best")
    with start(tmp_path, commit_timeout_s=1.0) as run:
        die_after_publishing(run, monkeypatch)
        run.save(3, tag="best")
    old, new = (read_record(tmp_path / f"node{node}/best") for node in range(2))
    assert new is not None
    assert new["step"] == 3
    assert old is None  # what had the name before was replaced, and then taken back
    shutil.rmtree(tmp_path / "node0/.copies/best")  # node 1's ranks as they were at step 2
    with start(tmp_path) as run:
        skipped = assert_found(run, tmp_path, "step1")
    assert len(skipped) == 2


# -- restore --------------------------------------------------------------------------------------


def test_a_node_names_only_ranks_whose_files_are_all_there(tmp_path: Path) -> None:
    with start(tmp_path) as run:
        run.save(1)
        run.save(2)
    old, new = tmp_path / "node0/step1", tmp_path / "node0/step2"
    (new / file_name(1)).unlink()
    shutil.copy(old / "manifest-00000.json", new)  # of another attempt
    (tmp_path / "node0/.copies/step2/2" / file_name(2)).write_bytes(b"short")
    found = {each["tag"]: each for each in holdings(tmp_path / "node0")}
    assert found["step1"]["ranks"] == {"0": [MODEL], "1": []}
    assert found["step1"]["copies"] == {"2": [], "3": []}
    assert found["step2"]["ranks"] == {}
    assert found["step2"]["copies"] == {"3": []}
    assert (found["step1"]["is_latest"], found["step2"]["is_latest"]) == (False, True)


@pytest.mark.parametrize("mode", ["full", "fast", "off"])
def test_a_replaced_node_gets_everything_back_bit_for_bit(tmp_path: Path, mode: str) -> None:
    with start(tmp_path, 3) as run:
        run.save(1)
        run.save(2)
    before = contents(tmp_path / "node1/step2")
    shutil.rmtree(tmp_path / "node1")
    with start(tmp_path, 3, verify=mode) as run:
        assert assert_found(run, tmp_path, "step2") == []
        after = contents(tmp_path / "node1/step2")
        assert {name: after[name] for name in before} == before
        assert read_latest(tmp_path / "node1") == "step2"
        model = (tmp_path / "node0/step2" / MODEL).read_bytes()
        for node in (1, 2):  # DeepSpeed reads rank 0's on every node
            assert (tmp_path / f"node{node}/step2" / MODEL).read_bytes() == model
        run.save(3)
        assert assert_found(run, tmp_path, "step3") == []
    for node in range(3):
        assert verify(tmp_path / f"node{node}/step2").is_ok
        assert verify(tmp_path / f"node{node}/step3").is_ok


def test_the_node_with_the_shared_model_file_is_lost(tmp_path: Path) -> None:
    with start(tmp_path) as run:
        run.save(1)
    before = contents(tmp_path / "node0/step1")
    shutil.rmtree(tmp_path / "node0")
    with start(tmp_path) as run:
        assert assert_found(run, tmp_path, "step1") == []
    after = contents(tmp_path / "node0/step1")
    assert after == before
    assert (tmp_path / "node1/step1" / MODEL).read_bytes() == before[MODEL]


def test_a_damaged_file_is_brought_back_from_its_copy(tmp_path: Path) -> None:
    with start(tmp_path) as run:
        run.save(1)
    path = tmp_path / "node1/step1" / file_name(3)
    before = path.read_bytes()
    flip(path)
    with start(tmp_path) as run:
        assert assert_found(run, tmp_path, "step1") == []
    assert path.read_bytes() == before


def test_a_file_of_an_older_attempt_is_brought_back_from_its_copy(tmp_path: Path) -> None:
    with start(tmp_path) as run:
        run.save(1)
        run.save(2)
    folder = tmp_path / "node1/step2"
    before = contents(folder)
    for name in (file_name(3), "manifest-00003.json"):  # they agree with each other
        shutil.copy(tmp_path / "node1/step1" / name, folder)
    with start(tmp_path) as run:
        assert assert_found(run, tmp_path, "step2") == []
    assert {name: contents(folder)[name] for name in before} == before


def test_a_part_that_only_lacks_its_name_counts(tmp_path: Path) -> None:
    with start(tmp_path) as run:
        run.save(1)
    record = read_record(tmp_path / "node1/step1")
    assert record is not None
    shutil.rmtree(tmp_path / "node0/.copies")
    (tmp_path / "node1/step1").rename(tmp_path / f"node1/.step1.{record['attempt']}.part")
    with start(tmp_path) as run:
        assert assert_found(run, tmp_path, "step1") == []


def test_a_damaged_copy_is_not_used(tmp_path: Path) -> None:
    with start(tmp_path) as run:
        run.save(1)
        run.save(2)
    shutil.rmtree(tmp_path / "node1")
    flip(copy_folder(tmp_path / "node0", "step2", 3) / file_name(3))
    with start(tmp_path) as run:
        (skipped,) = assert_found(run, tmp_path, "step1")
    assert "step2 is not used: rank 3 on node 1" in skipped
    assert f"{file_name(3)}: what came is not what was written" in skipped
    assert_holds(tmp_path / "node1/step1", 1, (2, 3))
    assert [path.name for path in (tmp_path / "node1").iterdir()] == ["step1"]


def test_a_damaged_copy_that_was_asked_for_raises_on_all_ranks(tmp_path: Path) -> None:
    with start(tmp_path) as run:
        run.save(1)
    shutil.rmtree(tmp_path / "node1")
    flip(copy_folder(tmp_path / "node0", "step1", 2) / file_name(2))
    with start(tmp_path) as run, pytest.raises(CheckpointError, match="Name another tag"):
        run.find("step1")


def test_two_neighbours_lost_fall_back_to_the_shared_level(tmp_path: Path) -> None:
    with start(tmp_path, 3, every=2) as run:
        for step in (1, 2, 3):
            run.save(step)
    assert tags(tmp_path / "shared") == ["step2"]
    for node in (1, 2):
        shutil.rmtree(tmp_path / f"node{node}")
    with start(tmp_path, 3) as run:
        found = run.find()
        for each in found:
            assert (each.folder, each.name) == (tmp_path / "shared", "step2")
        lines = [line for line in found[0].skipped if "step3" in line]
        assert lines == [f"checkpoint {tmp_path}/node0/step3 is not used: {nobody_has('2, 3')}"]
    assert verify(tmp_path / "shared/step2").is_ok


def test_two_nodes_that_are_no_neighbours_may_be_lost(tmp_path: Path) -> None:
    with start(tmp_path, 4, per_node=1) as run:
        run.save(1)
    for node in (0, 2):
        shutil.rmtree(tmp_path / f"node{node}")
    with start(tmp_path, 4, per_node=1) as run:
        assert assert_found(run, tmp_path, "step1", per_node=1) == []
    for node in range(4):
        assert_holds(tmp_path / f"node{node}/step1", 1, (node,))


def test_nodes_with_different_newest_ones_agree_on_what_all_have(tmp_path: Path) -> None:
    with start(tmp_path) as run:
        for step in (1, 2, 3):
            run.save(step)
    shutil.rmtree(tmp_path / "node1/step3")
    shutil.rmtree(tmp_path / "node0/.copies/step3")
    (tmp_path / "node1/latest").write_text("step2")
    with start(tmp_path) as run:
        (skipped,) = assert_found(run, tmp_path, "step2")
    assert "no node has the files of rank 2, 3" in skipped


def test_nodes_may_have_changed_their_numbers(tmp_path: Path) -> None:
    with start(tmp_path, is_swapped=True) as run:  # rank 0 is not on node 0
        run.save(1)
        assert run.savers[0].board.rank == 0
        assert run.savers[0].router.levels[0].folder == tmp_path / "node1"
    assert_holds(tmp_path / "node0/step1", 1, (2, 3))
    assert_holds(tmp_path / "node1/step1", 1, (0, 1))
    with start(tmp_path) as run:
        assert assert_found(run, tmp_path, "step1") == []
    for rank in range(4):
        assert_holds(tmp_path / f"node{rank // 2}/step1", 1, (rank,))


def test_another_number_of_ranks_has_all_files_on_every_node(tmp_path: Path) -> None:
    with start(tmp_path) as run:
        run.save(1)
    shutil.rmtree(tmp_path / "node1")
    with start(tmp_path, 3, per_node=1) as run:
        assert assert_found(run, tmp_path, "step1", per_node=1) == []
    for node in range(3):
        assert_holds(tmp_path / f"node{node}/step1", 1, (0, 1, 2, 3))
        assert (tmp_path / f"node{node}/step1" / MODEL).is_file()


def test_half_of_what_was_brought_back_is_no_checkpoint(tmp_path: Path, monkeypatch: Any) -> None:
    with start(tmp_path) as run:
        run.save(1)
    shutil.rmtree(tmp_path / "node1")
    with start(tmp_path) as run:
        monkeypatch.setattr("lowtide.checkpoint.nodes.restoring.Restorer._give_name", _die)
        assert [each.name for each in run.find()] == [None] * 4
    assert not (tmp_path / "node1/step1").exists()
    monkeypatch.undo()
    with start(tmp_path) as run:
        assert assert_found(run, tmp_path, "step1") == []
    assert_holds(tmp_path / "node1/step1", 1, (2, 3))


def _die(*_: Any, **__: Any) -> str:
    raise OSError(5, "as if it were dead")


# -- who is where, and settings -------------------------------------------------------------------


def test_number_of_the_node_comes_from_the_launcher() -> None:
    assert own_name({"GROUP_RANK": "3", "SLURM_NODEID": "1"}) == "3"
    assert own_name({"SLURM_NODEID": "1"}) == "1"
    assert own_name({"GROUP_RANK": ""}) == socket.gethostname()


def test_ranks_are_grouped_by_number_and_host() -> None:
    assert _grouped([["b", "b"], ["a", "a"], ["b", "b"]]) == [[0, 2], [1]]
    assert _grouped([["1", "x"], ["0", "x"], ["10", "x"], ["2", "x"]]) == [[1], [0], [3], [2]]
    assert _grouped([["0", "x"], ["0", "y"]]) == [[0], [1]]  # the shell's variable, on two hosts


def test_ring_goes_round_and_ranks_share_the_work() -> None:
    boards = make_boards(5)
    found = on_all([lambda b=board: find_nodes(b, name=str(b.rank // 3)) for board in boards])  # type: ignore[misc]
    assert [each.ranks for each in found] == [((0, 1, 2), (3, 4))] * 5
    assert [each.number for each in found] == [0, 0, 0, 1, 1]
    assert [each.partner for each in found] == [1, 1, 1, 0, 0]
    assert [each.server(each.partner) for each in found] == [3, 4, 3, 0, 1]
    assert [each.is_leader for each in found] == [True, False, False, True, False]


@pytest.mark.parametrize(
    ("tiers", "text"),
    [
        ([{"path": "/a", "scope": "node"}, {"path": "/b", "scope": "node"}], 'must be "shared"'),
        ([{"path": "/a", "copies": 1}], 'set "scope" to "node" or "copies" to 0'),
        ([{"path": "/a{node}"}], "is another folder on each node"),
        ([{"path": "/a", "scope": "node", "copies": 2}], "copies"),
    ],
)
def test_settings_that_cannot_be_are_refused(tiers: list[Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        CheckpointConfig.model_validate_json(json.dumps({"tiers": tiers}))


def test_a_single_level_may_be_the_nodes_own(tmp_path: Path) -> None:
    tiers = [{"path": str(tmp_path / "node{node}"), "scope": "node"}]
    config = make_config(tiers=tiers)
    made = on_all(
        [
            lambda b=board: Saver(  # type: ignore[misc]
                config, b, buffer_bytes=16 * MIB, nodes=find_nodes(b, name=str(b.rank))
            )
            for board in make_boards(2)
        ]
    )
    save(made, tmp_path / "node{node}", 1)
    assert on_all([lambda s=s: s.wait(Stage.DRAINED, EVER) for s in made]) == [True, True]  # type: ignore[misc]
    on_all([lambda s=s: s.close(5.0) for s in made])  # type: ignore[misc]
    for node in range(2):
        assert_holds(tmp_path / f"node{node}/step1", 1, (node,))
        assert not (tmp_path / f"node{node}/.copies").exists()


# -- processes ------------------------------------------------------------------------------------


@pytest.mark.dist
def test_processes_on_two_nodes_lose_one(tmp_path: Path) -> None:
    worker = ["-m", "tests.checkpoint.nodes_worker", "plain", str(tmp_path)]
    first = run_ranks([*worker, "save"], nproc=4, timeout_s=90).check().results
    for rank, facts in enumerate(first):
        assert facts["node"] == rank // 2
        assert facts["is_replicated"] is True
    before = contents(tmp_path / "node1/step2")
    shutil.rmtree(tmp_path / "node1")
    second = run_ranks([*worker, "load"], nproc=4, timeout_s=90).check().results
    for rank, facts in enumerate(second):
        assert facts["found"] == str(tmp_path / f"node{rank // 2}/step2")
        assert facts["is_right"] is True
    after = contents(tmp_path / "node1/step2")
    assert {name: after[name] for name in before} == before


@pytest.mark.dist
@pytest.mark.slow
def test_deepspeed_goes_on_after_a_node_was_lost(tmp_path: Path) -> None:
    worker = ["-m", "tests.checkpoint.nodes_worker", "deepspeed", str(tmp_path)]
    results = run_ranks(worker, timeout_s=280).check().results
    for rank, facts in enumerate(results):
        for stage in ("2", "3"):
            found, expected = facts[stage]["resumed"], facts[stage]["stock"]
            assert f"/node{rank}/" in found["path"]
            assert {**found, "path": None} == {**expected, "path": None}
            assert facts[stage]["is_replicated"] is True
        assert "another ZeRO stage" in facts["other stage"]
        assert 'take the levels of "scope" "node" out' in facts["other stage"]


def test_a_rate_that_is_allowed_is_no_silence(tmp_path: Path) -> None:
    # A file takes half a second, to the disk and to the next node.
    with start(tmp_path, bytes_per_s=4e5, stall_timeout_s=0.2) as run:
        savings = run.save(1)
        assert [saving.replica_error for saving in savings] == [None] * 4
        assert all(saving.is_replicated for saving in savings), run.savers[0].last_error
