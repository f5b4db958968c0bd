"""Environments by name: `module:Class`, or an entry point of the group `lorikeet.environments`.

In: an EnvironmentSpec of the settings. Out: an environment of one kind of contract.py. Every
mistake is a SettingsError that names the environment, what was found and what was expected.
"""

from __future__ import annotations

import importlib
import inspect
from importlib.metadata import entry_points
from typing import Any, cast

from edge_node.environments.contract import (
    AgentEnvironment,
    Environment,
    PlugIn,
    TextEnvironment,
    ToolEnvironment,
)
from edge_node.errors import SettingsError
from edge_node.settings import EnvironmentSpec

GROUP = "lorikeet.environments"
_KINDS: tuple[type, ...] = (Environment, ToolEnvironment, TextEnvironment)


def load_environment(spec: EnvironmentSpec) -> PlugIn:
    """Make the environment that `spec` names; raises SettingsError."""
    factory = _from_module(spec) if ":" in spec.factory else _from_entry_point(spec)
    if not callable(factory):
        raise _mistake(
            spec,
            f"is a {type(factory).__name__}",
            "a class or a function that makes an environment",
        )
    try:
        environment = factory(**spec.options)
    except (
        Exception
    ) as error:  # a plug-in may raise anything; the operator needs to know which setting did it
        raise _mistake(
            spec,
            f"raised {type(error).__name__}: {error}",
            f"it to accept the options {', '.join(sorted(spec.options)) or 'none'}",
        ) from error
    kinds: list[type] = [kind for kind in _KINDS if isinstance(environment, kind)]
    if is_agent(environment):
        kinds.append(AgentEnvironment)
    if len(kinds) > 1:
        raise _mistake(
            spec,
            f"made a {type(environment).__name__} with the methods of {len(kinds)} kinds: "
            f"{' and '.join(kind.__name__ for kind in kinds)}",
            "one kind, each environment with its own name",
        )
    if kinds:
        return cast(PlugIn, environment)
    missing = [
        name for name in ("tasks", "verify", "reference_answer") if not hasattr(environment, name)
    ]
    raise _mistake(
        spec,
        f"made a {type(environment).__name__} without {', '.join(missing)}, and without documents",
        "the methods of edge_node.environments.Environment; or tasks, reset and get_reward for one "
        "with tools; or tasks and `async def run` for an agent; or documents for one of texts",
    )


def is_agent(environment: object) -> bool:
    """Whether it is an AgentEnvironment. A plain method named `run` may be a tool."""
    run = getattr(environment, "run", None)
    return hasattr(environment, "tasks") and inspect.iscoroutinefunction(run)


def _from_module(spec: EnvironmentSpec) -> Any:
    module_name, _, attribute = spec.factory.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # importing a plug-in runs its code
        raise _mistake(
            spec,
            f"cannot be imported ({type(error).__name__}: {error})",
            "a module on the Python path",
        ) from error
    if not hasattr(module, attribute):
        raise _mistake(spec, f"has no {attribute!r}", f"a class of {module_name}")
    return getattr(module, attribute)


def _from_entry_point(spec: EnvironmentSpec) -> Any:
    found = {point.name: point for point in entry_points(group=GROUP)}
    if spec.factory not in found:
        known = ", ".join(sorted(found)) or "none is installed"
        raise _mistake(
            spec,
            "is not an installed entry point",
            f"module:Class, or one of the group {GROUP} ({known})",
        )
    try:
        return found[spec.factory].load()
    except Exception as error:  # importing a plug-in runs its code
        raise _mistake(
            spec, f"cannot be imported ({type(error).__name__}: {error})", "a working entry point"
        ) from error


def _mistake(spec: EnvironmentSpec, found: str, expected: str) -> SettingsError:
    return SettingsError(
        f"Environment {spec.name!r}: factory {spec.factory!r} {found}; expected {expected}. "
        "Correct EDGE_ENVIRONMENTS."
    )
