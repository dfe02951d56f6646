"""`python -m mc_kernels`: what a C or C++ build needs to know of this package. Imports no torch.

cc program.c $(python -m mc_kernels --cflags --libs)
"""

from __future__ import annotations

import argparse
import shlex
import sys

from . import extension


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m mc_kernels", description="Flags and folders for C and C++ programs that call the kernels."
    )
    for name, what in (
        ("--cflags", "flags that find the header, for the compiler"),
        ("--libs", "flags that find the library, for the linker and for the program when it runs"),
        ("--includedir", "the folder of mc_kernels.h"),
        ("--libdir", "the folder of the library"),
        ("--pkgconfigdir", "the folder of mc_kernels.pc, for PKG_CONFIG_PATH"),
        ("--version", "of the library"),
    ):
        parser.add_argument(name, action="store_true", help=what)
    asked = parser.parse_args()
    if not any(vars(asked).values()):
        parser.print_help()
        sys.exit(2)
    if reason := extension.available():
        sys.exit(f"mc_kernels: {reason}")
    folder = extension.FOLDER.resolve()
    flags = []
    if asked.cflags:
        flags += [f"-I{folder}"]
    if asked.libs:
        flags += [f"-L{folder}", f"-Wl,-rpath,{folder}", "-lmc_kernels"]
    lines = [shlex.join(flags)] if flags else []
    lines += [str(folder)] * (asked.includedir + asked.libdir)
    lines += [str(folder / "pkgconfig")] * asked.pkgconfigdir
    lines += [extension.library().version()] * asked.version
    print("\n".join(lines))


if __name__ == "__main__":
    main()
