"""FP8 emulated on a CPU, against float64 arithmetic of its own, and the admission check over the whole path."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from examples.benchmarks.fp8.emulation import EmulatedScorer, cast_input, cast_weight, emulate_fp8
from nemo_tropd.batch import Rollout, TokenBatch, TokenScores
from nemo_tropd.config import ConfigError
from nemo_tropd.config_teacher import AdmissionConfig
from nemo_tropd.parallel.topology import Topology
from nemo_tropd.teacher.admission import Admission, admit, measure
from nemo_tropd.teacher.fp8 import Fp8Settings
from nemo_tropd.teacher.scorer import TeacherScorer
from tests.tiny_models import make_tiny

VOCABULARY = 131
PAGE = Path(__file__).parents[2] / "examples" / "figures" / "fp8_teacher.md"


def e4m3_grid() -> list[float]:
    """Every value e4m3 (finite, no infinities) can hold, from its definition: 4 exponent bits biased by 7, 3 of
    mantissa."""
    values = [m / 8 * 2.0**-6 for m in range(8)]
    values += [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8) if not (e == 15 and m == 7)]
    return sorted({s * v for v in values for s in (-1.0, 1.0)})


def nearest(x: float, grid: list[float]) -> float:
    """The nearest grid value; between two, the one whose last bit is 0."""
    best = min(abs(g - x) for g in grid)
    near = [g for g in grid if abs(g - x) == best]
    if len(near) == 1:
        return near[0]
    return next(g for g in near if g == 0 or g / 2.0 ** max(math.floor(math.log2(abs(g))) - 3, -9) % 2 == 0)


def oracle_cast(matrix: Tensor, tile: tuple[int, int], powers_of_two: bool) -> Tensor:
    """Cast and multiplied back, one number at a time, in Python's float64."""
    grid, out = e4m3_grid(), torch.empty_like(matrix, dtype=torch.float64)
    rows, columns = matrix.shape
    for r in range(0, rows, tile[0]):
        for c in range(0, columns, tile[1]):
            block = matrix[r : r + tile[0], c : c + tile[1]].double()
            largest = float(block.abs().max())
            # Scales are fp32 in TE: the quotient is rounded once.
            scale = float(torch.tensor(448.0) / torch.tensor(largest)) if largest else 1.0
            if powers_of_two:
                scale = 2.0 ** math.floor(math.log2(scale))
            inverse = float(1 / torch.tensor(scale))
            for i in range(block.size(0)):
                for j in range(block.size(1)):
                    scaled = float(torch.tensor(float(block[i, j])) * torch.tensor(scale))
                    out[r + i, c + j] = nearest(max(-448.0, min(448.0, scaled)), grid) * inverse
    return out


@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise"])
def test_a_cast_is_the_nearest_value_of_the_format(recipe: str) -> None:
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(130, 140, generator=generator) * torch.logspace(-3, 1, 140)
    inputs = torch.randn(5, 140, generator=generator) * 3
    inputs[2] = 0.0
    inputs[3, 7] = 900.0
    blocks = recipe == "blockwise"
    whole_weight, whole_input = (130, 140), (5, 140)
    for found, matrix, tile in (
        (cast_weight(weight, recipe), weight, (128, 128) if blocks else whole_weight),
        (cast_input(inputs, recipe), inputs, (1, 128) if blocks else whole_input),
    ):
        wanted = oracle_cast(matrix, tile, blocks)
        torch.testing.assert_close(found.dequantize().double(), wanted, rtol=1e-6, atol=0)
        assert (found.dequantize() != matrix).float().mean() > 0.5  # it did round
    assert found.values.dtype == torch.float8_e4m3fn


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("fp8") / "m", "qwen2", layers=4, seed=3)


@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise"])
def test_a_linear_layer_computes_the_product_of_the_casts(recipe: str, tiny: Path, topology: Topology) -> None:
    """One layer of the built model against float64 products of independently cast operands; bias in full."""
    teacher = TeacherScorer(tiny, topology, dtype=torch.bfloat16, vocab_size=VOCABULARY)
    module: Any = teacher.model.decoder.layers[1].self_attention.linear_qkv
    weight, bias = module.weight.detach().clone(), module.bias.detach().clone()
    assert emulate_fp8(teacher.model, Fp8Settings(recipe)) == 16
    inputs = torch.randn(6, 1, weight.size(1), generator=torch.Generator().manual_seed(8)).bfloat16()
    with torch.no_grad():
        out, _ = module(inputs)
    blocks = recipe == "blockwise"
    left = oracle_cast(inputs[:, 0].float(), (1, 128) if blocks else tuple(inputs[:, 0].shape), blocks)
    right = oracle_cast(weight.float(), (128, 128) if blocks else tuple(weight.shape), blocks)
    wanted = left @ right.T + bias.double()
    torch.testing.assert_close(out[:, 0].double(), wanted, rtol=2**-8, atol=1e-4)
    plain = inputs[:, 0].double() @ weight.double().T + bias.double()
    assert (out[:, 0].double() - wanted).abs().mean() < 0.2 * (plain - wanted).abs().mean()  # bf16 alone is far nearer


def test_only_the_asked_layers_are_emulated(tiny: Path, topology: Topology) -> None:
    batch = batches(1)[0]
    outputs = {}
    for ends in (0, 1, 2):
        scorer = TeacherScorer(tiny, topology, dtype=torch.bfloat16, vocab_size=VOCABULARY)
        if ends < 2:
            assert emulate_fp8(scorer.model, Fp8Settings("blockwise", first_last_bf16=ends)) == 4 * (4 - 2 * ends)
        else:
            with pytest.raises(ValueError, match="no linear layer"):
                emulate_fp8(scorer.model, Fp8Settings("blockwise", first_last_bf16=ends))
        (outputs[ends],) = scorer.hidden([batch])
    assert not torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[1], outputs[2])
    with pytest.raises(ValueError, match="'mxfp8' is not emulated"):
        emulate_fp8(scorer.model, Fp8Settings("mxfp8"))


def batches(count: int) -> list[TokenBatch]:
    generator, made = torch.Generator().manual_seed(21), []
    for b in range(count):
        rollouts = []
        for i, length in enumerate((17, 9, 23)):
            ids = torch.randint(0, VOCABULARY, (length,), generator=generator).tolist()
            rollouts.append(Rollout(ids[:4], ids[4:], [], [], 0, 3 * b + i, i, True))
        made.append(TokenBatch.pack(rollouts, pad_id=0, seed=5, step=0))
    return made


def build(tiny: Path, topology: Topology, log: list[str]) -> Callable[[Fp8Settings | None], TeacherScorer]:
    def make(fp8: Fp8Settings | None) -> TeacherScorer:
        log.append("bf16" if fp8 is None else fp8.recipe)
        if fp8 is None:
            return TeacherScorer(tiny, topology, dtype=torch.bfloat16, vocab_size=VOCABULARY)
        return EmulatedScorer(tiny, topology, dtype=torch.bfloat16, vocab_size=VOCABULARY, fp8=fp8)

    return make


def student_scores(path: Path, topology: Topology, temperature: float = 1.0) -> Callable[..., Any]:
    student = TeacherScorer(path, topology, dtype=torch.float32, vocab_size=VOCABULARY)
    return partial(student.score_like, chunk_tokens=None, temperature=temperature)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_the_whole_path_admits_a_teacher(tiny: Path, tmp_path: Path, topology: Topology, temperature: float) -> None:
    """bf16 first, freed, then FP8; the figures against full distributions in float64."""
    other = make_tiny(tmp_path / "student", "qwen2", layers=2, seed=9)
    log: list[str] = []
    given, wide = batches(2), AdmissionConfig(top_k_kl=9.0, gate_flips=1.0, ratio_error=9.0)
    student = student_scores(other, topology, temperature)

    def watched(seen: Any, reference: Any) -> Any:
        log.append("student")
        return student(seen, reference)

    make = build(tiny, topology, log)
    teacher, found = admit(make, Fp8Settings("tensorwise"), given, watched, wide, temperature=temperature)
    assert log == ["bf16", "student", "tensorwise"]
    assert isinstance(teacher, EmulatedScorer)
    assert found.tokens == sum(b.count_loss_tokens for b in given) == 2 * (17 + 9 + 23 - 12)

    exact = TeacherScorer(tiny, topology, dtype=torch.bfloat16, vocab_size=VOCABULARY)
    small = TeacherScorer(other, topology, dtype=torch.float32, vocab_size=VOCABULARY)
    kl, flips, error = [], [], []
    for batch in given:
        rows = batch.loss_tokens()
        full, eight, mine = (full_log_probs(s, batch, temperature)[rows.rows] for s in (exact, teacher, small))
        top = full.topk(64).indices
        p, q = full.gather(1, top).exp(), eight.gather(1, top).exp()
        rest_p, rest_q = 1 - p.sum(-1), 1 - q.sum(-1)
        kl.append((p * (p / q).log()).sum(-1) + rest_p * (rest_p / rest_q).log())
        own = [x.gather(1, rows.token_ids[:, None])[:, 0] for x in (full, eight, mine)]
        gates = [rows.uniforms.double() < (t - own[2]).exp().clamp(max=1) for t in own[:2]]
        flips.append((gates[0] != gates[1]).double())
        error.append((own[1] - own[0]).abs())
    assert found.top_k_kl == pytest.approx(float(torch.cat(kl).mean()), rel=0.05, abs=1e-4)
    assert found.gate_flips == pytest.approx(float(torch.cat(flips).mean()), abs=1.01 / found.tokens)
    assert found.ratio_error == pytest.approx(float(torch.cat(error).mean()), rel=0.05)
    assert found.ratio_error > 0.005


def full_log_probs(scorer: TeacherScorer, batch: TokenBatch, temperature: float) -> Tensor:
    """[B * S, V] float64, from the scorer's hidden states; the head's product is bf16's or fp32's own."""
    (hidden,) = scorer.hidden([batch])
    assert hidden is not None
    logits = hidden.flatten(0, 1) @ scorer.head.detach().T
    return (logits[:, :VOCABULARY].double() / temperature).log_softmax(-1)


def test_a_teacher_past_a_bound_is_refused_with_the_values(tiny: Path, topology: Topology) -> None:
    log: list[str] = []
    bounds = AdmissionConfig(top_k_kl=1e-6, gate_flips=1.0, ratio_error=1e-5)
    student = student_scores(tiny, topology)
    with pytest.raises(ConfigError) as error:
        admit(build(tiny, topology, log), Fp8Settings("blockwise", first_last_bf16=1), batches(1), student, bounds)
    text = str(error.value)
    assert re.search(r"top-64 KL [\d.e-]+ is above model\.teacher\.admission\.top_k_kl = 1e-06", text)
    assert re.search(r"error of R [\d.]+ is above model\.teacher\.admission\.ratio_error = 1e-05", text)
    assert "gate flips" not in text
    assert "model.teacher.fp8=null" in text and "model.teacher.fp8_first_last_bf16=2" in text


def test_a_figure_that_is_not_a_number_passes_every_bound() -> None:
    with pytest.raises(ConfigError, match="top-64 KL nan"):
        Admission("tensorwise", 3, math.nan, 0.0, 0.0).check(AdmissionConfig())


def test_figures_of_a_teacher_against_itself_are_zero() -> None:
    generator = torch.Generator().manual_seed(1)
    log_probs = torch.randn(30, 200, generator=generator).log_softmax(-1)
    top, ids = log_probs.topk(64)[0], log_probs[:, 0]
    student = TokenScores(ids - 0.3, top - 0.3, ids, top, torch.zeros(30).bool(), torch.rand(30, generator=generator))
    same = TokenScores(ids, top, ids, top, student.guided, student.uniforms)
    found = measure([student], [same], "none")
    assert (found.gate_flips, found.ratio_error) == (0.0, 0.0)
    assert abs(found.top_k_kl) < 1e-6


def test_default_bounds_follow_from_the_page() -> None:
    """Each is the worst emulated figure of the table, rounded up to one digit."""
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in PAGE.read_text().splitlines()]
    figures = [r for r in rows if len(r) == 6 and r[2].isdigit() and r[1] != "fp32"]
    assert len(figures) >= 12
    worst = {
        "top_k_kl": max(float(r[3]) for r in figures),
        "gate_flips": max(float(r[4].rstrip("%")) / 100 for r in figures),
        "ratio_error": max(float(r[5]) for r in figures),
    }
    for key, value in worst.items():
        digit = 10.0 ** math.floor(math.log10(value))
        assert getattr(AdmissionConfig(), key) == pytest.approx(math.ceil(value / digit) * digit), key


def test_nothing_measured_admits_nothing(tiny: Path, topology: Topology) -> None:
    with pytest.raises(ConfigError, match="on 0 tokens"):
        admit(build(tiny, topology, []), Fp8Settings("tensorwise"), [], lambda *_: [], AdmissionConfig())
