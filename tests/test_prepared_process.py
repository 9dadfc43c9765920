"""What tests rely on where they fork a process: it begins without a past, and it ends as any does."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

import pytest
from forked_ranks import run_scripts
from prepared_process import run_forked

from autoaccum.devices.virtual import VirtualGpu, available

SHOWS = """
import gc, json, os, sys, threading
import torch
shown = sys.argv, os.getcwd(), os.environ.get("ASKED"), sys.stdin.read(), threading.active_count(), __name__
print(json.dumps([*shown, gc.isenabled(), torch.distributed.is_initialized(), hasattr(torch, "left")]))
torch.left = os.environ["LEFT"] = "something"
print("aside", file=sys.stderr)
raise SystemExit(7)
"""


def test_each_begins_as_one_that_was_started(tmp_path: Path) -> None:
    for _ in range(2):  # the second finds nothing of the first
        done = run_forked(SHOWS, "one", cwd=tmp_path, env={"ASKED": "yes"})
        assert (done.returncode, done.stderr) == (7, "aside\n")
        assert json.loads(done.stdout) == [["-c", "one"], str(tmp_path), "yes", "", 1, "__main__", True, False, False]


def test_a_file_finds_its_neighbours_and_an_error_its_line(tmp_path: Path) -> None:
    (tmp_path / "neighbour.py").write_text("value = 3")
    (tmp_path / "script.py").write_text("import neighbour\nprint(neighbour.value, __file__)\nraise KeyError('it')\n")
    done = run_forked(tmp_path / "script.py")
    assert done.returncode == 1 and done.stdout == f"3 {tmp_path / 'script.py'}\n"
    assert "line 3, in <module>\n    raise KeyError('it')" in done.stderr


def test_one_that_hangs_is_killed_and_the_next_one_is_served() -> None:
    with pytest.raises(subprocess.TimeoutExpired):
        run_forked("import time; time.sleep(60)", timeout=0.3)
    assert run_forked("import os, signal; os.kill(os.getpid(), signal.SIGKILL)").returncode == -9
    assert run_forked("print('served')").stdout == "served\n"


def test_what_torch_has_read_is_not_set_any_more() -> None:
    with pytest.raises(AssertionError, match="PYTORCH_CUDA_ALLOC_CONF"):
        run_forked("", env={"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"})


@pytest.mark.skipif(available() is not None, reason=str(available()))
def test_each_has_the_gpu_that_it_was_given() -> None:
    asks = "import torch; print(torch.cuda.mem_get_info()[1] >> 30, torch.cuda.get_device_name())"
    for size in (2, 3):
        done = run_forked(asks, gpu=VirtualGpu(memory_bytes=size << 30, name=f"of {size}"))
        assert done.stdout == f"{size} of {size}\n", done.stderr


def test_a_rank_that_fails_ends_the_others(tmp_path: Path) -> None:
    script = tmp_path / "ranks.py"
    script.write_text(
        "import os, sys, time\nprint(os.environ['RANK'], sys.argv[1])\n"
        "if sys.argv[1] == 'fails':\n    time.sleep(60 * (os.environ['RANK'] == '0'))\n    raise SystemExit(5)\n"
    )
    assert run_scripts(2, [[str(script), "a"], [str(script), "b"]], tmp_path, []) == ["0 a\n1 a\n", "0 b\n1 b\n"]
    begun = time.monotonic()
    with pytest.raises(AssertionError, match="rank 1 ended with 5"):
        run_scripts(2, [[str(script), "fails"]], tmp_path, [])
    assert time.monotonic() - begun < 30
