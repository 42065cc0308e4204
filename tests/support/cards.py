"""What the snippets of a model card do."""

from typing import Any


def run_snippets(text: str) -> None:
    """Run them as pasted: the first prints a continuation, the second loads the model at another sparsity."""
    first, second = (part.split("```")[0] for part in text.split("```python\n")[1:])
    printed: list[str] = []
    exec(first, {"print": printed.append})
    assert len(printed) == 1
    assert "Once upon a time" in printed[0]
    scope: dict[str, Any] = {}
    exec(second, scope)
    assert scope["model"].config.quantization_config.sparsity == 0.25
