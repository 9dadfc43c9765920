"""Groups of real processes over gloo, each of which runs many cases.

    python tests/rank_groups.py MODULE FOLDER PLAN GROUP...

MODULE has the cases: functions of a rank and its world that return what JSON has. A GROUP is WORLD:case,case,... where
WORLD may have a letter behind it, as in 3a: another group of as many.
One process imports all there is, and forks every rank of every group; `run_groups` starts it and reads what they said.
"""

from __future__ import annotations

import datetime
import gc
import importlib
import json
import os
import socket
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from plan_fields import changed_plan
from prepared_process import run_forked

from autoaccum import Plan, Workload
from autoaccum.plan import DistributionSection, RankEntry
from autoaccum.window.fingerprint import fingerprint, signature
from autoaccum.window.step import open_context

HERE = Path(__file__).parent
Splits = Sequence[tuple[int, ...]]
Said = dict[str, list[Any]]


def run_groups(
    module: str, groups: Mapping[Any, Sequence[str]], plan: Plan, folder: Path, timeout: float = 600, env: Any = None
) -> dict[Any, Said]:
    """Run groups one after the other; return what each rank's case returned, by world and case."""
    file = folder / "plan.json"
    plan.save(file)
    wanted = [f"{world}:{','.join(cases)}" for world, cases in groups.items()]
    given = {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", **(env or {})}
    done = run_forked(Path(__file__), module, str(folder), str(file), *wanted, env=given, timeout=timeout)
    print(done.stdout, done.stderr)
    assert done.returncode == 0, done.stderr
    found: dict[Any, Said] = {}
    for world, cases in groups.items():
        files = [folder / f"{world}-{rank}.json" for rank in range(world_of(str(world)))]
        said = [json.loads(file.read_text()) if file.exists() else {} for file in files]
        found[world] = {case: [each.get(case, "nothing was said") for each in said] for case in cases}
    return found


def plan_of_ranks(plan: Plan, work: Workload, splits: Splits, rank: int) -> Plan:
    """A plan as though each rank's split were the one that fits."""
    entries = tuple(RankEntry("cpu", split, 1 << 30, 4 << 30, max(split)) for split in splits)
    own, inner = splits[rank], getattr(work.model, "module", work.model)
    plan = changed_plan(
        plan, target_batch=sum(map(sum, splits)), world_size=len(splits), split=own, micro_batch=max(own),
        accumulation_steps=len(own), signature=signature(work.sample),
        fingerprint=fingerprint(open_context(replace(work, model=inner, scheduler=None))),
    )  # fmt: skip
    return replace(plan, distribution=DistributionSection(entries, "bare", "given"))


def world_of(group: str) -> int:
    """The ranks of a group by its name."""
    return int(group.rstrip("abcdefgh"))


def run_rank(module: str, folder: Path, group: str, rank: int, cases: Sequence[str]) -> None:
    """Run the cases in a rank of a group."""
    torch.set_num_threads(1)
    world, limit = world_of(group), datetime.timedelta(seconds=60)
    store = dist.TCPStore("127.0.0.1", int(os.environ[f"PORT_{group}"]), world, rank == 0, limit)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=limit)
    found: dict[str, Any] = {}
    functions = importlib.import_module(module)
    for case in cases:
        begun = time.process_time()
        try:
            found[case] = getattr(functions, case)(rank, world)
        except Exception:
            found[case] = traceback.format_exc()
        if os.environ.get("RANK_TIMES"):
            print(f"[{rank}] {case} {time.process_time() - begun:.2f} s", file=sys.stderr, flush=True)
        (folder / f"{group}-{rank}.json").write_text(json.dumps(found))


def fork(module: str, folder: Path, group: str, cases: Sequence[str]) -> list[int]:
    """Fork a group's ranks; return their processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        os.environ[f"PORT_{group}"] = str(free.getsockname()[1])
    ranks = []
    for rank in range(world_of(group)):
        child = os.fork()
        if child == 0:
            try:
                run_rank(module, folder, group, rank, cases)
            finally:
                os._exit(0)
        ranks.append(child)
    return ranks


def main() -> None:
    """Run every group after the one before."""
    module, folder, plan, *groups = sys.argv[1:]
    os.environ["RANK_PLAN"] = plan
    os.environ["RANK_FOLDER"] = tempfile.mkdtemp(dir=folder)
    import torch._dynamo  # noqa: F401  as the first optimizer does, on every rank

    warnings.simplefilter("ignore")
    importlib.import_module(module)
    gc.collect()
    gc.freeze()  # or each of the many collections would go through all that torch has
    for text in groups:
        group, _, cases = text.partition(":")
        for child in fork(module, Path(folder), group, cases.split(",")):
            os.waitpid(child, 0)


if __name__ == "__main__":
    sys.path.insert(0, str(HERE))
    main()
