"""Define `Plan`: eight sections, properties and JSON. No torch here."""

from __future__ import annotations

import html
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Sized
from dataclasses import asdict, dataclass, field, replace
from importlib import import_module
from typing import Any

from ..files.json_text import to_json
from ..units import show_bytes
from .entries import RankEntry, window_peak_bytes
from .sections import (
    KIND,
    SCHEMA_VERSION,
    DeviceSection,
    DistributionSection,
    EvidenceSection,
    MemorySection,
    ProvenanceSection,
    RequestSection,
    ScheduleSection,
    TimingSection,
)


@dataclass(frozen=True)
class Plan:
    """How to train an effective batch on one device.

    Attributes:
        request: The question: target batch, ranks, limits, objective.
        schedule: The micro-batches of an optimizer step.
        memory: Budget and predicted peaks, in bytes.
        evidence: Recordings, the verification run's measurements, exactness.
        timing: Measured times.
        provenance: Workload, versions, reasons and notes.
        device: The device, and the settings that the plan depends on.
        distribution: The ranks that share the target; left out of the JSON where there is one process.
        schema_version: Version of the JSON form.
    """

    request: RequestSection
    schedule: ScheduleSection
    memory: MemorySection
    evidence: EvidenceSection
    timing: TimingSection
    provenance: ProvenanceSection
    device: DeviceSection
    distribution: DistributionSection = field(default_factory=DistributionSection)
    schema_version: int = SCHEMA_VERSION

    @property
    def target_batch(self) -> int:
        """Samples in an optimizer step, over all ranks."""
        return self.request.target_batch

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.request.world_size

    @property
    def ranks(self) -> tuple[RankEntry, ...]:
        """Each rank's part, by rank; empty for one process."""
        return self.distribution.ranks

    @property
    def shares(self) -> tuple[int, ...]:
        """Samples of each rank in an optimizer step, by rank."""
        if self.ranks:
            return tuple(entry.samples for entry in self.ranks)
        size, larger = divmod(self.target_batch, self.world_size)
        return (size + 1,) * larger + (size,) * (self.world_size - larger)

    @property
    def parallel(self) -> str:
        """How the model is trained over ranks: "ddp", "bare", "fsdp" or "single"."""
        return self.distribution.parallel

    @property
    def micro_batch(self) -> int:
        """The largest micro-batch of the split, in samples."""
        return self.schedule.micro_batch

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches in an optimizer step."""
        return self.schedule.accumulation_steps

    @property
    def split(self) -> tuple[int, ...]:
        """Samples in each micro-batch of this rank, largest first."""
        return self.schedule.split

    @property
    def largest_micro_batch(self) -> int:
        """The largest micro-batch of which a window of two or more fits."""
        return self.schedule.largest_micro_batch

    @property
    def budget_bytes(self) -> int:
        """Memory that the whole process may use."""
        return self.memory.budget.bytes

    @property
    def predicted_peak_bytes(self) -> int:
        """Predicted peak of the window, baseline and inputs included."""
        return self.memory.predicted_peak_bytes

    @property
    def measured_peak_bytes(self) -> int | None:
        """Peak of the verification run; None unless verified."""
        return self.evidence.measured_peak_bytes

    @property
    def exactness(self) -> str:
        """Result of testing whether the window's gradient is the large batch's."""
        return self.evidence.exactness

    @property
    def method(self) -> str:
        """How peaks were predicted: "replayed" or "bracketed"."""
        return self.evidence.method

    @property
    def notes(self) -> tuple[str, ...]:
        """Further remarks for the reader."""
        return self.provenance.notes

    @property
    def on_cuda(self) -> bool:
        """Whether bytes are a CUDA device's reserved bytes, not committed ones."""
        return self.device.name != "cpu"

    @property
    def verified(self) -> bool:
        """Whether the plan's window was run and its peak was as predicted."""
        return self.measured_peak_bytes is not None

    def entry(self) -> RankEntry:
        """Return this plan's own part, as one rank's."""
        return RankEntry(
            device=self.device.name,
            split=self.split,
            predicted_peak_bytes=self.predicted_peak_bytes,
            budget_bytes=self.budget_bytes,
            largest_micro_batch=self.largest_micro_batch,
            measured_peak_bytes=self.measured_peak_bytes,
            window_seconds=self.timing.window_seconds,
        )

    def for_rank(self, rank: int) -> Plan:
        """Return the plan with one rank's own split and peaks.

        A file has the first rank's. What else the plan says, its table of peaks above all, stays as it is.
        """
        if not self.ranks or self.ranks[rank] == self.entry():
            return self
        entry, phases = self.ranks[rank], self.memory.phases
        schedule = replace(
            self.schedule,
            micro_batch=entry.micro_batch,
            accumulation_steps=entry.accumulation_steps,
            split=entry.split,
            largest_micro_batch=entry.largest_micro_batch,
        )
        memory = replace(
            self.memory,
            predicted_peak_bytes=entry.predicted_peak_bytes,
            phases=phases,
            budget=replace(self.memory.budget, bytes=entry.budget_bytes),
        )
        return replace(self, schedule=schedule, memory=memory)

    def fewer_steps_need(self) -> tuple[int, int] | None:
        """Return what one accumulation step fewer would need.

        Returns:
            Its largest micro-batch, and the peak of its window in bytes; None if there are no fewer steps, or if the
            table of peaks lacks that size.
        """
        memory, samples, steps = self.memory, sum(self.split), self.accumulation_steps - 1
        size = -(-samples // steps) if steps else 0
        rows = {row.micro_batch: row for row in memory.peaks}
        if size not in rows:
            return None
        smallest, larger = divmod(samples, steps)
        first = rows[size]
        second, last = rows.get(smallest if larger == 1 else size, first), rows.get(smallest, first)
        training = memory.input_bytes + memory.history_bytes + window_peak_bytes(first, second, last, steps)
        return size, memory.baseline_bytes + int((1 + memory.malloc_overhead) * training)

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain values: dicts, lists, strings, numbers, None."""
        found: dict[str, Any] = json.loads(self.to_json())
        return found

    def to_json(self) -> str:
        """Return the plan as JSON, for `Plan.load` and for other tools."""
        values = asdict(self)
        if self.distribution == DistributionSection():
            del values["distribution"]
        return _folded(to_json({"kind": KIND, **values}, indent=2)) + "\n"

    def batch_sampler(
        self, dataset: Sized, *, shuffle: bool = True, seed: int = 0, rank: int = 0, drop_last: bool = False
    ) -> Iterable[list[int]]:
        """Return a DataLoader's `batch_sampler` that yields this plan's micro-batches.

        Args:
            dataset: The map-style dataset; only its length is read.
            shuffle: Whether each epoch has another order; `set_epoch(n)` chooses the epoch.
            seed: Seed of the order, the same on all ranks.
            rank: This process's rank, of `world_size`.
            drop_last: Whether an incomplete last window is left out; needed with several ranks.

        Returns:
            A `PlanBatchSampler` (data/batch_sampler.py).

        Raises:
            UsageError: The rank is invalid, or several ranks would train unequal last windows.
        """
        made = import_module("autoaccum.data.batch_sampler").PlanBatchSampler  # by name: torch is loaded there
        found: Iterable[list[int]] = made(
            self, len(dataset), shuffle=shuffle, seed=seed, rank=rank, drop_last=drop_last
        )
        return found

    @classmethod
    def from_json(cls, text: str, *, source: str = "the plan") -> Plan:
        """Read the output of `to_json`.

        Args:
            text: The JSON.
            source: The text's name in error messages.

        Raises:
            PlanFileError: It is truncated, foreign, of another schema version, or inconsistent.
        """
        from .reader import read_plan

        return read_plan(text, source, cls)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read a plan file.

        Raises:
            PlanFileError: It is missing, truncated, foreign, of another schema version, or inconsistent.
        """
        from .reader import load_plan

        return load_plan(path, cls)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan file, whole or not at all.

        Raises:
            UsageError: The file cannot be written.
        """
        from ..files.whole import write_whole

        write_whole(path, self.to_json().encode())

    def explain(self) -> str:
        """Return how each number was derived, and what fewer steps need."""
        # By name: reports are built on plans, so this room imports nothing from there.
        text: str = import_module("autoaccum.reporting.explain").explain(self)
        return text

    def __str__(self) -> str:
        text: str = import_module("autoaccum.reporting.explain").summary(self)
        return text

    def __repr__(self) -> str:
        sizes = " + ".join(f"{times} x {size}" for size, times in Counter(self.split).items())
        peak, budget = show_bytes(self.predicted_peak_bytes), show_bytes(self.budget_bytes)
        return f"<Plan for {self.device.name}: {self.target_batch} samples as {sizes}, peak {peak} of {budget}>"

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(self.explain())}</pre>"


_INNERMOST = re.compile(r"[\[{]\n[^\[\]{}]*?\n *[\]}]")


def _folded(text: str) -> str:
    """Fold the innermost lists and objects of indented JSON into lines.

    A line break within a string is written as an escape, so that nothing inside a string is folded.
    """
    return _INNERMOST.sub(lambda match: re.sub(r"\n *", " ", match[0]), text)
