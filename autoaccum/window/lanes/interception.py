"""Let lanes meet where their samples interact.

Calls of `torch.nn.functional.batch_norm` with batch statistics, whoever makes them: torch's own modules, those derived
from them, and others that call the function. A function mode sees them in the lane's own thread, so nothing of the
model is replaced.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from ...errors import UsageError
from .backward_order import BackwardOrder
from .baton import Request, current_lane
from .joint_norm import Gate, enter, join, leave, wide


@dataclass(frozen=True, eq=False)
class Met:
    """What one meeting of a batch normalization found.

    Attributes:
        merged: The window's mean and variance, of shape (2, channels), without their graph; a gradient is required
            where they had one.
        means: Each lane's own mean, by which a recomputation finds its meeting.
    """

    merged: torch.Tensor
    means: list[torch.Tensor]


@dataclass(eq=False)
class Meetings:
    """The meetings of one window.

    Attributes:
        order: What was created where.
        names: Names of modules, by the identity of a tensor of theirs.
        counters: The identities of the modules' counts of batches.
        gate: Whether the backward may run.
        met: By place, what each meeting there found.
    """

    order: BackwardOrder
    names: Mapping[int, str]
    counters: frozenset[int]
    gate: Gate = field(default_factory=Gate)
    met: dict[tuple[Any, ...], list[Met]] = field(default_factory=lambda: defaultdict(list))

    def title(self, kind: str, channels: int, *tensors: torch.Tensor | None) -> str:
        """Name a place, by its module where that is known."""
        known = [self.names[id(each)] for each in tensors if id(each) in self.names]
        return f"{kind} {known[0]!r}" if known else f"a {kind} of {channels} channels"


@dataclass(frozen=True, eq=False)
class NormCall:
    """One call of a normalization, with its arguments by name."""

    input: torch.Tensor
    running_mean: torch.Tensor | None = None
    running_var: torch.Tensor | None = None
    weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    training: bool = False
    momentum: float = 0.1
    eps: float = 1e-5

    @property
    def place(self) -> tuple[Any, ...]:
        """What is equal in all lanes at this call."""
        tensors = (self.running_mean, self.running_var, self.weight, self.bias)
        return ("batch normalization", *map(id, tensors), self.input.shape[1], self.input.dtype, self.eps)


def of_functional(*args: Any, **kwargs: Any) -> NormCall:
    """Read the arguments of `torch.nn.functional.batch_norm`."""
    return NormCall(*args, **kwargs)


def of_torch(
    input: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool = True,
) -> NormCall:
    """Read the arguments of `torch.batch_norm`."""
    return NormCall(input, running_mean, running_var, weight, bias, training, momentum, eps)


READERS: Mapping[Any, Callable[..., NormCall]] = {F.batch_norm: of_functional, torch.batch_norm: of_torch}


class LaneMode(TorchFunctionMode):
    """See a lane's normalizations, and meet the other lanes there.

    Args:
        lane: The lane.
        meetings: The window's meetings.
    """

    def __init__(self, lane: int, meetings: Meetings) -> None:
        super().__init__()
        self._lane, self._meetings = lane, meetings

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run a function of torch, or its substitute in a lane."""
        kwargs = kwargs or {}
        reader = READERS.get(func)
        if reader is not None:
            call = reader(*args, **kwargs)
            if call.training:
                return _normalized(self._meetings, call)
        elif func is F.instance_norm:
            return _instance_normalized(self._meetings, *args, **kwargs)
        elif func is torch.Tensor.add_ and self._lane and id(args[0]) in self._meetings.counters:
            return args[0]  # the first lane has counted this batch
        return func(*args, **kwargs)


def _normalized(meetings: Meetings, call: NormCall) -> torch.Tensor:
    lane = current_lane()
    assert lane is not None
    h, rows = enter(call.input, meetings.gate)
    count = call.input.numel() // call.input.shape[1]
    is_on = torch.is_grad_enabled()

    def settle(values: list[Any]) -> list[Any]:
        with torch.set_grad_enabled(is_on):
            return [_join(meetings, call, [each for each, _ in values], [each for _, each in values])] * len(values)

    merged = lane.ask(Request(call.place, lambda: _title(meetings, call), (rows, count), settle))
    meetings.order.mark(lane.index)
    return leave(h, merged, call.weight, call.bias, call.eps, meetings.gate)


def _title(meetings: Meetings, call: NormCall) -> str:
    return meetings.title("batch normalization", call.input.shape[1], call.running_mean, call.weight)


def _join(meetings: Meetings, call: NormCall, rows: list[torch.Tensor], counts: list[int]) -> torch.Tensor:
    """Merge the lanes' statistics, and update the running ones once."""
    count = sum(counts)
    if count < 2:  # as torch.nn.functional.batch_norm
        raise ValueError(f"Expected more than 1 value per channel when training, got {count} in the window")
    merged = join(call.weight, call.bias, call.eps, counts, rows)
    meetings.order.met(rows, [merged])
    alike = merged.detach().requires_grad_(merged.requires_grad)
    meetings.met[call.place].append(Met(alike, [each[0].detach() for each in rows]))
    with torch.no_grad():
        mean, variance = merged
        _update(call, mean, variance * (count / (count - 1)))
    return merged


@torch.no_grad()
def _update(call: NormCall, mean: torch.Tensor, variance: torch.Tensor) -> None:
    """Update running statistics as torch does."""
    for running, value in ((call.running_mean, mean), (call.running_var, variance)):
        if running is not None:
            running.copy_(torch.lerp(running.to(value.dtype), value, call.momentum))


def _instance_normalized(
    meetings: Meetings,
    input: torch.Tensor,
    running_mean: torch.Tensor | None = None,
    running_var: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> torch.Tensor:
    """Normalize each sample by itself; update the running statistics once a window."""
    more = (weight, bias, use_input_stats)
    if running_mean is None or running_var is None or not use_input_stats:
        return F.instance_norm(input, running_mean, running_var, *more, momentum, eps)
    dtype = wide(input.dtype)
    own = [torch.zeros_like(each, dtype=dtype) for each in (running_mean, running_var)]
    out = F.instance_norm(input, own[0], own[1], *more, 1.0, eps)
    call = NormCall(input, running_mean, running_var, momentum=momentum, eps=eps)
    lane = current_lane()
    assert lane is not None

    def settle(values: list[Any]) -> list[Any]:
        samples = sum(each for _, each in values)
        mean, variance = (sum(found[row] * (count / samples) for found, count in values) for row in (0, 1))
        _update(call, mean, variance)
        return [None] * len(values)

    place = ("instance normalization", *call.place[1:])
    title = meetings.title("instance normalization", input.shape[1], running_mean)
    lane.ask(Request(place, lambda: title, (own, len(input)), settle))
    meetings.order.mark(lane.index)
    return out


class RecomputingMode(TorchFunctionMode):
    """Repeat a lane's normalizations in a checkpointed block's second forward.

    They take the statistics of the first one, of the whole window, and update nothing. Autograd carries this mode into
    its own threads.

    Args:
        meetings: The window's meetings.
    """

    def __init__(self, meetings: Meetings) -> None:
        super().__init__()
        self._meetings = meetings

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run a function of torch, or its substitute in a second forward."""
        kwargs = kwargs or {}
        reader = READERS.get(func)
        if reader is not None:
            call = reader(*args, **kwargs)
            if call.training and call.place in self._meetings.met:
                return self._repeated(call)
        elif func is torch.Tensor.add_ and id(args[0]) in self._meetings.counters:
            return args[0]
        return func(*args, **kwargs)

    def _repeated(self, call: NormCall) -> torch.Tensor:
        meetings = self._meetings
        h, rows = enter(call.input, meetings.gate)
        met = _met_before(meetings.met[call.place], rows.detach()[0])  # a graph here would be saved, too
        if torch.is_grad_enabled() and not met.merged.requires_grad and call.input.requires_grad:
            raise UsageError(
                f"{_title(meetings, call).capitalize()} is inside a block that torch.utils.checkpoint runs with "
                "use_reentrant=True.",
                "Such a block goes back by itself, without the other micro-batches that share its statistics.",
                "Use checkpoint(..., use_reentrant=False).",
            )
        return leave(h, met.merged, call.weight, call.bias, call.eps, meetings.gate)


def _met_before(found: list[Met], mean: torch.Tensor) -> Met:
    """Return the meeting of a repeated call in the first forward.

    Of a module that is called several times, by the nearest mean of a lane.
    """
    alike = [met for met in found if met.merged.requires_grad == torch.is_grad_enabled()] or found
    if len(alike) == 1:
        return alike[0]
    return min(alike, key=lambda met: min(float((each - mean).abs().max()) for each in met.means))
