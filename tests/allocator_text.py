"""Set the CUDA caching allocator's settings in a running process, under every version of torch."""

from __future__ import annotations

import os
import warnings

import torch

from autoaccum.simulation.cuda_allocator.ties import LATEST_KNOWN, minor_version

# Whether cuBLAS's workspaces stay allocated after a product.
KEEPS_WORKSPACES = os.environ.get("TORCH_CUBLAS_WORKSPACE_CACHE") == "1" or not torch.__version__.startswith("2.15")
VERSION = minor_version(torch.__version__) or LATEST_KNOWN


def set_settings(text: str) -> None:
    """As PYTORCH_CUDA_ALLOC_CONF would; an error where this torch has no such option."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # newer versions have another, private name for it
        torch.cuda.memory._set_allocator_settings(text)


def has_large_segments() -> bool:
    """Whether this torch has `large_segment_size_mb`."""
    return VERSION >= (2, 10)


def reset_settings() -> None:
    """Back to what they are in a process without the variable."""
    set_settings("expandable_segments:False" + ",large_segment_size_mb:20" * has_large_segments())
