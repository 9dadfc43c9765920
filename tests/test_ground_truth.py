"""The benchmark of measured runs: its rows, and what is predicted for them."""

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import pandas
import pytest
import torch
from prepared_process import run_forked

from autoaccum.devices import virtual
from benchmarks import ground_truth
from benchmarks.ground import models

needs_gpu = pytest.mark.skipif(virtual.available() is not None, reason=virtual.available() or "")
ROOT = Path(__file__).parents[1]
HEAD = "gpu,bench,batch_size,memory_mib_median,near_capacity\n"


@needs_gpu
@pytest.mark.slow
def test_the_command_predicts_a_made_up_row(tmp_path):
    pytest.importorskip("torchvision")
    data = tmp_path / "data.csv"
    data.write_text(HEAD + "H100,resnet50,2,2000,False\nH100,nobody's,1,1000,False\n")
    command = [sys.executable, "-m", "benchmarks.ground_truth", str(data), "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "1 rows of nobody's (unknown benchmark)" in done.stdout
    (row,) = pandas.read_csv(next(tmp_path.glob("*-ground-truth.csv"))).to_dict("records")
    parameters_mib = 25_557_032 * 4 / 2**20  # and their gradients, both in fp32
    assert 2 * parameters_mib < row["reserved_mib"] < 5 * parameters_mib
    device = ground_truth.DEVICES["H100"]
    outside = device.driver_mib + (device.gpu.context_bytes + device.gpu.library_bytes) / 2**20
    assert row["predicted_mib"] == pytest.approx(row["reserved_mib"] + outside, abs=0.02)
    assert row["replay_error_bytes"] == 0 and row["replay_is_same"]
    assert row["error_mib"] == pytest.approx(row["predicted_mib"] - 2000, abs=0.02)


def test_one_benchmark_s_constant_is_applied_to_all_others(monkeypatch):
    rows = [
        ("H100", "bert-fp32", 1, 1210, False),
        ("H100", "bert-fp32", 2, 1230, False),
        ("H100", "bert-fp32", 3, 5000, False),
        ("H100", "bert-fp32", 4, 9000, True),  # near capacity: not for the constant
        ("H100", "whisper", 1, 20_000, False),
        ("H200", "whisper", 1, 1000, False),
    ]
    data = pandas.DataFrame(rows, columns=["gpu", "bench", "batch_size", "memory_mib_median", "near_capacity"])
    answers = [{"gpu": g, "bench": b, "batch_size": n, "reserved": 10 * 2**20, "out": False} for g, b, n, *_ in rows]
    monkeypatch.setattr(ground_truth, "reserved", lambda data: iter(answers))
    found, constant, text = ground_truth.predict(data)
    assert constant == 1220 and "3 rows of bert-fp32 on H100" in text
    assert found.predicted_mib.tolist()[:5] == [1230] * 5
    assert found.predicted_mib[5] == pytest.approx(1230 + (143_771 - 143_156) - (81_559 - 85_017_755_648 / 2**20))
    table = ground_truth.summary(found).set_index("rows")
    assert table.loc["development, smaller", "number"] == 3 and table.loc["held out, 10 GB and more", "number"] == 1
    assert table.loc["held out, 10 GB and more", "worst %"] == pytest.approx(100 * 18_770 / 20_000)
    assert table.loc["held out, smaller", "within 400 MiB"] == "100 %"


def test_versions_that_were_not_measured_are_named(monkeypatch):
    monkeypatch.setitem(ground_truth.MEASURED_WITH, "torch", "0.1")
    monkeypatch.setitem(ground_truth.MEASURED_WITH, "no such package", "1.0")
    text = ground_truth.versions()
    assert (
        text.startswith("torch 2")
        and "(measured with 0.1)" in text
        and text.endswith("no such package is not installed")
    )
    monkeypatch.setitem(ground_truth.MEASURED_WITH, "torch", importlib.metadata.version("torch"))
    assert "(measured with" not in ground_truth.versions().split(",")[0]


def test_a_mask_of_ones_needs_no_answer_from_the_device(monkeypatch):
    modeling_bert = pytest.importorskip("transformers.models.bert.modeling_bert")
    name = "_prepare_4d_attention_mask_for_sdpa"  # of transformers 4
    monkeypatch.setattr(modeling_bert, name, lambda *_: 1 / 0, raising=False)
    models._answer_for_the_mask()
    assert getattr(modeling_bert, name)(torch.zeros(2, 3), torch.float32, tgt_len=3) is None
    monkeypatch.delattr(modeling_bert, name)
    models._answer_for_the_mask()  # transformers 5 doesn't ask
    assert not hasattr(modeling_bert, name)


CONVOLUTIONS = """
import json, torch
def workspace(backward, kernel, layout, dtype=torch.half, groups=1):
    x = torch.zeros(8, 64, 64, 64, device="cuda", dtype=dtype).to(memory_format=layout).requires_grad_(backward)
    conv = torch.nn.Conv2d(64, 64, kernel, padding=kernel // 2, bias=False, groups=groups).to("cuda", dtype)
    conv = conv.requires_grad_(backward).to(memory_format=layout)
    y = conv(x)
    assert y.shape == x.shape
    tensors = 2 * x.nbytes + conv.weight.nbytes
    made = x.nbytes
    if backward:
        gradient = torch.zeros_like(y)
        made += conv.weight.nbytes
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    if backward:
        y.backward(gradient)
    else:
        before -= y.nbytes
        del y
        y = conv(x)
    return round((torch.cuda.max_memory_allocated() - before - made) / tensors, 2)
nchw, nhwc = torch.contiguous_format, torch.channels_last
found = [workspace(False, 3, nchw), workspace(True, 3, nchw), workspace(False, 1, nchw), workspace(True, 1, nchw)]
found += [workspace(False, 3, nhwc), workspace(True, 3, nhwc), workspace(False, 3, nchw, torch.float)]
found += [workspace(False, 3, nchw, groups=64)]
print(json.dumps(found))
"""


@needs_gpu
def test_convolutions_in_half_precision_turn_their_tensors():
    done = run_forked(CONVOLUTIONS, gpu=virtual.VirtualGpu(convolution_workspace="transposed"))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found[2] == found[4] == found[5] == found[6] == found[7] == 0.0
    assert found[0] == pytest.approx(1, abs=0.02)
    assert found[1] == pytest.approx(1, abs=0.05) and found[3] == pytest.approx(1, abs=0.05)
