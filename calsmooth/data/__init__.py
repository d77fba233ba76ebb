"""Instruction data: rows from a file or the hub -> conversations -> token ids and labels.

`load_examples` does all of it; `load_example_set` also says what was dropped and how the rows were read.
"""

from typing import TYPE_CHECKING, Any

__all__ = ["IGNORED", "Example", "ExampleSet", "load_example_set", "load_examples"]

if TYPE_CHECKING:
    from calsmooth.data.examples import IGNORED, Example, ExampleSet, load_example_set, load_examples


def __getattr__(name: str) -> Any:
    if name in __all__:
        from calsmooth.data import examples

        return getattr(examples, name)
    raise AttributeError(f"module 'calsmooth.data' has no attribute {name!r}")
