"""Every rank reads the data by itself: one that reads others is named, on every rank, before the first step."""

from __future__ import annotations

import json
from pathlib import Path

from nemo_tropd.data import PromptError, load_prompts
from nemo_tropd.parallel.agreement import World
from nemo_tropd.training.start import agreed_fingerprint
from tests.dist.run_distributed import run_distributed
from tests.unit.test_prompts import WordTokenizer

WORLD = 3


def compare(rank: int, world_size: int, files: list[str]) -> str:
    split = load_prompts(files[rank], WordTokenizer(), max_prompt_tokens=50, held_out=2)
    try:
        return agreed_fingerprint(split, World())
    except PromptError as error:
        return f"PromptError: {error}"


def compare_twice(rank: int, world_size: int, same: list[str], grown: list[str]) -> tuple[str, str]:
    return compare(rank, world_size, same), compare(rank, world_size, grown)


def test_a_file_that_grew_while_the_ranks_read_it_names_the_rank(tmp_path: Path) -> None:
    lines = [json.dumps({"prompt": f"what is {i}"}) + "\n" for i in range(20)]
    same, grown = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    same.write_text("".join(lines))
    grown.write_text("".join([*lines, '{"prompt": "one more"}\n']))
    files = [str(same)] * WORLD
    by_rank = run_distributed(compare_twice, WORLD, files, [*files[:-1], str(grown)])
    agreed, other = map(set, zip(*by_rank, strict=True))
    assert len(agreed) == len(other) == 1 and not agreed.pop().startswith("PromptError")
    message = other.pop()
    assert message.startswith("PromptError: model.data.path: the training prompts of rank 2 are not those of rank 0")
    assert "19 of them" in message and "18." in message
