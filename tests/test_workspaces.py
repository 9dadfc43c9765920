"""Where cuBLAS's workspaces and what ran before lie in the caching allocator decides nothing: windows are alike.

A small language model stands for large ones: its logits are one block, of which the backward pass leaves a free one
behind just when cuBLAS wants its workspace. Each check on the virtual GPU is a process that runs this file; a line of
JSON is its answer, found in forks of it, so that each figure is one of a fresh process.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from allocator_text import KEEPS_WORKSPACES
from torch import nn

from autoaccum import Workload, fit_plan
from autoaccum.data.split import tile
from autoaccum.devices.virtual import VirtualGpu, available, launch
from autoaccum.phases import FIRST, LATER, OPTIMIZER
from autoaccum.simulation.breakdown import WORKSPACES, composition
from autoaccum.simulation.cuda_allocator.allocator import CudaRules
from autoaccum.simulation.from_verification import with_released_workspaces
from autoaccum.simulation.program import as_recorded
from autoaccum.simulation.recording import Event, Phase, Recording
from autoaccum.simulation.training_run import replay_training, training_of, with_kept_workspaces
from autoaccum.window import step

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.truth_search import forked

REASON = available()
MIB = 1 << 20
HISTORIES = ("fresh", "asked", "evaluated", "loop")
SIZES = (25, 40)


class Small(nn.Module):
    """A language model of one hidden layer."""

    def __init__(self, vocabulary: int = 12_000, hidden: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, hidden)
        self.hidden = nn.Linear(hidden, hidden)
        self.head = nn.Linear(hidden, vocabulary, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.hidden(self.embedding(ids))))


def loss(model: nn.Module, batch: Any) -> torch.Tensor:
    ids, goal = batch
    return F.cross_entropy(model(ids).flatten(0, 1).float(), goal.flatten())


def workload(precision: str | None = "bf16") -> Workload:
    ids = torch.zeros(4, 64, dtype=torch.long)
    return Workload(Small().cuda(), (ids, ids.clone()), loss=loss, precision=precision, clip_grad_norm=1.0)


def trained(history: str, n: int) -> dict[str, int]:
    """What four windows of two micro-batches take after something else was run in the process, or by another loop."""
    work = workload()
    context = step.open_context(work)
    piece = tile(work.sample, n)
    if history == "evaluated":
        with torch.no_grad():
            loss(work.model, tree_to(tile(work.sample, n // 2)))
    if history == "asked":
        context.loss_is_pair = False  # as if it had been: so a window of the others' asks once more than this one's
    torch.cuda.reset_peak_memory_stats()
    for _ in range(4):
        if history == "loop":
            loop(context, [piece] * 2)
        else:
            step.train_window(context, [piece] * 2, (n, n))
    state = [value for each in context.optimizer.state.values() for value in each.values() if value.is_cuda]
    held = sum(block.untyped_storage().nbytes() for block in [*work.model.parameters(), *state])
    return {"reserved": torch.cuda.max_memory_reserved(), "left": torch.cuda.memory_allocated() - held}


def tree_to(batch: Any) -> Any:
    return tuple(leaf.cuda() for leaf in batch)


def loop(context: step.TrainingContext, pieces: list[Any]) -> None:
    for piece in pieces:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            found = loss(context.model, tree_to(piece))
        (found / len(pieces)).backward()
    nn.utils.clip_grad_norm_(context.model.parameters(), 1.0)
    context.optimizer.step()
    context.optimizer.zero_grad()


def planned(n: int) -> dict[str, Any]:
    work = workload()
    plan = fit_plan(work, target_batch=2 * n, max_micro_batch=n, check=False)
    found = {
        "predicted_peak_bytes": plan.predicted_peak_bytes,
        "this_process_peak_bytes": plan.evidence.this_process_peak_bytes,
        "measured_peak_bytes": plan.measured_peak_bytes,
        "plain_loop_peak_bytes": plan.memory.plain_loop_peak_bytes,
        "split": plan.split,
    }
    context = step.open_context(work)
    torch.cuda.reset_peak_memory_stats()
    for _ in range(3):
        step.train_window(context, [tile(work.sample, n)] * 2, (n, n))
    return found | {"after planning": torch.cuda.max_memory_reserved(), "text": plan.explain()}


@pytest.fixture(scope="module")
def answers() -> dict[str, dict[str, Any]]:
    if REASON is not None:
        pytest.skip(REASON)
    process = launch(
        [sys.executable, __file__], VirtualGpu(memory_bytes=4 << 30, copies="zero"), stdout=subprocess.PIPE
    )
    out, _ = process.communicate(timeout=240)
    assert process.returncode == 0
    found: dict[str, dict[str, Any]] = json.loads(out.splitlines()[-1])
    return found


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.slow
def test_what_ran_before_changes_nothing(answers: dict[str, dict[str, Any]], n: int) -> None:
    found = answers[str(n)]
    assert found["fresh"] == found["asked"] == found["evaluated"]


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.slow
def test_a_window_reserves_no_more_than_a_loop(answers: dict[str, dict[str, Any]], n: int) -> None:
    found = answers[str(n)]
    assert found["fresh"]["reserved"] <= found["loop"]["reserved"]


@pytest.mark.slow
def test_a_window_reserves_less_where_a_workspace_would_keep_logits_from_their_place(
    answers: dict[str, dict[str, Any]],
) -> None:
    less = [found["fresh"]["reserved"] < 0.9 * found["loop"]["reserved"] for found in answers.values()]
    assert any(less) == KEEPS_WORKSPACES


@pytest.mark.slow
def test_nothing_is_left_but_parameters_and_state(answers: dict[str, dict[str, Any]]) -> None:
    for found in answers.values():
        assert found["fresh"]["left"] < MIB  # the window's loss; a workspace has 8 MiB
        assert (found["loop"]["left"] > 8 * MIB) == KEEPS_WORKSPACES


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.slow
def test_the_prediction_is_the_measurement_in_each_history(answers: dict[str, dict[str, Any]], n: int) -> None:
    found = answers[str(n)]
    plan = found["plan"]
    assert plan["split"] == [n, n]
    fresh, here = plan["predicted_peak_bytes"], plan["this_process_peak_bytes"]
    assert here == plan["measured_peak_bytes"] == plan["after planning"]
    assert fresh == found["fresh"]["reserved"]
    assert plan["plain_loop_peak_bytes"] == found["loop"]["reserved"]
    assert ("by hand" in plan["text"]) == (plan["plain_loop_peak_bytes"] != fresh)


# -- the same by values


def recorded(n: int = 7) -> Recording:
    """A window in which a workspace is made when the only free block is the logits'; the first block is a gradient."""
    logits, work, gradient = 3 * MIB * n, 8 * MIB, 12 * MIB
    first = (Event(2, logits), Event(1, gradient), Event(2, -logits), Event(3, work), Event(3, -work))
    later = (Event(5, logits), Event(4, gradient), Event(5, -logits), Event(6, work), Event(6, -work))
    phases = (
        Phase(FIRST, first),
        Phase(LATER, (*later, Event(4, -gradient))),
        Phase(OPTIMIZER, (Event(1, -gradient),)),
    )
    return Recording(n, phases, 2, workspaces=frozenset({3, 6}))


def test_by_hand_a_workspace_stays_in_the_logits_place() -> None:
    recording = recorded()
    training = training_of(as_recorded(recording), recording, ())
    runner, loop = (replay_training(each, (7, 7), CudaRules()) for each in (training, with_kept_workspaces(training)))
    assert runner.peak_reserved_bytes == (22 + 12 + 12) * MIB
    assert loop.peak_reserved_bytes == (22 + 22 + 12) * MIB  # the later gradient comes to lie beside the workspace
    assert loop.peak_allocated_bytes == runner.peak_allocated_bytes + 8 * MIB


def as_kept(given_back: Recording) -> Recording:
    """The same window, in which cuBLAS keeps the workspace that it makes first."""
    phases = tuple(
        Phase(phase.name, tuple(e for e in phase.events if e.block != 6 and (e.block != 3 or e.bytes > 0)))
        for phase in given_back.phases
    )
    return replace(given_back, phases=phases, workspaces=frozenset())


def test_by_hand_workspaces_that_were_kept_while_recorded_stay() -> None:
    given_back = recorded()
    kept = as_kept(given_back)
    found = [
        replay_training(with_kept_workspaces(training_of(as_recorded(each), each, ())), (7, 7), CudaRules())
        for each in (given_back, kept)
    ]
    assert found[0] == found[1]
    assert found[1].peak_allocated_bytes == (22 + 12 + 12 + 8) * MIB  # a segment of 22 isn't cut for logits of 21


@pytest.mark.parametrize(("size", "like"), [(7, 7), (20, 7), (7, 20)])
def test_a_window_with_workspaces_kept_is_one_that_gave_them_back_by_another_that_did(size: int, like: int) -> None:
    found = with_released_workspaces(as_kept(recorded(size)), recorded(like))
    assert found is not None
    made, wanted = ([training_of(as_recorded(each), each, ())] for each in (found, recorded(size)))
    for one, other in ((made[0], wanted[0]), (with_kept_workspaces(made[0]), with_kept_workspaces(wanted[0]))):
        assert replay_training(one, (size,) * 3, CudaRules()) == replay_training(other, (size,) * 3, CudaRules())
    assert [[e.bytes for e in phase.events] for phase in found.phases] == [
        [e.bytes for e in phase.events] for phase in recorded(size).phases
    ]
    assert len(found.workspaces) == 2


@pytest.mark.parametrize("phase", [0, 1])
def test_nothing_is_put_into_a_window_that_did_something_else(phase: int) -> None:
    kept = as_kept(recorded())
    more = replace(kept.phases[phase], events=(*kept.phases[phase].events, Event(9, MIB), Event(9, -MIB)))
    other = replace(kept, phases=(*kept.phases[:phase], more, *kept.phases[phase + 1 :]))
    assert with_released_workspaces(other, recorded()) is None
    assert with_released_workspaces(replace(kept, phases=kept.phases[:2]), recorded()) is None


def test_a_workspace_is_neither_activation_nor_temporary() -> None:
    recording = recorded()
    phases = tuple(
        Phase(phase.name, tuple(event for event in phase.events if event.block not in (2, 5)))  # no logits
        for phase in recording.phases
    )
    found = composition(as_recorded(replace(recording, phases=phases)), (7, 7))
    assert [context.get(WORKSPACES) for context in found.values()] == [8 * MIB, 8 * MIB, None]


def main() -> None:
    """The figures of each size, on the virtual GPU."""
    torch.set_num_threads(1)
    found = {}
    for n in SIZES:
        found[n] = {history: forked(partial(trained, history, n)) for history in HISTORIES}
        found[n]["plan"] = forked(partial(planned, n))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
