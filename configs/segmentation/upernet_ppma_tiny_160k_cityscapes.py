_base_ = [
    "../_base_/models/upernet_slide_cityscapes.py",
    "../_base_/datasets/cityscapes_1024.py",
    "../_base_/schedules/ppma_160k_cityscapes.py",
    "../_base_/runtime_segmentation.py",
]

model = dict(
    backbone=dict(
        model_name="ppma_tiny",
        drop_path_rate=0.1,
        out_norms=True,
        init_cfg=dict(type="Pretrained", checkpoint="checkpoints/ppma_tiny.pth"),
    ),
    decode_head=dict(in_channels=[64, 128, 256, 512]),
    auxiliary_head=dict(in_channels=256),
)
