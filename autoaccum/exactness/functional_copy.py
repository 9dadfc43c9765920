"""Run windows on copies of a model's parameters, without touching the model.

Parameters and buffers are replaced by copies for the duration of a call (torch.func.functional_call), in double
precision where they are few. A deepcopy would fail where a weight is computed from others.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ..data import tree
from ..data.collated import materialized
from ..phases import FIRST, LATER
from ..state.closures import holdings
from ..state.rng import put_rng, same_state, take_rng
from ..window import step
from ..window.loss_terms import count_of
from ..window.step import TrainingContext
from ..workload import Batch, default_loss
from .batch_leaves import target_paths
from .determinism import ClassLoss, RandomOps, without_randomness
from .loss_trace import ForwardTrace, tracing_layers
from .row_trace import RowTrace
from .value_uses import watched

MAX_DOUBLE_PARAMETERS = 1 << 22  # parameters that are copied in double precision: 64 MiB with their gradients
MAX_COPIED_PARAMETERS = (
    1 << 28
)  # and in their own: above, the copies are views, and only embeddings that renormalize are copied
MAX_ENTRIES = 1 << 20  # of the gradient that are compared; of more, a random part of each tensor
MIN_TENSOR_ENTRIES = 1 << 10  # of a tensor, or all it has

# Measured on the losses of docs/exactness.md: rounding stays under 1e-12 in double and under 1e-6 in single precision,
# and inexact losses differ by 1e-3 and more. The limits lie between, closer to the rounding: a model may compute parts
# in single precision whatever its parameters are (a Hugging Face RMSNorm does).
EXACT_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}
# Where gradients are in half precision: rounding of bfloat16 stays under 4e-3 on the models of tests/test_recheck.py.
HALF_PRECISION_TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 5e-3}

THE_MODEL = "the model"

MakeParts = Callable[[], TrainingContext]


@dataclass(frozen=True, eq=False)
class Passes:
    """Hold the results of one call of `train_window`."""

    gradient: torch.Tensor
    cumulative: torch.Tensor
    draws: RandomOps
    is_random: bool
    is_pair: bool
    trace: RowTrace | None = None


class GradientRecorder(torch.optim.Optimizer):
    """Record the gradient at each step and change nothing."""

    def __init__(self, params: Iterable[torch.Tensor]) -> None:
        super().__init__(params, {})
        self.seen: list[torch.Tensor | None] = []

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Keep the gradient."""
        self.seen = [p.grad for group in self.param_groups for p in group["params"]]


class _Inside(nn.Module):
    """Run a function while its modules have replaced parameters."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        super().__init__()
        self.inner = nn.ModuleList(modules)

    def forward(self, work: Callable[[], Any]) -> Any:
        return work()


class FunctionalCopy:
    """Run a model and its loss's modules on copied parameters and buffers.

    Args:
        model: The model.
        loss: The loss; its modules are copied too.
        dtype: Type of floating-point copies; None for their own, but at least single precision.
        device: Device of the copies; None for that of the originals.
        alias: Whether large tensors are views instead of copies, if memory is short.
        widens: Whether half precision becomes single without a `dtype`; otherwise gradients stay in half precision, as
            in a window, and compare less closely.
        entries: Number of gradient entries to compare.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Any,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
        alias: bool = False,
        widens: bool = True,
        entries: int | None = None,
    ) -> None:
        self.model, self.dtype, self.device, self.widens = model, dtype, device, widens
        held = holdings(model, loss=loss).modules
        self.outside = _Inside([model, *held.values()])
        self.roots = ("", *held)
        numel = sum(p.numel() for p in self.outside.parameters())
        renormalized = {id(m.weight) for m in self.outside.modules() if getattr(m, "max_norm", None) is not None}
        self.copies: dict[str, torch.Tensor] = {}
        for name, p in self.outside.named_parameters():
            copied = self._cast(p.detach())
            if copied.data_ptr() == p.data_ptr() and (
                not (alias or numel > MAX_COPIED_PARAMETERS) or id(p) in renormalized
            ):
                copied = copied.clone()
            self.copies[name] = nn.Parameter(copied, requires_grad=p.requires_grad)
        self.buffers = {name: self._cast(b.detach()).clone() for name, b in self.outside.named_buffers()}
        self.moved: set[str] = set()
        self._parts: TrainingContext | None = None
        self._is_pair = False
        self._trace: RowTrace | None = None
        self._start = take_rng()  # each part starts from it, so that Python's and NumPy's draws are equal
        chosen = torch.Generator().manual_seed(0)
        self.trained = [name for name, p in self.copies.items() if p.requires_grad]
        self._chosen = _choose([_numbers(self.copies[name]) for name in self.trained], entries or MAX_ENTRIES, chosen)

    def cast(self, batch: Batch) -> Batch:
        """Copy a batch to this precision and device."""
        return tree.map_tensors(materialized(batch), lambda tensor: self._cast(tensor.detach()).clone())

    def _cast(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_complex() and self.dtype is torch.float64:
            return tensor.to(self.device or tensor.device, torch.complex128)
        if not tensor.is_floating_point():
            return tensor.to(self.device or tensor.device)
        dtype = self.dtype or (torch.float32 if self.widens and tensor.element_size() < 4 else tensor.dtype)
        return tensor.to(self.device or tensor.device, dtype)

    def run(self, work: Callable[[], Any]) -> Any:
        """Call `work` with the model on the copies and initial buffers."""
        self.copies |= {name: buffer.clone() for name, buffer in self.buffers.items()}
        return torch.func.functional_call(self.outside, self.copies, (work,))

    def window(self, make_parts: MakeParts, pieces: Sequence[Batch], sizes: Sequence[int], *, first: int = 0) -> Passes:
        """Run one window by `step.train_window` without randomness."""
        pieces = [self.cast(piece) for piece in pieces]
        self._trace = RowTrace(sizes[0], first) if first else None
        passes: Passes = self.run(lambda: self._window(make_parts, pieces, sizes))
        self.moved |= {name for name, buffer in self.buffers.items() if not _same(self.copies[name], buffer)}
        return passes

    def trace_forward(self, make_parts: MakeParts, batch: Batch, rows: int) -> ForwardTrace:
        """Trace what a forward calls and draws, outside a window."""
        batch, forward_trace = self.cast(batch), ForwardTrace()

        def forward() -> None:
            context = self._made(make_parts)
            put_rng(self._start)
            # With gradients: a loss may call torch.autograd.grad.
            watching = tracing_layers(self.model, forward_trace, rows)
            with watching, without_randomness() as forward_trace.draws, watched(batch) as forward_trace.uses:
                step.forward(context, batch)
            context.loss_is_pair = self._is_pair

        self.run(forward)
        forward_trace.draws.class_losses = [_placed(call, batch) for call in forward_trace.draws.class_losses]
        return forward_trace

    @contextmanager
    def wider(self, forward_trace: ForwardTrace) -> Iterator[None]:
        """Enlarge the last layer until exit, which spreads the outputs."""
        layer = list(forward_trace.layer.parameters(recurse=False)) if forward_trace.layer is not None else []
        own = {id(p) for p in layer if p.dim() > 1} or {id(p) for p in layer}  # a larger bias would move all equally
        names = [name for name, p in self.outside.named_parameters() if id(p) in own and name in self.copies]
        before, context = {name: self.copies[name] for name in names}, self._parts
        if forward_trace.layer_scale == 1.0 or context is None:
            yield
            return
        for name, copied in before.items():
            layer_scale = copied.detach() * forward_trace.layer_scale
            self.copies[name] = nn.Parameter(layer_scale, requires_grad=copied.requires_grad)
        self._parts = replace(context, optimizer=GradientRecorder([self.copies[name] for name in self.trained]))
        try:
            yield
        finally:
            self.copies |= before
            self._parts = context

    def _made(self, make_parts: MakeParts) -> TrainingContext:
        if self._parts is None:  # once: the first window determines the kind of loss
            self._parts = self._opened(make_parts, [self.copies[name] for name in self.trained])
        return self._parts

    def _window(self, make_parts: MakeParts, pieces: Sequence[Batch], sizes: Sequence[int]) -> Passes:
        trained, cumulative = [self.copies[name] for name in self.trained], list[torch.Tensor]()
        for p in trained:  # a loss that refused another batch in its second part left the first one's
            p.grad = None
        context = self._made(make_parts)
        optimizer = context.optimizer
        assert isinstance(optimizer, GradientRecorder)

        @contextmanager
        def phase(name: str) -> Iterator[None]:
            if name in (FIRST, LATER):
                put_rng(self._start)
            yield
            if name in (FIRST, LATER):
                cumulative.append(self._read([p.grad for p in trained]))

        with without_randomness() as draws:
            step.train_window(context, pieces, sizes, on_phase=phase)
        draws.class_losses = [_placed(call, pieces[0]) for call in draws.class_losses]
        gradient, optimizer.seen = self._read(optimizer.seen), []  # freed before the next window's
        for p in trained:
            p.grad = None
        return Passes(
            gradient,
            torch.stack(cumulative),
            draws,
            bool(draws.replaced or draws.kept) or _drawn(self._start),
            self._is_pair,
            self._trace,
        )

    def _opened(self, make_parts: MakeParts, trained: list[torch.Tensor]) -> TrainingContext:
        """Return the context with a recording optimizer, no scaler, no autocast."""
        made = make_parts()
        inner = made.loss

        def loss(model: nn.Module, batch: Batch) -> Any:
            untraced = self._trace is None or bool(self._trace.steps)  # the first piece comes first
            with contextlib.nullcontext() if untraced or self._trace is None else self._trace:
                out = inner(model, batch)
            self._is_pair = count_of(out) is not None
            return out

        return replace(
            made,
            loss=inner if inner is default_loss else loss,  # the step knows the default one by its identity
            optimizer=GradientRecorder(trained),
            device=trained[0].device,
            scaler=None,
            scheduler=None,
            clip_grad_norm=None,
            on_nonfinite=None,
            autocast_dtype=None,
        )

    def _read(self, gradients: Sequence[torch.Tensor | None]) -> torch.Tensor:
        """Return a gradient's chosen entries on the host, zeros if missing."""
        read = []
        for name, gradient, chosen in zip(self.trained, gradients, self._chosen, strict=True):
            size = _numbers(self.copies[name])
            if gradient is None:
                read.append(torch.zeros(size if chosen is None else len(chosen), dtype=torch.float64))
                continue
            dense = (gradient.to_dense() if gradient.layout is not torch.strided else gradient).detach()
            flat = (torch.view_as_real(dense.resolve_conj()) if dense.is_complex() else dense).reshape(-1)
            read.append((flat if chosen is None else flat[chosen.to(flat.device)]).to("cpu", torch.float64, copy=True))
        return torch.cat(read)

    @property
    def tolerance(self) -> float:
        """The relative difference that rounding may cause."""
        copies = [copied for copied in self.copies.values() if copied.is_floating_point() or copied.is_complex()]
        floats = {copied.dtype.to_real() for copied in copies}
        limits = {**EXACT_TOLERANCE, **HALF_PRECISION_TOLERANCE}
        return max(limits.get(dtype, EXACT_TOLERANCE[torch.float32]) for dtype in floats)

    def name_of(self, name: str) -> str:
        """Return a copy's name in the model, or below the loss."""
        _, index, *inside = name.split(".", 2)
        return ".".join(filter(None, [self.roots[int(index)], *inside]))

    def moving_place(self) -> str | None:
        """Return the moving module as an expression; None for the model itself."""
        owner = self._moving()
        if owner is None or owner == "inner.0":
            return None
        _, index, *inside = owner.split(".", 2)
        root = self.roots[int(index)] or "model"
        return f"{root}.get_submodule({inside[0]!r})" if inside else root

    def moving_module(self) -> str | None:
        """Return the first module whose float buffer a forward changed."""
        owner = self._moving()
        if owner is None:
            return None
        return f"{self.name_of(owner) or THE_MODEL} ({type(self.outside.get_submodule(owner)).__name__})"

    def _moving(self) -> str | None:
        moved = (name for name in self.buffers if name in self.moved and self.buffers[name].is_floating_point())
        return next((name.rpartition(".")[0] for name in moved), None)

    @property
    def places(self) -> tuple[tuple[str, int], ...]:
        """Names, as the model has them, and compared entries of parameters."""
        names = [self.name_of(name) for name in self.trained]
        sizes = [_numbers(self.copies[name]) for name in self.trained]
        pairs = zip(sizes, self._chosen, strict=True)
        entries = [size if chosen is None else len(chosen) for size, chosen in pairs]
        return tuple(zip(names, entries, strict=True))


def _numbers(tensor: torch.Tensor) -> int:
    """Return the real numbers in a tensor: a complex one has two."""
    return tensor.numel() * (2 if tensor.is_complex() else 1)


def _choose(sizes: Sequence[int], entries: int, generator: torch.Generator) -> list[torch.Tensor | None]:
    """Choose the entries of each tensor to compare; None for all."""
    total = sum(sizes)
    if total <= entries:
        return [None] * len(sizes)
    wanted = [min(size, max(MIN_TENSOR_ENTRIES, size * entries // total)) for size in sizes]
    return [
        None if number == size else torch.randint(size, (number,), generator=generator)
        for size, number in zip(sizes, wanted, strict=True)
    ]


def _drawn(start: dict[str, Any]) -> bool:
    """Return whether Python or NumPy drew; torch's draws are intercepted."""
    now = take_rng()
    return any(not same_state(now[name], start[name]) for name in ("Python RNG", "NumPy RNG") if name in start)


def _placed(call: ClassLoss, piece: Batch) -> ClassLoss:
    """Add the path of the leaf that holds a call's classes."""
    address, targets = call.targets.untyped_storage().data_ptr(), call.targets.flatten()
    leaves = [(p, leaf) for p, leaf in tree.leaves(piece) if isinstance(leaf, torch.Tensor) and leaf.dim()]
    named = target_paths(piece)
    leaves.sort(key=lambda item: item[0] not in named)  # prefer labels to inputs that they copy
    for path, leaf in leaves:
        if leaf.untyped_storage().data_ptr() == address:
            return replace(call, path=path)
    for path, leaf in leaves:
        if leaf.dtype != targets.dtype:  # -100 isn't a number of every type
            continue
        shifted = leaf[:, 1:] if leaf.dim() == 2 else leaf
        padded = torch.nn.functional.pad(shifted, (0, 1), value=call.ignore_index) if leaf.dim() == 2 else leaf
        for form in (leaf, shifted, padded):  # the last two: next tokens, cut off or padded as in Hugging Face
            if form.numel() != len(targets):
                continue
            if torch.equal(form.flatten().to(targets.device), targets):  # a batch may lie on the host
                return replace(call, path=path)
    return call


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and bool(torch.equal(one, other))
