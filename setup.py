"""Build of the package. Settings are in pyproject.toml; build_native.py and build_cuda.py compile csrc/."""

import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))  # an isolated build does not have the project on its path

import build_cuda  # noqa: E402
import build_native  # noqa: E402

NATIVE = Path("mc_kernels") / "_native"


class BuildNative(build_ext):
    """Libraries and their extensions into mc_kernels/_native: of the source tree (editable, --inplace) or the wheel."""

    def run(self) -> None:
        folder = (HERE if self.inplace else Path(self.build_lib)) / NATIVE
        self.built = build_native.build_or_explain(folder) + build_cuda.build_or_explain(folder)

    def get_outputs(self) -> list[str]:
        return [str(p) for p in getattr(self, "built", [])]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


# The extension's name makes the wheel one of this platform; its sources are build_native.py's business.
setup(ext_modules=[Extension("mc_kernels._native._C", sources=[])], cmdclass={"build_ext": BuildNative})
