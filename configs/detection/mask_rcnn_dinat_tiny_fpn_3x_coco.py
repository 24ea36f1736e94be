_base_ = "mask_rcnn_nat_mini_fpn_3x_coco.py"

model = dict(
    backbone=dict(
        model_name="dinat_tiny",
        drop_path_rate=0.2,
        model_kwargs=dict(dilations="coco"),
        init_cfg=dict(checkpoint="checkpoints/dinat_tiny.pth"),
    ),
)
