"""How weights are rounded to the block format of a file."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor

from treadle.core.config import Config
from treadle.core.progress import Progress
from treadle.data.source import Env
from treadle.models.decoder import DecoderModel


class FileRounding(Config):
    """A shape: rounds a model's matrices to a block format before they are written."""

    @abstractmethod
    def __call__(
        self, model: DecoderModel, env: Env, format: str, progress: Progress
    ) -> dict[str, Tensor]:
        """Bytes by parameter name, for the parameters that it rounds; the rest are rounded to the
        nearest as they are written. The model's weights become what the bytes say.

        Raises:
            ConfigError: it cannot round to this format.
        """


class Nearest(FileRounding):
    """Each weight by itself, to the nearest level."""

    def __call__(
        self, model: DecoderModel, env: Env, format: str, progress: Progress
    ) -> dict[str, Tensor]:
        return {}
