"""What a run trains on: files and data sets read as conversations, tokenized, split and ordered."""

from nemo_tropd.data.conversations import Prompt, PromptKeys
from nemo_tropd.data.prompts import PromptOrder, PromptSet, PromptSplit, load_prompts, split_held_out
from nemo_tropd.data.sources import PromptError, read_records

__all__ = [
    "Prompt",
    "PromptError",
    "PromptKeys",
    "PromptOrder",
    "PromptSet",
    "PromptSplit",
    "load_prompts",
    "read_records",
    "split_held_out",
]
