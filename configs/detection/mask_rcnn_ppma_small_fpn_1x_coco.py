_base_ = "mask_rcnn_ppma_tiny_fpn_1x_coco.py"

model = dict(
    backbone=dict(
        model_name="ppma_small",
        drop_path_rate=0.15,
        init_cfg=dict(checkpoint="checkpoints/ppma_small.pth"),
    ),
)
