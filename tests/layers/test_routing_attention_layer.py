"""The layer of routing attention: the authors' module in all its forms, padding, options."""

import json
import zlib

import numpy as np
import pytest
import torch
from oracles import DATA, error, image, make_state_dict, relative_error
from torch.nn import functional as F

from densezoo.layers.routing_attention import RoutingAttention

FILE = json.loads((DATA / "ops" / "bra2d.json").read_text())
MODULES = {case["name"]: case for case in FILE["cases"] if case["op"] == "bra2d_module"}
NAMES = {
    "lepe": "lepe", "qkv.qkv": "qkv", "wo": "proj",
}  # fmt: skip


def tensor_of(case, name):
    """An input of a case, as the file says how it is made."""
    shape = case["inputs"][name]
    rng = np.random.RandomState(zlib.crc32(f"{case['op']}:{name}:{case['seed']}:{shape}".encode()))
    return torch.from_numpy(rng.standard_normal(shape)).float()


def layer_of(case):
    """The layer that a case is of, with its weights."""
    args = case["args"]
    attn = RoutingAttention(
        args["dim"], args["num_heads"], args["n_win"], args["topk"],
        qk_dim=args.get("qk_dim"),
        lepe_kernel_size=args["side_dwconv"],
        has_proj=args.get("param_attention", "qkvo") == "qkvo",
        soft_routing=args.get("soft_routing", False),
        kv_pool_size=args.get("kv_per_win"),
    )  # fmt: skip
    state = make_state_dict(case["keys"], case["seed"])
    names = {f"{k}.{end}": f"{n}.{end}" for k, n in NAMES.items() for end in ("weight", "bias")}
    attn.load_state_dict({names[key]: value for key, value in state.items()})
    return attn


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize(
    "dtype, bound", [(torch.float64, 1e-6), (torch.float32, 1e-3)], ids=["float64", "float32"]
)
def test_it_is_the_authors_module(name, dtype, bound):
    case = MODULES[name]
    attn = layer_of(case).to(dtype)
    x, g = (tensor_of(case, part).to(dtype) for part in ("x", "g"))
    out = attn(x.requires_grad_())
    (out * g).sum().backward()
    found = dict(out=out, grad_x=x.grad, grad_qkv_weight=attn.qkv.weight.grad)
    assert found.keys() == case["outputs"].keys()
    errors = {key: error(case["outputs"][key], value) for key, value in found.items()}
    assert max(errors.values()) < bound, errors
    with torch.no_grad():  # by other kernels
        assert error(case["outputs"]["out"], attn(x)) < bound


def noisy(*args, seed=0, **kwargs):
    """A layer in float64 whose every parameter is noise."""
    attn = RoutingAttention(*args, **kwargs).double()
    generator = torch.Generator().manual_seed(seed)
    for parameter in attn.parameters():
        parameter.data.normal_(std=0.5, generator=generator)
    return attn


def tokens(*size, dim=8, batch=2, seed=0):
    return image(*size, batch=batch, chans=dim, seed=seed).double().permute(0, 2, 3, 1)


SIZES = [(12, 12), (13, 10), (5, 21), (4, 4), (3, 2), (1, 9), (1, 1)]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_padded_it_is_the_layer_of_a_padded_input(size):
    attn = noisy(8, 2, 4, 3)
    x = tokens(*size)
    height, width = size
    padded = F.pad(x, (0, 0, 0, -width % 4, 0, -height % 4))
    with torch.no_grad():
        expected = attn(padded)[:, :height, :width]
        assert relative_error(attn(x), expected) < 1e-12
    assert relative_error(attn(x), expected) < 1e-12


def full_attention(attn, x):
    """Attention of all tokens to all, and to zeros `extra` times, with LePE."""
    batch, height, width, dim = x.shape
    query, key, value = attn.qkv(x).flatten(1, 2).split(
        [attn.qk_dim, attn.qk_dim, dim], dim=-1
    )  # fmt: skip
    parts = [p.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2) for p in (query, key, value)]
    out = F.scaled_dot_product_attention(*parts, scale=attn.scale).transpose(1, 2)
    out = out.reshape(batch, height, width, dim)
    lepe = attn.lepe(value.reshape(batch, height, width, dim).permute(0, 3, 1, 2))
    return attn.proj(out + lepe.permute(0, 2, 3, 1))


@pytest.mark.parametrize("size", [(8, 12), (4, 4)], ids=str)
@pytest.mark.parametrize("options", [{}, dict(is_ragged=True), dict(qk_dim=4)], ids=str)
def test_routing_to_all_regions_is_full_attention(size, options):
    attn = noisy(8, 2, 4, 16, **options)
    x = tokens(*size)
    with torch.no_grad():
        assert relative_error(attn(x), full_attention(attn, x)) < 1e-12


@pytest.mark.parametrize("size", [(3, 5), (1, 1), (2, 4)], ids=str)
def test_ragged_maps_of_fewer_regions_than_topk_are_attended_to_whole(size):
    attn = noisy(8, 2, 7, 16, is_ragged=True)
    x = tokens(*size)
    with torch.no_grad():
        assert relative_error(attn(x), full_attention(attn, x)) < 1e-12


@pytest.mark.parametrize("is_ragged", [False, True])
def test_compiled_it_is_one_graph_at_any_size(is_ragged):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    attn = noisy(8, 2, 4, 9, is_ragged=is_ragged)
    compiled = torch.compile(attn, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in [(13, 9), (12, 16), (2, 3), (3, 12), (7, 2), (40, 5)]:
        x = tokens(*size)
        result, expected = compiled(x), attn(x)
        assert relative_error(result, expected) < 1e-10, size
        weight = tokens(*size, seed=1)
        leaves = list(attn.parameters())
        actual = torch.autograd.grad((result * weight).sum(), leaves)
        wanted = torch.autograd.grad((expected * weight).sum(), leaves)
        for a, e in zip(actual, wanted, strict=True):
            assert torch.allclose(a, e, atol=1e-10)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("options", [{}, dict(is_ragged=True), dict(soft_routing=True)], ids=str)
def test_bfloat16_and_autocast_give_their_dtype(options):
    attn = noisy(8, 2, 4, 3, **options).float()
    x = tokens(5, 9).float()
    with torch.autocast("cpu", torch.bfloat16):
        result = attn(x)
    assert result.dtype == attn.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


def test_soft_routing_passes_no_gradient_through_its_weights():
    attn = noisy(8, 2, 4, 1, soft_routing=True)
    plain = noisy(8, 2, 4, 1)
    x = tokens(9, 8)
    # Of one region routed to the weight is one.
    assert relative_error(attn(x), plain(x)) < 1e-12
    for a, b in zip(
        torch.autograd.grad(attn(x).square().sum(), list(attn.parameters())),
        torch.autograd.grad(plain(x).square().sum(), list(plain.parameters())),
        strict=True,
    ):
        assert torch.allclose(a, b, atol=1e-10)


@pytest.mark.parametrize("size", [(48, 64), (45, 61)], ids=["whole", "padded"])
@pytest.mark.parametrize("topk", [1, 16])
def test_training_keeps_no_copies_of_keys_values_or_weights_of_attention(size, topk):
    attn = RoutingAttention(64, 2, 8, topk)
    x = tokens(*size, dim=64).float().contiguous().requires_grad_()
    own = {p.untyped_storage().data_ptr() for p in [x, *attn.parameters()]}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        attn(x)
    # Queries, keys and values in one, results, and what the projection gets; of a padded map its
    # values once more. Beside them routes and two numbers a token.
    maps = 5 + (size == (45, 61)) * 48 * 64 / (45 * 61)
    assert sum(kept.values()) < (maps + 0.2) * x.nbytes


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(num_heads=3), "num_heads is 3: a divisor of dim 8"),
        (dict(qk_dim=7), "num_heads is 2: a divisor of dim 8 and qk_dim 7"),
        (dict(num_heads=0), "num_heads is 0"),
        (dict(dim=0), "dim is 0"),
        (dict(num_regions=0), "num_regions is 0"),
        (dict(num_regions=True), "num_regions is True"),
        (dict(topk=17), "topk is 17: at most 16 is taken, .* num_regions=4"),
        (dict(topk=0), "topk is 0"),
        (dict(scale=-1), "scale is -1"),
        (dict(lepe_kernel_size=4), "lepe_kernel_size is 4: 0 or an odd"),
        (dict(is_ragged=None), "is_ragged is None"),
        (dict(kv_pool_size=0), "kv_pool_size is 0"),
        (dict(is_ragged=True, soft_routing=True), "soft_routing and kv_pool_size .* is_ragged"),
        (dict(is_ragged=True, kv_pool_size=2), "soft_routing and kv_pool_size .* is_ragged"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        RoutingAttention(**{"dim": 8, "num_heads": 2, "num_regions": 4, "topk": 3, **arguments})
