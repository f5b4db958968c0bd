"""edge_node/vllm_arguments.py against the parser of the installed vLLM."""

from __future__ import annotations

import argparse
import contextlib
import io
from typing import Any

import pytest

from edge_node.vllm_arguments import REFUSED, mistakes


@pytest.fixture(scope="module")
def parser() -> Any:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    return make_arg_parser(FlexibleArgumentParser())


def test_every_refused_name_is_one_of_vllm(parser: argparse.ArgumentParser) -> None:
    assert set(REFUSED) - set(parser._option_string_actions) == {"--"}


def test_every_other_name_of_vllm_may_be_used(parser: argparse.ArgumentParser) -> None:
    for name in parser._option_string_actions:
        assert bool(mistakes([name])) == (name in REFUSED), name


def test_an_argument_is_refused_under_each_of_its_names(parser: argparse.ArgumentParser) -> None:
    for name in set(REFUSED) - {"--"}:
        others = parser._option_string_actions[name].option_strings
        assert [
            other for other in others if other not in REFUSED and not other.startswith("--no-")
        ] == []


def test_an_abbreviation_that_vllm_takes_for_a_refused_name_is_refused(
    parser: argparse.ArgumentParser,
) -> None:
    for name in set(REFUSED) - {"--"}:
        for length in range(2 + name.startswith("--"), len(name)):
            with (
                contextlib.redirect_stderr(io.StringIO()),
                contextlib.suppress(SystemExit),
            ):  # ambiguous
                found = parser._parse_optional(name[:length])
                if found is not None and found[0] is parser._option_string_actions[name]:
                    assert mistakes([name[:length]]), name[:length]


def test_our_middleware_is_outside_an_operators_and_access_outside_of_all(parser: Any) -> None:
    from fastapi import FastAPI
    from vllm.entrypoints.serve.middleware.register import init_entrypoints_middleware

    from edge_node.serving.command import MIDDLEWARE

    arguments = [
        part
        for name in ("tests.fakes.endpoint.Outside", *MIDDLEWARE)
        for part in ("--middleware", name)
    ]
    app = FastAPI()
    init_entrypoints_middleware(parser.parse_args(arguments), app, ("generate",))
    names = [str(getattr(entry.cls, "__name__", "")) for entry in app.user_middleware]
    assert names[:3] == ["AccessMiddleware", "LorikeetMiddleware", "Outside"]
