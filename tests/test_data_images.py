"""Images as they come: shown as transformers shows them, or refused with a sentence before they cost anything."""

import contextlib
import io
import struct
import tracemalloc
import zlib

import numpy as np
import PIL.Image
import pytest
from transformers.image_transforms import convert_to_rgb
from transformers.image_utils import load_image

from tapo_jax.config import BadImage
from tapo_jax.data import images
from tapo_jax.data.images import StoredImage, decode

RGB = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8))
RAMP = (np.arange(64 * 64).reshape(64, 64) * 16).astype(np.uint16)


def encoded(image: PIL.Image.Image, kind: str = "PNG", **options) -> bytes:
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def turned(orientation: int) -> bytes:
    exif = RGB.getexif()
    exif[0x0112] = orientation
    return encoded(RGB, "JPEG", exif=exif)


def bomb(width: int, height: int) -> bytes:
    """A PNG of some hundred bytes that says that it is huge."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


def drawing(mode: str) -> PIL.Image.Image:
    """Black on a clear ground, as icons and diagrams are saved."""
    image = PIL.Image.new("RGBA", (32, 32), (0, 0, 0, 0))
    for i in range(8, 24):
        image.putpixel((i, 16), (0, 0, 0, 255 - 5 * i))
    return image.convert(mode)


def palette() -> bytes:
    image = PIL.Image.new("P", (8, 8), 0)
    image.putpalette([255, 0, 255, 0, 0, 0] + [0] * 762)
    image.putpixel((3, 3), 1)
    return encoded(image, transparency=bytes([0, 255]))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photograph_is_turned_as_transformers_turns_it(orientation):
    data = turned(orientation)
    want = np.asarray(load_image(PIL.Image.open(io.BytesIO(data))))
    np.testing.assert_array_equal(decode(data, "x"), want)
    assert want.shape == ((80, 60, 3) if orientation > 4 else (60, 80, 3))


@pytest.mark.parametrize(
    "data",
    [
        encoded(drawing("RGBA")),
        encoded(drawing("LA")),
        encoded(drawing("RGBA"), "WEBP", lossless=True),
        palette(),
        encoded(RGB.convert("L"), transparency=40),
        encoded(RGB.quantize(16), "GIF"),
        encoded(RGB.convert("1")),
        encoded(RGB.convert("CMYK"), "JPEG"),
        encoded(RGB.convert("CMYK"), "TIFF"),
        encoded(RGB, "BMP"),
        encoded(RGB, "JPEG", progressive=True),
    ],
)
def test_every_mode_is_shown_as_the_published_processor_shows_it(data):
    want = convert_to_rgb(PIL.Image.open(io.BytesIO(data)), return_numpy=True)
    np.testing.assert_array_equal(decode(data, "x"), want)


def test_a_drawing_on_a_clear_ground_is_seen_on_white():
    shown = decode(encoded(drawing("RGBA")), "x")
    assert shown[0, 0].tolist() == [255, 255, 255] and shown[16, 8].max() < 60


@pytest.mark.parametrize(("kind", "values"), [("PNG", RAMP), ("TIFF", RAMP), ("TIFF", RAMP.astype(np.int32))])
def test_16_bits_are_scaled_and_not_cut(kind, values):
    shown = decode(encoded(PIL.Image.fromarray(values), kind), "x")
    np.testing.assert_array_equal(shown, np.repeat((RAMP >> 8).astype(np.uint8)[:, :, None], 3, 2))


def test_numbers_of_other_kinds():
    ramp = np.linspace(0, 1, 1024, dtype=np.float32).reshape(32, 32)
    shown = decode(encoded(PIL.Image.fromarray(ramp), "TIFF"), "x")
    np.testing.assert_array_equal(shown[:, :, 0], np.round(ramp * 255))
    with pytest.raises(BadImage, match="numbers from -1 to 1 are no picture"):
        decode(encoded(PIL.Image.fromarray(ramp * 2 - 1), "TIFF"), "x")


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "the file is empty"),
        (b"hello, no picture", "it is none of JPEG, PNG, WEBP"),
        (b"  <!DOCTYPE html><html>404</html>", "it is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "it is none of"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "it is none of"),
        (encoded(RGB)[:2000], "it is damaged"),
        (encoded(RGB)[:20], "it is (damaged|none of)"),
        (encoded(RGB, "JPEG")[:1500], "it is damaged"),
        (encoded(PIL.Image.new("RGB", (300, 1))), "300 x 1 is more than 200 times as long as wide"),
        (encoded(PIL.Image.new("RGB", (1, 300))), "1 x 300 is more than 200 times as long as wide"),
        (bomb(60000, 60000), "more than 200 megapixels"),
        (bomb(20000, 10001), "more than 200 megapixels"),
        (bomb(10000, 10000), "it is damaged"),
    ],
)
def test_what_cannot_be_shown_says_why(data, says):
    tracemalloc.start()
    with pytest.raises(BadImage, match=f"The image photo.jpg cannot be shown: .*{says}"):
        decode(data, "photo.jpg")
    assert tracemalloc.get_traced_memory()[1] < 1 << 22
    tracemalloc.stop()


def test_an_image_of_any_bytes_is_shown_or_refused():
    """Every prefix, and bytes changed at random, of files of several formats."""
    rng = np.random.default_rng(0)
    small = RGB.resize((16, 12))
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"):
        data = encoded(small, kind)
        for _ in range(60):
            changed = bytearray(data)
            for at in rng.integers(0, len(data), 3):
                changed[at] = rng.integers(256)
            for one in (bytes(changed), data[: rng.integers(len(data))]):
                with contextlib.suppress(BadImage):
                    assert decode(one, "x").ndim == 3


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_large_photograph_is_kept_up_to_what_zooming_needs(kind, monkeypatch):
    monkeypatch.setattr(images, "FULL_PIXELS", 64 * 64)
    exif = RGB.getexif()
    exif[0x0112] = 6
    photo = PIL.Image.linear_gradient("L").resize((120, 100)).convert("RGB")
    data = encoded(photo, kind, exif=exif, **({"quality": 95} if kind == "JPEG" else {}))
    shown = decode(data, "x")
    assert shown.shape == (60, 50, 3), "half of each side, and turned"
    want = np.rot90(np.asarray(photo.reduce(2)), -1)
    assert np.abs(shown.astype(int) - want).max() <= 4


def test_a_24_megapixel_photograph_is_shown_whole():
    shown = decode(encoded(PIL.Image.new("RGB", (6000, 4000), (9, 8, 7)), "JPEG"), "x")
    assert shown.shape == (4000, 6000, 3)


def test_the_size_is_known_without_decoding():
    image = StoredImage("x", lambda: bomb(10000, 10000))
    assert image.size() == (10000, 10000)


def test_a_file_that_is_gone_is_named(tmp_path):
    with pytest.raises(BadImage, match=r"gone\.png cannot be shown: it cannot be read \(No such file"):
        images.stored_file(tmp_path / "gone.png")()


def test_a_file_that_is_too_large_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "MAX_BYTES", 1 << 10)
    (tmp_path / "a.png").write_bytes(b"\0" * 2000)
    with pytest.raises(BadImage, match="the file is larger than"):
        images.stored_file(tmp_path / "a.png")()
