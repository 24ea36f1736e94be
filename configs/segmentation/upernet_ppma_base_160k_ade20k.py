_base_ = "upernet_ppma_tiny_160k_ade20k.py"

model = dict(
    backbone=dict(
        model_name="ppma_base",
        drop_path_rate=0.4,
        init_cfg=dict(checkpoint="checkpoints/ppma_base.pth"),
    ),
    decode_head=dict(in_channels=[80, 160, 320, 512]),
    auxiliary_head=dict(in_channels=320),
)
