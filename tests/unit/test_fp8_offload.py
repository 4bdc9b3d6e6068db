"""A teacher's weights away between scoring phases: when they come and go, and that they come back to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from examples.benchmarks.random_weights import random_weights, weight_bytes
from nemo_tropd.batch import Rollout, TokenBatch
from nemo_tropd.parallel.topology import Topology
from nemo_tropd.teacher.offload import WeightHome, parts, storages
from nemo_tropd.teacher.scorer import TeacherScorer
from tests.tiny_models import make_tiny

VOCABULARY = 131


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("offload") / "m", "qwen2", seed=3)


def batch(seed: int) -> TokenBatch:
    generator = torch.Generator().manual_seed(seed)
    rollouts = []
    for i, length in enumerate((12, 7)):
        ids = torch.randint(0, VOCABULARY, (length,), generator=generator).tolist()
        rollouts.append(Rollout(ids[:3], ids[3:], [], [], 0, i, i, True))
    return TokenBatch.pack(rollouts, pad_id=0, seed=1, step=0)


class RecordingHome(WeightHome):
    """Notes what is done to the weights, and does it."""

    def __init__(self, model: torch.nn.Module, log: list[str]) -> None:
        super().__init__(model)
        self.log = log

    def leave(self) -> None:
        self.log.append("leave")
        super().leave()

    def come_back(self) -> None:
        self.log.append("come back")
        super().come_back()


def recorded(tiny: Path, topology: Topology) -> tuple[TeacherScorer, list[str]]:
    teacher = TeacherScorer(tiny, topology, dtype=torch.float32, vocab_size=VOCABULARY, offload=True)
    assert teacher.home is not None and teacher.home.away
    teacher.home.come_back()
    log: list[str] = []
    teacher.home = RecordingHome(teacher.model, log)
    teacher.home.leave()
    teacher.model.register_forward_pre_hook(lambda *_: log.append("pass"))
    return teacher, log


def test_the_weights_are_there_for_every_pass_and_for_nothing_else(tiny: Path, topology: Topology) -> None:
    teacher, log = recorded(tiny, topology)
    teacher.score([batch(1), batch(2)], top_k=4, entropy=False, chunk_tokens=None)
    teacher.hidden([batch(3)])
    assert log == ["leave", "come back", "pass", "pass", "leave", "come back", "pass", "leave"]


def test_one_phase_around_several_calls_moves_the_weights_once(tiny: Path, topology: Topology) -> None:
    teacher, log = recorded(tiny, topology)
    with teacher.scoring():
        teacher.hidden([batch(1)])
        assert torch.isfinite(teacher.head).all()
        teacher.score([batch(2)], top_k=4, entropy=False, chunk_tokens=None)
    assert log == ["leave", "come back", "pass", "pass", "leave"]
    with pytest.raises(RuntimeError, match=r"inside scoring\(\)"):
        _ = teacher.head


def test_the_weights_leave_after_a_pass_that_fails(tiny: Path, topology: Topology) -> None:
    teacher, log = recorded(tiny, topology)
    with pytest.raises(RuntimeError, match="broken"), teacher.scoring():
        raise RuntimeError("broken")
    assert log[-1] == "leave"


def test_what_comes_back_is_what_left(tiny: Path, topology: Topology) -> None:
    stays = TeacherScorer(tiny, topology, dtype=torch.float32, vocab_size=VOCABULARY)
    moves = TeacherScorer(tiny, topology, dtype=torch.float32, vocab_size=VOCABULARY, offload=True)
    assert weight_bytes(moves.model) == 0 and moves.home is not None
    with moves.scoring():
        assert (
            weight_bytes(moves.model)
            == weight_bytes(stays.model)
            >= 4 * sum(p.numel() for p in stays.model.parameters())
        )
    for seed in range(3):
        (wanted,), (found,) = (t.score([batch(seed)], top_k=8, entropy=True, chunk_tokens=None) for t in (stays, moves))
        assert wanted is not None and found is not None
        for name in ("log_probs", "top_k_log_probs", "top_k_ids", "entropy"):
            assert torch.equal(getattr(found, name), getattr(wanted, name)), name
        assert weight_bytes(moves.model) == 0


def test_casts_of_the_weights_leave_with_them() -> None:
    """Beside weights that are not kept in FP8 Transformer Engine keeps their casts, neither parameters nor buffers."""
    layer = torch.nn.Linear(2, 2)
    layer._fp8_workspaces = {"weight": torch.zeros(4)}
    WeightHome(torch.nn.Sequential(layer)).leave()
    assert not layer._fp8_workspaces


class Quantized(Tensor):
    """A double of Transformer Engine's quantized tensors: a wrapper without storage around data and scale."""

    data_: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, data: Tensor, scale: Tensor) -> Quantized:
        made = Tensor._make_wrapper_subclass(cls, data.shape, dtype=torch.bfloat16)
        made.data_, made.scale = data, scale
        return made

    def get_metadata(self) -> dict[str, Any]:
        return {"data": self.data_, "fp8_scale_inv": self.scale, "data_transpose": None, "quantizer": object()}

    def untyped_storage(self) -> torch.UntypedStorage:
        return torch.UntypedStorage(0)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func is torch.ops.aten.detach.default:
            return Quantized(args[0].data_, args[0].scale)
        plain = tree_map(lambda x: x.data_.float() * x.scale if isinstance(x, Quantized) else x, args)
        return func(*plain, **(kwargs or {}))


def test_a_quantized_weight_moves_with_its_scale_and_its_views() -> None:
    generator = torch.Generator().manual_seed(2)
    data = torch.randn(8, 4, generator=generator).to(torch.float8_e4m3fn)
    weight = Quantized(data, torch.tensor([0.125]))
    model = torch.nn.Module()
    model.weight = torch.nn.Parameter(weight, requires_grad=False)
    model.norm = torch.nn.Parameter(torch.randn(4, generator=generator), requires_grad=False)
    model.tied = model.norm  # counted and moved once
    model.register_buffer("part", data[2:5])  # a view into the quantized data
    assert len(parts(model.weight)) == 2
    assert len(list(storages(model))) == 3
    assert weight_bytes(model) == 32 + 4 + 16
    before = (model.weight.float(), model.norm.clone(), model.part.float())
    home = WeightHome(model)
    for _ in range(2):
        home.leave()
        home.leave()
        assert weight_bytes(model) == 0 and data.untyped_storage().nbytes() == 0
        home.come_back()
        home.come_back()
        for wanted, found in zip(before, (model.weight.float(), model.norm, model.part.float()), strict=True):
            assert torch.equal(wanted, found)
    assert model.part.untyped_storage()._cdata == data.untyped_storage()._cdata


def test_random_weights_are_the_same_whatever_stores_them(tiny: Path, topology: Topology) -> None:
    from nemo_tropd.convert.families import read_shape

    shape = read_shape(tiny)
    made = [
        TeacherScorer(shape, topology, dtype=dtype, vocab_size=VOCABULARY, fill=random_weights(7, shape.layers))
        for dtype in (torch.float32, torch.bfloat16)
    ]
    for (name, wide), (_, narrow) in zip(*(t.model.named_parameters() for t in made), strict=True):
        assert torch.equal(wide, narrow.float()), name
        if "norm" not in name and not name.endswith("bias"):
            assert 0.5 < wide.std() / (0.02 / (2 if "linear_proj" in name or "linear_fc2" in name else 1)) < 1.5, name
    with pytest.raises(ValueError, match="needs fill"):
        TeacherScorer(shape, topology, dtype=torch.float32, vocab_size=VOCABULARY)
