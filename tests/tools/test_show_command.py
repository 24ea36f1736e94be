"""``densezoo predict --show`` writes a picture of each image, or says in one line what is wrong."""

import numpy as np
import pytest
from PIL import Image

from densezoo.tools import show_command
from densezoo.tools.cli import main, parse

SMALL = ["--model-kwargs", "depths=(1,1,1,1)"]


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    (folder / "deep").mkdir(parents=True)
    generator = np.random.default_rng(0)
    for name in ("a.png", "deep/b.jpg"):
        pixels = generator.integers(0, 256, (40, 56, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
    return folder


def show(kind, model, *words):
    return main(["predict", "--show", kind, model, *map(str, words)])


def written(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def test_each_image_gets_a_picture(photos, tmp_path):
    out = tmp_path / "out"
    words = [photos, "--out", out, "--size", 32, *SMALL, "num_regions=4", "--points", "0.5,0.5"]
    assert show("routing", "biformer_tiny", *words) == 0
    assert written(out) == ["a_routing.png", "deep/b_routing.png"]
    for name in written(out):
        with Image.open(out / name) as picture:
            assert picture.format == "PNG" and min(picture.size) > 200


def test_masks_of_a_head_are_drawn_beside_their_attention(photos, tmp_path):
    small = [*SMALL, "dims=(8,8,16,32)", "num_heads=(2,2,2,2)", "--head", 1]
    words = [photos / "a.png", "--out", tmp_path, "--size", 32, *small, "--points", "0.5,0.5"]
    assert show("mask", "ppma_tiny", *words) == 0
    with Image.open(tmp_path / "a_mask.png") as picture:
        # Two panels beside each other, below each other those of the four stages.
        assert picture.format == "PNG" and 1.4 < picture.height / picture.width < 1.8


def test_files_are_not_replaced_unless_asked(photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(
        show_command._ON_IMAGES, "attention", (lambda *args: b"drawn", "attention_maps")
    )
    words = [photos / "a.png", "--out", tmp_path, "--size", 32, *SMALL]
    assert show("attention", "nat_mini", *words) == 0
    file = tmp_path / "a_attention.png"
    assert file.read_bytes() == b"drawn"
    file.write_bytes(b"mine")
    assert show("attention", "nat_mini", *words) == 1
    assert "a_attention.png exists; pass --overwrite" in capsys.readouterr().err
    assert file.read_bytes() == b"mine"
    assert show("attention", "nat_mini", *words, "--overwrite") == 0
    assert file.read_bytes() == b"drawn"


def test_all_images_get_one_receptive_field(photos, tmp_path, capsys):
    out = tmp_path / "out"
    (photos / "c.png").write_bytes(b"no image")
    words = [photos, "--out", out, "--size", 32, *SMALL]
    assert show("erf", "cas_vit_xs", *words) == 1
    error = capsys.readouterr().err
    assert "1 of 3 images have no picture" in error and "c.png is not an image" in error
    assert written(out) == ["cas_vit_xs_erf.png"]
    assert show("erf", "cas_vit_xs", *words) == 1
    assert "cas_vit_xs_erf.png exists" in capsys.readouterr().err


def test_words_after_an_option_are_images_too():
    args = parse(["predict", "config", "c.pth", "--device", "cpu", "a.jpg", "b.jpg"])
    assert (args.config, args.words) == ("config", ["c.pth", "a.jpg", "b.jpg"])
    args = parse(["predict", "nat_mini", "--show", "erf", "a.jpg", "--size", "32", "48"])
    assert (args.config, args.words, args.size) == ("nat_mini", ["a.jpg"], [32, 48])


MISTAKES = {
    "no attention": ("attention cas_vit_xs a.png", 1, "cas_vit_xs has no attention"),
    "no routing": ("routing nat_mini a.png", 1, "nat_mini routes nothing"),
    "no mask": ("mask nat_mini a.png", 1, "nat_mini has no polyline masks: --show mask takes PPMA"),
    "mask of another": ("mask resnet18 a.png", 1, "resnet18 is timm's own"),
    "unknown model": ("attention nat_mni a.png", 1, "did you mean nat_mini"),
    "no image": ("attention nat_mini none.png", 1, "none.png does not exist"),
    "form of a point": ("attention nat_mini a.png --points 0.5", 1, "X,Y"),
    "fraction outside": ("attention nat_mini a.png --points 1.5,0.5", 1, "1.5,0.5 is outside"),
    "pixel outside": ("attention nat_mini a.png --points 56,0", 1, "which has 56x40 pixels"),
    "point of a field": ("erf nat_mini a.png --points 5,5", 1, "takes no --points"),
    "size": ("erf nat_mini a.png --size 0", 1, "--size is 0"),
    "sizes": ("attention nat_mini a.png --size 1 2 3", 1, "--size is 1 2 3"),
    "block": ("attention nat_mini a.png --block 7", 1, "stage 0 of nat_mini has blocks 0 to 2"),
    "argument": ("attention nat_mini a.png --model-kwargs width=3", 1, "with width=3"),
    "weights": ("attention nat_mini a.png --weights none.pth", 1, "none.pth' does not exist"),
    "kind": ("attentoin nat_mini a.png", 2, "invalid choice: 'attentoin'"),
    "no words": ("attention nat_mini", 2, "required: CHECKPOINT IMAGE"),
}


@pytest.mark.parametrize("words, code, message", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line_before_any_work(words, code, message, photos, monkeypatch, capsys):
    monkeypatch.chdir(photos)
    monkeypatch.setattr(show_command.Subject, "maps", lambda *args: pytest.fail("work was done"))
    if code == 2:
        with pytest.raises(SystemExit) as stop:
            main(["predict", "--show", *words.split()])
        assert stop.value.code == 2
    else:
        assert main(["predict", "--show", *words.split()]) == code
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (photos / "predictions").exists()


@pytest.mark.parametrize("words", ["--block 0", "--weights w.pth", "--points 0.5,0.5"])
def test_options_of_show_are_refused_without_it(words, capsys):
    with pytest.raises(SystemExit):
        main(["predict", "config", "c.pth", "a.jpg", *words.split()])
    assert f"{words.split()[0]} goes with --show" in capsys.readouterr().err
