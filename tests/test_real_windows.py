"""Windows that were recorded on a real GPU: what fewer recordings say of more, and of the peak that was measured.

tests/data/h200_windows.json.xz: windows of two micro-batches on an NVIDIA H200 (torch 2.11.0, cuDNN 9.19), recorded
while three models of benchmarks/on_gpu/models.py were planned. The peaks beside them were measured in fresh processes
(benchmarks/results/2026-11-28-nvidia-h200-torch-2.11.0-on-gpu.jsonl).
"""

from __future__ import annotations

import json
import lzma
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from autoaccum.budget import Budget
from autoaccum.phases import LATER
from autoaccum.planning import schedule
from autoaccum.planning.evidence import Evidence
from autoaccum.planning.predictor_cuda import CudaPredictor
from autoaccum.planning.training_simulator import TrainingSimulator
from autoaccum.simulation import saturation
from autoaccum.simulation.cuda_allocator.allocator import EMPTY, CudaRules
from autoaccum.simulation.cuda_allocator.ties import LOWEST_ADDRESS
from autoaccum.simulation.from_verification import without_state
from autoaccum.simulation.program import Step, StepProgram, lift, window
from autoaccum.simulation.recording import Event, Phase, Recording, live_peak
from autoaccum.simulation.scaling import Rule

GIB, MIB = 1 << 30, 1 << 20
LSTM, UNET, RESNET = "lstm-fp32", "unet-bf16", "resnet50-fp32"
PARAMETER_BYTES = {LSTM: 15_839_744, UNET: 7_746_560, RESNET: 102_475_264}  # with buffers, as they were allocated


@cache
def recordings(name: str) -> dict[int, Recording]:
    text = lzma.decompress((Path(__file__).parent / "data" / "h200_windows.json.xz").read_bytes())
    found = {}
    for each in json.loads(text)[name]:
        phases = tuple(Phase(title, tuple(Event(*event) for event in events)) for title, events in each["phases"])
        found[each["micro_batch"]] = Recording(
            each["micro_batch"], phases, each["passes"], workspaces=frozenset(each["workspaces"])
        )
    return found


def evidence_of(name: str, *sizes: int) -> Evidence:
    """What planning knew after it recorded its first window and these sizes."""
    recorded = recordings(name)
    first = recorded[min(recorded)]
    found = Evidence(first_step=first, small_recording=without_state(first))
    found.first_step_events = tuple(event for phase in first.phases for event in phase.events)
    found.set_recordings([recorded[size] for size in sizes])
    return found


def model_events(name: str) -> tuple[Event, ...]:
    """The model's blocks: gradients have the parameters' sizes, in the order in which backward reached them."""
    first = recordings(name)[min(recordings(name))]
    sizes = [event.bytes for event in first.phases[0].events if event.bytes > 0]
    freed = {event.block for event in first.phases[0].events if event.bytes < 0}
    kept = [event.bytes for event in first.phases[0].events if event.bytes > 0 and event.block not in freed]
    assert len(kept) < len(sizes)
    rest = PARAMETER_BYTES[name] - sum(kept)
    assert abs(rest) < MIB  # buffers, and 512 bytes of rounding each
    return tuple(Event((1 << 50) + index, size) for index, size in enumerate(reversed(kept)))


def rules() -> CudaRules:
    found = CudaRules.from_snapshot({}, device_bytes=150_110_011_392, version=(2, 11))
    return replace(found, tie_rule=LOWEST_ADDRESS, addresses_down=True)


def predictor(name: str, limit_bytes: int, *sizes: int) -> CudaPredictor:
    budget, asked = Budget(limit_bytes, limit_bytes, 0, (), "asked"), SimpleNamespace(histories=("new_process",))
    made: Any = CudaPredictor
    return made(None, asked, evidence_of(name, *sizes), 0, budget, 0, model_events=model_events(name), rules=rules())  # type: ignore[no-any-return]


def large(phase: Phase) -> Counter[int]:
    return Counter(event[1] for event in phase.events if event[1] > 24 * MIB)


def test_a_recurrent_nets_workspaces_follow_from_two_small_recordings_and_one_large_one() -> None:
    """Their parts are aligned, so the slope between two sizes isn't a whole number of bytes."""
    recorded = recordings(LSTM)
    program = lift([recorded[7], recorded[11], recorded[577]])
    for n in (1154, 1270):
        (phase,) = (each for each in recorded[n].phases if each.name == LATER)
        real, said = large(phase), large(window(program, (n, n))[1])
        assert sum(real.values()) > 10
        for one, other in zip(sorted(real.elements()), sorted(said.elements()), strict=True):
            assert other == pytest.approx(one, abs=512)
        assert live_peak(window(program, (n, n))) == pytest.approx(live_peak(recorded[n].phases), rel=1e-3)


def test_the_peak_is_what_a_fresh_process_reserved() -> None:
    simulator = TrainingSimulator(evidence_of(LSTM, 7, 11, 577), model_events(LSTM), rules(), EMPTY)
    found = simulator.replay((1171, 1171, 1170), 8 * GIB)
    assert found.fits and not any(found.retries)
    assert found.peak_reserved_bytes == pytest.approx(7_577_010_176, rel=1e-3)  # it was 9.4 % too low


def test_the_peak_is_what_a_fresh_process_reserved_at_its_limit() -> None:
    simulator = TrainingSimulator(evidence_of(RESNET, 11, 13, 43, 113), model_events(RESNET), rules(), EMPTY)
    found = simulator.replay((128, 128, 128), 12 * GIB, kept=True)
    assert found.fits and found.retries[:3] == (1, 0, 0)  # as on the card
    assert found.peak_allocated_bytes == pytest.approx(11_473_395_604, rel=3e-3)
    assert found.peak_reserved_bytes == pytest.approx(12_540_968_960, rel=1e-2)  # what a retry left of the cache


def test_copies_to_channels_last_confirm_a_workspaces_law_at_two_recordings() -> None:
    """A U-Net's kernels change between 7 and 47 samples: what a third recording would confirm, its tensors do."""
    recorded = recordings(UNET)
    real = large(recorded[89].phases[1])
    known = large(window(lift([recorded[5], recorded[7], recorded[47]]), (89, 89))[1])
    assert sum((real & known).values()) >= 0.8 * sum(real.values())
    peaks = [
        TrainingSimulator(evidence_of(UNET, *sizes), model_events(UNET), rules(), EMPTY).replay((103,) * 3, None)
        for sizes in ((5, 7, 47), (5, 7, 47, 89))
    ]
    assert peaks[0].peak_reserved_bytes == peaks[1].peak_reserved_bytes == 12_316_573_696  # was 6.6 % too low


@pytest.mark.parametrize("sizes", [(11, 577), (7, 11, 577), (11, 577, 1154)])
def test_what_ran_out_of_memory_on_the_card_is_not_recorded(sizes: tuple[int, ...]) -> None:
    """With 7 samples left out nothing confirms the law of the workspaces, 887 MB each at 577 samples."""
    found = predictor(LSTM, 8 * GIB, *sizes)
    reserved = found.replayed((1270, 1270), "new_process", None).peak_reserved_bytes
    assert reserved == pytest.approx(8_241_807_360, rel=0.02)
    assert not found.is_sure_to_fit(1553)
    assert not found.fits((1553, 1553)) and not found.fits_surely((1553, 1553))
    assert found.is_sure_to_fit(1223) and found.fits_surely((1223, 1223))


def steady(size: int, n: int, *rules: Rule) -> StepProgram:
    """A program of one phase, whose blocks follow rules; the first stands at a size."""
    steps = tuple(Step(index + 1, rule, 0) for index, rule in enumerate((Rule(size), *rules)))
    return StepProgram(n, (), {LATER: steps}, {})


def test_what_was_seen_once_or_saturated_may_grow_where_a_recording_has_to_fit() -> None:
    guess, ended = Rule(64 * MIB, is_guess=True), Rule(0, per_sample=MIB, unit_bytes=MIB, max_bytes=32 * MIB)
    small = Rule(1000, is_guess=True)
    known = steady(100 * MIB, 40, Rule(0, per_sample=MIB), small)
    assert saturation.grown_on(known, ended=True) is None

    def grown(rule: Rule, *, all_of_it: bool) -> int:
        found = saturation.grown_on(steady(100 * MIB, 40, rule), ended=all_of_it)
        first, second = (step.rule for step in (found or steady(100 * MIB, 40, rule)).phases[LATER])
        assert first == Rule(100 * MIB) and second is not None
        assert second.at(40) == rule.at(40)
        return second.at(60)

    assert grown(guess, all_of_it=False) == grown(guess, all_of_it=True) == 96 * MIB
    assert grown(ended, all_of_it=False) == 32 * MIB and grown(ended, all_of_it=True) == 48 * MIB


def test_where_the_wanted_size_may_not_fit_a_smaller_one_is_recorded() -> None:
    sure = {n: n <= 1300 for n in range(3000)}
    evidence: Any = SimpleNamespace(recordings=[recordings(LSTM)[577]])
    asked = list[int]()

    def allowed(_: Any, n: int) -> bool:
        asked.append(n)
        return sure[n]

    none: Any = None
    recorder = schedule.Recorder(none, evidence, none, allowed, 1)
    assert 1153 <= recorder._sure_size(1553) <= 1300
    assert recorder._sure_size(1291) == 1291 and recorder._sure_size(500) == 500
    sure.clear()
    sure.update(dict.fromkeys(range(3000), False))
    asked.clear()
    assert recorder._sure_size(1553) == 0 and len(asked) <= 1 + schedule.SURE_SIZE_TRIES
