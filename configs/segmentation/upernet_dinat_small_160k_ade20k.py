_base_ = "upernet_nat_mini_160k_ade20k.py"

model = dict(
    backbone=dict(
        model_name="dinat_small",
        drop_path_rate=0.5,
        model_kwargs=dict(dilations="ade20k"),
        init_cfg=dict(checkpoint="checkpoints/dinat_small.pth"),
    ),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
