_base_ = "retinanet_cas_vit_xs_fpn_1x_coco.py"

model = dict(
    backbone=dict(
        model_name="cas_vit_t",
        drop_path_rate=0.1,
        init_cfg=dict(checkpoint="checkpoints/cas_vit_t.pth"),
    ),
    neck=dict(in_channels=[128, 256, 512]),
)
