_base_ = [
    "../_base_/datasets/imagenet_384.py",
    "../_base_/schedules/maxvit_30e_in1k.py",
    "../_base_/runtime_classification.py",
]

# What this starts from: the published file, or a checkpoint of the 300-epoch config.
train_dataloader = dict(
    batch_size=16, dataset=dict(transform=dict(auto_augment="rand-m15-n2-p1.0"))
)
model = dict(
    type="ImageClassifier",
    model_name="maxvit_tiny.in1k_384",
    num_classes=1000,
    drop_path_rate=0.2,
    mixup=dict(mixup_alpha=0.8, cutmix_alpha=0.0, label_smoothing=0.1),
    init_cfg=dict(type="Pretrained", checkpoint="checkpoints/maxvit_tiny.pth"),
)
