"""Rewards and rankers: judges, learned models, diversity, elimination rules, ground truth, and weighted sums of these.

Read ``base.py`` first: it defines :class:`~instructgym.rewards.base.Reward`, which scores a batch of samples.
``__init__.pyi`` lists the names that can be imported from here; each is loaded on first use, so a reward that only
counts words does not import torch. The tables below hold the ids that ``reward=`` and ``ranker=`` take.
"""

import lazy_loader

from ..llm_backends.parts import register_kind, register_parts

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

register_kind("reward", "instructgym.rewards.base:Reward", "instructgym.rewards.base:FunctionReward")
register_parts(
    "reward",
    {
        "judge": "instructgym.rewards.judges.verdict:EqualityJudge",
        "pairwise-judge": "instructgym.rewards.judges.pairwise:PairwiseJudge",
        "scored-comparison": "instructgym.rewards.judges.pairwise:ScoredComparison",
        "ranking-judge": "instructgym.rewards.judges.ranking:RankingJudge",
        "rank": "instructgym.rewards.rankers.base:RankReward",
        "rubric-judge": "instructgym.rewards.judges.rubric:RubricJudge",
        "diversity": "instructgym.rewards.texts.diversity:DiversityReward",
        "elimination": "instructgym.rewards.elimination:EliminationReward",
        "judged-elimination": "instructgym.rewards.elimination:JudgedElimination",
        "weighted-sum": "instructgym.rewards.compose:WeightedSum",
        "ground-truth": "instructgym.rewards.ground_truth:GroundTruth",
        "label-match": "instructgym.rewards.ground_truth:LabelMatch",
        "regression": "instructgym.rewards.ground_truth:RegressionReward",
        "span": "instructgym.rewards.ground_truth:SpanReward",
        "token-reward": "instructgym.rewards.learned.token_reward:TokenReward",
        "sequence-reward": "instructgym.rewards.learned.token_reward:SequenceReward",
        "quality": "instructgym.rewards.quality.linear:LinearReward",
        "likelihood-ratio": "instructgym.rewards.quality.likelihood:LikelihoodRatio",
        "fluency": "instructgym.rewards.quality.likelihood:Fluency",
        "boolean-qa": "instructgym.rewards.quality.scorers:BooleanQA",
        "output-length": "instructgym.rewards.quality.scorers:OutputLength",
        "neighbour-distance": "instructgym.rewards.quality.scorers:NeighbourDistance",
        "unieval": "instructgym.rewards.quality.hub_models:UniEval",
        "hub-reward-model": "instructgym.rewards.quality.hub_models:HubRewardModel",
        "task-gain": "instructgym.rewards.prompt_scoring.rewards:TaskGain",
        "hinted-response": "instructgym.rewards.prompt_scoring.rewards:HintedResponse",
        "task": "instructgym.rewards.prompt_scoring.rewards:TaskReward",
        "vader": "instructgym.rewards.texts.sentiment:VaderSentiment",
        "reviews": "instructgym.rewards.texts.sentiment:ReviewClassifier",
    },
)

register_kind("ranker", "instructgym.rewards.rankers.base:Ranker", "instructgym.rewards.rankers.base:FunctionRanker")
register_parts(
    "ranker",
    {
        "probabilistic": "instructgym.rewards.rankers.base:ProbabilisticRanker",
        "contextual": "instructgym.rewards.rankers.contextual:ContextualRanker",
        "pairwise": "instructgym.rewards.rankers.pairwise:PairwiseRanker",
        "ground-truth": "instructgym.rewards.rankers.base:GroundTruthRanker",
    },
)
