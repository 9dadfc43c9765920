"""Batches as trees of leaves: walking, rebuilding and naming them."""

from __future__ import annotations

import dataclasses
import time
from collections import OrderedDict, UserDict, defaultdict
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from autoaccum.data import tree
from autoaccum.errors import BatchError


class Point(NamedTuple):
    x: Any
    y: Any


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    ids: Any
    mask: Any = None


@dataclasses.dataclass
class Derived:
    ids: torch.Tensor
    n: int = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.n = len(self.ids)


values = st.integers() | st.text(max_size=2) | st.none()
trees = st.recursive(
    values,
    lambda node: (
        st.lists(node, max_size=3)
        | st.lists(node, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=3), node, max_size=3)
        | st.dictionaries(st.text(max_size=3), node, max_size=3).map(OrderedDict)
        | st.builds(Point, node, node)
        | st.builds(Frozen, node, node)
    ),
    max_leaves=12,
)


@given(trees)
def test_mapping_the_identity_gives_an_equal_tree_of_the_same_types(batch: Any) -> None:
    result = tree.map_leaves(batch, lambda path, leaf: leaf)
    assert result == batch
    assert type(result) is type(batch)


@given(trees)
def test_map_leaves_visits_what_leaves_lists_in_the_same_order(batch: Any) -> None:
    seen: list[tuple[str, Any]] = []
    tree.map_leaves(batch, lambda path, leaf: seen.append((path, leaf)))
    assert seen == tree.leaves(batch)


def test_paths_read_as_the_code_that_reaches_the_leaf() -> None:
    batch = {"image": [10, 11], "point": Point(12, (13,)), "frozen": Frozen(14)}
    found = dict(tree.leaves(batch))
    assert list(found) == [
        "batch['image'][0]",
        "batch['image'][1]",
        "batch['point'].x",
        "batch['point'].y[0]",
        "batch['frozen'].ids",
        "batch['frozen'].mask",
    ]
    assert all(eval(path, {"batch": batch}) == leaf for path, leaf in found.items())
    assert tree.leaves(3) == [("batch", 3)]


@pytest.mark.parametrize("kind", [dict, OrderedDict, UserDict, MappingProxyType, lambda d: defaultdict(list, d)])
def test_mappings_keep_their_type_and_key_order_and_the_original_is_untouched(kind: Any) -> None:
    batch = kind({"z": 1, "a": 2})
    result = tree.map_leaves(batch, lambda path, leaf: leaf + 10)
    assert type(result) is type(batch)
    assert list(result.items()) == [("z", 11), ("a", 12)]
    assert list(batch.items()) == [("z", 1), ("a", 2)]


def test_a_defaultdict_keeps_its_factory() -> None:
    assert tree.map_leaves(defaultdict(list, a=1), lambda _, leaf: leaf)["new"] == []


def test_a_dataclass_derives_its_derived_fields_anew() -> None:
    half = tree.map_leaves(Derived(torch.arange(8)), lambda _, leaf: leaf[:4])
    assert half.n == 4


def test_a_container_that_cannot_be_made_anew_is_named() -> None:
    @dataclasses.dataclass
    class Picky:
        ids: Any
        other: dataclasses.InitVar[int]

    with pytest.raises(BatchError, match=r"batch\['p'\] is a Picky") as caught:
        tree.map_leaves({"p": Picky(1, 2)}, lambda _, leaf: leaf)
    assert caught.value.hint


def test_a_batch_encoding_stays_one_and_works_as_keywords() -> None:
    transformers = pytest.importorskip("transformers")
    batch = transformers.BatchEncoding({"input_ids": torch.ones(2, 3), "labels": torch.ones(2)})
    result = tree.map_leaves(batch, lambda _, leaf: leaf * 2)
    assert type(result) is type(batch)
    assert set(dict(**result)) == {"input_ids", "labels"}
    assert result.input_ids.sum() == 12
    assert batch.input_ids.sum() == 6


def test_a_model_output_stays_one_with_its_attributes() -> None:
    outputs = pytest.importorskip("transformers.modeling_outputs")
    batch = outputs.BaseModelOutput(last_hidden_state=torch.ones(2))
    result = tree.map_leaves(batch, lambda _, leaf: leaf * 2)
    assert type(result) is type(batch)
    assert result.last_hidden_state.sum() == result["last_hidden_state"].sum() == 4
    assert batch.last_hidden_state.sum() == 2


def test_to_device_makes_containers_of_its_own_around_the_same_tensors() -> None:
    batch = {"x": torch.ones(2), "name": "a", "n": [3]}
    there = tree.to_device(batch, torch.device("cpu"))
    assert there["x"] is batch["x"]
    there.pop("name")
    there["n"].append(4)
    assert batch == {"x": batch["x"], "name": "a", "n": [3]}


def test_to_device_moves_tensors_only_and_leaves_the_original() -> None:
    batch = {"x": torch.ones(2), "more": (torch.ones(1), "name", 3)}
    moved = tree.to_device(batch, "meta")
    assert moved["x"].device.type == moved["more"][0].device.type == "meta"
    assert moved["more"][1:] == ("name", 3)
    assert batch["x"].device.type == "cpu"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_to_device_moves_pinned_tensors_to_cuda() -> None:
    batch = {"x": torch.arange(4).pin_memory(), "y": torch.arange(4)}
    moved = tree.to_device(batch, torch.device("cuda"))
    assert moved["x"].is_cuda
    assert torch.equal(moved["x"].cpu(), batch["x"])
    assert tree.to_device(moved, torch.device("cuda")) is moved


def test_a_walk_takes_microseconds() -> None:
    batch = {f"key{i}": torch.ones(1) for i in range(8)}
    best = min(_seconds(lambda: tree.to_device(batch, "cpu")) for _ in range(20))
    assert best < 1e-3  # about 20 us; a machine that is busy gets fifty times that


def _seconds(function: Any) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start
