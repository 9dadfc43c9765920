"""The benchmark of what a search costs: its tables, without running a search."""

import importlib.util

import pytest
import torch

from autoaccum.devices import virtual
from benchmarks import search_cost, tables
from benchmarks.peers import accounting, cases, finders, trials

needs_virtual = pytest.mark.skipif(virtual.available() is not None, reason=virtual.available() or "")


def test_the_truth_is_the_largest_that_works_even_beyond_a_gap():
    assert trials.largest_that(lambda n: n <= 37) == 37
    assert trials.largest_that(lambda n: n <= 240 or 242 <= n <= 245) == 245  # fitting isn't monotone
    assert trials.largest_that(lambda n: False) == 0


def test_a_log_adds_up():
    cost = accounting.cost_of("forward 4\nbackward\nforward 8\nout_of_memory\n")
    assert (cost.forward, cost.backward, cost.samples, cost.ooms) == (2, 1, 12, 1)


def _state(model, optimizer):
    tensors = {f"parameters {name}": p.detach().clone() for name, p in model.named_parameters()}
    tensors |= {f"buffers {name}": b.detach().clone() for name, b in model.named_buffers()}
    gradients = tuple(name for name, p in model.named_parameters() if p.grad is not None)
    modes = tuple(module.training for module in model.modules())
    return accounting.State(tensors, gradients, bool(optimizer.state), modes, {"torch": torch.get_rng_state()})


def test_each_kind_of_change_is_named():
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))
    optimizer = torch.optim.AdamW(model.parameters())
    before = _state(model, optimizer)
    assert _state(model, optimizer).changed_since(before) == []
    model(torch.zeros(2, 3)).sum().backward()
    assert _state(model, optimizer).changed_since(before) == ["buffers", ".grad left"]
    optimizer.step()
    torch.rand(1)
    model.eval()
    text = ["parameters", "buffers", ".grad left", "optimizer state", "train/eval mode", "torch RNG"]
    assert _state(model, optimizer).changed_since(before) == text


def test_a_mark_on_running_statistics_does_not_stop_the_backward_pass():
    norm = torch.nn.BatchNorm1d(3)
    out = norm(torch.rand(4, 3, requires_grad=True))
    accounting._mark(norm.running_mean)
    before = norm.running_mean.clone()
    out.sum().backward()
    assert norm.running_mean[0] == before[0] >= 1


def test_what_is_not_installed_is_left_out_by_name(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "toma" else find(name))
    there, missing = search_cost.available(["autoaccum", "toma"])
    assert (list(there), missing) == (["autoaccum"], ["toma"])


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ({"trains": False}, "OOM"),
        ({"trains": True, "retries": [3, 0, 0]}, "yes"),
        ({"trains": True, "retries": [3, 1, 1]}, "yes, with retries in each window"),
        ({"failed": "Traceback\n  ...\nValueError: no"}, "ValueError: no"),
    ],
)
def test_verdicts(answer, words):
    assert search_cost.verdict(answer) == words


def test_every_finder_of_the_issue_is_there():
    packages = {finder.package for finder in finders.FINDERS.values()}
    peers = {"lightning", "accelerate", "toma", "batch_finder", "batch_probe", "autotrainer", "ultralytics"}
    assert packages == peers | {"autoaccum"}


def _row(finder, found, **more):
    row = {"case": "a case", "finder": finder, "version": "1.0", "trains": 12, "safe": 10, "found": found}
    costs = {"forward": 3, "backward": 2, "samples": 9, "ooms": 1, "host_seconds": "0.5", "changed": "nothing"}
    return row | {"of_safe": f"{found / 10:.3f}", "of_trains": f"{found / 12:.3f}", "afresh": "yes"} | costs | more


def test_the_page_has_each_finder_and_what_it_did(tmp_path):
    rows = [_row("one", 10), _row("two", 12, afresh="OOM", changed="parameters")]
    text = search_cost.page(rows, ["three"])
    assert "| one | 1.0 | 1 of 1 | 1.000 | 0.833 | 1 of 1 | 3 | 9 | 1 | 0.5 | nothing |" in text
    assert "| two | 12 | 1.200 | 1.000 | OOM | 3 / 2 | 9 | 1 | 0.5 | parameters |" in text
    assert "aren't installed: three" in text
    both = search_cost.summary([_row("one", 10), _row("one", 12, changed="buffers, torch RNG", case="another")])
    assert "| 1.000 to 1.200 (median 1.100) | 0.833 to 1.000 (median 0.916) | 2 of 2 |" in both
    assert both.endswith("| buffers, torch RNG |")
    tables.write_results("x", text, rows, tmp_path)
    assert tables.read_results("x", tmp_path) == rows  # a case made anew later leaves the others' rows as they are


def test_only_what_is_between_the_marks_of_a_page_is_written(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- printed: begin -->\nold\n<!-- printed: end -->\nafter\n")
    tables.write_between_marks(page, "new")
    assert page.read_text() == "before\n<!-- printed: begin -->\n\nnew\n\n<!-- printed: end -->\nafter\n"
    page.write_text("no marks")
    with pytest.raises(SystemExit):
        tables.write_between_marks(page, "new")


@needs_virtual
@pytest.mark.slow
def test_autoaccums_own_row_is_the_truth_at_no_out_of_memory_error():
    pytest.importorskip("torchvision")
    (row,) = search_cost.compare(cases.SMALL, {"autoaccum": "0.1"}, lambda text: None)
    assert row["found"] == row["safe"] > 4
    assert (row["afresh"], row["ooms"], row["changed"]) == ("yes", 0, "nothing")
    assert 0 < row["samples"] < 20 * row["found"] and row["forward"] >= row["backward"] > 0
