_base_ = [
    "../_base_/models/mask_rcnn_fpn.py",
    "../_base_/datasets/coco_instance_multiscale.py",
    "../_base_/schedules/gc_vit_3x_coco.py",
    "../_base_/runtime_detection.py",
]

# In the published recipe tables of positions decay here, other than with Cascade Mask R-CNN.
optim_wrapper = dict(
    type="AmpOptimWrapper",
    paramwise_cfg=dict(custom_keys={"rel_pos_bias": dict(decay_mult=1.0)}),
)
model = dict(
    backbone=dict(
        model_name="gc_vit_tiny",
        drop_path_rate=0.2,
        out_norms=True,
        init_cfg=dict(type="Pretrained", checkpoint="checkpoints/gc_vit_tiny.pth"),
    ),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
