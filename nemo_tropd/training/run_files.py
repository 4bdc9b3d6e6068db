"""What a run leaves for the report: rollouts with their tokens, and the summary of before and after."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemo_tropd.batch import Rollout


class RolloutFile:
    """Appends rollouts, token by token, to RUN/rollouts.jsonl."""

    def __init__(self, run_dir: Path, tokenizer: Any) -> None:
        self.path, self.tokenizer = run_dir / "rollouts.jsonl", tokenizer

    def write(self, step: int, rollouts: Sequence[Rollout], kept: Sequence[dict[str, Any]]) -> None:
        """``kept``: sequences as MetricSums.keep left them."""
        by_id = {r.sequence_id: r for r in rollouts}
        with self.path.open("a", encoding="utf-8") as file:
            for sequence in kept:
                line = {
                    "step": step,
                    "prompt": self.tokenizer.decode(by_id[sequence["sequence_id"]].prompt_ids),
                    "tokens": [self.tokenizer.decode([i]) for i in sequence["token_ids"]],
                    "log_ratio": sequence["log_ratio"],
                    "gate": sequence["gate"],
                    "guided": sequence["guided"],
                }
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
