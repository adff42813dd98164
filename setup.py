"""Builds the wheel and the editable install; the compiling is in build_tools/native.py."""

import os
import sys

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # build front ends do not add it

from build_tools import native


class BuildNative(build_ext):
    """Hands the whole job to ninja: setuptools only says where the binaries go."""

    def run(self):
        try:
            native.build(native.ROOT if self.in_place() else native.Path(self.build_lib))
        except native.BuildError as error:
            raise SystemExit(f"error: {error}") from None

    def in_place(self):
        return bool(self.inplace or getattr(self, "editable_mode", False))

    def get_outputs(self):
        built = [os.path.join(self.build_lib, name) for name in (*native.BINARIES, native.CUDA_LIBRARY)]
        return [file for file in built if os.path.exists(file)]

    def get_output_mapping(self):
        return {}

    def get_source_files(self):
        files = [file for kind in ("*.h", "*.cpp", "*.cu") for file in native.SOURCES.rglob(kind)]
        return [str(file.relative_to(native.ROOT)) for file in files]


setup(
    # Named so that the wheel is marked as binary; its sources are ninja's business.
    ext_modules=[Extension("flash_attn_ext._C", sources=[])],
    cmdclass={"build_ext": BuildNative},
)
