"""What the pinned vLLM does to memory, streams and processes, as far as our engine relies on it or works around it.

The doubles of tests/unit/test_colocated.py enforce these conditions: where a test here fails, they are to follow.
"""

from __future__ import annotations

import re

from tests.contract.sources import Library
from tests.contract.test_contract import method_source, source

WORKER = ("vllm.v1.worker.gpu_worker", "Worker")
EXECUTOR = ("vllm.v1.executor.abstract", "Executor")


def module_source(library: Library, module: str) -> str:
    file = library.file(module)
    assert file is not None, f"there is no {module}"
    return file.read_text(encoding="utf-8")


def test_the_first_waking_after_a_deep_sleep_writes_to_the_weights_whatever_its_tags(library: Library) -> None:
    """So that ``_MEMORY`` wakes the weights first."""
    wake = method_source(library, *WORKER, "wake_up")
    restored, tagged = wake.index("if len(self._sleep_saved_buffers)"), wake.index("'kv_cache' in tags")
    assert wake.index("allocator.wake_up(tags)") < restored < tagged
    assert "buffer.data.copy_" in wake[restored:tagged] and "tags" not in wake[restored:tagged].split("if tags")[0]
    assert "self._sleep_saved_buffers = {name: buffer.cpu()" in method_source(library, *WORKER, "sleep")


def test_part_asleep_vllm_neither_sleeps_nor_generates(library: Library) -> None:
    """So that all is woken before a sleep, and both parts before requests."""
    sleep, wake = (method_source(library, *EXECUTOR, name) for name in ("sleep", "wake_up"))
    assert re.search(r"if self.is_sleeping:\n.*\n\s+return", sleep)
    assert re.search(r"if tag not in self.sleeping_tags:\n.*\n\s+return", wake)
    assert re.search(r"if not self.sleeping_tags:\n\s+self.is_sleeping = False", wake)
    resumed = method_source(library, "vllm.v1.engine.core", "EngineCore", "wake_up")
    assert re.search(r"if not self.model_executor.is_sleeping:\n\s+self.resume_scheduler\(\)", resumed)


def test_sleeping_memory_is_unmapped_and_freed_memory_unmapped_again(library: Library) -> None:
    """So that close() wakes all first: what is freed at the end of vLLM is unmapped by the allocator's callback."""
    allocator = ("vllm.device_allocator.cumem", "CuMemAllocator")
    assert "unmap_and_release(handle)" in method_source(library, *allocator, "sleep")
    assert "return data.handle" in method_source(library, *allocator, "_python_free_callback")
    pool = method_source(library, *WORKER, "_maybe_get_memory_pool_context")
    assert "allocator.get_current_usage() == 0" in pool  # one engine a process, while it sleeps or is awake


def test_a_sleep_asserts_that_the_whole_device_gained_memory(library: Library) -> None:
    """So that runs which share a GPU must not sleep: the GPU check has one after the other."""
    sleep = method_source(library, *WORKER, "sleep")
    assert "torch.cuda.mem_get_info()" in sleep and "assert freed_bytes >= 0" in sleep


def test_a_stream_is_made_and_kept_where_none_was_set_since_the_import(library: Library) -> None:
    """So that the trainer's own is set between import and start. The V2 runner then keeps the stream it finds."""
    torch_utils = module_source(library, "vllm.utils.torch_utils")
    assert "torch.cuda.set_stream = _patched_set_stream" in torch_utils
    assert "torch.cuda.set_stream(torch.cuda.Stream())" in source(library, "vllm.utils.torch_utils", "current_stream")
    communicator = "vllm.distributed.device_communicators.pynccl"
    assert "stream = current_stream()" in method_source(library, communicator, "PyNcclCommunicator", "__init__")
    runner = ("vllm.v1.worker.gpu.model_runner", "GPUModelRunner", "main_stream")
    assert "torch.cuda.current_stream(self.device)" in method_source(library, *runner)
    captured = source(library, "vllm.distributed.parallel_state", "graph_capture")
    assert "torch.cuda.Stream(device=device)" in captured  # a stream of its own: graphs need not the default one's


def test_the_share_is_asked_of_free_memory_before_any_rank_can_fail_alone(library: Library) -> None:
    """What ``check_room`` asks first, with the same figures; then a collective over all ranks."""
    asked = source(library, "vllm.v1.worker.utils", "request_memory")
    assert "init_snapshot.total_memory * cache_config.gpu_memory_utilization" in asked
    assert "init_snapshot.free_memory < requested_memory" in asked
    launcher = ("vllm.v1.executor.uniproc_executor", "ExecutorWithExternalLauncher", "determine_available_memory")
    assert "dist.all_reduce(memory_tensor" in method_source(library, *launcher)


def test_communicators_are_made_before_the_share_is_looked_for(library: Library) -> None:
    """So that ``check_room`` leaves them room."""
    device = method_source(library, *WORKER, "init_device")
    made, measured = device.index("init_worker_distributed_environment("), device.index("MemorySnapshot(device")
    assert made < measured < device.index("request_memory(init_snapshot")
    communicator = ("vllm.distributed.device_communicators.cuda_communicator", "CudaCommunicator")
    made_of = method_source(library, *communicator, "__init__")
    assert all(f"{part}(" in made_of for part in ("PyNcclCommunicator", "SymmMemCommunicator", "CustomAllreduce"))


def test_requests_are_aborted_by_the_numbers_they_were_given(library: Library) -> None:
    """Those that are finished are passed over, and what the others hold is free before the call returns."""
    abort = method_source(library, "vllm.v1.engine.llm_engine", "LLMEngine", "abort_request")
    assert "internal: bool=False" in abort and "self.output_processor.abort_requests(request_ids, internal)" in abort
    assert "self.engine_core.abort_requests(request_ids)" in abort
    known = method_source(library, "vllm.v1.engine.output_processor", "OutputProcessor", "abort_requests")
    assert "self.external_req_ids.pop(request_id, [])" in known
    own = method_source(library, "vllm.v1.engine.core_client", "InprocClient", "abort_requests")
    assert "self.engine_core.abort_requests(request_ids)" in own
    core = method_source(library, "vllm.v1.engine.core", "EngineCore", "abort_requests")
    assert "self.scheduler.finish_requests(request_ids, RequestStatus.FINISHED_ABORTED)" in core


def test_the_prefix_cache_says_whether_it_was_emptied(library: Library) -> None:
    """It keeps what unfinished requests hold, and raises nothing."""
    pool = method_source(library, "vllm.v1.core.block_pool", "BlockPool", "reset_prefix_cache")
    assert re.search(r"if num_used_blocks != 1:(\n.*)+?\n\s+return False", pool)
    engine = method_source(library, "vllm.v1.engine.core", "EngineCore", "reset_prefix_cache")
    assert "return self.scheduler.reset_prefix_cache(" in engine


def test_tritons_hooks_are_set_when_the_engine_is_warm(library: Library) -> None:
    """For the process's life: the trainer's kernels compile later."""
    assert "activate_triton_jit_monitor(" in method_source(library, *WORKER, "compile_or_warm_up_model")
    monitor = module_source(library, "vllm.triton_utils.jit_monitor")
    assert "knobs.runtime.jit_post_compile_hook = _on_jit_compile" in monitor
    assert "knobs.autotuning.print = True" in monitor and "def deactivate" not in monitor


def test_graph_buffers_are_shared_by_ipc_handles_unless_it_is_disabled(library: Library) -> None:
    """Of expandable segments there is none. vLLM knows the older name of the variable alone."""
    reduce = ("vllm.distributed.device_communicators.custom_all_reduce", "CustomAllreduce")
    assert "get_graph_buffer_ipc_meta" in method_source(library, *reduce, "register_graph_buffers")
    made = source(library, "vllm.v1.worker.gpu_worker", "init_worker_distributed_environment")
    assert "set_custom_all_reduce(not parallel_config.disable_custom_all_reduce)" in made
    pool = method_source(library, "vllm.device_allocator.cumem", "CuMemAllocator", "use_memory_pool")
    assert "'PYTORCH_CUDA_ALLOC_CONF'" in pool and "'PYTORCH_ALLOC_CONF'" not in pool


def test_workers_are_forked_unless_cuda_is_initialized(library: Library) -> None:
    """Counting devices is no initialization for ``torch.cuda.is_initialized``, but forked processes then have no CUDA:
    vLLM asks NVML instead, if it is imported first. So that our engine asks for spawned workers."""
    assert "env_with_choices('VLLM_WORKER_MULTIPROC_METHOD', 'fork'" in source(
        library, "vllm.envs", "environment_variables"
    )
    forced = source(library, "vllm.utils.system_utils", "_maybe_force_spawn")
    assert "cuda_is_initialized()" in forced
    assert "torch.cuda.is_initialized()" in source(library, "vllm.utils.platform_utils", "cuda_is_initialized")
    assert 'os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"' in module_source(library, "vllm.env_override")
    config = method_source(library, "vllm.config.parallel", "ParallelConfig", "__post_init__")
    assert "backend: DistributedExecutorBackend = 'mp'" in config


def test_what_sleeps_beside_weights_and_cache_is_written_anew_for_each_request(library: Library) -> None:
    """The V2 runner makes its samplers and tables within the pools whose content a deep sleep discards. Their counts
    live in pinned host memory, what a request needs is written when it comes, and the tables' addresses on waking."""
    loaded = method_source(library, "vllm.v1.worker.gpu.model_runner", "GPUModelRunner", "load_model")
    assert "self.sampler = Sampler(" in loaded
    woken = method_source(library, "vllm.v1.worker.gpu.model_runner", "GPUModelRunner", "post_kv_cache_wake_up")
    assert "init_block_table_layout_tensors()" in woken
    bias = method_source(library, "vllm.v1.worker.gpu.sample.logit_bias", "LogitBiasState", "__init__")
    kinds = set(re.findall(r"self\.\w+ = (\w+)\(", bias))
    assert kinds == {"UvaBackedTensor", "StagedWriteTensor"}
    added = method_source(library, "vllm.v1.worker.gpu.sample.logit_bias", "LogitBiasState", "add_request")
    assert "self.logit_bias_token_ids.stage_write(req_idx" in added and "self.logit_bias.stage_write(req_idx" in added
    states = method_source(library, "vllm.v1.worker.gpu.sample.states", "SamplingStates", "__init__")
    assert "StagedWriteTensor" not in states and states.count("UvaBackedTensor(") >= 5  # seeds among them
    pinned = method_source(library, "vllm.v1.worker.gpu.buffer_utils", "UvaBuffer", "__init__")
    assert "device='cpu', pin_memory=True" in pinned


def test_requests_are_numbered_as_they_come_and_told_of_by_each_step(library: Library) -> None:
    """So that what ``llm_engine.step`` returns says which request is finished, under the number that it was given."""
    places = ("vllm.entrypoints.offline_utils", "vllm.entrypoints.common.offline")  # of 0.24 and of 0.32
    text = module_source(library, next(place for place in places if library.file(place) is not None))
    assert "request_id = str(next(self.request_counter))" in text
    assert "step_outputs = self.llm_engine.step()" in text and "if output.finished:" in text
    assert "key=lambda x: int(x.request_id)" in text
    # Requests that are enqueued between two steps are numbered likewise, and run before the call ends.
    assert "while self.llm_engine.has_unfinished_requests():" in text
    assert "return self._add_completion_requests(" in method_source(library, "vllm", "LLM", "enqueue")
    assert re.search(r"def __next__.*\n\s+i = self.counter\n", module_source(library, "vllm.utils.counter"))
    told = method_source(library, "vllm.v1.engine.output_processor", "RequestState", "make_request_output")
    assert "external_req_id" in told  # not the number with which vLLM makes it unique
