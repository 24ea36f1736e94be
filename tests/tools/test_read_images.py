"""Image files as users have them: every mode, every kind of damage, folders."""

import io
import os
import warnings

import numpy as np
import pytest
from PIL import Image

from densezoo.tools.read_images import UnusableImage, check_header, find_images, read_image


def noise(height=20, width=30, channels=3, seed=0):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def test_images_are_turned_upright(tmp_path):
    pixels = np.zeros((20, 30, 3), np.uint8)
    pixels[:, :15] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: the left side of the file is the top
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    upright = np.asarray(read_image(tmp_path / "turned.png"))
    assert upright.shape == (30, 20, 3)
    assert (upright[:15] == 255).all() and (upright[15:] == 0).all()


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bits_are_scaled_and_not_clipped(suffix, tmp_path):
    values = np.array([[0, 128, 129, 300], [32768, 40000, 65406, 65535]], np.uint16)
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    Image.fromarray(values).save(tmp_path / f"a.{suffix}", exif=exif)
    pixels = np.asarray(read_image(tmp_path / f"a.{suffix}"))
    expected = np.round(values / 257)[::-1, ::-1]
    assert expected.tolist() == [[255, 254, 156, 128], [1, 1, 0, 0]]
    np.testing.assert_array_equal(pixels, np.repeat(expected[..., None], 3, axis=2))


def test_big_endian_16_bits_are_read_rightly(tmp_path):
    values = np.array([[0, 514], [257, 65535]], np.uint16)
    image = Image.frombytes("I;16B", (2, 2), values.astype(">u2").tobytes())
    image.save(tmp_path / "a.tif")
    assert np.asarray(read_image(tmp_path / "a.tif"))[..., 0].tolist() == [[0, 2], [1, 255]]


@pytest.mark.parametrize(
    "dtype, kind", [(np.int32, "32-bit integers"), (np.float32, "floating-point numbers")]
)
def test_values_of_unknown_range_are_refused(dtype, kind, tmp_path):
    Image.fromarray(np.arange(6, dtype=dtype).reshape(2, 3)).save(tmp_path / "a.tif")
    with pytest.raises(UnusableImage, match=rf"a.tif can't be read: its pixels are {kind}"):
        read_image(tmp_path / "a.tif")


@pytest.mark.parametrize(
    "mode, suffix",
    [
        ("1", "png"), ("L", "png"), ("LA", "png"), ("P", "png"), ("RGB", "bmp"), ("RGBA", "png"),
        ("CMYK", "jpg"), ("YCbCr", "jpg"), ("RGB", "webp"), ("RGB", "tif"),
    ],
)  # fmt: skip
def test_every_mode_becomes_rgb(mode, suffix, tmp_path):
    image = Image.fromarray(np.full((12, 17, 3), (200, 100, 50), np.uint8)).convert(mode)
    image.save(tmp_path / f"a.{suffix}", **({"lossless": True} if suffix == "webp" else {}))
    read = read_image(tmp_path / f"a.{suffix}")
    assert read.mode == "RGB" and read.size == (17, 12)
    if mode not in ("1", "L", "LA"):  # which have no colour
        np.testing.assert_allclose(np.asarray(read).mean((0, 1)), (200, 100, 50), atol=12)
    elif mode == "1":
        assert set(np.unique(np.asarray(read))) <= {0, 255}
    else:
        assert np.ptp(np.asarray(read).astype(int), axis=2).max() == 0
        np.testing.assert_allclose(np.asarray(read).mean(), 124, atol=1)


def test_transparency_is_left_out_without_a_word(tmp_path):
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    palette.save(tmp_path / "p.png", transparency=bytes([0, 128]))
    Image.new("RGBA", (4, 4), (10, 20, 30, 0)).save(tmp_path / "rgba.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("p.png", "rgba.png"):
            assert (np.asarray(read_image(tmp_path / name)) == (10, 20, 30)).all()


def test_the_first_frame_of_an_animation_is_taken(tmp_path):
    frames = [Image.new("RGB", (9, 7), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert (np.asarray(read_image(tmp_path / "a.gif")) == (255, 0, 0)).all()


def test_huge_images_are_one_line_from_their_header(tmp_path, monkeypatch):
    Image.new("1", (400, 300)).save(tmp_path / "huge.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50_000)
    for function in (check_header, read_image):
        with pytest.raises(UnusableImage, match="huge.png is too large: up to 0 million"):
            function(tmp_path / "huge.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100_000)  # a warning of Pillow's alone
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_image(tmp_path / "huge.png").size == (400, 300)


def test_what_is_no_image_is_told_apart(tmp_path):
    for content, message in ((b"", "is empty"), (b"hello", "is not an image")):
        (tmp_path / "a.png").write_bytes(content)
        with pytest.raises(UnusableImage, match=f"a.png {message}"):
            check_header(tmp_path / "a.png")
    with pytest.raises(FileNotFoundError):
        read_image(tmp_path / "none.png")


@pytest.mark.parametrize("suffix", ["png", "jpeg", "gif", "tiff", "webp", "bmp"])
def test_damaged_files_are_read_or_refused_and_nothing_else(suffix, tmp_path):
    """Bytes changed at random places, a header's among them, and files cut short."""
    generator = np.random.default_rng(0)
    buffer = io.BytesIO()
    Image.fromarray(noise(40, 50)).save(buffer, suffix)
    path, refused = tmp_path / f"a.{suffix}", 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for number in range(60):
            content = bytearray(buffer.getvalue())
            for _ in range(4):
                end = len(content) if number % 2 else min(300, len(content))
                content[generator.integers(end)] = generator.integers(256)
            if number % 4 == 0:
                content = content[: generator.integers(len(content))]
            path.write_bytes(content)
            try:
                assert read_image(path).mode == "RGB"
            except UnusableImage as error:
                assert str(path) in str(error) and "\n" not in str(error).strip()
                refused += 1
    assert refused > 5


def test_images_are_opened_without_leaking_files(tmp_path):
    Image.fromarray(noise()).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:600])
    before = len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else 0
    for _ in range(20):
        read_image(tmp_path / "a.png")
        check_header(tmp_path / "a.png")
        with pytest.raises(UnusableImage, match="can't be read"):
            read_image(tmp_path / "b.png")
    after = len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else 0
    assert after == before


def test_images_of_a_folder_come_sorted_and_hidden_ones_not_at_all(tmp_path):
    names = ["b.JPG", "a/z.webp", "a/c.tiff", "out/d.png", "x.txt", ".h.png", ".git/e.png"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = [
        str(path.relative_to(tmp_path)) for path in find_images(tmp_path, beside=tmp_path / "out")
    ]
    assert found == ["a/c.tiff", "a/z.webp", "b.JPG"]
    assert len(find_images(tmp_path)) == 4
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds no image"):
        find_images(tmp_path / "empty")
