"""The benchmarks use planning's own functions: they have to run when these change."""

from __future__ import annotations

from benchmarks import speed


def test_solving_is_timed_on_a_program_of_ten_thousand_events() -> None:
    found = speed._in_process("solving")
    assert found["events"] >= 10_000
    assert found["steps"] > 1 and found["seconds"] > 0
