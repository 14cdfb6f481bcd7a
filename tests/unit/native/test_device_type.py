"""A meta tensor counts as one on the device that it stands for; every other tensor as one on its own device."""

from __future__ import annotations

import threading

import pytest
import torch

from sbft.native.device_type import device_type, standing_for


def test_a_tensor_is_on_its_own_device() -> None:
    assert device_type(torch.ones(1)) == "cpu"
    assert device_type(torch.ones(1, device="meta")) == "meta"


def test_meta_tensors_alone_stand_for_others_and_only_within() -> None:
    meta = torch.ones(1, device="meta")
    with standing_for("cuda"):
        assert device_type(meta) == "cuda"
        assert device_type(torch.ones(1)) == "cpu"
        with standing_for("cpu"):
            assert device_type(meta) == "cpu"
        assert device_type(meta) == "cuda"
    assert device_type(meta) == "meta"


def test_an_error_leaves_nothing_behind() -> None:
    with pytest.raises(KeyError), standing_for("cuda"):
        raise KeyError
    assert device_type(torch.ones(1, device="meta")) == "meta"


def test_another_thread_means_its_own() -> None:
    found: list[str] = []
    with standing_for("cuda"):
        thread = threading.Thread(target=lambda: found.append(device_type(torch.ones(1, device="meta"))))
        thread.start()
        thread.join()
    assert found == ["meta"]


def test_backward_on_meta_tensors_knows_what_they_stand_for() -> None:
    seen: list[str] = []
    weight = torch.ones(2, device="meta", requires_grad=True)
    weight.register_hook(lambda grad: seen.append(device_type(grad)))
    with standing_for("cuda"):
        (weight * 2).sum().backward()
    assert seen == ["cuda"]
