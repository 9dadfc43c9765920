"""Reports: the frames, the page in a browser, the what-if box against Python, and what is made of bad names."""

from __future__ import annotations

import csv
import html
import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_fields import changed_plan
from strategies import made_up_plan, recorded_programs
from typer.testing import CliRunner

from autoaccum import Plan, UsageError
from autoaccum.cli import app
from autoaccum.plan import PeakRow, TimedSize
from autoaccum.reporting import frames, render, what_if, words
from autoaccum.reporting.data import MOST_PLANS
from autoaccum.reporting.kinds import Kind, measured
from autoaccum.simulation.malloc import CpuRules, replay
from autoaccum.simulation.program import lift, window
from autoaccum.simulation.recording import Phase
from autoaccum.simulation.solver import CAPACITY_MARGIN, balanced, smallest_steps

MIB = 2**20
BAD = "<script>alert(1)</script>"
NASTY = (
    f"""my "quoted" 'file'/{BAD}</title></style><img src=x onerror=alert(2)>&amp;`|*_[x](javascript:alert(3)).py:f"""
)
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
NODE = shutil.which("node")
SCRIPT = Path(what_if.__file__).with_suffix(".js")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")
needs_node = pytest.mark.skipif(NODE is None, reason="there is no node here")


def a_plan(**changes: Any) -> Plan:
    """A plan of one rank on the CPU with a table that has every size up to 140."""
    rows = tuple(PeakRow(n, (22 + 7 * n) * MIB, (30 + 7 * n) * MIB, 60 * MIB) for n in range(1, 141))
    plan = made_up_plan(
        target_batch=512, world_size=1, split=(64,) * 8, micro_batch=64, accumulation_steps=8, max_micro_batch=None,
        min_micro_batch=1, malloc_overhead=0.0, largest_micro_batch=71, largest_is_capped=False, peaks=rows,
        baseline_bytes=888 * MIB, input_bytes=1052672, sample_bytes=2048, workload="chargpt",
        predicted_peak_bytes=888 * MIB + 1052672 + 478 * MIB, measured_peak_bytes=1380 * MIB, objective="fewest-steps",
    )  # fmt: skip
    limit = 1400 * MIB
    return changed_plan(
        plan, budget=replace(plan.memory.budget, bytes=limit, limit_bytes=limit, headroom_bytes=0), **changes
    )


# Data first.


def test_frames_are_pandas_frames_whose_rows_say_how_they_came_to_be() -> None:
    found = frames(made_up_plan())
    assert list(found) == [
        "figures", "peaks", "points", "composition", "timeline", "times", "plans", "recordings", "budget",
        "environment",
    ]  # fmt: skip
    for name, frame in found.items():
        assert isinstance(frame, pd.DataFrame) and len(frame), name
        assert name == "environment" or set(frame["kind"]) <= set(Kind)


def test_the_plans_own_row_says_what_the_plan_says() -> None:
    plan = a_plan()
    plans = frames(plan)["plans"]
    chosen = plans[plans["chosen"]]
    assert list(chosen["accumulation_steps"]) == [8] and list(chosen["peak_bytes"]) == [plan.predicted_peak_bytes]
    assert list(chosen["fits"]) == [True]
    fewer = plans[plans["accumulation_steps"] == 7]
    assert list(fewer["fits"]) == [False] and list(fewer["split"]) == ["1 \u00d7 74 + 6 \u00d7 73"]
    assert (plans["accumulation_steps"].diff().dropna() > 0).all() and plans["accumulation_steps"].max() == 512


def steps_one_by_one(plan: Plan, samples: int) -> list[int]:
    """The numbers of steps that a table knows, found by making every split."""
    table = what_if.table_of(plan)
    assert table is not None
    return [k for k in range(1, samples // table.least + 1) if table.is_exact(balanced(samples, k))]


@pytest.mark.parametrize("least", [1, 2])
@pytest.mark.parametrize("sizes", [range(1, 141), (1, 2, 3, 7, 8, 64), (1, 5, 6), (64,)], ids=str)
def test_the_known_numbers_of_steps_are_those_found_one_by_one(sizes: Any, least: int) -> None:
    rows = tuple(PeakRow(n, (22 + 7 * n) * MIB, (30 + 7 * n) * MIB, 60 * MIB) for n in sizes)
    for samples in (64, 97, 512):
        plan = a_plan(peaks=rows, min_micro_batch=least)
        plan = changed_plan(plan, target_batch=samples, split=balanced(samples, 8), micro_batch=-(-samples // 8))
        found = frames(plan)["plans"]
        known = list(found["accumulation_steps"])
        assert known == sorted({*steps_one_by_one(plan, samples), plan.accumulation_steps})
        table = what_if.table_of(plan)
        assert table is not None
        for steps, peak in zip(known, found["peak_bytes"], strict=True):
            own = steps == plan.accumulation_steps
            assert peak == (plan.predicted_peak_bytes if own else table.peak_bytes(balanced(samples, steps)))


@pytest.mark.parametrize(("steps", "size"), [(5_000, 1), (1_000_000, 1), (999_999, 7)])
def test_a_report_of_a_million_steps_takes_no_longer_than_one_of_eight(steps: int, size: int) -> None:
    plan = a_plan(target_batch=steps * size, split=(size,) * steps, micro_batch=size, accumulation_steps=steps)
    before = time.process_time()
    for suffix in (".html", ".md", ".csv", ".json"):
        assert len(render(plan, suffix)) < 1_000_000
    assert time.process_time() - before < 3
    plans = frames(plan)["plans"]
    assert len(plans) <= MOST_PLANS + 1 and list(plans[plans["chosen"]]["accumulation_steps"]) == [steps]


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"device_name": "cpu", "is_virtual": False}, "measured on this CPU"),
        ({"device_name": "NVIDIA H100", "is_virtual": False}, "measured on a GPU"),
        ({"device_name": "Virtual GPU", "is_virtual": True}, "real allocator on a virtual GPU"),
    ],
)
def test_measured_figures_are_marked_by_the_device(changes: dict[str, Any], kind: str) -> None:
    plan = a_plan(**changes)
    assert measured(plan).value == kind
    figures = frames(plan)["figures"].set_index("figure")
    assert figures.loc["peak, measured", "kind"] == kind and figures.loc["peak, predicted", "kind"] == "predicted"
    page, text = render(plan, ".html"), render(plan, ".md")
    assert kind in page.split("<h2")[0] and kind in text
    others = {"measured on this CPU", "measured on a GPU", "real allocator on a virtual GPU"} - {kind}
    assert not any(other in page.split("<footer>")[0] for other in others)


def test_the_page_draws_each_size_with_its_range_and_tells_the_knee() -> None:
    seconds = {8: 2.0, 16: 1.02, 32: 1.001, 64: 1.0}
    times = tuple(TimedSize(n, s, 9, tuple(s * (1 + i / 10000) for i in range(9))) for n, s in seconds.items())
    plan = a_plan(timed_sizes=times, is_virtual=False)
    page, text = render(plan, ".html"), render(plan, ".md")
    for message in (page, text):
        assert "32 is the smallest micro-batch within 1 % of the fastest, 64" in message and "free 224.0 MiB" in message
    assert page.count('<i class="range"') == 4 and page.count('class="point knee"') == 1
    assert list(frames(plan)["times"]["is_knee"]) == [False, False, True, False]
    assert 'id="times-plot"' in page and 'id="times-plot"' not in render(a_plan(timed_sizes=()), ".html")


# Answers from the table.


@settings(max_examples=300, deadline=None)
@given(
    target=st.integers(1, 3000),
    budget=st.integers(930 * MIB, 2600 * MIB),
    ranks=st.integers(1, 4),
    least=st.integers(1, 2),
    most=st.none() | st.integers(1, 200),
)
def test_what_if_gives_the_fewest_steps_that_fit_by_brute_force(
    target: int, budget: int, ranks: int, least: int, most: int | None
) -> None:
    plan = a_plan(world_size=ranks, min_micro_batch=least, max_micro_batch=most)
    table = what_if.table_of(plan)
    assert table is not None
    found = what_if.answer(table, target, budget)
    samples = -(-target // ranks)
    splits = [balanced(samples, k) for k in range(1, samples + 1)]
    allowed = [s for s in splits if s[-1] >= least and s[0] <= (most or s[0])]
    if not allowed or target < ranks:
        assert found.status == "invalid"
        return
    peaks = {s: table.peak_bytes(s) for s in allowed}
    fitting = [s for s, peak in peaks.items() if peak is not None and peak <= int(budget * (1 - CAPACITY_MARGIN))]
    if not fitting:
        assert found.status == "does not fit" and found.missing_bytes > 0
        return
    assert found.status == "fits" and found.steps == len(fitting[0]) and found.peak_bytes == peaks[fitting[0]]
    assert sum(count * size for count, size in found.split) == samples


@pytest.mark.slow
def test_what_if_answers_as_the_solver_does_from_replays() -> None:
    """Over recordings of real models: the same steps, and a peak within the small heap blocks' difference."""
    rules, checked, same = CpuRules(131072), 0, 0
    for recorded in recorded_programs()[:6]:
        program = lift(recorded.recordings, recorded.first_step_events)

        def peaks(split: tuple[int, ...], program: Any = program, recorded: Any = recorded) -> dict[str, int]:
            phases = [Phase("first step", recorded.first_step_events), *window(program, split)]
            return {phase.name: phase.bytes for phase in replay(phases, rules).phases}

        rows = []
        for n in range(1, 61):
            found = peaks((n, n))
            rows.append(PeakRow(n, found["first"], found["later"], found["optimizer"]))
        table = what_if.Table(tuple(rows), 0, 0, 0.0, 0, 1, 1, 60)
        for target in (60, 97, 128):
            for at in (9, 23, 41):
                budget = int(rows[at].peak_bytes(2) / (1 - CAPACITY_MARGIN)) + 4096
                usable = int(budget * (1 - CAPACITY_MARGIN))

                def truth(split: tuple[int, ...]) -> int:
                    return max(size for name, size in peaks(split[:2] + split[-1:]).items() if name != "first step")

                solved = smallest_steps(
                    lambda s, truth=truth, usable=usable: truth(s) <= usable, lambda n: 0,
                    samples=target, budget_bytes=usable, max_size=60,
                )  # fmt: skip
                assert solved is not None
                answer = what_if.answer(table, target, budget)
                mine = balanced(target, answer.steps)
                assert answer.peak_bytes == pytest.approx(truth(mine), rel=0.005)
                if answer.steps != len(solved.split):  # a matter of those few bytes, at the very border
                    assert abs(truth(mine) - usable) <= 0.005 * usable
                checked, same = checked + 1, same + (answer.steps == len(solved.split))
    assert checked == 54 and same >= 50


def test_what_if_at_the_plans_own_settings_is_the_plan() -> None:
    plan = a_plan()
    table = what_if.table_of(plan)
    assert table is not None
    found = what_if.ask(table, "512", "1400MiB", "")
    assert (found.steps, found.split, found.peak_bytes) == (8, ((8, 64),), plan.predicted_peak_bytes)


def test_what_if_repeats_a_size_that_fits_where_the_balanced_split_does_not_and_answers_its_own_plan() -> None:
    table = uneven_table()
    assert what_if.answer(table, 512, 1400 * MIB).split == ((6, 79), (1, 38)), "the plan's own answer"
    assert what_if.answer(table, 228, 1560 * MIB).split == ((2, 80), (1, 68))  # 76 takes more than 80
    assert what_if.answer(table, 152, 1560 * MIB).split == ((1, 83), (1, 69))  # with 80 to 82 the rest would not fit
    assert what_if.answer(replace(table, most=79), 228, 1560 * MIB).split == ((4, 57),)
    own = what_if.ask(table, "512", "1400MiB", "")
    assert (own.status, own.split, own.peak_bytes) == ("fits", ((6, 79), (1, 38)), 1399 * MIB)


def test_a_plan_that_is_not_balanced_stands_in_the_list_of_plans_as_it_is() -> None:
    split = (80,) * 6 + (32,)
    plan = a_plan(split=split, micro_batch=80, accumulation_steps=7, peaks=a_plan().memory.peaks[20:])
    plans = frames(plan)["plans"]
    chosen = plans[plans["chosen"]]
    assert list(chosen["split"]) == ["6 \u00d7 80 + 1 \u00d7 32"] and list(chosen["micro_batch"]) == [80]
    assert list(chosen["fits"]) == [True] and list(chosen["peak_bytes"]) == [plan.predicted_peak_bytes]
    assert list(plans["accumulation_steps"]).count(7) == 1
    assert "6 \u00d7 80 + 1 \u00d7 32" in render(plan, ".html")


def test_what_if_says_where_its_table_ends_or_has_gaps() -> None:
    plan = a_plan()
    table = what_if.table_of(plan)
    assert table is not None
    assert what_if.answer(table, 512, 1400 * MIB).beyond is False
    beyond = what_if.answer(table, 512, 4000 * MIB)
    assert beyond.beyond and beyond.split == ((4, 128),)
    sparse = replace(table, rows=table.rows[::10], chosen=None)
    found = what_if.answer(sparse, 512, 1400 * MIB)
    assert found.at_most and found.peak_bytes > (table.peak_bytes(balanced(512, found.steps)) or 0)
    assert what_if.table_of(a_plan(peaks=())) is None and "what-if-form" not in render(a_plan(peaks=()), ".html")


def test_a_target_of_a_million_is_answered_at_once() -> None:
    table = what_if.table_of(a_plan(sample_bytes=1, input_bytes=512))
    assert table is not None
    assert what_if.answer(table, 1_000_000, 1400 * MIB).status == "fits"
    assert what_if.answer(table, 1_000_000, 900 * MIB).status == "does not fit"


@settings(max_examples=300, deadline=None)
@given(
    data=st.data(),
    samples=st.integers(1, 250),
    least=st.integers(1, 5),
    most=st.integers(1, 250),
    peaks=st.lists(st.tuples(*[st.integers(0, 6)] * 4), min_size=1, max_size=40),
)
def test_steps_that_are_passed_over_hold_no_answer_the_solver_would_find(
    data: st.DataObject, samples: int, least: int, most: int, peaks: list[tuple[int, int, int, int]]
) -> None:
    sizes = data.draw(st.lists(st.integers(1, 260), min_size=len(peaks), max_size=len(peaks), unique=True).map(sorted))
    rows = tuple(PeakRow(n, *(100 * each for each in row)) for n, row in zip(sizes, peaks, strict=True))
    table = what_if.Table(rows, 0, 0, 0.0, 0, 1, least, most)
    found, reach = what_if.answer(table, samples, 350), min(most, samples)
    if samples < least or samples // least < -(-samples // reach):
        assert found.status == "invalid"
        return

    def fits(split: tuple[int, ...]) -> bool:
        peak = table.peak_bytes(split)
        return peak is not None and peak <= 343

    solved = smallest_steps(fits, lambda n: 0, samples=samples, budget_bytes=343, min_size=least, max_size=reach)
    split = balanced(samples, samples // least) if solved is None else solved.split
    assert found.status == ("does not fit" if solved is None else "fits")
    assert [size for count, size in found.split for _ in range(count)] == list(split)


def too_large_to_end() -> what_if.Table:
    """A table of which no window of millions fits, though each of its micro-batches does."""
    rows = (PeakRow(52, MIB, MIB, MIB, 10**12), PeakRow(10**7, MIB, MIB, 10**12))
    return what_if.Table(rows, 0, 0, 0.0, 0, 1, 1, None)


def test_millions_of_steps_are_answered_at_once_where_nothing_fits() -> None:
    before = time.process_time()
    found = what_if.ask(too_large_to_end(), "9999999", "80GiB", "5%")
    assert found.status == "does not fit" and found.split == ((9999999, 1),)
    assert time.process_time() - before < 3


# The same in JavaScript.


def uneven_table() -> what_if.Table:
    """A table as of a caching allocator: every other decade of sizes takes a quarter more."""
    plain = what_if.table_of(a_plan())
    assert plain is not None
    rows = tuple(
        replace(row, first_bytes=row.first_bytes * 5 // 4, later_bytes=row.later_bytes * 5 // 4)
        if row.micro_batch // 10 % 2
        else row
        for row in plain.rows
    )
    return replace(plain, rows=rows, chosen=what_if.Chosen(512, 1400 * MIB, ((6, 79), (1, 38)), 1399 * MIB))


def tables() -> list[what_if.Table]:
    plain = what_if.table_of(a_plan())
    assert plain is not None
    return [
        plain,
        replace(plain, malloc_overhead=0.25, history_bytes=3 * MIB + 17, least=2, world_size=3),
        replace(plain, rows=plain.rows[::7], most=50),
        replace(plain, sample_bytes=0, rows=plain.rows[:30]),
        uneven_table(),
        too_large_to_end(),
    ]


def questions(count: int) -> list[tuple[str, str, str]]:
    rng = random.Random(5)
    sizes = ["1.001KB", "0.9999GiB", "1.5 gib", "1400MiB", "1.4GB", "2T", "x", "", "-1", "0", "1e9", "1.GiB"]
    parts = ["", "0", "5%", "0.1%", "33.333%", "100%", "200MiB", "2000MiB", "abc", "99.999999%", "1.7 MB"]
    targets = ["1", "2", "3", "512", "007", "999999", "9999999", "1.5", "", "abc", "12345678", " 64 "]
    asked = [(t, "1400MiB", "") for t in targets] + [("512", s, p) for s in sizes for p in parts[:3]]
    asked += [("256", "1500MiB", part) for part in parts]
    while len(asked) < count:
        memory = f"{rng.uniform(0.85, 3):.{rng.randint(0, 6)}f}{rng.choice(['GiB', 'GB', 'G', 'gib'])}"
        asked.append((str(rng.randint(1, 3000)), memory, rng.choice(parts)))
    return asked


def as_page_has_it(found: what_if.Answer) -> dict[str, Any]:
    """JSON knows no tuples."""
    back: dict[str, Any] = json.loads(json.dumps(asdict(found)))
    return back


def test_the_questions_reach_every_kind_of_answer() -> None:
    found = [what_if.ask(table, *question) for table in tables() for question in questions(150)]
    assert {answer.status for answer in found} == {"fits", "does not fit", "invalid"}
    assert any(answer.beyond for answer in found) and any(answer.at_most for answer in found)
    assert len({answer.why for answer in found}) >= 6


@needs_node
def test_javascript_answers_as_python_does_in_node(tmp_path: Path) -> None:
    asked = questions(250)
    known = tables()
    (tmp_path / "asked.json").write_text(json.dumps([[what_if.for_page(t) for t in known], asked]))
    code = (
        f"const whatIf = require({json.dumps(str(SCRIPT))});"
        f"const [tables, asked] = JSON.parse(require('fs').readFileSync({json.dumps(str(tmp_path / 'asked.json'))}));"
        "console.log(JSON.stringify(tables.map((table) => asked.map((each) => whatIf.ask(table, ...each)))));"
    )
    out = subprocess.run([str(NODE), "-e", code], capture_output=True, text=True, check=True, timeout=60)
    for table, answers in zip(known, json.loads(out.stdout), strict=True):
        for question, answer in zip(asked, answers, strict=True):
            assert answer == as_page_has_it(what_if.ask(table, *question)), question


def dump_dom(page: Path, *, fragment: str = "", flags: tuple[str, ...] = ()) -> str:
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000", *flags]
    url = page.as_uri() + fragment
    profile = f"--user-data-dir={page.parent / 'profile'}"
    out = subprocess.run([*command, profile, "--dump-dom", url], capture_output=True, text=True, timeout=120)
    assert out.returncode == 0, out.stderr
    return out.stdout


def output_of(dom: str) -> tuple[dict[str, Any], str]:
    match = re.search(r'<output id="what-if-answer"([^>]*)>(.*?)</output>', dom, flags=re.S)
    assert match is not None
    data = re.search(r'data-answer="([^"]*)"', match[1])
    assert data is not None, "the page's script did not run"
    return json.loads(html.unescape(data[1])), html.unescape(match[2])


@needs_chromium
def test_the_box_answers_as_python_does_in_a_browser(tmp_path: Path) -> None:
    """Every question is typed into the real page's own fields; a test's script beside it writes the answers down."""
    plan = a_plan()
    table, asked = what_if.table_of(plan), questions(150)
    assert table is not None
    typist = (
        "const message = [], form = document.getElementById('what-if-form');"
        "const output = document.getElementById('what-if-answer');"
        f"for (const each of {json.dumps(asked)}) {{"
        "  ['target', 'memory', 'headroom'].forEach((name, i) => { form.elements.namedItem(name).value = each[i]; });"
        "  form.dispatchEvent(new Event('input', { bubbles: true }));"
        "  message.push([output.dataset.answer, output.textContent]); }"
        "const pre = document.createElement('pre'); pre.id = 'message';"
        "pre.textContent = JSON.stringify(message); document.body.append(pre);"
    )
    page = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", render(plan, ".html"))
    (tmp_path / "page.html").write_text(page.replace("</body>", f"<script>{typist}</script></body>"))
    match = re.search(r'<pre id="message">(.*?)</pre>', dump_dom(tmp_path / "page.html"), flags=re.S)
    assert match is not None
    message = json.loads(html.unescape(match[1]))
    assert len(message) >= 100
    for question, (answer, text) in zip(asked, message, strict=True):
        expected = what_if.ask(table, *question)
        assert json.loads(answer) == as_page_has_it(expected), question
        if expected.status == "fits":
            assert f"{expected.steps:,} accumulation step" in text
        elif expected.status == "does not fit":
            assert f"({expected.missing_bytes:,} bytes) are missing" in text
        else:
            assert text == expected.why


@needs_chromium
def test_the_box_reads_its_question_from_the_address_and_runs_under_the_pages_own_policy(tmp_path: Path) -> None:
    plan = a_plan()
    table = what_if.table_of(plan)
    assert table is not None
    (tmp_path / "page.html").write_text(render(plan, ".html"))
    answer, text = output_of(dump_dom(tmp_path / "page.html"))
    assert answer["peak_bytes"] == plan.predicted_peak_bytes and text.startswith("8 accumulation steps: 8 \u00d7 64.")
    answer, _ = output_of(dump_dom(tmp_path / "page.html", fragment="#target=100&memory=1.2GiB&headroom=5%25"))
    assert answer == as_page_has_it(what_if.ask(table, "100", "1.2GiB", "5%"))


NARROW = """
const high = (each) => each.getBoundingClientRect().height;
const line = (each) => parseFloat(getComputedStyle(each).lineHeight);
const pre = document.createElement('pre'); pre.id = 'message';
pre.textContent = JSON.stringify({
  wide: document.documentElement.scrollWidth - document.documentElement.clientWidth,
  heads: [...document.querySelectorAll('thead tr')].map((each) => high(each) / line(each.cells[0])),
  legends: [...document.querySelectorAll('.legend li')].map((each) =>
    Math.abs(each.children[0].getBoundingClientRect().top - each.children[1].getBoundingClientRect().top)
      / line(each)),
});
document.body.append(pre);
"""


@needs_chromium
def test_on_a_phone_nothing_is_cut_off_and_tables_keep_one_line_for_their_heads(tmp_path: Path) -> None:
    plan = a_plan(target_batch=10_000, split=(1,) * 10_000, micro_batch=1, accumulation_steps=10_000)
    page = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", render(plan, ".html"))
    (tmp_path / "page.html").write_text(page.replace("</body>", f"<script>{NARROW}</script></body>"))
    dom = dump_dom(tmp_path / "page.html", flags=("--window-size=500,900",))  # the least that a window may have
    match = re.search(r'<pre id="message">(.*?)</pre>', dom, flags=re.S)
    assert match is not None
    found = json.loads(html.unescape(match[1]))
    assert found["wide"] == 0
    assert len(found["heads"]) >= 3 and max(found["heads"]) < 2
    assert len(found["legends"]) >= 5 and max(found["legends"]) < 1  # the sign stands beside its words


def test_counts_are_written_with_commas_and_in_good_english() -> None:
    many = a_plan(target_batch=10_000, split=(1,) * 10_000, micro_batch=1, accumulation_steps=10_000)
    assert "accumulate 10,000 micro-batches of 1:" in words.answer(many)
    assert words.fewer(many) == "9,999 steps would fit too, according to the table of peaks: plan again to verify."
    tight = changed_plan(a_plan(), budget=replace(a_plan().memory.budget, bytes=1390 * MIB))
    assert words.fewer(tight).startswith("7 steps would need micro-batches of up to 74 and 1.40 GiB, 40.0 MiB over")
    for plan in (many, tight):
        assert "by the measured" not in words.answer(plan) and "the first 1 are" not in render(plan, ".html")


# What is the user's is text, and nothing else.


def nasty_plan() -> Plan:
    return a_plan(
        workload=NASTY, exactness=NASTY, notes=(NASTY,), fingerprint={NASTY: NASTY, "model": NASTY},
        binding_constraint=NASTY, environment={NASTY: NASTY},
        reasons={name: NASTY for name in a_plan().provenance.reasons},
    )  # fmt: skip


class Elements(HTMLParser):
    """The elements that a browser would make, and the text outside of scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1] not in ("script", "style"):
            self.text.append(data)


def test_bad_names_make_no_elements() -> None:
    nasty, plain = Elements(render(nasty_plan(), ".html")), Elements(render(a_plan(), ".html"))
    assert nasty.tags.count("script") == plain.tags.count("script") == 2 and "img" not in nasty.tags
    assert not any(name.startswith("on") for name, _ in nasty.attributes)
    assert NASTY in "".join(nasty.text)


@needs_chromium
def test_bad_names_are_shown_and_not_run_in_a_browser(tmp_path: Path) -> None:
    """Even with the page's security policy taken out, a marker that any of them would leave isn't there."""
    plan = nasty_plan()
    markers = render(plan, ".html").replace("alert(", "document.title='ran'+(")
    without_policy = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", markers)
    (tmp_path / "page.html").write_text(without_policy)
    dom = dump_dom(tmp_path / "page.html")
    title = re.search(r"<title>(.*?)</title>", dom, flags=re.S)
    assert title is not None and "ran1" not in title[1] and 'my "quoted"' in title[1]
    assert "<img" not in dom and dom.count("<script") == 2
    assert output_of(dom)[0]["status"] == "fits"  # the page's own script did run


def test_markdown_and_csv_hold_no_markup_and_no_formula() -> None:
    text = render(nasty_plan(), ".md")
    assert "<script" not in text.replace("\\<", "") and "](javascript" not in text
    plan = a_plan(fingerprint={"=cmd|' /C calc'!A0": "@SUM(1)", "model": "-1+1"})
    cells = [cell for row in csv.reader(io.StringIO(render(plan, ".csv"))) for cell in row]
    assert not [cell for cell in cells if cell.startswith(("=", "@", "+"))]
    assert "'@SUM(1)" in cells and "'-1+1" in cells


# One file that anyone can open.


def test_the_page_is_one_small_file_that_loads_nothing() -> None:
    rows = tuple(PeakRow(n, 2**40 + n, 2**41 + n, 2**39, 2**38) for n in range(1, 513))
    plan = a_plan(peaks=rows)
    page = render(plan, ".html")
    assert len(page.encode()) < 400 * 1024
    assert "default-src 'none'" in page
    parsed = Elements(page)
    assert not {"link", "img", "iframe", "object", "embed", "base"} & set(parsed.tags)
    assert not [name for name, _ in parsed.attributes if name in ("src", "href", "srcset", "action", "xlink:href")]
    assert "@import" not in page and "url(" not in page and "http://" not in page and "https://" not in page


def test_without_javascript_the_page_is_a_whole_report() -> None:
    page = render(a_plan(), ".html")
    assert re.search(r'<section id="what-if"[^>]* hidden>', page) and "<noscript>" in page
    for title in (
        "Peak against micro-batch",
        "Memory at the peak",
        "Live memory through the window",
        "All plans for 512",
    ):
        assert title in page
    answer = re.search(r"<h1>(.*?)</h1>", page)
    assert answer is not None and "accumulate 8 micro-batches of 64" in answer[1]


def test_every_field_of_the_box_has_a_label_and_its_answer_is_announced() -> None:
    page = render(a_plan(), ".html")
    for name in ("what-if-target", "what-if-memory", "what-if-headroom"):
        assert f'<label for="{name}">' in page and f'<input id="{name}"' in page
    assert re.search(r'<output id="what-if-answer"[^>]*aria-live="polite"', page)
    assert page.count('role="img" aria-label="') == 2 + 1


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    """WCAG 2.2's contrast ratio."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [0, 1, 2], ids=["light", "dark", "print"])
def test_text_and_graphics_have_the_contrast_that_wcag_aa_asks_for(theme: int) -> None:
    style = SCRIPT.with_name("page.css").read_text()
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{3,6});", style.split(":root {")[theme + 1].split("}")[0]))
    full = {
        name: value if len(value) == 7 else "#" + "".join(2 * c for c in value[1:]) for name, value in colours.items()
    }
    for text in ("ink", "quiet", "accent", "over", "measured", "virtual", "given"):
        assert contrast(full[text], full["panel"]) >= 4.5, text
        assert contrast(full[text], full["ground"]) >= 4.5, text
    parts = ("process", "parameters", "optimizer-state", "gradients", "activations", "temporaries", "data", "cached")
    for graphic in (*parts, "focus"):
        assert contrast(full[graphic], full["panel"]) >= 3, graphic


# The command.


def run(*args: str, code: int = 0, without_torch: bool = True) -> subprocess.CompletedProcess[str]:
    start = "import sys; sys.modules['torch'] = None; " if without_torch else ""
    command = [sys.executable, "-c", start + "from autoaccum.cli import main; main()", "report", *args]
    out = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
    assert out.returncode == code, out.stdout + out.stderr
    return out


def refusal(*args: str) -> str:
    """What the command says, in this process, where it refuses."""
    error = CliRunner().invoke(app, ["report", *args]).exception
    assert isinstance(error, UsageError)
    return f"{error} {error.hint}"


@pytest.mark.parametrize("suffix", [".html", ".md", ".csv", ".json"])
def test_a_report_is_made_from_the_file_alone_where_torch_cannot_be_imported(suffix: str, tmp_path: Path) -> None:
    plan = a_plan(workload="gone.py:workload", device_name="NVIDIA H100 80GB HBM3")
    plan.save(tmp_path / "plan.json")
    out = run(str(tmp_path / "plan.json"), "-o", str(tmp_path / f"report{suffix}"))
    assert out.stdout == "" and "wrote" in out.stderr
    text = (tmp_path / f"report{suffix}").read_text()
    assert text == render(plan, suffix) and len(text) > 1000
    if suffix == ".json":
        report = json.loads(text)
        assert list(report["tables"]) == list(frames(plan)) and "8 micro-batches of 64" in report["answer"]


def test_the_command_refuses_what_it_cannot_do_and_says_what_to_type(tmp_path: Path) -> None:
    plan, there = tmp_path / "plan.json", tmp_path / "report.html"
    a_plan().save(plan)
    there.write_text("mine")
    assert "--force" in run(str(plan), "-o", str(there), code=2).stderr and there.read_text() == "mine"
    assert ".html" in refusal(str(plan), "-o", str(tmp_path / "report.pdf"))
    assert "no folder" in refusal(str(plan), "-o", str(tmp_path / "no" / "report.html"))
    assert "cannot be read" in refusal(str(tmp_path / "no.json"))
    assert run(str(plan)).stdout.startswith("# chargpt: autoaccum report")
    with pytest.raises(UsageError):
        render(a_plan(), ".pdf")


def test_plans_of_other_kinds_are_reported_too() -> None:
    plain = dict(composition={}, timeline=(), timed_sizes=(), environment={})
    others = [
        a_plan(**plain),
        a_plan(**plain, peaks=()),
        a_plan(split=(512,), micro_batch=512, accumulation_steps=1),
        a_plan(measured_peak_bytes=None, resident_peak_bytes=None, window_seconds=None),
        made_up_plan(),
        a_plan(sample_bytes=0),
    ]
    for plan in others:
        for suffix in (".html", ".md", ".csv", ".json"):
            assert str(plan.micro_batch) in render(plan, suffix)
