"""The plan as a value and as JSON: what is read back, what is refused, and what loads no torch."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from plan_fields import PLACES, SECTIONS, changed_json, changed_plan
from strategies import made_up_plan, plans

import autoaccum
from autoaccum.errors import PlanFileError, UsageError
from autoaccum.files.whole import write_whole
from autoaccum.plan import KIND, SCHEMA_VERSION, Plan, RankEntry

HERE = Path(__file__).parent
PURE = (
    "simulation.solver", "simulation.program", "simulation.malloc", "simulation.cuda_allocator.allocator",
    "simulation.recording", "plan", "plan.reader", "budget", "units", "files.whole", "errors", "reporting.explain",
    "reporting.page",
)  # fmt: skip


def refused(text: str) -> PlanFileError:
    """The three-part error that reading that text is."""
    with pytest.raises(PlanFileError) as raised:
        Plan.from_json(text)
    assert all((raised.value.what, raised.value.why, raised.value.hint))
    assert len(str(raised.value).splitlines()) >= 3
    return raised.value


def changed(**changes: Any) -> str:
    """The JSON of a plan in which some things are otherwise."""
    return json.dumps(changed_json(json.loads(made_up_plan().to_json()), **changes))


# The value.


def test_a_plan_is_frozen() -> None:
    plan = made_up_plan()
    for value in (plan, *(getattr(plan, section) for section in SECTIONS)):
        for field in dataclasses.fields(value):
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(value, field.name, None)


def test_made_up_plans_leave_no_field_to_its_default() -> None:
    plan = made_up_plan()
    for section in [each for each in SECTIONS if each != "distribution"]:  # left out of a file for one process
        value = getattr(plan, section)
        for field in dataclasses.fields(value):
            assert field.default is dataclasses.MISSING or getattr(value, field.name) != field.default, field.name


def test_no_two_sections_share_a_fields_name_and_what_people_type_is_a_property() -> None:
    assert len(PLACES) == sum(len(dataclasses.fields(kind)) for kind in SECTIONS.values())  # type: ignore[arg-type]
    plan = made_up_plan()
    for name in (
        "target_batch", "world_size", "micro_batch", "accumulation_steps", "split", "largest_micro_batch",
        "predicted_peak_bytes", "measured_peak_bytes", "exactness", "method", "notes",
    ):  # fmt: skip
        section, field = PLACES[name]
        assert getattr(plan, name) == getattr(getattr(plan, section), field)
    assert plan.budget_bytes == plan.memory.budget.bytes


def test_a_plan_with_every_field_comes_back_from_json_the_same() -> None:
    plan = made_up_plan()
    back = Plan.from_json(plan.to_json())
    assert back == plan
    for name, (section, field) in PLACES.items():
        ours, theirs = (getattr(getattr(each, section), field) for each in (plan, back))
        assert type(ours) is type(theirs), name
    assert back.to_json() == plan.to_json()


@given(plan=plans())
def test_a_plan_of_any_numbers_and_texts_comes_back_from_json_the_same_and_explains_itself(plan: Plan) -> None:
    back = Plan.from_json(plan.to_json())
    assert back == plan
    assert back.explain() == plan.explain()


def test_a_plan_comes_back_from_its_file_the_same(tmp_path: Path) -> None:
    plan = made_up_plan(workload="für ☃.py:f")
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_the_smaller_share_of_uneven_ranks_is_a_plan_too() -> None:
    plan = made_up_plan(target_batch=10, world_size=3, split=(2, 1), micro_batch=2, accumulation_steps=2)
    assert Plan.from_json(plan.to_json()) == plan


def test_uneven_ranks_come_back_from_a_file_and_must_add_up() -> None:
    splits = ((2, 1), (5,), (2,))
    ranks = tuple(RankEntry("cpu", split, 10, 20, max(split)) for split in splits)
    plan = made_up_plan(
        target_batch=10, world_size=3, split=(2, 1), micro_batch=2, accumulation_steps=2,
        ranks=ranks, parallel="ddp", shares_by="speed",
    )  # fmt: skip
    back = Plan.from_json(plan.to_json())
    assert back == plan and back.shares == (3, 5, 2) and back.parallel == "ddp"
    assert back.for_rank(1).split == (5,) and back.for_rank(1).micro_batch == 5 and back.for_rank(0).split == back.split
    assert [entry.accumulation_steps for entry in back.ranks] == [2, 1, 1]
    assert "3 ranks have 3, 5, 2 of 10" in plan.explain()
    for wrong in (
        ranks[:2],
        (*ranks[:2], dataclasses.replace(ranks[2], split=(3,))),
        (*ranks[:2], dataclasses.replace(ranks[2], split=())),
    ):
        data = changed_json(json.loads(plan.to_json()), ranks=[dataclasses.asdict(each) for each in wrong])
        assert "does not add up" in refused(json.dumps(data)).what


# Files that are no plans.


@pytest.mark.parametrize("part", range(50))
def test_a_plan_that_is_cut_short_anywhere_is_refused(part: int, tmp_path: Path) -> None:
    text = made_up_plan().to_json().rstrip()
    refused(text[: len(text) * part // 50])
    (tmp_path / "plan.json").write_text(text[: len(text) * part // 50])
    with pytest.raises(PlanFileError):
        Plan.load(tmp_path / "plan.json")


@pytest.mark.parametrize(
    "text",
    ["", "null", "[]", "{}", "3", '"plan"', "NaN", '{"kind": "lock file"}', '{"kind": ["autoaccum plan"]}', "[" * 10**5,
     "1" * 10**4, '{"kind": "autoaccum plan"}', "\x00", "\ufeff{}"],
    ids=lambda text: text[:20],
)  # fmt: skip
def test_foreign_json_is_refused(text: str) -> None:
    refused(text)


@pytest.mark.parametrize("version", [SCHEMA_VERSION + 1, 99])
def test_a_plan_of_a_newer_version_is_refused_and_says_what_to_do(version: int) -> None:
    error = refused(changed(schema_version=version))
    assert str(version) in error.what
    assert "upgrade" in error.hint


@pytest.mark.parametrize("version", ["1", None, True, 1.5, 0, -1])
def test_a_schema_version_that_cannot_be_is_refused(version: Any) -> None:
    refused(changed(schema_version=version))


def test_a_plan_of_the_first_version_is_refused_and_is_to_be_made_again() -> None:
    error = refused(json.dumps({"kind": KIND, "schema_version": 1, "target_batch": 512, "split": [256, 256]}))
    assert "schema version 1" in error.what and "older" in error.why and "Plan again" in error.hint


NEEDED = [
    (section, field.name)
    for section, kind in SECTIONS.items()
    for field in dataclasses.fields(kind)  # type: ignore[arg-type]
    if field.default is field.default_factory is dataclasses.MISSING
]


@pytest.mark.parametrize(("section", "name"), NEEDED, ids=lambda name: name)
def test_a_plan_that_lacks_a_field_is_refused_by_its_name(section: str, name: str) -> None:
    data = json.loads(made_up_plan().to_json())
    del data[section][name]
    assert f"{section}.{name}" in refused(json.dumps(data)).what
    data[section][name] = {"x": [None]}
    assert f"{section}.{name}" in refused(json.dumps(data)).what


@pytest.mark.parametrize("section", [each for each in SECTIONS if each != "distribution"])
def test_a_plan_that_lacks_a_section_is_refused_by_its_name(section: str) -> None:
    data = json.loads(made_up_plan().to_json())
    del data[section]
    assert section in refused(json.dumps(data)).what


BUDGET = json.loads(made_up_plan().to_json())["memory"]["budget"]


@pytest.mark.parametrize(
    "changes",
    [
        {"split": [52, 51, 51, 51, 50]},
        {"split": [52, 51, 51, 51, 52]},
        {"split": [256]},
        {"split": []},
        {"split": [], "accumulation_steps": 0},
        {"split": [256, 0, 0, 0, 0], "micro_batch": 256},
        {"split": [309, -53, 0, 0, 0], "micro_batch": 309},
        {"accumulation_steps": 4},
        {"micro_batch": 51},
        {"target_batch": 256},
        {"world_size": 1},
        {"world_size": 0},
        {"budget": {**BUDGET, "binding_constraint": "nothing"}},
        {"budget": {**BUDGET, "bytes": 0}},
        {"phases": {"warm-up": 5}},
        {"recordings": []},
        {"reasons": {}},
        {"measured_peak_bytes": 0},
        {"resident_peak_bytes": None},
    ],
    ids=str,
)
def test_a_plan_that_does_not_add_up_is_refused(changes: dict[str, Any]) -> None:
    assert "does not add up" in refused(changed(**changes)).what


@pytest.mark.parametrize("content", [b"\x80\x04\x95", b"\x00" * 100, bytes(range(256)), b"PK\x03", b"\xff\xfe{\x00"])
def test_binary_garbage_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_bytes(content)
    with pytest.raises(PlanFileError) as raised:
        Plan.load(tmp_path / "plan.json")
    assert all((raised.value.what, raised.value.why, raised.value.hint))


@pytest.mark.parametrize("name", ["missing.json", ".", "no/such/folder/plan.json", "nul\0.json", "x" * 300])
def test_a_file_that_cannot_be_read_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(PlanFileError) as raised:
        Plan.load(f"{tmp_path}/{name}")
    assert all((raised.value.what, raised.value.why, raised.value.hint))


# Writing.


@pytest.mark.parametrize("name", [".", "no/such/folder/plan.json", "nul\0.json", "x" * 300])
def test_a_file_that_cannot_be_written_is_a_usage_error_and_leaves_nothing_behind(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(UsageError) as raised:
        made_up_plan().save(f"{folder}/{name}")
    assert all((raised.value.what, raised.value.why, raised.value.hint))
    assert list(folder.iterdir()) == []
    assert list(tmp_path.iterdir()) == [folder]


def test_a_full_disk_is_a_usage_error_and_leaves_the_old_file(tmp_path: Path) -> None:
    def full(file: object) -> None:
        raise OSError(28, "No space left on device")

    made_up_plan().save(tmp_path / "plan.json")
    with pytest.raises(UsageError, match="No space left"):
        write_whole(tmp_path / "plan.json", full)
    assert Plan.load(tmp_path / "plan.json") == made_up_plan()
    assert len(list(tmp_path.iterdir())) == 1


def test_an_interrupt_while_writing_goes_through_and_leaves_the_old_file(tmp_path: Path) -> None:
    def interrupted(file: object) -> None:
        raise KeyboardInterrupt

    write_whole(tmp_path / "file", b"old")
    with pytest.raises(KeyboardInterrupt):
        write_whole(tmp_path / "file", interrupted)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]


def test_the_file_has_the_rights_that_the_users_mask_gives(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_whole(tmp_path / "file", b"")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


def test_a_process_that_is_killed_while_it_saves_leaves_a_whole_plan(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    code = (
        f"import sys; sys.path.insert(0, {str(HERE)!r})\n"
        "from strategies import made_up_plan\n"
        "plans = [made_up_plan(notes=('x' * 2_000_000,)), made_up_plan(notes=('y',))]\n"
        "while True:\n"
        "    for plan in plans:\n"
        f"        plan.save({str(path)!r})\n"
        "        print('saved', flush=True)\n"
    )
    made_up_plan().save(path)
    for attempt in range(6):
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "saved\n"
        time.sleep(0.005 * attempt)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        assert Plan.load(path).target_batch == 512


# Explaining.


def without_torch(code: str) -> str:
    """What code prints in a process where torch can't be imported."""
    code = f"import sys\nsys.modules['torch'] = None\nsys.path.insert(0, {str(HERE)!r})\n{code}"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_a_plan_is_explained_from_its_file_alone_where_torch_cannot_be_imported(tmp_path: Path) -> None:
    made_up_plan().save(tmp_path / "plan.json")
    message = without_torch(f"from autoaccum import Plan\nprint(Plan.load({str(tmp_path / 'plan.json')!r}).explain())")
    for phase in ("first micro-batch", "later micro-batch", "optimizer step", "between windows"):
        assert phase in message
    assert "4 would need micro-batches of up to 64, 2.87 GiB in total: 940.0 MiB over the budget" in message
    assert "1 of 52 and 4 of 51 samples = 256 x 2 ranks" in message
    assert "a reason for accumulation_steps" in message


def test_the_next_smaller_number_of_steps_needs_what_the_table_says() -> None:
    plan = made_up_plan(malloc_overhead=0.0)
    held = plan.memory.baseline_bytes + plan.memory.input_bytes
    assert plan.fewer_steps_need() == (64, held + 2100 * 2**20)
    two = changed_plan(plan, split=(32, 32), accumulation_steps=2)
    assert two.fewer_steps_need() == (64, held + 1900 * 2**20)  # one step: no later micro-batch
    assert changed_plan(plan, split=(64,) * 4, accumulation_steps=4).fewer_steps_need() is None
    assert changed_plan(plan, split=(256,), accumulation_steps=1).fewer_steps_need() is None
    more = changed_plan(plan, malloc_overhead=0.5, history_bytes=100 * 2**20)
    assert more.fewer_steps_need() == (
        64,
        plan.memory.baseline_bytes + (plan.memory.input_bytes + 2200 * 2**20) * 3 // 2,
    )


def test_plans_without_verification_or_with_one_step_explain_themselves() -> None:
    message = made_up_plan(
        measured_peak_bytes=None, resident_peak_bytes=None, kernel_time_fraction=None, window_seconds=None,
        split=(256,), micro_batch=256, accumulation_steps=1,
    ).explain()  # fmt: skip
    assert "not verified" in message
    assert "none: one step is the minimum" in message


def test_a_workload_called_script_is_shown_and_not_run() -> None:
    bad = "<script>alert(1)</script>"
    plan = made_up_plan(
        workload=bad, device_name=bad, exactness=bad, notes=(bad,), binding_constraint=bad, fingerprint={bad: bad}
    )
    shown = plan._repr_html_()
    assert "<script" not in shown
    assert "&lt;script&gt;" in shown


# What is loaded, and what is public.


@pytest.mark.parametrize("room", PURE)
def test_a_pure_room_works_without_torch_and_loads_none(room: str) -> None:
    assert without_torch(f"import autoaccum.{room}\nprint('fine')") == "fine\n"
    code = f"import sys, autoaccum.{room}\nprint(*{{m.split('.')[0] for m in sys.modules}})"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "numpy", "pandas", "optuna"} & set(loaded)


def test_importing_autoaccum_loads_nothing_heavy() -> None:
    code = "import sys, autoaccum\nprint(*{m.split('.')[0] for m in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "numpy", "pandas", "optuna", "pydantic", "typer", "rich"} & set(loaded)


def test_the_public_names_are_these_and_each_can_be_imported() -> None:
    assert sorted(autoaccum.__all__) == [
        "AutoaccumError",
        "BatchError",
        "DoesNotFit",
        "LossTerms",
        "NotConfirmed",
        "NotFinite",
        "OutOfMemory",
        "Plan",
        "PlanFileError",
        "PlanMismatch",
        "RanksFailed",
        "RestoreError",
        "Runner",
        "SearchSpace",
        "UsageError",
        "Workload",
        "configure",
        "fit_plan",
        "gather_window",
        "tune",
        "windows",
    ]
    for name in autoaccum.__all__:
        assert getattr(autoaccum, name).__name__ == name
        assert name in dir(autoaccum)
    with pytest.raises(AttributeError, match="no attribute"):
        autoaccum.nothing  # noqa: B018
