"""Collect a plan's figures in pandas frames, for every report. No torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ..plan import PeakRow, Plan
from ..simulation.knee import knee
from ..simulation.solver import CAPACITY_MARGIN, steps_with_largest
from . import what_if
from .kinds import Kind, measured

if TYPE_CHECKING:
    import pandas as pd

Rows = list[dict[str, Any]]

MOST_PLANS = 2000  # rows of `plans`, so that browsers and spreadsheets can display them


def frames(plan: Plan) -> dict[str, pd.DataFrame]:
    """Return the plan's figures, one frame for each topic.

    Args:
        plan: Any plan, also one read from a file.

    Returns:
        By name, in the order in which a report shows them. Columns that end in `_bytes` are whole numbers of bytes,
        those in `_seconds` are seconds; `kind` states the source of the figures of its row, such as measured.

        - `figures`: the plan's chosen numbers (`figure`, `value`, `unit`, `kind`, `why`).
        - `peaks`: `micro_batch`, `first_bytes`, `later_bytes`, `optimizer_bytes`, `between_bytes`, `peak_bytes` of the
          whole process, `fits`.
        - `points`: the sizes recorded, chosen and verified (`point`, `micro_batch`, `peak_bytes`, `kind`).
        - `composition`: `phase`, `category`, `bytes`.
        - `timeline`: `part`, `phase`, `micro_batch`, `position` (0 to 1 within the part), `bytes`.
        - `times`: `micro_batch`, `step_seconds` (the median), `low_seconds` and `high_seconds` (of the rounds),
          `windows` (a number), `ratio` to the fastest, `ratio_low` and `ratio_high` (95 %), `is_knee`, `may_be_knee`.
        - `plans`: the numbers of steps for the target that the table has peaks for; if more than 2,000, for each
          largest micro-batch the fewest steps (`accumulation_steps`, `split`,
          `peak_bytes`, `free_bytes`, `fits`, `passes`, `step_seconds`, `chosen`).
        - `recordings`: `micro_batch`, `passes`, `seconds`, `measured_bytes`, `predicted_bytes`, `error`.
        - `budget`: `limit`, `bytes`, `why`, `is_binding`.
        - `environment`: `name`, `value`.
    """
    import pandas as pd

    makers: dict[str, Callable[[Plan], Rows]] = {
        "figures": _figures,
        "peaks": _peaks,
        "points": _points,
        "composition": _composition,
        "timeline": _timeline,
        "times": _times,
        "plans": _plans,
        "recordings": _recordings,
        "budget": _budget,
        "environment": _environment,
    }
    return {name: pd.DataFrame(make(plan), dtype=object) for name, make in makers.items()}


def usable_bytes(plan: Plan) -> int:
    """Return the budget less the margin that a plan keeps free."""
    return int(plan.budget_bytes * (1 - CAPACITY_MARGIN))


def show_split(samples: int, steps: int) -> str:
    """Format a balanced split as "1 x 52 + 4 x 51"."""
    size, larger = divmod(samples, steps)
    return show_runs({size + 1: larger, size: steps - larger})


def show_runs(counts: Mapping[int, int]) -> str:
    """Format the number of micro-batches of each size."""
    return " + ".join(f"{count} \u00d7 {size}" for size, count in counts.items() if count)


def _figures(plan: Plan) -> Rows:
    real, reasons = measured(plan), plan.provenance.reasons
    rows: list[tuple[str, float, str, Kind, str]] = [
        ("target batch", plan.target_batch, "samples", Kind.GIVEN, ""),
        ("ranks", plan.world_size, "", Kind.GIVEN, ""),
        ("accumulation steps", plan.accumulation_steps, "", Kind.PREDICTED, reasons.get("accumulation_steps", "")),
        ("micro-batch", plan.micro_batch, "samples", Kind.PREDICTED, reasons.get("split", "")),
        (
            "largest micro-batch",
            plan.largest_micro_batch,
            "samples, at least" if plan.schedule.largest_is_capped else "samples",
            Kind.PREDICTED,
            reasons.get("largest_micro_batch", ""),
        ),
        ("budget", plan.budget_bytes, "bytes", Kind.GIVEN, reasons.get("budget_bytes", "")),
        ("before training", plan.memory.baseline_bytes, "bytes", real, reasons.get("baseline_bytes", "")),
        ("peak, predicted", plan.predicted_peak_bytes, "bytes", Kind.PREDICTED, plan.memory.binding_constraint),
    ]
    if plan.measured_peak_bytes is not None:
        rows.append(("peak, measured", plan.measured_peak_bytes, "bytes", real, reasons.get("measured_peak_bytes", "")))
    if plan.evidence.resident_peak_bytes is not None and plan.device.name == "cpu":
        rows.append(("peak in memory", plan.evidence.resident_peak_bytes, "bytes", real, "peak of the resident part"))
    rows += _of_lanes(plan)
    if plan.timing.window_seconds is not None:
        why = "estimated from the verification run, in proportion to the samples"
        rows.append(("optimizer step", plan.timing.window_seconds, "seconds", real, why))
    if plan.provenance.planning_seconds and not plan.device.is_virtual:  # a virtual GPU has no times
        rows.append(("planning", plan.provenance.planning_seconds, "seconds", real, ""))
    return [dict(zip(("figure", "value", "unit", "kind", "why"), row, strict=True)) for row in rows]


def _of_lanes(plan: Plan) -> list[tuple[str, float, str, Kind, str]]:
    """Return what lanes keep on the host, and what they move."""
    memory = plan.memory
    figures = (
        ("on the host", memory.host_bytes, "pinned buffers for what lanes save for the backward"),
        ("moved to the host", memory.moved_bytes, "by each window; it comes back in the backward"),
        ("kept on the device", memory.stayed_bytes, "by each window, of what could move to the host"),
        ("computed again", memory.recomputed_bytes, "by each window, of what it would move or keep"),
    )
    return [(name, size, "bytes", Kind.PREDICTED, why) for name, size, why in figures if size]


def total_bytes(plan: Plan, row: PeakRow, samples: int | None = None) -> int:
    """Return the process's peak in bytes with micro-batches of a row's size.

    Args:
        plan: Any plan.
        row: The row.
        samples: Samples in the window; None for the plan's, whose sum costs time in a loop.
    """
    steps = -(-(samples or sum(plan.split)) // row.micro_batch)
    training = plan.memory.input_bytes + plan.memory.history_bytes + row.peak_bytes(steps)
    return plan.memory.baseline_bytes + training + int(plan.memory.malloc_overhead * training)


def _peaks(plan: Plan) -> Rows:
    rows: Rows = []
    samples = sum(plan.split)
    for row in sorted(plan.memory.peaks, key=lambda row: row.micro_batch):
        total = total_bytes(plan, row, samples)
        phases = {name: getattr(row, name) for name in ("first_bytes", "later_bytes", "optimizer_bytes")}
        rows.append(
            {"micro_batch": row.micro_batch, **phases, "between_bytes": row.between_bytes, "peak_bytes": total}
            | {"fits": total <= usable_bytes(plan), "kind": Kind.PREDICTED}
        )
    return rows


def _points(plan: Plan) -> Rows:
    held, real = plan.memory.baseline_bytes + plan.memory.input_bytes, measured(plan)
    rows = [("recorded", note.micro_batch, held + note.measured_bytes, real) for note in plan.evidence.recordings]
    rows.append(("chosen", plan.micro_batch, plan.predicted_peak_bytes, Kind.PREDICTED))
    if plan.measured_peak_bytes is not None:
        rows.append(("verified", plan.micro_batch, plan.measured_peak_bytes, real))
    needed = plan.fewer_steps_need()
    if needed is not None:
        rows.append(("one step fewer", *needed, Kind.PREDICTED))
    return [dict(zip(("point", "micro_batch", "peak_bytes", "kind"), row, strict=True)) for row in rows]


def _composition(plan: Plan) -> Rows:
    return [
        {"phase": phase, "category": category, "bytes": size, "kind": Kind.PREDICTED}
        for phase, parts in plan.memory.composition.items()
        for category, size in parts.items()
    ]


def _timeline(plan: Plan) -> Rows:
    held = plan.memory.baseline_bytes + plan.memory.input_bytes
    return [
        {"part": index, "phase": part.phase, "micro_batch": part.micro_batch}
        | {"position": (i + 0.5) / len(part.bytes), "bytes": held + size, "kind": Kind.PREDICTED}
        for index, part in enumerate(plan.memory.timeline)
        for i, size in enumerate(part.bytes)
    ]


def _times(plan: Plan) -> Rows:
    found, rows = knee(plan.timing.timed_sizes), []
    for each in found.compared if found is not None else ():
        assert found is not None
        timed = each.timed
        rounds = timed.round_seconds or (timed.step_seconds,)
        rows.append(
            {"micro_batch": timed.micro_batch, "step_seconds": timed.step_seconds, "low_seconds": min(rounds)}
            | {"high_seconds": max(rounds), "windows": timed.windows, "ratio": each.ratio, "ratio_low": each.low}
            | {"ratio_high": each.high, "is_knee": timed is found.timed, "kind": measured(plan)}
            | {"may_be_knee": timed.micro_batch in found.candidates}
        )
    return rows


def _plans(plan: Plan) -> Rows:
    table, samples = what_if.table_of(plan), sum(plan.split)
    times = {timed.micro_batch: timed.step_seconds for timed in plan.timing.timed_sizes}
    if plan.timing.window_seconds is not None:
        times.setdefault(plan.micro_batch, plan.timing.window_seconds)
    if table is None:
        return []
    rows: Rows = []
    for steps in sorted({*_known_steps(table, samples, plan.accumulation_steps), plan.accumulation_steps}):
        chosen = steps == plan.accumulation_steps
        if chosen:  # its split may be uneven, and replays within the budget found that it fits
            split, largest = show_runs(Counter(plan.split)), plan.micro_batch
            peak, fits = plan.predicted_peak_bytes, True
        else:
            split, largest, last = show_split(samples, steps), -(-samples // steps), samples // steps
            second = largest if samples % steps != 1 else last
            found = table.peak_of(samples, steps, largest, second, last)
            assert found is not None, "the table has both sizes"
            peak, fits = found, found <= usable_bytes(plan) and largest <= (plan.request.max_micro_batch or largest)
        rows.append(
            {"accumulation_steps": steps, "split": split, "micro_batch": largest}
            | {"peak_bytes": peak, "free_bytes": plan.budget_bytes - peak, "fits": fits, "passes": steps}
            | {"step_seconds": times.get(largest), "chosen": chosen, "kind": Kind.PREDICTED}
        )
    return rows


def _known_steps(table: what_if.Table, samples: int, chosen: int) -> list[int]:
    """Return, ascending, the step counts whose balanced split the table covers.

    If there are more than `MOST_PLANS`, only the fewest steps for each largest micro-batch and the chosen count are
    returned.
    The counts are computed from the sizes: enumerating the splits of a million samples would be too slow.
    """
    sizes = {row.micro_batch for row in table.rows}
    most = samples // table.least
    found: list[range] = []
    for size in sorted(sizes, reverse=True):
        steps = steps_with_largest(samples, size)
        if size - 1 not in sizes:  # only the split into equal sizes
            steps = range(samples // size, samples // size + 1) if samples % size == 0 and steps else range(0)
        found.append(range(steps.start, min(steps.stop, most + 1)))
    if sum(map(len, found)) <= MOST_PLANS:
        return [steps for each in found for steps in each]
    fewest = [each[0] for each in found if each]
    known = [chosen] if any(chosen in each for each in found) else []
    return sorted({*fewest[-MOST_PLANS:], *known})


def _recordings(plan: Plan) -> Rows:
    return [
        {"micro_batch": note.micro_batch, "passes": note.passes, "seconds": note.seconds}
        | {"measured_bytes": note.measured_bytes, "predicted_bytes": note.predicted_bytes}
        | {"error": None if note.predicted_bytes is None else note.predicted_bytes / note.measured_bytes - 1}
        | {"kind": measured(plan)}
        for note in plan.evidence.recordings
    ]


def _budget(plan: Plan) -> Rows:
    return [
        {
            "limit": term.name,
            "bytes": term.bytes,
            "why": term.why,
            "is_binding": term.name == plan.memory.budget.binding_constraint,
        }
        | {"kind": Kind.GIVEN}
        for term in plan.memory.budget.terms
    ]


def _environment(plan: Plan) -> Rows:
    known = {"device": plan.device.name, "method": plan.method, **plan.provenance.fingerprint}
    known |= {
        name: value for name, value in plan.provenance.environment.items() if name not in plan.provenance.fingerprint
    }
    known |= {f"sample {leaf.path}": f"{leaf.dtype} {tuple(leaf.trailing_shape)}" for leaf in plan.provenance.signature}
    return [{"name": name, "value": value} for name, value in known.items()]
