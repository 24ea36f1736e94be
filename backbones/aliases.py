"""Names that the authors' own code gives to models of the zoo, in one table.

Each is registered in timm beside ours, unless timm has a model of that name; ours are the ones
that `list_backbones` lists and that a built model says it is.
"""

# Official name -> name of the zoo.
ALIASES: dict[str, str] = {
    # github.com/Tianfang-Zhang/CAS-ViT
    "rcvit_xs": "cas_vit_xs",
    "rcvit_s": "cas_vit_s",
    "rcvit_m": "cas_vit_m",
    "rcvit_t": "cas_vit_t",
    # github.com/NVlabs/FasterViT: classifiers of one size, and those of any that is fixed when
    # they are built; ours are both.
    **{f"faster_vit_{i}_224": f"faster_vit_{i}" for i in range(7)},
    **{f"faster_vit_{i}_any_res": f"faster_vit_{i}" for i in range(7)},
    **{
        f"faster_vit_4_21k_{size}_any_res": f"faster_vit_4_21k_{size}"
        for size in (224, 384, 512, 768)
    },
    # github.com/zhongchenzhao/PPMA
    "PPMAViT_T": "ppma_tiny",
    "PPMAViT_S": "ppma_small",
    "PPMAViT_B": "ppma_base",
}
