"""Weights in files: tied ones once, parts of one tensor apart, and loaded strictly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from kdbench.errors import UserError
from kdbench.models.weights import aliases, check_weights, load_weights, portable
from tests.bad_input.odd_networks import Tied


def load(model: nn.Module, path: Path) -> None:
    load_weights(model, path, name="tied", num_classes=2)


def test_the_names_of_a_tied_tensor_are_found_on_every_device() -> None:
    assert aliases(Tied(2, 1).state_dict()) == {"again.weight": "decode.weight"}
    with torch.device("meta"):
        assert aliases(Tied(2, 1).state_dict()) == {"again.weight": "decode.weight"}


def test_a_part_of_a_tensor_and_its_transpose_are_no_aliases_and_are_stored_apart() -> None:
    whole = torch.arange(6.0).view(2, 3)
    tensors = {"whole": whole, "part": whole[:1], "turned": whole.T, "empty": torch.zeros(0), "another": torch.zeros(0)}
    assert aliases(tensors) == {}
    stored = portable(tensors)
    assert {name: tensor.tolist() for name, tensor in stored.items()} == {name: tensor.tolist() for name, tensor in tensors.items()}
    kept = [tensor for tensor in stored.values() if tensor.numel()]
    assert len({tensor.untyped_storage().data_ptr() for tensor in kept}) == len(kept)


@pytest.mark.parametrize("stored_under", [("decode.weight",), ("again.weight",), ("decode.weight", "again.weight")], ids=" ".join)
def test_a_file_may_have_any_of_a_tied_tensors_names(tmp_path: Path, stored_under: tuple[str, ...]) -> None:
    trained, model = Tied(2, 1), Tied(2, 1)
    tensors = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
    gone = {"decode.weight", "again.weight"} - set(stored_under)
    save_file({name: tensor for name, tensor in tensors.items() if name not in gone}, tmp_path / "w.safetensors")
    load(model, tmp_path / "w.safetensors")
    assert model.again.weight is model.decode.weight
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in tensors.items())


def test_tied_weights_that_differ_in_the_file_and_missing_ones_are_refused(tmp_path: Path) -> None:
    tensors = {name: tensor.clone() for name, tensor in Tied(2, 1).state_dict().items()}
    save_file({**tensors, "again.weight": tensors["again.weight"] + 1}, tmp_path / "differ.safetensors")
    with pytest.raises(UserError, match=r"it ties 'again\.weight' to 'decode\.weight', which differ in the file"):
        load(Tied(2, 1), tmp_path / "differ.safetensors")
    del tensors["again.weight"], tensors["decode.weight"]
    save_file(tensors, tmp_path / "missing.safetensors")
    with pytest.raises(UserError, match=r"'decode\.weight' is missing \(and 1 more\)"):
        load(Tied(2, 1), tmp_path / "missing.safetensors")


def test_weights_are_checked_against_a_network_without_memory(tmp_path: Path) -> None:
    save_file(portable(Tied(2, 1).state_dict()), tmp_path / "w.safetensors")
    with torch.device("meta"):
        outline = Tied(2, 1)
    assert check_weights(outline, tmp_path / "w.safetensors", name="tied", num_classes=2).keys() == outline.state_dict().keys()
    assert all(parameter.is_meta for parameter in outline.parameters())
