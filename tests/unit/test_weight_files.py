"""Which files of a folder hold the weights: one list for trainer, engine, fingerprint and conversion, or a refusal that
the plan gives, with the remedy."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from examples.convert_checkpoint import hf_to_megatron
from examples.drop_layers import drop_layers
from nemo_tropd.config import ConfigError
from nemo_tropd.convert.families import ConversionError, read_shape
from nemo_tropd.convert.fingerprint import checkpoint_fingerprint
from nemo_tropd.convert.folders import copy_sidecar
from nemo_tropd.convert.hf_files import HfCheckpoint
from nemo_tropd.convert.weight_files import INDEX, SINGLE, weight_files
from nemo_tropd.rollout.engine import EngineError
from nemo_tropd.rollout.vllm.settings import EngineSettings
from nemo_tropd.rollout.weights.stream import checkpoint_shapes
from nemo_tropd.training.plan import make_plan
from tests.e2e.compose import compose_config
from tests.e2e.tiny_run import TinyRun
from tests.tiny_models import make_tiny

SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    return TinyRun.make(tmp_path_factory.mktemp("weights"))


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in weight_files(folder) for name, tensor in load_file(file).items()}


def edited(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Callable[[Path], None]:
    """A folder whose one file has other tensors."""

    def edit(folder: Path) -> None:
        save_file({n: t.contiguous() for n, t in change(tensors(folder)).items()}, folder / SINGLE)

    return edit


def renamed(change: Callable[[str], str]) -> Callable[[Path], None]:
    return edited(lambda held: {change(name): tensor for name, tensor in held.items()})


def with_shards(folder: Path) -> None:
    held = tensors(folder)
    for number, file in enumerate(SHARDS):
        save_file({n: t + 1 for n, t in list(held.items())[number::2]}, folder / file)
    names = {n: SHARDS[i % 2] for i, n in enumerate(held)}
    (folder / INDEX).write_text(json.dumps({"weight_map": names}))


def left_alone(*names: str) -> Callable[[Path], None]:
    """A folder whose weights have other names."""

    def edit(folder: Path) -> None:
        (folder / SINGLE).unlink()
        for name in names:
            (folder / name).write_bytes(b"{}")

    return edit


def beside(name: str, text: str = "{}") -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(text)


def quantised(held: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    name = "model.layers.0.mlp.up_proj."
    weight = held.pop(name + "weight")
    return {**held, name + "qweight": torch.zeros(weight.shape, dtype=torch.int32), name + "scales": torch.ones(4)}


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 3087467144\n"
REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "index and another single file": (with_shards, r"model\.safetensors is not in .*index\.json: .*remove one"),
    "an old copy": (beside("model-old.safetensors"), r"model-old\.safetensors beside .*vLLM would load .*move"),
    "adapter weights": (beside("adapter_model.safetensors"), r"has adapter_model\.safetensors beside model\.safe"),
    "another format": (beside("consolidated.safetensors"), r"has consolidated\.safetensors beside model\.safetensors"),
    "a pointer": (beside(SINGLE, POINTER), r"model\.safetensors is a Git LFS pointer.*git lfs pull"),
    "an index pointer": (beside(INDEX, POINTER), r"index\.json is a Git LFS pointer.*git lfs pull"),
    "a tokenizer's pointer": (beside("tokenizer.json", POINTER), r"tokenizer\.json is a Git LFS pointer"),
    "empty": (lambda f: (f / SINGLE).write_bytes(b"") and None, r"model\.safetensors is empty: download"),
    "cut": (lambda f: (f / SINGLE).write_bytes((f / SINGLE).read_bytes()[:-9]) and None, "damaged or truncated"),
    "an adapter": (left_alone("adapter_config.json", "adapter_model.safetensors"), r"only an adapter: merge it"),
    "pickles": (left_alone("pytorch_model.bin"), r"only pytorch_model\.bin: load it with .*save_pretrained"),
    "gguf": (left_alone("q4.gguf"), r"no safetensors file, only q4\.gguf: "),
    "shards without index": (left_alone(*SHARDS), r"has model-00001.*neither .*index\.json: download what is missing"),
    "nothing": (left_alone(), r"has no safetensors file: neither model\.safetensors nor"),
    "quantised beside": (beside("hf_quant_config.json"), r"hf_quant_config\.json says .*quantised: use their original"),
    "gptq": (edited(quantised), r"quantised weights \(model\.layers\.0\.mlp\.up_proj\.\w+, .*use the checkpoint they"),
    "fp8": (
        edited(lambda held: {n: t.to(torch.float8_e4m3fn) if "up_proj" in n else t for n, t in held.items()}),
        "up_proj.weight has dtype F8_E4M3; supported dtypes: F32, F16, BF16, mixed or not",
    ),
    "no prefix": (renamed(lambda n: n.removeprefix("model.")), r"names its tensors ''\.\.\. instead of 'model\.'"),
    "peft prefix": (renamed(lambda n: "base_model." + n), r"names its tensors 'base_model\.model\.'.*the wrapper"),
    "one more": (edited(lambda held: {**held, "model.vision.w": torch.ones(2)}), "no place for: model.vision.w"),
    "one less": (
        edited(lambda held: {n: t for n, t in held.items() if "layers.1.mlp.down" not in n}),
        "lacks 1 of .*tensors: model.layers.1.mlp.down_proj.weight",
    ),
    "another head": (
        edited(lambda held: {**held, HEAD: held[EMBEDDING].clone().index_fill_(0, torch.tensor(130), 0.5)}),
        "lm_head.weight differs from model.embed_tokens.weight; .*\"tie_word_embeddings\": false",
    ),
    "a head of another size": (edited(lambda held: {**held, HEAD: held[EMBEDDING][:9].clone()}), "lm_head.* differs"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_the_plan_refuses_weights_that_it_cannot_take(run: TinyRun, tmp_path: Path, what: str) -> None:
    edit, said = REFUSED[what]
    folder = Path(shutil.copytree(run.teacher, tmp_path / "teacher"))
    edit(folder)
    overrides = run.overrides(tmp_path / "run", **{"model.teacher.path": folder, "check_only": True})
    with pytest.raises(ConfigError, match=rf"(?s)model\.teacher\.path = '{folder}': .*{said}"):
        make_plan(compose_config(overrides))
    with pytest.raises(ConversionError):
        hf_to_megatron(folder, tmp_path / "out")


def test_the_plan_refuses_sequences_beyond_what_the_model_is(run: TinyRun, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(run.teacher, tmp_path / "teacher"))
    config = json.loads((folder / "config.json").read_text())
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e6, "factor": 4.0}
    (folder / "config.json").write_text(
        json.dumps({**config, "max_position_embeddings": 90, "rope_parameters": dynamic})
    )
    with pytest.raises(ConfigError, match=r"encoder_seq_length = 96: exceeds .*= 90, .*'dynamic' .*; at most 90"):
        make_plan(compose_config(run.overrides(tmp_path / "run", **{"model.teacher.path": folder})))


def test_all_read_the_files_of_the_index_and_no_other(tmp_path: Path) -> None:
    folder = make_tiny(tmp_path / "model", "llama", files=2, vocab=131)
    before = checkpoint_fingerprint(folder)
    for stray in ("consolidated.safetensors", "adapter_model.safetensors", "model-00003-of-00003.safetensors"):
        save_file({"model.norm.weight": torch.full((32,), 9.0), "another": torch.ones(1)}, folder / stray)
    assert [path.name for path in weight_files(folder)] == SHARDS
    shape = read_shape(folder)
    assert "another" not in checkpoint_shapes(folder)[0] and checkpoint_fingerprint(folder) == before
    assert not (HfCheckpoint(folder, shape).read("model.norm.weight") == 9.0).any()
    drop_layers(folder, tmp_path / "less", [0])
    assert sorted(path.name for path in (tmp_path / "less").glob("*.safetensors")) == SHARDS
    (folder / SHARDS[0]).unlink()
    with pytest.raises(EngineError, match=f"{SHARDS[0]}"):
        checkpoint_shapes(folder)
    with pytest.raises(FileNotFoundError, match=SHARDS[0]):
        checkpoint_fingerprint(folder)


def test_an_index_may_name_the_single_file(tmp_path: Path) -> None:
    folder = make_tiny(tmp_path / "model", "qwen3")
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(tensors(folder), SINGLE)}))
    assert weight_files(folder) == [folder / SINGLE]
    (folder / "adapter_model.safetensors").write_bytes(b"")
    assert weight_files(folder) == [folder / SINGLE]  # the engine filters by the index, too
    (folder / SINGLE).rename(folder / "weights.safetensors")
    (folder / INDEX).write_text((folder / INDEX).read_text().replace(SINGLE, "weights.safetensors"))
    drop_layers(folder, tmp_path / "less", [1])
    assert weight_files(tmp_path / "less") == [tmp_path / "less" / "weights.safetensors"]


def test_mixed_dtypes_old_tables_and_a_repeated_head_are_taken(tmp_path: Path) -> None:
    folder = make_tiny(tmp_path / "model", "llama")
    held = tensors(folder)
    mixed = {n: t.to((torch.float32, torch.float16, torch.bfloat16)[i % 3]) for i, (n, t) in enumerate(held.items())}
    old = {f"model.layers.0.self_attn.rotary_emb.{n}": torch.ones(3) for n in ("inv_freq", "cos_cached", "sin_cached")}
    save_file({**mixed, **old, HEAD: mixed[EMBEDDING].clone()}, folder / SINGLE)
    source = HfCheckpoint(folder, read_shape(folder))
    assert source.widest_dtype == torch.float32 and all(torch.equal(source.read(n), t) for n, t in mixed.items())
    assert old.keys() <= EngineSettings(folder, "float32", 64).shapes[1]


def test_an_export_has_the_models_files_and_not_those_of_its_history(tmp_path: Path) -> None:
    folder = make_tiny(tmp_path / "model", "llama")
    kept = ("preprocessor_config.json", "tokenizer.model", "merges.txt", "vocab.json", "LICENSE", "tekken.json")
    left = ("README.md", ".gitattributes", "params.json", "consolidated.00.pth", "optimizer.pt", "model.onnx")
    for name in (*kept, *left):
        (folder / name).write_text("x")
    (folder / "original").mkdir()
    (folder / "original" / "params.json").write_text("{}")
    copy_sidecar(folder, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert set(kept) <= names and not names & {*left, "original", SINGLE}
