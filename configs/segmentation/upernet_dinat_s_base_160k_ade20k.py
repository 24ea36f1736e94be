_base_ = "upernet_nat_mini_160k_ade20k.py"

model = dict(
    backbone=dict(
        model_name="dinat_s_base",
        drop_path_rate=0.3,
        model_kwargs=dict(dilations="ade20k"),
        init_cfg=dict(checkpoint="checkpoints/dinat_s_base.pth"),
    ),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512),
)
