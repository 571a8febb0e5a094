"""What a CUDA card would do at full size, on a pretended one: devices, kernels, widths, waits, and the bytes it takes.

The released sizes run here without a card or numbers (pretend.py). The bytes that are counted on the way are the table
in docs/memory.md and what `files/machine.py` says to a run that memory was too small for.
"""

from collections import Counter
from pathlib import Path

import peers
import pytest
import torch
from pretend import Card, kernels, place_network, some_lora

from bench import SCHEDULE
from files.machine import GIB, SIZE, needed
from geometry.camera import WINDOW, move_path
from geometry.pi3x import Pi3X, Pi3XConfig
from geometry.surface import estimate
from helios.load import Models, Prompts
from helios.text import UMT5Config, UMT5Encoder
from helios.vae import VAE, VAEConfig
from memory import Memory
from model import Helios, HeliosConfig
from render import Warp
from train import Recipe, Trainer
from wah import CHUNK, Options, Rollout

BF16 = torch.bfloat16
SHORT = Options(steps=(1, 1, 1), amplify_first_chunk=False)  # bytes are those of any number of steps
# where a big bf16 tensor becomes fp32, all of it official but for fp8's own cast (docs/parity.md)
ISLANDS = {"model.py:add_gated", "model.py:modulate", "model.py:rotate", "model.py:Block.read_text"}
ROWS = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]] for line in
        (Path(__file__).parents[1] / "docs" / "memory.md").read_text().splitlines() if line.startswith("|")}


def on_card(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def check_bytes(what: str, counted: int, column: int) -> None:
    """docs/memory.md says what is counted, to a tenth of a GiB."""
    written = float(ROWS[what][column])
    assert abs(counted / GIB - written) <= 0.06, f"{what}: counted {counted / GIB:.2f} GiB, docs/memory.md has {written}"


def check_need(program: str, words: str, counted: int, size: tuple[int, int] = SIZE) -> None:
    """So does the table that a run is answered from when memory was too small."""
    assert abs(counted / GIB - needed(program, words, size)) < 0.05


class Watch:
    """Peaks of bytes and waits of a rollout by its parts: encode, stage 0, 1, 2, decode; steps apart."""

    def __init__(self, card: Card, vae: VAE):
        self.card, self.part = card, "start"
        self.peaks: dict[str, int] = {}
        self.waits: dict[str, list[str]] = {}
        for name in ("encode", "decode"):
            setattr(vae, name, self.watched(name, getattr(vae, name)))

    def enter(self, part: str) -> None:
        self.peaks[self.part] = max(self.peaks.get(self.part, 0), self.card.peak)
        self.waits.setdefault(self.part, []).extend(self.card.waits)
        self.card.restart()
        self.card.waits.clear()
        self.part = part

    def watched(self, part: str, method):
        def call(x):
            self.enter(part)
            result = method(x)
            self.enter("between")
            return result

        return call

    def step(self, chunk: int, stage: int, step: int) -> None:
        self.enter(f"stage {stage}")


def rollout(card: Card, memory: str, size: tuple[int, int], options: Options) -> tuple[Rollout, Watch]:
    transformer = place_network(card, lambda: Helios(HeliosConfig()), BF16, memory)
    vae = place_network(card, lambda: VAE(VAEConfig()), torch.float32)
    watch = Watch(card, vae)
    prompts = Prompts(*(on_card(1, 512, 4096, dtype=BF16) for _ in range(2)))
    return Rollout(Models(transformer, vae, SCHEDULE), prompts, size, torch.Generator().manual_seed(0),
                   image=on_card(1, 3, *size), lora=some_lora(card, transformer), options=options,
                   on_step=watch.step), watch


def make_chunk(memory: str, size: tuple[int, int] = SIZE, options: Options = SHORT) -> tuple[Card, Watch, Rollout]:
    card = Card()
    with card, torch.no_grad():
        made, watch = rollout(card, memory, size, options)
        watch.enter("prepare")
        made.next(warp=Warp(on_card(1, 3, WINDOW, *size), on_card(1, 1, WINDOW, *size)))
        watch.enter("after")
    return card, watch, made


def check_chunk(memory: str, watch: Watch, card: Card) -> None:
    assert card.widened.keys() == ISLANDS | ({"model.py:Linear.forward"} if memory == "fp8" else set())
    work = max(peak for part, peak in watch.peaks.items() if part.startswith("stage"))
    check_bytes(memory, work, 1)
    check_bytes(memory, max(watch.peaks.values()), 2)
    check_need("sample.py", f"--memory {memory}", max(watch.peaks.values()))


def check_waits(watch: Watch) -> None:
    """At most one a stage, none inside a step: `prepare` and the last `stage` end with the one of all stages."""
    inside = [wait for part, waits in watch.waits.items() if part.startswith("stage") for wait in waits]
    assert [wait.partition(" in ")[2] for wait in inside] == ["helios/flow.py:sample"], inside
    assert sum("model.py:Helios.context" in wait for wait in watch.waits["between"]) == 1  # the tokens that stage 0 keeps
    everything = [wait for waits in watch.waits.values() for wait in waits]
    assert all("finite" in wait or "flow.py:sample" in wait or "context" in wait for wait in everything), everything
    assert len(everything) == 6  # with the picture's two


@pytest.mark.parametrize("memory", ["full", "fp8", "stream"])
def test_chunk(memory):
    card, watch, _ = make_chunk(memory)
    check_chunk(memory, watch, card)
    check_waits(watch)


@pytest.mark.slow
@pytest.mark.parametrize("memory", ["full", "fp8", "stream"])
def test_whole_chunk(memory):
    """With all steps of a first chunk, and a second one; what grows by pixels is as `NEEDS` says."""
    options = Options()
    card, watch, made = make_chunk(memory, options=options)
    check_chunk(memory, watch, card)
    check_waits(watch)
    peak, held = max(watch.peaks.values()), card.live
    with card:
        card.waits.clear()
        made.next(warp=Warp(on_card(1, 3, WINDOW, *SIZE), on_card(1, 1, WINDOW, *SIZE)))
        watch.enter("after")
    assert max(watch.peaks.values()) < peak + 2**24 and card.live < held + 2**27  # a few latents more are remembered
    small = make_chunk(memory, (256, 448))[1]
    check_need("sample.py", f"--memory {memory}", max(small.peaks.values()), (256, 448))


def train_step(memory: str, keep_attention: bool) -> Card:
    card = Card()
    with card:
        transformer = place_network(card, lambda: Helios(HeliosConfig()), BF16, memory)
        vae = place_network(card, lambda: VAE(VAEConfig()), torch.float32)  # is there, to encode the next case
        grid, history = peers.cases(transformer, SIZE, SCHEDULE)["stage 0, warp"]
        with torch.no_grad():
            text = transformer.text(on_card(1, 512, 4096, dtype=BF16))
        trainer = Trainer(transformer, SCHEDULE, Recipe(keep_attention=keep_attention))
        trainer.clock.device = torch.device("cpu")
        clean = on_card(1, 16, CHUNK, SIZE[0] // 8, SIZE[1] // 8)
        card.restart()
        card.waits.clear()
        card.widened.clear()
        trainer.step(history, clean, text)
        assert vae.channels == 16
    return card


def check_training(memory: str, keep_attention: bool) -> None:
    card = train_step(memory, keep_attention)
    waits = Counter(wait.partition(" in ")[2] for wait in card.waits)
    assert waits == {"model.py:Helios.context": 1, "train.py:Trainer.step": 1}
    # an adapter works in fp32, as PEFT's does; what is widened in the backward pass counts as the step's
    assert card.widened.keys() == ISLANDS | {"model.py:Linear.forward", "helios/team.py:add_gradients"}
    check_bytes(memory, card.peak, 3 if keep_attention else 4)
    check_need("train.py", f"--memory {memory}{'' if keep_attention else ' --set keep_attention=false'}", card.peak)


@pytest.mark.parametrize("keep_attention", [True, False])
def test_training_step(keep_attention):
    check_training("full", keep_attention)


@pytest.mark.slow
@pytest.mark.parametrize("memory", ["fp8", "stream"])
@pytest.mark.parametrize("keep_attention", [True, False])
def test_training_step_in_less(memory, keep_attention):
    check_training(memory, keep_attention)


@pytest.mark.parametrize("memory", ["full", "stream"])
def test_text_encoder(memory):
    card = Card()
    with card, torch.no_grad():
        encoder = place_network(card, lambda: UMT5Encoder(UMT5Config()), BF16, memory)
        encoder(torch.zeros(1, 512, dtype=torch.long, device="meta"))
    assert not card.widened and not card.waits
    check_bytes(memory, card.peak, 0)
    if memory == "full":
        check_bytes("fp8", card.peak, 0)  # which leaves it alone


PI3X = {"geometry/pi3x.py:Block.forward", "geometry/pi3x.py:BranchDecoder.forward", "geometry/pi3x.py:Pi3X.forward",
        "geometry/pi3x.py:LayerScale.forward", "geometry/pi3x.py:Attention.heads",
        "geometry/pi3x.py:MetricDecoder.forward", "geometry/pi3x.py:Pi3X.<genexpr>", "geometry/pi3x.py:Encoder.forward"}


@pytest.mark.parametrize("pictures", [1, 8, 33])
def test_pi3x(pictures):
    card = Card()
    with card:
        network = place_network(card, lambda: Pi3X(Pi3XConfig()), BF16)
        estimate(network, [on_card(1, 3, *SIZE)] * pictures)
    assert card.widened.keys() <= PI3X, card.widened.keys() - PI3X
    check_bytes(f"Pi3X, {pictures} picture{'s' * (pictures > 1)}", card.peak, 0)


def test_renderer_and_memory():
    """The first chunk's renderer, and a second chunk's keyframes with what lies behind them."""
    card = Card()
    with card, torch.no_grad():
        network = place_network(card, lambda: Pi3X(Pi3XConfig()), BF16)
        camera = Memory(lambda: network, on_card(1, 3, *SIZE), SIZE, keyframes=8)
        first = camera.warp(move_path("yaw 20"))
        camera.remember(on_card(1, 3, *SIZE))
        second = camera.warp(move_path("yaw 20"))
    assert first.frames.shape == (1, 3, WINDOW, *SIZE) and second.visible.shape == (1, 1, WINDOW + 1, *SIZE)
    assert first.frames.is_meta and second.frames.is_meta
    check_bytes("Pi3X and renderer", card.peak, 0)


# ------------------------------------------------------------------------------------------------- the pretended card


def test_a_wrong_device_is_refused():
    with Card(), pytest.raises(RuntimeError, match="a tensor .* of the host among the device's"):
        torch.nn.functional.linear(on_card(2, 8), torch.zeros(3, 8))


def test_an_operation_of_the_cpu_alone_is_refused():
    assert not kernels()["histogram.bin_ct"] and kernels()["mm"] and kernels()["add.Tensor"]
    with Card(), pytest.raises(RuntimeError, match="histogram.bin_ct .*no CUDA kernel"):
        torch.histogram(on_card(100), 10)


def test_a_silent_upcast_is_noted():
    with Card() as card:
        narrow = on_card(1024, 1024, dtype=BF16)
        assert (narrow + narrow).dtype == BF16 and not card.widened
        assert (narrow * on_card(1024)).dtype == torch.float32 and sum(card.widened.values()) == 1


def test_bytes_are_counted_until_they_are_freed():
    with Card() as card:
        whole = on_card(1000)
        part = whole[10:]
        assert card.live == 4096
        del whole
        assert card.live == 4096
        del part
        assert card.live == 0 and card.peak == 4096
        (on_card(256) + 1).add_(1)
        assert card.peak == 4096 and card.live == 0


def test_waits_are_noted():
    with Card() as card:
        x = on_card(4)
        for ask in (x.sum().item, x.tolist, x.cpu, x.nonzero, lambda: bool(x.any()), lambda: x[x > 0],
                    lambda: torch.zeros(4).to("meta"), lambda: torch.tensor([1.0], device="meta")):
            before = len(card.waits)
            ask()
            assert len(card.waits) == before + 1, ask
        before = len(card.waits)
        torch.full((1,), 3.0, device="meta")
        torch.zeros(4).to("meta", non_blocking=True)
        assert len(card.waits) == before

