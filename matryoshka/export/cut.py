"""Reduce a recorded graph to what its outputs need.

A truncated embedding needs only some channels of the layers before it. `cut` moves its slice
towards the input, through every operation that treats channels one by one, into the weights of the
linear layers and convolutions that compute them; then it stores the sliced weights in place of the
whole ones. It stops at operations that mix channels, such as a layer norm.

The graph is that of `torch.export` after `run_decompositions({})`: no operation changes its input
in place. Nodes carry the shapes of their values, as fake tensors, in `meta["val"]`.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

aten = torch.ops.aten
SLICE = aten.slice.Tensor
END = torch.iinfo(torch.int64).max  # what torch writes for the end of `x[:]`

# Each output element depends on the elements of the inputs at the same, broadcast, position.
ELEMENTWISE = {
    aten.add.Tensor,
    aten.sub.Tensor,
    aten.mul.Tensor,
    aten.div.Tensor,
    aten.relu.default,
    aten.gelu.default,
    aten.silu.default,
    aten.elu.default,
    aten.leaky_relu.default,
    aten.sigmoid.default,
    aten.tanh.default,
    aten.hardtanh.default,
    aten.hardswish.default,
    aten.hardsigmoid.default,
    aten.clamp.default,
    aten.dropout.default,  # the identity in eval mode
    aten.clone.default,
    aten.contiguous.default,
}
# Input [B, C, H, W]; channels do not mix.
POOLING = {
    aten.adaptive_avg_pool2d.default,
    aten.avg_pool2d.default,
    aten.max_pool2d.default,
}
# Checks that torch.export adds; they compute nothing.
ASSERTIONS = {
    aten._assert_tensor_metadata.default,
    aten._assert_scalar.default,
    aten.sym_constrain_range_for_size.default,
}


def cut(recorded: fx.GraphModule) -> fx.GraphModule:
    """A copy of the graph with the same outputs and only the weights that they need."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(recorded.graph, {}))
    module = fx.GraphModule(recorded, graph)
    remove_checks(module.graph)
    merge_equal(module.graph)
    push_slices(module.graph)
    fold_constants(module)
    module.graph.eliminate_dead_code()
    # A new module has only the weights that the graph names.
    return fx.GraphModule(module, module.graph)


# ---------------------------------------------------------------- clean-up


def remove_checks(graph: fx.Graph) -> None:
    """Remove assertions, aliases and slices that take everything."""
    for node in list(graph.nodes):
        if node.target in ASSERTIONS or node.op == "call_module":  # the module of input guards
            graph.erase_node(node)
        elif node.target is aten.alias.default or _takes_everything(node):
            _replace(node, node.args[0])


def merge_equal(graph: fx.Graph) -> None:
    """Merge nodes that compute the same: a model's features and its logits share the trunk."""
    known: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op not in ("call_function", "get_attr"):
            continue
        key = (node.op, node.target, _hashable(node.args), _hashable(node.kwargs))
        first = known.setdefault(key, node)
        if first is not node:
            _replace(node, first)


def _hashable(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return tuple(_hashable(item) for item in value)
    if isinstance(value, dict):
        return tuple((key, _hashable(item)) for key, item in sorted(value.items()))
    return type(value), value  # 1, 1.0 and True are equal to Python


def _replace(node: fx.Node, by: Any) -> None:
    node.replace_all_uses_with(by)
    node.graph.erase_node(node)


# ---------------------------------------------------------------- slices


def push_slices(graph: fx.Graph) -> None:
    """Move slices `x[..., :k]` towards the input, as far as channels stay apart.

    A node moves if all its users take a prefix on one axis; then it computes the longest of them.
    """
    # From the outputs on: a rule inserts slices before its node, whose producers come later here.
    for node in reversed(list(graph.nodes)):
        users = list(node.users)
        if not users or not all(_is_prefix(user) and user.args[0] is node for user in users):
            continue
        axes = {_parts(user)[1] for user in users}
        axis = min(axes)
        size = _shape(node)[axis]
        longest = max(_parts(user)[3] for user in users)
        if len(axes) > 1 or not isinstance(size, int) or longest >= size:
            continue
        if _cut_node(node, axis, longest):
            node.meta["val"] = node.meta["val"].narrow(axis, 0, longest)
            for user in users:
                if _parts(user)[3] == longest:
                    _replace(user, node)


def _cut_node(node: fx.Node, axis: int, length: int) -> bool:
    """Let `node` compute only the first `length` elements of `axis`; False if no rule applies."""
    if node.target is operator.getitem:
        return _cut_batch_norm(node, axis, length)
    if node.target in ELEMENTWISE:
        return _cut_elementwise(node, axis, length)
    if node.target in POOLING:
        return axis == 1 and _cut_arguments(node, {0: 1}, length)
    rule = RULES.get(node.target)
    return rule is not None and rule(node, axis, length)


def _cut_arguments(node: fx.Node, axes: dict[int, int], length: int) -> bool:
    """Slice the arguments {position: axis}, where they are tensors."""
    for position, axis in axes.items():
        if position < len(node.args) and isinstance(node.args[position], fx.Node):
            node.update_arg(position, _sliced(node, node.args[position], axis, length))
    return True


def _sliced(before: fx.Node, value: Any, axis: int, length: int) -> fx.Node:
    with before.graph.inserting_before(before):
        part = before.graph.call_function(SLICE, (value, axis, 0, length))
    part.meta["val"] = value.meta["val"].narrow(axis, 0, length)
    return part


def _cut_elementwise(node: fx.Node, axis: int, length: int) -> bool:
    rank = len(_shape(node))
    for position, argument in enumerate(node.args):
        if not isinstance(argument, fx.Node):
            continue
        shape = _shape(argument)
        own_axis = axis - (rank - len(shape))  # shapes are aligned at the right
        if own_axis >= 0 and shape[own_axis] != 1:
            node.update_arg(position, _sliced(node, argument, own_axis, length))
    return True


def _cut_linear(node: fx.Node, axis: int, length: int) -> bool:
    if axis != len(_shape(node)) - 1:
        return False
    return _cut_arguments(node, {1: 0, 2: 0}, length)


def _cut_conv(node: fx.Node, axis: int, length: int) -> bool:
    source: Any = node.args[0]
    groups: Any = node.args[6] if len(node.args) > 6 else 1
    if axis != 1:
        return False
    if groups == 1:
        return _cut_arguments(node, {1: 0, 2: 0}, length)
    if groups == _shape(node)[1] == _shape(source)[1]:  # depthwise
        node.update_arg(6, length)
        return _cut_arguments(node, {0: 1, 1: 0, 2: 0}, length)
    return False


def _cut_batch_norm(node: fx.Node, axis: int, length: int) -> bool:
    norm: Any = node.args[0]
    if norm.target is not aten._native_batch_norm_legit_no_training.default or axis != 1:
        return False
    # Its other two outputs are statistics of training.
    if node.args[1] != 0 or any(user is not node and user.users for user in norm.users):
        return False
    return _cut_arguments(norm, {0: 1, 1: 0, 2: 0, 3: 0, 4: 0}, length)


def _cut_view(node: fx.Node, axis: int, length: int) -> bool:
    """A view that only adds or removes axes of length 1 behind the others."""
    before, after = _shape(node.args[0]), _shape(node)
    common = min(len(before), len(after))
    # As text: to compare a symbolic size with a number would fix it.
    same = list(map(str, before[:common])) == list(map(str, after[:common]))
    added = {str(n) for n in (*before[common:], *after[common:])}
    if not same or axis >= common or added - {"1"}:
        return False
    given: Any = node.args[1]
    sizes = list(given)
    sizes[axis] = length
    node.update_arg(1, sizes)
    return _cut_arguments(node, {0: axis}, length)


def _cut_reduction(node: fx.Node, axis: int, length: int) -> bool:
    rank = len(_shape(node.args[0]))
    axes: Any = node.args[1]
    reduced = {d % rank for d in axes}
    keepdim = len(node.args) > 2 and node.args[2]
    kept = [d for d in range(rank) if keepdim or d not in reduced]
    if kept[axis] in reduced:
        return False
    return _cut_arguments(node, {0: kept[axis]}, length)


def _cut_select(node: fx.Node, axis: int, length: int) -> bool:
    position: Any = node.args[1]
    removed = position % len(_shape(node.args[0]))
    return _cut_arguments(node, {0: axis if axis < removed else axis + 1}, length)


def _cut_slice(node: fx.Node, axis: int, length: int) -> bool:
    """A slice on another axis, or a longer prefix on the same one."""
    if axis != _parts(node)[1]:
        return _cut_arguments(node, {0: axis}, length)
    if not _is_prefix(node):
        return False
    node.update_arg(3, length)
    return True


def _cut_permute(node: fx.Node, axis: int, length: int) -> bool:
    order: Any = node.args[1]
    return _cut_arguments(node, {0: order[axis] % len(order)}, length)


RULES: dict[Any, Callable[[fx.Node, int, int], bool]] = {
    aten.linear.default: _cut_linear,
    aten.conv2d.default: _cut_conv,
    aten.conv2d.padding: _cut_conv,
    aten.view.default: _cut_view,
    aten.mean.dim: _cut_reduction,
    aten.sum.dim_IntList: _cut_reduction,
    aten.amax.default: _cut_reduction,
    aten.select.int: _cut_select,
    aten.permute.default: _cut_permute,
    SLICE: _cut_slice,
}


def _shape(node: Any) -> tuple[Any, ...]:
    """The shape of a node's value, () for a value that is not a tensor."""
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def _parts(slice_node: fx.Node) -> tuple[Any, Any, Any, Any, Any]:
    """(input, axis, start, end, step) of a slice; trailing arguments may be missing."""
    defaults = (None, 0, None, None, 1)
    given = slice_node.args
    source, axis, start, end, step = (*given, *defaults[len(given) :])
    return source, axis, start or 0, END if end is None else end, step


def _is_prefix(node: fx.Node) -> bool:
    """Whether a node is `x[..., :k]` on some axis with a constant k."""
    if node.target is not SLICE or node.kwargs:
        return False
    _, axis, start, end, step = _parts(node)
    is_constant = isinstance(axis, int) and isinstance(end, int)
    return is_constant and axis >= 0 and end > 0 and start == 0 and step == 1


def _takes_everything(node: fx.Node) -> bool:
    if not _is_prefix(node):
        return False
    source, axis, _, end, _ = _parts(node)
    size = _shape(source)[axis]
    return end == END or (isinstance(size, int) and end >= size)


# ---------------------------------------------------------------- constants


def fold_constants(module: fx.GraphModule) -> None:
    """Replace what is computed from one weight alone by its value, where that is not larger.

    Sliced weights, for one, and resampled position embeddings. A weight that is used in several
    overlapping slices, as by a model that is nested in its width, stays whole.
    """
    sources: dict[fx.Node, set[fx.Node]] = {}  # of a constant node: the weights that it uses
    for node in module.graph.nodes:
        inputs = node.all_input_nodes
        if node.op == "get_attr":
            sources[node] = {node}
        if node.op == "call_function" and inputs and all(i in sources for i in inputs):
            sources[node] = set().union(*(sources[i] for i in inputs))

    results: defaultdict[fx.Node, list[fx.Node]] = defaultdict(list)
    for node, weights in sources.items():
        used = any(user not in sources for user in node.users)
        if used and len(weights) == 1:
            results[next(iter(weights))].append(node)
    for weight, computed in results.items():
        size = sum(_numel(node) for node in computed)
        if computed != [weight] and size <= _numel(weight):
            for node in computed:
                if node is not weight:
                    _store(module, node, _value(module, node))


def _numel(node: fx.Node) -> int:
    value = node.meta["val"]
    return value.numel() if isinstance(value, Tensor) else 0


def _value(module: fx.GraphModule, node: Any) -> Any:
    """The value of a constant node."""
    if not isinstance(node, fx.Node):
        return node
    if node.op == "get_attr":
        return operator.attrgetter(str(node.target))(module)
    arguments, keywords = map_arg((node.args, node.kwargs), partial(_value, module))
    compute: Any = node.target
    with torch.no_grad():
        return compute(*arguments, **keywords)


def _store(module: fx.GraphModule, node: fx.Node, value: Tensor) -> None:
    name = f"constant_{sum(1 for _ in module.buffers())}"
    # A copy: a view would keep, and write, the whole weight.
    module.register_buffer(name, value.detach().clone(memory_format=torch.contiguous_format))
    with module.graph.inserting_before(node):
        stored = module.graph.get_attr(name)
    stored.meta["val"] = node.meta["val"]
    _replace(node, stored)
