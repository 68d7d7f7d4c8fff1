"""YAML that may come from anybody: plain values only, and no more of them than the text is long.

No tags, no key twice; and aliases, which name a value again, may not multiply it: nine lines of them make a
billion values.
"""

from __future__ import annotations

from typing import Any

import yaml

MAX_VALUES = 100_000  # with each alias counted as what it stands for
MAX_DEPTH = 50
MAX_SCALAR_CHARACTERS = 10_000  # YAML has numbers in base 60, whose reading takes the square of their length


def load_yaml(text: str) -> Any:
    """The values in a text.

    Raises:
        yaml.YAMLError, ValueError: it is no YAML, or would take more than it should.
    """
    return yaml.load(text, Loader=_PlainLoader)


class _PlainLoader(yaml.SafeLoader):
    """Refuses a key that stands twice, of which YAML would silently take the last, and what grows."""

    def get_single_node(self) -> yaml.Node | None:
        try:
            node = super().get_single_node()
        except RecursionError:
            raise yaml.MarkedYAMLError(problem="it is nested too deeply") from None
        if node is not None:
            _count(node, 0, {})
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                continue  # a list as a key: refused below
            if key_node.value in seen:
                mark = key_node.start_mark
                raise yaml.MarkedYAMLError(problem=f"{key_node.value!r} stands twice", problem_mark=mark)
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


def _count(node: yaml.Node, depth: int, counted: dict[int, int]) -> int:
    """Values in a node, with those that aliases bring."""
    if isinstance(node, yaml.ScalarNode):
        if len(node.value) > MAX_SCALAR_CHARACTERS:
            raise yaml.MarkedYAMLError(problem="a value is too long", problem_mark=node.start_mark)
        return 1
    if depth > MAX_DEPTH:  # or a list in itself
        raise yaml.MarkedYAMLError(problem="it is nested too deeply", problem_mark=node.start_mark)
    if id(node) not in counted:
        members = node.value
        if isinstance(node, yaml.MappingNode):
            members = [member for pair in node.value for member in pair]
        counted[id(node)] = 1 + sum(_count(member, depth + 1, counted) for member in members)
        if counted[id(node)] > MAX_VALUES:
            problem = "it has too many values, with those that aliases bring"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
    return counted[id(node)]
