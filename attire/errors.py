"""What goes wrong, in one line: the subject, what, where, and what to do."""


class AttireError(Exception):
    """Bad data or a failed read or write; the command line ends with status 1.

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
        """From a process of its own an error comes back whole."""
        return type(self), (self.subject, self.what, self.where, self.do)


class UsageError(AttireError):
    """A command, option or argument that cannot be meant; status 2."""

    status = 2


class Stopped(AttireError):  # noqa: N818  (not a fault)
    """Ctrl-C, after everything that must be kept has been written; status 130."""

    status = 130


class AttireWarning(UserWarning):
    """Something a result depends on that is not a failure; one line, in the form of an AttireError."""


def one_line(text: str) -> str:
    """File names may hold line breaks or escape codes: show those escaped, so that an error stays one line."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)
