"""Values that are not finite: carried as NaN to the gradient norm, named, and never loaded or kept in silence."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nemo_tropd import objectives
from nemo_tropd.convert.families import ConversionError, read_shape
from nemo_tropd.convert.hf_import import load_hf
from nemo_tropd.gpt.build import build_gpt
from nemo_tropd.loss.divergence import exact_divergences
from nemo_tropd.loss.head import HeadLoss, LossOptions, head_loss, teacher_scores
from nemo_tropd.loss.inputs import HeadLayout
from nemo_tropd.parallel.topology import Topology
from nemo_tropd.teacher.offload import WeightHome
from nemo_tropd.teacher.scorer import TeacherScorer
from nemo_tropd.training.checkpoint import CheckpointError, Checkpoints
from tests.oracles.micro_batch import MicroBatch, make
from tests.tiny_models import make_tiny
from tests.unit.test_checkpoint import STATE
from tests.unit.test_optimizer import Student

pytestmark = pytest.mark.random
VOCABULARY = 131


def loss_of(mb: MicroBatch, hidden: Tensor, *, objective: str = "tropd", carry: bool = True, **changes: object):
    hidden, weight = hidden.detach().requires_grad_(), mb.weight.float().requires_grad_()
    teacher = replace(mb.teacher_scores(), **changes)
    options = LossOptions(carry_bad=carry)
    layout = HeadLayout(mb.vocab_size, chunk_tokens=3)
    found = head_loss(
        hidden, weight, mb.tokens, teacher, objectives.build(objective), layout, scale=0.25, options=options
    )
    found.loss.backward()
    return found, hidden.grad, weight.grad


def check_all_bad(found: HeadLoss, *gradients: Tensor) -> None:
    assert found.loss.isnan()
    assert all(gradient.isnan().all() for gradient in gradients)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("objective", ["tropd", "mask_outlier", "opd"])
def test_bad_logits_of_the_student_make_loss_and_gradients_nan(value: float, objective: str) -> None:
    mb = make(1)
    hidden = mb.hidden.float()
    row = int(mb.tokens.rows[2])
    hidden.view(-1, hidden.size(-1))[row] = value
    found, *gradients = loss_of(mb, hidden, objective=objective)
    check_all_bad(found, *gradients)
    assert found.bad is not None and found.bad[0] == "the student's logits"
    assert int(mb.tokens.rows[found.bad[1]]) == row


def test_bad_scores_of_the_teacher_count_though_the_objective_leaves_the_token_out() -> None:
    """The loss of a token of the teacher's prefix does not depend on its score."""
    mb = make(2)
    guided = int(mb.tokens.guided.nonzero()[0])
    for token, objective in ((3, "tropd"), (3, "mask_outlier"), (guided, "tropd"), (guided, "mask_outlier")):
        log_probs = mb.teacher_scores().log_probs.clone()
        log_probs[token] = torch.nan
        found, *gradients = loss_of(mb, mb.hidden.float(), objective=objective, log_probs=log_probs)
        check_all_bad(found, *gradients)
        assert found.bad == ("the teacher's logits", token)


def test_an_infinite_loss_of_finite_logits_is_named() -> None:
    mb = make(3)
    log_probs = mb.teacher_scores().log_probs.clone()
    token = int((~mb.tokens.guided).nonzero()[0])
    log_probs[token] = -torch.inf
    found, *gradients = loss_of(mb, mb.hidden.float(), objective="opd", log_probs=log_probs)
    check_all_bad(found, *gradients)
    assert found.bad == ("the loss", token)


def test_finite_values_are_the_same_to_the_bit() -> None:
    mb = make(4)
    carried, raised = (loss_of(mb, mb.hidden.float(), carry=carry) for carry in (True, False))
    assert carried[0].bad is None and all(
        map(torch.equal, (carried[0].loss, *carried[1:]), (raised[0].loss, *raised[1:]))
    )


def test_a_teachers_bad_tokens_are_nan_and_the_others_as_they_were() -> None:
    mb = make(5)
    hidden, layout = mb.hidden.float(), HeadLayout(mb.vocab_size)
    args = mb.weight.float(), mb.tokens.rows, mb.tokens.token_ids, 5, layout
    good = teacher_scores(hidden, *args, entropy=True)
    hidden.view(-1, hidden.size(-1))[mb.tokens.rows[2]] = torch.nan
    found = teacher_scores(hidden, *args, entropy=True, carry_bad=True)
    bad = mb.tokens.rows == mb.tokens.rows[2]
    for name in ("log_probs", "top_k_log_probs", "entropy"):
        values, wanted = getattr(found, name), getattr(good, name)
        assert values[bad].isnan().all() and torch.equal(values[~bad], wanted[~bad]), name
    assert torch.equal(found.top_k_ids[~bad], good.top_k_ids[~bad]) and not found.top_k_ids[bad].any()


def test_divergences_of_bad_logits_are_nan_there_alone() -> None:
    mb = make(6)
    hidden, weight = mb.hidden.float(), mb.weight.float()
    broken = hidden.clone()
    broken.view(-1, hidden.size(-1))[mb.tokens.rows[0]] = torch.nan
    bad = mb.tokens.rows == mb.tokens.rows[0]
    for student, teacher in ((broken, hidden), (hidden, broken)):
        found = exact_divergences(student, weight, teacher, weight, mb.tokens.rows, HeadLayout(mb.vocab_size))
        for name in ("reverse_kl", "top1_agreement"):
            assert found[name][bad].isnan().all() and found[name][~bad].isfinite().all()


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_not_finite_are_named_by_tensor(tmp_path: Path, topology: Topology, value: float) -> None:
    folder = make_tiny(tmp_path, "qwen2", layers=1)
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.0.self_attn.k_proj.weight"
    weights[name].view(-1)[7] = value
    save_file(weights, folder / "model.safetensors")
    shape = read_shape(folder)
    model = build_gpt(shape, topology)
    with pytest.raises(ConversionError, match=rf"{tmp_path}: {name} has NaN or infinite values: download"):
        load_hf(model, folder, shape, topology)


def test_a_runs_checkpoint_with_bad_weights_is_refused_by_parameter(tmp_path: Path, topology: Topology) -> None:
    folder = make_tiny(tmp_path / "hf", "qwen2", layers=1)
    student = Student(folder, topology)
    student.step(0)
    checkpoints = Checkpoints(tmp_path / "run", topology, hf_source=folder, keep=2)
    name, parameter = list(student.ddp.module.named_parameters())[3]
    with torch.no_grad():
        parameter.view(-1)[1] = torch.nan
    path = checkpoints.save(student.ddp.module, student.optimizer, STATE)
    with pytest.raises(CheckpointError, match=rf"step_00000003 cannot be loaded .*{name} has NaN"):
        checkpoints.load(path, student.ddp.module, student.optimizer)


def test_a_teachers_weight_that_changed_is_named_before_it_scores(tmp_path: Path, topology: Topology) -> None:
    folder = make_tiny(tmp_path, "qwen3", layers=1)
    for offload in (True, False):
        teacher = TeacherScorer(folder, topology, dtype=torch.float32, vocab_size=VOCABULARY, offload=offload)
        for _ in range(2):
            with teacher.scoring():
                pass
        if offload:
            assert isinstance(teacher.home, WeightHome)
            teacher.home._host[0][1][5] ^= 1  # one bit of the host's copy
        else:
            next(teacher.model.parameters()).view(torch.uint8).view(-1)[5] ^= 1
        wanted = pytest.raises(RuntimeError, match=r"word_embeddings\.weight .* not the bytes that were loaded")
        with wanted, teacher.scoring():
            raise AssertionError("the teacher scores with other weights")
