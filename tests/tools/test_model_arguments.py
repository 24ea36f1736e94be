"""Arguments of models are read from the command line as Python's literals, or as texts."""

import pytest

from densezoo.tools.model_arguments import read_model_arguments


def test_values_are_literals_with_tuples_for_lists_or_texts():
    words = ["num_regions=16", "depths=[1,[2,3]]", "topk=1,4,16", "dilations=coco", "scale=1e-2"]
    assert read_model_arguments([*words, "flag=True", "name=a=b"]) == dict(
        num_regions=16,
        depths=(1, (2, 3)),
        topk=(1, 4, 16),
        dilations="coco",
        scale=0.01,
        flag=True,
        name="a=b",
    )


@pytest.mark.parametrize(
    "words, message",
    [
        (["depths"], "KEY=VALUE"),
        (["a.b=1"], "KEY=VALUE"),
        (["=1"], "KEY=VALUE"),
        (["a=1", "a=2"], "has a twice"),
    ],
)
def test_other_words_are_refused(words, message):
    with pytest.raises(ValueError, match=message):
        read_model_arguments(words)
