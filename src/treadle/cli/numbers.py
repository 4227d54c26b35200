"""In which numbers a command keeps a model's weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from treadle.models.decoder import DecoderModel

DTYPES = ("float32", "bfloat16", "float16")
Dtype = Annotated[
    str | None,
    typer.Option("--dtype", help="float32, bfloat16 or float16, for a torch device."),
]
Quantize = Annotated[
    str | None,
    typer.Option(
        "--quantize",
        metavar="KIND|YAML",
        help="Float8, Int8, Int4 or NF4 on a torch device, or such as '{kind: Int8, group: 32}'.",
    ),
]


@dataclass(frozen=True)
class Numbers:
    """What the options say."""

    dtype: str | None = None
    quantize: str | None = None

    @property
    def given(self) -> bool:
        return self.dtype is not None or self.quantize is not None

    def put(self, model: DecoderModel, device: str) -> DecoderModel:
        """The model on this device, in these numbers.

        Raises:
            TreadleError: there is no such device or dtype.
            ConfigError: there is no such format, or the device or the model is not one for it.
        """
        import torch

        from treadle.core.errors import TreadleError, did_you_mean

        if self.dtype is not None and self.dtype not in DTYPES:
            hint = did_you_mean(self.dtype, DTYPES)
            raise TreadleError(f"--dtype {self.dtype}: there are {', '.join(DTYPES)}{hint}")
        model = model.requires_grad_(False).eval()
        try:
            model = model.to(torch.device(device), getattr(torch, self.dtype or "", None))
        except (RuntimeError, AssertionError) as error:
            raise TreadleError(f"device `{device}` cannot be used: {error}") from None
        return model if self.quantize is None else _quantised(model, self.quantize)


def _quantised(model: DecoderModel, text: str) -> DecoderModel:
    from treadle.cli.kinds import named
    from treadle.quantization.quantize import Quantization

    return named(text, Quantization, "--quantize")(model)  # type: ignore[type-abstract]
