"""The plan cache: the same question is answered from it, and a changed one never is."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from strategies import made_up_plan
from torch import nn

from autoaccum import Workload
from autoaccum.devices.registry import get_device
from autoaccum.planning import cache, kept_plans
from autoaccum.planning.cache_key import digest, question, torch_settings
from autoaccum.planning.live_digest import Opaque
from autoaccum.planning.request import PlanRequest

CPU = get_device(torch.device("cpu"))
FACTOR = 2
REQUEST = PlanRequest(target_batch=64, budget="2GiB", train_in_new_process=True)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(cache.SWITCH, raising=False)
    yield tmp_path / "cache" / "autoaccum" / "plans"


class Net(nn.Module):
    scale = 1.0

    def __init__(self, width: int = 8, activation: Callable[..., Any] = torch.relu) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, width), nn.Linear(width, 3)
        self.activation, self.repeats = activation, 1
        self.register_buffer("order", torch.arange(4), persistent=False)
        self.gate = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(self.repeats):
            x = x[:, self.order]  # type: ignore[index]
        out: torch.Tensor = self.second(self.activation(self.first(x))) * self.scale * self.gate
        return out


def loss(model: nn.Module, batch: Any) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1]) * FACTOR


def weighted(weight: float) -> Callable[[nn.Module, Any], torch.Tensor]:
    return lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1]) * weight


def workload(model: nn.Module | None = None, **changes: Any) -> Workload:
    torch.manual_seed(0)
    model = model or Net()
    sample = torch.randn(6, 4), torch.randint(3, (6,))
    given: dict[str, Any] = {
        "sample": sample, "loss": loss, "optimizer": torch.optim.AdamW(model.parameters()), "clip_grad_norm": 1.0,
    }  # fmt: skip
    return Workload(model, **(given | changes))


def with_attribute(name: str, value: Any) -> Workload:
    model = Net()
    setattr(model, name, value)
    return workload(model)


def with_hook() -> Workload:
    made = workload()
    made.model.register_forward_hook(lambda module, given, out: out + 0)
    return made


def with_tied() -> Workload:
    model = Net(4)
    model.second = nn.Linear(4, 4)
    model.first.weight = model.second.weight
    return workload(model, loss=weighted(1.0))


def untied() -> Workload:
    model = Net(4)
    model.second = nn.Linear(4, 4)
    return workload(model, loss=weighted(1.0))


def frozen() -> Workload:
    made = workload()
    made.model.get_parameter("first.weight").requires_grad_(False)
    return made


def with_state() -> Workload:
    made = workload()
    made.loss(made.model, made.sample).backward()  # type: ignore[misc]
    made.optimizer.step()  # type: ignore[union-attr]
    return made


CHANGES: dict[str, Callable[[], Workload]] = {
    "shape of a weight": lambda: workload(Net(9)),
    "dtype of the weights": lambda: workload(Net().bfloat16()),
    "a layer more": lambda: with_attribute("third", nn.Linear(2, 2)),
    "another activation": lambda: workload(Net(activation=torch.nn.functional.gelu)),
    "a plain attribute": lambda: with_attribute("repeats", 2),
    "values of an index": lambda: with_attribute("order", torch.tensor([3, 2, 1, 0])),
    "a gate's value": lambda: with_attribute("gate", nn.Parameter(torch.tensor(0.0))),
    "a frozen weight": frozen,
    "mode": lambda: workload(Net().eval()),
    "a hook": with_hook,
    "another loss": lambda: workload(loss=weighted(1.0)),
    "another optimizer": lambda: workload(optimizer="sgd"),
    "a setting of the optimizer": lambda: workload(optimizer=partial(torch.optim.AdamW, foreach=True)),
    "state of the optimizer": with_state,
    "precision": lambda: workload(precision="bf16"),
    "accumulation": lambda: workload(accumulate="as_parameters"),
    "clipping": lambda: workload(clip_grad_norm=None),
    "shape of the sample": lambda: workload(sample=(torch.randn(5, 4), torch.randint(3, (5,)))),
    "values of the sample": lambda: workload(sample=(torch.randn(6, 4), torch.zeros(6, dtype=torch.long))),
    "lengths": lambda: workload(lengths=[1, 2, 3]),
    "a loader": lambda: workload(loader=[(torch.randn(6, 4), torch.randint(3, (6,)))]),
    "between steps": lambda: workload(between_steps=lambda model: None),
}


def digest_of(make: Callable[[], Workload]) -> str:
    """Return its digest, made as a new process makes it: torch's seed is the same in each."""
    torch.manual_seed(0)
    return digest(make())


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_workload_has_another_digest(change: str) -> None:
    changed = CHANGES[change]
    assert digest_of(workload) == digest_of(workload)
    assert digest_of(changed) == digest_of(changed)
    assert digest_of(changed) != digest_of(workload)


def test_what_functions_hold_name_and_do_is_in_the_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    assert digest_of(partial(workload, loss=weighted(1.0))) != digest_of(
        partial(workload, loss=weighted(2.0))
    )  # a closure
    assert digest_of(with_tied) != digest_of(untied)
    before = digest_of(workload)
    monkeypatch.setattr(sys.modules[__name__], "FACTOR", 3)  # a global that the loss names
    assert digest_of(workload) != before
    monkeypatch.undo()
    monkeypatch.setattr(Net, "scale", 2.0)  # of the class
    assert digest_of(workload) != before
    monkeypatch.undo()
    monkeypatch.setattr(Net, "forward", lambda self, x: self.second(self.first(x)))
    assert digest_of(workload) != before
    monkeypatch.undo()
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: x @ self.weight.T)  # in the place of torch's own
    assert digest_of(workload) != before
    monkeypatch.undo()
    assert digest_of(workload) == before


def test_what_cannot_be_looked_into_is_named() -> None:
    with pytest.raises(Opaque, match=r"numbers is a builtins\.generator"):
        digest(with_attribute("numbers", (number for number in range(3))))
    compiled = Net()
    compiled.compile(backend="eager")
    with pytest.raises(Opaque, match="model is compiled"):
        digest(workload(compiled))

    class Sees(torch.overrides.TorchFunctionMode):
        pass

    made = workload()
    with Sees(), pytest.raises(Opaque, match="Sees watches"):
        question(made, REQUEST, CPU)


# -- the question, and what surrounds it


def key_of(request: PlanRequest = REQUEST, **changes: Any) -> str:
    torch.manual_seed(0)
    return cache.key_of({**question(workload(**changes), request, CPU), **cache.surroundings()})


def test_request_settings_and_surroundings_are_in_the_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    first = key_of()
    assert key_of() == first
    for change in ({"target_batch": 65}, {"budget": "1GiB"}, {"malloc": "default"}, {"uniform": True}):
        assert key_of(replace(REQUEST, **change)) != first, change  # type: ignore[arg-type]
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    assert key_of() != first
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF")
    monkeypatch.setenv("COLUMNS", "77")  # no training depends on a terminal's width
    assert key_of() == first
    monkeypatch.chdir(tmp_path)
    assert key_of() != first
    monkeypatch.undo()
    settings = torch_settings()
    torch.backends.cudnn.benchmark = not torch.backends.cudnn.benchmark
    try:
        assert torch_settings() != settings
    finally:
        torch.backends.cudnn.benchmark = not torch.backends.cudnn.benchmark
    monkeypatch.setattr(torch, "__version__", "9.9.9")
    assert torch_settings() != settings


# -- entries


def plans(mode: str = cache.USE) -> kept_plans.KeptPlans:
    return kept_plans.KeptPlans(mode)


def made_plan() -> Any:
    plan = made_up_plan()
    budget = CPU.read_budget(REQUEST.budget, None)
    return replace(plan, memory=replace(plan.memory, budget=budget), evidence=replace(plan.evidence, method="replayed"))


def asked(kept: kept_plans.KeptPlans, make: Any = None, request: PlanRequest = REQUEST) -> tuple[Any, bool]:
    """Return the answer, and whether it was made."""
    calls: list[int] = []

    def count() -> Any:
        calls.append(1)
        return (make or made_plan)()

    torch.manual_seed(0)
    return kept.answer(CPU, workload(), request, count), bool(calls)


def test_the_second_time_a_plan_is_not_made_until_it_is_to_be_anew(folder: Path) -> None:
    first, made = asked(plans())
    assert made and folder.stat().st_mode & 0o777 == 0o700
    (entry,) = folder.iterdir()
    assert entry.stat().st_mode & 0o777 == 0o600
    kept = plans()
    again, made = asked(kept)
    assert not made and again == first and kept.entry is not None and "--refresh" in kept.entry.origin
    assert kept.seconds > 0
    assert asked(plans(cache.REFRESH))[1] and asked(plans(cache.OFF))[1]
    assert asked(plans(), request=replace(REQUEST, train_in_new_process=False))[1]


def test_only_what_was_replayed_is_kept_and_only_for_its_budget(folder: Path) -> None:
    bracketed = replace(made_plan(), evidence=replace(made_plan().evidence, method="bracketed"))
    kept = plans()
    assert asked(kept, lambda: bracketed)[1] and kept.reason == "its sizes follow no rule"
    assert not list(folder.glob("*.json"))
    other = replace(made_plan(), memory=replace(made_plan().memory, budget=replace(made_plan().memory.budget, bytes=1)))
    asked(plans(), lambda: other)
    assert list(folder.glob("*.json")) and asked(plans())[1]  # planned when less was free


@pytest.mark.parametrize("damage", ["cut", "changed", "empty", "deep", "list", "other key", "link", "folder"])
def test_a_damaged_entry_counts_as_none_and_is_replaced(folder: Path, damage: str) -> None:
    asked(plans())
    (entry,) = folder.glob("*.json")
    whole = entry.read_text()
    contents = {
        "cut": whole[: len(whole) // 2], "changed": whole.replace('"micro_batch', '"macro_batch', 1), "empty": "",
        "deep": "[" * 100_000, "list": "[]", "other key": whole.replace(entry.stem, "0" * 64),
    }  # fmt: skip
    if damage == "link":
        entry.rename(folder / "elsewhere")
        entry.symlink_to("elsewhere")
    elif damage == "folder":
        entry.unlink()
        entry.mkdir()
    else:
        entry.write_text(contents[damage])
    assert asked(plans())[1]
    assert asked(plans())[1] == (damage == "folder")  # which is left alone: nothing of ours


def test_another_users_entry_or_folder_is_not_used(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked(plans())
    (entry,) = folder.glob("*.json")
    entry.chmod(0o666)
    assert asked(plans())[1] and entry.stat().st_mode & 0o777 == 0o600
    me = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: me + 1)  # to whom the folder belongs to somebody else
    assert asked(plans())[1]
    monkeypatch.undo()
    folder.chmod(0o777)
    assert asked(plans())[1]


def test_a_file_that_was_read_for_the_plan_and_changed_makes_a_new_one(tmp_path: Path) -> None:
    read, late = tmp_path / "settings.json", tmp_path / "late.json"
    for file in (read, late):
        file.write_text("{}")
        os.utime(file, (1, 1))

    def ask() -> bool:
        kept = plans()
        kept._opened._note("open", (str(read), "r", os.O_RDONLY))  # by the workload's function

        def make() -> Any:
            kept._opened._note("open", (str(late), "r", os.O_RDONLY))  # by the first forward
            return made_plan()

        return asked(kept, make)[1]

    assert [ask(), ask()] == [True, False]
    for file in (read, late):
        file.write_text('{"width": 2}')
        os.utime(file, (1, 1))
        assert [ask(), ask()] == [True, False], file
    written = plans()
    read.write_text("{}")  # while it was planned
    written._opened._note("open", (str(read), "r", os.O_RDONLY))
    asked(written)
    assert "was written meanwhile" in written.reason


def test_the_first_plan_on_a_machine_is_kept_though_libraries_were_compiled_for_it(folder: Path) -> None:
    """And the kept plan itself, looked up for another budget, is nothing that the new one rests on."""
    library = folder.parent / "pages" / "libautoaccum-pages.so"
    library.parent.mkdir(parents=True)

    def ask() -> kept_plans.KeptPlans:
        kept = plans()

        def make() -> Any:
            library.write_text("compiled meanwhile")
            for path in (library, *folder.glob("*.json")):
                kept._opened._note("open", (str(path), "r", os.O_RDONLY))
            return made_plan()

        assert asked(kept, make)[0] is not None
        return kept

    assert ask().reason == "" and ask().entry is not None
    (entry,) = folder.glob("*.json")
    entry.write_text("{}")
    assert ask().entry is None and ask().entry is not None


def test_files_are_noted_as_they_are_opened(tmp_path: Path) -> None:
    code = (
        "import os, sys, json\nfrom autoaccum.files.stamps import OpenedFiles, loaded_files, stamps\n"
        "seen = OpenedFiles(); seen.watch()\nopen('read.txt').close(); open('written.txt', 'w').close()\n"
        "os.close(os.open('low.txt', os.O_RDONLY)); os.path.exists('asked.txt'); open('/proc/self/maps').close()\n"
        "print(json.dumps([sorted(seen.paths()), sorted(stamps(loaded_files()))]))"
    )
    for name in ("read.txt", "low.txt", "asked.txt"):
        (tmp_path / name).write_text(name)
    command = [sys.executable, "-c", code]
    found = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path, timeout=60).stdout
    opened, loaded = json.loads(found)
    assert [Path(path).name for path in opened] == ["low.txt", "read.txt"]
    assert any(path.endswith("autoaccum/files/stamps.py") for path in loaded)  # of the tree, or installed
    assert any("libc.so" in path or "ld-linux" in path for path in loaded)


def test_the_entries_used_last_are_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "_MOST_ENTRIES", 2)
    for name in "abc":
        cache.keep(name, {"plan": name}, {})
        os.utime(folder / f"{name}.json", (ord(name), ord(name)))
        if name == "b":
            assert cache.look_up("a") is not None  # used just now
    assert sorted(path.stem for path in folder.iterdir()) == ["a", "c"]


def test_two_at_once_and_a_kill_in_the_middle_of_writing_do_no_harm(folder: Path) -> None:
    answers = [{"plan": str(number) * 200_000} for number in range(4)]

    def write(answer: dict[str, str]) -> None:
        for _ in range(5):
            cache.keep("k", answer, {})

    threads = [threading.Thread(target=write, args=(answer,)) for answer in answers]
    for thread in threads:
        thread.start()
    seen = []
    while any(thread.is_alive() for thread in threads):
        seen.append(cache.look_up("k"))
        time.sleep(0.001)
    assert all(found is None or found.answer in answers for found in seen)
    code = (
        "import autoaccum.files.whole as whole, os, signal\nfrom autoaccum.planning import cache\n"
        "fsync = os.fsync\ndef die(file): os.kill(os.getpid(), signal.SIGKILL)\n"
        "whole.os = type('', (), {**vars(os), 'fsync': staticmethod(die)})\ncache.keep('k', {'plan': 'new'}, {})"
    )
    died = subprocess.run([sys.executable, "-c", code], timeout=60)
    assert died.returncode == -signal.SIGKILL and any(path.suffix == ".part" for path in folder.iterdir())
    found = cache.look_up("k")
    assert found is not None and found.answer in answers
    for path in folder.glob(".*.part"):
        os.utime(path, (1, 1))  # what is a second old is a living writer's, maybe
    cache.keep("k", {"plan": "after"}, {})
    assert [path.name for path in folder.iterdir()] == ["k.json"]


def test_no_cache_where_none_can_be_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert asked(plans())[1] and asked(plans())[1]
    monkeypatch.setenv(cache.SWITCH, "0")
    assert cache.mode_of(refresh=False) == cache.OFF
    assert SimpleNamespace(**kept_plans.about(plans(cache.OFF))).not_kept == "the cache is off"


# -- the command


WORKLOAD = """
import json
import torch
from torch import nn
import autoaccum

def workload():
    model = nn.Sequential(nn.Linear(8, json.load(open("width.json"))), nn.ReLU(), nn.Linear(16, 3))
    sample = torch.randn(4, 8), torch.randint(3, (4,))
    return autoaccum.Workload(model, sample, loss=nn.CrossEntropyLoss(), optimizer="sgd")
"""


@pytest.mark.slow
def test_the_command_says_that_a_plan_is_an_old_one_and_how_to_make_it_anew(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(WORKLOAD)
    (tmp_path / "width.json").write_text("16")
    os.utime(tmp_path / "train.py", (1, 1))
    os.utime(tmp_path / "width.json", (1, 1))

    def plan(*options: str) -> str:
        command = [sys.executable, "-m", "autoaccum", "plan", "--target-batch", "64", "--memory", "2GiB", *options]
        command += ["--workload", "train.py:workload"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    first, second = plan(), plan()
    assert "--refresh" not in first and "kept since then; --refresh plans anew" in second
    assert [line for line in second.splitlines() if not line.startswith("planned")] == first.splitlines()
    assert "kept since then" not in plan("--refresh")
    assert json.loads(plan("--json").partition("\non ")[0])["request"]["target_batch"] == 64
    (tmp_path / "width.json").write_text(" 16")
    os.utime(tmp_path / "width.json", (1, 1))
    assert "kept since then" not in plan()
    text = (tmp_path / "train.py").read_text().replace("nn.ReLU()", "nn.Sigmoid()")
    (tmp_path / "train.py").write_text(text)
    assert "kept since then" not in plan()
