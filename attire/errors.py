"""Errors and warnings of one line: the subject, what is wrong, where, and what to do."""


class AttireError(Exception):
    """Bad data, or a failed read or write; the command line exits with status 1.

    >>> print(AttireError("mine.csv", "784 values, expected 785", "line 1,042", "the file may be cut off there"))
    mine.csv: 784 values, expected 785 (line 1,042); the file may be cut off there
    """

    status = 1

    def __init__(self, subject: object, what: str, where: str = "", do: str = "") -> None:
        self.subject, self.what, self.where, self.do = str(subject), what, where, do
        line = f"{self.subject}: {what}"
        line += f" ({where})" if where else ""
        line += f"; {do}" if do else ""
        super().__init__(one_line(line))

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle all parts, so that a worker process passes the error on whole."""
        return type(self), (self.subject, self.what, self.where, self.do)


class UsageError(AttireError):
    """A command, option or argument that makes no sense; status 2."""

    status = 2


class Stopped(AttireError):  # noqa: N818  (not a fault)
    """Ctrl-C, raised after everything to be kept has been written; status 130."""

    status = 130


class AttireWarning(UserWarning):
    """A fact that a result depends on, but no failure; one line, in the form of an AttireError."""


def one_line(text: str) -> str:
    """Escape line breaks and escape codes, as file names may hold them."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)
