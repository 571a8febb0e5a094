"""Each reader takes a damaged file or refuses it in one line that names it; `fuzz.py` makes the files."""

from pathlib import Path

import fuzz
import pytest


@pytest.mark.parametrize("reader", fuzz.READERS)
def test_some_damaged_files(reader):
    counts, failures = fuzz.fuzz(reader, 25)
    assert not failures, "\n".join(failures)
    assert counts["refused"] > 5 and sum(counts.values()) == 25


@pytest.mark.slow
@pytest.mark.parametrize("reader", fuzz.READERS)
def test_a_minute_of_damaged_files(reader):
    counts, failures = fuzz.fuzz(reader, seconds=60, seed=10**6)
    assert not failures, "\n".join(failures)
    assert counts["refused"] > 100


def test_the_fuzzer_sees_what_is_wrong(tmp_path, monkeypatch):
    """Another error than the two, a line without the file's name, a stray warning, a long time."""

    def raises(error):
        def read(file: Path):
            raise error

        return read

    for read, words in ((raises(KeyError("x")), "KeyError"), (raises(ValueError("bad")), "not one clear line"),
                        (raises(ValueError(f"{tmp_path}\n")), "not one clear line"),
                        (lambda file: fuzz.warnings.warn("careful", stacklevel=2), "a stray warning: careful"),
                        (lambda file: fuzz.time.sleep(0.02), "0.0 s"), (lambda file: None, "taken")):
        monkeypatch.setitem(fuzz.READERS, "own", (".x", list, lambda random, data: data, read))
        monkeypatch.setattr(fuzz, "SECONDS", 0.01 if words == "0.0 s" else 5)
        assert words in fuzz.one(tmp_path, "own", 0, [b""])


def test_the_original_files_are_taken(tmp_path):
    """What the mutations begin with is good, so that a refusal is due to them."""
    for name, (suffix, begin, _, read) in fuzz.READERS.items():
        for index, data in enumerate(begin()):
            file = tmp_path / f"{name}_{index}{suffix}"
            file.write_bytes(data)
            if name not in ("shards", "folders"):  # one names no tensor, the other is a seed
                read(file)
