"""The optimizer's state while planning: what planning made is dropped, what the optimizer came with stays."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers_train import mlp, vectors

from autoaccum import Workload
from autoaccum.planning.fit import PlanningEnvironment, environment_for, plan_in
from autoaccum.planning.request import PlanRequest


def state_bytes_while_planning(optimizer: Callable[[Any], Any], *, made: bool) -> list[int]:
    """The optimizer's bytes at the times when the process's memory is read, in a process that ends with the plan."""
    found = []
    here = environment_for(torch.device("cpu"))

    def noted(subject: Any, *args: Any) -> Any:
        found.append(subject.held_state_bytes)
        return here.make_predictor(subject, *args)

    model = mlp(width=64)
    work = Workload(model, vectors(4), optimizer=optimizer(model.parameters()) if made else optimizer)
    environment: PlanningEnvironment = replace(here, make_predictor=noted, keep=False)
    plan_in(environment, work, PlanRequest(target_batch=8, max_micro_batch=4, verify=False))
    return found


@pytest.mark.parametrize("made", [True, False], ids=["optimizer", "function"])
def test_state_that_planning_made_is_not_there_when_the_plan_is_predicted(made: bool) -> None:
    assert state_bytes_while_planning(torch.optim.AdamW, made=made)[-1] == 0


@pytest.mark.parametrize("made", [True, False], ids=["optimizer", "function"])
def test_state_that_an_optimizer_came_with_stays(made: bool) -> None:
    assert state_bytes_while_planning(torch.optim.Adagrad, made=made)[-1] > 0
