"""Models that are looked at: by name and config, with weights of any layout, and their images."""

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from densezoo.backbones.registry import find_backbone
from densezoo.tools.read_images import UnusableImage
from densezoo.tools.show_model import build_subject

SMALL = ["depths=(1,1,1,1)", "num_classes=3"]
CONFIG = "retinanet_cas_vit_xs_fpn_1x_coco"


def test_a_name_gives_the_classifier_whose_random_weights_are_seeded():
    subjects = [build_subject("nat_mini", model_kwargs=SMALL) for _ in range(2)]
    first, second = (subject.backbone.state_dict() for subject in subjects)
    assert all(torch.equal(first[key], second[key]) for key in first)
    subject = subjects[0]
    assert subject.weights == "random weights (seed 0)" and not subject.is_fixed
    assert isinstance(subject.backbone, find_backbone("nat_mini").cls)
    assert not subject.backbone.training and len(subject.stages) == 4
    maps = subject.maps(subject.batch(Image.new("RGB", (64, 32))))
    assert [tuple(m.shape[2:]) for m in maps] == [(8, 16), (4, 8), (2, 4), (1, 2)]
    assert not any(p.requires_grad for p in subject.model.parameters())


def test_weights_are_loaded_from_the_layouts_that_the_model_knows(tmp_path):
    torch.manual_seed(1)
    model = timm.create_model("nat_mini", depths=(1, 1, 1, 1), num_classes=3)
    state = model.state_dict()
    wrapped = {f"backbone.{key}": value for key, value in state.items()}
    torch.save({"state_dict": wrapped}, tmp_path / "trained.pth")
    subject = build_subject(
        "nat_mini", weights=str(tmp_path / "trained.pth"), model_kwargs=SMALL[:1]
    )
    assert subject.weights == "weights trained.pth"
    own = subject.backbone.state_dict()
    same = [torch.equal(own[key], state[key]) for key in state if not key.startswith("head.")]
    assert all(same)
    torch.save({"state_dict": {"x": torch.ones(2)}}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="nat_mini"):
        build_subject("nat_mini", weights=str(tmp_path / "other.pth"), model_kwargs=SMALL)


def test_a_config_gives_its_backbone_with_its_mean_and_std(tmp_path):
    options = ["model.backbone.model_kwargs.depths=(1,1,1,1)"]
    options.append("model.data_preprocessor.mean=[51,102,153]")
    subject = build_subject(CONFIG, cfg_options=options)
    assert subject.name == CONFIG and len(subject.backbone.stages[2].blocks) == 1
    assert list(subject.mean) == [0.2, 0.4, 0.6]
    # As a detector's checkpoint has it.
    state = {f"backbone.model.{k}": v + 1 for k, v in subject.model.state_dict().items()}
    state = {k.replace("model.model.", "model."): v for k, v in state.items()}
    torch.save({"state_dict": {**state, "bbox_head.x": torch.ones(1)}}, tmp_path / "epoch_1.pth")
    trained = build_subject(CONFIG, cfg_options=options, weights=str(tmp_path / "epoch_1.pth"))
    before, after = (s.backbone.stem.state_dict() for s in (subject, trained))
    assert all(torch.equal(after[key], before[key] + 1) for key in before)


def test_images_are_normalised_and_keep_their_proportions():
    subject = build_subject("nat_mini", model_kwargs=SMALL)
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    batch = subject.batch(Image.fromarray(pixels))
    expected = (pixels / 255 - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)
    np.testing.assert_allclose(batch[0].permute(1, 2, 0).numpy(), expected, rtol=1e-5)
    assert subject.resized(640, 427, None) == (224, 336)
    assert subject.resized(427, 640, [100]) == (150, 100)
    assert subject.resized(640, 427, [64, 96]) == (64, 96)
    with pytest.raises(UnusableImage, match="too narrow"):
        subject.resized(60000, 1, None)


def test_models_of_one_size_keep_it():
    subject = build_subject("vitrpb_small", model_kwargs=["depths=(1,)", "img_size=64"])
    subject.check_size([64])
    assert subject.resized(640, 427, None) == subject.resized(640, 427, [64]) == (64, 64)
    with pytest.raises(ValueError, match="images of 64x64 pixels alone: leave --size out"):
        subject.check_size([32, 64])


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("nat_mni", {}, "unknown model 'nat_mni': did you mean nat_mini"),
        ("nat_mini", dict(model_kwargs=["width=3"]), "can't be built with width=3: .*'width'"),
        ("nat_mini", dict(cfg_options=["a=1"]), "nat_mini is a model: use --model-kwargs"),
        (CONFIG, dict(model_kwargs=["depths=3"]), "change a config with --cfg-options"),
        (CONFIG, dict(cfg_options=["model.backbone=ResNet"]), "has no model_name"),
    ],
    ids=["name", "argument", "options", "arguments", "backbone"],
)
def test_what_cannot_be_built_is_one_line(name, options, message):
    with pytest.raises(ValueError, match=message) as error:
        build_subject(name, **options)
    assert "\n" not in str(error.value)
