"""Weights that go to host memory and on from there."""

from __future__ import annotations

import pytest
import torch

from nemo_tropd.rollout.weights.copies import HostCopy

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def test_a_copy_is_there_when_it_was_taken_and_in_pinned_memory_that_is_used_again() -> None:
    fused = torch.randn(3000, 1024, device="cuda")
    copy, at = HostCopy(), []
    for turn in range(3):
        torch.cuda._sleep(50_000_000)  # what comes before it on the device is waited for
        fused += turn
        stream = {"q": fused[:1000], "t": fused.T, "small": fused[0]}
        copy.take(iter(stream.items()))
        found = {name: tensor.clone() for name, tensor in copy.tensors.items()}
        assert all(torch.equal(found[name], tensor.cpu()) for name, tensor in stream.items())
        at.append([tensor.data_ptr() for tensor in copy.tensors.values()])
    assert at[0] == at[1] == at[2]
    assert [tensor.is_pinned() for tensor in copy.tensors.values()] == [True, True, False]


def test_memory_is_unpinned_with_its_owner() -> None:
    copy = HostCopy()
    copy.take(iter({"w": torch.ones(1 << 20, device="cuda")}.items()))
    held = copy.tensors["w"]
    assert held.is_pinned()
    del copy
    assert not held.is_pinned()
