"""The recipes of PPMA, and of RMT as PPMA's authors train it, are the published ones.

The tables below were typed from the pages, configurations and training logs of the official code,
beside what our configs say. Where a figure is not published, the config's page says so.
"""

import pytest
from recipes import build, check_that_rates_follow_timm, decay_by_name, rates, rows_of
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from densezoo.backbones.registry import BACKBONES
from densezoo.tools.engine.config_files import load_config, shipped_configs

# Drop path, top-1; RMT's are those of the logs, of averaged weights as PPMA's.
IMAGENET = {
    "ppma_tiny": (0.1, "82.6"), "ppma_small": (0.15, "84.2"), "ppma_base": (0.4, "85.0"),
    "rmt_tiny": (0.1, "82.31 (training log)"), "rmt_small": (0.15, "83.95 (training log)"),
    "rmt_base": (0.4, "84.91 (training log)"), "rmt_large": (0.5, "not trained"),
}  # fmt: skip
# Box and mask AP, millions of parameters.
MASK_RCNN = {
    "mask_rcnn_ppma_tiny_fpn_1x_coco": ("47.1", "42.4", 33),
    "mask_rcnn_ppma_small_fpn_1x_coco": ("49.2", "43.8", 46),
    "mask_rcnn_ppma_base_fpn_1x_coco": ("51.1", "45.5", 73),
    "mask_rcnn_ppma_base_fpn_3x_coco": ("52.6", "46.3", 73),
}
# mIoU of one size and of several, millions of parameters (not published for Cityscapes).
UPERNET = {
    "upernet_ppma_tiny_160k_ade20k": ("48.7 / 49.1", 43),
    "upernet_ppma_small_160k_ade20k": ("51.1 / 52.0", 56),
    "upernet_ppma_base_160k_ade20k": ("52.3 / 53.0", 83),
    "upernet_ppma_tiny_160k_cityscapes": ("82.7 / 83.5", None),
    "upernet_ppma_small_160k_cityscapes": ("83.7 / 84.0", None),
    "upernet_ppma_base_160k_cityscapes": ("83.9 / 84.3", None),
}
CHANNELS = {
    "ppma_tiny": [64, 128, 256, 512], "ppma_small": [64, 128, 256, 512],
    "ppma_base": [80, 160, 320, 512],
}  # fmt: skip

CLASSIFIERS = {f"{name}_8xb128_300e_in1k": name for name in IMAGENET}
DENSE = [*MASK_RCNN, *UPERNET]


def name_of(config):
    """The model of a detector's or segmenter's config."""
    return f"ppma_{config.partition('ppma_')[2].partition('_')[0]}"


def test_there_is_a_config_for_every_published_run():
    ours = {name for name in shipped_configs() if "ppma_" in name or "rmt_" in name}
    assert ours == {*CLASSIFIERS, *DENSE}


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
    (average,) = cfg.custom_hooks
    assert (average.type, average.ema_type) == ("EMAHook", "ExponentialMovingAverage")
    assert 1 - average.momentum == pytest.approx(0.99996 ** (1024 / 512), rel=1e-12)
    assert average.update_buffers and "interval" not in average
    assert cfg.sync_bn == "torch"
    for loader in (cfg.val_dataloader, cfg.test_dataloader):
        assert loader.dataset.input_size == 224
        assert loader.dataset.transform == dict(interpolation="bicubic", crop_pct=224 / 256)


def test_the_rate_on_imagenet_follows_timm_iteration_by_iteration():
    length = 7
    seen = rates(load_config("ppma_tiny_8xb128_300e_in1k"), length, 300 * length)
    assert seen[0] == pytest.approx(1e-6)
    check_that_rates_follow_timm(seen, length, lr=1e-3, epochs=300, warmup=5, lowest=1e-5)
    assert seen[-1] == pytest.approx(1e-5, rel=1e-3)


def test_on_imagenet_one_dimension_alone_is_spared_from_decay_but_for_layer_scales():
    """The base models have layer scales, in two stages, and the mask's decays are learned."""
    cfg = load_config("ppma_base_8xb128_300e_in1k")
    model = build(cfg)
    blocks = [block for stage in model.backbone.stages[2:] for block in stage.blocks]
    scales = {
        f"backbone.{name}"
        for name, parameter in model.backbone.named_parameters()
        if "gamma" in name
    }
    assert len(scales) == 2 * len(blocks) == 2 * (25 + 8)
    decays = 0
    for name, value in decay_by_name(cfg, model).items():
        parameter = model.get_parameter(name)
        assert value == (0.05 if parameter.ndim > 1 or name in scales else 0), name
        decays += value == 0 and parameter.shape in [(5,), (10,), (16,)]
    assert decays == 2 * (4 + 8 + 25 + 8)  # two numbers a head in each block


@pytest.mark.parametrize("config", DENSE)
def test_dense_recipes_are_the_published_ones(config):
    cfg, name = load_config(config), name_of(config)
    backbone = cfg.model.backbone
    assert (backbone.model_name, backbone.drop_path_rate) == (name, IMAGENET[name][0])
    assert backbone.init_cfg.checkpoint == f"checkpoints/{name}.pth"
    assert cfg.optim_wrapper.type == "OptimWrapper"
    assert "clip_grad" not in cfg.optim_wrapper
    is_detector = config in MASK_RCNN
    lr = 1e-4 if is_detector else 6e-5
    optimizer = dict(type="AdamW", lr=lr, betas=(0.9, 0.999), weight_decay=0.05)
    assert cfg.optim_wrapper.optimizer == optimizer
    assert cfg.train_dataloader.batch_size == (1 if "cityscapes" in config else 2)
    channels = CHANNELS[name]
    if is_detector:
        assert (cfg.model.neck.in_channels, cfg.model.neck.out_channels) == (channels, 256)
        return
    head, auxiliary = cfg.model.decode_head, cfg.model.auxiliary_head
    assert (head.in_channels, head.channels) == (channels, 512)
    assert (auxiliary.in_index, auxiliary.in_channels) == (2, channels[2])
    assert (auxiliary.channels, auxiliary.loss_decode.loss_weight) == (256, 0.4)
    assert cfg.train_cfg.max_iters == 160000


@pytest.mark.parametrize("config", [
    "mask_rcnn_ppma_tiny_fpn_1x_coco", "mask_rcnn_ppma_base_fpn_3x_coco",
    "upernet_ppma_tiny_160k_ade20k", "upernet_ppma_base_160k_cityscapes",
])  # fmt: skip
def test_decay_spares_what_the_official_code_calls_a_norm(config):
    """Not the norms of the stem, which have numbers for names there, nor those of heads."""
    cfg = load_config(config)
    model = build(cfg)
    norms = {
        name: module
        for name, module in model.backbone.named_modules()
        if isinstance(module, (nn.LayerNorm, _BatchNorm))
    }
    stem = {name for name in norms if ".stem." in name}
    assert len(stem) == 4 and all(isinstance(norms[name], _BatchNorm) for name in stem)
    depth = sum(len(stage.blocks) for stage in model.backbone.model.model.stages)
    assert len(norms) == 4 + 2 * depth + 3 + 4  # stem, blocks, downsamplers, outputs
    assert all(norm.eps == 1e-5 for name, norm in norms.items() if "out_norms" in name)
    for name, value in decay_by_name(cfg, model).items():
        module = name.removeprefix("backbone.").rpartition(".")[0]
        is_spared = name.startswith("backbone.") and module in norms and module not in stem
        assert value == (0 if is_spared else 0.05), name
    assert all(norm.training for norm in norms.values())  # none is frozen
    published = (MASK_RCNN.get(config) or UPERNET[config])[-1]
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    assert published in (None, round(millions)), millions


@pytest.mark.parametrize("config, steps", [
    ("mask_rcnn_ppma_tiny_fpn_1x_coco", (8, 11, 12)),
    ("mask_rcnn_ppma_base_fpn_3x_coco", (27, 33, 36)),
])  # fmt: skip
def test_the_rate_of_detectors_drops_twice(config, steps):
    cfg, (first, second, end) = load_config(config), steps
    seen = rates(cfg, 100, end * 100)
    assert cfg.train_cfg.max_epochs == end
    assert seen[0] == pytest.approx(1e-7)
    assert seen[250] == pytest.approx(5e-5, rel=0.01)
    assert seen[500 : first * 100] == [pytest.approx(1e-4)] * (first * 100 - 500)
    assert seen[first * 100 : second * 100] == [pytest.approx(1e-5)] * ((second - first) * 100)
    assert seen[second * 100 :] == [pytest.approx(1e-6)] * ((end - second) * 100)


@pytest.mark.parametrize("config", [
    "upernet_ppma_tiny_160k_ade20k", "upernet_ppma_tiny_160k_cityscapes",
])  # fmt: skip
def test_the_rate_of_segmenters_falls_from_the_first_iteration_beside_the_warm_up(config):
    seen = rates(load_config(config), 10**9, 4000)
    for iteration in (0, 1, 700, 1499, 1500, 3999):
        warmup = min(1, 1e-6 + (1 - 1e-6) * iteration / 1499)
        assert seen[iteration] == pytest.approx(6e-5 * (1 - iteration / 160000) * warmup)


def test_images_of_detectors_are_of_one_size_in_12_epochs_and_of_several_in_36():
    cfg = load_config("mask_rcnn_ppma_tiny_fpn_1x_coco")
    for loader in (cfg.train_dataloader, cfg.test_dataloader):
        (resize,) = [s for s in loader.dataset.pipeline if s.type.endswith("Resize")]
        assert (resize.scale, resize.keep_ratio) == ((1333, 800), True)
    cfg = load_config("mask_rcnn_ppma_base_fpn_3x_coco")
    (choice,) = [s for s in cfg.train_dataloader.dataset.pipeline if s.type == "RandomChoice"]
    plain, cropped = choice.transforms
    assert [min(scale) for scale in plain[0].scales] == list(range(480, 801, 32))
    assert [step.type for step in cropped][1] == "RandomCrop"


@pytest.mark.parametrize("config, side, scale, classes, data", [
    ("upernet_ppma_tiny_160k_ade20k", 512, (2048, 512), 150, "ADE20KDataset"),
    ("upernet_ppma_tiny_160k_cityscapes", 1024, (2048, 1024), 19, "CityscapesDataset"),
])  # fmt: skip
def test_segmenters_train_on_crops_and_test_in_windows_of_their_size(
    config, side, scale, classes, data
):
    cfg = load_config(config)
    steps = {step.type: step for step in cfg.train_dataloader.dataset.pipeline}
    resize, crop = steps["RandomResize"], steps["RandomCrop"]
    assert (resize.scale, resize.ratio_range) == (scale, (0.5, 2.0))
    assert (crop.crop_size, crop.cat_max_ratio) == ((side, side), 0.75)
    assert {"RandomFlip", "PhotoMetricDistortion"} <= set(steps)
    # Labels of ADE20K begin with that of no class; train ids of Cityscapes have none.
    assert bool(steps["LoadAnnotations"].get("reduce_zero_label")) == (classes == 150)
    assert cfg.model.data_preprocessor.size == (side, side)
    test = {step.type: step for step in cfg.test_dataloader.dataset.pipeline}
    assert (test["Resize"].scale, test["Resize"].keep_ratio) == (scale, True)
    slide = dict(mode="slide", crop_size=(side, side), stride=(341, 341))
    assert cfg.model.test_cfg == slide
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        assert loader.dataset.type == data
    assert cfg.model.decode_head.num_classes == cfg.model.auxiliary_head.num_classes == classes


def test_the_pages_and_the_registry_say_the_published_figures():
    rows = rows_of("classification")
    for config, name in CLASSIFIERS.items():
        rate, top1 = IMAGENET[name]
        assert rows[config] == [top1, str(rate), "224"]
        if name.startswith("ppma"):
            assert BACKBONES[name].weights.published.top1 == (float(top1),)
    rows = rows_of("detection")
    for config, (box, mask, _) in MASK_RCNN.items():
        assert rows[config] == [box, mask, str(IMAGENET[name_of(config)][0])]
    rows = rows_of("segmentation")
    for config, (figures, _) in UPERNET.items():
        assert rows[config] == [figures, str(IMAGENET[name_of(config)][0])]
