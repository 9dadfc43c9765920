"""What would spoil a window's gradient without a word is refused by name; what may is said."""

from __future__ import annotations

import copy
import functools
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers_train import (
    FP32,
    FP64,
    Capture,
    distance,
    gradients,
    mlp,
    one_thread,  # noqa: F401
    plan_for,
    runner_for,
    seen,
    tagger,
    vectors,
)
from torch import nn

from autoaccum import OutOfMemory, Runner, UsageError, Workload
from autoaccum.exactness.check import check
from autoaccum.runner import compatibility
from autoaccum.window.step import open_context
from autoaccum.workload import default_loss


def tutorial(model: nn.Module) -> None:
    """As in PyTorch's tutorial on the optimizer step in backward."""
    optimizers = {p: torch.optim.SGD([p], lr=0.1) for p in model.parameters()}

    def optimizer_hook(parameter: torch.Tensor) -> None:
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(optimizer_hook)


class Layerwise:
    """An optimizer held by an object, as GaLore's layer-wise form does."""

    def __init__(self, model: nn.Module) -> None:
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for p in model.parameters():
            p.register_post_accumulate_grad_hook(self.update)

    def update(self, parameter: torch.Tensor) -> None:
        self.optimizer.step()


def by_partial(model: nn.Module) -> None:
    def update(optimizer: Any, parameter: torch.Tensor) -> None:
        optimizer.step()

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(functools.partial(update, optimizer))


def by_helper(model: nn.Module) -> None:
    """The hook calls a function that steps."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def helper() -> None:
        optimizer.step()

    def calls_helper(parameter: torch.Tensor) -> None:
        helper()

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(calls_helper)


def lomo(model: nn.Module) -> None:
    """No optimizer at all: the hook updates and drops the gradient itself."""

    def fused_update(parameter: torch.Tensor) -> None:
        with torch.no_grad():
            parameter.sub_(parameter.grad, alpha=0.1)
        parameter.grad = None

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(fused_update)


GLOBAL: dict[Any, torch.optim.Optimizer] = {}


def by_global(model: nn.Module) -> None:
    def global_hook(parameter: torch.Tensor) -> None:
        GLOBAL[parameter].step()

    GLOBAL.update({p: torch.optim.SGD([p], lr=0.1) for p in model.parameters()})
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(global_hook)


def of_torch(model: nn.Module) -> None:
    from torch.distributed.optim import _apply_optimizer_in_backward

    _apply_optimizer_in_backward(torch.optim.SGD, model.parameters(), {"lr": 0.1})


def offload(model: nn.Module) -> None:
    """Takes the gradient away and adds it up elsewhere."""
    sums: dict[Any, torch.Tensor] = {}

    def to_host(parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        sums[parameter] = sums.get(parameter, 0) + parameter.grad
        parameter.grad = None

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(to_host)


@pytest.mark.parametrize(
    ("attach", "said", "changes"),
    [
        (tutorial, r"optimizer_hook on [04]\.\w+ steps SGD in backward", False),
        (Layerwise, r"Layerwise.update on [04]\.\w+ steps SGD in backward", False),
        (by_partial, r"update on [04]\.\w+ steps SGD", False),
        (by_global, r"global_hook on [04]\.\w+ steps SGD", False),
        (by_helper, r"calls_helper on [04]\.\w+ steps SGD", False),
        (lomo, r"fused_update on 4\.\w+ updates it in backward", True),
        (offload, r"to_host on 4\.\w+ drops its gradient in backward", False),
        (of_torch, r"A hook on [04]\.\w+ steps SGD in backward", False),
    ],
    ids=["tutorial", "bound", "partial", "global", "helper", "lomo", "offload", "torch.distributed"],
)
def test_an_optimizer_in_backward_is_refused_where_there_are_several_micro_batches(
    attach: Any, said: str, changes: bool
) -> None:
    model = mlp()
    work = Workload(model, vectors(2), optimizer=Capture)
    many, one = plan_for(work, 16, 4), plan_for(work, 16, 16)
    attach(model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UsageError, match=r"4 micro-batches") as refused:
        Runner(work, many).step(vectors(16))
    assert re.search(said, str(refused.value))
    assert "optimizer=" in str(refused.value)
    changed = [name for name, value in model.state_dict().items() if not torch.equal(before[name], value)]
    assert len(changed) == changes and all(name in str(refused.value) for name in changed)
    Runner(work, one)
    GLOBAL.clear()


def test_a_window_whose_backward_has_updated_parameters_is_not_repeated() -> None:
    class Short(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x * 1

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            raise torch.OutOfMemoryError("short")

    def loss(m: nn.Module, b: Any) -> torch.Tensor:
        return default_loss(m[1:], (Short.apply(m[0](b[0])), b[1]))  # type: ignore[index,no-untyped-call]

    model = mlp()
    tutorial(model)
    runner = runner_for(Workload(model, vectors(2), loss=loss, optimizer=Capture), 16, 16)
    with pytest.raises(OutOfMemory, match=r"a hook updates .*4\.weight.*short"):
        runner.step(vectors(16))


def test_a_window_with_an_optimizer_in_backward_is_not_cut_into_several_micro_batches() -> None:
    failures = iter([torch.OutOfMemoryError("short")])  # which no retry winds back

    def loss(m: nn.Module, b: Any) -> torch.Tensor:
        for failure in failures:
            raise failure
        return default_loss(m, b)

    model = mlp()
    tutorial(model)
    before = copy.deepcopy(model.state_dict())
    runner = runner_for(Workload(model, vectors(2), loss=loss, optimizer=Capture), 16, 16)
    with pytest.raises(OutOfMemory, match=r"steps SGD in backward, so a window that ran out of memory .*short"):
        runner.step(vectors(16))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_other_hooks_after_accumulation_are_said_and_work(caplog: pytest.LogCaptureFixture) -> None:
    model, norms = mlp(), list[float]()

    def keeps_norms(parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        norms.append(float(parameter.grad.norm()))

    for p in list(model.parameters())[:2]:
        p.register_post_accumulate_grad_hook(keeps_norms)
    want = gradients(mlp(), default_loss, vectors(16))
    runner = runner_for(Workload(model, vectors(2), optimizer=Capture), 16, 4)
    assert "keeps_norms on 0.weight (and 1 more) runs after every micro-batch, 4 times a window" in caplog.text
    runner.step(vectors(16))
    assert len(norms) == 8
    assert distance(seen(runner)[-1], want) <= FP64


def test_a_hook_that_only_reads_an_optimizer_is_not_refused(caplog: pytest.LogCaptureFixture) -> None:
    model, rates = mlp(), list[float]()
    optimizer = Capture(model.parameters(), lr=0.1)

    def reads_rate(parameter: torch.Tensor) -> None:
        rates.append(optimizer.param_groups[0]["lr"])

    next(model.parameters()).register_post_accumulate_grad_hook(reads_rate)
    runner_for(Workload(model, vectors(2), optimizer=optimizer), 16, 4).step(vectors(16))
    assert "reads_rate on 0.weight runs after every micro-batch" in caplog.text
    assert rates == [0.1] * 4


def test_hooks_on_gradients_are_said(caplog: pytest.LogCaptureFixture) -> None:
    def clamps(gradient: torch.Tensor) -> torch.Tensor:
        return gradient.clamp(-0.01, 0.01)

    model = mlp()
    next(model.parameters()).register_hook(clamps)
    work = Workload(model, vectors(2), optimizer=Capture)
    runner_for(work, 16, 16)
    assert not caplog.text
    runner_for(work, 16, 4)
    assert "clamps on 0.weight runs on every micro-batch's gradient separately" in caplog.text


class Counts(nn.Module):
    """Counts its forwards, in one of several ways."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.int64))
        self.register_buffer("queue", torch.zeros(3))
        self.register_buffer("scale", torch.ones(()))


class ByBuffer(Counts):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.num_updates += 1
        self.scale = self.scale.to(x.dtype)
        return x * self.scale


class ByAttribute(Counts):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls = self.calls + 1
        return x


class ByMethod(Counts):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.moved(x)

    def moved(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.num_updates.add_(1)
        return x


class ByElement(Counts):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.queue[0] = x.detach().mean()
        return x


@pytest.mark.parametrize(
    ("kind", "named"),
    [(ByBuffer, "1.num_updates"), (ByAttribute, "1.calls"), (ByMethod, "1.num_updates"), (ByElement, "1.queue")],
)
def test_a_module_that_counts_its_own_steps_is_named_once(
    kind: type[Counts], named: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = nn.Sequential(mlp(), kind())
    work = Workload(model, vectors(2), optimizer=Capture)
    alone = runner_for(work, 16, 16)
    for _ in range(3):
        alone.step(vectors(16))
    assert not caplog.text  # one micro-batch: one step, one count
    runner = runner_for(work, 16, 4)
    runner.step(vectors(4))
    runner.step(vectors(16, seed=1))
    assert "The forward changes" not in caplog.text  # a flag changes in the first window, too
    runner.step(vectors(16, seed=2))
    assert f"The forward changes {named}: 4 times a window, not once" in caplog.text
    assert "in between_steps=" in caplog.text  # what to do
    runner.step(vectors(16))
    assert caplog.text.count("The forward changes") == 1


class Sized(Counts):
    """Reads its sizes off the first input, as torchvision's MultiScaleRoIAlign does (`roi_heads.box_roi_pool`)."""

    def __init__(self) -> None:
        super().__init__()
        self.scales: list[float] | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.scales is None:
            self.scales = [1.0 / len(x)]
        return x


class Flagged(Counts):
    """Starts from its first batch, behind a flag: as an ActNorm does."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.num_updates == 0:
            with torch.no_grad():
                self.scale.copy_(x.detach().std())
            self.num_updates.fill_(1)
        return x * self.scale


class Returning(Flagged):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.start(x.detach())
        return x * self.scale

    def start(self, x: torch.Tensor) -> None:
        if self.num_updates:
            return
        self.scale.copy_(x.std())
        self.num_updates.fill_(1)


class Lazily(Counts):
    """A flag that the source doesn't show as one."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.__dict__["ran"] = True
        return x


@pytest.mark.parametrize("kind", [Sized, Flagged, Returning, Lazily])
def test_what_flips_once_is_no_counting(kind: type[nn.Module], caplog: pytest.LogCaptureFixture) -> None:
    runner = runner_for(Workload(nn.Sequential(mlp(), kind()), vectors(2), optimizer=Capture), 16, 4)
    for _ in range(3):
        runner.step(vectors(16))
    assert "The forward changes" not in caplog.text


def test_a_counter_behind_a_bound_of_its_own_is_still_named(caplog: pytest.LogCaptureFixture) -> None:
    class WarmsUp(Counts):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.calls < 1000:
                self.calls += 1
            return x * min(1.0, self.calls / 1000)

    runner = runner_for(Workload(nn.Sequential(mlp(), WarmsUp()), vectors(2), optimizer=Capture), 16, 4)
    for _ in range(2):
        runner.step(vectors(16))
    assert "The forward changes 1.calls: 4 times a window" in caplog.text


def test_what_is_known_of_is_not_named_as_counting(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    spectral = nn.utils.parametrizations.spectral_norm(nn.Linear(6, 8))
    model = nn.Sequential(spectral, nn.BatchNorm1d(8), nn.Dropout(0.1), nn.Linear(8, 5)).double()
    runner = runner_for(Workload(model, vectors(4), optimizer=Capture), 16, 4)
    for _ in range(2):
        runner.step(vectors(16))
    assert "The forward changes" not in caplog.text


def test_an_optimizer_that_calls_for_a_closure_is_refused() -> None:
    work = Workload(mlp(), vectors(2), optimizer=lambda p: torch.optim.LBFGS(p))
    with pytest.raises(UsageError, match="LBFGS calls for a closure"):
        runner_for(work, 16, 16)


# --- CUDA graphs: what is looked for can be made without a GPU -----------------------------------------------------


def graphed(model: nn.Module) -> nn.Module:
    """What torch.cuda.make_graphed_callables does to a module's forward."""

    def make_graphed_callables() -> Any:
        def new_fwd(x: torch.Tensor) -> torch.Tensor:
            return x

        return new_fwd

    model.forward = make_graphed_callables()  # type: ignore[method-assign]
    return model


def on_a_gpu(model: nn.Module) -> Any:
    context = open_context(Workload(model, vectors(2)))
    context.device = torch.device("cuda", 0)
    return context


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (graphed, "make_graphed_callables"),
        (lambda m: torch.compile(m, mode="reduce-overhead"), "compiled with CUDA graphs"),
        (lambda m: torch.compile(m, mode="max-autotune"), "compiled with CUDA graphs"),
        (lambda m: torch.compile(m, options={"triton.cudagraphs": True}), "compiled with CUDA graphs"),
        (lambda m: nn.Sequential(torch.compile(m, mode="reduce-overhead")), "0 is compiled with CUDA graphs"),
    ],
    ids=["graphed", "reduce-overhead", "max-autotune", "option", "inner"],
)
def test_gradients_in_the_pool_of_a_cuda_graph_are_refused(make: Any, said: str) -> None:
    context = on_a_gpu(make(mlp()))
    with pytest.raises(UsageError, match="4 micro-batches") as refused:
        compatibility.refuse_graphs(context, 4)
    assert said in str(refused.value)
    compatibility.refuse_graphs(context, 1)
    context.device = torch.device("cpu")  # which has no graphs
    compatibility.refuse_graphs(context, 4)


def test_module_compile_with_cuda_graphs_is_refused() -> None:
    model = mlp()
    model.compile(mode="reduce-overhead")
    with pytest.raises(UsageError, match="compiled with CUDA graphs"):
        compatibility.refuse_graphs(on_a_gpu(model), 4)


@pytest.mark.parametrize("mode", [None, "default", "max-autotune-no-cudagraphs"])
def test_compiling_without_cuda_graphs_is_not_refused(mode: str | None) -> None:
    compatibility.refuse_graphs(on_a_gpu(torch.compile(mlp(), mode=mode)), 4)
    model = mlp()
    model.compile(mode=mode)
    compatibility.refuse_graphs(on_a_gpu(model), 4)


# --- what works ----------------------------------------------------------------------------------------------------


def test_frozen_parameters_work() -> None:
    model = mlp()
    for p in model[0].parameters():
        p.requires_grad_(False)
    before = model[0].weight.clone()
    want = gradients(model, default_loss, vectors(16))
    runner = runner_for(Workload(model, vectors(2), optimizer=Capture), 16, 5)
    runner.step(vectors(16))
    assert len(seen(runner)[-1]) == 4
    assert distance(seen(runner)[-1], want) <= FP64
    assert torch.equal(model[0].weight, before)


def test_tied_parameters_work() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(11, 8)
            self.inner = nn.Linear(8, 8)
            self.out = nn.Linear(8, 11, bias=False)
            self.out.weight = self.embedding.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.out(torch.tanh(self.inner(self.embedding(ids)))).mean(1)

    torch.manual_seed(0)
    model = Tied().double()
    batch = torch.randint(11, (16, 5)), torch.arange(16) % 11
    want = gradients(model, default_loss, batch)
    runner = runner_for(Workload(model, batch, optimizer=Capture), 16, 5)
    runner.step(batch)
    assert distance(seen(runner)[-1], want) <= FP64
    assert model.out.weight is model.embedding.weight


class LowRank(nn.Module):
    """A frozen layer and what is trained beside it, as LoRA does it."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(2, layer.in_features).double())
        self.up = nn.Parameter(torch.randn(layer.out_features, 2).double())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) + x @ self.down.T @ self.up.T


def test_adapters_beside_frozen_layers_work() -> None:
    model = mlp()
    for index in (0, 2, 4):
        model[index] = LowRank(model[index])
    frozen = [p for p in model.parameters() if not p.requires_grad]
    before, want = copy.deepcopy(frozen), gradients(model, default_loss, vectors(16))
    work = Workload(model, vectors(2), optimizer=Capture)
    runner = runner_for(work, 16, 5)
    runner.step(vectors(16))
    assert len(seen(runner)[-1]) == len(want) == 6
    assert distance(seen(runner)[-1], want) <= FP64
    assert all(torch.equal(*pair) and pair[0].grad is None for pair in zip(frozen, before, strict=True))
    assert check(work).kind == "exact"


def test_peft_works() -> None:
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2,
    )  # fmt: skip
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(transformers.LlamaForCausalLM(config), lora).train()
    ids = torch.randint(3, 32, (16, 10))
    labels = ids.masked_fill(torch.arange(10)[None] >= torch.linspace(10, 2, 16).int()[:, None], -100)
    batch = {"input_ids": ids, "labels": labels}
    want = gradients(model, lambda m, b: m(**b).loss, batch)
    runner = runner_for(Workload(model, batch, optimizer=Capture), 16, 5)
    runner.step(batch)
    assert len(seen(runner)[-1]) == len(want) == 8
    assert distance(seen(runner)[-1], want) <= FP32
    form = runner.context.loss_form
    assert form is not None and form.denominator is not None and form.denominator.shifted


def test_a_parameter_that_a_window_does_not_reach_has_no_gradient() -> None:
    model = tagger()
    model.unused = nn.Linear(3, 3)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
    runner = runner_for(
        Workload(
            model,
            {"ids": torch.ones(2, 4, dtype=torch.int64), "labels": torch.ones(2, 4, dtype=torch.int64)},
            loss=lambda m, b: F.cross_entropy(m(b["ids"]).flatten(0, 1), b["labels"].flatten()),
            optimizer=optimizer,
        ),
        8,
        3,
    )
    before = copy.deepcopy(model.unused.state_dict())
    runner.step({"ids": torch.ones(8, 4, dtype=torch.int64), "labels": torch.arange(32).reshape(8, 4) % 7})
    assert all(torch.equal(model.unused.state_dict()[name], value) for name, value in before.items())
