"""What a text is worth: judges, diversity, elimination rules, and their composition."""

from ..llm_backends.parts import register_kind, register_part
from .base import FunctionReward, NonFiniteRewardError, Reward, Sample, Score, score_with_retries
from .compose import WeightedSum
from .diversity import DiversityReward, RougePool, rouge_l
from .elimination import EliminationReward, JudgedElimination, eliminated_by
from .judge import EqualityJudge

__all__ = [
    "DiversityReward",
    "EliminationReward",
    "EqualityJudge",
    "FunctionReward",
    "JudgedElimination",
    "NonFiniteRewardError",
    "Reward",
    "RougePool",
    "Sample",
    "Score",
    "WeightedSum",
    "eliminated_by",
    "rouge_l",
    "score_with_retries",
]

register_kind("reward", Reward, FunctionReward)
register_part("reward", "judge", "instructgym.rewards.judge:EqualityJudge")
register_part("reward", "diversity", "instructgym.rewards.diversity:DiversityReward")
register_part("reward", "elimination", "instructgym.rewards.elimination:EliminationReward")
register_part("reward", "judged-elimination", "instructgym.rewards.elimination:JudgedElimination")
register_part("reward", "weighted-sum", "instructgym.rewards.compose:WeightedSum")
