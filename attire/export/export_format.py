"""What every format of `attire export` does: build the network, and write it with what it says of itself."""

import contextlib
import io
import logging
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from attire.data.loading import load_dataset
from attire.export.network import EndToEndNetwork

_CALIBRATION_IMAGES = 300  # of the training set: what NNCF takes by default


class ExportFormat(ABC):
    """A format; `inference.runtimes` reads what it writes. precisions: those it has, the default first."""

    precisions: ClassVar[tuple[str, ...]]

    def build(self, network: EndToEndNetwork, precision: str, folder: Path) -> tuple[Path, dict[str, Any]]:
        """Write the network into a folder, without metadata: its path, and the versions it was made with.

        Raises AttireError where the format's packages are not installed.
        """
        with _silence():
            return self._build(network, precision, folder)

    @abstractmethod
    def write(self, built: Path, metadata: dict[str, Any], card: str, path: Path) -> None:
        """Write what `build` built under its final name, sealed with its metadata and the bundle's card."""

    @abstractmethod
    def _build(self, network: EndToEndNetwork, precision: str, folder: Path) -> tuple[Path, dict[str, Any]]: ...

    def _example_images(self) -> torch.Tensor:
        """What the exporters trace the network with; the number of images stays free."""
        return torch.zeros(2, 28, 28, dtype=torch.uint8)

    def _calibration_images(self) -> NDArray[np.uint8]:
        """(300, 28, 28): what int8 takes the ranges of activations from."""
        return load_dataset(part="train").images[:_CALIBRATION_IMAGES]


@contextmanager
def _silence() -> Iterator[None]:
    """Exporters print progress, deprecations and advice, which are not for the user."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logging.disable(before)
