"""The inputs that sparsec makes up for a model that came without any."""

from types import SimpleNamespace

import pytest

from sparsec.compiler.runtime import random_feeds

Shape = list[int | str | None]


def session(**inputs: Shape) -> SimpleNamespace:
    values = [SimpleNamespace(name=name, shape=shape, type="tensor(float)") for name, shape in inputs.items()]
    return SimpleNamespace(get_inputs=lambda: values)


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        # A recurrent state is [layers, batch, hidden], whether or not its batch has the name of the others'.
        ({"audio": [None, None], "state": [2, None, 64]}, {"audio": (3, 7), "state": (2, 3, 64)}),
        ({"x": ["batch", "time"], "state": [2, "batch", 64]}, {"x": (3, 7), "state": (2, 3, 64)}),
        # Without a batch anywhere the dynamic dimensions are sizes.
        ({"image": [1, 3, None, None]}, {"image": (1, 3, 7, 7)}),
        # A size that was given wins.
        ({"x": ["batch", "time"], "state": [2, "time", 4]}, {"x": (3, 7), "state": (2, 7, 4)}),
    ],
)
def test_batch_of_recurrent_states(inputs: dict[str, Shape], expected: dict[str, tuple[int, ...]]) -> None:
    given = {"time": 7} if "time" in str(inputs) else {}
    feeds = random_feeds(session(**inputs), batch=3, dims=given, seed=0, other=7)
    assert {name: array.shape for name, array in feeds.items()} == expected
