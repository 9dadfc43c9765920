"""Batches cut, repeated and joined along their samples."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, UserDict
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from autoaccum.data import tree
from autoaccum.data.split import batch_size, join, joinable, split, tile
from autoaccum.errors import BatchError


class Pair(NamedTuple):
    image: Any
    label: Any


@dataclasses.dataclass(frozen=True)
class Example:
    ids: Any
    text: Any


def make_batch(n: int, kind: str) -> Any:
    x = torch.arange(n * 6, dtype=torch.float32).reshape(n, 3, 2)
    y = torch.arange(n)
    text = [f"row {i}" for i in range(n)]
    if kind == "encoding":
        transformers = pytest.importorskip("transformers")
        return transformers.BatchEncoding({"input_ids": x, "labels": y})
    return {
        "tensor": x,
        "pair": (x, y),
        "list": [x, y],
        "namedtuple": Pair(x, y),
        "dict": {"x": x, "labels": y, "temperature": 0.5, "scale": torch.tensor(3.0), "none": None, "on": True},
        "userdict": UserDict(x=x, labels=y),
        "nested": OrderedDict(b={"deep": [x, (y, Example(y, text))]}, a=Pair(x, "shared")),
        "strings": {"text": text, "tuple": tuple(text), "y": y},
        "only strings": text,
    }[kind]


kinds = st.sampled_from(
    ["tensor", "pair", "list", "namedtuple", "dict", "userdict", "nested", "strings", "only strings", "encoding"]
)
all_sizes = st.lists(st.integers(1, 5), min_size=1, max_size=6)


def same(a: Any, b: Any) -> bool:
    ones, others = tree.leaves(a), tree.leaves(b)
    return type(a) is type(b) and all(
        path == path2 and (torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y)
        for (path, x), (path2, y) in zip(ones, others, strict=True)
    )


def tensors(batch: Any) -> list[torch.Tensor]:
    return [leaf for _, leaf in tree.leaves(batch) if isinstance(leaf, torch.Tensor) and leaf.dim()]


@given(all_sizes, kinds)
def test_the_pieces_joined_are_the_batch(sizes: list[int], kind: str) -> None:
    batch = make_batch(sum(sizes), kind)
    pieces = split(batch, sizes)
    assert [batch_size(piece) for piece in pieces] == sizes
    assert all(type(piece) is type(batch) for piece in pieces)
    assert same(join(pieces), batch)


@given(all_sizes, kinds)
def test_pieces_are_views_in_order(sizes: list[int], kind: str) -> None:
    batch = make_batch(sum(sizes), kind)
    pieces = split(batch, sizes)
    for index, whole in enumerate(tensors(batch)):
        parts = [tensors(piece)[index] for piece in pieces]
        assert torch.equal(torch.cat(parts), whole)
        assert all(part.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr() for part in parts)


@given(all_sizes, st.integers(-3, 3).filter(bool))
def test_sizes_that_do_not_sum_to_the_batch_raise(sizes: list[int], off: int) -> None:
    batch = make_batch(sum(sizes) + 3, "dict")
    with pytest.raises(BatchError, match=f"batch of {sum(sizes) + 3} samples"):
        split(batch, [*sizes, 3 + off])


@pytest.mark.parametrize("sizes", [(), (4, 0), (5, -1)])
def test_sizes_below_one_raise(sizes: tuple[int, ...]) -> None:
    with pytest.raises(BatchError):
        split(make_batch(4, "pair"), sizes)


@given(st.integers(1, 5), st.integers(1, 17), kinds)
def test_row_i_of_a_tile_is_row_i_modulo_the_sample(size: int, n: int, kind: str) -> None:
    sample = make_batch(size, kind)
    tiled = tile(sample, n)
    assert batch_size(tiled) == n
    assert type(tiled) is type(sample)
    for row, piece in enumerate(split(tiled, [1] * n)):
        assert same(piece, split(sample, [1] * size)[row % size])


def test_a_tile_has_storage_of_its_own_and_keeps_dtype_memory_format_and_grad() -> None:
    image = torch.rand(4, 3, 5, 5).to(memory_format=torch.channels_last)
    sample = {"image": image, "ids": torch.arange(4, dtype=torch.uint8), "x": torch.rand(4, 2, requires_grad=True)}
    tiled = tile(sample, 4)
    for key, leaf in tiled.items():
        assert leaf.dtype == sample[key].dtype
        assert leaf.stride() == sample[key].stride()
        assert leaf.is_leaf
        assert leaf.requires_grad == sample[key].requires_grad
        assert leaf.data_ptr() != sample[key].data_ptr()


def test_a_tile_of_nothing_raises() -> None:
    with pytest.raises(BatchError, match="0 samples"):
        tile(make_batch(2, "pair"), 0)


def test_shared_leaves_are_the_same_object_in_all_pieces() -> None:
    batch = {"x": torch.ones(4, 2), "scale": torch.tensor(2.0), "matrix": torch.ones(3, 3), "names": {"a", "b"}}
    for piece in (*split(batch, (1, 3), shared={"matrix", "names"}), tile(batch, 9, shared={"matrix", "names"})):
        assert all(piece[key] is batch[key] for key in ("scale", "matrix", "names"))


def test_popping_from_a_piece_leaves_the_batch_and_the_other_pieces() -> None:
    batch = {"x": torch.ones(4), "meta": {"y": torch.ones(4), "z": 1}}
    first, second = split(batch, (2, 2))
    first["meta"].pop("z")
    first.pop("x")
    assert "x" in second
    assert "z" in second["meta"]
    assert "z" in batch["meta"]


def test_leaves_that_disagree_raise_with_path_and_shapes() -> None:
    batch = {"scores": torch.ones(10), "x": torch.ones(8, 3), "y": torch.ones(8)}
    with pytest.raises(BatchError) as caught:
        batch_size(batch)
    assert "batch['scores'] (shape (10,)) has 10 rows" in caught.value.what
    assert "batch['x'] (shape (8, 3)) and 1 more has 8" in caught.value.what
    assert "shared={'scores'}" in caught.value.hint
    assert batch_size(batch, shared={"scores"}) == 8


@pytest.mark.parametrize("batch", [{}, {"lr": 0.1}, torch.tensor(1.0), "text", None, {"x": []}])
def test_a_batch_without_rows_raises(batch: Any) -> None:
    with pytest.raises(BatchError, match="nothing with a row for each sample"):
        batch_size(batch)


def test_a_batch_of_zero_samples_raises() -> None:
    with pytest.raises(BatchError, match="0 samples"):
        batch_size({"x": torch.ones(0, 3)})


@pytest.mark.parametrize("leaf", [{1, 2}, object(), range(8), pytest])
def test_what_cannot_be_cut_raises_with_its_path_and_can_be_shared(leaf: Any) -> None:
    batch = {"x": torch.ones(8, 3), "odd": leaf}
    with pytest.raises(BatchError, match=r"batch\['odd'\] is a") as caught:
        batch_size(batch)
    assert "shared={'odd'}" in caught.value.hint
    assert batch_size(batch, shared={"odd"}) == batch_size(batch, shared="odd") == 8


def test_numpy_arrays_raise() -> None:
    numpy = pytest.importorskip("numpy")
    with pytest.raises(BatchError, match=r"numpy\.ndarray"):
        batch_size((torch.ones(8), numpy.ones(8)))


def test_nested_and_sparse_tensors_raise_with_their_path() -> None:
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)
    with pytest.raises(BatchError, match=r"batch\['seq'\] is a nested tensor"):
        batch_size({"seq": nested})
    with pytest.raises(BatchError, match=r"batch\['adj'\] is a tensor in layout torch.sparse_coo"):
        batch_size({"adj": torch.eye(8).to_sparse()})


@pytest.mark.parametrize("key", ["weight", "weights", "class_weight", "pos_weight", "class_prior", "Class_Weights"])
def test_eight_class_weights_in_a_batch_of_eight_raise_until_they_are_settled(key: str) -> None:
    batch = {"x": torch.ones(8, 3), key: torch.arange(8.0)}
    with pytest.raises(BatchError, match=key) as caught:
        batch_size(batch)
    assert f"shared={{{key!r}}}" in caught.value.hint
    assert f"per_sample={{{key!r}}}" in caught.value.hint
    assert split(batch, (5, 3), shared={key})[1][key] is batch[key]
    assert split(batch, (5, 3), per_sample={key})[1][key].tolist() == [5, 6, 7]


@pytest.mark.parametrize("key", ["sample_weight", "example_weights", "weighted", "label"])
def test_names_that_say_per_sample_are_cut(key: str) -> None:
    assert batch_size({"x": torch.ones(8, 3), key: torch.ones(8)}) == 8


def test_integer_and_two_dimensional_weights_are_no_class_weights() -> None:
    assert batch_size({"x": torch.ones(8), "weight": torch.ones(8, 1), "weights": torch.arange(8)}) == 8


@pytest.mark.parametrize(
    "key", ["cu_seqlens", "cu_seq_lens_q", "cu_seqlen_k", "offsets", "indptr", "ptr", "row_splits"]
)
@pytest.mark.parametrize("rows", [8, 9])
def test_positions_in_packed_sequences_raise_whatever_their_length(key: str, rows: int) -> None:
    batch = {"x": torch.ones(8, 3), key: torch.arange(rows)}
    with pytest.raises(BatchError, match=key) as caught:
        split(batch, (4, 4))
    assert "packed" in caught.value.why
    assert batch_size(batch, shared={key}) == 8


def test_offset_mappings_and_float_offsets_are_cut() -> None:
    assert batch_size({"offset_mapping": torch.ones(8, 4, 2).long(), "box_offsets": torch.ones(8, 4)}) == 8


def test_a_name_settles_nested_keys_fields_and_paths() -> None:
    loss = {"loss": {"weight": torch.ones(8)}, "x": torch.ones(8)}
    assert batch_size(loss, per_sample={"weight"}) == 8
    assert batch_size(loss, shared={"loss"}) == 8
    assert split(loss, (3, 5), shared={"loss"})[0]["loss"] is loss["loss"]
    assert batch_size(Pair(torch.ones(8), torch.ones(5)), shared={"label"}) == 8
    assert batch_size((torch.ones(8), torch.ones(5)), shared={"batch[1]"}) == 8


def test_a_list_of_strings_of_another_length_raises() -> None:
    batch = {"x": torch.ones(8, 3), "classes": ["cat", "dog"]}
    with pytest.raises(BatchError, match=r"batch\['classes'\] \(list of 2\) has 2 rows"):
        batch_size(batch)
    assert split(batch, (4, 4), shared={"classes"})[0]["classes"] == ["cat", "dog"]


def detection(n: int) -> dict[str, Any]:
    targets = [{"boxes": torch.full((i % 3 + 1, 4), float(i)), "image_id": i} for i in range(n)]
    return {"image": torch.rand(n, 3, 4, 4), "targets": targets}


def test_a_list_of_detection_targets_raises_and_is_cut_by_rows_once_named() -> None:
    batch = detection(8)
    with pytest.raises(BatchError) as caught:
        batch_size(batch)
    assert "batch['targets']" in str(caught.value)
    assert "per_sample={'targets'}" in caught.value.hint
    pieces = split(batch, (3, 5), per_sample={"targets"})
    assert [target["image_id"] for target in pieces[1]["targets"]] == [3, 4, 5, 6, 7]
    assert same(join(pieces, per_sample={"targets"}), batch)
    assert len(tile(batch, 19, per_sample={"targets"})["targets"]) == 19


def test_following_the_hints_settles_a_torchvision_batch() -> None:
    images = tuple(torch.rand(3, 4 + i, 4) for i in range(8))
    batch = (images, tuple(detection(8)["targets"]))
    named: set[str] = set()
    for expected in ("batch[0]", "batch[1]"):
        with pytest.raises(BatchError) as caught:
            batch_size(batch, per_sample=named)
        assert f"per_sample={{{expected!r}}}" in caught.value.hint
        named.add(expected)
    assert [len(piece[0]) for piece in split(batch, (3, 5), per_sample=named)] == [3, 5]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"x": torch.ones(2, 3)}, {"x": torch.ones(2, 4)}),
        ({"x": torch.ones(2, 3)}, {"x": torch.ones(2, 3).double()}),
        ({"x": torch.ones(2, 3)}, {"y": torch.ones(2, 3)}),
        ({"x": torch.ones(2), "t": 1}, {"x": torch.ones(2), "t": 2}),
        ({"x": torch.ones(2), "t": torch.tensor(1)}, {"x": torch.ones(2), "t": torch.tensor(2)}),
        ({"x": torch.ones(2), "t": None}, {"x": torch.ones(2), "t": torch.ones(2)}),
        ({"x": torch.ones(2)}, {"x": torch.ones(2, device="meta")}),
    ],
)
def test_batches_that_differ_in_more_than_their_samples_are_not_joined(one: Any, other: Any) -> None:
    assert join([one, other]) is None
    assert not joinable(one, other)


def test_shared_values_that_are_equal_join() -> None:
    one = {"x": torch.ones(2), "t": torch.tensor([1, 2, 3]), "meta": {"names": {"a"}, "m": torch.ones(3)}}
    other = {"x": torch.ones(1), "t": torch.tensor([1, 2, 3]), "meta": {"names": {"a"}, "m": torch.ones(3)}}
    joined = join([one, other], shared={"t", "meta"})
    assert joined is not None
    assert joined["x"].shape == (3,)
    other["meta"]["m"] = torch.zeros(3)
    assert join([one, other], shared={"t", "meta"}) is None


def test_joining_one_gives_it_back_and_joining_none_raises() -> None:
    batch = make_batch(3, "dict")
    assert join([batch]) is batch
    with pytest.raises(BatchError):
        join([])
