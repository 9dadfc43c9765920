"""Let lanes meet where their samples interact.

Calls of `torch.nn.functional.batch_norm` with batch statistics, whoever makes them: torch's own modules, those derived
from them, and others that call the function. A function mode sees them in the lane's own thread, so nothing of the
model is replaced.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from ...errors import UsageError
from ...ranks.exchange import TOO_FEW_VALUES, Alone
from . import whole_norm
from .backward_order import BackwardOrder
from .baton import Request, current_lane
from .joint_norm import Gate, Joined, enter, join, leave, wide
from .over_ranks import RankMeeting
from .torch_internals import has_saved_hooks


@dataclass(eq=False)
class Meetings:
    """The meetings of one window.

    Attributes:
        order: What was created where.
        names: Names of modules, by the identity of a tensor of theirs.
        counters: The identities of the modules' counts of batches.
        gate: Whether the backward may run.
        met: By place, what each meeting there found, without its graph; nothing of what normalized as one batch.
        gathered: How many rows tensors of all lanes have (gather_window).
        ranks: What meets with other ranks; None on one rank.
        absent: While planning: samples of ranks that are not here, for each one that is.
        anchors: Over ranks: numbers that the backward begins from as well.
    """

    order: BackwardOrder
    names: Mapping[int, str]
    counters: frozenset[int]
    gate: Gate = field(default_factory=Gate)
    met: dict[tuple[Any, ...], list[Joined]] = field(default_factory=lambda: defaultdict(list))
    gathered: set[int] = field(default_factory=set)
    ranks: Alone | None = None
    absent: float = 0.0
    anchors: list[torch.Tensor] = field(default_factory=list)
    _begun: int = 0
    _shares: dict[tuple[float, ...], torch.Tensor] = field(default_factory=dict)

    def shares(self, counts: Sequence[int], device: torch.device) -> torch.Tensor:
        """Return each lane's part of all values, one row for each lane."""
        parts = tuple(each / max(1, sum(counts)) for each in counts)
        if parts not in self._shares:
            dtype = torch.float32 if device.type == "mps" else torch.float64
            self._shares[parts] = torch.tensor(parts, dtype=dtype).to(device)[:, None]
        return self._shares[parts]

    def over_ranks(self, title: str, like: torch.Tensor, brought: Sequence[torch.Tensor] = ()) -> RankMeeting | None:
        """Return the next meeting of all ranks; None on one rank.

        Args:
            title: What it is, by names that are equal on all ranks.
            like: A tensor whose type is, too.
            brought: What may have a graph: on all ranks, or on none.
        """
        if self.ranks is None:
            return None
        self._begun += 1
        has_graph = torch.is_grad_enabled() and any(each.requires_grad for each in brought)
        graph = "with gradients" if has_graph else "without gradients"
        return RankMeeting(
            self.ranks, f"meeting {self._begun}, {title} in {like.dtype} {graph}".replace("torch.", ""), self.absent
        )

    def anchor(self, tensor: torch.Tensor | None) -> None:
        """Begin the backward from a number, too."""
        if tensor is not None and tensor.requires_grad:
            self.anchors.append(tensor)

    def forget(self) -> None:
        """Drop all tensors, once the backward is over."""
        self.met.clear()
        self.anchors.clear()
        self._shares.clear()

    def title(self, kind: str, channels: int, *tensors: torch.Tensor | None) -> str:
        """Name a place, by its module where that is known."""
        known = [self.names[id(each)] for each in tensors if id(each) in self.names]
        return f"{kind} {known[0]!r}" if known else f"a {kind} of {channels} channels"


class NormCall(NamedTuple):
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


SEEN = frozenset((*READERS, F.instance_norm, torch.Tensor.add_))


class NormMode(TorchFunctionMode):
    """See calls of normalizations, and counts of batches.

    Args:
        meetings: The window's meetings.
        counts: Whether a module counts the batch that it is given.
    """

    def __init__(self, meetings: Meetings, *, counts: bool) -> None:
        super().__init__()
        self.meetings, self._counts = meetings, counts

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run a function of torch, or its substitute."""
        if func not in SEEN:
            return func(*args, **kwargs) if kwargs else func(*args)
        kwargs = kwargs or {}
        reader = READERS.get(func)
        if reader is not None:
            call = reader(*args, **kwargs)
            found = self.normalized(call) if call.training else None
            if found is not None:
                return found
        elif func is F.instance_norm:
            return self.instance_normalized(*args, **kwargs)
        elif func is torch.Tensor.add_ and not self._counts and id(args[0]) in self.meetings.counters:
            return args[0]
        return func(*args, **kwargs)

    def normalized(self, call: NormCall) -> torch.Tensor | None:
        """Return a normalized input; None for torch's own way."""
        raise NotImplementedError

    def instance_normalized(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Normalize each sample by itself."""
        raise NotImplementedError


class LaneMode(NormMode):
    """Meet the other lanes at each normalization.

    The first lane counts a batch for all.

    Args:
        lane: The lane.
        meetings: The window's meetings.
    """

    def __init__(self, lane: int, meetings: Meetings) -> None:
        super().__init__(meetings, counts=lane == 0)

    def normalized(self, call: NormCall) -> torch.Tensor:
        """Normalize by the statistics of the window."""
        meetings, lane = self.meetings, current_lane()
        assert lane is not None
        if call.input.device.type == "cpu" and meetings.ranks is None and not has_saved_hooks():
            out: torch.Tensor | None = lane.ask(self._together(call))
            meetings.order.mark(lane.index)
            if out is not None:
                return out
        h, rows = enter(call.input, meetings.gate)
        count = call.input.numel() // call.input.shape[1]
        is_on = torch.is_grad_enabled()

        def settle(values: list[Any]) -> list[Any]:
            with torch.set_grad_enabled(is_on):
                return [_join(meetings, call, [each for each, _ in values], [each for _, each in values])] * len(values)

        joined = lane.ask(Request(call.place, lambda: _title(meetings, call), (rows, count), settle))
        meetings.order.mark(lane.index)
        return leave(h, joined, call.eps)

    def _together(self, call: NormCall) -> Request:
        """Ask for one batch's normalization; None where lanes' shapes differ."""
        meetings, is_on = self.meetings, torch.is_grad_enabled()

        def settle(inputs: list[Any]) -> list[Any]:
            if not whole_norm.fits(inputs):
                return [None] * len(inputs)
            _refuse_too_few(sum(each.numel() for each in inputs) // call.input.shape[1])
            with torch.set_grad_enabled(is_on):
                outs = whole_norm.normalize(inputs, call, meetings.gate)
            meetings.order.met(inputs, outs[:1])
            meetings.met[call.place]  # by the key alone: nothing to repeat it by
            return outs

        return Request(("together", *call.place), lambda: _title(meetings, call), call.input, settle)

    def instance_normalized(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Update the running statistics once a window."""
        out, call, own = _by_instance(*args, **kwargs)
        if not own:
            return out
        meetings, lane = self.meetings, current_lane()
        assert lane is not None

        def settle(values: list[Any]) -> list[Any]:
            samples = sum(each for _, each in values)
            mean, variance = (sum(found[row] * (count / samples) for found, count in values) for row in (0, 1))
            ranks = meetings.over_ranks(title, mean)
            if ranks is not None:
                mean, variance = ranks.averaged(samples, (mean, variance))
            _update(call, mean, variance)
            meetings.order.met((), ())  # no graph goes through it
            return [None] * len(values)

        place = ("instance normalization", *call.place[1:])
        title = meetings.title("instance normalization", call.input.shape[1], call.running_mean)
        lane.ask(Request(place, lambda: title, (own, len(call.input)), settle))
        meetings.order.mark(lane.index)
        return out


def _title(meetings: Meetings, call: NormCall) -> str:
    return meetings.title("batch normalization", call.input.shape[1], call.running_mean, call.weight)


def _join(meetings: Meetings, call: NormCall, rows: list[torch.Tensor], counts: list[int]) -> Joined:
    """Merge the lanes' statistics, and update the running ones once."""
    count = sum(counts)
    affine = [each for each in (call.weight, call.bias) if each is not None]
    ranks = meetings.over_ranks(_title(meetings, call), call.input, [*rows, *affine])
    if ranks is None:
        _refuse_too_few(count)
    shares = meetings.shares(counts, rows[0].device)
    joined = join(call.weight, call.bias, call.eps, meetings.gate, count, shares, rows, ranks)
    count = count if ranks is None else ranks.count
    meetings.anchor(joined.anchor)
    meetings.order.met(rows, [joined.weight])
    meetings.met[call.place].append(joined.alike())
    _update(call, joined.mean, joined.variance * (count / (count - 1)))
    return joined


def _refuse_too_few(count: int) -> None:
    """Refuse a single value in each channel, as torch does."""
    if count < 2:
        raise ValueError(TOO_FEW_VALUES.format(count))


@torch.no_grad()
def _update(call: NormCall, mean: torch.Tensor, variance: torch.Tensor) -> None:
    """Update running statistics as torch does."""
    for running, value in ((call.running_mean, mean), (call.running_var, variance)):
        if running is not None and running.dtype == value.dtype:
            running.lerp_(value, call.momentum)
        elif running is not None:
            running.copy_(torch.lerp(running.to(value.dtype), value, call.momentum))


def _by_instance(
    input: torch.Tensor,
    running_mean: torch.Tensor | None = None,
    running_var: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> tuple[torch.Tensor, NormCall, list[torch.Tensor]]:
    """Normalize each sample by itself, without an update.

    Returns:
        The output, the call, and the statistics that it would update the running ones by; none where it would not.
    """
    call = NormCall(input, running_mean, running_var, momentum=momentum, eps=eps)
    if running_mean is None or running_var is None or not use_input_stats:
        out = F.instance_norm(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)
        return out, call, []
    own = [torch.zeros_like(each, dtype=wide(input.dtype)) for each in (running_mean, running_var)]
    return F.instance_norm(input, own[0], own[1], weight, bias, use_input_stats, 1.0, eps), call, own


class RecomputingMode(NormMode):
    """Repeat a lane's normalizations in a checkpointed block's second forward.

    They take the statistics of the first one, of the whole window, and update nothing. Autograd carries this mode into
    its own threads.

    Args:
        meetings: The window's meetings.
    """

    def __init__(self, meetings: Meetings) -> None:
        super().__init__(meetings, counts=False)

    def normalized(self, call: NormCall) -> torch.Tensor | None:
        """Normalize by the statistics of the first forward."""
        meetings = self.meetings
        if call.place not in meetings.met:
            return None
        h, rows = enter(call.input, meetings.gate)
        found = meetings.met[call.place]
        joined = _met_before(found, rows.detach()[0]) if found else None  # a graph here would be saved, too
        takes_gradients = torch.is_grad_enabled() and call.input.requires_grad
        if joined is None or (takes_gradients and not joined.weight.requires_grad):
            raise UsageError(
                f"{_title(meetings, call).capitalize()} is inside a block that torch.utils.checkpoint runs with "
                "use_reentrant=True.",
                "Such a block goes back by itself, without the other micro-batches that share its statistics.",
                "Use checkpoint(..., use_reentrant=False).",
            )
        return leave(h, joined, call.eps)

    def instance_normalized(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Update nothing: the first forward did."""
        return _by_instance(*args, **kwargs)[0]


def _met_before(found: list[Joined], mean: torch.Tensor) -> Joined:
    """Return the meeting of a repeated call in the first forward.

    Of a module that is called several times, by the nearest mean of a lane.
    """
    alike = [each for each in found if each.weight.requires_grad == torch.is_grad_enabled()] or found
    if len(alike) == 1:
        return alike[0]
    return min(alike, key=lambda joined: float((joined.means - mean).abs().amax(1).min()))
