"""What a text is worth: judges, diversity, elimination rules, and their composition."""

from ..llm_backends.parts import register_kind, register_part
from .base import FunctionReward, NonFiniteRewardError, Reward, Sample, Score, score_with_retries
from .compose import WeightedSum
from .diversity import DiversityReward, RougePool, rouge_l
from .elimination import EliminationReward, JudgedElimination, eliminated_by
from .ground_truth import GroundTruth, LabelMatch, RegressionReward, SpanReward, parse_label, parse_number
from .judge import EqualityJudge

__all__ = [
    "DiversityReward",
    "EliminationReward",
    "EqualityJudge",
    "FunctionReward",
    "GroundTruth",
    "JudgedElimination",
    "LabelMatch",
    "NonFiniteRewardError",
    "RegressionReward",
    "Reward",
    "RougePool",
    "Sample",
    "Score",
    "SpanReward",
    "WeightedSum",
    "eliminated_by",
    "parse_label",
    "parse_number",
    "rouge_l",
    "score_with_retries",
]

register_kind("reward", Reward, FunctionReward)
register_part("reward", "judge", "instructgym.rewards.judge:EqualityJudge")
register_part("reward", "diversity", "instructgym.rewards.diversity:DiversityReward")
register_part("reward", "elimination", "instructgym.rewards.elimination:EliminationReward")
register_part("reward", "judged-elimination", "instructgym.rewards.elimination:JudgedElimination")
register_part("reward", "weighted-sum", "instructgym.rewards.compose:WeightedSum")
register_part("reward", "ground-truth", "instructgym.rewards.ground_truth:GroundTruth")
register_part("reward", "label-match", "instructgym.rewards.ground_truth:LabelMatch")
register_part("reward", "regression", "instructgym.rewards.ground_truth:RegressionReward")
register_part("reward", "span", "instructgym.rewards.ground_truth:SpanReward")
