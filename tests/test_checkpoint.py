"""Checkpoints: nothing in one is run, a changed byte is noticed, and whatever is odd is refused in one way."""

from __future__ import annotations

import io
import os
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers_train import Rows, mlp, plan_for, vectors
from torch import nn
from torch.utils.data import DataLoader

from autoaccum import UsageError, Workload
from autoaccum.runner.checkpoint import _Sealed, plain, read_checkpoint, write_checkpoint
from autoaccum.runner.loop import train
from autoaccum.state.rng import as_plain, from_plain, put_rng, take_rng


def sealed(state: Any) -> bytes:
    """What a checkpoint of that would be, whatever it is."""
    out = io.BytesIO()
    writer = _Sealed(out)
    torch.save(state, writer)  # type: ignore[arg-type]
    writer.end()
    return out.getvalue()


def trained(checkpoint: Path, **how: Any) -> dict[str, Any]:
    rows = list(zip(*vectors(16), strict=True))
    work = Workload(
        nn.Sequential(mlp(), nn.Dropout(0.1)),
        vectors(4),
        loader=lambda: DataLoader(Rows(rows), batch_size=8, shuffle=True),
        **how,
    )
    return train(work, plan_for(work, 8, 4), progress=lambda figures: None, checkpoint=str(checkpoint), steps=1)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The bytes of a checkpoint of a real training."""
    path = tmp_path_factory.mktemp("whole") / "checkpoint.pt"
    trained(path)
    return path.read_bytes()


@pytest.fixture(scope="module")
def state(whole: bytes) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(io.BytesIO(whole), weights_only=True)  # as anybody's own script reads it
    return found


class Marks:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


PLACES: list[Callable[[dict[str, Any], Any], Any]] = [
    lambda state, marks: {"for": marks},
    lambda state, marks: marks,
    lambda state, marks: {**state, "place": {**state["place"], "rng_now": marks}},
    lambda state, marks: {**state, "runner": {**state["runner"], "optimizer": {"state": {0: marks}}}},
]


@pytest.mark.parametrize("place", range(len(PLACES)))
@pytest.mark.parametrize("is_sealed", [True, False])
def test_nothing_in_a_checkpoint_is_run(place: int, is_sealed: bool, state: dict[str, Any], tmp_path: Path) -> None:
    marker, path, content = (
        tmp_path / "executed",
        tmp_path / "evil.pt",
        PLACES[place](state, Marks(tmp_path / "executed")),
    )
    if is_sealed:
        path.write_bytes(sealed(content))
    else:
        torch.save(content, path)
    with pytest.raises(UsageError, match="can't be read"):
        trained(path)
    assert not marker.exists()


ODD: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a number": lambda state: 5,
    "for 5": lambda state: {"for": 5},
    "nothing": lambda state: {},
    "no runner": lambda state: {name: state[name] for name in ("for", "place")},
    "no place": lambda state: {name: state[name] for name in ("for", "runner")},
    "a runner of nothing": lambda state: {**state, "runner": {}},
    "a number of text": lambda state: {**state, "runner": {**state["runner"], "number": "1"}},
    "no micro-batch": lambda state: {**state, "runner": {**state["runner"], "limits": {"micro_batch": 0}}},
    "no weights": lambda state: {**state, "runner": {**state["runner"], "model": {}}},
    "no parameter groups": lambda state: {**state, "runner": {**state["runner"], "optimizer": {}}},
    "limits of text": lambda state: {**state, "runner": {**state["runner"], "limits": "none"}},
    "a negative epoch": lambda state: {**state, "place": {**state["place"], "epoch": -1}},
    "an epoch of a half": lambda state: {**state, "place": {**state["place"], "epoch": 0.5}},
    "an order of numbers": lambda state: {**state, "place": {**state["place"], "order_at_epoch": [1]}},
    "an order too short": lambda state: {**state, "place": {**state["place"], "order_at_epoch": [torch.zeros(3)]}},
    "no random states": lambda state: {**state, "place": {**state["place"], "rng_now": 7}},
    "random states of text": lambda state: {**state, "place": {**state["place"], "rng_now": {"torch RNG": "x"}}},
    "half a random state": lambda state: {**state, "place": {**state["place"], "rng_now": {"Python RNG": (3, (1, 2))}}},
    "arrays of objects": lambda state: {
        **state,
        "place": {**state["place"], "rng_now": {"NumPy RNG": {"dtype": "O", "values": [1]}}},
    },
    **{
        f"arrays with {value}": lambda state, value=value: {  # type: ignore[misc]
            **state,
            "place": {**state["place"], "rng_now": {"NumPy RNG": {"dtype": "uint32", "values": [value]}}},
        }
        for value in (-1, 2**63, float("inf"))
    },
    "a random state below 0": lambda state: {
        **state,
        "place": {**state["place"], "rng_now": {"Python RNG": (3, (0,) * 624 + (-(10**40),), None)}},
    },
}


@pytest.mark.parametrize("odd", ODD)
def test_an_odd_checkpoint_gets_the_one_clear_message(odd: str, state: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "odd.pt"
    path.write_bytes(sealed(ODD[odd](state)))
    with pytest.raises(UsageError) as caught:
        trained(path)
    assert caught.value.what.startswith(f"The checkpoint {str(path)!r} can't be read: ")
    assert "something else wrote it" in caught.value.why and "remove it" in caught.value.hint


@pytest.mark.parametrize(
    "kind", ["empty", "text", "torch's own", "pickle", "legacy", "cut", "longer", "fifo", "folder"]
)
def test_a_foreign_file_gets_the_same_message(kind: str, whole: bytes, state: dict[str, Any], tmp_path: Path) -> None:
    path, contents = tmp_path / "foreign.pt", io.BytesIO()
    torch.save(state, contents, _use_new_zipfile_serialization=kind != "legacy")
    made = {"empty": b"", "text": b"{}", "torch's own": contents.getvalue(), "legacy": contents.getvalue(),
            "pickle": pickle.dumps({"for": 5}), "cut": whole[:-100], "longer": whole + b"\0"}  # fmt: skip
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.write_bytes(made[kind])
    with pytest.raises(UsageError, match="can't be read"):
        trained(path)


def test_a_flipped_byte_is_always_noticed(whole: bytes, tmp_path: Path) -> None:
    rng, path = random.Random(0), tmp_path / "flipped.pt"
    places = {0, len(whole) - 1, *range(len(whole) - 120, len(whole)), *(rng.randrange(len(whole)) for _ in range(200))}
    for place in places:
        flipped = bytearray(whole)
        flipped[place] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)
        with pytest.raises(UsageError, match="can't be read"):
            read_checkpoint(path)
    path.write_bytes(whole)
    assert read_checkpoint(path).keys() == {"runner", "place", "for", "ranks"}


@pytest.mark.parametrize("pieces", [1, 7, 21, 22, 23, 1000])
def test_the_seal_is_the_same_in_whatever_pieces_it_is_written(pieces: int) -> None:
    plain_file = io.BytesIO()
    torch.save({"a": torch.arange(5)}, plain_file)
    out, content = io.BytesIO(), plain_file.getvalue()
    writer = _Sealed(out)
    for start in range(0, len(content), pieces):
        writer.write(content[start : start + pieces])
    writer.end()
    assert out.getvalue()[: len(content) - 2] == content[:-2]
    assert torch.load(io.BytesIO(out.getvalue()), weights_only=True)["a"].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("generator", [np.random.MT19937, np.random.PCG64, np.random.Philox, np.random.SFC64])
def test_random_states_come_back_from_a_file_as_they_were(generator: Any, tmp_path: Path) -> None:
    before, bits = take_rng(), np.random.get_bit_generator()
    try:
        np.random.set_bit_generator(generator(3))
        random.gauss(0, 1)
        np.random.standard_normal()  # the Mersenne twister keeps its second one
        torch.randn(1)
        write_checkpoint(tmp_path / "rng.pt", {"rng": as_plain(take_rng())})
        drawn = random.gauss(0, 1), np.random.standard_normal(), torch.randn(1).item(), random.random()
        put_rng(from_plain(read_checkpoint(tmp_path / "rng.pt")["rng"]))
        assert drawn == (random.gauss(0, 1), np.random.standard_normal(), torch.randn(1).item(), random.random())
    finally:
        np.random.set_bit_generator(bits)
        put_rng(before)


def test_a_state_dict_keeps_its_versions_and_its_values(tmp_path: Path) -> None:
    model = nn.Sequential(nn.BatchNorm1d(3))
    given = {
        "model": model.state_dict(),
        "lr": np.float64(0.1),
        "steps": [np.int64(3), (None, True)],
        "name": "é\ud800",
    }
    write_checkpoint(tmp_path / "state.pt", given)
    found = read_checkpoint(tmp_path / "state.pt")
    assert found["model"]._metadata == given["model"]._metadata  # type: ignore[attr-defined]
    assert found["lr"] == 0.1 and type(found["lr"]) is float and found["steps"] == [3, (None, True)]
    changed = model.state_dict()
    changed["extra"] = np.float32(0.5)  # type: ignore[assignment]
    assert plain(changed, "it")._metadata == changed._metadata and type(plain(changed, "it")["extra"]) is float


class Keeper(torch.optim.lr_scheduler.LRScheduler):
    """Its state holds an object of a class of its own."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.kept = Kept()
        super().__init__(optimizer)

    def get_lr(self) -> list[Any]:
        return [group["lr"] for group in self.optimizer.param_groups]


class Kept:
    """Something of the user's."""


def test_what_could_not_be_read_again_is_refused_before_the_first_window(tmp_path: Path) -> None:
    path = tmp_path / "kept.pt"
    with pytest.raises(UsageError, match=r"\['scheduler'\]\['kept'\] is a \S*Kept, which a checkpoint can't hold"):
        trained(path, scheduler=lambda optimizer: Keeper(optimizer))
    assert not path.exists()
    with torch.serialization.safe_globals([Kept]):  # what the workload's own file vouches for
        trained(path, scheduler=lambda optimizer: Keeper(optimizer))
        assert isinstance(read_checkpoint(path)["runner"]["scheduler"]["kept"], Kept)
