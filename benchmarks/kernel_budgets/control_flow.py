"""The loops of a kernel's machine code follow from its labels and branches."""

from __future__ import annotations

import re

BRANCH = re.compile(r"(?:\bBRA\b.*`\(|\bs_cbranch_\w+ |\bs_branch )(\.\w+)")
NO_RETURN = re.compile(r"^(BRA(?!.* !?U?P\d)|EXIT|RET|s_branch|s_endpgm|s_setpc)")
Graph = list[list[int]]


def loops(code: list[str]) -> list[list[str]]:
    """Return the natural loops (Aho et al. 2006, section 9.6.6) of instructions and labels, without the labels."""
    blocks = basic_blocks(code)
    graph = successors(blocks)
    bodies = (loop_body(graph, tail, head) for tail, head in back_edges(graph))
    return [[line for number in sorted(body) for line in blocks[number] if line[0] != "."] for body in bodies]


def basic_blocks(code: list[str]) -> list[list[str]]:
    """Split code into runs of lines that are entered at their first line and left at their last."""
    blocks: list[list[str]] = [[]]
    for line in code:
        if line.startswith(".") or (blocks[-1] and BRANCH.search(blocks[-1][-1])):
            blocks.append([])
        blocks[-1].append(line)
    return blocks


def successors(blocks: list[list[str]]) -> Graph:
    """Return the successors of each block: its branch, and the next block unless it always branches or ends."""
    labels = {block[0].rstrip(":"): number for number, block in enumerate(blocks) if block}
    graph: Graph = []
    for number, block in enumerate(blocks):
        last = block[-1] if block else ""
        target = BRANCH.search(last)
        following = [] if NO_RETURN.match(last) or number + 1 == len(blocks) else [number + 1]
        graph.append(following + ([labels[target[1]]] if target else []))
    return graph


def back_edges(graph: Graph) -> list[tuple[int, int]]:
    """Return the edges to a block that is on the path from the entry, in depth-first order."""
    edges, seen, path = [], {0}, [(0, iter(graph[0]))]
    while path:
        node, following = path[-1]
        for target in following:
            if any(target == on_path for on_path, _ in path):
                edges.append((node, target))
            elif target not in seen:
                seen.add(target)
                path.append((target, iter(graph[target])))
                break
        else:
            path.pop()
    return edges


def loop_body(graph: Graph, tail: int, head: int) -> set[int]:
    """Return `tail`, `head` and the blocks from which `tail` is reached without passing `head`."""
    body, waiting = {head, tail}, [tail]
    while waiting:
        node = waiting.pop()
        entering = [number for number, targets in enumerate(graph) if node in targets and node != head]
        waiting += [number for number in entering if number not in body]
        body.update(entering)
    return body
