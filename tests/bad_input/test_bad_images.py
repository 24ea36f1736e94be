"""Wrong image batches and image files are named; odd but good ones are taken."""

import shutil

import numpy as np
import pytest
import torch
from mistakes import CONFIG, IMAGE, classifier_options, create, dense, features
from PIL import Image

# Image batches, with what is said of them.
BATCHES = {
    "list": ([1], "a list: a tensor (B, 3, H, W)"),
    "none": (None, "a NoneType"),
    "path": ("image.jpg", "a str"),
    "numpy": (np.zeros((1, 3, 32, 32), np.float32), "a ndarray: a tensor"),
    "pillow": (Image.new("RGB", (32, 32)), "a Image"),
    "3d": (IMAGE[0], "shape (3, 32, 32)"),
    "5d": (IMAGE[None], "shape (1, 1, 3, 32, 32)"),
    "grey": (IMAGE[:, :1], "in_chans="),
    "channels-last-axis": (IMAGE.permute(0, 2, 3, 1), "shape (1, 32, 32, 3)"),
    "int": (IMAGE.int(), "dtype torch.int32: a floating-point"),
    "uint8": (IMAGE.byte(), "dtype torch.uint8"),
    "complex": (IMAGE.to(torch.complex64), "dtype torch.complex64"),
    "half": (IMAGE.half(), "dtype torch.float16 and the model torch.float32"),
    "double": (IMAGE.double(), "dtype torch.float64 and the model torch.float32"),
    "meta": (IMAGE.to("meta"), "device meta and the model cpu"),
    "sparse": (IMAGE.to_sparse(), "layout torch.sparse_coo: a dense one"),
    "height-0": (IMAGE[:, :, :0], "shape (1, 3, 0, 32)", "at least 1"),
    "width-0": (IMAGE[:, :, :, :0], "shape (1, 3, 32, 0)", "at least 1"),
}


@pytest.fixture(scope="module")
def takers():
    """What takes an image batch, by name."""
    model = create().eval()
    kinds = {
        kind: features(feature_cls=kind).eval() for kind in ("getter", "list", "hook", "dict", "fx")
    }
    return {
        "forward": model,
        "forward_features": model.forward_features,
        "forward_intermediates": model.forward_intermediates,
        "DenseBackbone": dense().eval(),
        **kinds,
    }


@pytest.mark.parametrize("case", BATCHES)
def test_a_wrong_image_batch_is_a_value_error_wherever_it_goes_in(case, takers):
    batch, *parts = BATCHES[case]
    for name, take in takers.items():
        with pytest.raises(ValueError) as caught:
            take(batch)
        line = str(caught.value)
        assert "\n" not in line
        for part in ("the image batch", *parts):
            assert part in line, (name, line)


@pytest.mark.parametrize("size", [(1, 1), (31, 31), (1, 31), (31, 1)], ids=str)
def test_small_images_give_maps_of_ceil_shapes(size, takers):
    with torch.no_grad():
        for name, take in takers.items():
            maps = take(torch.zeros(1, 3, *size))
            if name in ("forward", "forward_features"):
                continue
            maps = maps[1] if name == "forward_intermediates" else maps
            maps = maps.values() if isinstance(maps, dict) else maps
            shapes = [tuple(m.shape[2:]) for m in maps]
            assert shapes == [tuple(-(-n // s) for n in size) for s in (4, 8, 16, 32)], name


def test_no_image_gives_no_map(takers):
    for name, take in takers.items():
        maps = take(torch.zeros(0, 3, 64, 64))
        maps = maps[1] if name == "forward_intermediates" else maps
        maps = maps.values() if isinstance(maps, dict) else maps
        assert all(len(m) == 0 for m in maps), name


def _odd_images():
    """{name: image} of kinds that are rare but good."""
    rng = np.random.default_rng(0)
    rgb = Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8))
    deep = rng.integers(0, 65536, (30, 40), dtype=np.uint16)
    return {
        "grey.png": rgb.convert("L"),
        "black_white.png": rgb.convert("1"),
        "cmyk.jpg": rgb.convert("CMYK"),
        "palette.png": rgb.convert("P"),
        "alpha.png": rgb.convert("RGBA"),
        "grey_alpha.png": rgb.convert("LA"),
        "deep.png": Image.fromarray(deep),
        "deep.tif": Image.fromarray(deep),
        "still.gif": rgb.convert("P"),
        "pixel.png": rgb.crop((0, 0, 1, 1)),
        "small.png": rgb.resize((31, 31)),
        "wide.png": rgb.resize((300, 2)),
    }


def test_rare_but_good_images_are_predicted(run, stage, tmp_path):
    (tmp_path / "in").mkdir()
    for number, (name, image) in enumerate(_odd_images().items()):
        image.save(tmp_path / "in" / f"{number}_{name}")
    good = stage / "checkpoints" / "good.pth"
    code, said = run(f"predict {CONFIG} {good} in --out drawn", classifier_options(stage))
    assert code == 0, said
    assert len(list((tmp_path / "drawn").glob("*.png"))) == 12


BAD_IMAGES = {
    "text": (b"hello", "is not an image"),
    "empty": (b"", "empty.png"),
    "truncated": (None, "truncated.png"),
    "huge": (None, "huge.png"),
    "float": (None, "floating-point"),
}


@pytest.mark.parametrize("case", BAD_IMAGES)
def test_a_bad_image_is_named_and_the_others_are_predicted(case, run, stage, tmp_path):
    (tmp_path / "in").mkdir()
    shutil.copy(stage / "images" / "good.png", tmp_path / "in")
    content, part = BAD_IMAGES[case]
    path = tmp_path / "in" / f"{case}.png"
    if case == "truncated":
        noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path)
        content = path.read_bytes()[:5000]
    if case == "huge":
        Image.new("1", (20000, 20000)).save(path)
    elif case == "float":
        path = path.with_suffix(".tif")
        Image.fromarray(np.zeros((30, 40), np.float32)).save(path)
    else:
        path.write_bytes(content)
    good = stage / "checkpoints" / "good.pth"
    code, said = run(f"predict {CONFIG} {good} in --out drawn", classifier_options(stage))
    assert code == 1 and "Traceback" not in said, said
    last = said.strip().splitlines()[-1]
    assert path.name in last and part in last, last
    assert [picture.name for picture in (tmp_path / "drawn").glob("*.png")] == ["good.png"]
