"""Hold a tuning's plan and trials, and rank them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ..configuration import sentence
from ..files.escape import one_line
from ..files.json_text import to_json
from ..plan import Plan, TimedSize
from ..units import show_bytes

SCHEMA_VERSION = 1
SECONDS, MEMORY = "seconds", "memory"
TIE_TIME_RATIO = 1.01  # of the best time: nobody notices the difference
MEASURED, RANKED, SAME, PRUNED, FAILED = "measured", "ranked", "same", "pruned", "failed"


@dataclass(frozen=True)
class Trial:
    """Hold the result of one tried configuration.

    Attributes:
        number: Its number in the study.
        state: "measured", or "ranked" if memory alone counts; "pruned": it can't fit, and was not run; "same": an
            earlier trial had the same configuration; "failed".
        configuration: Its choices.
        micro_batch: The largest micro-batch of its split; None if nothing fits.
        accumulation_steps: Micro-batches in its window.
        step_seconds: Median of its windows, or of its turns; None if it was not timed.
        windows: How many windows were timed.
        peak_bytes: Predicted peak of the process.
        why: Why it was pruned or failed, or which trial it equals.
        numerics: The choices that change numbers, by name, with how.
        pareto: Whether no other trial is better in both seconds (or steps) and bytes.
        turns: How many turns it had in the final timing; 0 if it was timed alone only.
    """

    number: int
    state: str
    configuration: Mapping[str, Any]
    micro_batch: int | None = None
    accumulation_steps: int | None = None
    step_seconds: float | None = None
    windows: int = 0
    peak_bytes: int | None = None
    why: str = ""
    numerics: Mapping[str, str] = field(default_factory=dict)
    pareto: bool = False
    turns: int = 0

    @property
    def counts(self) -> bool:
        """Whether the trial has a rank."""
        return self.state in (MEASURED, RANKED)

    def order(self, ranking: str) -> tuple[float, ...]:
        """Return the sort key of a ranking: seconds, or steps; then bytes."""
        assert self.accumulation_steps is not None and self.peak_bytes is not None
        if ranking == SECONDS:
            return (self.step_seconds or 0.0, self.peak_bytes)
        return (self.accumulation_steps, self.peak_bytes)


def ranked(trials: Iterable[Trial], ranking: str) -> list[Trial]:
    """Return the trials that have a rank, best first.

    If some were timed in turn, the best is one of these. Of those within 1 % of the fastest, it is the one that changes
    the fewest numbers: nobody notices 1 % of time, but other numbers are noticed.
    """
    found = sorted((trial for trial in trials if trial.counts), key=lambda trial: trial.order(ranking))
    if ranking == SECONDS and found:
        known = [trial for trial in found if trial.turns] or found
        as_good = [
            trial for trial in known if (trial.step_seconds or 0.0) <= TIE_TIME_RATIO * (known[0].step_seconds or 0.0)
        ]
        best = min(as_good, key=lambda trial: len(trial.numerics))
        found.remove(best)
        found.insert(0, best)
    return found


@dataclass(frozen=True)
class TuningResult:
    """Hold what a tuning found.

    Attributes:
        plan: The winner's plan, including its configuration.
        trials: All trials, in order.
        ranking: "seconds" per optimizer step, measured; or "memory": fewest steps, then the lowest peak.
        space: Number of configurations in the search space.
        notes: What was left out of the search, a line each.
        plain: Number of the plain configuration's trial; None if it wasn't tried.
        seconds: Duration of the tuning.
    """

    plan: Plan
    trials: tuple[Trial, ...]
    ranking: str
    space: int
    notes: tuple[str, ...] = ()
    plain: int | None = None
    seconds: float = 0.0

    @property
    def ranked(self) -> list[Trial]:
        """The trials that have a rank, best first."""
        return ranked(self.trials, self.ranking)

    @property
    def best(self) -> Trial:
        """The winning trial."""
        return self.ranked[0]

    def to_json(self) -> str:
        """Return everything as JSON, for other tools."""
        values = {
            "kind": "autoaccum tuning",
            "schema_version": SCHEMA_VERSION,
            "ranking": self.ranking,
            "space": self.space,
            "notes": self.notes,
            "plain": self.plain,
            "seconds": self.seconds,
            "trials": [asdict(trial) for trial in self.trials],
            "plan": json.loads(self.plan.to_json()),
        }
        return to_json(values, indent=1) + "\n"

    def table(self, rows: int = 20) -> str:
        """Return the table of the best trials and the failures."""
        lines = [f"{'rank':>4}  {'seconds/step':>12}  {'peak':>10}  {'micro-batch':>14}  configuration"]
        places = self.ranked
        shown = places if len(places) <= rows else places[: rows - 1]
        for rank, trial in enumerate(shown, 1):
            lines.append(self._row(rank, trial))
        plain = next((trial for trial in places if trial.number == self.plain), None)
        if plain is not None and plain not in shown:
            lines.append(self._row(places.index(plain) + 1, plain))
        if len(shown) < len(places):
            lines.append(f"{'':>4}  and {len(places) - len(shown)} more")
        lines += [f"{'-':>4}  {trial.state}: {sentence(trial.configuration)}: {trial.why}" for trial in self.trials
                  if trial.state in (PRUNED, FAILED)]  # fmt: skip
        return "\n".join(map(one_line, lines))

    def _row(self, rank: int, trial: Trial) -> str:
        seconds = "-" if trial.step_seconds is None else f"{trial.step_seconds:.4g}"
        marks = (
            " (plain)" * (trial.number == self.plain) + " (Pareto)" * trial.pareto + " (in turn)" * bool(trial.turns)
        )
        split = f"{trial.micro_batch} x {trial.accumulation_steps}"
        return (
            f"{rank:>4}  {seconds:>12}  {show_bytes(trial.peak_bytes or 0):>10}  {split:>14}  "
            f"{sentence(trial.configuration)}{marks}"
        )


def with_configuration(plan: Plan, winner: Trial, ranking: str, trials: tuple[Trial, ...], windows: str) -> Plan:
    """Add the winner's configuration, its reasons and its notes to its plan.

    Args:
        plan: The plan of the winner's split.
        winner: The winning trial.
        ranking: "seconds" or "memory".
        trials: All trials.
        windows: How trials were compared, as a phrase.
    """
    values = {name: value for name, value in winner.configuration.items() if name != "micro_batch"}
    reasons = {"configuration": f"the best of {sum(trial.counts for trial in trials)} that were {windows}"}
    reasons |= {f"configuration.{name}": text for name, text in winner.numerics.items()}
    notes = [f"Changes numbers: {text}." for text in winner.numerics.values()]
    times = _times(trials, values) if ranking == SECONDS else ()
    return replace(
        plan,
        schedule=replace(plan.schedule, configuration=values),
        provenance=replace(
            plan.provenance, reasons={**plan.provenance.reasons, **reasons}, notes=(*plan.notes, *notes)
        ),
        timing=replace(plan.timing, timed_sizes=plan.timing.timed_sizes or times),
    )


def _times(trials: tuple[Trial, ...], values: Mapping[str, Any]) -> tuple[TimedSize, ...]:
    """Return the configuration's times at other micro-batches."""
    found = {}
    for trial in trials:
        same = {name: value for name, value in trial.configuration.items() if name != "micro_batch"} == values
        if same and trial.micro_batch is not None and trial.step_seconds is not None:
            found[trial.micro_batch] = TimedSize(trial.micro_batch, trial.step_seconds, trial.windows)
    return tuple(found[size] for size in sorted(found))


def summary(found: TuningResult) -> str:
    """Summarize a tuning: the ranking, the winner's gain, the numbers it changes."""
    counts = {state: sum(trial.state == state for trial in found.trials) for state in (PRUNED, SAME, FAILED)}
    tried = len(found.trials) - counts[SAME]
    also = ", ".join(f"{count} {word}" for word, count in (
        ("pruned without running", counts[PRUNED]), ("failed", counts[FAILED]),
        ("answered from the study", counts[SAME]),
    ) if count)  # fmt: skip
    ranked_by = (
        f"seconds per optimizer step, measured{_in_turn(found)}"
        if found.ranking == SECONDS
        else "memory: fewest steps, then the lowest peak; a virtual GPU computes nothing, so there is no time"
    )
    lines = [
        ("trials", f"{tried} of {found.space} configurations" + (f" ({also})" if also else "")),
        ("ranked by", ranked_by),
        ("winner", f"trial {found.best.number}: {sentence(found.best.configuration)}{_gain(found)}"),
    ]
    numerics = "; ".join(found.best.numerics.values())
    lines.append(("numbers", f"changed by {numerics}" if numerics else "unchanged by any choice"))
    lines += [("note", note) for note in found.notes]
    return "\n".join(one_line(f"{name:<12}{text}") for name, text in lines)


def _in_turn(found: TuningResult) -> str:
    """Return how many trials were timed in turn, as a phrase."""
    turns = [trial.turns for trial in found.trials if trial.turns and trial.counts]
    return f"; the leading ones and the plain one in turn, {max(turns)} rounds of {len(turns)}" if turns else ""


def _gain(found: TuningResult) -> str:
    plain = next((trial for trial in found.trials if trial.number == found.plain), None)
    best = found.best
    if plain is None or plain.number == best.number:
        return "" if plain is None else ", which is the plain one"
    if found.ranking == SECONDS and plain.step_seconds and best.step_seconds:
        return f", {plain.step_seconds / best.step_seconds:.2f} times as fast as the plain one"
    return (
        f": {best.accumulation_steps} x {best.micro_batch} in {show_bytes(best.peak_bytes or 0)}, and the plain one "
        f"{plain.accumulation_steps} x {plain.micro_batch} in {show_bytes(plain.peak_bytes or 0)}"
    )
