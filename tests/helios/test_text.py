"""Prompt cleaning, tokens and text encoder against the official numbers and against diffusers and transformers."""

import peers
import pytest
import torch
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from goldens import DISTILLED, HELIOS, cases, check, tensors
from hypothesis import example, given, settings
from hypothesis import strategies as st

from files.checkpoint import load
from helios.text import Tokenizer, UMT5Config, UMT5Encoder, clean, encode_prompt

CASES = cases(HELIOS / "text_cases.json")
GOLDEN = tensors(HELIOS / "text.safetensors")


@pytest.fixture(scope="module", autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(DISTILLED / "tokenizer")


@pytest.fixture(scope="module")
def encoder() -> UMT5Encoder:
    return load(UMT5Encoder, DISTILLED / "text_encoder", torch.device("cpu"))


@pytest.mark.parametrize("name", CASES)
def test_golden(tokenizer, encoder, name):
    case = CASES[name]
    cleaned, length = case["cleaned"], case["max_sequence_length"]
    assert clean(case["prompt"]) == cleaned
    ids = tokenizer(cleaned, length)
    check("text token ids", ids, GOLDEN[f"{name}.input_ids"], 0)
    assert len(ids) == case["seq_len"]

    embeddings = encode_prompt(tokenizer, encoder, case["prompt"], length)
    assert embeddings.shape == (1, length, encoder.config.d_model)
    assert not embeddings[:, len(ids) :].any()
    rows, expected = embeddings[0, : len(ids)], GOLDEN[f"{name}.prompt_embeds_nonpad"]
    if len(expected) < len(rows):  # of a long prompt only the two ends are recorded
        rows = torch.cat([rows[: len(expected) // 2], rows[-len(expected) // 2 :]])
    check("text embeddings", rows, expected, 5e-5)


PIECES = [*"ab<& \t\n\u00a0\u3000\u2028\x1c\x85é“’", "&amp;", "amp;", "lt;", "&#28;", "&nbsp;", "â€™"]


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(PIECES)).map("".join))
@example("<a &amp;lt; b>")  # ftfy leaves entities alone beside a <, so both rounds of unescaping are needed
def test_cleaning_equals_diffusers(prompt):
    assert clean(prompt) == prompt_clean(prompt)


def test_tokens_are_cut_before_the_end_token_and_that_is_said(tokenizer, capsys):
    text = "a car driving through a roundabout"
    whole = tokenizer(text)
    assert whole[-1] == 1 and tokenizer(text, len(whole)) == whole and capsys.readouterr().err == ""
    assert tokenizer(text, 7) == [*whole[:6], 1]
    lost = tokenizer.model.decode(whole[6:-1])
    assert f"{len(whole) - 1} tokens, 6 are read; what is cut off begins with {lost!r}" in capsys.readouterr().err


def test_tokenizer_takes_the_file_too(tokenizer):
    assert Tokenizer(str(DISTILLED / "tokenizer" / "spiece.model"))("a car") == tokenizer("a car")


def test_bad_tokenizer_files_are_named(tmp_path):
    with pytest.raises(ValueError, match="spiece.model: expected a sentencepiece model, found no such file; tokenizer.json"):
        Tokenizer(tmp_path)
    (tmp_path / "spiece.model").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match="spiece.model: a git-lfs pointer, .*git lfs pull"):
        Tokenizer(tmp_path)
    (tmp_path / "spiece.model").write_bytes(b"nothing\n")
    with pytest.raises(ValueError, match="spiece.model: expected a sentencepiece model"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize(
    "options",
    [
        dict(vocab_size=99, d_model=48, d_kv=16, d_ff=40, num_layers=3, num_heads=2),
        dict(vocab_size=50, d_model=24, d_kv=8, d_ff=64, num_layers=2, num_heads=5,
             relative_attention_num_buckets=20, relative_attention_max_distance=70, layer_norm_epsilon=1e-3),
    ],
    ids=["wide", "other buckets"],
)  # fmt: skip
def test_equals_transformers(options):
    """Sequences beyond the last bucket, and the official way of masking padding against running without it."""
    ours = peers.randomize(UMT5Encoder(UMT5Config(**options)))
    peer = peers.twin(ours)
    torch.manual_seed(2)
    ids = torch.randint(0, options["vocab_size"], (1, 300))
    check("UMT5 (transformers, random)", ours(ids), peer(ids).last_hidden_state, 5e-5)
    padded, mask = ids.clone(), (torch.arange(300) < 170)[None].long()
    padded[:, 170:] = 0
    expected = peer(padded, attention_mask=mask).last_hidden_state[:, :170]
    check("UMT5 (transformers, random)", ours(ids[:, :170]), expected, 5e-5)


def test_bf16_stays_near_fp32(tokenizer, encoder):
    low = load(UMT5Encoder, DISTILLED / "text_encoder", torch.device("cpu"), torch.bfloat16)
    prompt = CASES["plain"]["prompt"]
    embeddings, expected = encode_prompt(tokenizer, low, prompt), encode_prompt(tokenizer, encoder, prompt)
    assert embeddings.dtype == torch.bfloat16
    check("text embeddings, bf16", embeddings, expected, 0.05, relative=True)


def test_full_size_names_and_shapes():
    with torch.device("meta"):
        ours = UMT5Encoder(UMT5Config())
    shapes = {name: tuple(tensor.shape) for name, tensor in ours.state_dict().items()}
    assert len(shapes) == 242  # without encoder.embed_tokens.weight, the duplicate that a file may hold
    assert sum(parameter.numel() for parameter in ours.parameters()) == 5_680_910_336
    assert not list(ours.buffers())
    expected = {"shared.weight": (256384, 4096), "encoder.final_layer_norm.weight": (4096,)}
    for i in range(24):
        layer = f"encoder.block.{i}.layer"
        expected |= {f"{layer}.0.SelfAttention.{part}.weight": (4096, 4096) for part in "qkvo"}
        expected[f"{layer}.0.SelfAttention.relative_attention_bias.weight"] = (32, 64)
        expected |= {f"{layer}.1.DenseReluDense.{part}.weight": (10240, 4096) for part in ("wi_0", "wi_1")}
        expected[f"{layer}.1.DenseReluDense.wo.weight"] = (4096, 10240)
        expected |= {f"{layer}.{part}.layer_norm.weight": (4096,) for part in (0, 1)}
    assert shapes == expected


def test_ungated_feed_forward_is_refused():
    with pytest.raises(ValueError, match="feed_forward_proj is 'relu'"):
        UMT5Config(feed_forward_proj="relu")
