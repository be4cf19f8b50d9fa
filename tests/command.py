"""`attire`, called as from a shell, but in this process."""

import io
import shlex
import sys
import warnings
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass

import pytest

from attire.cli import main

# The recipe `tiny` of conftest.py.
TINY = shlex.split("--freeze-to block2 --image-size 16 --hidden 16 --epochs 3 --batch-size 16 --precision fp32 --tta 1")


@dataclass(frozen=True)
class Done:
    status: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The only line on stderr, after `error: `."""
        assert self.err.startswith("error: "), self
        assert self.err.count("\n") == 1, self
        return self.err.removeprefix("error: ").removesuffix("\n")

    @property
    def last(self) -> str:
        """The last line on stderr."""
        return self.err.splitlines()[-1]


def attire(*arguments: object) -> Done:
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["attire", *map(str, arguments)])
        patch.setattr(warnings, "showwarning", warnings.showwarning)  # which `main` replaces
        with pytest.raises(SystemExit) as caught:
            main.main()
    assert isinstance(caught.value.code, int)
    return Done(caught.value.code, out.getvalue(), err.getvalue())
