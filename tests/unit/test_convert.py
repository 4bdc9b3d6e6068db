"""Whole-folder conversion: exact bytes both ways, files carried over, manifests, and what makes it refuse."""

from __future__ import annotations

import io
import itertools
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from examples import convert_checkpoint
from examples.convert_checkpoint import MANIFEST, hf_to_megatron, megatron_to_hf
from nemo_tropd.convert import folders
from nemo_tropd.convert.families import ConversionError, read_shape, shape_of_config
from nemo_tropd.convert.hf_files import INDEX, SINGLE, write_weights
from tests.commands import run_command
from tests.dist.run_distributed import run_distributed
from tests.tiny_models import FAMILIES, make_tiny

pytestmark = pytest.mark.random

CARRIED = ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def _seed() -> int:
    return int(torch.randint(0, 2**31, ()))


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Read by the safetensors library, not by our own reader."""
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as handle:
            tensors.update({name: handle.get_tensor(name) for name in handle.keys()})  # noqa: SIM118
    return tensors


def _changed(folder: Path) -> list[str]:
    """The files of ``folder`` that are not those its manifest lists, by size and SHA-256."""
    listed = json.loads((folder / MANIFEST).read_text())["files"]
    found = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": sha256(path.read_bytes()).hexdigest()}
        for path in folder.rglob("*")
        if path.is_file() and path.name != MANIFEST
    }
    return sorted(name for name in listed.keys() | found.keys() if listed.get(name) != found.get(name))


def _same_bytes(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        t.dtype == b[n].dtype and t.shape == b[n].shape and torch.equal(t.view(torch.uint8), b[n].view(torch.uint8))
        for n, t in a.items()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip_keeps_every_byte(tmp_path: Path, family: str, tied: bool, dtype: torch.dtype):
    source = make_tiny(tmp_path / "hf", family, tied, vocab=131, seed=_seed(), dtype=dtype, files=2)
    hf_to_megatron(source, tmp_path / "megatron", tensor_parallel=2, pipeline_parallel=2)
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back", max_shard_bytes=30_000)
    assert _same_bytes(_tensors(source), _tensors(tmp_path / "back"))
    assert (tmp_path / "back" / INDEX).is_file()
    for name in (*CARRIED, "config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (source / name).read_bytes(), name
    assert not _changed(tmp_path / "megatron") and not _changed(tmp_path / "back")


def test_values_that_are_not_finite_survive(tmp_path: Path):
    """Bytes are compared, so a converter that adds, scales or goes through another dtype shows."""
    source = make_tiny(tmp_path / "hf", dtype=torch.bfloat16)
    poisoned = _tensors(source)
    generator = torch.Generator().manual_seed(_seed())
    for name, tensor in poisoned.items():
        bits = torch.randint(-(2**15), 2**15, tensor.shape, generator=generator, dtype=torch.int16)
        poisoned[name] = bits.view(torch.bfloat16)
    save_file(poisoned, source / SINGLE)
    hf_to_megatron(source, tmp_path / "megatron", tensor_parallel=2)
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    assert _same_bytes(poisoned, _tensors(tmp_path / "back"))


def test_large_vocabularies_are_stored_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from nemo_tropd.convert import megatron_files

    monkeypatch.setattr(megatron_files, "_BLOCK_BYTES", 1000)
    source = make_tiny(tmp_path / "hf", "qwen2", False, seed=_seed())
    done: list[tuple[int, int]] = []
    hf_to_megatron(source, tmp_path / "megatron", progress=lambda *at: done.append(at))
    assert done[-1][0] == done[-1][1] == read_shape(source).parameters() * 4
    assert max(b[0] - a[0] for a, b in itertools.pairwise(done)) <= 1000
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    assert _same_bytes(_tensors(source), _tensors(tmp_path / "back"))


def test_dtype_changes_the_weights_and_the_config(tmp_path: Path):
    source = make_tiny(tmp_path / "hf", "llama", seed=_seed())
    hf_to_megatron(source, tmp_path / "megatron", dtype=torch.bfloat16)
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    expected = {name: tensor.bfloat16() for name, tensor in _tensors(source).items()}
    assert _same_bytes(expected, _tensors(tmp_path / "back"))
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("embedding", "norms", "widest"),
    [
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float16, torch.float32),  # neither holds the other
        (torch.float16, torch.float16, torch.float16),
    ],
)
def test_of_mixed_dtypes_the_one_that_holds_all_is_written(
    tmp_path: Path, embedding: torch.dtype, norms: torch.dtype, widest: torch.dtype
):
    source = make_tiny(tmp_path / "hf", "llama", seed=_seed())
    stored = {name: t.to(norms if "norm" in name else embedding) for name, t in _tensors(source).items()}
    save_file(stored, source / SINGLE)
    hf_to_megatron(source, tmp_path / "megatron")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    assert _same_bytes({name: tensor.to(widest) for name, tensor in stored.items()}, _tensors(tmp_path / "back"))
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] == str(widest).removeprefix("torch.")


def _verified(rank: int, world_size: int, hf: str, out: str, spoiled: str, *flags: str) -> tuple[int, str]:
    """The command's exit code and output, if it had made the tensor ``spoiled`` by a hundredth too large."""

    def convert(hf_dir: str, *rest: str, **options: Any) -> None:
        hf_to_megatron(hf_dir, *rest, **options)
        if spoiled:
            tensors = _tensors(Path(hf_dir))
            tensors[spoiled] *= 1.01
            save_file(tensors, Path(hf_dir) / SINGLE)

    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(said), redirect_stderr(said):
        patch.setattr(convert_checkpoint, "hf_to_megatron", convert)
        words = ["convert_checkpoint.py", "hf-to-megatron", "--hf", hf, "--out", out, "--verify", *flags]
        patch.setattr(sys, "argv", words)
        return convert_checkpoint.main(), said.getvalue()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spoiled", ["", "model.norm.weight", "model.layers.1.self_attn.v_proj.weight"])
def test_verify_finds_a_tensor_that_is_off_by_a_hundredth(tmp_path: Path, spoiled: str, dtype: torch.dtype):
    source = make_tiny(tmp_path / "hf", "qwen3", seed=_seed(), dtype=dtype)
    ((code, said),) = run_distributed(_verified, 1, str(source), str(tmp_path / "out"), spoiled, init_gloo=False)
    assert code == bool(spoiled) and ("not the same model" in said) == bool(spoiled), said
    assert f", in {str(dtype).removeprefix('torch.')}" in said


@pytest.mark.parametrize("flags", [(), ("--dtype", "bf16")])
@pytest.mark.parametrize("changes", [{"sliding_window": 16}, {"max_position_embeddings": 24}])
def test_verify_compares_as_many_tokens_as_both_models_attend_to(
    tmp_path: Path, changes: dict[str, int], flags: tuple[str, ...]
):
    source = make_tiny(tmp_path / "hf", "mistral", seed=_seed(), changes=changes)
    ((code, said),) = run_distributed(_verified, 1, str(source), str(tmp_path / "out"), "", *flags, init_gloo=False)
    assert code == 0 and "largest logit difference" in said, said


def test_transformers_loads_the_export_with_its_tokenizer(tmp_path: Path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = make_tiny(tmp_path / "hf", "qwen3", False, seed=_seed())
    hf_to_megatron(source, tmp_path / "megatron")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back", max_shard_bytes=20_000)
    ids = torch.randint(0, 131, (1, 20))
    with torch.no_grad():
        before, after = (
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits
            for folder in (source, tmp_path / "back")
        )
    assert torch.equal(before, after)
    chat = [{"role": "user", "content": "2 + 2 = ?"}]
    texts = [
        AutoTokenizer.from_pretrained(folder).apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        for folder in (source, tmp_path / "back")
    ]
    assert texts[0] == texts[1] == "<|im_start|>user\n2 + 2 = ?<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return make_tiny(tmp_path / "hf", "qwen3", files=2, seed=_seed())


def _refused(source: Path, *parts: str, out: str = "out") -> None:
    """The conversion stops with a ConversionError that says every part, and leaves nothing behind."""
    before = sorted(source.parent.iterdir())
    with pytest.raises(ConversionError) as caught:
        hf_to_megatron(source, source.parent / out)
    for part in parts:
        assert part in str(caught.value)
    assert sorted(source.parent.iterdir()) == before


def _edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def test_refuses_an_unknown_architecture(tiny: Path):
    _edit_config(tiny, architectures=["MambaForCausalLM"], model_type="mamba")
    _refused(tiny, "MambaForCausalLM", "LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attention_bias", True),
        ("use_sliding_window", True),
        ("hidden_act", "gelu"),
        ("rope_parameters", {"rope_type": "yarn", "rope_theta": 1e6}),
        ("layer_types", ["full_attention", "sliding_attention"]),
        ("num_hidden_layers", None),
        ("quantization_config", {"quant_method": "fp8"}),
        ("architectures", 3),
        ("layer_types", "full_attention"),
        ("rope_parameters", "default"),
        ("rope_parameters", {"rope_theta": "1e6"}),
        ("head_dim", -16),
        ("num_key_value_heads", "2"),
        ("vocab_size", True),
        ("rms_norm_eps", "small"),
        ("max_position_embeddings", 512.5),
    ],
)
def test_refuses_what_it_does_not_model(tiny: Path, key: str, value: object):
    _edit_config(tiny, **{key: value})
    _refused(tiny, "config.json", key.removesuffix("_parameters"))


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe"])
def test_refuses_a_config_that_is_no_json_object(tiny: Path, content: bytes):
    (tiny / "config.json").write_bytes(content)
    _refused(tiny, "config.json", "JSON")


def test_a_config_that_is_a_folder_is_refused(tiny: Path):
    (tiny / "config.json").unlink()
    (tiny / "config.json").mkdir()
    _refused(tiny, "config.json cannot be read")


def test_names_a_missing_file(tiny: Path):
    (tiny / "model-00002-of-00002.safetensors").unlink()
    _refused(tiny, "model-00002-of-00002.safetensors does not exist")


def test_names_a_missing_tensor(tiny: Path):
    _edit_config(tiny, tie_word_embeddings=False)
    _refused(tiny, "lacks 1 of 25 tensors: lm_head.weight")


def test_names_a_tensor_without_a_place(tiny: Path):
    _edit_config(tiny, num_hidden_layers=1)
    _refused(tiny, "no place for", "model.layers.1.")


def test_names_both_shapes(tiny: Path):
    _edit_config(tiny, intermediate_size=80)
    _refused(tiny, "[96, 32]", "[80, 32]", "gate_proj")


def test_finds_a_truncated_file(tiny: Path):
    file = tiny / "model-00001-of-00002.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:-1])
    _refused(tiny, "truncated", file.name, f"{len(data) - 1} bytes")
    file.write_bytes(data[:100])
    _refused(tiny, "truncated", file.name, "100 bytes")


def test_names_a_tensor_stored_twice(tiny: Path):
    """Whichever file is read last must not decide which weights are taken."""
    first, second = (tiny / f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    name, tensor = next(iter(load_file(first).items()))
    save_file({**load_file(second), name: tensor + 1}, second)
    _refused(tiny, name, "stored twice", first.name, second.name)


@pytest.mark.parametrize(("dtype", "named"), [(torch.float64, "F64"), (torch.float8_e4m3fn, "F8_E4M3")])
@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight"])
def test_refuses_a_dtype_before_anything_is_written(tmp_path: Path, name: str, dtype: torch.dtype, named: str):
    source = make_tiny(tmp_path / "hf", "qwen3")
    tensors = _tensors(source)
    save_file({**tensors, name: tensors[name].to(dtype)}, source / SINGLE)
    _refused(source, f"{name} has dtype {named}; supported dtypes: F32, F16, BF16")


@pytest.mark.parametrize(
    "index",
    [
        "{",
        "[]",
        '{"weight_map": {}}',
        '{"weight_map": []}',
        '{"weight_map": {"a": []}}',
        '{"weight_map": {"a": "../x"}}',
    ],
)
def test_refuses_a_malformed_index(tiny: Path, index: str):
    (tiny / INDEX).write_text(index)
    _refused(tiny, INDEX, "weight_map" if "weight_map" in index and "[]" not in index else "malformed")


def test_a_tied_head_and_old_rotary_frequencies_are_allowed(tmp_path: Path):
    source = make_tiny(tmp_path / "hf", "llama", True, seed=_seed())
    tensors = _tensors(source)
    stored = {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    stored["model.layers.1.self_attn.rotary_emb.inv_freq"] = torch.rand(8)
    assert {name: tuple(t.shape) for name, t in stored.items()}.items() <= (
        read_shape(source).hf_optional_tensors().items()
    )
    save_file(tensors | stored, source / SINGLE)
    hf_to_megatron(source, tmp_path / "megatron")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    assert _same_bytes(tensors, _tensors(tmp_path / "back"))


def test_files_are_written_one_at_a_time_and_readable_by_all(tmp_path: Path):
    tensors = {f"t{i}": torch.randn(10, 10) for i in range(5)}  # 400 bytes each
    expected = dict.fromkeys(tensors, (10, 10))
    written: list[int] = []

    def stream() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in tensors.items():
            written.append(len(list(tmp_path.iterdir())))
            yield name, tensor

    write_weights(tmp_path, stream(), expected, torch.float32, max_shard_bytes=800)
    assert written == [0, 0, 0, 1, 1]
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == [*(f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)), INDEX]
    assert all((tmp_path / name).stat().st_mode & 0o044 == 0o044 for name in files)
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == 2000
    assert all(name in load_file(tmp_path / file) for name, file in index["weight_map"].items())
    assert _same_bytes(_tensors(tmp_path), tensors)


@pytest.mark.parametrize(
    ("names", "message"),
    [("ab", "ended without 1 tensors: c"), ("abcd", "d: it is not a tensor"), ("aba", "a: the stream has it twice")],
)
def test_a_stream_of_other_tensors_is_refused(tmp_path: Path, names: str, message: str):
    with pytest.raises(ConversionError, match=message):
        write_weights(tmp_path, ((n, torch.ones(2)) for n in names), dict.fromkeys("abc", (2,)), torch.float32)
    with pytest.raises(ConversionError, match=r"a: it has shape \[3\], not \[2\]"):
        write_weights(tmp_path, iter([("a", torch.ones(3))]), {"a": (2,)}, torch.float32)


def test_a_failed_write_is_an_error_of_the_conversion(tmp_path: Path):
    with pytest.raises(ConversionError, match=r"cannot write .*nowhere"):
        write_weights(tmp_path / "nowhere", iter([("a", torch.ones(2))]), {"a": (2,)}, torch.float32)


def test_refuses_a_folder_that_exists_and_replaces_it_on_demand(tiny: Path):
    out = tiny.parent / "out"
    out.mkdir()
    (out / "kept.txt").write_text("mine")
    _refused(tiny, "exists")
    assert (out / "kept.txt").read_text() == "mine"
    hf_to_megatron(tiny, out, overwrite=True)
    assert not (out / "kept.txt").exists()
    assert not _changed(out)


@pytest.fixture
def both(tiny: Path) -> dict[str, Path]:
    """A model in both formats, in a folder with something else, and links to them."""
    models = tiny.parent / "models"
    models.mkdir()
    tiny.rename(models / "hf")
    (models / "notes.txt").write_text("mine")
    hf_to_megatron(models / "hf", models / "megatron")
    (tiny.parent / "link").symlink_to("models")
    (models / "to_hf").symlink_to("hf")
    return {"models": models, "hf": models / "hf", "megatron": models / "megatron", "link": tiny.parent / "link"}


@pytest.mark.parametrize(
    ("out", "said"),
    [
        ("models/{kind}", "it is the source itself"),
        ("link/{kind}", "it is the source itself"),
        ("models/../models/{kind}", "it is the source itself"),
        ("models/to_hf", "it is the source itself"),
        ("models", "it has .*, which is read"),
        ("link", "it has .*, which is read"),
        (".", "it has .*, which is read"),
        ("/", "it has .*, which is read"),
        ("models/{kind}/out", "it lies in the source"),
        ("link/{kind}/hf", "it lies in the source"),
    ],
)
@pytest.mark.parametrize("kind", ["hf", "megatron"])
def test_the_source_is_never_replaced(
    both: dict[str, Path], monkeypatch: pytest.MonkeyPatch, kind: str, out: str, said: str
):
    monkeypatch.chdir(both["models"].parent)
    if "to_hf" in out:
        (both["models"] / "to_hf").unlink()
        (both["models"] / "to_hf").symlink_to(kind)
    before = {path: path.read_bytes() for path in both["models"].rglob("*") if path.is_file()}
    convert = {"hf": hf_to_megatron, "megatron": megatron_to_hf}[kind]
    for named in (both[kind], both["link"] / kind, Path("models", kind)):
        with pytest.raises(ConversionError, match=said):
            convert(named, out.format(kind=kind), overwrite=True)
        assert {path: path.read_bytes() for path in both["models"].rglob("*") if path.is_file()} == before


def test_the_files_that_a_sources_links_lead_to_are_never_replaced(tiny: Path):
    """As in a hub's cache: snapshots/REVISION has links to ../../blobs/HASH."""
    blobs = tiny.parent / "model" / "blobs"
    blobs.mkdir(parents=True)
    for file in list(tiny.iterdir()):
        file.rename(blobs / file.name)
        file.symlink_to(blobs / file.name)
    for out in (blobs, blobs.parent):
        with pytest.raises(ConversionError, match=r"it has .*blobs/.* in it, which is read"):
            hf_to_megatron(tiny, out, overwrite=True)
    hf_to_megatron(tiny, tiny.parent / "out")
    assert read_shape(tiny).layers == 2


def test_a_link_stays_and_what_it_leads_to_is_replaced(tiny: Path):
    out, disk = tiny.parent / "out", tiny.parent / "disk"
    disk.mkdir()
    out.symlink_to(disk / "there")
    hf_to_megatron(tiny, out)
    (disk / "there" / "old").write_text("old")
    with pytest.raises(ConversionError, match="exists"):
        hf_to_megatron(tiny, out)
    hf_to_megatron(tiny, out, overwrite=True)
    assert out.is_symlink() and not _changed(disk / "there")
    assert sorted(path.name for path in disk.iterdir()) == ["there"]


def test_room_is_looked_for_on_the_disk_that_a_link_leads_to(tiny: Path, monkeypatch: pytest.MonkeyPatch):
    disk, usage = tiny.parent / "disk", shutil.disk_usage(tiny)
    disk.mkdir()
    (tiny.parent / "out").symlink_to(disk / "there")
    monkeypatch.setattr(folders.shutil, "disk_usage", lambda path: usage._replace(free=10 if path == disk else 10**12))
    with pytest.raises(ConversionError, match="GB free"):
        hf_to_megatron(tiny, tiny.parent / "out")


def test_a_folder_below_a_file_or_in_place_of_one_is_refused(tiny: Path):
    file = tiny.parent / "file"
    file.write_text("mine")
    for out in (file, file / "x", file / "x" / "y"):
        with pytest.raises(ConversionError, match="is a file, not a folder"):
            hf_to_megatron(tiny, out, overwrite=True)
    with pytest.raises(ConversionError, match="a disk is mounted"):
        hf_to_megatron(tiny, "/proc", overwrite=True)
    assert file.read_text() == "mine"


def test_the_working_directory_can_be_replaced_by_its_short_name(tiny: Path, monkeypatch: pytest.MonkeyPatch):
    out = tiny.parent / "out"
    out.mkdir()
    monkeypatch.chdir(out)
    hf_to_megatron(tiny, ".", overwrite=True)
    assert not _changed(out)


def test_the_command_says_in_a_line_what_the_system_refuses(tiny: Path):
    command = (Path(convert_checkpoint.__file__), "hf-to-megatron", "--hf", tiny)
    for out in (tiny, "/proc/none/out"):
        done = run_command(*command, "--out", out, "--overwrite", cwd=tiny.parent)
        assert done.returncode == 1 and "error: " in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_refuses_a_disk_that_is_too_small(tiny: Path, monkeypatch: pytest.MonkeyPatch):
    usage = shutil.disk_usage(tiny)._replace(free=10_000)
    monkeypatch.setattr(folders.shutil, "disk_usage", lambda path: usage)
    _refused(tiny, "GB free")


def test_a_failure_half_way_leaves_the_old_folder(tiny: Path):
    out = tiny.parent / "out"
    hf_to_megatron(tiny, out)
    before = sorted(tiny.parent.iterdir())

    def fail(done: int, total: int) -> None:
        if done > total // 2:
            raise OSError("the disk went away")

    with pytest.raises(OSError, match="the disk went away"):
        hf_to_megatron(tiny, out, overwrite=True, progress=fail)
    assert sorted(tiny.parent.iterdir()) == before
    assert not _changed(out)


def test_refuses_heads_that_do_not_divide():
    config = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "num_hidden_layers": 30,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    }
    shape = shape_of_config(config)
    assert shape.parameters() == 134_515_008
    assert shape.padded_vocab(3) == 49152
    shape.check_layout(3, 2)
    with pytest.raises(
        ConversionError, match=r"9 query heads .* tensor parallel 2; supported degrees .*9 query, 3 key.*: 1, 3"
    ):
        shape.check_layout(2, 1)
    with pytest.raises(ConversionError, match=r"30 layers .* pipeline parallel 4; supported degrees: 1, 2, 3, 5"):
        shape.check_layout(1, 4)


@pytest.mark.parametrize(("vocab", "degree"), [(151_936, 2), (152_064, 4), (151_665, 8), (131, 4)])
def test_shards_of_the_vocabulary_are_equal_and_cover_it(vocab: int, degree: int):
    config = {"model_type": "qwen2", "hidden_size": 16, "intermediate_size": 8, "num_attention_heads": 8}
    shape = shape_of_config({**config, "num_key_value_heads": 8, "num_hidden_layers": 1, "vocab_size": vocab})
    padded = shape.padded_vocab(degree)
    assert padded % (128 * degree) == 0 and vocab <= padded < vocab + 128 * degree


@pytest.mark.parametrize("older", [False, True])
def test_reads_rotary_settings_old_and_new(tiny: Path, older: bool):
    config = json.loads((tiny / "config.json").read_text())
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 8192
    del config["rope_parameters"]
    if older:
        config |= {"rope_theta": 500000.0, "rope_scaling": scaling}
    else:
        config["rope_parameters"] = {**scaling, "rope_theta": 500000.0}
    shape = shape_of_config(config)
    assert shape.rope_theta == 500000.0 and shape.rope_scaling is not None
    assert shape.rope_scaling.factor == 8.0 and shape.rope_scaling.original_max_positions == 8192


def test_refuses_a_damaged_megatron_checkpoint(tiny: Path):
    out, back = tiny.parent / "out", tiny.parent / "back"
    with pytest.raises(ConversionError, match="not a complete distributed checkpoint"):
        megatron_to_hf(tiny, back)
    hf_to_megatron(tiny, out)
    data = out / "__0_0.distcp"
    content = data.read_bytes()
    data.write_bytes(content[:-10])
    with pytest.raises(ConversionError, match="truncated"):
        megatron_to_hf(out, back)
    assert _changed(out) == [data.name]
    data.unlink()
    with pytest.raises(ConversionError, match="does not exist"):
        megatron_to_hf(out, back)
    data.write_bytes(content)
    _edit_config(out / "hf", hidden_size=48)
    with pytest.raises(ConversionError, match=r"\[131, 32\], but config.json asks for \[131, 48\]"):
        megatron_to_hf(out, back)
    assert not back.exists()


def test_a_path_that_the_system_refuses_is_named(tiny: Path):
    long = tiny.parent / ("a" * 256)
    for call in (
        lambda: hf_to_megatron(tiny, long),
        lambda: hf_to_megatron(long, tiny.parent / "out"),
        lambda: megatron_to_hf(long, tiny.parent / "out"),
        lambda: megatron_to_hf(tiny, long),
    ):
        with pytest.raises(ConversionError, match=r"aaa.*(refuses it|cannot be read).*name too long"):
            call()


def test_families_need_no_torch():
    code = "import sys; sys.modules['torch'] = None; import nemo_tropd.convert.families"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_commands_convert_verify_and_refuse(tiny: Path):
    script = Path(__file__).parents[2] / "examples" / "convert_checkpoint.py"
    out, back = tiny.parent / "out", tiny.parent / "back"

    def run(*args: object) -> subprocess.CompletedProcess[str]:
        return run_command(script, *args, cwd=tiny.parent)

    made = run("hf-to-megatron", "--hf", tiny, "--out", out, "--tp", 2, "--dtype", "fp32")
    assert made.returncode == 0, made.stderr
    verified = run("megatron-to-hf", "--checkpoint", out, "--out", back, "--verify")
    assert verified.returncode == 0, verified.stderr
    assert float(verified.stdout.split("largest logit difference:")[1].split(",")[0]) < 1e-4
    assert _same_bytes(_tensors(tiny), _tensors(back))
    again = run("hf-to-megatron", "--hf", tiny, "--out", out)
    assert again.returncode == 1 and "exists" in again.stderr and "Traceback" not in again.stderr
