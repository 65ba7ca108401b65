"""A scripted backend that bootstraps tasks: numbered lists, task types and instances, good ones and bad ones."""

import re

from instructgym.llm_backends import ScriptedBackend, request_seed

WORDS = "tides rain snow wind hail fog dew frost heat mist salt iron moss clay wool silk rope sail oar mast".split()


def sentence(seed, number):
    picks = [WORDS[request_seed(seed, number, i) % len(WORDS)] for i in range(5)]
    return f"Explain {' '.join(picks)} to {WORDS[seed % len(WORDS)]}."


def reply(prompt, sampling):
    last = prompt.split("\n\n")[-1]
    if re.search(r"\n9\.$", prompt):
        items = [sentence(sampling.seed, i) for i in range(4)]
        items[1] = "Sing now."  # too short
        items[2] = "Draw " + items[2]  # a blocked word
        return " " + "\n".join(items[:1] + [f"{10 + i}. {item}" for i, item in enumerate(items[1:])])
    if last.endswith("Classification:"):
        return " Yes" if len(last) % 3 == 0 else " No"
    if last.endswith("Class label:"):
        return " calm\nInput: a flat sea\nClass label: rough\nInput: high waves\nClass label: calm\nInput: a flat sea"
    if "fog" in last:
        return "Input: a day\nOutput: one\nInput: a day\nOutput: two"  # a contradiction
    return (
        f"Example 1\nInput: {len(last)} words\nOutput: done\nExample 2\nInput: none\nOutput:\nExample 3\nOutput: done"
    )


def bootstrapping(latency=0.0):
    return ScriptedBackend(reply=reply, latency=latency)
