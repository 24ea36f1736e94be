_base_ = "biformer_tiny_8xb128_300e_in1k.py"

# Not published: that of the same backbone with Semantic FPN, where the small one has its own 0.15.
model = dict(model_name="biformer_base", drop_path_rate=0.3)
