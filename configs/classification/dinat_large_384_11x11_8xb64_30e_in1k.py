_base_ = "dinat_large_384_8xb64_30e_in1k.py"

# The weight decay of kernel 11 is not published: that of kernel 7 is taken.
model = dict(
    model_name="dinat_large_384_11x11",
    init_cfg=dict(checkpoint="checkpoints/dinat_large_in22k_224_11x11interp.pth"),
)
