"""One rank of test_distributed.py: all scenarios on shards of the same samples.

python -m tests.kmeans.ranks_worker FOLDER
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from lowtide.core.errors import LowtideError
from lowtide.kmeans import KMeans, runs
from lowtide.kmeans.distributed import Ranks
from tests.helpers.ranks import leave_result
from tests.kmeans.points import points

COUNT, FEATURES = 1500, 5


def samples_of(dtype: Any) -> Any:
    return points(COUNT, FEATURES, 8, dtype=dtype)


def weights_of() -> Any:
    return np.random.default_rng(4).random(COUNT)


def bounds(size: int) -> list[int]:
    """Uneven shards; with more than two ranks the second has nothing."""
    if size == 1:
        return [0, COUNT]
    if size == 2:
        return [0, 411, COUNT]
    return [0, 700, 700, 1450, COUNT]


def shard(values: Any) -> Any:
    ends = bounds(dist.get_world_size())
    return values[ends[dist.get_rank()] : ends[dist.get_rank() + 1]]


def facts(model: KMeans) -> dict[str, Any]:
    return {
        "labels": np.asarray(model.labels_).tolist(),
        "centroids": np.asarray(model.cluster_centers_).tolist(),
        "inertia": model.inertia_,
        "n_iter": getattr(model, "n_iter_", None),
        "report": model.fault_report_.as_dict(),
    }


def starts() -> dict[str, Any]:
    """Clusterings that one rank and many have to agree on."""
    samples, wide = samples_of(np.float32), samples_of(np.float64)
    far = np.vstack([samples[:6], np.full((4, FEATURES), 300)]).astype(np.float32)
    return {
        "array": (np.float32, {"init": samples[5:13]}),
        "array64": (np.float64, {"init": wide[5:13], "fault_tolerance": "correct"}),
        "empty": (np.float32, {"init": far, "fault_tolerance": "detect"}),
        "plus_plus": (np.float64, {"init": "k-means++"}),
        "parallel": (np.float64, {"init": "k-means||"}),
        "random": (np.float64, {"init": "random", "n_init": 3}),
    }


def fits() -> dict[str, Any]:
    done = {}
    for name, (dtype, options) in starts().items():
        n_clusters = 10 if name == "empty" else 8
        model = KMeans(n_clusters, random_state=3, tol=0.0, process_group="world", **options)
        done[name] = facts(model.fit(shard(samples_of(dtype)), sample_weight=shard(weights_of())))
    batches = KMeans(8, random_state=3, process_group="world", init=starts()["array64"][1]["init"])
    for step in range(3):
        part = slice(500 * step, 500 * (step + 1))
        size = dist.get_world_size()
        own = slice(part.start + dist.get_rank(), part.stop, size)
        batches.partial_fit(samples_of(np.float64)[own])
    done["batches"] = facts(batches)
    return done


def resumed(folder: Path) -> dict[str, Any]:
    """A fit that is stopped on all ranks and goes on from rank 0's file."""
    runs.EVERY_S = 0.0
    samples, right, written = samples_of(np.float64), runs._File.write, []

    def write(self: Any, position: Any) -> None:
        right(self, position)
        written.append(1)
        if len(written) == 12:
            raise InterruptedError

    path = folder / f"rank{dist.get_rank()}.npy"  # ranks need not share a disk
    options: dict[str, Any] = {"random_state": 3, "tol": 0.0, "process_group": "world"}
    options |= {"init": "random", "n_init": 3}
    whole = KMeans(8, **options).fit(shard(samples))
    runs._File.write = write  # type: ignore[method-assign]
    is_stopped = False
    try:
        KMeans(8, **options, checkpoint=path).fit(shard(samples))
    except InterruptedError:
        is_stopped = True
    runs._File.write = right  # type: ignore[method-assign]
    is_there = path.exists()
    again = KMeans(8, **options, checkpoint=path).fit(shard(samples))
    return {
        "whole": facts(whole),
        "again": facts(again),
        "is_stopped": is_stopped,
        "is_there": is_there,
        "is_gone": not path.exists(),
    }


def damaged(where: str) -> dict[str, Any]:
    """Flip a bit in an all-reduce: in what one rank sends, or in what one rank receives."""
    right, calls = dist.all_reduce, []

    def all_reduce(tensor: torch.Tensor, **options: Any) -> Any:
        is_sums = tensor.numel() > 40
        calls.append(is_sums)
        is_hit = is_sums and dist.get_rank() == 0 and sum(calls) == 4
        if where == "sent" and is_hit:
            tensor[3] *= 1 + 1e-9
        done = right(tensor, **options)
        if where == "received" and is_hit:
            tensor.view(torch.int64)[7] ^= 1  # the last bit: only the other ranks can tell
        if where == "everywhere" and is_sums:
            tensor[2] += 1.0
        return done

    dist.all_reduce = all_reduce
    try:
        dtype, options = starts()["array64"]
        mode = "correct" if where != "everywhere" else "detect"
        options = {**options, "fault_tolerance": mode}
        model = KMeans(8, tol=0.0, process_group="world", **options)
        model.fit(shard(samples_of(dtype)), sample_weight=shard(weights_of()))
        return facts(model)
    except LowtideError as error:
        return {"error": f"{type(error).__name__}: {error}"}
    finally:
        dist.all_reduce = right


def failures() -> dict[str, str]:
    """What each rank raises when one of them is called wrongly or breaks."""
    rank = dist.get_rank()
    good = shard(samples_of(np.float32))
    bad = good.copy()
    if rank == 0:
        bad[1, 1] = np.nan
    narrow = good[:, :3] if rank == 0 else good
    said = {}

    def attempt(name: str, samples: Any, **options: Any) -> None:
        try:
            KMeans(**{"n_clusters": 8, "process_group": "world"} | options).fit(samples)
            said[name] = "no error"
        except Exception as error:  # noqa: BLE001
            said[name] = f"{type(error).__name__}: {error}"

    attempt("nan", bad)
    attempt("features", narrow)
    attempt("n_clusters", good, n_clusters=8 + rank)
    attempt("init", good, init=samples_of(np.float32)[rank : rank + 8])
    attempt("few", good, n_clusters=COUNT + 1)
    attempt("parameter", good, tol=-1 if rank == 1 else 0.0)
    attempt("backend", good, backend="reference" if rank else "nonsense")
    from lowtide.kmeans import portable

    right = portable._Prepared.assign

    def breaks(*arguments: Any, **options: Any) -> Any:
        if rank == 1:
            raise MemoryError("no memory left on this rank")
        return right(*arguments, **options)

    portable._Prepared.assign = breaks  # type: ignore[method-assign]
    attempt("breaks", good, backend="torch", init="random")
    portable._Prepared.assign = right  # type: ignore[method-assign]
    attempt("after", good)
    return said


def main() -> None:
    warnings.simplefilter("error")
    dist.init_process_group("gloo")
    group = Ranks()
    rows = group.gather(shard(np.ones((COUNT, 1))))
    result: dict[str, Any] = {"fits": fits(), "gathered": [len(part) for part in rows]}
    if group.size > 1:
        result["resumed"] = resumed(Path(sys.argv[1]))
        result["failures"] = failures()
        result["damaged"] = {w: damaged(w) for w in ("sent", "received", "everywhere")}
    leave_result(result)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
