_base_ = [
    "../_base_/models/dino_4scale.py",
    "../_base_/datasets/coco_detection_multiscale.py",
    "../_base_/schedules/faster_vit_dino_1x_coco.py",
    "../_base_/runtime_detection.py",
]

model = dict(
    backbone=dict(
        model_name="faster_vit_0",
        drop_path_rate=0.1,
        out_norms=True,
        init_cfg=dict(type="Pretrained", checkpoint="checkpoints/faster_vit_0.pth"),
    ),
    neck=dict(in_channels=[128, 256, 512]),
)
