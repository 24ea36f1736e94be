_base_ = "maxvit_tiny_8xb64_300e_in1k.py"

model = dict(model_name="maxvit_base", drop_path_rate=0.4)
