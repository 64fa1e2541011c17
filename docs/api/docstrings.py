"""Docstrings as pages show them: lists of the arguments that are explained in running text, and paragraphs.

The package explains arguments in sentences such as `width: D. grid: patches along an axis.` Markdown would join them.
"""

import re

import griffe

PARAGRAPHS = ("Raises ", "Returns ", "Source:", "Gradients:", "Time and memory")  # begin one
SECTIONS = ("Args:", "Returns:", "Raises:", "Attributes:")  # of Google's style, which are lists already


def laid_out(text: str, known: set[str]) -> str:
    """The docstring with a list item for each known name that is explained, and paragraphs of their own."""
    if not known:
        return text
    name = f"(?:{'|'.join(sorted(known, key=len, reverse=True))})"
    explained = re.compile(rf"{name}(?:, {name})*: ")
    blocks = []
    for block in re.split(r"\n\s*\n", text):
        if block.startswith((*SECTIONS, " ", "-")) or not re.search(rf"(?:^|\. ){explained.pattern}", block, re.M):
            blocks.append(block)
            continue
        hanging, pieces = "\n " in block, []
        for line in block.splitlines():
            goes_on = line.startswith(" ") if hanging else not (explained.match(line) or line.startswith(PARAGRAPHS))
            if pieces and (goes_on or (hanging and not explained.match(line) and not explained.match(pieces[-1]))):
                pieces[-1] += f" {line.strip()}"
            else:
                pieces.append(line)
        items = [item for piece in pieces for item in re.split(rf"(?<=\.) (?={explained.pattern})", piece)]
        for item in items:
            if found := explained.match(item):
                names = ", ".join(f"`{one}`" for one in found[0].removesuffix(": ").split(", "))
                item = f"- {names}: {item[found.end() :]}"
            if item.startswith("- ") and blocks and blocks[-1].startswith("- "):
                blocks[-1] += f"\n{item}"
            else:
                blocks.append(item)
    return "\n\n".join(blocks)


def names_of(obj: griffe.Object) -> set[str]:
    """The arguments of a function; of a class those of its constructor, and its fields."""
    if obj.is_function:
        return {parameter.name for parameter in obj.parameters}
    constructor = obj.members.get("__init__")
    given = {parameter.name for parameter in constructor.parameters} if constructor is not None else set()
    return given | {name for name, member in obj.members.items() if not member.is_alias and member.is_attribute}


class Docstrings(griffe.Extension):
    """Lays out the docstrings of the whole package, once it is read."""

    def on_package(self, *, pkg: griffe.Module, **kwargs) -> None:
        pending: list[griffe.Object] = [pkg]
        while pending:
            obj = pending.pop()
            pending += [member for member in obj.members.values() if not member.is_alias]
            if obj.docstring is not None and (obj.is_function or obj.is_class):
                obj.docstring.value = laid_out(obj.docstring.value, names_of(obj))
