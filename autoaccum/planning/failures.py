"""Create the errors that nothing fits, with what would help."""

from __future__ import annotations

from ..errors import DoesNotFit
from ..simulation.solver import Split
from ..units import show_bytes
from .growth import describe_growth
from .predictor import MemoryPredictor


def does_not_fit(predictor: MemoryPredictor, split: Split, needed_bytes: int | None) -> DoesNotFit:
    """Create the error that not even the smallest window fits.

    Args:
        predictor: The predictor.
        split: The smallest window.
        needed_bytes: The smallest budget that it fits; None if unknown, since no window so small was recorded.
    """
    budget = predictor.budget
    missing = max(1, needed_bytes - budget.bytes) if needed_bytes is not None else 0
    state = predictor.evidence.state_bytes
    helps = (
        *(predictor.remedies(needed_bytes) if needed_bytes is not None else ()),
        _larger_budget(predictor, needed_bytes),
        f"an optimizer without state (this one's is {show_bytes(state)})" if state and state > missing / 4 else None,
        _keeping_less(predictor, split),
        "activation checkpointing, shorter samples, or a smaller model",
    )
    remedies = ", ".join(text for text in helps if text)
    needs = (
        f"its window needs {show_bytes(needed_bytes)}, the budget is {show_bytes(budget.bytes)}; "
        f"{show_bytes(missing)} ({missing:,} bytes) are missing."
        if needed_bytes is not None
        else f"no window was recorded within the budget of {show_bytes(budget.bytes)}."
    )
    return DoesNotFit(
        f"Not even a micro-batch of {split[0]} fits: {needs}",
        f"{show_bytes(predictor.baseline_bytes)} of it are {predictor.baseline_words}; "
        f"the tightest limit is {budget.binding_constraint}.",
        f"What would help: {remedies}.",
        missing_bytes=missing,
    )


def _keeping_less(predictor: MemoryPredictor, split: Split) -> str | None:
    """Return the remedy of keeping less between windows."""
    found = predictor.evidence.growth
    growth = predictor.growth_bytes(split) if found is not None else 0
    return (
        f"keeping less than {show_bytes(growth)} of each window (allocated at {describe_growth(found)})"
        if found and growth
        else None
    )


def ran_out(predictor: MemoryPredictor, failure: str) -> DoesNotFit:
    """Create the error that the first windows ran out of memory.

    The failure is the allocation that failed, or would have.
    """
    budget = predictor.budget
    return DoesNotFit(
        f"A window of a few samples does not fit ({failure}); the budget is {show_bytes(budget.bytes)}.",
        f"{show_bytes(predictor.baseline_bytes)} are {predictor.baseline_words}; "
        f"the tightest limit is {budget.binding_constraint}.",
        f"What would help: {_larger_budget(predictor, None)}, an optimizer with less state, or a smaller model.",
        missing_bytes=1,
    )


def _larger_budget(predictor: MemoryPredictor, needed_bytes: int | None) -> str | None:
    """Return the remedy of a larger budget or limit."""
    budget = predictor.budget
    if budget.binding_constraint != "asked":
        return f"a higher limit ({budget.binding_constraint})"
    if needed_bytes is None:
        return "a larger budget (budget=)"
    outside = predictor.budget.limit_bytes - predictor.budget.bytes  # headroom, and on a GPU what torch doesn't see
    enough = show_bytes(int(needed_bytes * 1.001) + outside).replace(" ", "")
    return f'a budget of {enough} (budget="{enough}")'
