"""Every class, function, keyword and field of the pinned GPU packages that our code uses is there and means the same.

The GPU's packages cannot run here; their sources can be read. What we use is gathered from our own source, so that a
new use is checked without being listed; below it stands what syntax trees cannot see: dictionaries handed on as
keywords, methods of objects, and meanings.
"""

from __future__ import annotations

import ast
import re

import pytest

from nemo_tropd.teacher.fp8 import MULTIPLES, Fp8Settings
from tests.contract.sources import Definition, Library
from tests.contract.uses import Use, gather, method_calls, string_keys
from tests.contract.wheels import PACKAGES, pinned

CONFIG = ("megatron.core.transformer.transformer_config", "TransformerConfig")

# Dictionaries of ours that end as keywords of TransformerConfig: (file, function or variable) -> keys that are not.
CONFIG_FIELDS = {
    ("gpt/build.py", "transformer_config"): set(),
    ("gpt/ddp.py", "recompute_fields"): {"selective", "full"},
    ("teacher/fp8.py", "transformer_fields"): set(),
}
# Those that end as keywords of vllm.LLM, which hands what it does not name to EngineArgs.
ENGINE_ARGUMENTS = {
    ("rollout/vllm/settings.py", "_FIXED_ARGUMENTS"): set(),
    ("rollout/vllm/settings.py", "llm_arguments"): {"mode", "cudagraph_mode"},
    ("rollout/vllm/in_process.py", "start"): {"weights", "kv_cache"},
}
# Variables, attributes and methods of ours that hold a vllm.LLM.
ENGINES = {
    "rollout/vllm/in_process.py": ("llm", "_llm"),
    "rollout/vllm/generating.py": ("llm",),
}
# Attributes and methods of their objects that we use: class -> names.
MEMBERS = {
    "megatron.core.models.gpt.GPTModel": (
        "decoder output_layer rotary_pos_emb config share_embeddings_and_output_weights "
        "shared_embedding_or_output_weight sharded_state_dict"
    ),
    "megatron.core.distributed.DistributedDataParallel": "zero_grad_buffer no_sync module",
    "megatron.core.packed_seq_params.PackedSeqParams": "cu_seqlens_q",
    "megatron.core.transformer.dot_product_attention.DotProductAttention": "softmax_scale",
    "megatron.core.transformer.transformer_block.TransformerBlock": "layers",
    "megatron.core.transformer.transformer_layer.TransformerLayer": "layer_number self_attention mlp",
    "megatron.core.tensor_parallel.layers.ColumnParallelLinear": "weight forward _forward_impl",
    "vllm.outputs.RequestOutput": "outputs",
    "vllm.outputs.CompletionOutput": "token_ids logprobs finish_reason",
    "vllm.v1.engine.logprobs.LogprobsProcessor": "num_logprobs logprobs _update_sample_logprobs",
    "vllm.v1.worker.gpu_worker.Worker": "model_runner load_model",
    "vllm.v1.worker.worker_base.WorkerBase": "vllm_config device",
    "vllm.v1.worker.gpu_model_runner.GPUModelRunner": "get_model",
    "vllm.v1.engine.core.EngineCore": "model_executor scheduler",
    "vllm.v1.core.sched.scheduler.Scheduler": "shutdown",
    "vllm.v1.executor.abstract.Executor": "shutdown collective_rpc sleep wake_up",
    "transformer_engine.pytorch.quantized_tensor.QuantizedTensor": "dequantize quantize_",
    "transformer_engine.pytorch.tensor.float8_tensor.Float8Tensor": "get_metadata",
    "transformer_engine.pytorch.tensor.float8_blockwise_tensor.Float8BlockwiseQTensor": "get_metadata",
    "transformer_engine.pytorch.tensor.mxfp8_tensor.MXFP8Tensor": "get_metadata",
    "transformer_engine.pytorch.LayerNormLinear": "fuse_wgrad_accumulation",
    "transformer_engine.pytorch.Linear": "fuse_wgrad_accumulation",
}


def faults(library: Library, use: Use) -> list[str]:
    """What is wrong with one use."""
    if not use.name:
        return [] if library.is_package(use.module) else [f"{use}: there is no such module"]
    found = library.resolve(use.module, use.name)
    if found is None:
        return [f"{use}: {use.module} has no {use.name}"]
    if use.member:
        if found.node is None:
            found = library.resolve(found.module, use.member)
        elif isinstance(found.node, ast.ClassDef):
            found = library.member(found, use.member)
        else:
            return []  # an attribute of a value
        if found is None:
            # A method of our own in a subclass need not be theirs.
            return [] if use.overrides is not None else [f"{use}: there is no {use.member}"]
    if use.overrides is not None:
        return _override_faults(library, use, found)
    return _call_faults(library, use, found) if use.called else []


def _call_faults(library: Library, use: Use, found: Definition) -> list[str]:
    signature = library.signature(found)
    if signature is None:
        return []
    wrong = [] if signature.any_keyword else [k for k in use.keywords if k not in signature.keywords]
    texts = [f"{use}: takes no keyword {k}; it takes {', '.join(sorted(signature.keywords))}" for k in wrong]
    if use.positional > signature.positional and not signature.any_positional:
        texts.append(f"{use}: takes {signature.positional} positional arguments, not {use.positional}")
    return texts


def _override_faults(library: Library, use: Use, found: Definition) -> list[str]:
    signature = library.signature(found)
    assert use.overrides is not None
    if signature is None or "*" in use.overrides or use.member == "__init__":
        return []
    missing = signature.keywords - set(use.overrides)
    return [f"{use}: theirs takes {k}, our override does not" for k in sorted(missing)]


def test_everything_we_import_and_call_is_there(library: Library) -> None:
    uses = gather()
    assert {"megatron", "vllm", "transformer_engine"} <= {u.module.split(".")[0] for u in uses}
    assert sum(u.called for u in uses) > 20
    wrong = [fault for use in uses for fault in faults(library, use)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("place", CONFIG_FIELDS, ids=":".join)
def test_fields_of_the_transformer_config(place: tuple[str, str], library: Library) -> None:
    config = library.resolve(*CONFIG)
    assert config is not None
    known, ours = library.fields(config), string_keys(*place) - CONFIG_FIELDS[place]
    assert ours, f"{place} names no field"
    assert ours <= known, f"{place}: TransformerConfig has no {', '.join(sorted(ours - known))}"


@pytest.mark.parametrize("place", ENGINE_ARGUMENTS, ids=":".join)
def test_arguments_of_the_engine(place: tuple[str, str], library: Library) -> None:
    llm, arguments = library.resolve("vllm", "LLM"), library.resolve("vllm.engine.arg_utils", "EngineArgs")
    assert llm is not None and arguments is not None
    named = library.signature(llm)
    assert named is not None and named.any_keyword
    known, ours = named.keywords | library.fields(arguments), string_keys(*place) - ENGINE_ARGUMENTS[place]
    assert ours, f"{place} names no argument"
    assert ours <= known, f"{place}: neither LLM nor EngineArgs has {', '.join(sorted(ours - known))}"


@pytest.mark.parametrize("path", ENGINES)
def test_methods_of_the_engine(path: str, library: Library) -> None:
    llm = library.resolve("vllm", "LLM")
    assert llm is not None
    calls = list(method_calls(path, ENGINES[path]))
    assert calls, f"{path} calls no method of the engine"
    wrong = []
    for where, method, keywords in calls:
        found = library.member(llm, method)
        signature = library.signature(found) if found is not None else None
        if signature is None:
            wrong.append(f"{where}: vllm.LLM has no method {method}")
        elif not signature.any_keyword:
            wrong += [f"{where}: LLM.{method} takes no keyword {k}" for k in keywords if k not in signature.keywords]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("path", MEMBERS)
def test_members_of_their_objects(path: str, library: Library) -> None:
    module, _, name = path.rpartition(".")
    found = library.resolve(module, name)
    assert found is not None and isinstance(found.node, ast.ClassDef), f"there is no class {path}"
    missing = [m for m in MEMBERS[path].split() if library.member(found, m) is None]
    assert not missing, f"{path} has no {', '.join(missing)}"


# ---------------------------------------------------------------------------------------------------- meanings


def source(library: Library, module: str, name: str) -> str:
    """The source of a function or class, as ast writes it."""
    found = library.resolve(module, name)
    assert found is not None and found.node is not None, f"{module} has no {name}"
    return ast.unparse(found.node)


def method_source(library: Library, module: str, name: str, method: str) -> str:
    found = library.resolve(module, name)
    assert found is not None, f"{module} has no {name}"
    member = library.member(found, method)
    assert member is not None and member.node is not None, f"{name} has no {method}"
    return ast.unparse(member.node)


def test_fp8_fields_take_our_values(library: Library) -> None:
    config = library.resolve(*CONFIG)
    assert config is not None and isinstance(config.node, ast.ClassDef)
    types = {
        s.target.id: ast.unparse(s.annotation)
        for s in config.node.body
        if isinstance(s, ast.AnnAssign) and isinstance(s.target, ast.Name)
    }
    for recipe in MULTIPLES:
        fields = Fp8Settings(recipe, first_last_bf16=1).transformer_fields()
        assert f"'{fields['fp8']}'" in types["fp8"] and f"'{recipe}'" in types["fp8_recipe"]
    assert "'delayed'" in types["fp8_recipe"]  # what we refuse by name is what Megatron calls it
    recipes = source(library, "megatron.core.fp8_utils", "get_fp8_recipe")
    for name in ("Float8CurrentScaling", "Float8BlockScaling", "MXFP8BlockScaling"):
        assert name in recipes


def test_fp8_multiples_are_theirs(library: Library) -> None:
    rows = source(library, "transformer_engine.pytorch.utils", "assert_dim_for_fp8_exec")
    assert "shape[:-1]) % 8 != 0" in rows and "shape[-1] % 16 != 0" in rows
    align = source(library, "megatron.core.fp8_utils", "get_fp8_align_size")
    assert [int(n) for n in re.findall(r"return (\d+)", align)] == [MULTIPLES["mxfp8"], MULTIPLES["tensorwise"]]
    assert MULTIPLES["blockwise"] == MULTIPLES["tensorwise"]


def test_fp8_hardware_is_theirs(library: Library) -> None:
    """What ``teacher.fp8.HARDWARE`` says: Ada, Hopper, and Blackwell below 12.0."""
    module = "transformer_engine.pytorch.quantization"
    plain = source(library, module, "_compute_fp8_support")
    assert f"< {(8, 9)}" in plain
    assert f">= {(9, 0)}" in source(library, module, "_compute_fp8_block_scaling_support")
    mxfp8 = source(library, module, "_compute_mxfp8_support")
    assert all(f">= {bound}" in mxfp8 for bound in ((10, 0), (12, 0)))


def test_delayed_scales_are_updated_in_backward_passes_or_with_gradients_alone(library: Library) -> None:
    leave = method_source(library, "transformer_engine.pytorch.quantization", "FP8GlobalStateManager", "autocast_exit")
    assert "torch.is_grad_enabled()" in leave and "reduce_and_update_fp8_tensors(forward=True)" in leave


def test_weights_made_without_gradients_keep_no_second_copy(library: Library) -> None:
    made = method_source(
        library, "transformer_engine.pytorch.module.base", "TransformerEngineBaseModule", "reset_parameters"
    )
    assert "set_usage(rowwise=True, columnwise=torch.is_grad_enabled())" in made
    context = source(library, "megatron.core.fp8_utils", "get_fp8_context")
    assert "['preserve_high_precision_init_val'] = torch.is_grad_enabled()" in context
    assert "is_first_last_bf16_layer(config, layer_no)" in context


def test_copying_into_a_quantized_weight_quantizes(library: Library) -> None:
    dispatch = method_source(
        library, "transformer_engine.pytorch.quantized_tensor", "QuantizedTensor", "__torch_dispatch__"
    )
    assert "torch.ops.aten.copy_.default" in dispatch and "dst.quantize_(src)" in dispatch


def test_the_emulated_scales_are_their_defaults(library: Library) -> None:
    current = source(library, "transformer_engine.common.recipe", "Float8CurrentScaling")
    assert "'NVTE_FP8_CURRENT_SCALING_POWER_2_SCALES', '0'" in current
    block = source(library, "transformer_engine.common.recipe", "Float8BlockScaling")
    assert "power_2_scale=not use_f32_scales" in block and "'NVTE_FP8_BLOCK_SCALING_FP32_SCALES', '0'" in block
    assert "x_block_scaling_dim: int = 1" in block and "w_block_scaling_dim: int = 2" in block
    quantizer = method_source(
        library, "transformer_engine.pytorch.tensor.float8_blockwise_tensor", "Float8BlockQuantizer", "__init__"
    )
    assert "self.block_len = 128" in quantizer


def test_sleep_levels_and_tags_are_theirs(library: Library) -> None:
    worker = method_source(library, "vllm.v1.worker.gpu_worker", "Worker", "sleep")
    assert "level == 2" in worker and "('weights',) if level == 1" in worker
    pools = (library.file("vllm.v1.worker.gpu_worker") or pytest.fail("no gpu_worker")).read_text()
    assert 'tag="weights"' in pools and 'tag="kv_cache"' in pools


@pytest.mark.parametrize("package", PACKAGES)
def test_the_pin_is_read_from_the_image(package: str) -> None:
    assert re.fullmatch(r"\d+\.\d+(\.\d+)?", pinned(package))


# ------------------------------------------------------------------------------------------------- the test itself


def test_a_missing_name_keyword_or_field_is_named(library: Library) -> None:
    gpt = ("megatron.core.models.gpt", "GPTModel")
    assert faults(library, Use("x.py:1", *gpt, keywords=("config",), called=True)) == []
    (fault,) = faults(library, Use("x.py:2", *gpt, keywords=("confg",), called=True))
    assert "x.py:2" in fault and "no keyword confg" in fault
    (fault,) = faults(library, Use("x.py:3", "megatron.core.models.gpt", "GPTModl"))
    assert "has no GPTModl" in fault
    (fault,) = faults(library, Use("x.py:4", "vllm.no_such_module", ""))
    assert "no such module" in fault
    (fault,) = faults(library, Use("x.py:5", *gpt, member="frobnicate"))
    assert "no frobnicate" in fault
    (fault,) = faults(library, Use("x.py:6", "megatron.core.parallel_state", "get_tensor_model_parallel_grup"))
    assert "get_tensor_model_parallel_grup" in fault
