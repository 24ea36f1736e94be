_base_ = [
    "../_base_/datasets/imagenet.py",
    "../_base_/schedules/nat_30e_in1k.py",
    "../_base_/runtime_classification.py",
]

train_dataloader = dict(batch_size=64, dataset=dict(transform=dict(interpolation="random")))
# Starts from the published weights of ImageNet-22k, whose classifier is left out.
model = dict(
    type="ImageClassifier",
    model_name="dinat_large",
    num_classes=1000,
    drop_path_rate=0.35,
    loss=dict(type="LabelSmoothingCrossEntropy", smoothing=0.1),
    random_erasing=dict(probability=0.25, mode="pixel"),
    init_cfg=dict(type="Pretrained", checkpoint="checkpoints/dinat_large_in22k_224.pth"),
)
