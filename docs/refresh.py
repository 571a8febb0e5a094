"""Write into the Markdown what the sources say: line counts, and the tables of all settings.

    python docs/refresh.py

A row `| [file](file) | 123 | ...` gets that file's number of lines, or that of all Python files in a folder. The table
below `<!-- module.Class -->` gets the fields of that dataclass, their defaults and the comments beside or above them.
"""

import ast
import inspect
import re
import sys
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

sys.path.insert(0, str(ROOT))
from files.settings import show_value  # noqa: E402


def count_lines(path: Path) -> int:
    files = sorted(path.rglob("*.py")) if path.is_dir() else [path]
    return sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files)


def settings_table(module: str, name: str) -> str:
    """The fields that a dataclass adds to those it inherits: | name | default | comment |."""
    settings = getattr(import_module(module), name)
    source = inspect.getsource(settings)
    lines, (body,) = source.splitlines(), ast.parse(source).body
    rows = ["| name | default | |", "|---|---|---|"]
    for field in (node for node in body.body if isinstance(node, ast.AnnAssign)):
        start = field.lineno - 1
        while lines[start - 1].strip().startswith("#"):
            start -= 1
        above = [line.strip("# ") for line in lines[start : field.lineno - 1]]
        comment = " ".join([*above, lines[field.end_lineno - 1].partition("  # ")[2]]).strip()
        known = not isinstance(field.value, ast.Call)  # else it depends on the machine
        default = show_value(getattr(settings, field.target.id)) if known else ""
        escaped = comment.replace("|", r"\|")  # else it would end the cell
        rows.append(f"| `{field.target.id}` | {default} | {escaped} |")
    return "\n".join(rows)


def refresh(text: str) -> str:
    """A page as it should be."""

    def row(match: re.Match) -> str:
        return f"{match[1]}{count_lines(ROOT / match[2])}{match[3]}"

    def table(match: re.Match) -> str:
        return f"{match[1]}{settings_table(match[2], match[3])}\n"

    text = re.sub(r"(?m)^(\| \[[^]]*\]\(([^)]+)\) \| )\d+( \|)", row, text)
    return re.sub(r"(<!-- (\w+)\.(\w+) -->\n)(?:\|.*\n)*", table, text)


if __name__ == "__main__":
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        if refresh(text) != text:
            page.write_text(refresh(text), encoding="utf-8")
            print("wrote", page.relative_to(ROOT))
