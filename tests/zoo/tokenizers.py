"""Small tokenizers in the exact shape of public ones: the stages of tokenizer.json, the class in tokenizer_config.json,
special tokens and chat template. The vocabularies are made here, from a few sentences; nothing is copied.

What a shape gets wrong when its label is believed is why it is here: DeepSeek-R1-Distill models are byte-level and
labelled LlamaTokenizerFast, whose own pre-tokenizer drops every space.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

CORPUS = [
    "Hello world, how are you today? The answer is 12345, and the next one is 678.",
    "What is the sum of 10 and 200? Let us think about it: the sum of both is the answer.",
    "def add(a, b):\n    return a + b\n\n\nprint(add(1, 2))\t#",
    "caf\u00e9 na\u00efve r\u00e9sum\u00e9 \u65e5\u672c\u8a9e",
] * 4
_QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3_SPLIT = _QWEN_SPLIT.replace(r"|\p{N}|", r"|\p{N}{1,3}|")

_TURNS = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
_OPENING = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
CHATML = _TURNS + _OPENING
QWEN25 = (
    "{% if messages[0].role != 'system' %}"
    "{{ '<|im_start|>system\\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\\n' }}"
    "{% endif %}" + _TURNS + _OPENING
)
QWEN3 = (
    "{% if tools %}{{ '<|im_start|>system\\n# Tools\\n' }}{% for t in tools %}{{ t | tojson }}{% endfor %}"
    "{{ '<|im_end|>\\n' }}{% endif %}" + _TURNS + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
    "{% endif %}"
)
R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '<｜User｜>' + m.content }}"
    "{% elif m.role == 'assistant' %}"
    "{{ '<｜Assistant｜>' + m.content.split('</think>')[-1] + '<｜end▁of▁sentence｜>' }}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% if not date_string is defined %}{% if strftime_now is defined %}"
    "{% set date_string = strftime_now('%d %b %Y') %}{% else %}{% set date_string = '26 Jul 2024' %}"
    "{% endif %}{% endif %}"
    "{{ '<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: ' + date_string + '\\n\\n<|eot_id|>' }}"
    "{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)


@dataclass(frozen=True)
class Shape:
    """What is written. ``added``: tokens past the vocabulary, in order; those of reasoning, tools, code and R1's
    turns are not special, as in the public files."""

    model_type: str  # of config.json
    label: str  # tokenizer_class
    template: str | None
    added: Sequence[str]
    eos: str
    pad: str | None = None
    bos: str | None = None
    normalizer: Callable[[], Any] | None = None
    split: str = _QWEN_SPLIT
    adds_bos: bool = False  # before plain text, by the post-processor
    sentencepiece: bool = False  # characters and byte fallback with a normalizer, as Llama 2's
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def special(self) -> list[str]:
        """The added tokens that are special."""
        plain = ("think", "tool_", "fim_", "repo_name", "file_sep", "User", "Assistant", "EOT")
        return [t for t in self.added if not any(part in t for part in plain)]


_QWEN_TOKENS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>"),
    *("<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"),
    *("<|image_pad|>", "<|video_pad|>", "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>"),
    *("<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>"),
)
_R1_TOKENS = (
    *("<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<｜begin▁of▁sentence｜>"),
    *("<|EOT|>", "<think>", "</think>"),
    *_QWEN_TOKENS[7:],
)
_LLAMA3_TOKENS = (
    *("<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>"),
    *("<|finetune_right_pad_id|>", "<|reserved_special_token_2|>", "<|start_header_id|>", "<|end_header_id|>"),
    *("<|eom_id|>", "<|eot_id|>", "<|python_tag|>", *(f"<|reserved_special_token_{i}|>" for i in range(3, 12))),
)
_R1_CONFIG = {"add_bos_token": True, "add_eos_token": False, "legacy": True, "sp_model_kwargs": {}}
_R1_NAMES: dict[str, Any] = {
    "label": "LlamaTokenizerFast",
    "template": R1,
    "bos": "<｜begin▁of▁sentence｜>",
    "eos": "<｜end▁of▁sentence｜>",
    "pad": "<｜end▁of▁sentence｜>",
    "adds_bos": True,
    "config": _R1_CONFIG,
}
SHAPES = {
    "qwen2.5": Shape(
        "qwen2", "Qwen2Tokenizer", QWEN25, _QWEN_TOKENS, "<|im_end|>", "<|endoftext|>", normalizer=normalizers.NFC
    ),
    "qwen2.5-base": Shape(
        "qwen2", "Qwen2Tokenizer", QWEN25, _QWEN_TOKENS, "<|endoftext|>", "<|endoftext|>", normalizer=normalizers.NFC
    ),
    "qwen3": Shape(
        "qwen3",
        "Qwen2Tokenizer",
        QWEN3,
        (*_QWEN_TOKENS, "<tool_response>", "</tool_response>", "<think>", "</think>"),
        "<|im_end|>",
        "<|endoftext|>",
        normalizer=normalizers.NFC,
    ),
    "r1-qwen": Shape("qwen2", added=_R1_TOKENS, **_R1_NAMES),
    "r1-llama": Shape(
        "llama", added=(*_R1_TOKENS[3:4], *_R1_TOKENS[:3], *_R1_TOKENS[4:7]), split=_LLAMA3_SPLIT, **_R1_NAMES
    ),
    "llama3": Shape(
        "llama",
        "PreTrainedTokenizerFast",
        LLAMA3,
        _LLAMA3_TOKENS,
        "<|eot_id|>",
        "<|finetune_right_pad_id|>",
        "<|begin_of_text|>",
        split=_LLAMA3_SPLIT,
        adds_bos=True,
    ),
    "llama2": Shape(
        "llama",
        "LlamaTokenizer",
        LLAMA2,
        (),
        "</s>",
        None,
        "<s>",
        adds_bos=True,
        sentencepiece=True,
        config={"add_bos_token": True, "add_eos_token": False, "legacy": False, "sp_model_kwargs": {}},
    ),
}


def write_tokenizer(folder: Path, kind: str, *, more: Sequence[str] = (), **config: Any) -> int:
    """Write tokenizer.json and tokenizer_config.json in the shape of ``kind`` (a key of SHAPES); returns the number of
    tokens. ``more``: special tokens at the end, as trainers add pads. ``config``: keys of tokenizer_config.json; None
    leaves a key out."""
    shape = SHAPES[kind]
    tokenizer = _sentencepiece() if shape.sentencepiece else _byte_level(shape)
    special = [*shape.special, *more]
    for token in (*shape.added, *more):
        tokenizer.add_tokens([AddedToken(token, special=token in special, normalized=False)])
    if shape.adds_bos:
        bos = str(shape.bos)
        pieces = [(bos, tokenizer.token_to_id(bos))]
        tokenizer.post_processor = processors.TemplateProcessing(f"{bos} $A", f"{bos} $A {bos}:1 $B:1", pieces)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    known = {
        str(i): {
            "content": t.content,
            "lstrip": t.lstrip,
            "normalized": t.normalized,
            "rstrip": t.rstrip,
            "single_word": t.single_word,
            "special": t.special,
        }
        for i, t in tokenizer.get_added_tokens_decoder().items()
    }
    settings: dict[str, Any] = {
        "added_tokens_decoder": known,
        "bos_token": shape.bos,
        "chat_template": shape.template,
        "clean_up_tokenization_spaces": False,
        "eos_token": shape.eos,
        "model_max_length": 16384,
        "pad_token": shape.pad,
        "tokenizer_class": shape.label,
        "unk_token": "<unk>" if shape.sentencepiece else None,
        **shape.config,
        **config,
    }
    kept = {k: v for k, v in settings.items() if v is not None}
    (folder / "tokenizer_config.json").write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", "utf-8")
    return int(tokenizer.get_vocab_size())


def _byte_level(shape: Shape) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    if shape.normalizer is not None:
        tokenizer.normalizer = shape.normalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(shape.split), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=384, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def _sentencepiece() -> Tokenizer:
    """BPE over characters, spaces written as a low line, with bytes for what it does not know."""
    first = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizer
    learner.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=200, show_progress=False))
    learned = json.loads(learner.to_str())["model"]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys([*first, *learned["vocab"]]))}
    tokenizer = Tokenizer(
        models.BPE(
            vocabulary, [tuple(m) for m in learned["merges"]], unk_token="<unk>", fuse_unk=True, byte_fallback=True
        )
    )
    tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in first[:3]])
    return tokenizer
