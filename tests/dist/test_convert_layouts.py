"""Checkpoints saved at one layout and loaded at another, and a Hugging Face folder written by several ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.dist.run_distributed import run_distributed
from tests.tiny_models import make_tiny

pytestmark = pytest.mark.random

VOCAB = 131  # pads to 256 at tensor parallel 1 and 2, to 512 at 4
SHAPE = {"heads": 8, "kv_heads": 4, "layers": 4, "hidden": 64, "vocab": VOCAB}


def _poisoned(topology: Any, shape: Any, dtype: torch.dtype = torch.float32) -> Any:
    from nemo_tropd.gpt.build import build_gpt

    model = build_gpt(shape, topology, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    return model


def _equal_to_source(stream: Any, source: Any, dtype: torch.dtype) -> bool:
    return all(torch.equal(tensor, source.read(name).to(dtype)) for name, tensor in stream)


def _save(topology: Any, folder: str, out: str) -> None:
    from megatron.core import dist_checkpointing

    from nemo_tropd.convert.families import read_shape
    from nemo_tropd.convert.folders import write_hf_sidecar
    from nemo_tropd.convert.hf_import import load_hf

    shape = read_shape(folder)
    model = _poisoned(topology, shape)
    load_hf(model, folder, shape, topology)
    if topology.is_leader:
        Path(out).mkdir()
    topology.barrier()
    dist_checkpointing.save(model.sharded_state_dict(prefix="model."), out)
    if topology.is_leader:
        write_hf_sidecar(out, folder)
    topology.barrier()


def _reshard(rank: int, world_size: int, jobs: list[tuple[str, str, tuple[int, int] | None]]) -> list[str]:
    """For each (HF folder, checkpoint, layout to save it at first): what went wrong on loading it at others."""
    from megatron.core import parallel_state

    from nemo_tropd.parallel.topology import Topology

    wrong = []
    for folder, checkpoint, layout in jobs:
        if layout is not None:
            _save(Topology.start(*layout), folder, checkpoint)
            parallel_state.destroy_model_parallel()
        for tensor, pipeline in ((4, 1), (2, 2), (1, 4), (1, 2)):
            topology = Topology.start(tensor, pipeline)
            wrong += [f"{checkpoint} at {tensor} x {pipeline}: {what}" for what in _load(topology, folder, checkpoint)]
            topology.barrier()
            parallel_state.destroy_model_parallel()
    return wrong


def _load(topology: Any, folder: str, checkpoint: str) -> list[str]:
    """What went wrong, by our reader and by Megatron's own."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    from nemo_tropd.convert.families import read_shape
    from nemo_tropd.convert.hf_export import hf_stream
    from nemo_tropd.convert.hf_files import HfCheckpoint
    from nemo_tropd.convert.hf_import import local_rows
    from nemo_tropd.convert.megatron_files import load_megatron

    wrong = []
    shape = read_shape(folder)
    source = HfCheckpoint(folder, shape)
    ours, theirs = _poisoned(topology, shape), _poisoned(topology, shape)
    load_megatron(ours, checkpoint, shape, topology)
    wanted = theirs.sharded_state_dict(prefix="model.")
    wanted = {name: entry for name, entry in wanted.items() if not isinstance(entry, ShardedObject)}
    loaded = dist_checkpointing.load(wanted, checkpoint)
    theirs.load_state_dict({name.removeprefix("model."): value for name, value in loaded.items()}, strict=False)
    for label, model in (("ours", ours), ("theirs", theirs)):
        if not _equal_to_source(hf_stream(model, shape, topology), source, torch.float32):
            wrong.append(f"{label}: the export differs from the source")
        for parameter, row in local_rows(model, shape):
            if not torch.isfinite(parameter).all():
                wrong.append(f"{label}: {row.megatron} was not filled")
            first = max(0, VOCAB - topology.tensor_rank * parameter.size(0))
            if row.layout == "vocabulary" and parameter[first:].any():
                wrong.append(f"{label}: the padding is not zero")
    return wrong


def test_a_checkpoint_saved_at_one_layout_loads_at_others(tmp_path: Path):
    from examples.convert_checkpoint import hf_to_megatron, megatron_to_hf
    from nemo_tropd.convert.families import read_shape
    from nemo_tropd.convert.hf_files import HfCheckpoint

    seed = int(torch.randint(0, 2**31, ()))
    tied = make_tiny(tmp_path / "tied", "qwen3", True, seed=seed, **SHAPE)
    untied = make_tiny(tmp_path / "untied", "qwen2", False, seed=seed, **SHAPE)
    biases = {"attention_bias": True, "mlp_bias": True}
    biased = make_tiny(tmp_path / "biased", "llama", True, seed=seed, changes=biases, **SHAPE)
    hf_to_megatron(untied, tmp_path / "converted", tensor_parallel=2)
    jobs = [
        (str(tied), str(tmp_path / "tied-saved"), (2, 1)),
        (str(untied), str(tmp_path / "untied-saved"), (2, 2)),
        (str(biased), str(tmp_path / "biased-saved"), (2, 1)),
        (str(untied), str(tmp_path / "converted"), None),
    ]
    for wrong in run_distributed(_reshard, 4, jobs, timeout_s=240):
        assert not wrong
    for folder in (tied, untied, biased):
        back = tmp_path / f"{folder.name}-back"
        megatron_to_hf(tmp_path / f"{folder.name}-saved", back)
        shape = read_shape(folder)
        source, result = HfCheckpoint(folder, shape), HfCheckpoint(back, shape)
        assert all(torch.equal(result.read(name), source.read(name)) for name, _ in shape.hf_tensors())


def _export(rank: int, world_size: int, folder: str, out: str) -> list[str]:
    """save_hf from bf16 weights at 2 x 2, then the failures every rank must hear of."""
    from nemo_tropd.convert.families import ConversionError, read_shape
    from nemo_tropd.convert.hf_export import hf_stream, save_hf
    from nemo_tropd.convert.hf_import import load_hf
    from nemo_tropd.parallel.topology import Topology

    topology = Topology.start(2, 2, sequence_parallel=True)
    shape = read_shape(folder)
    model = _poisoned(topology, shape, torch.bfloat16)
    load_hf(model, folder, shape, topology)
    save_hf(hf_stream(model, shape, topology), out, source_dir=folder, dtype=torch.bfloat16, max_shard_bytes=50_000)
    said = []
    # One exists, another cannot be written, the last is where the tokenizer comes from.
    for target, overwrite in ((out, False), ("/proc/nowhere/out", False), (folder, True)):
        stream = hf_stream(model, shape, topology)
        try:
            save_hf(stream, target, source_dir=folder, dtype=torch.bfloat16, overwrite=overwrite)
        except (ConversionError, OSError) as error:
            said.append(str(error))
    dist.barrier()
    return said


def test_several_ranks_write_one_folder_and_fail_together(tmp_path: Path):
    from transformers import AutoModelForCausalLM

    folder = make_tiny(tmp_path / "hf", "qwen2", True, seed=int(torch.randint(0, 2**31, ())), **SHAPE)
    out = tmp_path / "out"
    for said in run_distributed(_export, 4, str(folder), str(out)):
        assert len(said) == 3 and "exists" in said[0] and "is the source itself" in said[2]
    models = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16) for path in (folder, out)]
    states = [model.state_dict() for model in models]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert (out / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
