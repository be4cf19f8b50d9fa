"""`--log tensorboard`: the curves of a run. The only code that knows TensorBoard."""

from pathlib import Path
from typing import Any

from attire.errors import AttireError
from attire.progress import Epoch, Progress

_NAMES = {"train_loss": "loss/train", "val_loss": "loss/validation", "val_accuracy": "accuracy/validation"}


class TensorBoardProgress:
    """Progress that passes everything on to `inner`, and writes each epoch as scalars into `folder`.

    Steps are epochs. After a resume the epochs go on in a further event file of the same folder, as TensorBoard
    expects. Raises AttireError where TensorBoard is not installed.
    """

    def __init__(self, inner: Progress, folder: Path) -> None:
        self.inner, self.writer = inner, _open_writer(folder)

    def note(self, name: str, text: str) -> None:
        self.inner.note(name, text)

    def advance(self, stage: str, done: int, total: int, text: str = "") -> None:
        self.inner.advance(stage, done, total, text)

    def epoch(self, line: Epoch) -> None:
        self.inner.epoch(line)
        for field, name in _NAMES.items():
            if (value := getattr(line, field)) is not None:
                self.writer.add_scalar(name, value, line.epoch)
        self.writer.add_scalar("seconds/epoch", line.seconds, line.epoch)
        self.writer.flush()

    def tested(self, accuracy: float, low: float, high: float, epoch: int) -> None:
        """The test accuracy, at the last epoch, with its 95 % confidence interval."""
        self.inner.tested(accuracy, low, high, epoch)
        for name, value in (("", accuracy), ("_low", low), ("_high", high)):
            self.writer.add_scalar(f"accuracy/test{name}", value, epoch)

    def close(self) -> None:
        self.writer.close()
        self.inner.close()


def _open_writer(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise AttireError("tensorboard", "not installed", do="pip install 'attire[tensorboard]'") from error
    return SummaryWriter(str(folder))
