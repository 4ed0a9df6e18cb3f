"""What pyproject.toml cannot say: the folder configs/ is installed as dpojax.configs."""

from setuptools import find_namespace_packages, setup

setup(
    packages=[*find_namespace_packages(include=["dpojax*"]), "dpojax.configs"],
    package_dir={"dpojax.configs": "configs"},
)
