_base_ = "upernet_nat_mini_160k_ade20k.py"

model = dict(
    backbone=dict(
        model_name="dinat_mini",
        drop_path_rate=0.2,
        model_kwargs=dict(dilations="ade20k"),
        init_cfg=dict(checkpoint="checkpoints/dinat_mini.pth"),
    ),
)
