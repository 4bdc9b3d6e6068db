"""The noise of the gradient on real text: sampled objectives beside their exact twins, at the same states.

    python examples/benchmarks/objectives/noise_text.py               # 3 times 8 batches of 8 rollouts of 40 tokens

The demo's student (SmolLM2-135M-Instruct without 4 of its 30 layers, before any step) answers the demo's prompts;
each objective's gradient of all its parameters is taken of the same answers, with its full teacher beside it. Models
and answers are transformers', loss and gradient this package's. Noise^2 / signal^2 is the variance of one batch's
gradient around the mean of all, over the mean's square (both unbiased): so many such batches have a mean with as much
noise as signal.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # this file is run, its siblings are imported

from examples.benchmarks.objectives.gradients import Gradients
from examples.make_smollm2 import build_smollm2, build_student
from nemo_tropd import objectives
from nemo_tropd.batch import LossTokens, TeacherStates, gate_uniforms
from nemo_tropd.loss.head import head_loss, teacher_scores
from nemo_tropd.loss.inputs import HeadLayout
from nemo_tropd.loss.teacher import TeacherHead
from nemo_tropd.objectives import Objective

PROMPTS = Path(__file__).resolve().parents[2] / "prompts" / "instructions.jsonl"
OBJECTIVES: dict[str, tuple[str, dict[str, Any]]] = {
    "opd": ("opd", {}),
    "opd_exact": ("opd_exact", {}),
    "tropd": ("tropd", {}),
    "tropd, gate=soft": ("tropd", {"gate": "soft"}),
    "tropd_exact": ("tropd_exact", {}),
}
TOP_K = 64


@dataclass(frozen=True)
class Pair:
    """Student and teacher, of transformers, with one tokenizer and one vocabulary."""

    student: Any
    teacher: Any
    tokenizer: Any

    @classmethod
    def load(cls, student: Path, teacher: Path) -> Pair:
        """From their checkpoints, in fp32."""
        tokenizer = AutoTokenizer.from_pretrained(teacher, padding_side="left")
        tokenizer.pad_token = tokenizer.eos_token
        ours, theirs = (AutoModelForCausalLM.from_pretrained(p, dtype=torch.float32).eval() for p in (student, teacher))
        return cls(ours, theirs, tokenizer)

    @torch.no_grad()
    def answer(self, prompts: Sequence[str], seed: int, length: int) -> tuple[Tensor, Tensor, LossTokens]:
        """Token ids and mask, [B, S] each, and the answers' tokens up to the one that ends each."""
        tokenizer, end = self.tokenizer, self.tokenizer.eos_token_id
        texts = [[{"role": "user", "content": prompt}] for prompt in prompts]
        written = tokenizer.apply_chat_template(texts, tokenize=False, add_generation_prompt=True)
        given = tokenizer(written, return_tensors="pt", padding=True, add_special_tokens=False)
        torch.manual_seed(seed)
        sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "pad_token_id": end}
        ids = self.student.generate(**given, max_new_tokens=length, **sampling)
        prompt = given["input_ids"].size(1)
        ends = ids[:, prompt:] == end
        said = ends.cumsum(1) - ends.long() == 0
        sequences, places = said.nonzero(as_tuple=True)
        uniforms = torch.stack([gate_uniforms(seed, 0, i, said.size(1)) for i in range(len(prompts))])
        tokens = LossTokens(
            rows=sequences * (ids.size(1)) + prompt - 1 + places,
            token_ids=ids[:, prompt:][said],
            guided=torch.zeros(len(places), dtype=torch.bool),
            uniforms=uniforms[said],
            behavior_log_probs=torch.full((len(places),), torch.nan),
            sequence=sequences,
        )
        return ids, torch.cat([given["attention_mask"], said.long()], 1), tokens

    def gradients(
        self, batch: tuple[Tensor, Tensor, LossTokens], wanted: Sequence[Objective]
    ) -> Iterator[list[Tensor]]:
        """Each objective's gradient of all parameters, one after the other."""
        ids, mask, tokens = batch
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
        layout = HeadLayout(self.student.config.vocab_size)
        head, beside = self.student.lm_head.weight, self.teacher.lm_head.weight
        with torch.no_grad():
            states = self.teacher.model(**inputs).last_hidden_state
            scores = teacher_scores(states, beside, tokens.rows, tokens.token_ids, TOP_K, layout)
        exact = TeacherHead(TeacherStates(states.flatten(0, 1)[tokens.rows]), beside, TOP_K)
        hidden = self.student.model(**inputs).last_hidden_state
        for objective in wanted:
            given = exact if objective.needs_distributions else scores
            result = head_loss(hidden, head, tokens, given, objective, layout, scale=1 / len(tokens))
            yield list(torch.autograd.grad(result.loss, list(self.student.parameters()), retain_graph=True))


def measure(pair: Pair, prompts: Sequence[str], seeds: Sequence[int], size: int, length: int) -> dict[str, Gradients]:
    """One batch of ``size`` prompts, of which no two share one, a seed."""
    built = {name: objectives.build(base, **params) for name, (base, params) in OBJECTIVES.items()}
    found: dict[str, Gradients] = {}
    for i, seed in enumerate(track(seeds, "batches", console=Console(stderr=True))):
        batch = pair.answer(prompts[i * size : (i + 1) * size], seed, length)
        for name, gradient in zip(built, pair.gradients(batch, list(built.values())), strict=True):
            found.setdefault(name, Gradients()).add(gradient)
    return found


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=3, help="of prompts and answers (default %(default)s)")
    parser.add_argument("--batches", type=int, default=8, help="of each draw (default %(default)s)")
    parser.add_argument("--size", type=int, default=8, help="rollouts a batch (default %(default)s)")
    parser.add_argument("--length", type=int, default=40, help="tokens a rollout at most (default %(default)s)")
    options = parser.parse_args()
    every = [json.loads(line)["prompt"] for line in PROMPTS.read_text().splitlines()]
    if options.batches < 2 or options.batches * options.size > len(every):
        parser.error(f"--batches must be at least 2, and --batches x --size at most {len(every)}")
    pair = Pair.load(build_student(), build_smollm2())
    console = Console(width=120)
    for draw in range(options.draws):
        prompts = random.Random(draw).sample(every, options.batches * options.size)
        seeds = range(draw * options.batches, (draw + 1) * options.batches)
        table = Table(f"draw {draw + 1}, {options.batches} batches", "noise^2 / signal^2 of a batch", "signal")
        for name, gradients in measure(pair, prompts, seeds, options.size, options.length).items():
            ratio, signal = gradients.noise_to_signal()
            table.add_row(name, *((f"{ratio:.2f}", f"{signal**0.5:.3f}") if signal > 0 else ("no signal", "")))
        console.print(table)


if __name__ == "__main__":
    main()
