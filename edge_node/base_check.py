"""`python -m edge_node.base_check DIRECTORY`: the modules that checkpoint, PEFT and vLLM know.

In: a base model directory. Out: one line of JSON, `{"modules": [...]}` or `{"problem": "..."}`. A
process of its own, because it loads torch and vLLM and sets up vLLM's global state; no weight is
read.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from protos.base import BaseModelError, Layout, read_layout


def common_modules(path: Path) -> list[str]:
    """Modules that can be trained, merged and served.

    Raises BaseModelError when there is none, with the reason.
    """
    from edge_node.learning.text_model import trained_modules
    from edge_node.serving.lora_modules import served_modules

    layout = read_layout(path)
    try:
        trained = trained_modules(path)
    except (ValueError, KeyError, ImportError, OSError, AttributeError) as error:
        raise BaseModelError(f"transformers cannot load it: {_first_line(error)}") from error
    try:
        served = served_modules(path, layout)
    except BaseModelError:
        raise
    except (
        Exception
    ) as error:  # whatever vLLM raises for a model that it cannot build; it would not start either
        raise BaseModelError(f"vLLM cannot build it: {_first_line(error)}") from error
    common = [
        name for name, shape in layout.module_shapes.items()
        if name in served and trained.get(layout.text_name(name)) == shape
    ]  # fmt: skip
    if not common:
        raise BaseModelError(_nothing_common(layout, trained, served))
    return common


def _nothing_common(layout: Layout, trained: dict[str, tuple[int, int]], served: set[str]) -> str:
    name = min(layout.module_shapes)
    return (
        f"none of its {len(layout.module_shapes)} linear modules is known to transformers and to "
        f"vLLM. The checkpoint has {name} {layout.module_shapes[name]}; transformers has "
        f"{min(trained, default='none')}, and vLLM knows {len(served)} of them"
    )


def _first_line(error: Exception) -> str:
    """The telling part of a message: pydantic puts it in the second line, after "Value error,"."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = next(
        (line for line in lines if line.startswith("Value error, ")), lines[0] if lines else ""
    )
    return f"{type(error).__name__}: {said.removeprefix('Value error, ').partition(' [type=')[0]}"[
        :400
    ]


def main() -> int:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM logs to standard output
    try:
        answer: dict[str, object] = {"modules": common_modules(Path(sys.argv[1]))}
    except BaseModelError as error:
        answer = {"problem": str(error)}
    print(json.dumps(answer), file=answers, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
