"""Environments by name: `module:Class`, or an entry point of the group `lorikeet.environments`.

In: an EnvironmentSpec of the settings. Out: an Environment. Every mistake is a SettingsError that names the
environment, what was found and what was expected.
"""

from __future__ import annotations

import importlib
from importlib.metadata import entry_points
from typing import Any

from edge_node.environments.contract import Environment
from edge_node.errors import SettingsError
from edge_node.settings import EnvironmentSpec

GROUP = "lorikeet.environments"


def load_environment(spec: EnvironmentSpec) -> Environment:
    """Make the environment that `spec` names; raises SettingsError."""
    factory = _from_module(spec) if ":" in spec.factory else _from_entry_point(spec)
    if not callable(factory):
        raise _mistake(spec, f"is a {type(factory).__name__}", "a class or a function that makes an environment")
    try:
        environment = factory(**spec.options)
    except Exception as error:  # a plug-in may raise anything; the operator needs to know which setting did it
        raise _mistake(
            spec, f"raised {type(error).__name__}: {error}", f"it to accept the options {spec.options!r}"
        ) from error
    if not isinstance(environment, Environment):
        missing = [name for name in ("tasks", "verify", "reference_answer") if not hasattr(environment, name)]
        raise _mistake(
            spec,
            f"made a {type(environment).__name__} without {', '.join(missing)}",
            "the methods of edge_node.environments.Environment",
        )
    return environment


def _from_module(spec: EnvironmentSpec) -> Any:
    module_name, _, attribute = spec.factory.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # importing a plug-in runs its code
        raise _mistake(
            spec, f"cannot be imported ({type(error).__name__}: {error})", "a module on the Python path"
        ) from error
    if not hasattr(module, attribute):
        raise _mistake(spec, f"has no {attribute!r}", f"a class of {module_name}")
    return getattr(module, attribute)


def _from_entry_point(spec: EnvironmentSpec) -> Any:
    found = {point.name: point for point in entry_points(group=GROUP)}
    if spec.factory not in found:
        known = ", ".join(sorted(found)) or "none is installed"
        raise _mistake(spec, "is not an installed entry point", f"module:Class, or one of the group {GROUP} ({known})")
    try:
        return found[spec.factory].load()
    except Exception as error:  # importing a plug-in runs its code
        raise _mistake(
            spec, f"cannot be imported ({type(error).__name__}: {error})", "a working entry point"
        ) from error


def _mistake(spec: EnvironmentSpec, found: str, expected: str) -> SettingsError:
    return SettingsError(
        f"Environment {spec.name!r}: factory {spec.factory!r} {found}; expected {expected}. Correct EDGE_ENVIRONMENTS."
    )
