"""Nothing in the sources removes, renames or cuts a file but what docs/files.md lists with its reason."""

import re
from pathlib import Path

import files

ROOT = Path(files.__file__).parents[1]
CALLS = re.compile(r"[\w.()]*\.(?:unlink|rmdir|rename|touch|truncate|removedirs|symlink_to|hardlink_to)\("
                   r"|os\.(?:replace|remove|rename|renames|unlink|rmdir)\(|(?:shutil\.)?rmtree\(|shutil\.move\(")


def code_of(line: str) -> str | None:
    """The call in a line that removes, renames or cuts, with its arguments."""
    found = CALLS.search(line)
    if not found or line.lstrip().startswith("#"):
        return None
    end, depth = found.end(), 1
    while depth:
        depth += {"(": 1, ")": -1}.get(line[end], 0)
        end += 1
    return line[found.start():end]


def test_every_removal_is_listed():
    sources = [path for path in ROOT.rglob("*.py") if path.relative_to(ROOT).parts[0] not in ("tests", "docs")
               and not any(part[0] == "." for part in path.relative_to(ROOT).parts)]
    found = {(str(path.relative_to(ROOT)), code) for path in sources for code in map(code_of, path.read_text().splitlines())
             if code}
    listed = set(re.findall(r"^\| `([\w/]+\.py)` \| `([^`]+)` \| .{10,} \|$", (ROOT / "docs" / "files.md").read_text(), re.M))
    assert found == listed


def test_what_counts_as_a_removal():
    """Ways to remove that the sources don't have are seen too."""
    for line in ("shutil.rmtree(folder)", "os.remove(path)", "  x = path.rename(a(b), c)", "Path('a').unlink()", "rmtree(x)",
                 "shutil.move(a, b)"):
        assert code_of(line)
    assert code_of("text.replace('a', 'b')") is None and code_of("# path.unlink()") is None
