"""What both engines ask of ``vllm.LLM``, and what they read from its answers; the one place that samples tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nemo_tropd.rollout.engine import Sampling

# Added to the logit of a padding row. Its raw log-probability is reported unchanged, but it is never sampled.
_NEVER = -100.0


@dataclass(frozen=True)
class Answer:
    """Tokens generated after one prompt, and the unscaled softmax's log-probability (nats) of each."""

    token_ids: list[int]
    log_probs: list[float]
    finished: bool  # ended by an end-of-sequence token, which is the last of ``token_ids``


def generate(
    llm: Any,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    max_new_tokens: Sequence[int],
    *,
    sampling: Sampling,
    end_ids: Sequence[int],
    padding_ids: range,
) -> list[Answer]:
    """One answer a prompt, in order; each is sampled with its own seed, and the list is queued before it starts.

    ``llm`` is a ``vllm.LLM`` made with logprobs_mode raw_logprobs. ``padding_ids`` are rows of the head past the
    tokenizer's size: they have no text.
    """
    from vllm import SamplingParams, TokensPrompt

    padding = dict.fromkeys(padding_ids, _NEVER) or None
    parameters = [
        SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            seed=seed,
            max_tokens=length,
            logprobs=0,  # the sampled token alone
            stop_token_ids=list(end_ids),
            detokenize=False,
            logit_bias=padding,
        )
        for seed, length in zip(seeds, max_new_tokens, strict=True)
    ]
    # What earlier calls left in the cache would change how this list is scheduled.
    llm.reset_prefix_cache()
    outputs = llm.generate([TokensPrompt(prompt_token_ids=list(p)) for p in prompts], parameters, use_tqdm=False)
    return [_answer(output.outputs[0]) for output in outputs]


def generate_plainly(llm: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> int:
    """What ``generate`` is timed against: vLLM without our seeds, log-probabilities or padding. Returns how many tokens
    were generated."""
    from vllm import SamplingParams, TokensPrompt

    parameters = SamplingParams(temperature=1.0, max_tokens=max_new_tokens, ignore_eos=True, detokenize=False)
    outputs = llm.generate([TokensPrompt(prompt_token_ids=list(p)) for p in prompts], parameters, use_tqdm=False)
    return sum(len(output.outputs[0].token_ids) for output in outputs)


def _answer(completion: Any) -> Answer:
    tokens = list(completion.token_ids)
    log_probs = [step[token].logprob for step, token in zip(completion.logprobs, tokens, strict=True)]
    return Answer(tokens, log_probs, completion.finish_reason == "stop")
