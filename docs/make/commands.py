"""docs/commands.md: every `--help`, as the program itself gives it. `tests/test_docs.py` holds the two together.

python docs/make/commands.py
"""

from pathlib import Path

from attire.cli.main import cli
from attire.storage.files import write_text

PAGE = Path(__file__).parent.parent / "commands.md"
COLUMNS = 80
BEGIN = """# Commands

Made by `python docs/make/commands.py` from the program itself; not edited. `attire train --help` shows the same.
Exit status: 0; 1 for data and I/O; 2 for usage; 130 after Ctrl-C.
"""


def helps() -> dict[str, str]:
    """`attire` and each command's name, with its help at COLUMNS."""
    root = cli.context_class(cli, info_name="attire", terminal_width=COLUMNS, **cli.context_settings)
    texts = {"attire": root.get_help()}
    for name in sorted(cli.commands):
        command = cli.commands[name]
        texts[f"attire {name}"] = command.context_class(
            command, parent=root, info_name=name, terminal_width=COLUMNS
        ).get_help()
    return texts


def page() -> str:
    return BEGIN + "".join(f"\n## {name}\n\n```text\n{text}\n```\n" for name, text in helps().items())


if __name__ == "__main__":
    write_text(PAGE, page())
