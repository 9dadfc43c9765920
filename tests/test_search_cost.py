import importlib.util

import pytest
import torch

from benchmarks import search_cost
from benchmarks.peers import accounting, finders


def test_the_truth_is_the_largest_that_works_even_beyond_a_gap():
    assert search_cost._largest(lambda n: n <= 37) == 37
    assert search_cost._largest(lambda n: n <= 240 or 242 <= n <= 245) == 245  # fitting isn't monotone
    assert search_cost._largest(lambda n: False) == 0


def test_a_log_adds_up():
    cost = accounting.cost_of("forward 4\nbackward\nforward 8\nout_of_memory\n")
    assert (cost.forward, cost.backward, cost.samples, cost.ooms) == (2, 1, 12, 1)


def _state(model, optimizer):
    tensors = {f"parameters {name}": p.detach().clone() for name, p in model.named_parameters()}
    tensors |= {f"buffers {name}": b.detach().clone() for name, b in model.named_buffers()}
    gradients = tuple(name for name, p in model.named_parameters() if p.grad is not None)
    modes = tuple(module.training for module in model.modules())
    return accounting.State(tensors, gradients, bool(optimizer.state), modes, {"torch": torch.get_rng_state()})


def test_each_kind_of_change_is_told():
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))
    optimizer = torch.optim.AdamW(model.parameters())
    before = _state(model, optimizer)
    assert _state(model, optimizer).changed_since(before) == []
    model(torch.zeros(2, 3)).sum().backward()
    assert _state(model, optimizer).changed_since(before) == ["buffers", ".grad left"]
    optimizer.step()
    torch.rand(1)
    model.eval()
    told = ["parameters", "buffers", ".grad left", "optimizer state", "train/eval mode", "torch RNG"]
    assert _state(model, optimizer).changed_since(before) == told


def test_what_is_not_installed_is_left_out_by_name(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "toma" else find(name))
    there, missing = search_cost._installed(["autoaccum, accumulating", "toma"])
    assert (there, missing) == (["autoaccum, accumulating"], ["toma"])


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ({"trains": False}, "OOM"),
        ({"trains": True, "retries": [3, 0, 0]}, "yes"),
        ({"trains": True, "retries": [3, 1, 1]}, "yes, retries in each window"),
    ],
)
def test_verdicts(answer, words):
    assert search_cost._verdict({"2": answer}, "2") == words


def test_every_finder_names_its_package():
    assert {finder.package for finder in finders.FINDERS.values()} >= {"lightning", "accelerate", "ultralytics"}
