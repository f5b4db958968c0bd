"""Why vLLM did not start, read from what vLLM 0.32 really printed (shortened; `vllm_output/`)."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_node.serving.failure import MAX_REASON, raised_at, startup_reason

OUTPUT = Path(__file__).parent / "vllm_output"
REASONS = {
    "unknown_argument": "unrecognized arguments: --no-such-argument",
    "bad_choice": "argument --dtype: invalid choice: 'float99' (choose from",
    "too_long": (
        "ValidationError: User-specified max_model_len (100000000) is greater than the derived"
    ),
    "architecture": (
        "ValidationError: Model architectures ['NoSuchModel'] are not supported for now."
    ),
    "adapter_slots": (
        "ValidationError: max_num_batched_tokens Input should be greater than or equal to 1 "
        "max_num_seqs Input"
    ),
    "kv_too_small": "ValueError: No available memory for the cache blocks.",
    "truncated": (
        "SafetensorError: Error while deserializing header: incomplete metadata, "
        "file not fully covered"
    ),
    "shapes": (
        "RuntimeError: start (0) + length (256) exceeds dimension size (128). (parameter.py:218)"
    ),
    "no_tokenizer": (
        "ValueError: Couldn't instantiate the backend tokenizer from one of: "
        "(1) a `tokenizers` library"
    ),
    "no_template": (
        "VLLMValidationError: The supplied chat template string (/no/such/template.jinja) "
        "appears path-like"
    ),
    "no_middleware": "ModuleNotFoundError: No module named 'no'",
    "no_key": "FileNotFoundError: [Errno 2] No such file or directory (config.py:131)",
    "bad_log_config": (
        "RuntimeError: ('Could not load logging config. File does not exist: %s', "
        "'/no/such/file.json')"
    ),
    "mem_small": "MemoryError (dataclasses.py:433)",
    "kill_core": (
        "RuntimeError: Engine core initialization failed. See root cause above. "
        "Failed core proc(s): {'EngineCore': -9}"
    ),
    "kv_mp": "RuntimeError: Engine core initialization failed. See root cause above.",
}
ULIMIT = (
    "can cause fd limit errors like `OSError: [Errno 24] Too many open files`. "
    "Consider increasing with ulimit -n"
)


@pytest.mark.parametrize("name", REASONS)
def test_the_reason_is_the_one_that_ended_it(name: str) -> None:
    reason = startup_reason((OUTPUT / f"{name}.txt").read_text())
    assert reason.startswith(REASONS[name])
    assert len(reason) <= MAX_REASON
    assert "ulimit" not in reason
    assert "For further information" not in reason


@pytest.mark.parametrize("name", ["good", "good_off"])
def test_a_vllm_that_started_gives_no_reason(name: str) -> None:
    assert startup_reason((OUTPUT / f"{name}.txt").read_text()) == ""


@pytest.mark.parametrize(
    "prefix", ["(APIServer pid=7) WARNING 11-26 19:12:43 [system_utils.py:255] Found ulimit, ", ""]
)
def test_a_warning_is_never_the_reason(prefix: str) -> None:
    """Without vLLM's own format (VLLM_CONFIGURE_LOGGING=0) too."""
    assert "ulimit" not in startup_reason(
        f"Traceback (most recent call last):\n  x\nValueError: real\n{prefix}{ULIMIT}\n"
    )


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", ""),
        (
            "/usr/bin/python: No module named vllm.entrypoints\n",
            "/usr/bin/python: No module named vllm.entrypoints",
        ),
        (
            "INFO:     Started\nERROR:    [Errno 98] address already in use\n",
            "[Errno 98] address already in use",
        ),
        ("INFO:     Waiting for application startup.\n", ""),
        (
            "Fatal Python error: Segmentation fault\n\nThread 0x1 (most recent call first):\n",
            "Fatal Python error: Segmentation fault",
        ),
        (
            "\x1b[31mTraceback (most recent call last):\x1b[0m\n  frame\nOSError: no disk\n",
            "OSError: no disk ()",
        ),
        (
            "Traceback (most recent call last):\n  x\nImportError: caught\n"
            "usage: entry.py [-h]\nentry.py: error: bad\n",
            "bad",
        ),
        (
            "terminate called after throwing an instance of 'std::bad_alloc'\n"
            "Traceback (most recent call last):\n  x\n"
            "RuntimeError: Failed core proc(s): {'EngineCore': -6}\n",
            "terminate called after throwing an instance of 'std::bad_alloc'",
        ),
        (
            "  + Exception Group Traceback (most recent call last):\n"
            '  |   File "a.py", line 1, in f\n'
            "  | ExceptionGroup: unhandled errors in a TaskGroup (1 sub-exception)\n"
            "  +-+---------------- 1 ----------------\n"
            "    | Traceback (most recent call last):\n"
            '    |   File "b.py", line 2, in g\n'
            "    | ValueError: the cause\n"
            "    +------------------------------------\n",
            "ValueError: the cause (b.py:2)",
        ),
        (
            "Traceback (most recent call last):\n  x\n"
            "OSError: the real one, which is long enough to stand without a place here\n"
            "Exception ignored in: <function A.__del__>\n"
            "Traceback (most recent call last):\n  x\nAttributeError: noise\n"
            "Traceback (most recent call last):\n  x\nasyncio.exceptions.CancelledError\n",
            "OSError: the real one, which is long enough to stand without a place here",
        ),
    ],
)
def test_other_ends(text: str, reason: str) -> None:
    assert startup_reason(text) == reason


def test_what_a_serving_vllm_ended_of_is_told_without_its_words() -> None:
    text = (
        "Traceback (most recent call last):\n"
        '  File "/x/engine.py", line 7, in step\n'
        "ValueError: bad prompt: my secret\n"
    )
    assert raised_at(text) == "ValueError (engine.py:7)"
    assert raised_at("nothing") == ""
