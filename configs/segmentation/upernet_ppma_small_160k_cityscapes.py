_base_ = "upernet_ppma_tiny_160k_cityscapes.py"

model = dict(
    backbone=dict(
        model_name="ppma_small",
        drop_path_rate=0.15,
        init_cfg=dict(checkpoint="checkpoints/ppma_small.pth"),
    ),
)
