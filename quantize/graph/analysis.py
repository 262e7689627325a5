"""The analysis walks the exported graph and sorts its channels into bases, which tells where a transform is legal.

Channels that are added are one channel, and channels with the same writers, readers and restrictions form a basis. So
a fused projection falls apart into the ranges that are used differently, without a special case.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from torch import fx

from quantize.graph.allowed_transforms import AllowedTransforms
from quantize.graph.assemble import assemble
from quantize.graph.basis import Bases, Basis
from quantize.graph.export import block_at
from quantize.graph.labels import ChannelTrace, id_pairs, shape_of
from quantize.graph.program import Program, Segment
from quantize.graph.rules import visit
from quantize.graph.views import disjoint


def find_bases(program: Program, folded: frozenset[str] = frozenset()) -> Bases:
    """Walk the graph once and sort its channels into bases.

    Args:
        program: the exported model.
        folded: the gains that count as ones.
    """
    walk = ChannelTrace(program.parameters, folded)
    for segment in program.segments:
        for node in segment.nodes:
            visit(walk, node)
        if program.unreached:
            pin_what_is_open(walk, segment, program)
    for value in (n for n in program.output.all_input_nodes if n not in program.intermediate_outputs):
        walk.pin(value, "it is an output of the model")
    share(walk)
    return assemble(walk)


def pin_what_is_open(walk: ChannelTrace, segment: Segment, program: Program) -> None:
    """Pin what a pass with other arguments may read or write with parameters that this pass does not reach.

    They may lie anywhere in the module that holds them and whose other parameters this pass does reach: image features
    take the place of words, and a layer for images may stand among the others. Only what stays inside of a block whose
    every parameter is reached is known to be all there is. A tower that this pass runs leaves as this pass shows it.
    """
    unreached = program.unreached
    inside = f"{block_at(segment.name)}."
    closed = inside != "." and not any(name.startswith(inside) for name in unreached)
    nodes, holders = set(segment.nodes), holders_of(unreached, program.parameters.values())
    for node in segment.nodes:
        if lies_in(node, holders) and (not closed or not nodes.issuperset(node.users)):
            walk.pin(node, f"`{min(unreached)}` and others that this pass does not reach may read or write it")


def holders_of(unreached: frozenset[str], names: Iterable[str]) -> frozenset[str]:
    """Return the paths, each with a dot behind it, of the innermost modules around them that hold others, too."""
    reached, found = [name for name in names if name not in unreached], set[str]()
    for name in unreached:
        path = name.rpartition(".")[0]
        while path and not any(other.startswith(f"{path}.") for other in reached):
            path = path.rpartition(".")[0]
        found.add(f"{path}." if path else "")
    return frozenset(found)


def lies_in(node: fx.Node, holders: frozenset[str]) -> bool:
    """Return whether a node's module lies in one of some modules, or it is not known where it lies."""
    stack = node.meta.get("nn_module_stack")
    path = f"{next(reversed(stack.values()))[0]}." if stack else ""
    return not path or any(path.startswith(holder) for holder in holders)


def share(walk: ChannelTrace) -> None:
    """Make the channels that a parameter touches in several uses one, because it can absorb a transform only once."""
    placeholders = {name: node for node, name in walk.parameters.items()}
    by_axis: dict[tuple[str, int, bool], list[int]] = {}
    for i, event in enumerate(walk.events):
        if event.parameter:
            by_axis.setdefault((event.parameter, event.axis, event.vector and event.reads), []).append(i)
    for name in walk.uses:
        if any((user, name) not in walk.accounted for user in consumers(walk, placeholders[name])):
            pin_uses(walk, name, "is also used in a way that has no rule")
    for (name, _, _), found in by_axis.items():
        shape = shape_of(placeholders[name])
        for n, i in enumerate(found):
            part = walk.events[i].region
            join_shared_parameter(walk, i, [j for j in found[:n] if not disjoint(part, walk.events[j].region, shape)])


def join_shared_parameter(walk: ChannelTrace, i: int, others: list[int]) -> None:
    """Join the channels of one event with those of an earlier one that takes the same part of the parameter."""
    event = walk.events[i]
    for other in (walk.events[j] for j in others):
        if other.region != event.region:
            return pin_uses(walk, event.parameter, "is used several times, each time another part of it")
    if others:
        other = walk.events[others[0]]
        meet = walk.joined if other.reads is event.reads else walk.paired
        meet.append(id_pairs(other.channels, event.channels))
        walk.events[i] = replace(event, parameter="", counted=True)


def pin_uses(walk: ChannelTrace, name: str, why: str) -> None:
    """Rule out every transform that a parameter would have to absorb."""
    for event in [e for e in walk.events if e.parameter == name]:
        walk.restrict(event.channels, AllowedTransforms.NONE, f"`{name}` {why}")


def consumers(walk: ChannelTrace, node: fx.Node) -> Iterator[fx.Node]:
    """Return the nodes that compute with a parameter, behind those that only take it apart or turn it around."""
    for user in node.users:
        if user in walk.views:
            yield from consumers(walk, user)
        else:
            yield user


def admissible_bases(program: Program) -> tuple[Basis, ...]:
    """Return all bases; those behind norm gains with what is allowed once the gains are folded into readers."""
    found = find_bases(program)
    gains = frozenset(b.gain.parameter for b in found.all if b.gain)
    folded = {origin_of(b): b for b in find_bases(program, gains).all if b.writers} if gains else {}
    return tuple(after_gain_folding(b, folded, gains) for b in found.all)


def origin_of(basis: Basis) -> tuple[str, int, int]:
    """Return where the first channel of a basis with writers is written, by which another walk finds the same basis."""
    edge = basis.writers[0]
    return edge.parameter, edge.axis, int(edge.index[0, 0])


def after_gain_folding(basis: Basis, folded: dict[tuple[str, int, int], Basis], gains: frozenset[str]) -> Basis:
    """Return the basis as it is once its gains are folded, with the gains' names."""
    needed = tuple(e.parameter for e in basis.readers if e.parameter in gains)
    found = folded.get(origin_of(basis)) if basis.writers and needed else None
    return replace(found, index=basis.index, gains=needed) if found else basis
