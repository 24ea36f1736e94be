"""Checkpoints of every layout load, say what became of them, and foreign ones are refused."""

import functools
import logging

import pytest
import safetensors.torch
import timm
import torch
from mmengine.registry import MODELS
from oracles import (
    error,
    in_transformers_layout,
    isotropic_keys,
    load_cases,
    make_checkpoint,
    make_input,
    make_state_dict,
    relative_error,
)
from timm.models._hub import save_for_hf

from densezoo.backbones.checkpoints import convert_checkpoint, map_keys, unwrap_nesting
from densezoo.backbones.registry import BACKBONES

CASES = load_cases()
XS_FILE, XS = CASES["cas_vit_xs-classification-224x224-0"]
SINGLE_FILE, SINGLE = CASES["cas_vit_xs_single_head-classification-224x224-0"]


@pytest.fixture
def official():
    return make_state_dict(XS_FILE["keys"])


def create(path, name="cas_vit_xs", **kwargs):
    overlay = dict(file=str(path))
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)


def saved(tmp_path, checkpoint, name="checkpoint.pth"):
    torch.save(checkpoint, tmp_path / name)
    return tmp_path / name


def file_of(name, with_derived):
    """Name and arguments of the model that an official file of `FILES` is for, and the file.

    Of a case the shapes alone, on the meta device; `with_derived` also of what the official model
    computes, which published files hold or not.
    """
    if name in CASES:
        case_file, case = CASES[name]
        checkpoint = {
            key: torch.empty(shape, device="meta")
            for key, shape, kind in case_file["keys"]
            if with_derived or kind != "derived"
        }
        return case_file["model_name"], case["model_kwargs"], checkpoint
    model_name, make = FURTHER_FILES[name]
    return model_name, *make()


def transformers_file():
    case_file, case = CASES["nat_mini-classification-224x224-0"]
    return {}, in_transformers_layout(make_checkpoint(case_file, case), (3, 4, 6, 5))


def isotropic_file(model_name, table):
    is_full = model_name.startswith("vitrpb")
    state = make_state_dict(isotropic_keys(2, 384, 12, table, is_full))
    return dict(depths=(2,)), state


def biformer_stl_file():
    """That of `biformer_stl_nchw` with linear layers where it has 1x1 convolutions."""
    case_file, case = CASES["biformer_stl_nchw-classification-224x224-0"]
    state = {}
    for key, value in make_checkpoint(case_file, case)["model"].items():
        key = key.replace(".qkv_linear.", ".qkv.qkv.").replace(".output_linear.", ".wo.")
        state[key] = value.flatten(1) if value.shape[2:] == (1, 1) else value
    return {}, {"model": state}


# Layouts that no case of outputs has, by the names that their libraries give: the model of each,
# and what makes its arguments and the file.
FURTHER_FILES = {
    "nat_mini-transformers": ("nat_mini", transformers_file),
    "biformer_stl": ("biformer_stl", biformer_stl_file),
    "nat_isotropic_small": (
        "nat_isotropic_small",
        lambda: isotropic_file("nat_isotropic_small", 13),
    ),
    "vitrpb_small": ("vitrpb_small", lambda: isotropic_file("vitrpb_small", 27)),
}
FILES = [*CASES, *FURTHER_FILES]
DERIVED = [
    name
    for name, (case_file, _) in CASES.items()
    if any(k == "derived" for *_, k in case_file["keys"])
]
# Official files whose tables are for windows of 7 and 14, in dense models with windows of 24.
RESIZED = [
    name for name, (_, case) in CASES.items() if case["model_kwargs"].get("window_size") == [24] * 4
]


@functools.cache
def converted(name, with_derived=False):
    """The model of an official file, the file's entries as the model's, and the report."""
    model_name, arguments, checkpoint = file_of(name, with_derived)
    registered = BACKBONES[model_name]
    model = timm.create_model(model_name, device="meta", **arguments)
    mapped, report = convert_checkpoint(
        checkpoint,
        model,
        registered.key_rules,
        first_conv=registered.weights.first_conv,
    )
    shapes = [{k: v.shape for k, v in state.items()} for state in (model.state_dict(), mapped)]
    return *shapes, report, registered


@pytest.mark.parametrize(
    "name, with_derived", [(name, False) for name in FILES] + [(name, True) for name in DERIVED]
)
def test_every_entry_of_an_official_file_maps_onto_exactly_our_keys(name, with_derived):
    own, mapped, report, registered = converted(name, with_derived)
    assert report.dialect in registered.key_rules
    assert (report.missing, report.unexpected) == ([], [])
    # Tables alone, a line a window, where the case is of a model with others than the file's.
    assert all("tables of relative position bias" in line for line in report.reshaped)
    assert len(report.reshaped) == (2 if name in RESIZED else 0)
    assert sorted(report.loaded) == sorted(own)
    assert mapped == own


@pytest.mark.parametrize("family", sorted({r.cls.__name__ for r in BACKBONES.values()}))
def test_every_dialect_of_a_family_has_a_file(family):
    members = [r for r in BACKBONES.values() if r.cls.__name__ == family]
    dialects = {dialect for registered in members for dialect in registered.key_rules}
    names = {registered.name for registered in members}
    files = [n for n in CASES if CASES[n][0]["model_name"] in names]
    files += [n for n in FURTHER_FILES if FURTHER_FILES[n][0] in names]
    tried = {converted(n)[2].dialect for n in files}
    assert tried == dialects


def prefixed(prefix):
    return lambda state: {prefix + k: v for k, v in state.items()}


LAYOUTS = {
    "bare": lambda s: s,
    "model": lambda s: {"model": s, "epoch": 3, "args": None},
    "state_dict": lambda s: {"state_dict": s, "meta": {"epoch": 3}},
    "model_ema": lambda s: {"model": {k: 0 * v for k, v in s.items()}, "model_ema": s},
    "nested": lambda s: {"checkpoint": {"model": s}},
    "module.": prefixed("module."),
    "backbone.": prefixed("backbone."),
    "module.backbone.": lambda s: {"state_dict": prefixed("module.backbone.")(s)},
    "detector": lambda s: {
        "state_dict": {
            **prefixed("backbone.")(s),
            "neck.lateral_convs.0.conv.weight": torch.zeros(8, 8, 1, 1),
            "bbox_head.retina_cls.weight": torch.zeros(9, 8, 3, 3),
        }
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("features_only", [False, True])
def test_any_nesting_and_prefix_loads(layout, features_only, tmp_path, official):
    expected = create(saved(tmp_path, official), features_only=features_only)
    path = saved(tmp_path, LAYOUTS[layout](official), "other.pth")
    model = create(path, features_only=features_only)
    for key, value in expected.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key


def test_safetensors_load(tmp_path, official):
    safetensors.torch.save_file(official, tmp_path / "model.safetensors")
    model = create(tmp_path / "model.safetensors")
    expected = create(saved(tmp_path, official))
    assert torch.equal(model.stem.conv1.conv.weight, expected.stem.conv1.conv.weight)


def test_loading_says_what_was_loaded_missing_unexpected_and_reshaped(tmp_path, official, caplog):
    del official["network.0.0.norm1.weight"]
    official["extra.weight"] = torch.zeros(3)
    with caplog.at_level(logging.INFO, "densezoo"):
        create(saved(tmp_path, official), in_chans=1)
    (message,) = [r for r in caplog.records if r.name.startswith("densezoo")]
    assert message.levelno == logging.WARNING
    text = message.getMessage()
    assert "442 entries loaded (official keys)" in text
    assert "1 missing: stages.0.blocks.0.norm1.weight" in text
    assert "1 unexpected: extra.weight" in text
    assert "1 reshaped: stem.conv1.conv.weight (24, 3, 3, 3) to (24, 1, 3, 3)" in text


def test_a_full_match_is_no_warning(tmp_path, official, caplog):
    with caplog.at_level(logging.INFO, "densezoo"):
        create(saved(tmp_path, official))
    (message,) = [r for r in caplog.records if r.name.startswith("densezoo")]
    assert message.levelno == logging.INFO


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    path = saved(tmp_path, timm.create_model("resnet18").state_dict())
    with pytest.raises(ValueError, match="cas_vit_xs: no entry of CASViT.*another model"):
        create(path)


def test_a_checkpoint_of_another_variant_is_refused_by_name(tmp_path, official):
    with pytest.raises(ValueError, match=r"stem.conv2.*another variant|another variant"):
        create(saved(tmp_path, official), name="cas_vit_m")


def test_a_part_of_a_checkpoint_is_refused(tmp_path, official):
    part = {k: v for k, v in official.items() if k.startswith(("patch_embed", "network.0"))}
    with pytest.raises(ValueError, match=r"\d+ of its \d+ entries of CASViT"):
        create(saved(tmp_path, part))


def test_a_fused_checkpoint_loads_into_fused_models_alone(tmp_path, settle):
    fused = settle(timm.create_model("cas_vit_xs")).fuse()
    path = saved(tmp_path, fused.state_dict())
    with pytest.raises(ValueError, match=r"fuse\(\)"):
        create(path)
    other = timm.create_model("cas_vit_xs").fuse().eval()
    other.load_state_dict(torch.load(path))
    x = make_input([1, 3, 64, 64])
    with torch.no_grad():
        assert torch.equal(other(x), fused(x))


@pytest.mark.parametrize("distillation", [False, True])
def test_a_fine_tuned_head_is_kept(distillation, tmp_path):
    torch.manual_seed(0)
    arguments = dict(num_classes=5, distillation=distillation)
    model = timm.create_model("cas_vit_xs", **arguments)
    again = create(saved(tmp_path, model.state_dict()), **arguments)
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key


def test_one_head_of_ours_loads_into_two(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("cas_vit_xs", distillation=False).eval()
    again = create(saved(tmp_path, model.state_dict())).eval()
    x = make_input([1, 3, 64, 64])
    with torch.no_grad():
        assert relative_error(again(x), model(x)) < 1e-5


@pytest.mark.parametrize("feature_cls", ["list", "dict", "hook", "fx"])
def test_state_dicts_of_every_feature_class_load(feature_cls, tmp_path):
    torch.manual_seed(0)
    features = timm.create_model("cas_vit_xs", features_only=True, feature_cls=feature_cls)
    model = create(saved(tmp_path, features.state_dict()), features_only=True)
    values = zip(model.state_dict().values(), features.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in values)


@pytest.mark.parametrize(
    "name, peer, arguments",
    [
        ("maxvit_tiny", "maxvit_tiny_tf_224", dict(depths=(1, 1, 1, 1))),
        ("gc_vit_xxtiny", "gcvit_xxtiny", {}),
    ],
    ids=["maxvit", "gc_vit"],
)
def test_what_timms_extractors_hold_of_timms_own_model_loads_whole(name, peer, arguments):
    state = timm.create_model(peer, features_only=True, **arguments).state_dict()
    model = timm.create_model(name, **arguments)
    rules = BACKBONES[name].key_rules
    _, report = convert_checkpoint(state, model, rules, first_conv="stem.conv1")
    assert report.dialect == "timm" and not report.unexpected and not report.reshaped
    assert all(key.startswith("head.") for key in report.missing)


def test_a_file_for_other_image_channels_names_the_argument(tmp_path):
    path = saved(tmp_path, timm.create_model("cas_vit_xs", in_chans=1).state_dict())
    with pytest.raises(ValueError, match="in_chans=1"):
        create(path)


@pytest.mark.parametrize(
    "content, message",
    [(None, "does not exist"), (b"", "can be read"), (b"PK\x03\x04x", "can be read")],
    ids=["missing", "empty", "truncated"],
)
def test_files_that_are_no_checkpoints_are_named(content, message, tmp_path):
    path = tmp_path / "weights.pth"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError), match=f"weights.pth.*{message}"):
        create(path)


def test_a_file_that_holds_a_list_is_named(tmp_path):
    with pytest.raises(ValueError, match="holds a list"):
        create(saved(tmp_path, [1, 2]))


def test_a_checkpoint_without_weights_is_refused():
    with pytest.raises(ValueError, match="no weights found .*epoch"):
        unwrap_nesting({"epoch": 3, "meta": {}})


def test_two_entries_of_one_name_are_refused():
    with pytest.raises(ValueError, match="map to c"):
        map_keys({"a": torch.zeros(1), "b": torch.zeros(1)}, [("^[ab]$", "c")])


def test_no_direct_link_names_the_page_and_the_overlay():
    with pytest.raises(ValueError, match=r"MODEL_ZOO\.md.*pretrained_cfg_overlay=dict\(file="):
        timm.create_model("cas_vit_xs", pretrained=True)
    with pytest.raises(ValueError, match=r"pretrained_cfg_overlay=dict\(file="):
        timm.create_model("cas_vit_xs", pretrained=True, features_only=True)


@pytest.mark.parametrize("safe", [False, True])
def test_saving_for_the_hub_and_local_dir_round_trip(safe, tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("cas_vit_xs", num_classes=11, in_chans=1).eval()
    save_for_hf(model, tmp_path / "hub", model_args=dict(in_chans=1), safe_serialization=safe)
    again = timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True).eval()
    x = torch.randn(1, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(again(x), model(x))


def test_one_head_loads_into_two_and_keeps_the_logits(tmp_path):
    path = saved(tmp_path, make_checkpoint(SINGLE_FILE, SINGLE))
    model = create(path).double().eval()
    with torch.no_grad():
        logits = model(make_input(SINGLE["input"], SINGLE["seed"]).double())
    assert error(SINGLE["outputs"]["logits"], logits) < 1e-6


def test_two_heads_load_into_one_and_keep_the_logits(tmp_path):
    path = saved(tmp_path, make_checkpoint(XS_FILE, XS))
    model = create(path, distillation=False).double().eval()
    with torch.no_grad():
        logits = model(make_input(XS["input"], XS["seed"]).double())
    assert error(XS["outputs"]["logits"], logits) < 1e-6


@pytest.mark.parametrize("distillation", [False, True])
def test_another_number_of_classes_gets_a_fresh_head(distillation, tmp_path, official, caplog):
    model = create(saved(tmp_path, official), num_classes=5, distillation=distillation)
    assert model.eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 5)
    assert torch.equal(model.stem.conv1.conv.weight, official["patch_embed.0.weight"])
    assert "(1000, 220) to (5, 220)" in caplog.text


@pytest.mark.parametrize("how", ["pretrained", "init_cfg"])
def test_dense_backbone_loads_official_files_with_their_output_norms(how, tmp_path, official):
    generator = torch.Generator().manual_seed(0)
    for i, dim in enumerate((48, 56, 112, 220)):
        official[f"norm{2 * i}.weight"] = torch.rand(dim, generator=generator)
        official[f"norm{2 * i}.bias"] = torch.rand(dim, generator=generator)
        official[f"norm{2 * i}.running_mean"] = torch.rand(dim, generator=generator)
        official[f"norm{2 * i}.running_var"] = torch.rand(dim, generator=generator) + 0.5
    path = str(saved(tmp_path, {"state_dict": {f"backbone.{k}": v for k, v in official.items()}}))
    load = (
        dict(pretrained=path)
        if how == "pretrained"
        else dict(init_cfg=dict(type="Pretrained", checkpoint=path))
    )
    backbone = MODELS.build(
        dict(type="DenseBackbone", model_name="cas_vit_xs", out_indices=(3, 1), out_norms=True)
        | load
    )
    backbone.init_weights()
    assert torch.equal(backbone.out_norms["1"].weight, official["norm2.weight"])
    assert torch.equal(backbone.out_norms["3"].running_var, official["norm6.running_var"])
    inner = backbone.model.model
    assert torch.equal(inner.stem.conv1.conv.weight, official["patch_embed.0.weight"])
    plain = create(saved(tmp_path, official, "bare.pth"), features_only=True, out_indices=(3, 1))
    x = make_input([1, 3, 64, 64])
    with torch.no_grad():
        maps, expected = backbone.eval()(x), plain.eval()(x)
    for m, e, i in zip(maps, expected, (3, 1), strict=True):
        norm = {k: official[f"norm{2 * i}.{k}"][:, None, None] for k in ("weight", "bias")}
        mean, var = (official[f"norm{2 * i}.running_{k}"][:, None, None] for k in ("mean", "var"))
        by_hand = (e - mean) / (var + 1e-5).sqrt() * norm["weight"] + norm["bias"]
        assert relative_error(m, by_hand) < 1e-5


def test_dense_backbone_loads_its_own_detector_with_output_norms(tmp_path, caplog):
    arguments = dict(type="DenseBackbone", model_name="cas_vit_xs", out_norms=True)
    torch.manual_seed(0)
    backbone = MODELS.build(arguments)
    for parameter in backbone.parameters():
        parameter.data.add_(0.1)
    state = {f"backbone.{k}": v for k, v in backbone.state_dict().items()}
    state["neck.conv.weight"] = torch.zeros(3, 3)
    path = str(saved(tmp_path, {"state_dict": state, "meta": {}}))
    with caplog.at_level(logging.INFO, "densezoo"):
        again = MODELS.build(arguments | dict(pretrained=path))
    for key, value in backbone.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key
    assert "20 of 20 entries of out_norms loaded" in caplog.text


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext"])
def test_dense_backbone_loads_its_own_detector_of_timm_models(name, tmp_path):
    backbone = MODELS.build(dict(type="DenseBackbone", model_name=name))
    state = {f"backbone.{k}": v for k, v in backbone.state_dict().items()}
    path = str(saved(tmp_path, {"state_dict": state}))
    again = MODELS.build(dict(type="DenseBackbone", model_name=name, pretrained=path))
    for key, value in backbone.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key


def test_dense_backbone_refuses_a_foreign_checkpoint_for_timm_models(tmp_path, official):
    path = str(saved(tmp_path, official))
    with pytest.raises(ValueError, match="not one of test_resnet"):
        MODELS.build(dict(type="DenseBackbone", model_name="test_resnet", pretrained=path))


def test_dense_backbone_refuses_a_foreign_checkpoint(tmp_path):
    path = str(saved(tmp_path, timm.create_model("resnet18").state_dict()))
    with pytest.raises(ValueError, match="does not fit cas_vit_xs"):
        MODELS.build(dict(type="DenseBackbone", model_name="cas_vit_xs", pretrained=path))
