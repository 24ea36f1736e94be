"""The recipes of BiFormer are the published ones, figure by figure.

The tables below were typed from the paper and from the configurations and pages of the official
code, beside what our configs say. Where a figure is not published, the config or its page says so.
"""

import math

import pytest
from recipes import build, check_that_rates_follow_timm, decay_by_name, rates, rows_of
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from densezoo.backbones.registry import BACKBONES
from densezoo.tools.engine.config_files import load_config, shipped_configs

# Drop path (those of tiny and base are not published), top-1.
IMAGENET = {
    "biformer_tiny": (0.1, "81.4"), "biformer_small": (0.15, "83.8"),
    "biformer_base": (0.3, "84.3"), "biformer_stl": (0.1, "82.7"),
    "biformer_stl_nchw": (0.1, "82.7"),
}  # fmt: skip
# Drop path, box and mask AP, those of the authors' second training.
MASK_RCNN = {
    "biformer_small": (0.2, "47.8", "43.2", "48.1 / 43.6"),
    "biformer_base": (0.3, "48.6", "43.7", "-"),
}
RETINANET = {
    "biformer_small": (0.2, "45.9", "-", "47.3"),
    "biformer_base": (0.3, "47.1", "-", "-"),
}
# Drop path, mIoU, mIoU of several sizes, flipped too.
SEMANTIC_FPN = {"biformer_small": (0.15, "48.9", "-"), "biformer_base": (0.3, "49.9", "-")}
UPERNET = {"biformer_small": (0.3, "49.8", "50.8"), "biformer_base": (0.4, "51.0", "51.7")}
CHANNELS = {"biformer_small": [64, 128, 256, 512], "biformer_base": [96, 192, 384, 768]}

CLASSIFIERS = {f"{name}_8xb128_300e_in1k": name for name in IMAGENET}
DETECTORS = {
    **{f"mask_rcnn_{name}_fpn_1x_coco": (name, row[0]) for name, row in MASK_RCNN.items()},
    **{f"retinanet_{name}_fpn_1x_coco": (name, row[0]) for name, row in RETINANET.items()},
}
SEGMENTERS = {
    **{f"fpn_{name}_80k_ade20k": (name, row[0]) for name, row in SEMANTIC_FPN.items()},
    **{f"upernet_{name}_160k_ade20k": (name, row[0]) for name, row in UPERNET.items()},
}


def test_there_is_a_config_for_every_published_run():
    ours = {name for name in shipped_configs() if "biformer" in name}
    assert ours == {*CLASSIFIERS, *DETECTORS, *SEGMENTERS}


@pytest.mark.parametrize("config", CLASSIFIERS)
def test_training_on_imagenet_is_the_published_recipe(config):
    cfg, name = load_config(config), CLASSIFIERS[config]
    assert (cfg.model.model_name, cfg.model.drop_path_rate) == (name, IMAGENET[name][0])
    optimizer = dict(type="AdamW", lr=1e-3, weight_decay=0.05, eps=1e-8, betas=(0.9, 0.999))
    assert cfg.optim_wrapper.optimizer == optimizer
    # 5e-4 for 512 images.
    assert 8 * cfg.train_dataloader.batch_size * 5e-4 / 512 == optimizer["lr"]
    assert "clip_grad" not in cfg.optim_wrapper
    assert cfg.optim_wrapper.type == "AmpOptimWrapper"
    assert cfg.train_cfg.max_epochs == 300
    mixup = dict(mixup_alpha=0.8, cutmix_alpha=1.0, switch_prob=0.5, prob=1.0, label_smoothing=0.1)
    assert cfg.model.mixup == mixup
    assert cfg.model.random_erasing == dict(probability=0.25, mode="pixel")
    transform = dict(interpolation="bicubic", auto_augment="rand-m9-mstd0.5-inc1")
    assert cfg.train_dataloader.dataset.transform == transform
    assert cfg.train_dataloader.sampler == dict(type="RepeatedAugmentationSampler")
    assert "custom_hooks" not in cfg  # the published figures are not those of the average
    for loader in (cfg.val_dataloader, cfg.test_dataloader):
        assert loader.dataset.input_size == 224
        assert loader.dataset.transform == dict(interpolation="bicubic", crop_pct=224 / 256)


def test_the_rate_on_imagenet_follows_timm_iteration_by_iteration():
    length = 7
    seen = rates(load_config("biformer_tiny_8xb128_300e_in1k"), length, 300 * length)
    assert seen[0] == pytest.approx(1e-6)
    check_that_rates_follow_timm(seen, length, lr=1e-3, epochs=300, warmup=5, lowest=1e-5)
    assert seen[-1] == pytest.approx(1e-5, rel=1e-3)


@pytest.mark.parametrize("config", ["biformer_tiny_8xb128_300e_in1k"])
def test_on_imagenet_one_dimension_alone_is_spared_from_decay(config):
    cfg = load_config(config)
    model = build(cfg)
    decay = decay_by_name(cfg, model)
    assert {n: 0.05 * (p.ndim > 1) for n, p in model.named_parameters()} == decay
    # Kernels of the position encoding decay too.
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.groups > 1]
    assert len(convolutions) >= 2 * 14


@pytest.mark.parametrize("config", [*DETECTORS, *SEGMENTERS])
def test_dense_recipes_are_the_published_ones(config):
    is_detector = config in DETECTORS
    cfg, (name, drop_path) = load_config(config), {**DETECTORS, **SEGMENTERS}[config]
    backbone = cfg.model.backbone
    assert (backbone.model_name, backbone.drop_path_rate) == (name, drop_path)
    assert backbone.init_cfg.checkpoint == f"checkpoints/{name}.pth"
    assert backbone.model_kwargs == dict(num_regions=16 if is_detector else 8)
    is_mixed = cfg.optim_wrapper.type == "AmpOptimWrapper" and cfg.optim_wrapper.loss_scale == 512.0
    assert is_mixed and isinstance(cfg.optim_wrapper.loss_scale, float)  # mmengine's static scale
    assert "clip_grad" not in cfg.optim_wrapper
    kind = config.partition("_biformer")[0]
    lr, decay, images = {
        "mask_rcnn": (1e-4, 0.05, 2), "retinanet": (1e-4, 1e-4, 2),
        "fpn": (2e-4, 1e-4, 4), "upernet": (6e-5, 0.01, 2),
    }[kind]  # fmt: skip
    optimizer = dict(type="AdamW", lr=lr, betas=(0.9, 0.999), weight_decay=decay)
    assert cfg.optim_wrapper.optimizer == optimizer
    assert cfg.train_dataloader.batch_size == images
    channels = CHANNELS[name]
    if kind == "retinanet":
        assert cfg.model.neck.in_channels == channels[1:]
        assert (cfg.model.neck.add_extra_convs, cfg.model.neck.num_outs) == ("on_input", 5)
    elif kind == "upernet":
        head, auxiliary = cfg.model.decode_head, cfg.model.auxiliary_head
        assert (head.in_channels, head.channels) == (channels, 512)
        assert (auxiliary.in_index, auxiliary.in_channels) == (2, channels[2])
        assert (auxiliary.channels, auxiliary.loss_decode.loss_weight) == (256, 0.4)
    else:
        assert cfg.model.neck.in_channels == channels
        assert cfg.model.neck.out_channels == 256


@pytest.mark.parametrize("config", [
    "mask_rcnn_biformer_small_fpn_1x_coco", "retinanet_biformer_small_fpn_1x_coco",
    "fpn_biformer_small_80k_ade20k", "upernet_biformer_small_160k_ade20k",
])  # fmt: skip
def test_decay_spares_the_layer_norms_where_the_published_rule_does(config):
    cfg = load_config(config)
    model = build(cfg)
    decay = cfg.optim_wrapper.optimizer.weight_decay
    spares = config.startswith(("mask_rcnn", "upernet"))
    # The published rule spares names with "norm"; those of BatchNorm are not called so there.
    layer_norms = [n for n, m in model.named_modules() if isinstance(m, nn.LayerNorm)]
    depth = 4 + 4 + 18 + 4
    assert len(layer_norms) == 2 * depth + len(model.backbone.out_channels)
    assert all(n.startswith("backbone.") for n in layer_norms)
    for name, value in decay_by_name(cfg, model).items():
        is_spared = spares and name.rpartition(".")[0] in layer_norms
        assert value == (0 if is_spared else decay), name


@pytest.mark.parametrize("config, is_frozen", [
    ("mask_rcnn_biformer_small_fpn_1x_coco", True), ("retinanet_biformer_base_fpn_1x_coco", True),
    ("fpn_biformer_small_80k_ade20k", False), ("upernet_biformer_base_160k_ade20k", False),
])  # fmt: skip
def test_statistics_of_detectors_are_frozen_and_all_parameters_train(config, is_frozen):
    cfg = load_config(config)
    backbone = build(cfg).backbone.train()
    norms = [m for m in backbone.modules() if isinstance(m, _BatchNorm)]
    assert len(norms) == 2 + 3
    assert {norm.training for norm in norms} == {not is_frozen}
    assert all(p.requires_grad for p in backbone.parameters())
    assert cfg.sync_bn == "torch"  # of what is in training mode, on GPUs


def test_the_rate_of_detectors_drops_at_epochs_8_and_11():
    seen = rates(load_config("mask_rcnn_biformer_small_fpn_1x_coco"), 100, 12 * 100)
    assert seen[0] == pytest.approx(1e-7)
    assert seen[250] == pytest.approx(5e-5, rel=0.01)
    assert seen[500:800] == [pytest.approx(1e-4)] * 300
    assert seen[800:1100] == [pytest.approx(1e-5)] * 300
    assert seen[1100:] == [pytest.approx(1e-6)] * 100


def test_the_rate_of_semantic_fpn_is_a_cosine_beside_the_warm_up():
    cfg = load_config("fpn_biformer_small_80k_ade20k")
    seen = rates(cfg, 10**9, 80000)
    assert cfg.train_cfg.max_iters == 80000
    for iteration in (0, 1, 500, 999, 1000, 40000, 79000, 79999):
        warmup = min(1, 0.1 + 0.9 * iteration / 999)
        cosine = 1e-8 + (1 - 1e-8) * (1 + math.cos(math.pi * iteration / 80000)) / 2
        assert seen[iteration] == pytest.approx(2e-4 * warmup * cosine, rel=1e-3)


def test_the_rate_of_upernet_falls_from_the_first_iteration_beside_the_warm_up():
    cfg = load_config("upernet_biformer_small_160k_ade20k")
    seen = rates(cfg, 10**9, 4000)
    assert cfg.train_cfg.max_iters == 160000
    for iteration in (0, 1, 700, 1499, 1500, 3999):
        warmup = min(1, 1e-6 + (1 - 1e-6) * iteration / 1499)
        assert seen[iteration] == pytest.approx(6e-5 * (1 - iteration / 160000) * warmup)


def test_images_of_detectors_are_of_one_size():
    cfg = load_config("mask_rcnn_biformer_small_fpn_1x_coco")
    for loader in (cfg.train_dataloader, cfg.test_dataloader):
        (resize,) = [s for s in loader.dataset.pipeline if s.type.endswith("Resize")]
        assert (resize.scale, resize.keep_ratio) == ((1333, 800), True)
    assert cfg.model.data_preprocessor.pad_size_divisor == 32
    assert cfg.train_cfg.max_epochs == 12


@pytest.mark.parametrize("config, is_aligned", [
    ("fpn_biformer_small_80k_ade20k", True), ("upernet_biformer_small_160k_ade20k", False),
])  # fmt: skip
def test_segmenters_test_whole_images_aligned_with_semantic_fpn_alone(config, is_aligned):
    cfg = load_config(config)
    steps = {step.type: step for step in cfg.train_dataloader.dataset.pipeline}
    assert steps["RandomResize"].ratio_range == (0.5, 2.0)
    crop = steps["RandomCrop"]
    assert (crop.crop_size, crop.cat_max_ratio) == ((512, 512), 0.75)
    assert {"RandomFlip", "PhotoMetricDistortion"} <= set(steps)
    steps = {step.type: step for step in cfg.test_dataloader.dataset.pipeline}
    assert (steps["Resize"].scale, steps["Resize"].keep_ratio) == ((2048, 512), True)
    assert ("ResizeToMultiple" in steps) == is_aligned
    if is_aligned:
        assert steps["ResizeToMultiple"].size_divisor == 32
        assert (cfg.model.decode_head.channels, cfg.model.decode_head.dropout_ratio) == (128, 0.1)
    assert cfg.model.test_cfg == dict(mode="whole")
    assert cfg.model.decode_head.num_classes == 150
    assert cfg.model.decode_head.norm_cfg.type == "SyncBN"


def test_the_pages_and_the_registry_say_the_published_figures():
    rows = rows_of("classification")
    for config, name in CLASSIFIERS.items():
        rate, top1 = IMAGENET[name]
        said = f"{rate} (not published)" if name in ("biformer_tiny", "biformer_base") else rate
        assert rows[config] == [top1, str(said), "224"]
        assert BACKBONES[name].weights.published.top1 == (float(top1),)
    rows = rows_of("detection")
    for head, table in (("mask_rcnn", MASK_RCNN), ("retinanet", RETINANET)):
        for name, (rate, *figures) in table.items():
            assert rows[f"{head}_{name}_fpn_1x_coco"] == [*figures, str(rate)]
    rows = rows_of("segmentation")
    for config, name, row in [
        *((f"fpn_{name}_80k_ade20k", name, row) for name, row in SEMANTIC_FPN.items()),
        *((f"upernet_{name}_160k_ade20k", name, row) for name, row in UPERNET.items()),
    ]:
        assert rows[config] == [*row[1:], str(row[0])], name
