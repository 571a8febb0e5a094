"""What the command lines share: one line for what is wrong, an exit status, and the two spellings of a setting."""

import argparse
import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import sample
import train
from files.cli import deferred_interrupt, explain, parse_size, run_program
from files.settings import parse_settings
from job import Settings


def said(capsys, program, words: list[str]) -> str:
    """The one line on stderr of words that are refused before anything is read."""
    with pytest.raises(SystemExit) as stop:
        program.parse(words)
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) == 1
    return lines[0]


@pytest.mark.parametrize("words, settings", [
    (["--keyframes", "3"], ["keyframes=3"]),
    (["--image", "x.png", "--warp-sigma=0.1,0.2", "--set", "fov=50"], ["warp_sigma=0.1,0.2", "fov=50"]),
    (["--check", "--size", "64x64"], ["check=true"]),
    (["--align", "false", "--drop=false"], ["align=false", "drop=false"]),
])
def test_a_setting_has_two_spellings(words, settings):
    assert sample.parse(words).set == settings and sample.parse(words).words == words


def test_an_option_that_is_also_a_setting_stays_one():
    assert train.parse(["--video", "x", "--device", "cpu", "--rank", "3"]).set == ["rank=3"]


@pytest.mark.parametrize("words", [["--keyframes"], ["--video", "x.mp4", "--seed"]])
def test_a_setting_without_a_value(capsys, words):
    assert f"{words[-1]}: expected a value" in said(capsys, sample, words)


@pytest.mark.parametrize("words, said", [
    (["step=2"], "--set step=2: expected NAME=VALUE with the name of a setting, perhaps steps"),
    (["Seed=1"], "perhaps seed"), (["steps", "2"], "--set steps: expected NAME=VALUE"), (["=1"], "setting (docs/"),
])  # fmt: skip
def test_a_setting_that_is_none(words, said):
    with pytest.raises(ValueError) as error:
        parse_settings(words, Settings())
    assert said in str(error.value) and len(str(error.value)) < 120


@pytest.mark.parametrize("program, words, parts", [
    (sample, ["--colour", "red"], ["unrecognized", "--colour"]),
    (sample, ["--frames", "many"], ["--frames", "many"]),
    (sample, ["--poses", "a.json", "--move", "hold"], ["--move", "--poses"]),
    (sample, ["--image", ""], ["--image", "empty"]),
    (train, ["--out", "run"], ["--video"]),
])
def test_other_words_are_one_line(capsys, program, words, parts):
    line = said(capsys, program, words)
    assert all(part in line for part in parts) and "--set" not in line


@pytest.mark.parametrize("text", ["64", "64x", "x64", "64x64x64", "65x64", "8x64", "64x8194", "-64x64", "64 x 64"])
def test_bad_sizes(text):
    with pytest.raises(ValueError, match="HEIGHTxWIDTH"):
        parse_size(text)


def test_exit_status(capsys):
    def ends(error: BaseException | None) -> tuple[int, str]:
        def program(args):
            if error is not None:
                raise error
        status = run_program("x.py", program, argparse.Namespace())
        return status, capsys.readouterr().err

    assert ends(None) == (0, "")
    assert ends(ValueError("a.png: no picture")) == (2, "x.py: error: a.png: no picture\n")
    assert ends(ValueError("a\nb.png: no picture")) == (2, "x.py: error: a b.png: no picture\n")
    status, line = ends(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "out.mp4"))
    assert status == 2 and "out.mp4: no room is left on the disk" in line
    status, line = ends(KeyboardInterrupt())
    assert status == 130 and "stopped, nothing written" in line
    with pytest.raises(ZeroDivisionError):  # a fault of the program is not dressed up
        ends(ZeroDivisionError())


def test_what_is_said_to_nobody(monkeypatch):
    """With stderr closed a bar has somewhere to go."""
    monkeypatch.setattr(sys, "stderr", None)
    assert run_program("x.py", lambda _: sys.stderr.write("a bar"), argparse.Namespace()) == 0


def test_unknown_errors_of_the_system_keep_their_words():
    assert explain(OSError(errno.EXDEV, "Cross-device link", "a")) == "a: Cross-device link"
    assert explain(OSError("no number")) == "no number"


def test_ctrl_c_waits_for_the_step_and_a_second_one_does_not(capsys):
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), deferred_interrupt() as asked:
        assert not asked.is_set()
        os.kill(os.getpid(), signal.SIGINT)
        assert asked.is_set() and "stopping after this step" in capsys.readouterr().out
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("buffered, status", [(True, 0), (False, 141)])
def test_nobody_reads_on(tmp_path, buffered, status):
    """As after `| head`: no words; a run that could say all before has succeeded, else it ends as a shell expects."""
    code = ("import argparse, sys; from files.cli import run_program; "
            "sys.exit(run_program('x', lambda args: print('done'), argparse.Namespace()))")
    reader, writer = os.pipe()
    os.close(reader)
    place, env = Path(__file__).parents[2], os.environ | {"PYTHONUNBUFFERED": "" if buffered else "1"}
    done = subprocess.run([sys.executable, "-c", code], stdout=writer, stderr=subprocess.PIPE, text=True, cwd=place, env=env)
    os.close(writer)
    assert (done.returncode, done.stderr) == (status, "")
