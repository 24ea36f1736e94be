_base_ = [
    "../_base_/models/mask_rcnn_fpn.py",
    "../_base_/datasets/coco_instance_multiscale.py",
    "../_base_/schedules/ppma_3x_coco.py",
    "../_base_/runtime_detection.py",
]

model = dict(
    backbone=dict(
        model_name="ppma_base",
        drop_path_rate=0.4,
        out_norms=True,
        init_cfg=dict(type="Pretrained", checkpoint="checkpoints/ppma_base.pth"),
    ),
    neck=dict(in_channels=[80, 160, 320, 512]),
)
