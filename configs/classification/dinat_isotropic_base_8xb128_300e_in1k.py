_base_ = "nat_isotropic_base_8xb128_300e_in1k.py"

model = dict(model_name="dinat_isotropic_base")
