"""ImageNet-1k as class folders, ``data/imagenet/{train,val}/n01440764/*.JPEG``, at 224 pixels.

Tar files, WebDataset shards and Hugging Face data sets are read with other values of
``train_dataloader.dataset.{root,name,split}``: see ``densezoo.tools.engine.timm_dataset``.
"""

train_dataloader = dict(
    batch_size=128,
    num_workers=8,
    persistent_workers=True,
    pin_memory=True,
    drop_last=True,
    collate_fn=dict(type="default_collate"),
    sampler=dict(type="DefaultSampler", shuffle=True),
    dataset=dict(
        type="TimmDataset",
        root="data/imagenet",
        split="train",
        is_training=True,
        input_size=224,
        transform=dict(interpolation="bicubic", auto_augment="rand-m9-mstd0.5-inc1"),
    ),
)
val_dataloader = dict(
    batch_size=128,
    num_workers=8,
    persistent_workers=True,
    pin_memory=True,
    collate_fn=dict(type="default_collate"),
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        type="TimmDataset",
        root="data/imagenet",
        split="val",
        input_size=224,
        transform=dict(interpolation="bicubic", crop_pct=0.875),
    ),
)
test_dataloader = val_dataloader

val_evaluator = dict(type="TopKAccuracy", topk=(1, 5))
test_evaluator = val_evaluator
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
