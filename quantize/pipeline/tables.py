"""Tables of words, and the linear that scores the vocabulary, are held in 8 bits where one tensor is not both."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from quantize.graph.linears import Linear
from quantize.graph.program import Program
from quantize.pipeline.layer_schemes import entry_for
from quantize.recipe.patterns import TABLE, matches, require_match
from quantize.recipe.recipe import Recipe


def scoring_linear(program: Program, linears: Sequence[Linear]) -> Linear | None:
    """Return the last linear if it scores the vocabulary, otherwise None."""
    sizes = {name: node.meta["val"].numel() for node, name in program.parameters.items()}
    return next((x for x in linears[-1:] if sizes[x.weight] == x.columns * program.vocabulary), None)


def tables_of_words(program: Program) -> dict[str, str]:
    """Return the tables of words with the paths of their modules: those that the model looks up in, and copies of them.

    A copy is tied to such a table and never read, as `shared` of an encoder-decoder with tables of their own.
    """
    read = {name for segment in program.segments for name in segment.parameters}
    tied = {other for name in program.word_tables for other in program.ties.get(name, ())}
    copies = [name for name in program.parameters.values() if name in (tied & program.embeddings) - read]
    return {name: module_of(name) for name in (*program.word_tables, *copies)}


def outside_of_body(program: Program) -> set[str]:
    """Return the tables of words, also those of a model that cannot be exported, by their rows alone."""
    words = program.vocabulary if program.export_error else 0
    sizes = {name: node.meta["val"].shape for node, name in program.parameters.items()}
    return {*tables_of_words(program), *(name for name in program.embeddings if sizes[name][0] == words)}


def set_apart(recipe: Recipe, head: Linear | None, tables: Iterable[str]) -> Recipe:
    """Return the recipe with the head in `ignore_also` if it names it in `tables`, so that no scheme is sought for it.

    Args:
        recipe: the recipe as it was given.
        head: the linear that scores the vocabulary.
        tables: the paths of the modules with tables of words.

    Raises:
        UsageError: a pattern of `tables` matches nothing.
    """
    paths = [*tables, *([head.path] if head else [])]
    for pattern in recipe.tables or ():
        require_match("tables", pattern, paths, TABLE)
    if head is None or not named(recipe.tables or (), head.path):
        return recipe
    return recipe.model_copy(update={"ignore_also": (*recipe.ignore_also, head.path)})


def choose_tables(
    recipe: Recipe, program: Program, head: Linear | None, changed: Iterable[str]
) -> tuple[tuple[str, ...], bool]:
    """Choose what is held in 8 bits, from the recipe as it was given.

    Args:
        recipe: the recipe before `ignore` got its default.
        program: the program, which knows the tables and the ties.
        head: the linear that scores the vocabulary.
        changed: the parameters that passes change or quantized linears replace, which are no longer tied.

    Returns:
        The names of the tables, and whether the head is held in 8 bits as well.
    """
    apart = set(changed)
    tables = tables_of_words(program)
    given = {**tables, **({head.weight: head.path} if head else {})}
    if recipe.tables is not None:
        chosen = {name for name, path in given.items() if named(recipe.tables, path)}
    else:
        chosen = {name for name in given if not is_shared(program.ties.get(name, ()), apart)}
        entry = entry_for(recipe, head.path) if head else None
        if head and (recipe.ignore is not None or (entry is not None and entry.scheme is not None)):
            chosen.discard(head.weight)
    left = {name for name in chosen if is_left(recipe, given[name])}
    chosen -= left
    return tuple(name for name in tables if name in chosen), head is not None and head.weight in chosen


def is_shared(names: Sequence[str], changed: set[str]) -> bool:
    """Return whether a parameter with these names is stored as one tensor, since none of them changes."""
    return len(names) > 1 and not changed & set(names)


def is_left(recipe: Recipe, path: str) -> bool:
    """Return whether the recipe says of a module that it stays in floating point."""
    entry = entry_for(recipe, path)
    ignored = named((*(recipe.ignore or ()), *recipe.ignore_also), path) or (entry is not None and entry.ignore)
    return ignored or not named(recipe.targets, path)


def named(patterns: Iterable[str], path: str) -> bool:
    """Return whether any pattern matches a path."""
    return any(matches(pattern, path) for pattern in patterns)


def module_of(name: str) -> str:
    """Return the path of the module that owns a parameter."""
    return name.rpartition(".")[0]
