"""Experts, and what chooses among them, are told by names with two numbers, by stacks of matrices, and by shapes."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping

Shapes = Mapping[str, tuple[int, ...]]
WEIGHT = ".weight"
LAYER = re.compile(r"(.*?\.)?\d+\.")  # up to the first number of a name
FEWEST = 32  # rows and columns of a linear: tables of relative positions and gates of single numbers have fewer


def containers_of(shapes: Shapes) -> dict[str, int]:
    """Return the modules in layers that hold experts, one by one under their numbers or in stacks, and how many."""
    numbers, counts = defaultdict[str, set[str]](set), dict[str, int]()
    for name, shape in shapes.items():
        if not (layer := LAYER.match(name)):
            continue
        if inner := LAYER.match(name, layer.end()):
            container, _, number = name[: inner.end() - 1].rpartition(".")
            numbers[container].add(number)
        elif len(shape) == 3 and min(shape[1:]) >= FEWEST:
            counts[parent(name.removesuffix(WEIGHT))] = shape[0]
    return counts | {container: len(found) for container, found in numbers.items()}


def routers_of(shapes: Shapes, containers: Mapping[str, int]) -> dict[str, str]:
    """Return the weights that choose experts: those beside experts with a row for each of them, or one row for all.

    Returns:
        The name of each such weight → the module that holds the experts.
    """
    places = defaultdict[str, list[str]](list)
    for container in containers:
        places[parent(container)].append(container)
    found = dict[str, str]()
    for name, shape in shapes.items():
        if len(shape) == 2 and name.endswith(WEIGHT):
            beside = (x for place in ancestors(name) for x in places.get(place, ()) if not name.startswith(f"{x}."))
            chosen = [x for x in beside if shape[0] in (1, containers[x])]
            found.update({name: chosen[0]} if chosen else {})
    return found


def stacks_of(shapes: Shapes, containers: Mapping[str, int], routers: Mapping[str, str]) -> dict[str, bool | None]:
    """Return the stacks of experts' matrices that a router chooses among, and whether each is [experts, in, out].

    The router reads what the experts read and write. Of matrices of one container the largest ones read it, since they
    make the inputs of a gate and of what the gate is multiplied with; where all are of one size, those of the shape
    that most have. Where that shape does not tell, as of square matrices or of two of one size, it is None.
    """
    width = {container: shapes[name][1] for name, container in routers.items() if shapes[name][0] > 1}
    grouped = defaultdict[str, dict[str, tuple[int, ...]]](dict)
    for name, shape in shapes.items():
        container = parent(name.removesuffix(WEIGHT))
        if len(shape) == 3 and container in width and shape[0] == containers[container]:
            grouped[container][name] = shape[1:]
    found = dict[str, bool | None]()
    for container, stacks in grouped.items():
        largest = max(rows * columns for rows, columns in stacks.values())
        counts = Counter(shape for shape in stacks.values() if shape[0] * shape[1] == largest)
        (shape, most), *others = counts.most_common()
        reads = not others or most > others[0][1]
        places = [axis for axis in (0, 1) if shape[axis] == width[container]]
        found |= dict.fromkeys(stacks, places == [0] if reads and len(places) == 1 else None)
    return found


def parent(path: str) -> str:
    """Return the path of the module that holds another, or a tensor."""
    return path.rpartition(".")[0]


def ancestors(path: str) -> Iterator[str]:
    """Yield the modules around a tensor, from the inmost one on."""
    while path := parent(path):
        yield path
