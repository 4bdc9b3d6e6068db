"""The safetensors files of a Hugging Face checkpoint: checked, read by ranges of a tensor, written file by file."""

import functools
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nemo_tropd.convert.families import ConversionError, ModelShape
from nemo_tropd.convert.weight_files import INDEX, ROTARY, SINGLE, weight_files
from nemo_tropd.files import write_json

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
MAX_SHARD_BYTES = 10**9
# Names of quantised weights: GPTQ and AWQ, compressed-tensors and FP8, bitsandbytes.
_QUANTISED = re.compile(
    r"\.(qweight|qzeros|scales|g_idx|SCB|absmax|quant_map|quant_state\..*|weight_(packed|shape|zero_point)|"
    r"(input|weight|activation|[kv])_scale(_inv)?)$"
)
_LAYER_NORM, _HEAD, _EMBEDDING = "layers.0.input_layernorm.weight", "lm_head.weight", "model.embed_tokens.weight"


class HfCheckpoint:
    """The weights of a Hugging Face folder, checked on opening against the names and shapes of ``shape``.

    A tensor is mapped from its file only until it is freed. Raises ConversionError naming a missing, damaged or
    truncated file, a tensor that is missing, duplicated, unexpected or of another shape or unsupported dtype.
    """

    def __init__(self, directory: str | Path, shape: ModelShape) -> None:
        self.directory = Path(directory)
        self._files: dict[str, Path] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        dtypes: dict[str, str] = {}
        for path in weight_files(self.directory):
            with open_safetensors(path) as file:
                for name in file.keys():  # noqa: SIM118 (no mapping: it only offers keys())
                    if name in self._files:
                        both = f"in {self._files[name].name} and in {path.name}"
                        raise ConversionError(f"{self.directory}: {name} is stored twice, {both}")
                    self._files[name] = path
                    entry = file.get_slice(name)
                    shapes[name], dtypes[name] = tuple(entry.get_shape()), entry.get_dtype()
        wanted, optional = dict(shape.hf_tensors()), shape.hf_optional_tensors()
        self._check_names(wanted, optional, shape)
        for name, expected in wanted.items():
            found, dtype = shapes[name], dtypes[name]
            if found != expected:
                asked = f"but config.json asks for {list(expected)}"
                raise ConversionError(f"{self.directory}: {name} has shape {list(found)}, {asked}")
            if dtype not in DTYPES:
                supported = f"supported dtypes: {', '.join(DTYPES)}, mixed or not"
                raise ConversionError(f"{self._files[name]}: {name} has dtype {dtype}; {supported}")
        self._dtypes = {name: DTYPES[dtypes[name]] for name in wanted}
        if shape.tied and _HEAD in shapes:
            self._check_tied_head()

    def _check_names(self, wanted: dict[str, Any], optional: dict[str, Any], shape: ModelShape) -> None:
        """Raise ConversionError for tensors that are missing, quantised, named otherwise, or too many."""
        names = self._files.keys()
        if quantised := [name for name in names if _QUANTISED.search(name)]:
            remedy = "use the checkpoint they were made from"
            raise ConversionError(f"{self.directory} has quantised weights ({_some(quantised)}): {remedy}")
        first = next((name for name in names if name.endswith(_LAYER_NORM)), "model." + _LAYER_NORM)
        if (prefix := first.removesuffix(_LAYER_NORM)) != "model.":
            remedy = "save the model that is inside the wrapper (peft: merge_and_unload first)"
            if not prefix:
                remedy = "load it with transformers' AutoModelForCausalLM and write it with save_pretrained"
            raise ConversionError(f"{self.directory} names its tensors {prefix!r}... instead of 'model.'...: {remedy}")
        if missing := [name for name in wanted if name not in names]:
            raise ConversionError(f"{self.directory} lacks {len(missing)} of {len(wanted)} tensors: {_some(missing)}")
        if extra := [n for n in names if n not in wanted and n not in optional and not ROTARY.search(n)]:
            what = f"{len(extra)} tensors that a {shape.family} model has no place for"
            raise ConversionError(f"{self.directory} has {what}: {_some(extra)}")

    def _check_tied_head(self, rows: int = 8192) -> None:
        """Raise ConversionError if the stored head is not the embedding that config.json says it is."""
        with open_safetensors(self._files[_HEAD]) as head, open_safetensors(self._files[_EMBEDDING]) as embedding:
            ours, theirs = head.get_slice(_HEAD), embedding.get_slice(_EMBEDDING)
            size = ours.get_shape()
            same = size == theirs.get_shape() and all(
                torch.equal(ours[i : i + rows].float(), theirs[i : i + rows].float()) for i in range(0, size[0], rows)
            )
        if not same:
            raise ConversionError(
                f"{self.directory}: tie_word_embeddings is true, but {_HEAD} differs from {_EMBEDDING}; if the head "
                'was trained by itself, set "tie_word_embeddings": false in config.json, else remove it'
            )

    def read(self, name: str, *ranges: slice) -> Tensor:
        """The tensor, or a range of each of its first dimensions, in its stored dtype; a view of the mapped file."""
        with open_safetensors(self._files[name]) as file:
            return file.get_slice(name)[ranges] if ranges else file.get_tensor(name)

    @property
    def widest_dtype(self) -> torch.dtype:
        """The dtype that holds every stored tensor exactly."""
        return functools.reduce(torch.promote_types, self._dtypes.values())


@contextmanager
def open_safetensors(path: Path) -> Iterator[Any]:
    """``safetensors.safe_open`` for torch. Raises ConversionError for a missing, damaged or truncated file."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except FileNotFoundError:
        raise ConversionError(f"{path} does not exist, but the checkpoint's index names it") from None
    except (SafetensorError, OSError) as error:
        found = f"{path.stat().st_size} bytes; {error}" if path.is_file() else f"not a file; {error}"
        raise ConversionError(f"{path} is damaged or truncated ({found}): download or build it again") from error


def check_finite(path: Path) -> None:
    """Raise ConversionError, which names it, for a tensor of a weight file with a value that is not finite."""
    with open_safetensors(path) as file:
        for name in file.keys():  # noqa: SIM118
            values = file.get_tensor(name)
            if values.numel() and values.dtype in DTYPES.values() and not is_finite(values):
                remedy = "download the checkpoint again, or use another one"
                raise ConversionError(f"{path}: {name} has NaN or infinite values: {remedy}")


def is_finite(values: Tensor) -> bool:
    """Whether all values are; at least one is needed."""
    return bool(torch.stack(values.aminmax()).isfinite().all())  # NaN is both least and greatest


def write_weights(
    directory: Path,
    stream: Iterable[tuple[str, Tensor]],
    tensors: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write ``stream`` to safetensors files in ``directory``, cast to ``dtype``, and the index of more than one file.

    One file of at most ``max_shard_bytes``, or one tensor, is in memory at a time; a tensor must stay unchanged until
    its file is written. ``tensors`` has the names and shapes that the stream must have, in any order. Raises
    ConversionError for a tensor that is unexpected, repeated, missing or of another shape, and for a failed write.
    """
    missing = dict(tensors)
    shards: list[list[str]] = []
    shard: dict[str, Tensor] = {}
    size = total = 0

    def flush() -> None:
        save_weights(shard, directory / f"part-{len(shards)}.safetensors")
        shards.append(list(shard))
        shard.clear()

    for name, tensor in stream:
        if name not in missing:
            known = "the stream has it twice" if name in tensors else "it is not a tensor of this checkpoint"
            raise ConversionError(f"cannot write {name}: {known}")
        expected = missing.pop(name)
        if tuple(tensor.shape) != expected:
            raise ConversionError(f"cannot write {name}: it has shape {list(tensor.shape)}, not {list(expected)}")
        needed = tensor.numel() * dtype.itemsize
        if shard and size + needed > max_shard_bytes:
            flush()
            size = 0
        shard[name] = tensor.detach().to("cpu", dtype).contiguous()
        size, total = size + needed, total + needed
    if missing:
        raise ConversionError(f"the stream ended without {len(missing)} tensors: {_some(list(missing))}")
    flush()
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = SINGLE if len(shards) == 1 else f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (directory / f"part-{number}.safetensors").rename(directory / file)
        weight_map.update(dict.fromkeys(names, file))
    if len(shards) > 1:
        sizes = {"total_size": total}
        write_json(directory / INDEX, {"metadata": sizes, "weight_map": dict(sorted(weight_map.items()))})


def save_weights(tensors: dict[str, Tensor], path: Path) -> None:
    """Save as safetensors with the permissions of any file, which the library makes private; or ConversionError."""
    try:
        save_file(tensors, path, metadata={"format": "pt"})
        path.chmod(0o644)
    except (SafetensorError, OSError) as error:
        raise ConversionError(f"cannot write {path}: {error}") from error


def _some(names: list[str], count: int = 3) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more
