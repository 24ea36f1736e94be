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
}
