_base_ = [
    "../_base_/models/upernet_slide.py",
    "../_base_/datasets/ade20k_keep_ratio.py",
    "../_base_/schedules/ppma_160k_ade20k.py",
    "../_base_/runtime_segmentation.py",
]

# The norms of the stem decay, whose names have no "norm" in the official code.
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={"model.stem": dict(decay_mult=1.0)}))
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
