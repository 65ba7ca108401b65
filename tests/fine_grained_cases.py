"""An annotator and an editor for text of a model with random weights, by which commands can be run in tests."""

from instructgym.rewards import FunctionReward, Score


def annotator():
    """Shorter responses are better."""
    return FunctionReward(lambda samples: [-len(sample.response) / 10 for sample in samples])


def undecided():
    """The same, but without a verdict on responses of an odd length."""
    return FunctionReward(
        lambda samples: [
            Score.invalid("odd") if len(sample.response) % 2 else Score(-len(sample.response) / 10)
            for sample in samples
        ]
    )


def editor():
    """Cuts the last character off."""
    return lambda request: request.response[:-1] or None


def nothing():
    """Has no edits."""
    return lambda request: None
