"""Names in timm and mmengine: ours are there, timm's are untouched."""

import subprocess
import sys

import pytest
import timm
import torch
from mmengine.registry import MODELS
from oracles import load_cases, make_checkpoint, make_input, shallow

import densezoo
from densezoo.backbones.aliases import ALIASES
from densezoo.backbones.registry import BACKBONES
from densezoo.tools.bench_throughput import list_subjects
from densezoo.tools.cli import main
from densezoo.tools.count_macs import count_macs, input_size


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
warnings.simplefilter("error", UserWarning)
before = {n: (r._model_entrypoints[n], r._model_default_cfgs.get(n)) for n in r._model_entrypoints}
import densezoo
assert all(r._model_entrypoints[n] is f and r._model_default_cfgs.get(n) is c
           for n, (f, c) in before.items())
new = set(r._model_entrypoints) - set(before)
assert new == {*densezoo.list_backbones(), *densezoo.backbones.aliases.ALIASES}, new
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout == run.stderr == ""


def test_names_of_the_22k_models_do_not_stand_for_weights_of_1k():
    assert "in1k" in BACKBONES["dinat_large"].weights.url
    assert not timm.list_models("dinat*21k*")


@pytest.mark.parametrize("alias, name", ALIASES.items(), ids=str)
def test_official_names_are_the_same_models(alias, name):
    assert alias in timm.list_models() and alias not in densezoo.list_backbones()
    small = dict(shallow(name), num_classes=3, device="meta")
    model, ours = (timm.create_model(n, **small) for n in (alias, name))
    shapes, of_ours = ({k: v.shape for k, v in m.state_dict().items()} for m in (model, ours))
    assert type(model) is type(ours) and shapes == of_ours
    assert model.pretrained_cfg == ours.pretrained_cfg
    assert model.pretrained_cfg["architecture"] == name
    features = timm.create_model(alias, features_only=True, out_indices=(3, 1), **small)
    assert features.feature_info.reduction() == [32, 8]
    if BACKBONES[name].weights.url is None:
        with pytest.raises(ValueError, match=f"the weights of {name} have no direct link"):
            timm.create_model(alias, pretrained=True)
    assert input_size(alias) == input_size(name)
    fused = [subject.fused for subject in list_subjects([alias], fuse=True)]
    assert fused[:2] == [False, True]


def test_official_names_are_counted_as_ours_are():
    alias, name = next(iter(ALIASES.items()))
    assert count_macs(alias, (32, 32)).macs == count_macs(name, (32, 32)).macs
    assert count_macs(alias).published == BACKBONES[name].weights.published


def test_official_names_are_exported_as_ours_are(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    weights = timm.create_model("cas_vit_xs", num_classes=3).state_dict()
    torch.save(weights, "weights.pth")
    command = ["export", "rcvit_xs", "x.pt2", "--size", "64", "64", "--checkpoint", "weights.pth"]
    assert main(command) == 0
    assert "fused norms" in capsys.readouterr().out


def test_official_names_work_in_the_dense_backbone_and_load_official_files(tmp_path):
    case_file, case = next(
        c for n, c in load_cases().items() if n.startswith("cas_vit_xs-classification")
    )
    torch.save(make_checkpoint(case_file, case), tmp_path / "weights.pth")
    arguments = dict(out_norms=True, pretrained=str(tmp_path / "weights.pth"))
    backbones = [
        MODELS.get("DenseBackbone")(name, **arguments).eval() for name in ("rcvit_xs", "cas_vit_xs")
    ]
    x = make_input([1, 3, 64, 96])
    for one, other in zip(*(backbone(x) for backbone in backbones), strict=True):
        assert torch.equal(one, other)


def test_importing_twice_is_harmless():
    script = """
import sys, warnings, importlib
warnings.simplefilter("error", UserWarning)
import densezoo, timm
importlib.reload(densezoo)
importlib.reload(densezoo.backbones.cas_vit)
for name in [name for name in sys.modules if name.split(".")[0] == "densezoo"]:
    del sys.modules[name]
import densezoo
from mmengine.registry import MODELS
from densezoo.backbones.cas_vit import CASViT
assert len(densezoo.list_backbones()) >= 4
for name in ("cas_vit_xs", "rcvit_xs"):
    assert isinstance(timm.create_model(name, device="meta"), CASViT)
dense = MODELS.build(dict(type="DenseBackbone", model_name="rcvit_xs"))
assert isinstance(dense.model.model, CASViT)
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
import warnings; warnings.simplefilter("error", UserWarning)
for name in ("cas_vit_xs", "rcvit_s"):
    def entry(pretrained=False, **kwargs):
        return Theirs(timm.models.resnet.BasicBlock, (1, 1, 1, 1))
    entry.__name__, entry.__module__ = name, "theirs"
    register_model(entry)
import densezoo
assert isinstance(timm.create_model("cas_vit_xs"), Theirs)
assert isinstance(timm.create_model("rcvit_s"), Theirs)
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


@pytest.mark.parametrize("name, indices", [("test_resnet", (4, -3)), ("test_convnext", (3, 1))])
def test_dense_backbone_keeps_the_order_of_stages_on_models_of_timm(name, indices):
    backbone = MODELS.build(
        dict(type="DenseBackbone", model_name=name, out_indices=indices, out_norms="layer_norm")
    )
    maps = backbone.eval()(torch.zeros(1, 3, 64, 96))
    assert [m.shape[1] for m in maps] == backbone.out_channels
    assert [64 // m.shape[2] for m in maps] == backbone.out_strides == [32, 8]


@pytest.mark.parametrize(
    "name", ["efficientnet_b0", "test_convnext", "swin_tiny_patch4_window7_224"]
)
def test_frozen_stages_of_timm_models_hold_norms_with_children_and_bare_parameters(name):
    backbone = MODELS.build(dict(type="DenseBackbone", model_name=name, frozen_stages=1)).train()
    level = next(i["module"] for i in backbone.model.feature_info.info if i["reduction"] >= 4)
    names = [n for n, _ in backbone.model.named_parameters()]
    stage = [n for n in names if n.startswith((f"{level}.", level.replace(".", "_", 1) + "."))]
    end = names.index(stage[-1]) + 1
    free = [n for n, p in backbone.model.named_parameters() if p.requires_grad]
    assert free == names[end:] and 0 < end < len(names)
    for module_name, module in backbone.model.named_modules():
        own = [n for n in names if n.startswith(f"{module_name}.")]
        if module_name and own and set(own) <= set(names[:end]):
            assert not module.training, module_name


def test_frozen_norms_stay_frozen_when_they_become_synchronised():
    backbone = MODELS.build(dict(type="DenseBackbone", model_name="cas_vit_xs", frozen_stages=2))
    backbone = torch.nn.SyncBatchNorm.convert_sync_batchnorm(backbone).train()
    stem, stages = backbone.model.model.stem, backbone.model.model.stages
    assert isinstance(stem.conv1.norm, torch.nn.SyncBatchNorm)
    assert not stem.conv1.norm.training and not stages[1].blocks[0].norm1.training
    assert stages[2].blocks[0].norm1.training


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(drop_path_rate=1.5), "drop_path_rate is 1.5"),
        (dict(in_chans=0), "in_chans is 0"),
        (dict(depths=(2, 2, 4)), r"depths is \(2, 2, 4\): four"),
        (dict(dims=(8, 8, 0, 8)), "dims is"),
        (dict(num_classes=-1), "num_classes is -1"),
        (dict(global_pool="best"), "global_pool is 'best'"),
        (dict(global_pool=""), "needs a global_pool"),
    ],
    ids=str,
)
def test_bad_constructor_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("cas_vit_xs", **arguments)


@pytest.mark.parametrize("name", ["FX", "Hook", timm.models.FeatureListNet], ids=str)
def test_feature_classes_are_found_as_timm_finds_them(name):
    model = timm.create_model(
        "cas_vit_xs", features_only=True, feature_cls=name, out_indices=(2, 0)
    )
    assert [m.shape[1] for m in model.eval()(torch.zeros(1, 3, 32, 32))] == [112, 48]


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
