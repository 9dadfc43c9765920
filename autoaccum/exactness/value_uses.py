"""Find which leaves of a batch may be given invented values.

An index out of range is an error in most operators on the CPU. Some (CTC loss, `embedding_bag`, packed sequences, a
library's own) read or write foreign memory; on a GPU an assertion fails and the process loses the device. So a value
that the sample lacks is used only if every operator that reads the leaf is known to check it, or to accept any.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from ..data import tree
from ..torch_compat import TorchDispatchMode
from ..workload import Batch


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# These use values as indices and check each on the CPU (aten/src/ATen/native: TORCH_CHECK_INDEX and the like).
INDEXING = _names(
    """
    embedding index index_put index_put_ _index_put_impl_ index_select gather scatter scatter_ scatter_add
    scatter_add_ index_add index_add_ index_fill index_fill_ index_copy index_copy_ take bincount one_hot
    """
)
# These use them as values, or skip the ignored class; any value is safe.
VALUING = _names(
    """
    clone _to_copy copy_ _unsafe_view _reshape_alias cat stack constant_pad_nd pad sum mean any all max min amax aminmax
    amin argmax argmin sort argsort topk cumsum cumprod prod count_nonzero nonzero isin equal _unique unique_dim
    _unique2 roll flip repeat nll_loss_forward nll_loss2d_forward zeros_like ones_like full_like empty_like
    new_zeros new_ones new_full new_empty rand_like randn_like lift_fresh lift fill_ zero_ is_same_size
    masked_select tril triu masked_fill masked_scatter where searchsorted bucketize histc unique_consecutive
    repeat_interleave median mode kthvalue diff _local_scalar_dense _assert_async is_pinned _pin_memory
    record_stream
    """
)
# These use floating-point values as positions.
_PLACES = frozenset(["grid_sampler", "grid_sampler_2d", "grid_sampler_3d", "_grid_sampler_2d_cpu_fallback"])
# What may be done with a leaf's values.
ANY = "any"  # invent values
MOVED = "moved"  # move the sample's values to other places
KEPT = "kept"  # keep the rows as they are

_ESCAPES = (torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.__array__, torch.Tensor.data_ptr)
_UNCHECKING = (F.ctc_loss, F.embedding_bag, F.grid_sample, torch.ctc_loss)


@dataclass
class Uses:
    """Hold which operators read the leaves of a batch, by path.

    Attributes:
        known: Operators known to check or accept any value, at least on the CPU.
        unknown: The other operators.
    """

    known: dict[str, set[str]] = field(default_factory=dict)
    unknown: dict[str, set[str]] = field(default_factory=dict)

    def freedom(self, path: str, device: torch.device) -> str:
        """Return what may be done with a leaf's values."""
        if path in self.unknown:
            return KEPT
        if device.type == "cpu":
            return ANY
        read = self.known.get(path, set())
        if not read:
            return KEPT  # a custom kernel may read it, undetected
        return MOVED if read & INDEXING else ANY

    def invents(self, path: str, device: torch.device) -> bool:
        """Return whether a leaf may be given values the sample lacks."""
        return self.freedom(path, device) == ANY

    def indexes(self, path: str) -> bool:
        """Return whether a leaf's values are used as indices."""
        return bool(self.known.get(path, set()) & INDEXING)


@contextmanager
def watched(batch: Batch) -> Iterator[Uses]:
    """Watch what reads a batch's tensors until exit."""
    uses = Uses()
    trail = _Trail(uses)
    for path, leaf in tree.leaves(batch):
        if isinstance(leaf, torch.Tensor):
            trail.follow(leaf, {path})
    with ExitStack() as stack:
        stack.enter_context(_Operators(trail))
        stack.enter_context(_Functions(trail))
        yield uses


class _Trail:
    """Track tensors that hold a leaf's values or follow from them."""

    def __init__(self, uses: Uses) -> None:
        self.uses = uses
        self._paths: dict[int, set[str]] = {}
        self._alive: list[torch.Tensor] = []  # so that no address is used again

    def follow(self, tensor: torch.Tensor, paths: set[str]) -> None:
        if tensor.layout is not torch.strided or not tensor.numel():
            return
        self._paths.setdefault(tensor.untyped_storage().data_ptr(), set()).update(paths)
        self._alive.append(tensor)

    def of(self, tensor: torch.Tensor) -> set[str]:
        if tensor.layout is not torch.strided or not tensor.numel():
            return set()
        return self._paths.get(tensor.untyped_storage().data_ptr(), set())

    def read(self, paths: set[str], name: str, *, known: bool) -> None:
        for path in paths:
            (self.uses.known if known else self.uses.unknown).setdefault(path, set()).add(name)


class _Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Intercept operators at dispatch."""

    def __init__(self, trail: _Trail) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.trail = trail

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        read = [(t, paths) for t in _tensors((args, kwargs)) if (paths := self.trail.of(t))]
        out = func(*args, **kwargs)
        if not read:
            return out
        name = func.overloadpacket.__name__.removesuffix("_backward")
        paths = set[str]().union(*(paths for _, paths in read))
        by_value = func.is_view or torch.Tag.pointwise in func.tags or name in VALUING
        for tensor, own in read:
            by_index = name in INDEXING and not by_value and tensor.is_floating_point()  # it is what is looked up in
            known = _is_known(func, name, tensor, by_value)
            self.trail.read(own, f"{name} of it" if by_index else name, known=known)
        for made in _tensors(out) if by_value else ():
            if made.dtype is not torch.bool:
                self.trail.follow(made, paths)
        return out


class _Functions(TorchFunctionMode):
    """Intercept functions that pass values on unseen, as Python numbers."""

    def __init__(self, trail: _Trail) -> None:
        super().__init__()
        self.trail = trail

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _ESCAPES or func in _UNCHECKING:
            for tensor in _tensors((args, kwargs)):
                self.trail.read(self.trail.of(tensor), func.__name__, known=False)
        return func(*args, **kwargs)


def _is_known(func: Any, name: str, tensor: torch.Tensor, by_value: bool) -> bool:
    if func.namespace != "aten" and not by_value:
        return False
    if by_value:
        return True
    if tensor.is_floating_point() or tensor.is_complex():
        return name not in _PLACES
    return tensor.dtype is torch.bool or name in INDEXING


def _tensors(values: Any) -> list[torch.Tensor]:
    """Return the tensors in an operator's arguments or results."""
    if isinstance(values, torch.Tensor):
        return [values]
    if isinstance(values, dict):
        values = list(values.values())
    return [t for value in values for t in _tensors(value)] if isinstance(values, (list, tuple)) else []
