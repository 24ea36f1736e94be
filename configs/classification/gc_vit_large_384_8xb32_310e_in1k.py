_base_ = [
    "../_base_/datasets/imagenet_384.py",
    "../_base_/schedules/gc_vit_384_310e_in1k.py",
    "../_base_/runtime_classification.py",
]

# Which weights the published one started from is not published: here those of 224 pixels.
train_dataloader = dict(batch_size=32, dataset=dict(transform=dict(interpolation="random")))
model = dict(
    type="ImageClassifier",
    model_name="gc_vit_large.in21k_ft_in1k_384",
    num_classes=1000,
    drop_path_rate=0.1,
    mixup=dict(mixup_alpha=0.8, cutmix_alpha=1.0, prob=1.0, switch_prob=0.5, label_smoothing=0.1),
    random_erasing=dict(probability=0.25, mode="pixel"),
    init_cfg=dict(type="Pretrained", checkpoint="checkpoints/gc_vit_large_in21k.pth"),
)
