"""README and docs against the code: commands, options, links, names, counts; and README's commands as a user runs them."""

import argparse
import re
import shlex
import shutil
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest
import torch

import geometry.surface
import job
import sample
import train
from docs.refresh import PAGES, ROOT, refresh
from files.settings import parse_settings, setting_names

PAGES = [*PAGES, ROOT / "weights/README.md"]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROGRAMS = ("sample", "train", "view", "render", "bench", "evaluate", "mini.gallery", "mini.geometry",
            "mini.pretrain", "mini.reshoot", "mini.walk", "mini.world")
SETTINGS = {"sample": job.Settings(), "evaluate": job.Settings(), "train": train.Recipe()}
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def blocks(text: str) -> str:
    """Code blocks alone, lines that go on joined."""
    text = text.replace("\\\n", "")
    fenced = re.findall(r"(?ms)^```\w*\n(.*?)^```", text)
    return "\n".join([*fenced, *re.findall(r"(?m)^ {4}(\S.*)$", text)])


def inline(text: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", re.sub(r"(?ms)^```.*?^```", "", text))


def commands(text: str) -> list[list[str]]:
    """Words of all calls of our programs, also of several in a line."""
    lines = [*blocks(text).splitlines(), *(code for code in inline(text) if code.startswith("python "))]
    calls = [call.strip() for line in lines for call in line.split("&&")]
    found = [shlex.split(call, comments=True) for call in calls if call.startswith("python ")]
    return [words[1:] for words in found if not {"pytest", "--help", "docs/refresh.py"} & set(words)]


class Parsed(Exception):
    """A program has read its words; it goes no further."""


def parse(program: str, words: list[str]) -> tuple[list[argparse.ArgumentParser], argparse.Namespace]:
    """A program's own parsers, and what they make of the words; SystemExit if they refuse them."""
    parsers, result = [], []
    some, all_of = argparse.ArgumentParser.parse_known_args, argparse.ArgumentParser.parse_args

    def read_some(parser, *given):
        parsers.append(parser)
        return some(parser, *given)

    def read_all(parser, *given):
        result.append(all_of(parser, *given))
        raise Parsed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_known_args", read_some)
        patch.setattr(argparse.ArgumentParser, "parse_args", read_all)
        patch.setattr("sys.argv", [program, *words])
        with pytest.raises(Parsed):
            import_module(program).main()
    return parsers, result[0]


def split(words: list[str]) -> tuple[str, list[str]]:
    """["-m", "mini.world", ...] or ["sample.py", ...] -> a module's name and the rest."""
    if words[0] == "-m":
        return words[1], words[2:]
    return words[0].removesuffix(".py"), words[1:]


@each_page
def test_commands_parse(page):
    for words in commands(page.read_text(encoding="utf-8")):
        program, rest = split(words)
        assert program in PROGRAMS, words
        _, args = parse(program, rest)
        if program in SETTINGS:
            parse_settings(args.set, SETTINGS[program])


@cache
def option_names() -> set[str]:
    required = {"train": ["--video", "x"], "render": ["--image", "x", "--move", "hold"],
                "mini.geometry": ["train"], "mini.pretrain": ["dit"]}
    parsers = [parser for program in PROGRAMS for parser in parse(program, required.get(program, []))[0]]
    options = {option for parser in parsers for action in parser._actions for option in action.option_strings}
    return options | {f"--{name}" for settings in SETTINGS.values() for name in setting_names(settings)}


@each_page
def test_options_and_settings_exist(page):
    """What pages name in passing, such as `--memory fp8` or `--set align=false`."""
    for code in inline(page.read_text(encoding="utf-8")):
        if code.startswith(("pip ", "hf ", "torchrun ")):  # programs of others
            continue
        unknown = set(re.findall(r"(?<!\S)--[\w-]+", code)) - option_names()
        assert not unknown, code
        for name in re.findall(r"(?<!\S)([a-z_]+)=\S", code.partition("--set ")[2]):
            assert any(hasattr(settings, name) for settings in SETTINGS.values()), code


@each_page
def test_links_and_names_exist(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)]+)\)", text):
        assert target.startswith("http") or (page.parent / target.partition("#")[0]).exists(), target
    for code in inline(text):
        for path in re.findall(r"(?<!\S)(?:[\w.]+/)*\w+\.py(?=:|$|\s)", code):
            assert (ROOT / path).is_file(), code
        for path in re.findall(r"(?<!\S)(?:data|docs|tests|mini|weights/mini)/[\w./-]*", code):
            assert (ROOT / path).exists(), code
        for path, names in re.findall(r"([\w/]+)\.py:([\w.]+)", code):
            found = import_module(path.replace("/", "."))
            for name in names.split("."):
                found = getattr(found, name)


def test_readme_is_short():
    lines = README.splitlines()
    assert len(lines) <= 150
    assert max(map(len, lines)) <= 120


@each_page
def test_counts_and_tables(page):
    """`python docs/refresh.py` writes them."""
    text = page.read_text(encoding="utf-8")
    assert refresh(text) == text, f"{page.name}: run python docs/refresh.py"


@each_page
def test_rows_have_a_cell_for_each_column(page):
    """A | within a cell is escaped, else it ends it."""
    rows = [re.sub(r"\\\|", "", line).count("|") if line.startswith("|") else 0
            for line in page.read_text(encoding="utf-8").splitlines()]
    assert all(one == other for one, other in zip(rows, rows[1:]) if one and other)


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.name)
def test_pages_begin_with_a_question_and_are_linked(page):
    title = page.read_text(encoding="utf-8").splitlines()[0]
    assert title.startswith("# ") and title.endswith("?")
    assert f"](docs/{page.name})" in README


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """A user's folder, with a picture and a clip, and maps of few points, for speed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(geometry.surface, "PIXEL_LIMIT", 2 * 32 * 48)
    monkeypatch.setattr(sample, "DEMO", sample.DEMO | {"frames": 2, "size": SIZE})
    shutil.copy(ROOT / "data/plaza.png", "x.png")
    for ending in (".mp4", ".json", "_depth.npz"):
        shutil.copy(ROOT / f"data/car-roundabout{ending}", f"clip{ending}")


SIZE = "32x48"
QUICK = {"sample": ["--weights", str(ROOT / "weights/mini"), "--size", SIZE, "--frames", "2", "--set", "steps=1"],
         "train": ["--weights", str(ROOT / "weights/mini"), "--size", SIZE, "--set", "steps=1", "draws=1"]}


def test_readme_commands_run(desk, capsys):
    """All of them in order but the page, on the miniature, a few frames or steps of each."""
    for program, rest in filter(lambda call: call[0] in QUICK, map(split, commands(README))):
        assert import_module(program).main(rest + QUICK[program] * bool(rest)) == 0, capsys.readouterr().err
    for name in ("out.mp4", "room.mp4", "room_sheet.png", "runs/car/lora.safetensors", "runs/lora/lora.safetensors"):
        assert Path(name).is_file(), name


def test_python_page_runs(desk, monkeypatch):
    monkeypatch.chdir(ROOT)
    page = (ROOT / "docs/python.md").read_text(encoding="utf-8")
    code, again = re.findall(r"(?ms)^```python\n(.*?)^```", page)
    names = {}
    exec(code, names)
    assert names["chunk"].frames.shape == (1, 3, 33, 64, 96) and names["rollout"].chunk == 2
    assert torch.isfinite(names["chunk"].latents).all()
    exec(again, names)
    assert names["chunk"].frames.shape == (1, 3, 33, 64, 96) and names["rollout"].camera.frame == 33
