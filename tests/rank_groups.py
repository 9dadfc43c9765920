"""Groups of real processes over gloo, each of which runs many cases.

    python tests/rank_groups.py MODULE FOLDER PLAN GROUP...

MODULE has the cases: functions of a rank and its world that return what JSON has. A GROUP is WORLD:case,case,...
One process imports all there is, and forks every rank of every group; `run_groups` starts it and reads what they said.
"""

from __future__ import annotations

import datetime
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from plan_fields import changed_plan

from autoaccum import Plan, Workload
from autoaccum.plan import DistributionSection, RankEntry
from autoaccum.window.fingerprint import fingerprint, signature
from autoaccum.window.step import open_context

HERE = Path(__file__).parent
Splits = Sequence[tuple[int, ...]]
Said = dict[str, list[Any]]


def run_groups(
    module: str, groups: Mapping[int, Sequence[str]], plan: Plan, folder: Path, timeout: float = 240, env: Any = None
) -> dict[int, Said]:
    """Run groups one after the other; return what each rank's case returned, by world and case."""
    file = folder / "plan.json"
    plan.save(file)
    wanted = [f"{world}:{','.join(cases)}" for world, cases in groups.items()]
    given = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", **(env or {})}
    subprocess.run(
        [sys.executable, "-W", "ignore", __file__, module, str(folder), str(file), *wanted],
        check=True, timeout=timeout, env=given,
    )  # fmt: skip
    found: dict[int, Said] = {}
    for world, cases in groups.items():
        said = [json.loads((folder / f"{world}-{rank}.json").read_text()) for rank in range(world)]
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


def run_rank(module: str, folder: Path, world: int, rank: int, cases: Sequence[str], prefix: str = "") -> None:
    """Run the cases in a rank of a group."""
    torch.set_num_threads(1)
    store = f"file://{folder / f'{prefix}group-{world}'}"
    limit = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=limit)
    found: dict[str, Any] = {}
    functions = importlib.import_module(module)
    for case in cases:
        begun = time.perf_counter()
        try:
            found[case] = getattr(functions, case)(rank, world)
        except Exception:
            found[case] = traceback.format_exc()
        if os.environ.get("RANK_TIMES"):
            print(f"[{rank}] {case} {time.perf_counter() - begun:.2f} s", file=sys.stderr, flush=True)
        (folder / f"{prefix}{world}-{rank}.json").write_text(json.dumps(found))


def fork(module: str, folder: Path, world: int, cases: Sequence[str], prefix: str = "") -> list[int]:
    """Fork a group's ranks; return their processes."""
    ranks = []
    for rank in range(world):
        child = os.fork()
        if child == 0:
            try:
                run_rank(module, folder, world, rank, cases, prefix)
            finally:
                os._exit(0)
        ranks.append(child)
    return ranks


def main() -> None:
    module, folder, plan, *groups = sys.argv[1:]
    os.environ["RANK_PLAN"] = plan
    os.environ["RANK_FOLDER"] = tempfile.mkdtemp(dir=folder)
    importlib.import_module(module)
    for group in groups:
        world, _, cases = group.partition(":")
        for child in fork(module, Path(folder), int(world), cases.split(",")):
            os.waitpid(child, 0)


if __name__ == "__main__":
    sys.path.insert(0, str(HERE))
    main()
