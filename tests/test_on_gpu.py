"""The acceptance test of a GPU: its table, resuming, time limits and the search for the truth, on recorded rows."""

from __future__ import annotations

import json
import lzma
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from autoaccum.devices import virtual
from autoaccum.devices.cuda import recorder
from autoaccum.simulation.recording import Event, Phase, Recording
from benchmarks.on_gpu import around, card, earlier, libraries, process, report, rows, schedule, windows
from benchmarks.on_gpu.drive import Driver

ROOT = Path(__file__).parent.parent
BESIDE = {
    "card": "NVIDIA H100 80GB HBM3", "kind": card.REAL, "virtual": False, "driver": "580.00", "torch": "2.11.0+cu130",
    "cuda": "13.0", "cudnn": 91900, "python": "3.12.1",
}  # fmt: skip
FACTS = BESIDE | {"total bytes": 80 << 30, "uuid": "GPU-0", "spec": "h100-80gb", "spec outside bytes": 794 << 20}
FACTS |= {"nvml lists processes": True}
PLAN = {
    "split": [100] * 10, "largest": 108, "least": 1, "predicted": 12 << 30, "predicted here": 12 << 30,
    "measured": 12 << 30, "retries": [0, 0, 0], "ooms": 0, "passes": 9, "seconds": 8.1, "method": "replayed",
    "exactness": "exact (tested on 8 samples)", "capped": False,
}  # fmt: skip
FRESH = {"reserved": 12 << 30, "ooms": 0, "retries": [0, 0, 0, 0]}
TRUTH = {"largest": 108, "complete": True}


def row(part: str, model: str, step: str, **figures: Any) -> dict[str, Any]:
    return {"part": part, "model": model, "step": step, **figures, **BESIDE}


def trial(plan: dict[str, Any], fresh: dict[str, Any], truth: dict[str, Any]) -> list[dict[str, Any]]:
    steps = {"plan": PLAN | plan, "fresh": FRESH | fresh, "truth": TRUTH | truth, "final": {"status": "done"}}
    return [row("a", "gpt2-bf16", step, **figures) for step, figures in steps.items()]


# The table.


@pytest.mark.parametrize(
    ("plan", "fresh", "truth", "verdict"),
    [
        ({}, {}, {}, "as predicted"),
        ({}, {}, {"complete": False}, "as predicted; no time to find the largest"),
        ({"largest": 109}, {}, {}, "FAULT: the largest is too high by 1"),
        ({"largest": 106}, {}, {}, "FAULT: the largest is low by 2 (1.9 %)"),
        ({"largest": 106, "capped": True}, {}, {}, "as predicted"),
        ({"ooms": 2}, {}, {}, "FAULT: 2 out-of-memory errors while planning"),
        ({"measured": 13 << 30}, {}, {}, "FAULT: verified at 13.000 GiB, not as predicted"),
        ({}, {"reserved": int(12.1 * 2**30)}, {}, "FAULT: not trained as predicted"),
        ({}, {"ooms": 1}, {}, "FAULT: the plan runs out of memory in a fresh process"),
        ({}, {"retries": [0, 1, 0, 0]}, {}, "FAULT: unforeseen retries"),
        ({"retries": [0, 1, 0]}, {"retries": [0, 1, 0, 0]}, {}, "as predicted"),
        ({"method": "bracketed"}, {}, {}, "as predicted; bracketed"),
    ],
)
def test_a_plan_is_judged_by_the_peak_and_by_the_truth(
    plan: dict[str, Any], fresh: dict[str, Any], truth: dict[str, Any], verdict: str
) -> None:
    found = trial(plan, fresh, truth)
    (line,) = report.lines(found)
    assert line["verdict"] == verdict
    assert bool(report.faults(found)) == verdict.startswith("FAULT")


def others() -> list[dict[str, Any]]:
    """Rows of all other parts, some of them not as predicted."""
    runner = {"ratio": 1.01, "low": 1.0, "high": 1.02, "runner seconds": 0.5}
    copies = {"own stream / pageable": {"ratio": 0.9}, "own stream / pinned": {"ratio": 0.98}}
    scan = {"1": 0.004, "8": 0.001, "64": 0.00095}
    oom = {"planned": [24, 24], "split": [12] * 4, "samples": 48, "retries": 1, "ooms": 1, "ooms before": 0}
    finder = {"chosen": 96, "ooms": 5, "tries": 6, "seconds": 20.0, "trains afresh": True}
    context = {"assumed": 794 << 20, "gpu": "h100-80gb", "empty": 500 << 20, "read by budgets": 900 << 20}
    return [
        row("b", "gpt2-bf16", "plan", **PLAN | {"largest": 110}),
        row("c", "gpt2-bf16", "context", **context, **{"window 3": 800 << 20}),
        row("d", "gpt2-bf16", "window fp32", error=1e-7),
        row("d", "gpt2-bf16", "window fp64", error=1e-9),
        row("d", "gpt2-bf16", "after out of memory", error=2e-16, **oom),
        row("e", "gpt2-bf16", "runner", **runner),
        row("e", "gpt2-bf16", "knee", knee=8, largest=64, **{"seconds per sample": scan}),
        row("e", "gpt2-bf16", "copies", seconds={"own stream": 0.4}, **copies),
        row("f", "gpt2-bf16", "halving", **finder, **{"retries afresh": [1, 1, 1, 1]}),
        row("g", "commands", "doctor", code=0, seconds=2.0, said=""),
        row("g", "commands", "run", code=1, seconds=2.0, said="a\nno plan.json"),
        row("g", "commands", "final", status="stopped", why="killed after 150 s, its time limit"),
        row("a", "unet-bf16", "final", status="skipped", why="no time left"),
    ]


def test_each_part_has_its_lines_and_what_is_wrong_is_a_fault(tmp_path: Path) -> None:
    found = [*trial({}, {}, {}), *others()]
    lines = {(line["part"], line["what"]): line["verdict"] for line in report.lines(found)}
    assert lines["b", "gpt2-bf16"] == "FAULT: largest 110, and 108 on the card"
    assert lines["c", "gpt2-bf16"].startswith("FAULT: h100-80gb's row assumes 6 MiB too little")
    assert lines["d", "gpt2-bf16, window"].startswith("FAULT: fp64 is 1.0e-09 off")
    assert lines["d", "gpt2-bf16, after OOM"].startswith("recovered with the same gradient; fp64 2.0e-16; 24 to 12")
    assert lines["e", "gpt2-bf16, Runner"] == "as the loop; 1.010 (1.000 to 1.020) of the loop's time"
    assert lines["e", "gpt2-bf16, knee"].startswith("FAULT: larger micro-batches are faster")
    assert "+10.0 % saved against pageable memory" in lines["e", "gpt2-bf16, copies"]
    assert lines["f", "gpt2-bf16, halving"].endswith("with retries in each window; ours 108, 0 OOMs, 8.1 s")
    assert lines["g", "doctor"] == "exit code 0" and lines["g", "run"] == "FAULT: exit code 1: no plan.json"
    assert lines["g", "commands"] == "FAULT: stopped: killed after 150 s, its time limit"
    assert lines["a", "unet-bf16"] == "skipped: no time left"
    text = report.write(tmp_path / "2026-11-28-h100-on-gpu.jsonl", found, 300.0)
    assert "driver 580.00, torch 2.11.0+cu130" in text and "5.0 minutes" in text and "1 skipped" in text
    written = (tmp_path / "2026-11-28-h100-on-gpu.csv").read_text().splitlines()
    assert len(written) == 1 + len(report.lines(found))
    assert all("NVIDIA H100 80GB HBM3,measured on this GPU,580.00,2.11.0+cu130" in line for line in written[1:])
    assert (tmp_path / "2026-11-28-h100-on-gpu.md").read_text() == text


def test_times_of_a_virtual_gpu_are_no_fault() -> None:
    found = [each | {"virtual": True} for each in others() if each["part"] == "e"]
    assert {line["verdict"] for line in report.lines(found)} == {"times mean nothing here"}


# The truth.


@pytest.mark.parametrize("start", [1, 5, 36, 37, 38, 80])
def test_the_largest_is_found_from_any_guess(start: int) -> None:
    found = around.largest_around(lambda n: n <= 37, start, lambda: True)
    assert (found.largest, found.fails, found.is_complete) == (37, 38, True)
    assert len(found.tried) < 14


def test_the_largest_beyond_a_gap_is_found_and_nothing_may_fit() -> None:
    assert around.largest_around(lambda n: n <= 37 or n == 39, 37, lambda: True).largest == 39
    found = around.largest_around(lambda n: False, 8, lambda: True)
    assert (found.largest, found.is_complete) == (None, True)
    left = iter([True, False, False, False, False])
    cut_off = around.largest_around(lambda n: n <= 37, 8, lambda: next(left))
    assert cut_off.largest == 9 and not cut_off.is_complete


# The run.


def drive(tmp_path: Path, code: str, monkeypatch: pytest.MonkeyPatch, known: tuple[dict[str, Any], ...] = ()) -> Any:
    """Run two trials whose processes run this code instead; return the kept rows."""
    (tmp_path / "fake.py").write_text(code)
    init = process.Command.__init__

    def other_command(self: Any, command: list[str], *rest: Any) -> None:
        init(self, [sys.executable, "-S", str(tmp_path / "fake.py"), command[-1]], *rest)

    monkeypatch.setattr(process.Command, "__init__", other_command)
    kept = rows.Rows(tmp_path / "rows.jsonl", BESIDE, list(known))
    two = [schedule.Trial("a", name, 50 << 30, 1.0) for name in ("first", "second")]
    monkeypatch.setattr(schedule.Trial, "limit_seconds", property(lambda self: 1.0))
    Driver(kept, FACTS, workers=2, quiet=True).run(two)
    assert rows.read(kept.path) == kept.rows[len(known) :]
    return rows.by_trial(kept.rows)


def is_running(pid: int) -> bool:
    """Return whether a process exists, and isn't a zombie that nobody has waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


HANGS = """import json, subprocess, sys, time
job = json.loads(sys.argv[1])
def say(step, **figures):
    print("ROW " + json.dumps({"part": "a", "model": job["model"], "step": step, **figures}), flush=True)
say("plan", known=sorted(job["known"]))
if job["model"] == "first":
    child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"], process_group=0)
    say("child", pid=child.pid)
    time.sleep(60)
say("final", status="done")
"""


def test_a_hanging_trial_is_killed_with_all_it_started_and_the_next_one_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = time.monotonic()
    found = drive(tmp_path, HANGS, monkeypatch)
    assert time.monotonic() - started < 30
    first, second = found["a", "first"], found["a", "second"]
    assert first["final"]["status"] == "stopped" and first["plan"]["torch"] == BESIDE["torch"]
    assert not is_running(first["child"]["pid"])  # it made a process group, and was killed nevertheless
    assert second["final"]["status"] == "done"


def test_a_resumed_run_leaves_out_what_is_done_and_knows_what_was_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = (row("a", "first", "final", status="done"), row("a", "second", "truth", largest=3))
    found = drive(tmp_path, HANGS, monkeypatch, known)
    assert found["a", "second"]["plan"]["known"] == ["truth"]
    assert "plan" not in found["a", "first"]


def test_a_trial_that_dies_without_a_word_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = drive(tmp_path, "raise SystemExit('no such thing')", monkeypatch)
    assert "no such thing" in found["a", "first"]["final"]["why"]
    assert found["a", "first"]["final"]["status"] == "failed"


def test_without_time_a_trial_is_skipped_by_name(tmp_path: Path) -> None:
    kept = rows.Rows(tmp_path / "rows.jsonl", BESIDE)
    Driver(kept, FACTS, workers=1, ends=time.monotonic() + 5, quiet=True).run(
        [schedule.Trial("a", "gpt2-bf16", 1, 40), schedule.Trial("a", "other", 1, 1, skip="no compiler")]
    )
    assert [each["why"] for each in kept.rows] == ["no time left: about 40 s needed, 5 s left", "no compiler"]


def test_what_is_left_of_an_interrupted_run_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = rows.Rows(tmp_path / "rows.jsonl", BESIDE)
    driver = Driver(kept, FACTS, workers=1, quiet=True)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Driver, "_side_by_side", interrupted)
    with pytest.raises(KeyboardInterrupt):
        driver.run([schedule.Trial("a", name, 1, 40) for name in ("first", "second")])
    assert [(each["model"], each["status"], each["why"]) for each in kept.rows] == [
        ("first", "skipped", "interrupted"), ("second", "skipped", "interrupted"),
    ]  # fmt: skip


def test_what_no_real_card_has_measured_comes_first_and_then_what_was_not_as_predicted(tmp_path: Path) -> None:
    refused = [
        row("a", "llama-300m-bf16", "plan", refused="DoesNotFit"),
        row("a", "llama-300m-bf16", "final", status="done"),
    ]
    cut_off = [row("a", "unet-bf16", "final", status="stopped", why="killed")]
    virtual_too = [each | {"virtual": True} for each in trial({}, {}, {})]
    for name, found in (
        ("2026-11-28-card-on-gpu", [*trial({}, {}, {}), *refused, *cut_off]),
        ("v-on-gpu", virtual_too),
    ):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in found))
    known = earlier.real_rows({tmp_path})
    assert len(known) == 4 + 2 + 1
    ordered = earlier.in_order(schedule.trials(FACTS, ["a"]), known)
    names = [each.model for each in ordered]
    assert names[-1] == "gpt2-bf16" and names[-2] == "llama-300m-bf16" and ordered[-1].rank == schedule.MEASURED
    assert names.index("unet-bf16") < names.index("densenet121-bf16") < 18
    assert {each.rank for each in ordered} == {0, 1, 2}
    incomplete = earlier.ranks(trial({}, {}, {"complete": False}))
    assert incomplete == {("a", "gpt2-bf16"): schedule.NOT_AS_PREDICTED}


def test_by_the_first_real_run_the_models_that_it_did_not_reach_come_first() -> None:
    known = [each for each in earlier.real_rows({ROOT / "benchmarks" / "results"}) if each["card"] == "NVIDIA H200"]
    ranks = earlier.ranks([each for each in known if each["torch"].startswith("2.11.0")])
    new = {key for key, rank in ranks.items() if rank == schedule.NEW}
    assert {("a", "unet-bf16"), ("a", "densenet121-bf16"), ("e", "mlp-fp32")} <= new or not known


def test_a_size_at_which_a_convolution_did_without_its_workspace_is_distinguished_from_one_that_failed() -> None:
    def tries(**more: Any) -> dict[str, Any]:
        return {"tried": [108, 109], "tries detail": [{"split": [109, 109], "fits": False} | more]}

    words = "a convolution did without its workspace, or retries"
    (line,) = report.lines(trial({"largest": 109}, {}, tries(raised=False)))
    assert line["verdict"] == f"FAULT: the largest is too high by 1; at 109 nothing was raised: {words}"
    (line,) = report.lines(trial({"largest": 109}, {}, tries(raised=True)))
    assert line["verdict"] == "FAULT: the largest is too high by 1"


def test_a_line_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"part": "a"}\n{"part": "b", "mo')
    assert rows.read(tmp_path / "rows.jsonl") == [{"part": "a"}]
    assert rows.read(tmp_path / "none.jsonl") == []


def test_what_an_h200_has_yet_to_show_fits_seven_minutes_six_side_by_side() -> None:
    found = schedule.trials(FACTS)
    assert sum(each.part == "a" for each in found) == 20 and {each.part for each in found} == set(schedule.TITLES)
    assert all(each.card_bytes < schedule.CARD_SHARE * FACTS["total bytes"] for each in found)
    left = earlier.in_order(found, earlier.real_rows({ROOT / "benchmarks" / "results"}))
    left = [each for each in left if each.rank < schedule.MEASURED]
    card_seconds = sum(each.seconds for each in left if each.card_bytes and not each.alone) / 6
    assert card_seconds + sum(each.seconds for each in left if each.alone) < 7 * 60
    only = schedule.trials(FACTS, ["c", "a:gpt2-bf16"])
    assert [each.name for each in only if each.part == "a"] == ["a:gpt2-bf16"] and len(only) == 4


def test_calls_of_cudnn_differ_in_one_number_at_a_time() -> None:
    kinds = (
        (libraries.RECURRENT_BASE, libraries.RECURRENT_OTHERS),
        (
            libraries.CONVOLUTION_BASE,
            libraries.CONVOLUTION_OTHERS,
        ),
    )
    for base, others in kinds:
        first, *more = libraries.varied(base, others)
        assert first == base and len(more) == sum(map(len, others.values())) == len(set(more))
        assert all(sum(a != b for a, b in zip(base, each, strict=True)) == 1 for each in more)


def test_windows_are_kept_whole_where_a_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    phase = Phase("first", (Event(1, 4096), Event(2, 8, 3), Event(1, -4096)))
    made = Recording(7, (phase,), 2, workspaces=frozenset({2}))
    monkeypatch.setattr(recorder, "record", lambda *args, **kwargs: made)
    with windows.kept("mlp"):
        assert recorder.record(None, micro_batch=7) is made  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv(windows.FOLDER_VARIABLE, str(tmp_path / "windows"))
    with windows.kept("mlp"):
        recorder.record(None, micro_batch=7)  # type: ignore[arg-type]
    (path,) = (tmp_path / "windows").iterdir()
    assert path.name == "mlp.1.7.json.xz"
    assert json.loads(lzma.decompress(path.read_bytes())) == {
        "micro_batch": 7, "phases": [["first", [[1, 4096], [2, 8, 3], [1, -4096]]]], "passes": 2, "workspaces": [2],
        "reserved at start": None,
    }  # fmt: skip


def test_a_card_without_a_row_stands_in_by_the_nearest() -> None:
    gpu, is_own = card.nearest("NVIDIA H100 80GB HBM3", 85_017_755_648, "9.0")
    assert (gpu.name, is_own) == ("h100-80gb", True)
    gpu, is_own = card.nearest("NVIDIA H800", 80 << 30, "9.0")
    assert gpu.name.startswith("h100") and not is_own


@pytest.mark.slow
@pytest.mark.skipif(virtual.available() is not None, reason=virtual.available() or "")
def test_a_model_goes_through_plans_and_gradients_on_the_virtual_gpu(tmp_path: Path) -> None:
    only = "a:mlp-fp32,b:mlp-fp32,c:lstm-fp32,d:mlp-fp32,h:cudnn"
    command = [ROOT / "scripts" / "on_gpu", tmp_path, "--virtual", "h100-80gb", "--workers", "1", "--only", only]
    out = subprocess.run(command, env=os.environ | {"PYTHON": sys.executable}, capture_output=True, text=True)
    assert out.returncode == 0, out.stdout + out.stderr
    (path,) = tmp_path.glob("*-virtual-nvidia-h100-80gb-hbm3-torch-*-on-gpu.jsonl")
    found = rows.by_trial(map(json.loads, path.read_text().splitlines()))
    plan, truth = found["a", "mlp-fp32"]["plan"], found["a", "mlp-fp32"]["truth"]
    assert plan["largest"] == truth["largest"] > 1000 and truth["complete"]
    assert plan["predicted"] == found["b", "mlp-fp32"]["plan"]["predicted"]
    assert found["d", "mlp-fp32"]["after out of memory"]["retries"] > 0
    calls = found["h", "cudnn"]["recurrent"]["calls"]
    assert len(calls) == 1 + sum(map(len, libraries.RECURRENT_OTHERS.values()))
    assert all(each["blocks"] for each in calls)
    kept = sorted((tmp_path / "windows").glob("mlp-fp32.*.json.xz"))
    assert len(kept) > 3 and json.loads(lzma.decompress(kept[-1].read_bytes()))["phases"][0][0] == "first"
    assert "times mean nothing" in out.stdout and "nothing was left out" in out.stdout
    again = subprocess.run(command, env=os.environ | {"PYTHON": sys.executable}, capture_output=True, text=True)
    assert again.returncode == 1 and "is there already: go on with it by --resume" in again.stdout


def test_nothing_is_needed_of_the_network() -> None:
    sources = [path.read_text() for path in (ROOT / "benchmarks" / "on_gpu").glob("*.py")]
    assert not any(word in text for text in sources for word in ("from_pretrained", "urllib", "requests.", "https://"))


# What needs torch for more than a look.


@pytest.mark.slow
def test_gradients_of_windows_are_the_whole_batchs_where_something_is_computed() -> None:
    from benchmarks.on_gpu import gradients

    errors = {name: gradients.window_error("lstm-fp32", name, "cpu") for name in ("fp32", "fp64")}
    assert errors["fp32"] is not None and 0 < errors["fp32"] < 1e-5
    assert errors["fp64"] is not None and errors["fp64"] < 1e-12


def test_a_gradient_that_is_off_is_seen_and_one_of_zeros_is_nothing() -> None:
    import torch

    from benchmarks.on_gpu.gradients import distance

    whole = {"a": torch.tensor([3.0, 4.0]), "b": torch.zeros(2)}
    assert distance(whole, {"a": torch.tensor([3.0, 4.5]), "b": torch.zeros(2)}) == pytest.approx(0.1)
    assert distance({"a": torch.zeros(2)}, {"a": torch.zeros(2)}) is None
    with pytest.raises(RuntimeError, match="other parameters"):
        distance(whole, {"a": whole["a"]})


@pytest.mark.slow
def test_where_the_gpu_is_open_already_a_new_process_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.on_gpu import apart, loops

    assert not apart.gpu_is_open()
    assert apart.call(os.getppid) == os.getpid()
    monkeypatch.setattr(apart, "gpu_is_open", lambda: True)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    assert apart.call(os.getppid) == os.getpid()
    with pytest.raises(RuntimeError, match=r"loops:hand_written ended with exit code 1"):
        apart.call(loops.hand_written)
