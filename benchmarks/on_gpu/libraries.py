"""Part (h): what cuDNN asks the allocator for, call by call.

NVIDIA publishes no formula for the workspaces of recurrent nets and convolutions. `--gpu` has rules for them
(devices/virtual/source/rnn.c, docs/ground-truth.md); here are the sizes themselves, of calls that differ in one number
at a time, so that the rules can be corrected. Each call is one forward and backward, recorded by the allocator.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from autoaccum.devices.cuda import recorder

from . import apart
from .job import Job
from .memory import limit_to

LIMIT_BYTES = 6 << 30
LEAST_BYTES = 1 << 16  # smaller blocks are no workspaces
KINDS = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}
# kind, dtype, input, hidden, layers, both ways, steps, sequences, batch first, packed; others differ in one of these
RECURRENT_BASE = ("lstm", "float32", 256, 512, 2, False, 128, 8, True, False)
RECURRENT_OTHERS: dict[int, tuple[Any, ...]] = {
    0: ("gru", "rnn"), 1: ("bfloat16", "float16"), 2: (128, 512, 200), 3: (256, 1024, 300), 4: (1, 3, 4), 5: (True,),
    6: (64, 256, 100), 7: (1, 2, 16, 64, 256), 8: (False,), 9: (True,),
}  # fmt: skip
# dtype, channels-last, in, out, side, kernel, stride, groups, samples
CONVOLUTION_BASE = ("bfloat16", False, 64, 128, 56, 3, 1, 1, 8)
CONVOLUTION_OTHERS: dict[int, tuple[Any, ...]] = {
    0: ("float32", "float16"), 1: (True,), 2: (3, 256), 3: (32, 512), 4: (28, 112), 5: (1, 7), 6: (2,), 7: (64,),
    8: (2, 7, 13, 32, 64, 113, 128),
}  # fmt: skip


def run(job: Job) -> None:
    """Record both kinds of calls, each in a process."""
    for name, function in (("recurrent", recurrent), ("convolutions", convolutions)):
        if name not in job.known:
            job.emit(name, calls=apart.call(function, job.seconds_left / 2 if job.seconds_left < 1e6 else 600.0))


def varied(base: tuple[Any, ...], others: dict[int, tuple[Any, ...]]) -> Iterator[tuple[Any, ...]]:
    """Yield a call, and those that differ from it in one number."""
    yield base
    for place, values in others.items():
        for value in values:
            yield (*base[:place], value, *base[place + 1 :])


def recurrent(seconds: float) -> list[dict[str, Any]]:
    """Record recurrent nets."""
    limit_to(LIMIT_BYTES)
    ends, found = time.perf_counter() + seconds, []
    for call in varied(RECURRENT_BASE, RECURRENT_OTHERS):
        kind, dtype, inputs, hidden, layers, both, steps, sequences, first, packed = call
        cells = KINDS[kind](inputs, hidden, layers, batch_first=first, bidirectional=both)
        cells = cells.to("cuda", getattr(torch, dtype))
        shape = (sequences, steps, inputs) if first else (steps, sequences, inputs)
        x = torch.zeros(shape, dtype=getattr(torch, dtype), device="cuda", requires_grad=True)
        lengths = torch.full((sequences,), steps)
        given: Any = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=first) if packed else x

        found.append({"call": call} | _recorded(functools.partial(_train_cells, cells, given)))
        if time.perf_counter() > ends:
            break
    return found


def convolutions(seconds: float) -> list[dict[str, Any]]:
    """Record convolutions."""
    limit_to(LIMIT_BYTES)
    ends, found = time.perf_counter() + seconds, []
    for call in varied(CONVOLUTION_BASE, CONVOLUTION_OTHERS):
        dtype, last, inputs, outputs, side, kernel, stride, groups, samples = call
        layout = torch.channels_last if last else torch.contiguous_format
        layer = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
        layer = layer.to("cuda", getattr(torch, dtype)).to(memory_format=layout)
        x = torch.zeros(samples, inputs, side, side, dtype=getattr(torch, dtype), device="cuda")
        x = x.to(memory_format=layout).requires_grad_()

        found.append({"call": call} | _recorded(functools.partial(_train_layer, layer, x)))
        if time.perf_counter() > ends:
            break
    return found


def _train_cells(cells: nn.Module, given: Any) -> None:
    out = cells(given)[0]
    (out if isinstance(out, torch.Tensor) else out.data).sum().backward()


def _train_layer(layer: nn.Module, x: torch.Tensor) -> None:
    layer(x).sum().backward()


def _recorded(work: Callable[[], None]) -> dict[str, Any]:
    """Return a call's blocks: bytes, and the events until they are freed."""
    try:
        _, events = recorder.record_build(work, torch.cuda.current_device())
    except RuntimeError as error:
        return {"failed": str(error).splitlines()[0][:200]}
    freed = {event.block: index for index, event in enumerate(events) if event.bytes < 0}
    return {
        "blocks": [
            (event.bytes, freed[event.block] - index if event.block in freed else None)
            for index, event in enumerate(events)
            if event.bytes >= LEAST_BYTES
        ]
    }
