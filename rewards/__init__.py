"""What a text is worth: judges, diversity, elimination rules, and their composition."""

from ..llm_backends.parts import register_kind, register_part
from .base import FunctionReward, NonFiniteRewardError, Reward, Sample, Score, score_with_retries
from .compose import WeightedSum
from .diversity import DiversityReward
from .elimination import EliminationReward, JudgedElimination, eliminated_by
from .ground_truth import GroundTruth, LabelMatch, RegressionReward, SpanReward, parse_label, parse_number
from .judge import EqualityJudge
from .pairwise import Comparison, Pair, PairwiseJudge, compare
from .ranking import Ranking, RankingJudge, RankingQuestion, rank
from .rouge_gate import RougeGate, RougePool, rouge_l
from .rubric import Grades, Rubric, RubricJudge, grade

__all__ = [
    "Comparison",
    "DiversityReward",
    "EliminationReward",
    "EqualityJudge",
    "FunctionReward",
    "Grades",
    "GroundTruth",
    "JudgedElimination",
    "LabelMatch",
    "NonFiniteRewardError",
    "Pair",
    "PairwiseJudge",
    "Ranking",
    "RankingJudge",
    "RankingQuestion",
    "RegressionReward",
    "Reward",
    "RougeGate",
    "RougePool",
    "Rubric",
    "RubricJudge",
    "Sample",
    "Score",
    "SpanReward",
    "WeightedSum",
    "compare",
    "eliminated_by",
    "grade",
    "parse_label",
    "parse_number",
    "rank",
    "rouge_l",
    "score_with_retries",
]

register_kind("reward", Reward, FunctionReward)
register_part("reward", "judge", "instructgym.rewards.judge:EqualityJudge")
register_part("reward", "pairwise-judge", "instructgym.rewards.pairwise:PairwiseJudge")
register_part("reward", "ranking-judge", "instructgym.rewards.ranking:RankingJudge")
register_part("reward", "rubric-judge", "instructgym.rewards.rubric:RubricJudge")
register_part("reward", "diversity", "instructgym.rewards.diversity:DiversityReward")
register_part("reward", "elimination", "instructgym.rewards.elimination:EliminationReward")
register_part("reward", "judged-elimination", "instructgym.rewards.elimination:JudgedElimination")
register_part("reward", "weighted-sum", "instructgym.rewards.compose:WeightedSum")
register_part("reward", "ground-truth", "instructgym.rewards.ground_truth:GroundTruth")
register_part("reward", "label-match", "instructgym.rewards.ground_truth:LabelMatch")
register_part("reward", "regression", "instructgym.rewards.ground_truth:RegressionReward")
register_part("reward", "span", "instructgym.rewards.ground_truth:SpanReward")
