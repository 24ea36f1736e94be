_base_ = [
    "../_base_/models/retinanet_fpn.py",
    "../_base_/datasets/coco_detection.py",
    "../_base_/schedules/cas_vit_1x_coco.py",
    "../_base_/runtime_detection.py",
]

model = dict(
    backbone=dict(
        model_name="cas_vit_xs",
        drop_path_rate=0.0,
        norm_eval=True,
        out_norms=True,
        init_cfg=dict(type="Pretrained", checkpoint="checkpoints/cas_vit_xs.pth"),
    ),
    neck=dict(in_channels=[56, 112, 220]),
)
