"""Names in timm and mmengine: ours are there, timm's are untouched."""

import subprocess
import sys

import pytest
import timm
import torch
from mmengine.registry import MODELS

import densezoo
from densezoo.backbones.registry import BACKBONES


def test_every_backbone_is_in_timm_with_its_metadata():
    names = densezoo.list_backbones()
    assert {"cas_vit_xs", "cas_vit_s", "cas_vit_m", "cas_vit_t"} <= set(names)
    assert set(names) <= set(timm.list_models())
    for name in names:
        model = timm.create_model(name, device="meta")
        cfg = model.pretrained_cfg
        assert cfg["architecture"] == name
        assert cfg["source"].startswith("https://") and cfg["license"] and cfg["paper_ids"]
        assert len(cfg["input_size"]) == len(cfg["mean"]) == len(cfg["std"]) == 3
        assert cfg["interpolation"] and cfg["crop_pct"] and cfg["pool_size"]
        state = model.state_dict()
        assert f"{cfg['first_conv']}.weight" in state
        classifier = cfg["classifier"]
        for head in [classifier] if isinstance(classifier, str) else classifier:
            assert f"{head}.weight" in state


def test_pretrained_cfg_of_one_head_names_that_head():
    model = timm.create_model("cas_vit_xs", distillation=False, device="meta")
    assert model.pretrained_cfg["classifier"] == "head.fc"


def test_importing_overwrites_no_name_of_timm_and_warns_of_nothing():
    script = """
import warnings
from timm.models import _registry as r
warnings.simplefilter("error")
before = {n: (r._model_entrypoints[n], r._model_default_cfgs.get(n)) for n in r._model_entrypoints}
import densezoo
assert all(r._model_entrypoints[n] is f and r._model_default_cfgs.get(n) is c
           for n, (f, c) in before.items())
new = set(r._model_entrypoints) - set(before)
assert new == set(densezoo.list_backbones()), new
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout == run.stderr == ""


def test_a_name_that_timm_has_is_left_to_timm():
    script = """
import sys, types
import timm
from timm.models import register_model
module = types.ModuleType("theirs"); sys.modules["theirs"] = module
class Theirs(timm.models.ResNet): pass
def cas_vit_xs(pretrained=False, **kwargs):
    return Theirs(timm.models.resnet.BasicBlock, (1, 1, 1, 1))
cas_vit_xs.__module__ = "theirs"
import warnings; warnings.simplefilter("error")
register_model(cas_vit_xs)
import densezoo
assert isinstance(timm.create_model("cas_vit_xs"), Theirs)
assert "cas_vit_xs" not in densezoo.list_backbones()
assert timm.create_model("cas_vit_s", device="meta").num_features == 256
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True)
    assert run.returncode == 0, run.stderr.decode()


def test_unknown_constructor_arguments_are_a_type_error():
    with pytest.raises(TypeError, match="not_an_argument"):
        timm.create_model("cas_vit_xs", not_an_argument=1)


@pytest.mark.parametrize("feature_cls", ["getter", "list"])
@pytest.mark.parametrize("out_indices", [(4,), (-5,), (), (1, 1), 0, 5], ids=str)
def test_bad_out_indices_are_named(out_indices, feature_cls):
    with pytest.raises(ValueError, match="out_indices is"):
        timm.create_model(
            "cas_vit_xs", features_only=True, out_indices=out_indices, feature_cls=feature_cls
        )


def test_unknown_feature_class_is_named():
    with pytest.raises(ValueError, match="feature_cls is 'tree'.*getter"):
        timm.create_model("cas_vit_xs", features_only=True, feature_cls="tree")


def test_models_are_built_on_a_device_in_a_dtype():
    model = timm.create_model("cas_vit_xs", device="meta", dtype=torch.float16)
    assert {(t.device.type, t.dtype) for t in model.parameters()} == {("meta", torch.float16)}


def test_dense_backbone_takes_models_of_timm():
    backbone = MODELS.build(
        dict(
            type="DenseBackbone",
            model_name="resnet18",
            out_indices=(1, 2),
            frozen_stages=1,
            norm_eval=True,
        )
    )
    backbone.train()
    maps = backbone(torch.zeros(1, 3, 64, 96))
    assert [m.shape for m in maps] == [(1, 64, 16, 24), (1, 128, 8, 12)]
    frozen = {n.split(".")[1] for n, p in backbone.named_parameters() if not p.requires_grad}
    assert frozen == {"conv1", "bn1", "layer1"}
    # channels last within timm's, NCHW here
    swin = MODELS.build(dict(type="DenseBackbone", model_name="swin_tiny_patch4_window7_224"))
    assert [m.shape[1] for m in swin(torch.zeros(1, 3, 224, 224))] == [96, 192, 384, 768]
    with pytest.raises(ValueError, match="timm's"):
        swin.fuse()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(model_name="cas_vit_xl"), "unknown model 'cas_vit_xl': did you mean cas_vit_"),
        (dict(model_name="cas_vit_xs", frozen_stages=5), "frozen_stages is 5.*to 4"),
        (dict(model_name="cas_vit_xs", frozen_stages=-2), "frozen_stages is -2"),
        (dict(model_name="cas_vit_xs", out_norms="group"), "out_norms is 'group'.*batch_norm"),
        (dict(model_name="resnet18", out_norms=True), "no official output norms"),
        (dict(model_name="cas_vit_xs", out_indices=(7,)), "out_indices is"),
        (dict(model_name="cas_vit_xs", out_indices=(0,), frozen_stages=2), "not kept"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_bad_arguments_of_the_dense_backbone_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        MODELS.get("DenseBackbone")(**arguments)


def test_parameters_agree_with_the_published_counts():
    for name, registered in BACKBONES.items():
        model = timm.create_model(name, device="meta")
        millions = sum(p.numel() for p in model.parameters()) / 1e6
        assert round(millions, 2) == registered.weights.published.params, name
