"""The faults: one line of the program each, what it becomes, and the tests that must notice.

``line`` must be found exactly once in its file, indentation aside; ``becomes`` takes its place. Whoever changes such a
line changes it here (tests/unit/test_mutants.py says which), and asks whether the fault still means the same.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """One line that is wrong. At least one of ``tests`` must fail while it is in place."""

    room: str
    what: str
    file: str
    line: str
    becomes: str
    tests: tuple[str, ...]
    slow: bool = False  # its tests start several processes or train

    def planted(self, source: str) -> str:
        """``source`` with the fault. Raises ValueError unless the line is there exactly once."""
        lines = source.splitlines(keepends=True)
        found = [i for i, text in enumerate(lines) if text.strip() == self.line]
        if len(found) != 1:
            raise ValueError(f"{self.file}: the line is there {len(found)} times: {self.line}")
        text = lines[found[0]]
        lines[found[0]] = text.replace(self.line, self.becomes)
        return "".join(lines)


_BATCH = "tests/unit/test_batch.py::"
_PACKING = "tests/unit/test_packing.py::"
_BENCHMARKS = "tests/dist/test_benchmarks.py::test_benchmarks_during_training"
_OBJECTIVES = "tests/unit/test_objectives.py::"
_GUIDANCE = "tests/unit/test_guidance.py::"
_PROMPTS = "tests/unit/test_prompts.py::"
_BAD_NUMBERS = "tests/unit/test_bad_numbers.py::"
_STRANGERS = "tests/unit/test_strangers.py::"
_VOCAB = "tests/unit/test_vocab.py::"
_HEAD = "tests/unit/test_head.py::"
_EQUATIONS = _HEAD + "test_value_and_gradients"
_EXACT = "tests/unit/test_exact.py::"
_SAMPLED = "tests/unit/test_sampling.py::"
_SHARDS = "tests/dist/test_head_parallel.py::test_head_on_shards[2]"
_OPTIMIZER = "tests/unit/test_optimizer.py::"
_CHECKPOINT = "tests/unit/test_checkpoint.py::"
_OWN_STATES = "tests/dist/test_optimizer_shards.py::test_each_rank_saves_and_loads_its_own_states_in_megatrons_files"
_RESUMED = "tests/e2e/test_resume.py::"
_CONVERT = "tests/unit/test_convert.py::"
_STREAM = "tests/unit/test_weight_stream.py::"
_STEP = "tests/unit/test_step.py::"
_TOKENS = "tests/unit/test_tokenizer.py::"
_START = "tests/unit/test_start.py::"
_TEMPLATES = "tests/unit/test_templates.py::"
_TOKENS_OF_A_RUN = "tests/unit/test_tokens_of_a_run.py::"
_SUPERVISOR = "tests/dist/test_supervisor.py::"
_LAYOUTS = "tests/dist/test_training_layouts.py::"
_DEVICE = "tests/unit/test_colocated_device.py::"
_TEACHERS_ENGINE = "tests/unit/test_teacher_engine.py::"


def _gpu_check(file: str, what: str, line: str, becomes: str, test: str) -> Fault:
    return Fault(
        "gpu check",
        what,
        f"examples/benchmarks/{file}.py",
        line,
        becomes,
        (f"tests/benchmarks/test_gpu_check.py::{test}",),
    )


def _batch(what: str, line: str, becomes: str, *tests: str) -> Fault:
    return Fault("batch", what, "nemo_tropd/batch.py", line, becomes, tests)


def _objective(file: str, what: str, line: str, becomes: str, *tests: str) -> Fault:
    return Fault("objectives", f"{file}: {what}", f"nemo_tropd/objectives/{file}.py", line, becomes, tests)


def _packing(what: str, line: str, becomes: str, *tests: str) -> Fault:
    return Fault("packing", what, "nemo_tropd/training/packing.py", line, becomes, tests)


def _guidance(what: str, line: str, becomes: str, *tests: str) -> Fault:
    return Fault("guidance", what, "nemo_tropd/training/guidance.py", line, becomes, tests)


def _responses(what: str, line: str, becomes: str, *tests: str) -> Fault:
    return Fault("guidance", what, "nemo_tropd/training/teacher_responses.py", line, becomes, tests)


def _prompts(what: str, line: str, becomes: str, *tests: str) -> Fault:
    return Fault("prompts", what, "nemo_tropd/data/prompts.py", line, becomes, tests)


def _tokens(file: str, what: str, line: str, becomes: str, *tests: str) -> Fault:
    return Fault("tokens", what, f"nemo_tropd/{file}.py", line, becomes, tests)


def _vocab(what: str, line: str, becomes: str, *tests: str, slow: bool = False) -> Fault:
    return Fault("vocabulary", what, "nemo_tropd/parallel/vocab.py", line, becomes, tests, slow)


def _loss(file: str, what: str, line: str, becomes: str, *tests: str, slow: bool = False) -> Fault:
    return Fault("loss", f"{file}: {what}", f"nemo_tropd/loss/{file}.py", line, becomes, tests, slow)


def _convert(file: str, what: str, line: str, becomes: str, *tests: str, slow: bool = False) -> Fault:
    return Fault("conversion", f"{file}: {what}", f"nemo_tropd/convert/{file}.py", line, becomes, tests, slow)


def _optimizer(what: str, line: str, becomes: str, *tests: str) -> Fault:
    return Fault("optimizer", what, "nemo_tropd/training/optimizer.py", line, becomes, tests, "resume" in tests[0])


def _step(what: str, line: str, becomes: str, *tests: str) -> Fault:
    return Fault("step", what, "nemo_tropd/training/step.py", line, becomes, tests)


def _image(file: str, what: str, line: str, becomes: str, *tests: str) -> Fault:
    files = "tests/docker/test_image_files.py::"
    return Fault("images", f"{file}: {what}", f"docker/{file}", line, becomes, tuple(files + t for t in tests))


def _gpu(file: str, what: str, line: str, becomes: str, *tests: str) -> Fault:
    return Fault("gpu", what, f"nemo_tropd/{file}.py", line, becomes, tests)


def _weights(what: str, line: str, becomes: str, *tests: str) -> Fault:
    return Fault("weights", what, "nemo_tropd/rollout/weights/stream.py", line, becomes, tests)


def _versions(what: str, line: str, becomes: str, *tests: str) -> Fault:
    return Fault("versions", what, "nemo_tropd/rollout/restart.py", line, becomes, tests, slow=True)


def _several(file: str, what: str, line: str, becomes: str, *tests: str) -> Fault:
    return Fault("training", what, f"nemo_tropd/{file}.py", line, becomes, tests, slow=True)


def _numbers(file: str, what: str, line: str, becomes: str, *tests: str) -> Fault:
    return Fault("numbers", what, f"nemo_tropd/{file}.py", line, becomes, tests)


def _strangers(file: str, what: str, line: str, becomes: str, *tests: str) -> Fault:
    return Fault("strangers", what, f"nemo_tropd/{file}.py", line, becomes, tests)


def _evaluation(file: str, what: str, line: str, becomes: str, test: str) -> Fault:
    return Fault("evaluation", what, f"nemo_tropd/evaluation/{file}.py", line, becomes, (f"tests/evaluation/{test}",))


def _settings(what: str, line: str, becomes: str, *tests: str) -> Fault:
    return Fault("resume", what, "nemo_tropd/training/resume.py", line, becomes, tests, slow="e2e" in tests[0])


def _resume(what: str, line: str, becomes: str, *tests: str) -> Fault:
    return Fault("resume", what, "nemo_tropd/training/checkpoint.py", line, becomes, tests)


def _plan(file: str, what: str, line: str, becomes: str, test: str) -> Fault:
    return Fault(
        "planner", what, f"nemo_tropd/planner/{file}.py", line, becomes, (f"tests/unit/test_planner.py::{test}",)
    )


def _way(file: str, what: str, line: str, becomes: str, test: str) -> Fault:
    return Fault("ways", what, f"nemo_tropd/planner/{file}.py", line, becomes, (f"tests/unit/test_ways.py::{test}",))


def _teachers(file: str, what: str, line: str, becomes: str, *tests: str) -> Fault:
    unit = "tests/unit/test_teachers.py::"
    paths = tuple(test if "/" in test else unit + test for test in tests)
    return Fault("teachers", what, f"nemo_tropd/{file}.py", line, becomes, paths)


def _served(file: str, what: str, line: str, becomes: str, *tests: str) -> Fault:
    unit = "tests/unit/test_served.py::"
    paths = tuple(test if "/" in test else unit + test for test in tests)
    return Fault("served teachers", what, f"nemo_tropd/{file}.py", line, becomes, paths, "/" in tests[0])


_LAYOUTS_EARLY = "tests/dist/test_early_scores.py::test_the_same_steps_whichever_rollout_is_finished_first"
_MEMBERS = "tests/unit/test_parts_of_answers.py::"


def _early(file: str, what: str, line: str, becomes: str, *tests: str) -> Fault:
    paths = tuple(test if "/" in test else "tests/unit/test_early_scores.py::" + test for test in tests)
    return Fault("early scores", what, f"nemo_tropd/{file}.py", line, becomes, paths, "/dist/" in paths[0])


def _ahead(file: str, what: str, line: str, becomes: str, *tests: str) -> Fault:
    paths = tuple(test if "/" in test else "tests/dist/test_ahead.py::" + test for test in tests)
    return Fault("ahead", what, f"nemo_tropd/{file}.py", line, becomes, paths, True)


def _queue(file: str, what: str, line: str, becomes: str, *tests: str, slow: bool = False) -> Fault:
    paths = tuple(test if "/" in test else "tests/unit/test_engine_queue.py::" + test for test in tests)
    return Fault("queue", what, f"nemo_tropd/{file}.py", line, becomes, paths, slow)


_DEDICATED = "tests/dist/test_dedicated.py::"
_ARRAYS = "tests/unit/test_rollout_arrays.py::"
_TRAVEL = "tests/dist/test_rollouts_travel.py::"


def _arrays(file: str, what: str, line: str, becomes: str, test: str) -> Fault:
    return Fault("arrays", what, f"nemo_tropd/{file}.py", line, becomes, (test,), test.startswith(_TRAVEL))


_AS_SAID = "test_older_weights_are_used_as_said"
_RESUMES = "test_a_run_that_ended_anyhow_resumes_to_the_bit"
_VALIDATED = "tests/dist/test_ahead_validation.py::"


def _timeline(file: str, what: str, line: str, becomes: str, *tests: str) -> Fault:
    report = "tests/unit/test_report_timeline.py::" if file.startswith("report") else "tests/unit/test_timeline.py::"
    paths = tuple(test if "/" in test else report + test for test in tests)
    return Fault("timeline", what, f"nemo_tropd/{file}.py", line, becomes, paths, "/dist/" in paths[0])


FAULTS: list[Fault] = [
    # the timeline of a step
    _timeline(
        "timeline",
        "what goes on at a step's end is left out",
        "spans = [*self._done, *((lane, what, begin, ended) for lane, what, begin in self._open.values())]",
        "spans = list(self._done)",
        "test_what_crosses_a_step_is_cut_at_its_ends",
    ),
    _timeline(
        "timeline",
        "what began before a step counts from then",
        "begin, end = max(begin, began) - began, min(end, ended) - began",
        "begin, end = begin - began, min(end, ended) - began",
        "test_what_crosses_a_step_is_cut_at_its_ends",
    ),
    _timeline(
        "timeline",
        "questions that are asked at once count one by one",
        "total += max(end - max(begin, reached), 0.0)",
        "total += end - begin",
        "test_overlaps_count_once",
    ),
    _timeline(
        "timeline",
        "of several engines the busiest counts",
        "return {name: 1 - sum(b) / (len(b) * self.seconds) for name, b in busy.items() if b}",
        "return {name: 1 - max(b) / self.seconds for name, b in busy.items() if b}",
        "test_several_members_have_lanes_of_their_own",
    ),
    _timeline(
        "timeline",
        "the share that short ones are busy is that of what is written",
        "busy = length((begin, end) for begin, end, _ in bars)",
        "busy = length((begin, end) for begin, end, _ in _joined(bars, seconds / MOST_BARS))",
        "test_many_short_ones_are_written_as_few_and_counted_exactly",
    ),
    _timeline(
        "parallel/stopwatch",
        "a GPU's work ends when it is launched",
        "return self._began + self._origin.elapsed_time(mark) / 1000",
        "return self._began",
        "test_a_stopwatch_of_a_gpu_takes_its_events",
    ),
    _timeline(
        "training/run",
        "every rank records",
        "timeline = Timeline(enabled=topology.is_leader)",
        "timeline = Timeline()",
        "tests/dist/test_timeline.py::test_rank_0_alone_writes",
    ),
    _timeline(
        "rollout/timed",
        "every engine generates until the last one has answered",
        "elif isinstance(message, w.Generated | w.Failed) and member in self._generating:",
        "elif isinstance(message, w.Failed) and member in self._generating:",
        "test_members_work_until_each_has_answered",
    ),
    _timeline(
        "rollout/timed",
        "an engine without requests is none",
        "self._timeline.members(ENGINES, len(members))",
        "self._timeline.members(ENGINES, 2)",
        "test_members_work_until_each_has_answered",
    ),
    _timeline(
        "served/early",
        "a question is on its way for ever",
        "future.add_done_callback(lambda _: end())",
        "future.add_done_callback(lambda _: None)",
        "tests/unit/test_served.py::test_questions_as_they_come_have_the_answers_of_questions_together",
    ),
    _timeline(
        "rollout/placement",
        "engines are not on the timeline",
        "return TimedEngine(engine, timeline) if timeline.enabled else engine",
        "return engine",
        "tests/dist/test_timeline.py::test_in_turns_one_works_after_another",
    ),
    _timeline(
        "training/early_scores",
        "scores beside the engines are not on the timeline",
        'return EarlyScorer(teacher.teacher, score, partial(self.timeline.add, "teacher", EARLY))',
        "return EarlyScorer(teacher.teacher, score)",
        "tests/dist/test_timeline.py::test_early_scores_are_beside_their_generation",
    ),
    _timeline(
        "report/records",
        "steps that were done again are there as they were first",
        "if found and times.step <= next(reversed(found)):",
        "if found and times.step < 0:",
        "test_steps_done_again_replace_what_the_killed_run_had_written",
    ),
    _timeline(
        "report/timeline",
        "a pause for a checkpoint is within the picture",
        "if windows := close or windows:",
        "if windows:",
        "test_steps_ahead_are_shown_in_a_row",
    ),
    _timeline(
        "report/timeline",
        "what the engines are sent is the trainer's work",
        "return ((begin, end) for begin, end, what in bars if (what == SEND) == sent)",
        "return ((begin, end) for begin, end, what in bars)",
        "test_advice_for_steps_ahead",
    ),
    # engines that share a queue
    _queue(
        "rollout/vllm/dealing",
        "whoever is first in the list comes first",
        "self._undealt.extend(sorted(range(first, len(self.requests)), key=lambda place: -self._expected[place]))",
        "self._undealt.extend(range(first, len(self.requests)))",
        "test_the_longest_expected_come_first_and_whoever_has_least_is_next",
        "test_what_was_seen_decides_what_comes_first",
    ),
    _queue(
        "rollout/vllm/dealing",
        "everything is dealt at once",
        "if len(self._has[i]) == self._held:",
        "if False:",
        "test_who_is_faster_is_asked_more_and_the_answers_are_the_same",
    ),
    _queue(
        "rollout/vllm/dealing",
        "a member answers another's request",
        "if place not in self._has[member]:",
        "if False:",
        "test_a_member_that_does_not_keep_to_it_is_named",
    ),
    _queue(
        "rollout/vllm/dealing",
        "an engine of an engine is told too early that nothing follows",
        "last = self.closed and not self._undealt",
        "last = not self._undealt",
        "test_an_engine_of_an_engine_passes_requests_on",
    ),
    _queue(
        "rollout/vllm/dealing",
        "the teacher's prefix counts as the student's tokens",
        "return min(max(tokens // count - len(request.prefix_ids), 1), request.max_new_tokens)",
        "return min(max(tokens // count, 1), request.max_new_tokens)",
        "test_what_is_expected_of_a_request",
    ),
    _queue(
        "rollout/vllm/remote",
        "a member that ends before its last request is believed",
        "if answer != w.Generated(w.Packed()) or not queue.done(i):",
        "if answer != w.Generated(w.Packed()):",
        "test_a_member_that_does_not_keep_to_it_is_named",
    ),
    _queue(
        "rollout/vllm/server",
        "requests for an engine that has failed are taken for a call",
        "if not isinstance(request, (w.More, w.Abandon)):  # for a call that has ended meanwhile",
        "if not isinstance(request, w.Abandon):",
        "test_requests_for_an_engine_that_has_failed_are_passed_over",
    ),
    _queue(
        "rollout/vllm/server",
        "an engine waits for a trainer that is gone",
        "except (w.Disconnected, TimeoutError):",
        "except KeyError:",
        "test_an_engine_outlives_a_trainer_that_leaves_while_more_may_come",
    ),
    _queue(
        "rollout/vllm/server",
        "an engine goes on for a trainer that has left",
        "while self._waits and self._wire.wait_readable(0.0):",
        "while False:",
        "test_an_engine_does_not_go_on_for_a_trainer_that_has_left",
    ),
    _queue(
        "rollout/vllm/server",
        "an engine is not reusable after an abandoned call",
        "except Abandoned as error:",
        "except KeyError as error:",
        "test_an_engine_that_is_told_that_nobody_waits_has_ended_its_call",
    ),
    _queue(
        "rollout/vllm/generating",
        "vLLM keeps requests that nobody waits for",
        "engine.abort_request([str(number) for number in range(first, llm.request_counter.counter)])",
        "pass",
        "tests/unit/test_colocated.py::test_what_nobody_waits_for_is_abandoned_and_the_engine_goes_on",
    ),
    _queue(
        "rollout/vllm/remote",
        "an engine host does not tell its own engine that nobody waits",
        "self._send(member, w.Abandon())",
        "pass",
        "tests/unit/test_colocated.py::test_what_nobody_waits_for_is_abandoned_and_the_engine_goes_on",
    ),
    _queue(
        "rollout/vllm/generating",
        "requests wait until all before them are done",
        "between()",
        "pass",
        "tests/unit/test_colocated.py::test_further_requests_come_in_between_two_steps",
    ),
    _queue(
        "rollout/placement",
        "the key has no effect",
        'options |= {"engines": r.dedicated.engines, "timeout_s": r.dedicated.timeout_s, "queue": r.dedicated.queue}',
        'options |= {"engines": r.dedicated.engines, "timeout_s": r.dedicated.timeout_s}',
        "test_a_run_chooses_by_a_key_that_a_resumed_run_may_change",
    ),
    # validation, with an engine that works ahead
    _ahead(
        "training/trainer",
        "the trainer waits for rollouts of later steps before benchmarks",
        "ahead.begin(step, own=True)",
        "ahead.begin(step)",
        _VALIDATED + "test_what_the_trainer_waits_for_comes_first",
    ),
    _ahead(
        "training/trainer",
        "the step waits for the answers to benchmarks",
        "if self.one_step.ahead is None or BENCHMARKS not in parts or self.state.step == self.settings.max_steps:",
        "if True:",
        _VALIDATED + "test_the_step_goes_on_while_benchmarks_are_answered",
    ),
    _ahead(
        "training/step",
        "a validation is finished when the weights are others",
        "before_update()",
        "pass",
        _VALIDATED + "test_what_the_trainer_waits_for_comes_first",
    ),
    _ahead(
        "training/validation",
        "ranks differ in what there is to validate on",
        "there = {HELD_OUT: bool(self.prompts), BENCHMARKS: bool(self.cfg.validation.benchmarks)}",
        "there = {HELD_OUT: bool(self.prompts), BENCHMARKS: bool(self.benchmarks)}",
        _VALIDATED + "test_on_several_ranks",
    ),
    _ahead(
        "rollout/ahead",
        "rollouts that were taken are lost at a stop",
        "rollouts = self._agree(lambda: self._rollouts[name].result(), ROLLOUTS)",
        "rollouts = self._agree(lambda: self._rollouts.pop(name).result(), ROLLOUTS)",
        _VALIDATED + "test_a_stop_that_does_not_wait_for_answers_loses_neither_them_nor_the_rollouts",
    ),
    # rollouts ahead of the weights
    _ahead(
        "rollout/weights/copies",
        "the trainer's own weights instead of a copy",
        "self.tensors[name] = held = self._place(before.get(name), tensor)",
        "self.tensors[name], held = tensor.detach(), self._place(before.get(name), tensor)",
        "test_only_the_copies_that_are_still_wanted_are_kept",
    ),
    _ahead(
        "rollout/ahead",
        "a new engine keeps the version of the one that died",
        "self._engine, self._has = self._make_engine(), None",
        "self._engine = self._make_engine()",
        "test_an_engine_that_dies_is_replaced_by_one_with_the_same_weights",
    ),
    _ahead(
        "rollout/ahead",
        "whatever weights the engine has",
        "if self._has != version:",
        "if self._has is None:",
        "test_only_the_copies_that_are_still_wanted_are_kept",
    ),
    _ahead(
        "rollout/ahead",
        "copies are kept for ever",
        "self._free.append(self._kept.pop(version))",
        "pass",
        "test_only_the_copies_that_are_still_wanted_are_kept",
    ),
    _ahead(
        "training/ahead",
        "a step less ahead",
        "for later in range(step, min(step + (0 if own else self._steps) + 1, self._last)):",
        "for later in range(step, min(step + (0 if own else self._steps - 1) + 1, self._last)):",
        _AS_SAID,
    ),
    _ahead(
        "training/ahead",
        "rollouts past the last step",
        "for later in range(step, min(step + (0 if own else self._steps) + 1, self._last)):",
        "for later in range(step, step + (0 if own else self._steps) + 1):",
        _AS_SAID,
    ),
    _ahead(
        "training/ahead",
        "a checkpoint leaves out what older weights generated",
        "return {later: version for later, version in self._begun.items() if version < step}",
        "return {}",
        _RESUMES,
    ),
    _ahead(
        "training/trainer",
        "a resumed run generates again what the checkpoint has",
        "anew = ahead.resume(saved.ahead, self.checkpoints.rollouts_ahead(path, saved))",
        "anew = ahead.resume({}, None)",
        _RESUMES,
    ),
    _ahead(
        "rollout/arrays",
        "log-probabilities in single precision",
        "return single if np.array_equal(back.view(np.int64), exact.view(np.int64)) else exact",
        "return single",
        "test_rollouts_in_a_file_come_back_as_they_were",
    ),
    _ahead(
        "training/ahead",
        "rollouts of a file are the wrong step's",
        "of = np.repeat(np.array(steps, dtype=np.int64), [len(rollouts[step]) for step in steps])",
        "of = np.repeat(np.array(steps[:1], dtype=np.int64), len(a.numbers))",
        "test_rollouts_in_a_file_come_back_as_they_were",
    ),
    _ahead(
        "training/checkpoint",
        "a file of rollouts of another size is read",
        "if size != state.ahead_bytes:",
        "if False:",
        "test_a_damaged_file_of_rollouts_is_a_damaged_checkpoint",
    ),
    _ahead(
        "training/plan",
        "older rollouts without weights",
        'if cfg.model.rollout.steps_ahead and not objective.needs_distributions and "importance_cap" not in given:',
        "if False:",
        "test_what_is_refused_and_what_is_set",
    ),
    _ahead(
        "training/step",
        "the effective sample size of weights that are not squared",
        'squares = sums.get("importance_weight_squared", math.nan)',
        'squares = sums.get("importance_weight", math.nan)',
        "test_the_effective_sample_size",
    ),
    _ahead(
        "rollout/ahead",
        "a run whose rollouts are all there starts no engine",
        "if not self._started:",
        "if False:",
        "test_an_engine_is_told_of_the_end_of_a_run_whose_rollouts_a_checkpoint_had",
    ),
    _ahead(
        "rollout/ahead",
        "an engine that was closed before it started stays",
        "self._check_open()  # what was closed before it started is closed again",
        "pass",
        "test_an_engine_that_is_closed_while_it_starts_does_not_stay",
    ),
    _ahead(
        "training/checkpoint",
        "rollouts are not looked at before an older checkpoint could be used",
        "load_rollouts(path, state.ahead)",
        "pass",
        "test_a_damaged_file_of_rollouts_is_a_damaged_checkpoint",
    ),
    _ahead(
        "training/ahead",
        "rollouts of other data are used",
        "return [step for step in due if _answer(rollouts[step], self._requests(step))]",
        "return list(due)",
        "test_rollouts_of_other_data_are_generated_anew",
    ),
    _ahead(
        "rollout/restart",
        "an engine is replaced in silence",
        "if self.says:",
        "if False:",
        "test_an_engine_that_dies_is_replaced_by_one_with_the_same_weights",
    ),
    _ahead(
        "rollout/vllm/hosts",
        "engines that are closed wait for hosts",
        "if self._given_up.is_set():",
        "if False:",
        _DEDICATED + "test_engines_that_are_closed_while_hosts_are_awaited_wait_no_longer",
    ),
    _ahead(
        "rollout/engine_host",
        "a host ends under the trainer's rollouts",
        "STOP.install()",
        "pass",
        _DEDICATED + "test_a_host_asked_to_stop_stays_until_the_trainer_has_its_rollouts",
    ),
    _ahead(
        "rollout/engine_host",
        "a host that is asked to stop stays as long as the trainer",
        "while not STOP.overdue:",
        "while True:",
        _DEDICATED + "test_a_host_asked_to_stop_stays_until_the_trainer_has_its_rollouts",
    ),
    # rollouts as arrays
    _arrays(
        "rollout/arrays",
        "log-probabilities that compare equal count as the same",
        "return single if np.array_equal(back.view(np.int64), exact.view(np.int64)) else exact",
        "return single if np.array_equal(back, exact, equal_nan=True) else exact",
        _ARRAYS + "test_log_probabilities_come_back_to_the_bit",
    ),
    _arrays(
        "rollout/arrays",
        "log-probabilities are always doubles",
        "return single if np.array_equal(back.view(np.int64), exact.view(np.int64)) else exact",
        "return exact",
        "tests/unit/test_planner.py::test_a_rollouts_token_takes_as_many_bytes_as_the_plan_says",
    ),
    _arrays(
        "rollout/arrays",
        "only the sum of the lengths must fit",
        "fit = bool(((lengths >= 0) & (lengths <= len(self.ids))).all())",
        "fit = True",
        _ARRAYS + "test_bytes_that_are_no_rollouts_are_refused",
    ),
    _arrays(
        "rollout/arrays",
        "any number is finished",
        "if not np.isin(self.numbers[:, 3], (0, 1)).all():",
        "if False:",
        _ARRAYS + "test_bytes_that_are_no_rollouts_are_refused",
    ),
    _arrays(
        "rollout/arrays",
        "a header is believed",
        "if width not in _FLOATS or min(count, ids) < 0 or scored_from > ids_from or (ids_from - scored_from) % width:",
        "if width not in _FLOATS:",
        _ARRAYS + "test_bytes_that_are_no_rollouts_are_refused",
    ),
    _arrays(
        "rollout/vllm/wire",
        "a list is as good as bytes",
        "if not isinstance(plain, bytes):",
        "if False:",
        _MEMBERS + "test_a_member_whose_rollouts_are_none_is_named",
    ),
    _arrays(
        "batch",
        "a rollout's numbers equal no list",
        "return self.tolist() == other if isinstance(other, list) else super().__eq__(other)",
        "return super().__eq__(other)",
        _ARRAYS + "test_a_rollout_holds_its_numbers_in_arrays_that_read_as_lists",
    ),
    _arrays(
        "parallel/agreement",
        "the last parts are as the others",
        "parts.take(parts.read(content), kind == _Kind.LAST_PARTS)",
        "parts.take(parts.read(content), False)",
        _TRAVEL + "test_an_error_on_the_way_is_every_ranks_and_parts_keep_their_order",
    ),
    _arrays(
        "parallel/agreement",
        "of several parts the first one arrives",
        "return [part for one in pickle.loads(data) for part in self.codec.decode(memoryview(one))]",
        "return [part for one in pickle.loads(data)[:1] for part in self.codec.decode(memoryview(one))]",
        _TRAVEL + "test_an_error_on_the_way_is_every_ranks_and_parts_keep_their_order",
    ),
    _arrays(
        "rollout/collective",
        "every group's rollouts are the first ones",
        "ordered[data_rank::groups] = arrays.decode(part)",
        "ordered[::groups] = arrays.decode(part)",
        _TRAVEL + "test_every_rank_gets_the_rollouts_that_were_generated",
    ),
    # rollouts that are scored while others are generated
    _early(
        "training/early_scores",
        "what a new engine generated keeps the scores of the old text",
        "if self._seen.get(r.sequence_id) == r:",
        "if r.sequence_id in self._seen:",
        "test_what_a_new_engine_generates_otherwise_is_scored_again",
    ),
    _early(
        "training/early_scores",
        "every data rank scores everything",
        "if early is not None and r.loss_tokens and r.sequence_id % topology.data_size == topology.data_rank:",
        "if early is not None and r.loss_tokens:",
        "test_each_data_rank_scores_its_own",
    ),
    _early(
        "training/early_scores",
        "scores in the order of the sequences' numbers, not of the micro-batches",
        "own = [moved[r.sequence_id] for batch in batches for r in batch.rollouts if r.loss_tokens]",
        "own = [moved[i] for i in sorted(moved)]",
        _LAYOUTS_EARLY,
    ),
    _early(
        "training/early_scores",
        "a teacher is left awake after an error",
        "early.close()",
        "pass",
        "test_what_a_new_engine_generates_otherwise_is_scored_again",
    ),
    _early(
        "training/step",
        "a teacher that follows is a step behind",
        "model.follow(step)  # the engine is elsewhere, so the device has room",
        "pass",
        _LAYOUTS_EARLY + "[2]",
    ),
    _early(
        "planner/degrees",
        "engine and teacher share a device",
        'if not t.score_early or place == "colocated":',
        "if not t.score_early:",
        "tests/dist/test_early_scores.py::test_who_scores_early",
    ),
    _early(
        "parallel/exchange",
        "parts are taken in the order of their numbers, not of their senders",
        "received = sorted((i for i in owners if owners[i] == rank), key=lambda i: (makers[i], i))",
        "received = sorted(i for i in owners if owners[i] == rank)",
        "tests/dist/test_early_scores.py::test_parts_come_to_their_owners",
    ),
    _early(
        "rollout/vllm/remote",
        "a part that comes twice",
        "if key in parts[i] or key not in asked[i]:",
        "if key not in asked[i]:",
        _MEMBERS + "test_a_member_that_answers_otherwise_is_named",
    ),
    _early(
        "rollout/vllm/remote",
        "a part that answers another's request",
        "if key in parts[i] or key not in asked[i]:",
        "if key in parts[i]:",
        _MEMBERS + "test_a_member_that_answers_otherwise_is_named",
    ),
    _early(
        "rollout/vllm/remote",
        "parts stretch the deadline",
        "if time.monotonic() > deadline:",
        "if False:",
        _MEMBERS + "test_a_member_that_answers_otherwise_is_named",
    ),
    _early(
        "rollout/vllm/server",
        "an engine ends with the trainer that it was telling",
        "with suppress(w.Disconnected):",
        "with suppress(KeyError):",
        _MEMBERS + "test_an_engine_outlives_a_trainer_that_leaves_between_two_parts",
    ),
    _early(
        "rollout/vllm/generating",
        "vLLM's steps are watched for ever",
        "del engine.step  # the class's own again",
        "pass",
        "tests/unit/test_colocated.py::test_rollouts_are_told_when_they_are_finished_and_are_the_same",
    ),
    _early(
        "rollout/collective",
        "an engine that tells of too few",
        "if found.keys() != set(order):",
        "if False:",
        _SUPERVISOR + "test_what_is_wrong_with_a_part_is_raised_on_every_rank",
    ),
    _early(
        "rollout/collective",
        "what is told is not checked before it is scored",
        "check([r], [by_id[r.sequence_id]] if r.sequence_id in by_id else [])",
        "pass",
        _SUPERVISOR + "test_what_is_wrong_with_a_part_is_raised_on_every_rank",
    ),
    # teachers behind servers
    _served(
        "served/answers",
        "an answer about another prompt is taken",
        "if choice.prompt_token_ids != ids:",
        "if False:",
        "test_garbage_is_asked_for_again",
    ),
    _served(
        "served/answers",
        "the mass of padding stays in the normalisation",
        "rest = np.log1p(-np.minimum(np.where(padding, np.exp(best), 0).sum(1), 0.999))",
        "rest = np.zeros(len(best))",
        "test_scores_are_the_models_without_padding",
    ),
    _served(
        "served/answers",
        "logits are taken for log-probabilities",
        "if mass.max() > 1 + EPSILON or least < -math.log(rows) - EPSILON:",
        "if mass.max() > 1 + EPSILON:",
        "test_garbage_is_asked_for_again",
    ),
    _served(
        "served/client",
        "a server that comes back is used before it is compared",
        "if server in self._unsure:",
        "if False:",
        "test_other_weights_are_noticed_after_a_restart",
    ),
    _served(
        "served/client",
        "what a server says may show the token",
        'return text.replace(self._token, "***") if self._token else text',
        "return text",
        "test_a_refusal_is_not_repeated_and_a_token_is_never_shown",
    ),
    _served(
        "served/client",
        "an answer without end is read without end",
        "if len(body) > most_bytes:",
        "if False:",
        "test_a_faulty_server_is_left_for_another",
    ),
    _served(
        "served/teacher",
        "scores are used before the servers are compared",
        "if self._asked % self.servers.settings.check_interval == 0:",
        "if False:",
        "tests/dist/test_served_run.py::test_a_run_with_its_teacher_behind_a_server",
    ),
    _served(
        "training/served",
        "a resumed run takes any teacher",
        "if (far := was.distance(now)) <= t.server.noise:",
        "if (far := was.distance(now)) <= 1e9:",
        "tests/dist/test_served_run.py::test_a_run_with_its_teacher_behind_a_server",
    ),
    # teachers: which reads and scores what
    _teachers(
        "training/packing",
        "teachers share micro-batches",
        "by_teacher.setdefault(prompts[r.prompt_index].teacher, []).append(r)",
        'by_teacher.setdefault("default", []).append(r)',
        "test_a_micro_batch_is_one_teachers_and_has_what_it_reads",
    ),
    _teachers(
        "training/packing",
        "the teacher reads the student's prompt",
        "return replace(rollout, prompt_ids=told) if told else rollout",
        "return rollout",
        "test_a_micro_batch_is_one_teachers_and_has_what_it_reads",
        "test_r_is_that_of_the_two_texts",
    ),
    _teachers(
        "training/packing",
        "rows are as long as what the student reads",
        "lengths = [max(r.length, read[r.sequence_id].length) for r in rollouts]",
        "lengths = [r.length for r in rollouts]",
        "test_rows_have_room_for_what_the_teacher_reads",
    ),
    _teachers(
        "teacher/sharing",
        "scores are of what the student reads",
        "batches = [batch.for_teacher for batch in batches]",
        "batches = list(batches)",
        "test_r_is_that_of_the_two_texts",
        "test_hidden_states_are_of_what_the_teacher_reads",
    ),
    _teachers(
        "teacher/sharing",
        "the teacher's states are read where the student's lie",
        "teacher_rows=rows,",
        "teacher_rows=batches[i].loss_tokens().rows if mine else rows,",
        "test_r_is_that_of_the_two_texts",
    ),
    _teachers(
        "model/tropd_model",
        "every teacher scores with the last one's weights",
        "found |= dict.fromkeys(together, TeacherSharing(self._admitted(t, make, own), place))",
        "found |= dict.fromkeys(names, TeacherSharing(self._admitted(t, make, own), place))",
        "test_two_teachers_are_two_runs_with_one_each",
    ),
    _teachers(
        "model/tropd_model",
        "one head for the hidden states of all teachers",
        "return {name: heads[one] for name, one in self.on_ranks.items()}",
        "return {name: next(iter(heads.values())) for name in self.on_ranks}",
        "test_two_teachers_are_two_runs_with_one_each",
    ),
    _teachers(
        "training/guidance",
        "prefixes are those of the student's prompt",
        "wanted[prompt.teachers_ids] = max(length, wanted.get(prompt.teachers_ids, 0))",
        "wanted[prompt.token_ids] = max(length, wanted.get(prompt.token_ids, 0))",
        "test_the_teacher_may_be_told_something_else",
    ),
    _teachers(
        "training/checkpoint",
        "a teacher that follows is not resumed as it was",
        "return self.following if held else None",
        "return None",
        "tests/e2e/test_teachers.py::test_a_teacher_that_follows_the_student_is_resumed_as_it_was",
    ),
    _teachers(
        "training/trainer",
        "the head of a teacher that follows is not resumed with it",
        "self.model.teacher_changed()  # if it follows the student",
        "pass",
        "tests/e2e/test_teachers.py::test_a_teacher_that_follows_the_student_is_resumed_as_it_was[tropd_exact]",
    ),
    _teachers(
        "config",
        "a teacher that follows is one with a frozen one of its checkpoint",
        "return (Path(t.path).resolve(), split, t.offload, t.precision or precision, t.follow_steps, *fp8, *t.urls)",
        "return (Path(t.path).resolve(), split, t.offload, t.precision or precision, *fp8, *t.urls)",
        "test_one_checkpoint_is_one_teacher_whatever_is_spelled_out",
    ),
    _teachers(
        "teacher/scorer",
        "a teacher that follows comes back from the host as it was",
        "self.home.renew()",
        "pass",
        "test_a_teacher_that_follows_is_the_student_from_then_on",
    ),
    _teachers(
        "model/tropd_model",
        "the head of a teacher that follows stays as it was",
        "self.teacher_heads = self._teacher_heads()  # copies, if it is offloaded or split otherwise",
        "pass",
        "test_a_teacher_that_follows_is_the_student_from_then_on",
    ),
    _teachers(
        "training/start",
        "another checkpoint of a further teacher is not noticed",
        "said.append([name, weights, *as_what, t.fp8, t.fp8 and t.fp8_param, t.fp8 and t.fp8_first_last_bf16])",
        "said.append([name, *as_what, t.fp8, t.fp8 and t.fp8_param, t.fp8 and t.fp8_first_last_bf16])",
        "tests/e2e/test_teachers.py::test_a_resumed_run_has_the_bits_of_a_straight_one",
    ),
    _teachers(
        "parallel/metric_sums",
        "metrics of one group are added to the next",
        'total.add({f"{group}/{name}": value for group in of})',
        'total.add({f"{group}/{name}": value for group in groups[0]})',
        "test_metrics_are_summed_by_source_and_teacher",
    ),
    # batch: alignment, masks, the gate's draws
    _batch(
        "the gate's draws forget the step",
        "uniforms[row, begin:end] = gate_uniforms(seed, step, r.sequence_id, end - begin)",
        "uniforms[row, begin:end] = gate_uniforms(seed, 0, r.sequence_id, end - begin)",
        _BATCH + "test_the_draws_of_a_batch_are_those_of_seed_step_sequence_and_position",
    ),
    _batch(
        "the gate's draws forget the run's seed",
        "uniforms[row, begin:end] = gate_uniforms(seed, step, r.sequence_id, end - begin)",
        "uniforms[row, begin:end] = gate_uniforms(0, step, r.sequence_id, end - begin)",
        _BATCH + "test_the_draws_of_a_batch_are_those_of_seed_step_sequence_and_position",
    ),
    _batch(
        "the gate's draws go by the row, not the sequence",
        "uniforms[row, begin:end] = gate_uniforms(seed, step, r.sequence_id, end - begin)",
        "uniforms[row, begin:end] = gate_uniforms(seed, step, row, end - begin)",
        _BATCH + "test_the_draws_of_a_batch_are_those_of_seed_step_sequence_and_position",
    ),
    _batch(
        "the gate's draws are off by one position",
        "uniforms[row, begin:end] = gate_uniforms(seed, step, r.sequence_id, end - begin)",
        "uniforms[row, begin:end] = gate_uniforms(seed, step, r.sequence_id, end - begin + 1)[1:]",
        _BATCH + "test_the_draws_of_a_batch_are_those_of_seed_step_sequence_and_position",
    ),
    _batch(
        "large seeds run together",
        "key = np.array([seed & mask, step & mask], dtype=np.uint64)",
        "key = [seed & mask, step & mask]",
        _BATCH + "test_draws_are_philox_words_of_their_key_and_sequence",
    ),
    _batch(
        "all sequences share their draws",
        "counter = np.array([0, 0, sequence_id & mask, 0], dtype=np.uint64)",
        "counter = np.array([0, 0, 0, 0], dtype=np.uint64)",
        _BATCH + "test_draws_are_philox_words_of_their_key_and_sequence",
    ),
    _batch(
        "draws reach half of [0, 1) only",
        "return torch.from_numpy(raw * np.float32(2.0**-24))",
        "return torch.from_numpy(raw * np.float32(2.0**-25))",
        _BATCH + "test_draws_are_philox_words_of_their_key_and_sequence",
    ),
    _batch(
        "labels are the input itself",
        "labels[row, begin:end] = tokens[1:]",
        "labels[row, begin:end] = tokens[:-1]",
        _BATCH + "test_each_output_position_scores_the_next_token",
    ),
    _batch(
        "scored outputs begin one position late",
        "start = begin + len(r.prompt_ids) - 1  # the output that scores the first token after the prompt",
        "start = begin + len(r.prompt_ids)",
        _BATCH + "test_each_output_position_scores_the_next_token",
    ),
    _batch(
        "the student's tokens count as guided",
        "guided[row, start:middle] = True",
        "guided[row, start:end] = True",
        _BATCH + "test_each_output_position_scores_the_next_token",
    ),
    _batch(
        "the teacher's prefix is left out of the loss",
        "mask[row, start:end] = True",
        "mask[row, middle:end] = True",
        _BATCH + "test_each_output_position_scores_the_next_token",
    ),
    _batch(
        "positions run on through a concatenated row",
        "positions = torch.arange(width) - torch.repeat_interleave(bounds[:-1].long(), lengths)",
        "positions = torch.arange(width)",
        _PACKING + "test_a_row_holds_what_its_sequences_hold_alone",
    ),
    _batch(
        "a sequence's first token belongs to the one before",
        "sequence = torch.searchsorted(self.segments.bounds[1:], rows.to(torch.int32), right=True)",
        "sequence = torch.searchsorted(self.segments.bounds[1:], rows.to(torch.int32), right=False)",
        _PACKING + "test_the_first_position_of_a_sequence_is_its_own",
    ),
    # objectives: what every one of them shares
    _objective(
        "objective",
        "the ratio has the wrong sign",
        "return (scores.teacher_log_probs - scores.student_log_probs).detach()",
        "return (scores.student_log_probs - scores.teacher_log_probs).detach()",
        _OBJECTIVES + "test_k1_is_the_gradient_of_the_reverse_kl",
    ),
    _objective(
        "objective",
        "the ratio carries gradient",
        "return (scores.teacher_log_probs - scores.student_log_probs).detach()",
        "return scores.teacher_log_probs - scores.student_log_probs",
        _OBJECTIVES + "test_gradient_flows_through_the_student_alone",
    ),
    _objective(
        "objective",
        "the trust is not clamped at 1",
        "return ratio.clamp(max=0).exp()",
        "return ratio.exp()",
        _OBJECTIVES + "test_tropd_enumerated",
    ),
    _objective(
        "objective",
        "the importance weight has no cap",
        "weight = importance_ratio(scores, what=self.name).clamp(max=self.importance_cap)",
        "weight = importance_ratio(scores, what=self.name)",
        _OBJECTIVES + "test_importance_weights_are_truncated_and_detached",
    ),
    _objective(
        "objective",
        "the importance weight is capped from below",
        "weight = importance_ratio(scores, what=self.name).clamp(max=self.importance_cap)",
        "weight = importance_ratio(scores, what=self.name).clamp(min=self.importance_cap)",
        _OBJECTIVES + "test_importance_weights_are_truncated_and_detached",
    ),
    _objective(
        "objective",
        "the importance weight carries gradient",
        "gap = scores.student_log_probs.detach() - scores.behavior_log_probs.detach()",
        "gap = scores.student_log_probs - scores.behavior_log_probs.detach()",
        _OBJECTIVES + "test_importance_weights_are_truncated_and_detached",
    ),
    _objective(
        "objective",
        "tokens without a behavior weigh NaN",
        "return gap.nan_to_num(nan=0.0).exp()",
        "return gap.exp()",
        _OBJECTIVES + "test_importance_weights_are_truncated_and_detached",
    ),
    _objective(
        "objective",
        "guided tokens are pushed away",
        "loss = torch.where(scores.guided, -self.guidance_weight * scores.student_log_probs, loss)",
        "loss = torch.where(scores.guided, self.guidance_weight * scores.student_log_probs, loss)",
        _OBJECTIVES + "test_guidance_pulls_towards_the_teacher",
    ),
    _objective(
        "objective",
        "the guidance weight is forgotten",
        "loss = torch.where(scores.guided, -self.guidance_weight * scores.student_log_probs, loss)",
        "loss = torch.where(scores.guided, -scores.student_log_probs, loss)",
        _OBJECTIVES + "test_guidance_pulls_towards_the_teacher",
    ),
    _objective(
        "objective",
        "guidance takes the student's own tokens",
        "loss = torch.where(scores.guided, -self.guidance_weight * scores.student_log_probs, loss)",
        "loss = torch.where(~scores.guided, -self.guidance_weight * scores.student_log_probs, loss)",
        _OBJECTIVES + "test_guidance_pulls_towards_the_teacher",
    ),
    _objective(
        "terms",
        "the reward is minimised",
        "return -reward.detach() * scores.student_log_probs",
        "return reward.detach() * scores.student_log_probs",
        _OBJECTIVES + "test_k1_is_the_gradient_of_the_reverse_kl",
    ),
    _objective(
        "terms",
        "the reward is differentiated",
        "return -reward.detach() * scores.student_log_probs",
        "return -reward * scores.student_log_probs",
        _OBJECTIVES + "test_gopd_goes_beyond_the_teacher",
    ),
    _objective(
        "terms",
        "the Bernoulli gate is turned round",
        'return probability if gate == "soft" else (scores.uniforms < probability).to(ratio.dtype)',
        'return probability if gate == "soft" else (scores.uniforms > probability).to(ratio.dtype)',
        _OBJECTIVES + "test_tropd_enumerated",
    ),
    _objective(
        "terms",
        "the threshold gate does not trust a tie",
        "return (ratio >= 0).to(ratio.dtype)",
        "return (ratio > 0).to(ratio.dtype)",
        _OBJECTIVES + "test_ties_fall_as_the_equations_say",
    ),
    _objective(
        "terms",
        "the forward KL's sign",
        "value = torch.where(mass > 0, mass * (teacher - student), 0.0).sum(-1)",
        "value = (teacher.exp() * (student - teacher)).sum(-1)",
        _OBJECTIVES + "test_raw_forward_kl",
    ),
    _objective(
        "terms",
        "the forward KL is clamped at 0",
        "value = torch.where(mass > 0, mass * (teacher - student), 0.0).sum(-1)",
        "value = torch.where(mass > 0, mass * (teacher - student), 0.0).sum(-1).clamp(min=0)",
        _OBJECTIVES + "test_raw_forward_kl_may_be_negative_and_keeps_its_gradient",
    ),
    _objective(
        "terms",
        "the forward KL weighs by the student",
        "value = torch.where(mass > 0, mass * (teacher - student), 0.0).sum(-1)",
        "value = (student.exp() * (teacher - student)).sum(-1)",
        _OBJECTIVES + "test_raw_forward_kl",
    ),
    _objective(
        "terms",
        "the tail's mass is the student's",
        "value = value + rest_teacher.exp() * (rest_teacher - rest_student)",
        "value = value + rest_student.exp() * (rest_teacher - rest_student)",
        _OBJECTIVES + "test_ghost_tail_is_the_coarsened_kl",
    ),
    # objectives: each one's equation
    _objective(
        "tropd",
        "the forward KL applies to trusted tokens, too",
        'metrics["outlier_loss"] = (1 - trust) * outlier',
        'metrics["outlier_loss"] = outlier',
        _OBJECTIVES + "test_tropd_enumerated",
    ),
    _objective(
        "tropd",
        "another guidance weight",
        "guidance_weight: float | None = number(0.001, at_least=0.0, optional=True)",
        "guidance_weight: float | None = number(0.01, at_least=0.0, optional=True)",
        _OBJECTIVES + "test_guidance_pulls_towards_the_teacher",
    ),
    _objective(
        "tropd",
        "the floor of the clip is a ceiling",
        "outlier = policy_gradient(scores, ratio.clamp(min=self.tau))",
        "outlier = policy_gradient(scores, ratio.clamp(max=self.tau))",
        _EQUATIONS,
    ),
    _objective(
        "clip_outlier",
        "the floor is forgotten",
        'return policy_gradient(scores, ratio.clamp(min=self.tau)), {"clipped": (ratio < self.tau).to(ratio.dtype)}',
        'return policy_gradient(scores, ratio), {"clipped": (ratio < self.tau).to(ratio.dtype)}',
        _OBJECTIVES + "test_outliers_are_clipped_or_masked_at_tau",
    ),
    _objective(
        "mask_outlier",
        "a token at tau is kept",
        "keep = (ratio > self.tau).to(ratio.dtype)",
        "keep = (ratio >= self.tau).to(ratio.dtype)",
        _OBJECTIVES + "test_outliers_are_clipped_or_masked_at_tau",
    ),
    _objective(
        "aopd",
        "a tie is no outlier",
        "positive = (ratio > 0).to(ratio.dtype)",
        "positive = (ratio >= 0).to(ratio.dtype)",
        _OBJECTIVES + "test_ties_fall_as_the_equations_say",
    ),
    _objective(
        "entropy_opd",
        "the most certain tokens are kept",
        "keep = (scores.student_entropy > self.tau).to(scores.student_log_probs.dtype)",
        "keep = (scores.student_entropy < self.tau).to(scores.student_log_probs.dtype)",
        _HEAD + "test_first_pass_gives_what_the_objective_sees",
    ),
    _objective(
        "entropy_opd",
        "the quantile is one place too high",
        "place = q * (ordered.numel() - 1)",
        "place = min(q * ordered.numel(), ordered.numel() - 1)",
        _OBJECTIVES + "test_the_quantile_is_torchs",
    ),
    _objective(
        "eopd",
        "the ratio is not clipped",
        "reverse = -torch.minimum(ratio * reward, ratio.clamp(1 - self.eps, 1 + self.eps) * reward)",
        "reverse = -ratio * reward",
        _OBJECTIVES + "test_eopd_clips_the_ratio",
    ),
    _objective(
        "eopd",
        "the teacher is not renormalised over its top k",
        "q = scores.teacher_top_k_log_probs.detach().log_softmax(-1)",
        "q = scores.teacher_top_k_log_probs.detach()",
        _EQUATIONS,
    ),
    _objective(
        "eopd",
        "the forward KL applies where the teacher is certain",
        "uncertain = (scores.teacher_entropy > self.tau).to(l.dtype)",
        "uncertain = (scores.teacher_entropy < self.tau).to(l.dtype)",
        _EQUATIONS,
    ),
    _objective(
        "jsd",
        "the mixture's weights are exchanged",
        "return torch.logaddexp(teacher + math.log(self.beta), student + math.log1p(-self.beta))",
        "return torch.logaddexp(teacher + math.log1p(-self.beta), student + math.log(self.beta))",
        _OBJECTIVES + "test_jsd_detached_is_exact_and_the_literal_form_counts_twice",
    ),
    _objective(
        "jsd",
        "the first term always carries gradient",
        'if self.teacher_term == "detached":',
        'if self.teacher_term == "never":',
        _OBJECTIVES + "test_jsd_detached_is_exact_and_the_literal_form_counts_twice",
    ),
    _objective(
        "topd",
        "the baseline is not subtracted",
        "reward = self.statistic(scores) - (self.baseline_value or 0.0)",
        "reward = self.statistic(scores)",
        _EQUATIONS,
    ),
    _objective(
        "topd",
        "alpha weighs the student",
        "stay = math.log1p(-self.alpha) if self.alpha < 1 else -math.inf",
        "stay = 0.0",
        _OBJECTIVES + "test_topd_moves_towards_a_proximal_teacher",
    ),
    _objective(
        "gopd",
        "the reward stops at the teacher",
        "reward = self.lambda_ * (scores.teacher_log_probs - reference) - (scores.student_log_probs - reference)",
        "reward = (scores.teacher_log_probs - reference) - (scores.student_log_probs - reference)",
        _OBJECTIVES + "test_gopd_goes_beyond_the_teacher",
    ),
    _objective(
        "reopold",
        "the floor follows from another bound",
        "return math.log(self.lambda_) / (1 - self.lambda_)",
        "return math.log(self.lambda_)",
        _OBJECTIVES + "test_reopold_floors",
    ),
    _objective(
        "reopold_2stage",
        "the second stage begins one step late",
        "return self.step < self.switch_step",
        "return self.step <= self.switch_step",
        _OBJECTIVES + "test_two_stages",
    ),
    _objective(
        "reopold_2stage",
        "divided by all tokens, not by the mask",
        "return self._bound(threshold=threshold, factor=statistics.numel() / kept if kept else 0.0)",
        "return self._bound(threshold=threshold, factor=1.0 if kept else 0.0)",
        _OBJECTIVES + "test_two_stages",
    ),
    _objective(
        "tropd_aopd",
        "negative tokens count twice",
        "return loss + self.aopd_coef * policy_gradient(scores, log_ratio(scores).clamp(min=0)), metrics",
        "return loss + self.aopd_coef * policy_gradient(scores, log_ratio(scores).clamp(max=0)), metrics",
        _EQUATIONS,
    ),
    # packing: which rank gets what
    _packing(
        "every data-parallel rank takes the same sequences",
        "owned = [sorted(rollouts[rank::ranks], key=lambda r: -r.length) for rank in range(ranks)]",
        "owned = [sorted(rollouts[0::ranks], key=lambda r: -r.length) for rank in range(ranks)]",
        _PACKING + "test_every_rank_has_as_many_and_together_they_have_all",
    ),
    _packing(
        "ranks have different numbers of micro-batches",
        "count = math.ceil(math.ceil(len(rollouts) / ranks) / size)",
        "count = math.ceil(len(rollouts[self.topology.data_rank :: ranks]) / size)",
        _PACKING + "test_every_rank_has_as_many_and_together_they_have_all",
    ),
    _packing(
        "a micro-batch forgets its step",
        "return lay_out(part, pad_id=self.pad_id, seed=self.seed, step=step, pad_to_multiple=multiple)",
        "return lay_out(part, pad_id=self.pad_id, seed=self.seed, step=0, pad_to_multiple=multiple)",
        _PACKING + "test_every_micro_batch_has_the_draws_of_its_seed_and_step",
    ),
    _packing(
        "a micro-batch forgets the run's seed",
        "return lay_out(part, pad_id=self.pad_id, seed=self.seed, step=step, pad_to_multiple=multiple)",
        "return lay_out(part, pad_id=self.pad_id, seed=0, step=step, pad_to_multiple=multiple)",
        _PACKING + "test_every_micro_batch_has_the_draws_of_its_seed_and_step",
    ),
    _packing(
        "the padding id is 0 whatever was asked",
        "return lay_out(part, pad_id=self.pad_id, seed=self.seed, step=step, pad_to_multiple=multiple)",
        "return lay_out(part, pad_id=0, seed=self.seed, step=step, pad_to_multiple=multiple)",
        _PACKING + "test_every_micro_batch_has_the_draws_of_its_seed_and_step",
    ),
    _packing(
        "widths do not divide under sequence parallelism",
        "multiple = topology.tensor_size if topology.sequence_parallel else 1",
        "multiple = 1",
        _PACKING + "test_widths_divide_under_sequence_parallelism_alone",
    ),
    _packing(
        "rows of other ranks",
        "return [[[rollouts[i] for i in b] for b in bins[rank::ranks]] for rank in range(ranks)]",
        "return [[[rollouts[i] for i in b] for b in bins[: len(bins) // ranks]] for rank in range(ranks)]",
        _PACKING + "test_every_rank_has_as_many_and_together_they_have_all",
    ),
    _packing(
        "a full row is refused",
        "if order and lengths[order[0]] > capacity:",
        "if order and lengths[order[0]] >= capacity:",
        _PACKING + "test_bins_are_evenly_filled",
    ),
    _packing(
        "rows overflow when spread evenly",
        "if load + lengths[i] > capacity:",
        "if load > capacity:",
        _PACKING + "test_bins_that_cannot_be_even_stay_within_capacity",
    ),
    # guidance: prefixes and requests
    _guidance(
        "prefixes come back after the end of the annealing",
        "if step >= total_steps:",
        "if total_steps <= 0:",
        _GUIDANCE + "test_annealing_follows_the_cosine_and_ends_at_nothing",
    ),
    _guidance(
        "the annealing ends at half",
        "return math.floor(longest * (1.0 + math.cos(math.pi * step / total_steps)) / 2.0)",
        "return math.floor(longest * (1.0 + math.cos(math.pi * step / total_steps / 2)) / 2.0)",
        _GUIDANCE + "test_annealing_follows_the_cosine_and_ends_at_nothing",
    ),
    _guidance(
        "the length's draw forgets the step",
        "key = np.array([seed & mask, step & mask], dtype=np.uint64)",
        "key = np.array([seed & mask, 0], dtype=np.uint64)",
        _GUIDANCE + "test_a_length_is_the_philox_word_of_its_seed_step_and_sequence",
    ),
    _guidance(
        "the length's draw forgets the seed",
        "key = np.array([seed & mask, step & mask], dtype=np.uint64)",
        "key = np.array([0, step & mask], dtype=np.uint64)",
        _GUIDANCE + "test_a_length_is_the_philox_word_of_its_seed_step_and_sequence",
    ),
    _guidance(
        "the length's draw is the gate's",
        "_STREAM = 1",
        "_STREAM = 0",
        _GUIDANCE + "test_a_length_is_the_philox_word_of_its_seed_step_and_sequence",
    ),
    _guidance(
        "all sequences share a length",
        "stream = np.random.Philox(key=key, counter=np.array([0, 0, sequence_id & mask, _STREAM], dtype=np.uint64))",
        "stream = np.random.Philox(key=key, counter=np.array([0, 0, 0, _STREAM], dtype=np.uint64))",
        _GUIDANCE + "test_a_length_is_the_philox_word_of_its_seed_step_and_sequence",
    ),
    _guidance(
        "the longest prefix is never drawn",
        "return int(uniform * (limit + 1))",
        "return int(uniform * limit)",
        _GUIDANCE + "test_uniform_draw_covers_the_range_evenly_and_depends_on_its_names_alone",
    ),
    _guidance(
        "a prefix may hold the end of sequence",
        "usable = len(response.response_ids) - int(response.finished)",
        "usable = len(response.response_ids)",
        _GUIDANCE + "test_a_prefix_stops_before_the_end_and_leaves_room_for_a_token",
    ),
    _guidance(
        "a prefix may leave the student nothing to say",
        "longest = min(annealed, self.max_new_tokens - 1) if self.responses is not None else 0",
        "longest = min(annealed, self.max_new_tokens) if self.responses is not None else 0",
        _GUIDANCE + "test_a_prefix_stops_before_the_end_and_leaves_room_for_a_token",
    ),
    _guidance(
        "a plan draws lengths as at step 0",
        "length = draw_prefix_length(limit, draw=self.prefix_draw, seed=self.seed, step=step, sequence_id=sequence_id)",
        "length = draw_prefix_length(limit, draw=self.prefix_draw, seed=self.seed, step=0, sequence_id=sequence_id)",
        _GUIDANCE + "test_a_plan_is_a_function_of_seed_step_prompt_and_sample",
    ),
    _guidance(
        "samples of a prompt share their seed",
        "seed=request_seed(self.seed, step, index, sequence_id),",
        "seed=request_seed(self.seed, step, index, 0),",
        _GUIDANCE + "test_a_plan_is_a_function_of_seed_step_prompt_and_sample",
    ),
    _guidance(
        "a request's seed forgets the step",
        "seed=request_seed(self.seed, step, index, sequence_id),",
        "seed=request_seed(self.seed, 0, index, sequence_id),",
        _GUIDANCE + "test_a_plan_is_a_function_of_seed_step_prompt_and_sample",
    ),
    _guidance(
        "a request's seed forgets the run's seed",
        "seed=request_seed(self.seed, step, index, sequence_id),",
        "seed=request_seed(0, step, index, sequence_id),",
        _GUIDANCE + "test_a_plan_is_a_function_of_seed_step_prompt_and_sample",
    ),
    _guidance(
        "guided responses may be longer than free ones",
        "max_new_tokens=self.max_new_tokens - len(prefix),",
        "max_new_tokens=self.max_new_tokens,",
        _GUIDANCE + "test_planned_prefixes_are_teacher_text_without_its_end",
    ),
    _guidance(
        "a later step's shorter prefix is all that is generated",
        "wanted[prompt.teachers_ids] = max(length, wanted.get(prompt.teachers_ids, 0))",
        "wanted[prompt.teachers_ids] = length",
        _GUIDANCE + "test_prefixes_from_responses_of_the_needed_length_are_those_of_complete_ones",
    ),
    _responses(
        "a continued response repeats its first draws",
        'text = f"{self._seed}/{key}" + (f"/{len(start)}" if start else "")',
        'text = f"{self._seed}/{key}"',
        _GUIDANCE + "test_a_response_is_as_long_as_needed_and_continued_when_more_is",
    ),
    _responses(
        "a response that has ended is continued",
        "if (r := self._responses.get(key)) is None or not (r.finished or len(r.response_ids) >= one.length)",
        "if (r := self._responses.get(key)) is None or len(r.response_ids) < one.length",
        _GUIDANCE + "test_a_response_is_as_long_as_needed_and_continued_when_more_is",
    ),
    # prompts: order, resume, held-out ones
    _prompts(
        "every epoch has the first one's order",
        "return [int(self._permutation(i // self.n)[i % self.n]) for i in range(first, first + size)]",
        "return [int(self._permutation(0)[i % self.n]) for i in range(first, first + size)]",
        _PROMPTS + "test_the_order_is_the_sorted_philox_stream_of_seed_and_epoch",
    ),
    _prompts(
        "a batch begins one step late",
        "first = step * size",
        "first = (step + 1) * size",
        _PROMPTS + "test_the_order_is_the_sorted_philox_stream_of_seed_and_epoch",
    ),
    _prompts(
        "large seeds share an order",
        "key = np.array([self.seed & (2**64 - 1), epoch], dtype=np.uint64)  # a list would pass through float64",
        "key = [self.seed & (2**64 - 1), epoch]",
        _PROMPTS + "test_the_order_is_the_sorted_philox_stream_of_seed_and_epoch",
    ),
    _prompts(
        "a resumed run does not notice other tokens",
        "found.update(json.dumps([p.id, p.answer, p.token_ids]).encode())",
        "found.update(json.dumps([p.id, p.answer]).encode())",
        _PROMPTS + "test_the_fingerprint_notices_each_part_of_a_prompt",
    ),
    _prompts(
        "a resumed run does not notice other answers",
        "found.update(json.dumps([p.id, p.answer, p.token_ids]).encode())",
        "found.update(json.dumps([p.id, p.token_ids]).encode())",
        _PROMPTS + "test_the_fingerprint_notices_each_part_of_a_prompt",
    ),
    _prompts(
        "a source begins anew in every epoch",
        "nth += epoch * self.places[source]",
        "nth += 0",
        _PROMPTS + "test_the_order_of_several_sources_is_made_of_philox_streams",
    ),
    _prompts(
        "copies of held-out texts stay in other sources",
        "left = set(own) - chosen.keys()",
        "left, chosen = set(own), {}",
        _PROMPTS + "test_a_text_held_out_of_one_source_is_trained_on_in_none",
    ),
    Fault(
        "prompts",
        "an answer at the end stays in the prompt",
        "nemo_tropd/data/conversations.py",
        'while asked and _role(asked[-1]) == "assistant":',
        "while not given:",
        ("tests/unit/test_conversations.py::test_a_last_answer_is_left_out_and_counted",),
    ),
    Fault(
        "prompts",
        "an answer of a role by another name stays in the prompt",
        "nemo_tropd/data/conversations.py",
        'return low if low in _KEPT and turn.get("role") is not None else _ROLES.get(low, name)',
        'return name if turn.get("role") is not None else _ROLES.get(low, name)',
        ("tests/unit/test_conversations.py::test_roles_are_known_by_their_other_names_in_openais_form_too[model]",),
    ),
    Fault(
        "prompts",
        "messages that are not read pass for read",
        "nemo_tropd/data/conversations.py",
        "named = [key for key in (keys.prompt, keys.answer, keys.teacher, keys.teacher_prompt) if key is not None]",
        "named = [key for key in (keys.prompt, keys.answer, keys.messages) if key is not None]",
        (_PROMPTS + "test_what_was_left_out_is_counted",),
    ),
    Fault(
        "prompts",
        "shards are read backwards",
        "nemo_tropd/data/sources.py",
        "files = [file for file in map(Path, sorted(matches)) if _suffix(file)]",
        "files = [file for file in map(Path, sorted(matches, reverse=True)) if _suffix(file)]",
        ("tests/unit/test_sources.py::test_a_clone_of_a_hub_data_set_is_read_by_its_splits",),
    ),
    Fault(
        "prompts",
        "ranks may hold out other prompts",
        "nemo_tropd/training/start.py",
        "for name in mine:",
        'for name in ("training",):',
        ("tests/unit/test_plan.py::test_ranks_that_read_other_prompts_are_named",),
    ),
    Fault(
        "resume",
        "all weights are read at every start",
        "nemo_tropd/training/start.py",
        'return checkpoint_fingerprint(path, responses_dir(cfg) / "fingerprints.json")',
        "return checkpoint_fingerprint(path)",
        (_START + "test_the_weights_are_read_at_the_first_start_alone",),
    ),
    Fault(
        "answers",
        "of several answers the first alone counts",
        "nemo_tropd/evaluation/answers.py",
        "return next((v for wanted in (True, False) for v in verdicts if v[0] is wanted), (None, None))",
        "return verdicts[0]",
        ("tests/unit/test_answers.py::test_any_of_several_answers_is_right",),
    ),
    # vocabulary: padding, shards
    _vocab(
        "padded columns take part",
        "return cls(start, max(0, min(true - rank * columns, columns)), true, group if size > 1 else None, columns)",
        "return cls(start, columns, true, group if size > 1 else None, columns)",
        _VOCAB + "test_log_probs_and_gradient",
    ),
    _vocab(
        "a repeated id gets one gradient only",
        "slope.scatter_add_(1, local[block], torch.where(owned[block], grad[block], 0.0))",
        "slope.scatter_(1, local[block], torch.where(owned[block], grad[block], 0.0))",
        _VOCAB + "test_log_probs_and_gradient",
    ),
    _vocab(
        "log-probabilities over the top k alone",
        "top_k_log_probs=(values - top[:, None]) - log_sum[:, None],",
        "top_k_log_probs=values.log_softmax(-1),",
        _VOCAB + "test_top_k",
    ),
    _vocab(
        "the block of a winning column is taken from another row",
        "rows = winners + blocks * torch.arange(count, device=values.device)[:, None]",
        "rows = winners",
        _VOCAB + "test_the_fast_top_k_is_the_plain_one",
    ),
    # loss: the chunked head
    _loss(
        "chunks",
        "the sampled token overwrites its place in the top k",
        "slope.scatter_add_(1, self.softmax.local, torch.where(self.softmax.owned, grad, 0.0))",
        "slope.scatter_(1, softmax.local, torch.where(softmax.owned, grad, 0.0))",
        _EQUATIONS,
    ),
    _loss(
        "chunks",
        "the softmax's share of the gradient is left out",
        "slope = softmax.exponentials.mul_((-grad.sum(-1) / softmax.denominator)[:, None])",
        "slope = softmax.exponentials.mul_(0.0)",
        _EQUATIONS,
    ),
    _vocab(
        "the student's entropy has the wrong sign",
        "entropy=log_sum + packed[:, 1] / denominator if entropy else None,",
        "entropy=log_sum - packed[:, 1] / denominator if entropy else None,",
        _HEAD + "test_first_pass_gives_what_the_objective_sees",
        _EQUATIONS,
    ),
    _vocab(
        "each shard has a maximum of its own",
        "shard.reduce(top, ReduceOp.MAX)",
        "shard.reduce(top.clone(), ReduceOp.MAX)",
        _SHARDS,
        slow=True,
    ),
    _vocab(
        "each shard has a sum of its own",
        "shard.reduce(packed, ReduceOp.SUM)",
        "shard.reduce(packed.clone(), ReduceOp.SUM)",
        _SHARDS,
        slow=True,
    ),
    _loss(
        "chunks",
        "a token of another shard counts as column 0",
        "slope.scatter_add_(1, self.softmax.local, torch.where(self.softmax.owned, grad, 0.0))",
        "slope.scatter_add_(1, softmax.local, grad)",
        _SHARDS,
        slow=True,
    ),
    _loss(
        "inputs",
        "the hidden gradient is not summed over shards",
        "dist.all_reduce(grad, group=self.group)",
        "pass",
        _SHARDS,
        slow=True,
    ),
    _loss(
        "inputs",
        "gathered hidden states are read in another order",
        "index = (position // part) * (batch * part) + row * part + position % part",
        "index = rows",
        _SHARDS,
        slow=True,
    ),
    _loss(
        "weight_gradient",
        "only the last chunk's weight gradient is kept",
        "torch.mm(slope.t(), states, out=self._true) if self._fresh else self._true.addmm_(slope.t(), states)",
        "torch.mm(slope.t(), states, out=self._true)",
        _EQUATIONS,
    ),
    _loss(
        "call",
        "the scale is left out of the gradient",
        "total = (loss * scale).sum()",
        "total = loss.sum()",
        _EQUATIONS,
    ),
    _loss(
        "call",
        "metrics count the teacher's tokens, too",
        "self.sums = {name: torch.where(student, v, 0).double().sum() for name, v in self.per_token.items()}",
        "self.sums = {name: v.double().sum() for name, v in self.per_token.items()}",
        _HEAD + "test_metrics_are_sums_over_student_tokens",
    ),
    _objective(
        "exact",
        "the policy gradient has no baseline",
        "return (log_p.exp() * sums[:, :1]).sub_(self.weights(log_p, log_q))",
        "return -self.weights(log_p, log_q)",
        _EXACT + "test_the_twins_mean",
    ),
    _objective(
        "exact",
        "0 log 0 is not a number",
        "return values.mul_(p).masked_fill_(p == 0, 0.0)",
        "return values.mul_(p)",
        _EXACT + "test_a_teacher_that_rules_tokens_out",
    ),
    _objective(
        "tropd_exact",
        "the threshold's expectation leaves ties out",
        'return ratio, (ratio >= 0).to(ratio.dtype) if self.gate == "threshold" else ratio.clamp(max=0).exp_()',
        'return ratio, (ratio > 0).to(ratio.dtype) if self.gate == "threshold" else ratio.clamp(max=0).exp_()',
        _EXACT + "test_equal_models_have_nothing_to_learn",
    ),
    _loss(
        "chunks",
        "an infinite value reaches the gradient of a prefix token",
        "slope = slope.mul_(exact[:, None]).masked_fill_((exact == 0)[:, None], 0.0)",
        "slope = slope.mul_(exact[:, None])",
        _EXACT + "test_the_reverse_kl_is_infinite_where_the_teacher_rules_out_what_the_student_does_not",
    ),
    _loss(
        "chunks",
        "an exact objective's sums are this shard's alone",
        "sums = self.shard.reduce(objective.sums(log_p, log_q).contiguous(), ReduceOp.SUM)",
        "sums = objective.sums(log_p, log_q).contiguous()",
        _SHARDS,
        slow=True,
    ),
    _loss(
        "head",
        "long sequences weigh more than short ones",
        "return global_tokens / (global_sequences * lengths.double())",
        "return global_tokens / (global_sequences * lengths.double().mean().expand(lengths.shape))",
        _HEAD + "test_sequence_means",
    ),
    _loss(
        "head",
        "the outer gradient is forgotten",
        "scale_in_place(grad_hidden, grad_output)",
        "pass",
        _HEAD + "test_outer_gradient_scales_both_and_is_used_once",
    ),
    _loss(
        "divergence",
        "the teacher's overlap is a union",
        "sums = shard.reduce(torch.stack([*kl, torch.minimum(s, t).sum(-1), *entropies]), ReduceOp.SUM)",
        "sums = shard.reduce(torch.stack([*kl, torch.maximum(s, t).sum(-1), *entropies]), ReduceOp.SUM)",
        _HEAD + "test_exact_divergences",
    ),
    _loss(
        "divergence",
        "the reverse KL is weighed by the teacher",
        "kl = [(s * (log_s - log_t)).sum(-1), (t * (log_t - log_s)).sum(-1)]",
        "kl = [(t * (log_s - log_t)).sum(-1), (t * (log_t - log_s)).sum(-1)]",
        _HEAD + "test_exact_divergences",
    ),
    _loss(
        "divergence",
        "every best token is the teacher's",
        "same = (best[0] == best[1]).to(sums.dtype)",
        "same = (best[1] == best[1]).to(sums.dtype)",
        _HEAD + "test_exact_divergences",
    ),
    # optimizer
    _optimizer(
        "gradients are never clipped",
        "clip_grad=clip,",
        "clip_grad=0.0,",
        _OPTIMIZER + "test_steps_are_those_of_clipped_adamw",
    ),
    _optimizer(
        "the rate falls along another line",
        "lr_decay_style=cfg.sched.name,",
        'lr_decay_style="linear",',
        _OPTIMIZER + "test_steps_are_those_of_clipped_adamw",
    ),
    _optimizer(
        "norms and biases decay, too",
        "[model],",
        "[model], config_overrides={},",
        _OPTIMIZER + "test_steps_are_those_of_clipped_adamw",
    ),
    _optimizer(
        "another first moment",
        "adam_beta1=cfg.betas[0],",
        "adam_beta1=cfg.betas[1],",
        _OPTIMIZER + "test_steps_are_those_of_clipped_adamw",
    ),
    _optimizer(
        "another epsilon", "adam_eps=cfg.eps,", "adam_eps=1e-2,", _OPTIMIZER + "test_steps_are_those_of_clipped_adamw"
    ),
    _optimizer(
        "no warm-up",
        "lr_warmup_steps=cfg.sched.warmup_steps,",
        "lr_warmup_steps=0,",
        _OPTIMIZER + "test_steps_are_those_of_clipped_adamw",
    ),
    _optimizer(
        "the rate never falls to its least",
        "lr_decay_steps=max(cfg.sched.decay_steps or max_steps, cfg.sched.warmup_steps + 1)",
        "lr_decay_steps=2 * max_steps",
        _OPTIMIZER + "test_steps_are_those_of_clipped_adamw",
    ),
    _optimizer(
        "the schedule counts calls, not steps",
        "self.schedule.num_steps = step",
        "pass",
        _OPTIMIZER + "test_a_resumed_schedule_goes_by_the_step",
    ),
    _optimizer(
        "a gradient that is not finite is applied",
        "if not math.isfinite(grad_norm):",
        "if grad_norm < 0:",
        _OPTIMIZER + "test_a_gradient_that_is_not_finite_changes_nothing",
    ),
    _optimizer(
        "an infinite gradient is applied, only NaN is not",
        "if not math.isfinite(grad_norm):",
        "if math.isnan(grad_norm):",
        _OPTIMIZER + "test_a_gradient_that_is_not_finite_changes_nothing",
    ),
    # resume: what a checkpoint restores and refuses
    _settings(
        "other settings are accepted",
        "if key in accepted and key not in _FIXED:",
        "if key not in _FIXED:",
        _CHECKPOINT + "test_a_run_of_other_settings_may_not_resume",
    ),
    _settings(
        "models are compared by their paths",
        'return value["digest"] if isinstance(value, dict) and "digest" in value else value',
        'return value["path"] if isinstance(value, dict) and "digest" in value else value',
        _RESUMED + "test_models_are_known_by_their_content",
    ),
    _settings(
        "the optimizer's kind may change",
        '_FIXED = ("trainer.precision", "model.optim.name", "model.optim.distributed")',
        '_FIXED = ("model.optim.distributed",)',
        _RESUMED + "test_an_optimizer_resumes_to_the_bit",
    ),
    _settings(
        "a raised max_steps rewinds the prefixes",
        "same = saved is not None and saved.settings.get(_ANNEAL_FRACTION) == guidance.anneal_fraction",
        "same = False",
        _RESUMED + "test_a_raised_max_steps_rewinds_neither_rate_nor_prefixes",
    ),
    _optimizer(
        "a resumed run keeps the checkpoint's learning rate",
        "group.update(settings)",
        "pass",
        _RESUMED + "test_a_new_learning_rate_is_used_and_said",
    ),
    _optimizer(
        "a resumed run looks for states of its new rates",
        'group.update({k: groups[0][k] for k in ("max_lr", "min_lr") if k in groups[0]})',
        "pass",
        "tests/contract/test_pinned_megatron.py::test_checkpoints_and_configs_are_those_of_the_pinned_megatron",
    ),
    Fault(
        "resume",
        "a checkpoint's copies are page-locked",
        "nemo_tropd/training/checkpoint_writer.py",
        "setattr(FileSystemWriterAsync, _COPYING, staticmethod(_to_host))",
        "pass",
        (_CHECKPOINT + "test_a_checkpoint_leaves_no_page_locked_memory_behind",),
    ),
    _optimizer(
        "nothing is saved for an optimizer before its first step",
        "self.make_states()",
        "pass",
        _RESUMED + "test_a_run_that_has_applied_no_step_resumes",
    ),
    _optimizer(
        "all parameters of a distributed optimizer count in one tensor",
        'entry["step"] = entry["step"].clone()  # Megatron gives all parameters one tensor to count in',
        "pass",
        "tests/dist/test_resume.py::test_a_run_of_four_ranks_resumes_everywhere",
    ),
    _optimizer(
        "the last step of a decay is lost",
        "+ (cfg.sched.min_lr == 0),",
        ",",
        _RESUMED + "test_a_single_step_of_a_decaying_schedule_learns",
    ),
    Fault(
        "resume",
        "every copy of an optimizer's states is taken for a copy of another rank's",
        "nemo_tropd/training/optimizer_shards.py",
        "replica = (*whole.replica_id[:-1], 0)",
        "replica = whole.replica_id",
        (_OWN_STATES,),
        slow=True,
    ),
    Fault(
        "resume",
        "an incomplete row is taken for a complete one",
        "nemo_tropd/training/optimizer_shards.py",
        "row, column = divmod(begin + done, columns)",
        "row, column = (begin + done) // columns, 0",
        ("tests/unit/test_optimizer_shards.py::test_a_range_of_a_matrix_is_cut_at_its_rows",),
    ),
    _resume(
        "older checkpoints go before the new one is on the disk",
        "finish_folder(temporary, final)",
        "temporary.rename(final)",
        _CHECKPOINT + "test_everything_is_on_the_disk_before_an_older_checkpoint_goes",
    ),
    _resume(
        "a checkpoint that lost its files is finished",
        "if not (temporary / name).is_file():",
        "if False:",
        _CHECKPOINT + "test_a_checkpoint_whose_files_are_gone_is_not_finished",
    ),
    _resume(
        "a checkpoint that ranks lost each other over is called damaged",
        "if any(map(failed_collective, causes)):  # a rank is gone, or too slow",
        "if False:",
        _CHECKPOINT + "test_only_a_checkpoints_own_fault_is_called_damage",
    ),
    _resume(
        "Megatron's process stays beside the rank",
        "write_in_this_process()",
        "pass",
        _CHECKPOINT + "test_the_newest_complete_checkpoints_are_kept_and_the_rest_removed",
    ),
    Fault(
        "resume",
        "metrics may be lost though their checkpoint is there",
        "nemo_tropd/training/trainer.py",
        "self.log.sync()  # a checkpoint's steps are in the metrics, also after a power loss",
        "pass",
        (_CHECKPOINT + "test_metrics_are_on_the_disk_before_the_checkpoint_of_their_steps",),
    ),
    Fault(
        "resume",
        "every end of a trainer sends its engine hosts away",
        "nemo_tropd/rollout/collective.py",
        "self._engine.close(run_over=run_over)",
        "self._engine.close(run_over=True)",
        (_RESUMED + "test_a_stop_right_after_a_checkpoint_saves_nothing_twice",),
        slow=True,
    ),
    Fault(
        "resume",
        "a rank outlives its torchrun",
        "examples/train_tropd.py",
        "die_with_parent()  # torchrun: ranks must not train on without it",
        "pass",
        ("tests/unit/test_supervise.py::test_a_rank_and_an_agent_end_with_who_started_them",),
    ),
    Fault(
        "resume",
        "a second run is let in",
        "nemo_tropd/training/run_lock.py",
        "return fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)",
        "return fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)",
        (_RESUMED + "test_a_second_run_in_the_directory_is_refused",),
        slow=True,
    ),
    Fault(
        "resume",
        "the oldest checkpoint is taken",
        "nemo_tropd/training/checkpoint.py",
        "for path in reversed(found):",
        "for path in found:",
        ("tests/e2e/test_training.py::test_half_written_checkpoint_is_never_loaded",),
        slow=True,
    ),
    _resume(
        "moments start anew",
        'optimizer.load_state_dict(loaded["optimizer"])',
        "pass",
        _CHECKPOINT + "test_a_resumed_student_takes_the_steps_of_one_that_went_on",
    ),
    _resume(
        "a resumed run repeats a step",
        'saved = loaded["run_state"]',
        'saved = {**loaded["run_state"], "step": loaded["run_state"]["step"] - 1}',
        _CHECKPOINT + "test_a_resumed_student_takes_the_steps_of_one_that_went_on",
    ),
    _resume(
        "what a killed run left is taken for complete",
        '_NAME = re.compile(r"step_(\\d{8})")',
        '_NAME = re.compile(r".*step_(\\d{8})")',
        _CHECKPOINT + "test_the_newest_complete_checkpoints_are_kept_and_the_rest_removed",
    ),
    _resume(
        "what a killed run left stays",
        'for path in self.dir.glob(".tmp-*") if self.dir.is_dir() else ():',
        'for path in self.dir.glob("tmp-*") if self.dir.is_dir() else ():',
        _CHECKPOINT + "test_the_newest_complete_checkpoints_are_kept_and_the_rest_removed",
    ),
    # planner: what a plan counts
    _plan(
        "memory",
        "an FP8 teacher's bf16 weights are forgotten",
        "narrow += width  # Transformer Engine keeps the cast weights beside those they are cast from",
        "pass",
        "test_memory_falls_where_a_setting_promises_so",
    ),
    _plan(
        "memory",
        "CUDA graphs lie within the engine's share",
        'resident["engine asleep"] = graphs',
        'resident["engine asleep"] = 0.0',
        "test_memory_falls_where_a_setting_promises_so",
    ),
    _plan(
        "engine",
        "an engine's weights take no room",
        "free = engine_bytes(cfg, student, machine) - weights - ENGINE_WORKSPACE",
        "free = engine_bytes(cfg, student, machine) - ENGINE_WORKSPACE",
        "test_an_engine_holds_what_its_weights_leave_of_its_share",
    ),
    _plan(
        "seconds",
        "one wave takes as long as all",
        "return turns * r.max_new_tokens * each + prompts / load.tensor / rates.FLOPS",
        "return r.max_new_tokens * each + prompts / load.tensor / rates.FLOPS",
        "test_waves_of_responses_follow_one_another",
    ),
    _plan(
        "host",
        "every rank copies all states to its host",
        "written = checkpoint_bytes(cfg, numbers) / layout(cfg).data",
        "written = checkpoint_bytes(cfg, numbers)",
        "test_a_host_holds_what_its_ranks_write",
    ),
    # ways: who trains, who generates, and how long a step then takes
    _way(
        "ways",
        "a way that does not fit is the best",
        "return min((way for way in found if not way.refusal), key=lambda way: way.seconds, default=None)",
        "return min(found, key=lambda way: way.seconds, default=None)",
        "test_ways_that_do_not_fit_say_why_and_are_not_chosen",
    ),
    _way(
        "ways",
        "advice that shorter responses turn around",
        "holds = [way for way in found if work.pace(way.cfg, rates.SHORTER).seconds <= before]",
        "holds = found",
        "test_advice_that_shorter_responses_turn_around_is_not_given",
    ),
    _way(
        "ways",
        "complete nodes alone train",
        "yield from ((1, devices) for devices in range(1, min(gpus, node)))",
        "yield from ()",
        "test_a_faster_way_is_named_with_its_keys_reason_and_cost",
    ),
    _way(
        "ways",
        "engines on a node that trains take no memory of its host",
        "beside = min(engines, node - devices) if nodes == 1 else 0",
        "beside = 0",
        "test_engines_on_the_ranks_own_host_take_its_memory",
    ),
    _way(
        "pace",
        "one step ahead a step takes the shorter of both",
        "shorter = min(in_order.engines, in_order.trainer)",
        "shorter = max(in_order.engines, in_order.trainer)",
        "test_a_recipe_for_two_nodes_is_the_best_way_on_them",
    ),
    _way(
        "pace",
        "a process on rank 0's GPU works beside it for nothing",
        'if where != "dedicated":',
        'if where == "colocated":',
        "test_a_process_on_the_ranks_gpu_gains_nothing_by_working_ahead",
    ),
    _way(
        "pace",
        "the teacher is hidden behind the last wave, too",
        "before_the_last = 1 - length / engine_load(cfg, student, machine).waves",
        "before_the_last = 1.0",
        "test_an_early_teacher_is_hidden_behind_all_waves_but_the_last",
    ),
    _way(
        "seconds",
        "the longest response is as short as the mean",
        "turns = max(1.0, math.ceil(load.sequences / at_once) * length)",
        "turns = math.ceil(load.sequences / at_once) * length",
        "test_a_single_response_of_the_greatest_length_is_waited_for",
    ),
    Fault(
        "ways",
        "a plan does not name the faster way",
        "nemo_tropd/training/plan.py",
        "said = [cache, *time_lines(cfg, plan.student, time), *way_lines(cfg, plan.work)]",
        "said = [cache, *time_lines(cfg, plan.student, time)]",
        ("tests/unit/test_planner.py::test_a_plan_that_is_not_the_fastest_names_the_one_that_is",),
    ),
    # conversion: names, layouts, shards
    _convert(
        "layouts",
        "queries, keys and values are not interleaved by group",
        "groups = [t.reshape(shape.kv_heads, -1, *t.shape[1:]) for t in tensors]",
        "groups = [t.reshape(1, -1, *t.shape[1:]) for t in tensors]",
        "tests/unit/test_layouts.py::test_queries_keys_and_values_are_interleaved_by_group",
    ),
    _convert(
        "layouts",
        "gate and up are exchanged on the way back",
        "yield from zip(names, full.chunk(2), strict=True)",
        "yield from zip(names, full.chunk(2)[::-1], strict=True)",
        _CONVERT + "test_round_trip_keeps_every_byte",
    ),
    _vocab(
        "the teacher's own log-probability is a logit",
        "log_probs=(parts[..., fixed:].sum(0) - top[:, None]) - log_sum[:, None],",
        "log_probs=parts[..., fixed:].sum(0) - top[:, None],",
        _HEAD + "test_teacher_scores",
    ),
    _vocab(
        "the teacher's entropy forgets the shards' maxima",
        "entropy=log_sum + (parts[..., 2] * shift.exp() - sums * shift).sum(0) / denominator if entropy else None,",
        "entropy=log_sum - (parts[..., 2] * shift.exp() - sums * shift).sum(0) / denominator if entropy else None,",
        _HEAD + "test_teacher_scores",
    ),
    _loss(
        "weight_gradient",
        "the main gradient is replaced, not added to",
        "total.add_(part * factor)",
        "total.copy_(part * factor)",
        _HEAD + "test_main_gradients_add_up_over_micro_batches",
    ),
    _loss(
        "head",
        "DDP is not told that the gradient is in its buffer",
        "weight.grad_added_to_main_grad = True",
        "weight.grad_added_to_main_grad = False",
        _HEAD + "test_main_gradients_add_up_over_micro_batches",
    ),
    _loss(
        "call",
        "token weights of another chunk",
        "loss = loss * self.options.token_weights[chunk].to(loss.dtype)",
        "loss = loss * self.options.token_weights[: loss.numel()].to(loss.dtype)",
        _HEAD + "test_token_weights_go_with_their_tokens",
    ),
    # step: what the loop asks of its parts
    _step(
        "the prompts are always the first step's",
        "indices = self.order.batch(step, m.global_batch_size // m.rollout.samples_per_prompt)",
        "indices = self.order.batch(0, m.global_batch_size // m.rollout.samples_per_prompt)",
        _STEP + "test_the_requests_are_those_of_the_steps_prompts",
    ),
    _step(
        "a prompt for every sample",
        "indices = self.order.batch(step, m.global_batch_size // m.rollout.samples_per_prompt)",
        "indices = self.order.batch(step, m.global_batch_size)",
        _STEP + "test_the_requests_are_those_of_the_steps_prompts",
    ),
    _step(
        "the prompts' order forgets the seed",
        "self.order = prompts.order(model.settings.seed)",
        "self.order = prompts.order(0)",
        _STEP + "test_the_requests_are_those_of_the_steps_prompts",
    ),
    _step(
        "requests are planned for the first step",
        "return self.guidance.plan([self.prompts[i] for i in indices], step, prompt_indices=indices)",
        "return self.guidance.plan([self.prompts[i] for i in indices], 0, prompt_indices=indices)",
        _STEP + "test_the_requests_are_those_of_the_steps_prompts",
    ),
    _step(
        "places in the batch for places in the data",
        "return self.guidance.plan([self.prompts[i] for i in indices], step, prompt_indices=indices)",
        "return self.guidance.plan([self.prompts[i] for i in indices], step)",
        _STEP + "test_the_requests_are_those_of_the_steps_prompts",
    ),
    _step(
        "losses are divided by a rank's own tokens",
        "loss_tokens=sum(r.loss_tokens for r in rollouts),",
        "loss_tokens=sum(b.count_loss_tokens for b in batches),",
        _STEP + "test_losses_are_divided_by_the_global_batch",
    ),
    _step(
        "sequences without a loss token count",
        "sequences=sum(r.loss_tokens > 0 for r in rollouts),",
        "sequences=len(rollouts),",
        _STEP + "test_losses_are_divided_by_the_global_batch",
    ),
    _step(
        "micro-batches are packed for the first step",
        "batches = self.packer.pack(rollouts, step, self.prompts)",
        "batches = self.packer.pack(rollouts, 0, self.prompts)",
        _STEP + "test_the_gates_draws_are_the_steps",
    ),
    _step(
        "the schedule is one step late",
        "result = self.optimizer.step(step)",
        "result = self.optimizer.step(step + 1)",
        _STEP + "test_gradients_are_cleared_made_applied_and_numbered_in_this_order",
    ),
    _step(
        "the version is not raised",
        "model.finish_training_step(step + 1)",
        "model.finish_training_step(step)",
        _STEP + "test_gradients_are_cleared_made_applied_and_numbered_in_this_order",
    ),
    _step(
        "gradients of the step before stay",
        "self.optimizer.zero_grad()",
        "pass",
        _STEP + "test_gradients_are_cleared_made_applied_and_numbered_in_this_order",
    ),
    # weights: the stream to the engine
    _weights(
        "a stream that ends early passes",
        "missing = [name for name in shapes if name not in seen | optional]",
        "missing: list[str] = []",
        _STREAM + "test_a_stream_that_does_not_fit_is_refused_by_name",
    ),
    _weights(
        "a tensor may come twice",
        "if name in seen:",
        "if name is None:",
        _STREAM + "test_a_stream_that_does_not_fit_is_refused_by_name",
    ),
    _weights(
        "a transposed tensor passes",
        "if tuple(tensor.shape) != shapes[name]:",
        "if sorted(tensor.shape) != sorted(shapes[name]):",
        _STREAM + "test_a_stream_that_does_not_fit_is_refused_by_name",
    ),
    _weights(
        "weights keep the trainer's dtype",
        "held[name] = tensor.detach().to(dtype)",
        "held[name] = tensor.detach()",
        _STREAM + "test_buckets_hold_everything_once_cast_and_within_their_size",
    ),
    Fault(
        "weights",
        "a copy of the weights is rounded to what was there before",
        "nemo_tropd/rollout/weights/copies.py",
        "if held is None or (held.shape, held.dtype) != (tensor.shape, tensor.dtype):",
        "if held is None or held.shape != tensor.shape:",
        (_STREAM + "test_a_copy_of_the_weights_is_taken_anew_in_the_same_memory",),
    ),
    Fault(
        "weights",
        "every copy of the weights takes fresh memory",
        "nemo_tropd/rollout/weights/copies.py",
        "if held is None or (held.shape, held.dtype) != (tensor.shape, tensor.dtype):",
        "if True:",
        (_STREAM + "test_a_copy_of_the_weights_is_taken_anew_in_the_same_memory",),
    ),
    Fault(
        "weights",
        "parts of one tensor are saved as one",
        "nemo_tropd/rollout/weights/senders.py",
        "return there if there.untyped_storage().nbytes() == there.nbytes else there.clone()",
        "return there",
        (_STREAM + "test_parts_of_one_parameter_and_turned_ones_arrive",),
    ),
    _weights(
        "a bucket outgrows its size",
        "if held and held_bytes + size > bucket_bytes:",
        "if held and held_bytes > bucket_bytes:",
        _STREAM + "test_buckets_hold_everything_once_cast_and_within_their_size",
    ),
    _weights(
        "the last bucket is not sent",
        "if held:",
        "if False:",
        _STREAM + "test_buckets_hold_everything_once_cast_and_within_their_size",
    ),
    Fault(
        "weights",
        "seeds of requests run together",
        "nemo_tropd/training/guidance.py",
        'text = f"{run_seed}/{step}/{prompt_index}/{sample}".encode()',
        'text = f"{run_seed}{step}{prompt_index}{sample}".encode()',
        (_STREAM + "test_seeds_differ_in_every_argument",),
    ),
    # versions: which weights wrote a rollout
    Fault(
        "versions",
        "rollouts of newer weights pass",
        "nemo_tropd/rollout/engine.py",
        "if version is not None and r.weight_version != version:",
        "if version is not None and r.weight_version < version:",
        (_SUPERVISOR + "test_rollouts_of_other_weights_are_refused",),
        slow=True,
    ),
    _versions(
        "one restart a run, not a version",
        "if self._last == version:",
        "if self._last is not None:",
        _SUPERVISOR + "test_deaths_in_two_steps_are_each_forgiven",
    ),
    _versions(
        "restarts without end",
        "self._last = version",
        "pass",
        _SUPERVISOR + "test_a_second_death_in_one_step_is_an_error_on_every_rank",
    ),
    # training: several processes, or whole runs
    _several(
        "parallel/cpu",
        "every group has a device of its own, whose thread looks for work",
        "if key not in devices:",
        "if True:",
        "tests/dist/test_cpu_megatron.py::test_the_groups_of_a_rank_have_one_thread_that_looks_for_work",
    ),
    _several(
        "gpt/build",
        "gradients are averaged over data-parallel ranks",
        '"calculate_per_token_loss": True,',
        '"calculate_per_token_loss": False,',
        _LAYOUTS + "test_layout_takes_the_same_steps[tied-2]",
    ),
    _several(
        "model/student_pass",
        "losses are divided by a micro-batch's tokens",
        "scale=1.0 / divisor,",
        "scale=1.0 / max(len(tokens), 1),",
        _LAYOUTS + "test_micro_batches_change_nothing",
    ),
    _several(
        "gpt/build",
        "split parameters are not marked for the gradient's norm",
        "_mark_split_parameters(model, shape)",
        "pass",
        "tests/dist/test_cpu_megatron.py::test_shims_and_a_gradient_norm_that_counts_every_parameter_once",
    ),
    _several(
        "training/trainer",
        "a resumed run skips a step",
        "self.state = replace(self.state, step=saved.step, skipped_steps=skipped, skipped_in_a_row=in_a_row)",
        "self.state = replace(self.state, step=saved.step + 1, skipped_steps=skipped, skipped_in_a_row=in_a_row)",
        "tests/dist/test_loop.py::test_the_order_of_a_step_and_a_run_killed_between_rollout_and_update",
    ),
    _convert(
        "layouts",
        "a rank's up rows lie above its gate rows",
        "return [_block(full, 0, half * shape.ffn + rank * part, part) for half in (0, 1)]",
        "return [_block(full, 0, half * shape.ffn + rank * part, part) for half in (1, 0)]",
        "tests/unit/test_layouts.py::test_each_rank_holds_its_rows_of_gate_above_its_rows_of_up",
    ),
    _convert(
        "layouts",
        "a rank's gate and up are one block",
        "return [_block(full, 0, half * shape.ffn + rank * part, part) for half in (0, 1)]",
        "return [_block(full, 0, rank * 2 * part, 2 * part)]",
        "tests/unit/test_layouts.py::test_each_rank_holds_its_rows_of_gate_above_its_rows_of_up",
    ),
    _convert(
        "layouts",
        "padding is not cut from the vocabulary",
        "return torch.cat(list(shards))[: shape.vocab_size]",
        "return torch.nn.functional.pad(torch.cat(list(shards)), (0, 0, 0, 1))",
        "tests/unit/test_layouts.py::test_the_ranks_parts_make_the_tensors_again",
    ),
    _convert(
        "families",
        "the gate is a second copy of up",
        '_L + "mlp.gate_proj.weight ffn hidden",',
        '_L + "mlp.up_proj.weight ffn hidden",',
        "tests/unit/test_layouts.py::test_each_rank_holds_its_rows_of_gate_above_its_rows_of_up",
    ),
    Fault(
        "conversion",
        "long waves of Llama 3's rotary are not stretched",
        "nemo_tropd/gpt/rope.py",
        "scaled = torch.where(turns < scaling.low_freq_factor, frequencies / scaling.factor, blended)",
        "scaled = torch.where(turns < scaling.low_freq_factor, frequencies, blended)",
        ("tests/unit/test_layouts.py::test_rotary_frequencies_are_scaled_as_transformers_scales_them",),
    ),
    Fault(
        "conversion",
        "the blend of Llama 3's rotary is turned round",
        "nemo_tropd/gpt/rope.py",
        "blended = (1 - blend) * frequencies / scaling.factor + blend * frequencies",
        "blended = blend * frequencies / scaling.factor + (1 - blend) * frequencies",
        ("tests/unit/test_layouts.py::test_rotary_frequencies_are_scaled_as_transformers_scales_them",),
    ),
    _convert(
        "config_json",
        "unknown keys are taken",
        "if unknown:",
        "if unknown and not modelled:",
        "tests/unit/test_config_json.py::test_what_may_change_the_function_is_refused_by_name",
    ),
    _convert(
        "config_json",
        "a number that is no float is taken",
        "if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= most:",
        "if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:",
        "tests/unit/test_config_json.py::test_what_may_change_the_function_is_refused_by_name",
    ),
    _convert(
        "weight_files",
        "files beside the single one are taken",
        "if stray := [path.name for path in present if path != single]:",
        "if stray := [path.name for path in present if path == index]:",
        "tests/unit/test_weight_files.py::test_the_plan_refuses_weights_that_it_cannot_take",
    ),
    _convert(
        "hf_files",
        "a stored head is taken for the embedding",
        "if shape.tied and _HEAD in shapes:",
        "if not shape.tied and _HEAD not in shapes:",
        "tests/unit/test_weight_files.py::test_the_plan_refuses_weights_that_it_cannot_take",
    ),
    _convert(
        "rope",
        "yarn's magnitude is left to vLLM",
        'rope |= {"attn_factor": scaling.attention_factor, "apply_yarn_scaling": False}',
        'rope |= {"attn_factor": 1.0, "apply_yarn_scaling": True}',
        "tests/unit/test_config_json.py::test_vllm_is_told_what_its_versions_read_differently",
    ),
    Fault(
        "conversion",
        "yarn's magnitude multiplies scores once",
        "nemo_tropd/gpt/rope.py",
        "return None if factor == 1.0 else factor**2 / math.sqrt(shape.head_dim)",
        "return None if factor == 1.0 else factor / math.sqrt(shape.head_dim)",
        ("tests/unit/test_model_logits.py::test_logits_are_transformers_and_weights_come_back",),
    ),
    Fault(
        "conversion",
        "attention has the feed-forward part's biases",
        "nemo_tropd/gpt/specs.py",
        "if projection_bias != config.add_bias_linear:",
        "if projection_bias is None:",
        ("tests/unit/test_model_logits.py::test_logits_are_transformers_and_weights_come_back",),
    ),
    # sampling: what is sampled is what is trained on
    _loss(
        "sampled",
        "top-p drops the token that completes the mass",
        "kept = mass.cumsum(-1) - mass < sampling.top_p",
        "kept = mass.cumsum(-1) < sampling.top_p",
        _SAMPLED + "test_expected_gradients_are_those_of_the_distribution_that_was_sampled",
    ),
    _loss(
        "sampled",
        "the teacher's own tokens are cut, too",
        "sampled = torch.where(tokens.guided[chunk], own, own - torch.cat(members, 1).logsumexp(-1))",
        "sampled = own - torch.cat(members, 1).logsumexp(-1)",
        _SAMPLED + "test_expected_gradients_are_those_of_the_distribution_that_was_sampled",
    ),
    _loss(
        "sampled",
        "the sampled token counts twice",
        "among = ((kept.ids == ids) & kept.kept).any(-1)",
        "among = torch.zeros_like(tokens.guided[chunk])",
        _SAMPLED + "test_expected_gradients_are_those_of_the_distribution_that_was_sampled",
    ),
    _loss(
        "call",
        "the temperature is left out of the gradient",
        "scale = self.scale / self.layout.sampling.temperature",
        "scale = self.scale",
        _SAMPLED + "test_expected_gradients_are_those_of_the_distribution_that_was_sampled",
    ),
    _loss(
        "sampled",
        "a kept token in the teacher's top k has its gradient written twice",
        "return torch.cat([local[:, :-kept], last.masked_fill(repeat, -1)], 1), grad",
        "return local, grad",
        "tests/dist/test_head_kernels.py::test_kernels",
        slow=True,
    ),
    Fault(
        "sampling",
        "the teacher is scored at temperature 1",
        "nemo_tropd/teacher/scorer.py",
        "sampling, topology = Sampling(temperature), self.topology",
        "sampling, topology = Sampling(), self.topology",
        (_SAMPLED + "test_a_run_scores_all_its_models_as_it_samples",),
    ),
    # numbers: what is not finite is carried to every rank, named, and never used
    _numbers(
        "loss/head",
        "bad logits leave the gradients as they are",
        "for values in filter(torch.is_tensor, (losses, grad_hidden, grad_weight) if run.bad else ()):",
        "for values in filter(torch.is_tensor, (losses,) if run.bad else ()):",
        _BAD_NUMBERS + "test_bad_logits_of_the_student_make_loss_and_gradients_nan",
    ),
    _numbers(
        "loss/inputs",
        "bad scores of the teacher count only where the objective uses them",
        """causes = {"the teacher's logits": teacher.log_probs.isnan()}""",
        """causes = {"the teacher's logits": losses.isnan()}""",
        _BAD_NUMBERS + "test_bad_scores_of_the_teacher_count_though_the_objective_leaves_the_token_out",
    ),
    _numbers(
        "convert/hf_files",
        "only NaN weights are refused, infinite ones are loaded",
        "return bool(torch.stack(values.aminmax()).isfinite().all())  # NaN is both least and greatest",
        "return not bool(torch.stack(values.aminmax()).isnan().any())",
        _BAD_NUMBERS + "test_weights_that_are_not_finite_are_named_by_tensor",
    ),
    _numbers(
        "convert/fingerprint",
        "weights that are not finite are found after the teacher has generated",
        "check_finite(file)  # of pages that have just been read",
        "assert file",
        _START + "test_weights_that_are_not_finite_are_refused_before_anything_is_generated[nan-dtype0]",
    ),
    _numbers(
        "teacher/scorer",
        "the teacher's bytes are never compared",
        "self._checksums.check()  # an engine that shares the device has been awake since",
        "pass",
        _BAD_NUMBERS + "test_a_teachers_weight_that_changed_is_named_before_it_scores",
    ),
    # strangers: what comes from outside is neither run nor obeyed
    _strangers(
        "convert/metadata_file",
        "any class may be unpickled",
        "if name not in _ALLOWED.get(module, ()):",
        "if module == 'os':",
        _STRANGERS + "test_no_code_of_a_checkpoint_runs",
    ),
    _strangers(
        "convert/metadata_file",
        "any attribute may be taken where members of enumerations are read",
        "if not isinstance(kind, EnumType) or name not in kind.__members__:",
        "if not hasattr(kind, name):",
        _STRANGERS + "test_members_of_enumerations_are_read_as_any_python_writes_them",
    ),
    _strangers(
        "convert/metadata_file",
        "objects beside the weights are loaded as programs",
        'os.environ[_FORCE] = "1"',
        'os.environ[_FORCE] = "0"',
        _STRANGERS + "test_an_object_beside_the_weights_cannot_run_code",
    ),
    _strangers(
        "command_line",
        "control characters reach the terminal",
        'return "".join(c if c.isprintable() or c in "\\n\\t" else c.encode("unicode_escape").decode() for c in text)',
        "return text",
        _STRANGERS + "test_text_from_data_is_printed_as_it_is_and_obeyed_by_no_terminal",
    ),
    _strangers(
        "rollout/weights/senders",
        "another user's files are removed",
        "if found.st_uid == os.getuid() and time.time() - found.st_mtime > _STALE_AFTER_S:",
        "if time.time() - found.st_mtime > _STALE_AFTER_S:",
        _STRANGERS + "test_another_users_bucket_files_are_left_alone",
    ),
    _strangers(
        "evaluation/answers",
        "a stop reaches the judge before it is ready",
        "before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # inherited: the judge unblocks what it ignores",
        "before = signal.pthread_sigmask(signal.SIG_BLOCK, ())",
        "tests/unit/test_answers.py::test_a_stop_before_the_judge_is_ready_does_not_end_it",
    ),
    _tokens(
        "data/tokenizer",
        "a folder's label decides its ids",
        "made = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)",
        "made = AutoTokenizer.from_pretrained(folder, local_files_only=True)",
        _TOKENS + "test_a_byte_level_tokenizer_with_a_llama_label_keeps_its_spaces",
    ),
    _tokens(
        "data/tokenizer",
        "ids are not compared with tokenizer.json",
        "if ours != wanted:",
        "if not ours and wanted:",
        _TOKENS + "test_settings_that_contradict_the_file_are_refused_with_text_and_encodings",
    ),
    _tokens(
        "data/tokenizer",
        "the student samples ids that the teacher does not have",
        "size = min(max(mine) + 1, max(theirs) + 1, *rows)",
        "size = min(max(mine) + 1, *rows)",
        _TOKENS + "test_extra_tokens_at_the_end_are_never_sampled",
    ),
    _tokens(
        "data/tokenizer",
        "the teacher's end tokens are not the student's",
        "ids = {names[t] if isinstance(t, str) else t for t in given} or own[0] | own[1]",
        "ids = {names[t] if isinstance(t, str) else t for t in given} or own[0]",
        _TOKENS + "test_end_tokens_are_those_of_student_and_teacher",
    ),
    _tokens(
        "data/tokenizer",
        "what the student writes is scored as another token",
        "if _is_written(name, tokenizer):",
        "if _is_written(name, tokenizer) and i in end_ids:",
        _TOKENS + "test_a_token_that_responses_hold_may_not_mean_something_else",
    ),
    _tokens(
        "data/tokenizer",
        "a response may end with what the teacher knows as another token",
        "if i in end_ids:",
        "if i in end_ids[:1]:",
        _TOKENS + "test_a_token_that_responses_hold_may_not_mean_something_else",
    ),
    _tokens(
        "data/templates",
        "a template writes the day's date",
        '**{"strftime_now": date.fromisoformat(self.day).strftime, **self.kwargs},',
        "**self.kwargs,",
        _TEMPLATES + "test_a_date_in_the_template_is_the_same_on_every_day",
    ),
    _tokens(
        "training/run",
        "engines stop at their own folder's end tokens",
        "cfg.model.rollout.end_tokens = list(plan.end_ids)  # of both engines, and compared when the run is resumed",
        "assert plan.end_ids",
        _TOKENS_OF_A_RUN + "test_engines_cache_and_resume_get_the_plans_end_tokens",
    ),
    _tokens(
        "training/teacher_responses",
        "responses that stopped elsewhere are taken from the cache",
        'identity |= {"vocab_size": vocab_size, "end_ids": sorted(end_ids)}',
        'identity |= {"vocab_size": vocab_size}',
        _TOKENS_OF_A_RUN + "test_engines_cache_and_resume_get_the_plans_end_tokens",
    ),
    _tokens(
        "training/trainer",
        "a run whose rollouts never end says nothing",
        "if not said and self._unfinished_in_a_row == UNFINISHED_STEPS:",
        "if said and self._unfinished_in_a_row == UNFINISHED_STEPS:",
        _TOKENS_OF_A_RUN + "test_a_run_whose_rollouts_never_end_says_so_once",
    ),
    _tokens(
        "data/templates",
        "a last turn that the template leaves out is trained on",
        "if lost and lost[-1] is prompt.messages[-1]:",
        "if lost and lost[-1] is prompt.messages[-1] and not encoded:",
        _TEMPLATES + "test_turns_that_the_template_leaves_out_are_refused_or_counted",
    ),
    _tokens(
        "data/templates",
        "part of a variable's name passes for it",
        'if not re.search(rf"\\b{re.escape(name)}\\b", text):',
        "if name not in text:",
        _TEMPLATES + "test_what_the_template_does_not_read_is_said",
    ),
    _tokens(
        "data/tokenizer",
        "a tokenizer with dropout is taken",
        'if dropped := getattr(stored.model, "dropout", None):',
        'if dropped := getattr(stored.model, "fuse_unk", None):',
        _TOKENS + "test_a_tokenizer_that_encodes_by_chance_is_refused",
    ),
    _prompts(
        "a misspelt key of records is taken",
        "for key in [key for key in missed if has(raw, key)]:",
        "for key in list(missed):",
        _PROMPTS + "test_a_key_that_no_record_has_is_refused",
    ),
    _guidance(
        "prefixes are planned until but one prompt is used",
        "if length <= 0 or len(wanted) == every:  # prefixes get shorter: a prompt's first use needs the longest",
        "if length <= 0 or len(wanted) >= every - 1:",
        _GUIDANCE + "test_prefixes_from_responses_of_the_needed_length_are_those_of_complete_ones",
    ),
    Fault(
        "plan",
        "a run may write over its own models",
        "nemo_tropd/training/plan.py",
        "if Path(path).resolve().is_relative_to(directory.resolve()):",
        "if Path(path).resolve() == directory.resolve():",
        ("tests/unit/test_plan.py::test_a_model_in_the_run_directory_is_refused",),
    ),
    # gpu: what only a GPU would show
    _gpu(
        "teacher/offload",
        "casts of the weights stay on the device while the weights are away",
        'getattr(module, "_fp8_workspaces", {}).clear()  # the next pass makes them again',
        "pass",
        "tests/unit/test_fp8_offload.py::test_casts_of_the_weights_leave_with_them",
    ),
    _gpu(
        "loss/overlap",
        "the allocator does not know that the caller's stream reads what the side stream made",
        "tensor.record_stream(torch.cuda.current_stream(device))",
        "pass",
        "tests/unit/test_device_waits.py::test_the_allocator_knows_who_reads_what_the_side_stream_made",
    ),
    _gpu(
        "rollout/vllm/in_process",
        "the cache wakes before the weights",
        "self._wake(*_MEMORY)  # vLLM unmaps all memory at its end, and what sleeps is unmapped already",
        "self._wake(*sorted(_MEMORY))",
        "tests/unit/test_colocated.py::test_asleep_it_writes_nothing_until_it_is_refreshed",
    ),
    _gpu(
        "rollout/vllm/in_process",
        "a stream of vLLM's becomes the trainer's",
        "torch.cuda.set_stream(torch.cuda.current_stream())",
        "pass",
        _DEVICE + "test_the_trainers_stream_stays_current",
    ),
    _gpu(
        "rollout/vllm/in_process",
        "tensor-parallel workers are forked",
        '"VLLM_WORKER_MULTIPROC_METHOD": "spawn",',
        "",
        _DEVICE + "test_memory_that_has_no_ipc_handle_is_not_shared",
    ),
    _gpu(
        "rollout/vllm/in_process",
        "IPC handles are asked of expandable segments",
        'arguments["disable_custom_all_reduce"] = True',
        "pass",
        _DEVICE + "test_memory_that_has_no_ipc_handle_is_not_shared",
    ),
    _gpu(
        "rollout/vllm/generating",
        "prefixes of other weights stay cached",
        "if not llm.reset_prefix_cache():",
        "if llm.reset_prefix_cache() is None:",
        "tests/unit/test_colocated.py::test_prefixes_of_other_weights_are_never_used",
    ),
    _gpu(
        "rollout/vllm/in_process",
        "vLLM does not see expandable segments",
        'values["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"',
        "pass",
        _DEVICE + "test_vllm_sees_the_settings_that_torchs_allocator_goes_by",
    ),
    _gpu(
        "rollout/vllm/in_process",
        "blanks hide expandable segments",
        'return "expandable_segments:True" in "".join(given.split())',
        'return "expandable_segments:True" in given',
        _DEVICE + "test_memory_that_has_no_ipc_handle_is_not_shared",
    ),
    _gpu(
        "rollout/placement",
        "engines run without graphs on a GPU",
        "enforce_eager=not on_gpu,",
        "enforce_eager=True,",
        _TEACHERS_ENGINE + "test_the_teacher_has_a_nodes_gpus_to_itself",
    ),
    _gpu(
        "rollout/placement",
        "the teacher's engine has the rollouts' share of a GPU",
        'changes["gpu_memory_utilization"] = teacher_utilization(torch.cuda.mem_get_info()[1])',
        "pass",
        _TEACHERS_ENGINE + "test_the_teacher_has_a_nodes_gpus_to_itself",
    ),
    _gpu(
        "training/teacher_responses",
        "the prompts of one device are asked at a time",
        'batch=_BATCH["cuda"] * cfg.trainer.devices if on_gpu else _BATCH["cpu"],',
        'batch=_BATCH["cuda"] if on_gpu else _BATCH["cpu"],',
        _TEACHERS_ENGINE + "test_all_devices_are_asked_at_once",
    ),
    _gpu(
        "teacher/sharing",
        "states that travelled stay on the device",
        "return TeacherStates(kept(sent) if on_host else sent)",
        "return TeacherStates(sent)",
        "tests/unit/test_sharing.py::test_states_that_travel_are_kept_where_they_are_wanted",
    ),
    _gpu_check(
        "isolated",
        "uids of one name share torch's folder",
        "name_compiler_cache()",
        "pass",
        "test_the_compilers_cache_is_this_uids_own",
    ),
    Fault(
        "images",
        "precompiled headers are taken from whoever was first",
        "nemo_tropd/files.py",
        "if stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o022:",
        "if stat.S_ISDIR(found.st_mode):",
        ("tests/unit/test_files.py::test_what_another_uid_left_in_tmp_is_neither_used_nor_in_the_way",),
    ),
    _image(
        "pytorchjob.yaml",
        "a pod keeps nothing",
        "- {name: runs, mountPath: /workspace/runs}",
        "- {name: runs, mountPath: /workspace/outputs}",
        "test_what_containers_keep_lies_on_a_volume_that_outlives_them",
    ),
    _image(
        "compose.yaml",
        "a container keeps nothing",
        "- ${RUNS:-./runs}:/workspace/runs",
        "- ${RUNS:-./runs}:/workspace/outputs",
        "test_what_containers_keep_lies_on_a_volume_that_outlives_them",
    ),
    *(
        _plan(
            file,
            f"{file}: a teacher that answers benchmarks alone takes no memory",
            "if teacher_generates(cfg) and not all(of.model.teacher.url for of, _ in teachers):",
            "if cfg.model.data.held_out or cfg.model.tropd.guidance.enabled:",
            "test_the_teachers_engine_leaves_a_rank_its_context_and_itself_its_graphs",
        )
        for file in ("memory", "host")
    ),
    Fault(
        "planner",
        "the teacher's answers to benchmarks are not counted",
        "nemo_tropd/training/plan.py",
        "answers = [one.length for put in plan.benchmarks for one in put.of_teacher]",
        "answers: list[int] = []",
        ("tests/unit/test_plan.py::test_a_teacher_that_answers_benchmarks_alone_is_planned_for",),
    ),
    _plan(
        "verdict",
        "phases before the steps are not said",
        "for phase, parts in (*memory.before.items(), *memory.phases.items()):",
        "for phase, parts in memory.phases.items():",
        "test_a_recipes_plan_says_every_phase",
    ),
    _gpu(
        "rollout/vllm/in_process",
        "communicators are not left room",
        "free -= _COMMUNICATORS * several",
        "free -= 0",
        _DEVICE + "test_communicators_come_before_the_share",
    ),
    _gpu(
        "rollout/vllm/in_process",
        "vLLM warns of the trainer's kernels",
        "knobs.runtime.jit_post_compile_hook, knobs.autotuning.print = hook, shown",
        "pass",
        _DEVICE + "test_compiling_the_trainers_kernels_is_no_delay_of_inference",
    ),
    _gpu(
        "rollout/collective",
        "ranks start though one has no memory",
        "engine.check_room()",
        "pass",
        _DEVICE + "test_a_rank_without_memory_stops_all_before_any_starts",
    ),
    _gpu(
        "rollout/weights/senders",
        "NCCL's watchdog is as fast as our wait",
        "options._timeout = 2 * timeout",
        "options._timeout = timeout",
        "tests/unit/test_weight_group.py::test_our_wait_ends_before_nccls_watchdog",
    ),
    _gpu(
        "rollout/vllm/child",
        "dying workers are not waited for",
        "while session_members(process.pid) and time.monotonic() < until:",
        "while False:",
        _STREAM + "test_an_engine_has_ended_when_its_workers_have",
    ),
    _gpu(
        "loss/overlap",
        "a stream is made a call",
        "if device not in _side_streams:  # each is the next of torch's pool of 32, which others draw from, too",
        "if True:",
        "tests/unit/test_device_waits.py::test_the_side_stream_is_made_once",
    ),
    _evaluation(
        "statistics",
        "samples count as if they were problems",
        "return array if array.ndim == 1 else array.mean(axis=1)",
        "return array.ravel()",
        "test_statistics.py::test_the_error_is_that_of_problems",
    ),
    _evaluation(
        "graders/contract",
        "what was thought is graded",
        'return response.rpartition("</think>")[2].partition("<think>")[0]',
        "return response",
        "test_graders.py::test_choices",
    ),
    _evaluation(
        "graders/choice",
        "all samples see one order of options",
        "random.Random(sample_seed).shuffle(order)",
        "random.Random(0).shuffle(order)",
        "test_graders.py::test_options_are_shuffled_by_the_seed_and_votes_count_options",
    ),
    _evaluation(
        "graders/code",
        "a function that ends the program passes its checks",
        'passed = outcome.status == "ended" and outcome.code == 0 and outcome.stdout.endswith(f"\\n{mark}\\n")',
        'passed = outcome.status == "ended" and outcome.code == 0',
        "test_graders.py::test_a_function_is_checked",
    ),
    _evaluation(
        "graders/code",
        "a pickle may hold more than a text",
        "if len(texts) != 1 or not {name for name, _ in codes} <= _PICKLED:",
        "if not texts:",
        "test_graders.py::test_hidden_tests_that_are_no_text_are_named_and_not_unpickled",
    ),
    _evaluation(
        "sandbox_child",
        "programs have the machine's network",
        '_call("unshare", _NEWPID | _NEWNET | _NEWIPC | (0 if root else _NEWUSER))',
        '_call("unshare", _NEWPID | _NEWIPC | (0 if root else _NEWUSER))',
        "test_sandbox.py::test_no_connection_is_made",
    ),
    _evaluation(
        "sandbox_child",
        "without namespaces, what a program started outlives it",
        "if not isolated:",
        "if False:",
        "test_sandbox.py::test_what_is_started_and_left_ends_with_the_program",
    ),
    _gpu_check(
        "gpu_check/check",
        "what no longer fits is begun",
        "if check.seconds > left:",
        "if left < 0:",
        "test_a_failure_is_a_row_and_the_next_check_runs",
    ),
    _gpu_check(
        "gpu_check/check",
        "a check without rows is good",
        'failure = failure or ("" if count else "it measured nothing")',
        "pass",
        "test_a_failure_is_a_row_and_the_next_check_runs",
    ),
    _gpu_check(
        "isolated",
        "what a check started outlives it",
        "os.killpg(process.pid, signal.SIGKILL)",
        "pass",
        "test_a_failure_is_a_row_and_the_next_check_runs",
    ),
    _gpu_check(
        "isolated",
        "a check outlives the command",
        "die_with_parent()",
        "pass",
        "test_a_killed_command_leaves_its_rows_and_resumes",
    ),
    _gpu_check(
        "gpu_check/runs",
        "an engine with old weights passes",
        "mean is not None and mean <= MISMATCH and applied,",
        "mean is not None and applied,",
        "test_the_loops_check_rehearsed",
    ),
    _image(
        "entrypoint.sh",
        "the doctor looks at the image's own folder",
        'doctor) exec "$python" -m nemo_tropd.doctor "${@:2}" ;; # of the runs in the working directory',
        'doctor) cd "$here/.." && exec "$python" -m nemo_tropd.doctor "${@:2}" ;;',
        "test_the_doctor_looks_at_the_runs_where_a_container_starts",
    ),
    _image(
        "home.sh",
        "a home that cannot be written to is kept",
        'if ! mkdir -p "${HOME:=/}" 2> /dev/null || [[ $HOME == / || ! -w $HOME ]]; then',
        'if ! mkdir -p "${HOME:=/}" 2> /dev/null; then',
        "test_scripts_find_a_home_that_can_be_written_to",
    ),
    _image(
        "Dockerfile.cpu",
        "torch's CPU wheel is always asked of one index",
        '&& uv pip sync ${TORCH_BACKEND:+--torch-backend "$TORCH_BACKEND"} docker/requirements-cpu.txt',
        "&& uv pip sync --torch-backend cpu docker/requirements-cpu.txt",
        "test_torchs_cpu_wheel_may_come_from_elsewhere",
    ),
    _image(
        "Dockerfile.cpu",
        "the home is not on the volume",
        "ENV HOME=/opt/nemo_tropd/runs/.home USER=tropd",
        "ENV HOME=/home/tropd USER=tropd",
        "test_any_uid_has_a_home_on_the_volume_of_its_runs",
    ),
    _evaluation(
        "store",
        "a batch that was cut short stays, and the rest of it is asked for in another list",
        "if not complete:",
        "if False:",
        "test_evaluate.py::test_a_killed_evaluation_resumes_to_the_same_bytes_and_asks_nothing_twice",
    ),
    _evaluation(
        "store",
        "answers under other settings are taken for ours",
        "if ours.get(name) != theirs.get(name):",
        "if False:",
        "test_evaluate.py::test_another_model_is_another_file_and_its_answers_are_refused",
    ),
    _evaluation(
        "store",
        "two evaluations write one file",
        "fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)",
        "pass",
        "test_evaluate.py::test_one_evaluation_at_a_time_writes_a_file",
    ),
    _evaluation(
        "run",
        "answers cut at another length are taken for ours",
        '"max_new_tokens": b.max_new_tokens,',
        '"max_new_tokens": 0,',
        "test_evaluate.py::test_other_sampling_is_another_file",
    ),
    _evaluation(
        "problems",
        "every sample has the same seed",
        'text = f"{seed}/{benchmark}/{problem}/{sample}"',
        'text = f"{seed}/{benchmark}/{problem}"',
        "test_evaluate.py::test_seeds_are_of_benchmark_problem_and_sample_alone",
    ),
    _evaluation(
        "results",
        "a thought that the template opened counts as the answer",
        'opened, questions = "<think>" if model.thinks_at_once else "", task.questions[: len(answers)]',
        'opened, questions = "", task.questions[: len(answers)]',
        "test_evaluate.py::test_a_thought_that_the_template_opened_and_nothing_closed_is_no_answer",
    ),
    _evaluation(
        "models",
        "a Megatron checkpoint's hf/, which has no weights, is taken for a run's",
        'for folder, mark in ((path, "config.json"), (path, ".metadata"), (path / "hf", "config.json")):',
        'for folder, mark in ((path, "config.json"), (path / "hf", "config.json"), (path, ".metadata")):',
        "test_evaluate.py::test_runs_and_megatron_checkpoints_are_evaluated_as_their_hugging_face_folder",
    ),
    _evaluation(
        "statistics",
        "the interval at 0 of 30 has no width",
        "centre, half = p + z * z / (2 * n), z * float(np.sqrt(p * (1 - p) / n + z * z / (4 * n * n)))",
        "centre, half = p, z * float(np.sqrt(p * (1 - p) / n))",
        "test_statistics.py::test_an_interval_holds_where_nothing_is_right_or_everything",
    ),
    _evaluation(
        "statistics",
        "two models with nothing right differ by nothing, for certain",
        "if np.ptp(ours) == np.ptp(theirs) == 0 and n > 1:",
        "if False:",
        "test_statistics.py::test_an_interval_holds_where_nothing_is_right_or_everything",
    ),
    _evaluation(
        "graders/mentions",
        "a part of a word is the answer",
        "found = [a for a in answers if _words(a) in _words(response)]",
        "found = [a for a in answers if a.casefold() in response.casefold()]",
        "test_graders.py::test_an_answer_is_mentioned_as_whole_words",
    ),
    _several(
        "training/benchmarks",
        "a benchmark is sampled as the run is",
        "RolloutRequest(ids, [], q.seed, i, q.problem, limit, self.sampling)",
        "RolloutRequest(ids, [], q.seed, i, q.problem, limit)",
        _BENCHMARKS,
    ),
    _several(
        "training/trainer",
        "benchmarks come with every validation alone",
        "every = {HELD_OUT: often, BENCHMARKS: often if rare is None else rare}",
        "every = {HELD_OUT: often, BENCHMARKS: often}",
        _BENCHMARKS,
    ),
    _several(
        "training/teacher_responses",
        "the teacher's answer under one sampling counts for another",
        "named = list(prompt_ids) if sampling is None else [list(prompt_ids), asdict(sampling)]",
        "named = list(prompt_ids)",
        "tests/unit/test_guidance.py::test_a_sampling_of_its_own_is_another_response",
    ),
]
