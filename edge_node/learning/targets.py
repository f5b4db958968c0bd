"""Which of the base's modules a round trains.

In: EDGE_LEARNING__TARGET_MODULES and the names of the modules that can be trained, merged and
served. Out: the chosen names, in the base's order. Pure; imports nothing heavy.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from edge_node.errors import SettingsError

ALL, ATTENTION = "all-linear", "attention"
_IN_ATTENTION = re.compile(r"(^|\.)\w*att(n|ention)\w*\.")
_IN_LAYER = re.compile(r".*?\.\d+\.")
_SHOWN = 12


def targeted(setting: str | Sequence[str], modules: Iterable[str]) -> list[str]:
    """The modules that `setting` names.

    Args:
        setting: "all-linear"; "attention": what lies inside a layer's attention; a list of names,
            each of which a module's name is or ends with (`q_proj`, `self_attn.q_proj`,
            `model.layers.0.mlp.up_proj`); any other text is a regular expression of a whole name.
        modules: as in BaseModelInfo.module_shapes.

    Raises:
        SettingsError: a name, or the expression, fits no module.
    """
    known = list(modules)
    if setting == ALL:
        return known
    if not isinstance(setting, str):
        absent = [name for name in setting if not any(_is(module, name) for module in known)]
        if absent:
            raise SettingsError(
                f"EDGE_LEARNING__TARGET_MODULES names {', '.join(map(repr, absent))}, which the "
                f"base model does not have. {_known(known)}"
            )
        return [module for module in known if any(_is(module, name) for name in setting)]
    if setting == ATTENTION:
        found = [module for module in known if _IN_ATTENTION.search(module)]
    else:
        expression = re.compile(setting)
        found = [module for module in known if expression.fullmatch(module)]
    if not found:
        raise SettingsError(
            f"EDGE_LEARNING__TARGET_MODULES is {setting!r}, which fits none of the base model's "
            f"{len(known)} modules. A regular expression has to fit a whole name, such as "
            f"{min(known, default='none')}; names go into a JSON list. {_known(known)}"
        )
    return found


def _is(module: str, name: str) -> bool:
    return module == name or module.endswith(f".{name}")


def _known(modules: Sequence[str]) -> str:
    """The names within a layer, which all layers share."""
    names = sorted({_IN_LAYER.sub("", module, count=1) for module in modules})
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"Known names: {', '.join(names[:_SHOWN])}{more}."
