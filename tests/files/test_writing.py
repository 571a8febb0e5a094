"""Files that appear together or not at all."""

import pytest

from files import writing


def publish(paths: dict, inputs=(), content="new", fail=False) -> None:
    with writing.replacing(paths, inputs) as partials:
        for partial in partials.values():
            partial.write_text(content)
        if fail:
            raise RuntimeError("stop")


def test_outputs_appear_together_or_not_at_all(tmp_path):
    paths = {"a": tmp_path / "a.txt", "b": tmp_path / "b.txt"}
    paths["a"].write_text("before")
    with pytest.raises(RuntimeError, match="stop"):
        publish(paths, fail=True)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a.txt", "before")]
    publish(paths)
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"a.txt": "new", "b.txt": "new"}


def test_links_in_a_circle(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    writing.check_outputs({"video": tmp_path / "a"}, [])
    publish({"video": tmp_path / "a"})
    assert (tmp_path / "a").read_text() == "new"


def test_what_cannot_be_written_is_noticed_at_once(tmp_path):
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "in.mp4").write_text("input")
    good = tmp_path / "good.mp4"
    for bad, message in ((tmp_path / "no" / "v.mp4", "v.mp4"), (tmp_path / "folder.mp4", "folder.mp4"),
                         (tmp_path / "in.mp4", "overwrite"), (tmp_path / "x" / ".." / "good.mp4", "overwrite")):
        with pytest.raises((ValueError, OSError), match=message):
            publish({"good": good, "bad": bad}, inputs=[tmp_path / "in.mp4"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder.mp4", "in.mp4"]
    for name in ("v.avi", ".mp4", ""):
        with pytest.raises(ValueError, match=".mp4"):
            writing.beside(tmp_path / name)
