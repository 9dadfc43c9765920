"""What torch keeps for a thread is each lane's own, though lanes are greenlets of one thread."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from autoaccum.window.lanes import torch_internals
from autoaccum.window.lanes.baton import Request, current_lane, run_lanes
from autoaccum.window.lanes.thread_state import ThreadState

CPU = torch.device("cpu")
variable: ContextVar[str] = ContextVar("variable", default="unset")


class Functions(torch.overrides.TorchFunctionMode):
    """Count the functions that a mode sees."""

    count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


class Operations(TorchDispatchMode):
    """Count the operations that a mode sees."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


class Subclass(torch.Tensor):
    """A tensor whose functions return its like, where functions ask subclasses."""


@contextlib.contextmanager
def variable_set() -> Iterator[None]:
    token = variable.set("set")
    try:
        yield
    finally:
        variable.reset(token)


def probe() -> dict[str, Any]:
    """What a lane can see of each thing that torch keeps for a thread."""
    packed: list[torch.Tensor] = []
    here.append(packed)
    x = torch.ones(2, requires_grad=True)
    y = x * 2
    y.exp()
    here.pop()
    try:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
            torch.ones(2, requires_grad=True).exp()
        refusal = None
    except RuntimeError as error:
        refusal = str(error)
    return {
        "grad": (torch.is_grad_enabled(), y.requires_grad),
        "inference": (torch.is_inference_mode_enabled(), x.is_inference()),
        "autocast": (torch.is_autocast_enabled("cpu"), (torch.ones(2, 2) @ torch.ones(2, 2)).dtype),
        "dtype": torch.get_autocast_dtype("cpu"),
        "cache": torch.is_autocast_cache_enabled(),
        "nesting": (torch.autocast_increment_nesting() - 1, torch.autocast_decrement_nesting())[0],
        "anomalies": (torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()),
        "packed": len(packed),
        "refusal": refusal,
        "functions": sees(Functions),
        "operations": sees(Operations),
        "subclass": type(torch.ones(2).as_subclass(Subclass) + 1).__name__,
        "variable": variable.get(),
    }


here: list[list[torch.Tensor]] = []
modes: list[Any] = []


def sees(kind: type[Any]) -> bool:
    """Whether one of the modes of a kind sees what runs now."""
    own = [mode for mode in modes if isinstance(mode, kind)]
    before = [mode.count for mode in own]
    torch.ones(2).add(1)
    return before != [mode.count for mode in own]


def pack(tensor: torch.Tensor) -> torch.Tensor:
    for packed in here:
        packed.append(tensor)
    return tensor


@contextlib.contextmanager
def entered(mode: Any) -> Iterator[None]:
    modes.append(mode)
    try:
        with mode:
            yield
    finally:
        modes.remove(mode)


CONTEXTS: dict[str, Callable[[], Any]] = {
    "grad": torch.no_grad,
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "dtype": lambda: torch.autocast("cpu", torch.float16),
    "cache": lambda: torch.autocast("cpu", torch.bfloat16, cache_enabled=False),
    "nesting": lambda: torch.autocast("cpu", enabled=False),
    "anomalies": lambda: torch.autograd.detect_anomaly(check_nan=False),
    "packed": lambda: torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    "refusal": lambda: torch.autograd.graph.disable_saved_tensors_hooks("not here"),
    "functions": lambda: entered(Functions()),
    "operations": lambda: entered(Operations()),
    "subclass": torch._C.DisableTorchFunctionSubclass,
    "variable": variable_set,
}


def meet() -> None:
    lane = current_lane()
    assert lane is not None
    lane.ask(Request(("here",), lambda: "here", None, lambda values: values))


def in_lanes(works: list[Callable[[], Any]]) -> list[Any]:
    return run_lanes(works, None, lambda lane: contextlib.nullcontext(), ThreadState(CPU))


def within(*names: str) -> Callable[[], list[Any]]:
    """Work that looks about before, in and after contexts, with a meeting at each place."""

    def work() -> list[Any]:
        found = []

        def look() -> None:
            found.append(probe())
            meet()
            found.append(probe())

        look()
        with contextlib.ExitStack() as stack:
            for name in names:
                stack.enter_context(CONTEXTS[name]())
            look()
        look()
        return found

    return work


def alone(name: str) -> dict[str, Any]:
    with CONTEXTS[name]():
        return probe()


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("name", CONTEXTS)
def test_what_a_lane_enters_is_its_own_across_meetings(name: str) -> None:
    outside, inside = probe(), alone(name)
    assert outside[name] != inside[name]
    first, plain, second = in_lanes([within(name), within(), within(name)])
    assert first == second == [outside, outside, inside, inside, outside, outside]
    assert plain == [outside] * 6
    assert probe() == outside


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("name", CONTEXTS)
def test_what_the_caller_entered_is_every_lanes(name: str) -> None:
    outside = probe()
    with CONTEXTS[name]():
        inside = probe()
        for found in in_lanes([within(), within("grad"), within("autocast")]):
            assert found[:2] == found[4:] == [inside] * 2
        assert probe() == inside
    assert probe() == outside


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_many_contexts_of_many_lanes() -> None:
    outside = probe()
    nests = [("inference", "autocast", "packed"), ("functions", "grad", "operations"), ("packed", "packed", "cache")]
    wanted = []
    for nest in nests:
        with contextlib.ExitStack() as stack:
            for name in nest:
                stack.enter_context(CONTEXTS[name]())
            wanted.append(probe())
    for found, want in zip(in_lanes([within(*nest) for nest in nests]), wanted, strict=True):
        assert found == [outside, outside, want, want, outside, outside]
    assert probe() == outside


def test_a_lane_that_fails_inside_of_contexts_leaves_none_behind() -> None:
    outside = probe()

    def failing() -> None:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), entered(Functions()):
            meet()
            raise KeyError("in the second stretch")

    with pytest.raises(KeyError, match="second stretch"):
        in_lanes([within("packed", "operations"), failing, within("grad")])
    assert probe() == outside and modes == []


def test_a_lane_that_differs_by_an_autocast_alone_is_left_without_an_exchange() -> None:
    state, outside = ThreadState(CPU), probe()
    with torch.autocast("cpu", enabled=False), torch.autocast("cpu", enabled=False):
        inside = probe()
        kept = state.leave()
        assert kept == 2 and probe() == outside
        state.enter(kept)
        assert probe() == inside != outside
    with torch.no_grad():
        left = state.leave()
        assert not isinstance(left, int) and probe() == outside
        state.enter(left)
    assert probe() == outside


def test_private_names_of_torch() -> None:
    mode, hooks = Functions(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    torch_internals.track_saved_hooks()
    with mode, hooks:
        taken = torch_internals.take_modes(), torch_internals.take_saved_hooks()
        assert taken[0] == ([mode], []) and [pair[0] for pair in taken[1]] == [pack]
        assert torch_internals.take_modes() == ([], []) and torch_internals.take_saved_hooks() == []
        functions, refusal = torch_internals.state_readers()
        assert not any(read() for read in torch_internals.stack_readers())
        torch_internals.refuse_saved_hooks("not now")
        assert refusal() == "not now"
        torch_internals.refuse_saved_hooks(None)
        assert refusal() is None
        torch_internals.put_modes(taken[0])
        torch_internals.put_saved_hooks(taken[1])
        assert all(read() for read in torch_internals.stack_readers()[::2])
        before, state = mode.count, functions()
        torch_internals.take_functions()
        torch.ones(2).add(1)
        assert mode.count == before
        torch_internals.put_functions(state)
        torch.ones(2).add(1)
        assert mode.count > before
