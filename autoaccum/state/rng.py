"""Read, restore and compare the random generators of a training step.

Knows the global ones (Python's `random`, NumPy's, torch's on the CPU and on every CUDA device) and generator objects
that a module may hold. Doesn't know who draws from them. NumPy and CUDA count only where the process already uses
them: neither is imported or initialised here. Generators of other accelerators (MPS, XPU) are not covered.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

_Source = tuple[Callable[[], Any], Callable[[Any], Any]]


def take_rng() -> dict[str, Any]:
    """Return the state of every global generator in use, by name."""
    return {name: get() for name, (get, _) in _sources().items()}


def put_rng(states: dict[str, Any]) -> None:
    """Restore global generators to all or part of `take_rng`'s result."""
    sources = _sources()
    for name, state in states.items():
        sources[name][1](state)


def as_plain(states: dict[str, Any]) -> dict[str, Any]:
    """Convert `take_rng`'s result to tensors and plain values.

    NumPy's arrays become lists with their type.
    """
    return {name: _without_arrays(state) for name, state in states.items()}


def from_plain(states: dict[str, Any]) -> dict[str, Any]:
    """Convert `as_plain`'s result for `put_rng`; skip generators missing here.

    Raises:
        ValueError: It is something else.
    """
    if "NumPy RNG" in states:
        import numpy.random  # noqa: F401  the process that wrote it had imported it
    return {name: _with_arrays(states[name]) for name in _sources() if name in states}


def _without_arrays(state: Any) -> Any:
    if isinstance(state, dict):
        return {key: _without_arrays(each) for key, each in state.items()}
    if hasattr(state, "tolist") and not isinstance(state, torch.Tensor):
        return {"dtype": str(state.dtype), "values": state.tolist()} if state.ndim else state.item()
    return state


def _with_arrays(state: Any) -> Any:
    if not isinstance(state, dict):
        return state
    if set(state) != {"dtype", "values"}:
        return {key: _with_arrays(each) for key, each in state.items()}
    import numpy

    if state["dtype"] not in ("uint32", "uint64"):
        raise ValueError(f"no generator's state is of {state['dtype']}")
    return numpy.array(state["values"], dtype=state["dtype"])


def is_generator(cls: type) -> bool:
    """Whether objects of this class are generators that `read_generator` can read."""
    numpy = sys.modules.get("numpy.random")
    known = (torch.Generator, random.Random, *((numpy.Generator, numpy.RandomState) if numpy else ()))
    return issubclass(cls, known)


def read_generator(generator: Any) -> Any:
    """Return the state of a generator object: torch, Python or NumPy."""
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, random.Random):
        return generator.getstate()
    if hasattr(generator, "bit_generator"):
        return generator.bit_generator.state
    return generator.get_state(legacy=False)


def write_generator(generator: Any, state: Any) -> None:
    """Restore a generator object to `read_generator`'s result."""
    if isinstance(generator, torch.Generator):
        generator.set_state(state)
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    elif hasattr(generator, "bit_generator"):
        generator.bit_generator.state = state
    else:
        generator.set_state(state)


def same_state(one: Any, other: Any) -> bool:
    """Whether two states are bitwise equal.

    Scalars, tensors and arrays on the host, in dicts.
    """
    if isinstance(one, torch.Tensor) or hasattr(one, "tobytes"):
        return _identity(one) == _identity(other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same_state(one[key], other[key]) for key in one)
    return repr(one) == repr(other)  # Python's state is a tuple of 625 ints: one by one would be slow


def _identity(array: Any) -> tuple[Any, ...]:
    if isinstance(array, torch.Tensor):
        array = array.contiguous().reshape(-1).view(torch.uint8).numpy()
    return array.shape, array.dtype, array.tobytes()


def _sources() -> dict[str, _Source]:
    """How each global generator is read and written."""
    generator = torch.default_generator
    sources: dict[str, _Source] = {
        "Python RNG": (random.getstate, random.setstate),
        "torch RNG": (generator.get_state, generator.set_state),
    }
    numpy = sys.modules.get("numpy.random")
    if numpy is not None:
        # legacy=False also reads a bit generator that isn't the Mersenne twister
        sources["NumPy RNG"] = (partial(numpy.get_state, legacy=False), numpy.set_state)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        for index, cuda in enumerate(torch.cuda.default_generators):
            sources[f"CUDA RNG of device {index}"] = (cuda.get_state, cuda.set_state)
    return sources
