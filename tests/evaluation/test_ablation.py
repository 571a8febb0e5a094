"""The rows of the ablation: a LoRA has its own."""

from pathlib import Path

import pytest

from evaluation.ablation import folder_name, labels, ways
from helios.load import ROOT
from mini.judge import Trial


def test_loras_of_one_name():
    """train.py gives all of its LoRAs the same; each has its rows, in folders of their own."""
    loras = [Path("runs/a/lora.safetensors"), Path("runs/b/lora.safetensors"), Path("runs/b/best.safetensors")]
    assert [*labels(loras)] == ["runs/a/lora.safetensors", "runs/b/lora.safetensors", "best"]
    table = ways(loras)
    assert table["no drop, mean filling, LoRA runs/a/lora.safetensors"].lora == loras[0]
    assert table["full, mean filling, LoRA runs/b/lora.safetensors"].lora == loras[1]
    assert "no drop, mean filling, LoRA runs/b/lora.safetensors" not in table
    assert [way.lora for name, way in table.items() if name.endswith("LoRA best")] == [loras[2]] * 2
    assert len({*map(folder_name, table)}) == len(table) == 7 + 6 + 2 + 2


def test_a_trial_depends_on_each(tmp_path):
    loras = [tmp_path / name / "lora.safetensors" for name in "ab"]
    for lora in loras:
        lora.parent.mkdir()
        lora.write_text(lora.parent.name)
    about = Trial(ROOT / "mini", loras, 1, [], tmp_path).about()["loras"]
    assert [*about] == [*map(str, loras)] and len({*about.values()}) == 2


@pytest.mark.parametrize("loras", [("a-b", "a.b"), ("x/a", "x/a"), ("x/y/a", "x-y/a")])
def test_names_too_alike(loras):
    with pytest.raises(ValueError, match="--lora .*: too like another one's name"):
        labels([Path(f"{lora}.safetensors") for lora in loras])
