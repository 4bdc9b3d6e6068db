"""FP8 settings: refusals with their messages, what Megatron is told, and padding that is removed exactly."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nemo_tropd.batch import Rollout, TokenBatch
from nemo_tropd.config import ConfigError
from nemo_tropd.config_teacher import FP8_RECIPES, TeacherConfig
from nemo_tropd.convert.families import read_shape
from nemo_tropd.parallel.topology import Topology
from nemo_tropd.teacher.fp8 import (
    HARDWARE,
    MULTIPLES,
    Fp8Settings,
    check_hardware,
    pad_tokens,
    padded_width,
)
from tests.e2e.compose import compose_config
from tests.tiny_models import make_tiny

VOCABULARY = 131


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)


@pytest.mark.parametrize(
    ("overrides", "key", "remedy"),
    [
        (["model.teacher.fp8=delayed"], "model.teacher.fp8", "updates delayed scales in backward passes"),
        (["model.teacher.fp8=int8"], "model.teacher.fp8", "tensorwise, blockwise, mxfp8"),
        (["model.teacher.fp8=tensorwise", "model.teacher.precision=32"], "model.teacher.precision", "needs a bf16"),
        (["model.teacher.fp8=tensorwise", "trainer.precision=32"], "model.teacher.precision", "needs a bf16"),
        (["model.teacher.fp8=blockwise", "model.data.held_out=0"], "model.data.held_out", "admission.prompts=0"),
        (
            ["model.teacher.fp8=blockwise", "model.teacher.fp8_param=false", "model.teacher.offload=true"],
            "model.teacher.offload",
            "fp8_param=true",
        ),
        (["model.teacher.fp8_first_last_bf16=-1"], "model.teacher.fp8_first_last_bf16", "at least 0"),
        (["model.teacher.admission.gate_flips=-0.1"], "model.teacher.admission.gate_flips", "at least 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(overrides: list[str], key: str, remedy: str) -> None:
    required = ["pretrained_checkpoint.restore_from_path=s", "model.teacher.path=t", "model.data.path=d"]
    with pytest.raises(ConfigError) as error:
        compose_config([*required, "trainer.precision=bf16", *overrides], "base")
    assert error.value.key == key
    assert remedy in str(error.value)


@pytest.mark.parametrize("recipe", FP8_RECIPES)
def test_every_recipe_is_described(recipe: str) -> None:
    assert recipe in MULTIPLES and recipe in HARDWARE


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_machine_without_a_gpu_is_refused_before_anything_is_built() -> None:
    with pytest.raises(ConfigError, match=r"model\.teacher\.fp8 = 'tensorwise': this machine has no CUDA device"):
        check_hardware("tensorwise")


def test_what_megatron_is_told() -> None:
    from megatron.core.transformer.transformer_config import TransformerConfig

    fields = Fp8Settings.of(TeacherConfig(fp8="blockwise", fp8_first_last_bf16=2)).transformer_fields()
    config = TransformerConfig(num_layers=8, hidden_size=64, num_attention_heads=4, **fields)
    assert (config.fp8, config.fp8_recipe, config.fp8_param) == ("e4m3", "blockwise", True)
    assert config.first_last_layers_bf16
    assert (config.num_layers_at_start_in_bf16, config.num_layers_at_end_in_bf16) == (2, 2)
    assert Fp8Settings.of(TeacherConfig()) is None
    assert not Fp8Settings("tensorwise").transformer_fields()["first_last_layers_bf16"]


def test_shapes_that_fp8_cannot_multiply_are_refused(tmp_path: Path) -> None:
    shape = read_shape(make_tiny(tmp_path / "m", "llama", hidden=64, heads=4, kv_heads=2, layers=4, head_dim=16))
    Fp8Settings("tensorwise", first_last_bf16=2).check_shape(shape, 1, 2)
    with pytest.raises(ConfigError, match=r"hidden size, 40, is not a multiple of 16"):
        Fp8Settings("tensorwise").check_shape(replace(shape, hidden=40), 1, 1)
    with pytest.raises(ConfigError, match=r"feed-forward columns of a rank, 24, .* 16.*tensor-parallel degree"):
        Fp8Settings("blockwise").check_shape(replace(shape, ffn=48), 2, 1)
    with pytest.raises(ConfigError, match="not a multiple of 32"):
        Fp8Settings("mxfp8").check_shape(replace(shape, ffn=48), 1, 1)
    with pytest.raises(ConfigError, match=r"fp8_first_last_bf16 = 3: a pipeline stage of the teacher has 2 of its 4"):
        Fp8Settings("tensorwise", first_last_bf16=3).check_shape(shape, 1, 2)


@pytest.mark.parametrize("multiple", [16, 32])
@pytest.mark.parametrize("shards", [1, 2, 3])
@pytest.mark.parametrize("rows", [1, 2, 3, 8, 32, 40])
def test_width_is_the_least_that_fits(multiple: int, shards: int, rows: int) -> None:
    for width in range(1, 70):
        fits = [w for w in range(width, 400) if w % shards == 0 and rows * (w // shards) % multiple == 0]
        assert padded_width(rows, width, multiple, shards) == fits[0]


def rollouts(seed: int, lengths: tuple[int, ...]) -> list[Rollout]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for i, length in enumerate(lengths):
        ids = torch.randint(0, VOCABULARY, (length,), generator=generator).tolist()
        start, middle = max(1, length // 3), max(1, length // 2)
        response = ids[middle:]
        made.append(Rollout(ids[:start], ids[start:middle], response, [-1.5] * len(response), 0, i, i, True))
    return made


@pytest.fixture(scope="module")
def topology() -> Any:
    made = Topology.start()
    yield made
    made.stop()


@pytest.mark.parametrize("layout", ["pack", "concatenate"])
@pytest.mark.parametrize("moved", [False, True], ids=["fresh", "moved"])
def test_padding_names_the_same_loss_tokens(layout: str, moved: bool, topology: Topology) -> None:
    batch = getattr(TokenBatch, layout)(rollouts(3, (13, 5, 2, 19)), pad_id=7, seed=11, step=2)
    batch = batch.to(topology.device) if moved else batch
    wide = pad_tokens(batch, 16, topology)
    assert wide.input_ids.numel() % 16 == 0
    assert wide.input_ids.shape[0] == batch.input_ids.shape[0]
    assert wide.input_ids.shape[1] > batch.input_ids.shape[1]
    old, new = batch.loss_tokens(), wide.loss_tokens()
    for name in ("token_ids", "guided", "uniforms", "sequence"):
        assert torch.equal(getattr(old, name), getattr(new, name)), name
    assert torch.equal(old.behavior_log_probs.nan_to_num(9.0), new.behavior_log_probs.nan_to_num(9.0))
    # The rows point at the same positions of the same sequences, in tensors of either width.
    for name in ("input_ids", "labels", "position_ids"):
        before, after = getattr(batch, name).flatten()[old.rows], getattr(wide, name).flatten()[new.rows]
        assert torch.equal(before, after), name
    if wide.segments is not None:
        assert int(wide.segments.bounds[-1]) == wide.input_ids.numel()
        assert torch.equal(wide.segments.bounds[:-1], batch.segments.bounds)
        tail = wide.position_ids[0, batch.input_ids.size(1) :]
        assert torch.equal(tail, torch.arange(tail.numel()))
    assert pad_tokens(wide, 16, topology) is wide


@pytest.mark.parametrize("layout", ["pack", "concatenate"])
def test_padding_is_removed_and_changes_no_output(layout: str, tmp_path: Path, topology: Topology) -> None:
    """In fp32 and without FP8's shared scales, a teacher that pads gives what one gives that does not."""
    from nemo_tropd.teacher.scorer import TeacherScorer

    path = make_tiny(tmp_path / "m", "qwen2", seed=5)
    batches = [getattr(TokenBatch, layout)(rollouts(s, (13, 6, 20)), pad_id=0, seed=1, step=0) for s in (1, 2)]
    plain = TeacherScorer(path, topology, dtype=torch.float32, vocab_size=VOCABULARY)
    expected = [h for h in plain.hidden(batches) if h is not None]
    scores = plain.score(batches, top_k=8, entropy=True, chunk_tokens=None)
    plain.fp8 = Fp8Settings("tensorwise")  # pads from here on; its layers stay in fp32
    widths = [pad_tokens(b, 16, topology).input_ids.size(1) - b.input_ids.size(1) for b in batches]
    assert min(widths) > 0
    for hidden, wanted in zip(plain.hidden(batches), expected, strict=True):
        assert hidden is not None and hidden.shape == wanted.shape
        real = torch.ones(wanted.shape[:2], dtype=torch.bool)
        torch.testing.assert_close(hidden[real], wanted[real], rtol=1e-5, atol=1e-5)
    for found, wanted_scores in zip(
        plain.score(batches, top_k=8, entropy=True, chunk_tokens=None), scores, strict=True
    ):
        assert found is not None and wanted_scores is not None
        assert torch.equal(found.top_k_ids, wanted_scores.top_k_ids)
        for name in ("log_probs", "top_k_log_probs", "entropy"):
            torch.testing.assert_close(getattr(found, name), getattr(wanted_scores, name), rtol=1e-5, atol=1e-5)


def test_the_teacher_has_no_optimizer_and_no_gradient_buffers(tmp_path: Path, topology: Topology) -> None:
    from nemo_tropd.teacher.scorer import TeacherScorer

    path = make_tiny(tmp_path / "m")
    teacher = TeacherScorer(path, topology, dtype=torch.float32, vocab_size=VOCABULARY)
    batch = TokenBatch.pack(rollouts(1, (9, 4)), pad_id=0, seed=1, step=0)
    before = {name: p.clone() for name, p in teacher.model.named_parameters()}
    teacher.score([batch], top_k=4, entropy=False, chunk_tokens=None)
    held: list[Tensor] = [*teacher.model.parameters(), *teacher.model.buffers()]
    assert sum(t.numel() for t in held) < 1.1 * sum(t.numel() for t in before.values())
    for name, parameter in teacher.model.named_parameters():
        assert not parameter.requires_grad and parameter.grad is None, name
        assert not hasattr(parameter, "main_grad") and not hasattr(parameter, "main_param"), name
        assert torch.equal(parameter, before[name]), name
