"""Golden plans: from stored recordings to plans, without a model, a GPU or this machine's memory having a say.

    python -m tests.golden --write [--virtual]

writes what the plans come to now (with `--virtual` also two whole plans on the virtual GPU), to be committed where a
number was changed on purpose. Numbers and words are two files: numbers by names of their own, so that other words for
them, or other names of a plan's fields, hide nothing. Recordings are made by `tests.data.make_golden`.
"""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from autoaccum.budget import Budget, BudgetItem
from autoaccum.devices.cpu.device import CpuDevice
from autoaccum.devices.cpu.page_cache import MallocSetting
from autoaccum.devices.cuda.device import CudaDevice
from autoaccum.errors import DoesNotFit
from autoaccum.phases import BETWEEN, BUILD, FIRST, LATER, OPTIMIZER
from autoaccum.plan import Plan, RecordingNote, TimedSize
from autoaccum.planning import build_plan, verify
from autoaccum.planning.evidence import Evidence
from autoaccum.planning.predictor_cpu import DEFAULT_MALLOC_OVERHEAD, CpuPredictor
from autoaccum.planning.predictor_cuda import CudaPredictor
from autoaccum.planning.resolved_request import ResolvedRequest
from autoaccum.planning.target import RecordingTarget
from autoaccum.planning.timing import Times
from autoaccum.simulation.breakdown import CATEGORIES
from autoaccum.simulation.cuda_allocator.allocator import CudaRules
from autoaccum.simulation.cuda_allocator.snapshot import AllocatorState, CudaBlock, CudaSegment
from autoaccum.simulation.malloc import HeapState
from autoaccum.simulation.recording import Event, Phase, Recording
from autoaccum.window import step
from autoaccum.workload import Workload

FOLDER = Path(__file__).parent / "data" / "golden"
NUMBERS, WORDS, WHOLE = (FOLDER / f"{name}.json.gz" for name in ("numbers", "words", "virtual"))
MiB = 1 << 20
PHASE_NAMES = {BUILD: "build", FIRST: "first", LATER: "later", OPTIMIZER: "optimizer", BETWEEN: "between"}
_KINDS = "process parameters workspaces state gradients activations temporaries data cached"
KIND_NAMES = dict(zip(CATEGORIES, _KINDS.split(), strict=True))
Flat = dict[str, Any]


# -- recordings as JSON


def flat(events: tuple[Event, ...]) -> list[int]:
    """Events as one list: block, bytes, stream, block, ..."""
    return [number for event in events for number in event]


def flat_recording(recording: Recording) -> Flat:
    """A recording as JSON has it; what it took is left out."""
    phases = [[phase.name, flat(phase.events)] for phase in recording.phases]
    kept = sorted(recording.workspaces)
    return {"micro_batch": recording.micro_batch, "passes": recording.passes, "phases": phases, "workspaces": kept}


def read_events(numbers: list[int]) -> tuple[Event, ...]:
    """What `flat` wrote."""
    return tuple(map(Event, numbers[::3], numbers[1::3], numbers[2::3]))


def read_recording(data: Flat) -> Recording:
    """What `flat_recording` wrote."""
    phases = tuple(Phase(name, read_events(numbers)) for name, numbers in data["phases"])
    kept = frozenset(data["workspaces"])
    return Recording(data["micro_batch"], phases, data["passes"], seconds=1.0, workspaces=kept)


def read_start(segments: list[list[Any]]) -> AllocatorState:
    """What a caching allocator held when its model had been recorded."""
    return AllocatorState(tuple(CudaSegment(*s[:5], tuple(CudaBlock(*block) for block in s[5])) for s in segments))


def read_source(name: str) -> Flat:
    """A model's recordings, and what else planning knows of it."""
    found: Flat = read_json(FOLDER / f"{name}.json.gz")
    return found


def read_json(path: Path) -> Any:
    """A file of JSON that was compressed."""
    return json.loads(gzip.decompress(path.read_bytes()))


# -- questions


@dataclass(frozen=True)
class Question:
    """What is asked of a model's recordings.

    Attributes:
        source: The model's name.
        setting: "cached", "fixed" or "default" malloc on the CPU; the allocator's settings on CUDA.
        target: Samples in an optimizer step; None for one micro-batch, the largest that fits.
        room: MiB of the budget above the base.
        least: The smallest micro-batch allowed.
        most: The largest.
        measured: Whether a verification is made up that took what was predicted.
        timed: Whether smaller sizes have made-up times.
    """

    source: str
    setting: str
    target: int | None
    room: int
    least: int = 1
    most: int = 1 << 20
    measured: bool = False
    timed: bool = False

    @property
    def name(self) -> str:
        limits = f" of {self.least} to {self.most}" if self.least > 1 or self.most < 1 << 20 else ""
        more = " measured" * self.measured + " timed" * self.timed
        return f"{self.source}, {self.setting or 'as it comes'}, {self.target}{limits} in {self.room} MiB{more}"


def questions() -> Iterator[Question]:
    """The grid, model by model and setting by setting."""
    for setting in ("fixed", "default"):
        yield from (Question("mlp", setting, target, room) for target, room in ((1000, 90), (1, 88)))
        yield from (Question("transformer", setting, target, room) for target, room in ((64, 100), (97, 45), (200, 61)))
        yield Question("transformer", setting, 29, 52)
        yield Question("transformer", setting, None, 80, most=60)
    yield Question("mlp", "default", 4096, 96)
    yield Question("mlp", "fixed", None, 90, most=2000)
    yield Question("transformer", "default", 300, 70)
    yield Question("transformer", "fixed", 1000, 90)
    yield Question("mlp", "fixed", 777, 76, measured=True, timed=True)
    yield Question("mlp", "fixed", 900, 80, least=16, most=256)
    yield Question("mlp", "fixed", 100, 12)
    yield Question("mlp", "fixed", 1597, 79)
    yield Question("mlp", "default", 1597, 91, measured=True)
    yield Question("transformer", "fixed", 300, 52, measured=True)
    yield Question("transformer", "fixed", 512, 19)
    yield Question("transformer", "fixed", 37, 70, least=2, timed=True)
    yield from (Question("mlp", "cached", target, room) for target, room in ((1000, 90), (1, 88), (900, 80)))
    yield from (Question("transformer", "cached", target, room) for target, room in ((64, 100), (97, 45), (512, 19)))
    yield Question("mlp", "cached", 777, 76, measured=True, timed=True)
    for setting in ("expandable_segments:True", "roundup_power2_divisions:4", "max_split_size_mb:24"):
        yield Question("llama", setting, 64, 333)
        yield Question("cnn", setting, 160, 215)
    collected = "garbage_collection_threshold:0.6,per_process_memory_fraction:0.5"
    yield Question("llama", collected, 40, 280)
    yield Question("cnn", collected, 300, 260)
    yield Question("llama", "", 60, 250, measured=True)
    yield Question("llama", "", 16, 90)
    yield Question("cnn", "", 256, 400)
    yield Question("cnn", "", None, 300, least=2, most=200)
    yield Question("cnn", "", 500, 222, least=2, measured=True)
    yield Question("cnn", "", 50, 20)


# -- answers


def observed_of(data: Flat, setting: str) -> Evidence:
    """What was recorded, as planning knows it; for one setting, since replays are remembered there."""
    first = read_recording(data["first_step"])
    evidence = Evidence(
        first_step=first, first_step_events=tuple(event for phase in first.phases for event in phase.events)
    )
    evidence.set_recordings(map(read_recording, data["recordings"]))
    evidence.notes = [RecordingNote(n, passes, 1.0, took, said) for n, passes, took, said in data["notes"]]
    evidence.unrecorded_bytes = 0 if setting == "default" else data["unrecorded_bytes"]
    return evidence


class Plain(torch.optim.Optimizer):
    """No real optimizer: making torch's first one loads its compiler, which takes a second."""

    def __init__(self, parameters: Any) -> None:
        self.param_groups, self.state = [{"params": list(parameters)}], {}


def subject_of(data: Flat, setting: str) -> RecordingTarget:
    """A stand-in for what was recorded: a model of one tensor with as many bytes, and a sample of any form."""
    model = torch.nn.Module()
    model.weight = torch.nn.Parameter(torch.empty(data["parameter_bytes"] // 4, device="meta"))
    sample = torch.zeros(2, 1), torch.zeros(2, 1)
    work = Workload(torch.nn.Linear(1, 1), sample, optimizer=Plain)
    context = replace(step.open_context(work), model=model, device=torch.device(data["device"]))
    threshold = data["mmap_threshold_bytes"] if setting != "default" else None
    device: CpuDevice | CudaDevice = (CpuDevice if data["device"] == "cpu" else CudaDevice)(context.device)
    if isinstance(device, CpuDevice):
        device.setting = MallocSetting(setting, threshold)
    return RecordingTarget(context, work, device, threshold)


def outlook_of(question: Question, data: Flat, evidence: Evidence) -> CpuPredictor | CudaPredictor:
    """What planning knows when it solves."""
    setting, base, total = question.setting, data["base_bytes"], data["base_bytes"] + question.room * MiB
    budget = Budget(
        total, total, 0, (BudgetItem("asked", total, "you named it"), BudgetItem("headroom", 0, "none")), "asked"
    )
    most = min(question.most, question.target or question.most)
    request = ResolvedRequest(question.target, question.target, 1, None, None, question.least, most)
    subject = subject_of(data, setting)
    if data["device"] == "cpu":
        overhead = DEFAULT_MALLOC_OVERHEAD if setting == "default" else 0.0
        new, this = map(HeapState, data["holes"])
        sample = data["sample_bytes"]
        return CpuPredictor(subject, request, evidence, base, budget, sample, overhead, new, this, data["own_bytes"])
    rules = CudaRules.from_settings(setting, device_bytes=2 * total)
    start, build = read_start(data["start"]), read_events(data["build"])
    return CudaPredictor(subject, request, evidence, base, budget, data["sample_bytes"], 0.0, build, start, rules)


def plan_of(question: Question, data: Flat, evidence: Evidence) -> Plan:
    """The plan that answers a question.

    Raises:
        DoesNotFit: Nothing does.
    """
    predictor = outlook_of(question, data, evidence)
    solution, _ = verify.solve_and_verify(predictor, lambda: None, verify=False, compiles=False)
    measured, timed = None, Times((), "not timed")
    if question.measured:
        took = predictor.peak_bytes(solution.split, "this_process")
        present = predictor.baseline_bytes + getattr(predictor, "inside_bytes", 0)  # on a CPU
        on_cpu = {"increment_bytes": took - present, "resident_bytes": took // 2, "system_share": 0.25}
        measured = SimpleNamespace(
            peak_bytes=took, allocated_bytes=took - MiB, retries=(0, 0, 0), seconds=2.5, recording=None, **on_cpu
        )
    if question.timed:
        sizes = sorted({1, solution.split[0] // 2, solution.split[0]})
        timed = Times(tuple(TimedSize(n, 1 + 1 / n, 6, (1 + 1 / n,) * 6) for n in sizes), "made up")
    named = mock.patch.object(torch.cuda, "get_device_name", lambda device: "a GPU")
    with named, mock.patch.object(torch.cuda.memory, "_snapshot", dict):
        plan = build_plan.plan(predictor, solution, measured, predictor.subject.workload, [], timed)
    return replace(plan, provenance=replace(plan.provenance, environment={}, fingerprint={}))


def answers() -> tuple[Flat, Flat]:
    """Numbers and words of all answers, by question."""
    numbers: Flat = {}
    words: Flat = {}
    sources = {name: read_source(name) for name in ("mlp", "transformer", "llama", "cnn")}
    known: dict[tuple[str, str], Evidence] = {}
    for question in questions():
        data = sources[question.source]
        key = question.source, question.setting
        if key not in known or question.setting.startswith("garbage"):  # a part of the budget's device
            known[key] = observed_of(data, question.setting)
        try:
            plan = plan_of(question, data, known[key])
        except DoesNotFit as error:
            numbers[question.name], words[question.name] = {"missing_bytes": error.missing_bytes}, str(error)
            continue
        numbers[question.name] = numbers_of(plan)
        words[question.name] = {"plan": json.loads(plan.to_json()), "explained": plan.explain().splitlines()}
    return numbers, words


def numbers_of(plan: Plan) -> Flat:
    """Every number of a plan by a name that stays, whatever the plan's own names become."""
    return {
        "target": plan.target_batch,
        "micro_batch": plan.micro_batch,
        "steps": plan.accumulation_steps,
        "split": list(plan.split),
        "largest": [plan.largest_micro_batch, plan.schedule.largest_is_capped],
        "largest_without_retries": plan.schedule.largest_without_retries,
        "largest_with_expandable_segments": plan.schedule.largest_with_expandable_segments,
        "limits": [
            plan.request.min_micro_batch,
            plan.request.max_micro_batch,
            plan.schedule.max_tokens,
            plan.schedule.max_rows,
        ],
        "budget": [plan.memory.budget.bytes, plan.memory.budget.limit_bytes, plan.memory.budget.headroom_bytes],
        "base": plan.memory.baseline_bytes,
        "data": plan.memory.input_bytes,
        "sample": plan.memory.sample_bytes,
        "history": plan.memory.history_bytes,
        "growth": plan.memory.growth_bytes,
        "slack": plan.memory.malloc_overhead,
        "mmap_threshold": plan.device.mmap_threshold_bytes,
        "predicted_peak": plan.predicted_peak_bytes,
        "predicted_here": plan.evidence.this_process_peak_bytes,
        "by_hand_peak": plan.memory.plain_loop_peak_bytes,
        "keeps_workspaces": plan.device.keeps_workspaces,
        "measured": [plan.measured_peak_bytes, plan.evidence.resident_peak_bytes, plan.evidence.allocated_peak_bytes],
        "measured_time": None
        if plan.device.is_virtual
        else [plan.timing.window_seconds, plan.timing.kernel_time_fraction],
        "retries": list(plan.memory.retries),
        "phases": {PHASE_NAMES[name]: size for name, size in plan.memory.phases.items()},
        "fewer_steps_need": list(plan.fewer_steps_need() or ()),
        "peaks": {
            str(row.micro_batch): [row.first_bytes, row.later_bytes, row.optimizer_bytes, row.between_bytes]
            for row in plan.memory.peaks
        },
        "composition": {
            PHASE_NAMES[name]: {KIND_NAMES[kind]: size for kind, size in context.items()}
            for name, context in plan.memory.composition.items()
        },
        "timeline": [[PHASE_NAMES[p.phase], p.micro_batch, p.events, list(p.bytes)] for p in plan.memory.timeline],
        "recordings": [
            [n.micro_batch, n.passes, n.measured_bytes, n.predicted_bytes] for n in plan.evidence.recordings
        ],
        "timed": [[t.micro_batch, t.step_seconds, t.windows, list(t.round_seconds)] for t in plan.timing.timed_sizes],
    }


# -- whole plans on the virtual GPU


WHOLE_PLANS = {"llama": ("t4", "40", "1GiB"), "cnn": ("a100-40gb", "300", "900MiB")}


def whole_plans() -> Flat:
    """Two plans by the command line, recorded, solved and verified on the virtual GPU: their numbers."""
    found: Flat = {"torch": str(torch.__version__)}
    with tempfile.TemporaryDirectory() as folder:
        for name, (gpu, target, memory) in WHOLE_PLANS.items():
            out = Path(folder) / f"{name}.json"
            source = f"{FOLDER.parent / 'make_golden.py'}:{name}"
            command = [sys.executable, "-m", "autoaccum", "plan", "--workload", source, "-o", str(out)]
            asked = ["--target-batch", target, "--gpu", gpu, "--memory", memory]
            subprocess.run([*command, *asked], check=True, capture_output=True, cwd=Path(__file__).parent.parent)
            found[name] = as_json(numbers_of(Plan.load(out)))
    return found


# -- differences


def as_json(value: Any) -> Any:
    """As it comes back from a file of JSON."""
    return json.loads(json.dumps(value))


def differences(old: Any, new: Any, path: str = "") -> Iterator[str]:
    """Each place where two trees of JSON differ: its path, what stands there in the one and in the other."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(key for key in new if key not in old)]:
            place = f"{path} / {key}" if path else key
            if key in old and key in new:
                yield from differences(old[key], new[key], place)
            else:
                what, value = ("is gone", old[key]) if key in old else ("is new", new[key])
                yield f"{place}: {what}: {json.dumps(value)[:200]}"
    elif isinstance(old, list) and isinstance(new, list):
        for index, (before, now) in enumerate(zip(old, new, strict=False)):
            yield from differences(before, now, f"{path}[{index}]")
        if len(old) != len(new):
            yield f"{path}: {len(old)} entries -> {len(new)}"
    elif old != new or type(old) is not type(new):
        yield f"{path}: {json.dumps(old)} -> {json.dumps(new)}"


def difference(old: Any, new: Any) -> str:
    """The first five places where two differ, and how many there are; "" where they are the same."""
    found = list(differences(old, new))
    return "\n".join([f"{len(found)} differences, golden -> now:", *found[:5]]) if found else ""


def main(options: list[str]) -> int:
    """Writes what plans come to now, and says what that changes."""
    if "--write" not in options:
        print(__doc__)
        return 2
    made = dict(zip((NUMBERS, WORDS), as_json(answers()), strict=True))
    if "--virtual" in options:
        made[WHOLE] = whole_plans()
        twice = difference(made[WHOLE], whole_plans())
        if twice:
            print(f"Two runs on the virtual GPU aren't alike: {twice}")
            return 1
    for path, value in made.items():
        text = difference(read_json(path), value) if path.exists() else "new"
        path.write_bytes(gzip.compress(json.dumps(value, separators=(",", ":")).encode(), mtime=0))
        print(f"{path.name}, {path.stat().st_size:,} bytes: {text or 'as before'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
