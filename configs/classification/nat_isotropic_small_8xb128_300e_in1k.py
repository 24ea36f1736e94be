_base_ = "nat_mini_8xb128_300e_in1k.py"

model = dict(model_name="nat_isotropic_small", drop_path_rate=0.1)
