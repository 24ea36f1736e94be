_base_ = "dinat_large_8xb64_30e_in1k.py"

model = dict(
    model_name="dinat_s_large",
    init_cfg=dict(checkpoint="checkpoints/dinat_s_large_in22k_224.pth"),
)
