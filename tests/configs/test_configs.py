"""Every shipped config builds; one real step of each task runs, by our command and by others'."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DATASETS, METRICS, MODELS, init_default_scope
from timm.layers import DropPath
from torch.nn.modules.batchnorm import _BatchNorm

from densezoo.tools.demo_data import CLASSES, make_dataset
from densezoo.tools.engine.config_files import CONFIG_ROOT, load_config, shipped_configs
from densezoo.tools.engine.runs import build_runner

NAMES = sorted(shipped_configs())
# One of each kind of model, data and schedule; RetinaNet is trained by mmdet's own script below.
TRAINED = [
    "cas_vit_xs_8xb128_300e_in1k",
    "fpn_cas_vit_xs_40k_ade20k",
    "cascade_mask_rcnn_dinat_mini_fpn_3x_coco",
    "dino_faster_vit_0_4scale_1x_coco",
    "gc_vit_xxtiny_8xb128_310e_in1k",
    "ppma_tiny_8xb128_300e_in1k",
    "upernet_ppma_tiny_160k_cityscapes",
]
OTHERS = [pytest.param(name, marks=pytest.mark.slow) for name in NAMES if name not in TRAINED]
# Of families whose sizes differ in figures alone, which the modules beside this read, one is built.
SIZES = (
    r"maxvit_(small|base|x?large)_|gc_vit_(xtiny|tiny2?|small2?|base|large)_|faster_vit_[1-6]_"
    r"|nat_(tiny|small|base|large)_|dinat_s_(small|base|large)_|(isotropic|vitrpb)_base_"
    r"|biformer_base_|ppma_(small|base)_|rmt_(small|base|large)_"
)
BUILT = [
    pytest.param(name, marks=pytest.mark.slow) if re.search(SIZES, f"{name}_") else name
    for name in NAMES
]


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    """The embedded data set, small: 16 and 4 scenes of 64 pixels in the formats of all tasks."""
    return make_dataset(tmp_path_factory.mktemp("data") / "digits", images=16, size=64)


def _small_data(name: str, root: Path) -> list[str]:
    """The options that put the embedded data set in the place of a config's own, and nothing else
    but what follows from it: the number of classes, the size of images, smaller batches.
    """
    task = shipped_configs()[name].parent.name
    # Smaller maps have one window in FasterViT's third stage, and no use for its carriers.
    side = 128 if "faster_vit" in name else 64
    square = f"({side},{side})"
    options = []
    for loader, split in (("train", "train"), ("val", "val"), ("test", "val")):
        dataset = f"{loader}_dataloader.dataset"
        options += [
            f"{loader}_dataloader.num_workers=0",
            f"{loader}_dataloader.persistent_workers=False",
        ]
        if task == "classification":
            size = 224 if name.startswith("vitrpb") else 32
            # Two rows in the last map, and the carriers.
            if re.search("maxvit|faster_vit|ppma|rmt", name):
                size = side
            options += [f"{dataset}.root={root / 'classes'}", f"{dataset}.input_size={size}"]
            continue
        options += [f"{dataset}.data_root={root}"]
        if task == "segmentation":
            options += [
                f"{dataset}.data_prefix.img_path=images/{split}",
                f"{dataset}.data_prefix.seg_map_path=masks/{split}",
                f"{dataset}.img_suffix=.jpg",
                f"{dataset}.seg_map_suffix=.png",
            ]
            resize = {"train": f"2.scale={square}", "val": f"1.scale={square}", "test": None}
        else:
            classes = ",".join(f'"{name}"' for name in CLASSES)
            options += [
                f"{dataset}.ann_file=annotations/instances_{split}.json",
                f"{dataset}.data_prefix.img=images/{split}",
                f"{dataset}.metainfo.classes=({classes})",
            ]
            resize = {"train": f"2.scale={square}", "val": f"1.scale={square}", "test": None}
            if loader == "train" and ("_3x_" in name or name.startswith("dino")):
                choice = "3.transforms"
                resize["train"] = f"{choice}.0.0.scales=[{square}]"
                options += [
                    f"{dataset}.pipeline.{choice}.1.0.scales=[{square}]",
                    f"{dataset}.pipeline.{choice}.1.1.crop_size=(32,48)",
                    f"{dataset}.pipeline.{choice}.1.2.scales=[{square}]",
                ]
            if loader == "train" and "_896_" in name:
                options += [f"{dataset}.pipeline.3.crop_size={square}"]
            if loader != "train":
                annotations = root / "annotations" / f"instances_{split}.json"
                options += [f"{loader}_evaluator.ann_file={annotations}"]
        if resize[loader]:
            options += [f"{dataset}.pipeline.{resize[loader]}"]
    options += ["train_dataloader.batch_size=4", "param_scheduler=None"]
    if name == "fpn_biformer_small_80k_ade20k":  # float32, by an option alone
        options += ["optim_wrapper.type=OptimWrapper"]
    if task == "classification":
        options += ["model.num_classes=10", "model.init_cfg=None"]
    else:
        options += ["model.backbone.init_cfg=None"]
    if task == "segmentation":
        options += [
            f"train_dataloader.dataset.pipeline.3.crop_size={square}",
            f"model.data_preprocessor.size={square}",
        ]
    elif name.startswith("retinanet"):
        options += ["model.bbox_head.num_classes=10"]
    elif name.startswith("dino"):
        options += ["model.bbox_head.num_classes=10", "model.num_queries=20"]
        options += ["model.encoder.num_layers=1", "model.decoder.num_layers=2"]
        options += ["model.dn_cfg.group_cfg.num_dn_queries=8", "model.test_cfg.max_per_img=10"]
    elif "mask_rcnn" in name:
        stages = ["bbox_head.0", "bbox_head.1", "bbox_head.2"]
        heads = stages if name.startswith("cascade") else ["bbox_head"]
        options += [f"model.roi_head.{head}.num_classes=10" for head in (*heads, "mask_head")]
        if name.startswith("cascade"):  # large heads, slow on a CPU
            options += [f"model.train_cfg.rcnn.{i}.sampler.num=32" for i in range(3)]
            options += [f"model.roi_head.{head}.fc_out_channels=64" for head in heads]
            options += ["model.test_cfg.rpn.max_per_img=50", "model.test_cfg.rcnn.max_per_img=10"]
    if "_896_" in name:
        options += ["model.data_preprocessor.pad_size_divisor=64"]
    if task == "detection":
        options += ["train_dataloader.dataset.filter_cfg.min_size=1"]
    part = "model" if task == "classification" else "model.backbone"
    if re.search("(^|_)(nat|dinat)_(?!isotropic)", name):
        # One dilated block; the largest dilations would pad these small maps to hundreds of rows.
        options += [f"{part}.model_kwargs.depths=(1,1,2,1)"]
    if "gc_vit" in name:  # a local and a global block
        options += [f"{part}.model_kwargs.depths=(2,2,2,2)"]
    if re.search("maxvit|faster_vit|biformer|ppma|rmt", name):
        options += [f"{part}.model_kwargs.depths=(1,1,1,1)"]
    if re.match("faster_vit_[3-6]", name):
        options += [f"{part}.model_kwargs.dims=(32,64,128,256)"]
    if re.match("faster_vit_[1-6]", name):  # no epoch after the first comes here
        options += ["custom_hooks.1.begin_epoch=0"]
    return options


@pytest.mark.parametrize("name", BUILT)
def test_every_config_builds(name):
    cfg = load_config(name)
    init_default_scope(cfg.default_scope)
    with DATASETS.switch_scope_and_registry(cfg.default_scope) as datasets:
        for key in ("train_dataloader", "val_dataloader", "test_dataloader"):
            assert datasets.get(cfg[key].dataset.type)
    with METRICS.switch_scope_and_registry(cfg.default_scope) as metrics:
        for key in ("val_evaluator", "test_evaluator"):
            assert metrics.get(cfg[key].type)
    with torch.device("meta"):
        model = MODELS.build(cfg.model)
    cfg.optim_wrapper.type = "OptimWrapper"  # mixed precision needs a GPU
    cfg.optim_wrapper.pop("loss_scale", None)
    optimizer = build_optim_wrapper(model, cfg.optim_wrapper).optimizer
    trained = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    assert trained == sum(p.numel() for p in model.parameters())

    model.train()
    settings = cfg.model if cfg.model.type == "ImageClassifier" else cfg.model.backbone
    rates = [m.drop_prob for m in model.backbone.modules() if isinstance(m, DropPath)]
    assert max(rates, default=0.0) == pytest.approx(settings.drop_path_rate)
    if cfg.model.type != "ImageClassifier":
        norms = [m for m in model.backbone.modules() if isinstance(m, _BatchNorm)]
        assert all(norm.training != bool(settings.get("norm_eval")) for norm in norms)
        taker = cfg.model.get("neck") or cfg.model.decode_head
        assert list(model.backbone.out_channels) == taker.in_channels
        if cfg.model.get("auxiliary_head"):
            head = cfg.model.auxiliary_head
            assert model.backbone.out_channels[head.in_index] == head.in_channels
        has_norms = not settings.model_name.startswith("maxvit")
        assert len(model.backbone.out_norms) == has_norms * len(model.backbone.out_channels)


@pytest.mark.parametrize("name", NAMES)
def test_every_config_is_short_and_scales_its_learning_rate_from_the_batch_it_is_for(name):
    path = shipped_configs()[name]
    assert len(path.read_text().splitlines()) < 25
    cfg = load_config(name)
    assert cfg.auto_scale_lr == dict(
        enable=False, base_batch_size=8 * cfg.train_dataloader.batch_size
    )
    if "8xb" in name:
        assert f"_8xb{cfg.train_dataloader.batch_size}_" in name


@pytest.mark.parametrize("task", ["classification", "detection", "segmentation"])
def test_every_config_has_a_row_in_the_table_of_its_task(task):
    table = (CONFIG_ROOT / task / "README.md").read_text()
    for path in (CONFIG_ROOT / task).glob("*.py"):
        assert f"`{path.stem}`" in table, path.stem


@pytest.mark.parametrize("name", [*TRAINED, *OTHERS])
def test_one_step_of_training_and_the_metrics_run(name, digits, tmp_path):
    cfg = load_config(name, _small_data(name, digits))
    cfg.work_dir = str(tmp_path)
    cfg.launcher = "none"
    cfg.randomness = dict(seed=0)
    cfg.train_cfg = dict(type="IterBasedTrainLoop", max_iters=1, val_interval=1)
    cfg.default_hooks.checkpoint.by_epoch = False
    runner = build_runner(cfg, "train")
    before = {key: value.clone() for key, value in runner.model.named_parameters()}
    with_gradient = set()
    for key, value in runner.model.named_parameters():
        value.register_post_accumulate_grad_hook(lambda _, key=key: with_gradient.add(key))
    runner.train()
    assert runner.iter == 1
    scalars = runner.message_hub.log_scalars
    assert torch.isfinite(torch.tensor(scalars["train/loss"].current()))
    assert any(key.startswith("val/") for key in scalars)
    # Several processes wait for each parameter's gradient: none may be left out of a step.
    assert with_gradient == set(before)
    # A bias that a norm in training mode takes away again has no gradient.
    matrices = {key for key, value in before.items() if value.ndim > 1}
    after = dict(runner.model.named_parameters())
    same = [key for key in matrices if torch.equal(before[key], after[key])]
    # The last layer of DINO's predictors of boxes starts at zero, and passes nothing back.
    same = [key for key in same if not re.match(r"bbox_head\.reg_branches\.\d+\.[02]\.", key)]
    assert not same, f"not trained: {same}"
    assert (tmp_path / "iter_1.pth").exists()


@pytest.mark.parametrize(
    "library, name",
    [
        ("mmdet", "retinanet_cas_vit_xs_fpn_1x_coco"),
        pytest.param("mmseg", "fpn_cas_vit_xs_40k_ade20k", marks=pytest.mark.slow),
    ],
)
def test_the_train_script_of_mmdet_and_mmseg_runs_our_config(library, name, digits, tmp_path):
    (folder,) = importlib.util.find_spec(library).submodule_search_locations
    length = {"mmdet": ["max_epochs=1"], "mmseg": ["max_iters=1", "val_interval=1"]}[library]
    options = _small_data(name, digits) + [f"train_cfg.{option}" for option in length]
    command = [sys.executable, Path(folder, ".mim", "tools", "train.py"), shipped_configs()[name]]
    done = subprocess.run(
        [*command, "--work-dir", tmp_path, "--cfg-options", *options],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    checkpoint = (tmp_path / "last_checkpoint").read_text()
    assert Path(checkpoint).exists()
