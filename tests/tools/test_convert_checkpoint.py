"""``densezoo convert``: published files become checkpoints of our models, whole, or are refused.

The files are made from the names that the authors' models have, typed here, and from the state of
mmdet's and mmseg's own necks and heads, which no rule of ours has touched.
"""

import argparse
import math
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
from mmcv.ops import MultiScaleDeformableAttention
from mmdet.datasets import CocoDataset
from mmdet.models.layers.transformer.utils import coordinate_to_encoding
from mmdet.structures import DetDataSample
from mmengine.registry import MODELS, DefaultScope
from oracles import load_cases, make_checkpoint, make_state_dict
from PIL import Image
from torch import nn
from torch.nn import functional as F

from densezoo.backbones.checkpoints import read_checkpoint
from densezoo.tools import cli
from densezoo.tools.convert_checkpoint import convert
from densezoo.tools.demo_data import make_dataset
from densezoo.tools.engine.config_files import load_config

DEPTHS = (1, 1, 2, 1)
SMALL = [
    f"model.backbone.model_kwargs.depths={DEPTHS}".replace(" ", ""),
    "model.backbone.init_cfg=None",
]
ROI = "model.roi_head"
# Few boxes, whatever their scores.
BOXES = [
    "model.test_cfg.rpn.max_per_img=50",
    "model.test_cfg.rcnn.max_per_img=20",
    "model.test_cfg.rcnn.score_thr=0",
]
# Config, options that make it small, channels of the first stage, MLP ratio, whether its design is
# Swin's, layer scale.
DETECTORS = {
    "mask_rcnn": (
        "mask_rcnn_nat_small_fpn_3x_coco",
        [f"{ROI}.bbox_head.fc_out_channels=32", *BOXES],
        (96, 2, False, True),
    ),
    "cascade": (
        "cascade_mask_rcnn_dinat_s_tiny_fpn_3x_coco",
        [*(f"{ROI}.bbox_head.{i}.fc_out_channels=32" for i in range(3)), *BOXES],
        (96, 4, True, False),
    ),
    "upernet": (
        "upernet_dinat_mini_160k_ade20k",
        ["model.decode_head.channels=32"],
        (64, 3, False, False),
    ),
}  # fmt: skip


def official_keys(dim, mlp_ratio, is_swin_design, layer_scale, *, depths=DEPTHS, dense=True):
    """(name, shape, kind) of the entries of an official backbone, or of a classifier."""
    keys = []

    def add(name, *shape):
        keys.append((name, shape, "param"))

    def add_layer(name, outputs, inputs, *kernel):
        add(f"{name}.weight", outputs, inputs, *kernel)
        add(f"{name}.bias", outputs)

    def add_norm(name, channels):
        add(f"{name}.weight", channels)
        add(f"{name}.bias", channels)

    if is_swin_design:
        add_layer("patch_embed.proj", dim, 3, 4, 4)
    else:
        add_layer("patch_embed.proj.0", dim // 2, 3, 3, 3)
        add_layer("patch_embed.proj.1", dim, dim // 2, 3, 3)
    add_norm("patch_embed.norm", dim)
    levels = "layers" if is_swin_design else "levels"
    for i, depth in enumerate(depths):
        c = dim * 2**i
        for j in range(depth):
            block = f"{levels}.{i}.blocks.{j}"
            add_norm(f"{block}.norm1", c)
            add(f"{block}.attn.rpb", c // 32, 13, 13)
            add_layer(f"{block}.attn.qkv", 3 * c, c)
            add_layer(f"{block}.attn.proj", c, c)
            add_norm(f"{block}.norm2", c)
            add_layer(f"{block}.mlp.fc1", mlp_ratio * c, c)
            add_layer(f"{block}.mlp.fc2", c, mlp_ratio * c)
            if layer_scale:
                add(f"{block}.gamma1", c)
                add(f"{block}.gamma2", c)
        if i < 3 and is_swin_design:
            add_norm(f"{levels}.{i}.downsample.norm", 4 * c)
            add(f"{levels}.{i}.downsample.reduction.weight", 2 * c, 4 * c)
        elif i < 3:
            add(f"{levels}.{i}.downsample.reduction.weight", 2 * c, c, 3, 3)
            add_norm(f"{levels}.{i}.downsample.norm", 2 * c)
    if dense:
        for i in range(4):
            add_norm(f"norm{i}", dim * 2**i)
    else:
        add_norm("norm", 8 * dim)
        add_layer("head", 1000, 8 * dim)
    return keys


def randomised(state, seed):
    """A module's entries with numbers of their own, so that none can stand for another."""
    generator = torch.Generator().manual_seed(seed)
    result = {}
    for key, value in state.items():
        noise = torch.randn(value.shape, generator=generator)
        is_matrix = value.ndim > 1
        # Variances are positive, counters whole.
        result[key] = (
            value + 0.02 * noise if is_matrix else 1 + 0.1 * noise.abs()
        ).to(value.dtype)  # fmt: skip
    return result


class Case:
    """A published detector or segmenter, and the same one built from its parts."""

    def __init__(self, name, folder):
        self.config, options, self.design = DETECTORS[name]
        self.options = [*SMALL, *options]
        self.cfg = load_config(self.config, self.options)
        self.scope = self.cfg.default_scope
        self.backbone = make_state_dict(official_keys(*self.design), seed=1)
        self.parts = {}
        for seed, part in enumerate(
            ("neck", "rpn_head", "roi_head", "decode_head", "auxiliary_head")
        ):
            if part in self.cfg.model:
                self.parts[part] = randomised(self._build_part(part).state_dict(), seed)
        state = {f"backbone.{key}": value for key, value in self.backbone.items()}
        for part, entries in self.parts.items():
            state |= {f"{part}.{key}": value for key, value in entries.items()}
        self.state = state
        self.file = folder / f"{name}.pth"
        self.meta = dict(
            mmdet_version="2.19.0", epoch=36, iter=263880, config="model = dict()",
            CLASSES=tuple(f"class {i}" for i in range(80)), PALETTE=[[i, 0, 0] for i in range(80)],
        )  # fmt: skip
        optimizer = dict(state={0: dict(step=3)}, param_groups=[dict(lr=1e-4, params=[0])])
        torch.save(dict(meta=self.meta, state_dict=state, optimizer=optimizer), self.file)

    def _build_part(self, part):
        options = dict(self.cfg.model[part])
        if part == "roi_head":
            options |= dict(
                train_cfg=self.cfg.model.train_cfg.rcnn, test_cfg=self.cfg.model.test_cfg.rcnn
            )
        with DefaultScope.overwrite_default_scope(self.scope):
            return MODELS.build(options)

    def build(self):
        with DefaultScope.overwrite_default_scope(self.scope):
            return MODELS.build(self.cfg.model)

    def native(self, folder):
        """The model, its backbone's weights by its own loading, those of the parts by torch's."""
        model = self.build()
        path = folder / "backbone.pth"
        torch.save(self.backbone, path)
        model.backbone.load_weights(str(path))
        for part, entries in self.parts.items():
            getattr(model, part).load_state_dict(entries)
        return model

    def predict(self, model):
        """What a model says of an image, as tensors."""
        pixels = np.random.default_rng(0).integers(0, 256, (3, 72, 104), dtype=np.uint8)
        image = torch.from_numpy(pixels)
        with torch.no_grad(), DefaultScope.overwrite_default_scope(self.scope):
            model.eval()
            maps = model(image[None].float() / 64 - 2) if self.scope == "mmseg" else ()
            if self.scope == "mmseg":
                return [maps]
            sample = DetDataSample(metainfo=dict(
                img_shape=(72, 104), ori_shape=(72, 104), scale_factor=(1.0, 1.0), img_id=0,
            ))  # fmt: skip
            (result,) = model.test_step(dict(inputs=[image], data_samples=[sample]))
            found = result.pred_instances
            assert len(found) == 20
            return [found.bboxes, found.scores, found.labels, found.masks]


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    folder, made = tmp_path_factory.mktemp("published"), {}

    def make(name):
        if name not in made:
            made[name] = Case(name, folder)
        return made[name]

    return make


def run(*words):
    """Run the command; every word is given as it is."""
    return cli.main(["convert", *map(str, words)])


# Names of mmdet 2.19 and mmseg 0.20, typed from their code: the parts still have them.
OLD_NAMES = {
    "mask_rcnn": (
        "neck.lateral_convs.3.conv.weight", "neck.fpn_convs.0.conv.bias",
        "rpn_head.rpn_conv.weight", "rpn_head.rpn_cls.bias", "rpn_head.rpn_reg.weight",
        "roi_head.bbox_head.shared_fcs.1.weight", "roi_head.bbox_head.fc_cls.weight",
        "roi_head.bbox_head.fc_reg.bias", "roi_head.mask_head.convs.3.conv.weight",
        "roi_head.mask_head.upsample.weight", "roi_head.mask_head.conv_logits.bias",
    ),
    "cascade": (
        "roi_head.bbox_head.2.shared_convs.3.conv.weight",
        "roi_head.bbox_head.0.shared_convs.0.bn.running_var",
        "roi_head.bbox_head.1.shared_fcs.0.bias", "roi_head.bbox_head.1.fc_reg.weight",
        "roi_head.mask_head.2.convs.0.conv.bias",
    ),
    "upernet": (
        "decode_head.psp_modules.3.1.conv.weight", "decode_head.psp_modules.0.1.bn.running_mean",
        "decode_head.bottleneck.conv.weight", "decode_head.lateral_convs.2.bn.weight",
        "decode_head.fpn_convs.0.conv.weight", "decode_head.fpn_bottleneck.bn.bias",
        "decode_head.conv_seg.weight", "auxiliary_head.convs.0.conv.weight",
        "auxiliary_head.conv_seg.bias",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DETECTORS)
def test_a_converted_model_equals_one_loaded_part_by_part(name, cases, tmp_path, capsys):
    case = cases(name)
    assert {"backbone.norm3.weight", *OLD_NAMES[name]} <= case.state.keys()
    out = tmp_path / "out.pth"
    assert run(case.file, out, "--config", case.config, "--cfg-options", *case.options) == 0
    said = capsys.readouterr().out
    assert f"{len(case.state)} entries (official names)" in said and "the file has" not in said
    content = read_checkpoint(out)
    assert content.keys() == {"meta", "state_dict"}
    meta = content["meta"]["dataset_meta"]
    assert meta == dict(classes=case.meta["CLASSES"], palette=case.meta["PALETTE"])
    model = case.build()
    model.load_state_dict(content["state_dict"], strict=True)
    native = case.native(tmp_path)
    for i in range(4):
        entry = content["state_dict"][f"backbone.out_norms.{i}.weight"]
        assert torch.equal(entry, case.backbone[f"norm{i}.weight"])
    for ours, theirs in zip(case.predict(model), case.predict(native), strict=True):
        assert torch.equal(ours, theirs)
        assert torch.isfinite(ours.float()).all()
    fresh = case.build()
    assert any(
        not torch.equal(one, two)
        for one, two in zip(case.predict(model), case.predict(fresh), strict=True)
    )


def test_the_command_converts_in_a_process_of_its_own(cases, tmp_path):
    case = cases("upernet")
    out = tmp_path / "out.pth"
    done = subprocess.run(
        [sys.executable, "-m", "densezoo", "convert", case.file, out, "--config", case.config,
         "--cfg-options", *case.options],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith(f"{out}: ")
    assert [path.name for path in tmp_path.iterdir()] == ["out.pth"]


def test_the_test_command_takes_a_converted_file(cases, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    case = cases("upernet")
    root = make_dataset(tmp_path / "digits", images=16, size=64)
    assert run(case.file, "out.pth", "--config", case.config, "--cfg-options", *case.options) == 0
    data = "test_dataloader.dataset"
    options = [
        *case.options, f"{data}.data_root={root}", f"{data}.data_prefix.img_path=images/val",
        f"{data}.data_prefix.seg_map_path=masks/val", f"{data}.pipeline.1.scale=(64,64)",
        "test_dataloader.num_workers=0", "test_dataloader.persistent_workers=False",
    ]  # fmt: skip
    options = ["--cfg-options", *options, "experiment_name=converted"]
    words = ["test", case.config, "out.pth", "--out", "figures.json", *options]
    assert cli.main(words) == 0
    assert (tmp_path / "figures.json").exists()


def test_a_predictor_knows_the_classes_of_a_converted_file(cases, tmp_path):
    from densezoo.tools.predict import Predictor

    case = cases("mask_rcnn")
    out = tmp_path / "out.pth"
    assert run(case.file, out, "--config", case.config, "--cfg-options", *case.options) == 0
    options = [*case.options, "test_dataloader.dataset.pipeline.1.scale=(96,96)"]
    predictor = Predictor(case.config, out, cfg_options=options, device="cpu")
    assert predictor.classes == [f"class {i}" for i in range(80)]
    assert predictor.palette[7] == (7, 0, 0)
    found = predictor(Image.new("RGB", (64, 48), "red"))
    assert len(found.scores) == 20


def test_ema_buffers_wrappers_and_missing_counters_are_taken_as_they_come(cases):
    case = cases("cascade")
    model = case.build()
    plain = convert({"state_dict": case.state}, model)
    wrapped = {
        f"module.{key}": value
        for key, value in case.state.items()
        if not key.endswith("num_batches_tracked")
    }
    wrapped["module.ema_backbone_patch_embed_norm_weight"] = torch.zeros(96)
    converted = convert({"state_dict": wrapped}, model)
    assert converted.unused == ("ema_backbone_patch_embed_norm_weight",)
    assert converted.state_dict.keys() == plain.state_dict.keys() == model.state_dict().keys()
    for key, value in converted.state_dict.items():
        if key.endswith("num_batches_tracked"):
            assert value == 0 and value.dtype == torch.int64
        else:
            assert torch.equal(value, plain.state_dict[key])


def test_our_own_checkpoint_comes_out_as_it_is(cases):
    case = cases("upernet")
    model = case.build()
    state = model.state_dict()
    converted = convert({"state_dict": state}, model)
    assert converted.dialect == "densezoo"
    assert converted.state_dict.keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in converted.state_dict.items())


def test_what_the_maps_of_a_config_do_not_depend_on_is_left_out(cases):
    case = cases("upernet")
    options = [
        *case.options, "model.backbone.out_indices=(0,1)", "model.decode_head.in_index=[0,1]",
        "model.decode_head.in_channels=[64,128]", "model.auxiliary_head.in_index=1",
        "model.auxiliary_head.in_channels=128",
    ]  # fmt: skip
    cfg = load_config(case.config, options)
    with DefaultScope.overwrite_default_scope("mmseg"):
        model = MODELS.build(cfg.model)
    parts = {
        f"{part}.{key}": value
        for part in ("decode_head", "auxiliary_head")
        for key, value in getattr(model, part).state_dict().items()
    }
    body = {key: value for key, value in case.state.items() if key.startswith("backbone.")}
    body["backbone.head.weight"] = torch.zeros(1000, 512)
    converted = convert({**body, **parts}, model)
    assert converted.state_dict.keys() == model.state_dict().keys()
    assert {name.rpartition("backbone.")[2].split(".")[0] for name in converted.unused} == {
        "model", "out_norms",
    }  # fmt: skip
    assert "backbone.out_norms.3.weight" in converted.unused


# Detectors and segmenters of other families: config, its options, case of the backbone's weights,
# the classifier's own entries, channels of each norm, entries of a norm. No head of the RetinaNets
# takes the norm of the first map.
OTHER_FAMILIES = {
    "cas_vit": (
        "retinanet_cas_vit_xs_fpn_1x_coco",
        [],
        "cas_vit_xs",
        ("norm.", "head.", "dist_head."),
        {"norm0": 48, "norm2": 56, "norm4": 112, "norm6": 220},
        ("weight", "bias", "running_mean", "running_var"),
    ),
    "biformer": (
        "retinanet_biformer_small_fpn_1x_coco",
        ["model.backbone.model_kwargs.depths=(2,2,8,2)"],
        "biformer_tiny",
        ("norm.", "head."),
        {f"extra_norms.{i}": 64 * 2**i for i in range(4)},
        ("weight", "bias"),
    ),
    "ppma": (
        "mask_rcnn_ppma_tiny_fpn_1x_coco",
        [],
        "ppma_tiny",
        ("proj.", "norm.", "head."),
        {f"outnorm{i}": 64 * 2**i for i in range(4)},
        ("weight", "bias"),
    ),
    "ppma_segmenter": (
        "upernet_ppma_tiny_160k_cityscapes",
        [],
        "ppma_tiny",
        ("proj.", "norm.", "head."),
        {f"outnorm{i}": 64 * 2**i for i in range(4)},
        ("weight", "bias"),
    ),
}


@pytest.mark.parametrize("name", OTHER_FAMILIES)
def test_official_files_of_other_families_convert(name):
    config, options, variant, of_classifier, norms, entries = OTHER_FAMILIES[name]
    case_file, case = next(c for c in load_cases().values() if c[0]["variant"] == variant)
    (official,) = make_checkpoint(case_file, case).values()
    # Some files hold what the official model computes, too.
    derived = {key: torch.zeros(size) for key, size, kind in case_file["keys"] if kind == "derived"}
    body = {
        f"backbone.{key}": value
        for key, value in (official | derived).items()
        if not key.startswith(of_classifier)
    }
    cfg = load_config(config, [*options, "model.backbone.init_cfg=None"])
    with DefaultScope.overwrite_default_scope(cfg.default_scope), torch.device("meta"):
        model = MODELS.build(cfg.model)
    for i, (norm, dim) in enumerate(norms.items()):
        body |= {f"backbone.{norm}.{entry}": torch.full((dim,), i + 1.0) for entry in entries}
    own = model.state_dict()
    parts = {key: value for key, value in own.items() if not key.startswith("backbone.")}
    converted = convert({"state_dict": body | parts}, model)
    is_retinanet = config.startswith("retinanet")
    assert {name.split(".")[2] for name in converted.unused} == ({"0"} if is_retinanet else set())
    for i in range(is_retinanet, 4):
        assert converted.state_dict[f"backbone.out_norms.{i}.bias"].eq(i + 1).all()
    shapes = [{k: v.shape for k, v in state.items()} for state in (converted.state_dict, own)]
    assert shapes[0] == shapes[1]


def hugging_face(state):
    """An official classifier of design A under the names of Hugging Face's library."""
    renamed = {}
    for key, value in state.items():
        words = key.split(".")
        if key.startswith("patch_embed.proj."):
            name = f"nat.embeddings.patch_embeddings.projection.{words[2]}.{words[3]}"
        elif key.startswith("patch_embed.norm."):
            name = f"nat.embeddings.norm.{words[2]}"
        elif words[0] == "norm":
            name = f"nat.layernorm.{words[1]}"
        elif words[0] == "head":
            name = f"classifier.{words[1]}"
        elif words[2] == "downsample":
            name = f"nat.encoder.{key}"
        else:
            layer = f"nat.encoder.levels.{words[1]}.layers.{words[3]}"
            rest = ".".join(words[4:])
            if rest.startswith("attn.qkv."):
                for part, rows in zip(("query", "key", "value"), value.chunk(3), strict=True):
                    renamed[f"{layer}.attention.self.{part}.{words[-1]}"] = rows
                continue
            inner = {
                "attn.rpb": "attention.self.rpb",
                "attn.proj": "attention.output.dense",
                "norm1": "layernorm_before", "norm2": "layernorm_after",
                "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense",
            }  # fmt: skip
            stem = rest if rest == "attn.rpb" else rest.rpartition(".")[0]
            name = f"{layer}.{inner[stem]}" + ("" if stem == rest else f".{words[-1]}")
        renamed[name] = value
    return renamed


def isotropic_keys(*, full):
    """(name, shape, kind) of the entries of an official isotropic classifier, the small one."""
    keys = [
        ("patch_embed.proj.weight", (384, 3, 16, 16), "param"),
        ("patch_embed.proj.bias", (384,), "param"),
    ]
    norms = ["patch_embed.norm", "norm"]
    for i in range(12):
        block = f"layers.{i}"
        norms += [f"{block}.norm1", f"{block}.norm2"]
        keys.append((f"{block}.attn.rpb", (12, 27, 27) if full else (12, 13, 13), "param"))
        for name, outputs, inputs in (
            ("attn.qkv", 1152, 384), ("attn.proj", 384, 384),
            ("mlp.fc1", 1536, 384), ("mlp.fc2", 384, 1536),
        ):  # fmt: skip
            keys.append((f"{block}.{name}.weight", (outputs, inputs), "param"))
            keys.append((f"{block}.{name}.bias", (outputs,), "param"))
        if full:
            keys.append((f"{block}.attn.relative_position_index", (196, 196), "counter"))
    for norm in norms:
        keys += [(f"{norm}.weight", (384,), "param"), (f"{norm}.bias", (384,), "param")]
    keys += [("head.weight", (1000, 384), "param"), ("head.bias", (1000,), "param")]
    return keys


CLASSIFIERS = {
    "nat_mini": official_keys(64, 3, False, False, depths=(3, 4, 6, 5), dense=False),
    "dinat_s_tiny": official_keys(96, 4, True, False, depths=(2, 2, 6, 2), dense=False),
    "nat_isotropic_small": isotropic_keys(full=False),
    "vitrpb_small": isotropic_keys(full=True),
}


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_classifier_converts_to_what_timm_loads(name, tmp_path, capsys):
    official = make_state_dict(CLASSIFIERS[name], seed=2)
    source, out = tmp_path / "published.pth", tmp_path / "out.pth"
    raw = {key: torch.zeros_like(value) for key, value in official.items()}
    torch.save({"model": raw, "model_ema": official}, source)
    assert run(source, out, "--model", name) == 0
    said = capsys.readouterr().out
    assert "weights are those of 'model_ema'; the file has model too" in said
    assert "left out" not in said
    converted = timm.create_model(name, checkpoint_path=str(out))  # which maps no names
    overlay = dict(file=str(source))
    native = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay)
    for (key, one), (other, two) in zip(
        converted.state_dict().items(), native.state_dict().items(), strict=True
    ):
        assert key == other and torch.equal(one, two)
    assert torch.equal(converted.head.fc.weight, official["head.weight"])


def test_hugging_faces_names_give_the_same_classifier():
    official = make_state_dict(CLASSIFIERS["nat_mini"], seed=3)
    models = [timm.create_model("nat_mini", device="meta") for _ in range(2)]
    one, two = convert(official, models[0]), convert(hugging_face(official), models[1])
    assert (one.dialect, two.dialect) == ("official", "transformers")
    assert one.state_dict.keys() == two.state_dict.keys()
    assert all(torch.equal(one.state_dict[key], two.state_dict[key]) for key in one.state_dict)


def test_a_classifier_gets_as_many_classes_as_its_file_and_a_config_does_not(tmp_path, capsys):
    keys = official_keys(64, 3, False, False, depths=(3, 4, 6, 5), dense=False)
    keys = [k if k[0] != "head.weight" else (k[0], (21841, 512), k[2]) for k in keys]
    keys = [k if k[0] != "head.bias" else (k[0], (21841,), k[2]) for k in keys]
    source, out = tmp_path / "published.pth", tmp_path / "out.pth"
    torch.save(make_state_dict(keys), source)
    assert run(source, out, "--model", "dinat_mini") == 0
    assert len(read_checkpoint(out)["state_dict"]["head.fc.bias"]) == 21841
    config = ["--config", "dinat_mini_8xb128_300e_in1k"]
    assert run(source, tmp_path / "other.pth", *config) == 1
    assert "head.fc.weight (21841, 512) instead of (1000, 512)" in capsys.readouterr().err
    assert run(source, tmp_path / "other.pth", *config, "--cfg-options",
               "model.num_classes=21841") == 0  # fmt: skip
    state = read_checkpoint(tmp_path / "other.pth")["state_dict"]
    assert len(state["backbone.head.fc.bias"]) == 21841


def test_a_tensor_of_the_output_holds_its_own_numbers_alone(tmp_path):
    """A slice of a larger tensor would bring all of it along."""
    official = make_state_dict(CLASSIFIERS["nat_mini"])
    shared = torch.zeros(50_000_000)
    official["head.bias"] = shared[:1000]
    source, out = tmp_path / "published.pth", tmp_path / "out.pth"
    torch.save(official, source)
    assert run(source, out, "--model", "nat_mini") == 0
    assert out.stat().st_size < 100e6 < source.stat().st_size


# What becomes of the published file, the words after SOURCE, parts of the one line that is said.
def _without(*names):
    return lambda state: {k: v for k, v in state.items() if not k.endswith(names)}


def _with(**entries):
    return lambda state: {**state, **{k.replace("__", "."): v for k, v in entries.items()}}


CONFIG = "upernet_dinat_mini_160k_ade20k"
MISTAKES = {
    "no-target": (None, "out.pth", 2, "--config", "--model"),
    "both": (None, f"out.pth --config {CONFIG} --model nat_mini", 2, "not allowed with"),
    "suffix": (None, "out.safetensors --model nat_mini", 1, "out.safetensors", "end in .pth"),
    "folder": (None, "folder.pth --model nat_mini", 1, "folder.pth", "is a folder"),
    "exists": (None, "there.pth --model nat_mini", 1, "there.pth exists", "--overwrite"),
    "nowhere": (None, "no/out.pth --model nat_mini", 1, "no/out.pth", "does not exist"),
    "itself": (None, "source.pth --model nat_mini --overwrite", 1, "is SOURCE itself"),
    "config": (None, "out.pth --config upernet_dinat", 1, "'upernet_dinat'", "nearest"),
    "model": (None, "out.pth --model nat_minni", 1, "'nat_minni'", "did you mean nat_mini"),
    "timms": (None, "out.pth --model resnet18", 1, "models of densezoo", "resnet18 is timm's"),
    "options": (None, "out.pth --model nat_mini --cfg-options a=1", 1, "--cfg-options", "--config"),
    "dense-as-classifier": (
        None, "out.pth --model nat_mini", 1, "source.pth is not of nat_mini",
        "auxiliary_head., decode_head.", "give --config",
    ),
    "missing": (
        _without("norm2.weight", "conv_seg.bias"), "CONFIG", 1,
        "missing: 8 entries (backbone.", "...)", CONFIG,
    ),
    "left": (
        _with(decode_head__extra=torch.zeros(1)), "CONFIG", 1,
        "left over: 1 entries (decode_head.extra)",
    ),
    "deeper": (
        lambda state: state | {
            k.replace("levels.2.blocks.1", "levels.2.blocks.2"): v for k, v in state.items()
        },
        "CONFIG", 1, "left over: 13 entries (backbone.", "stages.2.blocks.2.",
    ),
    "classes": (
        _with(decode_head__conv_seg__weight=torch.zeros(7, 32, 1, 1)), "CONFIG", 1,
        "of another shape: 1 entries (decode_head.conv_seg.weight (7, 32, 1, 1) instead of",
        "--cfg-options",
    ),
    "wider": (
        _with(backbone__norm3__weight=torch.zeros(768)), "CONFIG", 1,
        "backbone.out_norms.3.weight (768,) instead of (512,)",
    ),
    "variant": (
        _with(backbone__patch_embed__norm__weight=torch.zeros(96)), "CONFIG", 1,
        "another variant",
    ),
    "no-backbone": (
        lambda state: {k: v for k, v in state.items() if not k.startswith("backbone.")},
        "CONFIG", 1, "no entry is under backbone.", "--model",
    ),
    "another": (
        lambda state: {f"backbone.layer1.{i}.weight": torch.zeros(3) for i in range(9)},
        "CONFIG", 1, "another model",
    ),
    "nan": (
        _with(decode_head__conv_seg__bias=torch.full((150,), torch.nan)), "CONFIG", 1, "hold NaN",
    ),
    "empty": (lambda state: {}, "CONFIG", 1, "no weights found"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_writes_nothing(name, cases, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    case = cases("upernet")
    change, words, code, *parts = MISTAKES[name]
    state = (change or dict)(case.state)
    torch.save({"meta": case.meta, "state_dict": state}, "source.pth")
    (tmp_path / "folder.pth").mkdir()
    (tmp_path / "there.pth").write_text("precious")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    words = words.split()
    if words == ["CONFIG"]:
        words = ["out.pth", "--config", CONFIG, "--cfg-options", *case.options]
    try:
        found = run("source.pth", *words)
    except SystemExit as stopped:
        found = stopped.code
    said = capsys.readouterr().err
    assert found == code, said
    (line,) = said.splitlines()
    assert line.startswith("densezoo convert: error: ")
    for part in parts:
        assert part in line, line
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    assert after == before


@pytest.mark.parametrize(
    "content", [b"", b"<!DOCTYPE html>", b"PK\x03\x04" + bytes(64)], ids=range(3)
)
def test_a_damaged_file_is_one_line(content, tmp_path, capsys):
    source = tmp_path / "source.pth"
    source.write_bytes(content)
    assert run(source, tmp_path / "out.pth", "--model", "nat_mini") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "source.pth" in line and "can be read safely" in line
    assert run(tmp_path / "none.pth", tmp_path / "out.pth", "--model", "nat_mini") == 1
    assert "none.pth' does not exist" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["source.pth"]


def test_an_output_is_replaced_when_asked_for_and_kept_when_writing_fails(tmp_path, monkeypatch):
    official = make_state_dict(CLASSIFIERS["nat_mini"])
    source, out = tmp_path / "source.pth", tmp_path / "out.pth"
    torch.save(official, source)
    out.write_text("precious")

    def fail(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        assert run(source, out, "--model", "nat_mini", "--overwrite") == 1
    assert out.read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.pth", "source.pth"]
    assert run(source, out, "--model", "nat_mini", "--overwrite") == 0
    assert "head.fc.weight" in read_checkpoint(out)["state_dict"]


def test_a_model_without_a_backbone_of_the_zoo_is_named():
    with pytest.raises(ValueError, match="the backbone of this Linear is no model of densezoo"):
        convert({"a": torch.zeros(1)}, torch.nn.Linear(1, 1))


# FasterViT's published detector, small: what its copy of DINO's repository names its entries.
DINO = "dino_faster_vit_4_21k_224_4scale_1x_coco"
DINO_OPTIONS = [
    "model.backbone.init_cfg=None", "model.backbone.model_kwargs.depths=(1,1,2,1)",
    "model.backbone.model_kwargs.dims=(32,64,128,256)", "model.backbone.model_kwargs.stem_dim=16",
    "model.neck.in_channels=[64,128,256]", "model.encoder.num_layers=2",
    "model.decoder.num_layers=2", "model.num_queries=30", "model.test_cfg.max_per_img=20",
]  # fmt: skip
NUM_LAYERS, NUM_QUERIES, NUM_CATEGORIES = 2, 30, 91
# Of COCO's category numbers, as its annotations have them.
CATEGORIES = {"person": 1, "bicycle": 2, "fire hydrant": 11, "stop sign": 13, "parking meter": 14,
              "bench": 15, "backpack": 27, "umbrella": 28, "handbag": 31,
              "bottle": 44, "wine glass": 46, "bed": 65, "dining table": 67, "toilet": 70,
              "tv": 72, "refrigerator": 82, "book": 84, "toothbrush": 90}  # fmt: skip


def faster_vit_keys():
    """(name, shape, kind) of the small backbone without carriers, the derived entries included."""
    keys = []

    def add(name, *shape, bias=True):
        keys.append((f"{name}.weight", shape, "param"))
        if bias:
            keys.append((f"{name}.bias", shape[:1], "param"))

    def add_batch_norm(name, channels):
        add(name, channels)
        keys.append((f"{name}.running_mean", (channels,), "buffer"))
        keys.append((f"{name}.running_var", (channels,), "buffer"))
        keys.append((f"{name}.num_batches_tracked", (), "counter"))

    def add_position_mlp(name, outputs):
        add(f"{name}.cpb_mlp.0", 512, 2)
        add(f"{name}.cpb_mlp.2", outputs, 512, bias=False)

    add("patch_embed.conv_down.0", 16, 3, 3, 3, bias=False)
    add_batch_norm("patch_embed.conv_down.1", 16)
    add("patch_embed.conv_down.3", 32, 16, 3, 3, bias=False)
    add_batch_norm("patch_embed.conv_down.4", 32)
    for i, (depth, c) in enumerate(zip((1, 1, 2, 1), (32, 64, 128, 256), strict=True)):
        for j in range(depth):
            block = f"levels.{i}.blocks.{j}"
            if i < 2:
                for k in (1, 2):
                    add(f"{block}.conv{k}", c, c, 3, 3)
                    add_batch_norm(f"{block}.norm{k}", c)
                continue
            tokens, heads = (196, 16) if i == 2 else (49, 32)
            add_position_mlp(f"{block}.pos_embed", c)
            add_position_mlp(f"{block}.attn.pos_emb_funct", heads)
            for k in (1, 2):
                add(f"{block}.norm{k}", c)
                keys.append((f"{block}.gamma{k + 2}", (c,), "param"))
            add(f"{block}.attn.qkv", 3 * c, c)
            add(f"{block}.attn.proj", c, c)
            add(f"{block}.mlp.fc1", 4 * c, c)
            add(f"{block}.mlp.fc2", c, 4 * c)
            for name, *shape in (
                ("pos_embed.relative_bias", 1, tokens, c),
                ("attn.pos_emb_funct.relative_bias", 1, heads, tokens, tokens),
                ("attn.pos_emb_funct.relative_coords_table", 1, 5, 5, 2),
                ("attn.pos_emb_funct.relative_position_index", tokens, tokens),
            ):  # fmt: skip
                keys.append((f"{block}.{name}", shape, "counter"))
        if i < 3:
            add(f"levels.{i}.downsample.norm", c)
            add(f"levels.{i}.downsample.reduction.0", 2 * c, c, 3, 3, bias=False)
    return keys


def dino_keys():
    """(name, shape, kind) of what is beside the backbone, but for the second predictors."""
    keys = []

    def add(name, *shape):
        keys.append((f"{name}.weight", shape, "param"))
        keys.append((f"{name}.bias", shape[:1], "param"))

    def add_mlp(name, *widths):
        for i, (inputs, outputs) in enumerate(zip(widths, widths[1:], strict=False)):
            add(f"{name}.layers.{i}", outputs, inputs)

    for level, channels in enumerate((64, 128, 256, 256)):
        add(f"input_proj.{level}.0", 256, channels, *((3, 3) if level == 3 else (1, 1)))
        add(f"input_proj.{level}.1", 256)
    for part, attention, num_norms in (("encoder", "self_attn", 2), ("decoder", "cross_attn", 3)):
        for i in range(NUM_LAYERS):
            layer = f"transformer.{part}.layers.{i}"
            add(f"{layer}.{attention}.sampling_offsets", 256, 256)
            add(f"{layer}.{attention}.attention_weights", 128, 256)
            add(f"{layer}.{attention}.value_proj", 256, 256)
            add(f"{layer}.{attention}.output_proj", 256, 256)
            if part == "decoder":
                keys.append((f"{layer}.self_attn.in_proj_weight", (768, 256), "param"))
                keys.append((f"{layer}.self_attn.in_proj_bias", (768,), "param"))
                add(f"{layer}.self_attn.out_proj", 256, 256)
            add(f"{layer}.linear1", 2048, 256)
            add(f"{layer}.linear2", 256, 2048)
            for k in range(num_norms):
                add(f"{layer}.norm{k + 1}", 256)
    add("transformer.decoder.norm", 256)
    add_mlp("transformer.decoder.ref_point_head", 512, 256, 256)
    add("transformer.enc_output", 256, 256)
    add("transformer.enc_output_norm", 256)
    add("transformer.enc_out_class_embed", NUM_CATEGORIES, 256)
    add_mlp("transformer.enc_out_bbox_embed", 256, 256, 256, 4)
    add("class_embed.0", NUM_CATEGORIES, 256)
    add_mlp("bbox_embed.0", 256, 256, 256, 4)
    for name, *shape in (("transformer.level_embed", 4, 256),
                         ("transformer.tgt_embed.weight", NUM_QUERIES, 256),
                         ("label_enc.weight", NUM_CATEGORIES + 1, 256)):  # fmt: skip
        keys.append((name, shape, "param"))
    return keys


class DinoFile:
    """A file as FasterViT's detector is published in, and what it was made of."""

    def __init__(self, folder, first_norm=1):
        self.backbone = make_state_dict(faster_vit_keys(), seed=4)
        self.norms = {}
        for i, channels in enumerate((64, 128, 256), start=1):
            for entry, value in randomised(nn.BatchNorm2d(channels).state_dict(), seed=i).items():
                self.norms[i, entry] = value
        self.state = make_state_dict(dino_keys(), seed=5)
        for key in [k for k in self.state if k.startswith(("class_embed.", "bbox_embed."))]:
            for i in range(NUM_LAYERS):  # one module under many names
                name = key.replace("embed.0.", f"embed.{i}.")
                self.state[name] = self.state[f"transformer.decoder.{name}"] = self.state[key]
        for key, value in self.backbone.items():
            self.state[f"backbone.0.{key}"] = value
        for (i, entry), value in self.norms.items():
            self.state[f"backbone.0.norm{i - 1 + first_norm}.{entry}"] = value
        self.path = folder / "DINO_4scale.pth"
        torch.save(
            dict(
                model=self.state, optimizer=dict(state={}, param_groups=[]), epoch=11,
                lr_scheduler=dict(step_size=11), args=argparse.Namespace(lr=1e-4, num_classes=91),
            ),
            self.path,
        )  # fmt: skip


def build_dino(*options):
    cfg = load_config(DINO, [*DINO_OPTIONS, *options])
    with DefaultScope.overwrite_default_scope("mmdet"):
        return MODELS.build(cfg.model).eval()


@pytest.fixture(scope="module")
def dino(tmp_path_factory):
    """The file, the model with the file's weights, and what the command said."""
    file = DinoFile(tmp_path_factory.mktemp("dino"))
    model = build_dino()
    conversion = convert(read_checkpoint(file.path), model)
    model.load_state_dict(conversion.state_dict, strict=True)
    return file, model, conversion


def test_every_entry_of_faster_vits_detector_is_used_or_named(dino, tmp_path, capsys):
    """But for what the backbone computes anew, which it passes over as in a classifier's file."""
    file, model, conversion = dino
    twice = ("transformer.decoder.class_embed.", "transformer.decoder.bbox_embed.")
    repeated = [key for key in file.state if key.startswith(twice)]
    assert set(conversion.unused) == set(repeated)
    out = tmp_path / "dino.pth"
    assert run(file.path, out, "--config", DINO, "--cfg-options", *DINO_OPTIONS) == 0
    said = capsys.readouterr().out
    assert "(official names)" in said
    assert f"{len(repeated)} entries (transformer.decoder." in said
    assert "bbox_head.cls_branches.0.weight: 80 of 91 rows" in said
    written = read_checkpoint(out)["state_dict"]
    assert written.keys() == model.state_dict().keys()
    assert all(torch.equal(value, conversion.state_dict[key]) for key, value in written.items())


@pytest.mark.parametrize("first_norm", [0, 1])
def test_the_backbone_of_faster_vits_detector_gives_its_maps(dino, first_norm, tmp_path):
    """Whether its norms are counted from the first stage or the first map."""
    file, model, _ = dino
    if not first_norm:
        model = build_dino()
        file = DinoFile(tmp_path, first_norm)
        model.load_state_dict(convert(read_checkpoint(file.path), model).state_dict)
    source = tmp_path / "backbone.pth"
    torch.save({"state_dict": file.backbone}, source)
    native = timm.create_model(
        "faster_vit_4_21k_224", pretrained=True, pretrained_cfg_overlay=dict(file=str(source)),
        depths=(1, 1, 2, 1), dims=(32, 64, 128, 256), stem_dim=16, official_quirks=True,
        features_only=True, out_indices=(1, 2, 3),
    ).eval()  # fmt: skip
    image = torch.randn(1, 3, 72, 104, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for i, (ours, plain) in enumerate(
            zip(model.backbone(image), native(image), strict=True), 1
        ):
            norm = [
                file.norms[i, name] for name in ("running_mean", "running_var", "weight", "bias")
            ]
            assert torch.equal(ours, F.batch_norm(plain, *norm))


def test_the_predictors_and_labels_are_those_of_cocos_classes(dino):
    file, model, conversion = dino
    for name, number in CATEGORIES.items():
        i = CocoDataset.METAINFO["classes"].index(name)
        for ours, theirs in (
            ("bbox_head.cls_branches.1.weight", "class_embed.1.weight"),
            ("bbox_head.cls_branches.2.bias", "transformer.enc_out_class_embed.bias"),
            ("dn_query_generator.label_embedding.weight", "label_enc.weight"),
        ):
            assert torch.equal(conversion.state_dict[ours][i], file.state[theirs][number]), name
    assert model.bbox_head.cls_branches[0].out_features == 80


def linear(state, name, x):
    return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])


def normed(state, name, x):
    return F.layer_norm(x, (256,), state[f"{name}.weight"], state[f"{name}.bias"])


def test_the_layers_of_dinos_transformer_compute_what_the_repositorys_do(dino):
    """Order of norms, layers and frequencies, by the repository's own definition."""
    file, model, _ = dino
    state = {key: value.double() for key, value in file.state.items()}
    model = model.double()
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    shapes = torch.tensor([(6, 9), (3, 5), (2, 3), (1, 2)])
    starts = torch.tensor([0, 54, 69, 75])
    memory, query, boxes = draw(1, 77, 256), draw(1, NUM_QUERIES, 256), draw(1, NUM_QUERIES, 4)

    def attend(name, **inputs):
        attention = MultiScaleDeformableAttention(dropout=0.0, batch_first=True).double()
        own = f"transformer.{name}."
        attention.load_state_dict(
            {k.removeprefix(own): v for k, v in state.items() if k.startswith(own)}
        )
        return attention(spatial_shapes=shapes, level_start_index=starts, **inputs)

    def feed_forward(name, x, norm):
        hidden = linear(state, f"{name}.linear1", x).relu()
        return normed(state, f"{name}.{norm}", x + linear(state, f"{name}.linear2", hidden))

    with torch.no_grad():
        # Positions of queries: 128 sines and cosines of y, x, width and height.
        frequency = 10000 ** (torch.arange(64, dtype=torch.float64) / 64)
        angle = 2 * math.pi * boxes[..., [1, 0, 2, 3], None] / frequency
        encoding = torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(2)
        head = "transformer.decoder.ref_point_head.layers"
        position = linear(state, f"{head}.1", linear(state, f"{head}.0", encoding).relu())
        width = model.decoder.ref_point_head.layers[0].in_features // 4
        found = model.decoder.ref_point_head(coordinate_to_encoding(boxes, num_feats=width))
        # mmdet computes the frequencies in single precision.
        torch.testing.assert_close(found, position, rtol=0, atol=1e-4)

        # A layer of the decoder: among the queries, to the maps, feed-forward.
        name = "transformer.decoder.layers.1"
        attention = nn.MultiheadAttention(256, 8, batch_first=True).double()
        attention.load_state_dict(
            {k.removeprefix(f"{name}.self_attn."): v for k, v in state.items()
             if k.startswith(f"{name}.self_attn.")}
        )  # fmt: skip
        keys = query + position
        x = normed(state, f"{name}.norm2", query + attention(keys, keys, query)[0])
        places = boxes[:, :, None].expand(-1, -1, 4, -1)
        x = attend("decoder.layers.1.cross_attn", query=x, query_pos=position, value=memory,
                   reference_points=places)  # fmt: skip
        x = feed_forward(name, normed(state, f"{name}.norm1", x), "norm3")
        ours = model.decoder.layers[1](
            query, query_pos=position, value=memory, key_padding_mask=None, self_attn_mask=None,
            spatial_shapes=shapes, level_start_index=starts, reference_points=places,
        )  # fmt: skip
        torch.testing.assert_close(ours, x, rtol=1e-9, atol=1e-9)

        # A layer of the encoder.
        name = "transformer.encoder.layers.1"
        places, position = draw(1, 77, 4, 2), draw(1, 77, 256)
        x = attend("encoder.layers.1.self_attn", query=memory, query_pos=position, value=memory,
                   reference_points=places)  # fmt: skip
        x = feed_forward(name, normed(state, f"{name}.norm1", x), "norm2")
        ours = model.encoder.layers[1](
            query=memory, query_pos=position, key_padding_mask=None, spatial_shapes=shapes,
            level_start_index=starts, reference_points=places,
        )  # fmt: skip
        torch.testing.assert_close(ours, x, rtol=1e-9, atol=1e-9)

        # Boxes of a layer, and of the encoder, whose predictors are the last.
        for index, theirs in ((1, "bbox_embed.1"), (2, "transformer.enc_out_bbox_embed")):
            x = query
            for k in range(3):
                x = linear(state, f"{theirs}.layers.{k}", x)
                x = x.relu() if k < 2 else x
            torch.testing.assert_close(model.bbox_head.reg_branches[index](query), x)
        x = normed(
            state, "transformer.enc_output_norm", linear(state, "transformer.enc_output", query)
        )
        torch.testing.assert_close(model.memory_trans_norm(model.memory_trans_fc(query)), x)
        # The fourth map, from the third.
        maps = [draw(1, c, 4, 4) for c in (64, 128, 256)]
        projected = model.neck(maps)
        for level in range(4):
            parts = [
                state[f"input_proj.{level}.{k}.{e}"] for k in (0, 1) for e in ("weight", "bias")
            ]
            options = dict(stride=2, padding=1) if level == 3 else {}
            x = F.conv2d(maps[min(level, 2)], *parts[:2], **options)
            torch.testing.assert_close(projected[level], F.group_norm(x, 32, *parts[2:]))
    model.float()


def test_a_dino_file_is_refused_by_other_configs_and_if_its_predictors_differ(dino, cases):
    file, model, _ = dino
    with pytest.raises(
        ValueError, match="of a DINO, and the model is a CascadeRCNN: give a config"
    ):
        convert({"model": file.state}, cases("cascade").build())
    key = "transformer.decoder.bbox_embed.1.layers.2.bias"
    with pytest.raises(ValueError, match=f"{key} is not the same as bbox_embed.1.layers.2.bias"):
        convert({"model": {**file.state, key: file.state[key] + 1}}, model)
    for change, message in (
        (_without("norm3.weight", "tgt_embed.weight"), "missing: 4 entries"),
        (_with(transformer__extra=torch.zeros(1)), "left over: 1 entries (transformer.extra)"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            convert({"model": change(file.state)}, model)


def test_detectors_of_other_classes_than_cocos_convert(dino):
    file, _, _ = dino
    model = build_dino("model.bbox_head.num_classes=91")
    converted = convert({"model": file.state}, model)
    labels = converted.state_dict["dn_query_generator.label_embedding.weight"]
    assert torch.equal(labels, file.state["label_enc.weight"][:91])
    weight = converted.state_dict["bbox_head.cls_branches.0.weight"]
    assert torch.equal(weight, file.state["class_embed.0.weight"])
