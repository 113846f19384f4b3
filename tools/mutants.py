"""Small faults of a file: what could stand in place of a piece of code by a slip.

:mod:`tools.mutate` tries them. Texts, annotations, exceptions, logging and decorators are left as
they are, but for ``no_grad``.
"""

from __future__ import annotations

import ast
import copy
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType

PACKAGE = Path(__file__).parents[1] / "src" / "inversion_dpo"

BINARY: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.Pow: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.BitXor: ast.BitOr,
}
COMPARED: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
}
NAMES = {"min": "max", "max": "min", "amax": "amin", "amin": "amax", "ceil": "floor"}
NAMES |= {"floor": "ceil", "any": "all", "all": "any", "mean": "sum", "sum": "mean"}
TAKEN_OUT = {"abs", "sqrt", "square", "detach", "relu", "float", "round", "clamp", "sigmoid"}
MODULES = ("torch", "F", "math", "np")  # functions of these are called on nothing
NOT_LOGIC = {"logger", "warning", "info", "debug"}  # what is only told to people


def alternatives(node: ast.AST) -> Iterator[ast.AST]:
    """Yield what could stand in place of a node by a slip; each a new node."""
    if isinstance(node, ast.BinOp) and type(node.op) in BINARY:
        yield _with(node, op=BINARY[type(node.op)]())
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.Not)):
        yield copy.deepcopy(node.operand)
    elif isinstance(node, ast.Compare):
        for k, op in enumerate(node.ops):
            yield _with(node, ops=[*node.ops[:k], COMPARED[type(op)](), *node.ops[k + 1 :]])
    elif isinstance(node, ast.BoolOp):
        yield _with(node, op=ast.Or() if isinstance(node.op, ast.And) else ast.And())
    elif isinstance(node, (ast.If, ast.IfExp, ast.While)) and not _covered(node.test):
        yield _with(node, test=ast.UnaryOp(ast.Not(), copy.deepcopy(node.test)))
    elif isinstance(node, ast.Constant):
        yield from (_with(node, value=value) for value in _other_values(node.value))
    elif isinstance(node, ast.Call):
        yield from _other_calls(node)
    elif isinstance(node, ast.Return) and node.value is not None and not _is_none(node.value):
        yield _with(node, value=ast.Constant(None))
    elif isinstance(node, ast.FunctionDef):
        kept = [d for d in node.decorator_list if "no_grad" not in ast.unparse(d)]
        if len(kept) < len(node.decorator_list):
            yield _with(node, decorator_list=kept)
    if isinstance(node, ast.Attribute) and _swapped(node.attr):
        yield _with(node, attr=_swapped(node.attr))
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and _swapped(node.id):
        yield _with(node, id=_swapped(node.id))


def _covered(test: ast.AST) -> bool:
    """Whether the negation of a condition is a mutant of the condition's own."""
    equal = (ast.Eq, ast.NotEq, ast.In, ast.NotIn, ast.Is, ast.IsNot)
    if isinstance(test, ast.UnaryOp):
        return isinstance(test.op, ast.Not)
    return isinstance(test, ast.Compare) and len(test.ops) == 1 and isinstance(test.ops[0], equal)


def _with(node: ast.AST, **changed: object) -> ast.AST:
    new = copy.copy(node)
    for name, value in changed.items():
        setattr(new, name, value)
    return new


def _is_none(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def _other_values(value: object) -> Sequence[object]:
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1, 0] if value == 1 else [value + 1]
    if isinstance(value, float):
        return [2 * value or 1.0]
    return []


def _other_calls(node: ast.Call) -> Iterator[ast.AST]:
    """Another function of its kind, or none: what it was called on or with."""
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    if name in NAMES:
        key = "attr" if isinstance(node.func, ast.Attribute) else "id"
        yield _with(node, func=_with(node.func, **{key: NAMES[name]}))
    if name in ("min", "max", "clamp") and [k.arg for k in node.keywords] in (["min"], ["max"]):
        other = {"min": "max", "max": "min"}[str(node.keywords[0].arg)]
        yield _with(node, keywords=[_with(node.keywords[0], arg=other)])
    if name in TAKEN_OUT:
        module = isinstance(node.func, ast.Attribute) and ast.unparse(node.func.value) in MODULES
        if isinstance(node.func, ast.Attribute) and not module:
            yield copy.deepcopy(node.func.value)
        elif node.args:
            yield copy.deepcopy(node.args[0])


def _swapped(name: str) -> str:
    """Name the same thing of the other image of a pair, or nothing."""
    if "winner" in name:
        return name.replace("winner", "loser")
    if "loser" in name:
        return name.replace("loser", "winner")
    return ""


# ---------------------------------------------------------------- where


@dataclass(frozen=True)
class Mutant:
    """One fault: where it is, and what stands there before and after."""

    file: str
    function: str
    line: int
    before: str
    after: str
    number: int  # among those of the function that read the same
    code: CodeType

    @property
    def name(self) -> str:
        """How the list of equivalent mutants names it: without its line, which moves."""
        more = f" #{self.number}" if self.number else ""
        return f"{self.file} {self.function}: {self.before} -> {self.after}{more}"


def mutants_of(file: str) -> list[Mutant]:
    """Every mutant of a file, in the order of its lines."""
    path = PACKAGE / file
    tree = ast.parse(path.read_text())
    found: list[Mutant] = []
    counts: Counter[tuple[str, ...]] = Counter()
    for parent, key, index, node, function in _places(tree, ""):
        for other in alternatives(node):
            before, after = _text(node), _text(other)
            if before == after:
                continue
            _put(parent, key, index, ast.fix_missing_locations(ast.copy_location(other, node)))
            code = compile(tree, str(path), "exec")
            _put(parent, key, index, node)
            line = getattr(node, "lineno", 0)
            same = (function, before, after)
            found.append(Mutant(file, function, line, before, after, counts[same], code))
            counts[same] += 1
    return found


def _text(node: ast.AST) -> str:
    """Show a node in one short line; a whole statement without its body."""
    if isinstance(node, ast.FunctionDef):
        return " ".join(f"@{ast.unparse(d)}" for d in node.decorator_list) + f" def {node.name}"
    text = ast.unparse(node)
    return text.splitlines()[0] if isinstance(node, (ast.If, ast.While)) else " ".join(text.split())


def _put(parent: ast.AST, key: str, index: int | None, node: ast.AST) -> None:
    if index is None:
        setattr(parent, key, node)
    else:
        getattr(parent, key)[index] = node


Place = tuple[ast.AST, str, int | None, ast.AST, str]


def _places(node: ast.AST, function: str) -> Iterator[Place]:
    """(parent, field, index, node, function) of all nodes where a slip would be a fault.

    Texts, annotations, exceptions, logging, decorators and imports for type checkers are none.
    """
    for key, value in ast.iter_fields(node):
        if key in ("annotation", "returns", "decorator_list"):
            continue
        entries = enumerate(value) if isinstance(value, list) else [(None, value)]
        for index, child in entries:
            if not isinstance(child, ast.AST) or _only_told(child):
                continue
            inside = function
            if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
                inside = f"{function}.{child.name}".lstrip(".")
            yield node, key, index, child, inside
            yield from _places(child, inside)


def _only_told(node: ast.AST) -> bool:
    if isinstance(node, (ast.Raise, ast.Import, ast.ImportFrom, ast.JoinedStr)):
        return True
    if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
        return True
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        return bool(NOT_LOGIC & set(ast.unparse(node.value.func).split(".")))
    return False
