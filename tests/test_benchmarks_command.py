"""`python -m benchmarks`: what is made of figures, of parts that fail or are missing, and planning at scale."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from autoaccum.reporting import table_page
from benchmarks import __main__ as command
from benchmarks import parts, scaling
from benchmarks.figures import Figure, compare, figure_of, read_figure

CPU = "measured on this CPU"


# Figures.


def test_a_figure_is_unstable_where_its_repeats_spread_beyond_a_tenth() -> None:
    assert not figure_of([1.0, 1.05, 1.09], "a", "s", CPU).is_unstable
    assert figure_of([1.0, 1.05, 1.2], "a", "s", CPU).is_unstable
    assert figure_of([3.0, 1.0, 2.0], "a", "s", CPU) == Figure("a", 2.0, "s", CPU, 1.0, 3.0, 3)
    assert not Figure("a", 1.0, "s", CPU, 1.0, 1.0).is_unstable
    figure = figure_of([1.0, 1.05, 1.2], "a", "s", CPU)
    assert read_figure(json.loads(json.dumps(figure.to_dict()))) == figure


@pytest.mark.parametrize(
    ("old", "new", "verdict", "difference"),
    [
        ([1.0, 1.01, 1.02], [1.01, 1.02, 1.03], "same", "+1.0 %"),
        ([1.0, 1.01, 1.02], [1.1, 1.12, 1.13], "changed", "+10.9 %"),
        ([1.0, 1.01, 1.5], [1.1, 1.12, 1.13], "unstable", "+10.9 %"),
        ([1.0, 1.01, 1.02], [0.5, 0.9, 1.3], "unstable", "-10.9 %"),
        ([1.0, 1.2, 1.4], [2.0, 2.2, 2.9], "changed", "+83.3 %"),
        ([2.0, 2.1, 2.2], [1.0, 1.01, 1.02], "changed", "-51.9 %"),
        ([1.0], [1.5], "unstable", "+50.0 %, timed once"),
    ],
)
def test_two_runs_differ_where_their_repeats_do_not_overlap(
    old: list[float], new: list[float], verdict: str, difference: str
) -> None:
    (change,) = compare([figure_of(old, "a", "s", CPU)], [figure_of(new, "a", "s", CPU)])
    assert (change.verdict, change.difference) == (verdict, difference)


def test_figures_without_repeats_differ_by_two_percent_or_a_point_or_their_kind() -> None:
    def verdict(unit: str, old: float, new: float, kind: str = CPU) -> str:
        return compare([Figure("a", old, unit, CPU, old, old)], [Figure("a", new, unit, kind, new, new)])[0].verdict

    assert verdict("GiB", 10, 10.19) == "same" and verdict("GiB", 10, 10.3) == "changed"
    assert verdict("%", 0.1, 1.0) == "same" and verdict("%", 0.1, 1.2) == "changed"
    assert verdict("GiB", 10, 10, "predicted") == "changed" and verdict("OOMs", 0, 1) == "changed"
    old, new = Figure("old", 1, "s", CPU, 1, 1), Figure("new", 1, "s", CPU, 1, 1)
    assert [change.verdict for change in compare([old], [new])] == ["gone", "new"]


# The command.


def run_of(seconds: list[float], **changes: Any) -> dict[str, Any]:
    figure = figure_of(seconds, "a <b>", "s", CPU).to_dict()
    part = {
        "name": "speed",
        "title": "Speed",
        "lead": "As <i>measured</i>.",
        "kinds": [CPU],
        "notes": [],
        "skipped": "",
    }
    part |= {"rows": [{"model": "<script>", "seconds": 1.5, "trains": True}], "figures": [figure], "seconds": 60.0}
    left_out = part | {"name": "peers", "rows": [], "figures": [], "skipped": "lightning isn't installed"}
    run = {"kind": "autoaccum benchmarks", "date": "2026-11-24", "quick": False, "machine": {"processor": "one"}}
    return run | {"parts": [part, left_out]} | changes


def test_the_page_has_tables_figures_what_changed_and_what_was_skipped() -> None:
    old, new = run_of([1.0, 1.01, 1.02]), run_of([1.3, 1.4, 1.8])
    changes = command.changes_since(old, new)
    made = command.page(new, changes, "old.json", "python -m benchmarks --against old.json")
    page, text = table_page.as_html(made), table_page.as_markdown(made)
    for shown in (page, text):
        assert "changed" in shown and "+38.6 %" in shown and "unstable" in shown and "1 was skipped" in shown
        assert "1 benchmark ran in 1 minute, " in shown and "of 1 figure 1 is unstable" in shown
        assert "lightning isn" in shown and CPU in shown and "<script>" not in shown.replace("\\<", "")
    warned = command.warnings_of(new, changes)
    assert [line.split(":")[0] for line in warned] == ["unstable", "changed"]
    assert command.warnings_of(old, []) == []


def test_a_part_that_was_not_run_this_time_is_not_gone() -> None:
    old = run_of([1.0, 1.01, 1.02])
    more = old["parts"][0] | {"name": "starting"}
    changes = command.changes_since(old | {"parts": [*old["parts"], more]}, old)
    assert [(change.name, change.verdict) for change in changes] == [("speed: a <b>", "same")]


def test_an_earlier_run_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text("{}")
    for name in ("other.json", "none.json"):
        with pytest.raises(SystemExit, match="can.t be read" if name[0] == "n" else "is not a result"):
            command.read(tmp_path / name)


def test_a_part_runs_by_itself_and_a_failing_one_does_not_end_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    found = command.run_part("starting", quick=True)
    assert {figure["name"] for figure in found["figures"]} == {"python", "import", "help"}
    assert all(figure["repeats"] == 3 and figure["kind"] == CPU for figure in found["figures"])
    failed = command.run_part("no such part", quick=True)
    assert failed["failed"] and "exit code 2" in failed["skipped"]
    run = run_of([1.0], parts=[found, failed])
    assert any("failed with exit code 2" in line for line in command.warnings_of(run, []))


def test_what_was_run_is_kept_when_a_later_part_is_interrupted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def part(name: str, *, quick: bool) -> dict[str, Any]:
        if name == "scaling":
            raise KeyboardInterrupt
        return run_of([1.0, 1.01])["parts"][0] | {"name": name}

    monkeypatch.setattr(command, "run_part", part)
    asked = ["--only", "speed", "--only", "scaling", "--name", "here", "--results", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["benchmarks", *asked])
    with pytest.raises(KeyboardInterrupt):
        command.main()
    (kept,) = tmp_path.glob("*-here-speed-scaling.json")
    run = command.read(kept)
    assert [part["name"] for part in run["parts"]] == ["speed"] and run["left"] == ["scaling"]
    assert "not run yet: scaling" in kept.with_suffix(".md").read_text()


def test_what_is_not_installed_is_skipped_by_name() -> None:
    part = parts.Part("peers", "", "", [])
    assert parts._optional("benchmarks.no_such_benchmark", (), part) is None
    assert "no_such_benchmark" in part.skipped
    assert parts._optional("benchmarks.scaling", ("sizes_table", "no_such_function"), part) is None
    assert part.skipped == "benchmarks.scaling lacks no_such_function"


# Scaling.


@pytest.mark.slow
def test_parameters_are_those_of_the_model_and_seventy_billion_get_an_answer() -> None:
    rows = {row["model"]: row for row in scaling.sizes_table(["llama_10m", "llama_70b"])}
    model = scaling._named("llama_10m")().model
    assert rows["llama_10m"]["parameters"] == sum(p.numel() for p in model.parameters())
    assert rows["llama_70b"]["parameters"] > 68e9 and "does not fit by" in rows["llama_70b"]["answer"]
    assert rows["llama_70b"]["held MiB"] < 4 * 1024


def test_targets_are_solved_for_from_one_recording() -> None:
    small, large = scaling.solve((64, 100_000), repeats=2, blocks=2)
    assert (small["steps"], small["micro-batch"]) == (1, 64) and large["steps"] > 10
    assert 0 < large["solving s low"] <= large["solving s"] <= large["solving s high"]


@pytest.mark.slow
def test_solving_for_a_million_samples_takes_seconds() -> None:
    command_line = [sys.executable, "-m", "benchmarks.scaling", "--solve", "[512, 1000000]"]
    out = subprocess.run(command_line, capture_output=True, text=True, check=True, cwd=command.HERE.parent)
    small, large = json.loads(out.stdout)
    one_fewer = -(-512 // (small["steps"] - 1))  # doesn't fit, and more steps need no less
    assert one_fewer > large["micro-batch"] > small["micro-batch"] / 2
    assert large["solving s"] < 60  # on a busy machine; 2 to 5 s on a quiet one
