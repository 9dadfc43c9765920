"""One rank of `tests/test_accelerate.py`: loops over windows on two processes, each gradient against the whole batch's.

RANK=0 WORLD_SIZE=2 MASTER_ADDR=... MASTER_PORT=... python tests/rank_loops.py mean.json tokens.json
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from helpers_train import FP64, Capture, Rows, distance, gradients, mlp, pad, sequence, tagger, token_count, vectors
from test_plain_loop import mean, token_mean
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.utils.data import DataLoader

from autoaccum import UsageError, windows

EXACT = DataLoaderConfiguration(even_batches=False)


def gathered(ids: list[int]) -> list[int]:
    """The samples of a window on all ranks."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, ids)
    return [each for part in found for each in part]


def compare(step: Any, ids: list[int], model: nn.Module, loss: Any, whole_of: Any) -> None:
    whole = whole_of(sorted(gathered(ids)))
    assert distance(step, gradients(model, loss, whole)) <= FP64, (dist.get_rank(), ids)


def counting(reductions, bucket):  # type: ignore[no-untyped-def]  # torch looks at annotations
    """Reduce as DistributedDataParallel does, and count it."""
    reductions.append(bucket.index())
    return allreduce_hook(None, bucket)  # type: ignore[arg-type]


def accelerated(plan: str, samples: int, batch: int, windows_expected: int, reduced: int) -> None:
    """Ranks with unequal numbers of samples; in some epochs' last window one has none."""
    accelerator = Accelerator(cpu=True, dataloader_config=EXACT, gradient_accumulation_steps=3)
    data = (*vectors(samples), torch.arange(samples))
    model = mlp()
    optimizer = Capture(model.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1000)
    loader: Any = DataLoader(Rows(list(zip(*data, strict=True))), batch)
    model, prepared, loader, wrapped = accelerator.prepare(model, optimizer, loader, scheduler)
    number, reductions = 0, list[int]()
    model.register_comm_hook(reductions, counting)
    for window in windows(loader, plan, accelerator=accelerator):
        ids: list[int] = []
        twin = mlp()
        twin.load_state_dict(model.module.state_dict())
        for micro in window:
            ids += micro.batch[2].tolist()
            window.backward(mean(model, micro.batch))
        result = window.step(prepared, scheduler=wrapped, max_grad_norm=1e9)
        number += 1
        compare(optimizer.seen[-1], ids, twin, mean, lambda rows: tuple(v[rows] for v in data))
        assert result.samples == len(gathered(ids)) and result.number == number
        assert scheduler.last_epoch == 2 * number  # the wrapper's rule: once for each process
        norm = torch.cat([g.flatten() for g in optimizer.seen[-1]]).norm()
        assert result.grad_norm is not None and abs(float(result.grad_norm / norm) - 1) < 1e-9
    assert number == windows_expected and len(reductions) == reduced
    same = [p.detach().clone() for p in model.parameters()]
    for p in same:
        dist.broadcast(p, 0)
    assert all(map(torch.equal, same, model.parameters()))


def tokens(plan: str) -> None:
    """Plain DistributedDataParallel; ragged counts, and one rank's last micro-batch counts nothing."""
    samples = [sequence(length, seed=i) for i, length in enumerate((9, 3, 7, 1, 8, 2, 6, 5, 4, 9, 2, 7))]
    samples[3]["labels"].fill_(-100)
    samples[9]["labels"].fill_(-100)
    rank = dist.get_rank()
    model: nn.Module = nn.parallel.DistributedDataParallel(tagger())
    optimizer = Capture(model.parameters())
    mine = [samples[i] for i in range(12) if i % 2 == rank]
    starts = list(range(rank, 12, 2))
    for window in windows([pad([each], 9) for each in mine], plan, model=model, count=token_count):
        ids = [starts.pop(0) for _ in window.split]
        for micro in window:
            window.backward(token_mean(model, micro.batch))
        window.step(optimizer)
        compare(optimizer.seen[-1], ids, model.module, token_mean, lambda rows: pad([samples[i] for i in rows], 9))  # type: ignore[arg-type]


def refused(plan: str) -> None:
    accelerator = Accelerator(cpu=True)
    loader = DataLoader(Rows(list(zip(*vectors(23), strict=True))), 4)
    try:
        windows(accelerator.prepare(loader), plan, accelerator=accelerator, model=mlp())
    except UsageError as error:
        assert "even_batches=False" in str(error)
    else:
        raise AssertionError("repeated samples were accepted")
    model = nn.parallel.DistributedDataParallel(mlp())
    try:
        for window in windows([(*vectors(5), torch.arange(5))], plan, model=model):
            for micro in window:
                with model.no_sync():
                    window.backward(mean(model, micro.batch))
    except UsageError as error:
        assert "Leave no_sync()" in str(error)
    else:
        raise AssertionError("a no_sync of the loop was accepted")
    try:
        windows([vectors(5)], plan)
    except UsageError as error:
        assert "model=model" in str(error)
    else:
        raise AssertionError("ranks without a model were accepted")


if __name__ == "__main__":
    by_mean, by_tokens = sys.argv[1:]
    accelerated(by_mean, 23, 4, 3, reduced=3)  # once a window
    accelerated(by_mean, 21, 4, 3, reduced=2)  # the last by the window itself: a rank has no sample
    tokens(by_tokens)
    refused(by_mean)
    print(f"rank {dist.get_rank()} done")
    dist.destroy_process_group()
