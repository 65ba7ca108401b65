"""An annotator and an editor for text of a model with random weights, by which commands can be run in tests."""

from instructgym.rewards import FunctionReward


def annotator():
    """Shorter responses are better."""
    return FunctionReward(lambda samples: [-len(sample.response) / 10 for sample in samples])


def editor():
    """Cuts the last character off."""
    return lambda request: request.response[:-1] or None


def nothing():
    """Has no edits."""
    return lambda request: None
