_base_ = "biformer_tiny_8xb128_300e_in1k.py"

model = dict(model_name="biformer_stl", drop_path_rate=0.1)
