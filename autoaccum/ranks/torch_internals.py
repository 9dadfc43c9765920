"""Reach the private names of torch that ranks need.

FSDP2's state and the fake process group; tests/test_sharded.py calls each function. Where a torch lacks a name,
`UnsupportedTorch` names the version and the name.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch

from ..torch_compat import UnsupportedTorch, _find

# FSDP2: torch/distributed/fsdp/_fully_shard


def has_begun(root: Any) -> bool:
    """Return whether a forward began since `fully_shard` was applied.

    Before it, there is no state to reset, and `reset_iter_state` fails.
    """
    return _find(root, "_get_fsdp_state", "reset a sharded model")()._is_root is not None


def gradient_divisors(module: Any) -> list[float | None]:
    """Return what `set_gradient_divide_factor` set for a sharded module's own parameters.

    None: the number of ranks. Empty where all parameters are inner modules'. Before torch 2.8 it can't be read back.
    """
    state = _find(module, "_get_fsdp_state", "read what a sharded model divides gradients by")()
    one, found = getattr(state, "_fsdp_param_group", None), list[float | None]()
    for group in getattr(state, "_fsdp_param_groups", None) or ([] if one is None else [one]):
        found.append(getattr(group, "gradient_divide_factor", None))
        if getattr(group, "reduce_scatter_reduce_op", None) is not None:
            why = "It doesn't say what set_reduce_scatter_divide_factor was called with, which a loss is multiplied by."
            raise UnsupportedTorch(f"torch {torch.__version__} hides a factor.", why, "Don't call it.")
    return found


# Process groups: torch/testing/_internal/distributed/fake_pg.py


def open_fake_group(rank: int, world_size: int) -> None:
    """Initialize torch's fake process group as the default one.

    Its collectives communicate with nobody.

    Raises:
        UnsupportedTorch: This torch has none.
    """
    try:
        module = importlib.import_module("torch.testing._internal.distributed.fake_pg")
    except ImportError as error:
        raise UnsupportedTorch(
            f"torch {torch.__version__} has no fake process group ({error}).",
            "autoaccum uses it to plan for ranks that are not here.",
            "Install a torch that is built with torch.distributed: pip install 'torch>=2.6'.",
        ) from error
    store = _find(module, "FakeStore", "plan for ranks that are not here")()
    torch.distributed.init_process_group("fake", store=store, rank=rank, world_size=world_size)
