"""Windows, padding to them, position biases and their resizing are written once in the project.

The sources of backbones and layers are searched for the ways in which such code is written. Each
may stand where it is listed and nowhere else; what is listed has to be found, or the search looks
for nothing.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

HOMES = {
    "tokens are regrouped into windows, or back": {
        "layers/windows.py: partition",
        "layers/windows.py: merge",
        "layers/conv.py: Conv.forward",  # the patches that a convolution takes
    },
    "positions of whole maps are counted, for an order of their tokens": {
        "layers/token_order.py: _compute",
    },
    "windows are viewed on a map's memory": {"layers/window_attention.py: _windows_of"},
    "a length is rounded up to a multiple": {"layers/resolution.py: padded_length"},
    "positions are subtracted pair by pair": {"layers/rel_pos.py: rel_pos_bias_of_pairs"},
    "coordinates are paired": {"layers/rel_pos.py: _grid"},
    "a tensor is interpolated": {
        "layers/rel_pos.py: resize_rel_pos_bias",
        "backbones/gc_vit.py: GlobalQuery.forward",  # a map of features, to a window
    },
}

# Each is a way of writing what the heading says.
COPIES = {
    "tokens are regrouped into windows, or back": [
        "x.view(b, h // 7, 7, w // 7, 7, c).permute(0, 1, 3, 2, 4, 5)",
        "torch.permute(x, (0, 2, 4, 1, 3, 5))",
        "x.reshape(b, h // 7, 7, w // 7, 7, c).transpose(2, 3)",
        "x.unflatten(1, (-1, 7)).unflatten(3, (-1, 7)).transpose(2, 3).flatten(3, 4)",
        "x.unflatten(1, (rows, 7, columns, 7)).swapaxes(2, 3)",
        "rearrange(x, 'b (h i) (w j) c -> (b h w) (i j) c', i=7, j=7)",
        "F.unfold(x, 7, stride=7)",
        "F.pixel_unshuffle(x, 7)",
        "x = x.view(b, h // 7, 7, w // 7, 7, c); x = x.transpose(2, 3)",
        "x = x.unflatten(2, (-1, 7)).unflatten(1, (-1, 7)); x = x.transpose(2, 3)",
        "x = windows.reshape(b, height // 7, width // 7, 7, 7, c); x = x.transpose(2, 3)",
    ],
    "positions of whole maps are counted, for an order of their tokens": [
        "t = torch.arange(batch * height * width)",
        "index = torch.arange(height * width).view(height, width)",
    ],
    "windows are viewed on a map's memory": [
        "x.as_strided((b, h, w, 7, 7, c), strides)",
        "x.unfold(1, 7, 7).unfold(2, 7, 7)",
    ],
    "a length is rounded up to a multiple": [
        "F.pad(x, (0, 0, 0, (side - w % side) % side))",
        "F.pad(x, (0, 0, 0, -w % side, 0, -h % side))",
        "missing = (side - length % side) % side",
        "padded = math.ceil(length / side) * side",
        "padded = -(-length // side) * side",
        "padded = side * ((length + side - 1) // side)",
        "padded = num_windows(length, side) * side",
    ],
    "positions are subtracted pair by pair": [
        "index = y[None, :] - y[:, None] + height - 1",
        "relative = coords[:, :, None] - coords[:, None, :]",
        "offset = position.unsqueeze(0) - position.unsqueeze(1)",
        "offset = torch.arange(n) - torch.arange(n)[:, None]",
    ],
    "coordinates are paired": [
        "torch.meshgrid(y, x, indexing='ij')",
        "torch.cartesian_prod(y, x)",
    ],
    "a tensor is interpolated": [
        "F.interpolate(table[None], size=(13, 13), mode='bicubic')",
        "nn.Upsample(size=(13, 13))",
        "F.grid_sample(table, grid)",
    ],
}

# Code that has something of these, and is none.
OTHERS = [
    "qkv.reshape(b, n, 3, heads, d).permute(2, 0, 3, 1, 4)",
    "x.permute(0, 2, 3, 1).flatten(1, 2)",
    "x.unflatten(-1, (3, heads, -1)).unbind(2)",
    "query.transpose(1, 2).flatten(2)",
    "F.pad(x, (0, patch_size - 1, 0, patch_size - 1))",
    "F.pad(x, (x.shape[3] % 2, 1, x.shape[2] % 2, 1))",
    "num_windows(length, side)",
    "torch.arange(count * self.side)",
    "sides = [-(-int(pixels) // 32) for pixels in sizes]",
    "y - y.mean()",
    "x[:, None] + bias[None]",
]


def called(node: ast.AST) -> str:
    """The name of the function or method that a call calls, "" for other nodes."""
    if not isinstance(node, ast.Call):
        return ""
    return getattr(node.func, "attr", getattr(node.func, "id", ""))


def chain(node: ast.AST) -> list[ast.Call]:
    """A call and those on whose result it is a method: f, then g, for x.g().f()."""
    calls = []
    while isinstance(node, ast.Call):
        calls.append(node)
        node = node.func.value if isinstance(node.func, ast.Attribute) else None
    return calls


def axes_given(call: ast.Call) -> int:
    """How many values the longest argument or all of a call's arguments make."""
    lists = [len(a.elts) for a in call.args if isinstance(a, (ast.Tuple, ast.List))]
    return max([len(call.args), *lists])


def regroups(node: ast.AST) -> bool:
    if called(node) in ("rearrange", "pixel_unshuffle", "pixel_shuffle"):
        return True
    if called(node) == "unfold" and isinstance(node.func.value, ast.Name):
        return node.func.value.id == "F"
    if called(node) == "permute":
        return axes_given(node) >= 6
    if called(node) in ("view", "reshape"):
        return ast.unparse(node).count("//") >= 2
    if called(node) == "unflatten":
        splits = [call for call in chain(node) if called(call) == "unflatten"]
        return (
            sum("-1" in ast.unparse(c.args[1]) or "//" in ast.unparse(c.args[1]) for c in splits)
            >= 2
        )
    if called(node) not in ("transpose", "swapaxes", "swapdims", "movedim"):
        return False
    before = chain(node)[1:]
    splits = [call for call in before if called(call) == "unflatten"]
    is_split_whole = any(called(c) in ("view", "reshape") and axes_given(c) >= 6 for c in before)
    return len(splits) >= 2 or is_split_whole or any(axes_given(c) >= 4 for c in splits)


def counts_positions(node: ast.AST) -> bool:
    if called(node) != "arange" or len(node.args) != 1:
        return False
    names = {name.id for name in ast.walk(node.args[0]) if isinstance(name, ast.Name)}
    is_product = isinstance(node.args[0], ast.BinOp) and isinstance(node.args[0].op, ast.Mult)
    return is_product and len({n for n in names if n.islower() and n != "self"}) >= 2


def views_windows(node: ast.AST) -> bool:
    if called(node) == "unfold" and isinstance(node.func.value, ast.Name):
        return node.func.value.id != "F"
    return called(node) in ("as_strided", "unfold")


def rounds_up(node: ast.AST) -> bool:
    """Whether a quotient, rounded up, is multiplied again, or what is missing to it is computed."""
    if not isinstance(node, ast.BinOp):
        return False
    if isinstance(node.op, ast.Mult):
        for quotient, side in ((node.left, node.right), (node.right, node.left)):
            text = ast.unparse(quotient)
            is_up = text.startswith("-(-") or "ceil" in text or called(quotient) == "num_windows"
            is_up = is_up or ("//" in text and "- 1" in text)
            if is_up and ast.unparse(side) in text:
                return True
    if not isinstance(node.op, ast.Mod) or isinstance(node.right, ast.Constant):
        return False
    side, left = ast.unparse(node.right), node.left
    if isinstance(left, ast.UnaryOp):
        return isinstance(left.op, ast.USub)
    return (
        isinstance(left, ast.BinOp)
        and isinstance(left.op, ast.Sub)
        and ast.unparse(left.left) == side
    )


def without_new_axes(node: ast.AST) -> tuple[str, str]:
    """What is indexed or unsqueezed alone, and how."""
    if isinstance(node, ast.Subscript):
        how = ast.unparse(node.slice)
        return (ast.unparse(node.value), how) if "None" in how else (ast.unparse(node), "")
    if called(node) == "unsqueeze":
        return ast.unparse(node.func.value), ast.unparse(node.args[0])
    return ast.unparse(node), ""


def subtracts_pairs(node: ast.AST) -> bool:
    if not (isinstance(node, ast.BinOp) and isinstance(node.op, ast.Sub)):
        return False
    (left, how_left), (right, how_right) = map(without_new_axes, (node.left, node.right))
    return left == right and how_left != how_right


def pairs_coordinates(node: ast.AST) -> bool:
    return called(node) in ("meshgrid", "cartesian_prod")


def interpolates(node: ast.AST) -> bool:
    return called(node) in ("interpolate", "Upsample", "upsample", "grid_sample")


SEARCHES = dict(
    zip(
        HOMES,
        (
            regroups,
            counts_positions,
            views_windows,
            rounds_up,
            subtracts_pairs,
            pairs_coordinates,
            interpolates,
        ),
        strict=True,
    )
)


def find(source: str, search) -> set[str]:
    """Names of the functions of a source, with their classes', where something is found."""
    found = set()

    def visit(node: ast.AST, scope: tuple[str, ...]) -> None:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            scope = (*scope, node.name)
        if search(node):
            found.add(".".join(scope))
        for child in ast.iter_child_nodes(node):
            visit(child, scope)

    visit(ast.parse(source), ())
    return found


@pytest.mark.parametrize("what", HOMES)
def test_it_is_written_where_it_belongs_and_nowhere_else(what):
    places = set()
    for folder in ("backbones", "layers"):
        for path in sorted((ROOT / folder).glob("*.py")):
            for name in find(path.read_text(encoding="utf-8"), SEARCHES[what]):
                places.add(f"{folder}/{path.name}: {name}")
    assert places == HOMES[what]


@pytest.mark.parametrize("what", COPIES)
def test_a_copy_is_found_however_it_is_written(what):
    for line in COPIES[what]:
        assert find(f"def copied():\n    {line}", SEARCHES[what]) == {"copied"}, line


@pytest.mark.parametrize("what", SEARCHES)
def test_other_code_is_not_taken_for_it(what):
    for line in OTHERS:
        assert not find(line, SEARCHES[what]), line
