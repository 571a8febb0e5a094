"""Pictures and depth maps: what is read is what was written, and bad files are one clear line."""

from pathlib import Path

import numpy as np
import PIL
import pytest
from goldens import GEOMETRY, check, tensors
from known import load_video
from PIL import Image, ImageCms

from files import media
from files.depth import load_depth

RNG = np.random.default_rng(0)
SMOOTH = np.full((32, 48, 3), 90, np.uint8)
SMOOTH[..., 0], SMOOTH[..., 1] = np.linspace(0, 200, 48), np.linspace(30, 255, 32)[:, None]


@pytest.mark.parametrize("case", ["tall", "up", "wide"])
def test_fit_equals_the_official_crop(case):
    golden = tensors(GEOMETRY / "poses.safetensors")
    expected = golden[f"crop/{case}_out"]
    fitted = media.fit_image(Image.fromarray(golden[f"crop/{case}_in"].numpy()), tuple(expected.shape[:2]))
    tolerance = 1e-4 if int(PIL.__version__.split(".")[0]) >= 13 else 2  # the official numbers are of Pillow 13
    check("Crop and resize (grey levels)", (fitted[0].permute(1, 2, 0) + 1) * 127.5, expected, tolerance)


def test_stretch_keeps_the_whole_picture():
    picture = np.zeros((40, 100, 3), np.uint8)
    picture[:, :10] = picture[:, -10:] = 255  # a crop would lose the edges
    assert media.fit_image(Image.fromarray(picture), (32, 32), crop=False)[0, 0, :, [0, -1]].min() > 0.9
    assert media.fit_image(Image.fromarray(picture), (32, 32))[0, 0, :, [0, -1]].max() < -0.9


@pytest.mark.parametrize("shape, size, crop, said", [
    ((90, 160), (64, 64), True, "x.png: 90 wide and 160 high; for --size 64x64 (height x width) 44% of it is cut off\n"),
    ((90, 160), (64, 64), False, "stretched to 1.78 times its shape"), ((300, 100), (64, 64), True, "67% of it"),
    ((160, 90), (384, 640), True, ""), ((160, 90), (384, 640), False, ""),
])  # fmt: skip
def test_a_crop_is_told(capsys, shape, size, crop, said):
    """Of a tenth or more; it is that of `fit_image`."""
    media.tell_shape("x.png", Image.new("RGB", shape), size, crop)
    error = capsys.readouterr().err
    assert said in error if said else not error


def test_pictures_of_every_mode(tmp_path):
    gray = (np.arange(12, dtype=np.uint8) * 20).reshape(3, 4)
    color = RNG.integers(0, 256, (3, 4, 3), dtype=np.uint8)
    alpha = np.dstack([color, np.full((3, 4), 255, np.uint8)])
    palette = Image.fromarray(color).quantize(12)
    cases = {"gray": (Image.fromarray(gray), gray), "alpha": (Image.fromarray(alpha), color),
             "palette": (palette, np.array(palette.convert("RGB"))),
             "deep": (Image.fromarray(gray.astype(np.uint16) * 257), gray)}
    for name, (image, expected) in cases.items():
        image.save(tmp_path / f"{name}.png")
        loaded = np.array(media.load_image(tmp_path / f"{name}.png"))
        assert np.array_equal(loaded, expected if expected.ndim == 3 else np.repeat(expected[..., None], 3, -1)), name


def test_unreadable_pictures(tmp_path):
    Image.fromarray(RNG.integers(0, 256, (32, 48, 3), dtype=np.uint8)).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:2000])
    (tmp_path / "text.png").write_text("hello")
    Image.fromarray(np.zeros((2, 2), np.float32)).save(tmp_path / "float.tiff")
    for name, message in (("cut.png", "readable"), ("text.png", "readable"), ("none.png", "no such"),
                          ("float.tiff", "float")):
        with pytest.raises(ValueError, match=f"{name}.*{message}"):
            media.load_image(tmp_path / name)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp"])
@pytest.mark.parametrize("tag", range(1, 9))
def test_pictures_stand_upright(tmp_path, tag, suffix):
    """What a camera wrote with each of the eight orientations is the same upright picture; a depth map turns too."""
    stored = [SMOOTH, SMOOTH[:, ::-1], SMOOTH[::-1, ::-1], SMOOTH[::-1], SMOOTH.swapaxes(0, 1), np.rot90(SMOOTH),
              np.rot90(SMOOTH.swapaxes(0, 1), 2), np.rot90(SMOOTH, -1)][tag - 1]
    image, exif = Image.fromarray(np.ascontiguousarray(stored)), Image.Exif()
    exif[274] = tag
    image.save(tmp_path / f"p{suffix}", exif=exif, quality=98)
    loaded = np.asarray(media.load_image(tmp_path / f"p{suffix}"))
    assert loaded.shape == SMOOTH.shape and np.abs(loaded.astype(int) - SMOOTH).max() < 9
    if suffix == ".png":
        Image.fromarray(stored[..., 0].astype(np.uint16) + 1).save(tmp_path / "d.png", exif=exif)
        assert np.array_equal(load_depth(tmp_path / "d.png"), SMOOTH[..., 0] + 1)


@pytest.mark.parametrize("mode, suffix", [("RGBA", ".png"), ("LA", ".png"), ("P", ".png"), ("RGBA", ".gif"), ("RGBA", ".webp"),
                                          ("RGBA", ".tif"), ("L", ".png")])
def test_what_transparency_hides_is_white(tmp_path, mode, suffix, capsys):
    hidden = np.full((8, 8, 4), (50, 50, 50, 255), np.uint8)
    hidden[:, :4] = 0, 0, 0, 0
    image = Image.fromarray(hidden).convert(mode)
    image.save(tmp_path / f"p{suffix}", lossless=True, **({"transparency": 0} if mode == "L" else {}))
    loaded = np.asarray(media.load_image(tmp_path / f"p{suffix}"))
    assert (loaded[:, :4] == 255).all() and (loaded[:, 4:] == 50).all()
    assert f"p{suffix}: has transparency, taken over white" in capsys.readouterr().err


def test_half_transparent(tmp_path):
    Image.new("RGBA", (2, 2), (100, 0, 200, 51)).save(tmp_path / "p.png")
    assert media.load_image(tmp_path / "p.png").getpixel((0, 0)) == (224, 204, 244)  # a fifth of it over white


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L", "CMYK"])
def test_colour_profiles(tmp_path, mode, capsys):
    """A profile whose red and green are exchanged exchanges them back; sRGB's own changes nothing; a bad one is said."""
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    swapped = bytearray(srgb.replace("sRGB".encode("utf-16-be"), "swap".encode("utf-16-be")))
    red, green = swapped.find(b"rXYZ", 128) + 4, swapped.find(b"gXYZ", 128) + 4
    swapped[red:red + 4], swapped[green:green + 4] = swapped[green:green + 4], swapped[red:red + 4]
    image = Image.new("RGB", (4, 4), (200, 120, 90)).convert(mode)
    plain = image.convert("RGB").getpixel((0, 0))
    turned = (plain[1], plain[0], plain[2])
    expected = {"srgb": plain, "swapped": plain if mode in ("L", "CMYK") else turned, "bad": plain}
    for name, profile in (("srgb", srgb), ("swapped", bytes(swapped)), ("bad", b"no profile")):
        path = tmp_path / f"{name}.tif"
        image.save(path, icc_profile=profile)
        assert np.abs(np.subtract(media.load_image(path).getpixel((0, 0)), expected[name])).max() <= 1, name
        unfit = name == "bad" or name == "swapped" and mode in ("L", "CMYK")  # a profile of another kind of colours
        assert ("colour profile can't be used" in capsys.readouterr().err) == unfit


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")  # pytest undoes what media.py does
def test_one_limit_of_pixels(tmp_path):
    Image.new("1", (8200, 8200)).save(tmp_path / "big.png")
    for read in (media.load_image, load_depth, lambda path: next(media.read_frames(path))):
        with pytest.raises(ValueError, match="big.png: a picture of more than 67,108,864 pixels"):
            read(tmp_path / "big.png")
    Image.new("1", (8192, 8192)).save(tmp_path / "just.png")
    assert media.open_image(tmp_path / "just.png").size == (8192, 8192)


@pytest.mark.parametrize("suffix", [".gif", ".png", ".webp", ".tif"])
def test_an_animation_is_a_picture_or_a_video(tmp_path, suffix, capsys):
    frames = [Image.new("RGB", (16, 8), (60 * index, 0, 90)) for index in range(4)]
    frames[0].save(tmp_path / f"a{suffix}", save_all=True, append_images=frames[1:], lossless=True)
    assert media.load_image(tmp_path / f"a{suffix}").getpixel((0, 0)) == (0, 0, 90)
    assert f"a{suffix}: has several pictures, the first is used" in capsys.readouterr().err
    assert load_video(tmp_path / f"a{suffix}")[:, 0, 0].tolist() == [[60 * index, 0, 90] for index in range(4)]


@pytest.mark.parametrize("suffix", [".gif", ".png", ".webp"])
def test_the_rate_of_an_animation(tmp_path, suffix):
    """Which ffmpeg does not know of all."""
    frames = [Image.new("RGB", (16, 8), (60 * index, 0, 90)) for index in range(4)]
    for wait, rate in ((50, 20), (200, 5), (4000, 1)):
        frames[0].save(tmp_path / f"a{suffix}", save_all=True, append_images=frames[1:], duration=wait)
        assert media.read_rate(tmp_path / f"a{suffix}") == rate


def test_heic_names_the_package(tmp_path):
    (tmp_path / "x.jpg").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100))
    with pytest.raises(ValueError, match="x.jpg: .*pip install pillow-heif"):
        media.load_image(tmp_path / "x.jpg")


def test_no_program_is_started_for_a_picture(tmp_path):
    (tmp_path / "x.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")
    with pytest.raises(ValueError, match="x.png: not a readable picture .cannot identify"):  # Pillow knows it: Ghostscript
        media.load_image(tmp_path / "x.png")


def test_which_files_of_a_folder(tmp_path, capsys):
    """Natural order whatever the case, all that Pillow reads; hidden files are passed over, others with a word."""
    names = ["1.png", "F2.PNG", "f3.jfif", "f10.avif", "f11.tga", "f12"]
    for index, name in enumerate(names):
        image = Image.new("RGB", (8, 8), (20 * index, 0, 0))
        image.save(tmp_path / name, format={".avif": "AVIF", "": "WEBP"}.get(Path(name).suffix), quality=100)
    for name in ("._1.png", ".DS_Store", "Thumbs.db"):
        (tmp_path / name).write_bytes(b"\0" * 20)
    (tmp_path / "sub").mkdir()
    assert [file.name for file in media.list_pictures(tmp_path)] == names and capsys.readouterr().err == ""
    reds = load_video(tmp_path)[:, 0, 0, 0].astype(int)
    assert np.abs(reds - 20 * np.arange(6)).max() < 5
    (tmp_path / "notes.txt").write_text("f2 is blurred")
    assert [file.name for file in media.list_pictures(tmp_path)] == names
    assert "passed over: notes.txt" in capsys.readouterr().err
    (tmp_path / "f4.png").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="f4.png: not a readable picture"):
        load_video(tmp_path)


@pytest.mark.parametrize("twin", ["0.jpg", "0_mask.png", "0.mask.png"])
def test_frames_and_masks_in_one_folder(tmp_path, twin):
    for name in ("0.png", "1.png", twin):
        Image.new("L", (8, 8)).save(tmp_path / name)
    with pytest.raises(ValueError, match="1 names with more than one picture, the first is '0'"):
        load_video(tmp_path)


def test_names_are_sorted_as_people_count(tmp_path):
    names = ["a2", "a10", "a10b3", "a11/1", "b1", "b01", "b\u00b2"]
    assert sorted(reversed(names[:5]), key=media.natural_order) == names[:5]
    assert sorted(names, key=media.natural_order) == names  # of the same number, as they came
    for index in range(12):
        Image.new("RGB", (4, 4), (20 * index, 0, 0)).save(tmp_path / f"{index}.png")
    assert [frame[0, 0, 0] for frame in media.read_frames(tmp_path)] == [20 * index for index in range(12)]
