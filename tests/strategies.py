"""Step programs made from known rules, recordings of them, and plans with every field made up.

A `Truth` is a window written down as what a training step does (temporaries, gradients, a kept activation, lists that
grow). `Truth.window` says what it allocates, without the package's own `window`: tests hold one against the other.
"""

from __future__ import annotations

import json
import lzma
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from plan_fields import plan_of

from autoaccum.budget import Budget, BudgetItem
from autoaccum.phases import FIRST, LATER, OPTIMIZER
from autoaccum.plan import LeafForm, PeakRow, Plan, RecordingNote, SegmentRow, TimedSize, TimelinePart
from autoaccum.simulation.program import Step, StepProgram
from autoaccum.simulation.recording import Event, Phase, Recording
from autoaccum.simulation.scaling import Rule

PRIMES = (5, 7, 11, 13)
RECORDED = Path(__file__).parent / "data" / "recorded_programs.json.xz"
Traced = tuple[str, int]  # a phase's name, and bytes: > 0 allocated, < 0 freed


@dataclass(frozen=True)
class Truth:
    """What a training step does with memory, by rules.

    Attributes:
        temporaries: In each micro-batch, freed in it: (rule, whether it lives to the micro-batch's end).
        gradients: Made in the first micro-batch, a temporary in later ones, freed by the optimizer step.
        carried: Kept from each micro-batch until the next has made its own (a module's last activation).
        carried_end: Whether the optimizer step frees the last carried ones.
        replaced_first: Whether a carried block is freed before its successor is made.
        growing: Kept from each micro-batch until the optimizer step (a list of losses).
        optimizer: Temporaries of the optimizer step.
        foreign: A block from before the window that its first micro-batch frees.
    """

    temporaries: tuple[tuple[Rule, bool], ...] = ()
    gradients: tuple[Rule, ...] = ()
    carried: tuple[Rule, ...] = ()
    carried_end: bool = False
    replaced_first: bool = False
    growing: tuple[Rule, ...] = ()
    optimizer: tuple[Rule, ...] = ()
    foreign: Rule | None = None

    def recording(self, n: int) -> Recording:
        """A window of two micro-batches of n samples."""
        return Recording(n, tuple(self.events((n, n))))

    def window(self, split: Sequence[int]) -> list[Traced]:
        """What a window does, foreign blocks left out."""
        return [(phase.name, e.bytes) for phase in self.events(split) for e in phase.events if e.block > 0]

    def events(self, split: Sequence[int]) -> list[Phase]:
        """The same as named events, by phase."""
        named = 0
        phases: list[Phase] = []
        gradients: list[Event] = []
        carried: list[Event] = []
        lists: list[list[Event]] = [[] for _ in self.growing]

        def made(rule: Rule, n: int, events: list[Event]) -> Event:
            nonlocal named
            named += 1
            events.append(Event(named, rule.at(n)))
            return events[-1]

        def freed(event: Event, events: list[Event]) -> None:
            events.append(Event(event.block, -event.bytes))

        for index, n in enumerate(split):
            events: list[Event] = []
            if index == 0 and self.foreign is not None:
                events.append(Event(-1, -self.foreign.at(n)))
            kept = []
            for rule, lasting in self.temporaries:
                event = made(rule, n, events)
                kept.append(event) if lasting else freed(event, events)
            for i, rule in enumerate(self.carried):
                if self.replaced_first and index:
                    freed(carried[i], events)
                new = made(rule, n, events)
                if index and not self.replaced_first:
                    freed(carried[i], events)
                carried[i:] = [new, *carried[i + 1 :]]
            for rule, members in zip(self.growing, lists, strict=True):
                members.append(made(rule, n, events))
            for rule in self.gradients:
                gradient = made(rule, n, events)
                gradients.append(gradient) if index == 0 else freed(gradient, events)
            for event in reversed(kept):
                freed(event, events)
            phases.append(Phase(LATER if index else FIRST, tuple(events)))
        last: list[Event] = []
        for rule in self.optimizer:
            freed(made(rule, split[-1], last), last)
        ended = [*gradients, *(member for members in lists for member in members)]
        for event in [*ended, *(carried if self.carried_end else [])]:
            freed(event, last)
        phases.append(Phase(OPTIMIZER, tuple(last)))
        return phases

    def program(self, at: int = 5) -> StepProgram:
        """The step program that lifting should come to, without lifting."""
        phases = self.events((at, at))
        order = {FIRST: self._micro_batch_rules(), LATER: self._micro_batch_rules(), OPTIMIZER: self.optimizer}
        steps = {}
        for phase in phases:
            rules = iter(order[phase.name])
            steps[phase.name] = tuple(Step(e.block, next(rules) if e.bytes > 0 else None, 0) for e in phase.events)
        made = [[e.block for e in phase.events if e.bytes > 0] for phase in phases]
        place = len(self.temporaries)
        successors = {made[0][place + i]: made[1][place + i] for i in range(len(self.carried))}
        return StepProgram(at, (), steps, successors)

    def _micro_batch_rules(self) -> tuple[Rule, ...]:
        return (*(rule for rule, _ in self.temporaries), *self.carried, *self.growing, *self.gradients)


def random_rule(rng: random.Random, scale: int = 1) -> Rule:
    """Constant, proportional, affine or quadratic."""
    kind = rng.randrange(4)
    if kind == 0:
        return Rule(rng.randint(1, 4000) * scale)
    if kind == 1:
        return Rule(0, per_sample=rng.randint(1, 400) * scale)
    if kind == 2:
        return Rule(rng.randint(1, 2000) * scale, per_sample=rng.randint(1, 300) * scale)
    return Rule(0, per_pair=rng.randint(1, 40) * scale)


def random_truth(rng: random.Random, *, scale: int = 1) -> Truth:
    """A small step program."""

    def some(most: int) -> tuple[Rule, ...]:
        return tuple(random_rule(rng, scale) for _ in range(rng.randint(0, most)))

    return Truth(
        temporaries=tuple((random_rule(rng, scale), rng.random() < 0.7) for _ in range(rng.randint(1, 3))),
        gradients=tuple(Rule(rng.randint(1, 4000) * scale) for _ in range(rng.randint(0, 2))),
        carried=some(1),
        carried_end=rng.random() < 0.5,
        replaced_first=rng.random() < 0.5,
        growing=some(1),
        optimizer=some(1),
        foreign=random_rule(rng, scale) if rng.random() < 0.2 else None,
    )


@st.composite
def truths(draw: st.DrawFn, scale: int = 1) -> Truth:
    """Step programs, of a size that shrinks to little."""
    return random_truth(draw(st.randoms(use_true_random=False)), scale=scale)


def traced(phases: Iterable[Phase]) -> list[Traced]:
    """Phases as `Truth.window` gives them."""
    return [(phase.name, event.bytes) for phase in phases for event in phase.events]


@dataclass(frozen=True)
class Recorded:
    """Recordings of a real model: see data/make_programs.py."""

    name: str
    first_step_events: tuple[Event, ...]
    recordings: tuple[Recording, ...]


def recorded_programs(most: int = 20) -> list[Recorded]:
    """The recordings of real torch models, the first `most` of 200."""
    found = json.loads(lzma.decompress(RECORDED.read_bytes()))[:most]
    return [
        Recorded(
            entry["name"],
            tuple(_events([("prelude", entry["prelude"])])[0].events),
            tuple(Recording(each["micro_batch"], tuple(_events(each["phases"])), 2) for each in entry["recordings"]),
        )
        for entry in found
    ]


def _events(phases: Iterable[tuple[str, list[Any]]]) -> list[Phase]:
    sizes: dict[int, int] = {}
    named = foreign = 0
    made: list[Phase] = []
    for name, numbers in phases:
        events = []
        for number in numbers:
            if isinstance(number, list):
                foreign -= 1
                events.append(Event(foreign, -number[0]))
            elif number > 0:
                named += 1
                sizes[named] = number
                events.append(Event(named, number))
            else:
                events.append(Event(-number, -sizes[-number]))
        made.append(Phase(name, tuple(events)))
    return made


def made_up_plan(**changes: Any) -> Plan:
    """A plan with every field set, none to its default."""
    mib = 2**20
    fields: dict[str, Any] = {
        "target_batch": 512,
        "world_size": 2,
        "micro_batch": 52,
        "accumulation_steps": 5,
        "split": (52, 51, 51, 51, 51),
        "largest_micro_batch": 57,
        "largest_is_capped": True,
        "budget": Budget(
            2000 * mib,
            2100 * mib,
            100 * mib,
            (BudgetItem("asked", 2100 * mib, "you named it"), BudgetItem("headroom", 1, "5%")),
            "asked",
        ),
        "baseline_bytes": 300 * mib,
        "input_bytes": 12 * mib,
        "history_bytes": 0,
        "predicted_peak_bytes": 1900 * mib,
        "measured_peak_bytes": 1910 * mib,
        "resident_peak_bytes": 1700 * mib,
        "host_bytes": 5 * mib,
        "host_limit_bytes": 64 * mib,
        "moved_bytes_per_sample": 4096,
        "moved_parts": 12,
        "moved_bytes": 6 * mib,
        "stayed_bytes": 2 * mib,
        "recomputes": True,
        "recomputed_bytes": 5 * mib,
        "spared_bytes": 4 * mib,
        "phases": {"first": 1700 * mib, "later": 1900 * mib, "optimizer": 900 * mib, "between": 700 * mib},
        "binding_constraint": "later micro-batch, a new process",
        "loss_average": "samples",
        "exactness": "exact (tested on 8 samples)",
        "peaks": (
            PeakRow(52, 1388 * mib, 1588 * mib, 588 * mib, 388 * mib),
            PeakRow(64, 1900 * mib, 2100 * mib, 600, 1),
        ),
        "signature": (LeafForm("[0]", "torch.float32", (3, 32, 32)), LeafForm("[1]", "torch.int64", ())),
        "fingerprint": {"model": "Net 0123", "optimizer": "AdamW", "torch": "2.14.1"},
        "device_name": "cpu",
        "method": "replayed",
        "mmap_threshold_bytes": 131072,
        "malloc": "fixed",
        "kernel_time_fraction": 0.125,
        "window_seconds": 1.5,
        "recordings": (RecordingNote(5, 2, 0.25, 50 * mib, None), RecordingNote(29, 2, 0.5, 500 * mib, 501 * mib)),
        "reasons": {
            name: f"a reason for {name}"
            for name in (
                "accumulation_steps",
                "split",
                "largest_micro_batch",
                "baseline_bytes",
                "input_bytes",
                "history_bytes",
                "budget_bytes",
                "malloc_overhead",
                "method",
                "measured_peak_bytes",
            )
        },
        "notes": ("Assumed: nothing.",),
        "malloc_overhead": 0.25,
        "min_micro_batch": 2,
        "samples_per_group": 2,
        "is_virtual": True,
        "retries": (2, 1, 0),
        "allocated_peak_bytes": 1700 * mib,
        "this_process_peak_bytes": 1801 * mib,
        "plain_loop_peak_bytes": 1999 * mib,
        "varied_peak_bytes": 1925 * mib,
        "segments": (SegmentRow(400 * mib, 3), SegmentRow(20 * mib, 9)),
        "keeps_workspaces": True,
        "largest_without_retries": 55,
        "largest_with_expandable_segments": 58,
        "workload": "train.py:workload",
        "planning_seconds": 12.5,
        "sample_bytes": 2048,
        "max_micro_batch": 60,
        "max_tokens": 26_624,
        "max_rows": 208,
        "composition": {"later": {"process": 290 * mib, "parameters": 10 * mib, "activations": 1600 * mib}},
        "timeline": (
            TimelinePart("first", 52, 4, (10 * mib, 1400 * mib)),
            TimelinePart("optimizer", 51, 2, (590 * mib,)),
        ),
        "timed_sizes": (TimedSize(26, 1.51, 3, (1.5, 1.51, 1.52)), TimedSize(52, 1.5, 3, (1.4, 1.5, 1.6))),
        "objective": "fastest",
        "environment": {"python": "3.11.7"},
        "configuration": {"precision": "bf16", "checkpointing": 2, "channels_last": False, "loader_workers": None},
        "growth_bytes": 3 * mib,
        "growth_where": "train.py:12",
    }
    return plan_of(fields | changes)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Plans that add up, with numbers of any size."""
    size = st.integers(1, 2**62)
    part = st.none() | st.floats(0, 1e12)
    ranks = draw(st.integers(1, 8))
    steps = draw(st.integers(1, 20))
    share = draw(st.integers(steps, 10**6))
    q, r = divmod(share, steps)
    split = (q + 1,) * r + (q,) * (steps - r)
    binds = draw(st.text())
    measured = draw(st.none() | size)
    budget = Budget(
        draw(size), draw(size), draw(st.integers(0, 2**62)), (BudgetItem(binds, draw(size), draw(st.text())),), binds
    )
    return made_up_plan(
        target_batch=share * ranks + draw(st.integers(1 - ranks, ranks - 1)),
        world_size=ranks,
        micro_batch=split[0],
        accumulation_steps=steps,
        split=split,
        largest_micro_batch=draw(size),
        largest_is_capped=draw(st.booleans()),
        budget=budget,
        baseline_bytes=draw(size),
        input_bytes=draw(size),
        history_bytes=draw(size),
        predicted_peak_bytes=draw(size),
        measured_peak_bytes=measured,
        resident_peak_bytes=measured if measured is None else draw(size),
        phases={name: draw(size) for name in draw(st.permutations(["first", "later", "optimizer"]))},
        peaks=tuple(PeakRow(*draw(st.tuples(size, size, size, size, size))) for _ in range(draw(st.integers(0, 4)))),
        exactness=draw(st.text()),
        loss_average=draw(st.text()),
        mmap_threshold_bytes=draw(st.none() | size),
        malloc=draw(st.sampled_from(["", "cached", "fixed", "default"])),
        kernel_time_fraction=draw(part),
        window_seconds=draw(part),
        recordings=(RecordingNote(draw(size), 2, 0.1, draw(size), draw(st.none() | size)),),
        notes=tuple(draw(st.lists(st.text(), max_size=3))),
        workload=draw(st.none() | st.text()),
        planning_seconds=draw(st.floats(0, 1e9)),
    )
