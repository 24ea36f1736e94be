_base_ = [
    "../_base_/models/mask_rcnn_fpn.py",
    "../_base_/datasets/coco_instance_multiscale.py",
    "../_base_/schedules/nat_3x_coco.py",
    "../_base_/runtime_detection.py",
]

model = dict(
    backbone=dict(
        model_name="nat_mini",
        drop_path_rate=0.2,
        out_norms=True,
        init_cfg=dict(type="Pretrained", checkpoint="checkpoints/nat_mini.pth"),
    ),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
