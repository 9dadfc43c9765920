"""`autoaccum fits`: a model from its configuration, planned on a virtual GPU; and configurations that ask for more."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from prepared_process import run_forked
from typer.testing import CliRunner

from autoaccum import UsageError
from autoaccum.cli import app
from autoaccum.cli.architectures.config_file import MOST_LAYERS, read_config
from autoaccum.cli.architectures.description import Description
from autoaccum.devices.virtual import VirtualGpu, available

REASON = available()
on_a_virtual_gpu = pytest.mark.skipif(REASON is not None, reason=REASON or "")

SMALL = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 128}
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 1000, **SMALL}
BERT = {"model_type": "bert", "architectures": ["BertForMaskedLM"], "vocab_size": 1000, **SMALL}
CLASSIFIER = {**BERT, "architectures": ["BertForSequenceClassification"]}
VIT = {"model_type": "vit", "architectures": ["ViTForImageClassification"], "image_size": 32, "patch_size": 8, **SMALL}
T5 = {
    "model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "vocab_size": 1000, "d_model": 64, "d_kv": 16,
    "d_ff": 128, "num_layers": 2, "num_heads": 4,
}  # fmt: skip


def config(folder: Path, content: Any) -> Path:
    (folder / "config.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def built(content: dict[str, Any], **options: Any) -> Any:
    from autoaccum.cli.architectures.build import build

    return build(Description("config", "config.json", content, **options), "meta")


def fits(*args: str, code: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "autoaccum", "fits", *args]
    found = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert found.returncode == code, found.stdout + found.stderr
    return found


# -- the model


@pytest.mark.parametrize(
    ("content", "options", "architecture", "names"),
    [
        (LLAMA, {"length": 16}, "LlamaForCausalLM", ["input_ids", "labels", "attention_mask"]),
        (LLAMA, {"length": 16, "packed": True}, "LlamaForCausalLM", ["input_ids", "labels"]),
        (BERT, {"length": 16}, "BertForMaskedLM", ["input_ids", "labels", "attention_mask"]),
        (T5, {"length": 16}, "T5ForConditionalGeneration", ["input_ids", "labels", "attention_mask"]),
        (CLASSIFIER, {"length": 16}, "BertForSequenceClassification", ["input_ids", "labels", "attention_mask"]),
        (VIT, {}, "ViTForImageClassification", ["pixel_values", "labels"]),
    ],
)
def test_the_architecture_that_a_configuration_names_is_built(
    content: dict[str, Any], options: dict[str, Any], architecture: str, names: list[str]
) -> None:
    pytest.importorskip("transformers")
    found = built(content, **options)
    assert found.architecture == architecture and list(found.workload.sample) == names
    assert next(found.workload.model.parameters()).is_meta and found.trained == found.parameters > 10_000
    assert all(leaf.device.type == "cpu" and len(leaf) == 2 for leaf in found.workload.sample.values())


def test_adapters_dtype_and_checkpointing_are_as_asked() -> None:
    pytest.importorskip("peft")
    import torch

    found = built({**LLAMA, "torch_dtype": "bfloat16"}, length=16, lora=4, checkpointing=True)
    dtypes = {parameter.dtype for parameter in found.workload.model.parameters() if not parameter.requires_grad}
    assert dtypes == {torch.bfloat16} and 0 < found.trained < found.parameters / 5
    assert any(getattr(module, "gradient_checkpointing", False) for module in found.workload.model.modules())
    assert "LoRA of rank 4 on all linear layers" in found.assumed
    full = built({**LLAMA, "torch_dtype": "bfloat16"}, length=16, dtype="fp32")
    assert {parameter.dtype for parameter in full.workload.model.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (LLAMA, {}, "--length is needed"),
        (LLAMA, {"length": 4096}, "exceeds the model's 2048 positions"),
        (VIT, {"length": 16}, "this model takes images"),
        ({**LLAMA, "architectures": ["LlamaForQuestionAnswering"]}, {"length": 16}, "whose loss is not known"),
        ({**LLAMA, "architectures": ["BertForMaskedLM"]}, {"length": 16}, "LlamaForCausalLM"),
        ({**LLAMA, "architectures": []}, {"length": 16}, "names no architecture"),
        ({**LLAMA, "model_type": "mine"}, {"length": 16}, "no model type 'mine'"),
        ({**LLAMA, "torch_dtype": "int8"}, {"length": 16}, "dtype 'int8'"),
        (LLAMA, {"length": 0}, "--length"),
        (LLAMA, {"length": 16, "precision": "int8"}, "--precision int8"),
    ],
)
def test_what_cannot_be_built_is_refused(content: dict[str, Any], options: dict[str, Any], message: str) -> None:
    pytest.importorskip("transformers")
    with pytest.raises(UsageError, match=message):
        built(content, **options)


# -- a configuration is untrusted


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"auto_map": {"AutoModelForCausalLM": "evil--modeling.Evil"}}, "auto_map.*Python code"),
        ({"text_config": {"auto_map": {"AutoConfig": "modeling.Evil"}}}, "auto_map"),
        ({"quantization_config": {"load_in_4bit": True}}, "quantization_config"),
        ({"use_pretrained_backbone": True}, "network"),
        ({"model_type": "timm_wrapper"}, "--timm NAME"),
        ({"num_hidden_layers": MOST_LAYERS + 1}, "more than 2048"),
        ({"vision_config": {"depth": 10**9}}, "more than 2048"),
    ],
)
def test_code_in_a_configuration_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=f"(?s){message}"):
        read_config(config(tmp_path, {**LLAMA, **changes}))


def test_code_that_a_configuration_chooses_is_dropped(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    chosen = {
        "_attn_implementation": "evil/kernel", "attn_implementation": "evil/kernel", "use_kernels": True,
        "_attn_implementation_internal": "evil/kernel", "experts_implementation": "evil/kernel",
        "trust_remote_code": True, "_name_or_path": "evil/model",
    }  # fmt: skip
    content = read_config(config(tmp_path, {**LLAMA, **chosen, "text_config": chosen}))
    assert content == {**LLAMA, "text_config": {}}
    del content["text_config"]
    assert "evil" not in str(built(content, length=16).workload.model.config.to_dict())


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"model_type": 3}', "[" * 100_000, '{"model_type": "llama"' * 2])
def test_what_is_no_configuration_is_refused(tmp_path: Path, content: str) -> None:
    with pytest.raises(UsageError, match="not a configuration"):
        read_config(config(tmp_path, content))
    with pytest.raises(UsageError, match="not a configuration"):
        read_config(tmp_path / "missing.json")


# -- names of timm's and torchvision's


@pytest.mark.parametrize("name", ["hf-hub:evil/model", "local-dir:/tmp", "vit_base_patch16_22", "../x"])
def test_a_name_is_one_of_timms_own(name: str) -> None:
    pytest.importorskip("timm")
    from autoaccum.cli.architectures.build import build

    with pytest.raises(UsageError, match="timm has no classifier"):
        build(Description("timm", name), "meta")


@pytest.mark.parametrize(("family", "name"), [("timm", "resnet10t"), ("torchvision", "resnet18")])
def test_a_classifier_is_built_by_its_name(family: str, name: str) -> None:
    pytest.importorskip(family)
    from autoaccum.cli.architectures.build import build

    found = build(Description(family, name, image_size=64), "meta")
    assert found.workload.sample[0].shape == (2, 3, 64, 64) and found.sample_words == "images of 64 x 64"
    with pytest.raises(UsageError, match="takes images"):
        Description(family, name, length=16)


# -- the command


@on_a_virtual_gpu
def test_the_answer_is_one_line_and_an_exit_code(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    place = ["--config", str(config(tmp_path, LLAMA)), "--gpu", "t4", "--target-batch", "64", "--length", "128"]
    yes = fits(*place, code=0)
    assert yes.stdout.count("\n") == 1 and yes.stdout.startswith("yes: LlamaForCausalLM")
    assert "real allocator on a virtual GPU" in yes.stdout and "attention mask" in yes.stderr


@pytest.mark.slow
@on_a_virtual_gpu
def test_a_model_that_is_too_large_is_a_no(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    large = config(tmp_path, {**LLAMA, "vocab_size": 2_000_000, "hidden_size": 1024})
    place = ["--config", str(large), "--gpu", "t4", "--target-batch", "64", "--length", "128"]
    answer = json.loads(fits(*place, "--json", code=3).stdout)
    assert answer["fits"] is False and "Not even a micro-batch of 1 fits" in answer["why"]
    assert answer["split"] is None and answer["parameters"] > 4e9


@on_a_virtual_gpu
@pytest.mark.parametrize("capability", ["8.9"])
def test_kernels_that_choose_by_the_codes_version_run(capability: str) -> None:
    code = "import torch; torch.zeros(5000, device='cuda').sort(); torch.cuda.synchronize(); print('sorted')"
    out = run_forked(code, gpu=VirtualGpu(compute_capability=capability))
    assert out.stdout == "sorted\n", out.stderr


def test_one_architecture_is_named(tmp_path: Path) -> None:
    asked = ["--gpu", "t4", "--target-batch", "8"]
    assert "No architecture was named" in fits(*asked, code=2).stderr
    error = CliRunner().invoke(app, ["fits", *asked, "--timm", "a", "--torchvision", "b"]).exception
    assert isinstance(error, UsageError) and "--timm and --torchvision were named" in str(error)


@pytest.mark.slow
@on_a_virtual_gpu
@pytest.mark.parametrize(
    ("architecture", "code"),
    [
        (["--timm", "vit_base_patch16_224", "--precision", "bf16"], 0),
        (["--torchvision", "resnet50"], 0),
        (["--timm", "vit_base_patch16_224", "--memory", "2GiB"], 3),
    ],
)
def test_classifiers_on_a_4090(architecture: list[str], code: int) -> None:
    pytest.importorskip(architecture[0].removeprefix("--"))
    fits("--gpu", "rtx-4090", "--target-batch", "256", *architecture, code=code)
