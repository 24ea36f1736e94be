"""mmdet's and mmseg's own models take a real training step on densezoo's operators."""

import copy
from pathlib import Path

import mmcv.ops.multi_scale_deform_attn as deform_attn
import mmdet.utils
import mmseg.utils
import numpy as np
import pytest
import torch
from mmdet.models.losses import focal_loss
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks
from mmengine.config import Config
from mmengine.optim import OptimWrapper
from mmengine.registry import DefaultScope
from mmengine.structures import InstanceData, PixelData
from mmseg.structures import SegDataSample

from densezoo.kernels import mmcv_ops

HEIGHT, WIDTH = 64, 96
NUM_CLASSES = 3
DIMS = [48, 56, 112, 220]
BACKBONE = dict(_delete_=True, type="DenseBackbone", model_name="cas_vit_xs")
NECK = dict(in_channels=DIMS, out_channels=16)

RETINANET = dict(
    backbone=BACKBONE,
    neck=NECK,
    bbox_head=dict(num_classes=NUM_CLASSES, in_channels=16, feat_channels=16, stacked_convs=1),
)
MASK_RCNN = dict(
    backbone=BACKBONE,
    neck=NECK,
    rpn_head=dict(in_channels=16, feat_channels=16),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=16),
        mask_roi_extractor=dict(out_channels=16),
        bbox_head=dict(in_channels=16, fc_out_channels=32, num_classes=NUM_CLASSES),
        mask_head=dict(in_channels=16, conv_out_channels=8, num_convs=1, num_classes=NUM_CLASSES),
    ),
    train_cfg=dict(rpn_proposal=dict(nms_pre=100, max_per_img=50), rcnn=dict(sampler=dict(num=32))),
    test_cfg=dict(rpn=dict(nms_pre=100, max_per_img=50)),
)
DETR_FFN = dict(embed_dims=32, feedforward_channels=32, ffn_drop=0.0)
DETR_ATTENTION = dict(embed_dims=32, num_heads=4, dropout=0.0)
DEFORMABLE_DETR = dict(
    num_queries=10,
    backbone=BACKBONE | dict(out_indices=(1, 2, 3)),
    neck=dict(in_channels=DIMS[1:], out_channels=32, norm_cfg=dict(num_groups=4)),
    encoder=dict(num_layers=1, layer_cfg=dict(self_attn_cfg=DETR_ATTENTION, ffn_cfg=DETR_FFN)),
    decoder=dict(
        num_layers=2,
        layer_cfg=dict(
            self_attn_cfg=DETR_ATTENTION, cross_attn_cfg=DETR_ATTENTION, ffn_cfg=DETR_FFN
        ),
    ),
    positional_encoding=dict(num_feats=16),
    bbox_head=dict(num_classes=NUM_CLASSES, embed_dims=32),
)
SEGMENTATION_HEAD = dict(channels=16, num_classes=NUM_CLASSES, norm_cfg=dict(type="BN"))
UPERNET = dict(
    data_preprocessor=dict(size=(HEIGHT, WIDTH)),
    pretrained=None,
    backbone=BACKBONE,
    decode_head=SEGMENTATION_HEAD | dict(in_channels=DIMS),
    auxiliary_head=SEGMENTATION_HEAD | dict(in_channels=DIMS[2]),
)
SEMANTIC_FPN = dict(
    data_preprocessor=dict(size=(HEIGHT, WIDTH)),
    pretrained=None,
    backbone=BACKBONE,
    neck=NECK,
    decode_head=SEGMENTATION_HEAD | dict(in_channels=[16] * 4),
)

MODELS = {
    "retinanet": (mmdet, "_base_/models/retinanet_r50_fpn.py", RETINANET),
    "mask_rcnn": (mmdet, "_base_/models/mask-rcnn_r50_fpn.py", MASK_RCNN),
    "deformable_detr": (
        mmdet,
        "deformable_detr/deformable-detr_r50_16xb2-50e_coco.py",
        DEFORMABLE_DETR,
    ),
    "upernet": (mmseg, "_base_/models/upernet_r50.py", UPERNET),
    "semantic_fpn": (mmseg, "_base_/models/fpn_r50.py", SEMANTIC_FPN),
}


@pytest.fixture
def build():
    """Return a function that builds a library's shipped config, shrunk, in the library's scope."""

    def build_in_scope(name):
        library, path, changes = MODELS[name]
        library.utils.register_all_modules(init_default_scope=False)
        config = Config.fromfile(Path(library.__file__).parent / ".mim" / "configs" / path)
        # A copy, because the merge takes _delete_ out of what it is given.
        config.merge_from_dict(dict(model=copy.deepcopy(changes)))
        torch.manual_seed(0)
        with DefaultScope.overwrite_default_scope(library.__name__):
            model = library.registry.MODELS.build(config.model)
            model.init_weights()
        return model

    return build_in_scope


def detection_batch():
    """Return two noise images with two boxes and masks each, as mmdet's data sets give them."""
    generator = torch.Generator().manual_seed(1)
    inputs, samples = [], []
    for _ in range(2):
        inputs.append(torch.randint(256, (3, HEIGHT, WIDTH), generator=generator).byte())
        boxes = torch.tensor([[8.0, 8, 40, 48], [30.0, 20, 90, 60]])
        masks = np.zeros((2, HEIGHT, WIDTH), dtype=np.uint8)
        for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist(), strict=True):
            mask[y1:y2, x1:x2] = 1
        shape = dict(img_shape=(HEIGHT, WIDTH), ori_shape=(HEIGHT, WIDTH))
        sample = DetDataSample(metainfo=dict(shape, scale_factor=(1.0, 1.0)))
        sample.gt_instances = InstanceData(
            bboxes=boxes, labels=torch.tensor([0, 2]), masks=BitmapMasks(masks, HEIGHT, WIDTH)
        )
        samples.append(sample)
    return dict(inputs=inputs, data_samples=samples)


def segmentation_batch():
    """Return two noise images with labels, some of them ignored."""
    generator = torch.Generator().manual_seed(1)
    inputs, samples = [], []
    for _ in range(2):
        inputs.append(torch.randint(256, (3, HEIGHT, WIDTH), generator=generator).byte())
        labels = torch.randint(NUM_CLASSES, (1, HEIGHT, WIDTH), generator=generator)
        labels[:, :8] = 255
        shape = dict(img_shape=(HEIGHT, WIDTH), ori_shape=(HEIGHT, WIDTH))
        sample = SegDataSample(metainfo=dict(shape, pad_shape=(HEIGHT, WIDTH)))
        sample.gt_sem_seg = PixelData(data=labels)
        samples.append(sample)
    return dict(inputs=inputs, data_samples=samples)


def train_step(model, name):
    """Take one step of SGD; return the losses that the model reports."""
    optimizer = OptimWrapper(torch.optim.SGD(model.parameters(), lr=1e-3))
    batch = detection_batch() if MODELS[name][0] is mmdet else segmentation_batch()
    with DefaultScope.overwrite_default_scope(MODELS[name][0].__name__):
        return model.train().train_step(batch, optimizer)


@pytest.mark.parametrize("name", MODELS)
def test_one_training_step_changes_what_it_trains(build, name):
    model = build(name)
    before = {key: value.detach().clone() for key, value in model.named_parameters()}
    losses = train_step(model, name)
    assert losses["loss"] > 0
    assert all(torch.isfinite(loss).all() for loss in losses.values())
    changed = {
        key for key, value in model.named_parameters() if not torch.equal(value, before[key])
    }
    parts = {name for name, part in model.named_children() if list(part.parameters())}
    assert parts <= {key.split(".")[0] for key in changed}


@pytest.mark.parametrize("name", ["retinanet", "mask_rcnn"])
def test_detectors_predict_with_nms(build, name):
    model = build(name).eval()
    # Untrained scores are below the usual threshold.
    test_cfg = model.bbox_head.test_cfg if name == "retinanet" else model.roi_head.test_cfg
    test_cfg.score_thr = 0.0
    with torch.no_grad():
        for sample in model.test_step(detection_batch()):
            found = sample.pred_instances
            assert 0 < len(found) <= 100
            assert torch.isfinite(found.bboxes).all()
            if name == "mask_rcnn":
                assert found.masks.shape == (len(found), HEIGHT, WIDTH)


def test_deformable_detr_takes_the_same_step_through_the_extension(build, monkeypatch):
    def through_the_extension(value, shapes, locations, weights):
        starts = torch.cat((shapes.new_zeros(1), shapes.prod(dim=1).cumsum(0)[:-1]))
        calls.append(len(shapes))
        apply = deform_attn.MultiScaleDeformableAttnFunction.apply
        return apply(value, shapes, starts, locations, weights, 64)

    calls, gradients = [], []
    for replace in (False, True):
        if replace:
            # mmcv takes the extension on accelerators only; this is its path there.
            name = "multi_scale_deformable_attn_pytorch"
            monkeypatch.setattr(deform_attn, name, through_the_extension)
        model = build("deformable_detr")
        train_step(model, "deformable_detr")
        gradients.append({key: value.grad for key, value in model.named_parameters()})
    assert calls == [4] * 3
    # The sums are in another order: half of float32's digits of the greatest gradient must agree.
    tolerance = torch.finfo(torch.float32).eps ** 0.5
    for key, expected in gradients[0].items():
        if expected is not None:
            scale = expected.abs().max()
            assert (gradients[1][key] - expected).abs().max() <= tolerance * scale, key


def test_mmdets_focal_loss_on_an_accelerator_equals_the_one_on_the_cpu():
    torch.manual_seed(0)
    logits, target = 3 * torch.randn(50, NUM_CLASSES), torch.randint(NUM_CLASSES + 1, (50,))
    results = []
    for function, labels in (
        (focal_loss.sigmoid_focal_loss, target),
        (
            focal_loss.py_sigmoid_focal_loss,
            torch.nn.functional.one_hot(target, NUM_CLASSES + 1)[:, :-1],
        ),
    ):
        leaf = logits.clone().requires_grad_()
        loss = function(leaf, labels, avg_factor=7)
        loss.backward()
        results.append((loss.detach(), leaf.grad))
    torch.testing.assert_close(results[0], results[1])


def test_these_models_run_on_the_stand_in():
    assert deform_attn.ext_module.__spec__.origin == mmcv_ops.__file__
