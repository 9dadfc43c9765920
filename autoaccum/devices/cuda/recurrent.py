"""Compute what cuDNN's recurrent nets allocate beyond their outputs.

NVIDIA publishes no formula. These give sizes that people printed of cuDNN 6 and 7; they and their sources are in
devices/virtual/source/rnn.c. Newer versions may ask for other sizes, so they only decide whether a first window is
tried: a plan's own figures are recorded, or stand for a GPU that isn't there (docs/gpu-memory.md).
No torch here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

FORWARD, BACKWARD = "aten::_cudnn_rnn", "aten::_cudnn_rnn_backward"
_LSTM, _GRU = 2, 3  # torch's modes; 0 and 1 have one gate
_STEP_BLOCKS = 88  # of a step's hidden states, in a workspace


@dataclass(frozen=True)
class RecurrentCall:
    """A call of a recurrent net.

    Attributes:
        mode: As torch numbers kinds of cells.
        input_size: Numbers in a step's input.
        hidden_size: Numbers in a hidden state.
        layers: How many.
        directions: 1 or 2.
        steps: Of all sequences.
        batch: Sequences.
        weights: Numbers in all weights.
        is_packed: Whether sequences lie packed.
        element_bytes: Of a number.
    """

    mode: int
    input_size: int
    hidden_size: int
    layers: int
    directions: int
    steps: int
    batch: int
    weights: int
    is_packed: bool
    element_bytes: int

    @property
    def output_bytes(self) -> int:
        """Bytes of all hidden states of the last layer."""
        return self.element_bytes * self.steps * self.hidden_size * self.directions

    @property
    def reserve_bytes(self) -> int:
        """Bytes kept for the backward pass: gates, cells, and outputs between layers."""
        return self.output_bytes * ({_LSTM: 5, _GRU: 6}.get(self.mode, 1) * self.layers + self.layers - 1)

    @property
    def workspace_bytes(self) -> int:
        """Bytes for a call: weights, inputs and outputs without padding."""
        numbers = self.weights + _STEP_BLOCKS * self.batch * self.hidden_size
        if self.directions > 1 or not self.is_packed:
            numbers += 2 * self.steps * self.hidden_size * self.directions
        if not self.is_packed:
            numbers += 2 * self.steps * self.input_size
        return self.element_bytes * numbers


def hidden_sizes(name: str, args: Sequence[Any]) -> tuple[int, ...]:
    """Return what a call allocates beyond what its meta kernel shows.

    Args:
        name: Of the operation, like "aten::_cudnn_rnn"; others have nothing.
        args: Its positional arguments, with tensors that have a shape.

    Returns:
        The workspace and the reserve space of a forward; of a backward, which has no meta kernel, the workspace and
        the gradients of input and weights. With the batch first, copies with time first, too.
    """
    if name == FORWARD:
        x, weights, after = args[0], args[1], args[6:]
    elif name == BACKWARD:
        x, weights, after = args[0], args[1], args[10:]
    else:
        return ()
    call = _call(x, weights, after)
    copied = bool(after[4]) and not call.is_packed
    if name == FORWARD:
        return (*((x.nbytes,) if copied else ()), call.workspace_bytes, call.reserve_bytes)
    copies = (x.nbytes, call.output_bytes) if copied else ()
    return (*copies, call.workspace_bytes, x.nbytes, call.weights * call.element_bytes)


def _call(x: Any, weights: Sequence[Any], after: Sequence[Any]) -> RecurrentCall:
    """Read a call: `after` begins with mode, hidden_size, proj_size, num_layers, batch_first."""
    mode, hidden_size, _, layers, batch_first, _, _, is_bidirectional, batch_sizes = after[:9]
    lines = x.shape[:-1]
    batch = batch_sizes[0] if batch_sizes else lines[0 if batch_first else 1]
    return RecurrentCall(
        mode=mode,
        input_size=x.shape[-1],
        hidden_size=hidden_size,
        layers=layers,
        directions=2 if is_bidirectional else 1,
        steps=lines[0] if batch_sizes else lines[0] * lines[1],
        batch=batch,
        weights=sum(weight.numel() for weight in weights),
        is_packed=bool(batch_sizes),
        element_bytes=x.element_size(),
    )
