"""A wrong call of polyline attention is a ValueError that names the argument and what is taken."""

from functools import partial

import pytest
import torch

from densezoo.kernels import polyline_attention, which_backend

MAP = torch.zeros(2, 6, 8, 3, 8)
DECAY = -torch.ones(2, 6, 8, 3)


def zeros(*shape):
    return torch.zeros(*shape)


def maps(like):
    return dict.fromkeys(("query", "key", "value"), like)


def with_one(number):
    """Decays of which one is this number."""
    decays = DECAY.clone()
    decays[1, 4, 7, 2] = number
    return decays


# Changes of polyline_attention(query, key, value, log_alpha, log_beta), parts of what is said.
CALLS = {
    "query-none": (dict(query=None), "query is None: a tensor"),
    "alpha-none": (dict(log_alpha=None), "log_alpha is None: a tensor"),
    "beta-number": (dict(log_beta=-0.5), "log_beta is -0.5: a tensor"),
    "query-4-axes": (
        dict(query=zeros(2, 48, 3, 8)),
        "query has shape (2, 48, 3, 8): (B, H, W, heads, head_dim)",
    ),
    "empty-map": (maps(zeros(2, 6, 0, 3, 8)), "(2, 6, 0, 3, 8): a map of at least 1 token"),
    "no-heads": (maps(zeros(2, 6, 8, 0, 8)), "(2, 6, 8, 0, 8): at least 1 head"),
    "no-channels": (maps(zeros(2, 6, 8, 3, 0)), "at least 1 head of at least 1 channel"),
    "query-int": (maps(MAP.int()), "query has dtype torch.int32: a floating-point dtype"),
    "key-grid": (dict(key=zeros(2, 6, 7, 3, 8)), "key has shape (2, 6, 7, 3, 8)", "(2, 6, 8, 3, 8"),
    "key-dtype": (dict(key=MAP.double()), "key has dtype torch.float64", "torch.float32"),
    "value-grid": (
        dict(value=zeros(2, 8, 6, 3, 8)),
        "value has shape (2, 8, 6, 3, 8)",
        "(2, 6, 8, 3, value_dim)",
    ),
    "value-none": (dict(value=zeros(2, 6, 8, 3, 0)), "value has shape (2, 6, 8, 3, 0)"),
    "value-dtype": (dict(value=MAP.half()), "value has dtype torch.float16", "torch.float32"),
    "value-device": (dict(value=MAP.to("meta")), "value is on the device meta", "cpu"),
    "alpha-grid": (
        dict(log_alpha=zeros(2, 8, 6, 3)),
        "log_alpha has shape (2, 8, 6, 3): (B, H, W, heads) is taken, here (2, 6, 8, 3)",
    ),
    "beta-heads": (dict(log_beta=zeros(2, 6, 8, 1)), "log_beta has shape (2, 6, 8, 1)", "8, 3)"),
    "beta-axes": (dict(log_beta=zeros(3)), "log_beta has shape (3,)", "(B, H, W, heads)"),
    "alpha-double": (
        dict(log_alpha=DECAY.double()),
        "log_alpha has dtype torch.float64: torch.float32 or the dtype of query, torch.float32",
    ),
    "beta-half": (dict(log_beta=DECAY.half()), "log_beta has dtype torch.float16"),
    "beta-bfloat16-beside-half": (
        dict(maps(MAP.half()), log_beta=DECAY.bfloat16()),
        "log_beta has dtype torch.bfloat16: torch.float32 or the dtype of query, torch.float16",
    ),
    "alpha-int": (dict(log_alpha=DECAY.int()), "log_alpha has dtype torch.int32"),
    "beta-device": (dict(log_beta=DECAY.to("meta")), "log_beta is on the device meta", "cpu"),
    "alpha-positive": (
        dict(log_alpha=with_one(0.25)),
        "log_alpha holds 0.25: logarithms of decays, finite numbers of at most 0",
    ),
    "beta-positive": (dict(log_beta=with_one(2.0)), "log_beta holds 2.0: logarithms of decays"),
    "alpha-nan": (dict(log_alpha=with_one(float("nan"))), "log_alpha holds nan: logarithms"),
    "beta-infinite": (dict(log_beta=with_one(float("-inf"))), "log_beta holds -inf: logarithms"),
    "alpha-lowest": (
        dict(log_alpha=with_one(torch.finfo(torch.float32).min)),
        "log_alpha holds -3.4",
        "finite numbers of at most 0 whose sums along lines are finite",
    ),
    "form-unknown": (dict(form="chunk"), "form is 'chunk': 'full' or 'axial' is taken"),
    "form-none": (dict(form=None), "form is None: 'full' or 'axial'"),
    "form-list": (dict(form=["full"]), "form is ['full']: 'full' or 'axial'"),
    "paths-unknown": (dict(paths="column_first"), "paths is 'column_first': 'both' or 'row_first'"),
    "paths-number": (dict(paths=2), "paths is 2: 'both' or 'row_first'"),
    "scale-word": (dict(scale="1"), "scale is '1': a finite number"),
    "scale-nan": (dict(scale=float("nan")), "scale is nan: a finite number"),
    "scale-tensor": (dict(scale=zeros(1)), "scale is a tensor of shape (1,): a finite number"),
    "backend-unknown": (dict(backend="cuda"), "backend is 'cuda'", "triton, cpu, reference"),
    "backend-on-cpu": (
        dict(backend="triton"),
        "backend='triton' cannot run this call of polyline_attention",
        "the tensors are on the CPU",
    ),
}


@pytest.fixture(autouse=True)
def no_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.mark.parametrize("ask", [False, True], ids=["call", "which"])
@pytest.mark.parametrize("case", CALLS)
def test_a_wrong_call_of_polyline_attention_names_the_argument(case, ask):
    changes, *parts = CALLS[case]
    arguments = dict(query=MAP, key=MAP, value=MAP, log_alpha=DECAY, log_beta=DECAY) | changes
    call = partial(which_backend, polyline_attention) if ask else polyline_attention
    with pytest.raises(ValueError) as raised:
        call(**arguments)
    line = str(raised.value)
    assert "\n" not in line
    for part in parts:
        assert part in line, line


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("form", ["full", "axial"])
def test_polyline_attention_takes_any_strides(form, backend):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    strided = [
        normal(2, 5, 7, 3, 3, 8).unbind(3)[1],  # of a product of query, key and value
        normal(2, 3, 8, 5, 7).permute(0, 3, 4, 1, 2),  # channels first
        normal(5, 1, 3, 4).expand(2, 5, 7, 3, 4),  # one column for all, one image for both
        -normal(3).abs().expand(2, 5, 7, 3),  # one decay a head
        -normal(3, 14, 5, 2).abs()[:, ::2].permute(3, 2, 1, 0),
    ]
    results = []
    for tensors in (strided, [tensor.contiguous() for tensor in strided]):
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        out = polyline_attention(*leaves, form=form, backend=backend)
        assert out.is_contiguous()
        results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)
