"""FasterViT on ImageNet-1k: 310 epochs and 10 at the last rate (arXiv 2306.06189; TRAINING.md).

4096 images a step, here 8 GPUs x 128 x 4 accumulated batches; the same schedule as GC ViT's.
"""

_base_ = "gc_vit_310e_in1k.py"

randomness = dict(seed=31)
