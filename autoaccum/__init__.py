"""autoaccum: the largest micro-batch that fits, and exact gradient accumulation.

Start with `fit_plan`; its file, `planning/fit.py`, is the page to read first.
"""

# No `from __future__ import`: that is an import like any other, from the current folder first.
from .processes.early_signals import end_at_once
from .processes.import_path import leave_current_folder

end_at_once()
leave_current_folder()  # before anything else is imported: `python -m` put it first
# isort: split
import importlib  # noqa: E402

__version__ = "0.1.0"

TYPE_CHECKING = False  # typing takes ten milliseconds, in which no signal is handled yet
if TYPE_CHECKING:
    from .errors import (
        AutoaccumError,
        BatchError,
        DoesNotFit,
        NotConfirmed,
        NotFinite,
        OutOfMemory,
        PlanFileError,
        PlanMismatch,
        RanksFailed,
        RestoreError,
        UsageError,
    )
    from .integrations.windows import windows
    from .plan import Plan
    from .planning.fit import fit_plan
    from .runner.runner import Runner
    from .tuning import SearchSpace, tune
    from .tuning.apply import configure
    from .window.lanes.gather import gather_window
    from .window.loss_terms import LossTerms
    from .workload import Workload

__all__ = [
    "AutoaccumError",
    "BatchError",
    "DoesNotFit",
    "LossTerms",
    "NotConfirmed",
    "NotFinite",
    "OutOfMemory",
    "Plan",
    "PlanFileError",
    "PlanMismatch",
    "RanksFailed",
    "RestoreError",
    "Runner",
    "SearchSpace",
    "UsageError",
    "Workload",
    "configure",
    "fit_plan",
    "gather_window",
    "tune",
    "windows",
]

_HOMES = {
    "LossTerms": "window.loss_terms",
    "Plan": "plan",
    "Runner": "runner.runner",
    "SearchSpace": "tuning",
    "Workload": "workload",
    "configure": "tuning.apply",
    "fit_plan": "planning.fit",
    "gather_window": "window.lanes.gather",
    "tune": "tuning",
    "windows": "integrations.windows",
}


def __getattr__(name: str) -> object:
    """Load a public name on first use.

    Importing torch takes two seconds, and `--help` doesn't need it.
    """
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("." + _HOMES.get(name, "errors"), __name__), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
