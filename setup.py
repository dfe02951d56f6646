"""Build of the package. Settings are in pyproject.toml; build_native.py compiles csrc/."""

import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))  # an isolated build does not have the project on its path

from build_native import build_or_explain  # noqa: E402

NATIVE = Path("mc_kernels") / "_native"


class BuildNative(build_ext):
    """The library and its extension into mc_kernels/_native: of the source tree (editable, --inplace) or the wheel."""

    def run(self) -> None:
        self.built = build_or_explain((HERE if self.inplace else Path(self.build_lib)) / NATIVE)

    def get_outputs(self) -> list[str]:
        return [str(p) for p in getattr(self, "built", [])]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


# The extension's name makes the wheel one of this platform; its sources are build_native.py's business.
setup(ext_modules=[Extension("mc_kernels._native._C", sources=[])], cmdclass={"build_ext": BuildNative})
