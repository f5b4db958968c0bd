"""The private surface of vLLM that serving needs exists in this vLLM; no engine starts."""

from __future__ import annotations

import ast
import inspect
import os
import socket
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import vllm.model_executor.models
from vllm.model_executor.models import registry

from edge_node.base_model import check_base
from edge_node.errors import ServingError, SettingsError
from edge_node.serving import internals, vllm_entry
from edge_node.serving.command import MIDDLEWARE, serving_command
from edge_node.settings import BaseModelSettings, EdgeSettings
from lorikeet import parent
from protos.base import WITHOUT_LORA, BaseModelInfo
from protos.families import FAMILIES
from tests.fakes.base_models import make

pytestmark = pytest.mark.timeout(240)


def test_the_installed_vllm_keeps_the_contract() -> None:
    internals.check_contract()


def test_another_version_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm

    monkeypatch.setattr(vllm, "__version__", "0.33.1")
    with pytest.raises(ServingError, match=r"vLLM 0\.33\.1 is installed.*0\.32\.\*"):
        internals.check_contract()


def test_a_changed_surface_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    changed = {
        "vllm.lora.request": {"LoRARequest": ("lora_weights",), "Gone": ()},
        "vllm.absent": {"x": ()},
    }
    monkeypatch.setattr(internals, "SURFACE", changed)
    with pytest.raises(ServingError) as raised:
        internals.check_contract()
    for part in (
        "no parameter lora_weights",
        "vllm.lora.request.Gone is missing",
        "vllm.absent cannot be imported",
    ):
        assert part in str(raised.value)


def test_vllm_finds_both_plug_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.plugins import load_endpoint_plugins
    from vllm.plugins.endpoint_plugins.interface import EndpointPlugin

    monkeypatch.setenv("VLLM_PLUGINS", "lorikeet")
    (plugin,) = load_endpoint_plugins(("generate",))
    assert isinstance(plugin, EndpointPlugin)
    (guard,) = entry_points(group="vllm.general_plugins", name="lorikeet")
    assert callable(guard.load())


def test_vllm_takes_the_socket_that_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.entrypoints.launchers import launcher

    monkeypatch.setattr(launcher, "create_server_socket", launcher.create_server_socket)
    given = socket.create_server(("127.0.0.1", 0))
    port = given.getsockname()[1]
    vllm_entry.inherit(os.dup(given.fileno()))
    arguments = SimpleNamespace(
        tool_parser_plugin=None, reasoning_parser_plugin=None, uds=None, host="127.0.0.1",
        port=port, ssl_keyfile=None, ssl_certfile=None, enable_auto_tool_choice=False,
        structured_outputs_config=SimpleNamespace(reasoning_parser=None), model="m",
        model_tag=None, api_server_count=1, tool_call_parser=None,
    )  # fmt: skip
    monkeypatch.setattr(launcher, "validate_api_server_args", lambda _: None)
    monkeypatch.setattr(launcher, "log_non_default_args", lambda _: None)
    _, taken = launcher.setup_server(arguments, reuse_port=False)
    with taken, given:
        assert taken.getsockname() == given.getsockname()
        with socket.create_connection(("127.0.0.1", port)):
            taken.accept()[0].close()


def test_vllm_understands_our_command_line(tmp_path: Path) -> None:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    command = serving_command(EdgeSettings(), BaseModelInfo(tmp_path, "ab" * 32, {}), on_cpu=True)
    arguments = make_arg_parser(FlexibleArgumentParser()).parse_args(command[3:])
    validate_parsed_serve_args(arguments)
    assert arguments.served_model_name == ["base@abababab"]
    assert arguments.middleware == list(MIDDLEWARE)
    assert (arguments.api_server_count, arguments.enforce_eager, arguments.max_cpu_loras) == (
        1,
        True,
        32,
    )


def test_the_table_of_models_without_lora_is_vllms() -> None:
    """Read from vLLM's source: importing every model takes minutes."""
    models = Path(vllm.model_executor.models.__file__).parent
    bases: dict[str, set[str]] = {}
    for file in [*models.glob("*.py"), *models.parents[1].joinpath("models").rglob("*.py")]:
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.ClassDef):
                names = {
                    ast.unparse(base).partition("[")[0].rpartition(".")[2] for base in node.bases
                }
                bases.setdefault(node.name, set()).update(names)

    def has_lora(name: str) -> bool:
        return name == "SupportsLoRA" or any(
            has_lora(base) for base in bases.get(name, set()) - {name}
        )

    table = registry._TEXT_GENERATION_MODELS
    assert {name for name, (_, model) in table.items() if not has_lora(model)} == WITHOUT_LORA
    assert not WITHOUT_LORA & set(FAMILIES)


def test_a_node_asks_vllm_about_a_base(tmp_path: Path) -> None:
    """Both sides of edge_node/base_check.py, on a base that vLLM has no class for."""
    base = make(tmp_path / "base", architectures=["NovelForCausalLM"], model_type="novel")
    settings = EdgeSettings(data_dir=tmp_path, base=BaseModelSettings(path=base))
    with pytest.raises(
        SettingsError, match=r"does not work here: transformers cannot load it: .*novel"
    ):
        check_base(settings)


def test_vllm_names_the_adapter_of_a_request_and_404s_unknown_models() -> None:
    """The alias rests on this: `lora_requests` decides who is served and named in the answer."""
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels
    from vllm.entrypoints.serve.engine.serving import BaseServing
    from vllm.lora.request import LoRARequest

    source = inspect.getsource(BaseServing._check_model) + inspect.getsource(
        BaseServing._maybe_get_adapters
    )
    assert source.count("self.models.lora_requests") >= 3
    assert (
        OpenAIServingModels.model_name(None, LoRARequest("lorikeet@v1", 1, "/v1")) == "lorikeet@v1"
    )  # type: ignore[arg-type]
    assert LoRARequest("a", 1, "/a") == LoRARequest("a", 2, "/b"), (
        "equality is by name: one name, one version"
    )


async def test_the_engine_wrapper_calls_vllm_as_it_is() -> None:
    calls: list[Any] = []

    async def add_lora(request: Any) -> bool:
        calls.append((request.lora_name, request.lora_int_id, request.lora_path))
        return True

    async def remove_lora(number: int) -> bool:
        calls.append(number)
        return True

    models = SimpleNamespace(lora_requests={}, model_config=SimpleNamespace(max_model_len=8))
    client = SimpleNamespace(
        add_lora=add_lora, remove_lora=remove_lora, errored=False, generate=None
    )
    arguments: Any = SimpleNamespace(served_model_name=["base@abababab"], model="/nowhere")
    renderer = SimpleNamespace(get_tokenizer=lambda: SimpleNamespace(eos_token_id=2))
    online = SimpleNamespace(renderer=renderer, model_config=models.model_config)
    engine = internals.Engine(
        client, SimpleNamespace(openai_serving_models=models, online_renderer=online), arguments
    )
    assert engine.chat_format.renderer == "SimpleNamespace", "one that the learner does not know"
    await engine.load("lorikeet@v1", Path("/v1"))
    await engine.load("lorikeet@v2", Path("/v2"))
    assert list(models.lora_requests) == ["lorikeet@v1", "lorikeet@v2"]
    await engine.unload("lorikeet@v1")
    assert calls == [("lorikeet@v1", 1, "/v1"), ("lorikeet@v2", 2, "/v2"), 1]
    assert list(models.lora_requests) == ["lorikeet@v2"]


def test_a_launched_command_dies_with_its_parent() -> None:
    program = (
        "import os, subprocess, sys\n"
        f"launch = [sys.executable, '-S', '-E', {parent.__file__!r}, str(os.getpid())]\n"
        "child = subprocess.Popen([*launch, sys.executable, '-c',\n"
        "    'print(\"up\", flush=True); import time; time.sleep(60)'])\n"
        "print(child.pid, flush=True)\n"
        "import time; time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    lines = {process.stdout.readline().strip(), process.stdout.readline().strip()}
    assert "up" in lines
    process.kill()
    process.wait()
    # End of file: nobody holds the pipe any more, so the grandchild is gone as well.
    assert process.stdout.read() == ""


def test_a_launched_command_without_its_parent_does_not_start() -> None:
    done = subprocess.run(
        [sys.executable, parent.__file__, str(os.getppid()), "/bin/echo", "up"],
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, b"")
