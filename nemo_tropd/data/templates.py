"""Conversations as token ids, by the tokenizer's chat template."""

from collections.abc import Sequence
from typing import Any

from nemo_tropd.data.conversations import Prompt
from nemo_tropd.data.sources import PromptError


def encode(records: Sequence[Prompt], tokenizer: Any) -> list[list[int]]:
    """Token ids of each prompt, chat template included."""
    conversations = [[dict(turn) for turn in r.messages] for r in records]
    try:
        encoded = tokenizer.apply_chat_template(conversations, add_generation_prompt=True, return_dict=True)
    except Exception as error:  # a template is code from the model's authors, and raises anything
        first, last = records[0].where, records[-1].where
        raise PromptError(f"the chat template rejected a prompt between {first} and {last}: {error}") from error
    return [list(ids) for ids in encoded["input_ids"]]
