"""What tests of token agents share: their logs without times, and a run that stops, is saved and goes on elsewhere."""

import torch
from stable_baselines3.common.logger import KVWriter, Logger


class Rows(KVWriter):
    """Keeps what is logged, times aside."""

    def __init__(self):
        self.rows = []

    def write(self, key_values, key_excluded, step=0):
        self.rows.append({k: float(key_values[k]) for k in sorted(key_values) if not k.startswith("time/")})

    def close(self):
        pass


def logged(agent):
    agent.set_logger(Logger(folder=None, output_formats=[writer := Rows()]))
    return agent, writer.rows


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


def undisturbed_and_restored(start, folder, steps, stop):
    """A run to its end, and the same one that stopped after some updates and went on in an agent of another seed.

    Args:
        start: gives an agent and what it logs, by seed.
        folder: for the checkpoint.
        steps: of the whole run.
        stop: updates before the checkpoint.
    """
    (whole, expected), (first, seen) = start(0), start(0)
    torch.manual_seed(0)
    whole.learn(steps)
    torch.manual_seed(0)
    first.learn(steps, lambda agent: agent.updates < stop)
    assert first.updates == stop < whole.updates - 1
    first.save(folder)
    torch.manual_seed(99)
    second, more = start(5)
    second.restore(folder)
    second.learn(steps)
    assert repr(seen + more) == repr(expected)
    return whole, second
