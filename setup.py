"""Builds the native core with CMake and links it into the one extension. Metadata is in pyproject.toml."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


def tool(name: str) -> str:
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent)])
    found = shutil.which(name, path=path)
    if found is None:
        raise RuntimeError(f"{name} is not on PATH; install it with: pip install {name}")
    return found


class BuildNative(build_ext):
    """cffi writes the C source of the extension, CMake builds the core, and then both are linked."""

    def run(self) -> None:
        with tempfile.TemporaryDirectory(prefix="tiermem-build-") as build:
            cmake = tool("cmake")
            configure = [cmake, "-S", str(ROOT), "-B", build, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}"]
            options = ["-DCMAKE_BUILD_TYPE=Release", "-DTIERMEM_TESTS=OFF", "-DTIERMEM_WERROR=OFF"]
            subprocess.run([*configure, *options], check=True)
            subprocess.run([cmake, "--build", build, "--target", "tiermem_core"], check=True)
            for extension in self.extensions:
                extension.include_dirs.append(str(ROOT / "native" / "include"))
                extension.extra_objects.append(str(Path(build, "libtiermem_core.a")))
                extension.extra_link_args.append("-pthread")
            self.force = True  # the core may have changed where the generated source has not
            super().run()


setup(
    cffi_modules=["native/ffi_build.py:ffibuilder"],
    cmdclass={"build_ext": BuildNative},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
