"""A plan's numbers in other tools: what their own libraries read from it, and what they train."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from plan_fields import changed_plan
from torch import nn
from typer.testing import CliRunner

from autoaccum import Plan, UsageError, Workload, fit_plan
from autoaccum.cli import app
from autoaccum.reporting.exports.equal_steps import equal_steps
from autoaccum.reporting.exports.json_merge import merge
from autoaccum.reporting.exports.targets import TARGETS, export

NUMBERS = {"train_batch_size": 30, "train_micro_batch_size_per_gpu": 6, "gradient_accumulation_steps": 5}


def planned(**request: Any) -> Plan:
    torch.manual_seed(0)
    work = Workload(nn.Linear(16, 4), (torch.randn(2, 16), torch.tensor([1, 3])))
    return fit_plan(work, target_batch=30, max_micro_batch=8, verify=False, check=False, **request)


@pytest.fixture(scope="module")
def plan() -> Plan:
    """Thirty samples, at most eight at a time: 8, 8, 7, 7."""
    found = planned()
    assert found.split == (8, 8, 7, 7)
    return found


def written(plan: Plan, target: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(export(plan, target).text)
    return found


def cli(*args: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    found = subprocess.run([sys.executable, "-m", "autoaccum", *args], capture_output=True, text=True)
    assert found.returncode == code, found.stdout + found.stderr
    return found


# -- one size


def test_a_uniform_plan_has_the_largest_divisor_that_fits() -> None:
    found = planned(uniform=True)
    assert found.split == (6, 6, 6, 6, 6)
    assert "no larger micro-batch up to 8 divides 30" in found.provenance.reasons["fewer_steps"]
    assert equal_steps(found).remarks == ()


@pytest.mark.parametrize(
    ("target", "most", "ranks", "refused"),
    [(31, 8, 1, None), (30, 8, 4, "28 or 32"), (32, 8, 4, None)],
)
def test_a_uniform_plan_shares_evenly_or_names_the_nearest(
    target: int, most: int, ranks: int, refused: str | None
) -> None:
    work = Workload(nn.Linear(16, 4), (torch.randn(2, 16), torch.tensor([1, 3])))
    request = {"target_batch": target, "max_micro_batch": most, "world_size": ranks, "uniform": True}
    if refused is None:
        found = fit_plan(work, verify=False, check=False, **request)  # type: ignore[arg-type]
        assert sum(found.split) * ranks == target and len(set(found.split)) == 1
        return
    with pytest.raises(UsageError, match=refused):
        fit_plan(work, verify=False, check=False, **request)  # type: ignore[arg-type]


def test_batch_statistics_forbid_a_prime_target_in_equal_steps() -> None:
    work = Workload(nn.Sequential(nn.Linear(16, 4), nn.BatchNorm1d(4)), (torch.randn(2, 16), torch.tensor([1, 3])))
    with pytest.raises(UsageError, match="equal micro-batches of 2 to 8"):
        fit_plan(work, target_batch=31, max_micro_batch=8, uniform=True, verify=False, check=False)


def test_an_uneven_plan_is_exported_with_its_cost(plan: Plan) -> None:
    found = equal_steps(plan)
    assert (found.micro_batch, found.accumulation_steps, found.target_batch) == (6, 5, 30)
    assert "5 steps of 6" in found.remarks[0] and "1.25 times the passes" in found.remarks[0]
    assert "28 (7 x 4) and 32 (8 x 4)" in found.remarks[1]


def test_equal_steps_that_the_table_does_not_fit_are_not_exported(plan: Plan) -> None:
    six = next(row for row in plan.memory.peaks if row.micro_batch == 6)
    too_large = [
        row if row is not six else type(row)(**{**vars(row), "later_bytes": 2 * plan.budget_bytes})
        for row in plan.memory.peaks
    ]
    found = equal_steps(changed_plan(plan, peaks=tuple(too_large)))
    assert (found.micro_batch, found.accumulation_steps) == (5, 6)


def test_a_target_without_equal_steps_names_the_nearest(plan: Plan) -> None:
    prime = changed_plan(plan, target_batch=31, split=(8, 8, 8, 7), min_micro_batch=2)
    with pytest.raises(UsageError, match=r"28 \(7 x 4\) and 32 \(8 x 4\)"):
        equal_steps(prime)
    shared = changed_plan(plan, target_batch=59, world_size=2)
    with pytest.raises(UsageError, match="shared evenly by 2 ranks"):
        equal_steps(shared)


# -- each tool


def test_the_hugging_face_trainer_trains_the_target(plan: Plan, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    values = written(plan, "hf")
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        **values,
    )
    seen: list[int] = []

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(16, 4)

        def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
            seen.append(len(x))
            return {"loss": nn.functional.cross_entropy(self.layer(x), labels)}

    data = [{"x": torch.randn(16), "labels": torch.tensor(1)} for _ in range(60)]
    trainer = transformers.Trainer(model=Model(), args=arguments, train_dataset=data)
    trainer.train()
    assert seen == [6] * 10 and trainer.state.global_step == 2


def test_accelerate_steps_after_the_target(plan: Plan) -> None:
    accelerate = pytest.importorskip("accelerate")
    values = written(plan, "accelerate")
    accelerator = accelerate.Accelerator(cpu=True, **values["Accelerator"])
    data = torch.utils.data.TensorDataset(torch.randn(60, 16))
    loader = torch.utils.data.DataLoader(data, **values["DataLoader"])
    model, loader = accelerator.prepare(nn.Linear(16, 4), loader)
    samples, windows = 0, []
    for (x,) in loader:
        with accelerator.accumulate(model):
            samples += len(x)
            if accelerator.sync_gradients:
                windows.append(samples)
                samples = 0
    assert windows == [30, 30]


def test_lightning_steps_after_the_target(plan: Plan, tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning.pytorch")
    values = written(plan, "lightning")
    steps: list[int] = []
    seen: list[int] = []

    class Module(lightning.LightningModule):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(16, 4)

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            seen.append(len(batch[0]))
            return self.layer(batch[0]).square().mean()  # type: ignore[no-any-return]

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            steps.append(sum(seen))

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    data = torch.utils.data.TensorDataset(torch.randn(60, 16))
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path, **values["Trainer"],
    )  # fmt: skip
    trainer.fit(Module(), torch.utils.data.DataLoader(data, **values["DataLoader"]))
    assert steps == [30, 60]


def test_deepspeeds_three_numbers_multiply(plan: Plan) -> None:
    assert written(plan, "deepspeed") == NUMBERS
    two = changed_plan(plan, target_batch=60, world_size=2)
    found = written(two, "deepspeed")
    product = found["train_micro_batch_size_per_gpu"] * found["gradient_accumulation_steps"] * 2
    assert found["train_batch_size"] == product == 60


def test_deepspeed_reads_them(plan: Plan, tmp_path: Path) -> None:
    config = pytest.importorskip("deepspeed.runtime.config")
    file = tmp_path / "ds.json"
    file.write_text(merge(COMMENTED, NUMBERS, source="ds.json"))
    found = config.DeepSpeedConfig(str(file))  # it asserts that they multiply to train_batch_size
    assert (found.train_batch_size, found.train_micro_batch_size_per_gpu) == (30, 6)
    assert found.gradient_accumulation_steps == 5 and found.zero_config.stage == 2


def test_torchtitan_reads_them(plan: Plan) -> None:
    flags = export(plan, "torchtitan").text.split()
    assert flags == ["--training.local_batch_size", "6", "--training.global_batch_size", "30"]
    tyro, titan = pytest.importorskip("tyro"), pytest.importorskip("torchtitan.config")
    found = tyro.cli(titan.TrainingConfig, args=[flag.replace("--training.", "--") for flag in flags])
    assert (found.local_batch_size, found.global_batch_size) == (6, 30)
    assert found.global_batch_size % found.local_batch_size == 0  # torchtitan's trainer asserts this


def test_the_autocast_that_was_planned_is_exported(plan: Plan) -> None:
    fingerprint = {**plan.provenance.fingerprint, "precision": "torch.bfloat16"}
    cast = changed_plan(plan, fingerprint=fingerprint)
    assert written(cast, "hf")["bf16"] is True and "bf16" not in written(plan, "hf")
    assert written(cast, "accelerate")["Accelerator"]["mixed_precision"] == "bf16"
    assert written(cast, "lightning")["Trainer"]["precision"] == "bf16-mixed"
    assert written(cast, "json")["autocast"] == "bf16"


def test_env_is_read_by_a_shell(plan: Plan) -> None:
    script = export(plan, "env").text + 'echo "$AUTOACCUM_SPLIT $AUTOACCUM_TARGET_BATCH $AUTOACCUM_UNIFORM"'
    out = subprocess.run(["sh", "-euc", script], capture_output=True, text=True, check=True)
    assert out.stdout == "8,8,7,7 30 0\n"


# -- a configuration that is there

COMMENTED = """{
    // tuned by hand
    "train_batch_size": "auto", # from the trainer
    "zero_optimization": {
        "stage": 2,
        "reduce_bucket_size": 5e8   /* not 500000000.0 */
    },
    "tensorboard": {"enabled": false, "job_name": "train_batch_size"},
    "train_micro_batch_size_per_gpu": "auto",
    "steps_per_print": 2000,
}
"""


def test_merging_keeps_every_other_character() -> None:
    merged = merge(COMMENTED, NUMBERS, source="ds.json")
    kept = COMMENTED.replace('"train_batch_size": "auto"', '"train_batch_size": 30')
    kept = kept.replace('"train_micro_batch_size_per_gpu": "auto"', '"train_micro_batch_size_per_gpu": 6')
    kept = kept.replace("2000,\n}", '2000,\n    "gradient_accumulation_steps": 5\n}')
    assert merged == kept
    assert merge(merged, NUMBERS, source="ds.json") == merged


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("{}", {}),
        ('{"a": {"b": [1, {"train_batch_size": 3}]}}', {"a": {"b": [1, {"train_batch_size": 3}]}}),
        ('{"gradient_accumulation_steps": {"x": [2]}, "u\\u00e9": "//no comment"}', {"u\u00e9": "//no comment"}),
        ('{\r\n\t"a": 1e5,\r\n\t"b": null\r\n}', {"a": 1e5, "b": None}),
    ],
)
def test_merging_changes_only_the_three_numbers(text: str, found: dict[str, Any]) -> None:
    assert json.loads(merge(text, NUMBERS, source="ds.json")) == {**found, **NUMBERS}


@pytest.mark.parametrize(
    "text", ["", "[1]", '{"a": 1, "a": 2}', '{"a": 1', "{a: 1}", '{"a": 1} {"b": 2}', "[" * 100_000, '{"a": "\n"}', "/"]
)
def test_what_cannot_be_merged_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"ds\.json is not a JSON object"):
        merge(text, NUMBERS, source="ds.json")


# -- the command


def test_the_command_prints_plain_values_and_writes_once(plan: Plan, tmp_path: Path) -> None:
    plan.save(file := tmp_path / "plan.json")
    (tmp_path / "ds.json").write_text(COMMENTED)
    printed = cli("export", str(file), "--to", "hf")
    assert json.loads(printed.stdout)["gradient_accumulation_steps"] == 5 and "5 steps of 6" in printed.stderr
    merged = ["export", str(file), "--to", "deepspeed", "--merge", str(tmp_path / "ds.json"), "-o"]
    assert "exists already" in cli(*merged, str(tmp_path / "ds.json"), code=2).stderr
    assert (tmp_path / "ds.json").read_text() == COMMENTED
    cli(*merged, str(tmp_path / "ds.json"), "--force")
    assert (tmp_path / "ds.json").read_text() == merge(COMMENTED, NUMBERS, source="")
    error = CliRunner().invoke(app, ["export", str(file), "--to", "megatron"]).exception
    assert isinstance(error, UsageError) and "one of: hf" in f"{error} {error.hint}"


def test_the_command_knows_every_target() -> None:
    from autoaccum.cli.export import _TARGETS

    assert _TARGETS == TARGETS


# -- in Python


def test_a_plan_as_plain_values(plan: Plan) -> None:
    found = plan.to_dict()
    assert found["schedule"]["split"] == [8, 8, 7, 7]
    assert Plan.from_json(json.dumps(found)) == plan
    plain = (dict, list, str, int, float, bool, type(None))

    def walk(value: Any) -> None:
        assert type(value) in plain
        for each in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            walk(each)

    walk(found)


def test_a_batch_sampler_yields_the_plans_micro_batches(plan: Plan) -> None:
    data = torch.utils.data.TensorDataset(torch.arange(70))
    sampler: Any = plan.batch_sampler(data)
    loader = torch.utils.data.DataLoader(data, batch_sampler=sampler)
    batches = [batch.tolist() for (batch,) in loader]
    assert [len(batch) for batch in batches] == [8, 8, 7, 7, 8, 8, 7, 7, 5, 5] and len(sampler) == 10
    assert sorted(list(chain(*batches))) == list(range(70))
    sampler.set_epoch(1)
    assert list(chain(*(batch.tolist() for (batch,) in loader))) != list(chain(*batches))
    ordered = list(plan.batch_sampler(data, shuffle=False, drop_last=True))
    assert list(chain(*ordered)) == list(range(60))


def test_ranks_sample_disjoint_shares_in_step(plan: Plan) -> None:
    two = changed_plan(plan, target_batch=59, world_size=2)
    dataset = torch.utils.data.TensorDataset(torch.arange(118))
    found = [list(two.batch_sampler(dataset, rank=rank)) for rank in (0, 1)]
    assert [len(each) for each in found] == [8, 8]
    assert sorted(list(chain(*(found[0] + found[1])))) == list(range(118))
    assert sum(map(len, found[0][:4])) == 30 and sum(map(len, found[1][:4])) == 29
    with pytest.raises(UsageError, match="drop_last=True"):
        two.batch_sampler(torch.utils.data.TensorDataset(torch.arange(100)))
    with pytest.raises(UsageError, match="rank is 2"):
        two.batch_sampler(dataset, rank=2)
