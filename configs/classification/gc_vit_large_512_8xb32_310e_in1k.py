"""GC ViT-L at 512 pixels: the recipe is not published; here that of 384 pixels."""

_base_ = "gc_vit_large_384_8xb32_310e_in1k.py"

train_dataloader = dict(dataset=dict(input_size=512))
val_dataloader = dict(dataset=dict(input_size=512))
test_dataloader = val_dataloader
model = dict(model_name="gc_vit_large.in21k_ft_in1k_512")
