"""MaxViT-T with UPerNet: not published; here the recipe of PPMA."""

_base_ = [
    "../_base_/models/upernet_slide.py",
    "../_base_/datasets/ade20k_keep_ratio.py",
    "../_base_/schedules/ppma_160k_ade20k.py",
    "../_base_/runtime_segmentation.py",
]

model = dict(
    backbone=dict(
        model_name="maxvit_tiny",
        drop_path_rate=0.2,
        model_kwargs=dict(window_size=16, grid_size=16),
        init_cfg=dict(type="Pretrained", checkpoint="checkpoints/maxvit_tiny.pth"),
    ),
    decode_head=dict(in_channels=[64, 128, 256, 512]),
    auxiliary_head=dict(in_channels=256),
)
