"""A wrong argument of a Python call is an error of one line that names it, and leaves no file.

A table of cases: what is called, and parts of what the error says.
"""

import numpy as np
import pytest
import torch
from mistakes import IMAGE, classifier, create, dense, features
from mmengine.optim import build_optim_wrapper
from torch import nn

import densezoo
from densezoo.backbones.checkpoints import convert_checkpoint, map_keys, unwrap_nesting
from densezoo.backbones.mmlab import DenseBackbone
from densezoo.kernels import mmcv_ops
from densezoo.layers.conv import ConvNorm, PointwiseConv, fold_norm_into_next
from densezoo.layers.mlp import ConvMlp
from densezoo.tools import demo, list_models
from densezoo.tools.bench_setup import Setup
from densezoo.tools.bench_throughput import Subject, list_subjects, measure
from densezoo.tools.count_macs import count_macs
from densezoo.tools.demo_data import make_dataset
from densezoo.tools.engine import TopKAccuracy, timm_dataset, timm_optimizer


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


def test_an_operator_that_is_not_covered_says_how_to_get_it():
    import mmcv._ext

    if mmcv._ext.__spec__.origin != mmcv_ops.__file__:
        return  # a compiled extension, which has them all
    with pytest.raises(NotImplementedError, match="'carafe_forward' .*Install mmcv"):
        mmcv._ext.carafe_forward()


def test_list_backbones_takes_nothing():
    with pytest.raises(TypeError):
        densezoo.list_backbones("cas_vit_*")
