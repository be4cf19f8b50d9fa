import copy

import pytest

from attire.errors import AttireError, AttireWarning, Stopped, UsageError, one_line


def test_the_line_says_subject_what_where_and_what_to_do() -> None:
    error = AttireError("mine.csv", "784 values, expected 785", "line 1,042", "the file may be cut off there")
    assert str(error) == "mine.csv: 784 values, expected 785 (line 1,042); the file may be cut off there"
    assert (error.subject, error.what) == ("mine.csv", "784 values, expected 785")
    assert (error.where, error.do) == ("line 1,042", "the file may be cut off there")


@pytest.mark.parametrize(
    ("where", "do", "line"),
    [("", "", "a: b"), ("c", "", "a: b (c)"), ("", "d", "a: b; d"), ("c", "d", "a: b (c); d")],
)
def test_what_is_left_out_leaves_no_trace_in_the_line(where: str, do: str, line: str) -> None:
    assert str(AttireError("a", "b", where, do)) == line


def test_each_kind_has_its_exit_status() -> None:
    assert [kind("a", "b").status for kind in (AttireError, UsageError, Stopped)] == [1, 2, 130]


def test_a_warning_of_ours_is_told_from_a_library_s() -> None:
    assert issubclass(AttireWarning, UserWarning)
    assert not issubclass(UserWarning, AttireWarning)


@pytest.mark.parametrize("part", ["subject", "what", "where", "do"])
def test_a_line_break_in_any_part_is_escaped(part: str) -> None:
    parts = {name: name for name in ("subject", "what", "where", "do")} | {part: "two\nlines\x1b[31m"}
    line = str(AttireError(**parts))
    assert "two\\nlines\\x1b[31m" in line
    assert line.isprintable()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain name.csv", "plain name.csv"),
        ("a\nb\r\tc", "a\\nb\\r\\tc"),
        ("\x1b[2J", "\\x1b[2J"),
        ("\u2028", "\\u2028"),
        ("\udcff", "\\udcff"),  # a byte that is not UTF-8, as the file system gives it
        ("Größe 服装 👟", "Größe 服装 👟"),
        ("", ""),
    ],
)
def test_one_line_escapes_what_cannot_be_printed_and_nothing_else(text: str, shown: str) -> None:
    assert one_line(text) == shown


def test_an_error_survives_the_way_between_processes() -> None:
    error = UsageError("--lr", "expected a number", "line 3", "try 0.001")
    again = copy.copy(error)
    assert (type(again), str(again), again.status) == (UsageError, str(error), 2)
