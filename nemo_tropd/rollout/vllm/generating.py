"""One call of vLLM's own generate: requests in, rollouts as they are finished, further requests between two steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from nemo_tropd.batch import Rollout
from nemo_tropd.rollout.engine import Abandoned, EngineError, Finished, Further, RolloutRequest, Wanted, check_requests
from nemo_tropd.rollout.vllm.settings import EngineSettings

# Added to the logit of a padding row, which then has no share in what is sampled from.
_NEVER = -100.0


def forget_prefixes(llm: Any) -> None:
    """Empty the prefix cache; EngineError if vLLM keeps it, since requests are unfinished: other weights made it."""
    if not llm.reset_prefix_cache():
        raise EngineError("vLLM keeps cached prefixes, since requests of an earlier call are unfinished")


def generated(
    llm: Any,
    requests: Sequence[RolloutRequest],
    settings: EngineSettings,
    version: int,
    finished: Finished | None,
    further: Further | None,
    wanted: Wanted | None,
) -> list[Rollout]:
    """One rollout a request, in order, those of ``further`` last; each is sampled with its own seed, and ``requests``
    are queued before the first step. Raises Abandoned once ``wanted`` says so."""
    # What earlier calls left in the cache would change how this list is scheduled.
    forget_prefixes(llm)
    if finished is None and further is None and wanted is None:
        outputs = llm.generate(*_asked(requests, settings), use_tqdm=False)
        return [_rollout(r, output.outputs[0], version) for r, output in zip(requests, outputs, strict=True)]
    everything, rollouts, over = list(requests), dict[int, Rollout](), further is None

    def told(place: int, output: Any) -> None:
        if not 0 <= place < len(everything):
            raise EngineError("vLLM numbers requests otherwise than as they come: install a version of the pins")
        rollouts[place] = _rollout(everything[place], output.outputs[0], version)
        if finished is not None:
            finished(rollouts[place])

    def more(wait: bool) -> Sequence[RolloutRequest]:
        nonlocal over
        some = None if over or further is None else further(wait)
        over = some is None
        check_requests(some or (), max_model_len=settings.max_model_len, vocab_size=settings.vocab_size)
        everything.extend(some or ())
        return some or ()

    def between() -> None:
        if wanted is not None and not wanted():
            raise Abandoned(f"nobody waits for {len(everything) - len(rollouts)} rollouts any more")
        if some := more(False):
            llm.enqueue(*_asked(some, settings), use_tqdm=False)

    with _watched(llm, told, between):
        some: Sequence[RolloutRequest] = requests
        while some or not over:
            if some:
                llm.generate(*_asked(some, settings), use_tqdm=False)
            some = more(True)
    return [rollouts[place] for place in range(len(everything))]


def _asked(requests: Sequence[RolloutRequest], settings: EngineSettings) -> tuple[list[Any], list[Any]]:
    """Prompts and how each is sampled, as vLLM takes them."""
    from vllm import SamplingParams, TokensPrompt

    # Rows of the head past the tokenizer's size have no text.
    padding = dict.fromkeys(range(settings.vocab_size, settings.model_rows), _NEVER) or None
    parameters = [
        SamplingParams(
            temperature=s.temperature,
            top_p=s.top_p,
            top_k=s.top_k,
            seed=r.seed,
            max_tokens=r.max_new_tokens,
            logprobs=0,  # the sampled token alone
            stop_token_ids=list(settings.end_ids),
            detokenize=False,
            logit_bias=padding,
        )
        for r, s in ((r, r.sampling or settings.sampling) for r in requests)
    ]
    return [TokensPrompt(prompt_token_ids=[*r.prompt_ids, *r.prefix_ids]) for r in requests], parameters


@contextmanager
def _watched(llm: Any, told: Callable[[int, Any], None], between: Callable[[], None]) -> Iterator[None]:
    """After each step of the engine call ``told`` with place and output of each request that is finished, counted from
    here on, then ``between``; when that raises Abandoned, none is left. Source: vllm 0.24.0,
    entrypoints/offline_utils.py: requests are numbered as they come, and _run_engine calls llm_engine.step() until none
    is left."""
    engine, first = llm.llm_engine, llm.request_counter.counter
    step = engine.step

    def watched() -> list[Any]:
        outputs: list[Any] = step()
        for output in outputs:
            if output.finished:
                told(int(output.request_id) - first, output)
        between()
        return outputs

    engine.step = watched
    try:
        yield
    except Abandoned:
        # Those that are finished are passed over. Source: vllm 0.24.0, v1/engine/output_processor.py.
        engine.abort_request([str(number) for number in range(first, llm.request_counter.counter)])
        raise
    finally:
        del engine.step  # the class's own again


def _rollout(request: RolloutRequest, completion: Any, version: int) -> Rollout:
    tokens = list(completion.token_ids)
    return Rollout(
        prompt_ids=request.prompt_ids,
        prefix_ids=request.prefix_ids,
        response_ids=tokens,
        response_log_probs=list(completion.logprobs),  # see keep_sampled_log_probs
        weight_version=version,
        sequence_id=request.sequence_id,
        prompt_index=request.prompt_index,
        finished=completion.finish_reason == "stop",
    )
