"""A student by dropping layers of its teacher, of any Hugging Face checkpoint whose tensors are named ``*.layers.N.*``.

python examples/drop_layers.py TEACHER STUDENT --drop 12 14 16 [--overwrite]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from nemo_tropd.command_line import printable
from nemo_tropd.convert.families import ConversionError
from nemo_tropd.convert.folders import copy_sidecar, new_folder
from nemo_tropd.convert.hf_files import open_safetensors, save_weights
from nemo_tropd.convert.weight_files import INDEX, SINGLE, weight_files
from nemo_tropd.files import write_json


def drop_layers(
    source_dir: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    layers_to_drop: Sequence[int],
    *,
    overwrite: bool = False,
) -> Path:
    """Copy a Hugging Face checkpoint without some of its layers and renumber the others. Deterministic.

    Weights are copied one safetensors file at a time, so at most one is in memory. ``config.json`` gets the new
    ``num_hidden_layers`` (and ``layer_types`` if present); other files are copied. With ``overwrite`` an existing
    ``out_dir`` is replaced once the new folder is complete. Returns ``out_dir``.

    Raises ConversionError if the source is not a checkpoint, the layers are out of range, repeated, or all of them, or
    ``out_dir`` exists without ``overwrite``, is the source, lies in it or holds it.
    """
    source, target = Path(source_dir), Path(out_dir)
    config = read_config(source)
    layers = int(config["num_hidden_layers"])
    dropped = sorted(layers_to_drop)
    if len(set(dropped)) != len(dropped) or any(not 0 <= i < layers for i in dropped) or len(dropped) >= layers:
        raise ConversionError(
            f"layers_to_drop={list(layers_to_drop)}: must be different numbers from 0 to {layers - 1} and keep a layer "
            f"({source} has {layers})"
        )
    kept = [i for i in range(layers) if i not in dropped]
    if config.get("layer_types"):
        config["layer_types"] = [config["layer_types"][i] for i in kept]
    config["num_hidden_layers"] = len(kept)
    files = weight_files(source)
    size = sum(f.stat().st_size for f in files)
    with new_folder(target, overwrite, size, source=source) as part:
        copy_sidecar(source, part)
        weight_map: dict[str, str] = {}
        total = 0
        for file in files:
            state = _read_kept(file, {old: new for new, old in enumerate(kept)})
            weight_map.update(dict.fromkeys(state, file.name))
            total += sum(t.numel() * t.element_size() for t in state.values())
            if state:
                save_weights(state, part / file.name)
        if [file.name for file in files] != [SINGLE]:
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            write_json(part / INDEX, index)
        write_json(part / "config.json", config)
    return target


def _read_kept(file: Path, new_index: dict[int, int]) -> dict[str, torch.Tensor]:
    """Tensors of one file that stay, under their new names."""
    state: dict[str, torch.Tensor] = {}
    with open_safetensors(file) as tensors:
        for name in tensors.keys():  # noqa: SIM118 (no mapping: it only offers keys())
            head, dot, rest = name.partition(".layers.")
            number, _, leaf = rest.partition(".")
            if not dot:
                state[name] = tensors.get_tensor(name)
            elif int(number) in new_index:
                state[f"{head}.layers.{new_index[int(number)]}.{leaf}"] = tensors.get_tensor(name)
    return state


def read_config(folder: Path) -> dict[str, Any]:
    """A checkpoint's config.json; ConversionError if it is missing, damaged or has no num_hidden_layers."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        int(config["num_hidden_layers"])
    except FileNotFoundError:
        raise ConversionError(f"{folder} is not a Hugging Face checkpoint: it has no config.json") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ConversionError(f"{path} is malformed: {error!r}") from error
    return config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", help="Hugging Face folder")
    parser.add_argument("student", help="folder to write")
    parser.add_argument("--drop", type=int, nargs="+", required=True, help="layers to drop, counted from 0")
    parser.add_argument("--overwrite", action="store_true", help="replace STUDENT if it exists")
    options = parser.parse_args()
    try:
        print(drop_layers(options.teacher, options.student, options.drop, overwrite=options.overwrite))
    except (ConversionError, OSError) as error:
        sys.exit(f"error: {printable(str(error))}")


if __name__ == "__main__":
    main()
