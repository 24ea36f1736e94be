_base_ = "dinat_large_384_8xb64_30e_in1k.py"

optim_wrapper = dict(optimizer=dict(weight_decay=1e-5))
model = dict(
    model_name="dinat_s_large_384",
    init_cfg=dict(checkpoint="checkpoints/dinat_s_large_in22k_224.pth"),
)
