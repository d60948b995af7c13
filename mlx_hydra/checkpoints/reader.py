"""Read the safetensors of a folder: everything checked from the headers, tensors one at a time."""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Union

import mlx.core as mx

INDEX = "model.safetensors.index.json"
NUMBERED_SHARD = re.compile(r"model-(\d+)-of-(\d+)\.safetensors")
MAX_HEADER_BYTES = 100_000_000

# Bytes of one element, by safetensors' names.
ELEMENT_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "U16": 2, "I16": 2,
    "F16": 2, "BF16": 2, "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    """What a header tells of a tensor: its shape, safetensors' name of its dtype, its file."""

    shape: tuple[int, ...]
    dtype: str
    shard: Path


class CheckpointReader:
    """The weights and the config of a checkpoint folder.

    Opening it reads config.json and the headers; a tensor's data is read when it is asked for.

    Raises:
        ValueError: no config, no safetensors, a shard that is missing, cut off or at odds with the
            index.
    """

    def __init__(self, folder: Union[str, Path]):
        self.folder = Path(folder)
        self.config = read_object(self.folder / "config.json")
        self.shards, weight_map = self._find_shards()
        self.tensors: dict[str, TensorInfo] = {}
        for shard in self.shards:
            for name, info in read_header(shard).items():
                if name in self.tensors:
                    raise ValueError(
                        f"{self.folder}: {name} is in {self.tensors[name].shard.name} and in "
                        f"{shard.name}: expected it once."
                    )
                self.tensors[name] = info
        if weight_map is not None:
            self._check_index(weight_map)

    def read(self, name: str) -> mx.array:
        """The tensor ``name``; the reader keeps no reference to it."""
        return mx.load(str(self.tensors[name].shard))[name]

    def _find_shards(self):
        """The files that hold the weights, and the index's weight_map if there is one."""
        if (self.folder / INDEX).is_file():
            weight_map = read_object(self.folder / INDEX).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise ValueError(f"{self.folder / INDEX}: expected an object 'weight_map'.")
            for name, shard in weight_map.items():
                if not isinstance(shard, str) or Path(shard).name != shard:
                    raise ValueError(
                        f"{self.folder / INDEX}: {name} is said to be in {shard!r}: "
                        "expected a file name in the same folder."
                    )
                if not (self.folder / shard).is_file():
                    count = list(weight_map.values()).count(shard)
                    raise ValueError(
                        f"{self.folder}: shard {shard} is missing; {INDEX} names {count} tensors "
                        f"in it, {name} among them."
                    )
            return [self.folder / shard for shard in sorted(set(weight_map.values()))], weight_map

        if (self.folder / "model.safetensors").is_file():
            return [self.folder / "model.safetensors"], None
        numbered = {
            path: match
            for path in sorted(self.folder.glob("model-*.safetensors"))
            if (match := NUMBERED_SHARD.fullmatch(path.name))
        }
        if not numbered:
            raise ValueError(self._no_safetensors())
        total = next(iter(numbered.values()))[2]
        for i in range(1, int(total) + 1):
            shard = f"model-{i:0{len(total)}d}-of-{total}.safetensors"
            if self.folder / shard not in numbered:
                raise ValueError(
                    f"{self.folder}: shard {shard} is missing: expected {int(total)} of them."
                )
        return list(numbered), None

    def _no_safetensors(self) -> str:
        for pattern in ("*.bin", "*.pt", "*.pth"):
            for path in sorted(self.folder.glob(pattern)):
                return (
                    f"{path} is refused: it is a pickle, and reading a pickle can run code that "
                    "it holds. Only safetensors are read: save the model with "
                    "save_pretrained(..., safe_serialization=True) first."
                )
        return (
            f"{self.folder} holds no model.safetensors and no model-*-of-*.safetensors; pickled "
            "weights (.bin) are not read."
        )

    def _check_index(self, weight_map):
        for name, shard in weight_map.items():
            if name not in self.tensors or self.tensors[name].shard.name != shard:
                raise ValueError(
                    f"{self.folder}: {INDEX} names {name} in {shard}: it is not there."
                )
        for name, info in self.tensors.items():
            if name not in weight_map:
                raise ValueError(f"{info.shard} holds {name}, which {INDEX} does not name.")


def read_object(path: Path) -> dict:
    """The object in a JSON file; a ValueError names the file if there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}.") from error
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}).") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object.")
    return content


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors that a safetensors file promises, checked against its length.

    Raises:
        ValueError: the file is cut off, longer than its header says, or no safetensors at all.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(9)
        if start.startswith(b"version "):
            raise ValueError(f"{path} is a Git LFS pointer, not the weights: run git lfs pull.")
        header_bytes = int.from_bytes(start[:8], "little")
        if header_bytes > MAX_HEADER_BYTES or not b"{".startswith(start[8:]):
            raise ValueError(f"{path} is not a safetensors file.")
        if size < 8 + header_bytes or size < 8:
            raise ValueError(f"{path} is cut off: {size} bytes end within its header.")
        file.seek(8)
        raw = file.read(header_bytes)
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        tensors = {
            name: (tuple(entry["shape"]), entry["dtype"], *entry["data_offsets"])
            for name, entry in header.items()
        }
        end = 0
        for name, (shape, dtype, begin, finish) in sorted(tensors.items(), key=lambda t: t[1][2:]):
            if begin != end or finish - begin != math.prod(shape) * ELEMENT_BYTES[dtype]:
                raise ValueError(f"bytes {begin} to {finish} do not fit {name} {dtype} {shape}")
            end = finish
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: its safetensors header is damaged ({error}).") from error
    promised = 8 + header_bytes + end
    if size < promised:
        raise ValueError(f"{path} is cut off: {size} bytes, its header promises {promised}.")
    if size > promised:
        raise ValueError(f"{path} is damaged: {size} bytes, its header promises {promised}.")
    return {name: TensorInfo(shape, dtype, path) for name, (shape, dtype, *_) in tensors.items()}
