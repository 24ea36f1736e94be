"""What PyTorch is told of an operator: the one piece that registers each of them.

The fast paths of an operator run inside ``torch.ops.densezoo.<name>``, which compilers and
exporters keep as one node; its gradient is another operator. The definition in plain PyTorch is
called as it is. Both give the output and the natural logarithm of the softmax's denominators::

    <name>(*tensors, *geometry, float scale, str backend) -> (out, lse)
    <name>_backward(grad_out, [grad_lse,] *tensors, out, lse, *geometry, float scale,
                    [bool needs_<..>_grad,] str backend) -> gradients of the tensors

`geometry` is what describes the call beside tensors, in plain numbers; paths and the definition
get it as one object.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import runtime
from .checks import cast_under_autocast

Tensors = tuple[Tensor | None, ...]
Shape = Sequence[int]

_library = torch.library.Library("densezoo", "FRAGMENT")
registered: dict[str, Operator] = {}


class Operator:
    """An operator: its paths, its definition, and its registration with PyTorch.

    A path is a module with ``why_not(*tensors, geometry)``, which says why it cannot run a call
    or None, ``forward(*tensors, geometry, scale)``, which gives out and lse, and
    ``backward(grad_out, [grad_lse,] *tensors, out, lse, geometry, scale[, needs_<..>_grad])``,
    which gives a gradient for each tensor that has one, None for absent tensors. Neither is
    called for an empty batch.

    Args:
        name: its name in ``torch.ops.densezoo``.
        tensors: its tensors as in schemas, "Tensor query" or "Tensor? bias"; query is the first
            and value the third: the output has the shape of query with the channels of value.
        geometry: what else describes a call, as in schemas: "int[] kernel_size".
        make_geometry: gives the object that paths get for these numbers.
        as_arguments: gives the numbers of such an object.
        import_path: gives the module of a path, by the name of its backend, in order; Triton's is
            imported only where its kernels may run.
        reference: the definition, called as ``forward`` of a path.
        count_macs: gives the multiply-accumulates of a forward pass for the shapes of the tensors
            (None for absent ones) and the geometry.
        shared: the names of tensors that all images share, which vmap loops over.
        spared: the names of tensors whose gradients can be left out, all of them together.
        spared_as: what the flag for that calls them: "shared" gives "needs_shared_grad".
        indices: the names of tensors that have no gradient.
        uncast: the names of tensors that keep their dtype under autocast.
        has_lse_grad: whether lse has a gradient.
        lse_axes: gives the sizes of what axes lse has beyond those of query but the last one, for
            the geometry; by default none.
    """

    def __init__(
        self,
        name: str,
        *,
        tensors: Sequence[str],
        geometry: Sequence[str],
        make_geometry: Callable[..., Any],
        as_arguments: Callable[[Any], tuple[Any, ...]],
        import_path: Mapping[str, Callable[[], ModuleType]],
        reference: Callable[..., tuple[Tensor, Tensor]],
        count_macs: Callable[[Sequence[Shape | None], Any], int],
        shared: Sequence[str] = (),
        spared: Sequence[str] = (),
        spared_as: str = "",
        indices: Sequence[str] = (),
        uncast: Sequence[str] = (),
        has_lse_grad: bool = True,
        lse_axes: Callable[[Any], Sequence[int]] | None = None,
    ) -> None:
        names = [tensor.split()[1] for tensor in tensors]
        self.name = name
        self.count_macs = count_macs
        self.make_geometry = make_geometry
        self.num_tensors = len(tensors)
        self._as_arguments = as_arguments
        self._import_path = import_path
        self._reference = reference
        self._shared = [names.index(tensor) for tensor in shared]
        self._spared = [names.index(tensor) for tensor in spared]
        self._spared_as = spared_as
        self._cast = [i for i, tensor in enumerate(names) if tensor not in uncast]
        self._differentiable = [i for i, tensor in enumerate(names) if tensor not in indices]
        self._num_grads = 2 if has_lse_grad else 1
        self._lse_axes = lse_axes
        # A process has the operators once: the package imported anew takes those that are there.
        is_first = not hasattr(torch.ops.densezoo, name)
        if is_first:
            self._define(", ".join(tensors), ", ".join(geometry))
        self.forward = getattr(torch.ops.densezoo, name).default
        self.backward = getattr(torch.ops.densezoo, f"{name}_backward").default
        if is_first:
            self._register()
        registered[name] = self

    def __call__(
        self, tensors: Tensors, geometry: Any, scale: float, backend: str | None
    ) -> tuple[Tensor, Tensor]:
        """Run a call whose arguments are checked: the definition, or the operator."""
        name = self.choose(tensors, geometry, backend).backend
        if name == "reference":
            return self._reference(*tensors, geometry, scale)
        is_traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
        if is_traced and runtime.requested_backend(backend)[0] is None:
            name = ""  # chosen when it runs
        return self.forward(*tensors, *self._as_arguments(geometry), scale, name)

    def choose(self, tensors: Tensors, geometry: Any, backend: str | None = None) -> runtime.Choice:
        """Choose the path of a call whose arguments are checked."""
        refusals = self._refusals(tensors, geometry)
        refusals["reference"] = lambda: None
        return runtime.choose(self.name, refusals, backend)

    def explain(
        self, function: Callable[..., Any], check: Callable[..., tuple[Tensors, Any, float]]
    ) -> None:
        """Let :func:`densezoo.kernels.which_backend` tell the choice for calls of `function`.

        `check` takes those of its arguments that it names; it gives tensors, geometry and scale.
        """
        signature, taken = inspect.signature(function), inspect.signature(check).parameters

        def choose(*args: Any, **kwargs: Any) -> runtime.Choice:
            call = signature.bind(*args, **kwargs)
            call.apply_defaults()
            arguments = {key: arg for key, arg in call.arguments.items() if key in taken}
            tensors, geometry, _ = check(**arguments)
            return self.choose(tensors, geometry, call.arguments["backend"])

        runtime.register_chooser(function, choose)

    def _refusals(self, tensors: Tensors, geometry: Any) -> dict[str, Callable[[], str | None]]:
        return {
            backend: functools.partial(self._why_not, backend, tensors, geometry)
            for backend in self._import_path
        }

    def _why_not(self, backend: str, tensors: Tensors, geometry: Any) -> str | None:
        refusal = runtime.why_no_operator()
        if refusal is None and backend == "triton":
            refusal = runtime.why_no_triton(tensors[0].device)
        return refusal or self._import_path[backend]().why_not(*tensors, geometry)

    def _define(self, tensors: str, geometry: str) -> None:
        """Tell the schemas of the operator and of its gradient."""
        grads = ", ".join(("Tensor grad_out", "Tensor? grad_lse")[: self._num_grads])
        flag = f"bool needs_{self._spared_as}_grad, " if self._spared else ""
        returns = ", ".join("Tensor" for _ in self._differentiable)
        for schema in (
            f"{self.name}({tensors}, {geometry}, float scale, str backend) -> (Tensor, Tensor)",
            f"{self.name}_backward({grads}, {tensors}, Tensor out, Tensor lse, {geometry}, "
            f"float scale, {flag}str backend) -> ({returns})",
        ):
            _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))

    def _register(self) -> None:
        """Tell what the two compute, return, cost, and how they are transformed.

        One kernel stands for all devices; `backend` is the name of one, or empty: then the first
        that can is chosen when the operator runs, so that an exported program may move to another
        device.
        """
        forward, backward = self.forward.name(), self.backward.name()
        _library.impl(forward, self._run_forward, "CompositeExplicitAutograd")
        _library.impl(backward, self._run_backward, "CompositeExplicitAutograd")
        torch.library.register_fake(forward, self._fake_forward, lib=_library)
        torch.library.register_fake(backward, self._fake_backward, lib=_library)
        torch.library.register_autograd(
            forward, self._differentiate, setup_context=self._save_for_backward, lib=_library
        )
        torch.library.register_autograd(backward, self._refuse_second_derivative, lib=_library)
        torch.library.register_vmap(forward, self._vmap_forward, lib=_library)
        torch.library.register_vmap(
            backward, functools.partial(_vmap_loop, self.backward), lib=_library
        )
        for device_type, dispatch_key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
            for operator, cast in ((self.forward, self._cast), (self.backward, ())):
                kernel = functools.partial(_autocast, operator, device_type, cast)
                _library.impl(operator.name(), kernel, dispatch_key)
        _register_flop_formula(self.forward, self._forward_flops)
        _register_flop_formula(self.backward, self._backward_flops)
        # What torch.onnx.export looks at. Fake tensors look at both tables, at the second first.
        torch._decomp.decomposition_table[self.forward] = self._decompose
        torch._decomp.meta_table[self.forward] = self._fake_forward

    def _path(self, backend: str, tensors: Tensors, geometry: Any) -> ModuleType:
        """Get the module that runs a call of the operator."""
        if not backend:
            backend = runtime.first_able(self.name, self._refusals(tensors, geometry)).backend
        return self._import_path[backend]()

    def _run_forward(self, *args: Any) -> tuple[Tensor, Tensor]:
        tensors, (*numbers, scale, backend) = _split(args, self.num_tensors)
        if tensors[0].shape[0] == 0:
            return self._fake_forward(*args)
        geometry = self.make_geometry(*numbers)
        return self._path(backend, tensors, geometry).forward(*tensors, geometry, scale)

    def _fake_forward(self, *args: Any) -> tuple[Tensor, Tensor]:
        """Give what the operator returns, uninitialised."""
        (query, _, value, *_), (*numbers, _, _) = _split(args, self.num_tensors)
        lse_dtype = torch.promote_types(query.dtype, torch.float32)
        lse_axes = self._lse_axes(self.make_geometry(*numbers)) if self._lse_axes else ()
        return (
            query.new_empty((*query.shape[:-1], value.shape[-1])),
            query.new_empty((*query.shape[:-1], *lse_axes), dtype=lse_dtype),
        )

    def _run_backward(self, *args: Any) -> tuple[Tensor, ...]:
        grads, tensors, results, (*numbers, backend) = self._split_backward(args)
        is_needed = self._needed_grads(args)
        if tensors[0].shape[0] == 0:
            found = [
                None if tensors[i] is None else torch.zeros_like(tensors[i])
                for i in self._differentiable
            ]
        else:
            flags = [numbers.pop()] if self._spared else []
            *numbers, scale = numbers
            geometry = self.make_geometry(*numbers)
            path = self._path(backend, tensors, geometry)
            found = path.backward(*grads, *tensors, *results, geometry, scale, *flags)
        # Operators return no None, and what their fake says: contiguous tensors.
        return tuple(
            grad.contiguous() if needed else tensors[0].new_empty(0)
            for grad, needed in zip(found, is_needed, strict=True)
        )

    def _fake_backward(self, *args: Any) -> tuple[Tensor, ...]:
        _, tensors, _, _ = self._split_backward(args)
        return tuple(
            torch.empty_like(tensors[i], memory_format=torch.contiguous_format)
            if needed
            else tensors[0].new_empty(0)
            for i, needed in zip(self._differentiable, self._needed_grads(args), strict=True)
        )

    def _split_backward(self, args: tuple[Any, ...]) -> tuple[tuple[Any, ...], ...]:
        """Part the arguments of the gradient: cotangents, tensors, (out, lse), others."""
        return _split(args, self._num_grads, self.num_tensors, 2)

    def _needed_grads(self, args: tuple[Any, ...]) -> list[bool]:
        """Tell which gradients a call of the gradient has to give, of those that there can be."""
        _, tensors, _, (*_, flag, _) = self._split_backward(args)
        left_out = self._spared if self._spared and not flag else ()
        return [tensors[i] is not None and i not in left_out for i in self._differentiable]

    def _save_for_backward(
        self, ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]
    ) -> None:
        tensors, ctx.arguments = _split(inputs, self.num_tensors)
        ctx.save_for_backward(*tensors, *output)
        ctx.set_materialize_grads(False)
        if self._num_grads == 1:
            ctx.mark_non_differentiable(output[1])

    def _differentiate(
        self, ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        *tensors, out, lse = ctx.saved_tensors
        *numbers, backend = ctx.arguments
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        needed = ctx.needs_input_grad
        flags = [any(needed[i] for i in self._spared)] if self._spared else []
        found = self.backward(
            *(grad_out, grad_lse)[: self._num_grads], *tensors, out, lse, *numbers, *flags, backend
        )
        grads: list[Tensor | None] = [None] * (len(tensors) + len(ctx.arguments))
        for i, grad in zip(self._differentiable, found, strict=True):
            grads[i] = grad if needed[i] else None
        return tuple(grads)

    def _refuse_second_derivative(self, ctx: Any, *grads: Tensor | None) -> None:
        raise RuntimeError(
            f"{self.name} has second derivatives with backend='reference' alone: take it for calls "
            "that are differentiated twice"
        )

    def _vmap_forward(
        self, info: Any, in_dims: tuple[int | None, ...], *args: Any
    ) -> tuple[Any, Any]:
        """Fold the mapped axis into the batch; loop over it if what images share has it."""
        if any(in_dims[i] is not None for i in self._shared):
            return _vmap_loop(self.forward, info, in_dims, *args)
        folded = list(args)
        for i in range(self.num_tensors):
            if args[i] is not None and i not in self._shared:
                folded[i] = _mapped_first(args[i], in_dims[i], info.batch_size).flatten(0, 1)
        outputs = self.forward(*folded)
        return tuple(output.unflatten(0, (info.batch_size, -1)) for output in outputs), (0, 0)

    def _decompose(self, *args: Any) -> tuple[Tensor, Tensor]:
        """Give the operator in plain PyTorch, which ONNX files are made of."""
        tensors, (*numbers, scale, _) = _split(args, self.num_tensors)
        return self._reference(*tensors, self.make_geometry(*numbers), scale)

    def _forward_flops(self, *args: Any, **kwargs: Any) -> int:
        """FLOPs of the operator, 2 a multiply-accumulate; of tensors there are the shapes."""
        shapes, (*numbers, _, _) = _split(args, self.num_tensors)
        return 2 * self.count_macs(shapes, self.make_geometry(*numbers))

    def _backward_flops(self, *args: Any, **kwargs: Any) -> int:
        """FLOPs of its gradient: twice the products, logits made again count once."""
        _, shapes, _, numbers = self._split_backward(args)
        numbers = numbers[: -3 if self._spared else -2]
        return 4 * self.count_macs(shapes, self.make_geometry(*numbers))


def _split(args: tuple[Any, ...], *sizes: int) -> list[tuple[Any, ...]]:
    """Part arguments into groups of these sizes and the rest."""
    parts, start = [], 0
    for size in sizes:
        parts.append(args[start : start + size])
        start += size
    return [*parts, args[start:]]


def _autocast(
    operator: torch._ops.OpOverload, device_type: str, cast: Sequence[int], *args: Any
) -> Any:
    """Cast the arguments at these places as autocast would and run the operator outside of it.

    None of a gradient's are: they have the dtypes that the forward pass gave them.
    """
    given = list(args)
    if cast:
        for i, tensor in zip(cast, cast_under_autocast(args[i] for i in cast), strict=True):
            given[i] = tensor
    with torch.autocast(device_type, enabled=False):
        return operator(*given)


def _mapped_first(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    return tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def _vmap_loop(
    operator: torch._ops.OpOverload, info: Any, in_dims: tuple[int | None, ...], *args: Any
) -> tuple[Any, Any]:
    """Run the operator for each entry of the mapped axis."""
    results = [
        operator(
            *(
                arg.select(dim, index) if isinstance(dim, int) else arg
                for arg, dim in zip(args, in_dims, strict=True)
            )
        )
        for index in range(info.batch_size)
    ]
    outputs = tuple(torch.stack(output) for output in zip(*results, strict=True))
    return outputs, (0,) * len(outputs)


def _register_flop_formula(operator: torch._ops.OpOverload, flops: Callable[..., int]) -> None:
    """Let torch.utils.flop_counter count the operator."""
    logger = logging.getLogger("torch.utils.flop_counter")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it warns on import where there is no Triton; ours is silent
    try:
        from torch.utils.flop_counter import register_flop_formula
    finally:
        logger.setLevel(level)
    register_flop_formula(operator.overloadpacket)(flops)
