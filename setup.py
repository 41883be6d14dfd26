"""Maps the top-level folders `policies/` and `kernels/` into the package `inference_shardformer`."""

from setuptools import find_packages, setup

PACKAGE_DIRS = {
    "inference_shardformer": "inference_shardformer",
    "inference_shardformer.policies": "policies",
    "inference_shardformer.kernels": "kernels",
}


def _packages() -> list[str]:
    """Every package under the three mapped folders, by its import name."""
    names: list[str] = []
    for package, folder in PACKAGE_DIRS.items():
        names.append(package)
        names.extend(f"{package}.{name}" for name in find_packages(folder))
    return sorted(set(names))


setup(package_dir=PACKAGE_DIRS, packages=_packages())
