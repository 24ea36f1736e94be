"""Bad input: every mistake is one line that says what, where and what to do, and costs nothing.

Tables of cases: what is called, what it raises or exits with, and parts of what it says.
"""

import errno
import itertools
import json
import os
import pickle
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from PIL import Image
from torch import nn

import densezoo
from densezoo.backbones.checkpoints import (
    convert_checkpoint,
    map_keys,
    read_checkpoint,
    unwrap_nesting,
)
from densezoo.backbones.mmlab import DenseBackbone
from densezoo.kernels import mmcv_ops
from densezoo.layers.conv import ConvNorm, PointwiseConv, fold_norm_into_next
from densezoo.layers.mlp import ConvMlp
from densezoo.tools import cli, demo, list_models
from densezoo.tools.bench_throughput import Setup, Subject, list_subjects, measure
from densezoo.tools.count_macs import count_macs
from densezoo.tools.demo_data import CLASSES, make_dataset
from densezoo.tools.engine import (
    ImageClassifier,
    TopKAccuracy,
    timm_dataset,
    timm_optimizer,
)
from densezoo.tools.engine.annotation_checks import check_annotations

CONFIG = "cas_vit_xs_8xb128_300e_in1k"
DETECTOR = "retinanet_cas_vit_xs_fpn_1x_coco"
SEGMENTER = "fpn_cas_vit_xs_40k_ade20k"
IMAGE = torch.zeros(1, 3, 32, 32)
SMALL = dict(depths=(1, 1, 1, 1), num_classes=3)


def create(**arguments):
    """Build the smallest model with these arguments."""
    return timm.create_model("cas_vit_xs", **{**SMALL, **arguments})


def features(**arguments):
    return timm.create_model(
        "cas_vit_xs", features_only=True, **{"depths": (1, 1, 1, 1), **arguments}
    )


def dense(**arguments):
    """Build a DenseBackbone with these arguments."""
    return DenseBackbone(
        **{"model_name": "cas_vit_xs", "model_kwargs": dict(depths=(1, 1, 1, 1)), **arguments}
    )


def classifier(**arguments):
    return ImageClassifier(**{"model_name": "test_vit", "num_classes": 3, **arguments})


def optimizer(**paramwise_cfg):
    """Build the optimizer of a small model with layer-wise learning rates."""
    settings = dict(
        type="OptimWrapper",
        constructor="LayerDecayOptimWrapperConstructor",
        optimizer=dict(type="AdamW", lr=1e-3),
        paramwise_cfg=paramwise_cfg,
    )
    return build_optim_wrapper(classifier(), settings)


# What is called, and what the ValueError says: the argument or place, then what is taken.
LIBRARY = {
    # timm.create_model
    "num_classes-str": (lambda: create(num_classes="10"), "num_classes is '10': a whole number"),
    "num_classes-float": (lambda: create(num_classes=2.5), "num_classes is 2.5: a whole number"),
    "num_classes-bool": (lambda: create(num_classes=True), "num_classes is True: a whole"),
    "num_classes-negative": (lambda: create(num_classes=-1), "num_classes is -1", "at least 0"),
    "in_chans-str": (lambda: create(in_chans="3"), "in_chans is '3': a whole number"),
    "in_chans-float": (lambda: create(in_chans=3.0), "in_chans is 3.0", "at least 1"),
    "in_chans-0": (lambda: create(in_chans=0), "in_chans is 0", "at least 1"),
    "drop_path_rate-str": (lambda: create(drop_path_rate="0.1"), "drop_path_rate is '0.1'"),
    "drop_path_rate-2": (lambda: create(drop_path_rate=2), "drop_path_rate is 2", "from 0 to 1"),
    "drop_path_rate-nan": (lambda: create(drop_path_rate=float("nan")), "is nan", "from 0 to 1"),
    "drop_rate-2": (lambda: create(drop_rate=2), "drop_rate is 2", "from 0 to 1"),
    "global_pool": (lambda: create(global_pool="mean"), "global_pool is 'mean'", "'avg'"),
    "depths-int": (lambda: create(depths=3), "depths is 3: four whole numbers"),
    "depths-three": (lambda: create(depths=(1, 1, 1)), "depths is (1, 1, 1): four"),
    "depths-float": (lambda: create(depths=(1, 1, 1, 1.5)), "1.5): four whole numbers"),
    "depths-str": (lambda: create(depths="1111"), "depths is '1111': four"),
    "dims-negative": (lambda: create(dims=(48, 56, 112, -1)), "-1): four whole", "at least 1"),
    "dims-1": (lambda: create(dims=(1, 56, 112, 220)), "dims[0] is 1", "at least 2"),
    "mlp_ratio-0": (lambda: create(mlp_ratio=0), "mlp_ratio is 0: a number of at least"),
    "mlp_ratio-str": (lambda: create(mlp_ratio="4"), "mlp_ratio is '4': a number"),
    "distillation": (lambda: create(distillation="no"), "distillation is 'no': True or False"),
    "device": (lambda: create(device="gpu"), "device is 'gpu'", "can't be used", "cpu, cuda"),
    "dtype-str": (lambda: create(dtype="float32"), "dtype is 'float32'", "torch.dtype"),
    "dtype-int": (lambda: create(dtype=torch.int32), "dtype is torch.int32: a floating-point"),
    "features_only-str": (lambda: create(features_only="no"), "features_only is 'no': True or"),
    "pretrained-path": (lambda: create(pretrained="a.pth"), "pretrained is 'a.pth'", "dict(file="),
    "pretrained-no-link": (lambda: create(pretrained=True), "no direct link", "Download one of"),
    "out_indices-str": (lambda: features(out_indices="01"), "out_indices is '01': whole numbers"),
    "out_indices-float": (lambda: features(out_indices=1.5), "out_indices is 1.5: whole numbers"),
    "out_indices-bool": (lambda: features(out_indices=True), "out_indices is True: whole numbers"),
    "out_indices-bools": (lambda: features(out_indices=(True, False)), "out_indices is True"),
    "out_indices-nested": (lambda: features(out_indices=[[0], [1]]), "out_indices is [0]: a whole"),
    "out_indices-none-in": (lambda: features(out_indices=(0, None)), "out_indices is None: a"),
    "out_indices-floats": (lambda: features(out_indices=(0, 1.0)), "out_indices is 1.0: a whole"),
    "out_indices-9": (lambda: features(out_indices=9), "out_indices is 9: stages 0 to 3"),
    "out_indices-empty": (lambda: features(out_indices=()), "out_indices is (): stages 0 to 3"),
    "out_indices-twice": (lambda: features(out_indices=(0, 0)), "(0, 0): each stage", "once"),
    "feature_cls": (lambda: features(feature_cls="x"), "feature_cls is 'x': one of"),
    # the model
    "reset-str": (lambda: create().reset_classifier("10"), "num_classes is '10': a whole number"),
    "reset-none": (lambda: create().reset_classifier(None), "num_classes is None: a whole"),
    "reset-pool": (lambda: create().reset_classifier(3, "mean"), "global_pool is 'mean'", "avg"),
    "reset-unpooled": (lambda: create().reset_classifier(3, ""), "needs a global_pool"),
    "prune-str": (lambda: create().prune_intermediate_layers("a"), "out_indices is 'a'"),
    "prune-9": (lambda: create().prune_intermediate_layers([9]), "is [9]: stages 0 to 3"),
    "checkpointing": (lambda: create().set_grad_checkpointing("no"), "enable is 'no': True or"),
    "distilled": (lambda: create().set_distilled_training("no"), "enable is 'no': True or"),
    "one-head": (
        lambda: create(distillation=False).set_distilled_training(),
        "needs two heads: distillation=True",
    ),
    "head-channels": (lambda: create().forward_head(IMAGE), "(1, 3, 32, 32)", "(B, 220, H, W)"),
    "head-list": (lambda: create().forward_head([1]), "got a list", "(B, 220, H, W)"),
    "intermediates-format": (
        lambda: create().forward_intermediates(IMAGE, output_fmt="NLC"),
        "output_fmt is 'NLC'",
        "NHWC",
    ),
    "intermediates-index": (
        lambda: create().forward_intermediates(IMAGE, indices=[4]),
        "out_indices is [4]: stages 0 to 3",
    ),
    "intermediates-flag": (
        lambda: create().forward_intermediates(IMAGE, norm="no"),
        "norm is 'no': True or False",
    ),
    # DenseBackbone
    "dense-name-int": (lambda: dense(model_name=3), "model_name is 3: the name of a model"),
    "dense-name-none": (lambda: dense(model_name=None), "model_name is None: the name"),
    "dense-name-near": (lambda: dense(model_name="cas_vit_xxs"), "'cas_vit_xxs'", "did you mean"),
    "dense-name-tag": (lambda: dense(model_name="cas_vit_xs.in1k"), "weights tag", "alone is"),
    "dense-indices-str": (lambda: dense(out_indices="0123"), "out_indices is '0123': whole"),
    "dense-indices-none": (lambda: dense(out_indices=None), "out_indices is None: whole"),
    "dense-indices-nested": (lambda: dense(out_indices=((0,), 1)), "out_indices is (0,): a whole"),
    "dense-indices-strs": (lambda: dense(out_indices=(0, "1")), "out_indices is '1': a whole"),
    "dense-indices-4": (lambda: dense(out_indices=(4,)), "out_indices is (4,)", "0 to 3"),
    "dense-indices-empty": (lambda: dense(out_indices=()), "out_indices is ()", "0 to 3"),
    "dense-frozen-bool": (lambda: dense(frozen_stages=True), "frozen_stages is True: a whole"),
    "dense-frozen-str": (lambda: dense(frozen_stages="1"), "frozen_stages is '1': a whole"),
    "dense-frozen-9": (lambda: dense(frozen_stages=9), "frozen_stages is 9", "to 4"),
    "dense-norm_eval": (lambda: dense(norm_eval="no"), "norm_eval is 'no': True or False"),
    "dense-with_cp": (lambda: dense(with_cp=1), "with_cp is 1: True or False"),
    "dense-out_norms": (lambda: dense(out_norms="bn"), "out_norms is 'bn'", "batch_norm"),
    "dense-drop-path": (lambda: dense(drop_path_rate=7), "drop_path_rate is 7", "from 0 to 1"),
    "dense-pretrained": (lambda: dense(pretrained=3), "pretrained is 3", "path or URL"),
    "dense-init-str": (lambda: dense(init_cfg="a.pth"), "init_cfg is 'a.pth'", "Pretrained"),
    "dense-init-typeless": (lambda: dense(init_cfg=dict(checkpoint="a")), "init_cfg is", "type"),
    "dense-init-fileless": (
        lambda: dense(init_cfg=dict(type="Pretrained")),
        "init_cfg.checkpoint is None: the path",
    ),
    "dense-kwargs-str": (lambda: dense(model_kwargs="a"), "model_kwargs is 'a': a dict"),
    "dense-kwargs-reserved": (
        lambda: dense(model_kwargs=dict(out_indices=(0,))),
        "model_kwargs has 'out_indices'",
        "move it",
    ),
    "dense-fuse": (lambda: DenseBackbone("test_vit").fuse(), "fuse() works on models of densezoo"),
    # engine
    "classifier-name": (lambda: classifier(model_name="resnet51"), "'resnet51'", "resnet50"),
    "classifier-classes-0": (lambda: classifier(num_classes=0), "num_classes is 0", "at least 1"),
    "classifier-classes-str": (lambda: classifier(num_classes="10"), "num_classes is '10'"),
    "classifier-pretrained": (lambda: classifier(pretrained="a.pth"), "pretrained is 'a.pth'"),
    "classifier-drop-path": (lambda: classifier(drop_path_rate=3), "drop_path_rate is 3"),
    "classifier-loss-str": (lambda: classifier(loss="CE"), "loss is 'CE': a dict"),
    "classifier-loss-type": (lambda: classifier(loss={}), "loss type=None", "CrossEntropyLoss"),
    "classifier-loss-argument": (
        lambda: classifier(loss=dict(type="CrossEntropyLoss", nope=1)),
        "loss of type CrossEntropyLoss",
        "'nope'",
    ),
    "classifier-mixup": (lambda: classifier(mixup=dict(nope=1)), "mixup", "'nope'"),
    "classifier-mixup-int": (lambda: classifier(mixup=3), "mixup is 3: a dict"),
    "classifier-erasing": (
        lambda: classifier(random_erasing=dict(nope=1)),
        "random_erasing has a wrong argument",
        "'nope'",
    ),
    "classifier-kwargs": (
        lambda: classifier(model_kwargs=dict(num_classes=5)),
        "model_kwargs has 'num_classes'",
    ),
    "classifier-init": (lambda: classifier(init_cfg="a.pth"), "init_cfg is 'a.pth'"),
    "classifier-list": (lambda: classifier()([1]), "the inputs are list", "(B, C, H, W)"),
    "classifier-labels": (lambda: classifier()(IMAGE, mode="loss"), "labels is None", "(B,)"),
    "classifier-mode": (lambda: classifier()(IMAGE, mode="x"), "mode='x'", "loss, predict"),
    "topk-int": (lambda: TopKAccuracy(topk=5), "topk is 5: a list of whole numbers"),
    "topk-0": (lambda: TopKAccuracy(topk=(0,)), "topk is 0", "at least 1"),
    "topk-empty": (lambda: TopKAccuracy(topk=()), "topk is (): a list"),
    "topk-nothing": (lambda: TopKAccuracy().compute_metrics([]), "no image was evaluated"),
    "decay-0": (lambda: optimizer(layer_decay=0), "layer_decay=0 is not a number in (0, 1]"),
    "decay-2": (lambda: optimizer(layer_decay=2), "layer_decay=2", "in (0, 1]"),
    "decay-str": (lambda: optimizer(layer_decay="a"), "layer_decay='a' is not a number"),
    "decay-misspelled": (
        lambda: optimizer(layer_decy=0.9),
        "layer_decy is not known",
        "did you mean layer_decay",
    ),
    "decay-scale": (lambda: optimizer(min_scale=-1), "min_scale is -1", "from 0 to 1"),
    "timm-optimizer": (lambda: timm_optimizer([], "nope", lr=1), "opt='nope'", "adamw"),
    # timm's data sets
    "data-root-none": (lambda: timm_dataset(None), "root of the data set is None: text"),
    "data-root-missing": (lambda: timm_dataset("none"), "root='none' does not exist"),
    "data-root-empty": (lambda: timm_dataset("."), "Found 0 images", "root='.'"),
    "data-name": (lambda: timm_dataset(".", name=3), "name of the data set is 3: text"),
    "data-split": (lambda: timm_dataset(".", split=3), "split of the data set is 3: text"),
    "data-input": (lambda: timm_dataset(".", input_size="a"), "input_size of the data set is 'a'"),
    "data-input-3": (lambda: timm_dataset(".", input_size=(3, 8, 8)), "(3, 8, 8)", "two"),
    "data-training": (lambda: timm_dataset(".", is_training="no"), "is_training", "True or False"),
    "data-transform": (lambda: timm_dataset(".", transform=3), "transform of the data set is 3"),
    "data-shards": (
        lambda: timm_dataset(".", name="wds/", split="a-{0..1}.tar"),
        "number of samples",
        "num_samples=NUMBER",
    ),
    # counting and timing
    "macs-name": (lambda: count_macs("cas_vit_xss"), "'cas_vit_xss'", "did you mean cas_vit_xs"),
    "macs-object": (lambda: count_macs(3), "model is 3: the name of a model, or a module"),
    "macs-empty": (lambda: count_macs(nn.ReLU(), (8, 8)), "ReLU()", "with parameters"),
    "macs-size-int": (lambda: count_macs("cas_vit_xs", 3), "size is 3: a height and a width"),
    "macs-size-bool": (lambda: count_macs("cas_vit_xs", (True, 3)), "size is True 3"),
    "macs-chans": (lambda: count_macs("cas_vit_xs", in_chans="3"), "in_chans is '3'"),
    "bench-none": (lambda: list_subjects(["resnet18"], fuse=True), "--fuse takes", "resnet18"),
    "bench-rounds": (
        lambda: measure([Subject("resnet50")], [(32, 32)], Setup(), rounds=3),
        "repeats is 3: at least 20",
    ),
    "bench-dtype": (lambda: Setup(dtype="int8").check(), "dtype is 'int8'", "float32"),
    "list-nothing": (lambda: list_models.select_models("zzz"), "no model", "'zzz'"),
    # checkpoints
    "unwrap-int": (lambda: unwrap_nesting(3), "holds a int, not weights by name"),
    "unwrap-empty": (lambda: unwrap_nesting({}), "no weights found"),
    "map-twice": (lambda: map_keys({"a": IMAGE, "b": IMAGE}, [(".", "c")]), "map to c"),
    "convert-empty": (lambda: convert_checkpoint({}, create(), {}, first_conv="a"), "no weights"),
    # layers
    "fold": (
        lambda: fold_norm_into_next(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3)),
        "kernel_size (3, 3)",
        "(1, 1)",
    ),
    "pointwise": (lambda: PointwiseConv("3", 4), "in_chans is '3': a whole number"),
    "conv-even": (lambda: ConvNorm(3, 4, 2), "kernel_size is 2", "odd"),
    "conv-groups": (lambda: ConvNorm(3, 4, 3, groups=2), "groups is 2", "divide in_chans 3"),
    "mlp": (lambda: ConvMlp(8, 0), "hidden_dim is 0: a whole number of at least 1"),
    # demo and its data
    "demo-data-images": (lambda: make_dataset("never", images=3), "images is 3", "at least 16"),
    "demo-data-size": (lambda: make_dataset("never", size=31), "size is 31", "32 to 1024"),
    "demo-data-seed": (lambda: make_dataset("never", seed=-1), "seed is -1", "0 or more"),
    "demo-seed": (lambda: demo.run_demo("never", seed=-1), "seed is -1", "0 or more"),
    "demo-name": (lambda: demo.run_demo("a b"), "--out a b", "letters"),
}


@pytest.mark.parametrize("case", LIBRARY)
def test_a_mistake_in_a_call_is_a_value_error_of_one_line(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call, *parts = LIBRARY[case]
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        call()
    line = str(caught.value)
    assert "\n" not in line
    for part in parts:
        assert part in line, line
    assert not list(tmp_path.iterdir())


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


def test_numpy_and_python_integers_are_whole_numbers():
    assert create(num_classes=np.int64(3)).num_classes == 3
    assert dense(frozen_stages=np.int32(1)).frozen_stages == 1


@pytest.mark.parametrize(
    "arguments, words",
    [
        (dict(nope=1), "'nope'"),
        (dict(img_size=224), "'img_size'"),
    ],
    ids=["unknown", "of-others"],
)
def test_an_unknown_argument_is_named(arguments, words):
    for build in (create, lambda **k: dense(model_kwargs=k), lambda **k: dense(**k)):
        with pytest.raises(TypeError, match=words):
            build(**arguments)


# -- The command --------------------------------------------------------------------------------


class _Malicious:
    """What makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkfifo, (str(self.path),)


def _write_checkpoints(folder):
    """Write checkpoints, good and bad ones, and return {name: path}."""
    torch.manual_seed(0)
    model = timm.create_model("cas_vit_xs", **{**SMALL, "num_classes": 10, "distillation": False})
    own = model.state_dict()
    paths = {}

    def save(name, content):
        paths[name] = folder / name
        torch.save(content, paths[name])

    save("good.pth", {"state_dict": {f"backbone.{key}": value for key, value in own.items()}})
    save("published.pth", {"model": own})
    save("other_family.pth", timm.create_model("test_convnext").state_dict())
    save("headless_detector.pth", {"state_dict": {"neck.conv.weight": torch.zeros(3, 3)}})
    save("library.pth", Config(dict(a=1)))
    save("tensor.pth", torch.zeros(3))
    save("nan.pth", {"model": {**own, "stem.conv1.conv.bias": torch.full((24,), torch.nan)}})
    save("malicious.pth", _Malicious(folder / "pwned"))
    save("numbers.pth", {"epoch": 3, "loss": 0.5})
    whole = paths["good.pth"].read_bytes()
    raw = {
        "truncated.pth": whole[: len(whole) // 2],
        "empty.pth": b"",
        "text.pth": b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 12\n",
        "page.pth": b"<!DOCTYPE html><html><body>Sign in</body></html>",
        "keras.h5": b"\x89HDF\r\n\x1a\n" + bytes(64),
        "keras.pth": b"\x89HDF\r\n\x1a\n" + bytes(64),
        "model.onnx": b"\x08\x07\x12\x07pytorch" + bytes(64),
        "list.pth": pickle.dumps([1, 2]),
        "index.json": json.dumps(
            {"metadata": {}, "weight_map": {"a": "model-00001-of-00002.safetensors"}}
        ).encode(),
        "broken.safetensors": b"\xff" * 64,
    }
    for name, content in raw.items():
        paths[name] = folder / name
        paths[name].write_bytes(content)
    safetensors.torch.save_file(own, folder / "tensors.safetensors")
    shutil.copy(folder / "tensors.safetensors", folder / "tensors.pth")
    shutil.copy(paths["good.pth"], folder / "torch.safetensors")
    with zipfile.ZipFile(folder / "archive.pth", "w") as archive:
        archive.writestr("readme.txt", "no weights")
    for name in ("tensors.safetensors", "tensors.pth", "torch.safetensors", "archive.pth"):
        paths[name] = folder / name
    return paths


CONFIGS = {
    "empty.py": "",
    "syntax.py": "model = dict(\n",
    "missing_base.py": '_base_ = "nope.py"\n',
    "circle.py": '_base_ = "circle_too.py"\n',
    "circle_too.py": '_base_ = "circle.py"\n',
    "exits.py": "raise SystemExit(3)\n",
    "divides.py": "a = 1 / 0\n",
    "broken.json": "{",
    "list.json": "[1]",
    "text.txt": "hello",
    "few.json": '{"model": {"type": "ImageClassifier"}}',
    "latin.py": b"\xff\xfe\x00",
    "imports.py": 'custom_imports = dict(imports=["no_such_package"])\n',
}


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    """A folder of files, good and bad, that the cases name."""
    root = tmp_path_factory.mktemp("stage")
    (root / "configs").mkdir()
    for name, text in CONFIGS.items():
        content = text if isinstance(text, bytes) else text.encode()
        (root / "configs" / name).write_bytes(content)
    (root / "checkpoints").mkdir()
    _write_checkpoints(root / "checkpoints")
    (root / "file").write_text("precious")
    (root / "folder").mkdir()
    (root / "folder" / "precious").write_text("precious")
    (root / "nothing").mkdir()
    make_dataset(root / "digits", images=16, size=64)
    (root / "images").mkdir()
    Image.new("RGB", (40, 30), "red").save(root / "images" / "good.png")
    return root


@pytest.fixture
def run(stage, tmp_path, monkeypatch, capsys):
    """Run a command line in an empty folder: (exit code, stderr without mmengine's own lines)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def run_(line, options=()):
        words = shlex.split(line.format(stage=stage, **_NAMES))
        if options:  # mmengine keeps the logs of runs apart by the experiment's name
            words += ["--cfg-options", *options, f"experiment_name=bad_input_{next(_runs)}"]
        capsys.readouterr()
        try:
            code = cli.main(words)
        except SystemExit as stopped:
            code = stopped.code
        return code, capsys.readouterr().err

    return run_


_runs = itertools.count()
_NAMES = dict(config=CONFIG, detector=DETECTOR, segmenter=SEGMENTER)


def _snapshot(folder):
    """{path: (size, time of change)} of what is in a folder."""
    return {
        path: (path.stat().st_size, path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# Command line, exit code, parts of the one line that it says.
COMMANDS = {
    "none": ("", 2, "COMMAND", "--help"),
    "unknown": ("trian x", 2, "no command 'trian'", "did you mean train"),
    "unknown-far": ("xyz", 2, "no command 'xyz'", "predict"),
    "option": ("list --filer x", 2, "--filer", "did you mean --filter"),
    "option-far": ("list --zzzzzz", 2, "--zzzzzz", "densezoo list --help"),
    "option-of-nested": ("data make d --imags 3", 2, "--imags", "did you mean --images"),
    "list-word": ("list x", 2, "unrecognized arguments: x"),
    "list-nothing": ("list --filter zzz", 1, "no model", "'zzz'", "densezoo list"),
    "macs-nothing": ("macs", 2, "required: model"),
    "macs-name": ("macs cas_vit_xxs", 1, "'cas_vit_xxs'", "did you mean cas_vit_"),
    "macs-tag": ("macs resnet50.nope", 1, "'resnet50.nope'", "alone is enough"),
    "macs-size-0": ("macs cas_vit_xs --size 0 3", 1, "size is 0 3", "at least 1 pixel"),
    "macs-size-word": ("macs cas_vit_xs --size a 3", 2, "--size", "invalid int value: 'a'"),
    "macs-size-one": ("macs cas_vit_xs --size 3", 2, "--size", "expected 2"),
    "macs-memory": (
        "macs cas_vit_xs --size 99999999 99999999",
        1,
        "not enough memory",
        "give a smaller --size",
    ),
    "bench-nothing": ("bench", 2, "required: MODEL"),
    "bench-name": ("bench nope", 1, "unknown model 'nope'", "densezoo list"),
    "bench-batch": ("bench cas_vit_xs --batch 0", 1, "batch is 0", "at least 1"),
    "bench-memory": ("bench cas_vit_xs --batch 99999999999", 1, "not enough memory", "--batch"),
    "bench-dtype": ("bench cas_vit_xs --dtype int8", 1, "dtype is 'int8'", "float32"),
    "bench-device": ("bench cas_vit_xs --device gpu", 1, "'gpu'", "cannot be used"),
    "bench-out-folder": ("bench cas_vit_xs --out {stage}/folder", 1, "folder", "another file"),
    "bench-out-file": ("bench cas_vit_xs --out {stage}/file", 1, "file", "another file"),
    "bench-out-nowhere": ("bench cas_vit_xs --out {stage}/no/x.csv", 1, "no/x.csv", "existing"),
    "bench-peer": ("bench cas_vit_xs --vs resnet18", 1, "timm:NAME", "'resnet18'"),
    "bench-repeats": ("bench cas_vit_xs --repeats 1", 1, "repeats is 1", "at least 20"),
    "bench-fuse": ("bench cas_vit_xs --train --fuse", 1, "--fuse is for inference"),
    "bench-threads": ("bench cas_vit_xs --threads 0", 1, "threads is 0", "at least 1"),
    "data-action": ("data mak", 2, "'mak'", "make"),
    "data-nowhere": ("data make", 2, "required: DIR"),
    "data-size": ("data make d --size 31", 1, "size is 31", "32 to 1024"),
    "data-images": ("data make d --images 0", 1, "images is 0", "at least 16"),
    "data-file": ("data make {stage}/file", 1, "file", "choose another folder"),
    "data-full": ("data make {stage}/folder", 1, "not empty", "choose another folder"),
    "data-under-file": ("data make {stage}/file/x", 1, "file'", "name another place"),
    "data-no-folder": ("data make /proc/none/x", 1, "/proc/none", "check the path"),
    "demo-seed": ("demo --seed -1", 1, "seed is -1", "0 or more"),
    "demo-file": ("demo --out {stage}/file", 1, "file", "choose a folder"),
    "demo-full": ("demo --out {stage}/folder", 1, "not empty", "another folder"),
    "demo-name": ("demo --out 'a b'", 1, "--out a b", "letters"),
    # configs
    "train-nothing": ("train", 2, "required: config"),
    "train-none": ("train retinanet_cas_vit_xs", 1, "'retinanet_cas_vit_xs'", "nearest: retinanet"),
    "train-blank": ("train ''", 1, "config ''", "nearest"),
    "train-folder": ("train {stage}/configs", 1, "configs'", "is a folder"),
    "train-empty": ("train {stage}/configs/empty.py", 1, "empty.py", "lacks model"),
    "train-few": ("train {stage}/configs/few.json", 1, "few.json", "lacks train_dataloader"),
    "train-syntax": ("train {stage}/configs/syntax.py", 1, "syntax.py", "SyntaxError", "line 1"),
    "train-base": ("train {stage}/configs/missing_base.py", 1, "nope.py", "check its _base_"),
    "train-circle": (
        "train {stage}/configs/circle.py",
        1,
        "inherits circle.py, which inherits it in turn",
    ),
    "train-exits": ("train {stage}/configs/exits.py", 1, "exits.py can't be read", "SystemExit"),
    "train-divides": ("train {stage}/configs/divides.py", 1, "divides.py", "ZeroDivisionError"),
    "train-broken": ("train {stage}/configs/broken.json", 1, "broken.json", "line 1 column"),
    "train-list": ("train {stage}/configs/list.json", 1, "list.json", "can't be read"),
    "train-text": ("train {stage}/configs/text.txt", 1, "text.txt", "another kind", ".py"),
    "train-latin": ("train {stage}/configs/latin.py", 1, "latin.py", "UnicodeDecodeError"),
    "train-imports": ("train {stage}/configs/imports.py", 1, "imports.py", "no_such_package"),
    "train-launcher": ("train {config} --launcher x", 2, "'x'", "pytorch"),
    "train-alone": ("train {config} --launcher pytorch", 1, "no launcher", "torchrun"),
    "train-seed": ("train {config} --seed a", 2, "--seed", "'a'"),
    "train-no-data": ("train {config}", 1, "data/imagenet", "train_dataloader.dataset.root=PATH"),
    "train-no-coco": ("train {detector}", 1, "data/coco", "train_dataloader.dataset.data_root="),
    "test-nothing": ("test {config}", 2, "required: checkpoint"),
    "test-none": ("test {config} none.pth", 1, "none.pth", "does not exist"),
    "predict-nothing": ("predict {config} x.pth", 2, "required: IMAGE"),
    "predict-threshold": ("predict {config} x.pth y.jpg --score-thr nan", 1, "nan", "0 to 1"),
    "predict-no-image": ("predict {config} x.pth y.jpg", 1, "y.jpg", "does not exist"),
    "predict-device": (
        "predict {config} x.pth {stage}/images/good.png --device gpu",
        1,
        "--device gpu",
        "can't be used",
    ),
    "predict-out": (
        "predict {config} x.pth {stage}/images/good.png --out {stage}/file",
        1,
        "file",
        "folder",
    ),
    "export-nothing": ("export cas_vit_xs", 2, "required: "),
    "export-name": ("export cas_vit_xxs m.onnx", 1, "'cas_vit_xxs'", "did you mean cas_vit_"),
    "export-suffix": ("export cas_vit_xs m.xyz", 1, "m.xyz", ".onnx"),
    "export-exists": ("export cas_vit_xs {stage}/folder/precious", 1, "precious"),
    "export-nowhere": ("export cas_vit_xs {stage}/no/m.onnx", 1, "m.onnx"),
    "export-size": ("export cas_vit_xs m.onnx --size 0 3", 1, "0 3"),
}


@pytest.mark.parametrize("case", COMMANDS)
def test_a_mistake_in_a_command_is_one_line_and_changes_nothing(case, run, stage, tmp_path):
    line, expected, *parts = COMMANDS[case]
    before = _snapshot(stage)
    code, said = run(line)
    assert code == expected, said
    lines = [line for line in said.splitlines() if line.strip() and "%|" not in line]
    assert len(lines) == 1, said
    assert lines[0].startswith("densezoo"), said
    assert "error: " in lines[0]
    for part in parts:
        assert part in lines[0], lines[0]
    assert not list(tmp_path.iterdir()), "a command that can't start left files"
    assert _snapshot(stage) == before


def _classifier_options(stage):
    """The options that make the ImageNet config a run of seconds on the digits."""
    loaders = ("train_dataloader", "val_dataloader", "test_dataloader")
    return [
        "model.model_kwargs.depths=(1,1,1,1)",
        "model.num_classes=10",
        *(f"{loader}.dataset.root={stage / 'digits' / 'classes'}" for loader in loaders),
        *(f"{loader}.dataset.input_size=32" for loader in loaders),
        *(f"{loader}.num_workers=0" for loader in loaders),
        *(f"{loader}.persistent_workers=False" for loader in loaders),
        "train_dataloader.batch_size=4",
        "optim_wrapper.type=OptimWrapper",
        "param_scheduler=None",
    ]


# Options beside those of a good run, and parts of the line that `train` says.
OPTIONS = {
    "no-equals": ("model", "KEY=VALUE", "'model'"),
    "no-key": ("=3", "KEY=VALUE"),
    "empty-part": ("model..x=1", "KEY=VALUE", "model..x"),
    "brackets": ("model.num_classes=[1,", "model.num_classes=[1,", "brackets"),
    "top-level-key": ("modl.a=1", "no 'modl'", "did you mean model"),
    "index": ("custom_hooks.9.interval=3", "custom_hooks.9.interval=3", "Index 9 exceeds"),
    "no-index": ("custom_hooks.x.interval=3", "custom_hooks.x", "integers"),
    "nested-key": ("model.backbone.modl_name=1", "'backbone'"),
    "model-key": ("model.num_clases=3", "'num_clases'"),
    "model-int": ("model=3", "model is 3: a dict"),
    "model-none": ("model=None", "lacks model"),
    "model-type": ("model.type=ImageClasifier", "ImageClasifier"),
    "model-name": ("model.model_name=cas_vit_xss", "did you mean cas_vit_xs"),
    "model-classes": ("model.num_classes=abc", "num_classes is 'abc': a whole number"),
    "model-other-classes": ("model.num_classes=4", "10 classes", "model.num_classes=10"),
    "model-drop-path": ("model.drop_path_rate=3", "drop_path_rate is 3", "from 0 to 1"),
    "optimizer-key": ("optim_wrapper.optimizer.typ=SGD", "'typ'"),
    "optimizer-type": ("optim_wrapper.optimizer.type=Adamm", "'Adamm'", "did you mean Adam"),
    "optimizer-lr": ("optim_wrapper.optimizer.lr=fast", "optimizer.lr is 'fast': a number"),
    "optimizer-lr-negative": ("optim_wrapper.optimizer.lr=-1", "optimizer.lr is -1", "at least 0"),
    "batch-word": ("train_dataloader.batch_size=abc", "batch_size is 'abc': a whole number"),
    "batch-0": ("train_dataloader.batch_size=0", "train_dataloader.batch_size is 0", "at least 1"),
    "batch-float": ("val_dataloader.batch_size=2.5", "val_dataloader.batch_size is 2.5"),
    "batch-large": (
        "train_dataloader.batch_size=4000",
        "TrainLoop has no batch",
        "lower batch_size",
    ),
    "workers": ("train_dataloader.num_workers=-1", "num_workers is -1", "at least 0"),
    "loader-key": ("train_dataloader.batch_siz=3", "'batch_siz'"),
    "loader-int": ("train_dataloader=3", "train_dataloader is 3: a dict"),
    "loader-none": ("train_dataloader=None", "lacks train_dataloader"),
    "epochs-0": ("train_cfg.max_epochs=0", "max_epochs is 0", "at least 1"),
    "epochs-negative": ("train_cfg.max_epochs=-1", "max_epochs is -1", "at least 1"),
    "epochs-word": ("train_cfg.max_epochs=ten", "max_epochs is 'ten': a whole number"),
    "interval-0": ("train_cfg.val_interval=0", "val_interval is 0", "at least 1"),
    "accumulation": ("optim_wrapper.accumulative_counts=0", "accumulative_counts is 0"),
    "train-cfg": ("train_cfg=3", "train_cfg is 3: a dict"),
    "train-cfg-key": ("train_cfg.max_epoch=3", "'max_epoch'"),
    "hook-key": ("default_hooks.checkpoint.intervall=3", "'intervall'"),
    "hook-type": ("default_hooks.logger.type=LogerHook", "LogerHook"),
    "data-root": ("train_dataloader.dataset.root=none", "'none' does not exist", "root=PATH"),
    "data-root-int": ("train_dataloader.dataset.root=3", "root is 3: a path"),
    "data-key": ("train_dataloader.dataset.rot=x", "'rot'"),
    "data-size": ("val_dataloader.dataset.input_size=0", "input_size of the data set is 0"),
    "data-transform": ("val_dataloader.dataset.transform.interpolation=x", "KeyError: 'x'"),
    "metric-topk": ("val_evaluator.topk=5", "topk is 5: a list"),
    "seed": ("randomness.seed=-1", "seed is -1", "at least 0"),
    "load-from": ("load_from=none.pth", "'none.pth' does not exist"),
    "init": ("model.init_cfg.checkpoint=none.pth", "none.pth"),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_a_mistake_in_a_config_is_one_line_before_any_work(case, run, stage, tmp_path):
    option, *parts = OPTIONS[case]
    before = _snapshot(stage)
    options = [*_classifier_options(stage), "model.init_cfg.type=Pretrained", option]
    if case != "init":
        options.remove("model.init_cfg.type=Pretrained")
    code, said = run(f"train {CONFIG} --work-dir work", options)
    line = said.strip().splitlines()[-1]
    assert code == 1, said
    assert "Traceback" not in said
    assert line.startswith("densezoo train: error: ")
    for part in parts:
        assert part in line, line
    assert not list(tmp_path.rglob("*.pth"))
    assert _snapshot(stage) == before


# Checkpoints, and parts of the line that `test` and `predict` say of them.
CHECKPOINTS = {
    "truncated.pth": ("truncated.pth", "can be read safely", "truncated"),
    "empty.pth": ("empty.pth", "it is empty", "again"),
    "text.pth": ("text.pth", "Git LFS", "git lfs pull"),
    "page.pth": ("page.pth", "a web page", "download the file itself"),
    "keras.h5": ("keras.h5", "HDF5"),
    "keras.pth": ("keras.pth", "HDF5"),
    "model.onnx": ("model.onnx", "of another format"),
    "list.pth": ("list.pth", "can be read safely"),
    "index.json": ("index.json", "JSON", "index of several files"),
    "library.pth": ("library.pth", "it asks for mmengine.config.config.Config"),
    "nan.pth": ("hold NaN, such as", "conv1.conv.bias", "before its training failed"),
    "malicious.pth": ("malicious.pth", "it asks for posix.mkfifo"),
    "archive.pth": ("archive.pth", "of another format"),
    "broken.safetensors": ("broken.safetensors", "can be read safely"),
    "torch.safetensors": ("torch.safetensors", "give it the suffix .pth"),
    "tensors.pth": ("tensors.pth", "give it the suffix .safetensors"),
    "tensor.pth": ("tensor.pth", "Tensor, not a checkpoint"),
    "numbers.pth": ("no weights found", "'epoch'"),
    "other_family.pth": ("other_family.pth", "another model"),
    "headless_detector.pth": ("headless_detector.pth",),
    "": ("checkpoints", "folder"),
    "none.pth": ("none.pth", "does not exist"),
}


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_a_bad_checkpoint_is_one_line_however_it_is_loaded(case, run, stage, tmp_path):
    path = stage / "checkpoints" / case
    before = _snapshot(stage)
    options = _classifier_options(stage)
    for line in (
        f"test {CONFIG} {path} --out figures.json",
        f"predict {CONFIG} {path} {{stage}}/images/good.png --out drawn",
        f"train {CONFIG} --resume {path}",
    ):
        code, said = run(line, options)
        assert code == 1, said
        assert "Traceback" not in said
        said = said.strip().splitlines()[-1]
        parts = ("optimizer",) if line.startswith("train") and "optimizer" in said else ()
        for part in parts or CHECKPOINTS[case]:
            assert part in said, said
    assert not list(tmp_path.rglob("*.png")) and not list(tmp_path.rglob("*.json"))
    for load in (
        lambda: create(pretrained=True, pretrained_cfg_overlay=dict(file=str(path))),
        lambda: dense(init_cfg=dict(type="Pretrained", checkpoint=str(path))).init_weights(),
        lambda: dense(pretrained=path),
        lambda: classifier(init_cfg=dict(type="Pretrained", checkpoint=str(path))).init_weights(),
    ):
        with pytest.raises((ValueError, OSError)) as caught:
            load()
        assert "\n" not in str(caught.value)
    assert _snapshot(stage) == before
    assert not (path.parent / "pwned").exists()


@pytest.mark.parametrize("name", ["good.pth", "published.pth", "tensors.safetensors"])
def test_the_good_checkpoints_of_these_tests_are_read(name, stage):
    path = stage / "checkpoints" / name
    expected = read_checkpoint(stage / "checkpoints" / "published.pth")["model"][
        "stem.conv1.conv.bias"
    ]
    for model in (
        create(pretrained=True, pretrained_cfg_overlay=dict(file=str(path))),
        dense(pretrained=path).model,
    ):
        loaded = {key: value for key, value in model.state_dict().items()}
        (own,) = (value for key, value in loaded.items() if key.endswith("stem.conv1.conv.bias"))
        assert torch.equal(own, expected)


# Words beside those of a good run on the digits, and parts of the line that the command says.
RUNS = {
    "work-dir-file": (f"train {CONFIG} --work-dir {{stage}}/file", "file'", "--work-dir"),
    "work-dir-under": (f"train {CONFIG} --work-dir {{stage}}/file/x", "file/x'", "--work-dir"),
    "work-dir-proc": (f"train {CONFIG} --work-dir /proc/none", "/proc/none'", "--work-dir"),
    "work-dir-used": (f"train {CONFIG} --work-dir {{stage}}/checkpoints", "holds checkpoints of"),
    "resume-none": (f"train {CONFIG} --resume none.pth", "'none.pth' does not exist"),
    "resume-weights": (
        f"train {CONFIG} --resume {{stage}}/checkpoints/good.pth",
        "no state of an optimizer",
        "load_from=FILE",
    ),
    "test-out-file": (
        f"test {CONFIG} {{stage}}/checkpoints/good.pth --out {{stage}}/file",
        "file",
        "another file",
    ),
    "test-out-nowhere": (
        f"test {CONFIG} {{stage}}/checkpoints/good.pth --out {{stage}}/no/a.json",
        "no/a.json",
    ),
    "test-work-dir": (
        f"test {CONFIG} {{stage}}/checkpoints/good.pth --work-dir {{stage}}/file",
        "file'",
        "--work-dir",
    ),
    "test-other": (f"test {CONFIG} {{stage}}/checkpoints/other_family.pth", "another model"),
    "test-tta": (f"test {CONFIG} {{stage}}/checkpoints/good.pth --tta", "tta"),
    "train-scale": (f"train {CONFIG} --auto-scale-lr", "auto_scale_lr.base_batch_size"),
}


@pytest.mark.parametrize("case", RUNS)
def test_a_run_that_would_lose_something_does_not_start(case, run, stage, tmp_path):
    line, *parts = RUNS[case]
    before = _snapshot(stage)
    options = _classifier_options(stage)
    options += ["auto_scale_lr.base_batch_size=None"] if case == "train-scale" else []
    code, said = run(line, options)
    assert code == 1 and "Traceback" not in said, said
    last = said.strip().splitlines()[-1]
    assert last.startswith(f"densezoo {line.split()[0]}: error: ")
    for part in parts:
        assert part in last, last
    assert _snapshot(stage) == before
    assert not list(tmp_path.rglob("*.pth"))


def _odd_images(folder):
    """Write images of kinds that are rare but good."""
    rng = np.random.default_rng(0)
    rgb = Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8))
    deep = rng.integers(0, 65536, (30, 40), dtype=np.uint16)
    images = {
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
    for name, image in images.items():
        image.save(folder / name)
    return images


def test_rare_but_good_images_are_predicted(run, stage, tmp_path):
    (tmp_path / "in").mkdir()
    for number, (name, image) in enumerate(_odd_images(stage / "nothing").items()):
        image.save(tmp_path / "in" / f"{number}_{name}")
    shutil.rmtree(stage / "nothing")
    (stage / "nothing").mkdir()
    good = stage / "checkpoints" / "good.pth"
    code, said = run(f"predict {CONFIG} {good} in --out drawn", _classifier_options(stage))
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
    code, said = run(f"predict {CONFIG} {good} in --out drawn", _classifier_options(stage))
    assert code == 1 and "Traceback" not in said, said
    last = said.strip().splitlines()[-1]
    assert path.name in last and part in last, last
    assert [picture.name for picture in (tmp_path / "drawn").glob("*.png")] == ["good.png"]


# -- Annotations --------------------------------------------------------------------------------


def _coco(root):
    """A good annotation file of four images of 40 x 30 pixels, two categories and four objects."""
    (root / "images").mkdir(parents=True)
    for i in range(4):
        Image.new("RGB", (40, 30)).save(root / "images" / f"{i}.png")
    square = [10, 5, 20, 5, 20, 15, 10, 15]
    return {
        "images": [dict(id=i, file_name=f"{i}.png", width=40, height=30) for i in range(4)],
        "categories": [dict(id=1, name="cat"), dict(id=2, name="dog")],
        "annotations": [
            dict(
                id=10 + i,
                image_id=i,
                category_id=1 + i % 2,
                bbox=[10, 5, 10, 10],
                area=100,
                iscrowd=0,
                segmentation=[square],
            )
            for i in range(4)
        ],
    }


def _check_coco(root, content, *, classes=("cat", "dog"), with_mask=True, loader="train", **extra):
    text = content if isinstance(content, (str, bytes)) else json.dumps(content)
    (root / "a.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    load = dict(type="LoadAnnotations", with_bbox=True, with_mask=with_mask)
    dataset = dict(
        type="CocoDataset",
        data_root=str(root),
        ann_file="a.json",
        data_prefix=dict(img="images"),
        metainfo=dict(classes=classes),
        pipeline=[load],
    )
    cfg = {f"{loader}_dataloader": dict(dataset=dataset), "default_scope": "mmdet", **extra}
    return check_annotations(Config(cfg), "train" if loader != "test" else "test")


def _set(key, position, **values):
    """Return a change of an entry of an annotation file."""

    def change(content, root):
        content[key][position].update(values)

    return change


def _drop(key, position, name):
    def change(content, root):
        del content[key][position][name]

    return change


def _replace(key, value):
    def change(content, root):
        content[key] = value

    return change


def _resave(size, **options):
    def change(content, root):
        Image.new("RGB", size).save(root / "images" / "2.png", **options)

    return change


def _turned():
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


RLE = dict(size=[40, 30], counts=[0, 1200])

# A change of the good file, and what stops the run.
COCO_ERRORS = {
    "no-images": (_replace("images", []), "has no images"),
    "no-annotations": (_replace("annotations", []), "has no annotations", "give one"),
    "no-categories": (_replace("categories", []), "has no categories"),
    "images-missing": (lambda content, root: content.pop("images"), "no list of images"),
    "images-dict": (_replace("images", {}), "no list of images", "COCO file"),
    "images-ints": (_replace("images", [1]), "no list of images"),
    "image-id-missing": (_drop("images", 1, "id"), "1 images have no id", "number 1"),
    "image-id-twice": (_set("images", 1, id=0), "1 images have the id of another one", "id 0"),
    "image-width": (_set("images", 1, width=0), "no width and height", "id 1 with 0 x 30"),
    "image-height-missing": (_drop("images", 1, "height"), "id 1 with 40 x None"),
    "image-name-missing": (_drop("images", 3, "file_name"), "images have no file_name", "id 3"),
    "image-size": (_set("images", 2, width=50), "50 x 30 pixels", "2.png", "has 40 x 30"),
    "image-turned": (_resave((40, 30), exif=_turned()), "40 x 30", "has 30 x 40", "EXIF"),
    "category-id-twice": (_set("categories", 1, id=1), "categories have the id of another"),
    "category-name-twice": (_set("categories", 1, name="cat"), "name another one has", "'cat'"),
    "class-missing": (_set("categories", 1, name="wolf"), "lacks 1 of 2 classes", "'dog'", "wolf"),
    "class-order": (
        lambda content, root: content["categories"].reverse(),
        "another order than metainfo.classes",
        "number 0 is 'dog' there and 'cat' here",
    ),
    "id-twice": (_set("annotations", 1, id=10), "1 annotations have the id of another", "id 10"),
    "unknown-image": (_set("annotations", 1, image_id=9), "1 annotations are of images", "id 11"),
    "image-id-str": (_set("annotations", 1, image_id="1"), "image_id '1'", "as they are in images"),
    "unknown-category": (
        _set("annotations", 1, category_id=9),
        "1 annotations are of categories",
        "id 11 of image_id 1, category_id 9",
        "add the categories",
    ),
    "no-box": (_drop("annotations", 2, "bbox"), "no box of four finite numbers", "id 12"),
    "no-area": (_drop("annotations", 2, "area"), "or no area", "id 12"),
    "box-three": (_set("annotations", 2, bbox=[1, 2, 3]), "no box of four", "[1, 2, 3]"),
    "box-words": (_set("annotations", 2, bbox=list("abcd")), "no box of four", "id 12"),
    "box-nan": (_set("annotations", 2, bbox=[1, 2, float("nan"), 4]), "no box of four", "nan"),
    "box-negative": (_set("annotations", 2, bbox=[20, 5, -10, 10]), "negative width", "id 12"),
    "box-outside": (
        _set("annotations", 2, bbox=[50, 5, 10, 10]),
        "1 boxes lie outside their image",
        "id 12 with bbox [50, 5, 10, 10] of image_id 2, which has 40 x 30 pixels",
    ),
    "boxes-of-corners": (_set("annotations", 2, bbox=[30, 5, 38, 10]), "x, y, width, height"),
    "mask-size": (
        _set("annotations", 2, segmentation=RLE),
        "1 masks have another size than their image",
        "size [40, 30], where the image has [30, 40]",
    ),
}


@pytest.mark.parametrize("case", COCO_ERRORS)
def test_a_wrong_annotation_stops_the_run_with_its_count_and_place(case, tmp_path):
    content = _coco(tmp_path)
    change, *parts = COCO_ERRORS[case]
    change(content, tmp_path)
    with pytest.raises(ValueError) as caught:
        _check_coco(tmp_path, content)
    line = str(caught.value)
    assert "\n" not in line
    for part in (f"annotation file {tmp_path}/a.json", *parts):
        assert part in line, line


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", b"\xff\xfe", "[" * 100000], ids=range(6))
def test_a_file_that_is_no_coco_file_is_named(text, tmp_path):
    _coco(tmp_path)
    with pytest.raises(ValueError, match="annotation file .*a.json .*(COCO|JSON)"):
        _check_coco(tmp_path, text)


def test_good_annotations_say_nothing(tmp_path):
    content = _coco(tmp_path)
    content["annotations"][0]["bbox"] = [-0.5, 0, 40.9, 30.5]  # rounded
    content["annotations"][1]["segmentation"] = dict(size=[30, 40], counts=[0, 1200])
    content["images"].append(dict(id=9, file_name="0.png", width=40, height=30))  # no objects
    assert _check_coco(tmp_path, content) == []
    assert _check_coco(tmp_path, content, loader="val") == []
    assert _check_coco(tmp_path, content, classes=("dog",)) == []  # cats are left out on purpose


def test_what_published_data_has_is_counted(tmp_path):
    content = _coco(tmp_path)
    good = content["annotations"][3]
    content["annotations"] += [{**good, "id": 20 + i} for i in range(20)]
    content["annotations"][0]["bbox"] = [10, 5, 0, 10]
    content["annotations"][1]["bbox"] = [10, 5, 33, 10]
    content["annotations"][2]["segmentation"] = [[1, 2, 3, 4]]
    (tmp_path / "images" / "1.png").unlink()
    notes = _check_coco(tmp_path, content)
    assert len(notes) == 4
    for note, part in zip(
        notes, ("id 10 with bbox [10, 5, 0, 10]", "id 11", "id 12", "1.png"), strict=True
    ):
        assert ": 1 " in note and part in note, note
    assert len(_check_coco(tmp_path, content, with_mask=False)) == 3
    with pytest.raises(FileNotFoundError, match="1 of 4 of its images .*1.png; check data_prefix"):
        _check_coco(tmp_path, content, loader="val")
    shutil.rmtree(tmp_path / "images")
    with pytest.raises(FileNotFoundError, match="4 of 4 of its images"):
        _check_coco(tmp_path, content)


def test_a_damaged_image_is_left_to_the_run_which_counts_them(tmp_path):
    content = _coco(tmp_path)
    (tmp_path / "images" / "1.png").write_bytes(b"no image")
    assert _check_coco(tmp_path, content) == []


def test_results_can_be_written_without_annotations(tmp_path):
    content = _coco(tmp_path)
    del content["annotations"]
    metric = dict(type="CocoMetric", format_only=True)
    assert _check_coco(tmp_path, content, loader="test", test_evaluator=metric) == []
    with pytest.raises(ValueError, match="no list of annotations"):
        _check_coco(tmp_path, content, loader="test", test_evaluator=dict(type="CocoMetric"))


def _label_maps(root):
    """Four images of 40 x 30 pixels and their label maps of two classes."""
    for name in ("images", "masks"):
        (root / name).mkdir(parents=True)
    for i in range(4):
        Image.new("RGB", (40, 30)).save(root / "images" / f"{i}.jpg")
        labels = np.full((30, 40), i % 2, np.uint8)
        labels[:3] = 255
        Image.fromarray(labels).save(root / "masks" / f"{i}.png")


def _check_label_maps(root, **settings):
    dataset = dict(
        type="BaseSegDataset",
        data_root=str(root),
        data_prefix=dict(img_path="images", seg_map_path="masks"),
        metainfo=dict(classes=("cat", "dog")),
        pipeline=[],
        **settings,
    )
    cfg = Config(dict(default_scope="mmseg", train_dataloader=dict(dataset=dataset)))
    return check_annotations(cfg, "train")


def _save_labels(value, size=(40, 30), mode="L"):
    return lambda root: Image.new(mode, size, value).save(root / "masks" / "2.png")


LABEL_MAP_ERRORS = {
    "missing": (lambda root: (root / "masks/2.png").unlink(), "1 of 4 images", "2.jpg needs"),
    "all-missing": (
        lambda root: shutil.rmtree(root / "masks"),
        "4 of 4 images",
        "seg_map_suffix",
    ),
    "size": (_save_labels(0, (30, 40)), "2.png has 30 x 40 pixels", "2.jpg has 40 x 30"),
    "label": (_save_labels(7), "2.png has the label 7", "up to 1", "metainfo.classes"),
    "colours": (_save_labels((0, 0, 0), mode="RGB"), "2.png is a picture of mode RGB", "L or P"),
    "damaged": (
        lambda root: (root / "masks/2.png").write_bytes(b"no image"),
        "2.png can't be read",
        "replace it",
    ),
}


@pytest.mark.parametrize("case", LABEL_MAP_ERRORS)
def test_a_wrong_label_map_stops_the_run(case, tmp_path):
    _label_maps(tmp_path)
    change, *parts = LABEL_MAP_ERRORS[case]
    change(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        _check_label_maps(tmp_path)
    line = str(caught.value)
    assert "\n" not in line
    for part in parts:
        assert part in line, line


def test_good_label_maps_say_nothing(tmp_path):
    _label_maps(tmp_path)
    assert _check_label_maps(tmp_path) == []
    Image.new("L", (40, 30), 2).save(tmp_path / "masks" / "2.png")
    assert _check_label_maps(tmp_path, reduce_zero_label=True) == []
    with pytest.raises(ValueError, match="label 2"):
        _check_label_maps(tmp_path)


def _detector_options(stage, annotations):
    """The options that point the detector's config at the digits and an annotation file."""
    options = []
    classes = ",".join(f'"{name}"' for name in CLASSES)
    for loader in ("train", "val"):
        dataset = f"{loader}_dataloader.dataset"
        options += [
            f"{dataset}.data_root={stage / 'digits'}",
            f"{dataset}.ann_file={annotations}",
            f"{dataset}.data_prefix.img=images/train",
            f"{dataset}.metainfo.classes=({classes})",
        ]
    options += [f"val_evaluator.ann_file={annotations}", "model.backbone.init_cfg=None"]
    return options


def test_train_and_test_check_annotations_before_they_start(run, stage, tmp_path):
    good = stage / "digits" / "annotations" / "instances_train.json"
    content = json.loads(good.read_text())
    content["annotations"][5]["category_id"] = 99
    bad = tmp_path / "bad.json"
    bad.write_text(json.dumps(content))
    options = _detector_options(stage, bad)
    for line, own in (
        (f"train {DETECTOR} --work-dir work", options),
        (
            f"test {DETECTOR} {{stage}}/checkpoints/good.pth --work-dir work",
            [option.replace("val_", "test_") for option in options if "train_data" not in option],
        ),
    ):
        code, said = run(line, own)
        assert code == 1, said
        last = said.strip().splitlines()[-1]
        assert "1 annotations are of categories" in last and "Traceback" not in said
        assert not Path("work").exists()


# -- Interruptions, full disks, closed pipes: in processes of their own ---------------------------


def _start(words, folder, *, file_size=None):
    """Start the command in a process group of its own, whose files are limited to some bytes."""

    def limit():
        if file_size is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))

    return subprocess.Popen(
        [sys.executable, "-m", "densezoo", *map(str, words)],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
        stdout=open(folder / "stdout", "w"),
        stderr=open(folder / "stderr", "w"),
        start_new_session=True,
        preexec_fn=limit,
    )


def _interrupt(process, is_time, seconds=120):
    """Press Ctrl-C, which the whole group gets, when `is_time()`; return the exit code."""
    end = time.monotonic() + seconds
    try:
        while not is_time():
            assert process.poll() is None, "it ended before it was interrupted"
            assert time.monotonic() < end, "the moment to interrupt it did not come"
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGINT)
        return process.wait(timeout=seconds)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _assert_interrupted(code, folder, command):
    said = (folder / "stderr").read_text()
    assert code == 130, said
    assert said.splitlines()[-1] == f"{command}: interrupted"
    assert "Traceback" not in said


def _has(folder, name, text):
    return lambda: text in (folder / name).read_text(errors="replace").replace(" ", "")


def test_ctrl_c_during_the_imports(tmp_path):
    process = _start(["list"], tmp_path)
    maps = Path(f"/proc/{process.pid}/maps")
    code = _interrupt(process, lambda: "libtorch_python" in maps.read_text())
    _assert_interrupted(code, tmp_path, "densezoo")


def test_ctrl_c_during_a_training(stage, tmp_path):
    options = [*_classifier_options(stage), "train_cfg.max_epochs=1000"]
    options += ["default_hooks.logger.interval=1", "train_dataloader.num_workers=1"]
    words = ["train", CONFIG, "--work-dir", "work", "--cfg-options", *options]
    process = _start(words, tmp_path)
    code = _interrupt(process, _has(tmp_path, "stdout", "Epoch(train)[3]"))
    _assert_interrupted(code, tmp_path, "densezoo train")
    left = sorted(path.name for path in (tmp_path / "work").glob("*.pth"))
    assert "epoch_2.pth" in left
    for name in left:
        assert read_checkpoint(tmp_path / "work" / name)["meta"]
    last = Path((tmp_path / "work" / "last_checkpoint").read_text().strip())
    assert last.name in left


def test_ctrl_c_during_predictions(stage, tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(2000):
        os.link(stage / "images" / "good.png", tmp_path / "images" / f"{i}.png")
    words = ["predict", CONFIG, stage / "checkpoints" / "good.pth", "images", "--out", "drawn"]
    process = _start([*words, "--cfg-options", *_classifier_options(stage)], tmp_path)
    code = _interrupt(process, lambda: len(list(tmp_path.glob("drawn/*.png"))) > 3)
    _assert_interrupted(code, tmp_path, "densezoo predict")
    for path in (tmp_path / "drawn").iterdir():
        if path.suffix == ".png":
            Image.open(path).load()
        else:
            assert path.suffix == ".json" and json.loads(path.read_text())


def test_ctrl_c_during_a_benchmark(tmp_path):
    words = ["bench", "cas_vit_xs", "--size", "32", "32", "--repeats", "100000", "--out", "a.csv"]
    process = _start(words, tmp_path)
    code = _interrupt(process, _has(tmp_path, "stderr", "bench:"))
    _assert_interrupted(code, tmp_path, "densezoo bench")
    assert not (tmp_path / "a.csv").exists()


def test_ctrl_c_while_data_is_made(tmp_path):
    (tmp_path / "place").mkdir()
    words = ["data", "make", "place/digits", "--images", "20000"]
    process = _start(words, tmp_path)
    code = _interrupt(process, lambda: list(tmp_path.glob("place/.digits.*/images/train/*.jpg")))
    _assert_interrupted(code, tmp_path, "densezoo data")
    assert not list((tmp_path / "place").iterdir())


def test_ctrl_c_during_the_demo(tmp_path):
    process = _start(["demo", "--out", "out"], tmp_path)
    code = _interrupt(process, lambda: (tmp_path / "out" / "logs" / "data.log").exists())
    _assert_interrupted(code, tmp_path, "densezoo demo")
    assert json.loads((tmp_path / "out" / demo.MARKER).read_text())["seconds"] == {}


def test_a_reader_that_goes_away_is_no_error(tmp_path):
    line = f"{sys.executable} -m densezoo list | head -1"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", line], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.stderr == ""
    assert done.stdout.count("\n") == 1
    # What a program ends with that such a signal killed, or success if all was read in time.
    assert done.returncode in (0, 128 + signal.SIGPIPE)


def test_a_full_disk_is_named_while_data_is_made(tmp_path):
    (tmp_path / "place").mkdir()
    process = _start(["data", "make", "place/digits", "--images", "16"], tmp_path, file_size=2048)
    assert process.wait(timeout=120) == 1
    line = (tmp_path / "stderr").read_text().splitlines()[-1]
    assert line.startswith("densezoo data: error: ") and "File too large" in line, line
    assert "ulimit -f" in line
    assert not list((tmp_path / "place").iterdir())


def test_a_full_disk_stops_predictions_without_half_a_picture(stage, tmp_path):
    words = ["predict", CONFIG, stage / "checkpoints" / "good.pth", stage / "images" / "good.png"]
    words += ["--out", "drawn", "--cfg-options", *_classifier_options(stage)]
    process = _start(words, tmp_path, file_size=2048)
    assert process.wait(timeout=120) == 1
    line = (tmp_path / "stderr").read_text().splitlines()[-1]
    assert line.startswith("densezoo predict: error: ") and "File too large" in line, line
    assert not list(tmp_path.glob("drawn/*"))


# -- How errors are told --------------------------------------------------------------------------


def _raising(monkeypatch, error):
    def raise_error(args):
        raise error

    monkeypatch.setattr(list_models, "run", raise_error)


SAID = {
    "no-space": (OSError(errno.ENOSPC, "No space left on device", "a.pth"), 1, "'a.pth': No space",
                 "free some space"),
    "read-only": (OSError(errno.EROFS, "Read-only file system", "/b"), 1, "'/b': Read-only",
                  "name a place"),
    "permission": (PermissionError(errno.EACCES, "Permission denied", "c"), 1, "'c'", "permission"),
    "memory": (MemoryError(), 1, "not enough memory", "other programs"),
    "gpu-memory": (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), 1,
                   "not enough memory (CUDA out of memory. Tried"),
    "worker-memory": (RuntimeError("Caught MemoryError in DataLoader worker process 0."), 1,
                      "not enough memory"),
    "lines": (ValueError("one\n  two\nthree"), 1, "error: one two three"),
    "wordless": (ValueError(), 1, "error: ValueError"),
    "interrupted": (KeyboardInterrupt(), 130, "densezoo list: interrupted"),
}  # fmt: skip


@pytest.mark.parametrize("case", SAID)
def test_errors_become_one_line_with_advice(case, monkeypatch, capsys):
    error, expected, *parts = SAID[case]
    _raising(monkeypatch, error)
    assert cli.main(["list"]) == expected
    (line,) = capsys.readouterr().err.splitlines()
    for part in parts:
        assert part in line, line


def test_memory_that_another_error_came_from_is_named(monkeypatch, capsys):
    error = RuntimeError("the run stopped: ...")
    error.__cause__ = MemoryError("cannot allocate 3 GiB")
    _raising(monkeypatch, error)
    assert cli.main(["list"]) == 1
    assert "not enough memory" in capsys.readouterr().err


def test_a_defect_keeps_its_traceback_and_says_what_to_do(monkeypatch, capsys):
    _raising(monkeypatch, AttributeError("'X' has no y"))
    assert cli.main(["list"]) == 70
    said = capsys.readouterr().err
    assert said.startswith("Traceback") and "raise_error" in said
    last = said.splitlines()[-1]
    assert last.startswith("densezoo list: AttributeError: 'X' has no y")
    assert "defect of densezoo" in last and "report it" in last


@pytest.mark.parametrize(
    "error", [ValueError("x"), AttributeError("x"), MemoryError("x")], ids=repr
)
def test_debug_shows_every_traceback(error, monkeypatch):
    _raising(monkeypatch, error)
    with pytest.raises(type(error)):
        cli.main(["list", "--debug"])


def test_an_operator_that_is_not_covered_says_how_to_get_it():
    import mmcv._ext

    if mmcv._ext.__spec__.origin != mmcv_ops.__file__:
        return  # a compiled extension, which has them all
    with pytest.raises(NotImplementedError, match="'carafe_forward' .*Install mmcv"):
        mmcv._ext.carafe_forward()


def test_list_backbones_takes_nothing():
    with pytest.raises(TypeError):
        densezoo.list_backbones("cas_vit_*")
