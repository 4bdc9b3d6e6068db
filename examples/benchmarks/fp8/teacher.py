"""What FP8 would do to a real teacher's scores: SmolLM2-135M-Instruct on real prompts, FP8 emulated on a CPU.

    python examples/benchmarks/fp8/teacher.py         # 24 prompts; writes examples/figures/fp8_teacher.md

The tokens are answers to the first prompts of examples/prompts/instructions.jsonl, sampled at temperature 1: the
teacher's own, on which a run admits its teacher, and those of the 24-layer student, on which it scores. Every figure is
against the same teacher in bf16. The row "fp32" is no FP8 at all: it shows how far bf16 itself is from fp32.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from nemo_tropd.batch import Rollout, TokenBatch
from nemo_tropd.config_teacher import AdmissionConfig
from nemo_tropd.data import load_tokenizer
from nemo_tropd.files import write_text
from nemo_tropd.parallel.topology import Topology
from nemo_tropd.teacher.admission import TOP_K, Admission, measure
from nemo_tropd.teacher.fp8 import Fp8Settings
from nemo_tropd.teacher.scorer import TeacherScorer

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # this file is run, its siblings are imported

from examples.benchmarks.fp8.emulation import EmulatedScorer
from examples.make_smollm2 import build_smollm2, build_student

EXAMPLES = Path(__file__).resolve().parents[2]
VARIANTS = [
    Fp8Settings("tensorwise"),
    Fp8Settings("tensorwise", first_last_bf16=1),
    Fp8Settings("tensorwise", first_last_bf16=3),
    Fp8Settings("blockwise"),
    Fp8Settings("blockwise", first_last_bf16=1),
    Fp8Settings("blockwise", first_last_bf16=3),
]
DROPPED = (12, 14, 16, 18, 20, 22)  # of the student in examples/figures/fp8_teacher.md


def study(prompts_file: Path, out: Path, *, prompts: int = 24, new_tokens: int = 48, seed: int = 0) -> None:
    """Measure every variant and write the table to ``out`` (Markdown)."""
    teacher = build_smollm2()
    student = build_student(layers_to_drop=DROPPED)
    texts, vocab_size = {}, 0
    for writer, path in (("the teacher's answers", teacher), ("the student's answers", student)):
        texts[writer], vocab_size = write_answers(path, prompts_file, prompts, new_tokens, seed)
    topology = Topology.start(seed=seed)
    try:
        rows = []
        for name, by_writer in figures(teacher, student, texts, vocab_size, topology, seed):
            for writer, found in by_writer.items():
                Console(width=160).print(f"{writer}, {name}: {found.line()}", highlight=False)
                rows.append((writer, name, found))
    finally:
        topology.stop()
    write_text(out, table(sorted(rows, key=lambda row: row[0], reverse=True), prompts))


def figures(
    teacher: Path,
    student: Path,
    texts: Mapping[str, Sequence[Rollout]],
    vocab_size: int,
    topology: Topology,
    seed: int,
) -> Iterator[tuple[str, dict[str, Admission]]]:
    """(name, figures by text) of fp32 and of every FP8 variant against the bf16 teacher; a text is one batch."""
    batches = [
        TokenBatch.pack(rollouts, pad_id=0, seed=seed, step=0).to(topology.device) for rollouts in texts.values()
    ]
    make = partial(TeacherScorer, topology=topology, vocab_size=vocab_size)
    reference = make(teacher, dtype=torch.bfloat16).score(batches, top_k=TOP_K, entropy=False, chunk_tokens=None)
    scored = make(student, dtype=torch.bfloat16).score_like(batches, reference, chunk_tokens=None)

    def against_bf16(scorer: TeacherScorer, recipe: str) -> dict[str, Admission]:
        seen = zip(texts, scored, scorer.score_like(batches, reference, chunk_tokens=None), strict=True)
        return {text: measure([s], [q], recipe) for text, s, q in seen if s is not None and q is not None}

    yield "fp32", against_bf16(make(teacher, dtype=torch.float32), "none, fp32")
    for fp8 in VARIANTS:
        scorer = EmulatedScorer(teacher, topology, dtype=torch.bfloat16, vocab_size=vocab_size, fp8=fp8)
        ends = f", {fp8.first_last_bf16} first and last in bf16" if fp8.first_last_bf16 else ""
        yield fp8.recipe + ends, against_bf16(scorer, f"{fp8.recipe}, emulated")


@torch.no_grad()
def write_answers(
    model_dir: Path, prompts_file: Path, prompts: int, new_tokens: int, seed: int
) -> tuple[list[Rollout], int]:
    """Answers of the model in ``model_dir`` to the first ``prompts`` prompts, sampled by transformers, and the
    tokenizer's true size."""
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(model_dir, "the teacher")
    tokenizer.padding_side = "left"
    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16).eval()
    lines = prompts_file.read_text(encoding="utf-8").splitlines()[:prompts]
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": json.loads(line)["prompt"]}], tokenize=False, add_generation_prompt=True
        )
        for line in lines
    ]
    inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    torch.manual_seed(seed)
    out = model.generate(**inputs, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=new_tokens)  # type: ignore[operator]
    rollouts = []
    for i, (ids, mask) in enumerate(zip(inputs["input_ids"], inputs["attention_mask"], strict=True)):
        answer = out[i, ids.numel() :].tolist()
        if tokenizer.eos_token_id in answer:
            answer = answer[: answer.index(tokenizer.eos_token_id) + 1]
        rollouts.append(Rollout(ids[mask.bool()].tolist(), [], answer, [0.0] * len(answer), 0, i, i, True))
    return rollouts, max(tokenizer.get_vocab().values()) + 1


def table(rows: Sequence[tuple[str, str, Admission]], prompts: int) -> str:
    """The page, bounds and their origin included."""
    bounds = AdmissionConfig()
    lines = [
        "# An FP8 teacher, emulated",
        "",
        f"SmolLM2-135M-Instruct against itself in bf16, on sampled answers to {prompts} real prompts.",
        "**Emulation on a CPU** with torch's float8 types (e4m3, current scaling), not Transformer Engine: it rounds",
        "as the recipes do and multiplies exactly. Head, embedding and norms in bf16. Made by",
        "`python examples/benchmarks/fp8/teacher.py`.",
        "",
        "| text | teacher | tokens | top-64 KL, nats | gate flips | error of R, nats |",
        "|---|---|---|---|---|---|",
    ]
    for writer, name, f in rows:
        lines.append(
            f"| {writer} | {name} | {f.tokens} | {f.top_k_kl:.5f} | {f.gate_flips:.2%} | {f.ratio_error:.4f} |"
        )
    worst = {
        key: max(getattr(f, key) for _, name, f in rows if name != "fp32")
        for key in ("top_k_kl", "gate_flips", "ratio_error")
    }
    lines += [
        "",
        "top-64 KL: from bf16 to the other, over bf16's 64 best tokens and one bucket for the rest. Gate flips: tokens",
        "whose Bernoulli gate, student against teacher, falls the other way under the same draws. Error of R: mean",
        "absolute difference of log pi_T - log pi_S. The row fp32 is not FP8: it is how far bf16 itself is from fp32.",
        "",
        "The admission check's default bounds are the worst of these figures, rounded up to one digit: rounding errors",
        "average out over a wider model, so a teacher that is worse off than one of 135M parameters needs a look.",
        "They are:",
        f"top-64 KL {bounds.top_k_kl:g} (worst {worst['top_k_kl']:.4f}), gate flips {bounds.gate_flips:.0%} (worst "
        f"{worst['gate_flips']:.2%}), error of R {bounds.ratio_error:g} (worst {worst['ratio_error']:.4f}).",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--new-tokens", type=int, default=48, help="of each answer, at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=EXAMPLES / "figures" / "fp8_teacher.md")
    options = parser.parse_args()
    prompts = EXAMPLES / "prompts" / "instructions.jsonl"
    study(prompts, options.out, prompts=options.prompts, new_tokens=options.new_tokens, seed=options.seed)


if __name__ == "__main__":
    main()
