"""Output folders that appear only once complete, and the files that are copied unchanged beside the weights."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch

from nemo_tropd.convert.families import ConversionError
from nemo_tropd.files import complete_folder, refusal, write_json

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ot", ".index.json")
# Of other things than this model: an adapter, a trainer, the model it was made from, its maker's own format.
_OTHERS = ("manifest.json", "adapter_config.json", "trainer_state.json", "README.md", ".gitattributes", "params.json")
_TEMPLATES = "additional_chat_templates"
_SPARE_BYTES = 64 * 2**20
SIDECAR = "hf"


@contextlib.contextmanager
def new_folder(
    path: str | Path, overwrite: bool = False, needed_bytes: int = 0, *, source: Path | None = None
) -> Iterator[Path]:
    """:func:`nemo_tropd.files.complete_folder` after :func:`check_free_to_write`; an old folder stays until then."""
    check_free_to_write(Path(path), overwrite, needed_bytes, source)
    with complete_folder(path) as folder:
        yield folder


def check_free_to_write(path: Path, overwrite: bool, needed_bytes: int, source: Path | None = None) -> None:
    """Raise ConversionError if ``path`` exists and ``overwrite`` is off, if no folder can be made or replaced there, if
    that would touch ``source``, or the disk lacks ``needed_bytes``. A link stands for what it leads to."""
    if why := refusal(path):
        raise ConversionError(f"{path}: {why}")
    if source is not None:
        check_apart(path, source)
    if path.exists() and not overwrite:
        raise ConversionError(f"{path} exists: choose another folder, or pass --overwrite (overwrite=True)")
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_dir():
        raise ConversionError(f"{path} is a file, not a folder: choose another folder")
    if target.is_mount():
        raise ConversionError(f"{path} is where a disk is mounted, which cannot be replaced: name a folder inside it")
    existing = next(parent for parent in target.parents if parent.exists())
    if not existing.is_dir():
        raise ConversionError(f"{path}: {existing} is a file, not a folder: choose another folder")
    free = shutil.disk_usage(existing).free
    if free < needed_bytes + _SPARE_BYTES * bool(needed_bytes):
        sizes = f"{free / 1e9:.2f} GB free, but {needed_bytes / 1e9:.2f} GB are needed"
        raise ConversionError(f"{existing} has {sizes}: free disk space or choose another disk")


def check_apart(path: Path, source: Path, *, inside: bool = False) -> None:
    """Raise ConversionError if a folder at ``path`` would replace the folder ``source``, what is in it (unless
    ``inside``), or what its links lead to."""
    if refusal(source):
        return  # there is nothing to protect, and reading it says what is wrong
    links = [entry for entry in source.iterdir() if entry.is_symlink()] if source.is_dir() else []
    for kept in (source, *links):
        if _lies_in(kept, path):
            what = (
                "is the source itself" if _lies_in(path, kept) else f"has {os.path.realpath(kept)} in it, which is read"
            )
            raise ConversionError(f"cannot write to {path}: it {what}; choose another folder")
    if not inside and _lies_in(path, source):
        raise ConversionError(f"cannot write to {path}: it lies in the source {source}; choose another folder")


def _lies_in(path: Path, folder: Path) -> bool:
    """Whether ``path`` is ``folder`` or below it, whatever the links and mounts by which they are named."""
    real = Path(os.path.realpath(path))
    if not folder.exists():
        return Path(os.path.realpath(folder)) in (real, *real.parents)
    return any(parent.exists() and parent.samefile(folder) for parent in (real, *real.parents))


def copy_sidecar(source_dir: Path, target: Path, dtype: torch.dtype | None = None) -> None:
    """Copy every file of a Hugging Face folder that is not weights, nor of adapters and trainers, nor its model card:
    config, tokenizer and so on. They stay the same byte for byte, except that config.json gets ``dtype``, under both
    names in use."""
    target.mkdir(exist_ok=True)  # not its parents: a checkpoint that another process removed must not come back hollow
    for file in sorted(source_dir.iterdir()):
        if file.is_file() and not file.name.endswith(_WEIGHTS) and file.name not in _OTHERS:
            shutil.copyfile(file, target / file.name)
    if (source_dir / _TEMPLATES).is_dir():
        shutil.copytree(source_dir / _TEMPLATES, target / _TEMPLATES, dirs_exist_ok=True)
    if dtype is None:
        return
    config = json.loads((target / "config.json").read_text(encoding="utf-8"))
    fields = {"torch_dtype", "dtype"} & config.keys() or {"dtype"}
    changed = {**config, **dict.fromkeys(fields, str(dtype).removeprefix("torch."))}
    if changed != config:
        write_json(target / "config.json", changed)


def write_hf_sidecar(checkpoint_dir: str | Path, source_dir: str | Path) -> None:
    """Copy config and tokenizer of ``source_dir`` to ``checkpoint_dir/hf``, so that export needs no other folder.
    ``source_dir`` is a Hugging Face folder, or a checkpoint that has such a folder itself."""
    source = Path(source_dir)
    if not (source / "config.json").is_file() and (source / SIDECAR / "config.json").is_file():
        source = source / SIDECAR
    if not (source / "config.json").is_file():
        raise ConversionError(f"{source_dir} has no config.json: the Hugging Face folder of the model is needed")
    copy_sidecar(source, Path(checkpoint_dir) / SIDECAR)
