"""The weight files of a Hugging Face folder: the one list that trainer, engine, fingerprint and conversion read.
Imports no torch.

vLLM opens every ``*.safetensors`` of the folder, or those that the index names if there is one; transformers prefers
model.safetensors to an index. A folder that they would read otherwise than we do is refused.
"""

import json
import re
from pathlib import Path

from nemo_tropd.convert.config_json import ConversionError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# Tables made from config.json, which old checkpoints stored.
ROTARY = re.compile(r"rotary_emb\.(inv_freq|cos_cached|sin_cached)$")
_POINTER = b"version https://git-lfs"
_LARGE = ("tokenizer.json", "tokenizer.model")  # what else a hub keeps in Git LFS
_QUANTISED = "hf_quant_config.json"  # vLLM obeys it, wherever config.json says nothing
_TO_SAFETENSORS = "load it with transformers' from_pretrained and write it with save_pretrained"


def weight_files(directory: str | Path) -> list[Path]:
    """The files that the index names, by name, else model.safetensors. Raises ConversionError, with the remedy, where
    there are none, where programs would choose differently, and for a Git LFS pointer (of the tokenizer, too), an empty
    or an outside file."""
    directory = Path(directory)
    if (directory / _QUANTISED).is_file():
        raise ConversionError(f"{directory / _QUANTISED} says that the weights are quantised: use their original")
    index, single = directory / INDEX, directory / SINGLE
    present = sorted(directory.glob("*.safetensors"))
    if index.is_file():
        files = _indexed(index)
        if single.is_file() and single not in files:
            raise ConversionError(f"{single} is not in {INDEX}: programs differ on which of the two counts; remove one")
    elif single.is_file():
        files = [single]
        if stray := [path.name for path in present if path != single]:
            raise ConversionError(
                f"{directory} has {', '.join(stray)} beside {SINGLE}, and no {INDEX}: vLLM would load all of them; "
                f"move {stray[0]} elsewhere"
            )
    else:
        raise ConversionError(_nothing(directory, present))
    for path in (*files, *(directory / name for name in _LARGE)):
        _refuse_pointer(path)
    return files


def _indexed(index: Path) -> list[Path]:
    _refuse_pointer(index)
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConversionError(f"{index} is malformed ({error!r}): download it again") from None
    outside = [name for name in names if not isinstance(name, str) or Path(name).name != name]
    if outside or not names:
        raise ConversionError(f"{index} must name files of its own folder in weight_map, not {outside or 'none'}")
    return [index.parent / name for name in names]


def _refuse_pointer(path: Path) -> None:
    """Refuse an empty file, and what a clone without Git LFS leaves instead of a large one. A missing file passes."""
    try:
        with path.open("rb") as file:
            start = file.read(len(_POINTER))
    except (OSError, ValueError):  # named by what opens it
        return
    if start == _POINTER:
        raise ConversionError(f"{path} is a Git LFS pointer, not the file: run `git lfs pull` in its folder")
    if not start:
        raise ConversionError(f"{path} is empty: download it again")


def _nothing(directory: Path, present: list[Path]) -> str:
    """What is said of a folder without an index and without model.safetensors."""
    what = f"{directory} has no safetensors file"
    others = sorted(path.name for kind in ("*.bin", "*.pt", "*.pth", "*.gguf") for path in directory.glob(kind))
    if (directory / "adapter_config.json").is_file():
        return f"{what} of a model, only an adapter: merge it into its base (peft: merge_and_unload, save_pretrained)"
    if present:
        names = ", ".join(path.name for path in present[:3])
        return f"{directory} has {names}, but neither {SINGLE} nor {INDEX}: download what is missing"
    if others:
        return f"{what}, only {', '.join(others[:3])}: {_TO_SAFETENSORS}"
    return f"{what}: neither {SINGLE} nor {INDEX}; provide a Hugging Face checkpoint in that format"
