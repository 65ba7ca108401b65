"""An annotator and an editor for text of a model with random weights, by which commands can be run in tests."""

from instructgym.rewards import FunctionReward, Score


def annotator():
    """Shorter responses are better."""
    return FunctionReward(lambda samples: [-len(sample.response) / 10 for sample in samples])


def undecided():
    """The same, but without a verdict on responses whose length is a multiple of four."""

    def score(sample):
        length = len(sample.response)
        return Score.invalid("four") if length % 4 == 0 else Score(-length / 10)

    return FunctionReward(lambda samples: [score(sample) for sample in samples])


def editor():
    """Cuts the last character off."""
    return lambda request: request.response[:-1] or None


def nothing():
    """Has no edits."""
    return lambda request: None
