"""Which layers count, and what counts as one layer: both chosen by regular expressions on the layers' names."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import takewhile

from torch import nn

from recon.errors import UnknownNameError, UsageError, shortened
from recon.support.network.layers import Layer, find_layers, unwrapped

logger = logging.getLogger(__name__)

Patterns = str | Sequence[str]
"""A regular expression, or several."""

UNIT = "unit"
"""The group of a regular expression, `(?P<unit>...)`, whose text names the unit."""

_GLOBAL_FLAGS = re.compile(r"\(\?[aiLmsux]+\)")


def choose_layers(
    model: nn.Module,
    layers: Patterns | None = None,
    exclude: Patterns | None = None,
    units: Patterns | None = None,
) -> list[Layer]:
    """The layers of `model` that are wanted, in model order, with those of a unit joined into one.

    Args:
        model: it may be wrapped in DistributedDataParallel or compiled.
        layers: only those whose whole name matches one of these, see `choose_names`; a layer that is reached by
            several paths by any of them.
        exclude: without those that match one of these.
        units: joins what is left, see `join_names`. Frozen layers have no gradient, so they join none.

    Raises:
        UnknownNameError: a pattern matches nothing.
        UsageError: one is not a regular expression, nothing is left, or a unit joins nothing or has another's name.
    """
    found = find_layers(unwrapped(model))
    names = choose_names({layer.name: layer.aliases for layer in found}, layers, exclude)
    by_name = {layer.name: layer for layer in found}
    if units is None:
        return [by_name[name] for name in names]
    trainable = [name for name in names if any(p.requires_grad for p in by_name[name].parameters.values())]
    joins = join_names(trainable, units, taken=by_name)
    unit_of = {
        name: joined_layer(unit, [by_name[m] for m in members]) for unit, members in joins.items() for name in members
    }
    return list({layer.name: layer for layer in (unit_of.get(name, by_name[name]) for name in names)}.values())


def given_patterns(**choice: Patterns | None) -> dict[str, str | list[str]]:
    """Those of `layers`, `exclude` and `units` that are given, as plain values to be noted."""
    return {name: p if isinstance(p, str) else list(p) for name, p in choice.items() if p is not None}


def joined_layer(name: str, members: Iterable[Layer]) -> Layer:
    """Several layers as one; its parameters are named from the unit on, or by their whole paths if outside of it."""
    members = list(members)
    parameters = {
        (layer.name if layer.kind == "Parameter" else f"{layer.name}.{local}").removeprefix(f"{name}."): parameter
        for layer in members
        for local, parameter in layer.parameters.items()
    }
    kind = unit_kind([layer.kind for layer in members])
    return Layer(name, kind, parameters, members=tuple(layer.name for layer in members))


def unit_kind(kinds: Sequence[str]) -> str:
    """What a unit of layers of these kinds is, in short: `2 Conv2d`, `6 layers`."""
    return f"{len(kinds)} {kinds[0] if len(set(kinds)) == 1 and kinds[0] else 'layers'}"


def choose_names(
    names: Mapping[str, Sequence[str]], layers: Patterns | None = None, exclude: Patterns | None = None
) -> list[str]:
    """The names that a pattern of `layers` matches as a whole and none of `exclude` does, in the given order.

    A pattern that is itself a name means that one alone.

    Args:
        names: `{name: its other names}`.
        layers: all, when not given.
        exclude: none, when not given.

    Raises:
        UnknownNameError: a pattern matches nothing.
        UsageError: one is not a regular expression, or nothing is left.
    """
    chosen = list(names) if layers is None else _matching("layers", layers, names)
    left_out = set() if exclude is None else set(_matching("exclude", exclude, names))
    left = [name for name in chosen if name not in left_out]
    if not left:
        raise UsageError(
            f"exclude={exclude!r} leaves none of the {len(chosen)} layers ({shortened(chosen)}). Exclude fewer."
        )
    return left


def join_names(names: Sequence[str], units: Patterns, taken: Collection[str] = ()) -> dict[str, list[str]]:
    r"""`{unit: the two or more names that it joins}`.

    A pattern is searched for among whole parts of a name. A name belongs to the unit that ends with the match, so
    `layer\d+\.\d+` joins the layers of every block, in `layer1.0` and so on. If no two names belong together so, the
    pattern names the pieces, and those with the same text before the match are joined: `lora_[AB]` joins
    `query.lora_A.default` and `query.lora_B.default`, in `query`. A group `(?P<unit>...)` names the unit by its text,
    whatever else matches. A name that several patterns match belongs to the first; one that stays alone is no unit, and
    logged (WARNING).

    Args:
        names: of the layers to join.
        units: the patterns.
        taken: names that no unit may have.

    Raises:
        UnknownNameError: a pattern matches nothing.
        UsageError: one is not a regular expression, joins nothing, or gives a unit the name of another, or of a layer.
    """
    joins: dict[str, list[str]] = {}
    for pattern in _checked("units", units):
        joined = {name for members in joins.values() for name in members}
        for unit, members in _units(pattern, [name for name in names if name not in joined]).items():
            if unit in joins or unit in taken:
                what = "another unit" if unit in joins else "a layer"
                raise UsageError(
                    f"units={pattern!r} joins {shortened(members)} in {unit!r}, but {what} has that name. Name the "
                    f"unit by a group of the expression, as in '(?P<{UNIT}>...)'."
                )
            joins[unit] = members
    return joins


def _units(pattern: str, names: Sequence[str]) -> dict[str, list[str]]:
    """What one pattern joins."""
    regex = _at_parts(pattern)
    found = {name: match for name in names if (match := regex.search(name))}
    if not found:
        raise UnknownNameError("trainable layer", pattern, names, "units= looks for whole parts of the names.")
    if UNIT in regex.groupindex:
        named = {name: match[UNIT] for name, match in found.items()}
        if nameless := [name for name, unit in named.items() if not unit]:
            raise UsageError(f"units={pattern!r} matches {shortened(nameless)}, where its group {UNIT!r} has no text.")
        ways = [_several(named)]
    else:
        to_the_end = {name: name[: match.end()] for name, match in found.items()}
        parents = {name: name[: match.start()].rstrip(".") for name, match in found.items()}
        ways = [_several(to_the_end), _several(parents)]
    for units in ways:
        if units:
            _warn_of_lone(pattern, found, units)
            return {unit or _common(members): members for unit, members in units.items()}
    raise UsageError(
        f"units={pattern!r} joins nothing: of the layers that it matches ({shortened(found)}), no two belong to the "
        r"same unit. Match what they have in common, as 'layer\d+\.\d+' does, or the pieces of one module, as "
        "'lora_[AB]' does."
    )


def _warn_of_lone(pattern: str, found: Iterable[str], units: Mapping[str, list[str]]) -> None:
    joined = {name for members in units.values() for name in members}
    lone = [name for name in found if name not in joined]
    if lone:
        logger.warning(
            "units=%r joins layers in %s, and leaves alone what it matches elsewhere: %s.",
            pattern,
            shortened(units),
            shortened(lone),
        )


def _several(unit_of: Mapping[str, str]) -> dict[str, list[str]]:
    """`{unit: names}` of the units with two names or more, from `{name: unit}`."""
    units: dict[str, list[str]] = {}
    for name, unit in unit_of.items():
        units.setdefault(unit, []).append(name)
    return {unit: members for unit, members in units.items() if len(members) > 1}


def _common(names: Sequence[str]) -> str:
    """A name for these: the path that they share, or where each begins."""
    paths = [name.split(".") for name in names]
    shared = [parts[0] for parts in takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))]
    return ".".join(shared) or "+".join(dict.fromkeys(first for first, *_ in paths))


def _matching(option: str, given: Patterns, names: Mapping[str, Sequence[str]]) -> list[str]:
    """The names that one of the patterns matches; refuses a pattern that matches none."""
    found: set[str] = set()
    for pattern in _checked(option, given):
        matches = [name for name, others in names.items() if pattern in (name, *others)] or [
            name for name, others in names.items() if any(re.fullmatch(pattern, path) for path in (name, *others))
        ]
        if not matches:
            _refuse_unmatched(option, pattern, list(names))
        found.update(matches)
    return [name for name in names if name in found]


def _refuse_unmatched(option: str, pattern: str, names: Sequence[str]) -> None:
    flags, rest = _without_flags(pattern)
    longer = flags + (f"(?:{rest})" if "|" in rest else rest) + r"\..*"
    inside = [name for name in names if re.fullmatch(longer, name)]
    if inside:
        raise UsageError(
            f"{option}={pattern!r} is the whole name of no layer, but {len(inside)} begin with it: "
            f"{shortened(inside)}. Write '{longer}' to match those."
        )
    hint = f"{option}= matches whole names by regular expressions, as '.*bn1' does."
    raise UnknownNameError("layer", pattern, names, hint)


def _checked(option: str, given: Patterns) -> list[str]:
    """The patterns, each of them a regular expression."""
    patterns = [given] if isinstance(given, str) else list(given) if isinstance(given, Iterable) else []
    if not patterns or not all(isinstance(pattern, str) for pattern in patterns):
        raise UsageError(f"{option} is {given!r}. Give a regular expression, or a list of one or more.")
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise UsageError(f"{option}={pattern!r} is not a regular expression: {error}. Correct it.") from error
    return patterns


def _at_parts(pattern: str) -> re.Pattern[str]:
    """Matches from the beginning of one part of a name to the end of one."""
    flags, pattern = _without_flags(pattern)
    return re.compile(rf"{flags}(?<![^.])(?:{pattern})(?![^.])")


def _without_flags(pattern: str) -> tuple[str, str]:
    """The flags for the whole expression, `(?i)` say, which must stay in front; and the rest."""
    flags = _GLOBAL_FLAGS.match(pattern)
    return (flags[0], pattern[flags.end() :]) if flags else ("", pattern)
