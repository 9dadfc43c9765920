"""The virtual GPU: the checks that run on it, and how it is built, described and started."""

from __future__ import annotations

import errno
import importlib.machinery
import json
import os
import stat
import subprocess
import sys
import sysconfig
import time
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from prepared_process import run_forked
from virtual_checks import GROUPS

from autoaccum.devices.compiled_library import CompiledLibrary
from autoaccum.devices.virtual import VirtualGpu, available, build, control, environment, launch, torch_build
from autoaccum.devices.virtual.elf import read_symbols
from autoaccum.errors import UsageError

HERE = Path(__file__).parent
REASON = available()
usable = pytest.mark.skipif(REASON is not None, reason=REASON or "")
COMPILES = {"torch_compile", "torchs_own_triton_kernels"}  # Triton compiles its launcher: it needs Python.h on any GPU
HAS_PYTHON_H = (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file()


def clean() -> dict[str, str]:
    unwanted = ("AUTOACCUM", "PYTORCH", "CUDA_", "TORCH_DISABLE")
    return {key: value for key, value in os.environ.items() if not key.startswith(unwanted)}


FORKED = tuple(name for name, group in GROUPS.items() if group.can_be_forked)


@cache
def lines(*groups: str) -> tuple[list[dict[str, Any]], str]:
    """What a process prints that runs the groups' checks, and how it ended."""
    checks = HERE / "virtual_checks.py"
    if len(groups) > 1:
        done = run_forked(checks, *groups, gpu=VirtualGpu())
        out, err, code = done.stdout, done.stderr, done.returncode
    else:
        gpu, env = GROUPS[groups[0]].gpu, clean() | GROUPS[groups[0]].env
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        process = launch([sys.executable, str(checks), *groups], gpu, env=env, **pipes)
        (out, err), code = process.communicate(timeout=240), process.returncode
    ending = "" if code == 0 else f"the process ended with {code}:\n{err[-3000:]}"
    return [json.loads(line) for line in out.splitlines()], ending


@cache
def outcomes(group: str) -> dict[str, str]:
    """Runs a group's checks: check -> what went wrong, "" where nothing did."""
    found, ending = lines(*FORKED if group in FORKED else (group,))
    of_group = [line for line in found if line["group"] == group]
    errors = {line["check"]: line["error"] for line in of_group if "check" in line}
    codes = [line["ending"] for line in of_group if "ending" in line]
    if group in FORKED and codes != [0]:
        ending = f"the forked process ended with {codes}; {ending}"
    return {name: errors.get(name, "it didn't run") or ending for name in GROUPS[group].checks}


def each_check() -> list[Any]:
    slow = {"compiled": pytest.mark.slow}  # nine seconds in the compiler
    return [
        pytest.param(group, name, id=name, marks=slow.get(group, ()))
        for group, wanted in GROUPS.items()
        for name in wanted.checks
    ]


@usable
@pytest.mark.parametrize(("group", "name"), each_check())
def test_on_the_virtual_gpu(group: str, name: str) -> None:
    if name in COMPILES and not HAS_PYTHON_H:
        pytest.skip("Python.h is missing")
    error = outcomes(group)[name]
    assert not error, error


# -- starting


@usable
def test_environment_keeps_what_was_there_and_can_be_repeated() -> None:
    base = {"LD_PRELOAD": "/x.so", "LD_LIBRARY_PATH": "/y", "HOME": "/h", "AUTOACCUM_GPU_MEMORY": "1"}
    first = environment(VirtualGpu(memory_bytes=2**31), base)
    assert first["LD_PRELOAD"].endswith(":/x.so") and first["LD_LIBRARY_PATH"].endswith(":/y")
    assert first["HOME"] == "/h" and first["AUTOACCUM_GPU_MEMORY"] == str(2**31)
    assert environment(VirtualGpu(memory_bytes=2**31), first) == first
    assert base["LD_PRELOAD"] == "/x.so"


@usable
def test_a_built_library_is_used_again() -> None:
    environment(VirtualGpu())
    seconds = []
    for _ in range(10):  # the best counts: a busy machine makes the others long
        started = time.perf_counter()
        environment(VirtualGpu())
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 0.05


@usable
def test_nothing_imports_torch() -> None:
    source = "import sys; from autoaccum.devices.virtual import *; environment(VirtualGpu())"
    source += "; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", source], check=False).returncode == 0


def on_the_command_line(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "autoaccum", "virtual-gpu", *words]
    return subprocess.run(command, env=clean() | env, capture_output=True, text=True, check=False)


@usable
def test_command_line_becomes_the_command() -> None:
    source = "from autoaccum.devices.virtual.control import stats; print(stats().free_bytes); raise SystemExit(7)"
    done = on_the_command_line("--memory", "2GiB", "--other", "25%", "--", sys.executable, "-c", source)
    assert (done.returncode, done.stdout) == (7, f"{3 * 2**29}\n")


@usable
def test_trace_names_what_is_not_modelled_once() -> None:
    source = "import ctypes; cuda = ctypes.CDLL(None); print([cuda.cudaMallocManaged(0, 1, 1) for _ in range(3)])"
    done = on_the_command_line("--trace", "--", sys.executable, "-c", source)
    assert done.stdout == "[801, 801, 801]\n" and done.stderr == "virtual GPU: cudaMallocManaged is not modelled\n"
    assert on_the_command_line("--", sys.executable, "-c", source).stderr == ""


@usable
@pytest.mark.parametrize(
    "setting", ["MEMORY=4GiB", "DEVICES=9", "COMPUTE_CAPABILITY=8", "COPIES=some", "CONVOLUTION_WORKSPACE=0.5y"]
)
def test_a_setting_that_cannot_be_read_ends_the_process(setting: str) -> None:
    name, value = setting.split("=")
    message = environment(VirtualGpu(), clean()) | {f"AUTOACCUM_GPU_{name}": value}
    done = subprocess.run(["true"], env=message, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and f"AUTOACCUM_GPU_{setting} is not" in done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--memory", "much", "--", "true"], "'much' is not an amount of memory"),
        (["--context", "17GiB", "--", "true"], "take 17.00 GiB of it"),
        (["--memory", "4GiB"], "The command to run is missing."),
    ],
)
def test_command_line_refuses(words: list[str], message: str) -> None:
    done = on_the_command_line(*words)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


@usable
def test_command_line_says_what_cannot_be_run() -> None:
    done = on_the_command_line("--", "/no/such/command")
    assert done.returncode == 127 and "'/no/such/command' cannot be run" in done.stderr


@pytest.mark.parametrize(
    "wrong",
    [
        {"memory_bytes": 0},
        {"context_bytes": -1},
        {"other_bytes": 16 * 2**30},
        {"devices": 0},
        {"devices": 9},
        {"compute_capability": "8"},
        {"multiprocessors": 0},
        {"name": ""},
        {"copies": "some"},
        {"addresses": "sideways"},
        {"convolution_workspace": "lots"},
        {"convolution_workspace": "-1x"},
    ],
)
def test_there_is_no_such_gpu(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        VirtualGpu(**wrong)


def test_controls_say_when_there_is_no_virtual_gpu() -> None:
    assert not control.is_virtual()
    with pytest.raises(UsageError, match="doesn't run on a virtual GPU"):
        control.stats(0)


# -- building


@usable
@pytest.mark.slow
def test_two_builders_at_once(tmp_path: Path) -> None:
    source = "from autoaccum.devices.virtual import *; print(environment(VirtualGpu(), {})['LD_PRELOAD'])"
    command, env = [sys.executable, "-c", source], clean() | {"XDG_CACHE_HOME": str(tmp_path / "with space")}
    both = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    message = {process.communicate(timeout=120)[0] for process in both}
    assert [process.returncode for process in both] == [0, 0] and message == {f"{build.LIBRARY.name}\n"}
    (made,) = (tmp_path / "with space" / "autoaccum" / "virtual").iterdir()  # and nothing half-made beside it
    assert {build.LIBRARY.name, *build.ALIASES} <= {path.name for path in made.iterdir()}
    done = on_the_command_line("--", sys.executable, "-c", "import ctypes; ctypes.CDLL(None).cuInit", **env)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


@usable
def test_no_compiler(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(empty_cache))
    with pytest.raises(UsageError, match="needs a C compiler, and there is no cc, gcc or clang on the PATH") as error:
        environment(VirtualGpu())
    assert error.value.why and error.value.hint and available() == error.value.what


@usable
def test_a_compiler_that_fails(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = empty_cache / "cc"
    compiler.write_text("#!/bin/sh\nseq 100\necho no such thing >&2\nexit 3\n")
    compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CC", str(compiler))
    with pytest.raises(UsageError, match="gave exit code 3") as error:
        environment(VirtualGpu())
    assert error.value.why.endswith("100\nno such thing") and "\n50\n" not in error.value.why
    assert list((empty_cache / "autoaccum" / "virtual").iterdir()) == []


@usable
def test_a_cache_that_cannot_be_written(empty_cache: Path) -> None:
    (empty_cache / "autoaccum").write_text("a file")
    with pytest.raises(UsageError, match="can't be kept in") as error:
        environment(VirtualGpu())
    assert "XDG_CACHE_HOME" in error.value.hint


@usable
@pytest.mark.parametrize("place", ["seal", "_move"])
def test_a_disk_that_fills_while_it_is_compiled(empty_cache: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(build, "_compile", lambda torch, making: build.LIBRARY.seal(making))
    monkeypatch.setattr(CompiledLibrary, "seal", lambda self, making: None)
    monkeypatch.setattr(CompiledLibrary, place, full)
    with pytest.raises(UsageError, match=r"can't be kept in .*No space left on device"):
        environment(VirtualGpu())
    assert list((empty_cache / "autoaccum" / "virtual").iterdir()) == []


def pretend_torch(folder: Path, version: str, cuda: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "torch").mkdir()
    (folder / "torch" / "version.py").write_text(
        f"from typing import Optional\n\n__version__ = '{version}'\ndebug = False\ncuda: Optional[str] = {cuda}\n"
        "git_version = 'x'\nhip: Optional[str] = None\n"
    )
    spec = importlib.machinery.ModuleSpec("torch", None, origin=str(folder / "torch" / "__init__.py"))
    monkeypatch.setattr(torch_build.importlib.util, "find_spec", {"torch": spec}.get)


@pytest.mark.parametrize(
    ("version", "cuda", "message"),
    [
        ("2.13.0+cpu", "None", "needs a CUDA build of torch; 2.13.0+cpu here has no CUDA"),
        ("2.5.1+cu118", "'11.8'", "knows CUDA 12 and 13; torch 2.5.1+cu118 here is built for CUDA 11.8"),
        ("2.6.0+cu124", "'12.4'", "needs the CUDA headers that torch 2.6.0"),
        ("2.14.1+cu130", "'13.0'", "needs the CUDA headers that torch 2.14.1"),
    ],
)
def test_another_torch(version: str, cuda: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_torch(tmp_path, version, cuda, monkeypatch)
    reason = available()
    assert reason is not None and message in reason
    with pytest.raises(UsageError) as error:
        environment(VirtualGpu())
    assert error.value.what == reason and error.value.why and error.value.hint


def test_the_wheels_of_cuda_12(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_torch(tmp_path, "2.6.0+cu124", "'12.4'", monkeypatch)
    for part, header in torch_build._WHEELS[12]:
        (tmp_path / "nvidia" / part / "include").mkdir(parents=True)
        (tmp_path / "nvidia" / part / "include" / header).touch()
    nvidia = importlib.machinery.ModuleSpec("nvidia", None, is_package=True)
    nvidia.submodule_search_locations = [str(tmp_path / "nvidia")]
    torch = torch_build.importlib.util.find_spec("torch")
    monkeypatch.setattr(torch_build.importlib.util, "find_spec", {"torch": torch, "nvidia": nvidia}.get)
    found = torch_build.find_torch()
    assert found.cuda == "12.4" and len(found.cuda_libs) == 6
    assert [found.includes[0], found.includes[-1]] == [
        tmp_path / "nvidia" / part / "include" for part in ("cuda_runtime", "cudnn")
    ]
    (tmp_path / "nvidia" / "cusparse" / "include" / "cusparse.h").unlink()
    with pytest.raises(UsageError, match="needs the CUDA headers"):
        torch_build.find_torch()


def test_no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_build.importlib.util, "find_spec", lambda name: None)
    assert "needs torch, which isn't installed" in (available() or "")


@usable
def test_symbols_are_read_without_tools() -> None:
    torch = torch_build.find_torch()
    symbols = read_symbols(torch.lib / "libc10_cuda.so")
    runtime = f"libcudart.so.{str(torch.cuda).partition('.')[0]}"
    assert symbols.imported["cudaMalloc"] == runtime and not symbols.exported & symbols.imported.keys()
    assert {"cuInit", "cudaMalloc", "cudaMallocManaged", "nvmlInit_v2"} <= read_symbols(build.built_library()).exported
    with pytest.raises(ValueError, match="not a 64-bit little-endian ELF file"):
        read_symbols(Path(__file__))
