"""Maps `policies/` and `kernels/` into the package `inference_shardformer`, and builds the optional native library."""

import importlib.util
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

PACKAGE_DIRS = {
    "inference_shardformer": "inference_shardformer",
    "inference_shardformer.policies": "policies",
    "inference_shardformer.kernels": "kernels",
}
NATIVE = Path("kernels/cpu")


def _packages() -> list[str]:
    """Every package under the three mapped folders, by its import name."""
    names: list[str] = []
    for package, folder in PACKAGE_DIRS.items():
        names.append(package)
        names.extend(f"{package}.{name}" for name in find_packages(folder))
    return sorted(set(names))


def _builder():
    """The module that knows how to build the library; it is found by its path, for nothing is installed yet."""
    spec = importlib.util.spec_from_file_location("_native_build", NATIVE / "build.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


class BuildNative(build_ext):
    """Builds the library for every instruction set at once. A failure is recorded for `doctor`, and is no failure."""

    def run(self) -> None:
        """Build into the source tree for an editable install, else into the wheel."""
        builder = _builder()
        record = builder.build(self._folder(), work=Path(self.build_temp).resolve() / "native")
        if record.error:
            self.warn(f"the native CPU kernels are left out: {record.error}")

    def get_outputs(self) -> list[str]:
        """The files of `_folder` that belong to the installation."""
        builder = _builder()
        return [str(path) for name in (builder.LIBRARY, builder.RECORD) if (path := self._folder() / name).exists()]

    def get_output_mapping(self) -> dict[str, str]:
        """An editable install finds the library where it was built."""
        return {}

    def _folder(self) -> Path:
        if self.inplace or self.editable_mode:
            return NATIVE.resolve()
        return Path(self.build_lib) / "inference_shardformer" / NATIVE


class PlatformWheel(bdist_wheel):
    """The library is made for a machine and knows nothing of Python: one wheel serves every version."""

    def get_tag(self) -> tuple[str, str, str]:
        """The wheel's tag."""
        return "py3", "none", super().get_tag()[2]


def _sources(pattern: str) -> list[str]:
    return sorted(str(path) for path in NATIVE.glob(pattern))


setup(
    package_dir=PACKAGE_DIRS,
    packages=_packages(),
    ext_modules=[
        Extension(
            "inference_shardformer.kernels.cpu._native", sources=_sources("src/*.cpp"), depends=_sources("src/*.h")
        )
    ],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": PlatformWheel},
)
