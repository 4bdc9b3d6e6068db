"""What a run trains on: files and data sets read as conversations, tokenized, split and ordered."""

from nemo_tropd.data.conversations import Prompt, PromptKeys
from nemo_tropd.data.held_out import split_held_out
from nemo_tropd.data.prompts import (
    MixedOrder,
    PromptOrder,
    PromptSet,
    PromptSplit,
    Source,
    load_prompts,
)
from nemo_tropd.data.sources import PromptError, read_records
from nemo_tropd.data.templates import Template, template_notes
from nemo_tropd.data.tokenizer import Vocabulary, end_tokens, labelled_otherwise, load_tokenizer, token_texts

__all__ = [
    "MixedOrder",
    "Prompt",
    "PromptError",
    "PromptKeys",
    "PromptOrder",
    "PromptSet",
    "PromptSplit",
    "Source",
    "Template",
    "Vocabulary",
    "end_tokens",
    "labelled_otherwise",
    "load_prompts",
    "load_tokenizer",
    "read_records",
    "split_held_out",
    "template_notes",
    "token_texts",
]
