"""What can be changed in a source: every mutant is one small mistake, by a node of its syntax tree.

Comparisons, arithmetic, numbers, truth, `and`/`or`, minimum and maximum, what is returned, statements left out. Not
changed: text (docstrings, messages), annotations, decorators, imports, `if TYPE_CHECKING`.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterator
from dataclasses import dataclass

_COMPARISONS: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}
_ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Add,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.LShift: ast.RShift,
}
_NAMES = {
    "min": "max",
    "max": "min",
    "minimum": "maximum",
    "maximum": "minimum",
    "amax": "amin",
    "any": "all",
    "all": "any",
    "sum": "mean",
    "mean": "sum",
    "zeros_like": "ones_like",
    "new_zeros": "new_ones",
    "ones": "zeros",
    "zeros": "ones",
    "exp_": "log_",
    "exp": "log",
    "abs": "neg",
}
_LEFT_ALONE = (
    "JoinedStr",
    "ImportFrom",
    "Import",
    "AnnAssign.annotation",
    "arg.annotation",
    "FunctionDef.returns",
    "FunctionDef.decorator_list",
    "ClassDef.decorator_list",
)


@dataclass(frozen=True)
class Mutant:
    """One mistake.

    Attributes:
        line: in the source, from 1.
        what: the line's change in words, for people.
        source: of the whole module with the mistake in it.
    """

    line: int
    what: str
    source: str


def mutants(source: str) -> Iterator[Mutant]:
    """Every mutant of a module's source."""
    tree = ast.parse(source)
    for place in _places(tree):
        for change in _changes(_node(tree, place)):
            copied = copy.deepcopy(tree)
            old = _node(copied, place)
            told = ast.unparse(old)
            _replace(copied, place, change)
            ast.fix_missing_locations(copied)
            line = next(inner.lineno for inner in ast.walk(old) if hasattr(inner, "lineno"))
            yield Mutant(line, f"{_short(told)} -> {_short(ast.unparse(change))}", ast.unparse(copied))


Place = tuple[tuple[str, int | None], ...]
"""The way from the root to a node: fields, with the position where a field is a list."""


def _places(tree: ast.AST, above: Place = ()) -> Iterator[Place]:
    for field, value in ast.iter_fields(tree):
        owner = f"{type(tree).__name__}.{field}"
        if owner in _LEFT_ALONE or type(tree).__name__ in _LEFT_ALONE or _is_type_checking(tree):
            continue
        children = value if isinstance(value, list) else [value]
        for position, child in enumerate(children):
            if isinstance(child, ast.AST):
                here = (*above, (field, position if isinstance(value, list) else None))
                yield here
                yield from _places(child, here)


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def _node(tree: ast.AST, place: Place) -> ast.AST:
    for field, position in place:
        value = getattr(tree, field)
        tree = value if position is None else value[position]
    return tree


def _replace(tree: ast.AST, place: Place, by: ast.AST) -> None:
    owner, (field, position) = _node(tree, place[:-1]), place[-1]
    if position is None:
        setattr(owner, field, by)
    else:
        getattr(owner, field)[position] = by


def _changes(node: ast.AST) -> Iterator[ast.AST]:
    match node:
        case ast.Compare(ops=[op]):
            for other in _COMPARISONS[type(op)]:
                yield _with(node, ops=[other()])
        case ast.Compare(ops=ops):
            for number, op in enumerate(ops):
                for other in _COMPARISONS[type(op)]:
                    yield _with(node, ops=[*ops[:number], other(), *ops[number + 1 :]])
        case ast.BinOp(op=op) if type(op) in _ARITHMETIC and not _is_text(node):
            yield _with(node, op=_ARITHMETIC[type(op)]())
        case ast.BoolOp(op=op):
            yield _with(node, op=ast.Or() if isinstance(op, ast.And) else ast.And())
        case ast.UnaryOp(op=ast.USub() | ast.Not() | ast.Invert(), operand=operand):
            yield operand
        case ast.Constant(value=bool(value)):
            yield ast.Constant(not value)
        case ast.Constant(value=int(value)):
            yield ast.Constant(value + 1)
            if value:
                yield ast.Constant(value - 1)
        case ast.Constant(value=float(value)):
            yield ast.Constant(value * 2 if value else 1.0)
        case ast.Name(id=name) if name in _NAMES:
            yield _with(node, id=_NAMES[name])
        case ast.Attribute(attr=name) if name in _NAMES:
            yield _with(node, attr=_NAMES[name])
        case ast.keyword(arg="min" | "max" as side, value=value):
            yield ast.keyword("max" if side == "min" else "min", value)
        case ast.IfExp() | ast.If():
            yield _with(node, test=ast.Constant(True))
            yield _with(node, test=ast.Constant(False))
        case ast.Return(value=value) if value is not None and not _is_none(value):
            yield ast.Return(ast.Constant(None))
        case ast.Raise():
            yield ast.Pass()
        case ast.Expr(value=ast.Call()) | ast.AugAssign() | ast.Assign(targets=[ast.Subscript() | ast.Attribute()]):
            yield ast.Pass()
        case ast.Slice(lower=lower, upper=upper) if not (lower is None and upper is None):
            yield ast.Slice(None, None)
        case ast.comprehension(ifs=[_, *_]):
            yield _with(node, ifs=[])


def _with(node: ast.AST, **fields: object) -> ast.AST:
    changed = copy.copy(node)
    for name, value in fields.items():
        setattr(changed, name, value)
    return changed


def _is_none(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def _is_text(node: ast.BinOp) -> bool:
    return any(
        isinstance(side, ast.JoinedStr) or (isinstance(side, ast.Constant) and isinstance(side.value, str))
        for side in (node.left, node.right)
    )


def _short(text: str) -> str:
    first = " ".join(text.split())
    return first if len(first) <= 90 else first[:87] + "..."
