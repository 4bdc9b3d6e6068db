"""TRL's DistillationTrainer (1.16) on a ``LoopCase``: its own step, with rollouts made beforehand.

The student has fp32 weights and runs under bf16 autocast, TRL's default; on CPU all is fp32. The teacher has the run's
precision. Gradient checkpointing is off, as in ours; beta is 1, the reverse KL, TRL's default.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from examples.benchmarks.loop_case import LoopCase, LoopCost, config_of, ideal_seconds, peak, synchronize


def measure(case: LoopCase, folder: Path) -> LoopCost:
    """The fastest timed step; TRL's phases cannot be told apart, so only their sum is given."""
    config_of(case, folder)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bf16 = case.precision == "bf16"
    student = _model(folder / "student", torch.float32, device)
    teacher = _model(folder / "teacher", torch.bfloat16 if bf16 else torch.float32, device)
    trainer, clock = _trainer(case, folder, student, teacher, bf16)
    trainer.train()
    seconds = clock.seconds[case.warmup :]
    memory, of = peak(device)
    cost = LoopCost({}, min(seconds), memory, of)
    plain = LoopCase(**{**vars(case), "teacher_fp8": None})
    cost.matrix_share = ideal_seconds(plain, device) / cost.not_rollout_s
    return cost


def _model(folder: Path, dtype: torch.dtype, device: torch.device) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(1)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(folder), dtype=dtype, attn_implementation="sdpa"
        )


def _tokenizer(vocabulary: int) -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = {"<unk>": 0, "<pad>": 1, "<eos>": 2} | {str(i): i for i in range(3, vocabulary)}
    model = Tokenizer(WordLevel(words, unk_token="<unk>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=model, unk_token="<unk>", pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )


class _Clock:
    """Seconds of each step, less those spent handing out rollouts."""

    def __init__(self, device: torch.device, warmup: int) -> None:
        self.device, self.warmup = device, warmup
        self.seconds: list[float] = []
        self.outside = 0.0

    def begin(self) -> None:
        synchronize(self.device)
        if len(self.seconds) == self.warmup and self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self.began, self.outside = time.perf_counter(), 0.0

    def end(self) -> None:
        synchronize(self.device)
        self.seconds.append(time.perf_counter() - self.began - self.outside)


def _trainer(case: LoopCase, folder: Path, student: Any, teacher: Any, bf16: bool) -> tuple[Any, _Clock]:
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import DistillationConfig, DistillationTrainer

    clock = _Clock(student.device, case.warmup)
    prompts, completions = case.prompts(), case.completions()
    micro = max(1, case.tokens_per_micro_batch // case.length)

    class Timed(TrainerCallback):
        def on_step_begin(self, *args: Any, **kw: Any) -> None:
            clock.begin()

        def on_step_end(self, *args: Any, **kw: Any) -> None:
            clock.end()

    class OnFixedRollouts(DistillationTrainer):
        def _tokenize_prompts(self, given: list[str]) -> tuple[Any, None, dict[str, Any]]:
            self.places = [int(place) for place in given]
            return [prompts[place] for place in self.places], None, {}

        def _generate_single_turn(self, prompt_ids: Any, *args: Any, **kw: Any) -> list[list[int]]:
            began = time.perf_counter()
            responses = [completions[place] for place in self.places]
            clock.outside += time.perf_counter() - began
            return responses

    while case.sequences % micro:
        micro -= 1
    arguments = DistillationConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=case.sequences // micro,
        max_steps=case.warmup + case.timed,
        max_completion_length=case.new_tokens,
        learning_rate=1e-6,
        bf16=bf16,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        use_cpu=student.device.type == "cpu",
    )
    trainer = OnFixedRollouts(
        model=student,
        teacher_model=teacher,
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": [str(i) for i in range(case.sequences)]}),
        processing_class=_tokenizer(student.config.vocab_size),
        callbacks=[Timed()],
    )
    return trainer, clock
