"""What becomes of every tensor of a conversion, decided from the headers alone."""

import difflib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Optional

import mlx.core as mx

from ..config import ModelArgs
from ..models.hydrahead import Model, may_cast, may_quantize
from .reader import CheckpointReader
from .writer import TensorSpec

FLOAT_DTYPES = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}
FLOAT16_MAX = 65504


@dataclass(frozen=True)
class Quantization:
    """mlx-lm's affine quantisation."""

    bits: int
    group_size: int

    def as_config(self) -> dict:
        return {"group_size": self.group_size, "bits": self.bits, "mode": "affine"}


@dataclass(frozen=True)
class Step:
    """How one tensor of the output is made.

    target, shape: its name and its shape before quantisation.
    sources: the tensors that it is made from, and the shapes that they must have.
    make: gives it from the sources' arrays, in their order.
    what: the same in words.
    like: the tensor of the source whose dtype it takes; the first of its sources if None.
    dtype: what it is cast to; None until the plan is checked, if it takes another's.
    quantization: how it is quantised, if it is.
    """

    target: str
    shape: tuple[int, ...]
    sources: dict[str, tuple[int, ...]]
    make: Callable[..., mx.array]
    what: str
    like: Optional[str] = None
    dtype: Optional[mx.Dtype] = None
    quantization: Optional[Quantization] = None

    @property
    def dtype_in_words(self) -> str:
        """``"bfloat16"``, or ``"4 bits, bfloat16"``."""
        dtype = str(self.dtype).removeprefix("mlx.core.")
        return dtype if self.quantization is None else f"{self.quantization.bits} bits, {dtype}"

    @property
    def outputs(self) -> list[TensorSpec]:
        """The tensors that are written: the weight, or its packed form with scales and biases."""
        if self.quantization is None:
            return [TensorSpec(self.target, self.shape, self.dtype)]
        path = self.target.removesuffix(".weight")
        *rows, columns = self.shape
        packed = (*rows, columns * self.quantization.bits // 32)
        groups = (*rows, columns // self.quantization.group_size)
        return [
            TensorSpec(self.target, packed, mx.uint32),
            TensorSpec(f"{path}.scales", groups, self.dtype),
            TensorSpec(f"{path}.biases", groups, self.dtype),
        ]

    def run(self, reader: CheckpointReader) -> Iterator[tuple[str, mx.array]]:
        """Read, make, cast and quantise: the names of ``outputs`` with their arrays.

        Raises:
            ValueError: float16 cannot hold a value.
        """
        array = self.make(*(reader.read(name) for name in self.sources))
        if array.dtype != self.dtype:
            if self.dtype == mx.float16 and (largest := mx.abs(array).max().item()) > FLOAT16_MAX:
                raise ValueError(
                    f"{self.target} holds {largest:g}, float16 ends at {FLOAT16_MAX}: "
                    "use --dtype bfloat16."
                )
            array = array.astype(self.dtype)
        if self.quantization is None:
            arrays = (array,)
        else:
            arrays = mx.quantize(
                array, group_size=self.quantization.group_size, bits=self.quantization.bits
            )
        for spec, output in zip(self.outputs, arrays):
            yield spec.name, output


@dataclass(frozen=True)
class Conversion:
    """A whole conversion.

    config: the config.json that is written.
    args: the same, understood.
    steps: how every tensor is made.
    file_format: what the files say they are for, "mlx" or "pt".
    dropped: the tensors of the source that are left out, and why.
    """

    config: dict
    args: ModelArgs
    steps: list[Step]
    file_format: str = "mlx"
    dropped: dict[str, str] = field(default_factory=dict)

    @property
    def outputs(self) -> list[TensorSpec]:
        return [spec for step in self.steps for spec in step.outputs]

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.outputs)

    @property
    def parameters(self) -> int:
        return sum(math.prod(step.shape) for step in self.steps)

    def checked(self, reader: CheckpointReader) -> "Conversion":
        """The plan with the dtypes and the dropped tensors of a source that it fits.

        Raises:
            ValueError: a tensor that is missing, that nothing uses, or of a wrong shape or dtype.
        """
        used = {name: shape for step in self.steps for name, shape in step.sources.items()}
        unused = [name for name in reader.tensors if name not in used]
        check_names(reader, used, [n for n in unused if self._why_dropped(n) is None])
        for name, shape in used.items():
            info = reader.tensors[name]
            if info.shape != shape:
                raise ValueError(
                    f"{name} in {info.shard} has shape {list(info.shape)}, "
                    f"the config asks for {list(shape)}."
                )
            if info.dtype not in FLOAT_DTYPES:
                raise ValueError(
                    f"{name} in {info.shard} is {info.dtype}: expected one of "
                    f"{', '.join(FLOAT_DTYPES)}."
                )
        steps = []
        for step in self.steps:
            if step.dtype is None:
                like = step.like or next(iter(step.sources))
                step = replace(step, dtype=FLOAT_DTYPES[reader.tensors[like].dtype])
            steps.append(step)
        dropped = {name: self._why_dropped(name) for name in unused}
        return replace(self, steps=steps, dropped=dropped)

    def cast(self, dtype: mx.Dtype) -> "Conversion":
        """The plan with all that may leave float32 in ``dtype``."""
        steps = [
            replace(step, dtype=dtype, what=cast_in_words(step, dtype))
            if may_cast(step.target)
            else step
            for step in self.steps
        ]
        known = [name for name in ("dtype", "torch_dtype") if name in self.config]
        name = str(dtype).removeprefix("mlx.core.")
        return replace(
            self, steps=steps, config={**self.config, **dict.fromkeys(known or ["dtype"], name)}
        )

    def quantized(self, quantization: Quantization) -> "Conversion":
        """The plan with all weights quantised that mlx-lm would quantise.

        Raises:
            ValueError: there is none.
        """
        modules = dict(Model(self.args).named_modules())
        steps = []
        for step in self.steps:
            path, _, parameter = step.target.rpartition(".")
            is_weight = parameter == "weight" and hasattr(modules.get(path), "to_quantized")
            if is_weight and may_quantize(path):
                if step.shape[-1] % quantization.group_size == 0:
                    step = replace(step, quantization=quantization)
                else:
                    what = f"{step.what}; {step.shape[-1]} columns: not quantised"
                    step = replace(step, what=what)
            steps.append(step)
        if not any(step.quantization for step in steps):
            raise ValueError(
                f"--q-group-size {quantization.group_size}: no weight has a multiple of it as its "
                "number of columns; expected 32, 64 or 128."
            )
        config = {
            **self.config,
            "quantization": quantization.as_config(),
            "quantization_config": quantization.as_config(),
        }
        return replace(self, steps=steps, config=config)

    def _why_dropped(self, name: str) -> Optional[str]:
        """Why a tensor may be left out; None if it may not."""
        if name == "lm_head.weight" and self.args.tie_word_embeddings:
            return "tied to model.embed_tokens.weight"
        if name.endswith("rotary_emb.inv_freq"):
            return "follows from rope_theta"
        return None


def check_names(reader: CheckpointReader, used: dict, unknown: list[str]) -> None:
    """Raise a ValueError if a tensor is missing, or if one is there that nothing uses."""
    missing = [name for name in used if name not in reader.tensors]
    if missing:
        text = f"{reader.folder}: tensors are missing: {and_more(missing)}."
        if nearest := difflib.get_close_matches(missing[0], unknown, 1):
            text += f" The nearest name there is {nearest[0]}."
        raise ValueError(text)
    if unknown:
        nearest = difflib.get_close_matches(unknown[0], used, 1, 0)
        raise ValueError(
            f"{reader.folder}: tensors that nothing uses: {and_more(unknown)}. "
            f"The nearest name that is known is {nearest[0]}."
        )


def and_more(names: list[str], shown: int = 3) -> str:
    more = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {more} more" if more > 0 else "")


def cast_in_words(step: Step, dtype: mx.Dtype) -> str:
    if step.dtype == dtype:
        return step.what
    return f"{step.what}; from {str(step.dtype).removeprefix('mlx.core.')}"
