_base_ = "upernet_dinat_large_160k_ade20k.py"

optim_wrapper = dict(type="AmpOptimWrapper")
model = dict(
    backbone=dict(
        model_name="dinat_s_large",
        drop_path_rate=0.3,
        init_cfg=dict(checkpoint="checkpoints/dinat_s_large.pth"),
    ),
)
