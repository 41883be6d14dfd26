"""Values written as text: how a variable, a flag and a YAML file read one."""

from __future__ import annotations

import re

import yaml


class ConfigYamlLoader(yaml.SafeLoader):
    """Safe YAML that also reads `1e-3` as a number, which YAML 1.1 takes for text."""


ConfigYamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def parse_scalar(text: str) -> object:
    """A value given as text: YAML's numbers, true and false; text that is no valid YAML stays text."""
    try:
        return yaml.load(text, Loader=ConfigYamlLoader)  # a SafeLoader
    except yaml.YAMLError:
        return text
