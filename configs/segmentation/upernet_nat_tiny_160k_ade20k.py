_base_ = "upernet_nat_mini_160k_ade20k.py"

model = dict(
    backbone=dict(
        model_name="nat_tiny",
        drop_path_rate=0.3,
        init_cfg=dict(checkpoint="checkpoints/nat_tiny.pth"),
    ),
)
