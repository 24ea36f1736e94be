_base_ = [
    "../_base_/datasets/imagenet_384_center_crop.py",
    "../_base_/schedules/nat_30e_in1k.py",
    "../_base_/runtime_classification.py",
]

train_dataloader = dict(dataset=dict(transform=dict(interpolation="random")))
optim_wrapper = dict(optimizer=dict(weight_decay=1e-10))
model = dict(
    type="ImageClassifier",
    model_name="dinat_large_384",
    num_classes=1000,
    drop_path_rate=0.35,
    loss=dict(type="LabelSmoothingCrossEntropy", smoothing=0.1),
    random_erasing=dict(probability=0.25, mode="pixel"),
    init_cfg=dict(type="Pretrained", checkpoint="checkpoints/dinat_large_in22k_224.pth"),
)
