"""YAML as plain data, read strictly."""

from typing import Any

import yaml

_MERGE = "tag:yaml.org,2002:merge"  # <<, which may stand more than once


def load_yaml(text: str) -> Any:
    """What a text of YAML says. Raises yaml.YAMLError for all that is wrong, a key that stands twice in a mapping too:
    PyYAML would take the last one without a word, and raise other errors for dates that don't exist or deep nesting."""
    try:
        return yaml.load(text, Loader=_Loader)
    except (ValueError, RecursionError) as error:
        raise yaml.YAMLError(str(error)) from error


class _Loader(yaml.SafeLoader):
    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        """See yaml.composer.Composer."""
        node = super().compose_mapping_node(anchor)
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != _MERGE:
                if (key.tag, key.value) in seen:
                    raise yaml.composer.ComposerError(None, None, f"key {key.value!r} stands twice", key.start_mark)
                seen.add((key.tag, key.value))
        return node
