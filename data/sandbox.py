"""The sandbox of chat templates: jinja2's, with a budget for the work of a rendering and the memory that it may take.

Jinja2's sandbox keeps a template from calling Python and from opening files, but one line can ask for a string of 3 GB,
or for ten billion turns of an empty loop. Here everything that takes time or memory in proportion to its arguments is
paid for before it is done: a unit for each character, and ITEM units for each item of a list and each turn of a loop.
For this the syntax tree of a template is changed before it is compiled (Paid), filters, tests and calls are wrapped,
and every value that is written passes through `weighed`.
"""
import functools
import json
import re
import threading
from contextlib import contextmanager
from datetime import datetime
from types import GeneratorType

from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

LARGEST_FACTOR = 1 << 31                # largest factor of a product: a loop of products cannot fill the memory
WORK, PER_UNIT = 20_000_000, 200        # the budget of a rendering: so much, and so much for each unit of the chat
ITEM = 16                               # units of an item or a turn: 20 million units are 100 MB, or a second, at most
PURSE = threading.local()               # .left: the units that the rendering of this thread may still spend


@contextmanager
def budget(*values):
    """Render or compile a template on a budget in a with block; the values are what it is given."""
    PURSE.left = float("inf")
    PURSE.left = WORK + PER_UNIT * weight(values)
    try:
        yield
    finally:
        del PURSE.left


def spend(units):
    """MemoryError if the budget does not have so many units any more."""
    PURSE.left -= units
    if PURSE.left < 0:
        raise MemoryError("it takes more work than any chat needs")
    return True


def weight(value):
    """Units of a value: what it would take to write or compare it. MemoryError if the budget does not have as many,
    which also ends the walk through lists that hold one list many times."""
    units, waiting = 0, [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, (str, bytes)):
            units += len(one)
        elif isinstance(one, range):
            units += ITEM * len(one)
        elif isinstance(one, dict):
            waiting += one.keys()
            waiting += one.values()
        elif isinstance(one, (list, tuple, set, frozenset, *VIEWS)):
            waiting += one
        units += ITEM
        if units + ITEM * len(waiting) > PURSE.left:
            spend(units + ITEM * len(waiting))
    return units


VIEWS = type({}.keys()), type({}.values()), type({}.items())


def weighed(value):
    """The value, paid for."""
    spend(weight(value))
    return value


def joined(*values):
    """a ~ b ~ c, paid for."""
    return "".join(map(str, weighed(values)))


def pay(name, value, args, named):
    """Pay for value.name(*args) or value|name(*args): for the value as often as the largest of the numbers among the
    arguments says, since a number may be a width; and for texts that are put in at several places."""
    given = (*args, *named.values())
    widest = max((abs(x) for x in given if isinstance(x, (int, float))), default=0)
    if name in ("indent", "wordwrap", "urlize"):
        widest = max([widest, *(len(x) for x in given if isinstance(x, str))])
    units = len(value) + 1 if isinstance(value, str) else weight(value)
    more = weight(given)
    spend(more + units * (1 + widest))
    if isinstance(value, str) and name == "replace" and len(args) > 1:
        old, new = map(str, args[:2])
        spend((value.count(old) if old else units) * len(new))
    elif isinstance(value, str) and name == "join":
        spend(len(value) * more)
    elif isinstance(value, str) and name in ("format", "format_map"):
        written = max(map(int, re.findall(r"\d{1,15}", value)), default=0)
        spend((value.count("%") + value.count("{")) * (more + written + widest))


def paying(name, function):
    """A filter or a test that is paid for."""
    place = hasattr(function, "jinja_pass_arg")         # whether the context, or so, comes before the value

    @functools.wraps(function)
    def paid(*args, **named):
        before, (value, *others) = args[:place], args[place:]
        if isinstance(value, GeneratorType):
            value = [each for each in value if spend(ITEM)]
        pay(name, value, others, named)
        found = function(*before, value, *others, **named)
        if isinstance(found, (str, list, tuple)):
            spend(len(found) * (1 if isinstance(found, str) else ITEM))
        return found
    return paid


class Paid(NodeTransformer):
    """Changes the syntax tree of a template, so that it pays for turns of loops, calls of macros, a ~ b, comparisons,
    subscripts and keys."""

    def call(self, name, *args):
        return nodes.Call(nodes.ImportedName(f"data.sandbox.{name}"), list(args), [], None, None)

    def visit_For(self, node):
        node = self.with_body(node)
        if node.test is not None:
            node.test = nodes.And(self.call("spend", nodes.Const(ITEM)), node.test)
        return node

    def with_body(self, node):
        """The loop or macro pays for each turn, and for the texts in its body."""
        texts = sum(len(text.data) for text in node.find_all(nodes.TemplateData))
        node = self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(self.call("spend", nodes.Const(ITEM + texts))))
        return node

    visit_Macro = visit_CallBlock = with_body

    def visit_Concat(self, node):
        return self.call("joined", *self.generic_visit(node).nodes)

    def visit_Compare(self, node):
        node = self.generic_visit(node)
        node.expr = self.call("weighed", node.expr)
        return node

    visit_Operand = visit_Compare

    def visit_Getitem(self, node):
        node = self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            return self.call("weighed", node)
        if not isinstance(node.arg, nodes.Const):
            node.arg = self.call("weighed", node.arg)
        return node

    def visit_Pair(self, node):
        node = self.generic_visit(node)
        node.key = self.call("weighed", node.key)
        return node


class Sandbox(ImmutableSandboxedEnvironment):
    """Jinja2's sandbox, which pays; also * takes small numbers only, and ** is not allowed."""
    intercepted_binops = frozenset(["*", "**", "%", "+"])       # jinja2 then does not compute them at compile time

    def compiled(self, source):
        """The Template of a source text."""
        with budget():
            tree = Paid().visit(self.parse(source))
            return self.from_string(tree)

    def call_binop(self, context, operator, left, right):
        if operator in ("*", "**"):
            small = all(isinstance(x, (int, float)) and abs(x) <= LARGEST_FACTOR for x in (left, right))
            if operator == "**" or not small:
                raise SecurityError("templates can multiply small numbers only, and cannot use **")
            return left * right
        if operator == "%" and isinstance(left, str):
            pay("format", left, [right, *(right if isinstance(right, tuple) else ())], {})
        else:
            spend(2 * ITEM + sum(ITEM * len(x) for x in (left, right) if isinstance(x, (str, list, tuple))))
        return super().call_binop(context, operator, left, right)

    def call(self, context, called, /, *args, **named):
        if called in (spend, weighed, joined):
            return called(*args)
        owner = getattr(getattr(called, "__wrapped__", called), "__self__", None)
        pay(getattr(called, "__name__", ""), owner, args, named)
        found = super().call(context, called, *args, **named)
        if isinstance(found, list):
            spend(len(found) * ITEM)
        return found


class Generation(Extension):
    """The tag {% generation %}, with which some templates mark the tokens to train on; its content is rendered."""
    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class SafeNamespace(Namespace):
    """A namespace that refuses names such as __class__, with which it could pretend to be another object."""

    def __init__(self, /, *args, **names):
        super().__init__()
        for name, value in dict(*args, **names).items():
            self[name] = value

    def __setitem__(self, name, value):
        if str(name).startswith("_"):
            raise SecurityError(f"a namespace cannot hold {name!r}")
        super().__setitem__(name, value)

    def __repr__(self):
        return "<Namespace>"            # what it holds may be long


class Dict:
    """A stand-in for dict: with the type itself, dict.update(message, ...) would get around the sandbox."""
    fromkeys = staticmethod(dict.fromkeys)

    def __call__(self, *args, **names):
        return dict(*args, **names)


def raise_exception(message):
    raise TemplateError(message)


def strftime_now(format):
    return datetime.now().strftime(format)


def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    if isinstance(indent, int) and indent > 100:
        raise SecurityError("templates can indent JSON by 100 spaces at most")
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def environment():
    """The Sandbox with the functions, filters and tags that transformers gives to templates. Without lipsum, which
    writes any number of paragraphs."""
    sandbox = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols], finalize=weighed)
    sandbox.filters["tojson"] = tojson                  # jinja2's own filter writes < as \u003c
    sandbox.filters = {name: paying(name, function) for name, function in sandbox.filters.items()}
    sandbox.tests = {name: paying(name, function) for name, function in sandbox.tests.items()}
    sandbox.globals.update(raise_exception=raise_exception, strftime_now=strftime_now, dict=Dict(),
                           namespace=SafeNamespace)
    del sandbox.globals["lipsum"]
    return sandbox
