"""Set up every test process: one thread each, cheap garbage collections, no torchvision of another build."""

from __future__ import annotations

import gc
import os
import sys

# Two test processes share the cores, and threads that wait for each other over small tensors take longer than one.
os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported; child processes inherit it
os.environ["AUTOACCUM_PLAN_CACHE"] = (
    "0"  # a plan that is tested is planned; tests/test_plan_cache.py has a cache of its own
)

gc.disable()  # until the tests are collected: what imports make stays, and collections are half of their seconds

import pytest  # noqa: E402

HIDDEN: list[str] = []  # a line about a torchvision that is left out
FROZEN = {"modules": 0}  # how many there were when objects were kept out of garbage collections
MANY_MODULES = 5

# Files that take longest, for pytest-xdist to start with: one of them begun last would keep one process alone at work.
LONGEST_FIRST = (
    "test_cli.py",
    "test_fit.py",
    "test_exact.py",
    "test_virtual.py",
    "test_prediction.py",
    "test_torchrun.py",
    "test_cuda_plan.py",
    "test_caching_allocator.py",
    "test_page_cache.py",
    "test_sharded_training.py",
    "test_over_ranks.py",
    "test_rank_lanes.py",
    "test_hugging_face_trainer.py",
    "test_solve.py",
    "test_fits.py",
    "test_oom.py",
    "test_rank_faults.py",
    "test_gpu_option.py",
    "test_notebooks.py",
    "test_golden_plans.py",
    "test_lanes.py",
    "test_runner_cuda.py",
    "test_lightning.py",
)


def _hide_a_torchvision_for_another_torch() -> str:
    """On a CPU build, PyPI's torchvision is one for CUDA: it can't be loaded, and takes transformers with it.

    Without it transformers works; what needs it here needs CUDA, too. Returns a line about it.
    """
    import torch

    if torch.version.cuda is not None:
        return ""
    try:
        import torchvision  # noqa: F401
    except (ImportError, OSError, RuntimeError) as error:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        sys.modules["torchvision"] = None  # type: ignore[assignment]
        return f"torchvision is left out: it is not for this torch ({error})"
    return ""


def pytest_configure(config: pytest.Config) -> None:
    """Let the process that only hands out tests collect garbage, and import no torch: it runs none of them."""
    if getattr(config.option, "numprocesses", None) and not hasattr(config, "workerinput"):
        gc.enable()
    elif hidden := _hide_a_torchvision_for_another_torch():
        HIDDEN.append(hidden)


def pytest_report_header() -> list[str]:
    """Return a line that says whether torchvision is hidden."""
    return HIDDEN


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files that take longest first; the order within a file stays."""
    places = {name: place for place, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


def _freeze() -> None:
    """Keep what is there now out of every later garbage collection."""
    gc.collect()
    gc.freeze()
    FROZEN.update(modules=len(sys.modules))


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """Keep what imports and collection made out of every later garbage collection.

    Planning collects garbage several times, and torch's and the tests' own objects make each collection take longer
    than the rest of a small plan.
    """
    _freeze()
    gc.enable()


@pytest.hookimpl(trylast=True)
def pytest_runtest_logfinish() -> None:
    """Keep what a test imported, such as a model of transformers', out of every later garbage collection, too."""
    if len(sys.modules) >= FROZEN["modules"] + MANY_MODULES:
        _freeze()
